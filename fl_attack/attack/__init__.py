"""What malicious clients do: the table of attacks, the direction that some of them push against, and budgets."""

import typing
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fl_attack import plugins
from fl_attack.attack import gradients, labels
from fl_attack.attack.budget import Refresh, Rounding, Scope, attacked_before, flip_allowance, select
from fl_attack.attack.gradients import Updates
from fl_attack.attack.labels import Proposal, Selection, View
from fl_attack.errors import InputError

__all__ = [
    "ATTACKS",
    "Attack",
    "Goal",
    "Knowledge",
    "Proposal",
    "Refresh",
    "Rounding",
    "Scope",
    "Selection",
    "Updates",
    "View",
    "attacked_before",
    "direction",
    "find",
    "flip_allowance",
    "flipped_target",
    "select",
]

Goal = Literal["untargeted", "targeted"]
Knowledge = Literal["full", "honest", "noisy", "own"]


class Attack(NamedTuple):
    """An attack: its function, what it writes, and which of the keys that shape a direction have a meaning for it."""

    function: Callable[..., Any]  # View -> Proposal (labels) or Updates -> Tensor (updates), and arguments by name
    writes: Literal["labels", "updates"]
    uses: tuple[str, ...] = ()


AIMED = ("goal", "knowledge", "target_path")
ATTACKS: dict[str, Attack] = {
    "greedy": Attack(labels.greedy, "labels", (*AIMED, "selection")),
    "random_flip": Attack(labels.random_flip, "labels"),
    "static_flip": Attack(labels.static_flip, "labels"),
    "confidence_flip": Attack(labels.confidence_flip, "labels"),
    "sign_flip": Attack(gradients.sign_flip, "updates"),
    "gaussian": Attack(gradients.gaussian, "updates"),
    "ipm": Attack(gradients.ipm, "updates"),
    "alie": Attack(gradients.alie, "updates"),
    "mimic": Attack(gradients.mimic, "updates"),
    "gradient_max": Attack(gradients.gradient_max, "updates", AIMED),
}


def find(name: str) -> Attack:
    """The attack of a name of the table, or of the import path of a user's function; InputError where there is none.

    A user's function writes updates if its first parameter is annotated as `Updates`, else labels.
    """
    if name in ATTACKS:
        return ATTACKS[name]
    if "." not in name and ":" not in name:
        known = ", ".join(("none", *ATTACKS))
        raise InputError(f"name={name} is not an attack; known: {known}, or the import path of a function")
    function = plugins.load(name)
    first = next(iter(signature(function).parameters), "")
    kind = typing.get_type_hints(function).get(first)
    return Attack(function, "updates" if kind is Updates else "labels", (*AIMED, "selection"))


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """InputError where an attack does not take these arguments."""
    parameters = list(signature(find(name).function).parameters.values())[1:]
    known = [one.name for one in parameters if one.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    unknown = [key for key in args if key not in known]
    if unknown and not any(one.kind is Parameter.VAR_KEYWORD for one in parameters):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InputError(f"args.{unknown[0]} is not an argument of name={name}; {takes}")


def direction(goal: Goal, theta: Tensor, clean_gradient: Tensor | None, target: Tensor | None) -> Tensor:
    """The direction v whose inner product with the gradient is minimised, (..., C, d).

    Untargeted, the clean gradient: the update is turned away from the honest one. Targeted, `target - theta`:
    the update is turned towards the target.
    """
    v = clean_gradient if goal == "untargeted" else target - theta if target is not None else None
    if v is None:
        raise ValueError(f"an attack with goal={goal} needs its clean gradient or target")
    return v


def flipped_target(y: Tensor, classes: int) -> Tensor:
    """The fully flipped labels that a targeted attacker steers to: y + 1 modulo classes (0 <-> 1 in binary)."""
    return (y + 1) % classes
