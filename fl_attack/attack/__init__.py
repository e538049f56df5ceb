"""What malicious clients do: the table of attacks, the direction that some of them push against, and budgets."""

import typing
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import torch
from torch import Tensor

from fl_attack import plugins
from fl_attack.attack import gradients, labels
from fl_attack.attack.adapt import PERCENTS, dealt_out, most_harmful
from fl_attack.attack.budget import attacked_before, flip_allowance, select
from fl_attack.attack.directions import DIRECTIONS, Aim, direction_of, find_direction, scores_along
from fl_attack.attack.gradients import Updates
from fl_attack.attack.harm import smoothed_error, smoothed_error_residuals
from fl_attack.attack.labels import Proposal, View, planned_options
from fl_attack.choices import Adapt as Adapt
from fl_attack.choices import Foresight as Foresight
from fl_attack.choices import Goal as Goal
from fl_attack.choices import Knowledge as Knowledge
from fl_attack.choices import Memory as Memory
from fl_attack.choices import Objective as Objective
from fl_attack.choices import Refresh as Refresh
from fl_attack.choices import Rounding as Rounding
from fl_attack.choices import Scope as Scope
from fl_attack.choices import Selection as Selection
from fl_attack.errors import InputError, one_line
from fl_attack.overrides import did_you_mean

__all__ = [
    "ATTACKS",
    "DIRECTIONS",
    "PERCENTS",
    "Adapt",
    "Aim",
    "Attack",
    "Foresight",
    "Goal",
    "Knowledge",
    "Memory",
    "Objective",
    "Proposal",
    "Refresh",
    "Rounding",
    "Scope",
    "Selection",
    "Updates",
    "View",
    "attacked_before",
    "craft",
    "dealt_out",
    "direction_of",
    "find",
    "find_direction",
    "flip_allowance",
    "flipped_target",
    "most_harmful",
    "planned_options",
    "propose",
    "scores_along",
    "select",
    "smoothed_error",
    "smoothed_error_residuals",
    "try_args",
]


class Attack(NamedTuple):
    """An attack: its function, what it writes, and which of the keys that shape a direction have a meaning for it."""

    function: Callable[..., Any]  # View -> Proposal (labels) or Updates -> Tensor (updates), and arguments by name
    writes: Literal["labels", "updates"]
    uses: tuple[str, ...] = ()
    tries: tuple[str, tuple[float, ...]] | None = None  # an argument, and values that adapting attackers try besides


AIMED = ("goal", "direction", "knowledge", "target_path")
FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
ATTACKS: dict[str, Attack] = {
    "greedy": Attack(labels.greedy, "labels", (*AIMED, "selection")),
    "random_flip": Attack(labels.random_flip, "labels"),
    "static_flip": Attack(labels.static_flip, "labels"),
    "confidence_flip": Attack(labels.confidence_flip, "labels"),
    "sign_flip": Attack(gradients.sign_flip, "updates", (), ("scale", FACTORS)),
    "gaussian": Attack(gradients.gaussian, "updates"),
    "ipm": Attack(gradients.ipm, "updates", (), ("epsilon", FACTORS)),
    "alie": Attack(gradients.alie, "updates", (), ("z", (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0))),
    "mimic": Attack(gradients.mimic, "updates"),
    "minmax": Attack(gradients.minmax, "updates"),
    "minsum": Attack(gradients.minsum, "updates"),
    "gradient_max": Attack(gradients.gradient_max, "updates", AIMED),
    "planned": Attack(labels.planned, "labels", ("objective", "foresight", "horizon", "selection")),
}


