"""Computing units: in this process, on the workers of a cluster, or one run after the other on Flower."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fl_attack import engine, federation
from fl_attack.config import settings_from
from fl_attack.errors import RunError
from fl_attack.history import COLUMNS, Recorder
from fl_attack.multirun.progress import Progress
from fl_attack.multirun.units import Numbers, Unit, mistakes, stacked
from fl_attack.scenario import Scenario

Keep = Callable[[Unit, Numbers], None]


def compute(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: Progress, keep: Keep) -> None:
    """Compute the units `todo` and hand the numbers of each to `keep` as it is done."""
    batched = [unit for unit in todo if scenarios[unit.cells[0]].settings.engine.name == "batched"]
    settings = scenarios[0].settings
    if settings.launcher == "ray" or (settings.launcher == "auto" and settings.engine.ray_address):
        _on_a_cluster(batched, scenarios, progress, keep)
    else:
        for unit in batched:
            cells = [scenarios[i] for i in unit.cells]
            keep(unit, batched_numbers(cells, partial(progress.rounds, cells[0].settings.rounds)))
    _one_by_one([unit for unit in todo if unit not in batched], scenarios, progress, keep)


def _on_a_cluster(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: Progress, keep: Keep) -> None:
    """Have units of the batched engine computed by the workers of a Ray cluster, and kept as they are done."""
    if not todo:
        return
    settings = scenarios[todo[0].cells[0]].settings
    threads = torch.get_num_threads()
    # the longest first, so that no worker starts on one when the others are done
    todo = sorted(todo, key=lambda unit: -len(unit.cells) * _samples_of(scenarios[unit.cells[0]]))
    jobs = [(threads, [scenarios[i].settings.model_dump_json() for i in unit.cells]) for unit in todo]
    reported = [0] * len(todo)

    def tell(i: int, rounds: int) -> None:
        progress.rounds(scenarios[todo[i].cells[0]].settings.rounds, rounds - reported[i])
        reported[i] = rounds

    scattered = federation.scatter(numbers_of_job, jobs, threads, settings.engine.ray_address, settings.verbose, tell)
    for i, numbers in scattered:
        tell(i, len(todo[i].cells) * scenarios[todo[i].cells[0]].settings.rounds)
        keep(todo[i], numbers)


def _samples_of(scenario: Scenario) -> int:
    """The samples that a cell uses in all its rounds, if all clients take part."""
    return scenario.settings.rounds * scenario.settings.local_steps * int(scenario.schedule.sizes.sum())


def _one_by_one(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: Progress, keep: Keep) -> None:
    """Run cells of the Flower engine one after the other, over the same clients where they have as many."""
    by_grid: dict[str, list[Unit]] = {}
    for unit in todo:
        settings = scenarios[unit.cells[0]].settings
        by_grid.setdefault(f"{settings.clients.total} {settings.engine}", []).append(unit)
    if not todo:
        return

    def federate_all(units_of_grid: Sequence[Unit], federate: federation.Federate) -> None:
        for unit in units_of_grid:
            scenario, error = scenarios[unit.cells[0]], ""
            recorder = Recorder(scenario, partial(progress.round, scenario.settings.rounds))
            try:
                federate(recorder)
            except RunError as failure:
                error = str(failure)
            rows = np.array([[row[name] for name in COLUMNS] for row in recorder.history.rows])
            wrong = mistakes(scenario, recorder.history.theta.cpu(), scenario.test_set())
            keep(unit, stacked([(rows, recorder.history.flip_count, error, wrong)]))

    with federation.ray_session(settings.engine.ray_address, settings.verbose):
        for units_of_grid in by_grid.values():
            federation.run(partial(federate_all, units_of_grid), scenarios[units_of_grid[0].cells[0]].settings)


def batched_numbers(cells: Sequence[Scenario], progress: Callable[[int], None] = lambda rounds: None) -> Numbers:
    """The numbers of cells that can run together."""
    engine_settings = cells[0].settings.engine
    outcomes = engine.run_cells(
        cells,
        device=engine_settings.device,
        memory_gb=engine_settings.memory_gb,
        progress=progress,
        keep_flips=False,
        keep_theta=True,
        full_rows=cells[0].settings.detectability,
    )
    test_set = cells[0].test_set()  # the same for all
    return stacked(
        [
            (one.table, one.flip_count, one.error or "", mistakes(cell, cast(Tensor, one.theta), test_set))
            for cell, one in zip(cells, outcomes, strict=True)
        ]
    )


def numbers_of_job(job: tuple[int, list[str]], progress: Callable[[int], None]) -> Numbers:
    """The numbers of cells given as the threads to use, and settings in JSON: what a worker of a cluster does."""
    threads, settings = job
    torch.set_num_threads(threads)  # as where the job was made, so that sums come out the same
    scenarios = engine.make_scenarios([settings_from(json.loads(text)) for text in settings], verify=False)
    return batched_numbers(scenarios, progress)
