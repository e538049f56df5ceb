"""Which labels attackers write: the largest of their priorities that come within the budgets.

Shapes: M cells, n columns that they may write, C outputs. Everything is a function of named arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack
from fl_attack.engine import kernels
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.batches import Batch
from fl_attack.engine.kinds import Part


class Change(NamedTuple):
    """The labels that attackers write, each with its cell and its column of the minibatch."""

    cells: Tensor  # (flips,) int64
    columns: Tensor  # (flips,) int64
    labels: Tensor  # (flips,) int64, the new ones

    def differing(self, y: Tensor) -> "Change":
        """The changes that differ from the true labels y (n,)."""
        new = self.labels != y[self.columns]
        return Change(self.cells[new], self.columns[new], self.labels[new])

    def per_cell(self, M: int) -> NDArray[np.int64]:
        """The number of labels that each of M cells changes, (M,)."""
        counts: NDArray[np.int64] = torch.bincount(self.cells, minlength=M).cpu().numpy()
        return counts


def no_change(device: torch.device) -> Change:
    """The change of a round in which no label is written."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Change(none, none, none)


def of_mask(flipped: Tensor, y: Tensor) -> Change:
    """The change that flips the labels of a binary task where a mask says so.

    Parameters
    ----------
    flipped : (M, n) tensor
        1 where a label is flipped, else 0.
    y : (n,) tensor of int64
        True labels.

    Returns
    -------
    Change
    """
    cells, columns = flipped.nonzero(as_tuple=True)
    return Change(cells, columns, 1 - y[columns])


def count_mask(flipped: Tensor) -> NDArray[np.int64]:
    """The number of flips (M,) in (M, n), 1 where a label is flipped, else 0."""
    counts: NDArray[np.int64] = flipped.sum(1).long().cpu().numpy()
    return counts


def greedy_of_two(
    gains: Tensor, batch: Batch, access: RoundAccess, parts: Sequence[Part], scratch: Tensor
) -> NDArray[np.int64]:
    """Choose the flips of greedy attackers with two classes, see `attack.labels.greedy`.

    Parameters
    ----------
    gains : (M, n) tensor
        The signed scores: what a flip gains by one use of its sample. Overwritten by the result, 1 where a label is
        flipped, else 0.
    batch : Batch
        The minibatch.
    access : RoundAccess
        What the attackers can write in the round.
    parts : sequence of Part
        The cells, parted by goal and selection.
    scratch : (M, n) tensor
        Memory that is overwritten.

    Returns
    -------
    (M,) array of int64
        The number of flips of each cell.
    """
    y, changing = batch.y[: access.n], []
    for part in parts:
        some = gains[part.cells]
        if part.selection == "literal":
            # ranked by the score of label 1; flipped where the label with the better score isn't there
            changing.append((some, (some > 0) | ((some == 0) & (y == 1))))
            some.mul_(1 - 2 * y)
        elif batch.counts is not None:
            some.mul_(batch.counts[: access.n])
    taken = take_within_(gains, batch.samples, access, scratch)
    for some, change in changing:
        some.mul_(change)
    return count_mask(gains) if changing else taken


def greedy_of_several(
    scores: Tensor, batch: Batch, access: RoundAccess, parts: Sequence[Part], priority: Tensor, scratch: Tensor
) -> Change:
    """The labels that greedy attackers write with several classes, see `attack.labels.greedy`.

    Parameters
    ----------
    scores : (M, C, n) tensor
        Scores along the direction of each cell.
    batch, access, parts
        As `greedy_of_two` takes them.
    priority, scratch : (M, n) tensor
        Memory that is overwritten.

    Returns
    -------
    Change
    """
    y = batch.y[: access.n]
    torch.amax(scores, 1, out=priority)
    for part in parts:
        if part.selection == "gain":
            some = priority[part.cells]
            some.sub_(scores[part.cells].gather(1, y.expand(len(some), 1, access.n))[:, 0])
            if batch.counts is not None:
                some.mul_(batch.counts[: access.n])
    take_within_(priority, batch.samples, access, scratch)
    cells, columns = priority.nonzero(as_tuple=True)
    return Change(cells, columns, scores[cells, :, columns].argmax(-1)).differing(batch.y)


def of_proposal(proposal: attack.Proposal, batch: Batch, access: RoundAccess, scratch: Tensor) -> Change:
    """The labels that an attack changes by its proposal, within the budgets.

    Parameters
    ----------
    proposal : attack.Proposal
        Labels and priorities, (M, n) or (n,).
    batch : Batch
        The minibatch, whose first n samples these are.
    access : RoundAccess
        What may be written, and how much of it; its `selection_plans` must not be None.
    scratch : (M, n) tensor
        Memory that is overwritten.

    Returns
    -------
    Change
    """
    priority = proposal.priority.to(scratch.dtype).expand(scratch.shape).clone()
    take_within_(priority, batch.samples, access, scratch)
    cells, columns = priority.nonzero(as_tuple=True)
    return Change(cells, columns, proposal.labels.expand(scratch.shape)[cells, columns]).differing(batch.y)


def take_within_(
    priority: Tensor, samples: NDArray[np.int64], access: RoundAccess, scratch: Tensor
) -> NDArray[np.int64]:
    """Turn priorities into the choice of the samples that the budgets allow, in place.

    Parameters
    ----------
    priority : (M, n) tensor
        It becomes 1 for samples that are chosen, else 0.
    samples : array of int, (n,) or longer
        Their positions in the training set, by which ties are broken.
    access, scratch
        As `of_proposal` takes them.

    Returns
    -------
    array of int, (M,)
        How many samples each cell has chosen.
    """
    plans = access.selection_plans
    assert plans is not None
    if access.write_mask is not None:
        priority.add_(access.write_mask)
    if len(plans) == 1 and access.groups[0].stop - access.groups[0].start == access.n:
        return kernels.take_largest_(priority, plans[0], scratch, samples[: access.n])
    taken, within = np.zeros(len(priority), np.int64), torch.zeros_like(priority)
    for part, plan in zip(access.groups, plans, strict=True):
        own_scratch = scratch.view(-1)[: len(priority) * (part.stop - part.start)].view(len(priority), -1)
        taken += kernels.take_largest_(priority[:, part], plan, own_scratch, samples[part])
        within[:, part] = priority[:, part]
    priority.copy_(within)  # between the groups there may be columns that are in none
    return taken
