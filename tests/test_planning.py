"""Planned flips: costates against finite differences through the whole training, plans against all flip sequences."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fl_attack import models, protocol
from fl_attack.attack import smoothed_error
from fl_attack.planning import (
    Costate,
    General,
    Linear,
    Minibatch,
    Problem,
    Sweeps,
    TrainingState,
    Trajectory,
    WriteAccess,
    chosen_labels,
    derivatives_of,
    pull_back_step,
)
from fl_attack.planning.sweeps import PATIENCE

T, SAMPLES, FEATURES = 4, 18, 4
OPTIMIZERS = ("sgd", "momentum", "adam")


def problem(
    seed: int,
    plans: int,
    *,
    classes: int = 2,
    n: int = 6,
    rounds: int = T,
    optimizer: protocol.Optimizer = "sgd",
    lr: float = 0.5,
    decay: float = 0.0,
    budget: int = 1,
    average: bool = False,
    derivatives: Any = None,
    shape: tuple[int, int] | None = None,
    **how: Any,
) -> Problem:
    """A training on a few samples of two or three classes; by default of logistic regression from zero."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (SAMPLES,), generator=rng)
    X = torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=rng)
    X = X + 1.5 * y[:, None] * torch.randn(FEATURES, dtype=torch.float64, generator=rng)
    X[:, -1] = 1
    batches = [
        Minibatch(X[part], y[part]) for part in (torch.randperm(SAMPLES, generator=rng)[:n] for _ in range(rounds))
    ]
    theta = torch.zeros(plans, *(shape or (1 if classes == 2 else classes, FEATURES)), dtype=torch.float64)
    access = WriteAccess(torch.arange(n), torch.zeros(n, dtype=torch.int64), None, torch.full((plans, 1), budget))
    weights = torch.zeros(rounds + 1, plans, dtype=torch.float64)
    weights[1 if average else rounds :] = 1 / rounds if average else 1
    return Problem(
        derivatives or Linear(),
        optimizer,
        TrainingState(theta, protocol.initial_state(theta)),
        range(1, rounds + 1),
        batch=lambda round_: batches[round_ - 1],
        access=lambda round_: access,
        lr=lambda round_: lr / round_**0.5,
        weight_decay=decay,
        classes=classes,
        sample=Minibatch(X, y),
        weights=weights,
        **how,
    )


def from_theta(of: Problem, theta: torch.Tensor) -> Problem:
    return dataclasses.replace(of, start=TrainingState(theta, protocol.initial_state(theta)))


def clean(of: Problem) -> list[torch.Tensor | None]:
    return [of.batch(round_).y.expand(of.plans, -1).to(torch.uint8) for round_ in of.rounds]


