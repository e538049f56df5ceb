"""The claims of the paper: what is measured for each, and the rule that decides. A new one is a row of `CLAIMS`.

A statistic takes cells and gives a number; its interval is over seeds, each cell paired with the unattacked one of its
seed. Rules follow three conventions. Where the paper gives a size, between half and one and a half times of it
replicates. Where it gives a direction, `COUNTS` points are the least that counts. An effect that is sure but beyond
these bounds is a partial replication.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fl_attack.replication.cells import Cells
from fl_attack.replication.verdicts import Interval, Rule, interval

Statistic = Callable[[Cells], float]
COUNTS = 0.5  # points: the least difference that counts where only a direction is claimed
SMALL, LARGE = 0.1, 0.25  # global budgets: at most, at least
GOALS = ("untargeted", "targeted")


@dataclass(frozen=True)
class Claim:
    """A claim, how it is measured, and from which sweep."""

    figure: str
    preset: str  # the sweep that it is decided on
    text: str
    paper: str  # its figure there
    quantity: str  # what is measured, with its unit
    rule: Rule
    measures: Mapping[str, Statistic]  # by label


@dataclass(frozen=True)
class Finding:
    """A claim measured once."""

    label: str
    found: Interval
    verdict: str


def measure(claim: Claim, cells: Cells) -> Iterator[Finding]:
    """Each measure of a claim on some cells; none of what they do not hold."""
    for label, statistic in claim.measures.items():
        found = interval(lambda mask, of=statistic: of(cells.only(mask)), cells["seed"])  # type: ignore[misc]
        if np.isfinite(found.value):
            yield Finding(label, found, claim.rule.verdict(found))


def mean(values: NDArray[np.float64]) -> float:
    """Of the finite values; NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def drop_at(cells: Cells, goal: str, kb: float, measure: str = "drop") -> float:
    """Mean points lost at a global budget under full write access."""
    return mean(cells.where(goal=goal, kb=kb, k=1.0)[measure])


def steepest_rise(cells: Cells, goal: str) -> float:
    """Largest rise of the mean accuracy from a global budget to the next larger one, under full write access."""
    mine = cells.where(goal=goal, k=1.0)
    means = [mean(mine["accuracy"][at]) for _, at in mine.parts("kb")]
    return float(np.diff(means).max()) if len(means) > 1 else float("nan")


def accuracy_at(cells: Cells, goal: str, k: float, b: float) -> float:
    """Mean accuracy at a write access and a local budget."""
    return mean(cells.where(goal=goal, k=k, b=b)["accuracy"])


def spread(cells: Cells, goal: str) -> float:
    """Standard deviation of the accuracy over seeds, pooled over attacked settings."""
    mine = cells.where(goal=goal).only(cells.where(goal=goal)["b"] > 0)
    groups = [mine["accuracy"][at] for _, at in mine.parts("k", "b")]
    freedom = sum(len(group) - 1 for group in groups)
    return float((sum(len(group) * group.var() for group in groups) / freedom) ** 0.5) if freedom else float("nan")


def spread_gap(cells: Cells) -> float:
    """How much more the untargeted attack varies than the targeted one."""
    return spread(cells, "untargeted") - spread(cells, "targeted") if len(cells) else float("nan")


