"""What can be done to updates before a rule sees them; several can be chained.

A pre-aggregator maps updates (..., m, C, d) and weights (m,) to new ones, of which there may be fewer. `lots` (m,) is a
random order of the clients, for those that draw lots. An update that is not finite stays so, or becomes zero: it never
gets into another.
"""

import torch
from torch import Tensor
from torch.nn import functional

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
    by_client = updates.movedim(-3, 0)
    starts = torch.arange(0, len(lots), s, device=lots.device)
    # reads each number once and writes each mean once, which with many clients is what it costs
    means = functional.embedding_bag(lots, by_client.reshape(len(by_client), -1), starts, mode="mean")
    shape = len(starts), *by_client.shape[1:]
    return means.view(shape).movedim(0, -3), torch.stack([part.sum() for part in weights[lots].split(s)])


def clipping(
    updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, c: float | None = None
) -> tuple[Tensor, Tensor]:
    """Each scaled down to the norm c; by default to the median of their norms."""
    return clip(updates, c), weights
