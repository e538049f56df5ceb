"""Robust aggregation rules, over any number of federations at once.

Parameters that all rules share: updates (..., m, C, d), one for each client in the order of the clients; weights (m,),
the samples that each used; f, how many clients may be malicious. All give the aggregate (..., C, d) in the precision of
the updates. Only the mean uses the weights. An update that is not finite counts as one that is infinitely far from all
others: no rule but the mean lets it through. Ties go to the client of the lower index.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fl_attack.aggregate.geometry import (
    CLOSE,
    LARGEST,
    SMALLEST,
    along,
    careful_products,
    combined,
    distances,
    products,
    weighted,
)
from fl_attack.aggregate.ordering import Rows, ascending, by_coordinate, finite_rows, middle, smallest

MANY, FEW = 8, 5  # clients from which on so many iterations of the geometric median are tried without products


def mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Mean weighted by samples: of gradients, the gradient of all clients' batches together. It is not robust."""
    weights = weights.to(updates)
    return weighted(updates, weights / weights.sum())


def median(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise median; of an even number of values the mean of the two middle ones.

    References
    ----------
    Yin et al. (2018). Byzantine-robust distributed learning: towards optimal statistical rates. arXiv 1803.01498.
    """
    m = updates.shape[-3]
    return middle(updates, (m - 1) // 2, m // 2 + 1)


def trimmed_mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the f smallest and the f largest values.

    References
    ----------
    Yin et al. (2018). Byzantine-robust distributed learning: towards optimal statistical rates. arXiv 1803.01498.
    """
    m = updates.shape[-3]
    return middle(updates, f, m - f)


def meamed(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean of the m - f values nearest to the median.

    References
    ----------
    Xie, Koyejo, Gupta (2018). Generalized Byzantine-tolerant SGD. arXiv 1802.10116.
    """
    m = updates.shape[-3]
    kept = m - f

    def mean_of_nearest(rows: Rows) -> Tensor:
        """Mean of the kept values of each coordinate, from values in order."""
        rows = list(rows.contiguous()) if isinstance(rows, Tensor) else rows
        # the nearest values are neighbours in order: a window of them, of which the farther end is as near as possible
        center, total = (rows[(m - 1) // 2] + rows[m // 2]) / 2, torch.zeros_like(rows[0])
        if f > kept:
            ordered = torch.stack(rows)
            farthest = [torch.maximum(center - rows[i], rows[i + kept - 1] - center) for i in range(f + 1)]
            first = torch.stack(farthest).argmin(0)
            place = torch.arange(m, device=first.device).view(-1, *[1] * first.ndim)
            return ordered.where((place >= first) & (place < first + kept), 0.0).sum(0) / kept
        for row in rows[f:kept]:  # these are in every window
            total += row
        for low, high in zip(rows[:f], rows[kept:], strict=True):
            total += torch.where(center - low <= high - center, low, high)
        return total / kept

    return by_coordinate(updates, range(m), mean_of_nearest)


def krum(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """The update with the least summed squared distance to its m - f - 2 nearest others.

    References
    ----------
    Blanchard et al. (2017). Machine learning with adversaries: Byzantine tolerant gradient descent. arXiv 1703.02757.
    """
    score = _krum_scores(distances(updates).ordered, f)
    return _clients(updates, score.argmin(-1, keepdim=True)).squeeze(-3)


def multi_krum(updates: Tensor, weights: Tensor, f: int, *, keep: int | None = None) -> Tensor:
    """Mean of the `keep` updates of the smallest Krum scores, by default m - f.

    References
    ----------
    Blanchard et al. (2017). Machine learning with adversaries: Byzantine tolerant gradient descent. arXiv 1703.02757.
    """
    m = updates.shape[-3]
    keep = m - f if keep is None else keep
    if not 1 <= keep <= m - f:
        raise ValueError(f"keep={keep} must be from 1 to {m - f}, the clients that are not f")
    score = _krum_scores(distances(updates).ordered, f)
    return combined(updates, smallest(score, keep, ascending(score)) / keep)


def bulyan(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean of the m - 4f values nearest to the median, of m - 2f updates chosen one by one by Krum.

    References
    ----------
    El Mhamdi, Guerraoui, Rouault (2018). The hidden vulnerability of distributed learning in Byzantium. arXiv
    1802.07927.
    """
    squared = distances(updates).squared
    m = squared.shape[-1]
    remaining = torch.ones(squared.shape[:-1], dtype=torch.bool, device=squared.device)
    chosen: list[Tensor] = []
    for _ in range(m - 2 * f):
        pairs = remaining.unsqueeze(-1) & remaining.unsqueeze(-2)
        count = m - len(chosen)
        # Krum's number of neighbours shrinks with the clients that remain; with one, any two clients that are each
        # other's nearest would be equal, and their order would decide
        score = _krum_scores(ascending(squared.where(pairs, torch.inf)), f, max(2, count - f - 2))
        best = score.where(remaining, torch.inf).argmin(-1, keepdim=True)
        remaining = remaining.scatter(-1, best, False)
        chosen.append(best)
    selected = _clients(updates, torch.cat(chosen, -1).sort(-1).values)
    return meamed(selected, weights, 2 * f)


def geometric_median(updates: Tensor, weights: Tensor, f: int, *, tolerance: float = 1e-6, most: int = 200) -> Tensor:
    """The point of least summed distance to the updates: Weiszfeld's iteration, as in https://arxiv.org/abs/1912.13445.

    Until no weight of an update changes by more than `tolerance`, or after `most` iterations. An iterate that an update
    holds fast, which is how one who knows the others would stop it, is led away as Vardi and Zhang do
    (https://doi.org/10.1073/pnas.97.4.1423). The iterates are means of the updates, so that all distances follow from
    the products of the updates with each other.
    """
    if not tolerance > 0 or most < 1:
        raise ValueError(f"tolerance={tolerance} must be above 0 and most={most} at least 1")
    m = updates.shape[-3]
    share = updates.new_full(updates.shape[:-2], 1 / m, dtype=torch.float64)
    left = torch.ones(updates.shape[:-3], dtype=torch.bool, device=updates.device)
    if m >= MANY:  # products with each other cost as much as a few iterations, which may be all that it takes
        share, left = _few_steps(updates, tolerance, min(most, FEW))
        if not bool(left.any()):
            return combined(updates, share.to(updates))
    some = updates[left]
    found, near = _weiszfeld(*products(some), tolerance, most)
    if bool(near.any()):  # where the median is all but one of the updates, only products about it tell how near
        found[near] = _weiszfeld(*careful_products(some[near]), tolerance, most)[0]
    share[left] = found
    return combined(updates, share.to(updates))


def _few_steps(updates: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Shares (..., m) after a few iterations, and where that was not enough, or not exact (...)."""
    # in numpy: of rows as short as these torch takes several times as long, and threads would wait for each other
    square = torch.linalg.vector_norm(updates.flatten(-2), dim=-1).double().cpu().numpy() ** 2
    share, moving = np.full_like(square, 1 / square.shape[-1]), np.ones_like(square[..., 0], dtype=np.bool_)
    exact = (np.isfinite(square) & (square > SMALLEST)).all(-1)
    if exact.any():
        least = CLOSE * square.max(-1)
        change = np.full_like(least, np.inf)
        with np.errstate(all="ignore"):  # of those that are not exact
            for step in range(most):
                at = weighted(updates, torch.from_numpy(share).to(updates))
                product = along(updates, at).double().cpu().numpy()
                apart = square - 2 * product + (share * product).sum(-1, keepdims=True)
                exact &= (apart.min(-1) > least) | ~moving  # else digits were lost in the difference
                nearer = 1 / np.sqrt(np.maximum(apart, SMALLEST))
                moved = (nearer / nearer.sum(-1, keepdims=True) - share) * moving[..., None]
                share = share + moved
                before, change = change, np.abs(moved).max(-1)
                moving = moving & (change > tolerance)  # who has arrived stays, whatever others do
                if step == 1:  # whose steps shrink too slowly will not arrive in time
                    exact &= ~moving | (change * (change / before).clip(max=1.0) ** (most - 2) <= tolerance)
                if not (moving & exact).any():
                    break
    undone = np.asarray(moving | ~exact)
    return torch.from_numpy(share).to(updates.device), torch.from_numpy(undone).to(updates.device)


def _weiszfeld(gram: Tensor, finite: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Shares (..., m) of the updates in their geometric median, and whether it is all but one of them (...)."""
    share = finite.double() / finite.sum(-1, keepdim=True)
    square = gram.diagonal(dim1=-2, dim2=-1)
    largest = square.amax(-1, keepdim=True)
    floor = 1e-12 * largest.sqrt() + 1e-300  # a point that is an update must not divide by zero
    moving = torch.ones_like(share[..., :1], dtype=torch.bool)
    nearest = torch.full_like(largest, torch.inf)
    left = torch.zeros_like(finite)  # the updates from which it has been led away
    for _ in range(most):
        apart = _from(share, gram)
        near, at = apart.where(finite, torch.inf).min(-1, keepdim=True)
        nearest = nearest.minimum(near).where(moving, nearest)
        nearer = finite.double() / apart.sqrt().maximum(floor)
        moved = (nearer / nearer.sum(-1, keepdim=True) - share) * moving
        share = share + moved
        still = moved.abs().amax(-1, keepdim=True) <= tolerance
        held = moving & still & (near < CLOSE * largest) & ~left.gather(-1, at)
        if bool(held.any()):
            elsewhere = _led_away(gram, finite, at, floor)
            left = left.scatter(-1, at, held | left.gather(-1, at))
            held = held & (_summed(_from(elsewhere, gram), finite) < _summed(apart, finite))
            share = elsewhere.where(held, share)
        moving = moving & (~still | held)
        if not bool(moving.any()):
            break
    return share, (nearest < CLOSE * largest).squeeze(-1)


def _from(share: Tensor, gram: Tensor) -> Tensor:
    """Squared distances (..., m) of the updates from their mean by shares."""
    product = (share.unsqueeze(-2) @ gram).squeeze(-2)
    square = gram.diagonal(dim1=-2, dim2=-1)
    return (square - 2 * product + (share * product).sum(-1, keepdim=True)).clamp(min=0)


def _summed(apart: Tensor, finite: Tensor) -> Tensor:
    """The summed distance (..., 1), which the geometric median makes least, from squared ones."""
    return apart.where(finite, 0.0).sqrt().sum(-1, keepdim=True)


def _led_away(gram: Tensor, finite: Tensor, at: Tensor, floor: Tensor) -> Tensor:
    """Shares (..., m) after a step from the update at an index (..., 1), where the others pull it away; else there."""
    here = torch.zeros_like(finite, dtype=torch.float64).scatter(-1, at, 1.0)
    apart = _from(here, gram).sqrt()
    same = finite & ((apart <= floor) | (here > 0))
    nearer = (finite & ~same).double() / apart.maximum(floor)
    total = nearer.sum(-1, keepdim=True)
    way = nearer / total.where(total > 0, 1.0) - here
    # the others pull with this, and those that are here withstand with one each
    pull = total * (way.unsqueeze(-2) @ gram @ way.unsqueeze(-1)).squeeze(-1).clamp(min=0).sqrt()
    stays = same.sum(-1, keepdim=True) / pull.where(pull > 0, torch.inf)
    return here + way * torch.where(pull > 0, 1.0 - stays.clamp(max=1.0), 0.0)


def centered_clipping(
    updates: Tensor,
    weights: Tensor,
    f: int,
    *,
    tau: float | None = None,
    iterations: int = 3,
    start: Literal["median", "zero"] = "median",
) -> Tensor:
    """Steps from the coordinate-wise median, or zero, by the mean of the differences to it, each clipped to tau.

    By default tau is the median distance of the updates from where a step starts. Karimireddy et al. start from the
    aggregate of the round before (https://arxiv.org/abs/2012.10333); here nothing is kept between rounds.
    """
    if (tau is not None and not tau > 0) or iterations < 1:
        raise ValueError(f"tau={tau} must be above 0 and iterations={iterations} at least 1")
    if start not in ("median", "zero"):
        raise ValueError(f"start={start} is not known; use median or zero")
    at = median(updates, weights, f) if start == "median" else None
    away = updates if at is None else updates - at.unsqueeze(-3)
    first = torch.linalg.vector_norm(away.flatten(-2), dim=-1).double()
    first = first.where(first.isfinite(), torch.inf)
    norm, moved = first, None
    for _ in range(iterations):
        if moved is not None:  # |a - u|^2 = |a|^2 - 2 a u + |u|^2, without making a - u
            square = first**2 - 2 * along(away, moved) + moved.double().square().sum((-2, -1)).unsqueeze(-1)
            norm = square.clamp(min=0).sqrt().where(first.isfinite(), torch.inf)
        radius = _median_of_row(norm) if tau is None else norm.new_tensor(tau)
        share = (radius / norm.where(norm > 0, 1.0)).clamp(max=1.0).to(away) / norm.shape[-1]
        clipped = combined(away, share)
        moved = clipped if moved is None else clipped + moved * (1 - share.sum(-1))[..., None, None]
    assert moved is not None
    return moved if at is None else at + moved


def norm_clipping(updates: Tensor, weights: Tensor, f: int, *, c: float | None = None) -> Tensor:
    """Mean of the updates, each scaled down to the norm c; by default to the median of their norms.

    Sun et al. 2019, https://arxiv.org/abs/1911.07963 (a fixed c).
    """
    share, finite = _clip_shares(updates, c)
    return combined(
        updates.where(finite[..., None, None], 0.0) if not bool(finite.all()) else updates, share / share.shape[-1]
    )


def clip(updates: Tensor, c: float | None) -> Tensor:
    """Updates scaled down to the norm c, None: the median of their norms; those that are not finite become zero."""
    share, finite = _clip_shares(updates, c)
    if not bool(finite.all()):
        updates = updates.where(finite[..., None, None], 0.0)
    return updates * share[..., None, None]


def _clip_shares(updates: Tensor, c: float | None) -> tuple[Tensor, Tensor]:
    """What clipping to the norm c leaves of each update (..., m), and which are finite."""
    if c is not None and not c > 0:
        raise ValueError(f"c={c} must be above 0")
    norm = torch.linalg.vector_norm(updates.flatten(-2), dim=-1)
    finite = norm.isfinite()
    if not bool(finite.all()):  # of a finite update the norm may overflow
        finite = finite_rows(updates)
    radius = _median_of_row(norm.where(finite, torch.inf)) if c is None else norm.new_tensor(c)
    return torch.clamp(radius / norm.where(finite & (norm > 0), 1.0), max=1.0), finite


def _krum_scores(ordered: Tensor, f: int, neighbours: int | None = None) -> Tensor:
    """Sum (..., m) of each client's smallest squared distances, from rows (..., m, m) in order."""
    count = max(1, ordered.shape[-1] - f - 2) if neighbours is None else neighbours
    return ordered[..., :count].sum(-1, dtype=torch.float64).clamp(max=LARGEST)


def _clients(updates: Tensor, chosen: Tensor) -> Tensor:
    """The updates (..., k, C, d) of the clients whose indices (..., k) are given."""
    shape = updates.shape
    index = chosen[..., None, None].expand(*chosen.shape, *shape[-2:])
    return updates.gather(-3, index)


def _median_of_row(values: Tensor) -> Tensor:
    """Median (..., 1) of the finite values of each row, the lower of two middle ones; zero where there is none."""
    count = values.isfinite().sum(-1, keepdim=True)
    found = values.sort(-1).values.gather(-1, ((count - 1) // 2).clamp(min=0))
    return found.where(count > 0, 0.0)


def any_f(m: int) -> int:
    """The largest f of a rule that is defined for any: m."""
    return m


def max_f_below_half(m: int) -> int:
    """The largest f with 2 f < m."""
    return (m - 1) // 2


def max_f_of_krum(m: int) -> int:
    """The largest f with 2 f + 2 < m."""
    return math.floor((m - 3) / 2)


def max_f_of_bulyan(m: int) -> int:
    """The largest f with 4 f + 3 <= m."""
    return math.floor((m - 3) / 4)
