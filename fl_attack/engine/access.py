"""What the attackers of cells may write, know and flip in each round."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fl_attack import knowledge, streams
from fl_attack.engine import kernels
from fl_attack.engine.batches import Layout
from fl_attack.engine.budgets import Allowances, Rounds
from fl_attack.engine.kinds import kind_of
from fl_attack.scenario import Scenario


class _Last(NamedTuple):
    """The result that was worked out last, and the key of all that it depends on."""

    key: tuple[object, ...] = ()
    found: Any = None


class RoundAccess(NamedTuple):
    """What the attackers of M cells can do and know in a round; no column after the first n is any cell's to write."""

    n: int
    malicious: torch.Tensor  # (M, m) bool: which clients of the round, ascending, are malicious, attacking or not
    write_mask: torch.Tensor | None  # (M, n) -inf where a column is not the cell's to write, else 0; None: all are
    known: torch.Tensor | None  # (M, columns) 1 where the cell knows a sample's clean gradient, else 0; None: all
    groups: list[slice]  # the columns that each budget is for
    selection_plans: list[kernels.SelectionPlan] | None  # one for each of `groups`; None where no cell may flip
    allowed: NDArray[np.int64]  # (M,) flips allowed, all budgets of a cell together


class Access:
    """The access of M cells with one kind of attack, to be asked for one round after the other.

    Parameters
    ----------
    cells : sequence of Scenario
        Attacked cells of one `Kind.tile_key`.
    layout : Layout
        The columns of a round in which every client takes part.
    device : torch.device
        The device of masks.
    dtype : torch.dtype
        Precision of masks and priorities.
    """

    def __init__(self, cells: Sequence[Scenario], layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        self._cell, self._kind = cells[0], kind_of(cells[0])
        self._device, self._dtype = device, dtype
        total = self._cell.settings.clients.total
        self._is_malicious = np.array(  # (M, clients)
            [np.isin(np.arange(total), cell.partition.malicious) & cell.settings.attacked for cell in cells]
        )
        threats = [cell.settings.attack for cell in cells]
        self.rounds = Rounds(threats, self._cell.settings.rounds)
        self._allowances = Allowances(threats, int(layout.ends[-1]), self._cell.settings.rounds)
        above_zero = float(np.nextafter(torch.zeros((), dtype=dtype).numpy()[()], 1))
        lowest = torch.finfo(dtype).min
        kinds = map(kind_of, cells)
        self._floor = np.array(  # (M,) below which no priority is worth a flip
            [above_zero if (kind.name, kind.selection) == ("greedy", "gain") else lowest for kind in kinds]
        )
        self._of_layout, self._of_table, self._of_round = _Last(), _Last(), _Last()

    def at(self, round_: int, layout: Layout, knowledge_round: int | None = None) -> RoundAccess:
        """The access in a round.

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
        RoundAccess
            Shared between rounds: not to be changed.
        """
        known_in = (knowledge_round or round_) if self._kind.knowledge == "noisy" else 0
        key = layout.key, known_in
        if key != self._of_layout.key:
            self._of_layout = _Last(key, (self._without_budgets(layout, known_in), self._writable(layout)))
        access, writable = self._of_layout.found
        first, place = self._allowances.place(round_, writable)
        of_table = layout.key, first
        if of_table != self._of_table.key:
            table = self._allowances.table
            plans = list(self._selection_plans(access.groups, table, layout))
            self._of_table = _Last(of_table, (plans, table.sum(2)))
        in_round = key, first, place
        if in_round != self._of_round.key:
            plans, allowed = self._of_table.found
            filled = access._replace(selection_plans=plans[place], allowed=allowed[place])
            self._of_round = _Last(in_round, filled)
        found: RoundAccess = self._of_round.found
        return found

    def past(self, round_: int) -> NDArray[np.int64]:
        """How many samples (M, G) could be written before a round to come, see `Allowances.past`."""
        return self._allowances.past(round_)

    def restore(self, round_: int, past: NDArray[np.int64]) -> None:
        """Go back to before a round, given the value of `past` then; see `Allowances.restore`."""
        self._allowances.restore(round_, past)

    def _without_budgets(self, layout: Layout, knowledge_round: int) -> RoundAccess:
        """The access in a round of a layout, as if no flip were allowed: budgets are still to be filled in."""
        clients, sizes = layout.clients, layout.sizes
        is_malicious = self._is_malicious[:, clients]  # (M, m) in the order of the columns
        writable = is_malicious.repeat(sizes, 1)
        any_ = np.flatnonzero(writable.any(0))
        n = int(any_[-1]) + 1 if len(any_) else 0
        allowed = torch.from_numpy(writable[:, :n]).to(self._device)
        write_mask = None if bool(allowed.all()) else torch.where(allowed, 0.0, -torch.inf).to(self._dtype)
        groups = [slice(0, n)]
        if self._kind.scope != "pooled":
            holders = np.flatnonzero(is_malicious.any(0))
            groups = [slice(int(layout.ends[i] - sizes[i]), int(layout.ends[i])) for i in holders]
        known = self._known_clients(knowledge_round, clients, is_malicious)
        columns = None if known is None else torch.from_numpy(known.repeat(sizes, 1)).to(self._device, self._dtype)
        malicious = torch.from_numpy(is_malicious[:, clients.argsort()]).to(self._device)
        return RoundAccess(n, malicious, write_mask, columns, groups, None, np.zeros(len(malicious), np.int64))

    def _writable(self, layout: Layout) -> NDArray[np.int64]:
        """How many samples each of the G budgets of a cell is for in a round of a layout, (M, G)."""
        if self._kind.scope == "pooled":
            return np.asarray((self._is_malicious[:, layout.clients] * layout.sizes).sum(1, keepdims=True))
        # every client that any cell holds, so that budgets that carry over keep their places from round to round
        of_all = np.zeros(self._is_malicious.shape[1], np.int64)
        of_all[layout.clients] = layout.sizes
        return np.asarray((self._is_malicious * of_all)[:, self._is_malicious.any(0)])

    def _known_clients(
        self, round_: int, clients: NDArray[np.int64], is_malicious: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """Whether each cell knows the clean gradient of each of `clients`, (M, m) of bool; None where it knows all."""
        if self._kind.knowledge == "full":
            return None
        if self._kind.knowledge != "noisy":
            return is_malicious if self._kind.knowledge == "own" else ~is_malicious
        settings = self._cell.settings
        by_rank = streams.known_rank(settings.seed, round_, settings.clients.total)[clients].argsort()
        honest = ~is_malicious[:, by_rank]
        quota = np.array([knowledge.count_of(self._kind.fraction, int(count)) for count in honest.sum(1)])
        known = np.zeros_like(is_malicious)
        known[:, by_rank] = honest & (honest.cumsum(1) <= quota[:, None])
        return known

    def _selection_plans(
        self, groups: list[slice], table: NDArray[np.int64], layout: Layout
    ) -> Iterator[list[kernels.SelectionPlan] | None]:
        """For each round of a table of allowances (rounds, M, G) one plan a group; None where no cell may flip."""
        if self._kind.scope == "pooled":
            budgets = [table[:, :, 0]]
        else:  # those of the clients that there are in this round
            everyone = np.flatnonzero(self._is_malicious.any(0))
            holders = layout.clients[np.isin(layout.clients, everyone)]
            budgets = [table[:, :, int(np.flatnonzero(everyone == client)[0])] for client in holders]
        by_group = [
            kernels.selection_plans(budget, part.stop - part.start, self._floor, self._dtype)
            for part, budget in zip(groups, budgets, strict=True)
        ]
        for allowed, *plans in zip(table, *by_group, strict=True):
            yield plans if allowed.any() else None
