"""Figures that compare attacks and rules, each with its table: `matrix` and `harm`."""

from pathlib import Path

import numpy as np

from fl_attack.plots import canvas, versus
from fl_attack.plots.marks import caption, colour_bar, ink_on, legend
from fl_attack.sweep_table import (
    ACCURACY,
    NAME,
    NUMBERS,
    K,
    Sweep,
    format_value,
    format_values,
    mean_interval,
    read_sweep,
    split,
    write_csv,
)

DIGITS = 4  # significant digits of the tables


def matrix(folder: Path, rows: str = NAME, columns: str = "strategy.name") -> list[Path]:
    """Draw the mean final accuracy at each pair of values of two columns, the worst row of each column framed.

    Parameters
    ----------
    folder : Path
        The folder of a sweep.
    rows, columns : str
        Two columns. All other settings that were swept have a panel for each combination.

    Returns
    -------
    list of Path
        `matrix.png`, `.pdf`, and the numbers with their intervals as `matrix.csv`.

    Raises
    ------
    InputError
        Where there are no such columns, one has a single value, or there are more settings than panels.
    """
    from matplotlib.patches import Rectangle

    sweep = read_sweep(folder)
    settings = sweep.varied(rows, columns)
    panel = sweep.labels(settings)
    names = canvas.distinct_values(panel, canvas.PANELS, "panels of a matrix")
    grids = {name: versus.grid(sweep, rows, columns, panel == name) for name in names}
    ys, xs = next(iter(grids.values())).rows, next(iter(grids.values())).columns
    labels = canvas.label(columns), canvas.label(rows)
    figure, panels = canvas.panels(names, 1.8 + 0.72 * len(xs), 1.4 + 0.3 * len(ys), *labels)
    low, high, extend = canvas.limits(np.array([grid.mean for grid in grids.values()]))
    x_texts, y_texts = format_values(xs), format_values(ys)
    for name, axes in panels.items():
        grid = grids[name]
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        image = axes.pcolormesh(grid.mean, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        axes.set_xticks(np.arange(len(xs)) + 0.5, [canvas.shortened(text) for text in x_texts], rotation=35, ha="right")
        axes.set_yticks(np.arange(len(ys)) + 0.5, [canvas.shortened(text) for text in y_texts])
        axes.tick_params(length=0)
        axes.set_ylim(len(ys), 0)
        for (row, column), value in np.ndenumerate(grid.mean):
            half = grid.half[row, column]
            spread = f" \N{PLUS-MINUS SIGN} {half:.0f}" if np.isfinite(half) else ""
            text = "\N{MULTIPLICATION SIGN}" if np.isnan(value) else f"{value:.0f}{spread}"
            ink = ink_on(image, value)
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
        for column in np.flatnonzero(grid.worst >= 0):
            corner = column + 0.04, grid.worst[column] + 0.04
            frame = Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=2)
            axes.add_patch(frame)
    colour_bar(figure, panels, image, NUMBERS[ACCURACY][0], extend)
    several_seeds = sweep.seed_index.any()
    spread = "\N{PLUS-MINUS SIGN} half the 95 % interval over seeds (Student t)." if several_seeds else ""
    note = sweep.note("Framed: the worst for each column.", spread)
    caption(figure, f"Final test accuracy, {sweep.averaging()}", note)
    header = [*settings, rows, columns, "mean", "interval", "worst"]
    table = [
        [*_values(sweep, settings, panel == name), y_texts[i], x_texts[j], *numbers]
        for name, grid in grids.items()
        for j in range(len(xs))
        for i in range(len(ys))
        for numbers in [(float(grid.mean[i, j]), float(grid.half[i, j]), int(grid.worst[j] == i))]
    ]
    return [*canvas.save(figure, folder, "matrix"), write_csv(folder / "matrix.csv", header, table, DIGITS)]


def harm(folder: Path) -> list[Path]:
    """Draw the final accuracy against write access for each attack: solid on labels, dashed on updates.

    Parameters
    ----------
    folder : Path
        The folder of a sweep with unattacked cells. Settings besides attack and clients have a panel each.

    Returns
    -------
    list of Path
        `harm.png`, `.pdf`, and the ratio of the worst harm by labels to the worst by updates as `harm.csv`.

    Raises
    ------
    InputError
        Where the attack does not vary, attacks of a kind or unattacked cells are missing, or there are too many panels.
    """
    sweep = read_sweep(folder)
    attack, k = sweep.column(NAME), sweep.column(K)
    settings = sweep.varied(NAME, K)
    panel = sweep.labels(settings)
    names = canvas.distinct_values(panel, canvas.PANELS, "panels of a comparison of harm")
    figure, panels = canvas.panels(names, 6.2 if len(names) == 1 else 4.4, 3.9, NUMBERS[K][0], NUMBERS[ACCURACY][0])
    writes = {name: versus.writes_of(sweep, attack == name) for name in dict.fromkeys(attack)}
    order = sorted(writes, key=lambda name: writes[name] != "none")  # the unattacked cells first
    header: list[str] = []
    table = []
    for part, axes in panels.items():
        for number, name in enumerate(order):
            cells = np.flatnonzero((panel == part) & (attack == name))
            points = split(len(cells), k[cells])
            mean, half = np.transpose([mean_interval(sweep.seed_means(cells[same])) for same in points.values()])
            style = canvas.style(number) | {"linestyle": "--" if writes[name] == "updates" else "-"}
            if writes[name] == "none":
                style |= {"color": "0.4", "linestyle": ":", "marker": ""}
            at = [value for (value,) in points]
            axes.errorbar(at, mean, np.nan_to_num(half), label=name, capsize=2, **style)
        axes.set_ylim(0, min(102, axes.get_ylim()[1]))  # a bar may leave what is possible
        for ratio in versus.ratios(sweep, panel == part):
            header = [*settings, *ratio]
            table.append([*_values(sweep, settings, panel == part), *ratio.values()])
    legend(figure, panels)
    note = "Solid: label flips; dashed: gradients. Bars: 95 % confidence of the mean over seeds (Student t)."
    caption(figure, "Final test accuracy by write access", sweep.note(note))
    return [*canvas.save(figure, folder, "harm"), write_csv(folder / "harm.csv", header, table, DIGITS)]


def _values(sweep: Sweep, settings: list[str], mask: versus.Mask) -> list[str]:
    """The text of the value of each of these settings, which all cells of a mask share."""
    return [format_value(sweep.cells[name][mask].tolist()[0]) for name in settings]
