"""Logistic regression, binary and multinomial, in closed form.

Shapes are indexed from the right, so that leading axes (experiments run together) broadcast:

    theta (..., C, d)   parameters; C = 1 output for two classes (sigmoid), else one per class (softmax)
    X     (n, d)        features; the last one is the constant 1, so that theta holds the bias
    y     (..., n)      labels, int64, 0 .. classes - 1
    Z     (..., n, C)   logits
    w     (n,)          how often each sample counts
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def output_count(classes: int) -> int:
    """Outputs C that `classes` labels need: one for two classes, else one a class."""
    return 1 if classes == 2 else classes


def logits(theta: Tensor, X: Tensor) -> Tensor:
    """Logits `X theta^T`, (..., n, C)."""
    return X @ theta.mT


def encode(y: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Labels as the numbers that the gradient subtracts: y itself (C = 1) or one-hot, (..., n, C)."""
    return y.unsqueeze(-1).to(dtype) if C == 1 else functional.one_hot(y, C).to(dtype)


def probabilities(Z: Tensor) -> Tensor:
    """Sigmoid of the one logit or softmax over several, shaped as Z."""
    return torch.sigmoid(Z) if Z.shape[-1] == 1 else torch.softmax(Z, -1)


def gradient(theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """Gradient of the mean cross-entropy, `sum_n w_n (p_n - Y_n) x_n^T / sum_n w_n`, (..., C, d)."""
    Z = logits(theta, X)
    R = probabilities(Z) - encode(y, Z.shape[-1], Z.dtype)
    if w is None:
        return R.mT @ X / X.shape[-2]
    return (R * w.unsqueeze(-1)).mT @ X / w.sum()


def scores(v: Tensor, X: Tensor) -> Tensor:
    """Derivative of each sample's class scores along v, (..., n, classes).

    Giving sample n the label c lowers `n <gradient, v>` by `scores[n, c] - scores[n, y_n]`. For a linear model
    this is `X v^T`; the one output of a binary model is read as the score of label 1 against 0 for label 0.
    """
    S = X @ v.mT
    return torch.cat([torch.zeros_like(S), S], -1) if S.shape[-1] == 1 else S


def predictions(Z: Tensor) -> Tensor:
    """Predicted labels, (..., n): 1 where the only logit is > 0, else the largest (ties: the lowest class)."""
    return (Z[..., 0] > 0).long() if Z.shape[-1] == 1 else Z.argmax(-1)


def losses(Z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, (..., n)."""
    if Z.shape[-1] == 1:
        z = Z[..., 0]
        return functional.softplus(z) - z * y  # -log of the sigmoid, without overflow
    return torch.logsumexp(Z, -1) - Z.gather(-1, y.expand(Z.shape[:-1]).unsqueeze(-1)).squeeze(-1)


class Quality(NamedTuple):
    """How well a model does on a test set."""

    accuracy: float
    f1: float
    loss: float


def quality(theta: Tensor, X: Tensor, y: Tensor) -> Quality:
    """Accuracy, F1 and mean loss of theta (C, d) on X, y.

    F1 is that of label 1 for two classes and otherwise the unweighted mean over the classes that occur, in y or among
    the predictions, as scikit-learn has it.
    """
    Z = logits(theta, X)
    predicted = predictions(Z)
    classes = max(2, Z.shape[-1])
    confusion = torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes)
    hits = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * hits / either.clamp(min=1)
    return Quality(
        accuracy=(hits.sum() / len(y)).item(),
        f1=(f1[1] if classes == 2 else f1[either > 0].mean()).item(),
        loss=losses(Z, y).double().mean().item(),
    )
