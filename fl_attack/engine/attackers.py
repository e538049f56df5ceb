"""The attackers of cells that are stepped together: what they may write, what they know, what they choose."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import adversary, attack
from fl_attack.engine import kernels
from fl_attack.engine.batches import Batch, Batches, Layout
from fl_attack.engine.budgets import Allowances, Rounds
from fl_attack.scenario import Scenario


class Kind(NamedTuple):
    """The attack of a cell, without its malicious clients and its budget."""

    name: str  # none where nobody attacks
    goal: str = ""
    selection: str = ""
    scope: str = ""
    knowledge: str = ""
    fraction: float = 0.0
    refresh: str = ""
    args: str = ""

    @property
    def exact(self) -> bool:
        """Whether greedy flips are chosen in every round: the way that is made fast."""
        return self.name == "greedy" and self.refresh == "step"

    @property
    def tile_key(self) -> "Kind":
        """The part of the kind that all cells of a tile have in common."""
        return self._replace(goal="", selection="") if self.exact else self


NOBODY = Kind("none")


def kind_of(cell: Scenario) -> Kind:
    """The kind of attack of a cell."""
    threat = cell.settings.attack
    if not cell.settings.attacked:
        return NOBODY
    return Kind(
        threat.name,
        threat.goal,
        threat.selection,
        threat.scope,
        threat.knowledge,
        threat.knowledge_fraction,
        threat.refresh,
        json.dumps(threat.args, sort_keys=True),
    )


class Part(NamedTuple):
    """Consecutive cells of a tile whose flips have one goal and one way of selection."""

    cells: slice
    goal: str
    selection: str


def parts_of(cells: Sequence[Scenario]) -> list[Part]:
    """The parts of a tile of these cells, in their order."""
    wanted = [(kind.goal, kind.selection) for kind in map(kind_of, cells)]
    edges = [0, *(i for i in range(1, len(cells)) if wanted[i] != wanted[i - 1]), len(cells)]
    return [Part(slice(start, end), *wanted[start]) for start, end in itertools.pairwise(edges)]


class Change(NamedTuple):
    """The labels that a round's attackers change, by cell and column."""

    cells: Tensor  # (flips,) int64
    columns: Tensor
    labels: Tensor


