"""The cells of a sweep in its trackers: one child for each, whichever unit its numbers come from."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fl_attack import trackers
from fl_attack.history import History, OnRound, row_of
from fl_attack.multirun.table import results_row
from fl_attack.multirun.units import Numbers, Unit, by_cell
from fl_attack.scenario import Scenario

OF_SEVERAL = ("drop", "rounds_to_recover")  # results that need the cell of the unattacked twin: in the table alone


class Children:
    """Tells a sweep's trackers of its cells; does nothing without trackers."""

    def __init__(
        self, tracked: trackers.TrackedSweep | None, scenarios: Sequence[Scenario], place: Sequence[int]
    ) -> None:
        """`scenarios` are of all cells; `place` has the position of each cell's among the experiments computed."""
        self.tracked, self.scenarios = tracked, scenarios
        self._cells: defaultdict[int, list[int]] = defaultdict(list)
        for cell, at in enumerate(place):
            self._cells[at].append(cell)

    def observer(self, at: int, history: History) -> OnRound | None:
        """The observer that logs the first of the cells sharing experiment `at`, or None; for others see `done`."""
        return self.tracked.observer(self._cells[at][0], history) if self.tracked else None

    def done(self, unit: Unit, numbers: Numbers) -> None:
        """Log all cells that share the experiments of a unit, with its numbers; see `by_cell`."""
        if self.tracked is None or not self.tracked.names:
            return
        for at, one in by_cell(unit, numbers).items():
            rows = [row_of(values) for values in one.table[~np.isnan(one.table[:, 0])].tolist()]
            for cell in self._cells[at]:
                found = results_row(self.scenarios[cell], one)
                facts = {name: number(value) for name, value in found.items() if name not in OF_SEVERAL}
                self.tracked.done(cell, rows, facts, str(one.error))
        self.tracked.save()


def number(value: str | int | float) -> str | int | float:
    """Text that reads as a float as that float, any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
