"""Attackers who know the server's rule: in each round they try a few ways and take the one that does most harm.

Harm is the inner product of the aggregate with the direction v that the attack pushes against. Like all that attackers
do it is a function of the scenario, the round, the parameters, and here of what the rule remembers.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fl_attack import adversary, aggregate, attack, knowledge, protocol
from fl_attack.scenario import NO_FLIPS, Flips, Scenario


class KnownServer(NamedTuple):
    """What is known of the server in a round."""

    rule: aggregate.Combine
    state: Any  # what the rule remembers, see `aggregate.Combine.step`
    momenta: Tensor | None = None  # (m, A, B) of the clients before the round, where they have one


def searches(scenario: Scenario) -> bool:
    """Whether the attackers of an experiment have something to try: under the plain mean all flips do the most harm."""
    settings = scenario.settings
    linear = settings.attack.writes == "labels" and settings.strategy.averages
    linear = linear and settings.local_steps == 1 and settings.sanitize.name == "none"
    return settings.attacked and settings.attack.adapt == "rule" and not linear


def best_flips(
    scenario: Scenario,
    theta: Tensor,
    round_: int,
    server: KnownServer | None,
    epoch_theta: Tensor | None = None,
    stored: Flips = NO_FLIPS,
) -> Flips:
    """The labels that all malicious clients write in a round, where they try what the server's rule makes of them.

    Of the parts `attack.PERCENTS` of the budget, the one whose aggregate has the smallest inner product with v.

    Parameters
    ----------
    scenario, theta, round_, epoch_theta, stored
        As `adversary.flips` takes them.
    server : KnownServer or None
        What is known of the server; without it nothing is tried.

    Returns
    -------
    Flips
    """
    plain = adversary.flips(scenario, theta, round_, epoch_theta, stored)
    if server is None or not len(plain.samples) or not searches(scenario):
        return plain
    tries = [plain, *(adversary.flips(scenario, theta, round_, percent=percent) for percent in attack.PERCENTS[1:])]
    candidates = [adversary.updates(scenario, theta, round_, one, server.momenta) for one in tries]
    return tries[_worst(scenario, theta, round_, server, candidates)]


def best_crafted(scenario: Scenario, theta: Tensor, round_: int, honest: Tensor, server: KnownServer | None) -> Tensor:
    """The updates that the clients of a round send under an attack on updates, where attackers try several values.

    Of the values that the attack's row names, and the one that is set, the one that does most harm.

    Parameters
    ----------
    scenario, theta, round_, honest
        As `adversary.crafted` takes them.
    server : KnownServer or None
        What is known of the server; without it nothing is tried.

    Returns
    -------
    (m, A, B) tensor
    """
    plain = adversary.crafted(scenario, theta, round_, honest)
    if scenario.settings.attack.writes != "updates" or plain is honest or server is None or not searches(scenario):
        return plain
    candidates = [plain, *(adversary.crafted(one, theta, round_, honest) for one in variants(scenario))]
    return candidates[_worst(scenario, theta, round_, server, candidates)]


def variants(scenario: Scenario) -> list[Scenario]:
    """An experiment with each of the values that its attack on updates tries in place of the one that is set.

    Parameters
    ----------
    scenario : Scenario
        The experiment, whose attackers adapt.

    Returns
    -------
    list of Scenario
        One for each value of `attack.Attack.tries`, in their order; empty where the attack has none.
    """
    if "variants" not in scenario.memo:
        threat = scenario.settings.attack
        name, values = attack.find(threat.name).tries or ("", ())
        changed = [threat.model_copy(update={"args": threat.args | {name: value}}) for value in values]
        settings = [scenario.settings.model_copy(update={"attack": one}) for one in changed]
        scenario.memo["variants"] = [replace(scenario, settings=one) for one in settings]
    found: list[Scenario] = scenario.memo["variants"]
    return found


def _worst(scenario: Scenario, theta: Tensor, round_: int, server: KnownServer, candidates: list[Tensor]) -> int:
    """The index of those updates (m, A, B), of some that could be sent, that do most harm; of equal ones the first."""
    clients = scenario.schedule.participants(round_)
    weights = torch.from_numpy(scenario.schedule.sizes[clients]).to(theta.device)
    order = torch.from_numpy(protocol.shuffled(scenario.settings.seed, round_, len(clients))).to(theta.device)
    v, seen = knowledge.direction(scenario, theta, round_), scenario.seen(round_, theta)
    products: list[Tensor] = []
    for i, updates in enumerate(candidates):
        same = next((j for j in range(i) if torch.equal(candidates[j], updates)), None)  # small budgets round alike
        if same is None:
            found = server.rule(updates, weights, order, seen, server.state)
            products.append((found * v.to(found)).sum())
        else:
            products.append(products[same])
    return int(attack.most_harmful(products))
