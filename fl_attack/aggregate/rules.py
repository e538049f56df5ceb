"""Robust aggregation rules, over any number of federations at once.

Parameters that all rules share: updates (..., m, C, d), one for each client in the order of the clients; weights (m,),
the samples that each used; f, how many clients may be malicious. All give the aggregate (..., C, d) in the precision of
the updates. Only the mean uses the weights. An update that is not finite counts as one that is infinitely far from all
others: no rule but the mean lets it through while at most f updates, and fewer than half, are like it. Ties go to the
client of the lower index.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor

from fl_attack.aggregate.geometry import (
    LARGEST,
    combined,
    distances,
    exponent_of,
    inner_products,
    norms,
    power_of_two,
    upper_median,
    weighted,
)
from fl_attack.aggregate.ordering import Rows, ascending, by_coordinate, middle, smallest

TINY = 1e-30  # smaller shares may lose digits in float32
ORDINARY, WILD = 2.0**16, 2.0**40  # typical norms from 1 / ORDINARY to ORDINARY need no scaling; WILD times it is far


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
    """Mean (..., C, d) weighted by samples: of gradients, that of all clients' batches together. It is not robust.

    Parameters
    ----------
    updates, weights, f
        See the head of this module; f is not used.
    """
    weights = weights.to(updates)
    return weighted(updates, weights / weights.sum())


@in_range
def median(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Coordinate-wise median (..., C, d); of an even number of values the mean of the two middle ones.

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
    """Coordinate-wise mean (..., C, d) without the f smallest and the f largest values.

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
    """Coordinate-wise mean (..., C, d) of the m - f values nearest to the median.

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
    """The update (..., C, d) with the least summed squared distance to its m - f - 2 nearest others.

    References
    ----------
    Blanchard et al. (2017). Machine learning with adversaries: Byzantine tolerant gradient descent. arXiv 1703.02757.

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        At most `max_f_of_krum(m)`.
    """
    score = _krum_scores(distances(updates).ordered, f)
    return _updates_of(updates, score.argmin(-1, keepdim=True)).squeeze(-3)


def multi_krum(updates: Tensor, weights: Tensor, f: int, *, keep: int | None = None) -> Tensor:
    """Mean (..., C, d) of the `keep` updates of the smallest Krum scores, by default m - f.

    References
    ----------
    Blanchard et al. (2017). Machine learning with adversaries: Byzantine tolerant gradient descent. arXiv 1703.02757.

    Parameters
    ----------
    updates, weights, f
        As `krum` takes them.
    keep : int, optional
        The number of updates that are averaged.

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
    """Coordinate-wise mean (..., C, d) of the m - 4f values nearest to the median, of m - 2f updates chosen by Krum.

    Krum chooses one by one: each time among those that remain.

    References
    ----------
    El Mhamdi, Guerraoui, Rouault (2018). The hidden vulnerability of distributed learning in Byzantium. arXiv
    1802.07927.

    Parameters
    ----------
    updates, weights
        See the head of this module.
    f : int
        At most `max_f_of_bulyan(m)`.
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
    selected = _updates_of(updates, torch.cat(chosen, -1).sort(-1).values)
    return meamed(selected, weights, 2 * f)


def mean_by_shares(updates: Tensor, share: Tensor) -> Tensor:
    """The sum of updates times shares, in float64 where the precision of the updates might not hold a share.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The updates that are averaged.
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
            square = first**2 - 2 * inner_products(away, moved) + moved.double().square().sum((-2, -1)).unsqueeze(-1)
            norm = square.clamp(min=0).sqrt().where(first.isfinite(), torch.inf)
        radius = _median_of_row(norm) if tau is None else norm.new_tensor(tau)
        share = (radius / norm.where(norm > 0, 1.0)).clamp(max=1.0).to(away) / norm.shape[-1]
        clipped = combined(away, share)
        moved = clipped if moved is None else clipped + moved * (1 - share.sum(-1))[..., None, None]
    assert moved is not None
    return moved if at is None else at + moved


def norm_clipping(updates: Tensor, weights: Tensor, f: int, *, c: float | None = None) -> Tensor:
    """Mean (..., C, d) of the updates, each scaled down to the norm c; by default to the median of their norms.

    References
    ----------
    Sun et al. (2019). Can you really backdoor federated learning? arXiv 1911.07963 (with a fixed c).

    Parameters
    ----------
    updates, weights, f
        See the head of this module; neither weights nor f are used.
    c : float, optional
        The largest norm.

    Raises
    ------
    ValueError
        Where c is not above 0.
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
        The largest norm; None is the median of the norms that are finite, the lower of two middle ones.

    Returns
    -------
    (..., m, C, d) tensor

    Raises
    ------
    ValueError
        Where c is not above 0.
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
    """Sum (..., m) of each client's `neighbours` smallest squared distances to others, from rows (..., m, m) in order.

    Each row is ascending, with the client's own entry infinite and so last. By default neighbours are m - f - 2, but at
    least one.
    """
    count = max(1, ordered.shape[-1] - f - 2) if neighbours is None else neighbours
    return ordered[..., :count].sum(-1, dtype=torch.float64).clamp(max=LARGEST)


def _updates_of(updates: Tensor, chosen: Tensor) -> Tensor:
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
