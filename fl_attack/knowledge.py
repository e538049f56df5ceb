"""What the malicious clients of an experiment know in a round: the views from which their attack chooses.

A view holds what is at hand, and functions for the rest, which are called only if the attack asks for it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, plan_maker, streams, targets
from fl_attack.scenario import Scenario

HARM_SAMPLES = 1000  # training samples that directions measure harm on
ClientIds = NDArray[np.int64]
SampleIds = NDArray[np.int64]


class VisibleSamples(NamedTuple):
    """What attackers on labels can see of a round; what takes work is worked out when it is asked for."""

    y: Tensor  # (n,) true labels of the samples that they can write
    counts: Tensor | None  # (n,) how often each of them is used; None: once
    samples: SampleIds  # (n,) which samples of the training set they are
    all_samples: Callable[[], SampleIds]  # those of all clients in this round, see `streams.label_noise`
    scores: Callable[[], Tensor]  # (..., n, classes), see `attack.View`
    logits: Callable[[], Tensor]  # (..., n, classes)


def of_samples(scenario: Scenario, theta: Tensor, round_: int, malicious: ClientIds) -> VisibleSamples:
    """What attackers see of the samples that the clients `malicious` (m,) can write.

    Parameters
    ----------
    scenario, theta, round_
        As `direction` takes them.
    malicious : array of int, (m,)
        The clients.

    Returns
    -------
    VisibleSamples
        The samples that these clients use in the round or, by epoch, hold; samples ascending.
    """
    at = minibatch_round(scenario, round_)
    samples, counts = scenario.schedule.samples(malicious, at)
    X, y, _ = scenario.batch(samples, counts, theta.device)
    return VisibleSamples(
        y,
        torch.from_numpy(counts).to(theta.device),
        samples,
        all_samples=partial(scenario.schedule.samples_of_all, at),
        scores=partial(attack.scores_along, scenario.settings.attack.aim, aim(scenario, theta, round_), X),
        logits=partial(scenario.model.class_logits, theta.to(X.dtype), X),
    )


def minibatch_round(scenario: Scenario, round_: int) -> int | None:
    """The round whose minibatches the attackers see.

    Parameters
    ----------
    scenario, round_
        As `direction` takes them.

    Returns
    -------
    int or None
        None where they see all that clients hold, for an epoch.
    """
    threat = scenario.settings.attack
    return round_ if threat.refresh == "step" or threat.writes != "labels" else None


def view(scenario: Scenario, round_: int, seen: VisibleSamples, dtype: torch.dtype) -> attack.View:
    """The view of an attack on labels.

    Parameters
    ----------
    scenario : Scenario
        The experiment, or one of several with this attack.
    round_ : int
        The round, counted from 1.
    seen : VisibleSamples
        The samples that the attackers hold in it.
    dtype : torch.dtype
        The precision of the noise.
    """
    device = seen.y.device
    return attack.View(
        seen.y,
        torch.ones_like(seen.y) if seen.counts is None else seen.counts,
        scores=seen.scores,
        logits=seen.logits,
        noise=partial(
            streams.label_noise, scenario.settings.seed, round_, seen.samples, seen.all_samples, device, dtype
        ),
        selection=scenario.settings.attack.selection,
    )


def view_of_updates(
    scenario: Scenario, round_: int, updates: Tensor, malicious: Tensor, direction: Callable[[], Tensor]
) -> attack.Updates:
    """The view of an attack on updates.

    Parameters
    ----------
    scenario, round_
        As `view` takes them.
    updates : (..., m, A, B) tensor
        What each client of the round would send, were all honest.
    malicious : (..., m) tensor of bool
        Which of them are malicious.
    direction : callable
        Gives the direction v when it is first asked for.
    """
    shape: Sequence[int] = scenario.schedule.per_round or scenario.settings.clients.total, *scenario.theta_shape
    seed, stream = scenario.settings.seed, streams.UPDATE_NOISE
    noise = partial(streams.normal_noise, seed, stream, round_, shape, updates.device, updates.dtype)
    return attack.Updates(updates, malicious, direction=direction, noise=noise)


def direction(scenario: Scenario, theta: Tensor, round_: int) -> Tensor:
    """The direction v that the attackers push the gradient against, worked out from what they know.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    theta : (A, B) tensor of float64
        The parameters that the server has broadcast.
    round_ : int
        The round, counted from 1; with `attack.refresh=epoch` the first of an epoch.

    Returns
    -------
    (A, B) tensor
        The direction of `attack.direction` or `attack.goal`, see `attack.DIRECTIONS`.
    """
    return attack.direction_of(scenario.settings.attack.aim, aim(scenario, theta, round_))


def aim(scenario: Scenario, theta: Tensor, round_: int) -> attack.Aim:
    """What the attackers know as they choose a direction, see `direction` for the arguments."""
    at = minibatch_round(scenario, round_)
    everyone = scenario.schedule.participants(round_) if at else np.arange(len(scenario.schedule.shards))
    return attack.Aim(
        theta,
        round_,
        scenario.model,
        gradient=partial(scenario.gradient, theta, known_clients(scenario, everyone, round_), at),
        target=partial(targets.target, scenario, theta.device),
        sample=partial(plan_maker.sample_of, scenario, HARM_SAMPLES, theta.device),
    )


def known_clients(scenario: Scenario, everyone: ClientIds, round_: int) -> ClientIds:
    """The clients whose clean gradient the attackers know in a round.

    Parameters
    ----------
    scenario : Scenario
        The experiment, whose `attack.knowledge` decides.
    everyone : array of int, (m,)
        The clients of the round, ascending.
    round_ : int
        The round, from 1, in which a part of the honest ones is drawn.

    Returns
    -------
    array of int
        Some of `everyone`, ascending.
    """
    threat, settings = scenario.settings.attack, scenario.settings
    if threat.knowledge == "full":
        return everyone
    is_malicious = np.isin(everyone, scenario.partition.malicious)
    if threat.knowledge == "own":
        return everyone[is_malicious]
    honest = everyone[~is_malicious]
    if threat.knowledge == "honest":
        return honest
    rank = streams.known_rank(settings.seed, round_, settings.clients.total)[honest]
    return np.sort(honest[rank.argsort()[: count_of(threat.knowledge_fraction, len(honest))]])


def count_of(fraction: float, of: int) -> int:
    """The number of clients that makes up a fraction of a number of clients.

    Parameters
    ----------
    fraction : float
        From 0 to 1.
    of : int
        The number of clients.

    Returns
    -------
    int
        Rounded, halves up, and at least one if there is any client.
    """
    return min(of, max(1, math.floor(fraction * of + 0.5)))
