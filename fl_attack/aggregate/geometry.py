"""Sums of updates by shares, and products and distances of updates with each other.

Shapes as in `rules`: updates (..., m, C, d). Each federation is computed as it would be alone.
"""

import torch
from torch import Tensor

from fl_attack.aggregate.ordering import ascending, finite_rows, middle

BLOCK = 32  # clients; of smaller blocks fewer products are made twice, but each takes longer
CLOSE = 0.01  # squared distances below this share of the squared norms have lost digits
SMALLEST = 1e-30  # a smaller squared norm may have lost all
LONGEST, FAR = 1e140, 1e300  # a longer update counts as not finite; the largest squared distance in a sum


def combined(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates by shares (..., m); those of share 0 count nothing, whatever they hold."""
    shares = shares.to(updates)
    found = weighted(updates, shares)
    if bool(found.sum().isfinite()):
        return found
    return weighted(updates.where((shares != 0)[..., None, None], 0.0), shares)


def weighted(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates by shares, (m,) or (..., m)."""
    whole = updates.flatten(-2)
    return (shares.expand(whole.shape[:-1]).unsqueeze(-2) @ whole).view(*whole.shape[:-2], *updates.shape[-2:])


def squared_distances(updates: Tensor) -> Tensor:
    """Between clients, (..., m, m) in float64; `FAR` to those that are not finite, infinite to oneself."""
    gram, finite = products(updates)
    square = gram.diagonal(dim1=-2, dim2=-1)
    found = (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram).clamp(min=0, max=FAR)
    found = found.where(finite.unsqueeze(-1) & finite.unsqueeze(-2), FAR)
    return found.masked_fill(torch.eye(found.shape[-1], dtype=torch.bool, device=found.device), torch.inf)


def products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Of each two updates less a common centre, (..., m, m) in float64, and which are finite (..., m).

    The centre is zero where that costs the differences of the updates no digits, else their median.
    """
    gram, finite = gram_of(updates)
    square = gram.diagonal(dim1=-2, dim2=-1)
    apart = square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram
    typical = ascending(apart)[..., gram.shape[-1] // 2]  # to the others, of each
    well = (finite & (square > SMALLEST)).all(-1) & (typical.amin(-1) > CLOSE * square.amax(-1))
    gram = gram.double()
    if not bool(well.all()):  # decided for each federation, so that none goes another way for the company it is in
        gram[~well], finite[~well] = careful_products(updates[~well])
    return gram, finite


def gram_of(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Of each two updates, (..., m, m), and whose norm is finite (..., m)."""
    whole = updates.flatten(-2)
    m = whole.shape[-2]
    gram = whole.new_zeros(*whole.shape[:-1], m)
    for start in range(0, m, BLOCK):  # what is left of the diagonal, and the diagonal
        stop = min(start + BLOCK, m)
        gram[..., start:stop, :stop] = whole[..., start:stop, :] @ whole[..., :stop, :].mT
    gram = gram.tril() + gram.tril(-1).mT
    return gram, gram.diagonal(dim1=-2, dim2=-1).isfinite()


def careful_products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """As `products`, about the median, so that a common shift costs no digits, of unit vectors: nothing overflows."""
    m, finite = updates.shape[-3], finite_rows(updates)
    away = (
        (updates - middle(updates, (m - 1) // 2, m // 2 + 1).unsqueeze(-3))
        .where(finite[..., None, None], 0.0)
        .flatten(-2)
    )
    largest = away.abs().amax(-1, keepdim=True)
    away = away / largest.where(largest > 0, 1.0)
    norm = torch.linalg.vector_norm(away, dim=-1)
    unit = away / norm.where(norm > 0, 1.0).unsqueeze(-1)
    norm = norm.double() * largest.squeeze(-1)
    finite, norm = finite & (norm <= LONGEST), norm.clamp(max=LONGEST)
    return (unit @ unit.mT).double() * norm.unsqueeze(-1) * norm.unsqueeze(-2), finite
