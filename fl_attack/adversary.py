"""What the malicious clients of an experiment do in a round: the labels they flip, or the updates they send.

Everything is a function of the scenario, the round and the parameters that the server has broadcast, so that every
process works out the same, and again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, knowledge, plans, protocol
from fl_attack.scenario import NO_FLIPS, Flips, Scenario, client_update

ClientIds = NDArray[np.int64]
Counts = NDArray[np.int64]


def epoch_start(scenario: Scenario, round_: int) -> int:
    """The first round of the epoch that a round is in, or of its plan where attackers plan anew now and then.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    round_ : int
        The round, from 1.

    Returns
    -------
    int
    """
    if scenario.settings.attack.plans:
        return plans.first_round(scenario, round_)
    per_epoch = scenario.schedule.rounds_per_epoch
    return (round_ - 1) // per_epoch * per_epoch + 1


def rounds_before(scenario: Scenario, round_: int) -> int | None:
    """The number of attacked rounds before a round.

    Parameters
    ----------
    scenario, round_
        As `epoch_start` takes them.

    Returns
    -------
    int or None
        None where the round itself is not attacked.
    """
    threat = scenario.settings.attack
    if not scenario.settings.attacked:
        return None
    return attack.attacked_before(round_, threat.every, threat.start, threat.stop)


def present(scenario: Scenario, round_: int) -> ClientIds:
    """The malicious clients that take part in a round.

    Parameters
    ----------
    scenario, round_
        As `epoch_start` takes them.

    Returns
    -------
    array of int
        The numbers of the clients, ascending; empty where no malicious client takes part.
    """
    return np.intersect1d(scenario.partition.malicious, scenario.schedule.participants(round_), assume_unique=True)


def attacks(scenario: Scenario, round_: int) -> bool:
    """Whether malicious clients take part in a round, and the round is attacked; arguments as of `epoch_start`."""
    return rounds_before(scenario, round_) is not None and len(present(scenario, round_)) > 0


def flips(
    scenario: Scenario,
    theta: Tensor,
    round_: int,
    epoch_theta: Tensor | None = None,
    stored: Flips = NO_FLIPS,
    percent: int = 100,
) -> Flips:
    """The labels that all malicious clients together have written in the samples of a round.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    theta : (A, B) tensor of float64
        The parameters that the server has broadcast in this round.
    round_ : int
        The round, counted from 1.
    epoch_theta : (A, B) tensor of float64, optional
        The parameters broadcast in the round `epoch_start`, on which the flips depend with `attack.refresh=epoch`
        and with `attack.horizon`.
    stored : Flips
        The labels that stand in the attackers' data before the round, where they stay there; see `remembered`.
    percent : int
        The part of the budget that is used, in percent, by attackers who choose anew in every round; others use all of
        it. Less than 100 is dealt out to the clients in proportion to what they can write, so that none sticks out.

    Returns
    -------
    Flips
        The samples, ascending, that are used with a label other than their true one. In a round that is not attacked
        these are what is `stored` of them.
    """
    before = rounds_before(scenario, round_)
    malicious = present(scenario, round_)
    if scenario.settings.attacked and scenario.settings.attack.remembers:
        stored_here = _among(stored, scenario.schedule.samples(malicious, round_)[0])
        if before is None or not len(malicious):
            return stored_here
        writable = scenario.schedule.used[malicious]
        past = _writable_before(scenario, round_, before, malicious)
        return _added(scenario, theta, round_, malicious, past, writable, stored)
    if before is None or scenario.settings.attack.writes != "labels" or not len(malicious):
        return NO_FLIPS
    if scenario.settings.attack.plans:
        theta_of_plan = epoch_theta if keeps_theta(scenario) else None
        return plans.plan(scenario, epoch_start(scenario, round_), theta_of_plan).flips(round_)
    if scenario.settings.attack.refresh == "step":
        writable = scenario.schedule.used[malicious]
        writable_before = _writable_before(scenario, round_, before, malicious)
        return _chosen(scenario, theta, round_, malicious, writable_before, writable, percent)
    assert epoch_theta is not None
    chosen = _flips_of_epoch(scenario, epoch_theta, epoch_start(scenario, round_))
    used = np.isin(chosen.samples, scenario.schedule.samples(malicious, round_)[0])
    return Flips(chosen.samples[used], chosen.labels[used], chosen.allowed)


def remembered(scenario: Scenario, round_: int, stored: Flips, flips: Flips) -> Flips:
    """The labels that stand in the attackers' data after a round.

    Parameters
    ----------
    scenario, round_
        As `flips` takes them.
    stored : Flips
        The labels that stood in the data before the round, of all samples.
    flips : Flips
        The labels with which the round's samples were used.

    Returns
    -------
    Flips
        By ascending sample; none with `attack.memory=forget`.
    """
    if not (scenario.settings.attacked and scenario.settings.attack.remembers):
        return NO_FLIPS
    used = scenario.schedule.samples(present(scenario, round_), round_)[0]
    kept = ~np.isin(stored.samples, used)
    samples = np.concatenate([stored.samples[kept], flips.samples])
    labels = np.concatenate([stored.labels[kept], flips.labels])
    order = samples.argsort(kind="stable")
    return Flips(samples[order], labels[order], 0)


def _among(stored: Flips, samples: NDArray[np.int64]) -> Flips:
    """The stored labels of these samples, none of them new."""
    among = np.isin(stored.samples, samples)
    return Flips(stored.samples[among], stored.labels[among], 0, 0)


def _flips_of_epoch(scenario: Scenario, theta: Tensor, first_round: int) -> Flips:
    """The labels flipped in an epoch that began at theta, of all that the malicious clients hold; remembered for it."""
    key = first_round, theta.cpu().numpy().tobytes()
    last = scenario.memo.get("flips of an epoch")
    if last is None or last[0] != key:
        last = scenario.memo["flips of an epoch"] = key, _chosen_for_epoch(scenario, theta, first_round)
    found: Flips = last[1]
    return found


def _chosen_for_epoch(scenario: Scenario, theta: Tensor, first_round: int) -> Flips:
    """The labels that attackers choose at theta for the epoch that begins with a round."""
    malicious = scenario.partition.malicious
    writable = np.array([len(scenario.schedule.shards[client]) for client in malicious])
    epochs = (first_round - 1) // scenario.schedule.rounds_per_epoch
    return _chosen(scenario, theta, first_round, malicious, epochs * writable, writable)


def _writable_before(scenario: Scenario, round_: int, rounds: int, malicious: ClientIds) -> Counts:
    """How many samples (m,) each client could write in the attacked `rounds` before this one, with repeats.

    Only budgets that carry over need it to be exact. Of a pooled one, where not all clients take part in a round, entry
    0 holds the sum over all malicious clients, and the others hold 0.
    """
    schedule, threat = scenario.schedule, scenario.settings.attack
    if schedule.per_round is None or threat.rounding != "carry":
        return rounds * schedule.used[malicious]
    times = scenario.participation[threat.start - 1 : round_ - 1 : threat.every][:, scenario.partition.malicious].sum(0)
    past = times * schedule.used[scenario.partition.malicious]
    if threat.scope == "pooled":  # one budget, of them all
        return np.array([past.sum(), *[0] * (len(malicious) - 1)])
    return np.asarray(past[np.isin(scenario.partition.malicious, malicious)])


def _chosen(
    scenario: Scenario,
    theta: Tensor,
    round_: int,
    malicious: ClientIds,
    before: Counts,
    writable: Counts,
    percent: int = 100,
) -> Flips:
    """The flips that clients `malicious` (m,) choose among the samples that they use or, by epoch, hold.

    `before` and `writable` (m,) are the numbers of samples that each could write in attacked rounds gone by, and can
    write now.
    """
    budgets = _allowances(scenario, before, writable)
    if not any(budgets):
        return NO_FLIPS
    seen = knowledge.of_samples(scenario, theta, round_, malicious)
    proposal = propose(scenario, round_, seen, seen.y.shape, scenario.settings.torch_dtype)
    samples, y = seen.samples, seen.y
    pooled, used = scenario.settings.attack.scope == "pooled", budgets
    if percent < 100:
        part = np.array(budgets) * percent // 100
        used = attack.dealt_out(part[0], writable).tolist() if pooled else part.tolist()
        pooled = False
    chosen = _within(scenario, malicious, samples, proposal.priority, used, pooled) & (proposal.labels != y)
    return Flips(samples[chosen.cpu().numpy()], proposal.labels[chosen].cpu().numpy(), sum(budgets))


def _added(
    scenario: Scenario,
    theta: Tensor,
    round_: int,
    malicious: ClientIds,
    before: Counts,
    writable: Counts,
    stored: Flips,
) -> Flips:
    """The labels of a round's samples after clients `malicious` (m,) have written into data where flips stay.

    The objective is a sum over samples, so the largest gains within the budget are the exact optimum among the samples
    that are not flipped yet. With `attack.unflip` those that are take their best label, or the true one, at no cost.
    `before` and `writable` (m,) are the numbers of samples that each client could write in attacked rounds gone by, and
    can write now.
    """
    threat = scenario.settings.attack
    samples = scenario.schedule.samples(malicious, round_)[0]
    stored_here = _among(stored, samples)
    flipped = np.isin(samples, stored_here.samples)
    if threat.memory == "persist":
        budgets = _allowances(scenario, before, writable)
    else:
        fixed = stored.samples[~np.isin(stored.samples, samples)] if threat.unflip else stored.samples
        budgets = _left_of_total(scenario, malicious, fixed)
    if not any(budgets) and not (threat.unflip and flipped.any()):
        return stored_here
    seen = knowledge.of_samples(scenario, theta, round_, malicious)
    y, proposal = seen.y, propose(scenario, round_, seen, seen.y.shape, scenario.settings.torch_dtype)
    is_flipped = torch.from_numpy(flipped).to(y.device)
    current = y.clone()
    current[is_flipped] = torch.from_numpy(stored_here.labels).to(y.device)
    is_wanted, priority = proposal.priority > -math.inf, proposal.priority
    if threat.memory == "persist" or not threat.unflip:
        priority = priority.masked_fill(is_flipped, -math.inf)
    chosen = _within(scenario, malicious, samples, priority, budgets, threat.scope == "pooled")
    labels = torch.where(chosen, proposal.labels, y)
    if not threat.unflip:
        labels = torch.where(is_flipped, current, labels)
    elif threat.memory == "persist":
        labels = torch.where(is_flipped & is_wanted, proposal.labels, labels)
    differs = labels != y
    new = int((differs & ~is_flipped).sum())
    return Flips(samples[differs.cpu().numpy()], labels[differs].cpu().numpy(), sum(budgets), new)


def _left_of_total(scenario: Scenario, malicious: ClientIds, fixed: NDArray[np.int64]) -> list[int]:
    """How many labels may still be written where one budget is for all rounds: one number, or one for each client.

    The budget is a share of all samples that the clients hold. Of it are taken the samples `fixed`, which are flipped
    already and not chosen anew.
    """
    threat, holder = scenario.settings.attack, scenario.partition.client
    pooled = threat.scope == "pooled"
    clients = scenario.partition.malicious if pooled else malicious
    held = np.array([len(scenario.schedule.shards[client]) for client in clients])
    taken = np.array([(holder[fixed] == client).sum() for client in clients])
    if pooled:
        held, taken = held.sum(keepdims=True), taken.sum(keepdims=True)
    rounding: attack.Rounding = "ceil" if threat.rounding == "ceil" else "floor"
    totals = [attack.flip_allowance(threat.exact_budget, 0, int(n), rounding) for n in held]
    return [max(0, total - int(n)) for total, n in zip(totals, taken, strict=True)]


def _allowances(scenario: Scenario, before: Counts, writable: Counts) -> list[int]:
    """How many labels may be written in a round: one number for all clients together, or one for each.

    `before` and `writable` (m,) are the numbers of samples that each client could write in attacked rounds gone by, and
    can write now.
    """
    threat = scenario.settings.attack
    writables = [(before.sum(), writable.sum())]
    if threat.scope != "pooled":
        writables = list(zip(before, writable, strict=True))
    return [attack.flip_allowance(threat.exact_budget, int(b), int(n), threat.rounding) for b, n in writables]


def _within(
    scenario: Scenario,
    malicious: ClientIds,
    samples: NDArray[np.int64],
    priority: Tensor,
    budgets: list[int],
    pooled: bool,
) -> Tensor:
    """Which samples are those of largest priority (n,) within the clients' budgets, or the pooled one, (n,) of bool."""
    group = np.zeros(len(samples), np.int64)
    if not pooled:
        group = np.searchsorted(malicious, scenario.partition.client[samples])
    device = priority.device
    return attack.select(priority, torch.from_numpy(group).to(device), torch.tensor(budgets, device=device))


