"""The command `fl-attack`: Hydra's overrides in, results and one table out."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_attack import __version__, launcher
from fl_attack.errors import InputError, Interrupted, RunError
from fl_attack.overrides import as_multirun, completed, conf_folder, explain

TRACEBACK = "HYDRA_FULL_ERROR"


def task(config: DictConfig) -> None:
    """Run one experiment and print its table; what Hydra calls, but for a multirun, which goes through `launcher`."""
    from fl_attack.config import settings_from  # takes seconds to import, with torch; help is printed before

    settings = settings_from(OmegaConf.to_container(config, resolve=True))
    from fl_attack import api, results  # and so do Ray and Flower; bad input is reported before

    print(results.table(api.execute(settings)))
    print(f"results in {settings.out}")


def main() -> None:
    """Run the command line.

    Exits with 0, 2 for bad input, 1 for a run that broke off, 130 after Ctrl-C, 143 after SIGTERM.
    """
    for name, mode in {"stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # closed by who started the program: there is nobody to tell
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the program ends
    if "--version" in sys.argv[1:]:
        print(f"fl-attack {__version__}")
        return
    if sys.argv[1:2] == ["report"]:
        from fl_attack import report

        sys.exit(report.main(sys.argv[2:]))
    wants_traceback = os.environ.get(TRACEBACK, "0") not in ("", "0")
    signal.signal(signal.SIGTERM, _terminated)
    os.environ[TRACEBACK] = "1"  # Hydra then hands its errors on instead of printing several lines itself

    def guarded(config: DictConfig) -> None:
        # SystemExit passes through Hydra, which would add lines of its own to any other exception of a job
        with _ending_in_a_line(wants_traceback):
            task(config)

    with _ending_in_a_line(wants_traceback):
        sys.argv[1:] = as_multirun(completed(sys.argv[1:]))
        launcher.register()
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(guarded)()


@contextmanager
def _ending_in_a_line(wants_traceback: bool) -> Iterator[None]:
    """A block whose errors (unless a traceback is wanted) and signals end the program with a line and an exit code."""
    try:
        yield
    except (InputError, RunError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        _exit(explain(error), 1 if isinstance(error, RunError) else 2)
    except Exception as error:
        if wants_traceback:
            raise
        _exit(f"{type(error).__name__}: {explain(error)} ({TRACEBACK}=1 shows where)", 1)
    except Interrupted as signalled:
        _exit(str(signalled) or "interrupted", signalled.code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _terminated(number: int, frame: object) -> None:
    """Ends the program as Ctrl-C does, so that what was measured is kept."""
    raise Interrupted("terminated", 128 + number)


def _exit(message: str, code: int) -> NoReturn:
    """Print a message on standard error and end the program with this exit code."""
    print(f"fl-attack: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
