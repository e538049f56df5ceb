"""The one reader and writer of sweeps' tables: columns of cells, the settings they differ in, statistics over seeds.

Arrays are (cells,): a value for each cell of a sweep. k is the write access, b the local budget, both shares of 1.
"""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.data.cache import write_whole
from fl_attack.detect import MEASURES
from fl_attack.errors import InputError
from fl_attack.folder import CURVES, TABLE
from fl_attack.overrides import did_you_mean

Array = NDArray[Any]
Floats = NDArray[np.float64]

RESULTS = (  # the columns of a sweep's table after the overrides
    "writes",  # what the attack changes: labels, updates or none
    "write_access",
    "budget",
    "global_budget",
    "effective_budget",  # labels flipped of all that the clients used, in all rounds
    "seed",
    "final_accuracy",
    "minimum_accuracy",
    "early_stop_accuracy",  # of the model that early stopping keeps; empty without it
    "final_f1",
    "final_loss",
    "validation_loss",  # of that model on the server's validation split; empty without one
    *MEASURES,  # means over the evaluated rounds in which they are finite; empty unless detectability=true
    "drop",  # final accuracy of the cell's unattacked twin less its own, where the sweep holds the twin
    "rounds_to_recover",  # rounds after the attack until the accuracy is again the twin's; likewise
    "flips",
    "rounds",
    "error",
)
K, B, KB, ACCURACY, GOAL = "write_access", "budget", "global_budget", "final_accuracy", "attack.goal"
EFFECTIVE, NOTABLE_DIFFERENCE, SHOWN = "effective_budget", 0.1, 6  # relative difference worth a sentence; values in it
WRITES, NAME, BUDGET, SHARE = "writes", "attack.name", "attack.budget", "partition.malicious_share"
NUMBERS = {  # columns that every sweep has: the label of their axis, and the factor from the table to its unit
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
LABELS = NUMBERS | {  # the same for columns that only some sweeps fill
    "rounds_to_recover": ("rounds to recover (count)", 1),
    "validation_loss": ("validation loss (nats)", 1),
    EFFECTIVE: ("effective budget (share of all labels used)", 1),
    "drop": ("drop of the final accuracy by the attack (points)", 100),
    "norm_auc": ("AUC of the norm (0.5: chance)", 1),
    "cosine_auc": ("AUC of the cosine (0.5: chance)", 1),
    "distance_auc": ("AUC of the distance (0.5: chance)", 1),
    "norm_z": ("z-score of the norm", 1),
    "cosine_to_median": ("cosine to the median update", 1),
    "distance_rank": ("rank of the distance (share of honest ones below)", 1),
}
WORDS = {  # what settings are called in figures and in the report
    "attack": "attack",
    "attack.adapt": "adaptation to the rule",
    "attack.budget": "local budget b",
    "attack.direction": "direction",
    "attack.every": "rounds from attack to attack",
    "attack.foresight": "minibatches ahead",
    "attack.goal": "goal",
    "attack.horizon": "planning horizon (rounds)",
    "attack.knowledge": "knowledge of gradients",
    "attack.knowledge_fraction": "share of honest samples known",
    "attack.memory": "flips after their round",
    "attack.name": "attack",
    "attack.objective": "planned objective",
    "attack.refresh": "flips chosen anew each",
    "attack.rounding": "rounding of the budget",
    "attack.scope": "scope of the budget",
    "attack.selection": "selection of flips",
    "attack.start": "first attacked round",
    "attack.stop": "last attacked round",
    "batch_size": "samples a round",
    "clients.honest": "honest clients",
    "clients.malicious": "malicious clients",
    "clients.per_round": "clients in a round",
    "clients.total": "clients",
    "dataset": "data set",
    "dataset.loader": "data set",
    "dtype": "precision",
    "early_stop.patience": "patience (evaluations)",
    "local_steps": "local steps",
    "lr": "learning rate",
    "lr_schedule": "learning rate schedule",
    "model": "model",
    "model.name": "model",
    "partition": "partition",
    "partition.alpha": "Dirichlet \N{GREEK SMALL LETTER ALPHA}",
    "partition.malicious_share": "malicious share of the samples",
    "partition.name": "partition",
    "partition.s": "shards a client",
    "sanitize": "label sanitization",
    "sanitize.name": "label sanitization",
    "server_optimizer": "server optimizer",
    "strategy": "aggregation rule",
    "strategy.f": "malicious clients assumed",
    "strategy.name": "aggregation rule",
    "strategy.pre": "pre-aggregation",
    "weight_decay": "weight decay",
    "worker_momentum": "clients' momentum",
}


class NotDrawableError(InputError):
    """A sweep does not hold what a figure shows."""


# --- statistics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A statistic, the ends of its confidence interval, which are NaN with fewer than two seeds, and their number."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def half(self) -> float:
        """Half the width of the interval, NaN with fewer than two seeds."""
        return self.high - self.value

    def __str__(self) -> str:
        return interval_text(self.value, self.low, self.high)


def interval_text(value: float, low: float, high: float) -> str:
    """A value and its confidence interval, two decimals each and a true minus sign; arguments as of `Interval`."""
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "\N{MINUS SIGN}")


