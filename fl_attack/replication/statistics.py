"""What is measured for the claims: functions of cells that give a value for each seed, in points if they say no other.

Cells are those of `cells.read`. A value is a function of the cells of its seed, or is taken over the others' choice, so
that values are independent, or nearly, and their mean has Student's interval. All give (seeds,), empty where the cells
do not hold what is measured.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import Cells, Floats

Statistic = Callable[[Cells], Floats]
OfSeeds = dict[float, float]  # values by seed
SMALL, LARGE = 0.1, 0.25  # global budgets: at most, at least
LEAST_EFFECT = 0.5  # points: the least difference that counts where only a direction is claimed
GOALS = ("untargeted", "targeted")
DEVIATION = (np.pi / 2) ** 0.5  # standard deviation over mean absolute deviation, of normal values


def mean(values: Floats) -> float:
    """Mean of those of the values that are finite; NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def by_seed(cells: Cells, function: Callable[[Cells], float]) -> Floats:
    """The value of a function for the cells of each seed.

    Parameters
    ----------
    cells : Cells
        The cells of all seeds.
    function : callable
        A function of the cells of one seed that gives a number.

    Returns
    -------
    (seeds,) array
        The numbers in the order of the seeds; a seed whose number is not finite has none.
    """
    return np.array(list(_of_seeds(cells, function).values()), float)


def drop_at(cells: Cells, goal: str, b: float, k: float = 1.0, measure: str = "drop") -> Floats:
    """Points lost at a write access and a local budget.

    Parameters
    ----------
    cells : Cells
        The cells of a run.
    goal : str
        The goal of the attack.
    b, k : float
        Local budget and write access, shares of 1.
    measure : str
        The column of the drop.

    Returns
    -------
    (seeds,) array
        In points.
    """
    return by_seed(cells.where(goal=goal, b=b, k=k), lambda of_seed: mean(of_seed[measure]))


def trend(cells: Cells, goal: str) -> Floats:
    """Kendall's tau of accuracy and global budget under full write access, from -1 to 1: 1 where it always falls.

    Of the pairs of budgets, the share in which the larger one costs at least `LEAST_EFFECT` points more, less the share
    in which it costs as much less: an attack that does nothing has 0, and so has noise. Empty where there
    are not three budgets.

    Parameters
    ----------
    cells, goal
        As `drop_at` takes them.

    Returns
    -------
    (seeds,) array
    """

    def tau(of_seed: Cells) -> float:
        means = np.array([mean(of_seed["accuracy"][at]) for _, at in of_seed.parts("kb")])
        one, other = np.triu_indices(len(means), 1)
        falls = means[one] - means[other]
        return mean(np.sign(falls) * (np.abs(falls) >= LEAST_EFFECT)) if len(means) > 2 else float("nan")

    return by_seed(cells.where(goal=goal, k=1.0), tau)


def accuracy_at(cells: Cells, goal: str, k: float, b: float) -> Floats:
    """Accuracy in points at a write access and a local budget, for each seed; arguments as of `drop_at`."""
    return by_seed(cells.where(goal=goal, k=k, b=b), lambda of_seed: mean(of_seed["accuracy"]))


def absolute_deviation(cells: Cells, goal: str) -> Floats:
    """Absolute deviation of the accuracy from its mean over seeds, averaged over attacked settings, for each seed.

    In points; arguments as of `drop_at`. Scaled so that its mean is the standard deviation of normal values.
    Differences of such values hold their level where those of standard deviations do not.

    References
    ----------
    Levene, H. (1960). Robust tests for equality of variances. Contributions to Probability and Statistics, 278.
    """
    return np.array(list(_deviations(cells, goal).values()), float)


def _deviations(cells: Cells, goal: str) -> OfSeeds:
    """The values of `absolute_deviation`, by seed."""
    attacked = cells.where(goal=goal).only(cells.where(goal=goal)["b"] > 0)
    columns = dict(attacked.columns)
    deviation = np.full(len(attacked), np.nan)
    for _, at in attacked.parts("k", "b") if len(attacked) else ():
        n = len(at)
        if n > 1:
            values = attacked["accuracy"][at]
            deviation[at] = DEVIATION * (n / (n - 1)) ** 0.5 * np.abs(values - values.mean())
    return _of_seeds(Cells(columns | {"away": deviation}), lambda one: mean(one["away"]))


