"""The harm that is planned for: a smooth stand-in for the error, on samples of the training data.

Shapes: logits Z (..., n, C) and labels y (n,), as in `models.outputs`; leading axes are plans made together.
"""

import torch
from torch import Tensor

from fl_attack.models.outputs import class_logits, entries_of


def smoothed_error(Z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Mean over samples of the probability that the model gives to other labels than the true one.

    Parameters
    ----------
    Z : (..., n, C) tensor
        Logits.
    y : (n,) tensor of int64
        True labels.
    temperature : float
        Logits are divided by it: the lower it is, the nearer is this to the error, and the rougher.

    Returns
    -------
    (...,) tensor
        The smoothed error, from 0 to 1.
    """
    return 1 - entries_of(torch.softmax(class_logits(Z) / temperature, -1), y).mean(-1)


def smoothed_error_residuals(Z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Derivative of `smoothed_error` by the logits.

    Parameters
    ----------
    Z, y, temperature
        As `smoothed_error` takes them.

    Returns
    -------
    (..., n, C) tensor
    """
    p = torch.softmax(class_logits(Z) / temperature, -1)
    own = p.gather(-1, y.expand(p.shape[:-1]).unsqueeze(-1))
    R = own * p
    R.scatter_add_(-1, y.expand(p.shape[:-1]).unsqueeze(-1), -own)
    R = R / (temperature * len(y))
    return R[..., 1:] if Z.shape[-1] == 1 else R
