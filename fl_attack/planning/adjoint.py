"""The adjoint of the server's step: how a harm at the end depends on the parameters, state and gradient of a round.

Shapes are those of `protocol.server_step`, (..., A, B); leading axes are plans that are made together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fl_attack.protocol import ADAM_BETAS, ADAM_EPS, MOMENTUM, Optimizer, ServerState


class Costate(NamedTuple):
    """Derivatives of the harm by the parameters and by what the optimizer remembers, (..., A, B) each."""

    theta: Tensor
    first: Tensor
    second: Tensor


def pull_back_step(
    optimizer: Optimizer, gradient: Tensor, lr: float | Tensor, state: ServerState, costate: Costate
) -> tuple[Costate, Tensor]:
    """The costate before a step of the server from the one after it, and the derivative of the harm by the gradient.

    Parameters
    ----------
    optimizer : {"sgd", "momentum", "adam"}
        As `protocol.server_step` takes it.
    gradient : (..., A, B) tensor
        The aggregate that the step took.
    lr : float or (..., 1, 1) tensor
        The learning rate.
    state : ServerState
        The optimizer's state before the step.
    costate : Costate
        The costate after the step.

    Returns
    -------
    before : Costate
        At a given gradient: what the gradient itself owes to the parameters is still to be added.
    by_gradient : (..., A, B) tensor
        The derivative of the harm by the aggregate; `-lr costate.theta` of sgd.
    """
    if optimizer == "sgd":
        return costate, -lr * costate.theta
    if optimizer == "momentum":
        by_first = costate.first - lr * costate.theta
        return costate._replace(first=MOMENTUM * by_first), by_first
    beta1, beta2 = ADAM_BETAS
    step = state.step + 1
    unbiased = (beta1 * state.first + (1 - beta1) * gradient) / (1 - beta1**step)
    root = ((beta2 * state.second + (1 - beta2) * gradient**2) / (1 - beta2**step)).sqrt()
    scale = root + ADAM_EPS
    by_first = costate.first - lr * costate.theta / scale / (1 - beta1**step)
    by_root = lr * costate.theta * unbiased / scale**2
    # where a coordinate has never had a gradient its root is 0 and has no derivative; nor does the coordinate move
    by_second = costate.second + torch.where(root > 0, by_root / (2 * root * (1 - beta2**step)), 0.0)
    by_gradient = (1 - beta1) * by_first + 2 * (1 - beta2) * gradient * by_second
    return Costate(costate.theta, beta1 * by_first, beta2 * by_second), by_gradient
