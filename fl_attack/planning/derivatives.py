"""What a plan needs to know of a model: gradients, scores and Hessian-vector products of many plans together.

Shapes: P plans, n samples, C logits, parameters (A, B). Each plan writes labels of its own, so labels are (P, n).
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fl_attack.models import Model, logistic, outputs


class Derivatives(Protocol):
    """Derivatives of the loss at parameters theta (P, A, B) of P plans."""

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits of samples.

        Parameters
        ----------
        theta : (P, A, B) tensor
            Parameters of each plan.
        X : (n, *inputs) tensor
            Inputs, the same for all.

        Returns
        -------
        (P, n, C) tensor
        """

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """Gradient of the mean loss.

        Parameters
        ----------
        theta, X
            As `logits` takes them.
        y : (P, n) tensor of int64
            The labels in each plan.

        Returns
        -------
        (P, A, B) tensor
        """

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """Derivatives by the parameters from those by the logits.

        Parameters
        ----------
        theta, X
            As `logits` takes them.
        R : (P, n, C) tensor
            Derivatives by the logits.

        Returns
        -------
        (P, A, B) tensor
            The sum over samples.
        """

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """Scores along a direction, as `models.base.Model.scores` defines them.

        Parameters
        ----------
        theta, X
            As `logits` takes them.
        v : (P, A, B) tensor
            The direction in each plan.

        Returns
        -------
        (P, n, classes) tensor
        """

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores along a direction, and the Hessian of the mean loss times it.

        Parameters
        ----------
        theta, v, X
            As `scores` takes them.
        y : (P, n) tensor of int64
            The labels in each plan.

        Returns
        -------
        scores : (P, n, classes) tensor
        product : (P, A, B) tensor
        """


class Linear:
    """Logistic regression, in closed form: all plans in the same matrix products."""

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits `X theta^T`, see `Derivatives.logits`."""
        return _rows(theta, X)

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """Gradient of the mean cross-entropy, see `Derivatives.gradient`."""
        R = outputs.probabilities(_rows(theta, X)) - outputs.encode(y, theta.shape[-2], X.dtype)
        return self.pull_back(theta, X, R) / len(X)

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """Derivatives by the parameters, the same whatever theta is; see `Derivatives.pull_back`."""
        P, n, C = R.shape
        return (R.transpose(1, 2).reshape(P * C, n) @ X).view(P, C, -1)

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """Scores `X v^T`, the same whatever theta is; see `Derivatives.scores`."""
        return outputs.class_logits(_rows(v, X))

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and Hessian-vector products; the Hessian is `X^T (diag(p) - p p^T) X / n`. See `Derivatives`."""
        p, U = outputs.probabilities(_rows(theta, X)), _rows(v, X)
        D = p * (1 - p) * U if p.shape[-1] == 1 else p * (U - (p * U).sum(-1, keepdim=True))
        return outputs.class_logits(U), self.pull_back(theta, X, D) / len(X)


class General:
    """Any model, one plan after the other; Hessian-vector products are forward-mode derivatives of its gradient."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits, plan after plan; see `Derivatives.logits`."""
        return torch.stack([self.model.logits_in_pieces(one, X) for one in theta])

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        """Gradients of the mean loss, plan after plan; see `Derivatives.gradient`."""
        return torch.stack([self.model.gradient(one, X, labels) for one, labels in zip(theta, y, strict=True)])

    def pull_back(self, theta: Tensor, X: Tensor, R: Tensor) -> Tensor:
        """Derivatives by the parameters, a plan and a piece of samples at a time; see `Derivatives.pull_back`."""

        def one(at: Tensor, by_logits: Tensor) -> Tensor:
            """The derivatives (A, B) of one plan."""
            total = torch.zeros_like(at)
            size = self.model.rows_at_once
            for piece, part in zip(X.split(size), by_logits.split(size), strict=True):
                _, back = cast(Any, vjp)(lambda theta, piece=piece: self.model.logits(theta, piece), at)
                total += back(part)[0]
            return total

        return torch.stack([one(*pair) for pair in zip(theta, R, strict=True)])

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """Scores along a direction, plan after plan; see `Derivatives.scores`."""
        return torch.stack([self.model.scores(at, along, X) for at, along in zip(theta, v, strict=True)])

    def scores_and_product(self, theta: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and Hessian-vector products by forward over reverse; see `Derivatives.scores_and_product`."""

        def one(at: Tensor, along: Tensor, labels: Tensor) -> Tensor:
            """The Hessian-vector product (A, B) of one plan."""
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
