"""The samples of a round, shared by all cells: which they are, and their features.

Columns: the distinct samples of a round, client after client, those first that are malicious in most cells. A client
has as many of them in every round, so that a cell's writable samples are the same columns wherever all take part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.engine.features import Features
from fl_attack.engine.kernels import Workspace
from fl_attack.models import outputs
from fl_attack.scenario import Scenario

SAMPLES_AT_ONCE = 2**16  # of which it is worked out in one go when they are used


@dataclass(frozen=True, eq=False)
class Layout:
    """The clients that the columns of a minibatch belong to."""

    clients: NDArray[np.int64]  # (m,) in the order of their columns
    ends: NDArray[np.int64]  # (m,) the column after the last of each
    kept: NDArray[np.int64] | None = None  # (n,) where some sit the round out: which of all clients' columns these are

    @cached_property
    def key(self) -> tuple[bytes, bytes]:
        """Equal for layouts that have the same columns."""
        return self.clients.tobytes(), self.ends.tobytes()

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The number of columns of each client, (m,)."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """The place of each of `clients` among them in ascending order, (m,)."""
        return self.clients.argsort().argsort()

    def columns(self, client: int) -> slice:
        """The columns of a client."""
        place = int(np.flatnonzero(self.clients == client)[0])
        return slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))


class Batch:
    """The minibatch of a round: n columns, C outputs, d features as `Features` keeps them."""

    def __init__(self, at: Tensor, X: Tensor, y_train: Tensor, encoded: int, layout: Layout) -> None:
        """`y_train` are the labels of all training samples, `encoded` is the `one_hot` of `Features`."""
        self.at = at  # (n,) position in the training set of the sample of each column
        self.X = X  # (n, d) features, signed for two classes of a linear model
        self.layout = layout
        self._y_train, self._encoded = y_train, encoded  # classes of one-hot labels, or 0
        self.counts: Tensor | None = None  # (n,) how often each sample is used, where that is not once
        self.steps: list[list[Tensor]] = []  # by client: the columns of each local step, where there are several

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """The position in the training set of the sample of each column, (n,)."""
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
    """The minibatches of a schedule, on a device.

    Parameters
    ----------
    cell : Scenario
        One of the cells, which have the same data, shards and schedule.
    clients : (m,) array of int64
        All clients, in the order of their columns.
    device : torch.device
        The device that minibatches are on.
    memory : float
        Bytes: features of all samples are held where they take no more, else those of each minibatch are computed.
    every_feature : bool
        Whether features that are zero in every sample stay, and rows keep their width.
    """

    def __init__(
        self,
        cell: Scenario,
        clients: NDArray[np.int64],
        device: torch.device,
        memory: float,
        every_feature: bool = False,
    ) -> None:
        self.cell, self.device, self.dtype = cell, device, cell.settings.torch_dtype
        self.features = Features(cell, clients, device, memory, every_feature)
        self.y = torch.tensor(cell.dataset.y_train)
        used = cell.schedule.used[clients]
        self.all = Layout(clients, np.cumsum(used))
        whole = (cell.schedule.sizes == [len(shard) for shard in cell.schedule.shards]).all()
        self._keep = bool(whole) and cell.schedule.per_round is None  # every round is the same
        self._kept: Batch | None = None
        self._rounds_at_once = min(cell.settings.rounds, max(1, SAMPLES_AT_ONCE // self.width))
        self._of_rounds: tuple[int, NDArray[np.int64]] = (-1, np.empty((0, 0), np.int64))  # a block, and its samples

    @property
    def width(self) -> int:
        """The number of columns where every client takes part."""
        return int(self.all.ends[-1])

    @property
    def bytes(self) -> int:
        """The memory that features held and a minibatch's take, in bytes."""
        resident = 0 if self.features.resident is None else self.features.resident.nbytes
        minibatch = self.width * self.features.d * self.dtype.itemsize
        return max(resident, minibatch) if self._keep else resident + minibatch

    def at(self, round_: int, workspace: Workspace) -> Batch:
        """The minibatch of a round.

        Parameters
        ----------
        round_ : int
            The round, from 1.
        workspace : Workspace
            Memory that the features may be put in: they hold until the next call.

        Returns
        -------
        Batch
            The same object in every round where all clients use all that they hold.
        """
        if self._kept is not None:
            return self._kept
        layout = self._layout(round_)
        if self.cell.schedule.local_steps > 1:
            batch = self._several_steps(round_, layout, workspace)
        else:
            samples = self._samples(round_)
            batch = self._batch(samples if layout.kept is None else samples[layout.kept], layout, workspace)
        self._kept = batch if self._keep else None
        return batch

    @cached_property
    def whole_layout(self) -> Layout:
        """The columns of all samples that the clients hold, in the order of `Features.samples`."""
        sizes = [len(self.cell.schedule.shards[client]) for client in self.all.clients]
        return Layout(self.all.clients, np.cumsum(sizes))

    def pieces(self, n: int, size: int) -> Iterator[tuple[Batch, slice]]:
        """The first samples of `Features.samples`, piece after piece.

        Parameters
        ----------
        n : int
            The number of samples.
        size : int
            The number of samples in a piece.

        Yields
        ------
        batch : Batch
            The samples of a piece; its layout is `whole_layout`, of all samples.
        place : slice
            The place of the piece among all n samples.
        """
        for start in range(0, n, max(1, size)):
            part = slice(start, min(n, start + max(1, size)))
            at = torch.from_numpy(self.features.samples[part])
            yield Batch(at, self.features.rows(part), self.y, self.features.one_hot, self.whole_layout), part

    def _layout(self, round_: int) -> Layout:
        """The columns of a round, of the clients that take part in it."""
        schedule, whole = self.cell.schedule, self.all
        if schedule.per_round is None:
            return whole
        participation = np.isin(whole.clients, schedule.participants(round_))
        sizes = whole.sizes
        return Layout(
            whole.clients[participation],
            np.cumsum(sizes[participation]),
            np.flatnonzero(np.repeat(participation, sizes)),
        )

    def _batch(self, samples: NDArray[np.int64], layout: Layout, workspace: Workspace) -> Batch:
        """The minibatch of these samples (n,), in the order of the columns of a layout."""
        at = torch.from_numpy(samples)
        return Batch(at, self.features.of(at, workspace), self.y, self.features.one_hot, layout)

    def _several_steps(self, round_: int, layout: Layout, workspace: Workspace) -> Batch:
        """The minibatch of a round of several local steps: each sample once, its count, the columns of each step."""
        steps = [self.cell.schedule.steps(int(client), round_) for client in layout.clients]
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
        """The samples (width,) of a round of one local step, as if every client took part; many rounds at a time."""
        block, place = divmod(round_ - 1, self._rounds_at_once)
        if block != self._of_rounds[0]:
            first, schedule = 1 + block * self._rounds_at_once, self.cell.schedule
            parts = [
                schedule.samples_of_rounds(int(client), first, self._rounds_at_once) for client in self.all.clients
            ]
            self._of_rounds = block, np.concatenate(parts, 1)
        samples: NDArray[np.int64] = self._of_rounds[1][place]
        return samples
