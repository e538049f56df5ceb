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
    """What tells the attackers of cells from each other, besides whom they hold and how much they may flip."""

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
    def alike(self) -> "Kind":
        """What the cells of a tile have to have in common."""
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
    """Cells of a tile that want the same of their flips."""

    cells: slice
    goal: str
    selection: str


def parts_of(cells: Sequence[Scenario]) -> list[Part]:
    """The parts of a tile, in their order."""
    wanted = [(kind.goal, kind.selection) for kind in map(kind_of, cells)]
    edges = [0, *(i for i in range(1, len(cells)) if wanted[i] != wanted[i - 1]), len(cells)]
    return [Part(slice(start, end), *wanted[start]) for start, end in itertools.pairwise(edges)]


class Change(NamedTuple):
    """The labels that a round's attackers change, by cell and column."""

    cells: Tensor  # (flips,) int64
    columns: Tensor
    labels: Tensor


def no_change(device: torch.device) -> Change:
    """Nothing."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Change(none, none, none)


class Turn(NamedTuple):
    """What the attackers of a tile can do in a round. Only the first n columns are within reach."""

    n: int
    malicious: Tensor  # (M, m) bool, of the clients of the round in ascending order
    barred: Tensor | None  # (M, n) -inf where a column is not the cell's to write; None: all are
    known: Tensor | None  # (M, columns) 1 where the cell knows a sample's clean gradient; None: all
    groups: list[slice]  # the columns that each budget is for
    picks: list[kernels.Pick] | None  # what may be taken of each; None where nobody may flip
    allowed: NDArray[np.int64]  # (M,) flips allowed


class Attackers:
    """The attackers of a tile: what they may write, what they know, how much they may flip."""

    def __init__(self, cells: Sequence[Scenario], batches: Batches, layout: Layout) -> None:
        """`layout` is that of a round in which every client takes part."""
        self.M, self.C = len(cells), cells[0].theta_shape[0]
        self.like, self.kind = cells[0], kind_of(cells[0])
        self.device, self.dtype = batches.device, batches.dtype
        self.tiny = float(np.nextafter(torch.zeros((), dtype=self.dtype).numpy()[()], 1))  # above 0, whatever is
        self.parts = parts_of(cells)
        floors = [
            self.tiny if kind_of(cell)[:3:2] == ("greedy", "gain") else torch.finfo(self.dtype).min for cell in cells
        ]
        self._floor = np.array(floors)  # (M,) below which no priority is worth a flip
        self.flips = np.zeros(self.M, np.int64)  # in all rounds
        self.last = self.flips.copy()  # in the last round
        total = self.like.settings.clients.total
        evil = [np.isin(np.arange(total), cell.partition.malicious) & cell.settings.attacked for cell in cells]
        self._evil = np.array(evil)  # (M, clients)
        self._layout: Layout | None = None
        self._writable = np.zeros((self.M, 1), np.int64)
        self._turn: Turn | None = None
        if self.kind == NOBODY:
            return
        threats = [cell.settings.attack for cell in cells]
        self.rounds = Rounds(threats, self.like.settings.rounds)
        self.allowances = Allowances(threats, int(layout.ends[-1]), self.like.settings.rounds)
        self._table: NDArray[np.int64] | None = None  # of allowances
        self._picks: list[list[kernels.Pick] | None] = []  # for each round of the table
        self._allowed = np.zeros((0, self.M), np.int64)

    def turn(self, round_: int, layout: Layout, lots_of: int | None = None) -> Turn | None:
        """What can be done in a round; to be asked for one round after the other. None where nobody attacks at all.

        Whom they know where they know a part is drawn as for the round `lots_of`, by default this one.
        """
        if self.kind == NOBODY:
            return None
        same = self._turn is not None and layout is self._layout
        if not same or self.kind.knowledge == "noisy":
            self._turn = self._reach(lots_of or round_, layout)
            self._layout = layout
        assert self._turn is not None
        self.allowances.at(round_, self._writable)
        table, place = self.allowances.table, self.allowances.place
        if not same or table is not self._table:
            self._table, self._allowed = table, table.sum(2)
            self._picks = list(self._picks_of(self._turn.groups, table))
        if self._turn.picks is not self._picks[place] or self._turn.picks is None:
            self._turn = self._turn._replace(picks=self._picks[place], allowed=self._allowed[place])
        if self._turn.picks is None:
            self.last = np.zeros(self.M, np.int64)
        return self._turn

    def _reach(self, round_: int, layout: Layout) -> Turn:
        clients, sizes = layout.clients, layout.sizes
        before = self._writable
        evil = self._evil[:, clients]  # (M, m) in the order of the columns
        writable = evil.repeat(sizes, 1)
        any_ = np.flatnonzero(writable.any(0))
        n = int(any_[-1]) + 1 if len(any_) else 0
        mine = torch.from_numpy(writable[:, :n]).to(self.device)
        barred = None if bool(mine.all()) else torch.where(mine, 0.0, -torch.inf).to(self.dtype)
        if self.kind.scope == "pooled":
            groups = [slice(0, n)]
            self._writable = (evil * sizes).sum(1, keepdims=True)
        else:
            reached = np.flatnonzero(evil.any(0))
            groups = [slice(int(layout.ends[i] - sizes[i]), int(layout.ends[i])) for i in reached]
            # every client that any cell holds, so that budgets that carry over keep their places from round to round
            of_all = np.zeros(self._evil.shape[1], np.int64)
            of_all[clients] = sizes
            self._writable = (self._evil * of_all)[:, self._evil.any(0)]
        if np.array_equal(before, self._writable):
            self._writable = before  # the very same array, so that what follows from it is not worked out again
        known = self._known(round_, clients, evil)
        columns = None if known is None else torch.from_numpy(known.repeat(sizes, 1)).to(self.device, self.dtype)
        malicious = torch.from_numpy(evil[:, clients.argsort()]).to(self.device)
        return Turn(n, malicious, barred, columns, groups, None, np.zeros(self.M, np.int64))

    def _known(self, round_: int, clients: NDArray[np.int64], evil: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """(M, m) whose clean gradient each cell knows; see `adversary.known`."""
        knowledge = self.kind.knowledge
        if knowledge == "full":
            return None
        if knowledge != "noisy":
            return evil if knowledge == "own" else ~evil
        by_rank = adversary.known_rank(self.like, round_)[clients].argsort()
        honest = ~evil[:, by_rank]
        many = np.array([adversary.part(self.kind.fraction, int(count)) for count in honest.sum(1)])
        known = np.zeros_like(evil)
        known[:, by_rank] = honest & (honest.cumsum(1) <= many[:, None])
        return known

    def _picks_of(self, groups: list[slice], table: NDArray[np.int64]) -> Iterator[list[kernels.Pick] | None]:
        """For each round of a table of allowances (rounds, M, G) what may be taken of each group, if anything may."""
        if self.kind.scope == "pooled":
            budgets = [table[:, :, 0]]
        else:  # those of the clients that there are in this round
            assert self._layout is not None
            everyone = np.flatnonzero(self._evil.any(0))
            reached = self._layout.clients[np.isin(self._layout.clients, everyone)]
            budgets = [table[:, :, int(np.flatnonzero(everyone == client)[0])] for client in reached]
        by_group = [
            kernels.picks(budget, part.stop - part.start, self._floor, self.dtype)
            for part, budget in zip(groups, budgets, strict=True)
        ]
        for allowed, *made in zip(table, *by_group, strict=True):
            yield made if allowed.any() else None

    def chosen(self, gains: Tensor, batch: Batch, turn: Turn, scratch: Tensor) -> Tensor:
        """Greedy, two classes: 1 where a label is flipped, else 0, (M, n); in the place of the gains."""
        y, changing = batch.y[: turn.n], []
        for part in self.parts:
            some = gains[part.cells]
            if part.selection == "literal":
                # ranked by the score of label 1; flipped where the label with the better score isn't there
                changing.append((some, (some > 0) | ((some == 0) & (y == 1))))
                some.mul_(1 - 2 * y)
            elif batch.counts is not None:
                some.mul_(batch.counts[: turn.n])
        self.last = self.take_largest_(gains, batch.samples, turn, scratch)
        for some, change in changing:
            some.mul_(change)
        if changing:
            self.count_flipped(gains)
        else:
            self.flips += self.last
        return gains

    def changes(self, scores: Tensor, batch: Batch, turn: Turn, priority: Tensor, scratch: Tensor) -> Change:
        """Greedy, several classes: the labels that change, from the scores (M, C, n); see `attack.labels.greedy`."""
        y = batch.y[: turn.n]
        torch.amax(scores, 1, out=priority)
        for part in self.parts:
            if part.selection == "gain":
                some = priority[part.cells]
                some.sub_(scores[part.cells].gather(1, y.expand(len(some), 1, turn.n))[:, 0])
                if batch.counts is not None:
                    some.mul_(batch.counts[: turn.n])
        self.take_largest_(priority, batch.samples, turn, scratch)
        cells, columns = priority.nonzero(as_tuple=True)
        return self.count(Change(cells, columns, scores[cells, :, columns].argmax(-1)), batch)

    def proposed(self, proposal: attack.Proposal, batch: Batch, turn: Turn, scratch: Tensor) -> Change:
        """Any attack on labels: those that change."""
        priority = proposal.priority.to(self.dtype).expand(self.M, turn.n).clone()
        self.take_largest_(priority, batch.samples, turn, scratch)
        cells, columns = priority.nonzero(as_tuple=True)
        return self.count(Change(cells, columns, proposal.labels.expand(self.M, turn.n)[cells, columns]), batch)

    def count_flipped(self, flipped: Tensor) -> None:
        """Count these flips (M, n), 1 or 0, as this round's."""
        self.last = flipped.sum(1).long().cpu().numpy()
        self.flips += self.last

    def count(self, written: Change, batch: Batch) -> Change:
        """Of what is written, the labels that are not the true ones; they are counted as this round's flips."""
        new = written.labels != batch.y[written.columns]
        change = Change(*(part[new] for part in written))
        self.last = torch.bincount(change.cells, minlength=self.M).cpu().numpy()
        self.flips += self.last
        return change

    def view(
        self, batch: Batch, turn: Turn, scores: Callable[[], Tensor], logits: Callable[[], Tensor], round_: int
    ) -> attack.View:
        """What an attack on labels sees, given scores and logits (M, n, classes) of the columns within reach."""
        n = turn.n
        counts = batch.counts[:n] if batch.counts is not None else torch.ones(n, dtype=self.dtype, device=self.device)

        def noise() -> Tensor:
            drawn = adversary.label_noise(self.like, round_, len(batch.samples))
            return torch.from_numpy(drawn[batch.samples.argsort().argsort()[:n]]).to(self.device, self.dtype)

        selection = self.like.settings.attack.selection
        return attack.View(batch.y[:n], counts, scores=scores, logits=logits, noise=noise, selection=selection)

    def take_largest_(
        self, priority: Tensor, samples: NDArray[np.int64], turn: Turn, scratch: Tensor
    ) -> NDArray[np.int64]:
        """Turns priorities (M, n) of samples into 1 for those that come within the budgets, else 0; how many."""
        assert turn.picks is not None
        if turn.barred is not None:
            priority.add_(turn.barred)
        if len(turn.picks) == 1 and turn.groups[0].stop - turn.groups[0].start == turn.n:
            return kernels.take_largest_(priority, turn.picks[0], scratch, samples[: turn.n])
        taken, within = np.zeros(self.M, np.int64), torch.zeros_like(priority)
        for part, pick in zip(turn.groups, turn.picks, strict=True):
            room = scratch.view(-1)[: self.M * (part.stop - part.start)].view(self.M, -1)
            taken += kernels.take_largest_(priority[:, part], pick, room, samples[part])
            within[:, part] = priority[:, part]
        priority.copy_(within)  # between the groups there may be columns that are in none
        return taken
