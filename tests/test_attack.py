"""The attack is optimal: against every label set within the budget, and in the gradient that it promises."""

import inspect
import itertools
import math
import re
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_attack import attack, models, plugins
from fl_attack.attack import ATTACKS, Proposal, View, labels
from fl_attack.errors import InputError, RunError
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


@pytest.mark.parametrize(("m", "f", "supporters"), [(10, 4, 2), (10, 5, 1), (10, 7, 1), (9, 3, 2), (9, 4, 1)])
def test_alie_goes_as_far_as_its_supporters_are_honest_clients_farther_out(m: int, f: int, supporters: int) -> None:
    view = updates_of(3, cells=1, m=m, f=f)
    z = max(0.0, statistics.NormalDist().inv_cdf((m - f - supporters) / (m - f))) if m - f > supporters else 0.0
    honest = view.updates[0][~view.malicious[0]]
    wanted = honest.mean(0) - z * honest.std(0, correction=0)
    torch.testing.assert_close(ATTACKS["alie"].function(view).expand_as(view.updates)[0, 0], wanted)


def test_noise_has_the_precision_of_the_updates() -> None:
    view = updates_of(2)
    single = attack.Updates(
        view.updates.float(), view.malicious, direction=lambda: view.direction, noise=lambda: view.noise
    )
    sent = ATTACKS["gaussian"].function(single, sigma=3.0)
    assert sent.dtype == torch.float32
    torch.testing.assert_close(sent, 3 * view.noise.float())


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


def test_what_a_view_holds_is_worked_out_once_and_a_copy_has_each_part_in_its_place() -> None:
    asked: list[str] = []

    def lazy(name: str, value: float) -> Callable[[], torch.Tensor]:
        return lambda: asked.append(name) or torch.full((2, 3), value)  # type: ignore[func-returns-value]

    parts = {"scores": 1.0, "logits": 2.0, "noise": 3.0}
    how = {name: lazy(name, value) for name, value in parts.items()}
    view = View(torch.tensor([0, 1]), torch.ones(2), selection="literal", **how)
    copied = view.copied()
    assert asked == [] and copied.selection == "literal"
    for name, value in parts.items():
        assert getattr(copied, name).tolist() == getattr(view, name).tolist() == [[value] * 3] * 2
        getattr(copied, name).zero_()
        assert (getattr(view, name) == value).all()
    assert asked == ["scores", "logits", "noise"]
    copied.y.zero_()
    copied.w.zero_()
    assert view.y.tolist() == [0, 1] and view.w.tolist() == [1, 1]


