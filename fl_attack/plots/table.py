"""The tables that are drawn, and the numbers behind the figures: means, intervals, deviations.

Arrays are (cells,): a value for each cell of a sweep. k is the write access, b the local budget, both shares.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.errors import InputError

Array = NDArray[Any]
Floats = NDArray[np.float64]

K, B, KB, ACCURACY, GOAL = "write_access", "budget", "global_budget", "final_accuracy", "attack.goal"
NUMBERS = {  # columns of every sweep: what their axis says, and how many of its units make one
    K: ("write access k (share of all samples)", 1),
    B: ("local budget b (share of malicious samples)", 1),
    KB: ("global budget k·b (share of all samples)", 1),
    ACCURACY: ("final test accuracy (%)", 100),
    "minimum_accuracy": ("minimum test accuracy (%)", 100),
    "early_stop_accuracy": ("test accuracy with early stopping (%)", 100),
    "final_f1": ("final F1 (0 to 1)", 1),
    "final_loss": ("final test loss (nats)", 1),
    "flips": ("flipped labels (count)", 1),
    "rounds": ("rounds (count)", 1),
}
LABELS = NUMBERS | {  # and those that only some sweeps have
    "rounds_to_recover": ("rounds to recover (count)", 1),
    "drop": ("drop of the final accuracy by the attack (points)", 100),
    "norm_auc": ("AUC of the norm (0.5: chance)", 1),
    "cosine_auc": ("AUC of the cosine (0.5: chance)", 1),
    "distance_auc": ("AUC of the distance (0.5: chance)", 1),
    "norm_z": ("z-score of the norm", 1),
    "cosine_to_median": ("cosine to the median update", 1),
    "distance_rank": ("rank of the distance (share of honest ones below)", 1),
}
PARTS = 6  # panels or lines that a figure bears


class NotVariedError(InputError):
    """A sweep does not vary what the figure shows."""


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep that ended well.

    `write_access` is the mean over all cells with the same clients, since the deal of samples moves it with the seed;
    `global_budget` is its product with the budget.
    """

    columns: dict[str, Array]  # (cells,) floats, or text
    factors: list[str]  # swept columns of several values but those of k, b and the seed; the goal first
    repeat: NDArray[np.int64]  # (cells,) the number of the seed, or of a combination of seeds
    cells: int  # with those that broke off

    def column(self, name: str) -> Array:
        """A column by its name, numbers in the unit of their axis."""
        if name not in self.columns:
            raise InputError(f"the sweep has no column {name}; known: {', '.join(self.columns)}")
        return self.columns[name] * LABELS[name][1] if name in LABELS else self.columns[name]

    def facets(self, *without: str) -> tuple[Array, list[str]]:
        """(cells,) text that sets at most `PARTS` parts apart, and the factors left, to be averaged over."""
        factors = [name for name in self.factors if name not in without]
        shown = list(factors)
        while len(split(len(self.repeat), *(self.columns[name] for name in shown))) > PARTS:
            shown.pop()
        label = np.full(len(self.repeat), "", object)
        for name in shown:
            prefix = (", " if name != shown[0] else "") + ("" if name == GOAL else f"{name} = ")
            label += np.array([prefix + told(value) for value in self.columns[name]], object)
        return label, factors[len(shown) :]

    def seed_means(self, cells: NDArray[np.intp]) -> Floats:
        """Mean final accuracy of these cells for each seed."""
        values, repeat = self.column(ACCURACY)[cells], self.repeat[cells]
        return np.array([values[same].mean() for same in split(len(cells), repeat).values()])

    def over(self, hidden: list[str]) -> str:
        """What a mean is taken over."""
        seeds = len(set(self.repeat.tolist()))
        of_seeds = f"{seeds} seeds" if seeds > 1 else ""
        averaged = " and ".join(filter(None, [of_seeds, ", ".join(hidden)]))
        return ", ".join(filter(None, [averaged and f"mean over {averaged}", "" if of_seeds else "one seed"]))

    def note(self, *sentences: str) -> str:
        """Sentences that belong under a figure, and how many cells it lacks."""
        lost = self.cells - len(self.repeat)
        return " ".join(
            filter(None, [*sentences, f"Left out: {lost} of {self.cells} cells broke off." if lost else ""])
        )


def read_sweep(folder: Path) -> Sweep:
    """The `sweep.csv` of a folder. NotVariedError where all cells broke off."""
    file = folder / "sweep.csv"
    header, found = _read(file, "a sweep")
    if missing := [name for name in (*NUMBERS, "seed", "error") if name not in header]:
        raise InputError(f"{file} has no column {missing[0]}")
    rows = [row for row in found if not row["error"] and row[ACCURACY] not in ("", "nan")]
    if not rows:
        raise NotVariedError(f"all {len(found)} cells of {file} broke off; nothing to draw")
    columns = {name: _column([row[name] for row in rows], name, file) for name in header if name != "error"}
    overrides = [name for name in columns if name not in (*LABELS, "cell", "attack.budget")]
    seeds = [name for name in overrides if name.rpartition(".")[2] == "seed"]
    deal = [name for name in overrides if name.startswith("clients.") or name == "partition.malicious_share"]
    for cells in split(len(rows), *(columns[name] for name in deal)).values():
        columns[K][cells] = float(f"{columns[K][cells].mean():.3g}")
    columns[KB] = np.round(columns[K] * columns[B], 9)
    repeat = np.zeros(len(rows), np.int64)
    for number, cells in enumerate(split(len(rows), *(columns[name] for name in seeds)).values()):
        repeat[cells] = number
    factors = [name for name in overrides if name not in (*seeds, *deal) and len(set(columns[name])) > 1]
    return Sweep(columns, sorted(factors, key=lambda name: name != GOAL), repeat, len(found))


