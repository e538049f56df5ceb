"""What the tiles of a chunk share in a round: the minibatch, and the products with it that serve several of them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch
from fl_attack.engine.kernels import Workspace
from fl_attack.engine.linear.targets import Targets

Asking = Iterable[tuple[Attackers, RoundAccess | None]]


class Shared(NamedTuple):
    """The minibatch of a round and the products with it that several tiles need."""

    round_: int
    batch: Batch
    gram: Tensor | None  # (n, writable) inner products of samples; None where not needed, or dearer than X
    target_logits: Tensor | None  # (T, C, writable) logits of the targets; None where not needed


def shared_by(asking: Asking, round_: int, batch: Batch, targets: Targets, workspace: Workspace) -> Shared:
    """What several tiles ask for in a round, computed once.

    Parameters
    ----------
    asking : sequence of pairs
        The attackers of each tile, and what they can write in the round.
    round_ : int
        The round, from 1.
    batch : Batch
        The minibatch of the round.
    targets : Targets
        The targets of all cells.
    workspace : Workspace
        Memory for the Gram matrix.

    Returns
    -------
    Shared
        Of the products those that a tile asks for, without a Gram matrix where it does not pay.
    """
    columns, rows = {"untargeted": 0, "targeted": 0}, 0  # of which greedy attackers need scores
    for attackers, access in asking:
        for goal, most in columns.items():
            if access is not None and (cells := attackers.seeking(goal)):
                columns[goal] = max(most, access.n)
                rows += cells * attackers.C * (goal == "untargeted")
    gram = target_logits = None
    if (n := columns["untargeted"]) and _gram_pays(batch, n, rows):
        gram = torch.mm(batch.X, batch.X[:n].mT, out=workspace.buffer("gram", len(batch.X), n))
    if n := columns["targeted"]:
        target_logits = targets.logits(batch, n)
    return Shared(round_, batch, gram, target_logits)


def _gram_pays(batch: Batch, n: int, rows: int) -> bool:
    """Whether scores of n samples, from `rows` rows of residuals, cost less by inner products with all samples."""
    # multiplications: once for the matrix and once for each row, or there and back through the features
    size, d = batch.X.shape
    return size * n * (d + rows) < rows * d * (size + n)
