"""What the malicious clients of an experiment do in a round: the labels they flip, or the updates they send.

Everything is a function of the scenario, the round and the parameters that the server has broadcast, so that every
process works out the same, and again.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, protocol, targets
from fl_attack.models import outputs
from fl_attack.scenario import NO_FLIPS, Flips, Scenario, client_update

LABEL_NOISE, UPDATE_NOISE, KNOWN_CLIENTS = 3, 4, 5  # names of random streams, beside those of `protocol`
Clients = NDArray[np.int64]
Counts = NDArray[np.int64]


def epoch_start(scenario: Scenario, round_: int) -> int:
    """The first round of the epoch that a round is in."""
    per_epoch = scenario.schedule.rounds_per_epoch
    return (round_ - 1) // per_epoch * per_epoch + 1


def rounds_before(scenario: Scenario, round_: int) -> int | None:
    """Rounds that were attacked before this one; None where this one isn't."""
    threat = scenario.settings.attack
    if not scenario.settings.attacked:
        return None
    return attack.attacked_before(round_, threat.every, threat.start, threat.stop)


def present(scenario: Scenario, round_: int) -> Clients:
    """The malicious clients that take part in a round, ascending."""
    return np.intersect1d(scenario.partition.malicious, scenario.schedule.participants(round_), assume_unique=True)


def flips(scenario: Scenario, theta: Tensor, round_: int, epoch_theta: Tensor | None = None) -> Flips:
    """The labels that all malicious clients together write in a round, given the broadcast theta (C, d).

    With `attack.refresh=epoch` what is flipped depends on `epoch_theta`, the theta broadcast at the start of the epoch.
    """
    before = rounds_before(scenario, round_)
    malicious = present(scenario, round_)
    if before is None or scenario.settings.attack.writes != "labels" or not len(malicious):
        return NO_FLIPS
    if scenario.settings.attack.refresh == "step":
        writable = scenario.schedule.used[malicious]
        writable_before = _writable_before(scenario, round_, before, malicious)
        return _chosen(scenario, theta, round_, malicious, writable_before, writable)
    assert epoch_theta is not None
    return of_round(scenario, flips_of_epoch(scenario, epoch_theta, epoch_start(scenario, round_)), round_)


def of_round(scenario: Scenario, chosen: Flips, round_: int) -> Flips:
    """The part of an epoch's flips that a round's minibatches meet."""
    if rounds_before(scenario, round_) is None:
        return NO_FLIPS
    now = np.isin(chosen.samples, scenario.schedule.samples(present(scenario, round_), round_)[0])
    return Flips(chosen.samples[now], chosen.labels[now], chosen.allowed)


def flips_of_epoch(scenario: Scenario, theta: Tensor, first_round: int) -> Flips:
    """What is flipped in an epoch, of all that the malicious clients hold, given theta at its first round."""
    malicious = scenario.partition.malicious
    writable = np.array([len(scenario.schedule.shards[client]) for client in malicious])
    epochs = (first_round - 1) // scenario.schedule.rounds_per_epoch
    return _chosen(scenario, theta, first_round, malicious, epochs * writable, writable)


def _writable_before(scenario: Scenario, round_: int, attacked: int, malicious: Clients) -> NDArray[np.int64]:
    """Samples of each of these clients that were within reach in the rounds attacked so far, for budgets that carry."""
    schedule, threat = scenario.schedule, scenario.settings.attack
    if schedule.per_round is None or threat.rounding == "floor":
        return attacked * schedule.used[malicious]
    times = scenario.participation[threat.start - 1 : round_ - 1 : threat.every][:, scenario.partition.malicious].sum(0)
    past = times * schedule.used[scenario.partition.malicious]
    if threat.scope == "pooled":  # one budget, of them all
        return np.array([past.sum(), *[0] * (len(malicious) - 1)])
    return np.asarray(past[np.isin(scenario.partition.malicious, malicious)])


def _chosen(
    scenario: Scenario,
    theta: Tensor,
    round_: int,
    malicious: Clients,
    before: Counts,
    writable: Counts,
) -> Flips:
    """The flips of these clients, of the samples that they use: in a round, or (`refresh=epoch`) hold."""
    threat, schedule = scenario.settings.attack, scenario.schedule
    pooled = threat.scope == "pooled"
    writables = [(before.sum(), writable.sum())] if pooled else zip(before, writable, strict=True)
    budgets = [attack.flip_allowance(threat.exact_budget, int(b), int(n), threat.rounding) for b, n in writables]
    if not any(budgets):
        return NO_FLIPS
    if threat.refresh == "step":
        samples, counts = schedule.samples(malicious, round_)
        everyone = schedule.participants(round_)
    else:
        samples = np.sort(np.concatenate([schedule.shards[client] for client in malicious]))
        everyone, counts = np.arange(len(schedule.shards)), np.ones_like(samples)
    X, y, _ = scenario.batch(samples, counts, theta.device)
    at = theta.to(X.dtype)

    def noise() -> Tensor:
        if threat.refresh == "step":
            pool, _ = schedule.samples(everyone, round_)
        else:
            pool = np.sort(np.concatenate(schedule.shards))
        drawn = label_noise(scenario, round_, len(pool))[np.searchsorted(pool, samples)]
        return torch.from_numpy(drawn).to(X)

    view = attack.View(
        y,
        torch.from_numpy(counts).to(theta.device),
        scores=lambda: scenario.model.scores(at, direction(scenario, theta, round_).to(X.dtype), X),
        logits=lambda: outputs.class_logits(scenario.model.logits(at, X)),
        noise=noise,
        selection=threat.selection,
    )
    proposal = attack.propose(threat.name, view, threat.args, (len(samples),), scenario.classes)
    owner = np.searchsorted(malicious, scenario.partition.client[samples])
    group = torch.zeros(len(y), dtype=torch.int64) if pooled else torch.from_numpy(owner)
    allowed = torch.tensor(budgets, device=theta.device)
    chosen = attack.select(proposal.priority, group.to(theta.device), allowed) & (proposal.labels != y)
    return Flips(samples[chosen.cpu().numpy()], proposal.labels[chosen].cpu().numpy(), sum(budgets))


