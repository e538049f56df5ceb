"""How the server combines the updates of clients: the tables of rules and of pre-aggregators.

Shapes: updates (..., m, C, d), weights (m,), client_order (m,), aggregate (..., C, d). What a rule remembers between
rounds is an argument and a result, so that whoever runs the rounds keeps it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fl_attack import plugins
from fl_attack.aggregate import byzfl, defences, pre, rules, weiszfeld
from fl_attack.aggregate.defences import Seen, State
from fl_attack.errors import InputError, one_line

__all__ = ["PRE", "RULES", "Combine", "Pre", "Rule", "Seen", "State", "is_builtin", "is_known", "make", "needs", "sees"]

NOTHING = Seen()
_GIVEN = {"seen", "state"}  # arguments that rules don't get from the settings
PreEntry = str | Mapping[str, Mapping[str, Any]]
"""A pre-aggregator by its name, or `{name: arguments}`."""


class Rule(NamedTuple):
    """A rule, the largest number of malicious clients for which it is defined, and which laws it does not keep."""

    # updates (..., m, C, d), weights (m,), f, and arguments by name: (..., C, d). One that has an argument `seen` gets
    # what the server knows of the round, one that has `state` also what it gave for the round before
    combine: Callable[..., Any]
    max_f: Callable[[int], int]  # of m clients
    breaks: frozenset[str] = frozenset()  # of "shift" and "minority": see tests/test_aggregate.py
    needs: frozenset[str] = frozenset()  # of "root", "noise" and "classes": what is used of `seen`


class Pre(NamedTuple):
    """A pre-aggregator, and how many updates it makes of m."""

    apply: Callable[..., tuple[Tensor, Tensor]]  # updates, weights, f, client_order, and arguments by name
    remaining: Callable[..., int] = lambda m, **args: m


LENGTHS = frozenset({"shift"})  # of rules that look at how long updates are, or where they point from zero
RULES: dict[str, Rule] = {
    "mean": Rule(rules.mean, rules.any_f, frozenset({"minority"})),
    "median": Rule(rules.median, rules.any_f),
    "trimmed_mean": Rule(rules.trimmed_mean, rules.max_f_below_half),
    "krum": Rule(rules.krum, rules.max_f_of_krum),
    "multi_krum": Rule(rules.multi_krum, rules.max_f_of_krum),
    "bulyan": Rule(rules.bulyan, rules.max_f_of_bulyan),
    "geometric_median": Rule(weiszfeld.geometric_median, rules.any_f),
    "centered_clipping": Rule(rules.centered_clipping, rules.any_f),
    "norm_clipping": Rule(rules.norm_clipping, rules.any_f, LENGTHS),
    "meamed": Rule(rules.meamed, rules.max_f_below_half),
    "fltrust": Rule(defences.fltrust, rules.any_f, LENGTHS, frozenset({"root"})),
    "cosine_history": Rule(defences.cosine_history, rules.max_f_below_half, LENGTHS),
    "class_norms": Rule(defences.class_norms, rules.max_f_below_half, LENGTHS, frozenset({"classes"})),
    "foolsgold": Rule(defences.foolsgold, rules.any_f, LENGTHS | {"minority"}, frozenset({"classes"})),
    "flame": Rule(defences.flame, rules.any_f, LENGTHS, frozenset({"noise"})),
    "spectral": Rule(defences.spectral, rules.max_f_below_half),
}
PRE: dict[str, Pre] = {
    "nnm": Pre(pre.nnm),
    "bucketing": Pre(pre.bucketing, lambda m, s=2: -(-m // s)),
    "clipping": Pre(pre.clipping),
}


def is_known(name: str) -> bool:
    """Whether there may be a rule of this name: of the table, ByzFL's, or the import path of a function."""
    return name in RULES or name == "byzfl" or plugins.is_path(name)


def needs(name: str) -> frozenset[str]:
    """Which of "root", "noise" and "classes" a rule of the table uses of `Seen`; empty for rules that are not of it."""
    return RULES[name].needs if name in RULES else frozenset()


def sees(name: str) -> bool:
    """Whether a rule's function has an argument `seen` (what the server knows besides the updates) or `state`."""
    if name in RULES:
        return bool(_asks(RULES[name].combine))
    return plugins.is_path(name) and bool(_asks(plugins.load(name)))


