"""Every model keeps the contract of `Model`: derivatives, exact flips, starts, names; and what is refused."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_attack import adversary, attack, models, scenario
from fl_attack.config import Settings
from fl_attack.errors import InputError
from fl_attack.models import LOSSES, Model, outputs
from fl_attack.models.networks import ConvNet, DenseLayers, Mlp, Network

IMAGE = (1, 8, 8)


class Normed(nn.Module):
    """Group norm, layer norm, a smooth activation and a buffer that is drawn at random."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], width, 3)
        self.group = nn.GroupNorm(2, width)
        self.layer = nn.LayerNorm(width)
        self.out = nn.Linear(width, classes)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, X: Tensor) -> Tensor:
        X = functional.gelu(self.group(self.conv(X))).mean((2, 3)) + self.shift
        return self.out(self.layer(X))


class Tied(nn.Module):
    """Two layers that share their weights, and one that is not trained."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        width = math.prod(shape)
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, classes)
        self.second.weight = self.first.weight
        self.out.bias.requires_grad_(False)

    def forward(self, X: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(X.flatten(1))))))


BUILDERS: dict[str, Callable[[int], Model]] = {
    "logistic": lambda classes: models.make("logistic", {}, "cross_entropy", IMAGE, classes, 0),
    "mlp": lambda classes: models.make("mlp", {"widths": [9, 7]}, "cross_entropy", IMAGE, classes, 0),
    "mlp without hidden layer": lambda classes: models.make("mlp", {"widths": []}, "cross_entropy", IMAGE, classes, 0),
    "cnn": lambda classes: models.make("cnn", {}, "cross_entropy", IMAGE, classes, 0),
    "norms": lambda classes: Network(Normed, IMAGE, classes, 0, "Normed"),
    "tied": lambda classes: Network(Tied, IMAGE, classes, 0, "Tied"),
    **{
        f"mlp with {loss}": lambda classes, loss=loss: models.make("mlp", {"widths": [6]}, loss, IMAGE, classes, 0)
        for loss in LOSSES
        if loss != "cross_entropy"
    },
}
EVERY = pytest.mark.parametrize("name", BUILDERS)


def problem(name: str, classes: int, n: int = 12, seed: int = 0) -> tuple[Model, Tensor, Tensor, Tensor, Tensor]:
    """A model, parameters, inputs, labels and how often each sample counts, in double precision."""
    model = BUILDERS[name](classes)
    rng = torch.Generator().manual_seed(seed)
    start = model.start()
    theta = start + 0.1 * torch.randn(start.shape, generator=rng, dtype=torch.float64)
    X = torch.rand((n, *IMAGE), generator=rng, dtype=torch.float64)
    if model.constant:
        X = torch.cat([X.flatten(1), torch.ones(n, 1, dtype=torch.float64)], 1)
    y = torch.randint(classes, (n,), generator=rng)
    return model, theta, X, y, torch.randint(1, 4, (n,), generator=rng).double()


def total_loss(model: Model, theta: Tensor, X: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The weighted sum of the losses, from their definition."""
    table = model.loss(model.logits(theta, X))
    return (table[torch.arange(len(y)), y] * w).sum()


@EVERY
@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_is_that_of_the_mean_loss(name: str, classes: int) -> None:
    model, theta, X, y, w = problem(name, classes)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total_loss(model, leaf, X, y, w) / w.sum(), leaf)
    torch.testing.assert_close(model.gradient(theta, X, y, w), expected, rtol=1e-9, atol=1e-12)
    unweighted = model.gradient(theta, X, y)
    torch.testing.assert_close(unweighted, model.gradient(theta, X, y, torch.ones_like(w)), rtol=1e-9, atol=1e-12)
    assert unweighted.shape == model.shape


@EVERY
@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_finite_differences_of_the_losses_under_each_label(name: str, classes: int) -> None:
    model, theta, X, _, _ = problem(name, classes)
    v = torch.randn(theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v /= v.norm()
    h = 1e-6
    ahead, behind = (model.loss(model.logits(theta + step * v, X)) for step in (h, -h))
    expected = -(ahead - behind) / (2 * h)
    found = model.scores(theta, v, X)
    assert found.shape == (len(X), classes)
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-5, atol=1e-7)


@EVERY
def test_relabelling_is_the_difference_of_two_gradients(name: str) -> None:
    model, theta, X, y, w = problem(name, 4)
    new = (y + 1) % 4
    expected = (model.gradient(theta, X, new, w) - model.gradient(theta, X, y, w)) * w.sum()
    torch.testing.assert_close(model.relabelling(theta, X, y, new, w), expected, rtol=1e-9, atol=1e-12)


