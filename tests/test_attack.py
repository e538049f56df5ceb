"""The attack is optimal: against every label set within the budget, and in the gradient that it promises."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_attack import attack, model
from fl_attack.attack import ATTACKS, Proposal, View

N, D = 6, 4
SIZES = st.sampled_from([2, 3])
SEEDS = st.integers(0, 10_000)


def world(classes: int, seed: int, ties: bool = False, n: int = N) -> tuple[torch.Tensor, ...]:
    """theta, v, X, y of a small problem; with ties, small integers and repeated samples."""
    rng = torch.Generator().manual_seed(seed)
    C = model.output_count(classes)
    theta, v = torch.randn(2, C, D, dtype=torch.float64, generator=rng)
    X = torch.randn(n, D, dtype=torch.float64, generator=rng)
    if ties:
        v, X = v.round(), X.round()
        X[1::2] = X[::2]
    return theta, v, X, torch.randint(classes, (n,), generator=rng)


def inner(theta: torch.Tensor, v: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> float:
    return (model.gradient(theta, X, y) * v).sum().item()


def flipped(
    v: torch.Tensor, X: torch.Tensor, y: torch.Tensor, group: torch.Tensor, budgets: torch.Tensor, selection: str
) -> torch.Tensor:
    view = View(y, model.scores(v, X), torch.ones(len(y)), selection)  # type: ignore[arg-type]
    proposal = ATTACKS["greedy"](view)
    chosen = attack.select(proposal.priority, group, budgets)
    return torch.where(chosen, proposal.labels, y)


def best_of_all(
    theta: torch.Tensor,
    v: torch.Tensor,
    X: torch.Tensor,
    y: torch.Tensor,
    group: torch.Tensor,
    budgets: torch.Tensor,
    classes: int,
) -> float:
    """The smallest inner product over every label set whose changes stay within each group's budget."""
    candidates = torch.tensor(list(itertools.product(range(classes), repeat=len(y))))
    changed = candidates != y
    spent = torch.stack([(changed & (group == g)).sum(-1) for g in range(len(budgets))], -1)
    allowed = candidates[(spent <= budgets).all(-1)]
    return (model.gradient(theta, X, allowed) * v).sum((-1, -2)).min().item()


@given(SIZES, SEEDS, st.booleans(), st.integers(0, N), st.booleans(), st.sampled_from(["untargeted", "targeted"]))
def test_greedy_is_the_optimum_over_all_label_sets(
    classes: int, seed: int, ties: bool, budget: int, per_client: bool, goal: str
) -> None:
    theta, target, X, y = world(classes, seed, ties)
    clean = model.gradient(theta, X, y)
    v = attack.direction(goal, theta, clean, target)  # type: ignore[arg-type]
    group = torch.arange(N) % 2 if per_client else torch.zeros(N, dtype=torch.int64)
    budgets = torch.tensor([budget // 2, budget - budget // 2] if per_client else [budget])
    labels = flipped(v, X, y, group, budgets, "gain")
    assert (torch.bincount(group[labels != y], minlength=len(budgets)) <= budgets).all()
    best = best_of_all(theta, v, X, y, group, budgets, classes)
    assert inner(theta, v, X, labels) == pytest.approx(best, abs=1e-12)


@given(SIZES, SEEDS, st.integers(0, N))
def test_flips_lower_the_inner_product_by_what_their_deltas_promise(classes: int, seed: int, budget: int) -> None:
    theta, v, X, y = world(classes, seed)
    group = torch.zeros(N, dtype=torch.int64)
    labels = flipped(v, X, y, group, torch.tensor([budget]), "gain")
    S = X @ v.T
    if classes == 2:
        deltas = (2 * y - 1) * S[:, 0] / N
        promised = deltas[labels != y].sum()
    else:
        rows = torch.arange(N)
        promised = ((S[rows, y] - S[rows, labels]) / N).sum()
    gained = inner(theta, v, X, labels) - inner(theta, v, X, y)
    assert gained == pytest.approx(promised.item(), abs=1e-12)
    assert gained <= 0


@given(SIZES, SEEDS, st.integers(0, N))
def test_the_printed_algorithm_never_beats_the_exact_one(classes: int, seed: int, budget: int) -> None:
    theta, v, X, y = world(classes, seed)
    group, budgets = torch.zeros(N, dtype=torch.int64), torch.tensor([budget])
    exact = inner(theta, v, X, flipped(v, X, y, group, budgets, "gain"))
    printed = inner(theta, v, X, flipped(v, X, y, group, budgets, "literal"))
    assert exact <= printed + 1e-12


@pytest.mark.parametrize("classes", [2, 3])
def test_the_printed_algorithm_wastes_budget_on_labels_that_are_harmful_already(classes: int) -> None:
    C = model.output_count(classes)
    v = torch.zeros(C, 1, dtype=torch.float64)
    v[-1] = 1.0  # the last label lowers the inner product by the feature
    X, last = torch.tensor([[2.0], [1.0]], dtype=torch.float64), classes - 1
    y = torch.tensor([last, 0])  # the first sample has the larger score and the harmful label already
    theta, group, one = torch.zeros_like(v), torch.zeros(2, dtype=torch.int64), torch.tensor([1])
    assert flipped(v, X, y, group, one, "gain").tolist() == [last, last]
    assert flipped(v, X, y, group, one, "literal").tolist() == [last, 0]
    exact, printed = (inner(theta, v, X, flipped(v, X, y, group, one, s)) for s in ("gain", "literal"))
    assert exact < printed


def test_the_printed_binary_algorithm_takes_the_smallest_scores_whatever_their_sign() -> None:
    v, X = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[-1.0], [-2.0], [3.0]], dtype=torch.float64)
    y = torch.tensor([1, 1, 0])
    group = torch.zeros(3, dtype=torch.int64)
    assert flipped(v, X, y, group, torch.tensor([2]), "literal").tolist() == [0, 1, 1]


