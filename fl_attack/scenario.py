"""What the rounds of one experiment share: its data, who holds what, and what the attacker can work out.

A scenario is a pure function of the settings, so every process makes its own from them; the images themselves are
memory-mapped and shared.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import aggregate, data, models, plugins, protocol, sanitize, streams
from fl_attack.config import Settings, settings_from
from fl_attack.errors import InputError


class Flips(NamedTuple):
    """The labels of a round that are not the true ones, and how many the attackers were allowed to write."""

    samples: NDArray[np.int64]  # ascending
    labels: NDArray[np.int64]
    allowed: int
    new: int | None = None  # how many of them were not flipped before; None: all

    @property
    def written(self) -> int:
        """The number of labels that the budget of the round was spent on."""
        return len(self.samples) if self.new is None else self.new


class CleanGradient(NamedTuple):
    """The clean gradient that was computed last, and of what; theta is compared by identity, since none is changed."""

    theta: Tensor
    samples: NDArray[np.int64]
    counts: NDArray[np.int64]
    gradient: Tensor


WORTH_ADDING = (
    0.6  # share of flipped samples up to which a pass over them alone is less work than one backwards over all
)
NO_FLIPS = Flips(np.empty(0, np.int64), np.empty(0, np.int64), 0)


NEIGHBOURS_KEPT = 512  # clients
_neighbours: dict[tuple[str, bytes, int], NDArray[np.int64]] = {}  # by data, samples and k: what takes long to find


@dataclass(frozen=True)
class Scenario:
    """An experiment, ready to run."""

    settings: Settings
    dataset: data.Dataset
    partition: data.Partition
    schedule: protocol.Schedule

    @property
    def classes(self) -> int:
        """The number of labels of the dataset, C."""
        return len(self.dataset.classes)

    @property
    def theta_shape(self) -> tuple[int, int]:
        """Shape of the parameters: (C, d) of logistic regression, the constant included; (1, P) of a network."""
        return self.model.shape

    @cached_property
    def model(self) -> models.Model:
        """The model that is trained."""
        chosen = self.settings.model
        args = json.dumps(chosen.args, sort_keys=True)
        return _model(chosen.name, args, chosen.loss, self.dataset.image_shape, self.classes, self.settings.seed)

    @property
    def write_access(self) -> float:
        """Share k of the clients' samples that malicious clients hold, from 0 to 1."""
        of_malicious = int(np.isin(self.partition.client, self.partition.malicious).sum())
        return of_malicious / int((self.partition.client >= 0).sum())

    def start(self) -> Tensor:
        """The parameters before the first round, in float64."""
        return self.model.start()

    def features(self, samples: NDArray[np.int64]) -> Tensor:
        """The model's inputs of training samples: features (n, d), or (n, C, H, W) of a network's images."""
        return self._inputs(self.dataset.rows(samples))

    def _inputs(self, raw: NDArray[np.float64]) -> Tensor:
        """The model's inputs of raw values (n, p)."""
        X = data.features(raw, self.dataset.scaling, self.settings.torch_dtype, self.model.constant)
        return X if self.model.constant else self.dataset.images(X)

    def test_set(self) -> tuple[Tensor, Tensor]:
        """Inputs (n, ...) and labels (n,) that the server measures the model on."""
        return self._inputs(self.dataset.x_test), torch.tensor(self.dataset.y_test)

    def validation_set(self) -> tuple[Tensor, Tensor]:
        """Inputs (n, ...) and labels (n,) that the server holds out to see when to stop."""
        samples = self.partition.validation
        return self.features(samples), torch.from_numpy(self.dataset.y_train[samples])

    def gradient(self, theta: Tensor, clients: Iterable[int], round_: int | None) -> Tensor:
        """Clean gradient of the samples that clients use in a round, or of all that they hold.

        Parameters
        ----------
        theta : (A, B) tensor
            The parameters.
        clients : iterable of int
            Numbers of the clients whose samples are taken together.
        round_ : int or None
            The round, from 1; None: whatever the round, all that they hold.

        Returns
        -------
        (A, B) tensor
            The mean over samples, a sample as often as it is used; in the precision of theta; zero without clients.
        """
        samples, counts = self.schedule.samples(clients, round_)
        return self.gradient_of(theta, samples, counts) if len(samples) else torch.zeros_like(theta)

    def gradient_of(self, theta: Tensor, samples: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        """Clean gradient of samples: that of their mean loss under the true labels.

        The last one is remembered: attackers, clients and measures ask for the same.

        Parameters
        ----------
        theta : (A, B) tensor
            The parameters; what is remembered is known by this object, so its values must not be changed in place.
        samples : array of int, (n,)
            Positions in the training set.
        counts : array of int, (n,)
            How often each sample is used.

        Returns
        -------
        (A, B) tensor
            In the precision of theta.
        """
        last = self.memo.get("gradient")
        if last and last.theta is theta and all(map(np.array_equal, last[1:3], (samples, counts))):
            found: Tensor = last.gradient
            return found
        X, y, w = self.batch(samples, counts, theta.device)
        gradient = self.model.gradient(theta.to(X.dtype), X, y, w).to(theta.dtype)
        self.memo["gradient"] = CleanGradient(theta, samples, counts, gradient)
        return gradient

    @cached_property
    def memo(self) -> dict[str, Any]:
        """Results of this experiment that may be asked for again, by name: a cache that starts empty."""
        return {}

    def batch(
        self, samples: NDArray[np.int64], counts: NDArray[np.int64], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training samples as a model takes them.

        Parameters
        ----------
        samples, counts : array of int, (n,)
            Positions in the training set, and how often each is used.
        device : torch.device or str
            The device of the tensors.

        Returns
        -------
        X : (n, ...) tensor
            Inputs, in the precision of the experiment.
        y : (n,) tensor of int64
            True labels.
        w : (n,) tensor
            The counts, in the precision of X.
        """
        X = self.features(samples).to(device)
        y = torch.from_numpy(self.dataset.y_train[samples]).to(device)
        return X, y, torch.from_numpy(counts).to(X)

    def lr(self, round_: int) -> float:
        """Learning rate of a round, of the clients' steps and the server's."""
        settings = self.settings
        factor = protocol.lr_factor(settings.lr_schedule, round_, settings.rounds, settings.lr_every, settings.lr_decay)
        return settings.lr * factor

    def momenta(self, start: Tensor) -> protocol.Momenta:
        """The clients' momenta before the first round, which starts from parameters `start` (A, B)."""
        return protocol.Momenta(self.settings.worker_momentum, self.settings.clients.total, start)

    def rule(self) -> aggregate.Combine:
        """The server's rule: updates (..., m, C, d), weights (m,), client_order (m,) to the aggregate (..., C, d)."""
        strategy, clients = self.settings.strategy, self.settings.per_round or self.settings.clients.total
        return aggregate.make(
            strategy.name,
            f=self.settings.assumed_malicious,
            m=clients,
            args=strategy.args,
            pre=strategy.pre,
            rule=strategy.rule,
        )

    @cached_property
    def trusted(self) -> NDArray[np.int64]:
        """The training samples, ascending, whose true labels the server has too; clients hold them as well.

        InputError where it is to have more than there are.
        """
        held = np.flatnonzero(self.partition.client >= 0)
        count = self.settings.strategy.trusted
        if count > len(held):
            raise InputError(f"strategy.root={count} is more than the {len(held)} samples that clients hold")
        return np.sort(np.random.default_rng([self.settings.seed, streams.TRUSTED]).choice(held, count, replace=False))

    def seen(self, round_: int, theta: Tensor) -> aggregate.Seen:
        """What the server knows of a round besides the updates.

        Parameters
        ----------
        round_ : int
            The round, from 1.
        theta : (A, B) tensor
            The parameters that the server has broadcast in it.

        Returns
        -------
        aggregate.Seen
            What the rule may look at; the server's own update and its noise are computed only if the rule asks for
            them.
        """

        def root() -> Tensor:
            """The server's own update (A, B)."""
            X, y, _ = self.batch(self.trusted, np.ones_like(self.trusted), theta.device)
            return server_update(self, theta, self.lr(round_), self.settings.weight_decay, X, y)

        return aggregate.Seen(
            clients=torch.from_numpy(self.schedule.participants(round_)),
            total=self.settings.clients.total,
            theta=theta,
            lr=self.lr(round_),
            root=root,
            noise=partial(streams.normal_noise, self.settings.seed, streams.SERVER_NOISE, round_, self.theta_shape),
            by_class=self.model.by_class,
        )

    def neighbours(self, client: int) -> NDArray[np.int64]:
        """The nearest neighbours of a client's samples among its own, (n, k) training samples, in the shard's order."""
        shard = self.schedule.shards[client]
        key = self.dataset.fingerprint, shard.tobytes(), self.settings.sanitize.k
        if key not in _neighbours:
            while len(_neighbours) >= NEIGHBOURS_KEPT:
                _neighbours.pop(next(iter(_neighbours)), None)
            raw = self.dataset.rows(shard)
            _neighbours[key] = shard[sanitize.nearest(torch.from_numpy(raw.astype(np.float64)), key[2])]
        return _neighbours[key]

    @cached_property
    def participation(self) -> NDArray[np.bool_]:
        """Which client takes part in which round, (rounds, clients) of bool."""
        rounds, clients = self.settings.rounds, self.settings.clients.total
        found = np.zeros((rounds, clients), bool)
        for i in range(rounds):
            found[i, self.schedule.participants(i + 1)] = True
        return found

    def labels_used(self, rounds: int) -> int:
        """The number of labels that the clients use in the first so many rounds, one of each sample of a round."""
        if self.schedule.per_round is None:
            return rounds * int(self.schedule.used.sum())
        return int((self.participation[:rounds] @ self.schedule.used).sum())

    def relabelled(self, y_train: NDArray[np.int64]) -> "Scenario":
        """The scenario with other training labels (n,)."""
        return replace(self, dataset=replace(self.dataset, y_train=y_train))


@lru_cache(maxsize=64)
def _model(name: str, args: str, loss: str, inputs: tuple[int, ...], classes: int, seed: int) -> models.Model:
    """The model that `models.make` gives, made once for all cells that have it in common."""
    return models.make(name, json.loads(args), loss, inputs, classes, seed)


def make(settings: Settings, verify: bool = True) -> Scenario:
    """The scenario of settings, with the data set loaded.

    Parameters
    ----------
    settings : Settings
        The checked settings of one experiment.
    verify : bool
        Whether the files of the data set are compared with their known sums.

    Returns
    -------
    Scenario

    Raises
    ------
    InputError
        Where the data can't be had, or can't be split as the settings ask.
    """
    return of(settings, data.load(**settings.dataset.model_dump(), verify=verify))


def of(
    settings: Settings,
    dataset: data.Dataset,
    partition: data.Partition | None = None,
    schedule: protocol.Schedule | None = None,
) -> Scenario:
    """The scenario of settings whose data set is loaded.

    Parameters
    ----------
    settings : Settings
        The checked settings of one experiment.
    dataset : data.Dataset
        What `data.load` gives for `settings.dataset`.
    partition : data.Partition, optional
        Who holds what, where nobody deals it, as with `partition=own`, or it is dealt already.
    schedule : protocol.Schedule, optional
        Who uses which samples when, where that is known too.

    Returns
    -------
    Scenario
        The experiment; its settings have absolute paths, import paths that name their file, and the divisor of the
        pixels.

    Raises
    ------
    InputError
        Where the data can't be split as the settings ask, or the model or the trusted samples can't be had.
    """
    settings = _spelled_out(settings, dataset.scale)
    if partition is None and settings.partition.name == "own":
        raise InputError(
            "partition=own needs a deployed federation, whose nodes bring data of their own (docs/deployment.md); use "
            "partition=given to deal the same shards here"
        )
    partition = partition or data.partition(
        dataset.y_train,
        honest=settings.clients.honest,
        malicious=settings.clients.malicious,
        seed=settings.seed,
        held_out=settings.early_stop.held_out,
        **settings.partition.model_dump(),
    )
    scenario = Scenario(settings, dataset, partition, schedule or _schedule(settings, partition))
    _ = scenario.model, scenario.trusted  # what can't be is told before any work starts
    if "classes" in aggregate.needs(settings.strategy.name):
        scenario.model.by_class(scenario.start())
    return scenario


def _schedule(settings: Settings, partition: data.Partition) -> protocol.Schedule:
    """The schedule of clients with the shards of a partition."""
    shards = tuple(partition.shards)
    batch_size = None if settings.batch_size == "full" else settings.batch_size
    sizes = protocol.batch_sizes(np.array([len(shard) for shard in shards]), batch_size)
    return protocol.Schedule(shards, sizes, settings.local_steps, settings.seed, settings.per_round)


def of_nodes(settings: Settings, dataset: data.Dataset, counts: Sequence[int], malicious: Sequence[int]) -> Scenario:
    """The scenario of clients with data of their own.

    Parameters
    ----------
    settings : Settings
        The settings of a run with `partition=own`.
    dataset : Dataset
        As `data.own.at_server` or `data.own.at_node` gives it.
    counts : sequence of int, (m,)
        How many samples each client holds.
    malicious : sequence of int
        The malicious clients, ascending; on a node at most itself, since it knows of no other.
    """
    holder = np.repeat(np.arange(len(counts)), counts)
    return of(settings, dataset, data.Partition(holder, np.array(malicious, np.int64)))


def _spelled_out(settings: Settings, scale: float) -> Settings:
    """Settings with absolute paths, import paths that name their file, and the divisor of the pixels."""
    # clients may live in another folder, and whoever replays a run needs the divisor of its pixels
    here = {
        "root": os.path.abspath(settings.dataset.root),
        "path": settings.dataset.path and os.path.abspath(settings.dataset.path),
        "scale": scale,
    }
    target, direction, folder = settings.attack.target_path, settings.attack.direction, os.getcwd()
    strategy = {"name": plugins.spelled_out(settings.strategy.name, folder)}
    return settings.model_copy(
        update={
            "dataset": settings.dataset.model_copy(update=here),
            "strategy": settings.strategy.model_copy(update=strategy),
            "model": settings.model.model_copy(update={"name": plugins.spelled_out(settings.model.name, folder)}),
            "partition": settings.partition.model_copy(
                update={"path": settings.partition.path and os.path.abspath(settings.partition.path)}
            ),
            "attack": settings.attack.model_copy(
                update={
                    "name": plugins.spelled_out(settings.attack.name, folder),
                    "direction": direction and plugins.spelled_out(direction, folder),
                    "target_path": target and os.path.abspath(target),
                }
            ),
        }
    )


@lru_cache(maxsize=4)
def from_json(text: str) -> Scenario:
    """The scenario of settings as they travel to clients; a process makes each once."""
    return make(settings_from(json.loads(text)), verify=False)


def client_update(scenario: Scenario, client: int, theta: Tensor, round_: int, flips: Flips) -> tuple[Tensor, int]:
    """The parameters of a client after its local steps on labels with flips.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    client : int
        The number of the client.
    theta : (A, B) tensor of float64
        The parameters that the client starts from.
    round_ : int
        The round, counted from 1.
    flips : Flips
        Labels that replace the true ones, of any samples: only those that the client uses matter.

    Returns
    -------
    moved : (A, B) tensor
        The parameters after the local steps, in the precision of theta.
    weight : int
        The number of samples used, a sample as often as it is.
    """
    steps = scenario.schedule.steps(client, round_)
    X = scenario.features(steps.ravel()).to(theta.device)
    y = torch.from_numpy(relabelled(scenario.dataset.y_train, steps, flips)).to(theta.device)
    moved = protocol.local_update(
        scenario.model.gradient,
        theta,
        X.view(*steps.shape, *X.shape[1:]),
        y,
        scenario.lr(round_),
        scenario.settings.weight_decay,
        kept_samples(scenario, client, theta, round_, flips),
    )
    return moved, steps.size


def kept_samples(scenario: Scenario, client: int, theta: Tensor, round_: int, flips: Flips) -> Tensor | None:
    """The samples of a client's local steps whose labels `sanitize` does not contradict.

    Decided once a round, on the labels that the client has received and the parameters that the server has broadcast.

    Parameters
    ----------
    scenario, client, theta, round_, flips
        As `client_update` takes them.

    Returns
    -------
    (steps, size) tensor of bool, or None
        True where a sample is kept; None where the settings ask for no such check.
    """
    chosen = scenario.settings.sanitize
    if chosen.name == "none":
        return None
    steps = scenario.schedule.steps(client, round_)
    samples = np.unique(steps)
    labels = torch.from_numpy(relabelled(scenario.dataset.y_train, samples, flips))
    if chosen.name == "knn":
        shard = scenario.schedule.shards[client]
        order = shard.argsort()
        position = order[np.searchsorted(shard, samples, sorter=order)]
        labels_of_neighbours = relabelled(scenario.dataset.y_train, scenario.neighbours(client)[position], flips)
        near_labels = torch.from_numpy(labels_of_neighbours)
        contradicted = sanitize.contradicted_by_neighbours(labels, near_labels, scenario.classes, chosen.share)
    else:
        X = scenario.features(samples).to(theta.device)
        logits = scenario.model.class_logits(theta.to(X.dtype), X)
        contradicted = sanitize.contradicted_by_model(labels.to(X.device), logits.softmax(-1))
    return ~contradicted[torch.from_numpy(np.searchsorted(samples, steps)).to(contradicted.device)]


def server_update(
    scenario: Scenario, theta: Tensor, lr: float | Tensor, weight_decay: float | Tensor, X: Tensor, y: Tensor
) -> Tensor:
    """The server's own update (..., A, B), as a gradient: its way over lr in as many local steps as clients take.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    theta : (..., A, B) tensor
        The parameters that the server has broadcast; leading axes as the model allows.
    lr, weight_decay : float or (..., 1, 1) tensor
    X, y : tensors
        Inputs (n, ...) and labels (n,) of the samples that it trusts, on all of which each step is taken.
    """
    steps = scenario.settings.local_steps
    X, y = X.expand(steps, *X.shape), y.expand(steps, *y.shape)
    return (theta - protocol.local_update(scenario.model.gradient, theta, X, y, lr, weight_decay)) / lr


def relabelled(y_train: NDArray[np.int64], samples: NDArray[np.int64], flips: Flips) -> NDArray[np.int64]:
    """The labels of samples with flips in place.

    Parameters
    ----------
    y_train : array of int, (N,)
        The labels of all training samples.
    samples : array of int
        Positions in the training set, in any shape.
    flips : Flips
        Labels that replace those of `y_train`.

    Returns
    -------
    array of int
        Shaped as `samples`; `y_train` is not changed.
    """
    y = y_train[samples]
    if not len(flips.samples):
        return y
    place = np.searchsorted(flips.samples, samples).clip(max=len(flips.samples) - 1)
    return np.where(flips.samples[place] == samples, flips.labels[place], y)


def mean_gradient(scenario: Scenario, theta: Tensor, round_: int, flips: Flips = NO_FLIPS) -> Tensor:
    """Mean of the gradients that the clients of a round of one local step send, with the weight decay.

    It is the gradient of the union of their minibatches. Where the clean one is at hand, what few flips change is added
    to it.

    Parameters
    ----------
    scenario : Scenario
        An experiment of one local step.
    theta, round_, flips
        As `client_update` takes them.

    Returns
    -------
    (A, B) tensor
        In the precision of theta.
    """
    schedule, clients = scenario.schedule, scenario.schedule.participants(round_)
    samples, counts = schedule.samples(clients, round_)
    decay = scenario.settings.weight_decay
    changed = np.isin(samples, flips.samples, assume_unique=True)
    last = scenario.memo.get("gradient")
    at_hand = last is not None and last.theta is theta and np.array_equal(last.samples, samples)
    if not changed.any() or (at_hand and changed.sum() < WORTH_ADDING * len(samples)):
        found = scenario.gradient_of(theta, samples, counts)
        if changed.any():
            X, y, w = scenario.batch(samples[changed], counts[changed], theta.device)
            new = torch.from_numpy(relabelled(scenario.dataset.y_train, samples[changed], flips)).to(theta.device)
            gained = scenario.model.relabelling(theta.to(X.dtype), X, y, new, w) / counts.sum()
            found = found + gained.to(theta.dtype)
    else:
        X, _, w = scenario.batch(samples, counts, theta.device)
        y = torch.from_numpy(relabelled(scenario.dataset.y_train, samples, flips)).to(theta.device)
        found = scenario.model.gradient(theta.to(X.dtype), X, y, w).to(theta.dtype)
    return found + decay * theta if decay else found
