"""How the server combines what clients send: one function and one row of `RULES` each.

A rule takes updates (..., m, C, d), one a client and in the order of the clients, and weights (m,), the samples that
each used; it gives the aggregate (..., C, d).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(updates: Tensor, weights: Tensor) -> Tensor:
    """Mean weighted by samples: for gradients, the gradient of all clients' batches together."""
    weights = weights.to(updates.dtype)
    return (updates * (weights / weights.sum())[:, None, None]).sum(-3)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean}


def make(name: str, *, f: int, m: int, args: Mapping[str, Any], pre: Sequence[Any], rule: str | None) -> Combine:
    """Stub."""
    return lambda updates, weights, lots: mean(updates, weights)
