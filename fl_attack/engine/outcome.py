"""What a cell leaves: its history as a table, and why it ended early."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.history import History, row_of
from fl_attack.scenario import Flips


@dataclass
class Outcome:
    """The result of one experiment of a batch."""

    table: NDArray[np.float64]  # (evaluations, columns of `history.COLUMNS`), round 0 first
    flip_count: int  # in all rounds
    theta: Tensor | None  # (A, B), None where it was not kept
    flips: list[tuple[int, Flips]] = field(default_factory=list)  # empty where they were not kept
    seconds: float = 0.0  # its share of the time of its batch
    error: str | None = None  # why the rounds end before the last one

    def history(self) -> History:
        """The outcome as a History: flips and columns not kept are empty or NaN; the parameters must have been kept."""
        assert self.theta is not None
        rows = [row_of(values) for values in self.table.tolist()]
        return History(self.theta.double(), rows, self.flips, self.seconds)


OnRounds = Callable[[int], None]  # gets how many rounds were done since the last call, summed over cells
Watch = Callable[[list[int], Callable[[], list[Outcome]]], None]  # gets numbers of cells, and what gives their outcomes