def read_rounds(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's `rounds.csv`."""
    header, rows = _read(folder / "rounds.csv", "a run")
    return {column: [float(row[column] or "nan") for row in rows] for column in header}


def split(cells: int, *columns: Array) -> dict[tuple[Any, ...], NDArray[np.intp]]:
    """The cells of each combination of values, in order of the values; all in one without columns."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for cell, key in enumerate(zip(*columns, strict=True) if columns else [()] * cells):
        found.setdefault(key, []).append(cell)
    return {key: np.array(found[key]) for key in sorted(found)}


def means_on_grid(x: Floats, y: Floats, values: Floats, xs: Floats, ys: Floats) -> Floats:
    """Mean value at each of `xs` and `ys`, (len(ys), len(xs)); NaN where there is none."""
    grid = np.full((len(ys), len(xs)), np.nan)
    for (at_x, at_y), cells in split(len(values), x, y).items():
        grid[np.ix_(ys == at_y, xs == at_x)] = values[cells].mean()
    return grid


def confidence(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of its confidence interval (Student t); of a single value NaN for the latter."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn

    if len(values) < 2:
        return float(values.mean()), float("nan")
    quantile = stdtrit(len(values) - 1, (1 + level) / 2)
    return float(values.mean()), float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def pooled_deviation(groups: Iterable[Floats]) -> float:
    """Standard deviation within groups, each about its own mean; NaN where no group has two values."""
    several = [group for group in groups if len(group) > 1]
    squares = sum(((group - group.mean()) ** 2).sum() for group in several)
    return float((squares / sum(len(group) - 1 for group in several)) ** 0.5) if several else float("nan")


def goal_differences(sweep: Sweep) -> tuple[NDArray[np.intp], Floats]:
    """Accuracy (%) of the untargeted less that of the targeted attack, and a cell of each pair.

    The cells of a pair differ in nothing but the goal, so a cell that broke off does not shift the mean of others.
    """
    if GOAL not in sweep.factors:
        raise NotVariedError("a difference of goals needs a sweep of attack.goal=untargeted,targeted")
    accuracy, goal = sweep.column(ACCURACY), sweep.column(GOAL)
    same = [sweep.column(name) for name in (K, B, *sweep.factors) if name != GOAL]
    pairs = []
    for cells in split(len(goal), sweep.repeat, *same).values():
        one, other = (accuracy[cells[goal[cells] == name]] for name in ("untargeted", "targeted"))
        if len(one) and len(other):
            pairs.append((cells[0], one.mean() - other.mean()))
    if not pairs:
        raise NotVariedError("a difference of goals needs untargeted and targeted cells of the same k, b and seed")
    return np.array([cell for cell, _ in pairs]), np.array([value for _, value in pairs])


def deviations(sweep: Sweep, part: Array) -> dict[tuple[str, float], float]:
    """Standard deviation over seeds of the accuracy (%) for each part and k, pooled over all else that is swept."""
    k, accuracy = sweep.column(K), sweep.column(ACCURACY)
    settings: dict[tuple[str, float], list[Floats]] = {}
    for cells in split(len(k), *(sweep.column(name) for name in (K, B, *sweep.factors))).values():
        settings.setdefault((part[cells[0]], k[cells[0]]), []).append(accuracy[cells])
    return {key: pooled_deviation(groups) for key, groups in settings.items()}


def several(values: Floats, figure: str, name: str) -> None:
    """NotVariedError unless a figure has two values or more to draw."""
    if len(values) < 2:
        raise NotVariedError(f"{figure} needs several values of {name}; the sweep has only {told(values[0])}")


def told(value: Any) -> str:
    """A value of a column as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else value or "(not given)"


def _read(file: Path, of: str) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines, restval="")
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no table"
        raise InputError(f"{file} can't be read: {reason}; give the folder of {of}") from None
    if not rows:
        raise InputError(f"{file} has no rows to draw")
    return list(table.fieldnames or ()), rows


def _column(texts: list[str], name: str, file: Path) -> Array:
    """Floats where a column must or can be, text else. Only results may lack a number (NaN)."""
    try:
        return np.array([float(text or "nan") if name in LABELS else float(text) for text in texts])
    except ValueError:
        if name in NUMBERS:
            raise InputError(f"{file} has a text in {name}, which is a column of numbers") from None
        return np.array(texts, object)
