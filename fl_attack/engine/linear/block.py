"""A block: tiles whose parameters are multiplied and moved together, few enough to stay in the processor's cache.

A product of few rows is bound by reading the minibatch, so tiles of a handful of cells share theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_attack.engine import kernels
from fl_attack.engine.linear.tile import Shared, Tile
from fl_attack.engine.log import Report


class Block:
    """The parameters of the cells of some tiles, and their rounds."""

    def __init__(self, tiles: Sequence[Tile], theta: Tensor) -> None:
        """The tiles have one optimizer; one of which `needs_client_updates` is true has a block of its own.

        `theta` (M C, d), tile after tile, is changed in place.
        """
        self.tiles, self.theta = tiles, theta
        lr, weight_decay = (torch.cat([getattr(tile, name) for tile in tiles]) for name in ("lr", "weight_decay"))
        self.optimizer = kernels.ServerOptimizer(tiles[0].optimizer, theta, lr, weight_decay)

    def step(self, shared: Shared, workspace: kernels.Workspace, watched: bool, measured: bool) -> list[Report | None]:
        """Step all cells by one round; gives the report of each tile, None where it is not watched."""
        X = shared.batch.X
        Z = torch.mm(self.theta, X.mT, out=workspace.buffer("Z", len(self.theta), len(X)))
        aggregate, reports = None, []
        for tile, rows in zip(self.tiles, Z.split([len(tile.theta) for tile in self.tiles]), strict=True):
            report, aggregate = tile.step(rows, shared, workspace, watched, measured)
            reports.append(report)
        factor = self.tiles[0].lr_factor(shared.round_)
        if aggregate is None:
            self.optimizer.descend(Z, X, workspace, factor)
        else:
            self.optimizer.take(aggregate, factor, decayed=True)
        return reports
