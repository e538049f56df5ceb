"""The replication: verdicts on tables with known answers, every preset, and the whole pipeline on a tiny grid."""

import csv
import math
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fl_attack import engine, identity, multirun
from fl_attack.config import Settings, compose
from fl_attack.errors import InputError
from fl_attack.launcher import grid
from fl_attack.replication import __main__ as replicate
from fl_attack.replication import claims, extensions, figures, findings, gradients, plan, report, statistics
from fl_attack.replication.cells import joined, read, with_drops, without_part
from fl_attack.replication.claims import CLAIMS, LEAST_EFFECT
from fl_attack.replication.verdicts import NOISY, NOT, PARTLY, REPLICATED, Criterion, Evidence
from fl_attack.sweep_table import Cells, jackknife_interval, mean_interval

RUNS = [run for kind in (plan._quick, plan._whole) for source in plan.sources(True, None) for run in kind(source)]


def table(rows: list[dict[str, object]]) -> Cells:
    """Cells of these rows; what they leave out is usual."""
    usual = {"k": 1.0, "b": 0.0, "goal": "untargeted", "seed": 0, "accuracy": 90.0, "f1": 90.0, "lr": 0.1}
    usual |= {"patience": "null", "optimizer": "sgd", "selection": "gain", "every": 1.0, "rounding": "carry"}
    usual |= {"validation": 0.5, "effective": 0.0}
    full = [usual | row for row in rows]
    columns = {name: np.array([row[name] for row in full]) for name in usual}
    for name in ("late", "minimum"):
        columns[name] = np.array([row.get(name, row["accuracy"]) for row in full])
    return with_drops(columns | {"kb": np.round(columns["k"] * columns["b"], 9)})


def seeded(accuracy: Callable[[dict[str, object], np.random.Generator], float], *settings: dict[str, object]) -> Cells:
    """Five seeds of each setting."""
    rng = np.random.default_rng(0)
    rows = [one | {"seed": seed} for seed in range(5) for one in settings]
    return table([row | {"accuracy": accuracy(row, rng)} for row in rows])


def verdicts(text: str, cells: Cells) -> dict[str, str]:
    (claim,) = [claim for claim in CLAIMS if text in claim.text]
    return {one.label: one.verdict for one in claims.measure(claim, cells)}


def test_the_interval_of_a_mean_is_students() -> None:
    from scipy.stats import t

    values = np.random.default_rng(1).normal(size=8)
    found = jackknife_interval(lambda mask: float(values[mask].mean()), np.arange(8))
    low, high = t.interval(0.95, 7, values.mean(), values.std(ddof=1) / 8**0.5)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert mean_interval(values) == pytest.approx((found.value, found.half))
    alone = jackknife_interval(lambda mask: float(values[mask].mean()), np.zeros(8, int))
    assert alone.seeds == 1 and math.isnan(alone.low)


def test_drops_are_from_the_unattacked_cell_of_the_same_seed_and_training() -> None:
    cells = table(
        [
            {"seed": seed, "lr": lr, "b": b, "accuracy": 90.0 + seed + 10 * lr - 100 * b}
            for seed in (0, 1)
            for lr in (0.1, 0.2)
            for b in (0.0, 0.05)
        ]
        + [{"seed": 7, "b": 0.05}]
    )
    assert cells["drop"][:-1] == pytest.approx(100 * cells["b"][:-1])
    assert math.isnan(cells["drop"][-1])  # its unattacked cell is not there


@pytest.mark.parametrize(("cost", "expected"), [(6.0, REPLICATED), (0.0, NOT), (1.5, PARTLY)])
def test_a_tenth_of_a_percent(cost: float, expected: str) -> None:
    points = [{"b": b, "goal": goal} for b in (0.0, 0.001) for goal in statistics.GOALS]
    cells = seeded(lambda row, rng: 90.0 - cost * (row["b"] == 0.001) + rng.normal() * 0.05, *points)
    assert set(verdicts("0.1 %", cells).values()) == {expected}
    if cost == 6.0:
        noisy = seeded(lambda row, rng: 90.0 - cost * (row["b"] == 0.001) + rng.normal() * 8, *points)
        assert set(verdicts("0.1 %", noisy).values()) == {NOISY}


def test_a_claim_is_decided_at_the_learning_rate_chosen_and_told_at_the_others() -> None:
    (source, _) = plan.sources(True, None)
    points = [{"b": b, "goal": g, "lr": lr} for b in (0.0, 0.001) for g in statistics.GOALS for lr in (0.01, 0.3)]
    cells = seeded(lambda row, rng: 90.0 - 6 * (row["b"] > 0) * (row["lr"] == 0.3) + rng.normal() * 0.01, *points)
    lines = findings.findings([findings.RunCells(plan.Run("smallest", source), cells)], {source.name: 0.3})
    decided = {(line.rate, line.primary, line.finding.verdict) for line in lines}
    assert decided == {("0.3", True, REPLICATED), ("0.01", False, NOT)}
    assert len(lines) == 2 * 6  # each measure once at each rate
    only = findings.findings(
        [findings.RunCells(plan.Run("smallest", source), cells.where(lr=0.01))], {source.name: 0.3}
    )
    assert {(line.rate, line.primary) for line in only} == {("0.01", False)}  # a rate of its own is told as that


def test_a_claim_that_chooses_its_rates_is_told_at_each_of_them_too() -> None:
    (source, _) = plan.sources(True, None)
    points = [{"b": b, "goal": "targeted", "optimizer": name} for b in (0.0, 0.5) for name in ("sgd", "adam")]

    def told(rates: tuple[object, ...], chosen: float, preset: str = "fig14", protocol: str = plan.STEP) -> set[object]:
        cells = seeded(lambda row, rng: rng.normal(), *({**one, "lr": lr} for one in points for lr in rates))
        lines = findings.findings([findings.RunCells(plan.Run(preset, source, protocol), cells)], {source.name: chosen})
        assert {line.claim.preset for line in lines} <= {preset} and {line.protocol for line in lines} <= {protocol}
        return {(line.rate, line.primary, line.setting) for line in lines}

    at_each = {("0.1", False, "per step, lr 0.1"), ("0.3", False, "per step, lr 0.3")}
    best = ("the best for each", True, "per step, lr the best for each")
    assert told((0.1, 0.3), 0.1) == {best} | at_each  # two are enough to choose from
    assert told((0.1,), 0.1) == {("0.1", True, "per step, lr 0.1")}
    assert told((0.1,), 0.3) == {("0.1", False, "per step, lr 0.1")}
    assert told(("",), 0.3) == {("0.3", True, "per step, lr 0.3")}  # that of the preset
    assert told(("",), 0.3, protocol=plan.FULL) == {("0.3", False, "full batch, lr 0.3")}
    assert told((0.1, 0.3), 0.3, "fig5") == set()  # two budgets make no trend
    # other sweeps tell about the data sets on which a claim is decided, and of those alone
    cells = seeded(lambda row, rng: rng.normal(), *({**one, "goal": "untargeted", "lr": ""} for one in points))
    larger = findings.RunCells(plan.Run("protocols", source, plan.LARGE), cells)
    ten = findings.RunCells(plan.Run("fig9", source), Cells(cells.columns | {"b": cells["b"] / 10}))
    assert findings.findings([larger], {source.name: 0.2}) == []
    lines = findings.findings([larger, ten], {source.name: 0.2})
    assert {(line.protocol, line.rate, line.primary) for line in lines} == {(plan.STEP, "0.2", True)}
    both = [findings.RunCells(larger.run, Cells(larger.cells.columns | {"b": cells["b"] / 10})), ten]
    lines = findings.findings(both, {source.name: 0.2})
    assert {(one.protocol, one.rate, one.primary) for one in lines} == {
        (plan.STEP, "0.2", True),
        (plan.LARGE, "0.2", False),
    }


def test_the_report_counts_verdicts_by_protocol_in_the_order_of_protocols() -> None:
    (source, _) = plan.sources(True, None)
    points = [{"b": b, "goal": g, "lr": lr} for b in (0.0, 0.001) for g in statistics.GOALS for lr in (0.01, 0.3)]
    cells = seeded(lambda row, rng: 90.0 - 6 * (row["b"] > 0) * (row["lr"] == 0.3) + rng.normal() * 0.01, *points)
    protocols = (plan.EPOCH, plan.CEIL, plan.STEP, plan.FLOOR)
    runs = [findings.RunCells(plan.Run("smallest", source, protocol), cells) for protocol in protocols]
    text = report._extent(findings.findings(runs, {source.name: 0.3}))
    first, *others = text.split("; ")
    assert first == "replicated in 6 of 6 measurements"
    assert others[0] == "other learning rates: 0 of 6"
    names = [one.rpartition(":")[0] for one in others[1:]]
    assert names == [one.removeprefix("per step, ") for one in plan.PROTOCOLS if one in {*protocols} - {plan.STEP}]


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((0.5,), "at least 0.5"),
        ((-math.inf, 55.0), "at most 55"),
        ((3.0, 9.0), "3 to 9"),
        ((3.0, 9.0, 0.5), "3 to 9; partly if surely above 0.5"),
        ((-math.inf, 55.0, 75.0), "at most 55; partly if surely below 75"),
    ],
)
def test_a_criterion_says_its_bounds(bounds: tuple[float, ...], text: str) -> None:
    assert str(Criterion(*bounds)) == text


def test_the_last_iterate_and_the_late_average_are_told_apart() -> None:
    rows = [{"b": b, "goal": goal, "seed": s} for b in (0.0, 0.001) for goal in statistics.GOALS for s in range(5)]
    cells = table([row | {"accuracy": 90.0 - 6000 * row["b"] + 0.01 * row["seed"], "late": 90.0} for row in rows])
    found = verdicts("0.1 %", cells)
    assert found["targeted, last iterate"] == REPLICATED
    assert found["targeted, mean of the last 20 epochs"] == NOT


def test_an_attack_is_told_from_the_noise_of_the_last_step() -> None:
    sure, none, wide = (Evidence(value, error, 19, 20) for value, error in ((5, 0.5), (0, 0.05), (2, 3)))
    assert extensions.cause(sure, sure) == "the attack"
    assert extensions.cause(sure, none) == "the noise of the last step"
    assert extensions.cause(none, none) == "no harm"
    assert extensions.cause(wide, none) == NOISY


def test_equal_budgets_of_larger_and_smaller_write_access() -> None:
    points = [{"k": k, "b": b, "goal": goal} for k in (0.5, 1.0) for b in (0.0, 0.1, 0.2) for goal in statistics.GOALS]
    larger = seeded(lambda row, rng: 90.0 - 5 * row["k"] + rng.normal() * 0.05, *points)
    for found in statistics.pairs(larger, "targeted"):
        assert found == pytest.approx([2.5], abs=0.3)  # 0.5 of 0.2 and 1 of 0.1
    assert set(verdicts("larger k does more harm", larger).values()) == {REPLICATED}
    assert set(verdicts("every pair", larger).values()) == {REPLICATED}
    smaller = seeded(lambda row, rng: 90.0 + 5 * row["k"], *points)
    assert set(verdicts("larger k does more harm", smaller).values()) == {NOT}
    equal = seeded(lambda row, rng: 90.0 + 0.4 * row["k"], *points)
    for cells, share in ((larger, 100.0), (smaller, 0.0), (equal, 50.0)):
        assert statistics.pair_share(cells, "targeted") == pytest.approx([share] * 5)
    assert set(verdicts("every pair", smaller).values()) == {NOT}


