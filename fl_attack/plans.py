"""Plans of `attack=planned`: what is flipped in every round, made once for an experiment, and cached.

A plan is a function of the scenario, the round that it begins with and the parameters at that time. The engines and
every client of Flower look it up: whoever asks first makes it, cells that share their minibatches together.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from fl_attack import attack, numerics, plugins
from fl_attack.checkpoint import Checkpoint
from fl_attack.data import cache
from fl_attack.plan_maker import OnSweep, Plan, PlanMaker
from fl_attack.scenario import Scenario

# settings that a plan depends on, besides data, partition and schedule
TRAINING: dict[str, Any] = {
    **dict.fromkeys(
        ("rounds", "eval_every", "batch_size", "local_steps", "lr", "lr_schedule", "lr_every", "lr_decay"), True
    ),
    **dict.fromkeys(("weight_decay", "server_optimizer", "model", "seed", "attack", "clients", "dtype"), True),
}


def plans_whole_run(scenario: Scenario) -> bool:
    """Whether all rounds of an experiment are planned before the first."""
    threat = scenario.settings.attack
    return scenario.settings.attacked and threat.plans and threat.horizon is None


def planning_seconds(cells: Sequence[Scenario]) -> float:
    """Roughly the seconds that the plans of cells take on one processor, made together.

    Parameters
    ----------
    cells : sequence of Scenario
        Cells that share their minibatches, planned or not.
    """
    planned = [cell for cell in cells if cell.settings.attacked and cell.settings.attack.plans]
    if not planned:
        return 0.0
    cell, options = planned[0], attack.planned_options(planned[0].settings.attack.args)
    A, B = cell.theta_shape
    multiplications = 5 * len(planned) * options.starts * int(cell.schedule.sizes.sum()) * A * B
    return options.sweeps * cell.settings.rounds * (4e-4 + multiplications / 5e9)


def first_round(scenario: Scenario, round_: int) -> int:
    """The first round of the plan that a round is in.

    Parameters
    ----------
    scenario : Scenario
        An experiment whose attackers plan.
    round_ : int
        The round, from 1.

    Returns
    -------
    int
        1 where all rounds are planned at once, or the round is before the first that is attacked.
    """
    threat = scenario.settings.attack
    if threat.horizon is None or round_ < threat.start:
        return 1
    return threat.start + (round_ - threat.start) // threat.horizon * threat.horizon


def plan(scenario: Scenario, first: int = 1, theta: Tensor | None = None) -> Plan:
    """The plan of an experiment that begins with a round.

    Parameters
    ----------
    scenario : Scenario
        The experiment, with `attack=planned`.
    first : int
        The round that the plan begins with, see `first_round`.
    theta : (A, B) tensor of float64, optional
        The parameters broadcast in that round; by default those that every run begins with.

    Returns
    -------
    Plan
    """
    held: dict[int, tuple[bytes, Plan]] = scenario.memo.setdefault("plans", {})
    key = b"" if theta is None else theta.cpu().numpy().tobytes()
    if first not in held or held[first][0] != key:
        held[first] = key, load_plans([scenario], first, None if theta is None else [theta])[0]
    return held[first][1]


def make_together(scenarios: Sequence[Scenario], first: int, thetas: Sequence[Tensor]) -> None:
    """Make the plans of experiments that begin with a round, for `plan` to find them; arguments as of `load_plans`."""
    found = load_plans(scenarios, first, thetas)
    for scenario, theta, one in zip(scenarios, thetas, found, strict=True):
        scenario.memo.setdefault("plans", {})[first] = theta.cpu().numpy().tobytes(), one


def note_start(scenario: Scenario, round_: int, theta: Tensor) -> None:
    """Note that other processes make a plan, for `plans_made`.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    round_ : int
        The round that the plan begins with.
    theta : (A, B) tensor
        The parameters before that round.
    """
    scenario.memo.setdefault("plan starts", {})[round_] = theta


def plans_made(scenario: Scenario) -> list[Plan]:
    """The plans of a run so far, ordered by the round that they begin with.

    Those from before an interruption hold how the objective rose (`harm`, `part`), but no flips.
    """
    held: dict[int, tuple[bytes, Plan]] = scenario.memo.get("plans", {})
    found: dict[int, Plan] = scenario.memo.get("plans before", {}) | {first: one for first, (_, one) in held.items()}
    for first, theta in scenario.memo.get("plan starts", {}).items():
        noted = _read(_file(scenario, first, theta.double()))
        found |= {first: noted} if noted is not None else {}
    return [found[first] for first in sorted(found)]


def sweeps_of(scenario: Scenario) -> list[dict[str, Any]]:
    """What a checkpoint keeps of the plans made, for `restore_sweeps`: how the objective rose, not the flips."""
    return [{"first": one.first, "harm": one.harm, "part": one.part} for one in plans_made(scenario)]


def restore_sweeps(scenario: Scenario, kept: Sequence[dict[str, Any]]) -> None:
    """Make `plans_made` list the plans that an earlier process of this run has made.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    kept : sequence of dict
        What `sweeps_of` gave in that process.
    """
    none = np.empty(0, np.int64)
    scenario.memo["plans before"] = {
        one["first"]: Plan(one["first"], none, none, none, none, one["harm"], one["part"]) for one in kept
    }


def load_plans(
    scenarios: Sequence[Scenario],
    first: int = 1,
    thetas: Sequence[Tensor] | None = None,
    on_sweep: OnSweep = lambda sweep: None,
) -> list[Plan]:
    """The plans of experiments that begin with a round, in their order; those that are not there are made together.

    Parameters
    ----------
    scenarios : sequence of Scenario
        The experiments, with `attack=planned`.
    first : int
        The round, counted from 1.
    thetas : sequence of (A, B) tensors, optional
        The parameters broadcast in that round, by default those that runs begin with.
    on_sweep
        Is called with the number of each sweep, a pass over all planned rounds, that is done.

    Returns
    -------
    list of Plan
    """
    starts = [cell.start() for cell in scenarios] if thetas is None else [theta.double() for theta in thetas]
    files = [_file(cell, first, theta) for cell, theta in zip(scenarios, starts, strict=True)]
    missing: dict[Path, int] = {}
    for i, file in enumerate(files):
        if _read(file) is None:
            missing.setdefault(file, i)
    groups: dict[Any, list[int]] = {}
    for i in missing.values():
        groups.setdefault(_group_key(scenarios[i]), []).append(i)
    for members in groups.values():
        for some in _pieces([scenarios[i] for i in members], members, first):
            _make_and_keep([scenarios[i] for i in some], first, [starts[i] for i in some], on_sweep)
    found = [_read(file) for file in files]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def _make_and_keep(cells: Sequence[Scenario], first: int, thetas: Sequence[Tensor], on_sweep: OnSweep) -> None:
    """Make the plans of cells together and leave each in its file; one process at a time, which resumes another's."""
    files = [_file(cell, first, theta) for cell, theta in zip(cells, thetas, strict=True)]
    name = hashlib.sha256("".join(file.name for file in files).encode()).hexdigest()[:24]
    work = files[0].parent / f"{name}.unfinished"
    with _held(work):
        if any(_read(file) is None for file in files):
            maker = PlanMaker(cells, first, thetas)
            with torch.inference_mode(), maker.threads():
                plans = maker.make(Checkpoint(work, name), on_sweep)
            for file, one in zip(files, plans, strict=True):
                cache.write_whole(file, partial(np.savez_compressed, **one._asdict()))
        shutil.rmtree(work, ignore_errors=True)  # whoever waits for the lock finds the plans made