def random_theta(of: Problem, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(of.start.theta.shape, dtype=torch.float64, generator=rng)


def differences(harm: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences of `harm` (P,) by each coordinate of `at` (P, A, B)."""
    found = torch.zeros_like(at)
    for a, b in itertools.product(range(at.shape[1]), range(at.shape[2])):
        along = torch.zeros_like(at)
        along[:, a, b] = step
        found[:, a, b] = (harm(at + along) - harm(at - along)) / (2 * step)
    return found


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_costates_are_the_derivatives_of_the_harm_through_the_whole_training(
    optimizer: protocol.Optimizer, classes: int, average: bool
) -> None:
    lr = 0.1 if optimizer == "adam" else 0.7
    # a memory of one byte has every segment but the last run again
    of = problem(0, 2, rounds=7, classes=classes, optimizer=optimizer, lr=lr, decay=0.05, average=average, memory=1)
    theta = random_theta(of)
    trajectory = Trajectory(from_theta(of, theta))
    trajectory.run(clean(of))
    costate = trajectory.backwards(lambda *visited: None)
    slow = differences(lambda at: Trajectory(from_theta(of, at)).run(clean(of)), theta)
    assert trajectory.segment == 2
    assert slow.abs().max() > 0.01
    torch.testing.assert_close(costate.theta, slow, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_direction_of_a_round_is_the_derivative_of_the_harm_by_its_gradient(optimizer: protocol.Optimizer) -> None:
    of = problem(3, 1, optimizer=optimizer, lr=0.1)
    trajectory = Trajectory(from_theta(of, random_theta(of)))
    trajectory.run(clean(of))
    found: dict[int, torch.Tensor] = {}
    trajectory.backwards(lambda t, theta, v, scores: found.update({t: v}))

    class Pushed(Linear):
        """The gradient of one round with something added."""

        def __init__(self, t: int, along: torch.Tensor) -> None:
            self.left, self.along = t, along

        def gradient(self, theta: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            return super().gradient(theta, X, y) + (self.along if self.left == -1 else 0)

    for t in range(T):

        def harm(along: torch.Tensor, t: int = t) -> torch.Tensor:
            pushed = dataclasses.replace(from_theta(of, random_theta(of)), derivatives=Pushed(t, along))
            return Trajectory(pushed).run(clean(of))

        slow = differences(harm, torch.zeros_like(of.start.theta))
        torch.testing.assert_close(-found[t], slow, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of the first derivative in a process
@pytest.mark.parametrize("classes", [2, 3])
def test_the_general_way_is_that_of_closed_forms(classes: int) -> None:
    of, model = (
        problem(1, 2, classes=classes),
        models.make("logistic", {}, "cross_entropy", (FEATURES - 1,), classes, 0),
    )
    general, closed, theta = General(model), Linear(), random_theta(of)
    v, (X, y) = random_theta(of, 2), of.batch(1)
    R = closed.logits(theta, X)
    for name, given in {
        "logits": (theta, X),
        "gradient": (theta, X, y.expand(2, -1)),
        "pull_back": (theta, X, R),
        "scores": (theta, v, X),
    }.items():
        torch.testing.assert_close(getattr(general, name)(*given), getattr(closed, name)(*given), msg=name)
    for one, other in zip(
        *(d.scores_and_product(theta, v, X, y.expand(2, -1)) for d in (general, closed)), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert isinstance(derivatives_of(model), Linear)


@pytest.mark.parametrize("loss", ["cross_entropy", "brier"])
def test_costates_of_a_network_are_the_derivatives_of_the_harm(loss: str) -> None:
    model = models.make("mlp", {"widths": [3]}, loss, (FEATURES,), 3, 0)
    of = problem(2, 2, classes=3, rounds=3, derivatives=derivatives_of(model), shape=model.shape, lr=0.3)
    theta = model.start().expand(2, -1, -1) + random_theta(of)
    with torch.inference_mode():  # as engines run
        trajectory = Trajectory(from_theta(of, theta))
        trajectory.run(clean(of))
        costate = trajectory.backwards(lambda *visited: None)
    slow = differences(lambda at: Trajectory(from_theta(of, at)).run(clean(of)), theta)
    assert slow.abs().max() > 1e-3
    torch.testing.assert_close(costate.theta, slow, rtol=1e-5, atol=1e-9)


def starts(of: Problem) -> Callable[[torch.Tensor, Minibatch], torch.Tensor]:
    """Four plans: away from the clean gradient, towards the flipped labels, to the last and to the first class."""

    def direction(theta: torch.Tensor, batch: Minibatch) -> torch.Tensor:
        v = of.derivatives.gradient(theta, batch.X, batch.y.expand(of.plans, -1)).clone()
        v[1] = -of.derivatives.gradient(theta, of.sample.X, 1 - of.sample.y.expand(of.plans, -1))[1]
        mean = of.sample.X.mean(0)
        v[2], v[3] = mean, -mean
        return v

    return direction


def uniform(seed: int, of: Problem) -> Callable[[int], torch.Tensor]:
    return lambda number: torch.from_numpy(np.random.default_rng([seed, number]).random((of.plans, len(of.rounds) + 3)))


def planned(of: Problem, seed: int, sweeps: int = 30, tolerance: float = 0.0) -> Sweeps:
    improved = Sweeps(of, uniform(seed, of), tolerance)
    improved.start_from(starts(of))
    improved.run(sweeps)
    return improved


def best_of_all(seed: int, **how: Any) -> float:
    """The largest harm over every sequence of at most one flip a round."""
    n = 6
    choices = torch.tensor(list(itertools.product(range(n + 1), repeat=T)))  # n: none
    of = problem(seed, len(choices), n=n, **how)
    labels: list[torch.Tensor | None] = []
    for t, round_ in enumerate(of.rounds):
        y = of.batch(round_).y
        flips = torch.cat([torch.eye(n, dtype=torch.int64), torch.zeros(1, n, dtype=torch.int64)])
        labels.append((y + flips[choices[:, t]]) % 2)
    return Trajectory(of).run(labels).max().item()


@pytest.mark.parametrize(
    "how", [{}, {"optimizer": "momentum"}, {"optimizer": "adam", "lr": 0.1}, {"average": True}], ids=str
)
def test_plans_are_the_best_of_all_flip_sequences_in_nine_of_ten_seeds_and_never_better(how: dict[str, Any]) -> None:
    hits = 0
    for seed in range(10):
        found = planned(problem(seed, 4, **how), seed, sweeps=60).harm[-1].max()
        best = best_of_all(seed, **how)
        assert found <= best + 1e-12
        hits += found >= best - 1e-12
    assert hits >= 9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_harm_never_falls_and_is_that_of_the_labels(optimizer: protocol.Optimizer) -> None:
    of = problem(5, 4, rounds=12, optimizer=optimizer, lr=0.3, budget=2, average=True)
    improved = planned(of, 5)
    harm = np.array(improved.harm)
    assert (np.diff(harm, axis=0) >= 0).all()
    assert (harm[-1] > harm[0]).all()
    np.testing.assert_allclose(Trajectory(of).run(improved.labels).numpy(), harm[-1], rtol=1e-12)
    for round_, labels in zip(of.rounds, improved.labels, strict=True):
        assert labels is not None
        assert ((labels != of.batch(round_).y).sum(1) <= 2).all()


def test_labels_that_are_not_a_plans_own_stay_true() -> None:
    of = problem(6, 4, budget=3)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, :2] = mask[1, 2:] = True
    columns, group = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([0, 1, 1, 1, 1])
    access = WriteAccess(columns, group, mask, torch.tensor([[1, 0], [0, 2], [3, 3], [0, 0]]))
    of = dataclasses.replace(of, access=lambda round_: access if round_ != 2 else None)
    improved = planned(of, 6)
    assert improved.labels[1] is None
    total = torch.zeros(4, 5, dtype=torch.int64)
    for round_ in (1, 3, 4):
        labels = improved.labels[round_ - 1]
        assert labels is not None
        total += labels != of.batch(round_).y[columns]
    assert not total[~mask].any()
    assert (total[0] <= 3 * torch.tensor([1, 0, 0, 0, 0])).all()
    assert total[1].sum() <= 6 and total[3].sum() == 0
    assert total[1].any()


def test_sweeps_go_on_where_their_state_was_kept() -> None:
    of = problem(7, 4, rounds=9)
    whole = planned(of, 7, sweeps=9)
    half = planned(of, 7, sweeps=4)
    again = Sweeps(of, uniform(7, of), 0.0)
    again.restore(half.state())
    again.run(9)
    np.testing.assert_array_equal(np.array(whole.harm), np.array(again.harm))
    np.testing.assert_array_equal(np.array(whole.part), np.array(again.part))


def test_plans_that_gain_no_more_end() -> None:
    improved = planned(problem(0, 4), 0, sweeps=100, tolerance=1e-9)
    assert improved.over.all()
    assert len(improved.harm) < 60


def test_the_smoothed_error_nears_the_error_as_it_cools() -> None:
    Z = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]], dtype=torch.float64)
    y = torch.tensor([1, 1, 0, 0])
    assert smoothed_error(Z, y, 0.01).item() == pytest.approx(0.5, abs=1e-9)
    both = torch.cat([torch.zeros_like(Z), Z], -1)
    assert smoothed_error(Z, y, 0.7).item() == pytest.approx(smoothed_error(both, y, 0.7).item())


def test_rounds_without_written_labels_are_trained_on_true_ones() -> None:
    of = problem(8, 2)
    honest = Trajectory(of).run(clean(of))
    np.testing.assert_array_equal(Trajectory(of).run([None] * T), honest)
    turned = [1 - labels for labels in clean(of) if labels is not None]
    assert (Trajectory(of).run(list(turned)) != honest).all()
    nobody = dataclasses.replace(of, access=lambda round_: None)
    np.testing.assert_array_equal(Trajectory(nobody).run(list(turned)), honest)


def moved(uniform: list[float], old: list[int], *, budget: list[int], mask: list[bool] | None = None) -> list[int]:
    """The labels of plan 1, of five columns in two groups, after one of them is moved; true ones are 0, 1, 2, 0, 1."""
    of = problem(0, 2, classes=3, n=6, rounds=2)
    y = torch.tensor([9, 0, 1, 2, 0, 1])  # column 0 is nobody's to write
    of = dataclasses.replace(of, batch=lambda round_: Minibatch(torch.zeros(6, FEATURES), y))
    masks = None if mask is None else torch.tensor([[True] * 5, mask])
    budgets = torch.tensor([[9, 9], budget])
    access = WriteAccess(torch.arange(1, 6), torch.tensor([0, 0, 0, 1, 1]), masks, budgets)
    of = dataclasses.replace(of, access=lambda round_: access if round_ == 2 else None)
    other = [2, 2, 2, 2, 2]
    trial: list[torch.Tensor | None] = [None, torch.tensor([other, old], dtype=torch.uint8)]
    before = trial[1]
    improved = Sweeps(of, lambda number: torch.zeros(2, 5))
    improved._move_one(trial, 1, 0, uniform)
    assert trial[0] is None  # where nobody can write
    improved._move_one(trial, 1, 1, uniform)
    assert before is not None and before.tolist() == [other, old]  # the labels so far stay as they are
    assert trial[1] is not None and trial[1].dtype == torch.uint8
    assert trial[1][0].tolist() == other
    return trial[1][1].tolist()


@pytest.mark.parametrize(
    ("uniform", "old", "budget", "mask", "new"),
    [
        ([0.0, 0.0, 0.0], [0, 1, 2, 0, 1], [1, 1], None, [1, 1, 2, 0, 1]),  # the first column, the next label
        ([0.0, 0.0, 0.6], [0, 1, 2, 0, 1], [1, 1], None, [2, 1, 2, 0, 1]),  # or the one after it
        ([0.45, 0.0, 0.0], [0, 1, 2, 0, 1], [1, 1], None, [0, 1, 0, 0, 1]),  # the third; labels go round
        ([0.99, 0.0, 0.6], [0, 1, 2, 0, 1], [1, 1], None, [0, 1, 2, 0, 0]),  # the last
        ([0.0, 0.0, 0.0], [0, 0, 2, 0, 1], [1, 1], None, [1, 1, 2, 0, 1]),  # a flip of the group gives way
        ([0.0, 0.0, 0.0], [0, 0, 2, 0, 1], [2, 1], None, [1, 0, 2, 0, 1]),  # there is budget for both
        ([0.0, 0.0, 0.0], [0, 0, 1, 0, 1], [2, 1], None, [1, 1, 1, 0, 1]),  # of two flips the first gives way
        ([0.0, 0.6, 0.0], [0, 0, 1, 0, 1], [2, 1], None, [1, 0, 2, 0, 1]),  # or the second
        ([0.0, 0.0, 0.0], [1, 1, 2, 0, 1], [1, 1], None, [2, 1, 2, 0, 1]),  # its own flip is no other's
        ([0.0, 0.0, 0.6], [1, 1, 2, 0, 1], [1, 1], None, [0, 1, 2, 0, 1]),  # and may be taken back
        ([0.99, 0.0, 0.0], [1, 1, 2, 0, 1], [1, 1], None, [1, 1, 2, 0, 2]),  # a flip of another group stays
        ([0.0, 0.0, 0.0], [0, 1, 2, 0, 1], [0, 1], None, [0, 1, 2, 0, 1]),  # without any budget nothing moves
        ([0.0, 0.0, 0.0], [0, 1, 2, 0, 1], [1, 1], [False, False, True, True, False], [0, 1, 0, 0, 1]),  # its own
        ([0.6, 0.0, 0.0], [0, 1, 2, 0, 1], [1, 1], [False, False, True, True, False], [0, 1, 2, 1, 1]),
        ([0.6, 0.0, 0.0], [0, 1, 2, 0, 1], [1, 1], [False] * 5, [0, 1, 2, 0, 1]),  # there is nothing to write
    ],
)
def test_a_plan_that_is_stuck_has_one_label_moved_within_its_budget(
    uniform: list[float], old: list[int], budget: list[int], mask: list[bool] | None, new: list[int]
) -> None:
    assert moved(uniform, old, budget=budget, mask=mask) == new


def test_a_sweep_chooses_more_rounds_after_one_that_was_kept_and_half_after_one_that_was_not() -> None:
    of = problem(0, 4, rounds=8, average=True)
    tolerance = 1e-4
    improved = planned(of, 0, sweeps=60, tolerance=tolerance)
    harm, part = np.array(improved.harm), np.array(improved.part)
    assert improved.over.all() and (part[0] == 1).all() and harm.shape == part.shape
    kept = np.diff(harm, axis=0) > 0
    for p in range(4):
        share, ended = 1.0, 0
        for k in range(1, len(harm)):
            if ended:
                assert part[k, p] == 0 and harm[k, p] == harm[ended, p]
                continue
            assert part[k, p] == math.ceil(share * 8) / 8
            share = min(1, share * 1.5) if kept[k - 1, p] else max(1 / 8, share / 2)
            if k >= 8 and harm[k, p] - harm[k - 8, p] < tolerance:
                ended = k
        assert ended >= 8
    assert {0.125, 0.25, 0.5, 1.0} <= set(part.ravel())
    assert PATIENCE == 8


def test_a_sweep_tells_of_itself_and_a_plan_without_a_finite_harm_has_ended() -> None:
    of = problem(0, 2)
    seen: list[int] = []
    improved = Sweeps(of, uniform(0, of), 0.0)
    improved.start_from(lambda theta, batch: batch.X.mean(0).expand(theta.shape))
    result = improved.run(3, lambda: seen.append(len(improved.harm)))
    assert seen == [2, 3, 4]
    assert result.harm.shape == result.part.shape == (4, 2) and result.labels is improved.labels
    far = from_theta(of, torch.tensor([[[1.0] * FEATURES], [[math.nan] * FEATURES]], dtype=torch.float64))
    broken = Sweeps(far, uniform(0, far), 0.0)
    broken.start_from(lambda theta, batch: batch.X.mean(0).expand(theta.shape))
    assert broken.over.tolist() == [False, True]


@pytest.mark.parametrize(
    ("optimizer", "memory", "segment"),
    [
        ("sgd", 9 * 64, 9), ("sgd", 9 * 64 - 1, 3), ("momentum", 18 * 64, 9), ("momentum", 18 * 64 - 1, 3),
        ("adam", 27 * 64, 9), ("adam", 27 * 64 - 1, 3),
    ],
)  # fmt: skip
def test_states_of_all_rounds_are_kept_where_they_fit(
    optimizer: protocol.Optimizer, memory: float, segment: int
) -> None:
    of = problem(0, 2, rounds=9, optimizer=optimizer, memory=memory)
    assert of.start.theta.nbytes == 64 and of.plans == 2
    assert Trajectory(of).segment == segment


def test_labels_are_written_within_each_plans_own_budget_in_few_bits() -> None:
    scores = torch.tensor([[0.0, 1, 2], [0, 3, 1], [5, 0, 0]]).expand(2, -1, -1)
    y, group = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    budgets = torch.tensor([[1, 1], [2, 0]])
    found = chosen_labels(scores, y, WriteAccess(torch.arange(3), group, None, budgets))
    assert found.dtype == torch.uint8 and found.tolist() == [[0, 1, 0], [2, 1, 1]]
    mask = torch.tensor([[True, False, False], [False, True, True]])
    found = chosen_labels(scores, y, WriteAccess(torch.arange(3), group, mask, budgets))
    assert found.tolist() == [[2, 0, 1], [0, 1, 1]]
    literal = chosen_labels(
        scores, y, WriteAccess(torch.arange(3), torch.zeros(3, dtype=torch.int64), None, budgets[:1, :1]), "literal"
    )
    assert literal.tolist() == [[0, 0, 0]] * 2  # the largest score of all is taken
    for classes, dtype in ((256, torch.uint8), (257, torch.int16)):
        many = torch.eye(classes)[None, -1:]
        found = chosen_labels(many, y[:1], WriteAccess(torch.arange(1), group[:1], None, budgets[:1]))
        assert found.dtype == dtype and found.tolist() == [[classes - 1]]


def test_a_coordinate_that_has_never_moved_pulls_nothing_back_through_adam() -> None:
    zero, one = torch.zeros(1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    gradient = torch.tensor([[[0.0, 2.0]]], dtype=torch.float64)
    state = protocol.ServerState(0, zero, zero)
    before, by_gradient = pull_back_step("adam", gradient, 0.1, state, Costate(one, zero, zero))
    assert by_gradient.isfinite().all() and before.second.isfinite().all()
    assert before.second[0, 0, 0] == 0 and before.second[0, 0, 1] > 0
    assert before.theta is not zero and torch.equal(before.theta, one)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_derivatives_of_a_network_are_the_same_in_pieces_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("mlp", {"widths": [3]}, "cross_entropy", (FEATURES,), 3, 0)
    general = derivatives_of(model)
    assert isinstance(general, General)
    rng = torch.Generator().manual_seed(0)
    X, R = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((7, FEATURES), (2, 7, 3)))
    theta = model.start() + torch.randn(2, *model.shape, dtype=torch.float64, generator=rng)
    whole = general.pull_back(theta, X, R), general.logits(theta, X)
    monkeypatch.setattr(model, "rows_at_once", 3)
    for found, expected in zip((general.pull_back(theta, X, R), general.logits(theta, X)), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert whole[0].shape == theta.shape and not torch.allclose(whole[0][0], whole[0][1])


@pytest.mark.parametrize("sweeps", [1, 7])
def test_what_is_wanted_next_is_greedy_along_the_costates_of_the_best_labels(sweeps: int) -> None:
    of = problem(9, 4, rounds=5, average=True)
    improved = planned(of, 9, sweeps=sweeps)
    assert (improved.harm[-1] > improved.harm[0]).any()
    trajectory = Trajectory(of)
    np.testing.assert_allclose(trajectory.run(improved.labels).numpy(), improved.harm[-1], rtol=1e-12)
    for wanted, best in zip(improved.wanted, trajectory.best_labels(), strict=True):
        assert wanted is not None and best is not None
        assert torch.equal(wanted, best)


@pytest.mark.parametrize("rounds", [1, 8])
def test_a_label_is_moved_where_a_single_round_of_several_is_left(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of, moves = problem(0, 4, rounds=rounds, average=True), []
    monkeypatch.setattr(Sweeps, "_move_one", lambda self, trial, p, t, numbers: moves.append((len(self.harm), p)))
    part = np.array(planned(of, 0, sweeps=20).part)
    left = [(k, p) for k, p in np.argwhere(part == 1 / 8).tolist()]
    assert moves == (left if rounds > 1 else [])
    assert bool(left) == (rounds > 1)
