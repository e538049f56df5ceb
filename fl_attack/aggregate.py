"""How the server combines what clients send: one function and one row of `RULES` each.

A rule takes updates (..., m, C, d), one a client and in the order of the clients, and weights (m,), the samples that
each used; it gives the aggregate (..., C, d).
"""

from collections.abc import Callable

from torch import Tensor


def mean(updates: Tensor, weights: Tensor) -> Tensor:
    """Mean weighted by samples: for gradients, the gradient of all clients' batches together."""
    weights = weights.to(updates.dtype)
    return (updates * (weights / weights.sum())[:, None, None]).sum(-3)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean}
