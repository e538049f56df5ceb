"""In which rounds each cell is attacked, and how many labels it may flip then, for many cells at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_attack.config import AttackSettings

EXACT = 2**62  # above this, whole numbers of 64 bits are not enough


class Rounds:
    """Which of M cells are attacked when; see `attack.attacked_before`."""

    def __init__(self, threats: Sequence[AttackSettings], rounds: int) -> None:
        self._every, self._first, self._stop = (
            np.array(values)
            for values in zip(*((t.every, t.start, rounds if t.stop is None else t.stop) for t in threats), strict=True)
        )
        self.always = bool((self._every == 1).all() and (self._first == 1).all() and (self._stop >= rounds).all())

    def attacked(self, round_: int) -> NDArray[np.bool_]:
        """(M,) whether a cell is attacked in a round."""
        since = round_ - self._first
        found: NDArray[np.bool_] = (since >= 0) & (round_ <= self._stop) & (since % self._every == 0)
        return found


class Allowances:
    """Flips allowed, (M, G): M cells, each with G budgets of its own; see `attack.flip_allowance`.

    To be asked for one round after the other: what is carried over depends on the rounds before.
    """

    def __init__(self, threats: Sequence[AttackSettings], most: int, rounds: int) -> None:
        """`most` is the largest number of samples that a budget can be for in a round."""
        exact = [threat.exact_budget for threat in threats]
        small = all(max(b.numerator, b.denominator) * most * (rounds + 1) < EXACT for b in exact)
        kind = np.int64 if small else object
        self._over = np.array([b.numerator for b in exact], kind)[:, None]
        self._under = np.array([b.denominator for b in exact], kind)[:, None]
        self._carries = np.array([threat.rounding == "carry" for threat in threats])[:, None]
        self.rounds = Rounds(threats, rounds)
        self._past: NDArray[np.int64] | int = 0
        self._steady: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def at(self, round_: int, writable: NDArray[np.int64]) -> NDArray[np.int64]:
        """For a round in which `writable` (M, G) samples are within reach.

        The very same array as the round before where it has the same content for a reason that lasts.
        """
        if self._steady is not None and self._steady[0] is writable:
            return self._steady[1]
        now = np.where(self.rounds.attacked(round_)[:, None], writable, 0)
        allowed = self._floor(now)
        if self._carries.any():
            carried = self._floor(self._past + now) - self._floor(self._past)
            allowed = np.where(self._carries, carried, allowed)
            self._past = self._past + now
        elif self.rounds.always:
            self._steady = writable, allowed
        return allowed

    def _floor(self, samples: NDArray[np.int64] | int) -> NDArray[np.int64]:
        whole: NDArray[np.int64] = (self._over * samples // self._under).astype(np.int64)
        return whole
