"""Attacks on labels: what each would write, and which samples it wants most.

In one round the greedy attacker wants the gradient's inner product with a direction v as small as it can be made.
That product is linear in the encoded labels, so relabelling sample n from y to c changes it by
`(scores[n, y] - scores[n, c]) / |B|`, whatever else is flipped: the best class of each sample, and the samples with
the largest gains, are the exact optimum (arXiv 2503.00140; the tests prove it by brute force).

An attack is one function `View -> Proposal` and one row of `attack.ATTACKS`; budget, scope, rounding and schedule are
applied to what it proposes. Shapes: n samples that the attacker may write, in ascending order of their index; leading
axes broadcast.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fl_attack.choices import Selection as Selection

MaybeLazy = Tensor | Callable[[], Tensor]


class View:
    """What a label attack sees of a round. What takes work is worked out when it is first asked for."""

    def __init__(
        self,
        y: Tensor,
        w: Tensor,
        *,
        scores: MaybeLazy,
        logits: MaybeLazy,
        noise: MaybeLazy,
        selection: Selection = "gain",
    ) -> None:
        """`scores`, `logits` and `noise` are the tensors of the properties so named, or functions that return them."""
        self.y = y  # (n,) true labels
        self.w = w  # (n,) how often the sample is used in this round
        self.selection = selection
        self._lazy = scores, logits, noise

    def copied(self) -> "View":
        """A copy of the view in memory of its own, so that whoever writes into it changes nothing else."""
        lazy = (lambda: self.scores.clone()), (lambda: self.logits.clone()), (lambda: self.noise.clone())
        return View(
            self.y.clone(), self.w.clone(), scores=lazy[0], logits=lazy[1], noise=lazy[2], selection=self.selection
        )

    @cached_property
    def scores(self) -> Tensor:
        """(..., n, classes) of `model.scores` along the direction."""
        return _worked_out(self._lazy[0])

    @cached_property
    def logits(self) -> Tensor:
        """(..., n, classes) at the broadcast parameters; two classes: 0 and the one logit."""
        return _worked_out(self._lazy[1])

    @cached_property
    def noise(self) -> Tensor:
        """(n, 2) uniform in [0, 1); a function of seed, round and sample."""
        return _worked_out(self._lazy[2])


def _worked_out(lazy: MaybeLazy) -> Tensor:
    """A tensor that is there or has yet to be computed."""
    return lazy if isinstance(lazy, Tensor) else lazy()


class Proposal(NamedTuple):
    """A label for each sample and how much the attacker wants it; -inf where it doesn't want it at all."""

    labels: Tensor  # (..., n) int64
    priority: Tensor  # (..., n)


def greedy(view: View) -> Proposal:
    """The label of each sample that lowers the objective most, with the priority `w (scores[label] - scores[y])`.

    Where no other label lowers it the priority is -inf. `literal` ranks as the paper's algorithms are printed: by the
    score of the new label alone (of two classes by that of label 1 less that of label 0), whether or not the sample
    already has it, so that part of the budget can go to flips that change nothing.
    """
    best, labels = view.scores.max(-1)
    if view.selection == "literal":
        binary = view.scores.shape[-1] == 2
        return Proposal(labels, view.scores[..., 1] - view.scores[..., 0] if binary else best)
    own = view.scores.gather(-1, view.y.expand(best.shape).unsqueeze(-1)).squeeze(-1)
    gain = (best - own) * view.w
    return Proposal(labels, gain.masked_fill(gain <= 0, -math.inf))


class PlannedOptions(NamedTuple):
    """The arguments of `planned`."""

    sweeps: int = 40
    starts: int = 4
    tolerance: float = 1e-4
    sample: int = 1000
    temperature: float = 0.3


def planned_options(args: Mapping[str, Any]) -> PlannedOptions:
    """The arguments of `planned` with their defaults; ValueError where one is not allowed."""
    options = PlannedOptions(**args)
    for name in ("sweeps", "starts", "sample"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is not allowed; it must be 1 or more")
    if not 0 <= options.tolerance < math.inf:
        raise ValueError(f"tolerance={options.tolerance} is not allowed; it must be 0 or more")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"temperature={options.temperature} is not allowed; it must be more than 0")
    return options


