"""Many experiments at once: the way that suits their model."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fl_attack import adaptive, aggregate, plans, targets
from fl_attack.checkpoint import Checkpoint
from fl_attack.engine import groups, linear, sequential, stacked
from fl_attack.engine.outcome import OnRounds, Outcome, Watch
from fl_attack.engine.threads import side_by_side
from fl_attack.errors import InputError
from fl_attack.scenario import Scenario

LINEAR_CELLS = 512


def run_cells(
    scenarios: Sequence[Scenario],
    *,
    device: str = "cpu",
    memory_gb: float = 2.0,
    progress: OnRounds = lambda rounds: None,
    watch: Watch = lambda cells, so_far: None,
    checkpoints: Sequence[Checkpoint] = (),
    keep_flips: bool = True,
    keep_theta: bool = True,
    full_rows: bool = True,
) -> list[Outcome]:
    """Run experiments of one `group_key` together.

    Parameters
    ----------
    scenarios
        The experiments.
    device
        `cpu` or `cuda`, as in `engine.device`.
    memory_gb
        What cells that run together may hold at a time, in 2^30 bytes, except flips that are kept.
    progress
        Is called with the number of rounds done since the last call, summed over the experiments; those that a
        checkpoint spares, or that follow an early end, count as done.
    watch
        Is called after every round with the numbers of the cells that run, and what gives their outcomes so far.
    checkpoints
        One for each experiment, or none: where they keep how far they are, and go on. Not used by experiments of dense
        layers that run together, or of a linear model where they don't fit in memory together.
    keep_flips, keep_theta
        Whether outcomes hold the flips and the last parameters.
    full_rows
        Whether the columns `cosine`, `repeated`, `relabelled` and those of `detect.MEASURES`, which cost extra work,
        are measured; else they are NaN, but for `repeated` and `relabelled` of experiments that run one by one.

    Returns
    -------
    list of Outcome
        In the order of the experiments. One whose parameters are not finite any more ends there, with an error, and
        disturbs no other; what was not to be kept or measured may be there for it.

    Raises
    ------
    InputError
        Where the experiments can't run together, or not here.
    """
    if not scenarios:
        return []
    for cell in scenarios:
        groups.check(cell)
    if len({groups.group_key(cell) for cell in scenarios}) > 1:
        raise InputError("these experiments differ in what cells of one batch share; see fl_attack.engine.group")
    lost = set(targets.diverging(scenarios))  # whose attack ends the run in the first round that needs the target
    of_linear = [i for i, cell in enumerate(scenarios) if is_linear(cell) and i not in lost]
    found: dict[int, Outcome] = {}
    kept = {"keep_flips": keep_flips, "keep_theta": keep_theta}

    def run_some(run: Callable[..., list[Outcome]], numbers: Sequence[int], **options: Any) -> None:
        some, watched = [scenarios[i] for i in numbers], partial(_numbered, watch, numbers)
        outcomes = run(some, device=device, progress=progress, watch=watched, **options)
        found.update(zip(numbers, outcomes, strict=True))

    def checkpoints_of(numbers: Sequence[int]) -> Sequence[Checkpoint]:
        return [checkpoints[i] for i in numbers] if checkpoints else ()

    if planning := [cell for i, cell in enumerate(scenarios) if plans.plans_whole_run(cell) and i not in lost]:
        plans.load_plans(planning)  # together
    if of_linear:
        more = {"full_rows": full_rows, "checkpoints": checkpoints_of(of_linear)}
        run_some(linear.run_cells, of_linear, memory_gb=memory_gb, **kept, **more)
    others = [i for i in range(len(scenarios)) if i not in found]
    together = [i for i in others if not full_rows and stacked.can_run(scenarios[i]) and i not in lost]
    one_by_one = [i for i in others if i not in set(together)]
    with torch.inference_mode():
        if together:
            run_some(stacked.run_cells, together, memory_gb=memory_gb, **kept)
    run_some(_side_by_side, one_by_one, full_rows=full_rows, checkpoints=checkpoints_of(one_by_one), **kept)
    return [found[i] for i in range(len(scenarios))]


def _numbered(watch: Watch, numbers: Sequence[int], cells: Sequence[int], so_far: Callable[[], list[Outcome]]) -> None:
    """Call `watch` for `cells`, positions in a part of the experiments, by their numbers among all: `numbers`."""
    watch([numbers[i] for i in cells], so_far)


def _slimmed(outcome: Outcome, keep_flips: bool, keep_theta: bool) -> Outcome:
    """An outcome without what is not to be kept."""
    return replace(outcome, theta=outcome.theta if keep_theta else None, flips=outcome.flips if keep_flips else [])


def _side_by_side(
    cells: Sequence[Scenario],
    *,
    device: str,
    progress: OnRounds,
    watch: Watch,
    full_rows: bool,
    checkpoints: Sequence[Checkpoint],
    keep_flips: bool,
    keep_theta: bool,
) -> list[Outcome]:
    """The outcomes of cells that are run each by itself, on a CPU as many at a time as there are threads."""
    for cell in cells:
        if cell.settings.attacked and cell.settings.attack.steers:
            targets.diverging([cell])  # trained here, so that no two threads train the same
    lock = threading.Lock()

    def report_rounds(rounds: int) -> None:
        with lock:
            progress(rounds)

    def watch_cell(i: int, so_far: Callable[[], Outcome]) -> None:
        with lock:
            watch([i], lambda: [so_far()])

    def run_cell(i: int) -> Outcome:
        with torch.inference_mode():
            kept = checkpoints[i] if checkpoints else None
            outcome = sequential.run(
                cells[i],
                device=device,
                progress=report_rounds,
                watch=partial(watch_cell, i),
                checkpoint=kept,
                full_rows=full_rows,
            )
            return _slimmed(outcome, keep_flips, keep_theta)

    on_cpu = torch.device(device).type == "cpu"
    numbers = range(len(cells))
    return side_by_side(run_cell, numbers) if on_cpu else [run_cell(i) for i in numbers]


def cells_at_once(cell: Scenario) -> int:
    """The number of cells of this kind worth computing together, which is what an interruption may lose.

    It does not depend on the machine, so that a sweep can be taken up again on another.
    """
    if is_linear(cell):
        return LINEAR_CELLS
    return stacked.CELLS["cpu"] if stacked.can_run(cell) and not cell.settings.detectability else 1


def is_linear(cell: Scenario) -> bool:
    """Whether a cell runs in `engine.linear`: the products of a linear model are all that its rounds take."""
    settings = cell.settings
    own_rule = aggregate.sees(settings.strategy.name) and not aggregate.is_builtin(settings.strategy.name)
    tries_labels = adaptive.searches(cell) and settings.attack.writes == "labels"
    alone = groups.needs_own_history(cell) and not settings.attack.plans
    more = settings.sanitize.name != "none" or tries_labels or own_rule
    return cell.model.linear and not (settings.worker_momentum or alone or more)
