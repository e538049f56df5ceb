"""The samples of a round, shared by all cells: which they are, and their features.

Columns: the distinct samples of a round, client after client, those first that most cells hold for malicious; a
client's share of them is the same in every round, so that a cell's writable samples are always the same columns.

For two classes the samples of label 1 are stored negated: with `x~ = (1 - 2y) x` and `z~ = <theta, x~>` the residual
times the features is `sigmoid(z~) x~` and a flip takes 1 from that sigmoid, whatever the label.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_attack import data
from fl_attack.engine.kernels import Workspace
from fl_attack.models import outputs
from fl_attack.scenario import Scenario

LINE = 16  # numbers of single precision in a line of the processor's cache
ROWS_AT_ONCE = 4096  # samples turned into features in one piece
SAMPLES_AT_ONCE = 2**16  # of which it is worked out in one go when they are used


class Layout(NamedTuple):
    """The clients that the columns of a minibatch belong to."""

    clients: NDArray[np.int64]  # (m,) in the order of their columns
    ends: NDArray[np.int64]  # (m,) the column after the last of each
    kept: NDArray[np.int64] | None = None  # (n,) of all clients' columns those that there are; None: all

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The number of columns of each client, (m,)."""
        return np.diff(self.ends, prepend=0)

    @property
    def rank(self) -> NDArray[np.int64]:
        """The place of each client among those of the round in ascending order, (m,)."""
        return self.clients.argsort().argsort()

    def columns(self, client: int) -> slice:
        """The columns of a client."""
        place = int(np.flatnonzero(self.clients == client)[0])
        return slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))


class Batch:
    """The minibatch of a round: n columns, C outputs, d features that are not zero everywhere."""

    def __init__(self, at: Tensor, X: Tensor, y_train: Tensor, encoded: int, layout: Layout) -> None:
        self.at = at  # (n,) sample of each column
        self.X = X  # (n, d) features, signed for two classes of a linear model
        self.layout = layout
        self._y_train, self._encoded = y_train, encoded  # classes of one-hot labels, or 0
        self.counts: Tensor | None = None  # (n,) how often each sample is used, where that is not once
        self.steps: list[list[Tensor]] = []  # by client: the columns of each local step, where there are several

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """The sample of each column, (n,)."""
        return self.at.numpy()

    @cached_property
    def y(self) -> Tensor:
        """The true label of each column, (n,)."""
        return self._y_train[self.at].to(self.X.device)

    @cached_property
    def sign(self) -> Tensor:
        """The sign (n,) that features are multiplied by for two classes: -1 for label 1, else 1."""
        return (1 - 2 * self.y).to(self.X.dtype)

    @cached_property
    def encoded(self) -> Tensor:
        """One-hot labels, (C, n); empty where features are signed instead."""
        if not self._encoded:
            return self.X.new_empty(0)
        return outputs.encode(self.y, self._encoded, self.X.dtype).mT.contiguous()


