"""Figures of tables made for them: lines with bands, and gradients as points and arrows."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend


def lines(file: Path, title: str, note: str, log: bool = False, floor: float | None = None) -> list[Path]:
    """Draw lines with bands from a table.

    Parameters
    ----------
    file : Path
        A table of the columns panel, line, x, y and half interval; the third and fourth are named as their axis is.
    title, note : str
        What stands above and below the panels.
    log : bool
        Whether x is logarithmic from its least positive value up, and linear from there down to 0.
    floor : float, optional
        The lower end of the axis y.

    Returns
    -------
    list of Path
        A PNG and a PDF of the table's name, beside it.
    """
    header, rows = _table(file)
    x, y = header[2], header[3]
    panels = list(dict.fromkeys(row[0] for row in rows))
    names = list(dict.fromkeys(row[1] for row in rows))
    labels = [canvas.label(name) for name in (x, y)]
    figure, axes_of = canvas.panels(panels, 5.4 if len(panels) == 1 else 4.2, 3.5, *labels)
    for panel, axes in axes_of.items():
        for number, name in enumerate(names):
            points = [[float(value or "nan") for value in row[2:]] for row in rows if row[:2] == [panel, name]]
            if not points:
                continue
            at, mean, half = np.array(sorted(points)).T
            style = canvas.style(number, len(names) if len(names) > len(canvas.COLOURS) else None)
            axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)
            axes.plot(at, mean, label=name, linestyle=canvas.DASHES[number % len(canvas.DASHES)], **style)
        if log:
            least = min(float(row[2]) for row in rows if float(row[2]) > 0)
            axes.set_xscale("symlog", linthresh=least)
            axes.set_xlim(left=0)
            ticks = [0.0]
            for value in sorted({float(row[2]) for row in rows} - {0.0}):
                if value > 1.5 * ticks[-1]:  # else the labels would overlap
                    ticks.append(value)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60)
            axes.minorticks_off()
        if floor is not None:
            axes.set_ylim(bottom=floor)
    legend(figure, axes_of)
    caption(figure, title, note)
    return canvas.save(figure, file.parent, file.stem)


def gradients(file: Path, title: str, note: str) -> list[Path]:
    """Draw gradients along two directions: kinds of which there are many as points, single ones as arrows.

    Parameters
    ----------
    file : Path
        A table with columns panel, kind, x, y: the coordinates of a gradient.
    title, note : str
        What stands above and below the panels.

    Returns
    -------
    list of Path
        A PNG and a PDF of the table's name, beside it.
    """
    _, rows = _table(file)
    panels = list(dict.fromkeys(row[0] for row in rows))
    figure, axes_of = canvas.panels(panels, 4.0, 3.4, "along the first direction", "along the second")
    kinds = list(dict.fromkeys(row[1] for row in rows))
    for panel, axes in axes_of.items():
        for number, kind in enumerate(kinds):
            points = np.array([[float(value) for value in row[2:]] for row in rows if row[:2] == [panel, kind]])
            if not len(points):
                continue
            style: dict[str, Any] = canvas.style(number) | {"linestyle": "", "label": kind}
            if len(points) > 1:
                axes.plot(*points.T, **style | {"markersize": 2, "alpha": 0.35, "marker": "."})
            else:
                axes.annotate("", points[0], (0, 0), arrowprops={"arrowstyle": "-|>", "color": style["color"]})
                axes.plot(*points.T, **style)
        axes.axhline(0, color="0.7", linewidth=0.6)
        axes.axvline(0, color="0.7", linewidth=0.6)
    legend(figure, axes_of)
    caption(figure, title, note)
    return canvas.save(figure, file.parent, file.stem)


def _table(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, as text."""
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, rows
