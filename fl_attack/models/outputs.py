"""What is made of a classifier's logits: losses, their derivatives, predictions, and how good a model is.

Shapes are indexed from the right, so that leading axes (experiments run together) broadcast:

    Z     (..., n, C)   logits; one output (C = 1) for two classes is read as the logit of label 1 against 0
    y     (..., n)      labels, int64, 0 .. classes - 1
    w     (n,)          how often each sample counts
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LossTable = Callable[[Tensor], Tensor]  # of logits (..., n, C): each sample's loss under each label, (..., n, classes)
SMOOTHING = 0.1  # Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
FOCUS = 2.0  # gamma of Lin et al. 2017, https://arxiv.org/abs/1708.02002


def class_logits(Z: Tensor) -> Tensor:
    """Logits of all classes, (..., n, classes): one output z becomes 0 and z."""
    return torch.cat([torch.zeros_like(Z), Z], -1) if Z.shape[-1] == 1 else Z


def encode(y: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Labels as the numbers that the gradient subtracts.

    Parameters
    ----------
    y : (..., n) tensor of int64
        Labels.
    C : int
        Numbers for each sample: 1 for two classes, else as many as there are classes.
    dtype : torch.dtype
        Precision of the result.

    Returns
    -------
    (..., n, C) tensor
        y itself (C = 1) or one-hot.
    """
    return y.unsqueeze(-1).to(dtype) if C == 1 else functional.one_hot(y, C).to(dtype)


def probabilities(Z: Tensor) -> Tensor:
    """Sigmoid of the one logit or softmax over several, shaped as Z."""
    return torch.sigmoid(Z) if Z.shape[-1] == 1 else torch.softmax(Z, -1)


def predictions(Z: Tensor) -> Tensor:
    """Predicted labels, (..., n): 1 where the only logit is > 0, else the largest (ties: the lowest class)."""
    return (Z[..., 0] > 0).long() if Z.shape[-1] == 1 else Z.argmax(-1)


def cross_entropy(Z: Tensor) -> Tensor:
    """Cross-entropy of each sample under each label in nats, (..., n, classes)."""
    if Z.shape[-1] == 1:
        return torch.cat([functional.softplus(Z), functional.softplus(Z) - Z], -1)  # -log of the sigmoid
    return torch.logsumexp(Z, -1, keepdim=True) - Z


def label_smoothing(Z: Tensor) -> Tensor:
    """Cross-entropy against a label that is smoothed by 0.1, (..., n, classes). https://arxiv.org/abs/1512.00567"""
    table = cross_entropy(Z)
    return (1 - SMOOTHING) * table + SMOOTHING * table.mean(-1, keepdim=True)


def focal(Z: Tensor) -> Tensor:
    """Focal loss with gamma = 2, (..., n, classes). https://arxiv.org/abs/1708.02002"""
    table = cross_entropy(Z)
    return (-torch.expm1(-table)) ** FOCUS * table


def brier(Z: Tensor) -> Tensor:
    """Squared distance of the probabilities to the one-hot label, (..., n, classes). Brier 1950."""
    p = torch.softmax(class_logits(Z), -1)
    return (p**2).sum(-1, keepdim=True) - 2 * p + 1


# each sums over samples, so that relabelling one changes the gradient by the same whatever else is relabelled
LOSSES: dict[str, LossTable] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": label_smoothing,
    "focal": focal,
    "brier": brier,
}


def losses(Z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample.

    Parameters
    ----------
    Z : (..., n, C) tensor
        Logits.
    y : (..., n) tensor of int64
        Labels.

    Returns
    -------
    (..., n) tensor
        The losses, in nats.
    """
    if Z.shape[-1] == 1:
        z = Z[..., 0]
        return functional.softplus(z) - z * y  # -log of the sigmoid, without overflow
    return torch.logsumexp(Z, -1) - entries_of(Z, y)


def losses_under(loss: LossTable, Z: Tensor, y: Tensor) -> Tensor:
    """Loss of each sample under its label.

    Parameters
    ----------
    loss : callable
        Gives the loss of each sample under each label, (..., n, classes), from logits.
    Z, y
        As `losses` takes them.

    Returns
    -------
    (..., n) tensor
    """
    return losses(Z, y) if loss is cross_entropy else entries_of(loss(Z), y)


def residuals(loss: LossTable, Z: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """Derivative of the sum of `w_n loss_n` by the logits; `p - Y` for the cross-entropy.

    Parameters
    ----------
    loss, Z, y
        As `losses_under` takes them.
    w : (..., n) tensor, optional
        How often each sample counts; by default once.

    Returns
    -------
    (..., n, C) tensor
    """
    if loss is cross_entropy:
        R = probabilities(Z) - encode(y, Z.shape[-1], Z.dtype)
        return R if w is None else R * w.unsqueeze(-1)

    def total(logits: Tensor) -> Tensor:
        """The sum of `w_n loss_n`, a scalar."""
        own = entries_of(loss(logits), y)
        return (own if w is None else own * w).sum()

    found: Tensor = torch.func.grad(total)(Z)
    return found


def entries_of(table: Tensor, y: Tensor) -> Tensor:
    """The entry of each sample's label in a table over the labels.

    Parameters
    ----------
    table : (..., n, classes) tensor
        One row for each sample.
    y : (n,) tensor of int64
        Labels.

    Returns
    -------
    (..., n) tensor
    """
    return table.gather(-1, y.expand(table.shape[:-1]).unsqueeze(-1)).squeeze(-1)


class Quality(NamedTuple):
    """How well a model does on a test set."""

    accuracy: float
    f1: float
    loss: float


def quality(Z: Tensor, y: Tensor, loss: LossTable = cross_entropy) -> Quality:
    """Accuracy, F1 and mean loss.

    Parameters
    ----------
    Z : (n, C) tensor
        Logits.
    y : (n,) tensor of int64
        Labels.
    loss : callable
        As `losses_under` takes it.

    Returns
    -------
    Quality
        F1 is that of label 1 for two classes and otherwise the unweighted mean over the classes that occur, in y or
        among the predictions, as scikit-learn has it.
    """
    predicted = predictions(Z)
    classes = max(2, Z.shape[-1])
    confusion = torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes)
    hits = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * hits / either.clamp(min=1)
    return Quality(
        accuracy=(hits.sum() / len(y)).item(),
        f1=(f1[1] if classes == 2 else f1[either > 0].mean()).item(),
        loss=losses_under(loss, Z, y).double().mean().item(),
    )
