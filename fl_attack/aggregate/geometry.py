"""Weighted sums of updates, and inner products and distances between them.

Shapes as in `rules`: updates (..., m, C, d). Each federation of the leading axes is computed as it would be alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.aggregate.ordering import ascending, finite_rows, middle

BLOCK = 32  # clients; smaller blocks compute fewer products twice, but each takes longer
MANY, LARGE_BLOCK = 500, 256  # of more clients than `MANY`, in blocks that take half the time
CLOSE = 0.01  # squared distances below this share of the squared norms have lost digits
SMALLEST = 1e-26  # a squared norm that is a smaller share of the others may have lost all
UNDERFLOW = 1e-30  # squares of numbers whose squared norm is smaller may have
LONGEST = 464  # exponent: an update longer than the typical one by 2 to the power of this counts as not finite
FAR, LARGEST = 1e300, 1e307  # squared distance to one that is not finite; the largest sum of these


def combined(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum of the updates times their shares.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The update of each of m clients.
    shares : (..., m) tensor
        A share of 0 leaves out even an update with NaN or Inf.

    Returns
    -------
    (..., C, d) tensor
        In the precision of the updates.
    """
    shares = shares.to(updates)
    found = weighted(updates, shares)
    if bool(found.sum().isfinite()):
        return found
    return weighted(updates.where((shares != 0)[..., None, None], 0.0), shares)


def weighted(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum of the updates times their shares, of updates that are all finite.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The updates that are added up.
    shares : (m,) or (..., m) tensor
        What each update is multiplied by, the same in all federations (m,) or in each its own.

    Returns
    -------
    (..., C, d) tensor
    """
    by_client = updates.movedim(-3, 0)
    if shares.ndim == 1 and by_client.is_contiguous():  # one product for all federations
        return (shares @ by_client.view(len(shares), -1)).view(by_client.shape[1:])
    whole = updates.flatten(-2)
    return (shares.expand(whole.shape[:-1]).unsqueeze(-2) @ whole).view(*whole.shape[:-2], *updates.shape[-2:])


def inner_products(updates: Tensor, v: Tensor) -> Tensor:
    """Inner products of updates with a vector.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The updates of m clients.
    v : (..., C, d) tensor
        A vector for each federation.

    Returns
    -------
    (..., m) tensor
    """
    # a row times a matrix: ten times as fast, for many small ones, as the matrix times a column
    return (v.flatten(-2).unsqueeze(-2) @ updates.flatten(-2).mT).squeeze(-2)


class Distances(NamedTuple):
    """Squared distances between the clients of each federation."""

    # (..., m, m) Inf on the diagonal, `FAR` to updates that are not finite, or too long to be told from such
    squared: Tensor
    ordered: Tensor  # (..., m, m) the same with each row ascending


def distances(updates: Tensor) -> Distances:
    """Squared distances between clients: in float64 if any federation needs it, else in the updates' precision.

    Those of a federation whose products would lose digits are computed anew, about the median. Where its typical
    length is not from about 2^-400 to 2^400, they are in another unit, since their squares can't be held.
    """
    gram = gram_of(updates)
    squared = _squared_distances(gram)
    ordered = ascending(squared)
    exact = _are_exact(gram, ordered)
    if not bool(exact.all()):  # decided for each federation, so that its result does not depend on the others
        squared, ordered = squared.double(), ordered.double()
        gram, finite, unit = _careful(updates[~exact])
        scale = power_of_two(2 * unit.clamp(-400, 400)).unsqueeze(-1)  # beyond, squares can't be held as they are
        careful = _squared_distances(gram) * scale
        careful = careful.clamp(max=FAR).where(finite.unsqueeze(-1) & finite.unsqueeze(-2), FAR)
        careful.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        squared[~exact], ordered[~exact] = careful, ascending(careful)
    return Distances(squared, ordered)


def products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the updates about a common centre, which keep the digits of their differences.

    Returns
    -------
    gram : (..., m, m) tensor of float64
        About zero and in plain units where that costs a federation's differences no digits. Else about the
        coordinate-wise median, in the square of a power of two near the typical update's largest difference from it.
    finite : (..., m) tensor of bool
        False where an update is not finite, or 2^LONGEST times as far from the median as the typical one.
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
    """Whether a federation's updates are finite and their products keep the digits of the distances, (...) of bool.

    `ordered` are the squared distances (..., m, m) from `gram`, each row ascending.
    """
    shortest, longest = gram.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)  # NaN or Inf if any of them is
    typical = ordered[..., max(0, gram.shape[-1] // 2 - 1)]  # each client's median distance to the others
    return (longest > UNDERFLOW) & (shortest > SMALLEST * longest) & (typical.amin(-1) > CLOSE * longest)


def gram_of(updates: Tensor) -> Tensor:
    """Inner products (..., m, m) of the updates about zero, in their precision."""
    whole = updates.flatten(-2)
    m = whole.shape[-2]
    gram = whole.new_empty(*whole.shape[:-1], m)
    block = LARGE_BLOCK if m > MANY else BLOCK
    for start in range(0, m, block):  # the diagonal and below
        stop = min(start + block, m)
        gram[..., start:, start:stop] = whole[..., start:, :] @ whole[..., start:stop, :].mT
    place = torch.arange(m, device=gram.device)
    return torch.where(place.unsqueeze(-1) >= place, gram, gram.mT)


def careful_products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """As `products`, but of every federation about the median, as it is there where zero would cost digits."""
    gram, finite, _ = _careful(updates)
    return gram, finite


def _careful(updates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products (..., m, m), which updates are usable (..., m), and the exponent of the unit of length (..., 1).

    They are about the coordinate-wise median, so that a common shift costs no digits. The unit is a power of two near
    the typical update's largest difference from it; usable is what is finite and at most 2^LONGEST units long. All
    scales are powers of two, so that a change of scale by one changes no bit, and whole numbers stay exact.
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
    """Norms (..., m) in float64, as exact as the updates at any scale; Inf where an update is not finite."""
    found = torch.linalg.vector_norm(updates.flatten(-2), dim=-1)
    small, large = (1e-15, 1e15) if found.dtype == torch.float32 else (1e-140, 1e140)
    exact = (found > small) & (found < large)
    found = found.double()
    if not bool(exact.all()):  # squares may have overflowed, or lost digits
        some = updates[~exact].flatten(-2)
        exponent = exponent_of(some.abs().amax(-1).double().where(some.isfinite().all(-1), 0.0))
        unit = (some.double() * power_of_two(-exponent).unsqueeze(-1)).to(updates)
        found[~exact] = torch.linalg.vector_norm(unit, dim=-1).double() * power_of_two(exponent)
    finite: Tensor = found.where(found.isfinite(), torch.inf)
    return finite


def upper_median(values: Tensor) -> Tensor:
    """Median (..., 1) of the finite values of each row, the upper of two middle ones; zero where there is none."""
    count = values.isfinite().sum(-1, keepdim=True)
    ordered = values.sort(-1).values
    return ordered.gather(-1, (count // 2).clamp(max=values.shape[-1] - 1)).where(count > 0, 0.0)


def exponent_of(values: Tensor) -> Tensor:
    """The whole number e with 2^(e-1) <= |value| < 2^e, 0 for zero; from -1000 to 1000, so that 2^e has all digits."""
    found: Tensor = torch.frexp(values.double()).exponent.clamp(-1000, 1000)
    return found


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of whole numbers, in float64."""
    found: Tensor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return found
