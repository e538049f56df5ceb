"""The update of each client, for aggregation rules, attacks on updates and measures that need to see it.

The mean of label attacks never does: its gradients of all clients together are one matrix product.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fl_attack import adaptive, adversary, aggregate, attack, detect, protocol, scenario
from fl_attack.checkpoint import State
from fl_attack.engine import kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.kinds import NOBODY
from fl_attack.engine.linear.labels import stacked_direction
from fl_attack.engine.linear.shared import Shared
from fl_attack.engine.linear.targets import TargetsOf
from fl_attack.engine.threads import side_by_side
from fl_attack.scenario import Scenario

BYTES_AT_ONCE = 6 * 2**20  # of updates: what a rule goes over several times should stay in the processor's cache


class Residuals(NamedTuple):
    """The residuals of a round and what else the updates of clients are computed from, in M cells."""

    theta: Tensor  # (M C, d)
    R: Tensor  # (M C, n) residuals with the labels as written
    written: Tensor | None  # (M C, n) R less the clean ones, where clients take several steps
    lr: Tensor  # (M C, 1) of this round
    weight_decay: Tensor | None  # (M C, 1)

    def rows(self, part: slice) -> "Residuals":
        """The residuals of a part of the rows."""
        written = None if self.written is None else self.written[part]
        decay = None if self.weight_decay is None else self.weight_decay[part]
        return Residuals(self.theta[part], self.R[part], written, self.lr[part], decay)


def by_client(residuals: Residuals, batch: Batch, C: int) -> Iterator[tuple[int, Tensor]]:
    """The update of each client: what its local steps take from theta, over the learning rate.

    Parameters
    ----------
    residuals : Residuals
        Residuals and parameters of M cells.
    batch : Batch
        The minibatch, with the client of each column.
    C : int
        Number of logits of a sample.

    Yields
    ------
    place : int
        The place of a client among the clients of the round, ascending.
    update : (M C, d) tensor
        The update that this client sends, in each cell.
    """
    layout = batch.layout
    starts = layout.ends - layout.sizes
    for i, place in enumerate(layout.rank.tolist()):
        columns = slice(int(starts[i]), int(layout.ends[i]))
        if residuals.written is None:
            update = (residuals.R[:, columns] @ batch.X[columns]).div_(columns.stop - columns.start)
            if residuals.weight_decay is not None:
                update.addcmul_(residuals.theta, residuals.weight_decay)
            yield place, update
            continue
        moved = residuals.theta.clone()
        for step in batch.steps[i]:
            X = batch.X[step]
            encoded = batch.encoded[:, step] if C > 1 else batch.encoded
            step_R = kernels.residuals_(moved @ X.mT, C, encoded).add_(residuals.written[:, step])
            if residuals.weight_decay is not None:
                moved.mul_(1 - residuals.lr * residuals.weight_decay)
            moved.addmm_(step_R.mul_(residuals.lr), X, alpha=-1 / len(step))
        yield place, torch.sub(residuals.theta, moved, out=moved).div_(residuals.lr)


def pieces(cells: int, bytes_each: int) -> list[slice]:
    """The cells in parts whose updates are computed together, each of one cell or within `BYTES_AT_ONCE`.

    Parameters
    ----------
    cells : int
        The number of cells.
    bytes_each : int
        Bytes that the updates of one cell take.

    Returns
    -------
    list of slice
    """
    step = max(1, BYTES_AT_ONCE // bytes_each)
    return [slice(start, min(cells, start + step)) for start in range(0, cells, step)]


class Aggregator:
    """The server of the cells of a tile: their rule, on the updates of their clients."""

    def __init__(self, cells: Sequence[Scenario], attackers: Attackers, targets: TargetsOf, batches: Batches) -> None:
        self.cell, self.attackers, self.features = cells[0], attackers, batches.features
        self.targets = targets if attackers.kind.goal == "targeted" else None
        self.M, self.C = attackers.M, attackers.C
        self.crafts = attackers.kind != NOBODY and self.cell.settings.attack.writes == "updates"
        self.rule = self.cell.rule()
        self.remembered: State | None = None  # what the rule keeps between rounds, of all cells
        self.adapts = self.crafts and adaptive.searches(self.cell)
        strategy, threat = self.cell.settings.strategy, self.cell.settings.attack
        # a function of others may draw from a generator that all threads share
        own_attack = not self.crafts or threat.name in attack.ATTACKS
        self.is_builtin = own_attack and aggregate.is_builtin(strategy.name, strategy.pre)
        # else the mean of what clients send needs no attack and no rule
        self.needed = self.crafts or not strategy.averages

    def _mean(self, residuals: Residuals, batch: Batch) -> Tensor:
        """The mean (M C, d) of the clients' updates, weighted by their minibatches, where no attack replaces any."""
        sizes = self.cell.schedule.sizes[np.sort(batch.layout.clients)]
        total = torch.zeros_like(residuals.theta)
        for place, update in by_client(residuals, batch, self.C):
            total.add_(update, alpha=float(sizes[place] / sizes.sum()))
        return total

    def combine(
        self, residuals: Residuals, shared: Shared, access: RoundAccess | None, measured: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The aggregate of the updates that the clients of a round send; what the rule remembers is noted.

        Parameters
        ----------
        residuals : Residuals
            The residuals of all cells of the tile.
        shared : Shared
            The round and its minibatch.
        access : RoundAccess or None
            What the attackers can do; None where nobody attacks in any round.
        measured : bool
            Whether `detect.MEASURES` are wanted.

        Returns
        -------
        aggregate : (M C, d) tensor
        detection : (M, measures) tensor or None
            None where it is not measured, or nobody attacks.
        """
        round_, batch = shared.round_, shared.batch
        if not self.needed and not measured:
            return self._mean(residuals, batch), None
        d, layout = residuals.theta.shape[1], batch.layout
        m = len(layout.clients)
        weights = torch.from_numpy(self.cell.schedule.sizes[np.sort(layout.clients)])
        client_order = torch.from_numpy(protocol.shuffled(self.cell.settings.seed, round_, m))
        out = torch.empty_like(residuals.theta)

        def some(cells: slice) -> tuple[Tensor | None, State | None]:
            rows = slice(cells.start * self.C, cells.stop * self.C)
            stacked = out.new_empty(m, rows.stop - rows.start, d)
            for place, update in by_client(residuals.rows(rows), batch, self.C):
                stacked[place] = update
            updates = stacked.view(m, -1, self.C, d).movedim(0, 1)
            before = None if self.remembered is None else {key: x[cells] for key, x in self.remembered.items()}
            arguments = weights.to(out.device), client_order.to(out.device), self._seen(residuals, rows, round_), before
            if self.crafts and access is not None:
                updates = self._replaced(
                    updates,
                    residuals,
                    batch,
                    access,
                    cells,
                    round_,
                    lambda updates_sent: self.rule(updates_sent, *arguments),
                )
            combined, after = self.rule.step(updates, *arguments)
            out[rows] = combined.reshape(-1, d)
            measures = detect.measures(updates, access.malicious[cells]) if measured and access is not None else None
            return measures, after

        parts = pieces(self.M, m * self.C * d * out.element_size())
        found = side_by_side(some, parts) if self.is_builtin else [some(cells) for cells in parts]
        after = [one for _, one in found if one is not None]
        if after:
            self.remembered = {key: torch.cat([one[key] for one in after]) for key in after[0]}
        return out, torch.cat([one for one, _ in found if one is not None]) if measured and access is not None else None

    def _seen(self, residuals: Residuals, rows: slice, round_: int) -> aggregate.Seen:
        """What the server knows of a round besides the updates, in the cells that some rows of theta are of."""
        if not self.rule.sees:
            return aggregate.Seen()
        cell, theta = self.cell, residuals.theta[rows]
        lr = residuals.lr[rows].view(-1, self.C, 1)[:, :1]
        decay = 0.0 if residuals.weight_decay is None else residuals.weight_decay[rows].view(-1, self.C, 1)[:, :1]

        def root() -> Tensor:
            X, y, _ = cell.batch(cell.trusted, np.ones_like(cell.trusted), theta.device)
            whole = self.features.restore(theta).to(theta.device).view(-1, self.C, X.shape[-1])
            update = scenario.server_update(cell, whole, lr, decay, X, y)
            return self.features.drop(update.flatten(0, 1)).view(-1, self.C, theta.shape[-1])

        return cell.seen(round_, theta.view(-1, self.C, theta.shape[-1]))._replace(lr=lr, root=root)

    def _replaced(
        self,
        updates: Tensor,
        residuals: Residuals,
        batch: Batch,
        access: RoundAccess,
        cells: slice,
        round_: int,
        rule: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The updates (cells, m, C, d) of some cells, with those of malicious clients replaced where these attack now.

        Attackers who adapt send what gives the rule's aggregate the smallest inner product with their direction.
        """
        malicious = access.malicious[cells]
        now = torch.from_numpy(self.attackers.attacked(round_)[cells]).to(updates.device)
        attacking = malicious & now[:, None]
        if not attacking.any():
            return updates

        @cache
        def v() -> Tensor:
            found = stacked_direction(residuals.theta, residuals.R, batch, access.known, self.C, cells, self.targets)
            return found.view(-1, self.C, residuals.theta.shape[1])

        variants = [self.cell, *(adaptive.variants(self.cell) if self.adapts else ())]
        candidates = [
            adversary.replace_updates(variant, round_, updates, malicious, attacking, v) for variant in variants
        ]
        if len(candidates) == 1:
            return candidates[0]
        worst = attack.most_harmful([(rule(one) * v()).flatten(1).sum(1) for one in candidates])
        return torch.stack(candidates)[worst, torch.arange(len(worst), device=worst.device)]
