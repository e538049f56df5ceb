"""How the attackers of a tile come to the labels that they write in a round.

Each way is one class with one method, `write`: logits go in, and come out as residuals with the true labels, beside the
labels that are written. Shapes: M cells, C outputs, n columns of the minibatch, d features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import adversary, knowledge, plans
from fl_attack.checkpoint import State
from fl_attack.engine import choices, kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch
from fl_attack.engine.choices import Change, no_change
from fl_attack.engine.linear.shared import Shared
from fl_attack.engine.linear.targets import TargetsOf
from fl_attack.models import outputs
from fl_attack.scenario import NO_FLIPS, Scenario


class Written(NamedTuple):
    """The labels that the attackers of M cells write in a round, in one of two forms."""

    flipped: Tensor | None  # (M, writable) two classes: 1 where a label is the other one, else 0; None: see `change`
    change: Change | None
    flips: NDArray[np.int64]  # (M,) how many each cell flips
    allowed: NDArray[np.int64]  # (M,) how many its budget allows

    def put_into(self, R: Tensor, batch: Batch, C: int) -> None:
        """Give residuals the written labels, in place.

        Parameters
        ----------
        R : (M C, n) tensor
            Residuals under the true labels.
        batch : Batch
            The minibatch.
        C : int
            Number of logits of a sample.
        """
        if self.flipped is not None:
            R[:, : self.flipped.shape[1]].sub_(self.flipped)
        if self.change is None:
            return
        cells, columns, labels = self.change
        if C == 1:
            R[cells, columns] -= 1
        else:
            by_class = R.view(-1, C, R.shape[1])
            by_class[cells, batch.y[columns], columns] += 1
            by_class[cells, labels, columns] -= 1

    def as_change(self, batch: Batch) -> Change:
        """The labels as a change, whatever form they are in."""
        if self.flipped is not None:
            return choices.of_mask(self.flipped, batch.y)
        return no_change(batch.X.device) if self.change is None else self.change


class Way(Protocol):
    """A way to come to the labels of a round."""

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """The labels that attackers write in a round.

        Parameters
        ----------
        Z : (M C, n) tensor
            Logits, which become residuals under the true labels, in place.
        shared : Shared
            The minibatch, and products with it that tiles share.
        access : RoundAccess or None
            What may be written; None where nobody attacks in any round.
        workspace : Workspace
            Memory for intermediate values.

        Returns
        -------
        Written or None
            None, or without flips, where no label is written.
        """


class Nobody:
    """No label is written."""

    def __init__(self, C: int) -> None:
        self.C = C

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """None: only the residuals are worked out, see `Way.write`."""
        kernels.residuals_(Z, self.C, shared.batch.encoded)
        return None


class Greedy:
    """Greedy flips, chosen anew in every round along the direction of each cell."""

    def __init__(self, attackers: Attackers, targets: TargetsOf) -> None:
        self.attackers, self.targets = attackers, targets

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """The labels that lower the inner product most, see `Way.write`."""
        M, C, batch = self.attackers.M, self.attackers.C, shared.batch
        if access is None or access.selection_plans is None:
            kernels.residuals_(Z, C, batch.encoded)
            return None
        scores = workspace.buffer("scores", M, C, access.n)
        self._along_targets(Z, shared, scores)
        R = kernels.residuals_(Z, C, batch.encoded)
        self._along_clean_gradients(R, shared, access, scores, workspace)
        scratch, parts = workspace.buffer("sorted", M, access.n), self.attackers.parts
        if C == 1:
            flipped = scores[:, 0]
            count = choices.greedy_of_two(flipped, batch, access, parts, scratch)
            return Written(flipped, None, count, access.allowed)
        priority = workspace.buffer("priority", M, access.n)
        change = choices.greedy_of_several(scores, batch, access, parts, priority, scratch)
        return Written(None, change, change.per_cell(M), access.allowed)

    def _along_targets(self, Z: Tensor, shared: Shared, scores: Tensor) -> None:
        """Fill scores (M, C, n) of targeted cells along `target - theta`: the target's logits less those of theta."""
        if shared.target_logits is None:
            return
        n, logits = scores.shape[-1], Z.view(*scores.shape[:2], -1)
        for part in self.attackers.parts:
            if part.goal == "targeted":
                goals = self.targets.pick(shared.target_logits, part.cells)
                torch.sub(goals[:, :, :n], logits[part.cells, :, :n], out=scores[part.cells])

    def _along_clean_gradients(
        self, R: Tensor, shared: Shared, access: RoundAccess, scores: Tensor, workspace: kernels.Workspace
    ) -> None:
        """Fill the scores (M, C, n) of untargeted cells, along `v = R X` up to its scale: `X v^T = (X X^T) R^T`."""
        batch, n, C = shared.batch, scores.shape[-1], self.attackers.C
        for part in self.attackers.parts:
            if part.goal != "untargeted":
                continue
            known = known_residuals(R[part.cells.start * C : part.cells.stop * C], batch, access.known, C, part.cells)
            out = scores[part.cells].view(-1, n)
            if shared.gram is not None:
                torch.mm(known, shared.gram[:, :n], out=out)
            else:
                v = torch.mm(known, batch.X, out=workspace.buffer("gradient", len(known), batch.X.shape[1]))
                torch.mm(v, batch.X[:n].mT, out=out)


