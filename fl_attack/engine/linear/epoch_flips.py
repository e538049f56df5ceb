"""Labels that attackers choose at the start of an epoch, over all that they hold, and keep for its minibatches."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_attack import adversary, attack
from fl_attack.engine import kernels
from fl_attack.engine.attackers import Attackers, Change, RoundAccess, no_change
from fl_attack.engine.batches import Batch, Batches
from fl_attack.scenario import Scenario

NUMBERS_AT_ONCE = 2**21  # logits, and features, of a piece: what several products read stays in the cache


class EpochFlips:
    """The labels that the attackers of a tile have written into their data for the epoch."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches) -> None:
        self.cells, self.batches = cells, batches
        self.layout = batches.whole_layout
        every_epoch = {"every": 1, "start": 1, "stop": None}
        planners = [
            Scenario(
                cell.settings.model_copy(update={"attack": cell.settings.attack.model_copy(update=every_epoch)}),
                *(cell.dataset, cell.partition, cell.schedule),
            )
            for cell in cells
        ]
        self.attackers = Attackers(planners, batches, self.layout)
        self.written: Tensor | None = None  # (M, n) the label, or -1
        self._flipped: Tensor | None = None  # (M, n + 1) two classes instead: 1 where it is the other one, else 0
        self.access: RoundAccess | None = None

    def renew(self, theta: Tensor, targets: Tensor | None, round_: int) -> None:
        """Choose the flips of the epoch that begins with a round, at theta (M C, d), with targets (M C, d) if any."""
        attackers, epoch = self.attackers, (round_ - 1) // self.cells[0].schedule.rounds_per_epoch + 1
        access = self.access = attackers.access(epoch, self.layout, round_)
        self.written = self._flipped = None
        if access is None or access.selection_plans is None:
            return
        M, C, n = attackers.M, attackers.C, access.n
        aimed = "goal" in attack.find(attackers.kind.name).uses
        v = self._direction(theta, targets, access) if aimed else theta
        priority = torch.empty(M, n, dtype=theta.dtype, device=theta.device)
        samples = self.batches.whole_samples[:n]
        pieces = self.batches.pieces(n, NUMBERS_AT_ONCE // (M * C + self.batches.d))
        if C == 1 and attackers.kind[:3:2] == ("greedy", "gain"):
            for batch, part in pieces:  # of samples that are signed: what a flip gains
                priority[:, part] = v @ batch.X.mT
            attackers.take_largest_(priority, samples, access, torch.empty_like(priority))
            self._flipped = functional.pad(priority, (0, 1))
            return
        labels = torch.empty(M, n, dtype=torch.int64, device=theta.device)
        args, classes = attackers.template_cell.settings.attack.args, attackers.template_cell.classes
        uniform = adversary.label_noise(attackers.template_cell, round_, int(self.layout.ends[-1]))
        noise = torch.from_numpy(uniform[self.batches.whole_samples.argsort().argsort()]).to(theta)
        for batch, part in pieces:
            width = part.stop - part.start
            view = attack.View(
                batch.y,
                torch.ones(width, dtype=theta.dtype, device=theta.device),
                scores=lambda b=batch: self._by_class(v, b),  # type: ignore[misc]
                logits=lambda b=batch: self._by_class(theta, b),  # type: ignore[misc]
                noise=noise[part],
                selection=attackers.template_cell.settings.attack.selection,
            )
            proposal = attack.propose(attackers.kind.name, view, args, (M, width), classes)
            labels[:, part], priority[:, part] = proposal.labels, proposal.priority.to(theta)
        attackers.take_largest_(priority, samples, access, torch.empty_like(priority))
        y = self.batches.y[torch.from_numpy(samples)].to(theta.device)
        self.written = labels.masked_fill_((priority == 0) | (labels == y), -1)
        if C == 1:
            self._flipped = functional.pad((self.written >= 0).to(theta), (0, 1))

    def _direction(self, theta: Tensor, targets: Tensor | None, access: RoundAccess) -> Tensor:
        """The direction v of each cell, (M C, d), up to a positive factor."""
        if targets is not None:
            return targets - theta
        M, C = self.attackers.M, self.attackers.C
        v = torch.zeros_like(theta)
        for batch, part in self.batches.pieces(int(self.layout.ends[-1]), NUMBERS_AT_ONCE // (M * C + self.batches.d)):
            R = kernels.residuals_(theta @ batch.X.mT, C, batch.encoded)
            if access.known is not None:
                R = (R.view(M, C, -1) * access.known[:, None, part]).view_as(R)
            v.addmm_(R, batch.X)
        return v

    def _by_class(self, rows: Tensor, batch: Batch) -> Tensor:
        """Inner products (M, n, classes) of rows (M C, d) with the features, not signed; two classes: 0 and the one."""
        signed = rows @ batch.X.mT
        if self.attackers.C > 1:
            return signed.view(self.attackers.M, self.attackers.C, -1).mT
        plain = signed * batch.sign
        return torch.stack([torch.zeros_like(plain), plain], -1)

    def flipped(self, batch: Batch, attacked: NDArray[np.bool_], n: int) -> Tensor:
        """The flips of two classes among the first n columns of a minibatch, (M, n): 1 for a flipped label, else 0."""
        if self._flipped is None:
            return batch.X.new_zeros(len(attacked), n)
        columns = self.batches.row[batch.at[:n]].clamp_(max=self._flipped.shape[1] - 1).to(batch.X.device)
        found = self._flipped.index_select(1, columns)
        return found if attacked.all() else found.mul_(torch.from_numpy(attacked).to(found)[:, None])

    def change(self, batch: Batch, attacked: NDArray[np.bool_], n: int) -> Change:
        """The labels written among the first n columns of a minibatch, in the cells that are `attacked` (M,) now."""
        if self.written is None:
            return no_change(batch.X.device)
        columns = self.batches.row[batch.at[:n]].to(self.written.device)
        labels = self.written.index_select(1, columns.clamp(max=self.written.shape[1] - 1))
        labels = labels.masked_fill((columns >= self.written.shape[1]) | ~torch.from_numpy(attacked)[:, None], -1)
        cells, at = (labels >= 0).nonzero(as_tuple=True)
        return Change(cells, at, labels[cells, at])
