"""Many experiments at once: the way that suits their model."""

from collections.abc import Callable, Sequence

import torch

from fl_attack import targets
from fl_attack.engine import groups, linear, sequential, stacked
from fl_attack.engine.outcome import Outcome
from fl_attack.engine.threads import side_by_side
from fl_attack.errors import InputError
from fl_attack.scenario import Scenario

Progress = Callable[[int], None]
LINEAR_CELLS = 512


def run_cells(
    scenarios: Sequence[Scenario],
    *,
    device: str = "cpu",
    memory_gb: float = 2.0,
    progress: Progress = lambda rounds: None,
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
        What may be held at a time, in 2^30 bytes, except flips that are kept.
    progress
        Is told how many rounds of one cell are done since it was last told.
    keep_flips, keep_theta
        Whether outcomes hold the flips and the last parameters.
    full_rows
        Whether the columns `cosine`, `repeated` and those of `detect.MEASURES`, which cost extra work, are measured;
        else they are NaN.

    Returns
    -------
    list of Outcome
        In the order of the experiments. One whose parameters are not finite any more ends there, with an error, and
        disturbs no other.

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
    if is_linear(scenarios[0]):
        return linear.run_cells(
            scenarios,
            device=device,
            memory_gb=memory_gb,
            progress=progress,
            keep_flips=keep_flips,
            keep_theta=keep_theta,
            full_rows=full_rows,
        )
    together = [i for i, cell in enumerate(scenarios) if not full_rows and stacked.can_run(cell)]
    apart = [i for i in range(len(scenarios)) if i not in set(together)]
    found: dict[int, Outcome] = {}
    with torch.inference_mode():
        if together:
            outcomes = stacked.run_cells(
                [scenarios[i] for i in together],
                device=device,
                memory_gb=memory_gb,
                progress=progress,
                keep_flips=keep_flips,
                keep_theta=keep_theta,
            )
            found |= zip(together, outcomes, strict=True)
    alone = _side_by_side([scenarios[i] for i in apart], device, progress, keep_flips, keep_theta, full_rows)
    found |= zip(apart, alone, strict=True)
    return [found[i] for i in range(len(scenarios))]


def cells_at_once(cell: Scenario) -> int:
    """How many cells like this one are worth computing together; what an interruption may lose."""
    if is_linear(cell):
        return LINEAR_CELLS
    return stacked.CELLS["cpu"] if stacked.can_run(cell) else torch.get_num_threads()


def is_linear(cell: Scenario) -> bool:
    """Whether the matrix products of a linear model are all that the rounds of a cell take."""
    return cell.model.linear and not cell.settings.worker_momentum


def _side_by_side(
    scenarios: Sequence[Scenario],
    device: str,
    progress: Progress,
    keep_flips: bool,
    keep_theta: bool,
    full_rows: bool,
) -> list[Outcome]:
    """Each experiment by itself, on the CPU as many at a time as torch uses threads."""
    aimed = [cell for cell in scenarios if cell.settings.attacked and cell.settings.attack.goal == "targeted"]
    for cell in aimed:
        targets.target(cell)  # here, so that no two threads train the same

    def one(cell: Scenario) -> Outcome:
        with torch.inference_mode():
            outcome = sequential.run(cell, device=device, progress=progress, full_rows=full_rows)
        if not keep_theta:
            outcome.theta = None
        if not keep_flips:
            outcome.flips = []
        return outcome

    if torch.device(device).type != "cpu":
        return [one(cell) for cell in scenarios]
    return side_by_side(one, scenarios)
