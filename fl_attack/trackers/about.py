"""The description of a run that a tracker gets, and what a tracker does with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fl_attack.history import Row

How = Literal["finished", "failed", "killed"]  # how a run ended; killed: by a signal
Value = str | int | float | bool | None
PROJECT = "fl-attack"  # where the user's own settings name no other


@dataclass(frozen=True)
class About:
    """The description of a run that a tracker gets as the run begins."""

    kind: Literal["run", "sweep", "cell"]
    name: str
    settings: Mapping[str, Value]  # by key; what differs between the cells of a sweep is left out of the sweep's
    command: str  # that runs it again
    folder: Path  # of the run or the sweep
    parent: str | None = None  # of a cell: the id that the tracker gave the sweep


class Store(Protocol):
    """One run in the store of a tracker. Methods raise whatever the tracker's library raises.

    `part` is the empty text for the run itself, or the name of a run that belongs to it, such as the unattacked twin.
    """

    id: str

    def rows(self, part: str, rows: Sequence[Row]) -> None:
        """Log rows of measures; what is not finite is left out.

        Parameters
        ----------
        part : str
            The part of the run that the rows are of; see `Store`.
        rows : sequence of Row
            In the order of their rounds.
        """

    def summary(self, part: str, facts: Mapping[str, Value]) -> None:
        """Log the results of a whole run.

        Parameters
        ----------
        part : str
            The part of the run that the results are of; see `Store`.
        facts : mapping
            The results by their names.
        """

    def leave(self) -> None:
        """Close what is open in the folder of the run, which is about to be moved."""

    def files(self, folder: Path, files: Sequence[Path]) -> None:
        """Keep the files of a finished result, and show its figures where the tracker can.

        Parameters
        ----------
        folder : Path
            The folder where the result is now.
        files : sequence of Path
            The files in the folder that are kept.
        """

    def end(self, how: How) -> None:
        """Say how the run ended."""


def tagged(part: str, name: str) -> str:
    """The name that a measure is logged by: `part/name`, or `name` where the part is empty.

    Parameters
    ----------
    part : str
        The part of a run, see `Store`.
    name : str
        The measure, as a column of a table calls it.
    """
    return f"{part}/{name}" if part else name