def test_random_flips_step_over_the_true_label_by_their_second_number() -> None:
    noise = torch.tensor([[0.1, 0.0], [0.2, 0.33], [0.3, 0.34], [0.4, 0.67], [0.5, 0.999], [0.6, 1.0]])
    proposal = ATTACKS["random_flip"].function(view_of(torch.full((6,), 2), torch.zeros(6, 4), noise=noise))
    assert proposal.labels.tolist() == [3, 3, 0, 1, 1, 1]
    assert proposal.priority.tolist() == noise[:, 0].tolist()
    two = ATTACKS["random_flip"].function(view_of(torch.tensor([0, 1, 0, 1, 0, 1]), torch.zeros(6, 2), noise=noise))
    assert two.labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_the_arguments_of_planned_flips_have_one_default_and_their_bounds() -> None:
    function = ATTACKS["planned"].function
    defaults = {one.name: one.default for one in inspect.signature(function).parameters.values()}
    del defaults["view"]
    assert labels.PlannedOptions()._asdict() == defaults
    view = view_of(torch.tensor([0]), torch.zeros(1, 2))
    for name in ("sweeps", "starts", "sample"):
        assert function(view, **{name: 1}).labels.tolist() == [0]
        with pytest.raises(ValueError, match=f"^{name}=0 is not allowed; it must be 1 or more$"):
            function(view, **{name: 0})
    assert attack.planned_options({"tolerance": 0}).tolerance == 0
    assert attack.planned_options({"tolerance": 1.5, "temperature": 1.5}).temperature == 1.5
    for wrong in (-1e-9, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^tolerance=.* it must be 0 or more$"):
            function(view, tolerance=wrong)
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^temperature=.* it must be more than 0$"):
            function(view, temperature=wrong)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("sign_flip", {"scale": "big"}, "args.scale=big is not allowed; it must be a number"),
        ("sign_flip", {"scale": True}, "args.scale=True is not allowed; it must be a number"),
        ("sign_flip", {"scale": None}, "args.scale=None is not allowed; it must be a number"),
        ("alie", {"z": "a"}, "args.z=a is not allowed; it must be a number or null"),
        ("static_flip", {"source": 1.0}, "args.source=1.0 is not allowed; it must be a whole number or null"),
        ("static_flip", {"target": False}, "args.target=False is not allowed; it must be a whole number or null"),
        ("static_flip", {"map": "odd"}, "args.map=odd is not allowed; it must be opposite or cyclic"),
        ("planned", {"sweeps": 2.5}, "args.sweeps=2.5 is not allowed; it must be a whole number"),
        ("minmax", {"perturbation": 1}, "args.perturbation=1 is not allowed; it must be std or unit or sign"),
        ("mimic", {"z": 1}, "args.z is not an argument of name=mimic; it takes none"),
        ("ipm", {"eps": 1}, "args.eps is not an argument of name=ipm; it takes epsilon"),
    ],
)
def test_arguments_of_another_kind_are_told_what_they_must_be(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        attack.check_args(name, args)


def made(answer: Any) -> Callable[..., Any]:
    """A user's function on labels that gives this."""

    def own(view: View, needed: Any, flag: bool = False, word: str = "", many: list[int] = [1]) -> Any:  # noqa: B006
        return answer

    return own


def test_arguments_of_a_users_function_are_checked_as_far_as_they_are_annotated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: made(None))
    attack.check_args("mine.py:own", {"needed": 1, "flag": True, "word": "a", "many": [2]})
    for args, said in {
        "args.needed is missing; name=mine.py:own has no default for it": {"flag": True},
        "args.flag=1 is not allowed; it must be true or false": {"needed": None, "flag": 1},
        "args.word=2 is not allowed; it must be a text": {"needed": "x", "word": 2},
    }.items():
        with pytest.raises(InputError, match=f"^{re.escape(args)}$"):
            attack.check_args("mine.py:own", said)
    assert attack.find("mine.py:own").writes == "labels"
    assert attack.find("mine.py:own").uses == attack.find("greedy").uses


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        (
            "gaussian",
            {"sigma": -1.0},
            "attack.args of attack=gaussian: sigma=-1.0 is not allowed; it must be 0 or more",
        ),
        ("gaussian", {"sigma": math.inf}, "attack.args of attack=gaussian: sigma=inf is not allowed"),
        ("static_flip", {"source": 3, "target": 0}, "source=3 target=0 must be two different labels from 0 to 2"),
        ("planned", {"starts": 0}, "attack.args of attack=planned: starts=0 is not allowed"),
        ("minsum", {"perturbation": "odd"}, "perturbation=odd is not known; use std, unit or sign"),
    ],
)
def test_a_value_that_an_attack_refuses_is_told_before_any_round(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        attack.try_args(name, args, 3)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("classes", [2, 5])
def test_an_attack_with_its_defaults_is_tried_without_a_complaint(name: str, classes: int) -> None:
    attack.try_args(name, {}, classes)
    attack.try_args("static_flip", {"source": 0, "target": classes - 1}, classes)
    attack.try_args("gaussian", {"sigma": 0}, classes)
    attack.try_args("mine.py:own", {"a": 1}, classes)  # is not called


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((torch.ones(2), torch.ones(2)), "gave labels of shape (2,), float32; wanted: whole numbers, as in int64"),
        ((torch.ones(2).bool(), torch.ones(2)), "gave labels of shape (2,), bool; wanted: whole numbers, as in int64"),
        ((torch.ones(2) * 1j, torch.ones(2)), "gave labels of shape (2,), complex64; wanted: whole numbers"),
        ((torch.tensor([0, 3]), torch.ones(2)), "gave the label 3; wanted: 0 to 2"),
        ((torch.tensor([0, -1]), torch.ones(2)), "gave the label -1; wanted: 0 to 2"),
        ((torch.tensor([0, 1]), torch.ones(2) * 1j), "gave a priority of shape (2,), complex64; wanted: real numbers"),
        (
            (torch.tensor([0, 1]), torch.tensor([0, math.nan])),
            "gave a priority of NaN; wanted: real numbers, -inf where",
        ),
        ((torch.tensor([0]), torch.ones(2)), "gave labels of shape (1,), int64; wanted: one for each of 2 samples"),
        ((torch.tensor([0, 1]), torch.ones(3, 2)), "gave priority of shape (3, 2), float32; wanted: one for each of 2"),
        ((torch.tensor([0, 1]),), "gave tuple; wanted: Proposal(labels, priority), two tensors"),
        ([torch.tensor([0, 1])] * 2 and (torch.tensor([0, 1]), 1.0), "gave tuple; wanted: Proposal(labels, priority)"),
        (torch.ones(2, 2), "gave shape (2, 2), float32; wanted: Proposal(labels, priority), two tensors"),
    ],
)
def test_a_proposal_that_is_none_is_told_with_what_is_wanted(
    answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: made(answer))
    with pytest.raises(RunError, match=re.escape(said)):
        attack.propose("mine.py:own", view_of(torch.tensor([0, 1]), torch.zeros(2, 3)), {"needed": 1}, (4, 2), 3)


