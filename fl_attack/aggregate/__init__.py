"""How the server combines what clients send: the tables of rules and of what can be done before them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fl_attack import plugins
from fl_attack.aggregate import byzfl, pre, rules
from fl_attack.errors import InputError

__all__ = ["PRE", "RULES", "Combine", "Pre", "Rule", "known", "make", "ours"]

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""updates (..., m, C, d), weights (m,) and lots (m,), a random order of the clients, to the aggregate (..., C, d)."""


class Rule(NamedTuple):
    """A rule and the largest f for which it is defined."""

    combine: Callable[..., Tensor]  # updates (..., m, C, d), weights (m,), f, and arguments by name: (..., C, d)
    most: Callable[[int], int]  # of m clients


class Pre(NamedTuple):
    """A pre-aggregator, and how many updates it makes of m."""

    apply: Callable[..., tuple[Tensor, Tensor]]  # updates, weights, f, lots, and arguments by name
    left: Callable[..., int] = lambda m, **args: m


def _all(m: int) -> int:
    return m


RULES: dict[str, Rule] = {
    "mean": Rule(rules.mean, _all),
    "median": Rule(rules.median, _all),
    "trimmed_mean": Rule(rules.trimmed_mean, rules.half),
    "krum": Rule(rules.krum, rules.krum_most),
    "multi_krum": Rule(rules.multi_krum, rules.krum_most),
    "bulyan": Rule(rules.bulyan, rules.bulyan_most),
    "geometric_median": Rule(rules.geometric_median, _all),
    "centered_clipping": Rule(rules.centered_clipping, _all),
    "norm_clipping": Rule(rules.norm_clipping, _all),
    "meamed": Rule(rules.meamed, rules.half),
}
PRE: dict[str, Pre] = {
    "nnm": Pre(pre.nnm),
    "bucketing": Pre(pre.bucketing, lambda m, s=2: -(-m // s)),
    "clipping": Pre(pre.clipping),
}


def known(name: str) -> bool:
    """Whether there may be a rule of this name."""
    return name in RULES or name == "byzfl" or plugins.is_path(name)


def ours(name: str, pre: Sequence[str | Mapping[str, Mapping[str, Any]]] = ()) -> bool:
    """Whether a rule and what goes before it are of these tables: other people's may not be called side by side."""
    return name in RULES and all((one if isinstance(one, str) else next(iter(one))) in PRE for one in pre)


def make(
    name: str,
    *,
    f: int,
    m: int,
    args: Mapping[str, Any] = {},
    pre: Sequence[str | Mapping[str, Mapping[str, Any]]] = (),
    rule: str | None = None,
) -> Combine:
    """The function of a rule and what goes before it, for m clients of which f may be malicious.

    `name` is one of `RULES`, `byzfl` (then `rule` is the name of a class of ByzFL's), or the import path of a function
    `(updates, weights, f, **args)`. InputError where it is undefined for these.
    """
    if f > m:
        raise InputError(f"strategy.f={f} is more than the {m} clients of a round")
    steps, left = _steps(pre, f, m)
    if any(step.keywords.get("name") == "NNM" for step in steps) and rule == "CAF":
        raise InputError("strategy.rule=CAF never ends after NNM; use another rule or leave NNM out")
    if name == "byzfl":
        if rule is None:
            raise InputError(f"strategy.rule is missing; give one of ByzFL's: {', '.join(byzfl.RULES)}")
        theirs = byzfl.make(rule, byzfl.RULES, "strategy.rule", f, left, args)
        combine: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda updates, weights, lots: theirs(updates, lots)  # noqa: E731
    elif name in RULES:
        most = RULES[name].most(left)
        if f > most:
            way = f"use at most {most}" if most >= 0 else "use more clients"
            raise InputError(f"strategy.f={f} is too many for strategy={name} of {left} clients; {way}")
        combine = _bound(RULES[name].combine, name, "strategy.args", f, left, args)
    elif plugins.is_path(name):
        try:
            signature(plugins.load(name)).bind(None, None, f, **args)
        except TypeError as error:
            raise InputError(f"strategy.args of {name}: {error}; a rule takes updates, weights, f and these") from None
        combine = lambda updates, weights, lots: _of_user(name, updates, weights, f, args)  # noqa: E731
    else:
        raise InputError(
            f"strategy.name={name} is not a strategy; known: {', '.join((*RULES, 'byzfl', 'flower'))}, or the import "
            "path of a function"
        )

    def all_of_it(updates: Tensor, weights: Tensor, lots: Tensor) -> Tensor:
        for step in steps:
            updates, weights = step(updates, weights, f, lots)
            lots = lots[lots < len(weights)]  # still a random order, of what is left
        return combine(updates, weights, lots)

    return all_of_it


def _of_user(name: str, updates: Tensor, weights: Tensor, f: int, args: Mapping[str, Any]) -> Tensor:
    """What a user's rule makes of copies; RunError where it is no aggregate."""
    made = plugins.call(name, updates.clone(), weights.clone(), f, **args)
    wanted = (*updates.shape[:-3], *updates.shape[-2:])
    told = f"wanted: an aggregate of shape {wanted}, real and finite where the updates are"
    if not isinstance(made, Tensor):
        plugins.refuse(name, type(made).__name__, told)
    if tuple(made.shape) != wanted or made.dtype.is_complex:
        plugins.refuse(name, f"shape {tuple(made.shape)}, {str(made.dtype).removeprefix('torch.')}", told)
    broken = ~made.isfinite().flatten(-2).all(-1) & updates.isfinite().flatten(-3).all(-1)
    if broken.any():
        plugins.refuse(name, "NaN or infinity", told)
    return made.to(updates)


def _steps(pre: Sequence[str | Mapping[str, Mapping[str, Any]]], f: int, m: int) -> tuple[list[Any], int]:
    """The pre-aggregators as functions, and how many updates they leave."""
    steps: list[Any] = []
    for entry in pre:
        name, args = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        if name in byzfl.PRE:
            theirs = byzfl.make(name, byzfl.PRE, "strategy.pre", f, m, args)
            m = len(theirs(torch.arange(m, dtype=torch.float64).view(m, 1, 1), torch.arange(m)))
            steps.append(partial(_theirs, theirs, name=name))
            continue
        if name not in PRE:
            raise InputError(f"strategy.pre={name} is not known; known: {', '.join((*PRE, *byzfl.PRE))}")
        _check(PRE[name].apply, name, "strategy.pre", args)
        if not (isinstance(args.get("s", 2), int) and args.get("s", 2) >= 1):
            raise InputError(f"strategy.pre: s={args['s']} of {name} must be a whole number of at least 1")
        steps.append(partial(PRE[name].apply, **args))
        _try(lambda: steps[-1](*_sample(m), 0, torch.arange(m)), f"strategy.pre={name}")  # noqa: B023
        m = PRE[name].left(m, **({"s": args["s"]} if "s" in args else {}))
    return steps, m


def _theirs(
    function: Callable[..., Tensor], updates: Tensor, weights: Tensor, f: int, lots: Tensor, *, name: str
) -> tuple[Tensor, Tensor]:
    made = function(updates, lots)
    return made, weights if made.shape[-3] == len(weights) else torch.ones(made.shape[-3])


def _bound(
    function: Callable[..., Tensor], name: str, key: str, f: int, m: int, args: Mapping[str, Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    _check(function, name, key, args)
    _try(lambda: function(*_sample(m), f, **args), f"{key} of strategy={name}")
    return lambda updates, weights, lots: function(updates, weights, f, **args)


def _check(function: Callable[..., Any], name: str, key: str, args: Mapping[str, Any]) -> None:
    takes = [one.name for one in signature(function).parameters.values() if one.kind is Parameter.KEYWORD_ONLY]
    unknown = [one for one in args if one not in takes]
    if unknown:
        raise InputError(f"{key}: {unknown[0]} is not an argument of {name}; it takes {', '.join(takes) or 'none'}")


def _sample(m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(m, dtype=torch.float64).view(m, 1, 1), torch.ones(m)


def _try(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except InputError:
        raise
    except Exception as error:  # a value of the wrong kind, or one that the function refuses
        raise InputError(f"{what}: {' '.join(str(error).split())}") from None
