"""From a statistic to a verdict, by rules that are stated before any number is seen."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn

REPLICATED, PARTLY, NOT, NOISY = "replicated", "partly", "not replicated", "too noisy to tell"
INF = math.inf


@dataclass(frozen=True)
class Interval:
    """A statistic and the ends of its interval."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Rule:
    """What the interval of a statistic has to say for a claim to hold.

    It is replicated where all of the interval is within `low` and `high`; too noisy to tell where only a part is;
    else not replicated, or partly where the interval is at least on the right side of `side`.
    """

    low: float = -INF
    high: float = INF
    side: float | None = None

    def verdict(self, found: Interval) -> str:
        """What an interval says of the claim."""
        if math.isnan(found.value) or math.isnan(found.low) or math.isnan(found.high):
            return NOISY
        if self.low <= found.low and found.high <= self.high:
            return REPLICATED
        if self.side is not None and (found.low > self.side if self.low > -INF else found.high < self.side):
            return PARTLY
        if found.high < self.low or found.low > self.high:
            return NOT
        return NOISY

    def __str__(self) -> str:
        if self.low == -INF:
            text = f"at most {self.high:g}"
        else:
            text = f"at least {self.low:g}" if self.high == INF else f"{self.low:g} to {self.high:g}"
        if self.side is not None:
            text += f"; partly if surely {'above' if self.low > -INF else 'below'} {self.side:g}"
        return text.replace("-", "\N{MINUS SIGN}")


def interval(statistic: Callable[[NDArray[np.bool_]], float], seed: NDArray[np.int64], level: float = 0.95) -> Interval:
    """Jackknife interval over seeds of a statistic of cells (Tukey 1958), with Student's t.

    `statistic` takes a mask (cells,) of the cells to use; `seed` (cells,) says whose each is. For a mean over seeds it
    is the usual t interval. Without two seeds its ends are NaN.
    """
    seeds = np.unique(seed)
    value, n = statistic(np.ones(len(seed), bool)), len(seeds)
    if n < 2:
        return Interval(value, math.nan, math.nan, n)
    without = np.array([statistic(seed != one) for one in seeds])
    half = stdtrit(n - 1, (1 + level) / 2) * np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return Interval(value, float(value - half), float(value + half), n)


def overall(verdicts: Iterable[str]) -> str:
    """Of several rows: replicated where all are, partly where some are, not where one is not and none is."""
    found = set(verdicts)
    if not found:
        return NOISY
    if found == {REPLICATED}:
        return REPLICATED
    if found & {REPLICATED, PARTLY}:
        return PARTLY
    return NOT if NOT in found else NOISY