def gap_growth(cells: Cells) -> float:
    """That for the larger half of the write accesses less that for the smaller half."""
    ks = np.unique(cells["k"])
    middle = ks[len(ks) // 2]
    return spread_gap(cells.only(cells["k"] >= middle)) - spread_gap(cells.only(cells["k"] < middle))


def goal_gaps(cells: Cells) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean accuracy of the targeted less that of the untargeted attack at each (k, b) with b > 0, and the k·b."""
    gaps, budgets = [], []
    attacked = cells.only(cells["b"] > 0)
    for _, at in attacked.parts("k", "b"):
        means = [mean(attacked["accuracy"][at][attacked["goal"][at] == goal]) for goal in reversed(GOALS)]
        gaps.append(means[0] - means[1])
        budgets.append(attacked["kb"][at[0]])
    return np.array(gaps), np.array(budgets)


def small_gap(cells: Cells) -> float:
    """Mean size of the difference of goals at small global budgets."""
    gaps, budgets = goal_gaps(cells)
    return mean(np.abs(gaps[budgets <= SMALL + 1e-9]))


def large_gap(cells: Cells) -> float:
    """Mean by which the untargeted attack does more harm at large global budgets."""
    gaps, budgets = goal_gaps(cells)
    return mean(gaps[budgets >= LARGE - 1e-9])


def pairs(cells: Cells, goal: str) -> NDArray[np.float64]:
    """Accuracy at the smaller less that at the larger k, for every pair of settings with the same k·b > 0."""
    mine = cells.where(goal=goal).only(cells.where(goal=goal)["b"] > 0)
    at_kb: dict[float, list[float]] = {}
    for (kb, _), at in mine.parts("kb", "k"):
        at_kb.setdefault(kb, []).append(mean(mine["accuracy"][at]))  # by rising k
    return np.array([one - other for line in at_kb.values() for i, one in enumerate(line) for other in line[i + 1 :]])


def pair_harm(cells: Cells, goal: str) -> float:
    """Mean of these."""
    return mean(pairs(cells, goal))


def pair_share(cells: Cells, goal: str) -> float:
    """In how many of them (%) the larger k does more harm; a tie counts a half."""
    found = pairs(cells, goal)
    return 100 * mean((np.sign(np.round(found, 6)) + 1) / 2)


def correlation(cells: Cells, goal: str) -> float:
    """Pearson's r of the mean F1 and the mean accuracy of settings."""
    mine = cells.where(goal=goal)
    means = np.array([(mine["f1"][at].mean(), mine["accuracy"][at].mean()) for _, at in mine.parts("k", "b")])
    return float(np.corrcoef(means.T)[0, 1]) if len(means) > 2 and means.std(0).all() else float("nan")


def at_best(cells: Cells) -> Cells:
    """The cells at the learning rate that serves the unattacked ones best."""
    honest = cells.only(cells["b"] == 0)
    accuracy = {lr: mean(honest["accuracy"][at]) for (lr,), at in honest.parts("lr")}
    return cells.where(lr=max(accuracy, key=lambda lr: accuracy[lr])) if accuracy else cells


def amplified(cells: Cells, goal: str) -> float:
    """Mean drop with early stopping less that without, at the best learning rate without."""
    lasting = at_best(cells.where(patience="null"))
    rates: set[object] = set(lasting["lr"].tolist())
    stopped = cells.only(np.array([lr in rates for lr in cells["lr"].tolist()]) & (cells["patience"] != "null"))
    drops = [one.where(goal=goal) for one in (stopped, lasting)]
    return mean(drops[0]["drop"][drops[0]["b"] > 0]) - mean(drops[1]["drop"][drops[1]["b"] > 0])


def adam_harm(cells: Cells, goal: str) -> float:
    """Mean drop under Adam less that under SGD, each at its best learning rate."""
    adam, sgd = (at_best(cells.where(optimizer=optimizer)).where(goal=goal) for optimizer in ("adam", "sgd"))
    return mean(adam["drop"][adam["b"] > 0]) - mean(sgd["drop"][sgd["b"] > 0])


def adam_lowest(cells: Cells, goal: str) -> float:
    """Lowest mean accuracy of any budget under Adam at its best learning rate."""
    mine = at_best(cells.where(optimizer="adam")).where(goal=goal)
    means = [mean(mine["accuracy"][at]) for _, at in mine.parts("k", "b")]
    return min(means) if means else float("nan")


def by_goal(statistic: Callable[..., float], **arguments: float) -> dict[str, Statistic]:
    """A statistic for each goal."""
    return {goal: partial(statistic, goal=goal, **arguments) for goal in GOALS}


CLAIMS = (
    Claim(
        "5",
        "fig5",
        "accuracy falls monotonically with the global budget",
        "monotone",
        "largest rise between neighbouring global budgets, k = 1 (points)",
        Rule(high=1.0),
        by_goal(steepest_rise),
    ),
    Claim(
        "5",
        "fig5",
        "0.1 % of the labels a round cost 6 points",
        "6 points",
        "drop at k·b = 0.001, k = 1 (points)",
        Rule(3.0, 9.0, side=0.0),
        {f"{goal}, last iterate": partial(drop_at, goal=goal, kb=0.001) for goal in GOALS}
        | {
            f"{goal}, mean of the last 20 epochs": partial(drop_at, goal=goal, kb=0.001, measure="late_drop")
            for goal in GOALS
        },
    ),
    Claim(
        "5",
        "fig5",
        "25 % of the labels give chance or worse",
        "at most 50 %",
        "accuracy at k·b = 0.25 (%)",
        Rule(high=55.0, side=75.0),
        {
            f"{goal}, k = {k:g}": partial(accuracy_at, goal=goal, k=k, b=b)
            for k, b in ((0.5, 0.5), (1.0, 0.25))
            for goal in GOALS
        },
    ),
    Claim(
        "6",
        "fig6",
        "untargeted varies more than targeted",
        "more",
        "difference of the standard deviations over seeds, pooled over k and b (points)",
        Rule(COUNTS, side=0.0),
        {"": spread_gap},
    ),
    Claim(
        "6",
        "fig6",
        "it does so the more, the larger k",
        "more",
        "that difference for large k less that for small k (points)",
        Rule(COUNTS, side=0.0),
        {"": gap_growth},
    ),
    Claim(
        "7",
        "fig7",
        "for small budgets the goals differ little",
        "small",
        f"mean size of the difference of accuracy at k·b up to {SMALL:g} (points)",
        Rule(high=2.0),
        {"": small_gap},
    ),
    Claim(
        "7",
        "fig7",
        "for large budgets the untargeted attack does more harm",
        "more",
        f"accuracy of the targeted less that of the untargeted at k·b from {LARGE:g} (points)",
        Rule(COUNTS, side=0.0),
        {"": large_gap},
    ),
    Claim(
        "8",
        "fig8",
        "at equal k·b a larger k does more harm than a larger b",
        "more",
        "mean difference of accuracy over pairs of equal k·b (points)",
        Rule(COUNTS, side=0.0),
        by_goal(pair_harm),
    ),
    Claim(
        "8",
        "fig8",
        "it does so for every pair of settings",
        "all pairs",
        "share of the pairs in which the larger k does more harm (%)",
        Rule(90.0, side=50.0),
        by_goal(pair_share),
    ),
    Claim(
        "9",
        "fig9",
        "on ten classes 5 % of the labels cost 10 to 19 points",
        "10 to 19 points",
        "drop at k·b = 0.05, k = 1 (points)",
        Rule(5.0, 28.5, side=0.0),
        by_goal(drop_at, kb=0.05),
    ),
    Claim(
        "11",
        "fig11",
        "F1 mirrors accuracy",
        "mirrors",
        "correlation of F1 and accuracy over (k, b)",
        Rule(0.9, side=0.5),
        by_goal(correlation),
    ),
    Claim(
        "12",
        "fig12",
        "early stopping amplifies the harm",
        "more",
        "drop with early stopping less drop without, over all budgets (points)",
        Rule(COUNTS, side=0.0),
        by_goal(amplified),
    ),
    Claim(
        "14",
        "fig14",
        "Adam is more vulnerable than SGD",
        "more",
        "drop under Adam less drop under SGD, each at its best learning rate (points)",
        Rule(COUNTS, side=0.0),
        by_goal(adam_harm),
    ),
    Claim(
        "14",
        "fig14",
        "Adam goes down to 10 % accuracy",
        "10 %",
        "lowest mean accuracy under Adam at its best learning rate (%)",
        Rule(high=15.0),
        by_goal(adam_lowest),
    ),
)
