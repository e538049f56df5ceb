"""What is noted of the rounds of cells: the labels flipped, and a row of measures for each evaluation."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.checkpoint import State
from fl_attack.detect import MEASURES
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch
from fl_attack.engine.choices import Change
from fl_attack.history import packed_flips, unpacked_flips
from fl_attack.scenario import Flips


class Report(NamedTuple):
    """The flips of a tile of M cells in a round, and measures that may be taken of it."""

    change: Change
    allowed: NDArray[np.int64]  # (M,) flips that the budgets allowed
    cosine: Tensor | None  # (M,) between the aggregate and the clean gradient, NaN where one of them is zero
    detection: Tensor | None  # (M, detect.MEASURES)


class Log:
    """The rows of M cells, each of the columns `history.COLUMNS`, and their flips."""

    def __init__(self, M: int, samples: int, keep_flips: bool, full_rows: bool) -> None:
        """`samples` is the number of training samples; `keep_flips`, `full_rows` are those of `engine.run_cells`."""
        self.M, self.samples, self.keep_flips, self.full_rows = M, samples, keep_flips, full_rows
        self._rows: list[NDArray[np.float64]] = []  # (M, columns) each
        self._flips: list[list[tuple[int, Flips]]] = [[] for _ in range(M)]
        self._written: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)  # by round: cell and sample in one
        self._cosine = np.full(M, np.nan)
        self._detection = np.full((M, len(MEASURES)), np.nan)

    def table(self, cell: int, last: int) -> NDArray[np.float64]:
        """The measures of a cell.

        Parameters
        ----------
        cell : int
            The number of the cell.
        last : int
            The last round whose measures are wanted.

        Returns
        -------
        (evaluations, columns) array
            Columns are those of `history.COLUMNS`.
        """
        return np.stack([rows[cell] for rows in self._rows if rows[cell, 0] <= last])

    def flips(self, cell: int, last: int) -> list[tuple[int, Flips]]:
        """The flips of a cell, with their rounds; rounds without any are left out.

        Parameters
        ----------
        cell, last
            As `table` takes them.

        Returns
        -------
        list of (int, Flips)
            Empty where flips are not kept.
        """
        return [(round_, flips) for round_, flips in self._flips[cell] if round_ <= last]

    def state(self) -> State:
        """The state that `restore` needs to go on."""
        rows = np.stack(self._rows)
        written = {str(round_): np.concatenate(parts, 1) for round_, parts in self._written.items() if parts}
        return {"rows": rows, "flips": [packed_flips(flips) for flips in self._flips], "written": written}

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave."""
        self._rows = list(state["rows"])
        self._flips = [unpacked_flips(flips) for flips in state["flips"]]
        self._written.clear()
        for round_, written in state["written"].items():
            self._written[int(round_)] = [written]

    def watch(self, round_: int, start: int, batch: Batch, report: Report) -> None:
        """Note what the cells of a tile did in a round.

        Parameters
        ----------
        round_ : int
            The round, from 1.
        start : int
            The number of the tile's first cell.
        batch : Batch
            The minibatch of the round.
        report : Report
            What was written, and how it looks beside honest updates.
        """
        cells, columns, labels = (part.cpu().numpy() for part in report.change)
        samples = batch.samples[columns]
        order = np.lexsort((samples, cells))
        cells, samples, labels = cells[order], samples[order], labels[order]
        self._written.pop(round_ - 2, None)
        self._written[round_].append(np.stack([(start + cells) * self.samples + samples, labels]))
        cells_of_tile = slice(start, start + len(report.allowed))
        if report.cosine is not None:
            self._cosine[cells_of_tile] = report.cosine.cpu().numpy()
        self._detection[cells_of_tile] = np.nan if report.detection is None else report.detection.cpu().numpy()
        if not self.keep_flips:
            return
        ends = np.searchsorted(cells, np.arange(len(report.allowed) + 1))
        for i in np.flatnonzero(np.diff(ends)):
            part = slice(ends[i], ends[i + 1])
            flips = Flips(samples[part], labels[part], int(report.allowed[i]))
            self._flips[start + i].append((round_, flips))

    def measure(
        self,
        round_: int,
        quality: NDArray[np.float64],
        validation_loss: NDArray[np.float64] | float,
        attackers: Sequence[Attackers] = (),
    ) -> None:
        """Note a row of measures for each cell.

        Parameters
        ----------
        round_ : int
            The round; 0 is before the first.
        quality : (M, 3) array
            Accuracy, F1 and loss on the test set.
        validation_loss : (M,) array or float
            NaN without a validation split.
        attackers : sequence of Attackers
            Those of all tiles, in their order, after the round; none where `round_` is 0.
        """
        flips, allowed = np.zeros(self.M), np.zeros(self.M)
        repeated, relabelled = np.zeros((2, self.M))
        if attackers:
            flips = np.concatenate([some.last for some in attackers])
            allowed = np.concatenate([some.allowed for some in attackers])
        if round_ and not self.full_rows:
            repeated[:] = relabelled[:] = np.nan
        elif flips.any():
            empty = np.empty((2, 0), np.int64)
            now, before = (np.concatenate([empty, *self._written[r]], 1) for r in (round_, round_ - 1))
            _, at_now, at_before = np.intersect1d(now[0], before[0], assume_unique=True, return_indices=True)
            cells = now[0, at_now] // self.samples
            repeated = np.bincount(cells, minlength=self.M) / flips.clip(1)
            relabelled_cells = cells[now[1, at_now] != before[1, at_before]]
            relabelled = np.bincount(relabelled_cells, minlength=self.M) / flips.clip(1)
        full = bool(round_) and self.full_rows
        cosine, detection = (part if full else np.full_like(part, np.nan) for part in (self._cosine, self._detection))
        used = flips / allowed.clip(1)
        effective = flips / attackers[0].cell.schedule.labels_used(round_) if attackers else flips
        loss = np.broadcast_to(validation_loss, self.M)
        parts = (
            np.full(self.M, round_),
            quality,
            flips,
            flips,
            allowed,
            used,
            effective,
            cosine,
            repeated,
            relabelled,
            detection,
            loss,
        )
        self._rows.append(np.column_stack(parts))
