"""Figures that compare attacks and rules, each with its table: `matrix`, `harm`, `rounds`."""

from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.errors import InputError
from fl_attack.plots import canvas, versus
from fl_attack.plots.marks import caption, legend
from fl_attack.plots.table import ACCURACY, NUMBERS, K, confidence, read_sweep, split, told


def matrix(folder: Path, rows: str = "attack.name", columns: str = "strategy.name") -> list[Path]:
    """Mean final accuracy at each pair of values of two columns, the worst row of each framed; and as a table."""
    from matplotlib.patches import Rectangle

    sweep = read_sweep(folder)
    ys, xs, mean, half = versus.grid(sweep, rows, columns)
    names = [""]
    figure, panels = canvas.panels(names, 1.8 + 0.62 * len(xs), 1.4 + 0.3 * len(ys), columns, rows)
    axes = panels[""]
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    image = axes.pcolormesh(mean, cmap="cividis", edgecolors="face", linewidth=0.2)
    axes.set_xticks(np.arange(len(xs)) + 0.5, [told(x) for x in xs], rotation=35, ha="right")
    axes.set_yticks(np.arange(len(ys)) + 0.5, [told(y) for y in ys])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(mean):
        ground = image.cmap(image.norm(value))
        ink = "black" if np.dot(ground[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"
        text = "\N{MULTIPLICATION SIGN}" if np.isnan(value) else f"{value:.0f}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
    for column, row in enumerate(versus.worst(ys, mean)):
        axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=2))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(NUMBERS[ACCURACY][0], fontsize="small")
    _, hidden = sweep.facets(rows, columns)
    caption(figure, f"Final test accuracy, {sweep.over(hidden)}", sweep.note("Framed: the worst for each column."))
    table = [
        {rows: told(y), columns: told(x), "mean": mean[i, j], "interval": half[i, j], "worst": int(lowest == i)}
        for j, (x, lowest) in enumerate(zip(xs, versus.worst(ys, mean), strict=True))
        for i, y in enumerate(ys)
    ]
    return [*canvas.save(figure, folder, "matrix"), versus.write_csv(folder / "matrix.csv", table)]


def harm(folder: Path) -> list[Path]:
    """Final accuracy against write access for each attack, and a table of the ratio of harm: flips over gradients."""
    sweep = read_sweep(folder)
    names, k = sweep.column(versus.NAME), sweep.column(K)
    figure, panels = canvas.panels([""], 6.2, 3.9, NUMBERS[K][0], NUMBERS[ACCURACY][0])
    order = [name for name in dict.fromkeys(names) if name != "none"]
    for number, name in enumerate(["none", *order]):
        points = []
        for (at,), cells in split(len(k), k).items():
            mine = cells[names[cells] == name]
            if len(mine):
                points.append((at, *confidence(sweep.seed_means(mine))))
        at, mean, half = np.array(points).T
        flips = name in versus.FLIPS
        look = canvas.style(number % canvas.COLOURS) | {"marker": canvas.MARKERS[number % canvas.ENTRIES]}
        look |= {"linestyle": "-" if flips else "--"}
        if name == "none":
            look |= {"color": "0.4", "linestyle": ":", "marker": ""}
        panels[""].errorbar(at, mean, np.nan_to_num(half), label=name, capsize=2, **look)
    panels[""].set_ylim(bottom=0)  # a bar may leave what is possible
    legend(figure, panels)
    note = "Solid: label flips; dashed: gradients. Bars: 95 % confidence of the mean over seeds (Student t)."
    caption(figure, "Final test accuracy by write access", sweep.note(note))
    return [*canvas.save(figure, folder, "harm"), versus.write_csv(folder / "harm.csv", versus.ratios(sweep))]


def rounds(folder: Path, by: str = "attack.name") -> list[Path]:
    """Mean accuracy by round for each value of a column, a panel for each combination of the others."""
    sweep = read_sweep(folder)
    parts, hidden = sweep.facets(by)
    try:
        with np.load(folder / "curves.npz") as stored:
            accuracy, at = 100 * stored["accuracy"], stored["round"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'curves.npz'} can't be read: {error}") from None
    cell = sweep.columns["cell"].astype(int)
    figure, panels = canvas.panels(sorted(set(parts)), 4.6, 3.6, "round", "test accuracy (%)")
    values: list[Any] = list(dict.fromkeys(sweep.column(by).tolist()))
    for part, axes in panels.items():
        for number, value in enumerate(values):
            mine = cell[(parts == part) & (sweep.column(by) == value)]
            if len(mine):
                look = canvas.style(number, len(values) if len(values) > canvas.COLOURS else None)
                look |= {"marker": "", "linestyle": canvas.DASHES[number % len(canvas.DASHES)]}
                axes.plot(at, np.nanmean(accuracy[mine], 0), label=told(value), **look)
    legend(figure, panels, by)
    caption(figure, f"Test accuracy by round, {sweep.over(hidden)}", sweep.note())
    return canvas.save(figure, folder, "rounds")
