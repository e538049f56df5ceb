"""What every classifier offers, and the general way to it: derivatives by `torch.func`.

Shapes:

    theta (A, B)            parameters; (C, d) of logistic regression, (1, P) of a network
    X     (n, *inputs)      inputs of n samples
    y     (n,)              labels, int64
    w     (n,)              how often each sample counts; None: once each
    Z     (n, C)            logits
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vjp

from fl_attack.models import outputs


class Model(ABC):
    """A classifier that is a differentiable function of its parameters and of one sample at a time."""

    constant: ClassVar[bool] = False  # whether inputs are flat features that end with a constant 1
    linear: ClassVar[bool] = False  # whether logits are `X theta^T`, which engine/linear relies on
    stackable: ClassVar[bool] = False  # whether gradient, scores and logits take theta (M, A, B) of M cells at once
    rows_at_once: int = 1024  # samples whose logits are computed in one go when many are measured

    def __init__(self, shape: tuple[int, int], loss: outputs.LossTable = outputs.cross_entropy) -> None:
        """`shape` (A, B) is that of theta; `loss` gives the loss of each sample under each label, see `outputs`."""
        self.shape = shape
        self.loss = loss

    @abstractmethod
    def start(self) -> Tensor:
        """Parameters before the first round, (A, B) in float64; a function of the settings and the seed alone."""

    @abstractmethod
    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits of samples.

        Parameters
        ----------
        theta, X
            Parameters and inputs, see the head of this module for all shapes.

        Returns
        -------
        (n, C) tensor
        """

    def class_logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits of samples by class, (n, classes): one output z becomes 0 and z. See `logits` for the arguments."""
        return outputs.class_logits(self.logits(theta, X))

    @abstractmethod
    def state(self, theta: Tensor) -> dict[str, NDArray[Any]]:
        """Parameters by their names, as a run leaves them in `model.npz`."""

    @abstractmethod
    def theta_of(self, state: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """The parameters from arrays that `state` gave.

        Parameters
        ----------
        state : mapping
            Arrays by name.

        Returns
        -------
        (A, B) array of float64

        Raises
        ------
        KeyError or ValueError
            Where a parameter is missing, or one of a network's has another shape. The shape of an array `theta`, which
            holds all parameters, is not checked.
        """

    def by_class(self, updates: Tensor) -> Tensor:
        """The rows (..., classes, width) of the last layer in updates (..., A, B); one row where there is one logit.

        InputError where there is no last layer with a row for each class.
        """
        return updates

    def residuals(self, Z: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Derivative of the sum of `w_n loss_n` over samples by the logits.

        Parameters
        ----------
        Z, y, w
            Logits, labels and how often each sample counts.

        Returns
        -------
        (n, C) tensor
        """
        return outputs.residuals(self.loss, Z, y, w)

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss, `sum_n w_n grad loss_n / sum_n w_n`.

        Parameters
        ----------
        theta, X, y, w
            Parameters, inputs, labels and how often each sample counts.

        Returns
        -------
        (A, B) tensor
        """
        Z, pull_back = self._pull_back(theta, X)
        return pull_back(self.residuals(Z, y, w) / (len(X) if w is None else w.sum()))

    def relabelling(self, theta: Tensor, X: Tensor, y: Tensor, new: Tensor, w: Tensor) -> Tensor:
        """What the sum over samples of `w_n grad loss_n` gains by other labels.

        Parameters
        ----------
        theta, X, y, w
            As `gradient` takes them.
        new : (n,) tensor of int64
            The labels that take the place of y.

        Returns
        -------
        (A, B) tensor
        """
        Z, pull_back = self._pull_back(theta, X)
        return pull_back(self.residuals(Z, new, w) - self.residuals(Z, y, w))

    def _pull_back(self, theta: Tensor, X: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits (n, C), and what turns derivatives by the logits (n, C) into those by theta (A, B)."""
        Z, pull_back = cast(Any, vjp)(lambda at: self.logits(at, X), theta)
        return Z.detach(), lambda R: pull_back(R)[0]

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """Derivative along a direction of what each sample gains by each label.

        Giving sample n the label c lowers `sum_n <grad loss_n, v>` by `scores[n, c] - scores[n, y_n]`. These are the
        derivatives of the losses under each label, negated; for the cross-entropy, up to a number that all labels of
        a sample share, those of the logits.

        Parameters
        ----------
        theta, X
            Parameters and inputs.
        v : (A, B) tensor
            The direction.

        Returns
        -------
        (n, classes) tensor
        """
        Z, dZ = cast(Any, jvp)(lambda at: self.logits(at, X), (theta,), (v,))
        return self.class_scores(Z, dZ)

    def class_scores(self, Z: Tensor, dZ: Tensor) -> Tensor:
        """The scores along a direction, from the derivatives of the logits along it.

        Parameters
        ----------
        Z, dZ : (n, C) tensors
            Logits and their derivatives.

        Returns
        -------
        (n, classes) tensor
            As `scores` gives them.
        """
        if self.loss is outputs.cross_entropy:
            return outputs.class_logits(dZ)
        _, D = cast(Any, jvp)(self.loss, (Z,), (dZ,))
        return torch.neg(D)

    def measure(self, theta: Tensor, X: Tensor, y: Tensor) -> outputs.Quality:
        """How well the model does on samples.

        Parameters
        ----------
        theta, X, y
            Parameters, inputs and labels of any number of samples, see the head of this module.

        Returns
        -------
        outputs.Quality
            Accuracy, F1 and mean loss.
        """
        return outputs.quality(self.logits_in_pieces(theta, X), y, self.loss)

    def mean_loss(self, theta: Tensor, X: Tensor, y: Tensor) -> float:
        """Mean loss on samples; arguments as of `measure`."""
        return outputs.losses_under(self.loss, self.logits_in_pieces(theta, X), y).double().mean().item()

    def logits_in_pieces(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits of many samples, a piece at a time, so that activations stay small; see `logits`."""
        if len(X) <= self.rows_at_once:
            return self.logits(theta, X)
        return torch.cat([self.logits(theta, piece) for piece in X.split(self.rows_at_once)])
