"""Directions that attackers push the gradient against: the table DIRECTIONS.

A direction is one function `Aim -> v` and one row of the table: flips are chosen so that the inner product of the
gradient with v is smallest. None of them looks ahead, as plans do. Shapes: parameters and directions are (..., A, B);
leading axes, for models that take them, are experiments.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import vjp

from fl_attack import plugins
from fl_attack.attack.harm import smoothed_error_residuals
from fl_attack.errors import InputError
from fl_attack.models import Model

TEMPERATURE = 1.0  # by which the smoothed error divides logits
Lazy = Callable[[], Any]


class Aim:
    """What attackers know as they choose a direction. What takes work is worked out when it is first asked for."""

    def __init__(self, theta: Tensor, round_: int, model: Model, *, gradient: Lazy, target: Lazy, sample: Lazy) -> None:
        """The last three are functions without arguments that give what the properties of these names hold."""
        self.theta = theta  # (..., A, B) the broadcast parameters
        self.round = round_  # counted from 1
        self.model = model
        self._lazy = gradient, target, sample

    @cached_property
    def gradient(self) -> Tensor:
        """(..., A, B) clean gradient of the minibatches that the attackers know; zero if they know none."""
        return cast(Tensor, self._lazy[0]())

    @cached_property
    def target(self) -> Tensor:
        """(..., A, B) parameters of the same training on fully flipped labels, or those of `attack.target_path`."""
        return cast(Tensor, self._lazy[1]())

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """Inputs (n, ...) and true labels (n,) of training samples, the same in every round; none of the test set."""
        return cast(tuple[Tensor, Tensor], self._lazy[2]())

    def pull_back(self, by_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """The derivative by theta (..., A, B) of what has the derivative `by_logits` by the logits of the sample."""
        X, _ = self.sample
        if self.model.linear:  # the first use of torch.func takes seconds
            return (by_logits(self.model.logits(self.theta.to(X.dtype), X)).mT @ X).to(self.theta)
        Z, back = cast(Any, vjp)(lambda theta: self.model.logits(theta, X), self.theta.to(X.dtype))
        return cast(Tensor, back(by_logits(Z))[0]).to(self.theta)


def gradient(aim: Aim) -> Tensor:
    """The clean gradient: the update is turned away from the honest one (goal=untargeted)."""
    return aim.gradient


def target(aim: Aim) -> Tensor:
    """The way to the target: the update is turned towards it (goal=targeted)."""
    return aim.target - aim.theta


def target_far(aim: Aim) -> Tensor:
    """The parameters of the target as they are: the same direction in every round, beyond the target too."""
    return aim.target


def validation_loss(aim: Aim) -> Tensor:
    """Direction that raises the loss: the gradient of the mean loss on the sample."""
    y = aim.sample[1]
    return aim.pull_back(lambda Z: aim.model.residuals(Z, y) / len(y))


def smoothed_error_direction(aim: Aim) -> Tensor:
    """Direction that raises the smoothed error: the gradient of the smoothed error on the sample."""
    y = aim.sample[1]
    return aim.pull_back(lambda Z: smoothed_error_residuals(Z, y, TEMPERATURE))


def mean_feature(aim: Aim) -> Tensor:
    """The derivative of the mean logit of the last class, to which labels go; of linear models the mean feature."""
    return aim.pull_back(lambda Z: _mean_logit_derivative(Z, Z.shape[-1] - 1, 1.0))


def minus_mean_feature(aim: Aim) -> Tensor:
    """Direction along which labels become the first class; of two classes the opposite of `mean_feature`."""
    return aim.pull_back(lambda Z: _mean_logit_derivative(Z, 0, -1.0 if Z.shape[-1] == 1 else 1.0))


def _mean_logit_derivative(Z: Tensor, number: int, sign: float) -> Tensor:
    """The derivative by logits Z (..., n, C) of `sign` times the mean logit of a class."""
    R = torch.zeros_like(Z)
    R[..., number] = sign / Z.shape[-2]
    return R


class Direction(NamedTuple):
    """A row of the table: the function, and what it needs that takes training or knowledge."""

    function: Callable[[Aim], Tensor]
    uses: tuple[str, ...] = ()  # of `knowledge` (of the clean gradient) and `target_path`


DIRECTIONS: dict[str, Direction] = {
    "gradient": Direction(gradient, ("knowledge",)),
    "target": Direction(target, ("target_path",)),
    "target_far": Direction(target_far, ("target_path",)),
    "validation_loss": Direction(validation_loss),
    "smoothed_error": Direction(smoothed_error_direction),
    "mean_feature": Direction(mean_feature),
    "-mean_feature": Direction(minus_mean_feature),
}


def find_direction(name: str) -> Direction:
    """The direction of a name of the table or of the import path of a function; InputError where there is none."""
    if name in DIRECTIONS:
        return DIRECTIONS[name]
    if not plugins.is_path(name):
        raise InputError(plugins.unknown_name("direction", name, "a direction", DIRECTIONS))
    try:
        return Direction(cast(Callable[[Aim], Tensor], plugins.load(name)), ("knowledge", "target_path"))
    except InputError as error:
        raise InputError(f"direction={error}") from None


def scores_along(name: str, aim: Aim, X: Tensor) -> Tensor:
    """The scores of samples along a direction, see `Model.scores`.

    Parameters
    ----------
    name : str
        The direction: a row of `DIRECTIONS`, or the import path of a function.
    aim : Aim
        What the attackers know as they choose it.
    X : (n, ...) tensor
        The samples' features.

    Returns
    -------
    (..., n, classes) tensor
    """
    return aim.model.scores(aim.theta.to(X.dtype), direction_of(name, aim).to(X.dtype), X)


def direction_of(name: str, aim: Aim) -> Tensor:
    """The direction that the gradient is pushed against.

    Parameters
    ----------
    name : str
        A name of `DIRECTIONS`, or the import path of a function.
    aim : Aim
        What the attackers know as they choose; a user's function gets a copy.

    Returns
    -------
    (..., A, B) tensor
        The direction, shaped as the parameters.

    Raises
    ------
    RunError
        Where a user's function gives no direction.
    """
    if name in DIRECTIONS:
        return DIRECTIONS[name].function(aim)
    own = Aim(
        aim.theta.clone(),
        aim.round,
        aim.model,
        gradient=lambda: aim.gradient.clone(),
        target=lambda: aim.target.clone(),
        sample=lambda: tuple(part.clone() for part in aim.sample),
    )
    given = plugins.call(name, own)
    wanted = f"wanted: real numbers of shape {tuple(aim.theta.shape)}"
    if not isinstance(given, Tensor) or given.shape != aim.theta.shape or given.dtype.is_complex:
        what = f"shape {tuple(given.shape)}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        plugins.refuse(name, what.replace("torch.", ""), wanted)
    if not given.isfinite().all():
        plugins.refuse(name, "values that are not finite", wanted)
    return given.to(aim.theta)
