"""What every figure is drawn on and with: panels, labels, colours, files."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.data.cache import write_whole
from fl_attack.sweep_table import LABELS, WORDS, Array, Floats, NotDrawableError, format_value

HONEST, ATTACKED = "#0072B2", "#D55E00"
COLOURS = (  # told apart by the colour-blind too; the first six are Okabe and Ito's
    *(HONEST, ATTACKED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#000000", "#882255", "#999933", "#332288", "#8C510A", "#7FBC41"),
)
MARKERS, DASHES = "osD^vPX*<>hd", ("-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)))  # also for prints in grey
ENTRIES = len(MARKERS)  # names in a legend, at most
PANELS = 12  # panels of a figure, at most
_captured: ContextVar[list[Any] | None] = ContextVar("figures that are kept instead of written", default=None)
_titled: ContextVar[bool] = ContextVar("whether figures have titles and notes", default=True)


def panels(names: Sequence[str], width: float, height: float, x: str, y: str) -> tuple[Any, dict[str, Any]]:
    """A figure with axes for each name, which share both scales.

    Parameters
    ----------
    names : sequence of str
        The titles of the panels, all different.
    width, height : float
        Size of a panel in inches.
    x, y : str
        Labels of the axes.

    Returns
    -------
    figure : matplotlib.figure.Figure
    panels : dict
        The axes of each name.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    across = 2 if len(names) == 4 else min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    axes_of = dict(zip(names, grid.flat, strict=False))
    for number, (name, axes) in enumerate(axes_of.items()):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="small")
        axes.set_title(shortened(name, int(11 * width)), fontsize="medium", loc="left")
        if number + across >= len(names):
            axes.set_xlabel(x, fontsize="small")
            axes.tick_params(labelbottom=True)
        if number % across == 0:
            axes.set_ylabel(y, fontsize="small")
    return figure, axes_of


def distinct_values(values: Array, limit: int, what: str) -> list[Any]:
    """The different values of a column, ascending.

    Parameters
    ----------
    values : array
        The column.
    limit : int
        The largest number of values that a figure shows.
    what : str
        The figure and the part of it that has one for each value, for the error.

    Returns
    -------
    list
        Plain values of Python.

    Raises
    ------
    NotDrawableError
        Where there are more than `limit`.
    """
    found = sorted(set(values.tolist()))
    if len(found) > limit:
        names = ", ".join(map(format_value, found[:2]))
        raise NotDrawableError(f"{what}: a figure shows at most {limit}, the sweep has {len(found)} ({names}, ...)")
    return found


def shortened(text: str, limit: int = 32) -> str:
    """A text, of a long one the end: of a user's function that is its name.

    Parameters
    ----------
    text : str
        The whole text.
    limit : int
        The largest number of characters.

    Returns
    -------
    str
        The text itself where it is short enough; else an ellipsis and its end.
    """
    return text if len(text) <= limit else f"\N{HORIZONTAL ELLIPSIS}{text[1 - limit :]}"


def label(column: str) -> str:
    """The label of a column's axis, with its unit, in the field's words."""
    return LABELS[column][0] if column in LABELS else WORDS.get(column, column)


def limits(values: Floats) -> tuple[float, float, str]:
    """The ends of a colour scale that a few cells do not stretch.

    Parameters
    ----------
    values : array
        The values of all cells, one of them finite; others are left out.

    Returns
    -------
    low, high : float
        The least and the largest value; but at an end where the last fiftieth of the cells (at least one) reaches
        farther beyond the others than these are spread, the last value of the others.
    extend : str
        The ends that cells lie beyond, as matplotlib's `extend` of a colour bar: neither, min, max or both.
    """
    ordered = np.sort(values[np.isfinite(values)])
    few = max(1, len(ordered) // 50)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 2 * few + 2:
        inner_low, inner_high = ordered[few], ordered[-1 - few]
        low, high = (
            inner if abs(end - inner) > inner_high - inner_low > 0 else end
            for end, inner in ((low, inner_low), (high, inner_high))
        )
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    return float(low), float(high), extend[bool(ordered[0] < low), bool(ordered[-1] > high)]


def style(number: int, shades: int | None = None) -> dict[str, Any]:
    """How a line is drawn, by its number.

    Parameters
    ----------
    number : int
        The number of the line, counted from 0.
    shades : int, optional
        How many lines there are, where they follow an order: their colours go from dark to light.

    Returns
    -------
    dict
        Arguments of matplotlib: colour, marker, and their sizes.
    """
    from matplotlib import colormaps

    shade = number / max(shades - 1, 1) if shades else 0.0
    again, place = divmod(number, len(COLOURS))
    colour = colormaps["cividis"](0.85 * shade) if shades else COLOURS[place]
    marker = MARKERS[(number + again) % len(MARKERS)]  # another one where a colour comes again
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.3}


@contextmanager
def untitled() -> Iterator[None]:
    """Figures that are drawn while the block runs have no title and no note, which a paper has in its caption."""
    token = _titled.set(False)
    try:
        yield
    finally:
        _titled.reset(token)


def has_titles() -> bool:
    """Whether figures have a title and a note."""
    return _titled.get()


@contextmanager
def captured() -> Iterator[list[Any]]:
    """Yield a list, which figures that are saved while the block runs are put in instead of being written."""
    figures: list[Any] = []
    token = _captured.set(figures)
    try:
        yield figures
    finally:
        _captured.reset(token)


def save(figure: Any, folder: Path, name: str, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write a figure in each format, with neither dates nor versions in the files.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure to write.
    folder : Path
        The folder that the files are written to.
    name : str
        The name of the files; dots, and what not every file system takes, become dashes.
    kinds : sequence of str
        The formats, which end the names.

    Returns
    -------
    list of Path
        The files; none where figures are captured.

    Raises
    ------
    InputError or RunError
        Where a file can't be written, as `write_whole` raises them.
    """
    from matplotlib import rc_context

    if (kept := _captured.get()) is not None:
        kept.append(figure)
        return []
    files = [folder / f"{re.sub(r'[^A-Za-z0-9_-]', '-', name)}.{kind}" for kind in kinds]
    no_metadata = {"png": {"Software": None}, "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate"))}
    for file, kind in zip(files, kinds, strict=True):
        with rc_context({"pdf.fonttype": 42}):  # text stays text
            write_whole(file, partial(figure.savefig, format=kind, dpi=160, metadata=no_metadata[kind]))
    return files
