"""How many labels each cell may flip in each round, for many cells at once."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fl_attack import attack
from fl_attack.config import AttackSettings


@lru_cache(maxsize=4096)
def _cycle(threat: AttackSettings, writable: int, attacked: int) -> NDArray[np.int64]:
    """Flips allowed in the rounds attacked, until they repeat: `b n t` is whole after denominator(b) rounds."""
    budget, rounding = threat.exact_budget, threat.rounding
    length = 1 if rounding == "floor" else min(budget.denominator, attacked)
    return np.array([attack.flip_allowance(budget, t * writable, writable, rounding) for t in range(max(1, length))])


class Allowances:
    """Flips allowed by round, (M, G): M cells, each with G budgets of its own."""

    def __init__(self, threats: Sequence[AttackSettings], writable: NDArray[np.int64], rounds: int) -> None:
        """`writable` (M, G): the samples of a round that each budget is for."""
        plain = [  # what an allowance depends on, for the cache
            AttackSettings(name="greedy", budget=threat.budget, rounding=threat.rounding) for threat in threats
        ]
        cycles = [[_cycle(threat, int(n), rounds) for n in row] for threat, row in zip(plain, writable, strict=True)]
        lengths = np.array([[len(cycle) for cycle in row] for row in cycles])
        self._flat = np.concatenate([cycle for row in cycles for cycle in row])
        self._length = lengths
        self._start = (lengths.cumsum() - lengths.ravel()).reshape(lengths.shape)
        self._every, self._first, self._stop = (
            np.array(values)[:, None]
            for values in zip(*((t.every, t.start, rounds if t.stop is None else t.stop) for t in threats), strict=True)
        )
        steady = (self._every == 1).all() and (self._first == 1).all() and (self._stop >= rounds).all()
        self._always: NDArray[np.int64] | None = None
        if steady and (lengths == 1).all():
            self._always = self._flat[self._start]

    def at(self, round_: int) -> NDArray[np.int64]:
        """Flips allowed in a round; the very same array where they are those of every round."""
        if self._always is not None:
            return self._always
        since = round_ - self._first
        attacked = (since >= 0) & (round_ <= self._stop) & (since % self._every == 0)
        turn = np.where(attacked, since // self._every, 0)  # `attack.attacked_before`, for all cells
        allowed: NDArray[np.int64] = np.where(attacked, self._flat[self._start + turn % self._length], 0)
        return allowed
