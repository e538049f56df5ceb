"""Computing units: in this process, in workers of this machine or of a cluster, or one run after the other on Flower.

What a unit gives does not depend on where it is computed, beside what, or how many threads it has: a launcher only says
where. Its row in `LAUNCHERS` takes jobs and yields their numbers as they are done.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fl_attack import engine, experiment, plans, workers
from fl_attack.config import Settings, settings_from
from fl_attack.errors import RunError
from fl_attack.history import COLUMNS, History, OnRound, Recorder
from fl_attack.multirun.units import Numbers, Unit, mistakes, stacked
from fl_attack.progress import Progress
from fl_attack.scenario import Scenario

OnNumbers = Callable[[Unit, Numbers], None]
Observe = Callable[[int, History], OnRound | None]  # of an experiment's position and history, its observer
OnSteps = Callable[[int, int], None]  # gets the position of a job and how many rounds of its cells are done
Packed = tuple[int, list[str]]  # the threads to use, and the settings of cells in JSON
WORTH_WORKERS = 4.0  # seconds of computing below which workers would take longer to start


@dataclass(frozen=True)
class UnitJob:
    """The cells of a unit of the batched engine."""

    cells: list[Scenario]

    def packed(self, threads: int) -> Packed:
        """The job for another process, see `numbers_of_job`, where this number of threads is free."""
        return self.threads(threads), [cell.settings.model_dump_json() for cell in self.cells]

    def threads(self, free: int) -> int:
        """The number of threads that it uses where `free` are: all for a linear model, one for others."""
        return free if engine.is_linear(self.cells[0]) else 1  # convolutions sum otherwise with another number


# gets jobs and the settings of any of their cells; yields the position and numbers of each job as it is done
Launcher = Callable[[Sequence[UnitJob], Settings, OnSteps], Iterator[tuple[int, Numbers]]]


def compute(
    todo: Sequence[Unit],
    scenarios: Sequence[Scenario],
    progress: Progress,
    keep: OnNumbers,
    observe: Observe = lambda cell, history: None,
) -> None:
    """Compute units, and hand on the numbers of each as it is done.

    Parameters
    ----------
    todo : sequence of Unit
        The units; the order in which they are done may be another.
    scenarios : sequence of Scenario
        The experiments; units have their positions.
    progress : Progress
        The progress bar, which counts cells.
    keep : callable
        Called with each unit and its numbers, in this process.
    observe : callable
        Called with the position and the history of an experiment that is about to run on Flower; gives the observer of
        its rounds, or None.

    Raises
    ------
    RunError
        Where a unit of the batched engine was lost with its workers. On Flower a cell that breaks off is kept as such.
    """
    batched = [unit for unit in todo if scenarios[unit.cells[0]].settings.engine.name == "batched"]
    if batched:
        _spread(batched, scenarios, progress, keep)
    _one_by_one([unit for unit in todo if unit not in batched], scenarios, progress, keep, observe)


def _spread(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: Progress, keep: OnNumbers) -> None:
    """Have units of the batched engine computed where their launcher says."""
    # the longest first, so that no worker starts on one when the others are done
    todo = sorted(todo, key=lambda unit: -_seconds(unit, scenarios))
    settings = scenarios[todo[0].cells[0]].settings
    jobs = [UnitJob([scenarios[i] for i in unit.cells]) for unit in todo]
    reported = [0] * len(todo)

    def on_steps(i: int, rounds: int) -> None:
        progress.rounds(jobs[i].cells[0].settings.rounds, rounds - reported[i])
        reported[i] = rounds

    for i, numbers in LAUNCHERS[launcher_of(settings)](jobs, settings, on_steps):
        on_steps(i, len(jobs[i].cells) * jobs[i].cells[0].settings.rounds)
        keep(todo[i], numbers)


def launcher_of(settings: Settings) -> str:
    """The name of the launcher of a sweep, a row of `LAUNCHERS`."""
    if settings.launcher != "auto":
        return settings.launcher
    return "ray" if settings.engine.ray_address else "local"


def _local(jobs: Sequence[UnitJob], settings: Settings, on_steps: OnSteps) -> Iterator[tuple[int, Numbers]]:
    """Yield the position and numbers of each job as it is done on this machine, in whatever order.

    Jobs run in worker processes where these are worth their start, else in this process.
    """
    count = worker_count([job.cells for job in jobs], settings)
    if count > 1:
        threads = max(1, (settings.workers or workers.processors()) // count)
        packed = [job.packed(threads) for job in jobs]
        yield from workers.side_by_side(numbers_of_job, packed, count, on_steps)
        return
    for i, job in enumerate(jobs):
        done = 0

        def step(rounds: int, i: int = i) -> None:
            nonlocal done
            done += rounds
            on_steps(i, done)

        with _threads(job.threads(min(torch.get_num_threads(), settings.workers or workers.processors()))):
            numbers = batched_numbers(job.cells, step)
        yield i, numbers


def _on_ray(jobs: Sequence[UnitJob], settings: Settings, on_steps: OnSteps) -> Iterator[tuple[int, Numbers]]:
    """Yield the position and numbers of each job as a worker of the Ray cluster is done with it, in whatever order."""
    from fl_attack import federation

    threads, address = torch.get_num_threads(), settings.engine.ray_address
    packed = [job.packed(threads) for job in jobs]
    yield from federation.scatter(numbers_of_job, packed, threads, address, settings.verbose, on_steps)


LAUNCHERS: dict[str, Launcher] = {"local": _local, "ray": _on_ray}


def worker_count(jobs: Sequence[Sequence[Scenario]], settings: Settings) -> int:
    """How many worker processes are worth their start.

    Parameters
    ----------
    jobs : sequence of sequences of Scenario
        The cells of each unit.
    settings : Settings
        The settings of any cell, for `workers` and the engine's device and memory.

    Returns
    -------
    int
        From 1, for units best computed in this process, to `workers` or the number of processors.
    """
    wanted = settings.workers or workers.processors()
    if torch.device(settings.engine.device).type != "cpu":
        return 1  # they would only take memory of the GPU from each other
    if settings.workers is None and sum(map(_seconds_of, jobs)) < WORTH_WORKERS:
        return 1
    held = np.cumsum(sorted((engine.memory_of(cells) for cells in jobs), reverse=True))
    fit = int((held <= settings.engine.memory_gb * 2**30).sum())  # side by side, whichever of them these are
    return max(1, min(wanted, len(jobs), fit))


def _seconds(unit: Unit, scenarios: Sequence[Scenario]) -> float:
    """Roughly the seconds that a unit takes on one processor."""
    return _seconds_of([scenarios[i] for i in unit.cells])


def _seconds_of(cells: Sequence[Scenario]) -> float:
    """Roughly the seconds that cells take together on one processor."""
    cell, settings = cells[0], cells[0].settings
    samples = settings.rounds * settings.local_steps * int(cell.schedule.sizes.sum())
    products = 4 * len(cells) * samples * cell.theta_shape[0] * cell.theta_shape[1] / 3e10
    planning = plans.planning_seconds(cells)
    if engine.is_linear(cell):
        return 2e-4 * settings.rounds + products + planning
    # a weight of a convolution is used many times
    return len(cells) * 2e-3 * settings.rounds + 20 * products + planning


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Have torch use this number of threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_by_one(
    todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: Progress, keep: OnNumbers, observe: Observe
) -> None:
    """Run cells of the Flower engine one after the other, over the same clients where number and engine are equal.

    A cell that breaks off is kept with its error and what it has recorded.
    """
    by_grid: dict[str, list[Unit]] = {}
    for unit in todo:
        settings = scenarios[unit.cells[0]].settings
        by_grid.setdefault(f"{settings.clients.total} {settings.engine}", []).append(unit)
    if not todo:
        return
    from fl_attack import federation

    def federate_all(units_of_grid: Sequence[Unit], federate: federation.Federate) -> None:
        for unit in units_of_grid:
            scenario, error = scenarios[unit.cells[0]], ""
            recorder = Recorder(scenario, partial(progress.round, scenario.settings.rounds))
            if logged := observe(unit.cells[0], recorder.history):
                recorder.on_round = experiment.both(recorder.on_round, logged)
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
    """The numbers of cells of one group of `engine.group`, computed together in this process.

    Parameters
    ----------
    cells : sequence of Scenario
        The experiments of the cells.
    progress : callable, optional
        Called with how many more rounds of a cell are done.

    Returns
    -------
    Numbers
        Each part with the cells along its first axis, in their order.
    """
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


def numbers_of_job(job: Packed, progress: Callable[[int], None]) -> Numbers:
    """Set the threads of torch, and compute cells that another process has packed: what a worker does.

    Parameters
    ----------
    job : Packed
        The number of threads, and the settings of each cell as JSON.
    progress : callable
        Called with how many more rounds of a cell are done.

    Returns
    -------
    Numbers
        As `batched_numbers` gives them.
    """
    threads, settings = job
    torch.set_num_threads(threads)
    scenarios = engine.make_scenarios([settings_from(json.loads(text)) for text in settings], verify=False)
    return batched_numbers(scenarios, progress)
