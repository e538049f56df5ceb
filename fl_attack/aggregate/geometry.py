"""Sums of updates by shares, and products and distances of updates with each other.

Shapes as in `rules`: updates (..., m, C, d). Each federation is computed as it would be alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.aggregate.ordering import ascending, finite_rows, middle

BLOCK = 32  # clients; of smaller blocks fewer products are made twice, but each takes longer
CLOSE = 0.01  # squared distances below this share of the squared norms have lost digits
SMALLEST = 1e-26  # a squared norm that is a smaller share of the others may have lost all
UNDERFLOW = 1e-30  # squares of numbers whose squared norm is smaller may have
LONGEST = 464  # exponent: an update longer than the typical one by 2 to the power of this counts as not finite
FAR, LARGEST = 1e300, 1e307  # squared distance to one that is not finite; the largest sum of these


def combined(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates by shares (..., m); those of share 0 count nothing, whatever they hold."""
    shares = shares.to(updates)
    found = weighted(updates, shares)
    if bool(found.sum().isfinite()):
        return found
    return weighted(updates.where((shares != 0)[..., None, None], 0.0), shares)


def weighted(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates by shares, (m,) or (..., m)."""
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
    """Between the clients of each federation."""

    squared: Tensor  # (..., m, m) infinite to oneself, `FAR` to those that are not finite; of float64 if any of these
    ordered: Tensor  # the same, each row ascending


def distances(updates: Tensor) -> Distances:
    """Between clients, squared: in the precision of the updates where that costs no digits, else in float64."""
    gram = gram_of(updates)
    squared = _apart(gram)
    ordered = ascending(squared)
    well = _keep_digits(gram, ordered)
    if not bool(well.all()):  # decided for each federation, so that none goes another way for the company it is in
        squared, ordered = squared.double(), ordered.double()
        gram, finite, unit = _careful(updates[~well])
        scale = power_of_two(2 * unit.clamp(-400, 400)).unsqueeze(-1)  # beyond, squares can't be told as they are
        careful = (_apart(gram) * scale).clamp(max=FAR).where(finite.unsqueeze(-1) & finite.unsqueeze(-2), FAR)
        careful.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        squared[~well], ordered[~well] = careful, ascending(careful)
    return Distances(squared, ordered)


def products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Of each two updates less a common centre, (..., m, m) in float64, and which are finite (..., m).

    The centre is zero where that costs the differences of the updates no digits, else their median.
    """
    gram = gram_of(updates)
    well = _keep_digits(gram, ascending(_apart(gram)))
    gram, finite = gram.double(), well.unsqueeze(-1).repeat_interleave(gram.shape[-1], -1)
    if not bool(well.all()):
        gram[~well], finite[~well] = careful_products(updates[~well])
    return gram, finite


def _apart(gram: Tensor) -> Tensor:
    """Squared distances (..., m, m) from products; infinite to oneself."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    found = (square.unsqueeze(-1) + square.unsqueeze(-2)).sub_(gram, alpha=2).clamp_(min=0)
    found.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return found


def _keep_digits(gram: Tensor, ordered: Tensor) -> Tensor:
    """(...) whether the distances that follow from these products are as exact as the updates, all of them finite."""
    shortest, longest = gram.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)  # not a number, or infinite, if any of them is
    typical = ordered[..., max(0, gram.shape[-1] // 2 - 1)]  # to the others, of each
    return (longest > UNDERFLOW) & (shortest > SMALLEST * longest) & (typical.amin(-1) > CLOSE * longest)


def gram_of(updates: Tensor) -> Tensor:
    """Products (..., m, m) of each two updates."""
    whole = updates.flatten(-2)
    m = whole.shape[-2]
    gram = whole.new_empty(*whole.shape[:-1], m)
    for start in range(0, m, BLOCK):  # the diagonal and what is below
        stop = min(start + BLOCK, m)
        gram[..., start:, start:stop] = whole[..., start:, :] @ whole[..., start:stop, :].mT
    place = torch.arange(m, device=gram.device)
    return torch.where(place.unsqueeze(-1) >= place, gram, gram.mT)


def careful_products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """As `products`, but in units of the square of the typical update."""
    gram, finite, _ = _careful(updates)
    return gram, finite


def _careful(updates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products (..., m, m), which updates are finite (..., m), and the exponent of the unit of length (..., 1).

    They are about the median, so that a common shift costs no digits, and in units of the typical update.

    All scales are powers of two, so that a change of scale by one changes no bit, and whole numbers stay exact.
    """
    m, finite = updates.shape[-3], finite_rows(updates)
    centre = middle(updates, (m - 1) // 2, m // 2 + 1).unsqueeze(-3)
    away = (updates.double() - centre.double()).where(finite[..., None, None], 0.0).flatten(-2)
    largest = away.abs().amax(-1)
    exponent = exponent_of(largest)
    away = away * power_of_two(-exponent).unsqueeze(-1)
    unit = upper_median(exponent.double().where(finite & (largest > 0), torch.inf)).to(exponent)
    exponent = exponent - unit
    finite, exponent = finite & (exponent <= LONGEST), exponent.clamp(-LONGEST, LONGEST)
    return (away @ away.mT) * power_of_two(exponent.unsqueeze(-1) + exponent.unsqueeze(-2)), finite, unit


def norms(updates: Tensor) -> Tensor:
    """(..., m) in float64, exact to the precision of the updates at any scale; infinite where one is not finite."""
    found = torch.linalg.vector_norm(updates.flatten(-2), dim=-1)
    small, large = (1e-15, 1e15) if found.dtype == torch.float32 else (1e-140, 1e140)
    well = (found > small) & (found < large)
    found = found.double()
    if not bool(well.all()):  # squares may have overflowed, or lost digits
        some = updates[~well].flatten(-2)
        exponent = exponent_of(some.abs().amax(-1).double().where(some.isfinite().all(-1), 0.0))
        unit = (some.double() * power_of_two(-exponent).unsqueeze(-1)).to(updates)
        found[~well] = torch.linalg.vector_norm(unit, dim=-1).double() * power_of_two(exponent)
    known: Tensor = found.where(found.isfinite(), torch.inf)
    return known


def upper_median(values: Tensor) -> Tensor:
    """(..., 1) median of the finite values of each row, the upper of two middle ones; zero where there is none."""
    count = values.isfinite().sum(-1, keepdim=True)
    ordered = values.sort(-1).values
    return ordered.gather(-1, (count // 2).clamp(max=values.shape[-1] - 1)).where(count > 0, 0.0)


def exponent_of(values: Tensor) -> Tensor:
    """The exponent of a power of two near each value, 0 of zero; one whose power is a number of full precision."""
    found: Tensor = torch.frexp(values.double()).exponent.clamp(-1000, 1000)
    return found


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of whole numbers, in float64."""
    found: Tensor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return found
