"""Labels that attackers choose at the start of an epoch, over all that they hold, and keep for its minibatches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_attack import adversary, attack, knowledge
from fl_attack.checkpoint import State
from fl_attack.engine import choices, kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.choices import Change
from fl_attack.engine.linear.labels import Written, class_scores
from fl_attack.engine.linear.shared import Shared
from fl_attack.engine.linear.targets import TargetsOf
from fl_attack.scenario import Scenario

NUMBERS_AT_ONCE = 2**21  # logits, and features, of a piece: what several products read stays in the cache


class EpochFlips:
    """Flips that are chosen when an epoch begins: one of the ways of `labels`."""

    def __init__(
        self, cells: Sequence[Scenario], attackers: Attackers, batches: Batches, targets: TargetsOf, theta: Tensor
    ) -> None:
        """`attackers` are those of the cells; the server moves theta (M C, d), their parameters, in place."""
        self.attackers, self.batches, self.targets, self.theta = attackers, batches, targets, theta
        self.rounds_per_epoch = cells[0].schedule.rounds_per_epoch
        every_epoch = {"every": 1, "start": 1, "stop": None}
        planners = [
            Scenario(
                cell.settings.model_copy(update={"attack": cell.settings.attack.model_copy(update=every_epoch)}),
                *(cell.dataset, cell.partition, cell.schedule),
            )
            for cell in cells
        ]
        self.planners = Attackers(planners, batches, batches.whole_layout)  # whose rounds are epochs
        self.written: Tensor | None = None  # (M, n) the label of each sample that they hold, or -1; None: no flips
        # for two classes besides: (M, n + 1) 1 where a label is flipped, else 0, as in the last column
        self.flipped: Tensor | None = None
        self.allowed = np.zeros(len(cells), np.int64)  # flips in the epoch

    def write(
        self, Z: Tensor, shared: Shared, access: RoundAccess | None, workspace: kernels.Workspace
    ) -> Written | None:
        """The labels that were chosen for the epoch, of the minibatch's samples; see `labels.Way.write`."""
        kernels.residuals_(Z, self.attackers.C, shared.batch.encoded)
        if access is None:
            return None
        if (shared.round_ - 1) % self.rounds_per_epoch == 0:
            self.renew(shared.round_)
        attacked = self.attackers.attacked(shared.round_)
        allowed = self.allowed * attacked * access.malicious.any(1).cpu().numpy()
        if self.flipped is not None:  # with two classes, a gather takes less time than a list of flips
            flipped = self._flipped(self.flipped, shared.batch, attacked, access.n)
            return Written(flipped, None, choices.count_mask(flipped), allowed)
        change = self._change(shared.batch, attacked, access.n)
        return Written(None, change, change.per_cell(self.attackers.M), allowed)

    def state(self, round_: int) -> State:
        """The state that `restore` needs to go on after a round."""
        planners = self.planners.state(self._epoch(round_))
        return {"written": self.written, "allowed": self.allowed, "planners": planners}

    def restore(self, state: State, round_: int) -> None:
        """Go back to the state after a round.

        Parameters
        ----------
        state : dict
            The value of `state` after that round.
        round_ : int
            The round, from 1, which says what epoch it is.
        """
        self._keep(None if state["written"] is None else state["written"].to(self.theta.device))
        self.allowed = state["allowed"]
        self.planners.restore(state["planners"], self._epoch(round_))

    def _epoch(self, round_: int) -> int:
        """The epoch that a round is in, counted from 1."""
        return (round_ - 1) // self.rounds_per_epoch + 1

    def renew(self, round_: int) -> None:
        """Choose the flips of the epoch that begins with a round, and keep them in `written` and `allowed`."""
        planners = self.planners
        access = planners.access(self._epoch(round_), self.batches.whole_layout, round_)
        assert access is not None
        self._keep(None)
        self.allowed = access.allowed
        if access.selection_plans is None:
            return
        M, n = planners.M, access.n
        priority = torch.empty(M, n, dtype=self.theta.dtype, device=self.theta.device)
        labels = torch.empty(M, n, dtype=torch.int64, device=self.theta.device)
        aimed = "goal" in attack.find(planners.kind.name).uses
        v = self._direction(access) if aimed else self.theta
        gains_alone = planners.C == 1 and planners.kind.name == "greedy" and planners.kind.selection == "gain"
        samples = self.batches.features.samples[:n]
        y = self.batches.y[torch.from_numpy(samples)].to(self.theta.device)
        for batch, part in self._pieces(n):
            if gains_alone:  # the proposal of `attack.labels.greedy`, of samples that are signed
                priority[:, part] = v @ batch.X.mT
                continue
            proposal = self._proposal(v, batch, part, round_)
            labels[:, part], priority[:, part] = proposal.labels, proposal.priority.to(priority)
        if gains_alone:
            labels.copy_(1 - y)
        choices.take_within_(priority, samples, access, torch.empty_like(priority))
        self._keep(labels.masked_fill_((priority == 0) | (labels == y), -1))

    def _keep(self, written: Tensor | None) -> None:
        """Keep the labels `written` for the epoch, (M, n), -1 where there is none."""
        self.written = written
        self.flipped = None
        if written is not None and self.attackers.C == 1:
            self.flipped = functional.pad((written >= 0).to(self.theta), (0, 1))

    def _flipped(self, flipped: Tensor, batch: Batch, attacked: NDArray[np.bool_], n: int) -> Tensor:
        """1 for each flipped label of the first n columns of a minibatch, else 0, (M, n), by the mask `flipped`."""
        columns = self.batches.features.row[batch.at[:n]].to(flipped.device)
        found = flipped.index_select(1, columns.clamp(max=flipped.shape[1] - 1))
        return found if attacked.all() else found.mul_(torch.from_numpy(attacked).to(found)[:, None])

    def _change(self, batch: Batch, attacked: NDArray[np.bool_], n: int) -> Change:
        """The labels written among the first n columns of a minibatch, in the cells that are `attacked` (M,) now."""
        if self.written is None:
            return choices.no_change(batch.X.device)
        held = self.written.shape[1]
        columns = self.batches.features.row[batch.at[:n]].to(self.written.device)
        labels = self.written.index_select(1, columns.clamp(max=held - 1))
        away = torch.from_numpy(~attacked)[:, None].to(labels.device)
        labels = labels.masked_fill((columns >= held) | away, -1)
        cells, at = (labels >= 0).nonzero(as_tuple=True)
        return Change(cells, at, labels[cells, at])

    def _pieces(self, n: int) -> Iterator[tuple[Batch, slice]]:
        """The first n of the samples that the clients hold, in the pieces that `Batches.pieces` gives."""
        return self.batches.pieces(n, NUMBERS_AT_ONCE // (len(self.theta) + self.batches.features.d))

    def _proposal(self, v: Tensor, batch: Batch, part: slice, round_: int) -> attack.Proposal:
        """What the attack proposes for a piece of samples, along directions v (M C, d)."""
        M, C, samples = self.planners.M, self.planners.C, self.batches.features.samples
        seen = knowledge.VisibleSamples(
            batch.y,
            None,
            samples[part],
            lambda: samples,
            scores=lambda: class_scores(v @ batch.X.mT, batch, C),
            logits=lambda: class_scores(self.theta @ batch.X.mT, batch, C),
        )
        shape = M, part.stop - part.start
        return adversary.propose(self.planners.cell, round_, seen, shape, self.theta.dtype)

    def _direction(self, access: RoundAccess) -> Tensor:
        """The direction v of each cell, (M C, d), up to a positive factor."""
        M, C = self.planners.M, self.planners.C
        if self.planners.kind.goal == "targeted":
            return self.targets.rows(slice(0, M)) - self.theta
        v = torch.zeros_like(self.theta)
        for batch, part in self._pieces(int(self.batches.whole_layout.ends[-1])):
            R = kernels.residuals_(self.theta @ batch.X.mT, C, batch.encoded)
            if access.known is not None:
                R = (R.view(M, C, -1) * access.known[:, None, part]).view_as(R)
            v.addmm_(R, batch.X)
        return v
