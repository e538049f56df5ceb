"""Verdicts on made-up tables whose truth is known, and whether every interval holds its level."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from fl_attack.replication import claims, statistics
from fl_attack.replication.cells import joined, with_drops
from fl_attack.replication.claims import CLAIMS
from fl_attack.replication.extensions import lost_by_chance, short_answer
from fl_attack.replication.findings import Line, RunCells, decided
from fl_attack.replication.plan import CEIL, PERSIST, SMALL, STEP, PaperDataset, Run
from fl_attack.replication.report import _by_verdict
from fl_attack.replication.statistics import GOALS, Statistic
from fl_attack.replication.verdicts import (
    NOISY,
    NOT,
    PARTLY,
    REPLICATED,
    Criterion,
    Evidence,
    counted,
    decide,
    discoveries,
    evidence,
    overall,
)
from fl_attack.sweep_table import Cells

IMAGES, PARTS = 2000, 20
Settings = list[tuple[float, float, str]]  # k, b, goal
GRID: Settings = [(k, b, goal) for k in (0.5, 1.0) for b in (0.0, 0.05, 0.1, 0.5) for goal in GOALS]


def simulated(
    settings: Settings,
    truth: Callable[[float, float, str], float],
    seeds: int,
    rng: np.random.Generator,
    noise: Callable[[str], float] = lambda goal: 0.5,
    **columns: float,
) -> Cells:
    """Cells of accuracies (points): the truth, a part of each seed that its twin shares, and noise of each cell."""
    k, b, goal = (np.repeat(np.array(part), seeds) for part in zip(*settings, strict=True))
    seed = np.tile(np.arange(seeds), len(settings))
    means = np.array([truth(*one) for one in settings]).repeat(seeds)
    sizes = np.array([noise(one[2]) for one in settings]).repeat(seeds)
    accuracy = means + rng.normal(size=seeds)[seed] + sizes * rng.normal(size=len(seed))
    usual = {"lr": 0.1, "validation": 0.5, "effective": 0.0} | columns
    cells = {"k": k, "b": b, "kb": np.round(k * b, 9), "goal": goal.astype(object), "seed": seed}
    cells |= dict.fromkeys(("accuracy", "late", "minimum", "f1"), accuracy)
    cells |= {name: np.full(len(seed), value) for name, value in usual.items()}
    cells |= {"patience": np.full(len(seed), "null", object), "optimizer": np.full(len(seed), "adam", object)}
    return with_drops(cells)


def verdicts(text: str, cells: Cells) -> set[str]:
    (claim,) = [claim for claim in CLAIMS if text in claim.text]
    return {one.verdict for one in claims.measure(claim, cells)}


def pictured(wrong: np.ndarray, b: np.ndarray, seed: np.ndarray) -> Cells:
    """Untargeted cells (M,) with known mistakes (M, images) of each."""
    part = np.arange(IMAGES) % PARTS
    right = 100 * (1 - wrong.mean(1))
    moved = np.stack([100 * (1 - wrong[:, part != g].mean(1)) - right for g in range(PARTS)], 1)
    M = len(b)
    columns = {"k": np.ones(M), "b": b, "kb": b, "goal": np.full(M, "untargeted", object), "seed": seed, "moved": moved}
    columns |= dict.fromkeys(("accuracy", "late", "minimum", "f1"), right)
    columns |= {name: np.full(M, "", object) for name in ("lr", "patience", "optimizer")}
    return with_drops(columns)


# --- known answers ---------------------------------------------------------------------------------


def test_a_dead_attack_bears_nothing_out() -> None:
    cells = simulated(GRID, lambda k, b, goal: 90.0, 10, np.random.default_rng(0), lambda goal: 0.05)
    assert verdicts("monotonically", cells) == {NOT}  # what never falls does not fall monotonically
    for text in ("larger k does more harm", "large budgets the untargeted", "untargeted varies more"):
        assert verdicts(text, cells) == {NOT}
    assert verdicts("little", cells) == {REPLICATED}
    exact = simulated(GRID, lambda k, b, goal: 90.0, 10, np.random.default_rng(0), lambda goal: 0.0)
    assert verdicts("monotonically", exact) == {NOT}


def test_two_images_are_no_effect() -> None:
    rng = np.random.default_rng(0)
    honest = rng.random(IMAGES) < 0.002
    attacked = honest.copy()
    attacked[np.flatnonzero(~honest)[[5, 700]]] = True  # the same two images in every seed
    b = np.repeat([0.0, 0.001], 5)
    cells = pictured(np.where(b[:, None] > 0, attacked, honest), b, np.tile(np.arange(5), 2))
    found = claims.measured(partial(statistics.drop_at, goal="untargeted", b=0.001), cells)
    assert found.value == pytest.approx(0.1)
    assert found.error == pytest.approx(100 * 2**0.5 / IMAGES, rel=0.1)  # not 0: the images are a sample too
    assert verdicts("0.1 %", cells) == {NOT}


def test_noise_alone_is_no_effect() -> None:
    cells = simulated(GRID, lambda k, b, goal: 80.0, 10, np.random.default_rng(1), lambda goal: 8.0)
    for claim in CLAIMS:
        if claim.text.startswith(("25 %", "F1", "Adam goes")):
            continue
        assert not {one.verdict for one in claims.measure(claim, cells)} & {REPLICATED, PARTLY}, claim.text


def test_a_true_effect_is_found() -> None:
    def truth(k: float, b: float, goal: str) -> float:
        return 90 - 60 * k**1.5 * b - 20 * (goal == "untargeted") * k * b

    cells = simulated(GRID, truth, 10, np.random.default_rng(2), lambda goal: 0.2)
    for text in ("monotonically", "larger k does more harm", "large budgets the untargeted"):
        assert verdicts(text, cells) == {REPLICATED}
    tenth: Settings = [(1.0, b, goal) for b in (0.0, 0.001) for goal in GOALS]
    for cost, expected in ((6.0, REPLICATED), (1.5, PARTLY), (0.3, NOT), (12.0, PARTLY)):
        cells = simulated(
            tenth, lambda k, b, goal, c=cost: 90 - c * (b > 0), 10, np.random.default_rng(3), lambda goal: 0.1
        )  # type: ignore[misc]
        assert verdicts("0.1 %", cells) == {expected}


# --- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(6, 0.5, REPLICATED), (2, 0.4, PARTLY), (0.1, 0.05, NOT), (11, 0.4, PARTLY), (-1, 0.2, NOT), (3, 2, NOISY)],
)
def test_a_rule_of_a_size(value: float, error: float, expected: str) -> None:
    rule = Criterion(3.0, 9.0, side=0.5)
    assert decide([(rule, Evidence(value, error, 9, 10))]) == [expected]
    assert decide([(rule, Evidence(value, np.nan, 9, 1))]) == [NOISY]


def test_several_measurements_are_counted_and_one_in_four_is_not_partly() -> None:
    assert overall([REPLICATED] * 3) == REPLICATED
    assert overall([REPLICATED, NOT, NOT, NOT]) == NOT
    assert overall([PARTLY, NOISY, NOISY, NOISY]) == NOISY
    assert overall([PARTLY, REPLICATED, NOT, NOT]) == PARTLY
    assert overall([]) == NOISY
    assert counted([REPLICATED, NOT, NOT, NOT]) == "replicated in 1, not replicated in 3 of 4 measurements"


def test_many_rows_of_noise_leave_few_discoveries_and_a_single_true_row_stays() -> None:
    rng = np.random.default_rng(0)
    rows = [Evidence(float(x), 1.0, 1000, 1000) for x in rng.normal(size=400)]
    alone = [Criterion(0.0).doubts(row)[REPLICATED] < 0.05 for row in rows]
    assert 10 < sum(alone) < 40
    together = decide([(Criterion(0.0), row) for row in [*rows, Evidence(8.0, 1.0, 1000, 1000)]])
    assert together[:-1].count(REPLICATED) == 0 and together[-1] == REPLICATED


def test_discoveries_hold_their_rate_however_rows_depend() -> None:
    rng = np.random.default_rng(1)
    false, truths = [], np.arange(40) < 10
    for _ in range(400):
        shared = rng.normal()  # of the same seeds and runs
        z = 0.8 * shared + 0.6 * rng.normal(size=40) + 5 * truths
        found = discoveries(np.array([Evidence(x, 1.0, 1e6, 9).above(0.0) for x in z]))
        false.append((found & ~truths).sum() / max(1, found.sum()))
    assert np.mean(false) < 0.05
    assert not discoveries(np.ones(5)).any() and len(discoveries(np.empty(0))) == 0


def test_findings_are_decided_together() -> None:
    claim = CLAIMS[1]
    source = PaperDataset("x", "x", True, ())
    weak = claims.Finding("a", Evidence(0.05, 0.01, 9, 10), NOT)
    near = claims.Finding("b", Evidence(4.2, 0.55, 9, 10), REPLICATED)  # by itself, but not as one of a hundred
    assert decide([(claim.criterion, near.found)]) == [REPLICATED]
    lines = [Line(claim, source, STEP, "1", True, one) for one in (*[weak] * 99, near)]
    assert {line.finding.verdict for line in decided(lines)[:-1]} == {NOT}
    assert decided(lines)[-1].finding.verdict != REPLICATED


# --- intervals -------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students() -> None:
    values = np.random.default_rng(1).normal(size=8)
    found, known = evidence(values), ttest_1samp(values, 0.3)
    low, high = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert min(found.above(0.3), found.below(0.3)) == pytest.approx(known.pvalue / 2)
    assert np.isnan(evidence(values[:1]).error) and evidence(values[:0]).seeds == 0


COVERED: dict[str, tuple[Statistic, Settings, Callable[[float, float, str], float], float]] = {
    "drop": (
        partial(statistics.drop_at, goal="targeted", b=0.5),
        [(1.0, 0.0, "targeted"), (1.0, 0.5, "targeted")],
        lambda k, b, goal: 90 - 3 * (b > 0),
        3.0,
    ),
    "accuracy": (
        partial(statistics.accuracy_at, goal="targeted", k=1.0, b=0.5),
        [(1.0, 0.5, "targeted")],
        lambda k, b, goal: 70,
        70.0,
    ),
    "spread of equals": (statistics.spread_gap, GRID, lambda k, b, goal: 90, 0.0),
    "growth of equals": (statistics.gap_growth, GRID, lambda k, b, goal: 90, 0.0),
    "goals that differ": (statistics.small_gap, GRID, lambda k, b, goal: 90 - 2 * (goal == "targeted"), -2.0),
    "goals that do not": (statistics.small_gap, GRID, lambda k, b, goal: 90, 0.0),
    "large budgets": (statistics.large_gap, GRID, lambda k, b, goal: 90 - 2 * (goal == "untargeted"), 2.0),
    "equal products": (partial(statistics.pair_harm, goal="targeted"), GRID, lambda k, b, goal: 90 - 4 * k, 2.0),
    "share of equals": (partial(statistics.pair_share, goal="targeted"), GRID, lambda k, b, goal: 90, 50.0),
    "trend of nothing": (partial(statistics.trend, goal="targeted"), GRID, lambda k, b, goal: 90, 0.0),
    "trend": (partial(statistics.trend, goal="targeted"), GRID, lambda k, b, goal: 90 - 80 * b, 1.0),
    "lowest of equals": (partial(statistics.adam_lowest, goal="targeted"), GRID, lambda k, b, goal: 90, 90.0),
    "lowest": (partial(statistics.adam_lowest, goal="targeted"), GRID, lambda k, b, goal: 90 - 80 * b, 50.0),
    "mean drop": (partial(statistics.mean_drop, goal="targeted"), GRID, lambda k, b, goal: 90 - 3 * (b > 0), 3.0),
}


@pytest.mark.parametrize("seeds", [5, 20])
@pytest.mark.parametrize("name", COVERED)
def test_intervals_over_seeds_hold_their_level(name: str, seeds: int) -> None:
    statistic, settings, truth, value = COVERED[name]
    rng, inside = np.random.default_rng(seeds), []
    for _ in range(120):
        found = evidence(statistic(simulated(settings, truth, seeds, rng)))
        inside.append(found.low - 1e-9 <= value <= found.high + 1e-9)
    assert np.mean(inside) >= 0.89  # 0.95 less three standard errors of 120 tries


def test_intervals_over_seeds_and_images_hold_their_level_for_both() -> None:
    rng, inside, of_seeds = np.random.default_rng(0), [], []
    b, seed = np.repeat([0.0, 0.001], 8), np.tile(np.arange(8), 2)
    for _ in range(150):
        hard = rng.random(IMAGES)  # the images are a sample: those below the threshold are mistaken
        limit = np.where(b > 0, 0.13, 0.10) + 0.004 * rng.normal(size=16)
        wrong = hard[None, :] + 0.01 * rng.normal(size=(16, IMAGES)) < limit[:, None]
        cells = pictured(wrong, b, seed)
        statistic = partial(statistics.drop_at, goal="untargeted", b=0.001)
        found, without = claims.measured(statistic, cells), evidence(statistic(cells))
        inside.append(found.low <= 3.0 <= found.high)
        of_seeds.append(without.low <= 3.0 <= without.high)
    assert np.mean(inside) >= 0.9
    assert np.mean(of_seeds) < np.mean(inside)  # seeds alone are too sure


def test_what_a_single_run_loses_by_chance() -> None:
    assert lost_by_chance(np.array([80.0, 74.0, 90.0, 85.9])) == pytest.approx(4 / 12)
    ends = np.random.default_rng(0).normal(0, 7.4, 3000)
    assert lost_by_chance(ends) == pytest.approx(0.283, abs=0.02)  # 6 points are 0.57 deviations of a difference


def test_the_first_page_says_under_which_protocol_the_papers_size_comes_out() -> None:
    source = PaperDataset("mnist_01", "MNIST 0/1", True, ())
    claim = next(one for one in CLAIMS if one.preset == "smallest")

    def line(protocol: str, label: str, size: float, verdict: str) -> Line:
        found = evidence(np.array([size - 0.1, size + 0.1]))
        return Line(claim, source, protocol, "0.1", protocol == STEP, claims.Finding(label, found, verdict))

    lines = [
        line(STEP, "untargeted, last iterate", 0.1, NOT),
        line(STEP, "untargeted, least over epochs", 0.2, NOT),
        line(PERSIST, "untargeted, last iterate", 21.8, PARTLY),
        line(SMALL, "targeted, last iterate", 5.9, REPLICATED),
        line(SMALL, "targeted, mean of the last 20 epochs", 6.7, REPLICATED),
        line(CEIL, "untargeted, last iterate", 0.4, NOISY),
    ]
    ends = Cells({"lr": np.full(4, "0.1"), "accuracy": np.array([80.0, 74.0, 90.0, 85.9])})
    text, size, other, chance = short_answer([RunCells(Run("noise", source, batch=64), ends)], lines)
    assert "MNIST 0/1, untargeted: 0.10 [" in text and "0.20" not in text
    assert size.endswith(f"come out:** {SMALL}, MNIST 0/1 (targeted 5.9 to 6.7).")
    assert other.endswith(f"3 to 9):** {PERSIST}, MNIST 0/1 (untargeted 21.8).")
    assert chance.endswith("MNIST 0/1 in 33 % (lr 0.1, batches of 64).")
    assert short_answer([], lines[:1])[1].endswith("come out:** under no protocol.") and short_answer([], []) == []
    # the verdict is that of the paper's protocol, whatever others bear out
    assert _by_verdict(lines) == [f"*Not replicated*: {claim.text} (figure 5: not replicated in 2 of 2 measurements)."]


# --- laws of statistics ----------------------------------------------------------------------------


STATISTICS: dict[str, Statistic] = {
    **{
        f"{one.__name__}, {goal}": partial(one, goal=goal)
        for one in (
            statistics.trend,
            statistics.pair_harm,
            statistics.pair_share,
            statistics.correlation,
            statistics.mean_drop,
            statistics.adam_lowest,
            statistics.adam_harm,
            statistics.amplified,
            statistics.absolute_deviation,
        )
        for goal in GOALS
    },
    **{f"drop at, {goal}": partial(statistics.drop_at, goal=goal, b=0.1) for goal in GOALS},
    "drop at half": partial(statistics.drop_at, goal="targeted", b=0.1, k=0.5, measure="late_drop"),
    "accuracy at": partial(statistics.accuracy_at, goal="targeted", k=0.5, b=0.1),
    "spread gap": statistics.spread_gap,
    "gap growth": statistics.gap_growth,
    "small gap": statistics.small_gap,
    "large gap": statistics.large_gap,
}


@pytest.fixture(scope="module")
def varied() -> Cells:
    """Cells in which everything that a statistic looks at varies."""
    rng = np.random.default_rng(7)
    parts = []
    for optimizer in ("sgd", "adam"):
        for patience in ("null", "10"):
            for lr in (0.1, 0.3):
                one = simulated(GRID, lambda k, b, goal: 90 - 30 * k * b, 4, rng, lambda goal: 3.0, lr=lr)
                n = len(one)
                slope = 0.05 if optimizer == "sgd" else -0.02  # each is best at a rate of its own
                of_seed = np.array([0.1, 0.4, 0.2, 0.3])[one["seed"]] + slope * lr
                columns = {"optimizer": np.full(n, optimizer, object), "patience": np.full(n, patience, object)}
                columns |= {name: 50 + 10 * rng.normal(size=n) for name in ("late", "minimum", "f1")}
                parts.append(Cells(one.columns | columns | {"validation": of_seed}))
    return with_drops(dict(joined(*parts).columns))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_depends_on_no_order_no_repetition_and_no_other_goal(name: str, varied: Cells) -> None:
    statistic = STATISTICS[name]
    found = statistic(varied)
    assert (
        len(found) == 4 and np.isfinite(found).all() and len(set(np.round(found, 9))) >= (1 if "trend" in name else 2)
    )
    mixed = varied.only(np.random.default_rng(0).permutation(len(varied)))
    assert statistic(mixed) == pytest.approx(found)
    if not name.startswith(("absolute", "spread", "gap")):  # a spread has one degree of freedom less than cells
        assert statistic(joined(varied, varied)) == pytest.approx(found)
    goal = name.partition(", ")[2]
    if goal:
        other = varied["goal"] != goal
        shifted = varied["accuracy"] + 40 * other * (varied["b"] > 0)
        drop = varied["drop"] - 40 * other * (varied["b"] > 0)
        assert statistic(Cells(varied.columns | {"accuracy": shifted, "drop": drop})) == pytest.approx(found)
    if "accuracy at" not in name and "lowest" not in name:  # all but these are of differences
        raised = Cells(varied.columns | {"accuracy": varied["accuracy"] + 5})
        assert statistic(raised) == pytest.approx(found)
    assert (
        statistic(varied.only(varied["seed"] < 2)) == pytest.approx(found[:2])
        or "lowest" in name
        or name.startswith(("absolute", "spread", "gap"))
    )


@pytest.mark.parametrize("name", [name for name in STATISTICS if "lowest" not in name])
def test_a_statistic_of_unattacked_cells_is_empty(name: str, varied: Cells) -> None:
    assert len(STATISTICS[name](varied.only(varied["b"] == 0))) == 0


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_unit_of_a_statistic_changes_nothing_but_its_unit(scale: float) -> None:
    rng = np.random.default_rng(4)
    values, without = rng.normal(size=6), 0.2 * rng.normal(size=20)
    one, other = evidence(values, without), evidence(scale * values, scale * without)
    assert (other.value, other.error) == pytest.approx((scale * one.value, scale * one.error))
    assert other.freedom == pytest.approx(one.freedom) and 5 < one.freedom < 24  # of both parts
    assert evidence(np.ones(6)).freedom == 5 and evidence(np.ones(6)).half == 0


def test_two_seeds_have_a_spread() -> None:
    cells = simulated([(1.0, 0.1, "targeted")], lambda k, b, goal: 90, 2, np.random.default_rng(0))
    away = abs(np.diff(cells["accuracy"])[0]) / 2 * (np.pi / 2 * 2) ** 0.5
    assert statistics.absolute_deviation(cells, "targeted") == pytest.approx([away] * 2)
