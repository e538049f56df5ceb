"""Neural networks: any `torch.nn.Module`, and the ones that come with the package.

A module is built as `Net(shape, classes, **args)`, with `shape` (C, H, W) of images or (d,) of features; given inputs
(n, *shape) it answers with logits (n, classes), two classes included. Its trainable parameters are one row, (1, P), in
the order of `named_parameters`.
"""

import copy
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from fl_attack.errors import InputError, one_line
from fl_attack.models import outputs
from fl_attack.models.base import Model

Builder = Callable[..., nn.Module]
PROBES = 3  # samples on which a module is tried
GROUPS = 32  # of channels in a group norm, Wu and He 2018, https://arxiv.org/abs/1803.08494
TENTATIVE = 1e-3  # relative difference that rounding may make between a sample alone and in a batch


class Network(Model):
    """A module as a function of one row of parameters; derivatives by `torch.func`."""

    def __init__(
        self,
        build: Builder,
        inputs: tuple[int, ...],
        classes: int,
        seed: int,
        name: str,
        args: Mapping[str, Any] | None = None,
        loss: outputs.LossTable = outputs.cross_entropy,
    ) -> None:
        """InputError where the module can't be built, or is no function of its parameters and of one sample."""
        self.name, self.classes = name, classes
        module = _built(build, inputs, classes, seed, name, args or {})
        trained = {key: value for key, value in module.named_parameters() if value.requires_grad}
        if not trained:
            raise InputError(f"model.name={name} has no parameter to train")
        self.sizes = {key: value.shape for key, value in trained.items()}
        self._start = torch.cat([value.detach().reshape(-1).double() for value in trained.values()])[None]
        self._module = module
        self._copies, self._lock = threading.local(), threading.Lock()
        super().__init__((1, self._start.shape[1]), loss)
        _check_layers(module, name)
        _check_function(self, inputs, classes, name)

    def start(self) -> Tensor:
        """The module's own initialisation, (1, P)."""
        return self._start.clone()

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """The module's answer, (n, classes), see `Model.logits`."""
        module, fixed = self._module_of_thread(theta)
        found: Tensor = functional_call(module, (self.parameters(theta), fixed), (X,))
        return found

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta (1, P) by the names of the parameters."""
        parts = theta[0].split([math.prod(shape) for shape in self.sizes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.sizes.items(), parts, strict=True)}

    def state(self, theta: Tensor) -> dict[str, NDArray[Any]]:
        """All that `load_state_dict` of the module wants, theta's numbers where they are trained."""
        module = copy.deepcopy(self._module).double()
        with torch.no_grad():
            for name, value in self.parameters(theta).items():
                module.get_parameter(name).copy_(value)
        return {name: value.numpy() for name, value in module.state_dict().items()}

    def theta_of(self, state: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """The parameters (1, P) from arrays that `state` gave; an array `theta` (1, P) is taken as it is."""
        if "theta" in state and "theta" not in self.sizes:
            return np.asarray(state["theta"], np.float64)
        parts = []
        for name, shape in self.sizes.items():
            part = np.asarray(state[name], np.float64)
            if part.shape != tuple(shape):
                raise ValueError(f"{name} has shape {part.shape}; {tuple(shape)} is needed")
            parts.append(part.ravel())
        return np.concatenate(parts)[None]

    def by_class(self, updates: Tensor) -> Tensor:
        """Rows of the last weight with a row for each class, and of its bias if one follows; see `Model.by_class`."""
        parts = updates[..., 0, :].split([math.prod(shape) for shape in self.sizes.values()], -1)
        rows = list(zip(self.sizes.values(), parts, strict=True))
        last = [i for i, (shape, _) in enumerate(rows) if len(shape) > 1 and shape[0] == self.classes]
        if not last:
            raise InputError(f"model.name={self.name} has no last layer with a row for each of {self.classes} classes")
        bias = last[-1] + 1 < len(rows) and rows[last[-1] + 1][0] == (self.classes,)
        found = [part.unflatten(-1, (self.classes, -1)) for _, part in rows[last[-1] : last[-1] + 1 + bias]]
        return torch.cat(found, -1)

    def _module_of_thread(self, theta: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
        """A module of this thread's own, since `functional_call` puts parameters into it; and what is not trained."""
        held: dict[Any, Any] = self._copies.__dict__
        if "module" not in held:
            with self._lock:
                held["module"] = copy.deepcopy(self._module)
        key = theta.dtype, theta.device
        if key not in held:
            module = held["module"]
            rest = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            held[key] = {
                name: value.detach().to(theta.device, theta.dtype if value.is_floating_point() else value.dtype)
                for name, value in rest.items()
                if name not in self.sizes
            }
        return held["module"], held[key]


def _built(
    build: Builder, inputs: tuple[int, ...], classes: int, seed: int, name: str, args: Mapping[str, Any]
) -> nn.Module:
    """The module, initialised from the seed alone; InputError where building it fails or gives no module."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            module = build(inputs, classes, **args)
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            reason = one_line(error)
            raise InputError(
                f"model.name={name} can't be built as {getattr(build, '__name__', name)}(shape={inputs}, "
                f"classes={classes}{''.join(f', {key}={value}' for key, value in args.items())}): "
                f"{type(error).__name__}: {reason}"
            ) from None
    if not isinstance(module, nn.Module):
        raise InputError(f"model.name={name} gives a {type(module).__name__}; a torch.nn.Module is needed")
    return module.train()


def _check_layers(module: nn.Module, name: str) -> None:
    """InputError for layers under which a sample's logits depend on the batch or on chance, by their name."""
    for place, layer in module.named_modules():
        kind = f"layer {place} ({type(layer).__name__})" if place else type(layer).__name__
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"model.name={name}: {kind} depends on the other samples of a batch, so that no label's effect on the "
                "gradient stands alone; use torch.nn.GroupNorm in its place"
            )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise InputError(f"model.name={name}: {kind} keeps running statistics; set track_running_stats=False")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise InputError(
                f"model.name={name}: {kind} draws a new mask in every pass, so that attackers and clients would not "
                "see the same function; set p=0 or leave it out"
            )


def _check_function(model: Network, inputs: tuple[int, ...], classes: int, name: str) -> None:
    """InputError unless the module is a differentiable function of its parameters and of one sample at a time."""
    rng = torch.Generator().manual_seed(0)
    X = torch.rand((PROBES, *inputs), generator=rng)
    theta = model.start().float()
    v = torch.randn(theta.shape, generator=rng)
    where = f"model.name={name}"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            Z, again = model.logits(theta, X), model.logits(theta, X)
            if not isinstance(Z, Tensor) or Z.shape != (PROBES, classes):
                shape = tuple(Z.shape) if isinstance(Z, Tensor) else type(Z).__name__
                raise InputError(
                    f"{where} answers {PROBES} inputs of shape {inputs} with {shape}, not {PROBES, classes}"
                )
            if not Z.isfinite().all():
                raise InputError(f"{where} answers with logits that are not finite")
            if not torch.equal(Z, again):
                raise InputError(
                    f"{where} answers the same inputs differently when asked twice; leave chance out of it"
                )
            alone = torch.cat([model.logits(theta, x[None]) for x in X])
            if not torch.allclose(Z, alone, rtol=TENTATIVE, atol=TENTATIVE * float(Z.abs().max())):
                raise InputError(f"{where} answers a sample differently by itself than in a batch with others")
        try:
            with warnings.catch_warnings():  # the first derivative loads a part of torch that says so
                warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
                jvp(lambda at: model.logits(at, X), (theta,), (v,))
            model.gradient(theta, X, torch.zeros(PROBES, dtype=torch.int64))
        except (NotImplementedError, RuntimeError) as error:
            reason = one_line(error)[:200]
            raise InputError(f"{where} can't be differentiated as the attack needs it: {reason}") from None
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        reason = one_line(error)
        raise InputError(
            f"{where} can't answer inputs of shape {(PROBES, *inputs)}: {type(error).__name__}: {reason}"
        ) from None


# --- dense networks, in closed form --------------------------------------------------------------


class DenseLayers(nn.Sequential):
    """Hidden dense layers of these widths, each followed by a rectifier, and the output: `hidden1`, ..., `output`.

    InputError where `widths` is not a list of positive whole numbers.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, widths: Sequence[int] = (200,)) -> None:
        super().__init__()
        if isinstance(widths, int) or not all(isinstance(width, int) and width > 0 for width in widths):
            raise InputError(f"model.args.widths={widths} is not allowed: it must be a list such as [200] or [128,64]")
        self.add_module("flatten", nn.Flatten())
        for i, (before, after) in enumerate(pairwise([math.prod(shape), *widths]), 1):
            self.add_module(f"hidden{i}", nn.Linear(before, after))
            self.add_module(f"rectifier{i}", nn.ReLU())
        self.add_module("output", nn.Linear([math.prod(shape), *widths][-1], classes))


class Mlp(Network):
    """Dense layers, differentiated by hand; leading axes of theta (M, 1, P) are cells that share X.

    The first layer, where most of the work is, is then one product for all cells.
    """

    stackable = True

    def logits(self, theta: Tensor, X: Tensor) -> Tensor:
        """Logits, (..., n, classes), see `Model.logits`; theta may be that of many cells, (M, 1, P)."""
        return _unstacked(self.forward(theta, X)[-1], theta)

    def forward(self, theta: Tensor, X: Tensor, first: Tensor | None = None) -> list[Tensor]:
        """What goes into each layer but the first, and the logits.

        Parameters
        ----------
        theta : (1, P) or (M, 1, P) tensor
            Parameters of M cells.
        X : (n, *inputs) tensor
            Inputs, the same for all.
        first : (M, n, width) tensor, optional
            What the first layer gives, where that is known; it is overwritten.

        Returns
        -------
        list of (M, n, width) tensors
            Of each hidden layer what it puts out after its rectifier; last the logits.
        """
        layers = self.layers(theta)
        found = [shared_product(X.flatten(1), *layers[0]) if first is None else first]
        for W, b in layers[1:]:
            found.append(torch.baddbmm(b[:, None], found[-1].relu_(), W.mT))
        return found

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights (M, out, in) and biases (M, out) of each layer, as views of theta (..., 1, P)."""
        rows = theta.reshape(-1, theta.shape[-1])
        parts = iter(rows.split([math.prod(shape) for shape in self.sizes.values()], 1))
        shapes = iter(self.sizes.values())
        views = [part.view(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))

    def gradient(self, theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss, (..., 1, P), see `Model.gradient`; labels and weights may be (n,) or (M, n)."""
        activations = self.forward(theta, X)
        R = self.residuals(activations[-1], y, w)
        R = R / (X.shape[0] if w is None else w.sum(-1)[..., None, None])
        return self.pull_back(theta, X, activations, R)

    def relabelling(self, theta: Tensor, X: Tensor, y: Tensor, new: Tensor, w: Tensor) -> Tensor:
        """What the summed gradient gains by other labels, see `Model.relabelling`."""
        activations = self.forward(theta, X)
        Z = activations[-1]
        return self.pull_back(theta, X, activations, self.residuals(Z, new, w) - self.residuals(Z, y, w))

    def pull_back(self, theta: Tensor, X: Tensor, activations: list[Tensor], R: Tensor) -> Tensor:
        """Derivatives by the parameters from those by the logits.

        Parameters
        ----------
        theta, X
            As `forward` takes them.
        activations : list of tensors
            The activations that `forward` gave.
        R : (M, n, classes) tensor
            Derivatives by the logits.

        Returns
        -------
        (..., 1, P) tensor
            Shaped as theta.
        """
        deltas = self.deltas(theta, activations, R)
        X = X.flatten(1)
        M, n, width = deltas[0].shape
        parts = [(deltas[0].mT.reshape(M * width, n) @ X).view(M, -1), deltas[0].sum(1)]
        for W, b in self.pull_back_others(activations, deltas):
            parts += [W.flatten(1), b]
        return torch.cat(parts, 1).view(theta.shape)

    def pull_back_others(self, activations: list[Tensor], deltas: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The part of `pull_back` by all layers but the first.

        Parameters
        ----------
        activations, deltas : lists of tensors
            What `forward` and `deltas` gave.

        Returns
        -------
        list of pairs of tensors
            By the weights (M, out, in) and the biases (M, out) of each layer.
        """
        return [(torch.bmm(delta.mT, into), delta.sum(1)) for delta, into in zip(deltas[1:], activations, strict=False)]

    def deltas(self, theta: Tensor, activations: list[Tensor], R: Tensor) -> list[Tensor]:
        """Derivatives by what each layer puts out, before its rectifier.

        Parameters
        ----------
        theta, activations, R
            As `pull_back` takes them.

        Returns
        -------
        list of (M, n, width) tensors
            The last one is R.
        """
        layers, found = self.layers(theta), [R.expand(activations[-1].shape)]
        for (W, _), into in zip(layers[:0:-1], activations[-2::-1], strict=True):
            found.insert(0, torch.bmm(found[0], W).mul_(into > 0))
        return found

    def scores(self, theta: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """Scores along a direction, (..., n, classes), see `Model.scores`."""
        (first, first_bias), *others = self.layers(v)
        along_first = shared_product(X.flatten(1), first, first_bias)
        return _unstacked(self.forward_scores(theta, self.forward(theta, X), along_first, others), theta)

    def forward_scores(
        self, theta: Tensor, activations: list[Tensor], along_first: Tensor, others: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Scores along a direction, forward through the layers.

        Parameters
        ----------
        theta : (1, P) or (M, 1, P) tensor
            Parameters.
        activations : list of tensors
            The activations that `forward` gave for these parameters.
        along_first : (M, n, width) tensor
            What the first layer gives along the direction; it is overwritten.
        others : sequence of pairs of tensors
            The direction's weights and biases in the other layers.

        Returns
        -------
        (M, n, classes) tensor
            As `scores` gives them.
        """
        dZ = along_first
        for (W, _), (V, c), into in zip(self.layers(theta)[1:], others, activations, strict=False):
            dZ = torch.baddbmm(c[:, None], dZ.mul_(into > 0), W.mT).baddbmm_(into, V.mT)
        return self.class_scores(activations[-1], dZ)


def shared_product(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """`X W^T + b` of several layers that share their inputs, as one product.

    Parameters
    ----------
    X : (n, in) tensor
        Inputs.
    W : (M, out, in) tensor
        Weights.
    b : (M, out) tensor
        Biases.

    Returns
    -------
    (M, n, out) tensor
    """
    M, width, _ = W.shape
    return (
        functional.linear(X, W.reshape(M * width, -1), b.reshape(-1)).view(len(X), M, width).movedim(1, 0).contiguous()
    )


def _unstacked(values: Tensor, theta: Tensor) -> Tensor:
    """Values (M, n, C) with the leading axes of theta (..., 1, P)."""
    return values.view(*theta.shape[:-2], *values.shape[1:])


# --- networks of the literature ------------------------------------------------------------------


class ConvNet(nn.Module):
    """Two convolutions (20 and 50 of 5 x 5, each with a pooling by 2), two dense layers (500, classes).

    The network of the literature on robust learning for MNIST: 431,080 parameters for 28 x 28 and ten classes.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = _image(shape, "cnn")
        left = [((side - 4) // 2 - 4) // 2 if side >= 16 else 0 for side in (height, width)]
        padding = 0
        if min(left) < 1:  # small images keep their size in the convolutions
            padding, left = 2, [side // 2 // 2 for side in (height, width)]
        if min(left) < 1:
            raise InputError(f"model=cnn needs images of 4 x 4 pixels or more, not {height} x {width}; use model=mlp")
        self.conv1 = nn.Conv2d(channels, 20, 5, padding=padding)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.dense1 = nn.Linear(50 * left[0] * left[1], 500)
        self.dense2 = nn.Linear(500, classes)

    def forward(self, X: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, C, H, W)."""
        X = functional.max_pool2d(functional.relu(self.conv1(X)), 2)
        X = functional.max_pool2d(functional.relu(self.conv2(X)), 2)
        found: Tensor = self.dense2(functional.relu(self.dense1(X.flatten(1))))
        return found


def resnet18(shape: tuple[int, ...], classes: int, groups: int = GROUPS) -> nn.Module:
    """torchvision's ResNet-18 with group norm, and a first layer for small images: 3 x 3, no pooling.

    Parameters
    ----------
    shape : (C, H, W)
        The shape of an image.
    classes : int
        The number of labels.
    groups : int
        Number of groups of each normalisation; it must divide 64 channels.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InputError
        Where torchvision does not import, samples are no images, or `groups` does not fit.

    References
    ----------
    He et al. 2016, https://arxiv.org/abs/1512.03385; group norm after Hsieh et al. 2020,
    https://arxiv.org/abs/1910.00189.
    """
    try:
        from torchvision import models
    except Exception as error:  # it is not there, or what a torch of another build than its own makes it raise
        raise InputError(
            "model=resnet18 needs torchvision, which does not import here "
            f"({one_line(error)}); install fl-attack[vision], or use model=cnn"
        ) from None
    channels, _, _ = _image(shape, "resnet18")
    if not isinstance(groups, int) or groups < 1 or 64 % groups:
        raise InputError(f"model.args.groups={groups} must divide 64 channels")
    network: nn.Module = models.resnet18(num_classes=classes, norm_layer=lambda width: nn.GroupNorm(groups, width))
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _image(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """The shape (C, H, W) of an image, as it is given; InputError where samples have another number of axes."""
    if len(shape) != 3:
        raise InputError(f"model={name} needs images, but a sample of this data set is {shape}; use model=mlp")
    return shape
