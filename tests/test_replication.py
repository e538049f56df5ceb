"""The replication: verdicts on tables with known answers, every preset, and the whole pipeline on a tiny grid."""

import csv
import math
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fl_attack import engine, multirun
from fl_attack.errors import InputError
from fl_attack.launcher import grid
from fl_attack.replication import __main__ as replicate
from fl_attack.replication import claims, extensions, figures, findings, gradients, plan, report, statistics
from fl_attack.replication.cells import read, with_drops
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
    for goal in statistics.GOALS:
        for b in (0.1, 0.2):
            wanted = f"{loss[goal] + 100 * b:.2f}"
            (row,) = [line for line in text.splitlines() if f"| {goal} | {100 * b:g} % |" in line]
            assert row.count(wanted) >= 2, row  # with either rounding
    exact = [
        row | {"selection": way, "accuracy": row["accuracy"] + (3 if way == "literal" and row["b"] else 0)}  # type: ignore[operator]
        for row in grid_rows
        for way in ("gain", "literal")
        if row["rounding"] == "carry"
    ]
    text = extensions.selection([findings.RunCells(plan.Run("selection", source), table(exact))])
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
    assert len(places) == 1
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
    place = plan._unpacked(tmp_path / plan.ARCHIVE)
    assert plan._unpacked(tmp_path / plan.ARCHIVE) == place
    chosen = "dataset.classes=[airplane,automobile]"
    source = plan.PaperDataset("x", "x", True, ("dataset=image_folder", f"dataset.path={plan._quoted(place)}", chosen))
    assert plan.samples(source) == 24
    (tmp_path / plan.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(InputError, match="can't be unpacked"):
        plan._unpacked(tmp_path / plan.ARCHIVE)


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