def test_the_harm_of_a_larger_k_is_the_mean_over_pairs_of_settings() -> None:
    points = [{"k": k, "b": b, "goal": "targeted"} for k in (0.5, 1.0) for b in (0.1, 0.2, 0.4)]
    loss = {(1.0, 0.1): 4.0, (0.5, 0.2): 1.0, (1.0, 0.2): 9.0, (0.5, 0.4): 2.0}
    cells = seeded(lambda row, _: 90.0 - loss.get((float(str(row["k"])), float(str(row["b"]))), 0.0), *points)
    assert statistics.pair_harm(cells, "targeted") == pytest.approx([(3.0 + 7.0) / 2] * 5)


def test_the_correlation_is_that_of_one_goal() -> None:
    of_goal = {"targeted": 1.0, "untargeted": -1.0}
    cells = table(
        [
            {"b": b, "goal": goal, "seed": seed, "accuracy": 90 - 100 * b, "f1": sign * (90 - 100 * b)}
            for goal, sign in of_goal.items()
            for b in (0.0, 0.1, 0.3)
            for seed in (0, 1)
        ]
    )
    for goal, sign in of_goal.items():
        assert statistics.correlation(cells, goal) == pytest.approx([sign] * 2)


def assert_begins_as_published(section: str, lines: int = 5) -> None:
    """Heading, text and the head of the table are those of the published report."""
    published = (Path(__file__).parents[1] / "docs" / "replication.md").read_text(encoding="utf-8")
    begins = "\n".join(section.split("\n")[:lines])
    assert begins.startswith("## Beyond the paper: ") and f"\n\n{begins}\n" in published


def test_sections_beyond_the_paper_hold_the_drops_of_their_rows() -> None:
    (source, _) = plan.sources(True, None)
    loss = {"untargeted": 10.0, "targeted": 20.0}
    grid_rows = [
        {"goal": goal, "b": b, "rounding": rounding, "seed": seed, "accuracy": 90 - (b > 0) * (loss[goal] + 100 * b)}
        for goal in statistics.GOALS
        for b in (0.0, 0.1, 0.2)
        for rounding in ("carry", "floor")
        for seed in (0, 1, 2)
    ]
    text = extensions.rounding([findings.RunCells(plan.Run("rounding", source), table(grid_rows))])
    assert_begins_as_published(text)
    for goal in statistics.GOALS:
        for b in (0.1, 0.2):
            wanted = f"{loss[goal] + 100 * b:.2f}"
            (row,) = [line for line in text.splitlines() if f"| {goal} | {100 * b:g} % |" in line]
            assert [cell.strip()[: len(wanted)] for cell in row.split("|")[4:6]] == [wanted] * 2  # with either rounding
    exact = [
        row | {"selection": way, "accuracy": row["accuracy"] + (3 if way == "literal" and row["b"] else 0)}  # type: ignore[operator]
        for row in grid_rows
        for way in ("gain", "literal")
        if row["rounding"] == "carry"
    ]
    text = extensions.selection([findings.RunCells(plan.Run("selection", source), table(exact))])
    assert_begins_as_published(text)
    for goal in statistics.GOALS:
        for b in (0.1, 0.2):
            (row,) = [line for line in text.splitlines() if f"| {goal} | {100 * b:g} % |" in line]
            cost = loss[goal] + 100 * b
            wanted = (f"{cost:.2f} [", f"{cost - 3:.2f} [", "3.00 [")  # of either way, and the difference
            assert [one.strip().startswith(start) for one, start in zip(row.split("|")[4:7], wanted, strict=True)] == [
                True
            ] * 3
    now_and_then = [
        {"goal": goal, "every": float(every), "b": b, "seed": seed, "accuracy": 90 - (b > 0) * every * loss[goal]}
        for goal in statistics.GOALS
        for every in (1, 2, 5, 10)
        for b in (0.0, plan.MEAN_SHARE * every)
        for seed in (0, 1, 2)
    ]
    text = extensions.frequency([findings.RunCells(plan.Run("frequency", source), table(now_and_then))])
    assert_begins_as_published(text)
    for goal in statistics.GOALS:
        (row,) = [line for line in text.splitlines() if f"| {goal} |" in line]
        assert [f"{every * loss[goal]:.2f}" in row for every in (1, 2, 5, 10)] == [True] * 4


def test_goals_and_their_spread() -> None:
    points = [{"k": k, "b": b, "goal": goal} for k in (0.5, 1.0) for b in (0.1, 0.9) for goal in statistics.GOALS]
    rng = np.random.default_rng(3)
    noise = {seed: rng.normal() for seed in range(5)}

    def accuracy(row: dict[str, object], _: np.random.Generator) -> float:
        hurt = 10.0 if row["goal"] == "untargeted" and row["b"] == 0.9 else 0.0
        wide = 4.0 * float(row["k"]) if row["goal"] == "untargeted" else 0.1
        return 80.0 - hurt + wide * noise[int(row["seed"])]

    cells = seeded(accuracy, *points)
    values = np.array(list(noise.values()))
    away = np.abs(values - values.mean()).mean() * (np.pi / 2 * 5 / 4) ** 0.5  # a standard deviation, where normal
    assert statistics.absolute_deviation(cells.where(k=1.0), "untargeted").mean() == pytest.approx(4 * away)
    assert statistics.spread_gap(cells.where(k=1.0)).mean() == pytest.approx(3.9 * away)
    assert statistics.gap_growth(cells).mean() == pytest.approx(2 * away)
    assert statistics.large_gap(cells).mean() == pytest.approx(10, abs=abs(4 * values.mean()) + 1e-9)
    assert figures.standard_deviation(cells.where(k=1.0), "untargeted") == pytest.approx(4 * values.std(ddof=1))


def test_differences_pair_values_of_the_same_seed_where_each_side_lost_another() -> None:
    def drops(lost: int, drop: float, **setting: object) -> list[dict[str, object]]:
        """Cells of three seeds, one of them lost to a cell that broke off; what is lost grows with the seed."""
        values = [float("nan") if seed == lost else drop + 10 * seed for seed in range(3)]
        attacked = [{"b": 0.5, "drop": value, "accuracy": 90 - value, "seed": i} for i, value in enumerate(values)]
        honest = [{"b": 0.0, "drop": 0.0, "accuracy": 90.0, "seed": seed} for seed in range(3)]
        return [{"goal": "targeted", "k": 1.0, "lr": 0.1} | setting | row for row in attacked + honest]

    optimizers = table(drops(0, 3.0, optimizer="adam") + drops(2, 1.0, optimizer="sgd"))
    assert statistics.adam_harm(optimizers, "targeted").tolist() == [2.0]
    stopping = table(drops(0, 3.0, patience="20") + drops(2, 1.0, patience="null"))
    assert statistics.amplified(stopping, "targeted").tolist() == [2.0]
    assert len(statistics.mean_drop(stopping.where(patience="null"), "targeted")) == 2


def test_f1_early_stopping_and_adam() -> None:
    budgets = [{"b": b, "goal": goal} for b in (0.0, 0.1, 0.5) for goal in statistics.GOALS]
    cells = seeded(lambda row, rng: 90.0 - 60 * row["b"] + rng.normal(), *budgets)
    same = Cells(cells.columns | {"f1": cells["accuracy"] - 1})
    assert set(verdicts("F1 mirrors", same).values()) == {REPLICATED}
    assert set(verdicts("F1 mirrors", Cells(cells.columns | {"f1": -cells["accuracy"]})).values()) == {NOT}
    stopped = [{**one, "patience": patience} for one in budgets for patience in ("null", "10")]
    worse = seeded(
        lambda row, rng: 90.0 - 20 * row["b"] * (1 + (row["patience"] == "10")) + rng.normal() * 0.05, *stopped
    )
    assert set(verdicts("early stopping", worse).values()) == {REPLICATED}
    exact = seeded(lambda row, rng: 90.0 - 20 * row["b"] * (1 + (row["patience"] == "10")), *stopped)
    assert statistics.amplified(exact, "targeted") == pytest.approx([20 * (0.1 + 0.5) / 2] * 5)
    rates = [{**one, "optimizer": name, "lr": lr} for one in budgets for name in ("sgd", "adam") for lr in (0.1, 0.01)]

    def under_adam(row: dict[str, object], rng: np.random.Generator) -> float:
        honest = 90.0 if row["lr"] == (0.01 if row["optimizer"] == "adam" else 0.1) else 80.0  # the other is no match
        return honest - float(row["b"]) * (160 if row["optimizer"] == "adam" else 20) + rng.normal() * 0.05

    adam = seeded(under_adam, *rates)
    assert set(verdicts("Adam is more", adam).values()) == {REPLICATED}
    assert set(verdicts("Adam goes down", adam).values()) == {REPLICATED}
    assert set(statistics.at_best(adam.where(optimizer="adam"))["lr"]) == {0.01}


def rows_of(file: Path) -> list[tuple[object, ...]]:
    """The rows of a figure's table, with numbers from the third column on."""
    with file.open() as lines:
        _, *rows = csv.reader(lines)
    return [(*row[:2], *map(float, row[2:])) for row in rows]


def test_the_tables_of_figures_hold_means_over_seeds_under_the_names_of_their_lines(tmp_path: Path) -> None:
    points = [{"k": k, "b": b, "goal": goal} for k in (0.5, 1.0) for b in (0.0, 0.2) for goal in statistics.GOALS]
    loss = {"untargeted": 100.0, "targeted": 50.0}
    skew = (0.0, 1.0, 2.0, 3.0, 14.0)  # the mean is 4, the median 2

    def accuracy(row: dict[str, object], _: np.random.Generator) -> float:
        return 80 - loss[str(row["goal"])] * float(row["k"]) * float(row["b"]) + skew[int(row["seed"])]  # type: ignore[arg-type, call-overload]

    cells = seeded(accuracy, *points)
    half = 2.776445 * np.std(skew, ddof=1) / 5**0.5
    figures.by_budget(tmp_path / "a.csv", cells, "a title")
    expected = [
        (goal, f"k = {k:g}", k * b, 84 - loss[goal] * k * b, pytest.approx(half, rel=1e-4))
        for goal in statistics.GOALS
        for k in (0.5, 1.0)
        for b in (0.0, 0.2)
    ]
    assert sorted(rows_of(tmp_path / "a.csv")) == sorted(expected, key=lambda row: row[:4])
    figures.deviation(tmp_path / "b.csv", cells, "a title")
    assert [row[:4] for row in rows_of(tmp_path / "b.csv")] == [
        ("", goal, k, pytest.approx(np.std(skew, ddof=1), rel=1e-4)) for k in (0.5, 1.0) for goal in statistics.GOALS
    ]
    whole = cells.where(k=1.0)
    figures.compared("selection")(tmp_path / "c.csv", whole, "a title")
    drops = {row[0]: row[3] for row in rows_of(tmp_path / "c.csv") if row[2] == 0.2}
    assert drops == {goal: pytest.approx(loss[goal] * 0.2) for goal in statistics.GOALS}


