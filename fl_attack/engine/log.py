"""What is noted of a chunk's rounds: the labels flipped, and a row of measures for each evaluation."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch
from fl_attack.engine.tile import Report
from fl_attack.scenario import Flips


class Log:
    """Rows, one for each column of `history.COLUMNS`, and flips of M cells."""

    def __init__(self, M: int, samples: int, keep_flips: bool, full_rows: bool) -> None:
        """`samples` is how many there are to train on."""
        self.M, self.samples, self.keep_flips, self.full_rows = M, samples, keep_flips, full_rows
        self._rows: list[NDArray[np.float64]] = []  # (M, columns) each
        self._flips: list[list[tuple[int, Flips]]] = [[] for _ in range(M)]
        self._written: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)  # by round: cell and sample in one
        self._cosine = np.full(M, np.nan)

    def table(self, cell: int, last: int) -> NDArray[np.float64]:
        """The rows of a cell up to its last round."""
        return np.stack([rows[cell] for rows in self._rows if rows[cell, 0] <= last])

    def flips(self, cell: int, last: int) -> list[tuple[int, Flips]]:
        """The flips of a cell up to its last round, where they are kept."""
        return [(round_, made) for round_, made in self._flips[cell] if round_ <= last]

    def watch(self, round_: int, start: int, attackers: Attackers, batch: Batch, report: Report) -> None:
        """Note what the cells from `start` on did in a round."""
        cells, columns, labels = (part.cpu().numpy() for part in report.change)
        samples = batch.samples[columns]
        order = np.lexsort((samples, cells))
        cells, samples, labels = cells[order], samples[order], labels[order]
        self._written.pop(round_ - 2, None)
        self._written[round_].append((start + cells) * self.samples + samples)
        if report.cosine is not None:
            self._cosine[start : start + attackers.M] = report.cosine.cpu().numpy()
        if not self.keep_flips:
            return
        ends = np.searchsorted(cells, np.arange(attackers.M + 1))
        allowed = attackers.allowed(round_)
        for i in np.flatnonzero(np.diff(ends)):
            part = slice(ends[i], ends[i + 1])
            made = Flips(samples[part], labels[part], int(allowed[i]))
            self._flips[start + i].append((round_, made))

    def measure(
        self,
        round_: int,
        quality: NDArray[np.float64],
        validation_loss: NDArray[np.float64] | float,
        attackers: Iterable[Attackers] = (),
    ) -> None:
        """A row for each cell: quality (M, 3) and loss (M,) after a round, and what its attackers did in it."""
        made, allowed, repeated = np.zeros(self.M), np.zeros(self.M), np.zeros(self.M)
        if attackers:
            made = np.concatenate([one.last for one in attackers])
            allowed = np.concatenate([one.allowed(round_) for one in attackers])
        if round_ and not self.full_rows:
            repeated[:] = np.nan
        elif made.any():
            empty = np.empty(0, np.int64)
            now, before = (np.concatenate([empty, *self._written[r]]) for r in (round_, round_ - 1))
            again = np.bincount(now[np.isin(now, before)] // self.samples, minlength=self.M)
            repeated = again / made.clip(1)
        cosine = self._cosine if round_ and self.full_rows else np.full(self.M, np.nan)
        used = made / allowed.clip(1)
        loss = np.broadcast_to(validation_loss, self.M)
        self._rows.append(
            np.column_stack([np.full(self.M, round_), quality, made, allowed, used, cosine, repeated, loss])
        )
