"""Verdicts on intervals of statistics, by rules that are stated before any number is seen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fl_attack.sweep_table import Interval

REPLICATED, PARTLY, NOT, NOISY = "replicated", "partly", "not replicated", "too noisy to tell"
INF = math.inf


@dataclass(frozen=True)
class Rule:
    """The bounds within which the interval of a statistic bears a claim out.

    The claim is replicated where all of the interval is within `low` and `high`, too noisy to tell where only a part
    is, else not replicated, or partly where the interval is at least on the right side of `side`.
    """

    low: float = -INF
    high: float = INF
    side: float | None = None

    def verdict(self, found: Interval) -> str:
        """The verdict on the claim by an interval: one of the four constants of this module."""
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


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on several measurements together.

    Replicated where all are, partly where some are, not replicated where one is refuted and none is borne out.
    """
    found = set(verdicts)
    if not found:
        return NOISY
    if found == {REPLICATED}:
        return REPLICATED
    if found & {REPLICATED, PARTLY}:
        return PARTLY
    return NOT if NOT in found else NOISY
