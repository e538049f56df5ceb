"""Logistic regression, binary and multinomial, in closed form.

Shapes are indexed from the right, so that leading axes (experiments run together) broadcast:

    theta (..., C, d)   parameters; C = 1 output for two classes (sigmoid), else one per class (softmax)
    X     (n, d)        features; the last one is the constant 1, so that theta holds the bias
    y     (..., n)      labels, int64, 0 .. classes - 1
    w     (n,)          how often each sample counts
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.models import outputs
from fl_attack.models.base import Model
from fl_attack.models.outputs import encode, probabilities


def output_count(classes: int) -> int:
    """Outputs C that `classes` labels need: one for two classes, else one a class."""
    return 1 if classes == 2 else classes


def logits(theta: Tensor, X: Tensor) -> Tensor:
    """Logits `X theta^T` of logistic regression.

    Parameters
    ----------
    theta : (..., C, d) tensor
        Parameters.
    X : (n, d) tensor
        Features, with a constant.

    Returns
    -------
    (..., n, C) tensor
    """
    return X @ theta.mT


def gradient(theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """Gradient of the mean cross-entropy, `sum_n w_n (p_n - Y_n) x_n^T / sum_n w_n`.

    Parameters
    ----------
    theta, X
        As `logits` takes them.
    y : (n,) or (..., n) tensor of int64
        Labels.
    w : (n,) tensor, optional
        How often each sample counts, the same for all leading axes; by default once.

    Returns
    -------
    (..., C, d) tensor
    """
    Z = logits(theta, X)
    R = probabilities(Z) - encode(y, Z.shape[-1], Z.dtype)
    if w is None:
        return R.mT @ X / X.shape[-2]
    return (R * w.unsqueeze(-1)).mT @ X / w.sum()


def scores(v: Tensor, X: Tensor) -> Tensor:
    """Derivative of each sample's logits by class along a direction, `X v^T`, whatever the parameters.

    Parameters
    ----------
    v : (..., C, d) tensor
        The direction.
    X : (n, d) tensor
        Features.

    Returns
    -------
    (..., n, classes) tensor
    """
    return outputs.class_logits(X @ v.mT)


class Logistic(Model):
    """Logistic regression on flat features and a constant 1, from parameters that are zero."""

    constant = True
    linear = True
    stackable = True
    rows_at_once = 2**62

    def __init__(self, inputs: tuple[int, ...], classes: int) -> None:
        super().__init__((output_count(classes), math.prod(inputs) + 1))

    def start(self) -> Tensor:
        """Parameters that are all zero, (C, d)."""
        return torch.zeros(self.shape, dtype=torch.float64)

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits `X theta^T`, (..., n, C), see `Model.logits`; leading axes of theta are allowed."""
        return logits(theta, X)

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss in closed form, see `gradient` of this module."""
        return gradient(theta, X, y, w)

    def relabelling(self, theta: Tensor, X: Tensor, y: Tensor, new: Tensor, w: Tensor) -> Tensor:
        """`sum_n w_n (Y_n - Y'_n) x_n^T`, (C, d), whatever theta is; see `Model.relabelling`."""
        C = theta.shape[-2]
        return ((encode(y, C, X.dtype) - encode(new, C, X.dtype)) * w.unsqueeze(-1)).mT @ X

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """`X v^T` by class, (..., n, classes), whatever theta is; see `Model.scores`."""
        return scores(v, X)

    def state(self, theta: Tensor) -> dict[str, NDArray[Any]]:
        """The parameters (C, d) under the name `theta`."""
        return {"theta": theta.numpy()}

    def theta_of(self, state: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """The parameters (C, d) from arrays that `state` gave, see `Model.theta_of`."""
        return np.asarray(state["theta"], np.float64)