def no_change(device: torch.device) -> Change:
    """The change of a round in which no label is written."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Change(none, none, none)


class RoundAccess(NamedTuple):
    """What the attackers of a tile can do in a round, and know of it; they can write the first n columns alone."""

    n: int
    malicious: Tensor  # (M, m) bool, of the clients of the round in ascending order
    write_mask: Tensor | None  # (M, n) -inf where a column is not the cell's to write; None: all are
    known: Tensor | None  # (M, columns) 1 where the cell knows a sample's clean gradient; None: all
    groups: list[slice]  # the columns that each budget is for
    selection_plans: list[kernels.SelectionPlan] | None  # what may be taken of each; None where nobody may flip
    allowed: NDArray[np.int64]  # (M,) flips allowed


class Attackers:
    """The attackers of a tile: what they may write, what they know, how much they may flip."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches, layout: Layout) -> None:
        """`layout` is that of a round in which every client takes part."""
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self.template_cell, self.kind = cells[0], kind_of(cells[0])
        self.schedule = self.template_cell.schedule
        self.device, self.dtype = batches.device, batches.dtype
        self.tiny = float(np.nextafter(torch.zeros((), dtype=self.dtype).numpy()[()], 1))  # above 0, whatever is
        self.parts = parts_of(cells)
        floors = [
            self.tiny if kind_of(cell)[:3:2] == ("greedy", "gain") else torch.finfo(self.dtype).min for cell in cells
        ]
        self._floor = np.array(floors)  # (M,) below which no priority is worth a flip
        self.flips = np.zeros(self.M, np.int64)  # in all rounds
        self.last = self.flips.copy()  # in the last round
        total = self.template_cell.settings.clients.total
        is_malicious = [np.isin(np.arange(total), cell.partition.malicious) & cell.settings.attacked for cell in cells]
        self._is_malicious = np.array(is_malicious)  # (M, clients)
        self._layout: Layout | None = None
        self._writable = np.zeros((self.M, 1), np.int64)
        self._access: RoundAccess | None = None
        if self.kind == NOBODY:
            return
        threats = [cell.settings.attack for cell in cells]
        self.rounds = Rounds(threats, self.template_cell.settings.rounds)
        self.allowances = Allowances(threats, int(layout.ends[-1]), self.template_cell.settings.rounds)
        self._table: NDArray[np.int64] | None = None  # of allowances
        self._selection_plans: list[list[kernels.SelectionPlan] | None] = []  # for each round of the table
        self._allowed = np.zeros((0, self.M), np.int64)

    def access(self, round_: int, layout: Layout, knowledge_round: int | None = None) -> RoundAccess | None:
        """What the attackers can do in a round, to be asked for one round after the other.

        Parameters
        ----------
        round_ : int
            The round, counted from 1.
        layout : Layout
            The columns of its minibatch.
        knowledge_round : int, optional
            The round whose random stream says which honest clients are known, by default this one.

        Returns
        -------
        RoundAccess or None
            None where nobody attacks in any round.
        """
        if self.kind == NOBODY:
            return None
        same = self._access is not None and layout is self._layout
        if not same or self.kind.knowledge == "noisy":
            self._access = self._round_access(knowledge_round or round_, layout)
            self._layout = layout
        assert self._access is not None
        self.allowances.at(round_, self._writable)
        table, place = self.allowances.table, self.allowances.place
        if not same or table is not self._table:
            self._table, self._allowed = table, table.sum(2)
            self._selection_plans = list(self._selection_plans_of(self._access.groups, table))
        if self._access.selection_plans is not self._selection_plans[place] or self._access.selection_plans is None:
            plans, allowed = self._selection_plans[place], self._allowed[place]
            self._access = self._access._replace(selection_plans=plans, allowed=allowed)
        if self._access.selection_plans is None:
            self.last = np.zeros(self.M, np.int64)
        return self._access

    def _round_access(self, round_: int, layout: Layout) -> RoundAccess:
        """What the attackers can do in a round of this layout, without the plans of its budgets; notes `_writable`."""
        clients, sizes = layout.clients, layout.sizes
        before = self._writable
        is_malicious = self._is_malicious[:, clients]  # (M, m) in the order of the columns
        writable = is_malicious.repeat(sizes, 1)
        any_ = np.flatnonzero(writable.any(0))
        n = int(any_[-1]) + 1 if len(any_) else 0
        mine = torch.from_numpy(writable[:, :n]).to(self.device)
        write_mask = None if bool(mine.all()) else torch.where(mine, 0.0, -torch.inf).to(self.dtype)
        if self.kind.scope == "pooled":
            groups = [slice(0, n)]
            self._writable = (is_malicious * sizes).sum(1, keepdims=True)
        else:
            holders = np.flatnonzero(is_malicious.any(0))
            groups = [slice(int(layout.ends[i] - sizes[i]), int(layout.ends[i])) for i in holders]
            # every client that any cell holds, so that budgets that carry over keep their places from round to round
            of_all = np.zeros(self._is_malicious.shape[1], np.int64)
            of_all[clients] = sizes
            self._writable = (self._is_malicious * of_all)[:, self._is_malicious.any(0)]
        if np.array_equal(before, self._writable):
            self._writable = before  # the very same array, so that what follows from it is not worked out again
        known = self._known(round_, clients, is_malicious)
        columns = None if known is None else torch.from_numpy(known.repeat(sizes, 1)).to(self.device, self.dtype)
        malicious = torch.from_numpy(is_malicious[:, clients.argsort()]).to(self.device)
        return RoundAccess(n, malicious, write_mask, columns, groups, None, np.zeros(self.M, np.int64))

    def _known(
        self, round_: int, clients: NDArray[np.int64], is_malicious: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """Whose clean gradient each cell knows, (M, m) of bool, see `adversary.known`; None where it is everyone's."""
        knowledge = self.kind.knowledge
        if knowledge == "full":
            return None
        if knowledge != "noisy":
            return is_malicious if knowledge == "own" else ~is_malicious
        by_rank = adversary.known_rank(self.template_cell, round_)[clients].argsort()
        honest = ~is_malicious[:, by_rank]
        quota = np.array([adversary.part(self.kind.fraction, int(count)) for count in honest.sum(1)])
        known = np.zeros_like(is_malicious)
        known[:, by_rank] = honest & (honest.cumsum(1) <= quota[:, None])
        return known

    def _selection_plans_of(
        self, groups: list[slice], table: NDArray[np.int64]
    ) -> Iterator[list[kernels.SelectionPlan] | None]:
        """The plans of all groups for each round of a table of allowances (rounds, M, G); None without any flip."""
        if self.kind.scope == "pooled":
            budgets = [table[:, :, 0]]
        else:  # those of the clients that there are in this round
            assert self._layout is not None
            everyone = np.flatnonzero(self._is_malicious.any(0))
            holders = self._layout.clients[np.isin(self._layout.clients, everyone)]
            budgets = [table[:, :, int(np.flatnonzero(everyone == client)[0])] for client in holders]
        by_group = [
            kernels.selection_plans(budget, part.stop - part.start, self._floor, self.dtype)
            for part, budget in zip(groups, budgets, strict=True)
        ]
        for allowed, *plans in zip(table, *by_group, strict=True):
            yield plans if allowed.any() else None

    def chosen(self, gains: Tensor, batch: Batch, access: RoundAccess, scratch: Tensor) -> Tensor:
        """The flips of greedy attackers with two classes.

        Parameters
        ----------
        gains : (M, n) tensor
            How much each flip gains: the signed score. It is overwritten by the result.
        batch : Batch
            The minibatch.
        access : RoundAccess
            What the attackers can do.
        scratch : (M, n) tensor
            Memory that may be overwritten.

        Returns
        -------
        (M, n) tensor
            1 where a label is flipped, else 0; the flips are counted as this round's.
        """
        y, changing = batch.y[: access.n], []
        for part in self.parts:
            some = gains[part.cells]
            if part.selection == "literal":
                # ranked by the score of label 1; flipped where the label with the better score isn't there
                changing.append((some, (some > 0) | ((some == 0) & (y == 1))))
                some.mul_(1 - 2 * y)
            elif batch.counts is not None:
                some.mul_(batch.counts[: access.n])
        self.last = self.take_largest_(gains, batch.samples, access, scratch)
        for some, change in changing:
            some.mul_(change)
        if changing:
            self.count_flipped(gains)
        else:
            self.flips += self.last
        return gains

    def changes(self, scores: Tensor, batch: Batch, access: RoundAccess, priority: Tensor, scratch: Tensor) -> Change:
        """The labels that greedy attackers write with several classes, see `attack.labels.greedy`.

        `scores` are (M, C, n); `priority` and `scratch` (M, n) are memory that is overwritten. The flips are counted.
        """
        y = batch.y[: access.n]
        torch.amax(scores, 1, out=priority)
        for part in self.parts:
            if part.selection == "gain":
                some = priority[part.cells]
                some.sub_(scores[part.cells].gather(1, y.expand(len(some), 1, access.n))[:, 0])
                if batch.counts is not None:
                    some.mul_(batch.counts[: access.n])
        self.take_largest_(priority, batch.samples, access, scratch)
        cells, columns = priority.nonzero(as_tuple=True)
        return self.count(Change(cells, columns, scores[cells, :, columns].argmax(-1)), batch)

    def proposed(self, proposal: attack.Proposal, batch: Batch, access: RoundAccess, scratch: Tensor) -> Change:
        """The labels that an attack changes by its proposal, (M, n) or (n,), within the budgets; they are counted."""
        priority = proposal.priority.to(self.dtype).expand(self.M, access.n).clone()
        self.take_largest_(priority, batch.samples, access, scratch)
        cells, columns = priority.nonzero(as_tuple=True)
        return self.count(Change(cells, columns, proposal.labels.expand(self.M, access.n)[cells, columns]), batch)

    def count_flipped(self, flipped: Tensor) -> None:
        """Count flips (M, n), 1 where a label is flipped and else 0, as those of this round."""
        self.last = flipped.sum(1).long().cpu().numpy()
        self.flips += self.last

    def count(self, written: Change, batch: Batch) -> Change:
        """The written labels that differ from the true ones; they are counted as the flips of this round."""
        new = written.labels != batch.y[written.columns]
        change = Change(*(part[new] for part in written))
        self.last = torch.bincount(change.cells, minlength=self.M).cpu().numpy()
        self.flips += self.last
        return change

    def view(
        self, batch: Batch, access: RoundAccess, scores: Callable[[], Tensor], logits: Callable[[], Tensor], round_: int
    ) -> attack.View:
        """What an attack on labels sees of a round, given scores and logits (M, n, classes) of the writable columns."""
        n = access.n
        counts = batch.counts[:n] if batch.counts is not None else torch.ones(n, dtype=self.dtype, device=self.device)

        def noise() -> Tensor:
            uniform = adversary.label_noise(self.template_cell, round_, len(batch.samples))
            return torch.from_numpy(uniform[batch.samples.argsort().argsort()[:n]]).to(self.device, self.dtype)

        selection = self.template_cell.settings.attack.selection
        return attack.View(batch.y[:n], counts, scores=scores, logits=logits, noise=noise, selection=selection)

    def take_largest_(
        self, priority: Tensor, samples: NDArray[np.int64], access: RoundAccess, scratch: Tensor
    ) -> NDArray[np.int64]:
        """Turn priorities (M, n) of samples (n,) into 1 for those within the budgets, else 0; gives their number (M,).

        `scratch` (M, n) is memory that is overwritten.
        """
        assert access.selection_plans is not None
        if access.write_mask is not None:
            priority.add_(access.write_mask)
        if len(access.selection_plans) == 1 and access.groups[0].stop - access.groups[0].start == access.n:
            return kernels.take_largest_(priority, access.selection_plans[0], scratch, samples[: access.n])
        taken, within = np.zeros(self.M, np.int64), torch.zeros_like(priority)
        for part, plan in zip(access.groups, access.selection_plans, strict=True):
            own_scratch = scratch.view(-1)[: self.M * (part.stop - part.start)].view(self.M, -1)
            taken += kernels.take_largest_(priority[:, part], plan, own_scratch, samples[part])
            within[:, part] = priority[:, part]
        priority.copy_(within)  # between the groups there may be columns that are in none
        return taken