def test_early_stopping_optimizers_and_frequencies_are_lines_of_their_names(tmp_path: Path) -> None:
    lower = {("null", "sgd"): 0.0, ("10", "sgd"): 5.0, ("null", "adam"): 20.0}
    points = [{"b": b, "patience": p, "optimizer": o} for b in (0.0, 0.2) for p, o in lower]
    cells = seeded(
        lambda row, rng: 90.0 - lower[str(row["patience"]), str(row["optimizer"])] * (row["b"] == 0.2), *points
    )
    figures.stopped(tmp_path / "a.csv", cells.where(optimizer="sgd"), "a title")
    found = {row[1]: row[3] for row in rows_of(tmp_path / "a.csv") if row[2] == 0.2}
    assert found == {"last model, lr 0.1": 90, "stopped early, lr 0.1": 85}
    figures.optimizers(tmp_path / "b.csv", cells.where(patience="null"), "a title")
    found = {row[1]: row[3] for row in rows_of(tmp_path / "b.csv") if row[2] == 0.2}
    assert found == {"sgd, lr 0.1": 90, "adam, lr 0.1": 70}
    often = [{"b": 0.0}, {"b": 0.05, "every": 1.0}, {"b": 0.1, "every": 2.0}]
    few = seeded(lambda row, rng: 90.0 - 3 * (row["b"] == 0.05) - 7 * (row["b"] == 0.1), *often)
    figures.frequencies(tmp_path / "c.csv", few, "a title")
    assert [row[1:4] for row in rows_of(tmp_path / "c.csv")] == [("5 % a round", 1, 3), ("5 % a round", 2, 7)]


def test_ten_classes() -> None:
    points = [{"b": b, "goal": goal} for b in (0.0, 0.05) for goal in statistics.GOALS]
    cells = seeded(lambda row, rng: 90.0 - 14 * (row["b"] > 0) + rng.normal() * 0.1, *points)
    assert set(verdicts("ten classes", cells).values()) == {REPLICATED}
    assert verdicts("monotonically", cells.where(goal="none")) == {}  # nothing to go by


