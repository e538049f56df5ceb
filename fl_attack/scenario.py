"""What the rounds of one experiment share: its data, who holds what, and what the attacker can work out.

A scenario is a pure function of the settings, so every process makes its own from them; the images themselves are
memory-mapped and shared.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import __version__, aggregate, attack, data, model, plugins, protocol
from fl_attack.config import Settings, settings_from
from fl_attack.data import cache
from fl_attack.errors import InputError

Progress = Callable[[int], None]


class Flips(NamedTuple):
    """The labels that attackers write in a round, and how many they were allowed to."""

    samples: NDArray[np.int64]  # ascending
    labels: NDArray[np.int64]
    allowed: int


AT_HAND = 2**30  # bytes of features that a training in this process may keep
PIECE = 2**20  # numbers of features of a piece that stays in the cache
NO_FLIPS = Flips(np.empty(0, np.int64), np.empty(0, np.int64), 0)


@dataclass(frozen=True)
class Scenario:
    """An experiment, ready to run."""

    settings: Settings
    dataset: data.Dataset
    partition: data.Partition
    schedule: protocol.Schedule

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.dataset.classes)

    @property
    def theta_shape(self) -> tuple[int, int]:
        """Outputs C and features d, the constant included."""
        return model.output_count(self.classes), self.dataset.x_train.shape[1] + 1

    @property
    def write_access(self) -> float:
        """Share k of the clients' samples that malicious ones hold."""
        theirs = int(np.isin(self.partition.client, self.partition.malicious).sum())
        return theirs / int((self.partition.client >= 0).sum())

    def start(self) -> Tensor:
        """The parameters before the first round: zero."""
        return torch.zeros(self.theta_shape, dtype=torch.float64)

    def features(self, samples: NDArray[np.int64]) -> Tensor:
        """Features of training samples, (n, d)."""
        x = np.asarray(self.dataset.x_train)  # indexing the bare array is quicker than the memory map
        raw = x if len(samples) == len(x) and (np.diff(samples) == 1).all() else x[samples]
        return data.features(raw, self.dataset.scale, self.settings.torch_dtype)

    def test_set(self) -> tuple[Tensor, Tensor]:
        """Features and labels that the server measures the model on."""
        X = data.features(self.dataset.x_test, self.dataset.scale, self.settings.torch_dtype)
        return X, torch.tensor(self.dataset.y_test)

    def validation_set(self) -> tuple[Tensor, Tensor]:
        """Features and labels that the server holds out to see when to stop."""
        samples = self.partition.validation
        return self.features(samples), torch.from_numpy(self.dataset.y_train[samples])

    def gradient(self, theta: Tensor, clients: Iterable[int], round_: int) -> Tensor:
        """Clean gradient of the clients' samples in a round, (C, d), in the precision of theta."""
        return self.gradient_of(theta, *self.schedule.samples(clients, round_))

    def gradient_of(self, theta: Tensor, samples: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
        """Clean gradient of samples that count so often, (C, d), in the precision of theta."""
        return _gradient(theta, *self.batch(samples, counts))

    def batch(self, samples: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, d), labels (n,) and how often each counts (n,), in the precision of the features."""
        X = self.features(samples)
        return X, torch.from_numpy(self.dataset.y_train[samples]), torch.from_numpy(counts).to(X.dtype)

    def rule(self) -> aggregate.Combine:
        """The server's rule: updates (..., m, C, d), weights (m,) and lots (m,) to the aggregate (..., C, d)."""
        strategy, clients = self.settings.strategy, self.settings.per_round or self.settings.clients.total
        return aggregate.make(
            strategy.name,
            f=self.settings.tolerated,
            m=clients,
            args=strategy.args,
            pre=strategy.pre,
            rule=strategy.rule,
        )

    @cached_property
    def takes_part(self) -> NDArray[np.bool_]:
        """(rounds, clients): who takes part when."""
        rounds, clients = self.settings.rounds, self.settings.clients.total
        found = np.zeros((rounds, clients), bool)
        for i in range(rounds):
            found[i, self.schedule.drawn(i + 1)] = True
        return found

    @cached_property
    def target(self) -> Tensor:
        """The parameters that a targeted attacker steers to, (C, d)."""
        return load_target(self)

    def relabelled(self, y_train: NDArray[np.int64]) -> "Scenario":
        """The same experiment with other training labels."""
        dataset = self.dataset.__class__(**{**vars(self.dataset), "y_train": y_train})
        return Scenario(self.settings, dataset, self.partition, self.schedule)


def make(settings: Settings, verify: bool = True) -> Scenario:
    """The scenario of settings. InputError where the data can't be had or can't be split as asked."""
    return of(settings, data.load(**settings.dataset.model_dump(), verify=verify))


def of(settings: Settings, dataset: data.Dataset) -> Scenario:
    """The scenario of settings whose dataset is loaded. InputError where it can't be split as asked."""
    settings = _spelled_out(settings, dataset.scale)
    partition = data.partition(
        dataset.y_train,
        honest=settings.clients.honest,
        malicious=settings.clients.malicious,
        seed=settings.seed,
        held_out=settings.early_stop.held_out,
        **settings.partition.model_dump(),
    )
    shards = tuple(partition.shards)
    batch_size = None if settings.batch_size == "full" else settings.batch_size
    sizes = protocol.batch_sizes(np.array([len(shard) for shard in shards]), batch_size)
    schedule = protocol.Schedule(shards, sizes, settings.local_steps, settings.seed, settings.per_round)
    return Scenario(settings, dataset, partition, schedule)


def _spelled_out(settings: Settings, scale: float) -> Settings:
    # clients may live in another folder, and whoever replays a run needs the divisor of its pixels
    here = {
        "root": os.path.abspath(settings.dataset.root),
        "path": settings.dataset.path and os.path.abspath(settings.dataset.path),
        "scale": scale,
    }
    target, folder = settings.attack.target_path, os.getcwd()
    strategy = {"name": plugins.spelled_out(settings.strategy.name, folder)}
    return settings.model_copy(
        update={
            "dataset": settings.dataset.model_copy(update=here),
            "strategy": settings.strategy.model_copy(update=strategy),
            "partition": settings.partition.model_copy(
                update={"path": settings.partition.path and os.path.abspath(settings.partition.path)}
            ),
            "attack": settings.attack.model_copy(
                update={
                    "name": plugins.spelled_out(settings.attack.name, folder),
                    "target_path": target and os.path.abspath(target),
                }
            ),
        }
    )


@lru_cache(maxsize=4)
def from_json(text: str) -> Scenario:
    """The scenario of settings as they travel to clients; a process makes each once."""
    return make(settings_from(json.loads(text)), verify=False)


def train(scenario: Scenario, progress: Progress = lambda round_: None) -> Tensor:
    """Parameters (C, d) after all rounds without any attack under the mean, in this process."""
    return train_all([scenario], progress)[0]


def train_all(scenarios: Sequence[Scenario], progress: Progress = lambda round_: None) -> list[Tensor]:
    """`train` of experiments that differ in learning rate and optimizer alone; each minibatch is fetched once."""
    like, thetas = scenarios[0], [made.start() for made in scenarios]
    take, schedule = _taker(like), like.schedule
    states = [protocol.initial_state(theta) for theta in thetas]
    last: NDArray[np.int64] = np.empty(0, np.int64)
    for round_ in range(1, like.settings.rounds + 1):
        if like.settings.local_steps == 1:  # the weighted mean of the gradients is the gradient of the union
            samples, _ = schedule.samples_once(round_)  # each once: clients share none
            if not np.array_equal(samples, last):  # full batches are all the same
                last, batch = samples, (take(samples), torch.from_numpy(like.dataset.y_train[samples]))
            aggregates = _gradients(thetas, *batch)
        else:
            aggregates = [_moved(made, theta, round_) for made, theta in zip(scenarios, thetas, strict=True)]
        for i, made in enumerate(scenarios):
            optimizer, lr = made.settings.server_optimizer, made.settings.lr
            thetas[i], states[i] = protocol.server_step(optimizer, thetas[i], aggregates[i], lr, states[i])
        progress(round_)
    return thetas


def _taker(like: Scenario) -> Callable[[NDArray[np.int64]], Tensor]:
    """What gives the features of samples: from all at hand, where these are not too many and used a few times."""
    x, size, dtype = like.dataset.x_train, int(like.schedule.sizes.sum()), like.settings.torch_dtype
    few_uses = like.settings.rounds * size <= 2 * len(x) or size == len(x) or like.settings.local_steps > 1
    if few_uses or x.size * dtype.itemsize > AT_HAND:
        return like.features
    return data.Stored(x, like.dataset.scale, dtype).take


def _gradient(theta: Tensor, X: Tensor, y: Tensor, counts: Tensor | None = None) -> Tensor:
    return model.gradient(theta.to(X.dtype), X, y, counts).to(theta.dtype)


def _gradients(thetas: Sequence[Tensor], X: Tensor, y: Tensor) -> list[Tensor]:
    """`_gradient` of several models; of many samples a piece at a time, which all models read from the cache."""
    rows = max(1, PIECE // X.shape[1])
    if len(X) <= 2 * rows:
        return [_gradient(theta, X, y) for theta in thetas]
    sums = [torch.zeros_like(theta) for theta in thetas]
    for X_piece, y_piece in zip(X.split(rows), y.split(rows), strict=True):
        for theta, total in zip(thetas, sums, strict=True):
            total.add_(_gradient(theta, X_piece, y_piece), alpha=len(X_piece))
    return [total / len(X) for total in sums]


def _moved(made: Scenario, theta: Tensor, round_: int) -> Tensor:
    """What the clients' local steps amount to, as a gradient."""
    clients, sizes = made.schedule.drawn(round_), made.schedule.sizes
    weights = sizes[clients] / sizes[clients].sum()
    moved = sum(
        w * client_update(made, int(c), theta, round_, NO_FLIPS)[0] for c, w in zip(clients, weights, strict=True)
    )
    found: Tensor = (theta - moved) / made.settings.lr
    return found


def client_update(scenario: Scenario, client: int, theta: Tensor, round_: int, flips: Flips) -> tuple[Tensor, int]:
    """A client's parameters (C, d) after its local steps on labels with flips, and the samples it used."""
    steps = scenario.schedule.steps(client, round_)
    X = scenario.features(steps.ravel()).view(*steps.shape, -1)
    y = scenario.dataset.y_train[steps]
    if len(flips.samples):
        place = np.searchsorted(flips.samples, steps).clip(max=len(flips.samples) - 1)
        y = np.where(flips.samples[place] == steps, flips.labels[place], y)
    return protocol.local_update(theta, X, torch.from_numpy(y), scenario.settings.lr), steps.size


def load_target(scenario: Scenario, progress: Progress = lambda round_: None) -> Tensor:
    """theta_target: the file of `attack.target_path`, or trained as the run would be, honestly, on flipped labels.

    What was trained is cached under a key of everything that it depends on.
    """
    return load_targets([scenario], progress)[0]


def load_targets(scenarios: Sequence[Scenario], progress: Progress = lambda round_: None) -> list[Tensor]:
    """`load_target` of experiments that differ in their attack, learning rate and optimizer alone."""
    files = [_target_file(made) for made in scenarios]
    missing = {file: made for file, made in zip(files, scenarios, strict=True) if not _is_target(file, made)}
    if missing:
        like = next(iter(missing.values()))
        flipped = attack.flipped_target(torch.tensor(like.dataset.y_train), like.classes).numpy()
        trained = train_all([made.relabelled(flipped) for made in missing.values()], progress)
        for file, target in zip(missing, trained, strict=True):
            cache.write_whole(file, partial(np.savez, theta=target.numpy()))
    return [_read_target(file, made.theta_shape) for file, made in zip(files, scenarios, strict=True)]


def _target_file(scenario: Scenario) -> Path:
    settings, path = scenario.settings, scenario.settings.attack.target_path
    if path is not None:
        return Path(path)
    kept = {"rounds", "batch_size", "local_steps", "lr", "server_optimizer", "seed", "dtype"}
    recipe = hashlib.sha256(scenario.partition.client.tobytes())
    recipe.update(f"{scenario.schedule.per_round}".encode())
    recipe.update((settings.model_dump_json(include=kept) + scenario.dataset.fingerprint + __version__).encode())
    return cache.folder() / "targets" / f"{recipe.hexdigest()[:24]}.npz"


def _is_target(file: Path, scenario: Scenario) -> bool:
    """Whether a target is there; one of ours that is damaged is trained anew, one of the user's is an error."""
    if scenario.settings.attack.target_path is not None:
        return True
    try:
        _read_target(file, scenario.theta_shape)
    except InputError:
        return False
    return True


def _read_target(file: Path, shape: tuple[int, int]) -> Tensor:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            theta = np.asarray(stored["theta"], np.float64)
    except Exception as error:
        raise InputError(
            f"{file} can't be read as a target (an .npz file with theta of shape {shape}): {error}"
        ) from None
    if theta.shape != shape or not np.isfinite(theta).all():
        raise InputError(f"theta in {file} has shape {theta.shape}; a finite array of shape {shape} is needed")
    return torch.from_numpy(theta)
