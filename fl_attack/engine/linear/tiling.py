"""How cells are cut: into chunks that fit in memory, tiles that choose together, blocks that fit in the cache."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.engine import ending
from fl_attack.engine.kinds import Kind, kind_of
from fl_attack.history import COLUMNS
from fl_attack.scenario import Scenario

CACHE = 2**23  # bytes of parameters in a block
COPIES = {"sgd": 1, "momentum": 2, "adam": 3}  # of the parameters, that an optimizer keeps
FEWEST = 128  # cells a tile, where there are as many, before another set of attackers gets its own


def training_key(cell: Scenario) -> tuple[Any, ...]:
    """The key of the cells that can be in one block: how the server steps; rates may differ, their schedule may not."""
    settings = cell.settings
    return settings.server_optimizer, settings.lr_schedule, settings.lr_every or 0, settings.lr_decay


def tile_key(cell: Scenario) -> tuple[tuple[Any, ...], Kind, str, int]:
    """The key of the cells that can be in one tile: how the server steps, the attack, and the rule."""
    strategy = cell.settings.strategy
    rule = ("", 0) if strategy.averages else (strategy.model_dump_json(), cell.settings.assumed_malicious)
    return training_key(cell), kind_of(cell).tile_key, *rule


def order(cells: Sequence[Scenario], targets: NDArray[np.int64]) -> list[int]:
    """The order in which cells are run, those that can share work beside each other.

    Parameters
    ----------
    cells : sequence of Scenario
        M cells.
    targets : array of int, (M,)
        The number of the target of each, -1 for none.

    Returns
    -------
    list of int
        The positions of the cells.
    """

    def sort_key(i: int) -> tuple[object, ...]:
        threat, malicious = cells[i].settings.attack, cells[i].partition.malicious
        wanted = threat.goal, threat.selection
        who = len(malicious), malicious.tolist()
        return *tile_key(cells[i]), *wanted, *who, targets[i], cells[i].settings.lr, threat.budget

    return sorted(range(len(cells)), key=sort_key)


def chunks(
    cells: Sequence[Scenario], order: Sequence[int], memory: float, held: float, row: int, early: bool
) -> list[list[int]]:
    """Cells in their order, cut into as few parts of about equal size as fit in memory.

    Parameters
    ----------
    cells : sequence of Scenario
        All cells of a call.
    order : sequence of int
        The numbers of the cells, in the order in which they are run.
    memory : float
        Bytes that may be held.
    held : float
        Bytes of what all cells share.
    row : int
        Bytes of the parameters of a cell.
    early : bool
        Whether the best parameters are kept too, for early stopping.

    Returns
    -------
    list of list of int
        The numbers of the cells of each part, of which there is at least one.
    """
    copies = max(COPIES[cell.settings.server_optimizer] for cell in cells) + early
    each = row * copies + 8 * len(ending.evaluated_rounds(cells[0].settings)) * len(COLUMNS) + 200
    size = max(1, int(min((memory - held) / each, len(order))))
    return [piece.tolist() for piece in np.array_split(np.array(order), -(-len(order) // size))]


def tiles(cells: Sequence[Scenario], fits: int) -> list[slice]:
    """The cells of each tile.

    A new tile begins where `tile_key` changes, or where attackers change after `FEWEST` cells; tiles of more cells than
    fit are split evenly.

    Parameters
    ----------
    cells : sequence of Scenario
        The cells in the order that `order` gives.
    fits : int
        How many cells a tile may have.

    Returns
    -------
    list of slice
        In order, and each cell in one.
    """
    cuts: list[slice] = []
    start = 0
    for end in range(1, len(cells) + 1):
        goes_on = end < len(cells) and tile_key(cells[end]) == tile_key(cells[start])
        if goes_on and (end - start < FEWEST or _same_attackers(cells[end], cells[end - 1])):
            continue
        pieces = -(-(end - start) // fits)
        edges = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
        cuts += itertools.starmap(slice, itertools.pairwise(edges))
        start = end
    return cuts


def fitting(cells: int, row: int, device: str) -> int:
    """The number of cells that a block may have.

    Parameters
    ----------
    cells : int
        The number of cells that are in memory together.
    row : int
        Bytes of the parameters of a cell.
    device : str
        The type of their device.

    Returns
    -------
    int
        On `cpu` as many as fit in the cache, but at least `FEWEST`; on other devices all.
    """
    return cells if device != "cpu" else max(FEWEST, CACHE // row)


def _same_attackers(cell: Scenario, other: Scenario) -> bool:
    """Whether the same clients are malicious in two cells, with one kind of attack."""
    same = np.array_equal(cell.partition.malicious, other.partition.malicious)
    return same and kind_of(cell) == kind_of(other)
