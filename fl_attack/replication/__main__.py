"""`python -m fl_attack.replication`, or `./scripts/replicate`: the paper's figures and a verdict on its claims."""

import argparse
import shlex
import sys
from pathlib import Path

from fl_attack.errors import InputError, RunError
from fl_attack.overrides import explain


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    command_line = argparse.ArgumentParser(
        "replicate", description="The paper's figures made anew, and a verdict on its claims."
    )
    command_line.add_argument(
        "--only", metavar="FIGURE", help="one figure: fig1, fig5, ..., selection, frequency, rounding"
    )
    command_line.add_argument("--quick", action="store_true", help="bundled digits, no download, under three minutes")
    command_line.add_argument("--data", type=Path, metavar="FOLDER", help="with MNIST and CIFAR-10 (default: data)")
    command_line.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the results (default: outputs/replication)"
    )
    command_line.add_argument("--so-far", action="store_true", help="report what is there, compute nothing")
    command_line.add_argument(
        "--docs", type=Path, metavar="FOLDER", help="also write the report as FOLDER/replication.md"
    )
    return command_line


def main(arguments: list[str]) -> int:
    """Run the command; gives the exit code: 0, 2 for bad input, 1 for a run that broke off, 130 after a signal."""
    options = parser().parse_args(arguments)
    try:
        from fl_attack.replication import pipeline, plan, report  # slow to import; --help does not need them

        todo = plan.make(options.quick, options.only, options.data)
        out = options.out or Path("outputs") / ("replication-quick" if options.quick else "replication")
        command = shlex.join(["./scripts/replicate", *arguments])
        written = pipeline.run(out, todo, command, options.so_far, options.only)
        if options.docs:
            report.publish(out, options.docs)
    except (InputError, RunError, OSError) as error:
        print(f"replicate: {explain(error)}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        print("replicate: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(written.read_text().split("## How it was done")[0])
    print(f"report in {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
