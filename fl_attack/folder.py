"""The folder of a result: of one run or one sweep, written by one process at a time, replaced only by a whole new one.

While a finished result stands in the folder, its successor is written to a folder in it, and takes its place when it
is whole.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from fl_attack.errors import InputError

ResultKind = Literal["run", "sweep"]
PLAN = "plan.csv"  # of a run whose flips are planned
SUMMARY, BASELINE, ROUNDS = "summary.json", "baseline", "rounds.csv"  # a run that has a summary is finished
REPORT = "report.html"
TABLE, CURVES, UNITS = "sweep.csv", "curves.npz", "units"  # a sweep that has a table and no units left is finished
OF_RUN = (
    "config.yaml",
    ROUNDS,
    SUMMARY,
    "model.npz",
    "partition.npz",
    "flips.npz",
    "target.npz",
    "clients.csv",
    "curves.png",
    "curves.pdf",
    PLAN,
    "plan.png",
)
STATE = "checkpoint.npz"
FIGURES = ("*.png", "*.pdf")  # of a sweep
TRACKERS, TENSORBOARD = "trackers.json", "tensorboard"  # what trackers know of the result, and the files of one
LOCK, UNFINISHED = ".lock", "unfinished"


class Place(NamedTuple):
    """Where a result goes."""

    out: Path
    work: Path  # what is written to: `out`, or a folder in it while a finished result stands there


def is_finished(folder: Path, kind: ResultKind) -> bool:
    """Whether a folder holds a whole run or sweep.

    Parameters
    ----------
    folder : Path
        Any folder; it need not be there.
    kind : {"run", "sweep"}
        Whether a run or a sweep is looked for.

    Returns
    -------
    bool
        A run is whole with its summary, a sweep with its table and without unfinished units.
    """
    if kind == "run":
        return (folder / SUMMARY).exists()
    return (folder / TABLE).exists() and not (folder / UNITS).exists()


def holds(folder: Path) -> ResultKind | None:
    """The kind of result that a folder holds, finished or not; None where nothing would be lost."""
    if (folder / TABLE).exists() or any((folder / UNITS).glob("*")):
        return "sweep"
    if any((folder / name).exists() for name in (SUMMARY, ROUNDS, f"{BASELINE}/{ROUNDS}", f"{BASELINE}/{SUMMARY}")):
        return "run"
    return None


@contextmanager
def taken(out: Path, kind: ResultKind, overwrite: bool, goes_on: Callable[[Path], bool]) -> Iterator[Place]:
    """Hold a folder for a new result while the block runs.

    Parameters
    ----------
    out : Path
        The folder of the result; made if it is missing.
    kind : {"run", "sweep"}
        The kind of the new result.
    overwrite : bool
        Whether what the folder holds may be replaced.
    goes_on : callable
        Whether the unfinished result in a folder is one that this one goes on with, or would come out the same.

    Yields
    ------
    Place
        The folder, with `work` in it. It holds an unfinished result only if `goes_on` said yes to it.

    Raises
    ------
    InputError
        Where the folder can't be written to, another process holds it, or it holds what would be lost.
    """
    lock = FileLock(out / LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable{os.getpid()}"
        probe.touch()
        probe.unlink()
        lock.acquire()
    except Timeout:
        raise InputError(f"out={out} is in use by another process; wait for it, or use another folder") from None
    except OSError as error:
        raise InputError(f"out={out} can't be written to: {error.strerror or error}; use another folder") from None
    try:
        place = Place(out, _checked(out, kind, overwrite, goes_on))
        place.work.mkdir(exist_ok=True)
        _remove_unfinished(place.work)
        yield place
    finally:
        with suppress(OSError):  # while the lock is held, so that nobody else's is removed
            (out / LOCK).unlink()
        lock.release()


def _checked(out: Path, kind: ResultKind, overwrite: bool, goes_on: Callable[[Path], bool]) -> Path:
    """The folder to write to: `out`, or `unfinished` in it while a finished result is there.

    With `overwrite` an earlier result in it is removed unless `goes_on` says yes; without, InputError where one would
    be lost.
    """
    held = holds(out)
    finished = held is not None and is_finished(out, held)
    if not overwrite:
        if held not in (None, kind):
            state = "a finished" if finished else "an unfinished"
            raise InputError(
                f"out={out} holds {state} {held}, not a {kind}; use another folder, or overwrite=true to replace it"
            )
        if finished:
            raise InputError(f"out={out} holds a finished {kind}; use another folder or overwrite=true")
        if held and not goes_on(out):
            raise InputError(
                f"out={out} holds an unfinished {kind} of other settings; use another folder, or overwrite=true to "
                "replace it"
            )
        return out
    work = out / UNFINISHED if finished else out
    if not (holds(work) == kind and goes_on(work)):
        clear(work)
    return work


def _remove_unfinished(work: Path) -> None:
    """Remove the hidden files that a killed process had begun to write; nobody else writes here."""
    for at in (work, work / BASELINE, work / UNITS):
        for file in at.glob(".*"):
            if re.fullmatch(r"\..+\.(npz|csv|json|yaml|png|pdf|html)\.[0-9a-f]{8}", file.name):
                file.unlink(missing_ok=True)


def settle(place: Place) -> None:
    """Put the new result, which is whole, in the place of the old one."""
    if place.work == place.out:
        return
    clear(place.out)
    parts = sorted(place.work.iterdir(), key=lambda part: part.name in (SUMMARY, TABLE))  # what says it is whole: last
    for part in parts:
        with suppress(OSError):
            shutil.rmtree(place.out / part.name)
        os.replace(part, place.out / part.name)
    place.work.rmdir()


def clear(folder: Path) -> None:
    """Remove the result in a folder, of whatever kind; other files stay."""
    patterns = FIGURES if holds(folder) == "sweep" else ()
    for name in (SUMMARY, TABLE, *OF_RUN, STATE, CURVES, REPORT):  # first what says that it is whole
        (folder / name).unlink(missing_ok=True)
    for file in [file for pattern in patterns for file in folder.glob(pattern)]:
        file.unlink()
    if (folder / TRACKERS).exists():
        (folder / TRACKERS).unlink()
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    if holds(folder / BASELINE) or (folder / BASELINE / "config.yaml").exists():
        shutil.rmtree(folder / BASELINE)
    shutil.rmtree(folder / UNITS, ignore_errors=True)