def propose(
    scenario: Scenario, round_: int, seen: knowledge.VisibleSamples, shape: Sequence[int], dtype: torch.dtype
) -> attack.Proposal:
    """What the attack on labels of an experiment, or of several with this attack, proposes in a round.

    Parameters
    ----------
    scenario : Scenario
        The experiment, or one of several that have their attack and their data in common.
    round_ : int
        The round, counted from 1, whose noise the attack may use.
    seen : knowledge.VisibleSamples
        The samples that the attackers can write, and what they see of them.
    shape : sequence of int
        (..., n), the shape of the proposal.
    dtype : torch.dtype
        Precision of the noise.

    Returns
    -------
    attack.Proposal
        The labels and priorities before any budget is applied.

    Raises
    ------
    RunError
        Where a user's function gives something else.
    """
    threat = scenario.settings.attack
    view = knowledge.view(scenario, round_, seen, dtype)
    return attack.propose(threat.name, view, threat.args, shape, scenario.classes)


def keeps_theta(scenario: Scenario) -> bool:
    """Whether flips depend on the parameters that were broadcast in the round `epoch_start`."""
    threat = scenario.settings.attack
    return scenario.settings.attacked and (threat.refresh == "epoch" or threat.horizon is not None)


def updates(
    scenario: Scenario, theta: Tensor, round_: int, flips: Flips = NO_FLIPS, momenta: Tensor | None = None
) -> Tensor:
    """The updates that the clients of a round would send, all of them as honest clients do.

    Parameters
    ----------
    scenario, theta, round_
        As `flips` takes them.
    flips : Flips
        The labels that are flipped in the round.
    momenta : (m, A, B) tensor, optional
        The clients' momenta before the round, where they have one.

    Returns
    -------
    (m, A, B) tensor
        As gradients, which is the way of the parameters over the learning rate; clients ascending.
    """
    moved = [client_update(scenario, int(c), theta, round_, flips)[0] for c in scenario.schedule.participants(round_)]
    gradients = torch.stack([(theta - one) / scenario.lr(round_) for one in moved])
    return protocol.with_momentum(scenario.settings.worker_momentum, momenta, gradients)


