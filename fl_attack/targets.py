"""What a targeted attacker steers to: the parameters of the same training, honest, on fully flipped labels."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, data, numerics, plugins, protocol
from fl_attack import scenario as scenarios_
from fl_attack.data import cache
from fl_attack.errors import InputError, RunError
from fl_attack.scenario import NO_FLIPS, Scenario

OnRound = Callable[[int], None]  # gets the number of the round that is done
FEATURES_IN_MEMORY = 2**30  # bytes of features that a training in this process may keep
PIECE = 2**20  # numbers of features of a piece that stays in the cache
# settings that the target depends on, besides data, partition and schedule
TRAINING = {
    *("rounds", "batch_size", "local_steps", "lr", "lr_schedule", "lr_every", "lr_decay", "weight_decay"),
    *("worker_momentum", "server_optimizer", "model", "seed", "dtype"),
}


def target(scenario: Scenario, device: torch.device | str = "cpu") -> Tensor:
    """The parameters that a targeted attacker steers to, kept for the next time they are asked for.

    Parameters
    ----------
    scenario : Scenario
        The experiment.
    device : torch.device or str
        The device of the result.

    Returns
    -------
    Tensor
        Shaped as theta, in float64.
    """
    if "target" not in scenario.memo:
        scenario.memo["target"] = load_target(scenario)
    found: Tensor = scenario.memo["target"]
    return found.to(device)


def load_target(scenario: Scenario, on_round: OnRound = lambda round_: None) -> Tensor:
    """theta_target: the file of `attack.target_path`, or trained as the run would be, honestly, on flipped labels.

    Parameters
    ----------
    scenario : Scenario
        The experiment whose attackers steer to it.
    on_round : callable, optional
        Told the number of each round of training that is done.

    Returns
    -------
    Tensor
        Shaped as theta, in float64. What was trained is cached under a key of everything that it depends on.

    Raises
    ------
    InputError
        Where a file of the user's holds none of the model's parameters.
    RunError
        Where the training diverges.
    """
    return load_targets([scenario], on_round)[0]


def load_targets(scenarios: Sequence[Scenario], on_round: OnRound = lambda round_: None) -> list[Tensor]:
    """The targets of experiments that differ in their attack, learning rate and optimizer alone.

    Parameters
    ----------
    scenarios : sequence of Scenario
        The experiments.
    on_round : callable, optional
        Told the number of each round of training that is done; those that are not there yet are trained together.

    Returns
    -------
    list of Tensor, (A, B) each
        In the order of the experiments, each as `load_target` gives it, which raises what that does.
    """
    found = _trained(scenarios, on_round)
    for cell, theta in zip(scenarios, found, strict=True):
        settings = cell.settings
        if theta.isfinite().all():
            continue
        if settings.attack.target_path is not None:
            raise InputError(f"theta in {settings.attack.target_path} is not finite; a finite array is needed")
        instead = ", or give attack.target_path" if "target_path" in attack.find(settings.attack.name).uses else ""
        raise RunError(
            f"attack={settings.attack.name} has no target: honest training on flipped labels diverges "
            f"(lr={settings.lr:g}); use a smaller lr{instead}"
        )
    return found


def diverging(scenarios: Sequence[Scenario]) -> list[int]:
    """The positions of those of the experiments whose targets `load_targets` can't train, since training diverges.

    Parameters
    ----------
    scenarios : sequence of Scenario
        As `load_targets` takes them, attacked or not.
    """
    alike: dict[str, list[int]] = {}  # positions of cells by what their targets depend on
    for i, cell in enumerate(scenarios):
        threat = cell.settings.attack
        if cell.settings.attacked and threat.steers and threat.target_path is None:
            alike.setdefault(cell.settings.model_dump_json(include=TRAINING), []).append(i)
    found = _trained([scenarios[members[0]] for members in alike.values()])
    pairs = zip(alike.values(), found, strict=True)
    return [i for members, theta in pairs if not theta.isfinite().all() for i in members]


def _trained(scenarios: Sequence[Scenario], on_round: OnRound = lambda round_: None) -> list[Tensor]:
    """The targets of experiments, which need not be finite; those that are not there are trained together."""
    files = [_target_file(cell) for cell in scenarios]
    missing = {file: cell for file, cell in zip(files, scenarios, strict=True) if not _is_target(file, cell)}
    if missing:
        first = next(iter(missing.values()))
        flipped = attack.flipped_target(torch.tensor(first.dataset.y_train), first.classes).numpy()
        trained = train_all([cell.relabelled(flipped) for cell in missing.values()], on_round)
        for file, theta in zip(missing, trained, strict=True):
            cache.write_whole(file, partial(np.savez, theta=theta.numpy()))
    return [_read_target(file, cell) for file, cell in zip(files, scenarios, strict=True)]


def train(scenario: Scenario, on_round: OnRound = lambda round_: None) -> Tensor:
    """Parameters after all rounds without any attack under the mean, computed in this process.

    Parameters
    ----------
    scenario : Scenario
        The experiment; its attack, its rule and its engine are left out of account.
    on_round : callable, optional
        Called with the number of each round that is done.

    Returns
    -------
    (A, B) tensor of float64
    """
    return train_all([scenario], on_round)[0]


def train_all(scenarios: Sequence[Scenario], on_round: OnRound = lambda round_: None) -> list[Tensor]:
    """Parameters after all rounds of honest trainings that differ in learning rate and optimizer alone.

    Each minibatch is fetched once for all of them.

    Parameters
    ----------
    scenarios : sequence of Scenario
        The experiments, one or more, of the same data, partition and schedule.
    on_round : callable, optional
        Told the number of each round that all of them have done.

    Returns
    -------
    list of (A, B) tensors of float64
        In the order of the experiments, each as `train` gives it.
    """
    first, thetas = scenarios[0], [cell.start() for cell in scenarios]
    gradients = _of_unions(first) if first.model.linear and first.settings.local_steps == 1 else None
    states = [protocol.initial_state(theta) for theta in thetas]
    momenta = [cell.momenta(theta) for cell, theta in zip(scenarios, thetas, strict=True)]
    for round_ in range(1, first.settings.rounds + 1):
        shared = gradients(thetas, round_) if gradients and not first.settings.worker_momentum else None
        for i, cell in enumerate(scenarios):
            if shared is not None:
                decay = cell.settings.weight_decay
                aggregate = shared[i] + decay * thetas[i] if decay else shared[i]
            elif cell.settings.local_steps == 1 and not cell.settings.worker_momentum:
                aggregate = scenarios_.mean_gradient(cell, thetas[i], round_)
            else:
                aggregate = _mean_update(cell, thetas[i], round_, momenta[i])
            optimizer = cell.settings.server_optimizer
            thetas[i], states[i] = protocol.server_step(optimizer, thetas[i], aggregate, cell.lr(round_), states[i])
        on_round(round_)
    return thetas


def _of_unions(first: Scenario) -> Callable[[Sequence[Tensor], int], list[Tensor]]:
    """A function of thetas and a round: the gradient (A, B) of each model on all samples of that round.

    The samples are fetched once for all models, and not again in a round of the same ones.
    """
    take, schedule = _taker(first), first.schedule
    last: NDArray[np.int64] = np.empty(0, np.int64)
    batch: tuple[Tensor, Tensor] | None = None

    def gradients(thetas: Sequence[Tensor], round_: int) -> list[Tensor]:
        """The gradient (A, B) of each model on the samples of a round."""
        nonlocal last, batch
        samples, _ = schedule.round_samples(round_)  # each once: clients share none
        if batch is None or not np.array_equal(samples, last):  # full batches are all the same
            last, batch = samples, (take(samples), torch.from_numpy(first.dataset.y_train[samples]))
        return _gradients(first, thetas, *batch)

    return gradients


def _taker(first: Scenario) -> Callable[[NDArray[np.int64]], Tensor]:
    """A function of samples (n,) that gives their features (n, d): from memory where they fit and are used again."""
    x, size, dtype = first.dataset.x_train, int(first.schedule.sizes.sum()), first.settings.torch_dtype
    few_uses = first.settings.rounds * size <= 2 * len(x) or size == len(x) or first.settings.local_steps > 1
    if few_uses or x.size * dtype.itemsize > FEATURES_IN_MEMORY:
        return first.features
    return data.Stored(x, first.dataset.scaling, dtype).features_of


def _gradients(first: Scenario, thetas: Sequence[Tensor], X: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients (A, B) of several linear models; samples go a piece at a time, which all read from the cache."""

    def gradient(theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """The gradient (A, B) of one model in the precision of theta, computed in that of X."""
        return first.model.gradient(theta.to(X.dtype), X, y).to(theta.dtype)

    rows = max(1, PIECE // X.shape[1])
    if len(X) <= 2 * rows:
        return [gradient(theta, X, y) for theta in thetas]
    sums = [torch.zeros_like(theta) for theta in thetas]
    for X_piece, y_piece in zip(X.split(rows), y.split(rows), strict=True):
        for theta, total in zip(thetas, sums, strict=True):
            total.add_(gradient(theta, X_piece, y_piece), alpha=len(X_piece))
    return [total / len(X) for total in sums]


def _mean_update(cell: Scenario, theta: Tensor, round_: int, momenta: protocol.Momenta) -> Tensor:
    """The mean (A, B) of the updates that the clients of a round send honestly, as a gradient; `momenta` go on."""
    clients, sizes, lr = cell.schedule.participants(round_), cell.schedule.sizes, cell.lr(round_)
    weights = sizes[clients] / sizes[clients].sum()
    if not cell.settings.worker_momentum:
        moved = sum(
            w * scenarios_.client_update(cell, int(c), theta, round_, NO_FLIPS)[0]
            for c, w in zip(clients, weights, strict=True)
        )
        found: Tensor = (theta - moved) / lr
        return found
    updates = [(theta - scenarios_.client_update(cell, int(c), theta, round_, NO_FLIPS)[0]) / lr for c in clients]
    after = protocol.with_momentum(momenta.beta, momenta.of(clients), torch.stack(updates))
    momenta.note(clients, after)
    return (after * torch.from_numpy(weights)[:, None, None]).sum(0)


def _target_file(scenario: Scenario) -> Path:
    """Where the target of an experiment is kept, under a hash of everything that it depends on."""
    settings, path = scenario.settings, scenario.settings.attack.target_path
    if path is not None:
        return Path(path)
    recipe = hashlib.sha256(scenario.partition.client.tobytes())
    recipe.update(f"{scenario.schedule.per_round} {plugins.source_digest(settings.model.name)}".encode())
    recipe.update((settings.model_dump_json(include=TRAINING) + scenario.dataset.fingerprint).encode())
    recipe.update(numerics.versions().encode())
    return cache.folder() / "targets" / f"{recipe.hexdigest()[:24]}.npz"


def _is_target(file: Path, scenario: Scenario) -> bool:
    """Whether a file need not be trained: it holds a target, or is the user's own, which is not looked into yet."""
    if scenario.settings.attack.target_path is not None:
        return True
    try:
        _read_target(file, scenario)
    except InputError:
        return False
    return True


def _read_target(file: Path, scenario: Scenario) -> Tensor:
    """The parameters in a file, shaped as theta, finite or not; InputError where they are not those of the model."""
    shape = scenario.theta_shape
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            theta = scenario.model.theta_of(stored)
    except Exception as error:
        raise InputError(
            f"{file} can't be read as a target (an .npz file with theta of shape {shape}): {error}"
        ) from None
    if theta.shape != shape:
        raise InputError(f"theta in {file} has shape {theta.shape}; an array of shape {shape} is needed")
    return torch.from_numpy(theta)