@EVERY
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_greedy_flips_are_the_best_of_all_label_sets(name: str, classes: int, goal: str) -> None:
    for seed, budget in ((0, 2), (1, 3)):
        model, theta, X, y, w = problem(name, classes, n=5, seed=seed)
        target = theta + 0.1 * torch.randn(theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        v = model.gradient(theta, X, y, w) if goal == "untargeted" else target - theta

        def objective(labels: Tensor) -> float:
            return float((model.gradient(theta, X, labels, w) * v).sum())  # noqa: B023

        view = attack.View(y, w, scores=model.scores(theta, v, X), logits=Tensor(), noise=Tensor())
        proposal = attack.find("greedy").function(view)
        chosen = attack.select(proposal.priority, torch.zeros(5, dtype=torch.int64), torch.tensor([budget]))
        written = torch.where(chosen, proposal.labels, y)
        every = itertools.product(range(classes), repeat=5)
        allowed = [one for one in map(torch.tensor, every) if (one != y).sum() <= budget]
        best = min(map(objective, allowed))
        assert objective(written) == pytest.approx(best, rel=1e-10, abs=1e-15)
        assert objective(written) < objective(y)
        scores = view.scores
        gained = ((scores[torch.arange(5), written] - scores[torch.arange(5), y]) * w).sum() / w.sum()
        assert objective(y) - objective(written) == pytest.approx(float(gained), rel=1e-9)


@EVERY
def test_parameters_survive_the_way_to_their_names_and_back(name: str) -> None:
    model, theta, *_ = problem(name, 3)
    assert np.array_equal(model.theta_of(model.state(theta)), theta.numpy())


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "logistic"])
def test_a_start_depends_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = BUILDERS[name](3).start()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(BUILDERS[name](3).start(), first)
    changed = BUILDERS[name](3).start()
    changed.add_(1)
    assert torch.equal(BUILDERS[name](3).start(), first)


def test_another_seed_gives_another_start() -> None:
    starts = [models.make("cnn", {}, "cross_entropy", IMAGE, 3, seed).start() for seed in (0, 1)]
    assert not torch.equal(*starts)


def test_logistic_is_the_general_way_on_one_dense_layer() -> None:
    logistic, theta, X, y, w = problem("logistic", 4)
    general = Network(lambda shape, classes: nn.Linear(shape[0], classes, bias=False), (X.shape[1],), 4, 0, "Linear")
    row, v = theta.reshape(1, -1), torch.randn_like(theta)
    torch.testing.assert_close(general.gradient(row, X, y, w).view_as(theta), logistic.gradient(theta, X, y, w))
    torch.testing.assert_close(general.scores(row, v.reshape(1, -1), X), logistic.scores(theta, v, X))


@pytest.mark.parametrize("loss", LOSSES)
def test_dense_layers_by_hand_are_the_general_way(loss: str) -> None:
    args = {"widths": [9, 7]}
    by_hand = Mlp(DenseLayers, IMAGE, 4, 3, "mlp", args, LOSSES[loss])
    general = Network(DenseLayers, IMAGE, 4, 3, "mlp", args, LOSSES[loss])
    rng = torch.Generator().manual_seed(0)
    theta = by_hand.start()
    assert torch.equal(theta, general.start())
    v = torch.randn(theta.shape, generator=rng, dtype=torch.float64)
    X, y = torch.rand((9, *IMAGE), generator=rng, dtype=torch.float64), torch.randint(4, (9,), generator=rng)
    for function, args_ in (("logits", (X,)), ("gradient", (X, y)), ("scores", (v, X))):
        found, expected = (getattr(model, function)(theta, *args_) for model in (by_hand, general))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name.startswith("mlp") or name == "logistic"])
def test_cells_in_stacked_parameters_do_not_mix(name: str) -> None:
    model, theta, X, y, w = problem(name, 4)
    assert model.stackable
    many, v = torch.stack([theta, -theta, 2 * theta]), torch.stack([2 * theta, theta, theta + 1])
    for found, one, along in zip(model.scores(many, v, X), many, v, strict=True):
        torch.testing.assert_close(found, model.scores(one, along, X))
    for found, one in zip(model.gradient(many, X, y, w), many, strict=True):
        torch.testing.assert_close(found, model.gradient(one, X, y, w))


