"""The numbers behind comparisons of attacks and rules: tables that lie beside their figures."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import (
    ACCURACY,
    NAME,
    WRITES,
    Floats,
    K,
    NotDrawableError,
    Sweep,
    mean_interval,
    split,
)

Mask = NDArray[np.bool_]


class Grid(NamedTuple):
    """The final accuracy at each pair of values of two columns."""

    rows: list[Any]  # the values of the one column, in the order of the cells
    columns: list[Any]  # of the other
    mean: Floats  # (rows, columns) in percent; NaN where no cell is
    half: Floats  # (rows, columns) half the interval of the mean over seeds, in points; NaN with fewer than two
    worst: NDArray[np.intp]  # (columns,) the attacked row of the lowest mean; -1 where none is


def grid(sweep: Sweep, rows: str, columns: str, mask: Mask) -> Grid:
    """The final accuracy of cells by two columns.

    Parameters
    ----------
    sweep : Sweep
        The cells.
    rows, columns : str
        Names of the columns whose values the grid is of.
    mask : (cells,) array of bool
        The cells that count.

    Returns
    -------
    Grid
        The values of both columns; means over seeds in percent, NaN where there is no cell; half widths, NaN where
        there are fewer than two seeds; and for each column the row of the attack that does most harm, -1 without one.

    Raises
    ------
    NotDrawableError
        Where a column has a single value.
    """
    ys, xs = (list(dict.fromkeys(sweep.column(name).tolist())) for name in (rows, columns))
    for name, values in ((rows, ys), (columns, xs)):
        if len(values) < 2:
            raise NotDrawableError(f"a matrix needs several values of {name}")
    mean, half = np.full((2, len(ys), len(xs)), np.nan)
    some = np.flatnonzero(mask)
    for (y, x), cells in split(len(some), sweep.column(rows)[some], sweep.column(columns)[some]).items():
        at = ys.index(y), xs.index(x)
        mean[at], half[at] = mean_interval(sweep.seed_means(some[cells]))
    attacked = np.array([writes_of(sweep, sweep.column(rows) == y) != "none" for y in ys])
    return Grid(ys, xs, mean, half, worst_attacks(mean, attacked))


def worst_attacks(mean: Floats, attacked: Mask) -> NDArray[np.intp]:
    """The attack that does most harm, for each column of a grid.

    Parameters
    ----------
    mean : (rows, columns) array
        Mean accuracies; NaN where there is none.
    attacked : (rows,) array of bool
        The rows that are attacks.

    Returns
    -------
    array of int, (columns,)
        The row of the lowest mean among the attacks, for each column; -1 where none has a mean.
    """
    harmful = np.where(attacked[:, None] & np.isfinite(mean), mean, np.inf)
    lowest: NDArray[np.intp] = np.where(np.isfinite(harmful).any(0), harmful.argmin(0), -1)
    return lowest


def writes_of(sweep: Sweep, mask: Mask) -> str:
    """What the attacks of some cells write.

    Parameters
    ----------
    sweep : Sweep
        The cells.
    mask : (cells,) array of bool
        The cells whose attacks are asked for.

    Returns
    -------
    {"updates", "labels", "none"}
        Updates where any of them does, else labels where any does.
    """
    found = set(sweep.column(WRITES)[mask])
    return next((kind for kind in ("updates", "labels") if kind in found), "none")


def ratios(sweep: Sweep, mask: Mask) -> list[dict[str, Any]]:
    """Harm of the worst attack on labels beside that of the worst attack on updates, at each write access.

    Parameters
    ----------
    sweep : Sweep
        With a column of the attack's name.
    mask : (cells,) array of bool
        Cells that differ in attack, write access and seed alone.

    Returns
    -------
    list of dict
        By rising `write_access`, where clients are malicious. `flips` names the attack on labels, `drop_by_flips` is
        its mean drop in percentage points from the unattacked cells of the same seeds, `drop_by_flips_interval` half
        the interval over seeds; likewise `gradients` of updates. `ratio` is of the first drop to the second, NaN
        unless that is above 0. The worst attacks are those of the largest mean drop.

    Raises
    ------
    NotDrawableError
        Where there are no unattacked cells, or at some write access no attacks of a kind.
    """
    name, writes, accuracy = (sweep.column(column) for column in (NAME, WRITES, ACCURACY))
    if "none" not in writes[mask]:
        raise NotDrawableError("a comparison of harm needs unattacked cells: attack.name=none,...")
    found = []
    some = np.flatnonzero(mask)
    for (k,), part in split(len(some), sweep.column(K)[some]).items():
        cells = some[part]
        honest = {sweep.seed_index[i]: accuracy[i] for i in cells if writes[i] == "none"}
        drops: dict[str, dict[str, dict[int, float]]] = {"labels": {}, "updates": {}}
        for i in cells:
            if writes[i] != "none" and sweep.seed_index[i] in honest:
                by_seed = drops[writes[i]].setdefault(name[i], {})
                by_seed[int(sweep.seed_index[i])] = honest[sweep.seed_index[i]] - accuracy[i]
        if not any(drops.values()):  # no client is malicious
            continue
        if not all(drops.values()):
            raise NotDrawableError("a comparison of harm needs attacks on labels and on gradients")
        row: dict[str, Any] = {"write_access": k}
        means = []
        for kind, title in (("labels", "flips"), ("updates", "gradients")):
            by_name = {attack: np.array([d[s] for s in sorted(d)]) for attack, d in drops[kind].items()}
            most_harmful = max(by_name, key=lambda attack, of=by_name: of[attack].mean())  # type: ignore[misc]
            mean, half = mean_interval(by_name[most_harmful])
            means.append(mean)
            row |= {title: most_harmful, f"drop_by_{title}": mean, f"drop_by_{title}_interval": half}
        row["ratio"] = means[0] / means[1] if means[1] > 0 else float("nan")
        found.append(row)
    return found
