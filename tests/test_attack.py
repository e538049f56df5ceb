"""The attack is optimal: against every label set within the budget, and in the gradient that it promises."""

import itertools
import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_attack import attack
from fl_attack.attack import ATTACKS, Proposal, View
from fl_attack.errors import InputError
from fl_attack.models import logistic

N, D = 6, 4
SIZES = st.sampled_from([2, 3])
SEEDS = st.integers(0, 10_000)


def world(classes: int, seed: int, ties: bool = False, n: int = N) -> tuple[torch.Tensor, ...]:
    """theta, v, X, y of a small problem; with ties, small integers and repeated samples."""
    rng = torch.Generator().manual_seed(seed)
    C = logistic.output_count(classes)
    theta, v = torch.randn(2, C, D, dtype=torch.float64, generator=rng)
    X = torch.randn(n, D, dtype=torch.float64, generator=rng)
    if ties:
        v, X = v.round(), X.round()
        X[1::2] = X[::2]
    return theta, v, X, torch.randint(classes, (n,), generator=rng)


def view_of(y: torch.Tensor, scores: torch.Tensor, w: torch.Tensor | None = None, **how: Any) -> View:
    noise = torch.rand(len(y), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return View(
        y, torch.ones(len(y)) if w is None else w, **({"scores": scores, "logits": scores, "noise": noise} | how)
    )


def inner(theta: torch.Tensor, v: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> float:
    return (logistic.gradient(theta, X, y) * v).sum().item()


def flipped(
    v: torch.Tensor, X: torch.Tensor, y: torch.Tensor, group: torch.Tensor, budgets: torch.Tensor, selection: str
) -> torch.Tensor:
    proposal = ATTACKS["greedy"].function(view_of(y, logistic.scores(v, X), selection=selection))
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
    return (logistic.gradient(theta, X, allowed) * v).sum((-1, -2)).min().item()


@given(SIZES, SEEDS, st.booleans(), st.integers(0, N), st.booleans(), st.sampled_from(["untargeted", "targeted"]))
def test_greedy_is_the_optimum_over_all_label_sets(
    classes: int, seed: int, ties: bool, budget: int, per_client: bool, goal: str
) -> None:
    theta, target, X, y = world(classes, seed, ties)
    clean = logistic.gradient(theta, X, y)
    v = clean if goal == "untargeted" else target - theta
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
    C = logistic.output_count(classes)
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
    proposal = ATTACKS["greedy"].function(view_of(torch.tensor([0, 0]), scores, torch.tensor([1, 2])))
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


@given(st.fractions(0, 1), st.integers(0, 50))
def test_a_budget_that_rounds_up_is_the_least_whole_number_that_holds_it(budget: Fraction, now: int) -> None:
    allowed = attack.flip_allowance(budget, 7, now, "ceil")
    assert 0 <= budget * now <= allowed < budget * now + 1
    assert allowed <= now
    assert (allowed >= 1) == (budget > 0 and now > 0)


def test_a_budget_is_counted_as_it_was_typed() -> None:
    assert 0.29 * 100 < 29  # what floating point would have counted
    assert attack.flip_allowance(Fraction("0.29"), 0, 100, "floor") == 29


def test_rounds_are_attacked_from_start_to_stop_every_so_many() -> None:
    attacked = [attack.attacked_before(r, every=3, start=2, stop=8) for r in range(1, 12)]
    assert attacked == [None, 0, None, None, 1, None, None, 2, None, None, None]


LABELS = [name for name, row in ATTACKS.items() if row.writes == "labels"]
UPDATES = [name for name, row in ATTACKS.items() if row.writes == "updates"]


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("classes", [2, 3])
def test_every_attack_on_labels_proposes_labels_and_leaves_its_view_alone(name: str, classes: int) -> None:
    theta, v, X, y = world(classes, seed=1)
    Z = logistic.logits(theta, X)
    logits = torch.cat([torch.zeros_like(Z), Z], -1) if classes == 2 else Z
    view = view_of(y, logistic.scores(v, X), logits=logits)
    parts = view.y, view.w, view.scores, view.logits, view.noise
    before = [part.clone() for part in parts]
    proposal = ATTACKS[name].function(view)
    assert isinstance(proposal, Proposal)
    assert proposal.labels.shape == proposal.priority.shape == y.shape
    assert ((proposal.labels >= 0) & (proposal.labels < classes)).all()
    assert ((proposal.labels != y) | (proposal.priority == -math.inf)).all()  # nothing is spent on no change
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))


