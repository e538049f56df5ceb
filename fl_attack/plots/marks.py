"""Marks on given axes: heat maps, lines of equal products, legends and captions."""

import textwrap
from typing import Any

import numpy as np

from fl_attack.plots.canvas import has_titles, shortened
from fl_attack.sweep_table import Floats, NotDrawableError, format_value

PRINTED = 12  # rows or columns of the largest map whose values are printed


def heat(axes: Any, xs: Floats, ys: Floats, grid: Floats, signed: bool, **scale: Any) -> Any:
    """Draw a heat map of cells of equal size, however xs and ys are spaced, and lines of equal products over it.

    NaN is a cross. Values are printed in maps of up to `PRINTED` rows and columns, in larger ones only minus signs.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    xs, ys : arrays
        The values at the columns and rows, ascending.
    grid : (len(ys), len(xs)) array
        The values to draw.
    signed : bool
        Whether values are printed with their sign; in larger maps, whether minus signs are.
    scale
        Arguments of matplotlib's `pcolormesh`: `cmap`, `vmin`, `vmax`.

    Returns
    -------
    matplotlib.collections.QuadMesh
        The image, from which a colour bar can be drawn.
    """
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("0.85")
    image = axes.pcolormesh(grid, edgecolors="face", linewidth=0.2, **scale)
    for set_ticks, marks in ((axes.set_xticks, xs), (axes.set_yticks, ys)):
        step = -(-len(marks) // PRINTED)
        set_ticks(np.arange(len(marks))[::step] + 0.5, [f"{mark:.3g}" for mark in marks[::step]])
    axes.tick_params(length=0)
    equal_products(axes, xs, ys)
    large = max(len(xs), len(ys)) > PRINTED
    for (row, column), value in np.ndenumerate(grid):
        ground: Any = image.cmap(image.norm(value))
        if np.isnan(value):
            text, ground, ink = "\N{MULTIPLICATION SIGN}", "0.85", "0.4"
        else:
            ink = ink_on(image, value)
            text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if signed else f"{value:.1f}"
            if large:  # of the values only the sign, which a print in grey does not show
                text = "\N{MINUS SIGN}" if signed and value < 0 else ""
        box = (
            {"facecolor": ground, "edgecolor": "none", "pad": 2.2} if not large else None
        )  # ends lines before the figures
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=ink, bbox=box)
    return image


def colour_bar(figure: Any, panels: dict[str, Any], image: Any, unit: str, extend: str) -> None:
    """Draw the colour scale beside all panels.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    panels : dict
        The axes of each panel.
    image : matplotlib.collections.QuadMesh
        The image of any of them.
    unit : str
        The label of the scale.
    extend : str
        The ends of the scale that have an arrow, because cells lie beyond: neither, min, max or both.
    """
    bar = figure.colorbar(image, ax=list(panels.values()), pad=0.02, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize="small")
    bar.set_label(unit, fontsize="small")


def ink_on(image: Any, value: float) -> str:
    """The colour of text that is read best on a cell of an image.

    Parameters
    ----------
    image : matplotlib image
        An image with a map of colours.
    value : float
        The value of the cell.

    Returns
    -------
    {"black", "white"}
    """
    ground = image.cmap(image.norm(value))
    return "black" if np.dot(ground[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def equal_products(axes: Any, xs: Floats, ys: Floats) -> None:
    """Draw lines of equal x·y over a map of equal cells, labelled on its right edge.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        What the map is drawn on, a cell a unit.
    xs, ys : (columns,) and (rows,) arrays
        The values of its cells, rising, two or more.
    """
    x_values, x_places = _edges_and_centres(xs)
    y_values, y_places = _edges_and_centres(ys)
    x = np.linspace(max(x_values[0], x_values[-1] / 1000), x_values[-1], 2000)
    below = -np.inf  # where the last label is
    for product in products_to_label(xs, ys):
        inside = (product / x >= y_values[0]) & (product / x <= y_values[-1])
        if not inside[-1]:
            continue
        across, up = np.interp(x[inside], x_values, x_places), np.interp(product / x[inside], y_values, y_places)
        if up[-1] - below < 0.05 * len(ys):
            continue
        below = up[-1]
        axes.plot(across, up, color="white", linewidth=2.2)
        axes.plot(across, up, color="black", linewidth=0.9)
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(f"k·b = {product:.3g}", (len(xs), below), **place)
    axes.set(xlim=(0, len(xs)), ylim=(0, len(ys)))


def products_to_label(xs: Floats, ys: Floats) -> list[float]:
    """A few products, spread over those of a grid whose lines reach its right edge.

    Parameters
    ----------
    xs, ys : (columns,) and (rows,) arrays
        The grid's values, rising.

    Returns
    -------
    list of float
        Rising, four at most: products that several cells share, or where few are, products rounded to one digit.
    """
    every = np.round(np.outer(xs, ys).ravel(), 9)
    every = every[(every > 0) & (every >= xs[-1] * ys[0])]  # whose lines reach the right edge
    if not len(every):
        return []
    values, count = np.unique(every, return_counts=True)
    shared = values[count > 1]
    wanted = np.quantile(every, (0.15, 0.4, 0.65, 0.85))
    chosen = [
        shared[np.abs(np.log(shared / one)).argmin()] if len(shared) > 3 else float(f"{one:.1g}") for one in wanted
    ]
    return sorted({float(one) for one in chosen})


def legend(figure: Any, panels: dict[str, Any], title: str = "") -> None:
    """Draw the names of all lines once, beside the panels; nothing where a single line has none.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure of the panels.
    panels : dict of str to Axes
        Lines of the same name in several panels are named once.
    title : str
        The name of the column whose values the lines are named by.
    """
    lines = {
        label: line for axes in panels.values() for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if lines and list(lines) != [""]:
        figure.legend(
            lines.values(),
            map(shortened, lines),
            loc="outside right center",
            frameon=False,
            fontsize="small",
            title=title or None,
        )


def require_several(values: Floats, figure: str, name: str) -> None:
    """Refuse a figure of a quantity that does not vary.

    Parameters
    ----------
    values : (n,) array
        What the figure would be drawn over.
    figure, name : str
        What the figure and the quantity are called in the error.

    Raises
    ------
    NotDrawableError
        Unless two of the values differ.
    """
    found = np.unique(values)
    if len(found) < 2:
        raise NotDrawableError(f"{figure} needs several values of {name}; the sweep has only {format_value(found[0])}")


def caption(figure: Any, title: str, note: str) -> None:
    """Write a title above the panels and a note below them, both wrapped to the figure's width; none if `untitled`.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure of the panels.
    title : str
        The title; empty for none.
    note : str
        The note: sentences, which may take several lines.
    """
    if not has_titles():
        return
    width = int(figure.get_figwidth() * 11)
    if title:
        figure.suptitle(textwrap.fill(title, width), x=0.01, ha="left", fontsize="medium", fontweight="bold")
    figure.supxlabel(textwrap.fill(note, int(width * 1.2)), x=0.01, ha="left", fontsize="small", color="0.25")


def _edges_and_centres(values: Floats) -> tuple[Floats, Floats]:
    """Values at the first edge, the centres and the last edge of n cells in a row, and the places of these, 0 to n."""
    first, last = (values[1] - values[0]) / 2, (values[-1] - values[-2]) / 2
    places = np.concatenate([[0], np.arange(len(values)) + 0.5, [len(values)]])
    return np.concatenate([[values[0] - first], values, [values[-1] + last]]), places
