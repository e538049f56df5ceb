"""What can be done to updates before a rule sees them; several can be chained.

A pre-aggregator maps updates (..., m, C, d) and weights (m,) to new ones, of which there may be fewer. `lots` (m,) is a
random order of the clients, for those that draw lots. An update that is not finite stays so, or becomes zero: it never
gets into another.
"""

import torch
from torch import Tensor

from fl_attack.aggregate.geometry import distances
from fl_attack.aggregate.ordering import finite_rows
from fl_attack.aggregate.rules import clip


def nnm(updates: Tensor, weights: Tensor, f: int, lots: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest-neighbour mixing: each becomes the mean of the m - f nearest to it, itself among them.

    Allouah et al., https://arxiv.org/abs/2302.01772.
    """
    m = updates.shape[-3]
    squared, ordered = distances(updates)
    squared.diagonal(dim1=-2, dim2=-1).zero_()
    others = m - f - 1  # beside itself
    bound = ordered[..., others - 1 : others] if others else torch.zeros_like(ordered[..., :1])
    near = (squared <= bound).to(updates)
    if bool((near.sum(-1) > m - f).any()):  # ties go to the client of the lower index
        nearest = squared.sort(dim=-1, stable=True).indices[..., : m - f]
        near = torch.zeros_like(near).scatter_(-1, nearest, 1.0)
    shares = near / (m - f)
    mixed = (shares @ updates.flatten(-2)).view(updates.shape)
    if not bool(mixed.sum().isfinite()):
        finite = finite_rows(updates)[..., None, None]
        mixed = (shares @ updates.where(finite, 0.0).flatten(-2)).view(updates.shape).where(finite, torch.nan)
    return mixed, weights


def bucketing(updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, s: int = 2) -> tuple[Tensor, Tensor]:
    """Means of s clients each, drawn by lot; the last bucket takes what is left.

    Karimireddy et al., https://arxiv.org/abs/2006.09365.
    """
    order, rows = lots.tolist(), updates.movedim(-3, 0).unbind()
    buckets = [order[start : start + s] for start in range(0, len(order), s)]
    means = updates.new_empty(len(buckets), *rows[0].shape)
    for mean, bucket in zip(means, buckets, strict=True):
        if len(bucket) == 1:
            mean.copy_(rows[bucket[0]])
        else:  # each number is read once: with many clients that is what it costs
            torch.add(rows[bucket[0]], rows[bucket[1]], out=mean)
        for other in bucket[2:]:
            mean += rows[other]
    sizes = torch.tensor([len(bucket) for bucket in buckets]).to(updates)
    means /= sizes.view(-1, *[1] * (means.ndim - 1))
    return means.movedim(0, -3), torch.stack([part.sum() for part in weights[lots].split(s)])


def clipping(
    updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, c: float | None = None
) -> tuple[Tensor, Tensor]:
    """Each scaled down to the norm c; by default to the median of their norms."""
    return clip(updates, c), weights