def find(name: str) -> Attack:
    """The attack of a name of the table, or of the import path of a user's function; InputError where there is none.

    A user's function writes updates if its first parameter is annotated as `Updates`, else labels.
    """
    if name in ATTACKS:
        return ATTACKS[name]
    if not plugins.is_path(name):
        known = ("none", *ATTACKS)
        raise InputError(f"{plugins.unknown_name('name', name, 'an attack', known)}{did_you_mean(name, known)}")
    function = plugins.load(name)
    first = next(iter(signature(function).parameters), "")
    kind = typing.get_type_hints(function).get(first)
    return Attack(function, "updates" if kind is Updates else "labels", (*AIMED, "selection"))


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Check that an attack takes arguments.

    Parameters
    ----------
    name : str
        A name of `ATTACKS`, or the import path of a function.
    args : mapping
        Arguments by name.

    Raises
    ------
    InputError
        Where the attack is not known, or an argument is unknown, missing or of another type.
    """
    parameters = list(signature(find(name).function).parameters.values())[1:]
    known = plugins.check_keywords(name, parameters, args)
    for one in parameters:
        if one.default is Parameter.empty and one.name in known and one.name not in args:
            raise InputError(f"args.{one.name} is missing; name={name} has no default for it")
    hints = typing.get_type_hints(find(name).function)
    for key, value in args.items():
        _check_type(f"args.{key}", value, hints.get(key, Any))


def _check_type(key: str, value: Any, hint: Any) -> None:
    """InputError where a value is not of the type that an argument is annotated with."""
    chosen = typing.get_origin(hint) in (Literal, Union, UnionType)  # of a list[int] the value is no whole number
    kinds = typing.get_args(hint) if chosen else (hint,)
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", NoneType: "null"}
    if typing.get_origin(hint) is not Literal and any(kind not in wanted for kind in kinds):
        return  # an annotation that we can't judge
    if typing.get_origin(hint) is Literal:
        fits, named = value in kinds, [str(kind) for kind in kinds]
    else:
        numbers = (float, int) if float in kinds else ()
        fits = isinstance(value, (*kinds, *numbers)) and (not isinstance(value, bool) or bool in kinds)
        named = [wanted[kind] for kind in kinds]
    if not fits:
        raise InputError(f"{key}={value} is not allowed; it must be {' or '.join(named)}")


def try_args(name: str, args: Mapping[str, Any], classes: int) -> None:
    """Check that an attack of the table takes the values of arguments, by calling it on a made-up round.

    Parameters
    ----------
    name, args
        As `check_args` takes them; others than those of the table are not called.
    classes : int
        The number of labels.

    Raises
    ------
    InputError
        Where the attack refuses a value, with what it says.
    """
    if name not in ATTACKS:
        return
    some = torch.zeros(classes, classes)
    try:
        if ATTACKS[name].writes == "labels":
            noise = torch.zeros(classes, 2)
            ATTACKS[name].function(
                View(torch.arange(classes), noise[:, 0], scores=some, logits=some, noise=noise),
                **args,
            )
        else:
            updates, malicious = torch.zeros(3, 1, 2), torch.tensor([True, False, False])
            lazy = {"direction": lambda: updates[0], "noise": lambda: updates}
            ATTACKS[name].function(Updates(updates, malicious, **lazy), **args)
    except Exception as error:  # a value that the function refuses
        raise InputError(f"attack.args of attack={name}: {one_line(error)}") from None


def propose(name: str, view: View, args: Mapping[str, Any], shape: Sequence[int], classes: int) -> Proposal:
    """What an attack on labels proposes.

    Parameters
    ----------
    name : str
        A name of `ATTACKS`, or the import path of a function.
    view : View
        What the attackers see in the round; a user's function gets a copy.
    args : mapping
        Arguments of the attack by name.
    shape : sequence of int
        Shape (..., n) of the labels: leading axes, and the number n of samples.
    classes : int
        The number of labels.

    Returns
    -------
    Proposal
        Labels and priorities, (..., n) or (n,).

    Raises
    ------
    RunError
        Where a user's function gives no proposal.
    """
    if name in ATTACKS:
        returned: Proposal = ATTACKS[name].function(view, **args)
        return returned
    returned = plugins.call(name, view.copied(), **args)
    if not (
        isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(tensor, Tensor) for tensor in returned)
    ):
        plugins.refuse(name, _describe(returned), "wanted: Proposal(labels, priority), two tensors")
    labels, priority = returned
    for what, tensor in (("labels", labels), ("priority", priority)):
        if tuple(tensor.shape) not in {tuple(shape), tuple(shape[-1:])}:
            plugins.refuse(name, f"{what} of {_describe(tensor)}", f"wanted: one for each of {shape[-1]} samples")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        plugins.refuse(name, f"labels of {_describe(labels)}", "wanted: whole numbers, as in int64")
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        plugins.refuse(name, f"the label {wrong}", f"wanted: 0 to {classes - 1}")
    if priority.dtype.is_complex or priority.isnan().any():
        what = _describe(priority) if priority.dtype.is_complex else "NaN"
        plugins.refuse(name, f"a priority of {what}", "wanted: real numbers, -inf where no flip is wanted")
    return Proposal(labels.long(), priority)


def craft(name: str, view: Updates, args: Mapping[str, Any]) -> Tensor:
    """What an attack on updates sends.

    Parameters
    ----------
    name, args
        As `propose` takes them.
    view : Updates
        What the attackers see in the round; a user's function gets a copy.

    Returns
    -------
    (..., m, C, d), (m, C, d) or (..., 1, C, d) tensor
        What each client would send as a malicious one, to be broadcast to (..., m, C, d): with one client in the place
        of m, all send the same.

    Raises
    ------
    RunError
        Where a user's function gives something else.
    """
    if name in ATTACKS:
        given: Tensor = ATTACKS[name].function(view, **args)
        return given
    given = plugins.call(name, view.copied(), **args)
    shape = view.updates.shape
    if not isinstance(given, Tensor) or given.shape[-3:] != shape[-3:] or given.shape not in (shape, shape[-3:]):
        plugins.refuse(name, _describe(given), f"wanted: an update for each client, {_describe(view.updates)}")
    if given.dtype.is_complex or given.isnan().any():
        what = _describe(given) if given.dtype.is_complex else "NaN"
        plugins.refuse(name, what, f"wanted: real numbers, {_describe(view.updates)}")
    return given.to(view.updates)


def _describe(given: Any) -> str:
    """The type of what a function has given, or the shape and dtype of a tensor, for a message."""
    if not isinstance(given, Tensor):
        return f"{type(given).__name__}"
    return f"shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')}"


def flipped_target(y: Tensor, classes: int) -> Tensor:
    """The labels, all of them flipped, on which the parameters that a targeted attacker steers to are trained.

    Parameters
    ----------
    y : tensor of int64
        True labels, in any shape.
    classes : int
        The number of labels, C.

    Returns
    -------
    tensor of int64
        y + 1 modulo C, which swaps the labels of a binary task.
    """
    return (y + 1) % classes
