"""When attackers may write, how much, and which of the labels that they want come within the budget."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from fl_attack.choices import Rounding as Rounding


def select(priority: Tensor, group: Tensor, budgets: Tensor) -> Tensor:
    """The samples of largest priority within the budget of each group.

    This is the plain definition, which the tests hold `engine.kernels.take_largest_` to.

    Parameters
    ----------
    priority : (..., n) tensor
        Samples of priority -inf are never taken; ties go to the lower index.
    group : (n,) tensor of int64
        The budget, from 0 to G - 1, that a sample draws on.
    budgets : (..., G) tensor of int64
        The number of samples that may be taken of each group.

    Returns
    -------
    (..., n) tensor of bool
    """
    by_priority = priority.argsort(dim=-1, descending=True, stable=True)
    by_group = group[by_priority].argsort(dim=-1, stable=True)
    order = by_priority.gather(-1, by_group)
    size = torch.bincount(group, minlength=budgets.shape[-1])
    start = size.cumsum(0) - size
    place = torch.arange(len(group), device=group.device)
    grouped = group.sort().values  # the same for every leading axis: groups have fixed sizes
    within = (place - start[grouped]) < budgets[..., grouped]
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, within.expand(order.shape))
    return chosen & (priority > -math.inf)


def flip_allowance(budget: Fraction, writable_before: int, writable: int, rounding: Rounding) -> int:
    """The number of labels that may be flipped in a round.

    Parameters
    ----------
    budget : Fraction
        Share b of the writable samples, exact.
    writable_before : int
        How many samples could be written in the attacked rounds before this one; only `carry` uses it.
    writable : int
        The number of samples that can be written in this round.
    rounding : {"floor", "carry", "ceil"}
        `floor` never exceeds the budget in any round; `carry` hands the fraction on, so that all rounds together come
        to the floor of the whole; `ceil` rounds up, so that any budget above 0 is at least one label in every round.

    Returns
    -------
    int
    """
    if rounding == "floor":
        return math.floor(budget * writable)
    if rounding == "ceil":
        return math.ceil(budget * writable)
    return math.floor(budget * (writable_before + writable)) - math.floor(budget * writable_before)


def attacked_before(round_: int, every: int, start: int, stop: int | None) -> int | None:
    """The number of attacked rounds before a round.

    Parameters
    ----------
    round_ : int
        The round, from 1.
    every, start, stop : int
        The rounds attacked: each `every`-th from `start` on, up to `stop` where that is not None.

    Returns
    -------
    int or None
        None where the round itself is not attacked.
    """
    if round_ < start or (stop is not None and round_ > stop) or (round_ - start) % every:
        return None
    return (round_ - start) // every
