"""A block: tiles whose parameters are multiplied and moved together, few enough to stay in the processor's cache.

A product of few rows is bound by reading the minibatch, so tiles of a handful of cells share theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_attack.engine import kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.linear.shared import Shared
from fl_attack.engine.linear.tile import Tile
from fl_attack.engine.linear.tiling import training_key
from fl_attack.engine.log import Report


class Block:
    """The parameters of the cells of some tiles, and their rounds.

    Parameters
    ----------
    tiles : sequence of Tile
        Of one `tiling.training_key`; one whose `needs_client_updates` is true is alone in its block.
    theta : (M C, d) tensor
        The parameters, tile after tile, changed in place.
    """

    def __init__(self, tiles: Sequence[Tile], theta: Tensor) -> None:
        self.tiles, self.theta = tiles, theta
        self._rows = [len(tile.theta) for tile in tiles]
        self._cell = tiles[0].cell
        lr, weight_decay = (torch.cat([getattr(tile, name) for tile in tiles]) for name in ("lr", "weight_decay"))
        self.optimizer = kernels.ServerOptimizer(self._cell.settings.server_optimizer, theta, lr, weight_decay)

    def step(
        self,
        shared: Shared,
        accesses: Sequence[RoundAccess | None],
        workspace: kernels.Workspace,
        watched: bool,
        measured: bool,
    ) -> list[Report | None]:
        """Step all cells by one round.

        Parameters
        ----------
        shared, workspace, watched, measured
            As `Tile.step` takes them.
        accesses : sequence of RoundAccess or None
            What the attackers of each tile can write; None for a tile where nobody attacks in any round.

        Returns
        -------
        list of Report or None
            The report of each tile; None where it is not watched.
        """
        X = shared.batch.X
        Z = torch.mm(self.theta, X.mT, out=workspace.buffer("Z", len(self.theta), len(X)))
        aggregate, reports = None, []
        for tile, access, rows in zip(self.tiles, accesses, Z.split(self._rows), strict=True):
            report, aggregate = tile.step(rows, shared, access, workspace, watched, measured)
            reports.append(report)
        factor = self._cell.lr(shared.round_) / self._cell.settings.lr
        if aggregate is None:
            self.optimizer.descend(Z, X, workspace, factor)
        else:
            self.optimizer.step(aggregate, factor, decayed=True)
        return reports


def blocks_of(tiles: Sequence[Tile], theta: Tensor, fits: int) -> list[Block]:
    """Blocks of consecutive tiles, each of as many as fit.

    Tiles share a block where their `tiling.training_key` is the same and none of them needs the updates of clients.

    Parameters
    ----------
    tiles : sequence of Tile
        In the order of their cells.
    theta : (M C, d) tensor
        The parameters of all cells, which the blocks change in place.
    fits : int
        How many cells a block of several tiles may have.

    Returns
    -------
    list of Block
        In the order of their tiles.
    """
    together: list[list[Tile]] = []
    for tile in tiles:
        last = together[-1] if together else []
        if last and _share_a_block(last[-1], tile) and sum(other.M for other in last) + tile.M <= fits:
            last.append(tile)
        else:
            together.append([tile])
    rows = theta.split([sum(len(tile.theta) for tile in some) for some in together])
    return [Block(some, part) for some, part in zip(together, rows, strict=True)]


def _share_a_block(tile: Tile, other: Tile) -> bool:
    """Whether two tiles can be stepped as one block."""
    alone = tile.needs_client_updates or other.needs_client_updates
    return training_key(tile.cell) == training_key(other.cell) and not alone
