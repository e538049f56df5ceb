"""Features as the engine multiplies them: without those that no gradient reaches, signed for two classes.

For two classes the samples of label 1 are stored negated: with `x~ = (1 - 2y) x` and `z~ = <theta, x~>` the residual
times the features is `sigmoid(z~) x~` and a flip takes 1 from that sigmoid, whatever the label.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_attack import data
from fl_attack.engine.kernels import Workspace
from fl_attack.scenario import Scenario

LINE = 16  # numbers of single precision in a line of the processor's cache
ROWS_AT_ONCE = 4096  # samples turned into features in one piece


class Features:
    """The features of samples, signed for two classes of a linear model, without those that no gradient reaches.

    Parameters
    ----------
    cell, clients, device, memory, every_feature
        As `Batches` takes them.
    """

    def __init__(
        self, cell: Scenario, clients: NDArray[np.int64], device: torch.device, memory: float, every_feature: bool
    ) -> None:
        self.cell, self.device, self.dtype = cell, device, cell.settings.torch_dtype
        x, constant = cell.dataset.x_train, cell.model.constant
        everything = every_feature or cell.dataset.standardize
        nonzero = np.ones(x.shape[1], bool) if everything else _nonzero_columns(x)
        self.seen = torch.from_numpy(np.append(nonzero, True) if constant else nonzero)  # the constant last
        self.d = int(self.seen.sum()) if every_feature else padded(int(self.seen.sum()))
        self.signed = cell.model.linear and cell.classes == 2
        self.samples = np.concatenate([cell.schedule.shards[client] for client in clients])  # that the clients hold
        self.row = torch.full((len(x),), -1)  # of each sample among these
        self.row[torch.from_numpy(self.samples)] = torch.arange(len(self.samples))
        fits = len(self.samples) * self.d * self.dtype.itemsize <= memory
        self.resident = self._all().to(device) if fits else None  # (n, d) of all of `samples`

    @property
    def one_hot(self) -> int:
        """The number of classes of one-hot labels; 0 where features are signed instead."""
        return 0 if self.signed else self.cell.classes

    def drop(self, rows: Tensor) -> Tensor:
        """The columns that this class keeps of rows (n, features), padded with zeros to (n, d)."""
        rows = rows[:, self.seen]
        return functional.pad(rows, (0, self.d - rows.shape[1])) if rows.shape[1] < self.d else rows

    def restore(self, rows: Tensor) -> Tensor:
        """Rows (n, features) from those of the kept columns (n, d), zero where a column was dropped; on the CPU."""
        whole = torch.zeros(len(rows), len(self.seen), dtype=rows.dtype)
        whole[:, self.seen] = rows[:, : int(self.seen.sum())].cpu()
        return whole

    def of(self, at: Tensor, workspace: Workspace) -> Tensor:
        """Features of samples, from memory where they are held, else computed.

        Parameters
        ----------
        at : (n,) tensor of int64
            Positions in the training set, of samples that the clients hold.
        workspace : Workspace
            Memory that they may be put in: they hold until the next call.

        Returns
        -------
        (n, d) tensor
            Not to be changed: it may be `resident` itself.
        """
        if self.resident is not None:
            rows = self.row[at]
            if len(rows) == len(self.resident) and torch.equal(rows, torch.arange(len(rows))):
                return self.resident
            X = workspace.buffer("X", len(at), self.d)
            return torch.index_select(self.resident, 0, rows.to(self.device), out=X)
        return torch.cat([self._piece(part) for part in at.split(ROWS_AT_ONCE)]).to(self.device)

    def rows(self, part: slice) -> Tensor:
        """Features (n, d) of a part of `samples`."""
        if self.resident is not None:
            return self.resident[part]
        return self.of(torch.from_numpy(self.samples[part]), Workspace(self.device, self.dtype))

    def _all(self) -> Tensor:
        """Features (n, d) of all of `samples`."""
        held = torch.from_numpy(self.samples)
        X = torch.empty(len(held), self.d, dtype=self.dtype)
        for rows, samples in zip(X.split(ROWS_AT_ONCE), held.split(ROWS_AT_ONCE), strict=True):
            rows.copy_(self._piece(samples))
        return X

    def _piece(self, at: Tensor) -> Tensor:
        """Features (n, d) of samples (n,) from the data set, as this class keeps them: dropped, padded, signed."""
        dataset, constant = self.cell.dataset, self.cell.model.constant
        X = data.features(dataset.x_train[at.numpy()], dataset.scaling, self.dtype, constant)
        X = self.drop(X if constant else dataset.images(X).flatten(1))  # a network's own order of the pixels
        if not self.signed:
            return X
        return X.mul_(torch.from_numpy(1 - 2 * dataset.y_train[at.numpy()]).to(self.dtype)[:, None])


def padded(features: int) -> int:
    """The least width, a multiple of `LINE` but not of 16 lines, that holds so many features.

    So rows begin at lines of the cache, and not all at ones that displace each other.
    """
    columns = -(-features // LINE) * LINE
    return columns + LINE * (columns % (16 * LINE) == 0)


def _nonzero_columns(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each feature of x (n, p) is nonzero in any sample, (p,) of bool: no gradient ever reaches the others."""
    found = np.zeros(x.shape[1], bool)
    for start in range(0, len(x), ROWS_AT_ONCE):
        found |= x[start : start + ROWS_AT_ONCE].any(0)
    return found