class Planned:
    """Flips that are planned: for all rounds before the first, or with `attack.horizon` anew now and then."""

    def __init__(self, cells: Sequence[Scenario], theta: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
        """`theta` (M C, d) are the parameters, which the server moves in place; `whole` gives all (A, B) of a cell."""
        self.C, self.cells = cells[0].theta_shape[0], cells
        self.theta, self.whole = theta, whole
        self.plans = [plans.plan(cell) if plans.plans_whole_run(cell) else None for cell in cells]
        self.epoch_theta: list[Tensor | None] = [None] * len(cells)  # (A, B) that a plan of now and then begins with

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """The labels of the round's plan, see `Way.write`."""
        batch = shared.batch
        kernels.residuals_(Z, self.C, batch.encoded)
        self._plan_anew(shared.round_)
        flips = [NO_FLIPS if one is None else one.flips(shared.round_) for one in self.plans]
        count = np.array([len(one.samples) for one in flips])
        order = batch.samples.argsort()
        columns = order[np.searchsorted(batch.samples[order], np.concatenate([one.samples for one in flips]))]
        cells, labels = np.repeat(np.arange(len(flips)), count), np.concatenate([one.labels for one in flips])
        change = Change(*(torch.from_numpy(part).to(Z.device) for part in (cells, columns, labels)))
        return Written(None, change, count, np.array([one.allowed for one in flips]))

    def _plan_anew(self, round_: int) -> None:
        """Make the plans that attackers need in a round and do not have; those of one length together."""
        for i, (cell, rows) in enumerate(zip(self.cells, self.theta.split(self.C), strict=True)):
            if not plans.plans_whole_run(cell) and plans.first_round(cell, round_) == round_:
                self.plans[i], self.epoch_theta[i] = None, self.whole(rows).double()
        lacking: dict[int, list[int]] = {}
        for i, cell in enumerate(self.cells):
            if self.plans[i] is None and adversary.attacks(cell, round_) and self._started(i).isfinite().all():
                lacking.setdefault(plans.first_round(cell, round_), []).append(i)
        for first, some in lacking.items():
            plans.make_together([self.cells[i] for i in some], first, [self._started(i) for i in some])
            for i in some:
                self.plans[i] = plans.plan(self.cells[i], first, self._started(i))

    def _started(self, cell: int) -> Tensor:
        """The parameters (A, B) of a cell that its plan of now and then begins with."""
        theta = self.epoch_theta[cell]
        assert theta is not None
        return theta

    def state(self, round_: int) -> State:
        """The state that `restore` needs to go on after a round."""
        sweeps = [[] if plans.plans_whole_run(cell) else plans.sweeps_of(cell) for cell in self.cells]
        return {"epoch_theta": self.epoch_theta, "sweeps": sweeps}

    def restore(self, state: State, round_: int) -> None:
        """Go back to the state after a round, see `EpochFlips.restore`; plans are found where they are kept."""
        self.epoch_theta = state["epoch_theta"]
        for cell, sweeps in zip(self.cells, state["sweeps"], strict=True):
            if not plans.plans_whole_run(cell):
                plans.restore_sweeps(cell, sweeps)


class Proposed:
    """Any other attack on labels, by what it proposes in a round."""

    def __init__(self, attackers: Attackers, targets: TargetsOf, theta: Tensor) -> None:
        """`theta` (M C, d) are the parameters of the cells, which the server moves in place."""
        self.attackers, self.targets, self.theta = attackers, targets, theta

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """The labels that an attack proposes, within the budgets; see `Way.write`."""
        M, C, batch = self.attackers.M, self.attackers.C, shared.batch
        writes = access is not None and access.selection_plans is not None
        logits = Z[:, : access.n].clone() if access is not None and writes else None
        R = kernels.residuals_(Z, C, batch.encoded)
        if access is None or logits is None:
            return None
        n = access.n
        targeted, everyone = self.attackers.kind.goal == "targeted", slice(0, M)
        seen = knowledge.VisibleSamples(
            batch.y[:n],
            None if batch.counts is None else batch.counts[:n],
            batch.samples[:n],
            lambda: batch.samples,
            scores=lambda: class_scores(
                stacked_direction(self.theta, R, batch, access.known, C, everyone, self.targets if targeted else None)
                @ batch.X[:n].mT,
                batch,
                C,
            ),
            logits=lambda: class_scores(logits, batch, C),
        )
        proposal = adversary.propose(self.attackers.cell, shared.round_, seen, (M, n), R.dtype)
        change = choices.of_proposal(proposal, batch, access, workspace.buffer("sorted", M, n))
        return Written(None, change, change.per_cell(M), access.allowed)


def known_residuals(R: Tensor, batch: Batch, known: Tensor | None, C: int, cells: slice) -> Tensor:
    """The residuals (rows, n) that times the features are a positive multiple of the gradient that attackers know.

    Parameters
    ----------
    R : (rows, n) tensor
        Residuals of these cells under the true labels.
    batch : Batch
        The minibatch.
    known : (M, n) tensor or None
        See `RoundAccess.known`.
    C : int
        Number of logits of a sample.
    cells : slice
        The cells whose rows are given.
    """
    if known is not None:
        R = (R.view(-1, C, R.shape[1]) * known[cells, None]).view_as(R)
    return R if batch.counts is None else R * batch.counts


def stacked_direction(
    theta: Tensor, R: Tensor, batch: Batch, known: Tensor | None, C: int, cells: slice, targets: TargetsOf | None
) -> Tensor:
    """The direction (cells C, d) of some cells, up to a positive factor, see `knowledge.direction`.

    Parameters
    ----------
    theta : (M C, d) tensor
        The parameters of all cells.
    R : (M C, n) tensor
        Residuals of all cells under the true labels.
    batch, known, C, cells
        As `known_residuals` takes them.
    targets : TargetsOf or None
        The targets of the cells, where they are targeted.
    """
    rows = slice(cells.start * C, cells.stop * C)
    if targets is not None:
        return targets.rows(cells) - theta[rows]
    return known_residuals(R[rows], batch, known, C, cells) @ batch.X


def class_scores(signed: Tensor, batch: Batch, C: int) -> Tensor:
    """Logits or scores by class.

    Parameters
    ----------
    signed : (M C, n) tensor
        Logits or scores of the first n columns; of binary tasks with the sign of the label.
    batch : Batch
        The minibatch, with the signs of its labels.
    C : int
        Number of logits of a sample.

    Returns
    -------
    (M, n, classes) tensor
        Logits or scores by class, without the sign; of two classes those of the first are 0.
    """
    n = signed.shape[1]
    if C > 1:
        return signed.view(-1, C, n).mT
    return outputs.class_logits((signed * batch.sign[:n])[..., None])
