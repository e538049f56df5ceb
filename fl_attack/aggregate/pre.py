"""What can be done to updates before a rule sees them; several can be chained.

A pre-aggregator maps updates (..., m, C, d) and weights (m,) to new ones, of which there may be fewer. `lots` (m,) is a
random order of the clients, for those that draw lots. An update that is not finite stays so, or becomes zero: it never
gets into another.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fl_attack.aggregate.geometry import distances
from fl_attack.aggregate.ordering import finite_rows, smallest
from fl_attack.aggregate.rules import clip


def nnm(updates: Tensor, weights: Tensor, f: int, lots: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest-neighbour mixing: each becomes the mean of the m - f nearest to it, itself among them.

    Allouah et al., https://arxiv.org/abs/2302.01772.
    """
    m = updates.shape[-3]
    squared, ordered = distances(updates)
    # oneself comes first, and last in `ordered`: the others that are wanted are one fewer
    near = smallest(squared, m - f - 1, ordered) if f < m - 1 else torch.zeros_like(squared)
    near.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    shares = near.to(updates) / (m - f)
    mixed = (shares @ updates.flatten(-2)).view(updates.shape)
    if not bool(mixed.sum().isfinite()):
        finite = finite_rows(updates)[..., None, None]
        mixed = (shares @ updates.where(finite, 0.0).flatten(-2)).view(updates.shape).where(finite, torch.nan)
    return mixed, weights


def bucketing(updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, s: int = 2) -> tuple[Tensor, Tensor]:
    """Means of s clients each, drawn by lot; the last bucket takes what is left.

    Karimireddy et al., https://arxiv.org/abs/2006.09365.
    """
    by_client = updates.movedim(-3, 0)
    starts = torch.arange(0, len(lots), s, device=lots.device)
    # reads each number once, which with many clients is what it costs; half the time of its own mode "mean"
    sums = functional.embedding_bag(lots, by_client.reshape(len(by_client), -1), starts, mode="sum")
    sizes = (len(lots) - starts).clamp(max=s).to(sums)
    means = sums.div_(sizes.unsqueeze(1)).view(len(starts), *by_client.shape[1:]).movedim(0, -3)
    short = len(starts) * s - len(lots)
    return means, functional.pad(weights[lots], (0, short)).view(-1, s).sum(-1)


def clipping(
    updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, c: float | None = None
) -> tuple[Tensor, Tensor]:
    """Each scaled down to the norm c; by default to the median of their norms."""
    return clip(updates, c), weights
