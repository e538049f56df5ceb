"""The rules: laws that all of them keep, slow obvious versions, and other people's versions of the same."""

import importlib.util
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN
from torch import Tensor

from fl_attack import aggregate, plugins
from fl_attack.aggregate import PRE, RULES, Seen, geometry, ordering, weiszfeld
from fl_attack.aggregate import byzfl as byzfl_
from fl_attack.aggregate.geometry import combined, distances, exponent_of, norms, upper_median
from fl_attack.errors import InputError, RunError

M, C, D = 11, 2, 3
SEEDS = st.integers(0, 10_000)
NAMES = st.sampled_from(list(RULES))
ROBUST = [name for name, row in RULES.items() if "minority" not in row.breaks]  # others let one client through
BOXED = ["mean", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "meamed", "spectral"]
# a rule that looks at lengths, or at directions from zero, keeps no shift law
SHIFTED = [name for name, row in RULES.items() if "shift" not in row.breaks]
HAS_BYZFL = importlib.util.find_spec("byzfl") is not None


def updates_of(seed: int, cells: int = 3, m: int = M) -> Tensor:
    return torch.randn(cells, m, C, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rule(name: str, f: int | None = None, m: int = M, **more: Any) -> Callable[[Tensor], Tensor]:
    f = min(2, RULES[name].max_f(m)) if f is None and name in RULES else f or 0
    combine = aggregate.make(name, f=f, m=m, **more)
    return lambda updates: combine(updates, torch.ones(m), torch.arange(m), seen(updates))


def seen(updates: Tensor, **more: Any) -> Seen:
    """What the server knows of a round; what it trusts goes the way of most clients, so that it changes as they do."""
    return Seen(**{"root": lambda: updates.nan_to_num(9.0).median(-3).values} | more)


@given(NAMES, SEEDS)
def test_the_order_of_the_clients_does_not_matter(name: str, seed: int) -> None:
    u = updates_of(seed)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rule(name)(u[:, order]), rule(name)(u), atol=1e-9, rtol=0)


@given(NAMES, SEEDS)
def test_the_order_of_clients_and_their_weights_together_does_not_matter(name: str, seed: int) -> None:
    u, weights = updates_of(seed), torch.arange(1, M + 1)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    combine = aggregate.make(name, f=min(2, RULES[name].max_f(M)), m=M)
    expected = combine(u, weights, torch.arange(M), seen(u))
    found = combine(u[:, order], weights[order], torch.arange(M), seen(u))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@given(st.sampled_from(SHIFTED), SEEDS)
