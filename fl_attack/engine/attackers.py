"""The attackers of cells that are stepped together: what they may write, what they know, what they choose."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.attack import Knowledge, Scope, Selection
from fl_attack.engine import kernels
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.budgets import Allowances
from fl_attack.scenario import Scenario


class Kind(NamedTuple):
    """What the cells of a tile have in common."""

    goal: str  # none where nobody attacks
    selection: Selection
    scope: Scope
    knowledge: Knowledge


def kind_of(cell: Scenario) -> Kind:
    """The kind of attack of a cell."""
    threat = cell.settings.attack
    if not cell.settings.attacked:
        return Kind("none", "gain", "pooled", "full")
    return Kind(threat.goal, threat.selection, threat.scope, threat.knowledge)


class Change(NamedTuple):
    """The labels that a round's attackers change, by cell and column."""

    cells: Tensor  # (flips,) int64
    columns: Tensor
    labels: Tensor


class Attackers:
    """The attackers of a tile: what they may write, what they know, how much they may flip."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches) -> None:
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self.kind = kind_of(cells[0])
        self.device, self.dtype = batches.device, batches.dtype
        self.tiny = float(np.nextafter(torch.zeros((), dtype=self.dtype).numpy()[()], 1))  # above 0, whatever is
        self.flips = np.zeros(self.M, np.int64)  # in all rounds
        self.last = self.flips.copy()  # in the last round
        if self.kind.goal == "none":
            self.n = 0
            return
        used, total = cells[0].schedule.used, cells[0].settings.clients.total
        evil = np.array([np.isin(np.arange(total), cell.partition.malicious) for cell in cells])  # (M, clients)
        owner = np.repeat(batches.clients, used[batches.clients])  # the client of each column
        writable = evil[:, owner]
        self.n = int(np.flatnonzero(writable.any(0))[-1]) + 1
        mine = torch.from_numpy(writable[:, : self.n]).to(self.device)
        self.barred = None if bool(mine.all()) else torch.where(mine, 0.0, -torch.inf).to(self.dtype)
        known = {"full": None, "honest": ~writable, "own": writable}[self.kind.knowledge]
        self.known = None if known is None else torch.from_numpy(known).to(self.device, self.dtype)
        if self.kind.scope == "pooled":
            self.groups = [slice(0, self.n)]
            reach = (evil * used).sum(1, keepdims=True)
        else:
            clients = [client for client in batches.clients if evil[:, client].any()]
            self.groups = [batches.columns(int(client)) for client in clients]
            reach = evil[:, clients] * used[clients]
        self.allowances = Allowances([cell.settings.attack for cell in cells], reach, cells[0].settings.rounds)
        self._allowed: NDArray[np.int64] | None = None
        self._picks: list[kernels.Pick] | None = None

    def allowed(self, round_: int) -> NDArray[np.int64]:
        """Flips allowed in a round, (M,)."""
        if not self.n:
            return np.zeros(self.M, np.int64)
        total: NDArray[np.int64] = self.allowances.at(round_).sum(1)
        return total

    def picks(self, round_: int) -> list[kernels.Pick] | None:
        """What may be taken of each group of columns in a round; None where nobody may flip anything."""
        if not self.n:
            return None
        allowed = self.allowances.at(round_)
        if allowed is not self._allowed and (self._allowed is None or (allowed != self._allowed).any()):
            floor = self.tiny if self.kind.selection == "gain" else torch.finfo(self.dtype).min
            self._picks = None
            if allowed.any():
                budgets = zip(self.groups, allowed.T, strict=True)
                self._picks = [kernels.pick(b.copy(), part.stop - part.start, floor, self.dtype) for part, b in budgets]
        self._allowed = allowed
        if self._picks is None:
            self.last = np.zeros(self.M, np.int64)
        return self._picks

    def chosen(self, gains: Tensor, batch: Batch, picks: list[kernels.Pick], scratch: Tensor) -> Tensor:
        """Two classes: 1 where a label is flipped, else 0, (M, n); in the place of the gains."""
        literal = self.kind.selection == "literal"
        if literal:  # ranked by the score of label 1; flipped where the label with the better score isn't there
            y = batch.y[: self.n]
            change = (gains > 0) | ((gains == 0) & (y == 1))
            gains.mul_(1 - 2 * y)
        elif batch.counts is not None:
            gains.mul_(batch.counts[: self.n])
        self.last = self._take_largest_(gains, batch, picks, scratch)
        if literal:
            self.last = gains.mul_(change).sum(1).long().cpu().numpy()
        self.flips += self.last
        return gains

    def changes(
        self, scores: Tensor, batch: Batch, picks: list[kernels.Pick], priority: Tensor, scratch: Tensor
    ) -> Change:
        """Several classes: the labels that change, from the scores (M, C, n); see `attack.greedy`."""
        y = batch.y[: self.n]
        torch.amax(scores, 1, out=priority)
        if self.kind.selection == "gain":
            priority.sub_(scores.gather(1, y.expand(self.M, 1, self.n))[:, 0])
            if batch.counts is not None:
                priority.mul_(batch.counts[: self.n])
        self._take_largest_(priority, batch, picks, scratch)
        cells, columns = priority.nonzero(as_tuple=True)
        labels = scores[cells, :, columns].argmax(-1)
        new = labels != y[columns]
        change = Change(cells[new], columns[new], labels[new])
        self.last = torch.bincount(change.cells, minlength=self.M).cpu().numpy()
        self.flips += self.last
        return change

    def _take_largest_(
        self, priority: Tensor, batch: Batch, picks: list[kernels.Pick], scratch: Tensor
    ) -> NDArray[np.int64]:
        if self.barred is not None:
            priority.add_(self.barred)
        if len(picks) == 1 and self.groups[0].stop - self.groups[0].start == self.n:
            return kernels.take_largest_(priority, picks[0], scratch, batch.samples[: self.n])
        taken = np.zeros(self.M, np.int64)
        for part, pick in zip(self.groups, picks, strict=True):
            room = scratch.view(-1)[: self.M * (part.stop - part.start)].view(self.M, -1)
            taken += kernels.take_largest_(priority[:, part], pick, room, batch.samples[part])
        return taken