def label_noise(scenario: Scenario, round_: int, samples: int) -> NDArray[np.float64]:
    """(samples, 2) uniform in [0, 1), for the samples of a round in ascending order."""
    return np.random.default_rng([scenario.settings.seed, LABEL_NOISE, round_]).random((samples, 2))


def update_noise(scenario: Scenario, round_: int) -> Tensor:
    """(m, C, d) standard normal, for the clients of a round in ascending order."""
    clients = scenario.schedule.per_round or scenario.settings.clients.total
    rng = np.random.default_rng([scenario.settings.seed, UPDATE_NOISE, round_])
    return torch.from_numpy(rng.standard_normal((clients, *scenario.theta_shape)))


def direction(scenario: Scenario, theta: Tensor, round_: int) -> Tensor:
    """The direction v that the attackers push the gradient against, from what they know, (C, d)."""
    threat, schedule = scenario.settings.attack, scenario.schedule
    if threat.goal == "targeted":
        return attack.direction(threat.goal, theta, None, targets.target(scenario).to(theta.device))
    step = threat.refresh == "step" or threat.writes != "labels"
    everyone = schedule.participants(round_) if step else np.arange(len(schedule.shards))
    clients = known(scenario, everyone, round_)
    if not len(clients):
        return torch.zeros_like(theta)
    if step:
        return attack.direction(threat.goal, theta, scenario.gradient(theta, clients, round_), None)
    held = np.sort(np.concatenate([schedule.shards[client] for client in clients]))
    return attack.direction(threat.goal, theta, scenario.gradient_of(theta, held, np.ones_like(held)), None)


def known(scenario: Scenario, everyone: Clients, round_: int) -> Clients:
    """Those of these clients whose clean gradient the attackers know."""
    threat = scenario.settings.attack
    is_malicious = np.isin(everyone, scenario.partition.malicious)
    if threat.knowledge == "full":
        return everyone
    if threat.knowledge == "own":
        return everyone[is_malicious]
    honest = everyone[~is_malicious]
    if threat.knowledge == "honest":
        return honest
    rank = known_rank(scenario, round_)[honest]
    return np.sort(honest[rank.argsort()[: part(threat.knowledge_fraction, len(honest))]])


def known_rank(scenario: Scenario, round_: int) -> NDArray[np.float64]:
    """(clients,) who comes first, by the smallest number, where attackers know a part of the honest clients."""
    settings = scenario.settings
    return np.random.default_rng([settings.seed, KNOWN_CLIENTS, round_]).random(settings.clients.total)


def part(fraction: float, of: int) -> int:
    """A fraction of a number of clients, rounded, at least one of them if there is any."""
    return min(of, max(1, math.floor(fraction * of + 0.5)))


def updates(
    scenario: Scenario, theta: Tensor, round_: int, flips: Flips = NO_FLIPS, momenta: Tensor | None = None
) -> Tensor:
    """What the clients of a round would send with these flips, as gradients, (m, A, B), in the order of the clients.

    `momenta` (m, A, B) are those of the clients before the round, where they have one.
    """
    moved = [client_update(scenario, int(c), theta, round_, flips)[0] for c in scenario.schedule.participants(round_)]
    sent = torch.stack([(theta - one) / scenario.lr(round_) for one in moved])
    return protocol.with_momentum(scenario.settings.worker_momentum, momenta, sent)


def crafted(scenario: Scenario, theta: Tensor, round_: int, honest: Tensor) -> Tensor:
    """What the clients of a round send (m, C, d), given what all of them would send honestly."""
    threat = scenario.settings.attack
    if threat.writes != "updates" or rounds_before(scenario, round_) is None:
        return honest
    malicious = torch.from_numpy(np.isin(scenario.schedule.participants(round_), scenario.partition.malicious))
    malicious = malicious.to(theta.device)
    if not malicious.any():
        return honest
    view = attack.Updates(
        honest,
        malicious,
        direction=lambda: direction(scenario, theta, round_),
        noise=lambda: update_noise(scenario, round_).to(theta.device),
    )
    sent = attack.craft(threat.name, view, threat.args)
    return torch.where(malicious[:, None, None], sent, honest)
