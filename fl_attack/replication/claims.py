"""The claims of the paper: what is measured for each, and the rule that decides. A new one is a row of `CLAIMS`.

A statistic takes cells and gives a value for each seed; its error is over seeds, each cell paired with the unattacked
one of its seed, and over test images. Rules follow three conventions. Where the paper gives a size, between half and
one and a half times of it replicates. Where it gives a direction, `LEAST_EFFECT` points are the least that counts. An
effect that is sure, and of at least as many points, but beyond these bounds is a partial replication.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from fl_attack.replication.cells import without_part
from fl_attack.replication.statistics import (
    GOALS,
    LARGE,
    LEAST_EFFECT,
    SMALL,
    Statistic,
    accuracy_at,
    adam_harm,
    adam_lowest,
    amplified,
    correlation,
    drop_at,
    gap_growth,
    large_gap,
    mean,
    pair_harm,
    pair_share,
    small_gap,
    spread_gap,
    trend,
)
from fl_attack.replication.verdicts import Criterion, Evidence, decide, evidence
from fl_attack.sweep_table import Cells, Floats

TENTH = {1.0: 0.001, 0.5: 0.002, 0.3: 0.0033}  # the local budget that is 0.1 % of all labels, by write access
QUARTER = {1.0: 0.25, 0.5: 0.5, 0.3: 0.83}  # 25 % of them
MEASURES = {"last iterate": "drop", "mean of the last 20 epochs": "late_drop", "least over epochs": "minimum_drop"}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, how it is measured, and on which sweep."""

    figure: str
    preset: str  # the sweep that it is decided on
    text: str
    paper: str  # the paper's number
    quantity: str  # what is measured, with its unit
    criterion: Criterion
    measures: Mapping[str, Statistic]  # the statistics by label
    others: tuple[str, ...] = ("protocols",)  # sweeps that show how much depends on protocol and learning rate
    own_rate: bool = False  # whether its statistics choose the best learning rate themselves


@dataclass(frozen=True)
class Finding:
    """A claim measured once."""

    label: str
    found: Evidence
    verdict: str


def measure(claim: Claim, cells: Cells) -> Iterator[Finding]:
    """Findings of a claim, each with the verdict that it would have by itself.

    Parameters
    ----------
    claim : Claim
        The claim to measure.
    cells : Cells
        The cells of a run of the claim's preset.

    Yields
    ------
    Finding
        One for each measure that the cells hold.
    """
    for label, statistic in claim.measures.items():
        found = measured(statistic, cells)
        if np.isfinite(found.value):
            yield Finding(label, found, decide([(claim.criterion, found)])[0])


def measured(statistic: Statistic, cells: Cells) -> Evidence:
    """A statistic of cells with its error over seeds and, where the cells count them, test images.

    Parameters
    ----------
    statistic : callable
        A function of cells that gives a value for each seed.
    cells : Cells
        The cells that the statistic is computed from.

    Returns
    -------
    Evidence
    """
    values, without = statistic(cells), None
    if "moved" in cells.columns and len(values) > 1:
        parts = range(cells["moved"].shape[1])
        without = np.array([mean(statistic(without_part(cells, part))) for part in parts])
    return evidence(values, without)


def by_goal(statistic: Callable[..., Floats], **arguments: float) -> dict[str, Statistic]:
    """A statistic for each goal of the attack.

    Parameters
    ----------
    statistic : callable
        A function of cells, a `goal`, and the other arguments.
    **arguments : float
        Other arguments of the statistic, the same for all goals.

    Returns
    -------
    dict of str to callable
        The statistic of cells alone, by goal.
    """
    return {goal: partial(statistic, goal=goal, **arguments) for goal in GOALS}