def spread_gap(cells: Cells) -> Floats:
    """`absolute_deviation` under the untargeted attack less that under the targeted one, for each seed of both."""
    return np.array(list(_spread_gaps(cells).values()), float)


def _spread_gaps(cells: Cells) -> OfSeeds:
    """The values of `spread_gap`, by seed."""
    return _difference(_deviations(cells, "untargeted"), _deviations(cells, "targeted"))


def gap_growth(cells: Cells) -> Floats:
    """`spread_gap` of the larger half of the write accesses, the middle one in it, less that of the smaller half."""
    ks = np.unique(cells["k"])
    middle = ks[len(ks) // 2]
    larger, smaller = (_spread_gaps(cells.only(mask)) for mask in (cells["k"] >= middle, cells["k"] < middle))
    return np.array(list(_difference(larger, smaller).values()), float)


def goal_gaps(cells: Cells, mask: Callable[[Floats], NDArray[np.bool_]]) -> Floats:
    """Accuracy of the targeted less that of the untargeted attack, by seed and setting (k, b).

    Parameters
    ----------
    cells : Cells
        The cells of a run.
    mask : callable
        Which global budgets count, of those above 0: an array of bool from one of floats.

    Returns
    -------
    (seeds, settings) array
        In points; empty where seeds have not all the same settings.
    """
    attacked = cells.only((cells["b"] > 0) & mask(cells["kb"]))
    rows = []
    for _, at in attacked.parts("seed") if len(attacked) else ():
        of_seed = attacked.only(at)
        by_setting = [
            mean(of_seed["accuracy"][at_setting][of_seed["goal"][at_setting] == "targeted"])
            - mean(of_seed["accuracy"][at_setting][of_seed["goal"][at_setting] == "untargeted"])
            for _, at_setting in of_seed.parts("k", "b")
        ]
        rows.append(by_setting)
    return np.array(rows) if rows and len({len(row) for row in rows}) == 1 else np.empty((0, 0))


def small_gap(cells: Cells) -> Floats:
    """By how many points the untargeted attack does more harm at global budgets up to `SMALL`, for each seed.

    Signed, since the size of a difference that is not there is never zero.
    """
    gaps = goal_gaps(cells, lambda kb: kb <= SMALL + 1e-9)
    return _finite(gaps.mean(1)) if gaps.size else np.empty(0)


def large_gap(cells: Cells) -> Floats:
    """By how many points the untargeted attack does more harm at global budgets from `LARGE` on, for each seed."""
    gaps = goal_gaps(cells, lambda kb: kb >= LARGE - 1e-9)
    return _finite(gaps.mean(1)) if gaps.size else np.empty(0)


def pairs(cells: Cells, goal: str) -> Iterator[Floats]:
    """Accuracy at the smaller less that at the larger k, for every pair of settings with the same k·b > 0.

    Parameters
    ----------
    cells, goal
        As `drop_at` takes them.

    Yields
    ------
    (pairs,) array
        One for each seed that has pairs, in points.
    """
    attacked = cells.where(goal=goal).only(cells.where(goal=goal)["b"] > 0)
    for _, at in attacked.parts("seed") if len(attacked) else ():
        of_seed, at_kb = attacked.only(at), dict[float, list[float]]()
        for (kb, _), here in of_seed.parts("kb", "k"):
            at_kb.setdefault(kb, []).append(mean(of_seed["accuracy"][here]))  # by rising k
        found = [one - other for line in at_kb.values() for i, one in enumerate(line) for other in line[i + 1 :]]
        if found:
            yield np.array(found)


def pair_harm(cells: Cells, goal: str) -> Floats:
    """By how many points the larger k does more harm at equal k·b, for each seed; arguments as of `pairs`."""
    return _finite(np.array([mean(found) for found in pairs(cells, goal)]))


def pair_share(cells: Cells, goal: str) -> Floats:
    """Share of `pairs` (%) in which the larger k does more harm, for each seed; arguments as of `pairs`.

    A difference of less than `LEAST_EFFECT` counts a half.
    """
    return _finite(
        np.array([100 * mean((np.sign(f) * (np.abs(f) >= LEAST_EFFECT) + 1) / 2) for f in pairs(cells, goal)])
    )


def correlation(cells: Cells, goal: str) -> Floats:
    """Pearson's r of F1 and accuracy over settings, for each seed; arguments as of `pairs`."""

    def r(of_seed: Cells) -> float:
        means = np.array(
            [(of_seed["f1"][at].mean(), of_seed["accuracy"][at].mean()) for _, at in of_seed.parts("k", "b")]
        )
        return float(np.corrcoef(means.T)[0, 1]) if len(means) > 2 and (means.std(0) > 1e-9).all() else float("nan")

    return by_seed(cells.where(goal=goal), r)


def at_best(cells: Cells) -> Cells:
    """The cells at the learning rate whose unattacked models have the lowest validation loss.

    Where nothing was held out it is the rate of their best accuracy; without unattacked ones these are all cells.
    """
    honest = cells.only(cells["b"] == 0)
    has_validation = "validation" in honest.columns and np.isfinite(honest["validation"]).all()
    quality = -honest["validation"] if has_validation else honest["accuracy"]
    found = {lr: mean(quality[at]) for (lr,), at in honest.parts("lr")}
    return cells.where(lr=max(found, key=lambda lr: found[lr])) if found else cells


def mean_drop(cells: Cells, goal: str) -> Floats:
    """Points lost over all attacked settings, for each seed; arguments as of `pairs`."""
    return np.array(list(_mean_drops(cells, goal).values()), float)


def _mean_drops(cells: Cells, goal: str) -> OfSeeds:
    """The values of `mean_drop`, by seed."""
    return _of_seeds(cells.where(goal=goal), lambda of_seed: mean(of_seed["drop"][of_seed["b"] > 0]))


def amplified(cells: Cells, goal: str) -> Floats:
    """Drop with early stopping less that without, at the best learning rate without; arguments as of `pairs`."""
    lasting = at_best(cells.where(patience="null"))
    rates: set[object] = set(lasting["lr"].tolist())
    stopped = cells.only(np.array([lr in rates for lr in cells["lr"].tolist()]) & (cells["patience"] != "null"))
    return np.array(list(_difference(_mean_drops(stopped, goal), _mean_drops(lasting, goal)).values()), float)


def adam_harm(cells: Cells, goal: str) -> Floats:
    """Drop under Adam less that under SGD, each at its best learning rate; arguments as of `pairs`."""
    adam, sgd = (at_best(cells.where(optimizer=optimizer)) for optimizer in ("adam", "sgd"))
    return np.array(list(_difference(_mean_drops(adam, goal), _mean_drops(sgd, goal)).values()), float)


def adam_lowest(cells: Cells, goal: str) -> Floats:
    """Accuracy under Adam at the budget at which it is lowest for the other seeds; arguments as of `pairs`.

    The learning rate is that which serves Adam best.
    """
    adam = at_best(cells.where(optimizer="adam")).where(goal=goal)
    rows = [
        [mean(adam["accuracy"][at][adam["b"][at] == b]) for b in np.unique(adam["b"])]
        for _, at in (adam.parts("seed") if len(adam) else ())
    ]
    table = np.array(rows)
    if len(table) < 2:
        return np.empty(0)
    others = (table.sum(0) - table) / (len(table) - 1)
    return _finite(table[np.arange(len(table)), others.argmin(1)])


def _of_seeds(cells: Cells, function: Callable[[Cells], float]) -> OfSeeds:
    """The finite values that a function has for the cells of a seed, by seed."""
    found = {seed: function(cells.only(at)) for (seed,), at in (cells.parts("seed") if len(cells) else ())}
    return {seed: value for seed, value in found.items() if np.isfinite(value)}


def _difference(one: OfSeeds, other: OfSeeds) -> OfSeeds:
    """What the one has more than the other, by seed, of those that both have."""
    return {seed: value - other[seed] for seed, value in one.items() if seed in other}


def _finite(values: Floats) -> Floats:
    """The values that are finite."""
    finite: Floats = values[np.isfinite(values)]
    return finite
