"""A tile: cells of one kind of attack, whose attackers choose together what to write."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import adversary, attack
from fl_attack.engine import kernels
from fl_attack.engine.attackers import Attackers, Change, RoundAccess, no_change
from fl_attack.engine.batches import Batch, Batches, Layout
from fl_attack.engine.linear import client_updates
from fl_attack.engine.linear.epoch_flips import EpochFlips
from fl_attack.engine.log import Report
from fl_attack.models import outputs
from fl_attack.scenario import Scenario


class Shared(NamedTuple):
    """The minibatch of a round and the products with it that several tiles need."""

    round_: int
    batch: Batch
    gram: Tensor | None  # (n, writable) inner products of the samples; None where a product with X is cheaper
    target_logits: Tensor | None  # (T, C, writable) logits of the targets
    targets: Tensor  # (T C, d)


class Tile:
    """The attackers of some cells and what they do in a round; the parameters are moved by `block.Block`."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches, theta: Tensor, target_of: Tensor | None) -> None:
        """`theta` (M C, d) are the cells' own rows; `target_of` (M,) is None where all have the same target or none."""
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self.theta, self.batches, self.target_of = theta, batches, target_of
        self.attackers = Attackers(cells, batches, batches.all)
        self.epoch_flips = EpochFlips(cells, batches) if self.attackers.kind.refresh == "epoch" else None
        lr = torch.tensor([cell.settings.lr for cell in cells], dtype=theta.dtype, device=theta.device)
        self.lr = lr.repeat_interleave(self.C)[:, None]
        decay = torch.tensor([cell.settings.weight_decay for cell in cells], dtype=theta.dtype, device=theta.device)
        self.weight_decay = decay.repeat_interleave(self.C)[:, None]
        self._decays = bool(decay.any())
        first = cells[0].settings
        self.optimizer = first.server_optimizer
        self.training = first.server_optimizer, first.lr_schedule, first.lr_every, first.lr_decay
        self.several_steps = cells[0].settings.local_steps > 1
        self.server = client_updates.Server(cells, self.attackers)
        self.seeking: Counter[str] = Counter()  # cells of greedy attackers, by their goal
        if self.attackers.kind.exact:
            for part in self.attackers.parts:
                self.seeking[part.goal] += part.cells.stop - part.cells.start
        self.access: RoundAccess | None = None
        self.allowed = np.zeros(self.M, np.int64)  # flips in the last round

    def prepare(self, round_: int, layout: Layout) -> None:
        """Work out what the attackers can do in a round; to be called before `step`, for one round after the other."""
        self.access = self.attackers.access(round_, layout)

    def lr_factor(self, round_: int) -> float:
        """The factor of the learning rates in a round; all cells of a block have one schedule."""
        cell = self.attackers.template_cell
        return cell.lr(round_) / cell.settings.lr

    def scored_columns(self, goal: str) -> int:
        """The number of first columns of which greedy attackers of a goal need scores in this round."""
        return self.access.n if self.access is not None and self.seeking.get(goal) else 0

    @property
    def needs_client_updates(self) -> bool:
        """Whether the server sees what each client sends, and one product of all residuals is not enough."""
        return self.server.needed or self.several_steps

    def step(
        self, Z: Tensor, shared: Shared, workspace: kernels.Workspace, watched: bool, measured: bool
    ) -> tuple[Report | None, Tensor | None]:
        """Turn the logits of a round into residuals with the labels as written.

        Parameters
        ----------
        Z : (M C, n) tensor
            Logits, signed for two classes; overwritten by the residuals.
        shared : Shared
            What all tiles use.
        workspace : Workspace
            Memory.
        watched : bool
            Whether a report is wanted.
        measured : bool
            Whether it is to hold the cosine and `detect.MEASURES`.

        Returns
        -------
        report : Report or None
        aggregate : (M C, d) tensor or None
            Where the tile `needs_client_updates`; else the residuals times the features are the sum of all updates.
        """
        batch, access = shared.batch, self.access
        logits = Z[:, : access.n].clone() if access is not None and self._needs_logits else None
        scores = None
        if self.seeking and access is not None and access.selection_plans is not None:
            scores = workspace.buffer("scores", self.M, self.C, access.n)
        self._towards_targets(Z, shared, scores)
        R = kernels.residuals_(Z, self.C, batch.encoded)
        self._along_clean_gradients(R, shared, scores, workspace)
        clean = self._clean_gradient(R, batch) if measured else None
        change = self._relabel(R, shared, scores, logits, workspace, watched)
        aggregate = detection = None
        if self.needs_client_updates or (measured and access is not None):
            aggregate, detection = self._aggregate(R, batch, shared, measured)
        if not self.needs_client_updates:
            aggregate = self._clean_gradient(R, batch) if measured else None
        cosine = _cosine(aggregate, clean, self.M) if aggregate is not None and clean is not None else None
        report = Report(change, self.allowed, cosine, detection) if watched and change is not None else None
        return report, aggregate if self.needs_client_updates else None

    @property
    def _needs_logits(self) -> bool:
        """Whether the attack asks for the logits of a round before they become residuals."""
        kind = self.attackers.kind
        return not kind.exact and not self.server.crafts and kind.refresh == "step"

    def _towards_targets(self, Z: Tensor, shared: Shared, scores: Tensor | None) -> None:
        """Fill scores (M, C, n) of targeted cells along `target - theta`: the target's logits less those of theta."""
        if scores is None or shared.target_logits is None:
            return
        n, logits = scores.shape[-1], Z.view(self.M, self.C, -1)
        for part in self.attackers.parts:
            if part.goal == "targeted":
                goals = shared.target_logits
                goals = goals if self.target_of is None else goals[self.target_of[part.cells]]
                torch.sub(goals[:, :, :n], logits[part.cells, :, :n], out=scores[part.cells])

    def _along_clean_gradients(
        self, R: Tensor, shared: Shared, scores: Tensor | None, workspace: kernels.Workspace
    ) -> None:
        """Fill the scores (M, C, n) of untargeted cells, along `v = R X` up to its scale: `X v^T = (X X^T) R^T`."""
        if scores is None:
            return
        batch, n, C = shared.batch, scores.shape[-1], self.C
        for part in self.attackers.parts:
            if part.goal != "untargeted":
                continue
            known = self._weighted(R[part.cells.start * C : part.cells.stop * C], batch, part.cells)
            out = scores[part.cells].view(-1, n)
            if shared.gram is not None:
                torch.mm(known, shared.gram[:, :n], out=out)
            else:
                v = torch.mm(known, batch.X, out=workspace.buffer("gradient", len(known), batch.X.shape[1]))
                torch.mm(v, batch.X[:n].mT, out=out)

    def _weighted(self, R: Tensor, batch: Batch, cells: slice = slice(None)) -> Tensor:
        """The residuals (M C, n) that times the features are the gradient that the attackers of cells know."""
        if self.access is not None and self.access.known is not None:
            R = (R.view(-1, self.C, R.shape[1]) * self.access.known[cells, None]).view_as(R)
        return R if batch.counts is None else R * batch.counts

    def _relabel(
        self,
        R: Tensor,
        shared: Shared,
        scores: Tensor | None,
        logits: Tensor | None,
        workspace: kernels.Workspace,
        watched: bool,
    ) -> Change | None:
        """Give residuals R (M C, n) the attackers' labels; gives the labels that changed where that is watched."""
        attackers, access, batch = self.attackers, self.access, shared.batch
        self.allowed = np.zeros(self.M, np.int64)
        if access is None or self.server.crafts or (self.epoch_flips is None and access.selection_plans is None):
            return no_change(R.device)
        flipped = None  # two classes: where a label is, 1, else 0, (M, n)
        scratch = workspace.buffer("sorted", self.M, access.n)
        if self.epoch_flips is not None:
            attacked = self._renew_epoch_flips(shared, access, self.epoch_flips)
            if self.C == 1:
                flipped = self.epoch_flips.flipped(batch, attacked, access.n)
                attackers.count_flipped(flipped)
            else:
                change = attackers.count(self.epoch_flips.change(batch, attacked, access.n), batch)
        else:
            self.allowed = access.allowed
            if not attackers.kind.exact:
                assert logits is not None
                view = self._view(R, shared, logits, access)
                threat = attackers.template_cell.settings.attack
                shape, classes = (self.M, access.n), attackers.template_cell.classes
                proposal = attack.propose(threat.name, view, threat.args, shape, classes)
                change = attackers.proposed(proposal, batch, access, scratch)
            else:
                assert scores is not None
                if self.C == 1:
                    flipped = attackers.chosen(scores[:, 0], batch, access, scratch)
                else:
                    priority = workspace.buffer("priority", self.M, access.n)
                    change = attackers.changes(scores, batch, access, priority, scratch)
        if flipped is not None:
            R[:, : access.n].sub_(flipped)
            if not watched:
                return None
            cells, columns = flipped.nonzero(as_tuple=True)
            return Change(cells, columns, 1 - batch.y[columns])
        if self.C == 1:
            R[change.cells, change.columns] -= 1
        else:
            by_class = R.view(self.M, self.C, -1)
            by_class[change.cells, batch.y[change.columns], change.columns] += 1
            by_class[change.cells, change.labels, change.columns] -= 1
        return change

    def _renew_epoch_flips(self, shared: Shared, access: RoundAccess, epoch_flips: EpochFlips) -> NDArray[np.bool_]:
        """Have the flips of an epoch chosen where it begins; gives which cells (M,) are attacked in this round."""
        if shared.round_ == adversary.epoch_start(self.attackers.template_cell, shared.round_):
            epoch_flips.renew(self.theta, self._targets(shared, slice(0, self.M)), shared.round_)
        attacked = self.attackers.rounds.attacked(shared.round_)
        if epoch_flips.access is not None:
            self.allowed = epoch_flips.access.allowed * attacked * access.malicious.any(1).cpu().numpy()
        return attacked

    def _view(self, R: Tensor, shared: Shared, logits: Tensor, access: RoundAccess) -> attack.View:
        """What an attack on labels sees of a round, given the residuals (M C, n) and logits (M C, n) of the cells."""
        batch, n = shared.batch, access.n

        def scores() -> Tensor:
            # for any attack but the fast one, which is why nothing is saved here
            targets = self._targets(shared, slice(0, self.M))
            v = self._weighted(R, batch) @ batch.X if targets is None else targets - self.theta
            return v @ batch.X[:n].mT

        def by_class(signed: Tensor) -> Tensor:
            """(M, n, classes) of signed logits or scores (M C, n)."""
            if self.C > 1:
                return signed.view(self.M, self.C, n).mT
            return outputs.class_logits((signed * batch.sign[:n])[..., None])

        return self.attackers.view(batch, access, lambda: by_class(scores()), lambda: by_class(logits), shared.round_)

    def _targets(self, shared: Shared, cells: slice) -> Tensor | None:
        """The target (cells C, d) of each of these cells; None where they are not targeted."""
        if self.attackers.kind.goal != "targeted":
            return None
        by_target = shared.targets.view(-1, self.C, shared.targets.shape[-1])
        number = torch.zeros(self.M, dtype=torch.int64) if self.target_of is None else self.target_of
        return by_target[number[cells]].reshape(-1, by_target.shape[-1])

    def _clean_gradient(self, R: Tensor, batch: Batch) -> Tensor:
        """The gradient of residuals R with the weight decay, up to the number of samples, (M C, d)."""
        gradient = (R if batch.counts is None else R * batch.counts) @ batch.X
        if self._decays:
            n = batch.X.shape[0] if batch.counts is None else float(batch.counts.sum())
            gradient.addcmul_(self.theta, self.weight_decay, value=n)
        return gradient

    def _aggregate(self, R: Tensor, batch: Batch, shared: Shared, measured: bool) -> tuple[Tensor, Tensor | None]:
        """The aggregate (M C, d) of the clients' updates and, where measured, `detect.MEASURES` (M, measures)."""
        written = None
        if self.several_steps:
            clean = torch.mm(self.theta, batch.X.mT)
            written = R - kernels.residuals_(clean, self.C, batch.encoded)
        rate = self.lr * self.lr_factor(shared.round_)
        of = client_updates.Residuals(self.theta, R, written, rate, self.weight_decay if self._decays else None)
        if not self.server.needed and not measured:
            return self.server.mean(of, batch), None

        def v(cells: slice) -> Tensor:
            targets = self._targets(shared, cells)
            rows = slice(cells.start * self.C, cells.stop * self.C)
            if targets is not None:
                return (targets - self.theta[rows]).view(-1, self.C, self.theta.shape[1])
            known = self.access.known[cells, None] if self.access is not None and self.access.known is not None else 1
            weighted = R[rows].view(-1, self.C, R.shape[1]) * known
            if batch.counts is not None:
                weighted = weighted * batch.counts
            return weighted @ batch.X

        return self.server.take(of, batch, self.access, v, shared.round_, measured)


def _cosine(aggregate: Tensor, clean: Tensor, M: int) -> Tensor:
    """The cosine (M,) of two gradients (M C, d) of each cell; NaN where one of them is zero."""
    a, b = (gradient.view(M, -1).double() for gradient in (aggregate, clean))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)
