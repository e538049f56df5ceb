"""The closed forms against automatic differentiation and against the textbook."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch.autograd.functional import jvp

from fl_attack.models import logistic, outputs

BOTH = pytest.mark.parametrize("classes", [2, 5])


def problem(classes: int, n: int = 30, d: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(logistic.output_count(classes), d, dtype=torch.float64, generator=rng)
    X = torch.randn(n, d, dtype=torch.float64, generator=rng)
    return theta, X, torch.randint(classes, (n,), generator=rng)


@BOTH
def test_the_gradient_is_that_of_the_mean_loss(classes: int) -> None:
    theta, X, y = problem(classes)
    theta.requires_grad_()
    loss = outputs.losses(logistic.logits(theta, X), y).mean()
    torch.testing.assert_close(logistic.gradient(theta, X, y), torch.autograd.grad(loss, theta)[0])


@BOTH
def test_a_weight_counts_a_sample_that_often(classes: int) -> None:
    theta, X, y = problem(classes)
    w = torch.randint(1, 4, (len(y),), generator=torch.Generator().manual_seed(1))
    often = torch.repeat_interleave(torch.arange(len(y)), w)
    torch.testing.assert_close(logistic.gradient(theta, X, y, w.double()), logistic.gradient(theta, X[often], y[often]))


@BOTH
def test_leading_axes_do_not_mix(classes: int) -> None:
    theta, X, y = problem(classes)
    many = torch.stack([theta, 2 * theta, -theta])
    together = logistic.gradient(many, X, y)
    for one, row in zip(many, together, strict=True):
        torch.testing.assert_close(row, logistic.gradient(one, X, y))


@BOTH
def test_scores_are_the_derivative_of_the_logits_along_the_direction(classes: int) -> None:
    theta, X, _ = problem(classes)
    v = problem(classes, seed=1)[0]
    _, derivative = jvp(lambda t: logistic.logits(t, X), theta, v)
    scores = logistic.scores(v, X)
    assert scores.shape == (len(X), classes)
    if classes == 2:
        derivative = torch.cat([torch.zeros_like(derivative), derivative], -1)
    torch.testing.assert_close(scores, derivative)


@BOTH
def test_accuracy_f1_and_loss_are_those_of_scikit_learn(classes: int) -> None:
    theta, X, y = problem(classes)
    Z = logistic.logits(theta, X)
    p = outputs.probabilities(Z)
    p = torch.cat([1 - p, p], -1) if classes == 2 else p
    predicted = p.argmax(-1)
    found = outputs.quality(logistic.logits(theta, X), y)
    assert found.accuracy == pytest.approx(accuracy_score(y, predicted))
    assert found.f1 == pytest.approx(f1_score(y, predicted, average="binary" if classes == 2 else "macro"))
    assert found.loss == pytest.approx(log_loss(y, p))


def test_a_logit_of_zero_predicts_label_zero() -> None:
    assert outputs.predictions(torch.tensor([[0.0], [1e-9], [-1.0]])).tolist() == [0, 1, 0]


def test_the_loss_stays_finite_for_huge_logits() -> None:
    Z = torch.tensor([[1e30], [-1e30]])
    assert outputs.losses(Z, torch.tensor([0, 1])).isfinite().all()
