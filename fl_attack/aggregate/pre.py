"""Pre-aggregators: what can be done to updates before a rule sees them; several can be chained.

Each maps updates (..., m, C, d) and weights (m,) to new ones, of which there may be fewer. f is how many clients may be
malicious; `client_order` (m,) is a random order of the clients, for those that make random choices. An update that is
not finite stays so or becomes zero, and gets into no other than the mean of its bucket.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fl_attack.aggregate.geometry import distances
from fl_attack.aggregate.ordering import finite_rows, smallest
from fl_attack.aggregate.rules import clip


def nnm(updates: Tensor, weights: Tensor, f: int, client_order: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest-neighbour mixing: each update becomes the mean of the m - f nearest to it, itself among them.

    References
    ----------
    Allouah et al. (2023). Fixing by mixing: a recipe for optimal Byzantine ML under heterogeneity. arXiv 2302.01772.

    Parameters
    ----------
    updates, weights, f, client_order
        As all of `PRE` take them, see this module's head.

    Returns
    -------
    mixed : (..., m, C, d) tensor
        NaN where an update is not finite.
    weights : (m,) tensor
        The weights as they were given.
    """
    m = updates.shape[-3]
    squared, ordered = distances(updates)
    # a client's distance to itself is last in `ordered`, so that one neighbour fewer is chosen
    near = smallest(squared, m - f - 1, ordered) if f < m - 1 else torch.zeros_like(squared)
    near.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    shares = near.to(updates) / (m - f)
    mixed = (shares @ updates.flatten(-2)).view(updates.shape)
    if not bool(mixed.sum().isfinite()):
        finite = finite_rows(updates)[..., None, None]
        mixed = (shares @ updates.where(finite, 0.0).flatten(-2)).view(updates.shape).where(finite, torch.nan)
    return mixed, weights


def bucketing(updates: Tensor, weights: Tensor, f: int, client_order: Tensor, *, s: int = 2) -> tuple[Tensor, Tensor]:
    """Means of s clients each, in their random order; the last bucket takes what is left.

    Parameters
    ----------
    updates, weights, f, client_order
        As all of `PRE` take them.
    s : int
        Number of clients in a bucket.

    Returns
    -------
    means : (..., ceil(m / s), C, d) tensor
        One for each bucket, not finite where one of its updates is not.
    weights : (ceil(m / s),) tensor
        The sum of the weights in each bucket.

    References
    ----------
    Karimireddy, He, Jaggi (2022). Byzantine-robust learning on heterogeneous datasets via bucketing. arXiv 2006.09365.
    """
    by_client = updates.movedim(-3, 0)
    starts = torch.arange(0, len(client_order), s, device=client_order.device)
    # this function reads each number once, which is the cost with many clients; its mode "mean" takes twice as long
    sums = functional.embedding_bag(client_order, by_client.reshape(len(by_client), -1), starts, mode="sum")
    sizes = (len(client_order) - starts).clamp(max=s).to(sums)
    means = sums.div_(sizes.unsqueeze(1)).view(len(starts), *by_client.shape[1:]).movedim(0, -3)
    missing = len(starts) * s - len(client_order)
    return means, functional.pad(weights[client_order], (0, missing)).view(-1, s).sum(-1)


def clipping(
    updates: Tensor, weights: Tensor, f: int, client_order: Tensor, *, c: float | None = None
) -> tuple[Tensor, Tensor]:
    """Each update scaled down to the norm c; by default to the median of their norms.

    Parameters
    ----------
    updates, weights, f, client_order
        As all of `PRE` take them.
    c : float, optional
        The largest norm.

    Returns
    -------
    clipped : (..., m, C, d) tensor
        The updates at most this long; those that are not finite are zero.
    weights : (m,) tensor
        The weights as they were given.

    Raises
    ------
    ValueError
        Where c is not above 0.
    """
    return clip(updates, c), weights