@pytest.mark.parametrize("labels_of", [torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([[2, 0]] * 4)])
def test_a_proposal_may_be_one_for_all_cells_or_each_its_own(
    labels_of: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    priority = torch.tensor([0.0, -math.inf])
    monkeypatch.setattr(plugins, "load", lambda path: made((labels_of, priority)))
    view = view_of(torch.tensor([0, 1]), torch.zeros(2, 3))
    found = attack.propose("mine.py:own", view, {"needed": 1}, (4, 2), 3)
    assert found.labels.dtype == torch.int64 and found.labels.tolist() == labels_of.tolist()
    assert found.priority is priority
    monkeypatch.setattr(plugins, "load", lambda path: made((torch.empty(0, dtype=torch.int32), torch.empty(0))))
    assert attack.propose("mine.py:own", view, {"needed": 1}, (0,), 3).labels.shape == (0,)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.ones(1, 2, 3), "gave shape (1, 2, 3), float32; wanted: an update for each client, shape (3, 7, 2, 3)"),
        (torch.ones(2, 7, 2, 3), "gave shape (2, 7, 2, 3), float32; wanted: an update for each client, shape (3, 7, 2"),
        (torch.ones(7, 3, 2), "gave shape (7, 3, 2), float32; wanted: an update for each client"),
        (
            torch.ones(7, 2, 3) * 1j,
            "gave shape (7, 2, 3), complex64; wanted: real numbers, shape (3, 7, 2, 3), float64",
        ),
        (torch.full((7, 2, 3), math.nan), "gave NaN; wanted: real numbers, shape (3, 7, 2, 3), float64"),
        (None, "gave NoneType; wanted: an update for each client"),
    ],
)
def test_updates_that_are_none_are_told_with_what_is_wanted(
    answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: lambda view: answer)
    with pytest.raises(RunError, match=re.escape(said)):
        attack.craft("mine.py:own", updates_of(0), {})


def test_updates_of_a_users_function_take_the_precision_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = torch.full((7, 2, 3), math.inf)  # a client may send what is not finite
    monkeypatch.setattr(plugins, "load", lambda path: lambda view, factor: sent * factor)
    found = attack.craft("mine.py:own", updates_of(0), {"factor": -1})
    assert found.dtype == torch.float64 and (found == -math.inf).all()


def test_a_direction_of_zero_is_answered_with_zero_and_the_first_honest_client_is_each_cells_own() -> None:
    view = updates_of(5)
    flat = attack.Updates(
        view.updates, view.malicious, direction=lambda: torch.zeros_like(view.direction), noise=lambda: view.noise
    )
    assert (ATTACKS["gradient_max"].function(flat) == 0).all()
    firsts = [int((~row).nonzero()[0]) for row in view.malicious]
    assert len(set(firsts)) > 1
    for cell, first in enumerate(firsts):
        assert torch.equal(ATTACKS["mimic"].function(view)[cell, 0], view.updates[cell, first])