class Batches:
    """The minibatches of a schedule, on a device."""

    def __init__(
        self,
        template_cell: Scenario,
        clients: NDArray[np.int64],
        device: torch.device,
        memory: float,
        every_feature: bool = False,
    ) -> None:
        """`clients` are in the order of their columns; `memory` is what features may take, in bytes.

        Features that are zero in every sample are left out unless `every_feature`.
        """
        self.template_cell, self.device = template_cell, device
        x, settings = template_cell.dataset.x_train, template_cell.settings
        self.classes, self.dtype = template_cell.classes, settings.torch_dtype
        everything = every_feature or template_cell.dataset.standardize
        nonzero = np.ones(x.shape[1], bool) if everything else _nonzero_columns(x)
        self._constant = template_cell.model.constant
        self.seen = torch.from_numpy(np.append(nonzero, True) if self._constant else nonzero)  # the constant last
        self.y = torch.tensor(template_cell.dataset.y_train)
        signed = template_cell.model.linear and self.classes == 2
        self.sign = (1 - 2 * self.y).to(self.dtype)[:, None] if signed else None
        self._encoded = 0 if signed else self.classes
        self.d = int(self.seen.sum()) if every_feature else padded(int(self.seen.sum()))
        used = template_cell.schedule.used[clients]
        self.all = Layout(clients, np.cumsum(used))
        self.width = int(self.all.ends[-1])
        bytes_each = self.d * self.dtype.itemsize
        held = self.whole_samples
        self.row = torch.full((len(x),), -1)  # of each sample among all that the clients hold
        self.row[torch.from_numpy(held)] = torch.arange(len(held))
        self.resident = self._all().to(device) if len(held) * bytes_each <= memory else None  # in this order
        whole = (template_cell.schedule.sizes == [len(shard) for shard in template_cell.schedule.shards]).all()
        self._kept: Batch | None = None
        self._keep = bool(whole) and template_cell.schedule.per_round is None  # every round is the same
        self._rounds = min(settings.rounds, max(1, SAMPLES_AT_ONCE // self.width))
        self._block, self._table = -1, np.empty((0, 0), np.int64)

    def drop_features(self, rows: Tensor) -> Tensor:
        """The used ones of all features (n, features), filled up with zeros to (n, d)."""
        rows = rows[:, self.seen]
        return functional.pad(rows, (0, self.d - rows.shape[1])) if rows.shape[1] < self.d else rows

    def restore_features(self, rows: Tensor) -> Tensor:
        """All features (n, features) from the used ones (n, d), with zeros for those that are not used."""
        whole = torch.zeros(len(rows), len(self.seen), dtype=rows.dtype)
        whole[:, self.seen] = rows[:, : int(self.seen.sum())].cpu()
        return whole

    @property
    def bytes(self) -> int:
        """The memory that features take, in bytes."""
        resident = 0 if self.resident is None else self.resident.nbytes
        minibatch = self.width * self.d * self.dtype.itemsize
        return max(resident, minibatch) if self._keep else resident + minibatch

    def at(self, round_: int, workspace: Workspace) -> Batch:
        """The minibatch of a round, counted from 1; its features are in a buffer."""
        if self._kept is not None:
            return self._kept
        layout = self._layout(round_)
        if self.template_cell.schedule.local_steps > 1:
            batch = self._several_steps(round_, layout, workspace)
        else:
            samples = self._samples(round_)
            batch = self._batch(samples if layout.kept is None else samples[layout.kept], layout, workspace)
        self._kept = batch if self._keep else None
        return batch

    @cached_property
    def whole_samples(self) -> NDArray[np.int64]:
        """All samples that the clients hold, (n,): client after client in the order of their columns."""
        return np.concatenate([self.template_cell.schedule.shards[client] for client in self.all.clients])

    @cached_property
    def whole_layout(self) -> Layout:
        """The clients that `whole_samples` belong to."""
        sizes = [len(self.template_cell.schedule.shards[client]) for client in self.all.clients]
        return Layout(self.all.clients, np.cumsum(sizes))

    def pieces(self, n: int, size: int) -> Iterator[tuple[Batch, slice]]:
        """The first n of `whole_samples` in pieces of `size`: each as a batch, and its place among them."""
        for start in range(0, n, max(1, size)):
            part = slice(start, min(n, start + max(1, size)))
            at = torch.from_numpy(self.whole_samples[part])
            X = self._features(at, Workspace(self.device, self.dtype)) if self.resident is None else self.resident[part]
            yield Batch(at, X, self.y, self._encoded, self.whole_layout), part

    def _layout(self, round_: int) -> Layout:
        """The columns of a round, of the clients that take part in it."""
        schedule, whole = self.template_cell.schedule, self.all
        if schedule.per_round is None:
            return whole
        takes_part = np.isin(whole.clients, schedule.participants(round_))
        sizes = whole.sizes
        return Layout(
            whole.clients[takes_part], np.cumsum(sizes[takes_part]), np.flatnonzero(np.repeat(takes_part, sizes))
        )

    def _batch(self, samples: NDArray[np.int64], layout: Layout, workspace: Workspace) -> Batch:
        """The minibatch of these samples (n,), in the order of the columns of a layout."""
        at = torch.from_numpy(samples)
        return Batch(at, self._features(at, workspace), self.y, self._encoded, layout)

    def _several_steps(self, round_: int, layout: Layout, workspace: Workspace) -> Batch:
        """The minibatch of a round of several local steps: each sample once, its count, the columns of each step."""
        steps = [self.template_cell.schedule.steps(int(client), round_) for client in layout.clients]
        unique = [np.unique(step, return_counts=True) for step in steps]
        batch = self._batch(np.concatenate([found for found, _ in unique]), layout, workspace)
        counts = np.concatenate([count for _, count in unique])
        if (counts != 1).any():
            batch.counts = torch.from_numpy(counts).to(self.device, self.dtype)
        starts = layout.ends - layout.sizes
        batch.steps = [
            [torch.from_numpy(start + np.searchsorted(found, step)).to(self.device) for step in client]
            for start, (found, _), client in zip(starts, unique, steps, strict=True)
        ]
        return batch

    def _samples(self, round_: int) -> NDArray[np.int64]:
        """The samples of a round of one local step, by column; worked out for many rounds at a time."""
        block, place = divmod(round_ - 1, self._rounds)
        if block != self._block:
            first = 1 + block * self._rounds
            schedule = self.template_cell.schedule
            parts = [schedule.samples_of_rounds(int(client), first, self._rounds) for client in self.all.clients]
            self._block, self._table = block, np.concatenate(parts, 1)
        samples: NDArray[np.int64] = self._table[place]
        return samples

    def _features(self, at: Tensor, workspace: Workspace) -> Tensor:
        """Features (n, d) of samples (n,), signed for two classes: from memory where they are held, else computed."""
        if self.resident is not None:
            rows = self.row[at]
            if len(rows) == len(self.resident) and torch.equal(rows, torch.arange(len(rows))):
                return self.resident
            X = workspace.buffer("X", len(at), self.d)
            return torch.index_select(self.resident, 0, rows.to(self.device), out=X)
        return torch.cat([self._piece(part) for part in at.split(ROWS_AT_ONCE)]).to(self.device)

    def _all(self) -> Tensor:
        """Features (n, d) of all samples that the clients hold, in the order of `whole_samples`."""
        held = torch.from_numpy(self.whole_samples)
        X = torch.empty(len(held), self.d, dtype=self.dtype)
        for rows, samples in zip(X.split(ROWS_AT_ONCE), held.split(ROWS_AT_ONCE), strict=True):
            rows.copy_(self._piece(samples))
        return X

    def _piece(self, at: Tensor) -> Tensor:
        """Features (n, d) of samples (n,), computed from the data set and signed for two classes."""
        dataset = self.template_cell.dataset
        X = data.features(dataset.x_train[at.numpy()], dataset.scaling, self.dtype, self._constant)
        X = X if self._constant else dataset.images(X).flatten(1)  # a network's own order of the pixels
        X = self.drop_features(X)
        return X if self.sign is None else X.mul_(self.sign[at])


def padded(features: int) -> int:
    """The width of rows of features: at least `features`, so that rows begin at cache lines, and at different ones."""
    columns = -(-features // LINE) * LINE
    return columns + LINE * (columns % (16 * LINE) == 0)


def _nonzero_columns(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which features of x (n, p) are not zero in every sample, (p,) of bool: no gradient ever reaches the others."""
    found = np.zeros(x.shape[1], bool)
    for start in range(0, len(x), ROWS_AT_ONCE):
        found |= x[start : start + ROWS_AT_ONCE].any(0)
    return found
