"""What a cell leaves: its history as a table, and what went wrong."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import adversary, protocol
from fl_attack.errors import RunError
from fl_attack.history import COLUMNS, History, Recorder, row_of
from fl_attack.scenario import Flips, Scenario


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
        rows = [row_of(values) for values in self.table.tolist()]
        return History(self.theta.double(), rows, self.flips, self.seconds)


def run_alone(cell: Scenario) -> Outcome:
    """One experiment client by client: what is done again with a cell that diverged, to end where it did."""
    recorder, settings = Recorder(cell), cell.settings
    theta = anchor = cell.start()
    state = protocol.initial_state(theta)
    rule = cell.rule()
    error = None
    try:
        recorder.record(0, theta)
        for round_ in range(1, settings.rounds + 1):
            if adversary.epoch_start(cell, round_) == round_:
                anchor = theta
            flips = adversary.flips(cell, theta, round_, anchor)
            updates = adversary.crafted(cell, theta, round_, adversary.updates(cell, theta, round_, flips))
            clients = cell.schedule.drawn(round_)
            order = torch.from_numpy(protocol.shuffled(settings.seed, round_, len(clients)))
            aggregate = rule(updates, torch.from_numpy(cell.schedule.sizes[clients]), order)
            theta, state = protocol.server_step(settings.server_optimizer, theta, aggregate, settings.lr, state)
            recorder.record(round_, theta, aggregate, flips, updates)
            if recorder.stopped:
                break
    except RunError as failure:
        error = str(failure)
    history = recorder.history
    table = np.array([[row[name] for name in COLUMNS] for row in history.rows])
    return Outcome(table, history.flip_count, history.theta, history.flips, error=error)