def aim_at(model: models.Model, theta: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> attack.Aim:
    gradient, target = (torch.full_like(theta, value) for value in (2.0, 5.0))
    return attack.Aim(theta, 3, model, gradient=lambda: gradient, target=lambda: target, sample=lambda: (X, y))


@pytest.mark.parametrize("classes", [2, 3])
def test_directions_of_the_sample_are_derivatives_of_what_they_are_named_after(classes: int) -> None:
    model = models.make("logistic", {}, "cross_entropy", (D - 1,), classes, 0)
    rng = torch.Generator().manual_seed(4)
    X = torch.randn(N, D, dtype=torch.float64, generator=rng)
    y = torch.randint(classes, (N,), generator=rng)
    theta = model.start() + 0.3 * torch.randn(model.shape, dtype=torch.float64, generator=rng)
    both = lambda at: model.class_logits(at, X)  # noqa: E731 - of all classes
    one_logit = model.logits(theta, X).shape[-1] == 1
    first = (lambda at: -both(at)[:, 1].mean()) if one_logit else (lambda at: both(at)[:, 0].mean())
    own = torch.arange(N), y
    measured = {
        "mean_feature": lambda at: both(at)[:, -1].mean(),
        "-mean_feature": first,
        "validation_loss": lambda at: -both(at).log_softmax(-1)[own].mean(),
        "smoothed_error": lambda at: 1 - both(at).softmax(-1)[own].mean(),
    }
    for name, value in measured.items():
        found, slow = attack.direction_of(name, aim_at(model, theta, X, y)), torch.zeros_like(theta)
        for place in itertools.product(*map(range, theta.shape)):
            step = torch.zeros_like(theta)
            step[place] = 1e-6
            slow[place] = (value(theta + step) - value(theta - step)) / 2e-6
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-8, msg=name)


def test_directions_to_the_target_and_of_the_gradient() -> None:
    model, theta, none = models.make("logistic", {}, "cross_entropy", (1,), 2, 0), torch.ones(1, 2), torch.zeros(0)
    aim = aim_at(model, theta, none, none)
    for name, value in {"gradient": 2.0, "target": 4.0, "target_far": 5.0}.items():
        assert attack.direction_of(name, aim).tolist() == [[value] * 2]
    # the score of label 1 along (4, 4) is 4 x1 + 4 x2
    assert attack.scores_along("target", aim, torch.tensor([[1.0, 2.0]])).tolist() == [[0.0, 12.0]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.ones(2), "gave shape (2,), float32; wanted: real numbers of shape (1, 2)"),
        (torch.ones(1, 2) * 1j, "gave shape (1, 2), complex64; wanted: real numbers of shape (1, 2)"),
        (torch.tensor([[0, math.inf]]), "gave values that are not finite; wanted: real numbers of shape (1, 2)"),
        ("north", "gave str; wanted: real numbers of shape (1, 2)"),
    ],
)
def test_a_direction_that_is_none_is_told_with_what_is_wanted(
    answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: lambda aim: answer)
    model = models.make("logistic", {}, "cross_entropy", (1,), 2, 0)
    with pytest.raises(RunError, match=re.escape(said)):
        attack.direction_of("mine.py:own", aim_at(model, torch.ones(1, 2), torch.zeros(0), torch.zeros(0)))


def test_a_users_direction_sees_copies_of_all_that_attackers_know(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[attack.Aim] = []

    def own(aim: attack.Aim) -> torch.Tensor:
        seen.append(aim)
        assert (aim.round, aim.sample[1].tolist()) == (3, [1])
        for part in (aim.theta, aim.gradient, aim.target, *aim.sample):
            part.mul_(10)
        return (aim.theta + aim.gradient + aim.target).float()

    monkeypatch.setattr(plugins, "load", lambda path: own)
    model = models.make("logistic", {}, "cross_entropy", (1,), 2, 0)
    aim = aim_at(model, torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2), torch.tensor([1]))
    found = attack.direction_of("mine.py:own", aim)
    assert found.tolist() == [[80.0, 80.0]] and found.dtype == torch.float64
    assert seen[0].model is model
    assert [part.flatten()[0].item() for part in (aim.theta, aim.gradient, aim.target, *aim.sample)] == [1, 2, 5, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uphill", "direction=uphill is not a direction; known: gradient, target, .*or the import path of a function"),
        ("no.such", "^direction=no.such can't be imported: ModuleNotFoundError"),
    ],
)
def test_an_unknown_direction_is_told_with_what_is_known(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack.find_direction(name)


def test_a_users_direction_may_use_what_is_known_and_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: made(None))
    assert set(attack.find_direction("mine.py:own").uses) == {"knowledge", "target_path"}
    used = {name: row.uses for name, row in attack.DIRECTIONS.items() if row.uses}
    assert used == {"gradient": ("knowledge",), "target": ("target_path",), "target_far": ("target_path",)}
