"""The work of a sweep, cut into units: the key of each, and the numbers that are kept of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import engine
from fl_attack.data import Partition
from fl_attack.history import COLUMNS
from fl_attack.identity import NOT_NUMBERS, key_of
from fl_attack.scenario import Scenario
from fl_attack.settings import AttackSettings, EarlyStopSettings, Settings


@dataclass(frozen=True)
class Unit:
    """Experiments that are computed together."""

    cells: list[int]  # their positions among the experiments of the sweep that are computed
    key: str  # of all that their numbers depend on


PARTS = 20  # of the test set: the images i, i + 20, i + 40, ... each


class Numbers(NamedTuple):
    """The numbers that are kept of the cells of a unit; of a single cell without the first axis."""

    table: NDArray[np.float64]  # (cells, evaluations, columns of `history.COLUMNS`); NaN after a cell ended early
    flips: NDArray[np.int64]  # (cells,) flipped labels used in all rounds
    error: NDArray[np.str_]  # (cells,) empty where a cell ended well
    wrong: NDArray[np.int64]  # (cells, PARTS) mistakes of the model given on each part of the test set


def plain(scenario: Scenario) -> Scenario:
    """An experiment with those of its settings as by default that change none of its numbers, to tell equal ones.

    Unattacked ones of a seed become one, whatever their attack, but for those with `detectability`.
    """
    scenario = replace(scenario, settings=_without_idle(scenario.settings))
    settings = scenario.settings
    if not settings.is_unattacked or settings.detectability:
        return scenario
    partition = scenario.partition
    update: dict[str, object] = {}
    if settings.strategy.averages and settings.partition.malicious_share is None:  # else they shape rule or shards
        update |= {"clients": settings.clients.model_copy(update={"honest": settings.clients.total, "malicious": 0})}
        partition = Partition(partition.client, partition.malicious[:0])
    return replace(scenario, settings=settings.unattacked().model_copy(update=update), partition=partition)


def _without_idle(settings: Settings) -> Settings:
    """Settings in which those that have no effect beside the others are as by default."""
    threat, of_attack, update = settings.attack, dict[str, object](), dict[str, object]()
    if settings.attacked and threat.writes == "updates":
        idle = ("budget", "rounding", "scope", "refresh", "memory")
        of_attack |= {name: AttackSettings.model_fields[name].default for name in idle}
    if of_attack.get("memory", threat.memory) == "forget":
        of_attack["unflip"] = False
    if threat.knowledge != "noisy":
        of_attack["knowledge_fraction"] = AttackSettings.model_fields["knowledge_fraction"].default
    update["attack"] = threat.model_copy(update=of_attack)
    if settings.strategy.averages:
        update["strategy"] = settings.strategy.model_copy(update={"f": None, "root": None})
    if settings.early_stop.patience is None:
        update["early_stop"] = EarlyStopSettings()
    if settings.lr_schedule != "step":
        update["lr_decay"] = Settings.model_fields["lr_decay"].default
    return settings.model_copy(update=update)


def distinct_experiments(scenarios: Sequence[Scenario]) -> tuple[list[Scenario], list[int]]:
    """The different experiments, each `plain`, and the position of each of `scenarios` among them."""
    places: dict[str, int] = {}
    kept: list[Scenario] = []
    place = []
    for scenario in map(plain, scenarios):
        key = scenario.settings.model_dump_json(exclude=NOT_NUMBERS)
        if key not in places:
            places[key] = len(kept)
            kept.append(scenario)
        place.append(places[key])
    return kept, place


def units(scenarios: Sequence[Scenario]) -> list[Unit]:
    """Units of all experiments: groups of batched ones cut as suits their model, those of Flower one by one."""
    batched = [i for i, scenario in enumerate(scenarios) if scenario.settings.engine.name == "batched"]
    cuts = [[i] for i, scenario in enumerate(scenarios) if scenario.settings.engine.name != "batched"]
    for group in engine.group([scenarios[i] for i in batched]):
        size = engine.cells_at_once(scenarios[batched[group[0]]])
        pieces = np.array_split(np.array(batched)[group], -(-len(group) // size))
        cuts += [piece.tolist() for piece in pieces]
    return [Unit(cut, key_of([scenarios[i] for i in cut])) for cut in cuts]


def mistakes(scenario: Scenario, theta: Tensor, test_set: tuple[Tensor, Tensor]) -> NDArray[np.int64]:
    """How many samples of each part of the test set a model gets wrong.

    Parameters
    ----------
    scenario : Scenario
        The experiment, which has the model.
    theta : (A, B) tensor
        The parameters.
    test_set : pair of tensors
        Inputs (n, ...) and labels (n,).

    Returns
    -------
    array of int, (PARTS,)
        Sample i belongs to the part i modulo `PARTS`.
    """
    X, y = test_set
    found = scenario.model.class_logits(theta.to(X.dtype), X).argmax(-1) != y
    return np.bincount(np.flatnonzero(found.numpy()) % PARTS, minlength=PARTS)


def stacked(outcomes: Sequence[tuple[NDArray[np.float64], int, str, NDArray[np.int64]]]) -> Numbers:
    """The numbers of cells from each one's table (evaluations, columns), flips, error and mistakes (PARTS,).

    Tables of fewer evaluations end with NaN.
    """
    longest = max(len(table) for table, *_ in outcomes)
    table = np.full((len(outcomes), longest, len(COLUMNS)), np.nan)
    for i, (rows, *_) in enumerate(outcomes):
        table[i, : len(rows)] = rows
    flips, errors, wrong = ([outcome[i] for outcome in outcomes] for i in (1, 2, 3))
    return Numbers(table, np.array(flips), np.array(errors, np.str_), np.array(wrong))


def by_cell(unit: Unit, numbers: Numbers) -> dict[int, Numbers]:
    """The numbers of each experiment of a unit.

    Parameters
    ----------
    unit : Unit
        The unit, which has the positions of its experiments.
    numbers : Numbers
        The numbers of all cells of the unit, along the first axis.

    Returns
    -------
    dict of int to Numbers
        The numbers of each experiment, without an axis of cells, by its position.
    """
    return {cell: Numbers(*(part[i] for part in numbers)) for i, cell in enumerate(unit.cells)}


def random_numbers(scenario: Scenario, rng: np.random.Generator) -> Numbers:
    """Random numbers in place of those of one cell, of two evaluations, to try figures with.

    Parameters
    ----------
    scenario : Scenario
        The experiment of the cell.
    rng : numpy.random.Generator
        Where they are drawn from.

    Returns
    -------
    Numbers
        Without an axis of cells.
    """
    table = rng.uniform(0.2, 0.8, (2, len(COLUMNS)))
    table[:, COLUMNS.index("round")] = 0, scenario.settings.rounds
    if scenario.settings.early_stop.patience is None:
        table[:, COLUMNS.index("validation_loss")] = np.nan
    return Numbers(table, np.array(1), np.array(""), np.zeros(PARTS, np.int64))


def saver(numbers: Numbers, key: str) -> Callable[[Any], None]:
    """A function that writes the numbers of a unit to a stream.

    Parameters
    ----------
    numbers : Numbers
        The numbers to write.
    key : str
        The key of the unit, which is written with them.

    Returns
    -------
    callable
        A function that takes a binary stream.
    """
    return lambda stream: np.savez_compressed(stream, key=np.array(key), **numbers._asdict())


def read(file: Path) -> Numbers | None:
    """The numbers in a file named by their unit's key.

    None where the file is missing, damaged, of another unit, or of another version with other columns.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != file.stem:
                return None
            numbers = Numbers(*(stored[name] for name in Numbers._fields))
            return numbers if numbers.table.shape[-1] == len(COLUMNS) else None
    except Exception:
        return None
