"""Attacks on gradients, by clients that send what they like: how near do label flips come to these?

An attack is one function `Updates -> Tensor` and one row of `attack.ATTACKS`: it gives what malicious clients send in
place of their update. Updates are gradients, m clients, each (C, d); leading axes broadcast.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Lazy = Callable[[], Tensor]
Perturbation = Literal["std", "unit", "sign"]


class Updates:
    """What a gradient attack sees of a round: everything. What takes work is worked out when first asked for."""

    def __init__(self, updates: Tensor, malicious: Tensor, *, direction: Lazy, noise: Lazy) -> None:
        """The last two are functions without arguments that give what the properties of these names hold."""
        self.updates = updates  # (..., m, C, d) what each client of the round would send, were all honest
        self.malicious = malicious  # (..., m) bool
        self._direction, self._noise = direction, noise

    def copied(self) -> "Updates":
        """A copy of the view in memory of its own, so that whoever writes into it changes nothing else."""
        return Updates(
            self.updates.clone(),
            self.malicious.clone(),
            direction=lambda: self.direction.clone(),
            noise=lambda: self.noise.clone(),
        )

    @cached_property
    def direction(self) -> Tensor:
        """(..., C, d) v, as for greedy flips: the clean gradient (untargeted) or `target - theta`."""
        return self._direction()

    @cached_property
    def noise(self) -> Tensor:
        """(m, C, d) standard normal; a function of seed and round."""
        return self._noise()

    @cached_property
    def honest(self) -> Tensor:
        """(..., m) bool: whose updates the attackers imitate; everyone's in a round without honest clients."""
        honest = ~self.malicious
        return honest | ~honest.any(-1, keepdim=True)

    @cached_property
    def mean(self) -> Tensor:
        """(..., 1, C, d) mean of the honest updates, each counting alike."""
        return self._honest_mean(self.updates)

    @cached_property
    def deviation(self) -> Tensor:
        """(..., 1, C, d) standard deviation (divided by their number) of the honest updates in each coordinate."""
        return self._honest_mean((self.updates - self.mean) ** 2).sqrt()

    def _honest_mean(self, values: Tensor) -> Tensor:
        """Mean (..., 1, C, d) of values (..., m, C, d) over the honest clients."""
        weights = self.honest.to(values.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        return (values * weights[..., None, None]).sum(-3, keepdim=True)


def sign_flip(view: Updates, *, scale: float = 1.0) -> Tensor:
    """What a malicious client sends is its own update times `-scale`: (..., m, C, d).

    Parameters
    ----------
    view : Updates
        What the attackers see of the round.
    scale : float
        The factor by which each update is lengthened.

    References
    ----------
    Li et al. 2019, https://arxiv.org/abs/1811.03761.
    """
    return view.updates * -scale


def gaussian(view: Updates, *, sigma: float = 200.0) -> Tensor:
    """Normal noise of mean 0, for each client its own: (m, C, d).

    Parameters
    ----------
    view : Updates
        What the attackers see of the round, with its noise.
    sigma : float
        Standard deviation of each coordinate, at least 0; 200 is that of the source.

    Raises
    ------
    ValueError
        Where `sigma` is negative, infinite or NaN.

    References
    ----------
    Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma={sigma} is not allowed; it must be 0 or more")
    return view.noise.to(view.updates) * sigma


def ipm(view: Updates, *, epsilon: float = 1.0) -> Tensor:
    """Inner-product manipulation: the honest mean, turned round, (..., 1, C, d), which all send.

    Parameters
    ----------
    view : Updates
        What the attackers see of the round, with the honest mean.
    epsilon : float
        The factor; below about the ratio of honest to malicious clients the mean still points the right way.

    References
    ----------
    Xie et al. 2020, https://arxiv.org/abs/1903.03936.
    """
    return view.mean * -epsilon


def alie(view: Updates, *, z: float | None = None) -> Tensor:
    """A little is enough: all send the honest mean less z standard deviations of each coordinate, (..., 1, C, d).

    Parameters
    ----------
    view : Updates
        It holds mean and deviation of the honest updates.
    z : float, optional
        By default the largest that a majority of the clients still outdoes: with n clients, f of them malicious and
        s = floor(n / 2 + 1) - f supporters needed, the normal quantile of (n - f - s) / (n - f); s is taken to be at
        least 1, z at least 0.

    References
    ----------
    Baruch et al. 2019, https://arxiv.org/abs/1902.06156.
    """
    if z is not None:
        return view.mean - z * view.deviation
    n = view.malicious.shape[-1]
    f = view.malicious.sum(-1)
    supporters = (n // 2 + 1 - f).clamp(min=1)
    honest = (n - f).clamp(min=1)
    quantile = torch.special.ndtri((honest - supporters).double() / honest).clamp(min=0).to(view.updates)
    return view.mean.sub(view.deviation * quantile[..., None, None, None])


def mimic(view: Updates) -> Tensor:
    """All send the update of the first honest client again, (..., 1, C, d). https://arxiv.org/abs/2006.09365."""
    first = view.honest.to(torch.uint8).argmax(-1)[..., None, None, None]
    shape = view.updates.shape
    return view.updates.gather(-3, first.expand(*shape[:-3], 1, *shape[-2:]))


def gradient_max(view: Updates) -> Tensor:
    """The most misaligned vector of the norm that each would have sent honestly: `-|u| v / |v|`, (..., m, C, d).

    No update of that norm has a smaller inner product with the direction; where it is zero, so is what is sent.
    """
    v = view.direction.unsqueeze(-3)
    norm = v.flatten(-2).norm(dim=-1)[..., None, None]
    own = view.updates.flatten(-2).norm(dim=-1)[..., None, None]
    return v.mul(-own / norm.where(norm > 0, 1.0))


def minmax(view: Updates, *, perturbation: Perturbation = "std") -> Tensor:
    """The honest mean pushed as far as no honest update is farther away than two honest ones are from each other.

    All send `mean + gamma p`, with the largest gamma for which `max_i |mean + gamma p - u_i|` is at most
    `max_ij |u_i - u_j|` over the honest updates. The paper looks for gamma by halving steps; here it is solved for.

    Parameters
    ----------
    view : Updates
        What the attackers see of the round.
    perturbation : {"std", "unit", "sign"}
        p is minus the standard deviation of the honest updates coordinate by coordinate, minus the unit vector along
        their mean, or minus its signs.

    Returns
    -------
    (..., 1, C, d) tensor

    Raises
    ------
    ValueError
        Where there is no such perturbation.

    References
    ----------
    Shejwalkar, Houmansadr (2021). Manipulating the Byzantine. https://doi.org/10.14722/ndss.2021.24498.
    """
    p = _perturbation(view, perturbation)
    to_mean, between = (view.mean - view.updates).flatten(-2).double(), _squared_distances(view)
    largest = between.masked_fill(~(view.honest.unsqueeze(-1) & view.honest.unsqueeze(-2)), 0.0).amax((-2, -1))
    # |a_i + gamma p|^2 <= D^2 is a square inequality of each honest client's, whose larger root is its gamma
    a, b = p.square().sum(-1, keepdim=True), (to_mean * p.unsqueeze(-2)).sum(-1)
    slack = largest.unsqueeze(-1) - to_mean.square().sum(-1)
    root = (b.square() + a * slack).clamp(min=0).sqrt()
    gamma = ((root - b) / a.where(a > 0, torch.inf)).masked_fill(~view.honest, torch.inf).amin(-1)
    return _pushed(view, p, gamma)


def minsum(view: Updates, *, perturbation: Perturbation = "std") -> Tensor:
    """The honest mean pushed as far as it is no farther from all honest updates than one of them is.

    As `minmax`, with `sum_i |mean + gamma p - u_i|^2` at most `max_i sum_j |u_i - u_j|^2`.

    Parameters
    ----------
    view, perturbation
        As `minmax` takes them.

    Returns
    -------
    (..., 1, C, d) tensor

    Raises
    ------
    ValueError
        Where there is no such perturbation.

    References
    ----------
    Shejwalkar, Houmansadr (2021). Manipulating the Byzantine. https://doi.org/10.14722/ndss.2021.24498.
    """
    p, honest = _perturbation(view, perturbation), view.honest.double()
    to_mean = (view.mean - view.updates).flatten(-2).double().square().sum(-1)
    summed = (_squared_distances(view) * honest.unsqueeze(-2)).sum(-1)
    slack = (summed * honest).amax(-1) - (to_mean * honest).sum(-1)  # the mean's own differences cancel in the sum
    a = honest.sum(-1) * p.square().sum(-1)
    return _pushed(view, p, (slack.clamp(min=0) / a.where(a > 0, torch.inf)).sqrt())


def _perturbation(view: Updates, name: Perturbation) -> Tensor:
    """The direction (..., C d) in which `minmax` and `minsum` push the honest mean, in float64."""
    mean = view.mean.flatten(-3).double()
    if name == "std":
        return -view.deviation.flatten(-3).double()
    if name == "unit":
        norm = mean.norm(dim=-1, keepdim=True)
        unit: Tensor = -mean / norm.where(norm > 0, 1.0)
        return unit
    if name == "sign":
        return -mean.sign()
    raise ValueError(f"perturbation={name} is not known; use std, unit or sign")


def _squared_distances(view: Updates) -> Tensor:
    """Squared distances (..., m, m) between what all clients would send, in float64."""
    whole = (view.updates - view.mean).flatten(-2).double()
    gram = whole @ whole.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    found: Tensor = (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram).clamp(min=0)
    return found


def _pushed(view: Updates, p: Tensor, gamma: Tensor) -> Tensor:
    """The honest mean plus gamma (...) times p (..., C d), (..., 1, C, d)."""
    return view.mean + (gamma[..., None] * p).view(view.mean.shape).to(view.mean)