@contextmanager
def _held(work: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made again where whoever held it before has removed it."""
    lock = FileLock(work / ".lock")
    while not lock.is_locked:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed while this one waited
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _group_key(cell: Scenario) -> tuple[Any, ...]:
    """The key of cells whose plans can be made together: they see the same minibatches and their servers step alike."""
    settings, threat = cell.settings, cell.settings.attack
    return (
        cell.dataset.fingerprint,
        hashlib.sha256(cell.dataset.y_train.tobytes() + cell.partition.client.tobytes()).hexdigest(),
        settings.model_dump_json(include={key: True for key in TRAINING if key not in ("attack", "clients", "lr")}),
        cell.schedule.per_round,
        settings.clients.total,
        (threat.selection, threat.scope, threat.foresight, threat.horizon, str(sorted(threat.args.items()))),
    )


def _pieces(cells: Sequence[Scenario], members: Sequence[int], first: int) -> list[list[int]]:
    """Members in pieces whose trajectories fit in memory, and on networks one by one."""
    cell = cells[0]
    if not cell.model.linear:
        return [[i] for i in members]
    A, B = cell.theta_shape
    T, starts = cell.settings.rounds - first + 1, attack.planned_options(cell.settings.attack.args).starts
    copies = {"sgd": 1, "momentum": 2, "adam": 3}[cell.settings.server_optimizer]
    each = starts * (2 * T**0.5 * copies * A * B * 8 + 3 * T * int(cell.schedule.sizes.sum()))
    size = max(1, int(cell.settings.engine.memory_gb * 2**29 / each))
    return [list(part) for part in (members[i : i + size] for i in range(0, len(members), size))]


def _file(cell: Scenario, first: int, theta: Tensor) -> Path:
    """Where the plan of an experiment is kept, under a hash of everything that it depends on."""
    settings = cell.settings
    recipe = hashlib.sha256(cell.partition.client.tobytes() + np.asarray(cell.partition.malicious).tobytes())
    recipe.update(cell.dataset.y_train.tobytes() + theta.cpu().numpy().tobytes())
    recipe.update(f"{first} {cell.schedule.per_round} {plugins.source_digest(settings.model.name)}".encode())
    recipe.update((settings.model_dump_json(include=TRAINING) + cell.dataset.fingerprint).encode())
    recipe.update(f"{numerics.versions()}/{numerics.WITH_OTHERS}".encode())
    return cache.folder() / "plans" / f"{recipe.hexdigest()[:24]}.npz"


def _read(file: Path) -> Plan | None:
    """The plan in a file; None where there is none, or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return Plan(int(stored["first"]), *(stored[name] for name in Plan._fields[1:]))
    except Exception:  # damage can raise anything
        return None