def mean_interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Mean of independent values and half the width of its confidence interval (Student's t).

    Parameters
    ----------
    values : (n,) array
        One value for each seed.
    level : float
        Probability with which the interval covers the true mean.

    Returns
    -------
    mean, half : float
        In the unit of the values; `half` is NaN for a single value.
    """
    n = len(values)
    if n < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(_t_quantile(n, level) * values.std(ddof=1) / n**0.5)


def jackknife_interval(
    statistic: Callable[[NDArray[np.bool_]], float], seed: NDArray[np.int64], level: float = 0.95
) -> Interval:
    """Jackknife interval over seeds of any statistic of cells, with Student's t.

    Parameters
    ----------
    statistic : callable
        Takes a mask (cells,) of the cells to use and gives a number. Of a mean over seeds the interval is that of
        `mean_interval`.
    seed : (cells,) array of int
        The seed of each cell; all cells of a seed are left out together.
    level : float
        Probability with which the interval covers the true value.

    Returns
    -------
    Interval
        Its ends are NaN with fewer than two seeds.

    References
    ----------
    Tukey, J. W. (1958). Bias and confidence in not quite large samples. Annals of Mathematical Statistics 29, 614.
    """
    seeds = np.unique(seed)
    value, n = statistic(np.ones(len(seed), bool)), len(seeds)
    if n < 2:
        return Interval(value, math.nan, math.nan, n)
    without = np.array([statistic(seed != one) for one in seeds])
    half = _t_quantile(n, level) * np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return Interval(value, float(value - half), float(value + half), n)


def pooled_deviation(groups: Iterable[Floats]) -> float:
    """Standard deviation within groups of values, each about its own mean; NaN where no group has two values."""
    several = [group for group in groups if len(group) > 1]
    squares = sum(((group - group.mean()) ** 2).sum() for group in several)
    return float((squares / sum(len(group) - 1 for group in several)) ** 0.5) if several else float("nan")


def _t_quantile(n: int, level: float) -> float:
    """Quantile of Student's t, n - 1 degrees of freedom, for a two-sided interval that covers with this probability."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(n - 1, (1 + level) / 2))


# --- cells and sweeps ------------------------------------------------------------------------------


def split(cells: int, *columns: Array) -> dict[tuple[Any, ...], NDArray[np.intp]]:
    """Part cells by the values that they have in common.

    Parameters
    ----------
    cells : int
        The number of cells.
    *columns : arrays, (cells,)
        What is compared; without any, all cells are one group.

    Returns
    -------
    dict of tuple to array of int
        For each combination of values that occurs, in ascending order, the indices of its cells.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for cell, key in enumerate(zip(*(column.tolist() for column in columns), strict=True) if columns else [()] * cells):
        found.setdefault(key, []).append(cell)
    return {key: np.array(found[key]) for key in sorted(found)}


@dataclass(frozen=True)
class Cells:
    """Named columns (cells,) of equal length."""

    columns: dict[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def only(self, mask: Array) -> "Cells":
        """The cells of a mask (cells,), or of indices (n,)."""
        return Cells({name: column[mask] for name, column in self.columns.items()})

    def where(self, **wanted: Any) -> "Cells":
        """The cells that have all these values, by column; floats are compared to nine decimal places."""
        mask = np.ones(len(self), bool)
        for name, value in wanted.items():
            column = self.columns[name]
            mask &= np.isclose(column, value, rtol=0, atol=1e-9) if column.dtype.kind == "f" else column == value
        return self.only(mask)

    def parts(self, *names: str) -> Iterator[tuple[tuple[Any, ...], NDArray[np.intp]]]:
        """Each combination of values of these columns, in order, and the indices of its cells."""
        yield from split(len(self), *(self.columns[name] for name in names)).items()


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep that have an accuracy and no error, and what was varied among them.

    `write_access` is the mean, to three digits, over all cells of equal `dealing`, since seeds deal differently;
    `global_budget` is its product with the budget.
    """

    cells: Cells  # columns of floats, or of text
    swept: list[str]  # overrides with several values, but for seeds; the goal first
    dealing: list[str]  # overrides that decide the write access: of the clients, and the malicious share
    seed_index: NDArray[np.int64]  # (cells,) the number of the seed, or of a combination of seeds
    total: int  # cells of the table, with those that broke off
    left_out: int = 0  # cells that ended well but are not what is asked for

    def __len__(self) -> int:
        return len(self.cells)

    def column(self, name: str) -> Array:
        """A column by its name, numbers in the unit of their axis; InputError where the sweep has none such."""
        if name not in self.cells.columns:
            near = did_you_mean(name, self.cells.columns)
            raise InputError(f"the sweep has no column {name}; known: {', '.join(self.cells.columns)}{near}")
        return self.cells[name] * LABELS[name][1] if name in LABELS else self.cells[name]

    def numbers(self, name: str) -> Floats:
        """A column of numbers in the unit of their axis; InputError where it holds text or the sweep has none such."""
        column = self.column(name)
        if column.dtype.kind != "f":
            raise InputError(f"{name} is a column of text; give one that holds numbers")
        return column

    def varied(self, *shown: str) -> list[str]:
        """The swept columns that do not follow from the columns shown in a figure, which parts its cells by them.

        Cells that are equal in the columns shown and in these differ in their seed alone.
        """
        covered = set(shown)
        if {K, KB} & covered:
            covered |= self._implied_by_access()
        if {B, KB} & covered:
            covered.add(BUDGET)
        return [name for name in self.swept if name not in covered]

    def _implied_by_access(self) -> set[str]:
        """The columns of the deal whose values follow from k: all where no two deals have the same k.

        Else the malicious share or, where that is not swept, the number of malicious clients.
        """
        deals = [self.cells[name] for name in self.dealing]
        if len(split(len(self), self.cells[K])) == len(split(len(self), self.cells[K], *deals)):
            return set(self.dealing)
        return {SHARE if SHARE in self.swept else "clients.malicious"}

    def labels(self, names: Sequence[str]) -> Array:
        """(cells,) text that names the values of these columns, different ones differently; empty without columns."""
        label = np.full(len(self), "", object)
        for name in names:
            prefix = (", " if name != names[0] else "") + ("" if name == GOAL else f"{WORDS.get(name, name)} = ")
            label += np.array([prefix + text for text in format_values(self.cells[name].tolist())], object)
        return label

    def label_attacks(self, unattacked: bool = True) -> "Sweep":
        """The sweep without attacks on updates, which have no budget of labels.

        Parameters
        ----------
        unattacked : bool
            Whether cells that nobody attacks are kept in a sweep of several attacks, as its cells of budget 0; in a
            sweep of one attack they always are.

        Returns
        -------
        Sweep
            With the number of cells that are not kept as `left_out`.

        Raises
        ------
        NotDrawableError
            Where no cell is kept.
        """
        writes = self.column(WRITES)
        mask = writes != "updates"
        if not unattacked and {NAME, "attack"} & set(self.swept):
            mask &= writes != "none"
        if not mask.any():
            raise NotDrawableError("attacks on updates have no budget of labels; the sweep has no others")
        cells = self.cells.only(mask)
        swept = [name for name in self.swept if len(set(cells[name].tolist())) > 1]
        return Sweep(cells, swept, self.dealing, self.seed_index[mask], self.total, int((~mask).sum()))

    def seed_means(self, cells: NDArray[np.intp], column: str = ACCURACY) -> Floats:
        """Means of a column, one for each seed.

        Parameters
        ----------
        cells : array of int, (n,)
            Indices of the cells that the means are over.
        column : str
            The name of the column.

        Returns
        -------
        array, (seeds,)
            In the order of the seeds and the unit of the column's axis; what is not finite is left out, and seeds
            that have nothing else.
        """
        values, seed = self.column(column)[cells], self.seed_index[cells]
        finite = np.isfinite(values)
        values, seed = values[finite], seed[finite]
        return np.array([values[same].mean() for same in split(len(values), seed).values()])

    def averaging(self) -> str:
        """What a mean of the sweep is taken over, in words."""
        seeds = len(set(self.seed_index.tolist()))
        return f"mean over {seeds} seeds" if seeds > 1 else "one seed"

    def effective(self) -> str:
        """A sentence on the share of all labels that was flipped at nominal global budgets, at most `SHOWN` of them.

        Empty where none differs by `NOTABLE_DIFFERENCE` of the budget, or the table does not tell.
        """
        if EFFECTIVE not in self.cells.columns:
            return ""
        nominal, found = self.column(KB), self.column(EFFECTIVE)
        means = {kb: float(np.nanmean(found[at])) for (kb,), at in split(len(self), nominal).items() if kb > 0}
        if all(abs(value / kb - 1) < NOTABLE_DIFFERENCE for kb, value in means.items()):
            return ""
        shown = list(means.items())[:: -(-len(means) // SHOWN)]
        return "Labels flipped at k·b, of all used: " + ", ".join(f"{kb:.3g}: {value:.2g}" for kb, value in shown) + "."

    def note(self, *sentences: str) -> str:
        """The text under a figure: these sentences, and how many cells it lacks and why."""
        lost = self.total - len(self) - self.left_out
        lacking = [
            f"Left out: {self.left_out} cells that flip no labels.",
            f"Left out: {lost} of {self.total} cells broke off.",
        ]
        return " ".join(filter(None, [*sentences, *itertools.compress(lacking, (self.left_out, lost))]))


# --- files -----------------------------------------------------------------------------------------


def read_sweep(folder: Path) -> Sweep:
    """The cells of the table `sweep.csv` in a folder.

    Parameters
    ----------
    folder : Path
        What a multirun left in its `out`.

    Returns
    -------
    Sweep
        The cells with an accuracy and no error; `write_access` and `global_budget` are averaged as `Sweep` says.

    Raises
    ------
    InputError
        Where there is no such table, or a column is missing or holds text in place of numbers.
    NotDrawableError
        Where all cells broke off.
    """
    file = folder / TABLE
    header, found = read_csv(file, "a sweep")
    if missing := [name for name in (*NUMBERS, "seed", "error") if name not in header]:
        raise InputError(f"{file} has no column {missing[0]}")
    rows = [row for row in found if not row["error"] and row[ACCURACY] not in ("", "nan")]
    if not rows:
        raise NotDrawableError(f"all {len(found)} cells of {file} broke off; nothing to draw")
    columns = {name: _column([row[name] for row in rows], name, file) for name in header if name != "error"}
    if WRITES not in columns:  # a table of an earlier version, which does not say which attacks are on updates
        attack = columns.get(NAME, columns.get("attack", np.full(len(rows), "", object)))
        columns[WRITES] = np.array(["none" if name == "none" else "labels" for name in attack], object)
    overrides = [name for name in columns if name not in (*LABELS, "cell", WRITES)]
    seeds = [name for name in overrides if name.rpartition(".")[2] == "seed"]
    dealing = [name for name in overrides if name.startswith("clients.") or name == SHARE]
    for cells in split(len(rows), *(columns[name] for name in dealing)).values():
        columns[K][cells] = float(f"{columns[K][cells].mean():.3g}")
    columns[KB] = np.round(columns[K] * columns[B], 9)
    seed_index = np.zeros(len(rows), np.int64)
    for number, cells in enumerate(split(len(rows), *(columns[name] for name in seeds)).values()):
        seed_index[cells] = number
    swept = [name for name in overrides if name not in seeds and len(set(columns[name].tolist())) > 1]
    return Sweep(Cells(columns), sorted(swept, key=lambda name: name != GOAL), dealing, seed_index, len(found))


def read_curves(folder: Path) -> tuple[Floats, Floats]:
    """The accuracy of each cell by evaluation.

    Parameters
    ----------
    folder : Path
        What a multirun left in its `out`.

    Returns
    -------
    accuracy : (cells, evaluations) array
        In percent; NaN after a cell broke off. Rows are in the order of the column `cell` of the table.
    rounds : (evaluations,) array
        After which round each evaluation was.

    Raises
    ------
    InputError
        Where `curves.npz` is not there or damaged.
    """
    with _stored_curves(folder) as stored:
        return 100 * stored["accuracy"], stored["round"]


def read_mistakes(folder: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """How many test images each cell's model gets wrong in each part of the test set.

    Parameters
    ----------
    folder : Path
        As `read_curves` takes it.

    Returns
    -------
    wrong : (cells, parts) array
        Rows in the order of the column `cell` of the table.
    images : (parts,) array
        Test images in each part; None in place of both where an earlier version did not count them.

    Raises
    ------
    InputError
        As `read_curves`.
    """
    with _stored_curves(folder) as stored:
        has_counts = "wrong" in stored.files and len(stored["wrong"])
        return (stored["wrong"], stored["images"]) if has_counts else None


@contextmanager
def _stored_curves(folder: Path) -> Iterator[Any]:
    """The arrays of `curves.npz` by name; in the block, what it lacks or can't be read of it is an InputError."""
    try:
        with np.load(folder / CURVES, allow_pickle=False) as stored:
            yield stored
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / CURVES} can't be read: {error}") from None


def read_csv(file: Path, of: str) -> tuple[list[str], list[dict[str, str]]]:
    """The header and rows of a table.

    Parameters
    ----------
    file : Path
        The file to read.
    of : str
        What the folder of the file should be of, such as "a sweep", for the error.

    Returns
    -------
    header : list of str
        Names of the columns.
    rows : list of dict
        The text of each row by column; cells that are missing at its end are empty.

    Raises
    ------
    InputError
        Where it can't be read, or has no rows.
    """
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


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int | None = None) -> Path:
    """Write a table, whole or not at all.

    Parameters
    ----------
    file : Path
        The file to write; missing folders are made.
    header : sequence of str
        Names of the columns.
    rows : iterable of sequences
        Values in the order of the columns.
    digits : int, optional
        Significant digits of floats; by default they are written so that reading gives the same bits.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InputError or RunError
        Where the disk refuses, see `write_whole`.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    for row in rows:
        table.writerow([f"{one:.{digits}g}" if digits and isinstance(one, float) else one for one in row])
    write_whole(file, lambda stream: stream.write(text.getvalue().encode()))
    return file


def format_value(value: Any) -> str:
    """A value of a column as figures show it: floats to four digits, an empty text as `(not given)`."""
    return f"{value:.4g}" if isinstance(value, float) else value or "(not given)"


def format_values(values: Sequence[Any]) -> list[str]:
    """`format_value` of each value, or where that does not tell all of them apart numbers to the last digit."""
    shown = {value: format_value(value) for value in values}
    if len(set(shown.values())) < len({repr(value) for value in shown}):
        shown = {
            value: f"{value!r}".removesuffix(".0") if isinstance(value, float) else text
            for value, text in shown.items()
        }
    return [shown[value] for value in values]


def _column(texts: list[str], name: str, file: Path) -> Array:
    """A column as floats where all its texts are numbers, else as text; empty ones are NaN in results, of `LABELS`.

    InputError where a text is in a column of `NUMBERS`.
    """
    try:
        return np.array([float(text or "nan") if name in LABELS else float(text) for text in texts])
    except ValueError:
        if name in NUMBERS:
            raise InputError(f"{file} has a text in {name}, which is a column of numbers") from None
        return np.array(texts, object)
