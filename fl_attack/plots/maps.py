"""Figures over write access and budget: `heatmap` and `difference`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, colour_bar, heat, require_several
from fl_attack.sweep_table import (
    ACCURACY,
    GOAL,
    KB,
    NUMBERS,
    Array,
    B,
    Floats,
    K,
    NotDrawableError,
    Sweep,
    read_sweep,
    split,
)

EQUAL_PRODUCTS = "Lines: equal global budget k·b."


def heatmap(folder: Path, column: str = ACCURACY) -> list[Path]:
    """Draw the mean of a column over k and b: a panel for each setting, with lines of equal k·b.

    Parameters
    ----------
    folder : Path
        The folder of a sweep.
    column : str
        A column of numbers; by default the final accuracy.

    Returns
    -------
    list of Path
        `heatmap.png` and `.pdf`, or `heatmap_<column>` for another column than the accuracy.

    Raises
    ------
    NotDrawableError
        Where k or b has a single value, no cell has a number in the column, or there are more settings than panels.
    InputError
        Where there is no such column, or it holds text.
    """
    sweep = read_sweep(folder).label_attacks(unattacked=False)
    if not np.isfinite(sweep.numbers(column)).any():
        raise NotDrawableError(f"no cell has a number in {column}")
    panel = sweep.labels(sweep.varied(KB))
    figure = _maps(sweep.column(K), sweep.column(B), sweep.numbers(column), panel, "cividis", canvas.label(column))
    name = "Final test accuracy" if column == ACCURACY else canvas.label(column)
    caption(figure, f"{name}, {sweep.averaging()}", sweep.note(EQUAL_PRODUCTS, sweep.effective()))
    return canvas.save(figure, folder, "heatmap" if column == ACCURACY else f"heatmap_{column}")


def difference(folder: Path) -> list[Path]:
    """Draw the final accuracy of the untargeted less that of the targeted attack over k and b, from pairs of cells.

    Returns `difference.png` and `.pdf`; NotDrawableError where goals, k or b do not vary.
    """
    sweep = read_sweep(folder).label_attacks(unattacked=False)
    cells, values = goal_differences(sweep)
    panel = sweep.labels(sweep.varied(KB, GOAL))
    k, b, unit = sweep.column(K)[cells], sweep.column(B)[cells], "difference in accuracy (percentage points)"
    figure = _maps(k, b, values, panel[cells], "PuOr_r", unit)
    note = sweep.note(f"Above 0 the targeted attack does more harm. {EQUAL_PRODUCTS}")
    caption(figure, f"Final accuracy, untargeted less targeted, {sweep.averaging()}", note)
    return canvas.save(figure, folder, "difference")


def goal_differences(sweep: Sweep) -> tuple[NDArray[np.intp], Floats]:
    """Difference of the final accuracy between the two goals.

    The cells of a pair differ in nothing but the goal, so that a cell that broke off does not shift the mean of others.

    Returns
    -------
    cells : (pairs,) array of int
        The index of one cell of each pair.
    values : (pairs,) array
        Accuracy of the untargeted attack less that of the targeted one, in percentage points.

    Raises
    ------
    NotDrawableError
        Where there is no such pair.
    """
    if GOAL not in sweep.swept:
        raise NotDrawableError("a difference of goals needs a sweep of attack.goal=untargeted,targeted")
    accuracy, goal = sweep.column(ACCURACY), sweep.column(GOAL)
    same = [sweep.column(name) for name in (K, B, *sweep.swept) if name != GOAL]
    pairs = []
    for cells in split(len(goal), sweep.seed_index, *same).values():
        untargeted, targeted = (accuracy[cells[goal[cells] == name]] for name in ("untargeted", "targeted"))
        if len(untargeted) and len(targeted):
            pairs.append((cells[0], untargeted.mean() - targeted.mean()))
    if not pairs:
        raise NotDrawableError("a difference of goals needs untargeted and targeted cells of the same k, b and seed")
    return np.array([cell for cell, _ in pairs]), np.array([value for _, value in pairs])


def means_on_grid(x: Floats, y: Floats, values: Floats, xs: Floats, ys: Floats) -> Floats:
    """Mean values at the points of a grid.

    Parameters
    ----------
    x, y : (n,) arrays
        The place of each value.
    values : (n,) array
        The values that are averaged.
    xs, ys : (columns,) and (rows,) arrays
        The different x and y that the grid is of.

    Returns
    -------
    (rows, columns) array
        NaN where there is no value.
    """
    grid = np.full((len(ys), len(xs)), np.nan)
    for (at_x, at_y), cells in split(len(values), x, y).items():
        grid[np.ix_(ys == at_y, xs == at_x)] = values[cells].mean()
    return grid


def _maps(x: Floats, y: Floats, values: Floats, panel: Array, colours: str, unit: str) -> Any:
    """A figure with a heat map of mean values for each panel; all arrays are (n,).

    All maps have one colour scale, centred at 0 unless `colours` is cividis. NotDrawableError where x or y is single.
    """
    xs, ys = np.unique(x), np.unique(y)
    require_several(xs, "a heat map", "k")
    require_several(ys, "a heat map", "b")
    cells_of = split(len(panel), panel)
    grids = {
        name: means_on_grid(x[cells], y[cells], values[cells], xs, ys)
        for name in canvas.distinct_values(panel, canvas.PANELS, "panels of a heat map")
        for cells in [cells_of[(name,)]]
    }
    every = np.array(list(grids.values()))
    low, high, extend = canvas.limits(every)
    if signed := colours != "cividis":
        _, high, _ = canvas.limits(np.concatenate([every, -every]))
        high = max(high, 1e-9)
        low = -high
        extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
            int(np.nanmin(every) < low), int(np.nanmax(every) > high)
        ]
    width = 0.9 + (0.44 if signed else 0.38) * min(max(len(xs), 8), 12)
    figure, panels = canvas.panels(list(grids), width, 3.9, NUMBERS[K][0], NUMBERS[B][0])
    for name, axes in panels.items():
        image = heat(axes, xs, ys, grids[name], signed, cmap=colours, vmin=low, vmax=high)
    colour_bar(figure, panels, image, unit, extend)
    return figure
