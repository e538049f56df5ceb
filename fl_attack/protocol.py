"""One round of the federation, as pure functions; engines only decide where and when they run.

Indices are positions in the training set. A client's minibatches are a function of (seed, client, round) alone, so
that any process can work out any client's part, and do it again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import streams
from fl_attack.choices import LrSchedule as LrSchedule
from fl_attack.choices import Optimizer as Optimizer
from fl_attack.errors import InputError

Gradient = Callable[..., Tensor]  # of theta (A, B), inputs (n, ...), labels (n,), perhaps counts (n,)
ROUNDS_AT_ONCE = 256  # at most
CLIENT_ROUNDS_AT_ONCE = 2**15  # so that a short run of many clients works out few rounds too many
FEW = 8  # clients, whose samples are as soon gathered one by one
MOMENTUM = 0.9
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def batch_sizes(shard_sizes: NDArray[np.int64], batch_size: int | None) -> NDArray[np.int64]:
    """How many samples each client takes in a local step: proportional to its shard, at least one.

    Parameters
    ----------
    shard_sizes : array of int, (m,)
        How many samples each client holds.
    batch_size : int or None
        Samples a step over all clients; None takes whole shards.

    Returns
    -------
    array of int, (m,)
        They add up to `batch_size` (largest remainders first), so that a step sees every sample equally often.

    Raises
    ------
    InputError
        Where `batch_size` is more than there are samples, or less than there are clients.
    """
    clients, total = len(shard_sizes), int(shard_sizes.sum())
    if batch_size is None:
        return shard_sizes.copy()
    if batch_size > total:
        raise InputError(
            f"batch_size={batch_size} is more than the {total} training samples; use at most {total} or full"
        )
    if batch_size < clients:
        raise InputError(
            f"batch_size={batch_size} leaves some of {clients} clients without a sample; use at least {clients}"
        )
    small = np.zeros(clients, bool)  # those whose fair part is below one sample get that one
    while True:
        rest, pool = batch_size - int(small.sum()), int(shard_sizes[~small].sum())
        smaller = small | (shard_sizes * rest < pool)
        if (smaller == small).all():
            break
        small = smaller
    sizes, remainders = np.divmod(shard_sizes * rest, pool)
    sizes[small], remainders[small] = 1, 0
    sizes[np.argsort(-remainders, kind="stable")[: batch_size - sizes.sum()]] += 1
    return sizes


@dataclass(frozen=True)
class Schedule:
    """Which clients take part in a round, and which samples each of them uses."""

    shards: tuple[NDArray[np.int64], ...]  # each client's samples, ascending
    sizes: NDArray[np.int64]  # how many samples a local step takes, by client
    local_steps: int
    seed: int
    per_round: int | None = None  # clients that take part in a round; None: all

    def participants(self, round_: int) -> NDArray[np.int64]:
        """The clients that take part in a round, ascending."""
        if self.per_round is None:
            return np.arange(len(self.shards))
        rng = np.random.default_rng([self.seed, streams.PARTICIPANTS, round_])
        return np.sort(rng.choice(len(self.shards), self.per_round, replace=False))

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which all clients together use as many samples as they hold, rounded up."""
        return -(-sum(map(len, self.shards)) // int(self.sizes.sum() * self.local_steps))

    @cached_property
    def used(self) -> NDArray[np.int64]:
        """How many different samples each client uses in a round in which it takes part, (clients,)."""
        lengths = np.array([len(shard) for shard in self.shards])
        return np.minimum(self.local_steps, lengths // self.sizes) * self.sizes

    def labels_used(self, round_: int) -> int:
        """The number of different samples that all clients together use in a round."""
        return int((self.used if self.per_round is None else self.used[self.participants(round_)]).sum())

    def steps(self, client: int, round_: int) -> NDArray[np.int64]:
        """Samples of a client's local steps in a round, (local_steps, size); those of a step differ.

        A pass over the shard, in a new order, is cut into whole rounds; what is left over sits that pass out. Where
        one pass is too short for a round, each round takes what fits and visits it in a new order until it is done.

        Parameters
        ----------
        client, round_ : int
            The client's number, and the round, from 1.

        Returns
        -------
        array of int, (local_steps, size)
            Positions in the training set.
        """
        shard, size = self.shards[client], int(self.sizes[client])
        if size == len(shard):
            return np.broadcast_to(shard, (self.local_steps, size))
        (samples,) = self.samples_of_rounds(client, round_, 1)
        used = len(samples)
        pass_ = (round_ - 1) // (len(shard) // used)
        missing = self.local_steps * size - used
        again = [samples[self._order(used, client, pass_, i)] for i in range(-(-missing // used))]
        return np.concatenate([samples, *again])[: self.local_steps * size].reshape(self.local_steps, size)

    def samples_of_rounds(self, client: int, first: int, rounds: int) -> NDArray[np.int64]:
        """The different samples that a client uses in each of some rounds in a row.

        Parameters
        ----------
        client : int
            The number of the client.
        first : int
            The first of the rounds, which count from 1.
        rounds : int
            The number of rounds.

        Returns
        -------
        array of int, (rounds, used)
            Positions in the training set, in the order in which the client visits them.
        """
        shard, used = self.shards[client], int(self.used[client])
        if used == len(shard) and self.local_steps == 1:
            return np.broadcast_to(shard, (rounds, used))
        per_pass = len(shard) // used
        start, stop = first - 1, first - 1 + rounds
        passes = range(start // per_pass, -(-stop // per_pass))
        orders = [self._order(len(shard), client, pass_)[: per_pass * used] for pass_ in passes]
        rows = np.concatenate([shard[order].reshape(per_pass, used) for order in orders])
        skipped = start - passes[0] * per_pass
        return rows[skipped : skipped + rounds]

    def samples(self, clients: Iterable[int], round_: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples that some clients use in a round, or all that they hold.

        Parameters
        ----------
        clients : iterable of int
            The numbers of the clients.
        round_ : int or None
            The round, from 1; None: whatever the round, all that they hold.

        Returns
        -------
        samples : array of int, (n,)
            Positions in the training set, ascending, each once.
        counts : array of int, (n,)
            How often each sample is used.
        """
        clients = np.fromiter(clients, np.int64)
        if round_ is None:
            held = np.sort(np.concatenate([np.empty(0, np.int64), *(self.shards[client] for client in clients)]))
            return held, np.ones_like(held)
        if self.local_steps == 1 and self.per_round is None and len(clients) > FEW:
            taken = np.zeros(len(self.shards), bool)
            taken[clients] = True
            found = np.sort(self._all_samples(round_)[1][np.repeat(taken, self.used)])
            return found, np.ones_like(found)
        parts = [np.empty(0, np.int64), *(self.steps(client, round_).ravel() for client in clients)]
        return np.unique(np.concatenate(parts), return_counts=True)

    def samples_of_all(self, round_: int | None) -> NDArray[np.int64]:
        """The samples, ascending, that all participants use in a round; None: all that any client holds."""
        clients = np.arange(len(self.shards)) if round_ is None else self.participants(round_)
        return self.samples(clients, round_)[0]

    def round_samples(self, round_: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples that all participants use in a round of one local step, ascending, and how often each.

        The same as `samples` gives; where everybody takes part, many rounds are worked out at a time.
        """
        if self.per_round is not None:
            return self.samples(self.participants(round_), round_)
        samples, _ = self._all_samples(round_)
        return samples, np.ones_like(samples)

    def _all_samples(self, round_: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of all clients in a round of one local step, ascending, and client after client."""
        at_once = min(ROUNDS_AT_ONCE, max(1, CLIENT_ROUNDS_AT_ONCE // len(self.shards)))
        number, place = divmod(round_ - 1, at_once)
        block = self._block.get("last")
        if block is None or block[0] != number:
            first = 1 + number * at_once
            rows = [self.samples_of_rounds(client, first, at_once) for client in range(len(self.shards))]
            by_client = np.concatenate(rows, 1)
            self._block["last"] = block = number, np.sort(by_client, 1), by_client
        return block[1][place], block[2][place]

    @cached_property
    def _block(self) -> dict[str, Any]:
        """The samples of the rounds that `_all_samples` has worked out last, and the number of their block."""
        return {}

    def _order(self, size: int, client: int, pass_: int, *again: int) -> NDArray[np.int64]:
        """The random order (size,) in which a client visits its samples in a pass: a function of seed and numbers.

        The last one of each client is kept: one number for each sample of the clients that a process asks for.
        """
        key = client, *again
        kept = self._orders.get(key)
        if kept is None or kept[0] != pass_:
            rng = np.random.default_rng([self.seed, streams.BATCHES, client, pass_, *again])
            self._orders[key] = kept = pass_, rng.permutation(size)
        return kept[1]  # not looked up anew: threads may share it

    @cached_property
    def _orders(self) -> dict[tuple[int, ...], tuple[int, NDArray[np.int64]]]:
        """The number of the pass and the order of `_order`, by client."""
        return {}


def shuffled(seed: int, round_: int, clients: int) -> NDArray[np.int64]:
    """The random order of the clients of a round, for rules that make random choices.

    Parameters
    ----------
    seed : int
        The seed of the experiment.
    round_ : int
        The round, from 1.
    clients : int
        How many clients take part in it.

    Returns
    -------
    array of int, (clients,)
        A permutation: a function of seed and round.
    """
    return np.random.default_rng([seed, streams.CLIENT_ORDER, round_]).permutation(clients)


def lr_factor(schedule: LrSchedule, round_: int, rounds: int, every: int | None = None, decay: float = 0.1) -> float:
    """By what the learning rate of a round, counted from 1, is multiplied.

    Parameters
    ----------
    schedule
        `constant` 1; `cosine` `(1 + cos(pi (t - 1) / T)) / 2` (Loshchilov and Hutter 2017,
        https://arxiv.org/abs/1608.03983); `step` `decay^((t - 1) // every)`; `inverse` `1 / (1 + (t - 1) / every)`.
    round_, rounds
        The round t, counted from 1, and the number T of rounds.
    every
        Rounds between two steps of `step`; None is a third of all, rounded up.
    decay
        The factor at each step of `step`.
    """
    past, every = round_ - 1, every or -(-rounds // 3)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * past / rounds)) / 2
    if schedule == "step":
        return float(decay ** (past // every))
    if schedule == "inverse":
        return 1 / (1 + past / every)
    return 1.0


def local_update(
    gradient: Gradient,
    theta: Tensor,
    X: Tensor,
    y: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """Parameters after one SGD step on each minibatch.

    Parameters
    ----------
    gradient
        Gradient (A, B) of the mean loss, given theta, inputs, labels and, with `kept`, how often each counts.
    theta : (A, B) tensor
        Keeps its own precision; gradients are computed in that of X.
    X : (steps, size, ...) tensor
        Inputs of each minibatch.
    y : (steps, size) tensor of int64
        Labels.
    lr : float
        Learning rate.
    weight_decay : float
        The step is along the gradient and this times theta, as in `torch.optim.SGD`.
    kept : (steps, size) tensor of bool, optional
        The samples over which a step's mean is taken; it is along no gradient where none is.

    Returns
    -------
    (A, B) tensor
    """
    decays = isinstance(weight_decay, Tensor) or weight_decay
    for i, (X_step, y_step) in enumerate(zip(X, y, strict=True)):
        if kept is None:
            step = gradient(theta.to(X.dtype), X_step, y_step).to(theta.dtype)
        elif bool(kept[i].any()):
            step = gradient(theta.to(X.dtype), X_step, y_step, kept[i].to(X.dtype)).to(theta.dtype)
        else:
            step = torch.zeros_like(theta)
        theta = theta - lr * (step + weight_decay * theta if decays else step)
    return theta


class Momenta:
    """The momentum of each client's updates, `m <- beta m + (1 - beta) u`, from zero.

    Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333. A client that sits a round out keeps what it has.
    """

    def __init__(self, beta: float, clients: int, start: Tensor) -> None:
        """`start` (A, B) is any tensor of the updates' shape."""
        self.beta = beta
        self.table = start.new_zeros(clients if beta else 0, *start.shape)

    def of(self, clients: Sequence[int] | NDArray[np.int64]) -> Tensor | None:
        """The momenta (m, A, B) of clients before a round; None where clients have none."""
        return self.table[torch.as_tensor(clients, device=self.table.device)] if self.beta else None

    def note(self, clients: Sequence[int] | NDArray[np.int64], moved: Tensor) -> None:
        """Remember the momenta of clients after a round.

        Parameters
        ----------
        clients : sequence of int, (m,)
            The clients that took part in the round.
        moved : Tensor, (m, A, B)
            The momenta of these clients after the round, in their order.
        """
        if self.beta:
            self.table[torch.as_tensor(clients, device=self.table.device)] = moved


def with_momentum(beta: float, before: Tensor | None, update: Tensor) -> Tensor:
    """The momentum after an update.

    Parameters
    ----------
    beta : float
        How much of the old momentum stays, from 0 to below 1.
    before : Tensor or None
        The momentum before, shaped as the update; None where there is none.
    update : Tensor
        The new update.

    Returns
    -------
    Tensor
        `beta before + (1 - beta) update`, shaped as both; the update itself without `before`.
    """
    return update if before is None else beta * before + (1 - beta) * update


class ServerState(NamedTuple):
    """What the server's optimizer remembers between rounds."""

    step: int  # the number of steps taken
    first: Tensor  # momentum, or adam's mean of gradients, shaped as theta
    second: Tensor  # adam's mean of squared gradients, shaped as theta


def initial_state(theta: Tensor) -> ServerState:
    """The optimizer's state before the first round: zeros, shaped as theta."""
    return ServerState(0, torch.zeros_like(theta), torch.zeros_like(theta))


def server_step(
    optimizer: Optimizer, theta: Tensor, gradient: Tensor, lr: float | Tensor, state: ServerState
) -> tuple[Tensor, ServerState]:
    """Parameters and state after the server has taken the aggregated gradient.

    Parameters
    ----------
    optimizer : {"sgd", "momentum", "adam"}
        sgd `theta - lr g`; momentum 0.9, not dampened; adam with betas 0.9 and 0.999 and eps 1e-8.
    theta, gradient : (..., A, B) tensor
        The parameters and the aggregate.
    lr : float or (..., 1, 1) tensor
        The learning rate.
    state : ServerState
        What the optimizer remembers of the rounds before.

    Returns
    -------
    theta : (..., A, B) tensor
    state : ServerState
        Neither argument is changed.

    References
    ----------
    Polyak 1964 (momentum); Kingma and Ba 2015, https://arxiv.org/abs/1412.6980 (adam).
    """
    step = state.step + 1
    if optimizer == "sgd":
        return theta - lr * gradient, state._replace(step=step)
    if optimizer == "momentum":
        first = MOMENTUM * state.first + gradient
        return theta - lr * first, state._replace(step=step, first=first)
    beta1, beta2 = ADAM_BETAS
    first = beta1 * state.first + (1 - beta1) * gradient
    second = beta2 * state.second + (1 - beta2) * gradient**2
    unbiased = first / (1 - beta1**step)
    scale = (second / (1 - beta2**step)).sqrt() + ADAM_EPS
    return theta - lr * unbiased / scale, ServerState(step, first, second)
