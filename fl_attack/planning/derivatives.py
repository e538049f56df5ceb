"""What a plan needs to know of a model: gradients, scores and Hessian-vector products of many plans together.

Shapes: P plans, n samples, C logits, parameters (A, B). A label of its own stands in each plan, so labels are (P, n).
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fl_attack.models import Model, logistic, outputs


class Derivatives(Protocol):
    """Derivatives of the loss at parameters theta (P, A, B) of P plans."""

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits of samples, (P, n, C)."""

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """Gradient of the mean loss under labels y (P, n), (P, A, B)."""

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """Derivatives by theta (P, A, B) from those by the logits R (P, n, C)."""

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """See `models.base.Model.scores`: (P, n, classes), along v (P, A, B)."""

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (P, n, classes) along v, and the Hessian of the mean loss under labels y times v, (P, A, B)."""


class Linear:
    """Logistic regression, in closed form: all plans in the same matrix products."""

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """See `Derivatives`."""
        return _rows(theta, X)

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """See `Derivatives`."""
        R = outputs.probabilities(_rows(theta, X)) - outputs.encode(y, theta.shape[-2], X.dtype)
        return self.pull_back(theta, X, R) / len(X)

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """See `Derivatives`; the same whatever theta is."""
        P, n, C = R.shape
        return (R.transpose(1, 2).reshape(P * C, n) @ X).view(P, C, -1)

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """See `Derivatives`; `X v^T`, the same whatever theta is."""
        return outputs.class_logits(_rows(v, X))

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Derivatives`; the Hessian is `X^T (diag(p) - p p^T) X / n`, whatever the labels."""
        p, U = outputs.probabilities(_rows(theta, X)), _rows(v, X)
        D = p * (1 - p) * U if p.shape[-1] == 1 else p * (U - (p * U).sum(-1, keepdim=True))
        return outputs.class_logits(U), self.pull_back(theta, X, D) / len(X)


class General:
    """Any model, one plan after the other; Hessian-vector products are forward-mode derivatives of its gradient."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """See `Derivatives`."""
        return torch.stack([self.model.logits_in_pieces(one, X) for one in theta])

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """See `Derivatives`."""
        return torch.stack([self.model.gradient(one, X, labels) for one, labels in zip(theta, y, strict=True)])

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """See `Derivatives`."""

        def one(at: Tensor, by_logits: Tensor) -> Tensor:
            total = torch.zeros_like(at)
            size = self.model.rows_at_once
            for piece, part in zip(X.split(size), by_logits.split(size), strict=True):
                _, back = cast(Any, vjp)(lambda theta, piece=piece: self.model.logits(theta, piece), at)
                total += back(part)[0]
            return total

        return torch.stack([one(*pair) for pair in zip(theta, R, strict=True)])

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """See `Derivatives`."""
        return torch.stack([self.model.scores(at, along, X) for at, along in zip(theta, v, strict=True)])

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Derivatives`."""

        def one(at: Tensor, along: Tensor, labels: Tensor) -> Tensor:
            _, product = cast(Any, jvp)(lambda theta: self.model.gradient(theta, X, labels), (at,), (along,))
            return cast(Tensor, product)

        return self.scores(theta, v, X), torch.stack([one(*triple) for triple in zip(theta, v, y, strict=True)])


def derivatives_of(model: Model) -> Derivatives:
    """The quickest exact derivatives of a model."""
    return Linear() if isinstance(model, logistic.Logistic) else General(model)


def _rows(theta: Tensor, X: Tensor) -> Tensor:
    """`X theta^T` of P plans as one product, (P, n, C)."""
    P, C, d = theta.shape
    return (theta.reshape(P * C, d) @ X.mT).view(P, C, -1).mT