def test_random_flips_reach_every_other_label_and_no_sample_is_favoured() -> None:
    y = torch.arange(4000) % 4
    rng = torch.Generator().manual_seed(0)
    proposal = ATTACKS["random_flip"].function(
        view_of(y, torch.zeros(4000, 4), noise=torch.rand(4000, 2, generator=rng))
    )
    counts = torch.bincount(y * 4 + proposal.labels, minlength=16).view(4, 4)
    assert (counts.diagonal() == 0).all()
    assert (counts[~torch.eye(4, dtype=torch.bool)] > 280).all()  # 333 each, 4 standard deviations are 60
    assert proposal.priority.argsort(descending=True)[:2000].float().mean() == pytest.approx(2000, abs=90)


def test_static_flips_follow_their_map() -> None:
    y = torch.tensor([0, 1, 2, 1])
    static = ATTACKS["static_flip"].function
    view = view_of(y, torch.zeros(4, 3))
    assert static(view).labels.tolist() == [2, 1, 0, 1]
    assert static(view).priority.isinf().tolist() == [False, True, False, True]  # the middle class stays
    assert static(view, map="cyclic").labels.tolist() == [1, 2, 0, 2]
    assert static(view, source=1, target=0).labels.tolist() == [0, 0, 2, 0]
    assert static(view, source=1, target=0).priority.isinf().tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"source": 1}, "source and target go together"),
        ({"source": 1, "target": 3}, "two different labels from 0 to 2"),
        ({"source": 1, "target": 1}, "two different labels"),
        ({"map": "odd"}, "map=odd is not known; use opposite or cyclic"),
    ],
)
def test_a_map_that_is_none_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS["static_flip"].function(view_of(torch.tensor([0, 1]), torch.zeros(2, 3)), **args)


def test_confidence_flips_rank_by_the_margin_of_the_true_label() -> None:
    logits = torch.tensor([[5.0, 1, 0], [0, 2, 1], [9, 8, 9.5]])
    view = view_of(torch.tensor([0, 1, 2]), torch.zeros(3, 3), logits=logits)
    confidence = ATTACKS["confidence_flip"].function
    assert confidence(view).labels.tolist() == [1, 2, 0]
    assert confidence(view).priority.tolist() == [4.0, 1.0, 0.5]
    assert confidence(view, certain="least").priority.tolist() == [-4.0, -1.0, -0.5]

    with pytest.raises(ValueError, match="certain=maybe is not known; use most or least"):
        confidence(view, certain="maybe")


def updates_of(seed: int, cells: int = 3, m: int = 7, f: int = 2) -> attack.Updates:
    rng = torch.Generator().manual_seed(seed)
    malicious = torch.stack([torch.randperm(m, generator=rng) < f for _ in range(cells)])
    u, v, noise = (
        torch.randn(*shape, 2, 3, dtype=torch.float64, generator=rng) for shape in ((cells, m), (cells,), (m,))
    )
    return attack.Updates(u, malicious, direction=lambda: v, noise=lambda: noise)


def test_a_copied_view_has_memory_of_its_own() -> None:
    view = updates_of(1)
    copied = view.copied()
    for name in ("updates", "malicious", "direction", "noise"):
        before = getattr(view, name).clone()
        assert torch.equal(getattr(copied, name), before)
        getattr(copied, name).zero_()
        assert torch.equal(getattr(view, name), before), name


@pytest.mark.parametrize("name", UPDATES)
def test_attacks_on_gradients_do_not_mix_cells_and_leave_their_view_alone(name: str) -> None:
    view = updates_of(0)
    before = view.updates.clone()
    sent = ATTACKS[name].function(view).expand(view.updates.shape)
    assert sent.isfinite().all()
    assert not torch.equal(sent, before)
    for i in range(3):
        alone = attack.Updates(
            before[i], view.malicious[i], direction=lambda i=i: view.direction[i], noise=lambda: view.noise
        )
        torch.testing.assert_close(ATTACKS[name].function(alone).expand(before[i].shape), sent[i])
    assert torch.equal(view.updates, before)


@pytest.mark.parametrize("name", ["ipm", "alie", "mimic", "minmax", "minsum"])
def test_attacks_that_imitate_look_at_honest_clients_only(name: str) -> None:
    view = updates_of(1)
    others = view.updates.clone()
    others[view.malicious] = 1e6
    changed = attack.Updates(others, view.malicious, direction=lambda: view.direction, noise=lambda: view.noise)
    torch.testing.assert_close(ATTACKS[name].function(changed), ATTACKS[name].function(view))


