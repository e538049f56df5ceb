"""The targets of targeted cells, each different one once, and their logits."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import targets
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.kinds import kind_of
from fl_attack.engine.linear.tiling import training_key
from fl_attack.scenario import Scenario

TARGETS_KEPT = 64  # rows of targets of which the logits of all samples are worked out once


class Targets:
    """The different targets of cells, and which of them each cell has."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches) -> None:
        self.batches, self.C = batches, cells[0].theta_shape[0]
        aimed: dict[object, Scenario] = {}
        keys: list[object] = []
        for cell in cells:
            settings = cell.settings
            trained = settings.attack.target_path, training_key(cell), settings.lr, settings.weight_decay
            key = trained if kind_of(cell).goal == "targeted" else None
            keys.append(key)
            if key is not None:
                aimed.setdefault(key, cell)
        thetas = [batches.features.drop(theta) for theta in targets.load_targets(list(aimed.values()))]
        empty = torch.empty(0, batches.features.d)
        self.theta = torch.cat([empty, *thetas]).to(batches.device, batches.dtype)  # (T C, d)
        place = {key: i for i, key in enumerate(aimed)}
        self.number: NDArray[np.int64] = np.array([place.get(key, -1) for key in keys])  # by cell; -1 for none
        self._logits_of_all: Tensor | None = None

    def of(self, cells: Sequence[int]) -> "TargetsOf":
        """The targets of some cells, given by their numbers among all."""
        one = len(self.theta) == self.C
        number = torch.zeros(len(cells), dtype=torch.int64) if one else torch.from_numpy(self.number[cells])
        return TargetsOf(self, number.to(self.batches.device), one)

    def logits(self, batch: Batch, n: int) -> Tensor:
        """Logits of the targets.

        Parameters
        ----------
        batch : Batch
            The minibatch.
        n : int
            How many of its columns are wanted, from the first.

        Returns
        -------
        (T, C, n) tensor
        """
        resident = self.batches.features.resident
        if resident is None or len(self.theta) > TARGETS_KEPT:
            return torch.mm(self.theta, batch.X[:n].mT).view(-1, self.C, n)
        if self._logits_of_all is None:  # those of all samples, once
            self._logits_of_all = torch.mm(self.theta, resident.mT)
        rows = self.batches.features.row[batch.at[:n]].to(self.batches.device)
        return self._logits_of_all.index_select(1, rows).view(-1, self.C, n)


class TargetsOf:
    """The targets of the M cells of a tile."""

    def __init__(self, all_: Targets, number: Tensor, one: bool) -> None:
        """`number` (M,) says which of `all_` each cell has; `one`, whether there is but one."""
        self._all, self._number, self._one = all_, number, one

    def rows(self, cells: slice) -> Tensor:
        """The targets (cells C, d) of some of the cells, all of which have one."""
        theta = self._all.theta
        return theta.view(-1, self._all.C, theta.shape[-1])[self._number[cells]].reshape(-1, theta.shape[-1])

    def pick(self, logits: Tensor, cells: slice) -> Tensor:
        """The logits of the targets of some cells.

        Parameters
        ----------
        logits : (T, C, n) tensor
            The logits of all targets.
        cells : slice
            Some of the cells of the tile.

        Returns
        -------
        (cells, C, n) tensor
            `logits`, which is (1, C, n), where there is one target alone.
        """
        return logits if self._one else logits[self._number[cells]]
