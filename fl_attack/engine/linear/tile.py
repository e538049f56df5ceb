"""A tile: cells of one kind of attack, whose attackers choose together what to write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_attack.checkpoint import State
from fl_attack.engine import kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.choices import no_change
from fl_attack.engine.linear.client_updates import Aggregator, Residuals
from fl_attack.engine.linear.epoch_flips import EpochFlips
from fl_attack.engine.linear.labels import Greedy, Nobody, Planned, Proposed, Way
from fl_attack.engine.linear.shared import Shared
from fl_attack.engine.linear.targets import TargetsOf
from fl_attack.engine.log import Report
from fl_attack.scenario import Scenario


class Tile:
    """The attackers and the server of some cells; the parameters are moved by `block.Block`.

    Parameters
    ----------
    cells : sequence of Scenario
        M cells of one `tiling.tile_key`.
    batches : Batches
        The minibatches of the cells.
    theta : (M C, d) tensor
        The cells' own rows of the parameters.
    targets : TargetsOf
        The targets of the cells.
    """

    def __init__(self, cells: Sequence[Scenario], batches: Batches, theta: Tensor, targets: TargetsOf) -> None:
        self.cell, self.M, self.C = cells[0], len(cells), cells[0].theta_shape[0]
        self.theta = theta
        self.attackers = Attackers(cells, batches, batches.all)
        self.lr, self.weight_decay = (
            torch.tensor([getattr(cell.settings, key) for cell in cells], dtype=theta.dtype, device=theta.device)
            .repeat_interleave(self.C)
            .unsqueeze(1)
            for key in ("lr", "weight_decay")
        )
        self._decay = self.weight_decay if self.weight_decay.any() else None
        self.aggregator = Aggregator(cells, self.attackers, targets, batches)
        self.way = self._way(cells, batches, targets)
        # whether the server sees what each client sends, and one product of all residuals is not enough
        self.needs_client_updates = self.aggregator.needed or cells[0].settings.local_steps > 1

    def _way(self, cells: Sequence[Scenario], batches: Batches, targets: TargetsOf) -> Way:
        """The one of the classes of `labels`, or `EpochFlips`, by which the cells' attackers write."""
        kind = self.attackers.kind
        if kind.name == "none" or self.aggregator.crafts:
            return Nobody(self.C)
        if self.cell.settings.attack.plans:
            return Planned(cells, self.theta, batches.features.restore)
        if kind.refresh == "epoch":
            return EpochFlips(cells, self.attackers, batches, targets, self.theta)
        return Greedy(self.attackers, targets) if kind.exact else Proposed(self.attackers, targets, self.theta)

    def step(
        self,
        Z: Tensor,
        shared: Shared,
        access: RoundAccess | None,
        workspace: kernels.Workspace,
        watched: bool,
        measured: bool,
    ) -> tuple[Report | None, Tensor | None]:
        """Turn the logits of a round into residuals with the labels as written, and these into an aggregate.

        Parameters
        ----------
        Z : (M C, n) tensor
            Logits, signed for two classes; overwritten by the residuals.
        shared : Shared
            The minibatch, and products with it that tiles share.
        access : RoundAccess or None
            What the attackers can do; None where nobody attacks in any round.
        workspace : Workspace
            Memory for intermediate values.
        watched : bool
            Whether a report is wanted.
        measured : bool
            Whether it is to hold the cosine and `detect.MEASURES`.

        Returns
        -------
        report : Report or None
            None where it is not `watched`.
        aggregate : (M C, d) tensor or None
            Where the tile `needs_client_updates`; else the residuals times the features are the sum of all updates.
        """
        written = self.way.write(Z, shared, access, workspace)
        clean = self._gradient_sum(Z, shared.batch) if measured else None
        if written is None:
            self.attackers.note(None, None)
        else:
            written.put_into(Z, shared.batch, self.C)
            self.attackers.note(written.flips, written.allowed)
        aggregate = detection = None
        if self.needs_client_updates or (measured and access is not None):
            aggregate, detection = self.aggregator.combine(self._residuals(Z, shared), shared, access, measured)
        if not watched:
            return None, aggregate if self.needs_client_updates else None
        cosine = None
        if clean is not None:
            of_clients = aggregate if self.needs_client_updates else None
            cosine = _cosine(self._gradient_sum(Z, shared.batch) if of_clients is None else of_clients, clean, self.M)
        change = written.as_change(shared.batch) if written is not None else no_change(Z.device)
        report = Report(change, self.attackers.allowed, cosine, detection)
        return report, aggregate if self.needs_client_updates else None

    def state(self, round_: int) -> State:
        """The state that `restore` needs to go on after a round."""
        way = self.way.state(round_) if isinstance(self.way, EpochFlips | Planned) else None
        return {"attackers": self.attackers.state(round_), "way": way, "rule": self.aggregator.remembered}

    def restore(self, state: State, round_: int) -> None:
        """Go back to the state after a round, given what `state` gave then; see `Attackers.restore`."""
        self.attackers.restore(state["attackers"], round_)
        if state["rule"] is not None:
            self.aggregator.remembered = {key: part.to(self.theta.device) for key, part in state["rule"].items()}
        if isinstance(self.way, EpochFlips | Planned):
            self.way.restore(state["way"], round_)

    def _gradient_sum(self, R: Tensor, batch: Batch) -> Tensor:
        """The gradient (M C, d) of residuals R with the weight decay, summed over the samples, not their mean."""
        gradient = (R if batch.counts is None else R * batch.counts) @ batch.X
        if self._decay is not None:
            n = batch.X.shape[0] if batch.counts is None else float(batch.counts.sum())
            gradient.addcmul_(self.theta, self._decay, value=n)
        return gradient

    def _residuals(self, R: Tensor, shared: Shared) -> Residuals:
        """What the updates of clients are computed from, given residuals R (M C, n) with the labels as written."""
        written = None
        if self.cell.settings.local_steps > 1:
            clean = torch.mm(self.theta, shared.batch.X.mT)
            written = R - kernels.residuals_(clean, self.C, shared.batch.encoded)
        rate = self.lr * (self.cell.lr(shared.round_) / self.cell.settings.lr)
        return Residuals(self.theta, R, written, rate, self._decay)


def _cosine(aggregate: Tensor, clean: Tensor, M: int) -> Tensor:
    """The cosine (M,) of two gradients (M C, d) of each cell; NaN where one of them is zero."""
    a, b = (gradient.view(M, -1).double() for gradient in (aggregate, clean))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)
