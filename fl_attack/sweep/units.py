"""The work of a sweep, cut into units: what each is known by, what is kept of it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fl_attack import __version__, engine, plugins
from fl_attack.config import AttackSettings
from fl_attack.data import Partition
from fl_attack.history import COLUMNS
from fl_attack.scenario import Scenario

NUMERICS = 4  # to be raised when a change of the code changes the numbers of a run
OF_RULES = 3  # likewise, of a run whose server sees what each client sends
NOT_NUMBERS = {"out", "overwrite", "verbose", "baseline", "launcher", "figures"}  # settings on which none depends
# nor, where the fingerprint of the data is known, on the place of these
ON_DATA: Mapping[str, bool | set[str]] = {**dict.fromkeys(NOT_NUMBERS, True), "dataset": {"root", "path"}}


@dataclass(frozen=True)
class Unit:
    """Cells that are computed together."""

    cells: list[int]
    key: str


class Numbers(NamedTuple):
    """What is kept of the cells of a unit."""

    table: NDArray[np.float64]  # (cells, evaluations, columns of `history.COLUMNS`); NaN after a cell broke off
    flips: NDArray[np.int64]  # (cells,)
    error: NDArray[np.str_]  # (cells,) empty where a cell ended well


def plain(made: Scenario) -> Scenario:
    """An experiment without the settings that change none of its numbers: unattacked ones of a seed become equal."""
    settings = made.settings
    if not settings.harmless or settings.detectability:
        return made
    partition = made.partition
    update: dict[str, object] = {"attack": AttackSettings(name="none")}
    if settings.strategy.averages and settings.partition.malicious_share is None:  # else they shape rule or shards
        update |= {"clients": settings.clients.model_copy(update={"honest": settings.clients.total, "malicious": 0})}
        partition = Partition(partition.client, partition.malicious[:0])
    return Scenario(settings.model_copy(update=update), made.dataset, partition, made.schedule)


def distinct(scenarios: Sequence[Scenario]) -> tuple[list[Scenario], list[int]]:
    """The experiments of which no two give the same numbers, and which of them each one is."""
    places: dict[str, int] = {}
    kept: list[Scenario] = []
    place = []
    for made in map(plain, scenarios):
        key = made.settings.model_dump_json(exclude=NOT_NUMBERS)
        if key not in places:
            places[key] = len(kept)
            kept.append(made)
        place.append(places[key])
    return kept, place


def units(scenarios: Sequence[Scenario]) -> list[Unit]:
    """The work, cut: groups of batched cells into pieces as large as suits their model, cells of Flower one by one."""
    batched = [i for i, made in enumerate(scenarios) if made.settings.engine.name == "batched"]
    cuts = [[i] for i, made in enumerate(scenarios) if made.settings.engine.name != "batched"]
    for group in engine.group([scenarios[i] for i in batched]):
        size = engine.cells_at_once(scenarios[batched[group[0]]])
        pieces = np.array_split(np.array(batched)[group], -(-len(group) // size))
        cuts += [piece.tolist() for piece in pieces]
    return [Unit(cut, key_of([scenarios[i] for i in cut])) for cut in cuts]


def key_of(scenarios: Sequence[Scenario]) -> str:
    """A hash of all that the numbers of these cells depend on, and of the version of the numerics."""
    parts = [f"{__version__}/{NUMERICS}/{torch.__version__}/{np.__version__}"]
    for made in scenarios:
        target = made.settings.attack.target_path
        own = hashlib.sha256(Path(target).read_bytes()).hexdigest() if target else ""
        of_users = made.settings.attack.name, made.settings.strategy.name, made.settings.model.name
        own += "".join(map(plugins.source_digest, of_users))
        settings = made.settings
        if not settings.strategy.averages or settings.attack.writes == "updates" or settings.detectability:
            own += str(OF_RULES)
        parts += [made.settings.model_dump_json(exclude=ON_DATA), made.dataset.fingerprint, own]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def stacked(outcomes: Sequence[tuple[NDArray[np.float64], int, str]]) -> Numbers:
    """The tables (evaluations, columns), flips and errors of cells as one; what is shorter is filled with NaN."""
    longest = max(len(table) for table, _, _ in outcomes)
    table = np.full((len(outcomes), longest, len(COLUMNS)), np.nan)
    for i, (rows, _, _) in enumerate(outcomes):
        table[i, : len(rows)] = rows
    return Numbers(table, np.array([n for _, n, _ in outcomes]), np.array([e for _, _, e in outcomes], np.str_))


def by_cell(unit: Unit, numbers: Numbers) -> dict[int, Numbers]:
    """The numbers of a unit by its cells."""
    return {cell: Numbers(*(part[i] for part in numbers)) for i, cell in enumerate(unit.cells)}


def saver(numbers: Numbers) -> Callable[[Any], None]:
    """Writes numbers to a stream."""
    return lambda stream: np.savez_compressed(stream, **numbers._asdict())


def read(file: Path) -> Numbers | None:
    """Numbers kept in a file; None where there is none or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return Numbers(*(stored[name] for name in Numbers._fields))
    except Exception:
        return None
