"""What is measured for the claims: functions of cells that give a number, in points of 100 unless they say otherwise.

Cells are those of `cells.read`. All give NaN where the cells do not hold what is measured.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import Cells, pooled_deviation

Statistic = Callable[[Cells], float]
SMALL, LARGE = 0.1, 0.25  # global budgets: at most, at least
GOALS = ("untargeted", "targeted")


def mean(values: NDArray[np.float64]) -> float:
    """Mean of the finite values; NaN without any."""
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
    return pooled_deviation(mine["accuracy"][at] for _, at in mine.parts("k", "b"))


def spread_gap(cells: Cells) -> float:
    """Standard deviation under the untargeted attack less that under the targeted one."""
    return spread(cells, "untargeted") - spread(cells, "targeted") if len(cells) else float("nan")


def gap_growth(cells: Cells) -> float:
    """`spread_gap` of the larger half of the write accesses less that of the smaller half."""
    ks = np.unique(cells["k"])
    middle = ks[len(ks) // 2]
    return spread_gap(cells.only(cells["k"] >= middle)) - spread_gap(cells.only(cells["k"] < middle))


def goal_gaps(cells: Cells) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean accuracy of the targeted less that of the untargeted attack at each (k, b) with b > 0; and each k·b."""
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
    """Mean of `pairs`: by how much the larger k does more harm at equal k·b."""
    return mean(pairs(cells, goal))


def pair_share(cells: Cells, goal: str) -> float:
    """Share of `pairs` (%) in which the larger k does more harm; a tie counts a half."""
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
