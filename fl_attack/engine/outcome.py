"""What a cell leaves: its history as a table, and what went wrong."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import protocol
from fl_attack.errors import RunError
from fl_attack.history import COLUMNS, History, Recorder
from fl_attack.scenario import Flips, Scenario, client_update

COUNTS = ("round", "flips", "allowed")  # the columns that are whole numbers


@dataclass
class Outcome:
    """The result of one experiment of a batch."""

    table: NDArray[np.float64]  # (evaluations, columns of `history.COLUMNS`), round 0 first
    flip_count: int  # in all rounds
    theta: Tensor | None  # (C, d), None where it was not kept
    flips: list[tuple[int, Flips]] = field(default_factory=list)  # empty where they were not kept
    seconds: float = 0.0  # its share of the time of its batch
    error: str | None = None  # why the rounds end before the last one

    def history(self) -> History:
        """The same as a run of this experiment alone records it."""
        assert self.theta is not None
        rows = [
            {name: int(value) if name in COUNTS else value for name, value in zip(COLUMNS, row, strict=True)}
            for row in self.table.tolist()
        ]
        return History(self.theta.double(), rows, self.flips, self.seconds)


def run_alone(cell: Scenario) -> Outcome:
    """One experiment client by client: what is done again with a cell that diverged, to end where it did."""
    recorder, settings = Recorder(cell), cell.settings
    theta = cell.start()
    state = protocol.initial_state(theta)
    weights = cell.schedule.sizes / cell.schedule.sizes.sum()
    error = None
    try:
        recorder.record(0, theta)
        for round_ in range(1, settings.rounds + 1):
            flips = cell.flips(theta, round_)
            moved = theta.new_zeros(theta.shape)
            for client, weight in enumerate(weights):
                moved += weight * client_update(cell, client, theta, round_, flips)[0]
            aggregate = (theta - moved) / settings.lr
            theta, state = protocol.server_step(settings.server_optimizer, theta, aggregate, settings.lr, state)
            recorder.record(round_, theta, aggregate, flips)
            if recorder.stopped:
                break
    except RunError as failure:
        error = str(failure)
    history = recorder.history
    table = np.array([[row[name] for name in COLUMNS] for row in history.rows])
    return Outcome(table, history.flip_count, history.theta, history.flips, error=error)