def test_losses_are_those_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    Z, y = torch.randn(9, 4, generator=rng, dtype=torch.float64), torch.randint(4, (9,), generator=rng)
    own = {name: outputs.losses_under(loss, Z, y) for name, loss in LOSSES.items()}
    torch.testing.assert_close(own["cross_entropy"], functional.cross_entropy(Z, y, reduction="none"))
    smoothed = functional.cross_entropy(Z, y, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(own["label_smoothing"], smoothed)
    p = torch.softmax(Z, -1)
    torch.testing.assert_close(own["brier"], ((p - functional.one_hot(y, 4)) ** 2).sum(-1))
    right = p[torch.arange(9), y]
    torch.testing.assert_close(own["focal"], -((1 - right) ** 2) * right.log())


def test_the_cnn_is_that_of_the_literature_on_mnist() -> None:
    assert sum(value.numel() for value in ConvNet((1, 28, 28), 10).parameters()) == 431_080


def test_resnet18_has_a_first_layer_for_small_images_and_no_batch_norm() -> None:
    model = models.make("resnet18", {"groups": 4}, "cross_entropy", (3, 8, 8), 10, 0)
    assert model.shape == (1, 11_173_962)
    names = model.state(model.start())
    assert names["conv1.weight"].shape == (64, 3, 3, 3) and not any("running" in name for name in names)


class Normalized(nn.Sequential):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(math.prod(shape)), nn.Linear(math.prod(shape), classes))


class Dropping(nn.Sequential):
    def __init__(self, shape: tuple[int, ...], classes: int, p: float = 0.5) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(p), nn.Linear(math.prod(shape), classes))


class Flat(nn.Sequential):
    """Of which the tests below change what it answers."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), classes))


class Noisy(Flat):
    def forward(self, X: Tensor) -> Tensor:
        return functional.dropout(super().forward(X), training=self.training)


class Centred(Flat):
    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X - X.mean(0))


class OneOutput(Flat):
    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X)[:, :1]


class Frozen(Flat):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__(shape, classes)
        self.requires_grad_(False)


class Broken(Flat):
    def forward(self, X: Tensor) -> Tensor:
        raise KeyError("no such layer")


class Undifferentiable(torch.autograd.Function):
    """Has no derivative in forward mode."""

    @staticmethod
    def forward(Z: Tensor) -> Tensor:
        return Z.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class BackwardsOnly(Flat):
    def forward(self, X: Tensor) -> Tensor:
        return Undifferentiable.apply(super().forward(X))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Normalized, r"layer 1 \(BatchNorm1d\) depends on the other samples.*GroupNorm"),
        (Dropping, r"layer 1 \(Dropout\) draws a new mask.*p=0"),
        (Noisy, "answers the same inputs differently"),
        (Centred, "differently by itself than in a batch"),
        (OneOutput, r"with \(3, 1\), not \(3, 4\)"),
        (Frozen, "no parameter to train"),
        (Broken, "can't answer inputs of shape .*KeyError"),
        (BackwardsOnly, "can't be differentiated"),
        (lambda shape, classes: 3, "gives a int"),
        (lambda shape, classes: 1 / 0, "can't be built .*ZeroDivisionError"),
    ],
)
def test_a_module_that_is_no_function_of_one_sample_is_refused(build: Callable[..., nn.Module], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        Network(build, IMAGE, 4, 0, "mine.py:Net")
    assert "\n" not in str(refused.value) and "mine.py:Net" in str(refused.value)


def test_dropout_that_drops_nothing_is_allowed() -> None:
    assert Network(Dropping, IMAGE, 4, 0, "mine", {"p": 0.0}).shape[0] == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=unknown"], "model.name=unknown is not a model; known: logistic, mlp, cnn, resnet18"),
        (["model=mlp", "model.args.depth=3"], "model.args.depth is not an argument of name=mlp; it takes widths"),
        (["model.loss=focal"], "model.loss=focal has no meaning with name=logistic"),
        (["model=mlp", "model.loss=hinge"], "model.loss=hinge is not allowed"),
        (["lr_every=3"], "lr_every=3 has no meaning with lr_schedule=constant"),
        (["worker_momentum=1"], "worker_momentum=1 is not allowed"),
    ],
)
def test_wrong_models_get_one_line(settings: Callable[..., Settings], overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(*overrides)


def test_a_module_of_a_file_is_trained(settings: Callable[..., Settings], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, shape, classes, width=5):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(shape[1] * shape[2], width), nn.Tanh(),\n"
        "                         nn.Linear(width, classes))\n"
    )
    cell = scenario.make(settings(f"model.name={file}:Net", "model.args.width=4"))
    assert cell.theta_shape == (1, 64 * 4 + 4 + 4 * 10 + 10)
    flips = adversary.flips(cell, cell.start(), 1)
    assert 0 < len(flips.samples) <= flips.allowed
