"""A tile: cells of one kind of attack that are stepped together, few enough to stay in the processor's cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.engine import kernels
from fl_attack.engine.attackers import Attackers, Change
from fl_attack.engine.batches import Batch, Batches
from fl_attack.scenario import Scenario


class Shared(NamedTuple):
    """What the tiles share in a round."""

    round_: int
    batch: Batch
    gram: Tensor | None  # (n, writable) inner products of the samples; None where a product with X is cheaper
    steered: Tensor | None  # (T, C, writable) logits of the targets


class Report(NamedTuple):
    """What there is to say of a round in which a tile was watched."""

    change: Change
    cosine: Tensor | None  # (M,) between the aggregate and the clean gradient, NaN where one of them is zero


class Tile:
    """The parameters of some cells, and their rounds."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches, theta: Tensor, target_of: Tensor | None) -> None:
        """`theta` (M C, d) is changed in place; `target_of` (M,) is None where all have the same target or none."""
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self.theta, self.batches, self.target_of = theta, batches, target_of
        self.attackers = Attackers(cells, batches)
        lr = torch.tensor([cell.settings.lr for cell in cells], dtype=theta.dtype, device=theta.device)
        self.lr = lr.repeat_interleave(self.C)[:, None]
        self.server = kernels.Server(cells[0].settings.server_optimizer, theta, self.lr)
        self.local = cells[0].settings.local_steps > 1

    def step(self, shared: Shared, room: kernels.Room, watched: bool, measured: bool) -> Report | None:
        """One round of all cells; a report where they are watched, with the cosine where they are measured."""
        batch, M, C, n = shared.batch, self.M, self.C, self.attackers.n
        Z = torch.mm(self.theta, batch.X.mT, out=room.take("Z", M * C, len(batch.X)))
        picks = self.attackers.picks(shared.round_)
        scores = room.take("scores", M, C, n)
        targeted = picks is not None and self.attackers.kind.goal == "targeted"
        if targeted:
            assert shared.steered is not None
            goal = shared.steered if self.target_of is None else shared.steered[self.target_of]
            torch.sub(goal[:, :, :n], Z.view(M, C, -1)[:, :, :n], out=scores)
        R = kernels.residuals_(Z, C, batch.encoded)
        if picks is not None and not targeted:
            self._along_the_clean_gradient(R, shared, room, scores)
        clean = self._clean_gradient(R, batch) if measured else None
        change = self._relabel(R, batch, picks, scores, room, watched)
        if self.local:
            aggregate = self._aggregate(R, batch, room)
            cosine = _cosine(aggregate, clean, M) if clean is not None else None
            self.server.take(aggregate)
        else:
            cosine = _cosine(R @ batch.X, clean, M) if clean is not None else None
            self.server.descend(R, batch.X, room)
        return Report(change, cosine) if watched and change is not None else None

    def _along_the_clean_gradient(self, R: Tensor, shared: Shared, room: kernels.Room, scores: Tensor) -> None:
        """Scores along `v = R X`: `X v^T = (X X^T) R^T`. The scale of v changes nothing."""
        batch, n, known = shared.batch, self.attackers.n, self.attackers.known
        if known is not None:
            R = (R.view(self.M, self.C, -1) * known[:, None]).view_as(R)
        if batch.counts is not None:
            R = R * batch.counts
        if shared.gram is not None:
            torch.mm(R, shared.gram[:, :n], out=scores.view(-1, n))
        else:
            v = torch.mm(R, batch.X, out=room.take("gradient", *self.theta.shape))
            torch.mm(v, batch.X[:n].mT, out=scores.view(-1, n))

    def _relabel(
        self,
        R: Tensor,
        batch: Batch,
        picks: list[kernels.Pick] | None,
        scores: Tensor,
        room: kernels.Room,
        watched: bool,
    ) -> Change | None:
        """Give the residuals the attackers' labels; what has changed where that is watched."""
        attackers, M, C, n = self.attackers, self.M, self.C, self.attackers.n
        if picks is None:
            none = torch.empty(0, dtype=torch.int64, device=R.device)
            return Change(none, none, none)
        scratch = room.take("sorted", M, n)
        if C == 1:
            flipped = attackers.chosen(scores[:, 0], batch, picks, scratch)
            R[:, :n].sub_(flipped)
            if not watched:
                return None
            cells, columns = flipped.nonzero(as_tuple=True)
            return Change(cells, columns, 1 - batch.y[columns])
        change = attackers.changes(scores, batch, picks, room.take("priority", M, n), scratch)
        by_class = R.view(M, C, -1)
        by_class[change.cells, batch.y[change.columns], change.columns] += 1
        by_class[change.cells, change.labels, change.columns] -= 1
        return change

    def _clean_gradient(self, R: Tensor, batch: Batch) -> Tensor:
        return (R if batch.counts is None else R * batch.counts) @ batch.X

    def _aggregate(self, R: Tensor, batch: Batch, room: kernels.Room) -> Tensor:
        """The mean of the clients' updates after several local steps each, over lr."""
        written = R - kernels.residuals_(
            torch.mm(self.theta, batch.X.mT, out=room.take("clean", *R.shape)), self.C, batch.encoded
        )
        sizes = self.batches.like.schedule.sizes[self.batches.clients]
        moved, total = room.take("moved", *self.theta.shape), room.take("total", *self.theta.shape).zero_()
        for size, steps in zip(sizes, batch.steps, strict=True):
            moved.copy_(self.theta)
            for columns in steps:
                X = batch.X[columns]
                encoded = batch.encoded[:, columns] if self.C > 1 else batch.encoded
                step = kernels.residuals_(moved @ X.mT, self.C, encoded).add_(written[:, columns])
                moved.addmm_(step.mul_(self.lr), X, alpha=-1 / int(size))
            total.add_(moved, alpha=float(size / sizes.sum()))
        return torch.sub(self.theta, total, out=moved).div_(self.lr)


def _cosine(aggregate: Tensor, clean: Tensor, M: int) -> Tensor:
    a, b = (gradient.view(M, -1).double() for gradient in (aggregate, clean))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)
