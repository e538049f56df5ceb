"""Robust aggregation rules, over any number of federations at once.

Shapes: updates (..., m, C, d), one a client in the order of the clients; weights (m,), the samples that each used; f,
how many clients may be malicious. A rule gives (..., C, d). Only the mean looks at the weights. An update that is not
finite counts as one that is infinitely far from all others: no rule but the mean lets it through. Ties go to the
client of the lower index.
"""

import math

import numpy as np
import torch
from torch import Tensor

SORTED_AT_ONCE = 2**18  # numbers that stay in the processor's cache
LONGEST, FAR = 1e140, 1e300  # a longer update counts as not finite; the largest squared distance in a sum


def mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Mean weighted by samples: for gradients, the gradient of all clients' batches together. Not robust."""
    weights = weights.to(updates)
    share = weights / weights.sum()
    return (updates * share[:, None, None]).sum(-3)


def median(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise median; the mean of the two middle ones of an even number. https://arxiv.org/abs/1803.01498."""
    m = updates.shape[-3]
    return _middle(updates, (m - 1) // 2, m // 2 + 1)


def trimmed_mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the f smallest and the f largest. https://arxiv.org/abs/1803.01498."""
    m = updates.shape[-3]
    return _middle(updates, f, m - f)


def meamed(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean of the m - f values nearest to the median. https://arxiv.org/abs/1802.10116."""
    m = updates.shape[-3]
    kept = m - f
    ordered = _sorted(updates)  # the nearest ones are neighbours in this order
    middle = (ordered[..., (m - 1) // 2, :, :] + ordered[..., m // 2, :, :]) / 2
    reach = [
        torch.maximum(middle - ordered[..., i, :, :], ordered[..., i + kept - 1, :, :] - middle) for i in range(f + 1)
    ]
    first = torch.stack(reach, -3).argmin(-3, keepdim=True)
    place = torch.arange(m, device=updates.device)[:, None, None]
    return ordered.where((place >= first) & (place < first + kept), 0.0).sum(-3) / kept


def krum(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """The update that is nearest to its m - f - 2 nearest others. Blanchard et al., https://arxiv.org/abs/1703.02757."""
    score = _krum_scores(squared_distances(updates), f)
    return _rows(updates, score.argmin(-1, keepdim=True)).squeeze(-3)


def multi_krum(updates: Tensor, weights: Tensor, f: int, *, keep: int | None = None) -> Tensor:
    """Mean of the `keep` updates of the smallest Krum scores, by default m - f. https://arxiv.org/abs/1703.02757."""
    m = updates.shape[-3]
    keep = m - f if keep is None else keep
    if not 1 <= keep <= m - f:
        raise ValueError(f"keep={keep} must be from 1 to {m - f}, the clients that are not f")
    score = _krum_scores(squared_distances(updates), f)
    first = score.sort(dim=-1, stable=True).indices[..., :keep]
    chosen = torch.zeros_like(score).scatter_(-1, first, 1.0)
    return combined(updates, chosen / keep)


def bulyan(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Of m - 2f updates, chosen one after the other by Krum, the mean of the m - 4f nearest to the median.

    Coordinate by coordinate. El Mhamdi et al., https://arxiv.org/abs/1802.07927.
    """
    distances = squared_distances(updates)
    m = distances.shape[-1]
    left = torch.ones(distances.shape[:-1], dtype=torch.bool, device=distances.device)
    chosen: list[Tensor] = []
    for _ in range(m - 2 * f):
        pairs = left.unsqueeze(-1) & left.unsqueeze(-2)
        count = m - len(chosen)
        # Krum's number of neighbours shrinks with the clients that are left; with one, any two clients that are each
        # other's nearest would be equal, and their order would decide
        score = _krum_scores(distances.where(pairs, torch.inf), f, max(2, count - f - 2))
        best = score.where(left, torch.inf).argmin(-1, keepdim=True)
        left = left.scatter(-1, best, False)
        chosen.append(best)
    picked = _rows(updates, torch.cat(chosen, -1).sort(-1).values)
    return meamed(picked, weights, 2 * f)


def geometric_median(updates: Tensor, weights: Tensor, f: int, *, tolerance: float = 1e-6, most: int = 200) -> Tensor:
    """The point of least summed distance to the updates: Weiszfeld's iteration, as in https://arxiv.org/abs/1912.13445.

    Until no weight of an update changes by more than `tolerance`, or after `most` iterations. The iterates are means of
    the updates, so that all distances follow from the products of the updates with each other.
    """
    if not tolerance > 0 or most < 1:
        raise ValueError(f"tolerance={tolerance} must be above 0 and most={most} at least 1")
    gram, finite = products(updates)
    share = finite.double() / finite.sum(-1, keepdim=True)
    square = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-12 * square.amax(-1, keepdim=True).sqrt() + 1e-300  # a point that is an update must not divide by zero
    for _ in range(most):
        product = (gram @ share.unsqueeze(-1)).squeeze(-1)
        distance = (square - 2 * product + (share * product).sum(-1, keepdim=True)).clamp(min=0).sqrt()
        nearer = finite.double() / distance.maximum(floor)
        before, share = share, nearer / nearer.sum(-1, keepdim=True)
        if (share - before).abs().max() <= tolerance:
            break
    return combined(updates, share.to(updates))


def centered_clipping(
    updates: Tensor, weights: Tensor, f: int, *, tau: float | None = None, iterations: int = 3
) -> Tensor:
    """Steps from the median by the mean of the differences to it, each clipped to the radius tau.

    By default tau is the median distance of the updates from where a step starts. Karimireddy et al. start from the
    aggregate of the round before (https://arxiv.org/abs/2012.10333); here nothing is kept between rounds.
    """
    if (tau is not None and not tau > 0) or iterations < 1:
        raise ValueError(f"tau={tau} must be above 0 and iterations={iterations} at least 1")
    finite, at = finite_rows(updates), median(updates, weights, f)
    known = updates.where(finite[..., None, None], 0.0)
    for _ in range(iterations):
        away = known - at.unsqueeze(-3)
        norm = away.flatten(-2).norm(dim=-1)
        radius = _median_of_row(norm.where(finite, torch.inf)) if tau is None else norm.new_tensor(tau)
        share = (radius / norm.where(norm > 0, 1.0)).clamp(max=1.0) * finite / norm.shape[-1]
        at = at + combined(away, share)
    return at


def norm_clipping(updates: Tensor, weights: Tensor, f: int, *, c: float | None = None) -> Tensor:
    """Mean of the updates, each scaled down to the norm c; by default to the median of their norms.

    Sun et al. 2019, https://arxiv.org/abs/1911.07963 (a fixed c).
    """
    clipped = clip(updates, c)
    return clipped.sum(-3) / updates.shape[-3]


def clip(updates: Tensor, c: float | None) -> Tensor:
    """Updates scaled down to the norm c, None: the median of their norms; those that are not finite become zero."""
    if c is not None and not c > 0:
        raise ValueError(f"c={c} must be above 0")
    finite = finite_rows(updates)
    known = updates.where(finite[..., None, None], 0.0)
    norm = known.flatten(-2).norm(dim=-1)
    radius = _median_of_row(norm.where(finite, torch.inf)) if c is None else norm.new_tensor(c)
    share = torch.clamp(radius / norm.where(norm > 0, 1.0), max=1.0)
    return known * share[..., None, None]


def combined(updates: Tensor, shares: Tensor) -> Tensor:
    """Sum (..., C, d) of the updates by shares (..., m); those of share 0 count nothing, whatever they hold."""
    known = updates.where((shares != 0)[..., None, None], 0.0)
    return (known * shares.to(updates)[..., None, None]).sum(-3)


def squared_distances(updates: Tensor) -> Tensor:
    """Between clients, (..., m, m) in float64; `FAR` to those that are not finite, infinite to oneself."""
    gram, finite = products(updates)
    square = gram.diagonal(dim1=-2, dim2=-1)
    found = (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram).clamp(min=0, max=FAR)
    found = found.where(finite.unsqueeze(-1) & finite.unsqueeze(-2), FAR)
    return found.masked_fill(torch.eye(found.shape[-1], dtype=torch.bool, device=found.device), torch.inf)


def products(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Of each two updates less the median, (..., m, m) in float64, and which are finite (..., m).

    Less the median, so that a common shift costs the differences no digits; of unit vectors, so that nothing overflows.
    """
    finite = finite_rows(updates)
    away = (updates - median(updates, finite, 0).unsqueeze(-3)).where(finite[..., None, None], 0.0).flatten(-2)
    largest = away.abs().amax(-1, keepdim=True)
    away = away / largest.where(largest > 0, 1.0)
    norm = torch.linalg.vector_norm(away, dim=-1)
    unit = away / norm.where(norm > 0, 1.0).unsqueeze(-1)
    norm = norm.double() * largest.squeeze(-1)
    finite, norm = finite & (norm <= LONGEST), norm.clamp(max=LONGEST)
    return (unit @ unit.mT).double() * norm.unsqueeze(-1) * norm.unsqueeze(-2), finite


def finite_rows(updates: Tensor) -> Tensor:
    """(..., m) which updates are finite."""
    return updates.isfinite().flatten(-2).all(-1)


def _krum_scores(distances: Tensor, f: int, neighbours: int | None = None) -> Tensor:
    """Sum of the squared distances to the nearest others, (..., m)."""
    count = max(1, distances.shape[-1] - f - 2) if neighbours is None else neighbours
    nearest = distances.sort(-1).values[..., :count]
    return nearest.clamp(max=FAR).sum(-1)


def _rows(updates: Tensor, chosen: Tensor) -> Tensor:
    """Those clients (..., k) of the updates, (..., k, C, d)."""
    shape = updates.shape
    index = chosen[..., None, None].expand(*chosen.shape, *shape[-2:])
    return updates.gather(-3, index)


def _median_of_row(values: Tensor) -> Tensor:
    """(..., 1) median of the finite values of each row, the lower of two middle ones; zero where there is none."""
    count = values.isfinite().sum(-1, keepdim=True)
    found = values.sort(-1).values.gather(-1, ((count - 1) // 2).clamp(min=0))
    return found.where(count > 0, 0.0)


def _middle(updates: Tensor, start: int, stop: int) -> Tensor:
    """Coordinate-wise mean of the sorted values from start to stop."""
    if start == 0 and stop == updates.shape[-3]:
        return updates.mean(-3)
    return _sorted(updates, start, stop).mean(-3)


def _sorted(updates: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Each coordinate in order over the clients; of it the places from start to stop. What is not finite comes last."""
    m = updates.shape[-3]
    stop = m if stop is None else stop
    clean = updates
    if not bool(updates.isfinite().all()):
        clean = updates.where(finite_rows(updates)[..., None, None], torch.inf)
    if updates.is_cuda:
        return clean.sort(-3).values[..., start:stop, :, :]
    # numpy's sort of a row is vectorised, many times as fast as torch's over an outer axis
    by_client = clean.movedim(-3, 0)
    shape = by_client.shape
    flat = by_client.reshape(m, -1)
    out = torch.empty(stop - start, flat.shape[1], dtype=flat.dtype)
    step = max(1, SORTED_AT_ONCE // m)
    for first in range(0, flat.shape[1], step):
        part = np.array(flat[:, first : first + step].mT.numpy(), order="C")  # a copy, whatever its layout
        part.sort(-1)
        out[:, first : first + step] = torch.from_numpy(part[:, start:stop]).mT
    return out.view(stop - start, *shape[1:]).movedim(0, -3)


def half(m: int) -> int:
    """The largest f below half of m."""
    return (m - 1) // 2


def krum_most(m: int) -> int:
    """The largest f with 2 f + 2 < m."""
    return math.floor((m - 3) / 2)


def bulyan_most(m: int) -> int:
    """The largest f with 4 f + 3 <= m."""
    return math.floor((m - 3) / 4)
