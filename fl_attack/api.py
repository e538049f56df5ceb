"""The laboratory from Python: `run` and `sweep` take the keys of the command line, `load` what a command left."""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_attack.errors import InputError, Interrupted, RunError
from fl_attack.overrides import as_multirun, written
from fl_attack.result import Result

if TYPE_CHECKING:
    from fl_attack.config import Settings

__all__ = ["execute", "load", "run", "sweep"]


def run(*overrides: str, **keys: Any) -> Result:
    """Run one experiment.

    Parameters
    ----------
    *overrides : str
        As on the command line: ``"attack=greedy"``, ``"attack.budget=0.3"``.
    **keys
        The same with values of Python: ``rounds=50``, ``**{"attack.budget": 0.3}``. Without ``out`` the result is
        in memory only, and no folder is left behind.

    Returns
    -------
    Result
        Its `rounds`, `flips`, `summary`, `theta` or `state_dict`, and its unattacked twin as `baseline`.

    Raises
    ------
    InputError
        Before any work starts, with the line that the command prints.
    RunError
        Where the run can't go on, as when it diverges.
    Interrupted
        After Ctrl-C or SIGTERM, a KeyboardInterrupt that says what is kept: nothing without `out`.

    Examples
    --------
    >>> from fl_attack import run
    >>> result = run("engine=batched", rounds=5, **{"attack.budget": 0.5})
    >>> int(result.rounds["round"].max())
    5
    """
    from fl_attack.config import compose

    given = _written(overrides, keys)
    if as_multirun(given)[:1] == ["-m"]:
        raise InputError("experiments, and keys set together, are grids: use sweep(...), not run(...)")
    with _place(given) as (out, in_memory):
        settings = compose(*given, *out)
        with _kept_in_memory(in_memory, settings):
            execute(settings)
        return _of(Path(settings.out), in_memory)


def sweep(*overrides: str, grid: Mapping[str, Iterable[Any]] | None = None, **keys: Any) -> Result:
    """Run every combination of the values of a grid, together where they share minibatches.

    Parameters
    ----------
    *overrides : str
        As on the command line; ``"seed=0,1,2"`` or ``"experiment=harm"`` are grids too.
    grid : mapping of str to iterable
        Keys and their values: ``{"attack.budget": [0.1, 0.3], "seed": range(5)}``.
    **keys
        Settings that all cells share, with values of Python. Without ``out`` the result is in memory only.

    Returns
    -------
    Result
        Its `table` has a row for each cell.

    Raises
    ------
    InputError
        Before any work starts, with the line that the command prints.
    RunError
        Where all cells broke off, or the sweep can't go on.
    Interrupted
        After Ctrl-C or SIGTERM, a KeyboardInterrupt that says what is kept: nothing without `out`.
    """
    from fl_attack import launcher, multirun

    given = [*_written(overrides, keys), *(_choices(key, values) for key, values in (grid or {}).items())]
    as_multirun(given)
    with _place(given) as (out, in_memory):
        cells = launcher.grid(*given, *out)
        with _kept_in_memory(in_memory, cells[0].settings), _no_exit("sweep"):
            folder = multirun.run(cells)
        return _of(folder, in_memory)


def load(folder: str | Path) -> Result:
    """What a run left in its folder, finished or not, or a sweep that has its table.

    Parameters
    ----------
    folder : str or Path
        The ``out`` of a command, or of `run` and `sweep`.

    Returns
    -------
    Result
        It reads the files as they are asked for.

    Raises
    ------
    InputError
        Where the folder holds no result, or one that broke off before its table was written.
    """
    return Result.of_folder(Path(folder))


def execute(settings: "Settings") -> dict[str, dict[str, Any]]:
    """Run checked settings and leave the result in their `out`; gives the summaries, see `experiment.run`."""
    from fl_attack import experiment

    with _no_exit("run"):
        return experiment.run(settings)


@contextmanager
def _no_exit(what: str) -> Iterator[None]:
    """A block in which sys.exit, as a library or a user's file may call it, becomes a RunError that names `what`."""
    try:
        yield
    except SystemExit as error:
        raise RunError(f"something called sys.exit({error.code}) before the {what} was finished") from None


def _written(overrides: Iterable[str], keys: Mapping[str, Any]) -> list[str]:
    """Overrides, and keys written as overrides; InputError where one is no text, or an option of the command line."""
    for override in overrides:
        if not isinstance(override, str):
            raise InputError(f"{override!r} is not an override; write one as in 'rounds=50'")
        if override.startswith("-"):
            raise InputError(
                f"{override} is an option of the command line; here only keys are taken, as in 'rounds=50'"
            )
    return [*overrides, *itertools.starmap(written, keys.items())]


def _choices(key: str, values: Iterable[Any]) -> str:
    """The override that gives a key each of these values; InputError where they are none, or no list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"grid: {key}={values!r} is not a list of values; write [{values!r}]")
    found = [written(key, value).partition("=")[2] for value in values]
    if not found:
        raise InputError(f"grid: {key} has no values")
    return f"{key}={','.join(found)}"


@contextmanager
def _place(given: Iterable[str]) -> Iterator[tuple[list[str], bool]]:
    """The overrides to add to those given, and whether the result is in memory.

    It is in memory where those given name no `out`: those to add then name a folder that is removed after the block,
    and turn the report off unless `report` is given.
    """
    if any(one.lstrip("+").startswith("out=") for one in given):
        yield [], False
        return
    with tempfile.TemporaryDirectory(prefix="fl-attack-") as folder:
        shown = any(one.lstrip("+").startswith("report=") for one in given)
        yield [written("out", folder), *([] if shown else ["report=false"])], True


@contextmanager
def _kept_in_memory(in_memory: bool, settings: "Settings") -> Iterator[None]:
    """A block that, where the result is in memory, renders no figures and says after a signal that nothing is kept.

    InputError where a tracker would keep its files in a folder that goes with the block.
    """
    from fl_attack.plots import canvas

    if in_memory and "tensorboard" in settings.tracker:
        raise InputError("tracker=tensorboard leaves its files in out; give out=, a folder")
    try:
        with canvas.captured() if in_memory and not settings.tracker else nullcontext():
            yield
    except Interrupted as signalled:
        if not in_memory:
            raise
        raise Interrupted("interrupted; nothing is kept: give out= to keep what was measured", signalled.code) from None


def _of(folder: Path, in_memory: bool) -> Result:
    """The result in a folder, read now if it is to be in memory, else as it is asked for."""
    return Result.of_files(folder) if in_memory else Result.of_folder(folder)
