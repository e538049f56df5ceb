"""The attackers of cells that are stepped together: what they want, what they may do, and what they have done."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_attack.checkpoint import State
from fl_attack.engine.access import Access, RoundAccess
from fl_attack.engine.batches import Batches, Layout
from fl_attack.engine.kinds import NOBODY, kind_of, parts_of
from fl_attack.scenario import Scenario


class Attackers:
    """The attackers of M cells, and their flips so far.

    What they carry from round to round belongs here: `state` and `restore` take it into a checkpoint.

    Parameters
    ----------
    cells : sequence of Scenario
        Cells of one `Kind.tile_key`.
    batches : Batches
        The minibatches of the cells.
    layout : Layout
        The columns of a round in which every client takes part.
    """

    def __init__(self, cells: Sequence[Scenario], batches: Batches, layout: Layout) -> None:
        self.cell, self.kind, self.parts = cells[0], kind_of(cells[0]), parts_of(cells)
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self._access = None if self.kind == NOBODY else Access(cells, layout, batches.device, batches.dtype)
        self.flips = np.zeros(self.M, np.int64)  # in all rounds
        self.last = self.flips.copy()  # in the last round
        self.allowed = self.flips.copy()  # likewise, that the budgets allow

    def access(self, round_: int, layout: Layout, knowledge_round: int | None = None) -> RoundAccess | None:
        """What the attackers can write in a round, see `Access.at`; None where nobody attacks in any round."""
        return self._access.at(round_, layout, knowledge_round) if self._access is not None else None

    def attacked(self, round_: int) -> NDArray[np.bool_]:
        """Which of the cells (M,) are attacked in a round; not to be called where nobody attacks in any round."""
        assert self._access is not None
        return self._access.rounds.attacked(round_)

    def note(self, count: NDArray[np.int64] | None, allowed: NDArray[np.int64] | None) -> None:
        """Note what was flipped in a round: `last` and `allowed` are replaced, `flips` goes up.

        Parameters
        ----------
        count, allowed : array of int, (M,), or None
            How many flips of each cell there were and how many were allowed; None is zero for all.
        """
        none = np.zeros(self.M, np.int64)
        self.last = none if count is None else count
        self.allowed = none if allowed is None else allowed
        if count is not None:
            self.flips += count

    def seeking(self, goal: str) -> int:
        """How many of the cells have this goal, where attackers are greedy and choose in every round; else 0."""
        return sum(part.size for part in self.parts if part.goal == goal) if self.kind.exact else 0

    def state(self, round_: int) -> State:
        """The state that `restore` needs to go on after a round, the last one that `access` was asked for."""
        past = None if self._access is None else self._access.past(round_ + 1)
        return {"flips": self.flips, "last": self.last, "allowed": self.allowed, "past": past}

    def restore(self, state: State, round_: int) -> None:
        """Go back to the state after a round.

        Parameters
        ----------
        state : dict
            The value of `state` after that round.
        round_ : int
            The round, from 1.
        """
        self.flips, self.last, self.allowed = state["flips"], state["last"], state["allowed"]
        if self._access is not None:
            self._access.restore(round_ + 1, state["past"])
