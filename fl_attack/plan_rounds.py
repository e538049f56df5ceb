"""The rounds that plans of `attack=planned` are made for: minibatches, and what the attackers can write in each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, protocol, streams
from fl_attack.planning import Minibatch, WriteAccess
from fl_attack.scenario import Scenario

ROWS_AT_ONCE = 4096  # samples turned into features in one piece
RESIDENT = 4  # features may take one part in so many of the memory


class HeldFeatures:
    """The features of the training samples that clients hold, in double precision."""

    def __init__(self, cell: Scenario, memory: float) -> None:
        """They are kept where they take at most 1 / `RESIDENT` of `memory`, in bytes."""
        self._cell, self._memory = cell, memory

    def of(self, samples: NDArray[np.int64], out: Tensor | None) -> Tensor:
        """The features (n, ...) of samples.

        Parameters
        ----------
        samples : array of int, (n,)
            Positions in the training set, of samples that the clients hold.
        out : tensor, optional
            Memory of earlier features, which is used again where the features are kept and there are as many.
        """
        if self._resident is None:
            return self._cell.features(samples).double()
        row = torch.from_numpy(self._row[samples])
        return torch.index_select(self._resident, 0, row, out=out if out is not None and len(out) == len(row) else None)

    @cached_property
    def _resident(self) -> Tensor | None:
        """The features of all samples that clients hold; None where they take over 1 / `RESIDENT` of the memory."""
        held = np.flatnonzero(self._row >= 0)
        one = self._cell.features(held[:1]).double()
        if len(held) * one.nbytes > self._memory / RESIDENT:
            return None
        whole = one.new_empty(len(held), *one.shape[1:])
        for part in torch.arange(len(held)).split(ROWS_AT_ONCE):
            whole[part] = self._cell.features(held[part.numpy()]).double()
        return whole

    @cached_property
    def _row(self) -> NDArray[np.int64]:
        """The row of each training sample among those that the clients hold; -1 of the others."""
        held = self._cell.partition.client >= 0
        return np.where(held, np.cumsum(held) - 1, -1)


class PlannedRounds:
    """The rounds that the plans of some cells are made for, by one schedule.

    Parameters
    ----------
    cells : sequence of Scenario
        M cells that share their minibatches.
    starts : int
        The number of plans that each cell has: plan p is of cell p // starts.
    rounds : range
        The T rounds, from 1.
    schedule : protocol.Schedule
        Which samples are used in each: those that come, or `imagined` ones.
    features : HeldFeatures
        The features of the samples.
    """

    def __init__(
        self,
        cells: Sequence[Scenario],
        starts: int,
        rounds: range,
        schedule: protocol.Schedule,
        features: HeldFeatures,
    ) -> None:
        self.cells, self.starts, self.rounds, self.schedule = cells, starts, rounds, schedule
        self._features = features
        self._last: tuple[int, Minibatch] | None = None  # the minibatch that was asked for last, and its round
        self._samples: dict[int, NDArray[np.int64]] = {}
        self._access: dict[int, WriteAccess | None] = {}
        self._by_content: dict[bytes, WriteAccess] = {}

    def batch(self, round_: int) -> Minibatch:
        """The minibatch of a round, from 1, in double precision; overwritten when another round is asked for."""
        last = self._last
        if last is not None and last[0] == round_:
            return last[1]
        samples = self.samples(round_)
        if last is not None and np.array_equal(samples, self.samples(last[0])):
            return last[1]  # full batches are all the same
        # into the same memory: between ever new pieces what is kept of each round would lie
        X = self._features.of(samples, None if last is None else last[1].X)
        batch = Minibatch(X, torch.from_numpy(self.cells[0].dataset.y_train[samples]))
        self._last = round_, batch
        return batch

    def samples(self, round_: int) -> NDArray[np.int64]:
        """The samples of the minibatch of a round, ascending; an equal round's array is the same."""
        if round_ not in self._samples:
            samples, last = self.schedule.round_samples(round_)[0], self._last
            before = samples if last is None else self._samples[last[0]]
            self._samples[round_] = before if np.array_equal(samples, before) else samples.copy()
        return self._samples[round_]

    def access(self, round_: int) -> WriteAccess | None:
        """What the attackers of all plans can write in a round; None where none of them can write anything."""
        if round_ not in self._access:
            self._access[round_] = self._round_access(round_)
        return self._access[round_]

    def _round_access(self, round_: int) -> WriteAccess | None:
        """What `access` gives of a round that it has not seen; equal ones of several rounds are one object."""
        budgets = self.budgets[round_ - self.rounds[0]]  # (M, G)
        if not budgets.any():
            return None
        client = self.cells[0].partition.client[self.samples(round_)]
        participating = np.isin(np.arange(len(self.schedule.shards)), self.schedule.participants(round_))
        malicious = np.logical_and(self._is_malicious, participating)
        of_any: NDArray[np.bool_] = np.asarray(malicious.any(0))
        columns = np.flatnonzero(of_any[client])
        if not len(columns):
            return None
        mask = torch.from_numpy(malicious[:, client[columns]]).repeat_interleave(self.starts, 0)
        pooled = self.cells[0].settings.attack.scope == "pooled"
        group = torch.zeros(len(columns), dtype=torch.int64) if pooled else torch.from_numpy(client[columns])
        key = b"|".join(part.tobytes() for part in (columns, group.numpy(), mask.numpy(), budgets))
        if key not in self._by_content:  # as most rounds are
            budget = torch.from_numpy(budgets).repeat_interleave(self.starts, 0)
            self._by_content[key] = WriteAccess(
                torch.from_numpy(columns), group, None if bool(mask.all()) else mask, budget
            )
        return self._by_content[key]

    @cached_property
    def _is_malicious(self) -> NDArray[np.bool_]:
        """Which clients are malicious in each cell, (M, clients) of bool."""
        clients = np.arange(len(self.schedule.shards))
        return np.array([np.isin(clients, cell.partition.malicious) for cell in self.cells])

    @cached_property
    def budgets(self) -> NDArray[np.int64]:
        """Flips allowed (T, M, G) in each round, G = 1 budget or one for each client."""
        return np.stack([allowances(cell, self.rounds, self.schedule) for cell in self.cells], 1)


