"""How the server combines the updates of clients: the tables of rules and of pre-aggregators.

Shapes: updates (..., m, C, d), weights (m,), client_order (m,), aggregate (..., C, d).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fl_attack import plugins
from fl_attack.aggregate import byzfl, pre, rules
from fl_attack.errors import InputError

__all__ = ["PRE", "RULES", "Combine", "Pre", "Rule", "is_builtin", "is_known", "make"]

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""updates (..., m, C, d), weights (m,) and client_order (m,), a random order, to the aggregate (..., C, d)."""

PreEntry = str | Mapping[str, Mapping[str, Any]]
"""A pre-aggregator by its name, or `{name: arguments}`."""


class Rule(NamedTuple):
    """A rule and the largest number of malicious clients for which it is defined."""

    combine: Callable[..., Tensor]  # updates (..., m, C, d), weights (m,), f, and arguments by name: (..., C, d)
    max_f: Callable[[int], int]  # of m clients


class Pre(NamedTuple):
    """A pre-aggregator, and how many updates it makes of m."""

    apply: Callable[..., tuple[Tensor, Tensor]]  # updates, weights, f, client_order, and arguments by name
    remaining: Callable[..., int] = lambda m, **args: m


RULES: dict[str, Rule] = {
    "mean": Rule(rules.mean, rules.any_f),
    "median": Rule(rules.median, rules.any_f),
    "trimmed_mean": Rule(rules.trimmed_mean, rules.max_f_below_half),
    "krum": Rule(rules.krum, rules.max_f_of_krum),
    "multi_krum": Rule(rules.multi_krum, rules.max_f_of_krum),
    "bulyan": Rule(rules.bulyan, rules.max_f_of_bulyan),
    "geometric_median": Rule(rules.geometric_median, rules.any_f),
    "centered_clipping": Rule(rules.centered_clipping, rules.any_f),
    "norm_clipping": Rule(rules.norm_clipping, rules.any_f),
    "meamed": Rule(rules.meamed, rules.max_f_below_half),
}
PRE: dict[str, Pre] = {
    "nnm": Pre(pre.nnm),
    "bucketing": Pre(pre.bucketing, lambda m, s=2: -(-m // s)),
    "clipping": Pre(pre.clipping),
}


def is_known(name: str) -> bool:
    """Whether there may be a rule of this name: of the table, ByzFL's, or the import path of a function."""
    return name in RULES or name == "byzfl" or plugins.is_path(name)


def is_builtin(name: str, pre: Sequence[PreEntry] = ()) -> bool:
    """Whether a rule and its pre-aggregators are of these tables; those of others may not run in threads."""
    return name in RULES and all((entry if isinstance(entry, str) else next(iter(entry))) in PRE for entry in pre)


def make(
    name: str,
    *,
    f: int,
    m: int,
    args: Mapping[str, Any] = {},
    pre: Sequence[PreEntry] = (),
    rule: str | None = None,
) -> Combine:
    """The function of a rule after its pre-aggregators.

    Parameters
    ----------
    name : str
        One of `RULES`, `byzfl`, or the import path of a function `(updates, weights, f, **args)`.
    f : int
        How many clients may be malicious.
    m : int
        Clients of a round.
    args : mapping
        Arguments of the rule by name.
    pre : sequence
        Pre-aggregators in the order in which they are applied.
    rule : str, optional
        The name of a class of ByzFL's, with `name="byzfl"`.

    Returns
    -------
    Combine
        Updates, weights and a random order of the clients to the aggregate. Its input is not changed.

    Raises
    ------
    InputError
        Where the rule is unknown or undefined for these numbers, or does not take an argument.
    """
    if f > m:
        raise InputError(f"strategy.f={f} is more than the {m} clients of a round")
    steps, remaining = _pre_aggregators(pre, f, m)
    if any(step.keywords.get("name") == "NNM" for step in steps) and rule == "CAF":
        raise InputError("strategy.rule=CAF never ends after NNM; use another rule or leave NNM out")
    combine = _rule(name, f, remaining, args, rule)

    def combined_rule(updates: Tensor, weights: Tensor, client_order: Tensor) -> Tensor:
        """The aggregate by the rule of what the pre-aggregators make of the updates."""
        for step in steps:
            updates, weights = step(updates, weights, f, client_order)
            client_order = client_order[client_order < len(weights)]  # still a random order, of those that remain
        return combine(updates, weights, client_order)

    return combined_rule


def _rule(name: str, f: int, m: int, args: Mapping[str, Any], byzfl_class: str | None) -> Combine:
    """The function of a rule for m updates, without pre-aggregators."""
    if name == "byzfl":
        if byzfl_class is None:
            raise InputError(f"strategy.rule is missing; give one of ByzFL's: {', '.join(byzfl.RULES)}")
        aggregator = byzfl.make(byzfl_class, byzfl.RULES, "strategy.rule", f, m, args)
        return lambda updates, weights, client_order: aggregator(updates, client_order)
    if name in RULES:
        max_f = RULES[name].max_f(m)
        if f > max_f:
            way_out = f"use at most {max_f}" if max_f >= 0 else "use more clients"
            raise InputError(f"strategy.f={f} is too many for strategy={name} of {m} clients; {way_out}")
        function = RULES[name].combine
        _check_names(function, name, "strategy.args", args)
        _check_call(lambda: function(*_probe(m), f, **args), f"strategy.args of strategy={name}")
        return lambda updates, weights, client_order: function(updates, weights, f, **args)
    if plugins.is_path(name):
        try:
            signature(plugins.load(name)).bind(None, None, f, **args)
        except TypeError as error:
            raise InputError(f"strategy.args of {name}: {error}; a rule takes updates, weights, f and these") from None
        return lambda updates, weights, client_order: _user_rule(name, updates, weights, f, args)
    raise InputError(
        f"strategy.name={name} is not a strategy; known: {', '.join((*RULES, 'byzfl', 'flower'))}, or the import "
        "path of a function"
    )


def _user_rule(name: str, updates: Tensor, weights: Tensor, f: int, args: Mapping[str, Any]) -> Tensor:
    """What a user's rule makes of copies of its input; RunError where it is no aggregate."""
    made = plugins.call(name, updates.clone(), weights.clone(), f, **args)
    expected = (*updates.shape[:-3], *updates.shape[-2:])
    wanted = f"wanted: an aggregate of shape {expected}, real and finite where the updates are"
    if not isinstance(made, Tensor):
        plugins.refuse(name, type(made).__name__, wanted)
    if tuple(made.shape) != expected or made.dtype.is_complex:
        plugins.refuse(name, f"shape {tuple(made.shape)}, {str(made.dtype).removeprefix('torch.')}", wanted)
    broken = ~made.isfinite().flatten(-2).all(-1) & updates.isfinite().flatten(-3).all(-1)
    if broken.any():
        plugins.refuse(name, "NaN or infinity", wanted)
    return made.to(updates)


def _pre_aggregators(pre: Sequence[PreEntry], f: int, m: int) -> tuple[list[Any], int]:
    """The pre-aggregators as functions of updates, weights, f and client_order; and how many updates they leave."""
    steps: list[Any] = []
    for entry in pre:
        name, args = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        if name in byzfl.PRE:
            function = byzfl.make(name, byzfl.PRE, "strategy.pre", f, m, args)
            m = len(function(_probe(m)[0], torch.arange(m)))
            steps.append(partial(_byzfl_pre, function, name=name))
            continue
        if name not in PRE:
            raise InputError(f"strategy.pre={name} is not known; known: {', '.join((*PRE, *byzfl.PRE))}")
        _check_names(PRE[name].apply, name, "strategy.pre", args)
        if not (isinstance(args.get("s", 2), int) and args.get("s", 2) >= 1):
            raise InputError(f"strategy.pre: s={args['s']} of {name} must be a whole number of at least 1")
        steps.append(partial(PRE[name].apply, **args))
        _check_call(lambda: steps[-1](*_probe(m), 0, torch.arange(m)), f"strategy.pre={name}")  # noqa: B023
        m = PRE[name].remaining(m, **({"s": args["s"]} if "s" in args else {}))
    return steps, m


def _byzfl_pre(
    function: Callable[..., Tensor], updates: Tensor, weights: Tensor, f: int, client_order: Tensor, *, name: str
) -> tuple[Tensor, Tensor]:
    """Updates after a pre-aggregator of ByzFL's, and their weights: equal ones where it changes their number."""
    made = function(updates, client_order)
    return made, weights if made.shape[-3] == len(weights) else torch.ones(made.shape[-3])


def _check_names(function: Callable[..., Any], name: str, key: str, args: Mapping[str, Any]) -> None:
    """InputError where a function does not take arguments of these names."""
    takes = [one.name for one in signature(function).parameters.values() if one.kind is Parameter.KEYWORD_ONLY]
    unknown = [one for one in args if one not in takes]
    if unknown:
        raise InputError(f"{key}: {unknown[0]} is not an argument of {name}; it takes {', '.join(takes) or 'none'}")


def _check_call(call: Callable[[], Any], what: str) -> None:
    """InputError where a trial call fails, as on an argument of the wrong kind or one that the function refuses."""
    try:
        call()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from None


def _probe(m: int) -> tuple[Tensor, Tensor]:
    """Updates (m, 1, 1) and weights (m,) for a trial call."""
    return torch.arange(m, dtype=torch.float64).view(m, 1, 1), torch.ones(m)
