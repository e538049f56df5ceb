"""Which labels an attacker flips: directions, proposals and the selection under a budget.

In one round the attacker wants the gradient's inner product with a direction v as small as it can be made. That
product is linear in the encoded labels, so relabelling sample n from y to c changes it by
`(scores[n, y] - scores[n, c]) / |B|`, whatever else is flipped: the best class of each sample, and the samples
with the largest gains, are the exact optimum (arXiv 2503.00140; the tests prove it by brute force).

An attack is one function `View -> Proposal` and one row of `ATTACKS`. Shapes: n samples that the attacker may
write, in ascending order of their index; leading axes broadcast.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Goal = Literal["untargeted", "targeted"]
Selection = Literal["gain", "literal"]
Scope = Literal["pooled", "per_client"]
Rounding = Literal["floor", "carry"]
Knowledge = Literal["full", "honest", "own"]


class View(NamedTuple):
    """What an attack sees of a round."""

    y: Tensor  # (n,) true labels
    scores: Tensor  # (..., n, classes) of `model.scores` along the direction
    w: Tensor  # (n,) how often the sample is used in this round
    selection: Selection


class Proposal(NamedTuple):
    """A label for each sample and how much the attacker wants it; -inf where it doesn't want it at all."""

    labels: Tensor  # (..., n) int64
    priority: Tensor  # (..., n)


def direction(goal: Goal, theta: Tensor, clean_gradient: Tensor | None, target: Tensor | None) -> Tensor:
    """The direction v whose inner product with the gradient is minimised, (..., C, d).

    Untargeted, the clean gradient: the update is turned away from the honest one. Targeted, `target - theta`:
    the update is turned towards the target.
    """
    v = clean_gradient if goal == "untargeted" else target - theta if target is not None else None
    if v is None:
        raise ValueError(f"an attack with goal={goal} needs its clean gradient or target")
    return v


def greedy(view: View) -> Proposal:
    """The class that lowers the objective most, wanted by how much it does.

    `literal` ranks as the paper's algorithms are printed: by the score of the new label alone, whether or not the
    sample already has it, so that part of the budget can go to flips that change nothing.
    """
    best, labels = view.scores.max(-1)
    if view.selection == "literal":
        binary = view.scores.shape[-1] == 2
        return Proposal(labels, view.scores[..., 1] - view.scores[..., 0] if binary else best)
    own = view.scores.gather(-1, view.y.expand(best.shape).unsqueeze(-1)).squeeze(-1)
    gain = (best - own) * view.w
    return Proposal(labels, gain.masked_fill(gain <= 0, -math.inf))


ATTACKS: dict[str, Callable[[View], Proposal]] = {"greedy": greedy}


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


def flipped_target(y: Tensor, classes: int) -> Tensor:
    """The fully flipped labels that a targeted attacker steers to: y + 1 modulo classes (0 <-> 1 in binary)."""
    return (y + 1) % classes
