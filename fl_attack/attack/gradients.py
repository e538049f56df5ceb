"""Attacks on gradients, by clients that send what they like: how near do label flips come to these?

An attack is one function `Updates -> Tensor` and one row of `attack.ATTACKS`: it gives what malicious clients send in
place of their update. Updates are gradients, m clients, each (C, d); leading axes broadcast.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

Lazy = Callable[[], Tensor]


class Updates:
    """What a gradient attack sees of a round: everything. What takes work is worked out when first asked for."""

    def __init__(self, updates: Tensor, malicious: Tensor, *, direction: Lazy, noise: Lazy) -> None:
        self.updates = updates  # (..., m, C, d) what each client of the round would send, were all honest
        self.malicious = malicious  # (..., m) bool
        self._direction, self._noise = direction, noise

    def copied(self) -> "Updates":
        """The same in memory of its own, so that whoever writes into it changes nothing else."""
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
        """(..., 1, C, d) of the honest updates."""
        return self._honest_mean(self.updates)

    @cached_property
    def deviation(self) -> Tensor:
        """(..., 1, C, d) standard deviation of the honest updates, coordinate by coordinate."""
        return self._honest_mean((self.updates - self.mean) ** 2).sqrt()

    def _honest_mean(self, values: Tensor) -> Tensor:
        """Mean (..., 1, C, d) of values (..., m, C, d) over the honest clients."""
        weights = self.honest.to(values.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        return (values * weights[..., None, None]).sum(-3, keepdim=True)


def sign_flip(view: Updates, *, scale: float = 1.0) -> Tensor:
    """Each its own update, turned round and scaled. Li et al. 2019, https://arxiv.org/abs/1811.03761."""
    return view.updates * -scale


def gaussian(view: Updates, *, sigma: float = 200.0) -> Tensor:
    """Noise of mean 0 and standard deviation sigma. Blanchard et al. 2017 (200), https://arxiv.org/abs/1703.02757."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma={sigma} is not allowed; it must be 0 or more")
    return view.noise.to(view.updates) * sigma


def ipm(view: Updates, *, epsilon: float = 1.0) -> Tensor:
    """Inner-product manipulation: -epsilon times the honest mean. Xie et al. 2020, https://arxiv.org/abs/1903.03936."""
    return view.mean * -epsilon


def alie(view: Updates, *, z: float | None = None) -> Tensor:
    """A little is enough: the honest mean less z honest standard deviations, coordinate by coordinate.

    By default z is the largest that a majority of the clients still outdoes: with n clients, f of them malicious and
    s = floor(n / 2 + 1) - f supporters needed, the normal quantile of (n - f - s) / (n - f); s is taken to be at
    least 1, z at least 0. Baruch et al. 2019, https://arxiv.org/abs/1902.06156.
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
    """All send the update of one honest client, the first: over-represented. https://arxiv.org/abs/2006.09365."""
    first = view.honest.to(torch.uint8).argmax(-1)[..., None, None, None]
    shape = view.updates.shape
    return view.updates.gather(-3, first.expand(*shape[:-3], 1, *shape[-2:]))


def gradient_max(view: Updates) -> Tensor:
    """The most misaligned vector of the norm that each would have sent honestly: `-|u| v / |v|`.

    No update of that norm has a smaller inner product with the direction; where it is zero, so is what is sent.
    """
    v = view.direction.unsqueeze(-3)
    norm = v.flatten(-2).norm(dim=-1)[..., None, None]
    own = view.updates.flatten(-2).norm(dim=-1)[..., None, None]
    return v.mul(-own / norm.where(norm > 0, 1.0))