def imagined(schedule: protocol.Schedule, first: int) -> protocol.Schedule:
    """A schedule as attackers imagine it: the same shards, in an order of their own.

    Parameters
    ----------
    schedule : protocol.Schedule
        The true one.
    first : int
        The round that their plan begins with, from 1; each plan has an order of its own.
    """
    seed = int(np.random.default_rng([schedule.seed, streams.IMAGINED, first]).integers(2**62))
    return replace(schedule, seed=seed)


def allowances(cell: Scenario, rounds: range, schedule: protocol.Schedule) -> NDArray[np.int64]:
    """The flips that the malicious clients of an experiment may make.

    Parameters
    ----------
    cell : Scenario
        The experiment.
    rounds : range
        The T rounds that are asked for, from 1.
    schedule : protocol.Schedule
        Which clients take part in each round.

    Returns
    -------
    array of int, (T, G)
        The flips allowed in each round: of all malicious clients together, G = 1; with `attack.scope=per_client` of
        each client by its number, 0 of honest ones. Rounds that are not attacked have 0.
    """
    threat, pooled = cell.settings.attack, cell.settings.attack.scope == "pooled"
    malicious = np.isin(np.arange(len(schedule.shards)), cell.partition.malicious)
    before: Counter[int] = Counter()
    found = np.zeros((len(rounds), 1 if pooled else len(malicious)), np.int64)
    for round_ in range(1, rounds[-1] + 1):
        if attack.attacked_before(round_, threat.every, threat.start, threat.stop) is None:
            continue
        participating = np.zeros(len(malicious), bool)
        participating[schedule.participants(round_)] = True
        writable = schedule.used * (malicious & participating)
        for group, size in enumerate([int(writable.sum())] if pooled else writable.tolist()):
            if size and round_ >= rounds[0]:
                allowed = attack.flip_allowance(threat.exact_budget, before[group], size, threat.rounding)
                found[round_ - rounds[0], group] = allowed
            before[group] += size
    return found
