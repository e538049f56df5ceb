"""The samples of a round, shared by all cells: which they are, and their features.

Columns: the distinct samples of a round, client after client, those first that most cells hold for malicious; a
client's share of them is the same in every round, so that a cell's writable samples are always the same columns.

For two classes the samples of label 1 are stored negated: with `x~ = (1 - 2y) x` and `z~ = <theta, x~>` the residual
times the features is `sigmoid(z~) x~` and a flip takes 1 from that sigmoid, whatever the label.
"""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import data, model, protocol
from fl_attack.engine.kernels import Room
from fl_attack.scenario import Scenario

ROWS_AT_ONCE = 4096  # samples turned into features in one piece
SAMPLES_AT_ONCE = 2**16  # of which it is worked out in one go when they are used


class Batch:
    """What the cells see of a round. n columns, C outputs, d features that are not zero everywhere."""

    def __init__(self, at: Tensor, X: Tensor, y_train: Tensor, classes: int) -> None:
        self.at, self.X = at, X  # (n,) sample of each column; (n, d) features, signed for two classes
        self._y_train, self._classes = y_train, classes
        self.counts: Tensor | None = None  # (n,) how often each sample is used, where that is not once
        self.steps: list[list[Tensor]] = []  # by client: the columns of each local step, where there are several

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """(n,) sample of each column."""
        return self.at.numpy()

    @cached_property
    def y(self) -> Tensor:
        """(n,) labels."""
        return self._y_train[self.at].to(self.X.device)

    @cached_property
    def encoded(self) -> Tensor:
        """(C, n) of the labels; for two classes, which are signed instead, empty."""
        if self._classes == 2:
            return self.X.new_empty(0)
        return model.encode(self.y, self._classes, self.X.dtype).mT.contiguous()


class Batches:
    """The minibatches of a schedule, on a device."""

    def __init__(self, like: Scenario, clients: NDArray[np.int64], device: torch.device, memory: float) -> None:
        """`clients` are in the order of their columns; `memory` is what features may take, in bytes."""
        self.like, self.clients, self.device = like, clients, device
        x, settings = like.dataset.x_train, like.settings
        self.classes, self.dtype = like.classes, settings.torch_dtype
        self.seen = torch.from_numpy(np.append(_nonzero_columns(x), True))  # the constant last
        self.y = torch.tensor(like.dataset.y_train)
        self.sign = (1 - 2 * self.y).to(self.dtype)[:, None] if self.classes == 2 else None
        self.d, used = int(self.seen.sum()), like.schedule.used[clients]
        self.ends = np.cumsum(used)
        self.width = int(self.ends[-1])
        bytes_each = self.d * self.dtype.itemsize
        self.resident = self._all().to(device) if len(x) * bytes_each <= memory else None
        whole = (like.schedule.sizes == [len(shard) for shard in like.schedule.shards]).all()
        self._kept: Batch | None = None
        self._keep = bool(whole)  # every round is the same
        self._rounds = min(settings.rounds, max(1, SAMPLES_AT_ONCE // self.width))
        self._block, self._table = -1, np.empty((0, 0), np.int64)

    @property
    def bytes(self) -> int:
        """Memory that features take."""
        return (self.resident.nbytes if self.resident is not None else 0) + 2 * self.width * self.d * 8

    def columns(self, client: int) -> slice:
        """The columns of a client's samples."""
        place = int(np.flatnonzero(self.clients == client)[0])
        end = int(self.ends[place])
        return slice(end - int(self.like.schedule.used[client]), end)

    def at(self, round_: int, room: Room) -> Batch:
        """The minibatch of a round, counted from 1; its features are in a buffer."""
        if self._kept is not None:
            return self._kept
        several = self.like.schedule.local_steps > 1
        batch = self._several_steps(round_, room) if several else self._batch(self._samples(round_), room)
        self._kept = batch if self._keep else None
        return batch

    def _batch(self, samples: NDArray[np.int64], room: Room) -> Batch:
        at = torch.from_numpy(samples)
        return Batch(at, self._features(at, room), self.y, self.classes)

    def _several_steps(self, round_: int, room: Room) -> Batch:
        drawn = [self.like.schedule.steps(int(client), round_) for client in self.clients]
        unique = [np.unique(step, return_counts=True) for step in drawn]
        batch = self._batch(np.concatenate([found for found, _ in unique]), room)
        often = np.concatenate([count for _, count in unique])
        if (often != 1).any():
            batch.counts = torch.from_numpy(often).to(self.device, self.dtype)
        starts = self.ends - [len(found) for found, _ in unique]
        batch.steps = [
            [torch.from_numpy(start + np.searchsorted(found, step)).to(self.device) for step in client]
            for start, (found, _), client in zip(starts, unique, drawn, strict=True)
        ]
        return batch

    def _samples(self, round_: int) -> NDArray[np.int64]:
        """The samples of a round of one local step, by column; worked out for many rounds at a time."""
        block, place = divmod(round_ - 1, self._rounds)
        if block != self._block:
            first = 1 + block * self._rounds
            parts = [self._drawn(int(client), first, self._rounds) for client in self.clients]
            self._block, self._table = block, np.concatenate(parts, 1)
        samples: NDArray[np.int64] = self._table[place]
        return samples

    def _drawn(self, client: int, first: int, rounds: int) -> NDArray[np.int64]:
        """`Schedule.steps` of a client of one local step in the rounds from `first` on, (rounds, size)."""
        schedule = self.like.schedule
        shard, size = schedule.shards[client], int(schedule.sizes[client])
        if size == len(shard):
            return np.broadcast_to(shard, (rounds, size))
        per_pass = len(shard) // size
        start, stop = first - 1, first - 1 + rounds
        passes = range(start // per_pass, -(-stop // per_pass))
        orders = [
            np.random.default_rng([schedule.seed, protocol.BATCHES, client, p]).permutation(len(shard)) for p in passes
        ]
        turns = np.concatenate([shard[order[: per_pass * size]].reshape(per_pass, size) for order in orders])
        skipped = start - passes[0] * per_pass
        return turns[skipped : skipped + rounds]

    def _features(self, at: Tensor, room: Room) -> Tensor:
        if self.resident is not None:
            X = room.take("X", len(at), self.d)
            return torch.index_select(self.resident, 0, at.to(self.device), out=X)
        return torch.cat([self._piece(part) for part in at.split(ROWS_AT_ONCE)]).to(self.device)

    def _all(self) -> Tensor:
        X = torch.empty(len(self.y), self.d, dtype=self.dtype)
        for part in torch.arange(len(self.y)).split(ROWS_AT_ONCE):
            X[part] = self._piece(part)
        return X

    def _piece(self, at: Tensor) -> Tensor:
        dataset = self.like.dataset
        X = data.features(dataset.x_train[at.numpy()], dataset.scale, self.dtype)[:, self.seen]
        return X if self.sign is None else X.mul_(self.sign[at])


def _nonzero_columns(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which features are not zero in every sample: no gradient ever reaches the others."""
    found = np.zeros(x.shape[1], bool)
    for start in range(0, len(x), ROWS_AT_ONCE):
        found |= x[start : start + ROWS_AT_ONCE].any(0)
    return found
