"""The random streams of one seed: each purpose has a number of its own, so that no setting shifts what another draws.

A partition is drawn before all that, from streams of its own in `data.partition`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCHES = 1  # the order in which a client visits its samples
PARTICIPANTS = 2  # who takes part in a round
LABEL_NOISE = 3  # of attacks on labels
UPDATE_NOISE = 4  # of attacks on updates
KNOWN_CLIENTS = 5  # whose gradients attackers know
CLIENT_ORDER = 6  # the order of a round's clients, by which rules make random choices
PLAN = 7  # the first flips of a plan, and its tries
SAMPLE = 8  # the training samples that attackers measure harm on
TRUSTED = 9  # the training samples whose true labels the server has
# the minibatches that planners imagine; drawn with a round, which tells them from TRUSTED: a number of its own would
# change the numbers of all plans with attack.foresight=simulated that are published
IMAGINED = 9
SERVER_NOISE = 10  # of rules that add noise


def label_noise(
    seed: int,
    round_: int,
    samples: NDArray[np.int64],
    all_samples: Callable[[], NDArray[np.int64]],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Random numbers of samples in a round; those of a sample do not depend on which others are asked for.

    Parameters
    ----------
    seed, round_ : int
        The seed of the experiment, and the round, counted from 1.
    samples : array of int, (n,)
        Positions in the training set.
    all_samples : callable
        A function without arguments that gives the samples of all clients in the round, in any order, these among them.
    device, dtype
        Device and precision of the result.

    Returns
    -------
    Tensor, (n, 2)
        Random numbers, uniform in [0, 1).
    """
    everyone = np.sort(all_samples())
    uniform = np.random.default_rng([seed, LABEL_NOISE, round_]).random((len(everyone), 2))
    return torch.from_numpy(uniform[np.searchsorted(everyone, samples)]).to(device, dtype)


def normal_noise(
    seed: int,
    stream: int,
    round_: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random numbers for attacks on updates, or for rules that add noise.

    Parameters
    ----------
    seed, round_ : int
        As `label_noise` takes them.
    stream : int
        The number of the stream, such as `UPDATE_NOISE`.
    shape : sequence of int
        Shape of the result.
    device, dtype
        Device and precision of the result; the numbers are drawn in float64.

    Returns
    -------
    Tensor
        Standard normal random numbers.
    """
    return torch.from_numpy(np.random.default_rng([seed, stream, round_]).standard_normal(shape)).to(device, dtype)


def known_rank(seed: int, round_: int, clients: int) -> NDArray[np.float64]:
    """A random number for each client: attackers who know a part of the honest ones know those of the lowest.

    Parameters
    ----------
    seed, round_ : int
        As `label_noise` takes them.
    clients : int
        The number of clients.

    Returns
    -------
    (clients,) array
        Random numbers, uniform in [0, 1).
    """
    return np.random.default_rng([seed, KNOWN_CLIENTS, round_]).random(clients)
