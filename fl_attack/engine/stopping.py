"""Early stopping of cells that run together: the model that each keeps, and where its rows end."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.checkpoint import State
from fl_attack.history import EarlyStop
from fl_attack.scenario import Scenario


class Measurable(Protocol):
    """Samples that cells are measured on."""

    def quality(self, theta: Tensor) -> NDArray[np.float64]:
        """Accuracy, F1 and mean loss of each of M cells, whose parameters theta holds, (M, 3)."""


class Stopping:
    """The model that each of M cells would give so far, and whether its run is over; see `history.EarlyStop`."""

    def __init__(self, cells: Sequence[Scenario], split: Measurable, theta: Tensor) -> None:
        """`split` is the server's validation split, `theta` (M C, d) what the cells start from."""
        patience = [cell.settings.early_stop.patience for cell in cells]
        self.rule = EarlyStop(np.array(patience))
        self.split, self.given = split, theta.clone()
        self._last = np.array([cell.settings.early_stop.restore == "last" for cell in cells])
        self.rounds = np.full(len(cells), cells[0].settings.rounds)  # the last one of each cell
        self.flips = np.zeros(len(cells), np.int64)  # in these rounds
        self.over = np.zeros(len(cells), bool)

    def state(self) -> State:
        """The state that `restore` needs to go on."""
        return {
            "lowest": self.rule.lowest,
            "since": self.rule.since,
            "given": self.given,
            "rounds": self.rounds,
            "flips": self.flips,
            "over": self.over,
        }

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave."""
        self.rule.lowest, self.rule.since = state["lowest"], state["since"]
        self.given.copy_(state["given"])
        self.rounds, self.flips, self.over = state["rounds"], state["flips"], state["over"]

    def losses(self, theta: Tensor) -> NDArray[np.float64]:
        """Validation loss of each cell, (M,)."""
        return self.split.quality(theta)[:, 2]

    def note(self, round_: int, losses: NDArray[np.float64], theta: Tensor, flips: NDArray[np.int64]) -> bool:
        """Note what a round has led to, in which the cells were measured.

        A cell whose parameters are not finite is left to run on: it has diverged, which its outcome says in the end.

        Parameters
        ----------
        round_ : int
            The round; 0 is before the first.
        losses : (M,) array
            Validation losses after the round.
        theta : (M rows, columns) tensor
            Parameters after the round.
        flips : array of int, (M,)
            Flips so far.

        Returns
        -------
        bool
            Whether no cell need go on: each has stopped or diverged.
        """
        M = len(losses)
        better = (self.rule.lower(losses) | self._last) & ~self.over
        kept = torch.from_numpy(better).to(theta.device)
        self.given.view(M, -1)[kept] = theta.view(M, -1)[kept]
        self.flips = np.where(self.over, self.flips, flips)
        finite = theta.view(M, -1).isfinite().all(1).cpu().numpy()
        now = self.rule.over & ~self.over & finite
        self.rounds[now] = round_
        self.over |= now
        return bool((self.over | ~finite).all())
