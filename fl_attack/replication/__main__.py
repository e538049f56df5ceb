"""`python -m fl_attack.replication`, or `./scripts/replicate`: the paper's figures and a verdict on its claims."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_attack.errors import InputError, RunError
from fl_attack.overrides import explain


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "replicate", description="The paper's figures made anew, and a verdict on its claims."
    )
    made.add_argument("--only", metavar="FIGURE", help="one figure: fig1, fig5, ..., selection, frequency, rounding")
    made.add_argument("--quick", action="store_true", help="bundled digits, no download, under three minutes")
    made.add_argument("--data", type=Path, metavar="FOLDER", help="with MNIST and CIFAR-10 (default: data)")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: outputs/replication)")
    made.add_argument("--so-far", action="store_true", help="report what is there, compute nothing")
    made.add_argument("--docs", type=Path, metavar="FOLDER", help="also write the report as FOLDER/replication.md")
    return made


@contextmanager
def _parallel(here: bool) -> Iterator[None]:
    """Sweeps whose units run side by side, a processor for each; in this process where that is not worth the start."""
    import torch

    from fl_attack import federation

    if here or (os.cpu_count() or 1) == 1:
        yield
        return
    torch.set_num_threads(1)
    with federation.ray_session(None, verbose=False):
        yield


def run(options: argparse.Namespace, command: str) -> Path:
    """Compute what is not there yet, draw, and write the report; gives its file."""
    from fl_attack import sweep  # slow to import; help is told before
    from fl_attack.replication import figures, plan, reach, report
    from fl_attack.replication.findings import Result

    out = options.out or Path("outputs") / ("replication-quick" if options.quick else "replication")
    todo = plan.make(options.quick, options.only, options.data)
    (out / report.FIGURES).mkdir(parents=True, exist_ok=True)
    likely = [plan.cells(one, todo.epochs, 0.1) for one in todo.runs]  # as many as at the rates still to be chosen
    distinct = {plan.folder_of(out, made): len(made) for made in likely}
    rates: dict[str, float] = {}
    done: dict[Path, Result] = {}
    results, drawn, missing = [], [], []
    with _parallel(todo.quick or options.so_far), sweep.Progress(sum(distinct.values()), "replicate") as progress:
        for one in todo.runs:
            made = plan.cells(one, todo.epochs, rates.get(one.source.name))
            place = plan.folder_of(out, made)
            if options.so_far and not plan.is_there(place):
                missing.append(one)
                continue
            if place not in done:
                progress.bar.set_description(f"{one.preset}, {one.source.title}, {one.protocol}")
                cells = plan.compute(out, made, progress, "local" if todo.quick else "ray")
                done[place] = Result(one, cells, plan.seconds(place))
            results.append(Result(one, done[place].cells, done[place].seconds))
            if one.preset == "honest":
                best = rates[one.source.name] = plan.best_rate(done[place].cells)
                if options.only in (None, *plan.GRADIENTS) and one.source.binary:
                    drawn.append(reach.draw(out / report.FIGURES, one.source, best))
            elif one.preset in figures.FIGURES and one.protocol == plan.STEP:
                figures.draw(
                    out / report.FIGURES, place, one.preset, one.source.name, one.source.title, results[-1].cells
                )
                drawn.append(f"{one.preset}-{one.source.name}")
    written = report.write(out, todo, results, rates, drawn, missing, command)
    if options.docs:
        report.publish(out, options.docs)
    return written


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 for bad input, 1 for a run that broke off, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        written = run(options, shlex.join(["./scripts/replicate", *arguments]))
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
