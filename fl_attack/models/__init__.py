"""What is trained: the table of models, and any module of a user's."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fl_attack import plugins
from fl_attack.errors import InputError
from fl_attack.models import logistic, networks, outputs
from fl_attack.models.base import Model
from fl_attack.models.networks import Mlp, Network
from fl_attack.models.outputs import LOSSES, Quality
from fl_attack.overrides import did_you_mean

__all__ = ["LOSSES", "MODELS", "Mlp", "Model", "Network", "Quality", "check_args", "logistic", "make", "outputs"]


class ModelEntry(NamedTuple):
    """A row of the table: what builds the module, and the class that differentiates it."""

    build: Callable[..., Any]  # Net(shape, classes, **args)
    kind: type[Network] | None = Network  # None: `build` gives a Model itself


MODELS: dict[str, ModelEntry] = {
    "logistic": ModelEntry(logistic.Logistic, None),
    "mlp": ModelEntry(networks.DenseLayers, Mlp),
    "cnn": ModelEntry(networks.ConvNet),
    "resnet18": ModelEntry(networks.resnet18),
}


def find(name: str) -> ModelEntry:
    """The row of a name of the table, or of the import path of a user's module; InputError where there is none."""
    if name in MODELS:
        return MODELS[name]
    if not plugins.is_path(name):
        message = plugins.unknown_name("name", name, "a model", MODELS, "a torch.nn.Module")
        raise InputError(f"{message}{did_you_mean(name, MODELS)}")
    return ModelEntry(plugins.load(name))


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Check that a model takes arguments.

    Parameters
    ----------
    name : str
        A name of `MODELS`, or the import path of a class.
    args : mapping
        Arguments by name, beside shape and classes.

    Raises
    ------
    InputError
        Where one is unknown or missing.
    """
    try:
        parameters = list(inspect.signature(find(name).build).parameters.values())[2:]
    except ValueError:  # no signature to be had: building it will tell
        return
    plugins.check_keywords(name, parameters, args)


def make(name: str, args: Mapping[str, Any], loss: str, inputs: tuple[int, ...], classes: int, seed: int) -> Model:
    """The model of a name, for samples of shape `inputs` and labels of `classes` classes.

    `logistic` has no use for args, loss and seed: it takes none, has the cross-entropy, and starts at zero.

    Parameters
    ----------
    name
        Of the table `MODELS`, or the import path of a `torch.nn.Module`, built as `Net(inputs, classes, **args)`.
    args
        Arguments of the module by name.
    loss
        Of the table `LOSSES`.
    inputs
        Shape of one sample: (C, H, W) of an image, (d,) of features.
    classes
        Number of labels.
    seed
        What a network's first parameters are drawn from.

    Raises
    ------
    InputError
        Where the module can't be built, or is no differentiable function of one sample at a time.
    """
    entry = find(name)
    if entry.kind is None:
        return entry.build(inputs, classes)  # type: ignore[no-any-return]
    return entry.kind(entry.build, inputs, classes, seed, name, args, LOSSES[loss])
