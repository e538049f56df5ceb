"""In which rounds each cell is attacked, and how many labels it may flip then, for many cells at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_attack.config import AttackSettings

EXACT = 2**62  # above this, whole numbers of 64 bits are not enough
AHEAD, NUMBERS_AHEAD = 64, 2**20  # rounds that are worked out together at most, and numbers


class Rounds:
    """The attacked rounds of each of M cells; see `attack.attacked_before`."""

    def __init__(self, threats: Sequence[AttackSettings], rounds: int) -> None:
        """`threats` are the attacks of the cells, `rounds` is the number of rounds of a run."""
        self._every, self._first, self._stop = (
            np.array(values)
            for values in zip(*((t.every, t.start, rounds if t.stop is None else t.stop) for t in threats), strict=True)
        )
        # whether every cell is attacked in every round
        self.always = bool((self._every == 1).all() and (self._first == 1).all() and (self._stop >= rounds).all())

    def attacked(self, round_: int | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each cell is attacked in a round, (M,) of bool; (n, M) for rounds (n, 1)."""
        since = round_ - self._first
        found: NDArray[np.bool_] = (since >= 0) & (round_ <= self._stop) & (since % self._every == 0)
        return found


class Allowances:
    """Flips allowed, (M, G): M cells, each with G budgets of its own; see `attack.flip_allowance`.

    To be asked for one round after the other: what is carried over depends on the rounds before.
    """

    def __init__(self, threats: Sequence[AttackSettings], max_samples: int, rounds: int) -> None:
        """As `Rounds` takes them; `max_samples` is the largest number of samples that a budget is for in a round."""
        exact = [threat.exact_budget for threat in threats]
        small = all(max(b.numerator, b.denominator) * max_samples * (rounds + AHEAD) < EXACT for b in exact)
        kind = np.int64 if small else object
        self._over = np.array([b.numerator for b in exact], kind)[:, None]
        self._under = np.array([b.denominator for b in exact], kind)[:, None]
        self._carries, self._rounds_up = (
            np.array([threat.rounding == rounding for threat in threats])[:, None] for rounding in ("carry", "ceil")
        )
        self.rounds = Rounds(threats, rounds)
        self._writable = np.empty((0, 0), np.int64)  # (M, G) the numbers of samples that the table is for
        self._first = 1  # round of the table
        self._steady = self.rounds.always and not self._carries.any()
        self.table, self._past = np.empty((0, 0, 0), np.int64), np.zeros((1, 1, 1), np.int64)

    def at(self, round_: int, writable: NDArray[np.int64]) -> NDArray[np.int64]:
        """The flips allowed in a round.

        Parameters
        ----------
        round_ : int
            The round, from 1.
        writable : array of int, (M, G)
            How many samples of each cell and group can be written in it.

        Returns
        -------
        array of int, (M, G)
        """
        _, place = self.place(round_, writable)
        allowed: NDArray[np.int64] = self.table[place]
        return allowed

    def place(self, round_: int, writable: NDArray[np.int64]) -> tuple[int, int]:
        """Where in `table` (rounds, M, G) the flips allowed in a round are.

        Rounds ahead are filled too where `writable` is that of the call before, as if it stayed so.

        Parameters
        ----------
        round_, writable
            As `at` takes them.

        Returns
        -------
        first : int
            The round that the table begins with.
        place : int
            The row of the table that holds for this round.
        """
        place = 0 if self._steady else round_ - self._first
        same = writable is self._writable or np.array_equal(writable, self._writable)
        if not same or not place < len(self.table):
            self._work_out(round_, writable, AHEAD if same else 1)
            place = 0
        return self._first, place

    def past(self, round_: int) -> NDArray[np.int64]:
        """How many samples could be written in the attacked rounds before a round to come, broadcasting to (M, G).

        Right only where some budget carries over; else nobody needs it, and one row of the table may be for all rounds.
        """
        past: NDArray[np.int64] = self._past[min(round_ - self._first, len(self._past) - 1)]
        return past

    def restore(self, round_: int, past: NDArray[np.int64]) -> None:
        """Go back to before a round.

        Parameters
        ----------
        round_ : int
            The round that comes next.
        past : array of int
            The value of `past` before that round.
        """
        self._first, self._past = round_, past[None]
        self.table, self._writable = np.empty((0, 0, 0), np.int64), np.empty((0, 0), np.int64)

    def _work_out(self, round_: int, writable: NDArray[np.int64], ahead: int) -> None:
        """Fill the table for `ahead` rounds at most, and how many samples could be written before each of them."""
        ahead = max(1, min(ahead, NUMBERS_AHEAD // max(1, writable.size)))
        past = self.past(round_)
        self._writable, self._first = writable, round_
        attacked = self.rounds.attacked(np.arange(round_, round_ + ahead)[:, None])
        of_round = np.where(attacked[:, :, None], writable, 0)
        self._past = np.concatenate([np.broadcast_to(past, (1, *writable.shape)), past + of_round.cumsum(0)])
        self.table = self._floor(of_round)
        if self._rounds_up.any():
            self.table = np.where(self._rounds_up, -self._floor(-of_round), self.table)
        if self._carries.any():
            total = self._floor(self._past)
            self.table = np.where(self._carries, total[1:] - total[:-1], self.table)

    def _floor(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The budgets, as shares, times numbers of samples (..., M, G), rounded down exactly, also below zero."""
        whole: NDArray[np.int64] = (self._over * counts // self._under).astype(np.int64)
        return whole