def is_builtin(name: str, pre: Sequence[PreEntry] = ()) -> bool:
    """Whether a rule and its pre-aggregators are of the tables here; those of others may not run in threads.

    Parameters
    ----------
    name : str
        The name of the rule, or an import path.
    pre : sequence
        The pre-aggregators, each a name or `{name: arguments}`.

    Returns
    -------
    bool
    """
    return name in RULES and all((entry if isinstance(entry, str) else next(iter(entry))) in PRE for entry in pre)


class Combine:
    """What the server calls to combine updates: the pre-aggregators in their order, then the rule, for m clients."""

    def __init__(self, steps: Sequence[Callable[..., tuple[Tensor, Tensor]]], f: int, rule: "_Step", asks: set[str]):
        """`asks` holds which of `seen` and `state` the rule has as arguments."""
        self._steps, self._f, self._rule = steps, f, rule
        self.keeps_state = "state" in asks
        self.sees = bool(asks)

    def __call__(
        self, updates: Tensor, weights: Tensor, client_order: Tensor, seen: Seen = NOTHING, state: Any = None
    ) -> Tensor:
        """The aggregate (..., C, d) alone, without what the rule keeps; see `step` for the arguments."""
        return self.step(updates, weights, client_order, seen, state)[0]

    def step(
        self, updates: Tensor, weights: Tensor, client_order: Tensor, seen: Seen = NOTHING, state: Any = None
    ) -> tuple[Tensor, Any]:
        """The aggregate of a round, and what the rule needs of it in the next. No argument is changed.

        Parameters
        ----------
        updates : (..., m, C, d) tensor
        weights : (m,) tensor
            The samples that each client used.
        client_order : (m,) tensor
            A random order of the clients, by which random choices are made.
        seen : Seen
            What the server knows of the round besides.
        state
            What the round before has given; None in the first.

        Returns
        -------
        aggregate : (..., C, d) tensor
        state
            A dict of tensors whose leading axes are those of the updates, of a user's rule whatever it gives; None of a
            rule that keeps nothing.
        """
        for step in self._steps:
            updates, weights = step(updates, weights, self._f, client_order)
            client_order = client_order[client_order < len(weights)]  # still a random order, of those that remain
        return self._rule(updates, weights, client_order, seen, state)


_Step = Callable[[Tensor, Tensor, Tensor, Seen, Any], tuple[Tensor, Any]]


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
        One of `RULES`, `byzfl`, or the import path of a function `(updates, weights, f, **args)`; it may ask for `seen`
        and for `state` too, see `Rule`.
    f : int
        How many clients may be malicious.
    m : int
        Number of clients in a round.
    args : mapping
        Arguments of the rule by name.
    pre : sequence
        Pre-aggregators in the order in which they are applied.
    rule : str, optional
        The name of a class of ByzFL's, with `name="byzfl"`.

    Returns
    -------
    Combine
        To be called with updates, weights and a random order of the clients; what it is given is not changed.

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
    combine, asks = _rule(name, f, remaining, args, rule)
    if "state" in asks and remaining != m:
        raise InputError(
            f"strategy={name} remembers clients, which strategy.pre makes {remaining} of {m}; leave bucketing out"
        )
    return Combine(steps, f, combine, asks)


