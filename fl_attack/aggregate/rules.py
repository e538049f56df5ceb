"""Robust aggregation rules, over any number of federations at once.

Parameters that all rules share: updates (..., m, C, d), one for each client in the order of the clients; weights (m,),
the samples that each used; f, how many clients may be malicious. All give the aggregate (..., C, d) in the precision of
the updates. Only the mean uses the weights. An update that is not finite counts as one that is infinitely far from all
others: no rule but the mean lets it through. Ties go to the client of the lower index.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

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
    exponent_of,
    norms,
    power_of_two,
    products,
    upper_median,
    weighted,
)
from fl_attack.aggregate.ordering import Rows, ascending, by_coordinate, middle, smallest

FAR_OFF = 64.0  # an update is far away from this multiple of the typical squared norm on
TINY = 1e-30  # smaller shares may lose digits in float32
ORDINARY, WILD = 2.0**16, 2.0**40  # typical norms from 1 / ORDINARY to ORDINARY need no scaling; WILD times it is far
MANY, FEW = 8, 5  # from MANY clients on, FEW iterations of the geometric median are tried without inner products


def at_ordinary_scale(rule: Callable[..., Tensor], updates: Tensor, **lengths: float | None) -> Tensor:
    """The aggregate by a rule, with updates of unusual length scaled to an ordinary one and back, exactly.

    The scales are powers of two. Each federation is computed as it would be alone, those with an update that is far
    longer than the typical one in float64.

    Parameters
    ----------
    rule : callable
        Takes updates, their norms (..., m) in float64, and the lengths by name.
    updates : (..., m, C, d) tensor
        The updates of all clients.
    **lengths : float or None
        Arguments of the rule that are lengths: they are scaled too.

    Returns
    -------
    (..., C, d) tensor
    """
    norm = torch.linalg.vector_norm(updates.flatten(-2), dim=-1)
    low, high = (float(end) for end in norm.aminmax())
    if low >= 1 / ORDINARY and high <= ORDINARY:  # the usual case, known without a median; false where any is NaN
        return rule(updates, norm.double(), **lengths)
    norm = norms(updates)
    typical = upper_median(norm).squeeze(-1)
    wild = norm.where(norm.isfinite(), 0.0).amax(-1) > WILD * typical
    unusual = (typical > 0) & (wild | (typical < 1 / ORDINARY) | (typical > ORDINARY))
    if not bool(unusual.any()):
        return rule(updates, norm, **lengths)
    found = updates.new_empty(*updates.shape[:-3], *updates.shape[-2:])
    if not bool(unusual.all()):
        found[~unusual] = rule(updates[~unusual], norm[~unusual], **lengths)
    exponent = exponent_of(typical)
    for at in unusual.nonzero().tolist():  # there are seldom many
        place = tuple(at)
        down, up = (float(power_of_two(sign * exponent[place])) for sign in (-1, 1))
        scaled = {key: length and length * down for key, length in lengths.items()}
        own = (updates[place].double() * down).to(torch.float64 if bool(wild[place]) else updates.dtype)
        found[place] = (rule(own, norms(own), **scaled).double() * up).to(updates)
    return found


def in_range(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule, computed on smaller numbers where its sums overflow."""

    @wraps(rule)
    def scaled(updates: Tensor, weights: Tensor, f: int, **args: Any) -> Tensor:
        """The aggregate, finite wherever it can be."""
        found = rule(updates, weights, f, **args)
        if bool(found.sum().isfinite()):
            return found
        down = 2.0 ** -(4 + updates.shape[-3].bit_length())
        again = rule(updates * down, weights, f, **args) / down
        return found.where(found.isfinite(), again)

    return scaled


def mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Mean weighted by samples: of gradients, the gradient of all clients' batches together. It is not robust.

    Parameters
    ----------
    updates, weights, f
        See the head of this module; f is not used.
    """
    weights = weights.to(updates)
    return weighted(updates, weights / weights.sum())


@in_range
def median(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise median; of an even number of values the mean of the two middle ones.

    References
    ----------
    Yin et al. (2018). Byzantine-robust distributed learning: towards optimal statistical rates. arXiv 1803.01498.

    Parameters
    ----------
    updates, weights, f
        See the head of this module; neither weights nor f are used.
    """
    m = updates.shape[-3]
    return middle(updates, (m - 1) // 2, m // 2 + 1)


@in_range
def trimmed_mean(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the f smallest and the f largest values.

    References
    ----------
    Yin et al. (2018). Byzantine-robust distributed learning: towards optimal statistical rates. arXiv 1803.01498.

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        Below half of the clients.
    """
    m = updates.shape[-3]
    return middle(updates, f, m - f)


@in_range
def meamed(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean of the m - f values nearest to the median.

    References
    ----------
    Xie, Koyejo, Gupta (2018). Generalized Byzantine-tolerant SGD. arXiv 1802.10116.

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        How many values of each coordinate are left out.
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

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        At most `max_f_of_krum` of the clients.
    """
    score = _krum_scores(distances(updates).ordered, f)
    return _clients(updates, score.argmin(-1, keepdim=True)).squeeze(-3)


def multi_krum(updates: Tensor, weights: Tensor, f: int, *, keep: int | None = None) -> Tensor:
    """Mean of the `keep` updates of the smallest Krum scores, by default m - f.

    References
    ----------
    Blanchard et al. (2017). Machine learning with adversaries: Byzantine tolerant gradient descent. arXiv 1703.02757.

    Parameters
    ----------
    updates, weights, f
        As `krum` takes them.
    keep : int, optional
        How many updates are averaged.

    Raises
    ------
    ValueError
        Where `keep` is not from 1 to m - f.
    """
    m = updates.shape[-3]
    keep = m - f if keep is None else keep
    if not 1 <= keep <= m - f:
        raise ValueError(f"keep={keep} must be from 1 to {m - f}, the clients that are not f")
    score = _krum_scores(distances(updates).ordered, f)
    return combined(updates, smallest(score, keep, ascending(score)) / keep)


@in_range
def bulyan(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean of the m - 4f values nearest to the median, of m - 2f updates chosen one by one by Krum.

    References
    ----------
    El Mhamdi, Guerraoui, Rouault (2018). The hidden vulnerability of distributed learning in Byzantium. arXiv
    1802.07927.

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        At most `max_f_of_bulyan` of the clients.
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
    """The point of least summed distance to the updates, by Weiszfeld's iteration.

    The iterates are weighted means of the updates, so that all distances follow from inner products of the updates. An
    update at which the iteration would stop, which a client who knows the others can send, is left by a step of Vardi
    and Zhang's.

    Parameters
    ----------
    updates, weights, f
        As in all rules.
    tolerance : float
        The iteration ends when no share of an update changes by more.
    most : int
        The largest number of iterations.

    Returns
    -------
    (..., C, d) tensor

    Raises
    ------
    ValueError
        Where an argument is out of range.

    References
    ----------
    Pillutla, Kakade, Harchaoui (2019). Robust aggregation for federated learning. arXiv 1912.13445.
    Vardi, Zhang (2000). The multivariate L1-median and associated data depth. https://doi.org/10.1073/pnas.97.4.1423.
    """
    if not tolerance > 0 or most < 1:
        raise ValueError(f"tolerance={tolerance} must be above 0 and most={most} at least 1")
    return at_ordinary_scale(partial(_geometric_median, tolerance=tolerance, most=most), updates)


def _geometric_median(updates: Tensor, norm: Tensor, tolerance: float, most: int) -> Tensor:
    """The geometric median (..., C, d) of updates of ordinary length, with their norms (..., m)."""
    m = updates.shape[-3]
    share = updates.new_full(updates.shape[:-2], 1 / m, dtype=torch.float64)
    unfinished = torch.ones(updates.shape[:-3], dtype=torch.bool, device=updates.device)
    if m >= MANY:  # inner products cost as much as a few iterations without them, which may be all that it takes
        share, unfinished = _few_iterations(updates, norm, tolerance, min(most, FEW))
        if not bool(unfinished.any()):
            return mean_by_shares(updates, share)
    some = updates[unfinished]
    found, near = _weiszfeld(*products(some), tolerance, most)
    if bool(near.any()):  # where the median is nearly one of the updates, only products about it tell how near
        found[near] = _weiszfeld(*careful_products(some[near]), tolerance, most)[0]
    share[unfinished] = found
    return mean_by_shares(updates, share)


def _few_iterations(updates: Tensor, norm: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Shares (..., m) after `most` iterations without inner products, and where they do not suffice, (...)."""
    # in numpy: torch takes several times as long for rows as short as these, and threads would wait for each other
    square = norm.square().cpu().numpy()
    share, moving = np.full_like(square, 1 / square.shape[-1]), np.ones_like(square[..., 0], dtype=np.bool_)
    exact = (np.isfinite(square) & (square > SMALLEST * square.max(-1, keepdims=True))).all(-1)
    if exact.any():
        smallest_exact = CLOSE * square.max(-1)
        change = np.full_like(smallest_exact, np.inf)
        with np.errstate(all="ignore"):  # in federations that are not exact
            for step in range(most):
                point = weighted(updates, torch.from_numpy(share).to(updates))
                product = along(updates, point).double().cpu().numpy()
                squared = square - 2 * product + (share * product).sum(-1, keepdims=True)
                exact &= (squared.min(-1) > smallest_exact) | ~moving  # else digits were lost in the difference
                inverse = 1 / np.sqrt(np.maximum(squared, SMALLEST * square))
                moved = (inverse / inverse.sum(-1, keepdims=True) - share) * moving[..., None]
                share = share + moved
                before, change = change, np.abs(moved).max(-1)
                moving = moving & (change > tolerance)  # a federation that has converged stays, whatever others do
                if step == 1:  # where steps shrink too slowly, the iterations will not suffice
                    exact &= ~moving | (change * (change / before).clip(max=1.0) ** (most - 2) <= tolerance)
                if not (moving & exact).any():
                    break
    unfinished = np.asarray(moving | ~exact)
    return torch.from_numpy(share).to(updates.device), torch.from_numpy(unfinished).to(updates.device)


def _weiszfeld(gram: Tensor, finite: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Shares (..., m) of the updates in their geometric median, and whether it is nearly one of them, (...) of bool."""
    share = finite.double() / finite.sum(-1, keepdim=True)
    square = gram.diagonal(dim1=-2, dim2=-1)
    # in units of the typical update, over which a minority has no power
    largest = upper_median(square.where(finite, torch.inf))
    floor = 1e-12 * largest.sqrt() + 1e-300  # a point that is an update must not divide by zero
    # a step of an update that is far away moves the point as far as it is away
    tolerances = tolerance / (square / (FAR_OFF * largest).where(largest > 0, torch.inf)).sqrt().clamp(min=1.0)
    moving = torch.ones_like(share[..., :1], dtype=torch.bool)
    smallest_so_far = torch.full_like(largest, torch.inf)
    was_left = torch.zeros_like(finite)  # the updates from which a step was made
    for _ in range(most):
        squared = _squared_distances_from(share, gram)
        smallest, nearest_update = squared.where(finite, torch.inf).min(-1, keepdim=True)
        smallest_so_far = smallest_so_far.minimum(smallest).where(moving, smallest_so_far)
        inverse = finite.double() / squared.sqrt().maximum(floor)
        moved = (inverse / inverse.sum(-1, keepdim=True) - share) * moving
        share = share + moved
        settled = (moved.abs() <= tolerances).all(-1, keepdim=True)
        leaves = moving & settled & (smallest < CLOSE * largest) & ~was_left.gather(-1, nearest_update)
        if bool(leaves.any()):
            after_step = vardi_zhang_step(gram, finite, nearest_update, floor)
            was_left = was_left.scatter(-1, nearest_update, leaves | was_left.gather(-1, nearest_update))
            leaves = leaves & (
                _summed_distance(_squared_distances_from(after_step, gram), finite) < _summed_distance(squared, finite)
            )
            share = after_step.where(leaves, share)
        moving = moving & (~settled | leaves)
        if not bool(moving.any()):
            break
    return share, (smallest_so_far < CLOSE * largest).squeeze(-1)


def mean_by_shares(updates: Tensor, share: Tensor) -> Tensor:
    """The sum of updates times shares, in float64 where the precision of the updates might not hold a share.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        What is averaged.
    share : (..., m) tensor of float64
        The factor of each update.

    Returns
    -------
    (..., C, d) tensor
        In the precision of the updates.
    """
    if bool(((share > 0) & (share < TINY)).any()) and updates.dtype == torch.float32:
        return combined(updates.double(), share).to(updates)
    return combined(updates, share.to(updates))


def _squared_distances_from(share: Tensor, gram: Tensor) -> Tensor:
    """Squared distances (..., m) of the updates from their mean weighted by shares (..., m)."""
    product = (share.unsqueeze(-2) @ gram).squeeze(-2)
    square = gram.diagonal(dim1=-2, dim2=-1)
    return (square - 2 * product + (share * product).sum(-1, keepdim=True)).clamp(min=0)


def _summed_distance(squared: Tensor, finite: Tensor) -> Tensor:
    """Summed distance (..., 1) to the finite updates, which the geometric median minimises, from squared ones."""
    return squared.where(finite, 0.0).sqrt().sum(-1, keepdim=True)


def vardi_zhang_step(gram: Tensor, finite: Tensor, at: Tensor, floor: Tensor) -> Tensor:
    """A step of Vardi and Zhang's towards the geometric median, from the place of an update.

    The step goes towards the others where they pull harder than the updates at this place hold; else it is none.

    Parameters
    ----------
    gram : (..., m, m) tensor of float64
        Inner products of the updates.
    finite : (..., m) tensor of bool
        Which of the updates are finite; the others do not count.
    at : (..., 1) tensor of int64
        The update that the step begins at.
    floor : (..., 1) tensor
        Distances up to which two updates are at the same place.

    Returns
    -------
    (..., m) tensor
        The shares of the updates in the place after the step.

    References
    ----------
    Vardi, Zhang (2000). The multivariate L1-median and associated data depth. https://doi.org/10.1073/pnas.97.4.1423.
    """
    place = torch.zeros_like(finite, dtype=torch.float64).scatter(-1, at, 1.0)
    distance = _squared_distances_from(place, gram).sqrt()
    at_this_place = finite & ((distance <= floor) | (place > 0))
    inverse = (finite & ~at_this_place).double() / distance.maximum(floor)
    total = inverse.sum(-1, keepdim=True)
    towards = inverse / total.where(total > 0, 1.0) - place
    # each of the others pulls with a force of one, in all with this; each update that is here holds with one
    pull = total * (towards.unsqueeze(-2) @ gram @ towards.unsqueeze(-1)).squeeze(-1).clamp(min=0).sqrt()
    held_back = at_this_place.sum(-1, keepdim=True) / pull.where(pull > 0, torch.inf)
    return place + towards * torch.where(pull > 0, 1.0 - held_back.clamp(max=1.0), 0.0)


def centered_clipping(
    updates: Tensor,
    weights: Tensor,
    f: int,
    *,
    tau: float | None = None,
    iterations: int = 3,
    start: Literal["median", "zero"] = "median",
) -> Tensor:
    """Steps from a centre by the mean of the differences of the updates to it, each clipped to a norm.

    Karimireddy et al. start from the aggregate of the round before; here nothing is kept between rounds.

    Parameters
    ----------
    updates, weights, f
        As in all rules.
    tau : float, optional
        The norm; by default the median distance of the updates from where a step starts.
    iterations : int
        The number of steps.
    start : "median" or "zero"
        The first centre: the coordinate-wise median, or zero.

    Returns
    -------
    (..., C, d) tensor

    Raises
    ------
    ValueError
        Where an argument is out of range.

    References
    ----------
    Karimireddy, He, Jaggi (2021). Learning from history for Byzantine robust optimization. arXiv 2012.10333.
    """
    if (tau is not None and not tau > 0) or iterations < 1:
        raise ValueError(f"tau={tau} must be above 0 and iterations={iterations} at least 1")
    if start not in ("median", "zero"):
        raise ValueError(f"start={start} is not known; use median or zero")
    return at_ordinary_scale(partial(_centered_clipping, iterations=iterations, start=start), updates, tau=tau)


def _centered_clipping(updates: Tensor, norm: Tensor, tau: float | None, iterations: int, start: str) -> Tensor:
    """The aggregate (..., C, d) by `centered_clipping` of updates of ordinary length, with their norms (..., m)."""
    at = median(updates, norm, 0) if start == "median" else None  # which asks for no weights
    away = updates if at is None else updates - at.unsqueeze(-3)
    first = norm if at is None else norms(away)
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

    References
    ----------
    Sun et al. (2019). Can you really backdoor federated learning? arXiv 1911.07963 (with a fixed c).

    Parameters
    ----------
    updates, weights, f
        See the head of this module; neither weights nor f are used.
    c : float, optional
        The largest norm, above 0.
    """
    share, finite = clip_shares(updates, c)
    if not bool(finite.all()):
        updates = updates.where(finite[..., None, None], 0.0)
    return mean_by_shares(updates, share / share.shape[-1])


def clip(updates: Tensor, c: float | None) -> Tensor:
    """Updates scaled down to a norm; those that are not finite become zero.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The updates of all clients, which are not changed.
    c : float or None
        The largest norm; None is the median of their norms.

    Returns
    -------
    (..., m, C, d) tensor
    """
    share, finite = clip_shares(updates, c)
    if not bool(finite.all()):
        updates = updates.where(finite[..., None, None], 0.0)
    if bool((share < TINY).any()):
        return (updates.double() * share[..., None, None]).to(updates)
    return updates * share[..., None, None].to(updates)


def clip_shares(updates: Tensor, c: float | None) -> tuple[Tensor, Tensor]:
    """The factors by which `clip` scales updates.

    Parameters
    ----------
    updates, c
        As `clip` takes them.

    Returns
    -------
    share : (..., m) tensor
        The factors, from 0 to 1.
    finite : (..., m) tensor of bool
        Which updates are finite; the factors of others mean nothing.

    Raises
    ------
    ValueError
        Where c is not above 0.
    """
    if c is not None and not c > 0:
        raise ValueError(f"c={c} must be above 0")
    norm = norms(updates)
    finite = norm.isfinite()
    radius = _median_of_row(norm) if c is None else norm.new_tensor(c)
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
