"""Labels that a client's own data contradict, which honest machinery leaves out before it trains.

The attacker writes labels and no more: the machine that trains on them is honest, and so is what it does to the labels
that it receives. Shapes: n samples of one client, leading axes are experiments.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

ROWS_AT_ONCE = 1024  # samples whose distances to all others are held at a time
MARGIN = 1e-5  # relative difference up to which probabilities are equal


def contradicted_by_neighbours(labels: Tensor, of_neighbours: Tensor, classes: int, share: float) -> Tensor:
    """Which samples have neighbours of which at least a share, and more than agree with them, have one other label.

    Parameters
    ----------
    labels : (..., n) tensor of int64
    of_neighbours : (..., n, k) tensor of int64
        The labels of each sample's nearest neighbours.
    classes : int
    share : float
        The least share of the neighbours, from 0.5 to 1.

    Returns
    -------
    (..., n) tensor of bool

    References
    ----------
    Paudice, Muñoz-González, Lupu (2018). Label sanitization against label flipping poisoning attacks. arXiv 1803.00992.
    They give the sample its neighbours' label; here it is left out.
    """
    votes = functional.one_hot(of_neighbours, classes).sum(-2)
    own = functional.one_hot(labels, classes).bool()
    agree = votes.masked_fill(~own, 0).sum(-1)
    largest = votes.masked_fill(own, -1).amax(-1)
    return (largest >= share * of_neighbours.shape[-1]) & (largest > agree)


def contradicted_by_model(labels: Tensor, probability: Tensor) -> Tensor:
    """Which samples the model takes for another class than that of their label, by confident learning.

    A sample counts as of class j where its probability of j is at least the mean over the samples labelled j; of
    several such classes, of the likeliest. It is contradicted where that is not its label.

    Parameters
    ----------
    labels : (..., n) tensor of int64
    probability : (..., n, classes) tensor
        Probabilities of the classes by the model that the server has broadcast.

    Returns
    -------
    (..., n) tensor of bool

    References
    ----------
    Northcutt, Jiang, Chuang (2021). Confident learning: estimating uncertainty in dataset labels. arXiv 1911.00068.
    """
    own = functional.one_hot(labels, probability.shape[-1]).to(probability)
    count = own.sum(-2)
    threshold = (own * probability).sum(-2) / count.clamp(min=1)
    # nobody is confident of a class that no sample is labelled as
    confident = (probability >= threshold.unsqueeze(-2) * (1 - MARGIN)) & (count > 0).unsqueeze(-2)
    likely = probability.masked_fill(~confident, -1.0)
    largest = likely.amax(-1)
    own_likely = likely.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    contradicted: Tensor = (largest > 0) & (largest > own_likely + MARGIN * own_likely.abs())
    return contradicted


def nearest(X: Tensor, k: int) -> NDArray[np.int64]:
    """The nearest others of each sample, by Euclidean distance in double precision.

    Parameters
    ----------
    X : (n, d) tensor
        The samples.
    k : int
        The number of neighbours that are wanted.

    Returns
    -------
    array of int, (n, min(k, n - 1))
        The rows of X that are nearest to each sample, the nearest first.
    """
    X = X.double()
    square = X.square().sum(1)
    found = []
    for rows in torch.arange(len(X)).split(ROWS_AT_ONCE):
        distance = square[rows, None] + square - 2 * X[rows] @ X.T
        distance[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance.topk(min(k, len(X) - 1), largest=False).indices)
    return torch.cat(found).numpy()


def step_weights(kept: Tensor) -> Tensor:
    """How much each sample counts in a mean over all n (..., n): n over the number kept, 0 where it is left out."""
    weight = kept.double()
    return weight * kept.shape[-1] / weight.sum(-1, keepdim=True).clamp(min=1)
