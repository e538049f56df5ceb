"""What every figure is drawn on and with: panels, colours, files."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fl_attack.data.cache import write_whole

HONEST, ATTACKED = "#0072B2", "#D55E00"
OKABE_ITO = (HONEST, ATTACKED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by all
COLOURS = len(OKABE_ITO)
MARKERS, DASHES = "osD^vPX*<>hd", ("-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)))  # told apart in grey
ENTRIES = len(MARKERS)  # that a legend bears


def panels(names: Sequence[str], width: float, height: float, x: str, y: str) -> tuple[Any, dict[str, Any]]:
    """A figure with axes for each name, alike in scale; width and height of each in inches."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    across = 2 if len(names) == 4 else min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    made = dict(zip(names, grid.flat, strict=False))
    for number, (name, axes) in enumerate(made.items()):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="small")
        axes.set_title(name, fontsize="medium", loc="left")
        if number + across >= len(names):
            axes.set_xlabel(x, fontsize="small")
            axes.tick_params(labelbottom=True)
        if number % across == 0:
            axes.set_ylabel(y, fontsize="small")
    return figure, made


def style(number: int, ordered: int | None = None) -> dict[str, Any]:
    """Colour and marker of a line: one of a palette, or of so many shades from dark to light."""
    from matplotlib import colormaps

    shade = number / max(ordered - 1, 1) if ordered else 0.0
    colour = colormaps["cividis"](0.85 * shade) if ordered else OKABE_ITO[number]
    return {"color": colour, "marker": MARKERS[number], "markersize": 4.5, "linewidth": 1.3}


def save(figure: Any, folder: Path, name: str, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """The files of a figure, which hold neither dates nor versions."""
    from matplotlib import rc_context

    files = [folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.{kind}" for kind in kinds]
    nothing = {"png": {"Software": None}, "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate"))}
    for file, kind in zip(files, kinds, strict=True):
        with rc_context({"pdf.fonttype": 42}):  # text stays text
            write_whole(file, partial(figure.savefig, format=kind, dpi=160, metadata=nothing[kind]))
    return files
