"""The figure of any column against any other: `columns`."""

from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.errors import InputError
from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend
from fl_attack.sweep_table import KB, LABELS, Array, B, K, format_value, format_values, mean_interval, read_sweep, split

WIDTH = 0.3  # of the cells of one name on an axis of text


def columns(folder: Path, x: str, y: str, by: str = "") -> list[Path]:
    """Draw column y against column x: all cells, and their mean over seeds with its confidence interval.

    Parameters
    ----------
    folder : Path
        The folder of a sweep.
    x : str
        A column of settings (numbers or text), or of results, of which the cells alone are drawn.
    y : str
        A column of numbers.
    by : str
        A column whose values have a line each. All other settings that were swept have a panel for each combination.

    Returns
    -------
    list of Path
        `columns_<x>_<y>[_<by>].png` and `.pdf`.

    Raises
    ------
    InputError
        Where there is no such column, y is text, or there are more lines or panels than a figure shows.
    """
    sweep = read_sweep(folder)
    across, values = sweep.column(x), sweep.numbers(y)
    finite = np.isfinite(values) & (np.isfinite(across) if across.dtype.kind == "f" else True)
    if not finite.any():
        raise InputError(f"no cell has both {x} and {y}")
    of_settings = x in (K, B, KB) or x not in (*LABELS, "cell")
    panel = sweep.labels(sweep.varied(x, by)) if of_settings else np.full(len(sweep), "", object)
    lines = canvas.distinct_values(sweep.column(by)[finite], canvas.ENTRIES, f"{by} in a legend") if by else [""]
    names = canvas.distinct_values(panel[finite], canvas.PANELS, f"panels of {y} against {x}")
    width = 5.6 if len(names) == 1 else 4.4
    figure, panels = canvas.panels(names, width, 3.8, canvas.label(x), canvas.label(y))
    place, levels = _places(across[finite])
    at = np.full(len(sweep), np.nan)
    at[finite] = place
    for name, axes in panels.items():
        for number, (line, text) in enumerate(zip(lines, format_values(lines), strict=True)):
            on_line = finite & (panel == name) & (sweep.column(by) == line if by else True)
            if not on_line.any():
                continue
            style = canvas.style(number)
            label = text if by else ""
            # side by side over their name
            shift = (number - (len(lines) - 1) / 2) * WIDTH / len(lines) if levels else 0.0
            axes.plot(at[on_line] + shift, values[on_line], **style | {"linestyle": "", "alpha": 0.25, "markersize": 3})
            if not of_settings:
                axes.plot([], [], label=label, **style | {"linestyle": ""})
                continue
            cells = np.flatnonzero(on_line)
            groups = split(len(cells), at[cells])
            means = [mean_interval(sweep.seed_means(cells[same], y)) for same in groups.values()]
            mean, half = np.transpose(means)
            dash = "" if levels else canvas.DASHES[number % len(canvas.DASHES)]
            where = [value + shift for (value,) in groups]
            axes.errorbar(where, mean, np.nan_to_num(half), label=label, capsize=2.5, linestyle=dash, **style)
        _scale(axes, levels, across[finite])
    legend(figure, panels, by and canvas.label(by))
    lacking = f"{np.sum(~finite)} cells have no such number." if not finite.all() else ""
    bars = "Bars: 95 % confidence of the mean over seeds (Student t); faint: the cells." if of_settings else ""
    caption(figure, "", sweep.note(bars, lacking))
    return canvas.save(figure, folder, "_".join(filter(None, ["columns", x, y, by])))


def _places(across: Array) -> tuple[Array, list[str]]:
    """The position of each value (n,) along an axis, and the texts of its ticks at 0, 1, ...

    A number is its own position, and has no text; a text has the position of its tick, and ticks are sorted.
    """
    if across.dtype.kind == "f":
        return across, []
    levels = sorted(set(across))
    return np.array([levels.index(one) for one in across], float), levels


def _scale(axes: Any, levels: list[str], across: Array) -> None:
    """Name the ticks of an axis of text, or make one of positive numbers that span a factor of 50 logarithmic."""
    if levels:
        names = [canvas.shortened(format_value(one)) for one in levels]
        long = len("  ".join(names)) > 60
        axes.set_xticks(range(len(names)), names, rotation=25 * long, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif across.min() > 0 and across.max() > 50 * across.min():
        axes.set_xscale("log")