def crafted(scenario: Scenario, theta: Tensor, round_: int, honest: Tensor) -> Tensor:
    """The updates that the clients of a round send under an attack on updates.

    Parameters
    ----------
    scenario, theta, round_
        As `flips` takes them.
    honest : (m, A, B) tensor
        The updates that all clients of the round would send honestly, clients ascending.

    Returns
    -------
    (m, A, B) tensor
        `honest` with those of malicious clients replaced; `honest` itself where the round is not attacked so.

    Raises
    ------
    RunError
        Where a user's function gives something else than an update for each client.
    """
    threat = scenario.settings.attack
    if threat.writes != "updates" or rounds_before(scenario, round_) is None:
        return honest
    malicious = torch.from_numpy(np.isin(scenario.schedule.participants(round_), scenario.partition.malicious))
    malicious = malicious.to(theta.device)
    if not malicious.any():
        return honest
    aim = knowledge.aim(scenario, theta, round_)
    direction = partial(attack.direction_of, threat.aim, aim)
    return replace_updates(scenario, round_, honest, malicious, malicious, direction)


def replace_updates(
    scenario: Scenario,
    round_: int,
    updates: Tensor,
    malicious: Tensor,
    attacking: Tensor,
    direction: Callable[[], Tensor],
) -> Tensor:
    """The updates of clients, with those that the attack on updates of an experiment sends in their place.

    Parameters
    ----------
    scenario : Scenario
        The experiment, or one of several that have their attack and their data in common.
    round_ : int
        The round, counted from 1, whose noise the attack may use.
    updates : (..., m, A, B) tensor
        What all clients of the round would send honestly, clients ascending.
    malicious : (..., m) tensor of bool
        Which of the clients are malicious.
    attacking : (..., m) tensor of bool
        The clients whose updates are replaced: the malicious ones, where the round is attacked.
    direction
        A function without arguments that gives the direction (..., A, B).

    Returns
    -------
    (..., m, A, B) tensor

    Raises
    ------
    RunError
        Where a user's function gives something else than an update for each client.
    """
    threat = scenario.settings.attack
    view = knowledge.view_of_updates(scenario, round_, updates, malicious, direction)
    return torch.where(attacking[..., None, None], attack.craft(threat.name, view, threat.args), updates)