CLAIMS = (
    Claim(
        "5",
        "fig5",
        "accuracy falls monotonically with the global budget",
        "monotone",
        "Kendall's tau of accuracy and budget, differences below half a point counting as ties, k = 1",
        Criterion(0.8, side=0.5),
        by_goal(trend),
    ),
    Claim(
        "5",
        "smallest",
        "0.1 % of the labels a round cost 6 points",
        "6 points",
        "drop at k·b = 0.001 (points)",
        Criterion(3.0, 9.0, side=LEAST_EFFECT),
        {
            f"{goal}, {name}": partial(drop_at, goal=goal, b=TENTH[1.0], measure=column)
            for name, column in MEASURES.items()
            for goal in GOALS
        }
        | {
            f"{goal}, last iterate, k = {k:g}": partial(drop_at, goal=goal, b=b, k=k)
            for k, b in TENTH.items()
            if k < 1
            for goal in GOALS
        },
    ),
    Claim(
        "5",
        "fig5",
        "25 % of the labels give chance or worse",
        "at most 50 %",
        "accuracy at k·b = 0.25 (%)",
        Criterion(high=55.0, side=75.0),
        {f"{goal}, k = {k:g}": partial(accuracy_at, goal=goal, k=k, b=b) for k, b in QUARTER.items() for goal in GOALS},
    ),
    Claim(
        "6",
        "fig6",
        "untargeted varies more than targeted",
        "more",
        "difference of the deviations from the mean over seeds, scaled to standard deviations (points)",
        Criterion(LEAST_EFFECT),
        {"": spread_gap},
    ),
    Claim(
        "6",
        "fig6",
        "it does so the more, the larger k",
        "more",
        "that difference for large k less that for small k (points)",
        Criterion(LEAST_EFFECT),
        {"": gap_growth},
    ),
    Claim(
        "7",
        "fig7",
        "for small budgets the goals differ little",
        "small",
        f"accuracy of the targeted less that of the untargeted at k·b up to {SMALL:g} (points)",
        Criterion(-2.0, 2.0),
        {"": small_gap},
    ),
    Claim(
        "7",
        "fig7",
        "for large budgets the untargeted attack does more harm",
        "more",
        f"accuracy of the targeted less that of the untargeted at k·b from {LARGE:g} (points)",
        Criterion(LEAST_EFFECT),
        {"": large_gap},
    ),
    Claim(
        "8",
        "fig8",
        "at equal k·b a larger k does more harm than a larger b",
        "more",
        "mean difference of accuracy over pairs of equal k·b (points)",
        Criterion(LEAST_EFFECT),
        by_goal(pair_harm),
    ),
    Claim(
        "8",
        "fig8",
        "it does so for every pair of settings",
        "all pairs",
        "share of pairs and seeds in which the larger k does half a point more harm, ties a half (%)",
        Criterion(90.0, side=50.0),
        by_goal(pair_share),
    ),
    Claim(
        "9",
        "fig9",
        "on ten classes 5 % of the labels cost 10 to 19 points",
        "10 to 19 points",
        "drop at k·b = 0.05, k = 1 (points)",
        Criterion(5.0, 28.5, side=LEAST_EFFECT),
        by_goal(drop_at, b=0.05),
    ),
    Claim(
        "11",
        "fig11",
        "F1 mirrors accuracy",
        "mirrors",
        "correlation of F1 and accuracy over (k, b), within a seed",
        Criterion(0.9, side=0.5),
        by_goal(correlation),
    ),
    Claim(
        "12",
        "fig12",
        "early stopping amplifies the harm",
        "more",
        "drop with early stopping less drop without, over all budgets (points)",
        Criterion(LEAST_EFFECT),
        by_goal(amplified),
        others=(),
        own_rate=True,
    ),
    Claim(
        "14",
        "fig14",
        "Adam is more vulnerable than SGD",
        "more",
        "drop under Adam less drop under SGD, each at its best learning rate (points)",
        Criterion(LEAST_EFFECT),
        by_goal(adam_harm),
        others=(),
        own_rate=True,
    ),
    Claim(
        "14",
        "fig14",
        "Adam goes down to 10 % accuracy",
        "10 %",
        "accuracy under Adam at its best learning rate, at the budget worst for the other seeds (%)",
        Criterion(high=15.0),
        by_goal(adam_lowest),
        others=(),
        own_rate=True,
    ),
)
