"""When attackers may write, how much, and which of the labels that they want come within the budget."""

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["pooled", "per_client"]
Rounding = Literal["floor", "carry"]
Refresh = Literal["step", "epoch"]


def select(priority: Tensor, group: Tensor, budgets: Tensor) -> Tensor:
    """Mask (..., n) of at most `budgets[g]` samples of each group g, those of largest priority.

    `group` (n,) names the budget that a sample draws on, `budgets` (..., G) counts flips. Ties go to the lower
    index; samples of priority -inf are never taken.
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
    """Labels that may be flipped in a round in which `writable` are within reach.

    `floor` never exceeds the budget in any round; `carry` hands the fraction on from the `writable_before` samples
    of the rounds attacked so far, so that all rounds together come to the floor of the whole.
    """
    if rounding == "floor":
        return math.floor(budget * writable)
    return math.floor(budget * (writable_before + writable)) - math.floor(budget * writable_before)


def attacked_before(round_: int, every: int, start: int, stop: int | None) -> int | None:
    """Rounds attacked before this one, or None where this one isn't: each `every`-th from `start` to `stop`."""
    if round_ < start or (stop is not None and round_ > stop) or (round_ - start) % every:
        return None
    return (round_ - start) // every
