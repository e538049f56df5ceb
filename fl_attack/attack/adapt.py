"""Attackers who know the server's rule: of a few ways to attack, the one whose aggregate does most harm.

Under the mean the most flips do the most harm. A rule that leaves out what sticks out may take more of a few flips than
of many, so that each round is tried with parts of the budget, plain greedy always among them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PERCENTS = (100, 70, 50, 30, 20, 10, 5, 0)  # of the budget; all of it is the attack as it is without a line search


def dealt_out(flips: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Flips of all clients together, dealt out in proportion to what each can write: largest remainders first.

    Parameters
    ----------
    flips : (...) array of int64
        The number of flips of all clients together.
    sizes : (..., m) array of int64
        The number of samples that each client can write.

    Returns
    -------
    (..., m) array of int64
        The flips of each client, whose sum is `flips`; zero where there is nothing to write.
    """
    total = np.maximum(sizes.sum(-1, keepdims=True), 1)
    whole, rest = np.divmod(flips[..., None] * sizes, total)
    left = np.where(sizes.sum(-1) > 0, flips - whole.sum(-1), 0)
    rank = np.argsort(np.argsort(-rest, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.asarray(whole + (rank < left[..., None]))


def most_harmful(products: Sequence[Tensor]) -> Tensor:
    """Which of some aggregates has the smallest inner product with the direction, (...) of int64.

    Parameters
    ----------
    products : sequence of (...) tensors
        The inner product of each; of equal ones the first is taken. NaN counts as infinite.
    """
    every = torch.stack(list(products))
    return every.where(~every.isnan(), torch.inf).argmin(0)