def test_a_shift_of_all_updates_shifts_the_result(name: str, seed: int) -> None:
    u, by = updates_of(seed), torch.tensor([3.0, -2.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(rule(name)(u + by), rule(name)(u) + by, atol=2e-6, rtol=0)


@given(NAMES, SEEDS)
def test_every_rule_is_odd(name: str, seed: int) -> None:
    u = updates_of(seed)
    torch.testing.assert_close(rule(name)(-u), -rule(name)(u), atol=1e-9, rtol=0)


@given(NAMES, SEEDS, st.sampled_from([1e-3, 1e3]))
def test_a_change_of_scale_changes_the_scale(name: str, seed: int, scale: float) -> None:
    u = updates_of(seed)
    torch.testing.assert_close(rule(name)(u * scale) / scale, rule(name)(u), atol=1e-6, rtol=0)


@given(st.sampled_from(BOXED), SEEDS)
def test_the_result_lies_between_the_smallest_and_the_largest_of_each_coordinate(name: str, seed: int) -> None:
    u = updates_of(seed)
    result = rule(name)(u)
    assert (result >= u.amin(1) - 1e-12).all() and (result <= u.amax(1) + 1e-12).all()


@given(NAMES, SEEDS)
def test_leading_axes_do_not_mix(name: str, seed: int) -> None:
    u = updates_of(seed, cells=4)
    together = rule(name)(u.view(2, 2, M, C, D)).reshape(4, C, D)
    torch.testing.assert_close(together, torch.stack([rule(name)(one) for one in u]), atol=1e-5, rtol=0)


@given(NAMES, SEEDS)
def test_equal_updates_are_their_own_aggregate(name: str, seed: int) -> None:
    one = updates_of(seed)[:, :1]
    torch.testing.assert_close(rule(name)(one.expand(-1, M, -1, -1)), one[:, 0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["trimmed_mean", "meamed", "multi_krum"])
def test_trimming_nothing_is_the_mean(name: str) -> None:
    u = updates_of(0)
    torch.testing.assert_close(rule(name, f=0)(u), u.mean(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("name", ROBUST)
def test_a_minority_that_sends_anything_does_not_get_through(name: str, bad: float) -> None:
    u = updates_of(1)
    f = min(2, RULES[name].max_f(M))
    u[:, 3 : 3 + f, 0, 1] = bad
    result = rule(name, f=f)(u)
    assert result.isfinite().all()
    assert result.abs().max() < 10


@pytest.mark.parametrize("pre", [["nnm"], ["bucketing"], ["clipping"], ["bucketing", "nnm"], ["clipping", "nnm"]])
def test_a_minority_does_not_get_through_pre_aggregators(pre: list[str]) -> None:
    u = updates_of(2)
    u[:, 5] = math.nan
    result = rule("median", f=1, pre=pre)(u)
    assert result.isfinite().all() and result.abs().max() < 10


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_as_they_are_and_so_does_the_precision(name: str, dtype: torch.dtype) -> None:
    u = updates_of(3).to(dtype)
    before = u.clone()
    assert rule(name)(u).dtype == dtype
    assert torch.equal(u, before)
    column = u[:, :, :1, :1].contiguous()  # which transposed has the same layout
    rule(name)(column)
    assert torch.equal(column, before[:, :, :1, :1])
    strided = u.movedim(1, 0).contiguous().movedim(0, 1)  # as the engine keeps them
    torch.testing.assert_close(rule(name)(strided), rule(name)(u))


def slow(name: str, u: np.ndarray, f: int, start: str = "median") -> np.ndarray:
    """Each rule as its paper says it, of u (m, n)."""
    m = len(u)
    distance = ((u[:, None] - u[None]) ** 2).sum(-1)

    def krum_order(members: list[int], neighbours: int) -> list[int]:
        score = {i: sum(sorted(distance[i, j] for j in members if j != i)[:neighbours]) for i in members}
        return sorted(members, key=lambda i: score[i])

    def around_median(values: np.ndarray, keep: int) -> float:
        middle = np.median(values)
        return float(np.mean(sorted(values, key=lambda value: abs(value - middle))[:keep]))

    everyone = list(range(m))
    if name == "median":
        return np.median(u, 0)
    if name == "trimmed_mean":
        return np.sort(u, 0)[f : m - f].mean(0)
    if name == "meamed":
        return np.array([around_median(column, m - f) for column in u.T])
    if name == "krum":
        return u[krum_order(everyone, m - f - 2)[0]]
    if name == "multi_krum":
        return u[krum_order(everyone, m - f - 2)[: m - f]].mean(0)
    if name == "bulyan":
        left, chosen = everyone, []
        for _ in range(m - 2 * f):
            best = krum_order(left, max(2, len(left) - f - 2))[0]
            chosen.append(best)
            left = [i for i in left if i != best]
        return np.array([around_median(column, m - 4 * f) for column in u[chosen].T])
    if name == "spectral":
        for _ in range(f):
            away = u[everyone] - u[everyone].mean(0)
            top = np.linalg.svd(away)[2][0]
            del everyone[int(np.abs(away @ top).argmax())]
        return u[everyone].mean(0)
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    if name == "fltrust":
        trusted = np.sort(u, 0)[(m - 1) // 2]
        trust = np.maximum(unit @ trusted / np.linalg.norm(trusted), 0)
        return trust @ unit / trust.sum() * np.linalg.norm(trusted)
    if name == "class_norms":
        norms = np.linalg.norm(u.reshape(m, C, D), axis=2)
        away = np.linalg.norm(norms - np.median(norms, 0), axis=1)
        return u[np.argsort(away)[: m - f]].mean(0)
    if name in ("cosine_history", "flame"):
        norms = np.linalg.norm(u, axis=1)
        clipped = u * np.minimum(1, np.median(norms) / norms)[:, None]
        if name == "cosine_history":
            return clipped[np.argsort(-unit @ np.median(u, 0))[: m - f]].mean(0)
        clusters = HDBSCAN(m // 2 + 1, min_samples=1, metric="precomputed", allow_single_cluster=True, copy=True)
        return clipped[clusters.fit((1 - unit @ unit.T).clip(0)).labels_ == 0].mean(0)
    if name == "foolsgold":
        alike = unit @ unit.T - np.eye(m)
        most = [max(alike[i, j] for j in everyone if j != i) for i in everyone]
        pardoned = [
            [alike[i, j] * (most[i] / most[j] if most[j] > most[i] else 1) for j in everyone if j != i]
            for i in everyone
        ]
        unlike = np.array([1 - max(row) for row in pardoned]).clip(0, 1)
        unlike = (unlike / unlike.max()).clip(max=0.99)
        with np.errstate(divide="ignore"):
            weight = (np.log(unlike / (1 - unlike)) + 0.5).clip(0, 1)
        return weight @ u / m
    if name == "norm_clipping":
        norms = np.linalg.norm(u, axis=1)
        return (u * np.minimum(1, np.median(norms) / norms)[:, None]).mean(0)
    if name == "centered_clipping":
        at = np.median(u, 0) if start == "median" else np.zeros(u.shape[1])
        for _ in range(3):
            away = u - at
            norms = np.linalg.norm(away, axis=1)
            at = at + (away * np.minimum(1, np.median(norms) / norms)[:, None]).mean(0)
        return at
    return u.mean(0)


@pytest.mark.parametrize("name", [name for name in RULES if name != "geometric_median"])
@pytest.mark.parametrize("f", [0, 1, 2])
def test_each_rule_is_what_its_paper_says(name: str, f: int) -> None:
    u = updates_of(4, cells=6)
    result = rule(name, f=f)(u).flatten(1).numpy()
    for cell, found in zip(u.flatten(2).numpy(), result, strict=True):
        np.testing.assert_allclose(found, slow(name, cell, f), atol=1e-9)


def test_centered_clipping_can_start_from_zero() -> None:
    u = updates_of(4, cells=6) + 0.3
    result = rule("centered_clipping", args={"start": "zero"})(u).flatten(1).numpy()
    for cell, found in zip(u.flatten(2).numpy(), result, strict=True):
        np.testing.assert_allclose(found, slow("centered_clipping", cell, 0, "zero"), atol=1e-9)
    with pytest.raises(InputError, match="start=one is not known; use median or zero"):
        rule("centered_clipping", args={"start": "one"})


@pytest.mark.parametrize("at", [0.0, 1e3])
def test_centered_clipping_keeps_its_digits_in_single_precision(at: float) -> None:
    u = torch.randn(3, 9, 1, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u[:, 0] += 100.0
    exact, single = (rule("centered_clipping", f=1, m=9)(v) for v in (u, (u + at).float()))
    torch.testing.assert_close(single.double() - at, exact, rtol=0, atol=2e-4 if at else 1e-5)


def test_no_step_from_the_geometric_median_shortens_the_way_to_all_updates() -> None:
    u = updates_of(5, cells=1)
    at = rule("geometric_median", args={"tolerance": 1e-10, "most": 10000})(u)

    def way(point: Tensor) -> float:
        return float((u - point.unsqueeze(1)).flatten(2).norm(dim=-1).sum())

    for step in torch.eye(C * D, dtype=torch.float64).view(-1, C, D):
        assert way(at) <= min(way(at + 1e-3 * step), way(at - 1e-3 * step))


def test_the_mean_is_weighted_by_samples() -> None:
    combine = aggregate.make("mean", f=0, m=2)
    updates = torch.tensor([0.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    assert combine(updates, torch.tensor([9, 1]), torch.arange(2)).item() == pytest.approx(0.3, abs=1e-15)


def test_ties_go_to_the_lower_client() -> None:
    u = torch.tensor([5.0, 1, 1, 0, 0, 9]).view(6, 1, 1)  # the ones and the zeros are equally near to each other
    assert rule("krum", f=1, m=6)(u).item() == 1


def test_mixing_with_neighbours_takes_the_mean_of_the_nearest() -> None:
    u = updates_of(6, cells=1)
    mixed, _ = PRE["nnm"].apply(u, torch.ones(M), 3, torch.arange(M))
    flat = u[0].flatten(1)
    for i, row in enumerate(mixed[0].flatten(1)):
        nearest = (flat - flat[i]).norm(dim=1).argsort()[: M - 3]
        torch.testing.assert_close(row, flat[nearest].mean(0))


def test_buckets_are_means_of_clients_drawn_by_lot() -> None:
    u, order = updates_of(7, cells=1), torch.randperm(M, generator=torch.Generator().manual_seed(0))
    means, weights = PRE["bucketing"].apply(u, torch.arange(M), 1, order, s=3)
    assert means.shape[1] == 4 and weights.sum() == sum(range(M))
    torch.testing.assert_close(means[0, 0], u[0, order[:3]].mean(0))
    torch.testing.assert_close(means[0, 3], u[0, order[9:]].mean(0))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("m", [3, 7, 10])
def test_an_f_for_which_a_rule_is_undefined_is_refused_with_the_largest_that_is_not(name: str, m: int) -> None:
    max_f = RULES[name].max_f(m)
    if max_f >= 0:
        assert rule(name, f=max_f, m=m)(updates_of(0, m=m)).isfinite().all()
    refusal = "more than" if max_f == m else f"too many for strategy={name} of {m} clients; use"
    with pytest.raises(InputError, match=f"strategy.f={max_f + 1} is {refusal}"):
        rule(name, f=max_f + 1, m=m)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "krmu"}, "strategy.name=krmu is not a strategy; known: mean, median"),
        ({"name": "krum", "f": 4}, "strategy.f=4 is too many for strategy=krum of 10 clients; use at most 3"),
        ({"name": "krum", "f": 2, "pre": ["bucketing"]}, "too many for strategy=krum of 5 clients; use at most 1"),
        ({"name": "median", "args": {"a": 1}}, "strategy.args: a is not an argument of median; it takes none"),
        ({"name": "multi_krum", "args": {"keep": 11}}, "keep=11 must be from 1 to 10"),
        ({"name": "geometric_median", "args": {"tolerance": 0}}, "tolerance=0 must be above 0"),
        ({"name": "median", "pre": ["nmm"]}, "strategy.pre=nmm is not known; known: nnm, bucketing, clipping"),
        ({"name": "median", "pre": [{"bucketing": {"s": 0}}]}, "s=0 of bucketing must be a whole number of at least 1"),
        ({"name": "median", "pre": [{"clipping": {"c": -1}}]}, "c=-1 must be above 0"),
        ({"name": "byzfl"}, "strategy.rule is missing; give one of ByzFL's: Average"),
        ({"name": "byzfl", "rule": "Mean"}, "strategy.rule=Mean is not one of ByzFL's; known: Average"),
        ({"name": "byzfl", "rule": "CAF", "pre": ["NNM"]}, "CAF never ends after NNM|needs ByzFL"),
        ({"name": "no.such"}, "no.such can't be imported"),
        ({"name": "mean", "f": 11}, "strategy.f=11 is more than the 10 clients"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate.make(**({"f": 0, "m": 10} | given))


def test_a_rule_of_ones_own_is_a_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(
        "def largest(updates, weights, f, *, scale=1.0):\n    return scale * updates.amax(-3)\n"
    )
    u = updates_of(0)
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/my_rules.py:largest", "my_rules.largest", "my_rules:largest"):
        full = plugins.spelled_out(path, str(tmp_path))
        assert full == f"{(tmp_path / 'my_rules.py').resolve()}:largest"
        assert torch.equal(rule(full, args={"scale": 2.0})(u), 2 * u.amax(1))
    assert plugins.spelled_out("krum", str(tmp_path)) == "krum"
    assert plugins.source_digest("krum") == ""
    assert len(plugins.source_digest("my_rules.largest")) == 64


def records(u: np.ndarray) -> list[RecordDict]:
    return [
        RecordDict({"arrays": ArrayRecord({"theta": Array(row)}), "metrics": MetricRecord({"num-examples": 1})})
        for row in u
    ]


@pytest.mark.parametrize("f", [1, 2])
def test_krum_picks_the_client_that_flowers_krum_picks(f: int) -> None:
    for seed in range(20):
        u = updates_of(seed, cells=1)[0].flatten(1).numpy()
        ours = rule("krum", f=f)(torch.from_numpy(u).view(1, M, 1, -1))[0, 0].numpy()
        (picked,) = select_multikrum(records(u), f, 1)
        np.testing.assert_array_equal(ours, picked["arrays"]["theta"].numpy())


@pytest.mark.parametrize("f", [0, 1, 3])
def test_the_trimmed_mean_is_flowers(f: int) -> None:
    u = updates_of(f, cells=1)
    theirs = trim_mean(u[0].numpy(), (f + 0.5) / M)  # Flower takes the share to cut, rounded down
    np.testing.assert_allclose(rule("trimmed_mean", f=f)(u)[0].numpy(), theirs)


def byzfl_of(name: str, f: int) -> Callable[[np.ndarray], np.ndarray]:
    byzfl = pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    kind = getattr(byzfl, name)
    return kind(f) if name in ("TrMean", "Krum", "MultiKrum", "Meamed", "NNM") else kind()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("mean", "Average"), ("median", "Median"), ("trimmed_mean", "TrMean"), ("meamed", "Meamed")],
)
@pytest.mark.parametrize("f", [1, 3])
def test_rules_agree_with_byzfls_where_the_definitions_do(ours: str, theirs: str, f: int) -> None:
    for seed in range(5):
        u = updates_of(seed, cells=1)
        expected = byzfl_of(theirs, f)(u[0].flatten(1).numpy())
        np.testing.assert_allclose(rule(ours, f=f)(u)[0].flatten().numpy(), expected, atol=1e-9)


def test_krum_with_one_more_neighbour_is_byzfls() -> None:
    theirs = byzfl_of("Krum", 2)
    differing = 0
    for seed in range(40):
        u = updates_of(seed, cells=1)
        ours = rule("krum", f=1)(u)[0].flatten().numpy()  # m - 1 - 2 neighbours are their m - 2 - 1
        np.testing.assert_allclose(ours, theirs(u[0].flatten(1).numpy()))
        differing += not np.allclose(rule("krum", f=2)(u)[0].flatten().numpy(), ours)
    assert differing  # so that the table in docs/rules.md is no idle talk


@pytest.mark.parametrize(("tau", "iterations"), [(0.5, 1), (2.0, 4), (1000.0, 2)])
def test_centered_clipping_from_zero_is_byzfls(tau: float, iterations: int) -> None:
    byzfl = pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u = updates_of(1, cells=1) + 1
    expected = byzfl.CenteredClipping(L=iterations, tau=tau)(u[0].flatten(1).numpy())
    args = {"start": "zero", "tau": tau, "iterations": iterations}
    found = rule("centered_clipping", args=args)(u)[0].flatten().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_multi_krum_with_one_more_neighbour_is_byzfls() -> None:
    theirs = byzfl_of("MultiKrum", 2)
    for seed in range(10):
        u = updates_of(seed, cells=1)
        ours = rule("multi_krum", f=1, args={"keep": M - 2})(u)[0].flatten().numpy()
        np.testing.assert_allclose(ours, theirs(u[0].flatten(1).numpy()), atol=1e-12)


def test_byzfls_geometric_median_comes_to_ours_with_its_steps() -> None:
    byzfl = pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u = updates_of(3, cells=1)
    ours = rule("geometric_median", args={"tolerance": 1e-12, "most": 10_000})(u)[0].flatten().numpy()
    theirs = [byzfl.GeometricMedian(nu=1e-9, T=steps)(u[0].flatten(1).numpy()) for steps in (3, 1000)]
    distances_to_ours = [np.linalg.norm(found - ours) for found in theirs]
    assert (
        distances_to_ours[1] < 1e-6 < distances_to_ours[0]
    )  # three are its own choice: a row of the table in docs/rules.md


@pytest.mark.parametrize("f", [1, 3])
def test_mixing_with_neighbours_is_byzfls(f: int) -> None:
    u = updates_of(f, cells=1)
    found = PRE["nnm"].apply(u, torch.ones(M), f, torch.arange(M))[0]
    np.testing.assert_allclose(found[0].flatten(1).numpy(), byzfl_of("NNM", f)(u[0].flatten(1).numpy()), atol=1e-12)


@pytest.mark.parametrize("c", [0.5, 2.0, 100.0])
def test_clipping_to_a_norm_is_byzfls(c: float) -> None:
    byzfl = pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u = updates_of(1, cells=1)
    found = PRE["clipping"].apply(u, torch.ones(M), 1, torch.arange(M), c=c)[0]
    expected = byzfl.Clipping(c=c)(u[0].flatten(1).numpy().copy())
    np.testing.assert_allclose(found[0].flatten(1).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("s", [1, 2, 3])
def test_buckets_are_byzfls_for_the_same_order(s: int) -> None:
    byzfl = pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")

    def theirs(array: np.ndarray) -> np.ndarray:
        with aggregate.byzfl.seeded(torch.arange(s)):
            return np.asarray(byzfl.Bucketing(s=s)(array))

    order = np.concatenate([np.flatnonzero(bucket) for bucket in theirs(np.eye(M))])
    u = updates_of(s, cells=1)
    found = PRE["bucketing"].apply(u, torch.ones(M), 1, torch.from_numpy(order), s=s)[0]
    np.testing.assert_allclose(found[0].flatten(1).numpy(), theirs(u[0].flatten(1).numpy()), atol=1e-12)


@pytest.mark.parametrize("name", aggregate.byzfl.RULES)
def test_each_of_byzfls_rules_runs_on_many_cells_in_double_precision(name: str) -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u = updates_of(0)
    u[:, 2] = math.nan
    before, state = u.clone(), torch.get_rng_state()
    combine = aggregate.make("byzfl", rule=name, f=2, m=M)
    result = combine(u, torch.ones(M), torch.arange(M))
    assert result.dtype == torch.float64 and result.shape == (3, C, D) and result.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(u.nan_to_num(7), before.nan_to_num(7))
    torch.testing.assert_close(combine(u, torch.ones(M), torch.arange(M)), result)
    torch.testing.assert_close(combine(u[1:2], torch.ones(M), torch.arange(M))[0], result[1])


@pytest.mark.parametrize("name", aggregate.byzfl.PRE)
def test_each_of_byzfls_pre_aggregators_goes_before_a_rule(name: str) -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    combine = aggregate.make("median", pre=[name], f=2, m=M)
    assert combine(updates_of(0), torch.ones(M), torch.arange(M)).isfinite().all()


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1000.0), (1e-20, 0.0), (1e20, 0.0)])
def test_distances_keep_their_digits_in_single_precision(scale: float, shift: float) -> None:
    exact = torch.randn(3, 9, 1, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    updates = (exact * scale + shift).float()
    for found, expected in zip(distances(updates), distances(updates.double()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0, check_dtype=False)


@pytest.mark.parametrize("m", [31, 32, 33, 70])
def test_distances_of_many_clients_are_all_there(m: int) -> None:
    u = torch.randn(2, m, 2, 20, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    squared, ordered = distances(u)
    found = squared.diagonal_scatter(torch.zeros(2, m, dtype=torch.float64), dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.cdist(u.flatten(-2), u.flatten(-2)) ** 2, rtol=1e-9, atol=1e-9)
    assert torch.equal(ordered, squared.sort(-1).values) and torch.equal(squared, squared.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_geometric_median_of_many_clients_is_the_same_by_steps_and_by_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    m = 40
    u = torch.randn(6, m, 2, 150, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u[1, :15] += 3.0  # takes more than a few iterations
    u[2] += 1000.0  # digits are lost without a centre
    u[3, 7] = math.nan
    u[4, 1:] = u[4, :1]  # the median is one of the updates
    u = u.to(dtype)
    combine = rule("geometric_median", m=m)
    found = combine(u)
    left = weiszfeld._few_iterations(u, norms(u), 1e-6, weiszfeld.FEW)[1].tolist()
    assert left[1:5] == [True] * 4 and left[0] is left[5] is False
    assert found.isfinite().all()
    torch.testing.assert_close(found, torch.stack([combine(one) for one in u]), atol=1e-4, rtol=1e-6)
    monkeypatch.setattr(weiszfeld, "MANY", m + 1)
    torch.testing.assert_close(found, combine(u), atol=1e-4, rtol=1e-6)
    assert (found[0] - u[0].mean(0)).abs().max() > 1e-3  # the mean is where the iteration begins


def test_the_geometric_median_is_iterated_to_its_tolerance() -> None:
    updates = torch.randn(4, 9, 2, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    at = aggregate.make("geometric_median", f=2, m=9, args={"tolerance": 1e-10})(
        updates, torch.ones(9), torch.arange(9)
    )
    away = (updates - at.unsqueeze(-3)).flatten(-2)
    pulls = (away / away.norm(dim=-1, keepdim=True)).sum(-2)  # the gradient of the summed distance
    assert pulls.norm(dim=-1).max() < 1e-8


@pytest.mark.parametrize("m", [7, 11, 41])
@pytest.mark.parametrize("away", [0.0, 1e-8, 1e-5, 1e-3])
def test_an_update_at_the_mean_of_the_others_does_not_hold_the_geometric_median(m: int, away: float) -> None:
    honest = torch.randn(3, m - 2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.cat([honest, torch.full((3, 1, 1, 4), 500.0)], 1)
    held = seen.mean(1, keepdim=True) + away  # where the iteration begins
    u = torch.cat([seen, held], 1)
    u[2] = honest[2, :1]  # an update that all have sent is not left
    found = rule("geometric_median", m=m)(u)
    summed = (u - found.unsqueeze(1)).flatten(-2).norm(dim=-1).sum(-1)
    from_each = torch.cdist(u.flatten(-2), u.flatten(-2)).sum(-1)
    assert (summed[:2] < from_each[:2].amin(-1)).all() and (summed[:2] < 0.8 * from_each[:2, -1]).all()
    torch.testing.assert_close(found[2], u[2, 0])
    torch.testing.assert_close(found, torch.stack([rule("geometric_median", m=m)(one) for one in u]))


def test_the_geometric_median_may_be_one_of_the_updates() -> None:
    u = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [0.0, -1.0], [0.01, 0.01]], dtype=torch.float64)
    found = rule("geometric_median", m=6, args={"most": 2000})(u.unsqueeze(1))[0]
    assert (found - u[0]).norm() < 0.02


def test_the_geometric_median_near_an_update_is_not_left_for_a_worse_point() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(300, 60, 1, 1, generator=generator) + 0.01 * torch.randn(300, 60, 1, 50, generator=generator)
    args = {"tolerance": 1e-9, "most": 3000}
    found, best = rule("geometric_median", m=60)(u).double(), rule("geometric_median", m=60, args=args)(u.double())
    summed, least = ((u.double() - at.unsqueeze(1)).flatten(-2).norm(dim=-1).sum(-1) for at in (found, best))
    assert (summed / least).max() < 1 + 1e-5


@pytest.mark.parametrize("pull", [1.003, 1.01, 1.03])
def test_the_geometric_median_beside_an_update_is_as_exact_as_the_updates(pull: float) -> None:
    generator = torch.Generator().manual_seed(1)
    one, half = (torch.randn(n, 100, generator=generator, dtype=torch.float64) for n in (1, 9))
    half /= half.norm(dim=-1, keepdim=True)
    ways = torch.linalg.qr(torch.randn(100, 2, generator=generator, dtype=torch.float64))[0]
    # these two draw the median away from the update in the middle, which holds it with a pull of 1
    two = pull / 2 * ways[:, 0] + torch.tensor([[1.0], [-1.0]]) * math.sqrt(1 - pull**2 / 4) * ways[:, 1]
    middle = 6 * one / one.norm()
    u = torch.cat([middle, middle + half, middle - half, middle + two]).float().unsqueeze(1)
    args = {"tolerance": 1e-9, "most": 20_000}
    found = rule("geometric_median", m=21, args=args)(u).double()
    exact = rule("geometric_median", m=21, args=args | {"tolerance": 1e-13})(u.double())
    assert 1e-5 < (exact - u[0]).norm() < 0.01 and (found - exact).norm() < 3e-6


def test_the_step_away_from_an_update_is_vardis_and_zhangs() -> None:
    u = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[2] = u[4] = 2.0  # sent by two
    share = weiszfeld.vardi_zhang_step(
        u @ u.T, torch.ones(7, dtype=torch.bool), torch.tensor([2]), torch.tensor([1e-9], dtype=torch.float64)
    )
    others = u[[0, 1, 3, 5, 6]]
    away = (others - u[2]).norm(dim=-1, keepdim=True)
    step, pull = (others / away).sum(0) / (1 / away).sum(), ((others - u[2]) / away).sum(0).norm()
    assert 2 < pull < 5
    torch.testing.assert_close(share @ u, (1 - 2 / pull) * step + 2 / pull * u[2])


def test_the_geometric_median_of_a_federation_does_not_go_on_for_the_company_it_is_in() -> None:
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(60, 9, 1, 20, generator=generator, dtype=torch.float64)
    nearness = torch.logspace(-3, 0, 60, dtype=torch.float64).view(60, 1, 1)
    u[:, 0] = u.mean(1) + nearness * u[:, 0]  # the nearer, the more iterations
    gram = u.flatten(-2) @ u.flatten(-2).mT
    everyone = torch.ones(60, 9, dtype=torch.bool)
    for tolerance in (0.003, 0.03):
        by_steps = weiszfeld._few_iterations(u, norms(u), tolerance, weiszfeld.FEW)
        by_products = weiszfeld._weiszfeld(gram, everyone, tolerance, 200)
        assert 0 < by_steps[1].sum() < 60 and 0 < by_products[1].sum() < 60
        for i in range(60):
            one = slice(i, i + 1)
            alone = weiszfeld._few_iterations(u[one], norms(u[one]), tolerance, weiszfeld.FEW)
            assert torch.equal(by_steps[1][one], alone[1])
            if not alone[1]:  # else the shares are not used
                torch.testing.assert_close(by_steps[0][one], alone[0], atol=1e-12, rtol=0.0)
            share, near = weiszfeld._weiszfeld(gram[one], everyone[one], tolerance, 200)
            torch.testing.assert_close(by_products[0][one], share, atol=1e-12, rtol=0.0)
            assert torch.equal(by_products[1][one], near)


def test_a_geometric_median_that_takes_many_iterations_is_left_to_products_after_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    u = torch.randn(2, 9, 1, 20, generator=torch.Generator().manual_seed(0))
    u[:, :4] += 3.0
    inner_products, calls = weiszfeld.inner_products, []
    monkeypatch.setattr(weiszfeld, "inner_products", lambda *given: calls.append(1) or inner_products(*given))
    assert weiszfeld._few_iterations(u, norms(u), 1e-6, weiszfeld.FEW)[1].all() and len(calls) == 2
    calls.clear()
    few = u[:, 4:]
    assert not weiszfeld._few_iterations(few, norms(few), 1e-2, weiszfeld.FEW)[1].any() and len(calls) > 2


@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median"])
def test_updates_whose_squares_underflow_keep_their_digits(name: str) -> None:
    u = torch.randn(50, 9, 1, 20, generator=torch.Generator().manual_seed(0))
    small = 2.0**-70  # 1e-21, of which a square has two or three bits
    torch.testing.assert_close(rule(name, m=9)(u * small) / small, rule(name, m=9)(u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("m", "whole"), [*((m, True) for m in (1, 2, 3, 5, 8, 16, 47, 48, 49)), (3, False), (13, False), (49, False)]
)
def test_values_of_any_number_of_clients_are_in_order_at_every_place(
    m: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:  # in chunks, of which the last is shorter
        monkeypatch.setattr(ordering, "NETWORK_CHUNK", 5)
        monkeypatch.setattr(ordering, "SORT_CHUNK", 5 * m + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rng = torch.Generator().manual_seed(m)
    u = torch.randint(-9, 9, (2, m, 3, 4), generator=rng).double()
    before, factors = u.clone(), torch.rand(m, dtype=torch.float64, generator=rng)
    for start, stop in {(0, m), (m // 3, m - m // 3), (m - 1, m), (0, 1)}:

        def reduce(rows: ordering.Rows, stop: int = stop, start: int = start) -> Tensor:
            assert len(rows) == stop - start
            return sum(factor * row for factor, row in zip(factors.tolist(), rows, strict=False))  # type: ignore[return-value]

        expected = (factors[: stop - start].view(-1, 1, 1) * u.sort(1).values[:, start:stop]).sum(1)
        torch.testing.assert_close(ordering.by_coordinate(u, range(start, stop), reduce), expected)
    assert torch.equal(u, before)
    if m > 1:
        u[0, 0, 0, 0] = math.nan
        last = ordering.by_coordinate(u, range(m - 1, m), lambda rows: rows[0].clone())
        assert last[0].isinf().all() and last[1].isfinite().all()


def test_a_sorting_network_compares_no_more_than_the_places_asked_for_need() -> None:
    assert ordering.network(1, range(1)) == [] == ordering.network(5, range(0))
    assert ordering.network(2, range(2)) == [(0, 1, True, True)]
    assert ordering.network(2, range(1)) == [(0, 1, True, False)]
    assert ordering.network(2, range(1, 2)) == [(0, 1, False, True)]
    assert len(ordering.network(4, range(4))) == 5 and len(ordering.network(8, range(8))) == 19  # Batcher 1968
    assert len(ordering.network(9, range(4, 5))) < len(ordering.network(9, range(9)))


def test_the_smallest_are_marked_and_of_equal_ones_those_of_the_lower_index() -> None:
    values = torch.tensor([[3.0, 1, 2, 1, 1], [5, 4, 3, 2, 1], [math.inf, 0, math.inf, 7, math.inf]])
    found = ordering.smallest(values, 2, ordering.ascending(values))
    assert found.tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]] and found.dtype == values.dtype
    assert ordering.smallest(values, 4, ordering.ascending(values))[2].tolist() == [1, 1, 1, 1, 0]
    alone = ordering.smallest(values[1], 1, ordering.ascending(values[1]))
    assert alone.tolist() == [0, 0, 0, 0, 1]
    assert ordering.ascending(torch.tensor([math.nan, 1.0, -math.inf, math.inf])).tolist()[:3] == [
        -math.inf,
        1,
        math.inf,
    ]


def test_the_upper_median_is_of_the_finite_values_alone() -> None:
    rows = torch.tensor([[4.0, 1, 3, 2], [math.inf, 1, 3, 2], [math.inf, math.inf, math.inf, 5], [math.inf] * 4])
    assert upper_median(rows).tolist() == [[3], [2], [5], [0]]
    numbers = torch.tensor([0.0, 1.0, -1.5, 2.0, 0.5, 1e-320, 1e305], dtype=torch.float64)
    assert exponent_of(numbers).tolist() == [0, 1, 1, 2, 0, -1000, 1000]


def test_a_share_of_zero_leaves_out_what_is_not_finite_and_any_other_does_not() -> None:
    u = torch.tensor([[1.0], [math.inf], [3.0]]).view(3, 1, 1)
    assert combined(u, torch.tensor([0.5, 0.0, 0.5])).item() == 2.0
    assert combined(u, torch.tensor([0.5, 0.1, 0.4])).item() == math.inf
    own = torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    assert combined(u.expand(2, 3, 1, 1), own).flatten().tolist() == [2.0, 1.0]


def test_all_generators_are_decided_by_the_order_of_the_clients_and_then_as_they_were() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - as ByzFL does

    def inside(order: list[int]) -> tuple[float, float, float]:
        with byzfl_.seeded(torch.tensor(order)):
            return drawn()

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = drawn()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    one, again, other = inside([0, 1, 2]), inside([0, 1, 2]), inside([2, 1, 0])
    assert one == again and all(a != b for a, b in zip(one, other, strict=True))
    assert drawn() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "MDA", "m": 21}, "strategy.rule=MDA tries all subsets of 21 clients; use at most 20"),
        ({"rule": "Best"}, "strategy.rule=Best is not one of ByzFL's; known: Average, Median, TrMean"),
        ({"rule": "Krum", "args": {"k": 1}}, "k is not an argument of ByzFL's Krum; it takes f"),
        ({"rule": "CenteredClipping", "args": {"m": 1}}, "m is not an argument of ByzFL's CenteredClipping; it takes"),
        ({"rule": None}, "strategy.rule is missing; give one of ByzFL's: Average, Median"),
        ({"rule": "CAF", "pre": ["NNM"]}, "strategy.rule=CAF never ends after NNM; use another rule or leave NNM out"),
        ({"rule": "TrMean", "f": 6}, "strategy.rule=TrMean does not take f=6 of 11 clients with {}: "),
    ],
)
def test_what_byzfl_can_not_do_is_told_in_one_line(given: dict[str, Any], message: str) -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        aggregate.make("byzfl", **{"f": 1, "m": M} | given)


def test_byzfls_rules_over_subsets_take_twenty_clients() -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u = updates_of(0, cells=1, m=20)
    u[0, 7] = 1e3
    found = aggregate.make("byzfl", rule="MDA", f=1, m=20)(u, torch.ones(20), torch.arange(20))
    torch.testing.assert_close(found, u[:, torch.arange(20) != 7].mean(1))


def test_buckets_of_byzfl_weigh_alike_and_updates_that_are_mixed_keep_their_weights() -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    u, order = updates_of(0), torch.arange(M)
    weights = torch.arange(1.0, M + 1)
    (buckets,), left = aggregate._pre_aggregators([{"Bucketing": {"s": 2}}], 1, M)
    changed, after = buckets(u, weights, 1, order)
    assert left == 6 and changed.shape == (3, 6, C, D) and after.tolist() == [1.0] * 6
    (mixed,), left = aggregate._pre_aggregators(["NNM"], 1, M)
    assert left == M and mixed(u, weights, 1, order)[1] is weights


def test_who_may_run_in_threads_and_what_a_rule_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert aggregate.is_builtin("median") and aggregate.is_builtin("krum", ["nnm", {"bucketing": {"s": 3}}])
    assert not aggregate.is_builtin("byzfl") and not aggregate.is_builtin("median", ["nnm", "NNM"])
    assert not aggregate.is_builtin("median", [{"ARC": {}}])
    assert [aggregate.is_known(name) for name in ("mean", "byzfl", "mine.py:own", "average")] == [True] * 3 + [False]
    assert {name for name in RULES if aggregate.sees(name)} == {
        *("fltrust", "cosine_history", "class_norms", "foolsgold", "flame"),
    }
    assert {name: set(aggregate.needs(name)) for name in ("fltrust", "flame", "mean", "mine.py:own")} == {
        "fltrust": {"root"}, "flame": {"noise"}, "mean": set(), "mine.py:own": set(),
    }  # fmt: skip
    monkeypatch.setattr(plugins, "load", lambda path: lambda updates, weights, f, state: (updates[0], state))
    assert aggregate.sees("mine.py:own") and not aggregate.sees("byzfl")


def own_rule(answer: Any, **asks: Any) -> Callable[..., Any]:
    def own(updates: Tensor, weights: Tensor, f: int, scale: float = 1.0) -> Any:
        return answer

    def with_state(updates: Tensor, weights: Tensor, f: int, *, state: Any) -> Any:
        return answer

    return with_state if asks else own


@pytest.mark.parametrize(
    ("answer", "asks", "said"),
    [
        (torch.ones(C, D), {}, "gave shape (2, 3), float32; wanted: an aggregate of shape (3, 2, 3), real and finite"),
        (torch.ones(3, C, D) * 1j, {}, "gave shape (3, 2, 3), complex64; wanted: an aggregate of shape (3, 2, 3)"),
        (torch.full((3, C, D), math.nan), {}, "gave NaN or infinity; wanted: an aggregate of shape (3, 2, 3)"),
        (1.0, {}, "gave float; wanted: an aggregate of shape (3, 2, 3)"),
        (torch.ones(3, C, D), {"state": 1}, "gave Tensor; wanted: a pair, the aggregate and the state for the next"),
        ((torch.ones(3, C, D),), {"state": 1}, "gave tuple; wanted: a pair, the aggregate and the state"),
    ],
)
def test_an_aggregate_that_is_none_is_told_with_what_is_wanted(
    answer: Any, asks: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "load", lambda path: own_rule(answer, **asks))
    combine = aggregate.make("mine.py:own", f=1, m=M)
    assert combine.keeps_state == combine.sees == bool(asks)
    with pytest.raises(RunError, match=re.escape(said)):
        combine.step(updates_of(0), torch.ones(M), torch.arange(M))


def test_a_users_rule_may_give_what_is_not_finite_where_an_update_is_not_and_any_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    u = updates_of(0)
    u[1, 3] = math.inf
    answer = torch.ones(3, C, D)
    answer[1] = math.nan
    monkeypatch.setattr(plugins, "load", lambda path: own_rule((answer, "kept"), state=1))
    found, state = aggregate.make("mine.py:own", f=1, m=M).step(u, torch.ones(M), torch.arange(M))
    assert state == "kept" and found.dtype == torch.float64 and found[0].tolist() == [[1.0] * D] * C
    monkeypatch.setattr(plugins, "load", lambda path: own_rule(answer))
    assert aggregate.make("mine.py:own", f=1, m=M, args={"scale": 2}).step(u, torch.ones(M), torch.arange(M))[1] is None
    with pytest.raises(InputError, match=r"^strategy.args of mine.py:own: .*; a rule takes updates, weights, f and"):
        aggregate.make("mine.py:own", f=1, m=M, args={"size": 2})


def test_the_order_of_the_clients_that_remain_after_buckets_is_one_of_them() -> None:
    seen_: list[list[int]] = []

    def step(updates: Tensor, weights: Tensor, f: int, client_order: Tensor) -> tuple[Tensor, Tensor]:
        seen_.append(client_order.tolist())
        return updates[..., : len(weights) - 2, :, :], weights[:-2]

    def last(updates: Tensor, weights: Tensor, order: Tensor, seen: Any, state: Any) -> tuple[Tensor, None]:
        seen_.append(order.tolist())
        return updates.mean(-3), None

    combine = aggregate.Combine([step, step], 1, last, set())
    combine(updates_of(0, m=6), torch.ones(6), torch.tensor([5, 2, 0, 4, 1, 3]))
    assert seen_ == [[5, 2, 0, 4, 1, 3], [2, 0, 1, 3], [0, 1]]


def test_products_of_federations_in_two_axes_are_those_of_each_alone() -> None:
    u = torch.randn(2, 3, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    u[0, 1, 2] = torch.inf
    u[1, 2] *= 1e25
    gram, finite = geometry.products(u)
    for place in itertools.product(range(2), range(3)):
        one, is_finite = geometry.products(u[place])
        torch.testing.assert_close(gram[place], one, rtol=1e-5, atol=1e-5)
        assert torch.equal(finite[place], is_finite)
    assert not finite[0, 1, 2] and finite.sum() == 29
