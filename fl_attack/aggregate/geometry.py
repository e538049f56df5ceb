"""Weighted sums of updates, and inner products and distances between them.

Shapes as in `rules`: updates (..., m, C, d). Each federation of the leading axes is computed as it would be alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.aggregate.ordering import ascending, finite_rows, middle

BLOCK = 32  # clients; smaller blocks compute fewer products twice, but each takes longer
CLOSE = 0.01  # squared distances below this share of the squared norms have lost digits
SMALLEST = 1e-30  # a smaller squared norm may have lost all
LONGEST = 1e140  # a longer update counts as not finite
FAR, LARGEST = 1e300, 1e307  # squared distance to one that is not finite; the largest sum of these


def combined(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates times shares (..., m); a share of 0 leaves out even an update with NaN or Inf."""
    shares = shares.to(updates)
    found = weighted(updates, shares)
    if bool(found.sum().isfinite()):
        return found
    return weighted(updates.where((shares != 0)[..., None, None], 0.0), shares)


def weighted(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates times shares, (m,) or (..., m)."""
    by_client = updates.movedim(-3, 0)
    if shares.ndim == 1 and by_client.is_contiguous():  # one product for all federations
        return (shares @ by_client.view(len(shares), -1)).view(by_client.shape[1:])
    whole = updates.flatten(-2)
    return (shares.expand(whole.shape[:-1]).unsqueeze(-2) @ whole).view(*whole.shape[:-2], *updates.shape[-2:])


def along(updates: Tensor, v: Tensor) -> Tensor:
    """Inner products (..., m) of the updates with v (..., C, d)."""
    # a row times a matrix: ten times as fast, for many small ones, as the matrix times a column
    return (v.flatten(-2).unsqueeze(-2) @ updates.flatten(-2).mT).squeeze(-2)


class Distances(NamedTuple):
    """Squared distances between the clients of each federation."""

    squared: Tensor  # (..., m, m) Inf on the diagonal, `FAR` to updates that are not finite; float64 if there are any
    ordered: Tensor  # (..., m, m) the same with each row ascending


def distances(updates: Tensor) -> Distances:
    """Squared distances between clients, in the precision of the updates unless that costs digits, else in float64."""
    gram = gram_of(updates)
    squared = _squared_distances(gram)
    ordered = ascending(squared)
    exact = _are_exact(gram, ordered)
    if not bool(exact.all()):  # decided for each federation, so that its result does not depend on the others
        squared, ordered = squared.double(), ordered.double()
        gram, finite = careful_products(updates[~exact])
        careful = _squared_distances(gram).clamp(max=FAR).where(finite.unsqueeze(-1) & finite.unsqueeze(-2), FAR)
        careful.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        squared[~exact], ordered[~exact] = careful, ascending(careful)
    return Distances(squared, ordered)


def products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the updates about a common centre, which keep the digits of their differences.

    Returns
    -------
    gram : (..., m, m) tensor of float64
        The centre is zero where that costs the differences no digits, else the coordinate-wise median.
    finite : (..., m) tensor of bool
        Which updates are finite.
    """
    gram = gram_of(updates)
    exact = _are_exact(gram, ascending(_squared_distances(gram)))
    gram, finite = gram.double(), exact.unsqueeze(-1).repeat_interleave(gram.shape[-1], -1)
    if not bool(exact.all()):
        gram[~exact], finite[~exact] = careful_products(updates[~exact])
    return gram, finite


def _squared_distances(gram: Tensor) -> Tensor:
    """Squared distances (..., m, m) from inner products; Inf on the diagonal."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    found = (square.unsqueeze(-1) + square.unsqueeze(-2)).sub_(gram, alpha=2).clamp_(min=0)
    found.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return found


def _are_exact(gram: Tensor, ordered: Tensor) -> Tensor:
    """Whether all updates are finite and the distances from their products as exact as they are, (...) of bool."""
    shortest, longest = gram.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)  # NaN or Inf if any of them is
    typical = ordered[..., max(0, gram.shape[-1] // 2 - 1)]  # each client's median distance to the others
    return (shortest > SMALLEST) & (typical.amin(-1) > CLOSE * longest)


def gram_of(updates: Tensor) -> Tensor:
    """Inner products (..., m, m) of the updates."""
    whole = updates.flatten(-2)
    m = whole.shape[-2]
    gram = whole.new_empty(*whole.shape[:-1], m)
    for start in range(0, m, BLOCK):  # the diagonal and below
        stop = min(start + BLOCK, m)
        gram[..., start:, start:stop] = whole[..., start:, :] @ whole[..., start:stop, :].mT
    place = torch.arange(m, device=gram.device)
    return torch.where(place.unsqueeze(-1) >= place, gram, gram.mT)


def careful_products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """As `products`, always about the median so that a common shift costs no digits; nothing overflows on the way."""
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