@pytest.mark.parametrize(
    "run", RUNS, ids=lambda run: f"{run.preset}-{run.source.name}-{run.protocol}-{len(run.overrides)}"
)
def test_every_run_composes_with_its_unattacked_twins(run: plan.Run) -> None:
    run = run if run.batch == "full" else replace(run, batch=32)
    swept = plan.cells(run, 3, 0.01)
    batches = 1 if run.batch == "full" else -(-plan.samples(run.source) // 32)
    epochs = {plan.MLP: 20, plan.CNN: 2}.get(run.protocol, 3)
    assert {cell.settings.rounds for cell in swept} == {epochs * batches}
    assert len({cell.settings.model_dump_json() for cell in swept}) == len(swept)
    full = run.protocol in (plan.FULL, plan.PERSIST) and run.preset == "smallest"  # has no randomness
    assert len({cell.settings.seed for cell in swept}) >= (2 if full else 5)
    budgets = {cell.settings.attack.budget for cell in swept}
    if run.preset not in ("honest", "noise", "fig6", "fig7", "fig8", "fig11"):
        assert 0.0 in budgets and len(budgets) > 1
    assert {cell.settings.attack.rounding for cell in swept} <= {"carry", "floor", "ceil"}
    network = {plan.MLP: "mlp", plan.CNN: "cnn"}.get(run.protocol, "logistic")
    assert {cell.settings.model.name for cell in swept} == {network}


def test_attacks_now_and_then_are_compared_at_equal_flips_in_all() -> None:
    (source, _) = plan.sources(True, None)
    attacks = [cell.settings.attack for cell in plan.cells(plan.Run("frequency", source, batch=32), 2, 0.1)]
    share = {(threat.every, round(threat.budget / threat.every, 9)) for threat in attacks if threat.budget}
    assert share == {(every, plan.MEAN_SHARE) for every in (1, 2, 5, 10)}


def test_learning_rates_are_the_chosen_one_those_of_the_run_or_of_the_preset() -> None:
    (source, _) = plan.sources(True, None)

    def rates(**how: object) -> set[float]:
        run = plan.Run("fig14", source, batch=32, **how)  # type: ignore[arg-type]
        return {cell.settings.lr for cell in plan.cells(run, 2, 0.3)}

    assert rates() == {0.3}
    assert rates(rates=(0.001, 0.3)) == {0.001, 0.3}
    assert rates(rates=None) == {0.001, 0.01, 0.1}
    assert rates(rates=None, overrides=("lr=1",)) == {1}


def test_the_question_of_a_tenth_of_a_percent_gets_twenty_seeds_and_adam_as_many_rates_as_sgd() -> None:
    source = plan.PaperDataset("cifar10_plane_auto", "x", True, ("dataset=digits_01",))
    runs = [replace(run, batch=32) for run in plan._whole(source) if run.protocol == plan.STEP]
    asked = next(run for run in runs if run.preset == "smallest")
    assert {cell.settings.seed for cell in plan.cells(asked, 2, 0.3)} == set(range(20))
    (adam,) = [run for run in runs if run.preset == "fig14"]
    tried: dict[str, set[float]] = {}
    swept = plan.cells(replace(adam, overrides=(*adam.overrides, "seed=0")), 2, 0.3)
    for cell in swept:
        tried.setdefault(cell.settings.server_optimizer, set()).add(cell.settings.lr)
        assert cell.settings.early_stop.held_out > 0
    assert tried["adam"] == tried["sgd"] and len(tried["sgd"]) >= 5
    assert max(cell.settings.attack.budget for cell in swept) == 1


def test_full_batches_of_pictures_are_at_a_rate_at_which_they_do_not_diverge() -> None:
    for name, rates in {"cifar10_plane_auto": {0.01, 0.1}, "mnist_01": {0.1, 1.0}}.items():
        source = plan.PaperDataset(name, name, True, ("dataset=digits_01",))
        whole = [run for run in plan._whole(source) if run.protocol == plan.FULL]
        assert {cell.settings.lr for run in whole for cell in plan.cells(run, 2, 0.3)} == rates


def test_each_network_is_replicated_at_its_learning_rate() -> None:
    source = plan.PaperDataset("mnist", "mnist", False, ("dataset=digits",))
    for protocol, model, epochs in ((plan.MLP, "mlp", 20), (plan.CNN, "cnn", 2)):
        (run,) = [run for run in plan._whole(source) if run.protocol == protocol]
        found = [cell.settings for cell in plan.cells(replace(run, batch=32), 2, 0.3)]
        assert {(one.model.name, one.lr) for one in found} == {(model, 0.1)}
        rounds = epochs * math.ceil(1437 * 0.9 / 32)  # about; a tenth may be held out
        assert all(0.8 * rounds <= one.rounds <= 1.3 * rounds for one in found)


def test_figures_of_one_grid_are_one_sweep(tmp_path: Path) -> None:
    (source, _) = plan.sources(True, None)
    places = {
        plan.folder_of(tmp_path, plan.cells(plan.Run(name, source, batch=32), 2, 0.1)) for name in ("fig6", "fig8")
    }
    assert len(places) == 1 and {place.parent for place in places} == {tmp_path / "runs"}
    other = plan.folder_of(tmp_path, plan.cells(plan.Run("fig8", source, batch=32), 3, 0.1))
    assert other not in places  # a changed parameter is never answered with an old result


def test_the_learning_rate_is_that_of_the_lowest_validation_loss_and_ties_are_told() -> None:
    loss = {0.1: 0.30, 0.2: 0.20, 0.3: 0.201, 1.0: 0.4}
    rng = np.random.default_rng(0)
    rows = [
        {"lr": lr, "seed": seed, "validation": value + 0.01 * rng.normal(), "accuracy": 99.0 * lr}
        for lr, value in loss.items()
        for seed in range(6)
    ]
    cells = table(rows)
    assert plan.best_rate(cells) in (0.2, 0.3)  # not that of the best test accuracy
    assert set(plan.tied_rates(cells)) == {0.2, 0.3}
    assert plan.extension(cells) is None
    few = cells.only(cells["lr"] <= 0.2)
    assert plan.best_rate(few) == 0.2 and plan.extension(few) == pytest.approx(0.7)
    many = cells.only((cells["lr"] >= 0.2) & (cells["lr"] != 0.3))
    assert plan.extension(many) == pytest.approx(0.07)
    adam = Cells(cells.columns | {"b": np.zeros(len(cells))})
    assert set(statistics.at_best(adam)["lr"]) == {plan.best_rate(cells)}


def tiny(source: plan.PaperDataset) -> list[plan.Run]:
    """Every kind of run, as small as it can be."""
    few = {"honest": ("lr=0.1,0.3",), "noise": ("lr=0.1,0.3",)}
    maps = ("clients.malicious=5,10", "attack.budget=0.1,0.5,1")
    runs = []
    for run in plan._quick(source):
        more = few.get(run.preset, ())
        if run.preset in ("fig6", "fig7", "fig8", "fig11"):
            more = maps
        elif run.preset in ("fig5", "fig9", "protocols") and run.epochs is None:
            more = ("clients.malicious=5,10", "attack.budget=0,0.001,0.05,0.25,0.5")
        rates = run.rates and ()  # at the learning rate chosen alone
        runs.append(replace(run, overrides=(*run.overrides, *more, "seed=0,1"), rates=rates, epochs=run.epochs and 1))
    return runs


@pytest.mark.slow
def test_the_pipeline_leaves_figures_tables_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(quick: bool, only: str | None, root: Path | None) -> plan.ReplicationPlan:
        chosen = plan.sources(True, None)
        return plan.ReplicationPlan(chosen, tuple(run for source in chosen for run in tiny(source)), 2, 32, True)

    monkeypatch.setattr(plan, "make", small)
    monkeypatch.setattr(gradients, "RANDOM_SETS", 20)
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    assert replicate.main(arguments) == 0
    stderr = capsys.readouterr()
    assert "replicate: 100 % of" in stderr.err
    assert "Under which protocol?" in stderr.out and "What holds and what does not" in stderr.out
    out = tmp_path / "out"
    for name in (*figures.FIGURES, "fig1"):
        stem = f"{name}-digits" if name == "fig9" else f"{name}-digits_01"
        for suffix in ("png", "pdf", "csv"):
            assert (out / "figures" / f"{stem}.{suffix}").stat().st_size, (name, suffix)
    text = (out / "REPLICATION.md").read_text()
    with (out / "claims.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for claim in CLAIMS:
        assert f"## Figure {claim.figure}: {claim.text}" in text
        assert [row for row in rows if row["claim"] == claim.text and row["primary"] == "1"]
    assert {row["protocol"] for row in rows} == set(plan.PROTOCOLS)
    assert {row["verdict"] for row in rows} <= {REPLICATED, PARTLY, NOT, NOISY}
    for piece in (
        "0.1 % of the labels, or the noise of the last step?",
        "the exact selection",
        "how often to attack",
        "budgets of less than a flip",
        "what a single run loses by chance",
    ):
        assert f"## Beyond the paper: {piece}" in text
    published = (tmp_path / "docs" / "replication.md").read_text()
    assert "(figures/" not in published and "(replication/fig8-digits_01.png)" in published
    assert (tmp_path / "docs" / "replication" / "fig8-digits_01.png").exists()

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(multirun, "tabulate_together", never)
    assert replicate.main(arguments) == 0  # all of it is there


def test_what_a_data_set_took_adds_up_and_its_loss_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "seconds"
    with plan.timed(file, lambda: False):
        pass
    assert plan.seconds_taken(file) == []
    interrupted = plan.timed(file, lambda: True)
    interrupted.__enter__()
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with plan.timed(file, lambda: True):
        pass
    first, second = plan.seconds_taken(file)
    assert 0 <= first < 1 and 0 <= second < 1
    file.write_bytes(b"12 \xff")
    assert plan.seconds_taken(file) == []


def test_sweeps_computed_together_are_those_computed_alone(tmp_path: Path) -> None:
    (source, _) = plan.sources(True, None)
    grids = {}
    for preset in ("fig5", "rounding", "selection"):
        run = plan.Run(preset, source, overrides=("attack.budget=0,0.05", "seed=0,1"), batch=32)
        swept = plan.cells(run, 2, 0.1)
        grids[plan.folder_of(tmp_path, swept)] = swept
    with multirun.Progress(sum(map(len, grids.values()))) as progress:
        plan.compute(tmp_path, grids, progress)
        assert progress.done == pytest.approx(progress.total)
    assert not plan.lacking(grids)
    assert not list(tmp_path.glob("runs/*.units"))
    for place, swept in grids.items():
        alone = multirun.tabulate(
            [multirun.Cell(one.overrides, one.settings.model_copy(update={"out": f"{place}-alone"})) for one in swept]
        )
        together, apart = read(place), read(alone)
        for name in ("k", "b", "goal", "seed", "accuracy", "late", "f1", "drop"):
            np.testing.assert_array_equal(together[name], apart[name])


def test_an_archive_of_images_is_unpacked_once_and_a_damaged_one_told(tmp_path: Path) -> None:
    from PIL import Image

    for part, count in (("train", 12), ("test", 4)):
        for name in ("airplane", "automobile"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i, 40 * (name == "airplane"), 0)).save(tmp_path / part / name / f"{i}.jpg")
    with tarfile.open(tmp_path / plan.ARCHIVE, "w") as tar:
        tar.add(tmp_path / "train", "train")
        tar.add(tmp_path / "test", "test")
    place = plan._unpacked_archive(tmp_path / plan.ARCHIVE)
    assert plan._unpacked_archive(tmp_path / plan.ARCHIVE) == place
    chosen = "dataset.classes=[airplane,automobile]"
    source = plan.PaperDataset("x", "x", True, ("dataset=image_folder", f"dataset.path={plan._quoted(place)}", chosen))
    assert plan.samples(source) == 24
    (tmp_path / plan.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(InputError, match="can't be unpacked"):
        plan._unpacked_archive(tmp_path / plan.ARCHIVE)


@pytest.mark.slow
def test_an_interrupted_replication_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = plan.make
    monkeypatch.setattr(plan, "make", lambda quick, only, root: replace(whole(quick, only, root), epochs=1))
    original, calls = multirun.tabulate_together, []

    def stops(grids: list[list[multirun.Cell]], kept: Path, progress: multirun.Progress) -> None:
        calls.append(sum(map(len, grids)))
        if calls[-1] == 80 and calls.count(80) == 1:
            raise KeyboardInterrupt
        original(grids, kept, progress)

    monkeypatch.setattr(multirun, "tabulate_together", stops)
    arguments = ["--quick", "--only", "rounding", "--out", str(tmp_path / "out")]
    assert replicate.main(arguments) == 130
    assert "goes on" in capsys.readouterr().err
    assert replicate.main([*arguments, "--so-far"]) == 0
    assert "*Not run yet: digits 0/1: 1 of 2 sweeps.*" in capsys.readouterr().out
    assert replicate.main(arguments) == 0
    assert calls[0] == 30 and calls[-2:] == [80, 80]  # the first sweep is not computed again
    assert set(calls[1:-2]) <= {5}  # nor are the learning rates beyond its grid
    assert "minutes in 2 calls (digits 0/1 " in (tmp_path / "out" / "REPLICATION.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fig99"], "--only fig99 is not a figure; known: fig1, "),
        (["--data", "nowhere"], "nowhere/MNIST"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert replicate.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("replicate: ") and message in line and line.count("\n") == 1


@pytest.mark.parametrize(("options", "folder"), [([], "replication"), (["--quick"], "replication-quick")])
def test_results_go_to_a_folder_of_their_kind(
    options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_attack.replication import pipeline

    places: list[Path] = []

    def run(out: Path, *_: object) -> Path:
        places.append(out)
        (tmp_path / "REPORT.md").write_text("a report")
        return tmp_path / "REPORT.md"

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(plan, "make", lambda *_: None)
    assert replicate.main(options) == 0
    assert places == [Path("outputs") / folder]
    published: list[tuple[Path, Path]] = []
    monkeypatch.setattr(report, "publish", lambda *where: published.append(where))
    assert replicate.main([*options, "--out", "o"]) == 0 and not published
    assert replicate.main([*options, "--out", "o", "--docs", "d"]) == 0
    assert published == [(Path("o"), Path("d"))] and places[1:] == [Path("o")] * 2


def test_greedy_flips_are_the_farthest_of_those_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    (source, _) = plan.sources(True, None)
    settings = [gradients._settings((*source.overrides, "lr=0.1"), 5, 0.5, goal) for goal in statistics.GOALS]
    swept = dict(zip(statistics.GOALS, engine.make_scenarios(settings), strict=True))
    import torch

    theta = swept["untargeted"].start() + 0.01 * torch.arange(65)
    found = gradients.points(swept, theta, 3, draws=200)
    along = {kind: [x for name, x, _ in found if name == kind] for kind, _, _ in found}
    assert along["clean"] == pytest.approx([1.0])
    assert along["greedy, untargeted"][0] <= min(along["random flips"]) + 1e-12
    across = {kind: y for kind, _, y in found}
    assert across["greedy, targeted"] > 0
    # the principal direction among the samples is that among all features
    monkeypatch.setattr(torch.linalg, "qr", lambda a: SimpleNamespace(Q=torch.eye(len(a), dtype=a.dtype)))
    whole = gradients.points(swept, theta, 3, draws=200)
    assert [y for _, _, y in found] == pytest.approx([y for _, _, y in whole], abs=1e-9)


def test_a_grid_from_python_is_that_of_the_command_line() -> None:
    cells = grid("experiment=fig8", "clients.malicious=1,2", "attack.budget=0.5", "seed=3", "out=unused")
    assert [cell.overrides["clients.malicious"] for cell in cells] == ["1", "1", "2", "2"]
    assert {cell.settings.attack.goal for cell in cells} == set(statistics.GOALS)
    with pytest.raises(InputError, match="ou is not a known key"):
        grid("experiment=fig8", "ou=unused")


def test_cells_of_a_sweep_have_late_averages(tmp_path: Path) -> None:
    swept = grid(
        "experiment=fig8", "clients.malicious=5", "attack.budget=0,0.5", "seed=0,1", "rounds=30", "eval_every=1",
        "batch_size=32", f"out={tmp_path}/out",
    )  # fmt: skip
    cells = read(multirun.tabulate(swept))
    with np.load(tmp_path / "out" / "curves.npz") as stored:
        curves = 100 * stored["accuracy"]
    assert cells["late"] == pytest.approx(curves[:, -20:].mean(1))
    assert cells["accuracy"] == pytest.approx(curves[:, -1])
    assert LEAST_EFFECT > 0 and (report.REPORT, report.TABLE) == ("REPLICATION.md", "claims.csv")


# --- the published replication ---------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = {  # the data sets by the title that the published report has for them
    "MNIST 0/1": plan.PaperDataset("mnist_01", "MNIST 0/1", True, ()),
    "CIFAR-10 (JPEG copies), airplane/automobile": plan.PaperDataset(
        "cifar10_plane_auto", "CIFAR-10 (JPEG copies), airplane/automobile", True, ()
    ),
    "MNIST, 10 classes": plan.PaperDataset("mnist", "MNIST, 10 classes", False, ()),
    "CIFAR-10 (JPEG copies), 10 classes": plan.PaperDataset("cifar10", "CIFAR-10 (JPEG copies), 10 classes", False, ()),
}


@pytest.fixture(scope="module")
def rows_published() -> list[dict[str, str]]:
    """The rows of the published `claims.csv`."""
    with (DOCS / "replication" / "claims.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def lines_published(rows_published: list[dict[str, str]]) -> list[findings.Line]:
    """The findings that the published table holds; an interval's degrees of freedom are not in it."""
    from scipy.special import stdtrit

    by_text = {(claim.figure, claim.text): claim for claim in CLAIMS}
    lines = []
    for row in rows_published:
        value, low, high = (float(row[name]) for name in ("value", "low", "high"))
        found = Evidence(value, (high - low) / 2 / stdtrit(9, 0.975), 9, int(row["seeds"]))
        finding = claims.Finding(row["measure"], found, row["verdict"])
        claim, source = by_text[row["figure"], row["claim"]], PUBLISHED[row["data"]]
        lines.append(findings.Line(claim, source, row["protocol"], row["lr"], row["primary"] == "1", finding))
    return lines


def in_words_and_numbers(text: str) -> tuple[str, list[float]]:
    """A text with its decimal fractions taken out, and these, which come from a table of six digits: rounded twice."""
    fraction = r"\N{MINUS SIGN}?\d+\.\d+\b"
    found = [float(one.replace("\N{MINUS SIGN}", "-")) for one in re.findall(fraction, text)]
    return re.sub(fraction, "#", text), found


def test_the_published_table_is_of_the_claims_as_they_are(rows_published: list[dict[str, str]]) -> None:
    of_claim = {
        (claim.figure, claim.text): (claim.paper, claim.quantity, str(claim.criterion), set(claim.measures))
        for claim in CLAIMS
    }
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows_published:
        key = row["figure"], row["claim"]
        assert (row["paper"], row["quantity"], row["rule"]) == of_claim[key][:3]
        found.setdefault(key, set()).add(row["measure"])
    assert found == {key: parts[3] for key, parts in of_claim.items()}
    assert [*found] == [*of_claim]
    chooses = {row["claim"] for row in rows_published if row["lr"] == "the best for each"}
    assert chooses == {claim.text for claim in CLAIMS if claim.own_rate}


def test_the_published_report_says_what_its_table_holds(lines_published: list[findings.Line]) -> None:
    published = (DOCS / "replication.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"\n\n(?=## )", published.rstrip("\n"))
    by_title = {section.split("\n")[0]: section for section in sections}
    for claim in CLAIMS:
        words, numbers = in_words_and_numbers(by_title[f"## Figure {claim.figure}: {claim.text}"])
        section = in_words_and_numbers(report._claim(claim, lines_published))
        assert section == (words, pytest.approx(numbers, abs=0.0101))
    first = report._first_page([], lines_published, whole_plan(), []).split("\n")
    wanted = by_title["## Under which protocol?"].split("\n\n**Under which reading")[0].split("\n")
    (chance,) = [line for line in wanted if "**By chance**" in line]  # of other runs
    wanted.remove(chance)
    words, numbers = in_words_and_numbers(re.sub(r"^\d+\. ", "", "\n".join(wanted), flags=re.MULTILINE))
    page = in_words_and_numbers(re.sub(r"^\d+\. ", "", "\n".join(first), flags=re.MULTILINE))
    assert page == (words, pytest.approx(numbers, abs=0.101))
    assert [line.partition(".")[0] for line in first[2:]] == [str(number) for number in range(1, len(first) - 1)]
    assert by_title["## What holds and what does not"] == report._by_figure(lines_published)
    method = by_title["## How it was done"]
    assert "\n".join(report._protocols(whole_plan())) in method
    assert report._rules_of_verdicts().replace("(claims.csv)", "(replication/claims.csv)") in method
    assert method.endswith("\n\n" + report._method(whole_plan(), findings.ReplicationRecord(), "").split("\n\n")[-1])
    stems = re.findall(r"\(\[table\]\(replication/(.*)\.csv\)\)", by_title["## Figures"])
    assert report._figures(stems, whole_plan()).replace("](figures/", "](replication/") == by_title["## Figures"]
    assert {stem.partition("-")[0] for stem in stems} == {"fig1", *figures.FIGURES}


def whole_plan() -> plan.ReplicationPlan:
    """The plan of the published replication, without its runs."""
    return plan.ReplicationPlan(tuple(PUBLISHED.values()), (), plan.EPOCHS, 128, quick=False)


def test_what_is_planned_is_what_was_published(rows_published: list[dict[str, str]]) -> None:
    own_rate = "the best for each"
    decisive = [row for row in rows_published if row["primary"] == "1" and row["lr"] != own_rate]
    chosen = {row["data"]: float(row["lr"]) for row in decisive}
    for title, source in PUBLISHED.items():
        runs = list(plan._whole(source))
        assert runs[0].preset == "honest"
        for claim in CLAIMS:
            expected = set()
            for run in runs:
                if run.preset == claim.preset or (
                    any(claim.preset == one.preset for one in runs) and (run.preset in claim.others)
                ):
                    swept = [one.removeprefix("lr=").split(",") for one in run.overrides if one.startswith("lr=")]
                    rates = {float(rate) for of_run in swept for rate in of_run}
                    rates |= set() if run.rates is None else {*run.rates, chosen[title]}
                    expected |= {(run.protocol, rate) for rate in rates}
            rows = [row for row in rows_published if (row["data"], row["claim"]) == (title, claim.text)]
            assert {(row["protocol"], float(row["lr"])) for row in rows if row["lr"] != own_rate} == expected


@pytest.mark.parametrize(
    ("stem", "columns"),
    [
        ("fig9-mnist", ("goal", "k", "global_budget")),
        ("fig9-cifar10", ("goal", "k", "global_budget")),
        ("fig14-mnist", ("goal", "global_budget")),
        ("fig14-mnist_01", ("goal", "global_budget")),
        ("selection-cifar10_plane_auto", ("goal", "selection", "global_budget")),
    ],
)
def test_what_is_planned_for_a_figure_is_what_it_shows(stem: str, columns: tuple[str, ...]) -> None:
    preset, _, name = stem.partition("-")
    with (DOCS / "replication" / f"{stem}.csv").open(encoding="utf-8") as stream:
        shown = {tuple(row[column] for column in columns) for row in csv.DictReader(stream)}
    kind = "dataset=digits_01" if name in ("mnist_01", "cifar10_plane_auto") else "dataset=digits"
    source = plan.PaperDataset(name, name, kind == "dataset=digits_01", (kind,))
    (run,) = [one for one in plan._whole(source) if (one.preset, one.protocol) == (preset, plan.STEP)]
    planned = set()
    rates = ("lr=0.1",)  # of one rate and one seed as of all
    for cell in plan.cells(replace(run, overrides=(*run.overrides, "seed=0", *rates), rates=None), 2, None):
        threat, k = cell.settings.attack, cell.settings.clients.malicious / cell.settings.clients.total
        values = {"goal": threat.goal, "k": f"k = {k:g}", "selection": threat.selection}
        planned.add(tuple((values | {"global_budget": f"{k * threat.budget:.6g}"})[column] for column in columns))
    assert planned == shown


def test_all_points_of_figure_5_are_planned() -> None:
    with (DOCS / "replication" / "fig5-mnist_01.csv").open(encoding="utf-8") as stream:
        shown = {(row["k"], row["global_budget"]) for row in csv.DictReader(stream)}
    (run,) = [one for one in plan._whole(PUBLISHED["MNIST 0/1"]) if one.preset == "fig5"]
    swept = dict(one.split("=") for one in run.overrides)
    shares = [float(number) / 10 for number in swept["clients.malicious"].split(",")]
    budgets = [float(budget) for budget in swept["attack.budget"].split(",")]
    assert {(f"k = {k:g}", f"{k * b:.6g}") for k in shares for b in budgets} == shown
    assert swept["seed"] == "range(10)"


# --- the report of records made by hand --------------------------------------------------------------


def table_below(text: str, heading: str) -> list[list[str]]:
    """The rows, with the head, of the first table below a line of Markdown that holds some words."""
    lines = text.split("\n")
    (at, *_) = [number for number, line in enumerate(lines) if heading in line]
    start = next(number for number in range(at, len(lines)) if lines[number].startswith("|"))
    stop = next((number for number in range(start, len(lines)) if not lines[number].startswith("|")), len(lines))
    assert set(lines[start + 1]) == {"|", "-"} and lines[start + 1].count("|") == lines[start].count("|")
    return [[cell.strip() for cell in lines[row][1:-1].split("|")] for row in (start, *range(start + 2, stop))]


def smallest(lost: dict[str, float], lr: float, budgets: tuple[float, ...] = (0.0, 0.001), **more: object) -> Cells:
    """Four seeds that lose so many points by 0.1 %, late seven tenths of them and at the least twice as many."""
    rows = []
    for goal, points in lost.items():
        for b in budgets:
            for seed in range(4):
                cost = points * (b > 0)
                measures = {"accuracy": 80 + 2 * seed - cost, "late": 90 + seed - 0.7 * cost, "minimum": 70 - 2 * cost}
                rows.append({"b": b, "goal": goal, "seed": seed, "lr": lr, "effective": b, **measures, **more})
    return table(rows)


def test_a_report_of_known_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = plan.PaperDataset("one", "One", True, ()), plan.PaperDataset("two", "Two (JPEG copies)", False, ())
    Done, Run = findings.RunCells, plan.Run
    honest = table(
        [
            {"seed": seed, "lr": lr, "accuracy": accuracy + seed}
            for lr, accuracy in ((0.1, 80.0), (0.3, 85.0), (1.0, 84.0))
            for seed in (0, 1)
        ]
    )
    cost = smallest({"untargeted": 6.0, "targeted": 0.0}, 0.3)
    later = smallest({"untargeted": 20.0, "targeted": 12.0}, 0.1)
    larger = table([{"b": b, "seed": seed, "accuracy": 77.0 - 70 * b} for b in (0.0, 0.5) for seed in (0, 1)])
    chance = {
        batch: table([{"seed": seed, "lr": 0.1, "accuracy": value} for seed, value in enumerate(ends)])
        for batch, ends in {16: (80.0, 74.0, 90.0, 85.9), 64: (80.0, 80.0, 82.0, 82.0)}.items()
    }
    wide = table([{"seed": seed, "lr": 3.0, "accuracy": 50.0 + 10 * seed} for seed in (0, 1)])
    runs = [
        (Run("honest", one), honest),
        (Run("honest", other), honest.only(honest["lr"] < 0.5)),
        (Run("smallest", one, plan.PERSIST), later),
        (Run("smallest", one), cost),
        (Run("protocols", one, plan.LARGE), larger),
        (Run("protocols", one, plan.EPOCH), Cells(larger.columns | {"accuracy": larger["accuracy"] - 30})),
        *((Run("noise", one, batch=batch), cells) for batch, cells in chance.items()),
        (Run("noise", other, batch=64), wide),
        (Run("fig6", one), cost),  # the same sweep as of another figure
    ]
    record = findings.ReplicationRecord(
        results=[Done(*parts) for parts in runs],
        rates={"one": 0.3, "two": 0.1},
        tied={"one": [0.3, 1.0]},
        figures=["fig1-one", "fig6-one", "noise-two"],
        missing=[Run("fig8", other), Run("fig9", other)],
        seconds={"One": [60.0, 30.0], "Two (JPEG copies)": [6.0], "Three": []},
    )
    monkeypatch.setattr(report, "_gigaflops", lambda: 123.4)
    monkeypatch.setattr(report.os, "cpu_count", lambda: 7)
    planned = (*(run for run, _ in runs), *record.missing)
    todo = plan.ReplicationPlan((one, other), planned, 50, 64, quick=True)
    file = report.write(tmp_path, todo, record, "the command")
    text = file.read_text(encoding="utf-8")
    assert file == tmp_path / "REPLICATION.md" and text.endswith("\n") and not text.endswith("\n\n")
    assert text.startswith("# Replication of *Approaching the Harm of Gradient Attacks")
    # what was not run, and what was
    assert "\n*Not run yet: Two (JPEG copies): 2 of 4 sweeps.*\n" in text
    assert "\n*A quick run on small bundled digits: it shows that the pipeline works, " in text
    cells = sum(len({id(some): some for _, some in runs}[key]) for key in {id(some) for _, some in runs})
    assert f"`the command`: {len(runs) - 1} sweeps, {cells} experiments, 1.6 minutes in 2 calls " in text
    assert "(One 1.5, Two (JPEG copies) 0.1) on 7 processors that together make 123 Gflop/s" in text
    assert "Each experiment: 50 epochs of logistic regression" in text and "minibatches of 64" in text
    assert "CIFAR-10 is a copy as JPEG files" in text and "Where an experiment is dear" not in text
    # learning rates: half an interval of two values that differ by 1 is 12.7062 times a half
    assert table_below(text, "Test accuracy at each") == [
        ["", "lr 0.1", "lr 0.3", "lr 1"],
        ["One", "80.50 ± 6.35", "**85.50 ± 6.35**", "*84.50 ± 6.35*"],
        ["Two (JPEG copies)", "**80.50 ± 6.35**", "85.50 ± 6.35", ""],
    ]
    assert "\nNor is the batch size. " in text and "come, at these rates, to One 77.00 ± 0.00.\n" in text
    # 0.1 % of the labels
    of_reading = [
        (plan.STEP, "untargeted", "0.3", "**6.00 [6.00, 6.00]**", "**4.20 [4.20, 4.20]**", "12.00 [12.00, 12.00]"),
        (plan.STEP, "targeted", "0.3", *["0.00 [0.00, 0.00]"] * 3),
        (plan.PERSIST, "untargeted", "0.1", "20.00 [20.00, 20.00]", "14.00 [14.00, 14.00]", "40.00 [40.00, 40.00]"),
        (plan.PERSIST, "targeted", "0.1", "12.00 [12.00, 12.00]", "**8.40 [8.40, 8.40]**", "24.00 [24.00, 24.00]"),
    ]
    head, *rows = table_below(text, "**Under which reading do 0.1 % of the labels cost 6 points?**")
    assert head == [
        *("Reading", "Data", "Attack", "lr", "Labels flipped", "Last iterate", "Last 20 epochs", "Least", "Seeds")
    ]
    assert rows == [[row[0], "One", *row[1:3], "0.1 %", *row[3:], "4"] for row in of_reading]
    of_lines = "0.1 % of the labels a round cost 6 points"
    head, *rows = table_below(text, f"## Figure 5: {of_lines}")
    assert head == ["Data", "Attack", "Protocol", "Ours, 95 %", "Seeds", ""]
    assert ["One", "untargeted, last iterate", "per step, lr 0.3", "6.00 [6.00, 6.00]", "4", "**replicated**"] in rows
    assert len(rows) == 6
    head, *rows = table_below(
        text, "<details><summary>Other protocols and learning rates (replicated in 2, partly in 1"
    )
    assert head == ["Data", "Attack", "Protocol", "Ours, 95 %", "Seeds", ""]
    assert [row[1:] for row in rows if row[1] == "targeted, least over epochs"] == [
        ["targeted, least over epochs", "full batch, flips stay, lr 0.1", "24.00 [24.00, 24.00]", "4", "partly"]
    ]
    assert (
        "- Figure 5. 0.1 % of the labels a round cost 6 points: **partly** (replicated in 2, partly in 1, not " in text
    )
    # beyond the paper
    assert table_below(text, "0.1 % of the labels, or the noise of the last step?") == [
        ["Data", "lr", "Seeds", "Attack", "sd, last", "sd, late", "Drop, last", "Drop, late", "What it is"],
        ["One", "0.3", "4", "untargeted", "2.58", "1.29", "6.00 [6.00, 6.00]", "4.20 [4.20, 4.20]", "the attack"],
        ["One", "0.3", "4", "targeted", "", "", "0.00 [0.00, 0.00]", "0.00 [0.00, 0.00]", "no harm"],
    ]
    assert table_below(text, "what a single run loses by chance") == [
        ["Data", "lr", "batches of 16", "batches of 64"],
        ["One", "0.1", "6.98; 33 %", "1.15; 0 %"],
        ["Two (JPEG copies)", "3", "", "7.07; 50 %"],
    ]
    assert "the second loses 6 points: One in 33 % (lr 0.1, batches of 16); Two (JPEG copies) in 50 % (lr 3, " in text
    for absent in ("the exact selection", "how often to attack", ": budgets of less than a flip", "## Figure 11"):
        assert absent not in text
    assert_begins_as_published(extensions.noise(record.results))
    assert_begins_as_published(extensions.noise_map(record.results), 3)
    # figures
    assert (
        "**Figures 1 and 4, One** ([table](figures/fig1-one.csv))\n\n![Figures 1 and 4, One](figures/fig1-one.png)"
        in text
    )
    assert "**Figure 6, One** ([table](figures/fig6-one.csv))" in text
    assert text.endswith("![Noise, Two (JPEG copies)](figures/noise-two.png)\n")
    # the table, and the copy among the docs
    with (tmp_path / "claims.csv").open(encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    (row,) = [row for row in found if (row["protocol"], row["measure"]) == (plan.STEP, "untargeted, last iterate")]
    assert row == {
        "figure": "5", "claim": of_lines, "data": "One", "protocol": plan.STEP, "lr": "0.3", "primary": "1",
        "measure": "untargeted, last iterate", "quantity": "drop at k·b = 0.001 (points)", "paper": "6 points",
        "value": "6", "low": "6", "high": "6", "seeds": "4", "rule": "3 to 9; partly if surely above 0.5",
        "verdict": REPLICATED,
    }  # fmt: skip
    assert {row["primary"] for row in found if row["protocol"] != plan.STEP} == {"0"}
    for name in ("fig6-one.png", "fig6-one.csv", "fig6-one.pdf"):
        (tmp_path / "figures").mkdir(exist_ok=True)
        (tmp_path / "figures" / name).write_text(name)
    for _ in range(2):  # once more in place of the first
        copy = report.publish(tmp_path, tmp_path / "my" / "docs")
    assert copy == tmp_path / "my" / "docs" / "replication.md"
    shown = copy.read_text(encoding="utf-8")
    assert "](figures/" not in shown and "](claims.csv)" not in shown and shown.count("\n") == text.count("\n")
    assert "([table](replication/fig6-one.csv))" in shown and "[All of them](replication/claims.csv)" in shown
    beside = {
        part.name: part.read_text(encoding="utf-8") for part in (tmp_path / "my" / "docs" / "replication").iterdir()
    }
    assert beside == {
        **{name: name for name in ("fig6-one.png", "fig6-one.csv")},
        "claims.csv": (tmp_path / "claims.csv").read_text(encoding="utf-8"),
    }


def test_the_report_of_nothing_says_no_more_than_how_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_gigaflops", lambda: 1.0)
    text = report.write(tmp_path, whole_plan(), findings.ReplicationRecord(), "x").read_text(encoding="utf-8")
    headings = [line for line in text.split("\n") if line.startswith("#")]
    assert headings[1:] == ["## Under which protocol?", "## How it was done", "## Figures"]
    assert (
        "Under which reading" not in text and "What holds" not in text and "|---" not in text.split("Test accuracy")[0]
    )
    assert "Nor is the batch size" not in text and "Not run yet" not in text and "A quick run" not in text
    assert "0 sweeps, 0 experiments, 0.0 minutes in 0 calls ()" in text


def test_the_speed_of_the_machine_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 1.0, 1.5, 2.0, 4.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(ticks))
    assert report._gigaflops(10, 3) == pytest.approx(2 * 1000 / 0.5 / 1e9)


# --- cells, figures and the pipeline, with stand-ins for what takes long ---------------------------------


def test_cells_are_read_in_points_with_what_each_part_of_the_images_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: dict[str, object] = {
        "cell": [0.0, 2.0, 3.0],
        "write_access": [0.3011, 0.3011, 0.9989],
        "budget": [0.0, 0.5, 0.1],
        "seed": [4.0, 4.0, 4.0],
        "final_accuracy": [0.9, 0.8, 0.7],
        "minimum_accuracy": [0.5, 0.4, 0.3],
        "final_f1": [0.6, 0.55, 0.45],
        "validation_loss": [0.25, 0.35, 0.45],
        "effective_budget": [0.0, 0.15, 0.1],
        "early_stop.patience": np.array(["null", "null", "null"], object),
        "server_optimizer": np.array(["adam", "adam", "adam"], object),
        "attack.selection": np.array(["gain", "gain", "literal"], object),
        "attack.every": [1.0, 1.0, 5.0],
        "attack.rounding": np.array(["carry", "floor", "ceil"], object),
        "attack.goal": np.array(["targeted", "targeted", "untargeted"], object),
    }
    swept = Cells({name: np.array(column) for name, column in columns.items()})
    curves = np.full((4, 30), 50.0)
    curves[0, :25] = np.arange(25)
    curves[2, :] = [40.0] * 10 + [70.0] * 20
    curves[0, 25:] = np.nan  # it stopped early
    curves[3, :] = np.nan
    wrong, images = np.array([[1, 0], [9, 9], [2, 0], [1, 2]]), np.array([5, 5])
    of_read = {"read_sweep": SimpleNamespace(cells=swept), "read_curves": (curves, None)}
    for name, found in of_read.items():
        monkeypatch.setattr(f"fl_attack.replication.cells.{name}", lambda folder, found=found: found)
    monkeypatch.setattr("fl_attack.replication.cells.read_mistakes", lambda folder: (wrong, images))
    cells = read(tmp_path, 0.7)
    numbers = {
        "k": [0.3, 0.3, 1.0],
        "b": [0.0, 0.5, 0.1],
        "kb": [0.0, 0.15, 0.1],
        "accuracy": [90, 80, 70],
        "minimum": [50, 40, 30],
        "f1": [60, 55, 45],
        "validation": [0.25, 0.35, 0.45],
        "effective": [0.0, 0.15, 0.1],
        "late": [14.5, 70.0, math.nan],
        "every": [1, 1, 5],
        "lr": [0.7] * 3,
        "drop": [0, 10, 20],
        "late_drop": [0, -55.5, math.nan],
        "minimum_drop": [0, 10, 20],
    }
    for name, expected in numbers.items():
        assert cells[name].tolist() == pytest.approx(expected, nan_ok=True), name
    assert cells["seed"].tolist() == [4, 4, 4] and cells["seed"].dtype == np.int64
    texts = {"goal": "attack.goal", "patience": "early_stop.patience", "optimizer": "server_optimizer"}
    for name, of_table in (texts | {"selection": "attack.selection", "rounding": "attack.rounding"}).items():
        assert cells[name].tolist() == swept[of_table].tolist()
    # without the first five images cell 0 has none wrong of five, with them one of ten
    assert cells["moved"] == pytest.approx(np.array([[10, -10], [20, -20], [-10 + 0.0, 10]]))
    assert cells["drop_moved"] == pytest.approx(cells["moved"][:1] - cells["moved"])
    for part in (0, 1):
        less = without_part(cells, part)
        for measure in ("accuracy", "late", "minimum", "f1"):
            assert less[measure] == pytest.approx(cells[measure] + cells["moved"][:, part], nan_ok=True)
        for drop in ("drop", "late_drop", "minimum_drop"):
            assert less[drop] == pytest.approx(cells[drop] + cells["drop_moved"][:, part], nan_ok=True)
        assert less["k"].tolist() == cells["k"].tolist()
    both = joined(cells, cells)
    assert both["accuracy"].tolist() == [90, 80, 70] * 2
    # a rate that was swept stays, one that nobody gave is empty, and what the table lacks is NaN
    few = {name: swept[name] for name in swept.columns if name not in ("validation_loss", "effective_budget")}
    few = {name: column for name, column in few.items() if not name.startswith("attack.")}
    monkeypatch.setattr("fl_attack.replication.cells.read_mistakes", lambda folder: None)
    monkeypatch.setattr(
        "fl_attack.replication.cells.read_sweep",
        lambda folder: SimpleNamespace(cells=Cells(few | {"lr": np.array([0.1, 0.2, 0.2])})),
    )
    cells = read(tmp_path, 0.7)
    assert cells["lr"].tolist() == [0.1, 0.2, 0.2] and "moved" not in cells.columns
    assert set(cells["goal"]) == {"untargeted"} and set(cells["rounding"]) == {""}
    assert np.isnan(cells["validation"]).all() and np.isnan(cells["effective"]).all()
    monkeypatch.setattr("fl_attack.replication.cells.read_sweep", lambda folder: SimpleNamespace(cells=Cells(few)))
    assert set(read(tmp_path)["lr"]) == {""}


def test_budgets_are_on_an_axis_of_powers_and_a_note_says_what_the_bands_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str, dict[str, object]]] = []
    monkeypatch.setattr(figures, "lines", lambda file, title, note, **more: drawn.append((title, note, more)))
    points = [
        {"b": b, "k": k, "goal": goal, "optimizer": optimizer, "every": 2.0, "patience": patience}
        for b in (0.0, 0.2)
        for k in (0.5, 1.0)
        for goal in statistics.GOALS
        for optimizer in ("sgd", "adam")
        for patience in ("null", "10")
    ]
    cells = seeded(lambda row, rng: rng.normal(), *points)
    for preset, (how, _) in figures.FIGURES.items():
        if preset not in ("fig7", "fig8", "fig11"):
            how(tmp_path / f"{preset}.csv", cells, preset)
    assert all(note.endswith("Bands: 95 % intervals over seeds.") for _, note, _ in drawn)
    logarithmic = {"fig5", "fig9", "fig12", "fig14", "selection", "rounding"}
    assert {title: more for title, _, more in drawn} == {
        **{title: {"log": True} for title in logarithmic},
        "fig6": {"floor": 0.0},
        "frequency": {},
    }
    heads = {}
    for preset in ("fig5", "fig6", "fig12", "fig14", "selection", "frequency", "rounding"):
        heads[preset] = (tmp_path / f"{preset}.csv").read_text().split("\n")[0]
        published = next((DOCS / "replication").glob(f"{preset}-*.csv")).read_text(encoding="utf-8")
        assert heads[preset] == published.split("\n")[0]


@pytest.mark.parametrize(("columns", "name"), [((), "accuracy"), (("final_f1",), "f1")])
def test_a_map_is_drawn_from_the_sweep_and_its_table_from_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: tuple[str, ...], name: str
) -> None:
    asked: list[tuple[object, ...]] = []

    def drawn(folder: Path, *how: str) -> list[Path]:
        asked.append((folder, (folder / "sweep.csv").read_text(), *how))
        files = [folder / f"heatmap.{suffix}" for suffix in ("png", "pdf")]
        for file in files:
            file.write_text(file.suffix)
        return files

    monkeypatch.setattr(figures.plots, "draw", drawn)
    points = [{"b": b, "k": k, "goal": goal} for b in (0.1, 0.2) for k in (0.5, 1.0) for goal in statistics.GOALS]
    cells = seeded(lambda row, rng: 80.0 + float(str(row["k"])) + 10 * float(str(row["b"])), *points)
    cells = Cells(cells.columns | {"f1": cells["accuracy"] - 50})
    run = tmp_path / "run"
    run.mkdir()
    (run / "sweep.csv").write_text("the sweep")
    preset = "fig11" if columns else "fig8"
    folder = tmp_path / "new" / "figures"
    figures.draw(folder, run, preset, "mnist_01", "MNIST 0/1", cells)
    assert asked == [(folder, "the sweep", "heatmap", *columns)]
    assert sorted(file.name for file in folder.iterdir()) == [f"{preset}-mnist_01.{s}" for s in ("csv", "pdf", "png")]
    head, *rows = [line.split(",") for line in (folder / f"{preset}-mnist_01.csv").read_text().split()]
    assert head == ["goal", "write_access", "budget", name, "interval"]
    less = 50 if columns else 0
    expected = [(g, f"{k:g}", f"{b:g}", f"{80 + k + 10 * b - less:g}") for k in (0.5, 1) for b in (0.1, 0.2) for g in (
        statistics.GOALS)]  # fmt: skip
    assert sorted(tuple(row[:4]) for row in rows) == sorted(expected)
    assert [row[0] for row in rows] == ["untargeted"] * 4 + ["targeted"] * 4
    figures.draw(folder, run, preset, "mnist_01", "MNIST 0/1", cells)
    assert len(asked) == 1  # drawn before
    later = (folder / f"{preset}-mnist_01.png").stat().st_mtime + 10
    os.utime(run / "sweep.csv", (later, later))
    figures.draw(folder, run, preset, "mnist_01", "MNIST 0/1", cells)
    assert len(asked) == 2  # the sweep is newer
    (folder / f"{preset}-mnist_01.pdf").unlink()
    os.utime(run / "sweep.csv", (0, 0))
    figures.draw(folder, run, preset, "mnist_01", "MNIST 0/1", cells)
    assert len(asked) == 3  # a part of it is gone


def test_the_figure_of_gradients_is_of_a_run_of_each_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    source = plan.PaperDataset("digits_01", "digits 0/1", True, ("dataset=digits_01",))
    monkeypatch.setattr(engine, "make_scenarios", lambda settings: settings)
    ran: list[float] = []

    def run_cells(settings: list[Settings], **how: bool) -> list[SimpleNamespace]:
        assert how == {"keep_flips": False, "full_rows": False}  # neither is looked at
        ran.extend(one.attack.budget for one in settings)
        return [SimpleNamespace(theta=torch.tensor([one.attack.budget])) for one in settings]

    def points(scenarios: dict[str, Settings], theta: torch.Tensor, round_: int) -> list[tuple[str, float, float]]:
        assert {goal: one.attack.goal for goal, one in scenarios.items()} == {goal: goal for goal in statistics.GOALS}
        for one in scenarios.values():
            assert (one.rounds, one.lr, one.batch_size) == (round_, 0.3, 128) and one.eval_every == round_ == 200
            assert (one.clients.total, one.clients.malicious, one.dataset.loader) == (10, 5, "digits")
            assert one.attack.budget == pytest.approx(theta.item()) and one.engine.name == "batched"
        assert theta.dtype == torch.float64
        return [("clean", 1.0, 0.0), ("greedy, targeted", 2.0, float(theta))]

    shown: list[tuple[object, ...]] = []
    monkeypatch.setattr(engine, "run_cells", run_cells)
    monkeypatch.setattr(gradients, "points", points)
    monkeypatch.setattr(gradients, "gradients", lambda file, title, note: shown.append((file, title, note)))
    assert gradients.draw(tmp_path, source, 0.3) == "fig1-digits_01"
    assert ran == [0.1, 0.25, 0.5, 1.0]
    rows = (tmp_path / "fig1-digits_01.csv").read_text().splitlines()
    assert rows[0] == "budget,kind,first,second" and rows[1:3] == [
        "b = 0.1,clean,1,0",
        'b = 0.1,"greedy, targeted",2,0.1',
    ]
    assert [row.split(",")[0] for row in rows[1:]] == [f"b = {b}" for b in ("0.1", "0.25", "0.5", "1") for _ in "12"]
    ((file, title, note),) = shown
    assert file == tmp_path / "fig1-digits_01.csv" and title == "Gradients that the attackers can reach: digits 0/1"
    assert "First direction: the clean gradient" in str(note) and str(note).endswith("k = 0.5.")


@pytest.mark.parametrize("only", [None, "fig1", "fig4", "fig5", "noise"])
@pytest.mark.parametrize("binary", [True, False])
def test_gradients_are_drawn_where_they_are_asked_for_and_there_are_two_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str | None, binary: bool
) -> None:
    from fl_attack.replication import pipeline

    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(gradients, "draw", lambda *how: drawn.append(how) or "fig1-one")
    monkeypatch.setattr(figures, "draw", lambda *how: drawn.append(how))
    source = plan.PaperDataset("one", "One", binary, ())
    rates = [
        {"seed": s, "lr": lr, "validation": loss + 0.2 * s} for s in (0, 1, 2) for lr, loss in ((0.1, 0.5), (0.3, 0.4))
    ]
    record = findings.ReplicationRecord(results=[findings.RunCells(plan.Run("honest", source), table(rates))])
    pipeline._draw(tmp_path, tmp_path / "run", record, only)
    wanted = binary and only in (None, "fig1", "fig4")
    assert drawn == ([(tmp_path, source, 0.3)] if wanted else [])
    assert record.figures == ["fig1-one"] * wanted
    assert record.rates == {"one": 0.3} and record.tied == {"one": [0.3]}
    # other presets have their own figure, under the paper's protocol
    drawn.clear()
    for preset, protocol in (("fig6", plan.STEP), ("fig6", plan.EPOCH), ("smallest", plan.STEP)):
        record.results.append(findings.RunCells(plan.Run(preset, source, protocol), table(rates)))
        pipeline._draw(tmp_path, tmp_path / "run", record, only)
    assert drawn == [(tmp_path, tmp_path / "run", "fig6", "one", "One", record.results[1].cells)]
    assert record.figures[wanted:] == ["fig6-one"]


def test_the_pipeline_computes_what_is_lacking_and_tells_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_attack.replication import pipeline

    computed, drawn, announced = list[str](), list[tuple[str, str | None]](), list[object]()

    def cells(run: plan.Run, epochs: int, lr: float | None) -> list[SimpleNamespace]:
        extra = [one.removeprefix("lr=") for one in run.overrides]
        rate = float(extra[0]) if extra else lr
        name = f"{run.source.name}-{run.preset}-{epochs}" + (f"-{rate:g}" if rate is not None else "")
        return [SimpleNamespace(settings=SimpleNamespace(lr=rate), name=name)] * (3 if run.preset == "fig8" else 2)

    def compute(out: Path, grids: plan.Grids, progress: object) -> None:
        assert out == tmp_path and progress is bars[-1]
        for place in plan.lacking(grids):
            computed.append(place.name)
            place.mkdir(parents=True)
            (place / "sweep.csv").touch()

    def read(place: Path, lr: float | None) -> Cells:
        rates = {0.1: 0.5, 0.3: 0.4} if lr is None else {lr: 0.2 if lr < 2 else 0.6}  # the best is 1, beyond the grid
        return table([{"lr": rate, "validation": loss, "seed": s} for rate, loss in rates.items() for s in (0, 1)])

    class Progress:
        """What takes the place of the bar."""

        def __init__(self, *named: object) -> None:
            self.bar = SimpleNamespace(set_description=announced.append)
            announced.append(named)
            bars.append(self)

        def __enter__(self) -> "Progress":
            return self

        def __exit__(self, *_: object) -> None:
            announced.append("end")

        def extend(self, more: int) -> None:
            announced.append(more)

    bars: list[Progress] = []
    written: list[findings.ReplicationRecord] = []

    def write(out: Path, todo: plan.ReplicationPlan, found: findings.ReplicationRecord, command: str) -> Path:
        assert (out, command) == (tmp_path, "the command") and (out / "figures").is_dir()
        written.append(found)
        return out / "the report"

    monkeypatch.setattr(plan, "cells", cells)
    monkeypatch.setattr(plan, "folder_of", lambda out, cells: out / "runs" / cells[0].name)
    monkeypatch.setattr(plan, "compute", compute)
    monkeypatch.setattr(pipeline, "read", read)
    monkeypatch.setattr(pipeline.multirun, "Progress", Progress)
    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(figures, "draw", lambda folder, place, *_: drawn.append((f"{folder.name}: {place.name}", None)))
    monkeypatch.setattr(gradients, "draw", lambda folder, source, rate: drawn.append((source.name, rate)) or "fig1")
    one, other = plan.PaperDataset("one", "One", True, ()), plan.PaperDataset("two", "Two", False, ())
    runs = [plan.Run("fig8", one), plan.Run("honest", one), plan.Run("honest", other), plan.Run("fig6", other)]
    runs.append(plan.Run("fig7", one, plan.EPOCH))
    todo = plan.ReplicationPlan((one, other), tuple(runs), 5, 32, quick=True)

    def run(so_far: bool, only: str | None = None) -> findings.ReplicationRecord:
        for noted in (computed, drawn, announced):
            noted.clear()
        assert pipeline.run(tmp_path, todo, "the command", so_far, only) == tmp_path / "the report"
        return written[-1]

    found = run(so_far=True)
    assert found.results == [] and found.missing == [runs[1], runs[0], runs[4], runs[2], runs[3]]
    assert computed == drawn == [] and found.seconds == {"One": [], "Two": []}
    assert announced == [(11, "replicate"), "One", "Two", "end"]
    found = run(so_far=False)
    of_one = ["one-honest-5", "one-honest-5-1", "one-honest-5-3", "one-fig8-5-1", "one-fig7-5-1"]
    assert computed == [*of_one, "two-honest-5", "two-honest-5-1", "two-honest-5-3", "two-fig6-5-1"]
    assert found.missing == [] and found.rates == {"one": 1.0, "two": 1.0}
    assert [result.run for result in found.results] == [runs[1], runs[0], runs[4], runs[2], runs[3]]
    assert sorted(set(found.results[0].cells["lr"])) == [0.1, 0.3, 1.0, 3.0]
    assert set(found.results[1].cells["lr"]) == {1.0}  # read at the rate of its settings
    assert drawn == [("one", 1.0), ("figures: one-fig8-5-1", None), ("figures: two-fig6-5-1", None)]
    assert announced == [(11, "replicate"), "One", 2, 2, "Two", 2, 2, "end"]
    assert {title: len(seconds) for title, seconds in found.seconds.items()} == {"One": 1, "Two": 1}
    (tmp_path / "runs" / "two-fig6-5-1" / "sweep.csv").unlink()
    (tmp_path / "runs" / "two-fig6-5-1").rmdir()
    found = run(so_far=True, only="fig8")
    assert computed == [] and found.missing == [runs[3]] and found.rates == {"one": 1.0, "two": 1.0}
    assert drawn == [("figures: one-fig8-5-1", None)]
    found = run(so_far=False)
    assert computed == ["two-fig6-5-1"] and announced[2:4] == [0, 0]  # the extensions are there
    assert {title: len(seconds) for title, seconds in found.seconds.items()} == {"One": 1, "Two": 2}


# --- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", plan.FIGURES)
def test_a_figure_alone_needs_its_sweeps_the_unattacked_runs_and_no_other_data(only: str) -> None:
    todo, whole = plan.make(True, only, None), plan.make(True, None, None)
    presets = {run.preset for run in todo.runs}
    assert "honest" in presets and (only in presets or only in ("fig1", "fig4", "readings"))
    if only == "readings":
        assert presets == {"honest", "smallest"}
    elif only in ("fig1", "fig4"):
        assert presets == {"honest"} and [source.name for source in todo.sources] == ["digits_01"]
    else:
        assert presets - {only, "honest"} <= {"protocols", "smallest"}
        of_claims = {claim.preset for claim in CLAIMS if claim.preset == only and claim.others}
        assert ("protocols" in presets) == bool(of_claims)
    assert ("smallest" in presets) == (only in ("fig5", "readings"))
    assert {run.source for run in todo.runs} == set(todo.sources)
    assert set(todo.runs) <= set(whole.runs)
    same = {run for run in whole.runs if run.source in todo.sources and run.preset in presets}
    assert set(todo.runs) == same


def test_a_quick_replication_is_a_short_one_of_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = plan.make(True, None, None)
    monkeypatch.setattr(plan, "sources", lambda quick, root: tuple(PUBLISHED.values()))
    whole = plan.make(False, None, None)
    assert (quick.epochs, quick.batch, quick.quick) == (40, 32, True)
    assert (whole.epochs, whole.batch, whole.quick) == (200, 128, False)
    assert [source.title for source in whole.sources] == list(PUBLISHED)
    assert {run.batch for run in whole.runs} == {16, 64, 128, 256, 512, "full"}
    assert {run.batch for run in quick.runs} == {10, 16, 32, 64, 128, "full"}
    assert all(run.overrides[-1] == "seed=range(5)" for run in quick.runs)
    for source in whole.sources:
        first, *others = [run for run in whole.runs if run.source == source]
        assert first.preset == "honest" != others[0].preset
        assert first.rates is None and set(plan.HELD_OUT) <= set(first.overrides)


@pytest.mark.parametrize("originals", [True, False])
def test_cifar_is_read_from_an_archive_of_images_where_the_original_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, originals: bool
) -> None:
    asked: list[plan.PaperDataset] = []
    monkeypatch.setattr(plan, "samples", asked.append)
    monkeypatch.setattr(plan, "_unpacked_archive", lambda archive: archive.with_suffix(""))
    (tmp_path / plan.ARCHIVE).touch()
    for file in plan.CIFAR10_FILES[: None if originals else -1]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = plan.sources(False, tmp_path)
    assert list(found) == asked  # a lack is told before anything runs
    assert [source.binary for source in found] == [True, True, False, False]
    assert [source.name for source in found] == [source.name for source in PUBLISHED.values()]
    if originals:
        assert [source.title for source in found[1::2]] == ["CIFAR-10, airplane/automobile", "CIFAR-10, 10 classes"]
        assert [source.overrides[0] for source in found[1::2]] == ["dataset=cifar10_plane_auto", "dataset=cifar10"]
        assert all(source.overrides[1:] == (f'dataset.root="{tmp_path}"',) for source in found)
    else:
        assert [source.title for source in found] == list(PUBLISHED)
        images = ("dataset=image_folder", f'dataset.path="{(tmp_path / plan.ARCHIVE).with_suffix("")}"')
        assert found[1].overrides == (*images, "dataset.classes=[airplane,automobile]")
        assert found[3].overrides == images
    for digits in found[::2]:
        assert digits.overrides == (f"dataset={digits.name}", f'dataset.root="{tmp_path}"')


