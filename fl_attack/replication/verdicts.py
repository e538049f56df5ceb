"""Verdicts on what was measured, by rules that are stated before any number is seen."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import interval_text

REPLICATED, PARTLY, NOT, NOISY = "replicated", "partly", "not replicated", "too noisy to tell"
DECIDED = (REPLICATED, PARTLY, NOT)  # the stronger first
FALSE = 0.05  # the share of each kind of verdict that may be false, on average
INF = math.inf


@dataclass(frozen=True)
class Evidence:
    """A statistic with its standard error, which counts the seeds and, where they are known, the test images."""

    value: float
    error: float  # NaN with fewer than two seeds
    freedom: float  # degrees of freedom of the error
    seeds: int

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval (Student's t), NaN with fewer than two seeds."""
        from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn

        return 0.0 if self.error == 0 else float(stdtrit(self.freedom, 0.975) * self.error)

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.value + self.half

    def above(self, bound: float) -> float:
        """The probability of a value so high, or higher, were the true one at most `bound`; 1 without an error."""
        from scipy.special import stdtr

        if bound == -INF:
            return 0.0
        if not math.isfinite(self.value) or math.isnan(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if self.value > bound else 1.0
        return float(stdtr(self.freedom, -(self.value - bound) / self.error))

    def below(self, bound: float) -> float:
        """The probability of a value so low, or lower, were the true one at least `bound`; 1 without an error."""
        return Evidence(-self.value, self.error, self.freedom, self.seeds).above(-bound)

    def __str__(self) -> str:
        return interval_text(self.value, self.low, self.high)


def evidence(values: NDArray[np.float64], without: NDArray[np.float64] | None = None) -> Evidence:
    """A statistic from its value for each seed, and from its mean where a part of the test images is left out.

    Parameters
    ----------
    values : (seeds,) array
        Independent values, whose mean is the statistic.
    without : (parts,) array, optional
        The mean without each of equal parts of the test images.

    Returns
    -------
    Evidence
        The variance is that over seeds and that of the jackknife over parts of the images, added; degrees of freedom
        by Welch and Satterthwaite. The value is NaN without seeds, the error with fewer than two.

    References
    ----------
    Satterthwaite, F. E. (1946). An approximate distribution of estimates of variance components. Biometrics 2, 110.
    """
    n = len(values)
    if n == 0:
        return Evidence(math.nan, math.nan, math.nan, 0)
    value = float(values.mean())
    if n < 2:
        return Evidence(value, math.nan, math.nan, n)
    parts = [(float(values.var(ddof=1)) / n, n - 1)]
    if without is not None and np.isfinite(without).all():
        G = len(without)
        parts.append(((G - 1) / G * float(((without - without.mean()) ** 2).sum()), G - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / of for part, of in parts) if variance > 0 else n - 1
    return Evidence(value, variance**0.5, freedom, n)


@dataclass(frozen=True)
class Criterion:
    """The bounds within which a statistic bears a claim out.

    The claim is replicated where the statistic is surely within `low` and `high`, partly where it is surely beyond
    `side` in the claimed direction, not replicated where it is surely out of the bounds, else too noisy to tell.
    """

    low: float = -INF
    high: float = INF
    side: float | None = None

    def doubts(self, found: Evidence) -> dict[str, float]:
        """The p-value of each verdict of `DECIDED`: the probability of numbers so clear, or clearer, were it false."""
        one, other = found.below(self.low), found.above(self.high)
        outside = other if self.low == -INF else one if self.high == INF else min(1.0, 2 * min(one, other))
        side = 1.0
        if self.side is not None:
            side = found.above(self.side) if self.low > -INF else found.below(self.side)
        return {REPLICATED: max(found.above(self.low), found.below(self.high)), PARTLY: side, NOT: outside}

    def __str__(self) -> str:
        if self.low == -INF:
            text = f"at most {self.high:g}"
        else:
            text = f"at least {self.low:g}" if self.high == INF else f"{self.low:g} to {self.high:g}"
        if self.side is not None:
            text += f"; partly if surely {'above' if self.low > -INF else 'below'} {self.side:g}"
        return text.replace("-", "\N{MINUS SIGN}")


def decide(rows: Sequence[tuple[Criterion, Evidence]]) -> list[str]:
    """The verdict on each row, of `DECIDED` or `NOISY`: of each of `DECIDED` at most `FALSE` are false on average.

    Rows may depend on each other in any way, as those of the same runs do.

    References
    ----------
    Benjamini, Y. and Yekutieli, D. (2001). The control of the false discovery rate in multiple testing under
    dependency. Annals of Statistics 29, 1165.
    """
    doubts = [criterion.doubts(found) for criterion, found in rows]
    sure = {verdict: discoveries(np.array([one[verdict] for one in doubts])) for verdict in DECIDED}
    return [next((verdict for verdict in DECIDED if sure[verdict][i]), NOISY) for i in range(len(rows))]


def discoveries(p: NDArray[np.float64], rate: float = FALSE) -> NDArray[np.bool_]:
    """Which of several tests are discoveries at a false discovery rate, under any dependence.

    Parameters
    ----------
    p : (n,) array
        The p-values of the tests.
    rate : float
        The expected share of false ones among the discoveries.

    Returns
    -------
    (n,) array of bool

    References
    ----------
    Benjamini, Yekutieli (2001). The control of the false discovery rate. https://doi.org/10.1214/aos/1013699998.
    """
    n = len(p)
    if n == 0:
        return np.zeros(0, bool)
    ranks = np.arange(1, n + 1)
    within = np.sort(p) <= rate * ranks / (n * (1 / ranks).sum())
    found: NDArray[np.bool_] = p <= (np.sort(p)[within].max() if within.any() else -1.0)
    return found


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on several measurements together.

    Replicated where all are; else partly where at least half are replicated or partly; else not replicated where at
    least half are not; else, and without any, too noisy to tell.
    """
    found = list(verdicts)
    if not found:
        return NOISY
    if set(found) == {REPLICATED}:
        return REPLICATED
    if 2 * (found.count(REPLICATED) + found.count(PARTLY)) >= len(found):
        return PARTLY
    return NOT if 2 * found.count(NOT) >= len(found) else NOISY


def counted(verdicts: Iterable[str]) -> str:
    """In words, how many of how many measurements have each verdict, but for those that none has."""
    found = list(verdicts)
    each = [f"{name} in {found.count(name)}" for name in (*DECIDED, NOISY) if name in found]
    return f"{', '.join(each)} of {len(found)} measurement{'s' * (len(found) != 1)}"