def test_attacks_on_gradients_follow_the_formulas_of_their_papers() -> None:
    view = updates_of(2, cells=1, m=10, f=3)
    u, malicious = view.updates[0].numpy(), view.malicious[0].numpy()
    honest = u[~malicious]
    crafted = {name: ATTACKS[name].function(view).expand(view.updates.shape)[0].numpy() for name in UPDATES}
    np.testing.assert_allclose(crafted["sign_flip"], -u)
    np.testing.assert_allclose(crafted["ipm"][0], -honest.mean(0))
    # 6 of 10 are a majority, 3 supporters are needed: 4 of 7 honest ones stay away
    z = statistics.NormalDist().inv_cdf((10 - 3 - 3) / (10 - 3))
    np.testing.assert_allclose(crafted["alie"][0], honest.mean(0) - z * honest.std(0))
    np.testing.assert_allclose(ATTACKS["alie"].function(view, z=1.5)[0, 0], honest.mean(0) - 1.5 * honest.std(0))
    np.testing.assert_allclose(crafted["mimic"][0], honest[0])
    np.testing.assert_allclose(ATTACKS["gaussian"].function(view), 200 * view.noise.numpy())
    v = view.direction[0].numpy()
    inner_products = (crafted["gradient_max"] * v).sum((1, 2))
    norms = np.sqrt((u**2).sum((1, 2)))
    np.testing.assert_allclose(np.sqrt((crafted["gradient_max"] ** 2).sum((1, 2))), norms)
    np.testing.assert_allclose(
        inner_products, -norms * np.sqrt((v**2).sum())
    )  # Cauchy and Schwarz: no less is possible


@pytest.mark.parametrize("name", ["minmax", "minsum"])
@pytest.mark.parametrize("perturbation", ["std", "unit", "sign"])
def test_the_push_is_the_largest_within_the_bound_of_the_paper(name: str, perturbation: str) -> None:
    view = updates_of(4, cells=5, m=9, f=3)
    sent = ATTACKS[name].function(view, perturbation=perturbation)
    for u, malicious, crafted in zip(view.updates, view.malicious, sent, strict=True):
        honest = u[~malicious].flatten(1)
        mean = honest.mean(0)
        push = {"std": -honest.std(0, correction=0), "unit": -mean / mean.norm(), "sign": -mean.sign()}[perturbation]
        gamma = float(((crafted.flatten() - mean) / push).mean())
        torch.testing.assert_close(crafted.flatten(), mean + gamma * push)
        apart = torch.cdist(honest, honest)

        def excess(gamma: float, name=name, honest=honest, mean=mean, push=push, apart=apart) -> float:
            away = (mean + gamma * push - honest).norm(dim=1)
            if name == "minmax":
                return float(away.max() - apart.max())
            return float((away**2).sum() - (apart**2).sum(1).max())

        assert gamma > 0.1 and excess(gamma * (1 - 1e-6)) <= 0 < excess(gamma * (1 + 1e-6))


def test_attackers_of_one_honest_client_send_its_update() -> None:
    view = updates_of(0, cells=2, m=4, f=3)
    for name in ("minmax", "minsum"):
        torch.testing.assert_close(ATTACKS[name].function(view)[:, 0], view.mean[:, 0])


def test_without_honest_clients_attackers_imitate_each_other() -> None:
    view = updates_of(3)
    alone = attack.Updates(
        view.updates, torch.ones_like(view.malicious), direction=lambda: view.direction, noise=lambda: view.noise
    )
    for name in UPDATES:
        assert ATTACKS[name].function(alone).isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gready", "name=gready is not an attack; known: none, greedy, random_flip.*or the import path of a function"),
        ("there.is.none", "there.is.none can't be imported: ModuleNotFoundError"),
        ("math:no_such", "there is no function no_such in math"),
        ("a b:1", "a b:1 is not an import path; use module.function or path/to/file.py:function"),
    ],
)
def test_unknown_attacks_are_told_with_what_is_known(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack.find(name)


def test_the_target_is_the_fully_flipped_data() -> None:
    assert attack.flipped_target(torch.tensor([0, 1]), 2).tolist() == [1, 0]
    assert attack.flipped_target(torch.tensor([0, 5, 9]), 10).tolist() == [1, 6, 0]