def _rule(name: str, f: int, m: int, args: Mapping[str, Any], byzfl_class: str | None) -> tuple[_Step, set[str]]:
    """A rule for m updates without pre-aggregators, and which of `seen` and `state` it has as arguments."""
    if name == "byzfl":
        if byzfl_class is None:
            raise InputError(f"strategy.rule is missing; give one of ByzFL's: {', '.join(byzfl.RULES)}")
        aggregator = byzfl.make(byzfl_class, byzfl.RULES, "strategy.rule", f, m, args)
        return lambda updates, weights, client_order, seen, state: (aggregator(updates, client_order), None), set()
    if name in RULES:
        max_f = RULES[name].max_f(m)
        if f > max_f:
            way_out = f"use at most {max_f}" if max_f >= 0 else "use more clients"
            raise InputError(f"strategy.f={f} is too many for strategy={name} of {m} clients; {way_out}")
        function = RULES[name].combine
        _check_names(function, name, "strategy.args", args)
        asks = _asks(function)
        given = partial(_called, function, asks, f, args)
        trial = Seen(root=lambda: torch.ones(1, 1, dtype=torch.float64))
        _check_call(lambda: given(*_probe(m), trial, None), f"strategy.args of strategy={name}")
        return lambda updates, weights, client_order, seen, state: given(updates, weights, seen, state), asks
    if plugins.is_path(name):
        function = plugins.load(name)
        asks = _asks(function)
        try:
            signature(function).bind(None, None, f, **args, **dict.fromkeys(asks))
        except TypeError as error:
            raise InputError(f"strategy.args of {name}: {error}; a rule takes updates, weights, f and these") from None
        given = partial(_called, partial(_user_rule, name, asks), asks, f, args)
        return lambda updates, weights, client_order, seen, state: given(updates, weights, seen, state), asks
    raise InputError(plugins.unknown_name("strategy.name", name, "a strategy", (*RULES, "byzfl", "flower")))


def _asks(function: Callable[..., Any]) -> set[str]:
    """Which of `seen` and `state` a function has as arguments."""
    return _GIVEN & signature(function).parameters.keys()


def _asked_for(asks: set[str], seen: Seen, state: Any) -> dict[str, Any]:
    """Those of `seen` and `state` that a function has as arguments, by name."""
    return {name: value for name, value in (("seen", seen), ("state", state)) if name in asks}


def _called(
    function: Callable[..., Any],
    asks: set[str],
    f: int,
    args: Mapping[str, Any],
    updates: Tensor,
    weights: Tensor,
    seen: Seen,
    state: Any,
) -> tuple[Tensor, Any]:
    """The aggregate that a rule's function gives, and its state: None where it has no argument `state`."""
    found = function(updates, weights, f, **args, **_asked_for(asks, seen, state))
    return found if "state" in asks else (found, None)


def _user_rule(name: str, asks: set[str], updates: Tensor, weights: Tensor, f: int, /, **args: Any) -> Any:
    """What a user's rule makes of copies of its input, as a rule of the table; RunError where it is no aggregate."""
    returned = plugins.call(name, updates.clone(), weights.clone(), f, **args)
    aggregate, state = returned, None
    if "state" in asks:
        if not (isinstance(returned, tuple) and len(returned) == 2):
            wanted = "wanted: a pair, the aggregate and the state for the next round"
            plugins.refuse(name, type(returned).__name__, wanted)
        aggregate, state = returned
    expected = (*updates.shape[:-3], *updates.shape[-2:])
    wanted = f"wanted: an aggregate of shape {expected}, real and finite where the updates are"
    if not isinstance(aggregate, Tensor):
        plugins.refuse(name, type(aggregate).__name__, wanted)
    if tuple(aggregate.shape) != expected or aggregate.dtype.is_complex:
        plugins.refuse(name, f"shape {tuple(aggregate.shape)}, {str(aggregate.dtype).removeprefix('torch.')}", wanted)
    broken = ~aggregate.isfinite().flatten(-2).all(-1) & updates.isfinite().flatten(-3).all(-1)
    if broken.any():
        plugins.refuse(name, "NaN or infinity", wanted)
    aggregate = aggregate.to(updates)
    return (aggregate, state) if "state" in asks else aggregate


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
    changed = function(updates, client_order)
    return changed, weights if changed.shape[-3] == len(weights) else torch.ones(changed.shape[-3])


def _check_names(function: Callable[..., Any], name: str, key: str, args: Mapping[str, Any]) -> None:
    """InputError where a function does not take arguments of these names."""
    parameters = signature(function).parameters.values()
    takes = [one.name for one in parameters if one.kind is Parameter.KEYWORD_ONLY and one.name not in _GIVEN]
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
        raise InputError(f"{what}: {one_line(error)}") from None


def _probe(m: int) -> tuple[Tensor, Tensor]:
    """Updates (m, 1, 1) and weights (m,) for a trial call."""
    return torch.arange(m, dtype=torch.float64).view(m, 1, 1), torch.ones(m)
