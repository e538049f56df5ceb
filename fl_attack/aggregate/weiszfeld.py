"""The geometric median of updates, by Weiszfeld's iteration.

Shapes as in `rules`: updates (..., m, C, d). A point is a weighted mean of the updates, given by their shares (..., m),
which add up to 1.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fl_attack.aggregate.geometry import (
    CLOSE,
    SMALLEST,
    careful_products,
    inner_products,
    products,
    upper_median,
    weighted,
)
from fl_attack.aggregate.rules import at_ordinary_scale, mean_by_shares

FAR_OFF = 64.0  # an update is far away from this multiple of the typical squared norm on
MANY, FEW = 8, 5  # from MANY clients on, FEW iterations of the geometric median are tried without inner products


def geometric_median(updates: Tensor, weights: Tensor, f: int, *, tolerance: float = 1e-6, most: int = 200) -> Tensor:
    """The point of least summed distance to the updates, by Weiszfeld's iteration.

    The iterates are weighted means of the updates, so that all distances follow from inner products of the updates. An
    update at which the iteration would stop, which a client who knows the others can send, is left by a step of Vardi
    and Zhang's.

    Parameters
    ----------
    updates, weights, f
        As in all rules; neither weights nor f are used.
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
    """Shares (..., m) after at most `most` iterations without inner products, and where these fail, (...) of bool."""
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
                product = inner_products(updates, point).double().cpu().numpy()
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
    """Shares (..., m) of the updates in their geometric median, and whether a point on the way there was nearly one.

    Parameters are `gram` and `finite` as `products` gives them; the second result is (...) of bool.
    """
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