@pytest.mark.parametrize(
    ("rates", "best", "wider"),
    [
        ((0.1, 0.3, 1.0), 1.0, 3.0),
        ((0.1, 0.3, 1.0), 0.1, 0.03),
        ((0.1, 0.3, 1.0), 0.3, None),
        ((0.0003, 0.001), 0.0003, 0.0001),
        ((0.0001, 0.001), 0.0001, None),
        ((1.0, 3.0), 3.0, 10.0),
        ((1.0, 10.0), 10.0, None),
    ],
)
def test_a_grid_of_learning_rates_is_extended_at_its_edges_within_reason(
    rates: tuple[float, ...], best: float, wider: float | None
) -> None:
    cells = table([{"lr": lr, "seed": seed, "validation": 0.1 + (lr != best)} for lr in rates for seed in (0, 1)])
    assert plan.best_rate(cells) == best
    assert plan.extension(cells) == wider


def test_of_equally_good_learning_rates_the_largest_is_taken() -> None:
    cells = table([{"lr": lr, "seed": seed, "validation": 0.1} for lr in (0.1, 0.3, 0.2) for seed in (0, 1)])
    assert plan.best_rate(cells) == 0.3 and plan.tied_rates(cells) == [0.1, 0.2, 0.3]


def test_a_point_of_a_single_seed_has_a_name_and_no_interval(tmp_path: Path) -> None:
    one = table([{"k": 0.5, "b": 0.2, "goal": "targeted", "lr": 0.3, "accuracy": 70.0}])
    assert (figures.shared_goal(one), figures.access(one), figures.rate(one)) == ("targeted", "k = 0.5", ", lr 0.3")
    assert figures.rate(table([{"lr": ""}])) == ""
    (row,) = figures.means(one, figures.shared_goal, figures.access, "kb", "accuracy")
    assert row[:4] == ("targeted", "k = 0.5", 0.1, 70.0) and math.isnan(row[4])
    figures.stopped(tmp_path / "a.csv", Cells(one.columns | {"patience": np.array(["10"])}), "a title")
    assert rows_of(tmp_path / "a.csv")[0][:4] == ("targeted", "stopped early, lr 0.3", 0.1, 70)
    both = [{"b": b, "accuracy": 90 - 10 * b, "optimizer": o, "lr": lr} for b in (0.0, 0.2) for o, lr in (
        ("sgd", 0.1), ("adam", 0.01))]  # fmt: skip
    figures.compared("rounding")(tmp_path / "b.csv", table(both).where(optimizer="adam"), "a title")
    assert [row[:4] for row in rows_of(tmp_path / "b.csv")] == [
        ("untargeted", "carry", 0, 0),
        ("untargeted", "carry", 0.2, 2),
    ]
    figures.optimizers(tmp_path / "c.csv", table(both), "a title")
    assert [row[1] for row in rows_of(tmp_path / "c.csv")] == ["sgd, lr 0.1"] * 2 + ["adam, lr 0.01"] * 2
    figures.frequencies(tmp_path / "d.csv", table([{"b": 0.5, "every": 10.0}]), "a title")
    assert rows_of(tmp_path / "d.csv")[0][1:3] == ("5 % a round", 10)


def test_the_name_of_a_grids_folder_has_sixteen_digits() -> None:
    settings = [compose("engine=batched", "seed=1", "out=x"), compose("engine=batched", "seed=2", "out=x")]
    names = {identity.key_of_grid("data", some) for some in (settings, settings[:1], settings[::-1])}
    names |= {identity.key_of_grid("other data", settings)}
    assert len(names) == 4 and {len(name) for name in names} == {16}
    assert all(int(name, 16) >= 0 for name in names)