def test_ties_go_to_the_lower_index() -> None:
    v, X, y = torch.ones(1, 1), torch.ones(5, 1), torch.zeros(5, dtype=torch.int64)
    labels = flipped(v, X, y, torch.zeros(5, dtype=torch.int64), torch.tensor([2]), "gain")
    assert labels.tolist() == [1, 1, 0, 0, 0]


def test_a_sample_used_twice_counts_twice() -> None:
    scores = torch.tensor([[0.0, 3.0], [0.0, 2.0]])
    proposal = attack.greedy(View(torch.tensor([0, 0]), scores, torch.tensor([1, 2]), "gain"))
    assert proposal.priority.tolist() == [3.0, 4.0]


@given(SEEDS, st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_selection_takes_the_largest_of_each_group_and_leading_axes_do_not_mix(
    seed: int, cells: int, budgets: list[int]
) -> None:
    rng = torch.Generator().manual_seed(seed)
    priority = torch.randint(0, 4, (cells, 9), generator=rng).double()
    priority[torch.rand(cells, 9, generator=rng) < 0.3] = -math.inf
    group = torch.randint(len(budgets), (9,), generator=rng)
    together = attack.select(priority, group, torch.tensor(budgets))
    for row, chosen in zip(priority.tolist(), together.tolist(), strict=True):
        expected = set()
        for g, budget in enumerate(budgets):
            members = [i for i in range(9) if group[i] == g and row[i] > -math.inf]
            expected |= set(sorted(members, key=lambda i: (-row[i], i))[:budget])
        assert {i for i, taken in enumerate(chosen) if taken} == expected


@given(st.fractions(0, 1), st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_carried_budgets_add_up_to_the_whole_and_never_exceed_it(budget: Fraction, writable: list[int]) -> None:
    spent = 0
    for i, now in enumerate(writable):
        before = sum(writable[:i])
        allowed = attack.flip_allowance(budget, before, now, "carry")
        assert 0 <= allowed <= now
        spent += allowed
        assert spent == math.floor(budget * (before + now))


def test_a_budget_is_counted_as_it_was_typed() -> None:
    assert 0.29 * 100 < 29  # what floating point would have counted
    assert attack.flip_allowance(Fraction("0.29"), 0, 100, "floor") == 29


def test_rounds_are_attacked_from_start_to_stop_every_so_many() -> None:
    attacked = [attack.attacked_before(r, every=3, start=2, stop=8) for r in range(1, 12)]
    assert attacked == [None, 0, None, None, 1, None, None, 2, None, None, None]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("classes", [2, 3])
def test_every_attack_proposes_labels_and_leaves_its_view_alone(name: str, classes: int) -> None:
    _, v, X, y = world(classes, seed=1)
    view = View(y, model.scores(v, X), torch.ones(N), "gain")
    before = [part.clone() for part in view[:3]]  # type: ignore[union-attr]
    proposal = ATTACKS[name](view)
    assert isinstance(proposal, Proposal)
    assert proposal.labels.shape == proposal.priority.shape == y.shape
    assert ((proposal.labels >= 0) & (proposal.labels < classes)).all()
    assert all(torch.equal(a, b) for a, b in zip(before, view[:3], strict=True))  # type: ignore[arg-type]


def test_the_target_is_the_fully_flipped_data() -> None:
    assert attack.flipped_target(torch.tensor([0, 1]), 2).tolist() == [1, 0]
    assert attack.flipped_target(torch.tensor([0, 5, 9]), 10).tolist() == [1, 6, 0]