def planned(
    view: View,
    *,
    sweeps: int = 40,
    starts: int = 4,
    tolerance: float = 1e-4,
    sample: int = 1000,
    temperature: float = 0.3,
) -> Proposal:
    """What `greedy` proposes; a run does not ask for it, but takes its flips from `plans`, made with these arguments.

    Parameters
    ----------
    view : View
        What the attackers see of the round.
    sweeps : int
        The largest number of sweeps (passes over all planned rounds) that improve a plan from each start.
    starts : int
        How many plans are begun, of which the best is taken.
    tolerance : float
        A plan that gains less harm in eight sweeps is ended.
    sample : int
        The number of training samples that harm is measured on.
    temperature : float
        The temperature of the smoothed error, which is the harm; see `harm.smoothed_error`.

    Raises
    ------
    ValueError
        Where an argument is out of range.
    """
    given = {"sweeps": sweeps, "starts": starts, "tolerance": tolerance, "sample": sample, "temperature": temperature}
    planned_options(given)
    return greedy(view)


def random_flip(view: View) -> Proposal:
    """Samples at random (uniform priorities), each to one of the other classes at random."""
    classes = view.logits.shape[-1]
    step = 1 + (view.noise[:, 1] * (classes - 1)).long().clamp(max=classes - 2)
    return Proposal((view.y + step) % classes, view.noise[:, 0])


def static_flip(
    view: View,
    *,
    map: Literal["opposite", "cyclic"] = "opposite",
    source: int | None = None,
    target: int | None = None,
) -> Proposal:
    """Samples at random, by a fixed map of labels; those whose label it does not change have priority -inf.

    Parameters
    ----------
    view : View
        What the attackers see of the round.
    map : {"opposite", "cyclic"}
        The map of labels: y to C - 1 - y, or y to y + 1 modulo C.
    source, target : int, optional
        With both, only samples of the one class are flipped, to the other.

    Raises
    ------
    ValueError
        Where only one of source and target is given, they are no two different labels, or map is not known.

    References
    ----------
    Fang et al., https://arxiv.org/abs/1911.11815 (opposite); Tolpegin et al., https://arxiv.org/abs/2007.08432 (source,
    target).
    """
    classes = view.logits.shape[-1]
    if (source is None) != (target is None):
        raise ValueError("source and target go together: give both or none")
    if map not in ("opposite", "cyclic"):
        raise ValueError(f"map={map} is not known; use opposite or cyclic")
    if source is not None and target is not None:
        if not (0 <= source < classes and 0 <= target < classes and source != target):
            raise ValueError(f"source={source} target={target} must be two different labels from 0 to {classes - 1}")
        labels = torch.where(view.y == source, target, view.y)
    else:
        labels = classes - 1 - view.y if map == "opposite" else (view.y + 1) % classes
    return Proposal(labels, view.noise[:, 0].masked_fill(labels == view.y, -math.inf))


def confidence_flip(view: View, *, certain: Literal["most", "least"] = "most") -> Proposal:
    """The samples whose true label the model is most, or least, certain of, each to the likeliest other class.

    Parameters
    ----------
    view : View
        What the attackers see of the round, with the logits.
    certain : {"most", "least"}
        Certainty is the margin: the logit of the true label above the largest other one.

    Raises
    ------
    ValueError
        Where `certain` is neither.
    """
    if certain not in ("most", "least"):
        raise ValueError(f"certain={certain} is not known; use most or least")
    true = view.y.expand(view.logits.shape[:-1]).unsqueeze(-1)
    others, labels = view.logits.scatter(-1, true, -math.inf).max(-1)
    margin = view.logits.gather(-1, true).squeeze(-1) - others
    return Proposal(labels, margin if certain == "most" else -margin)
