"""Figures of what runs and sweeps left behind; reads files only. `python -m fl_attack.plots FOLDER [KIND]`"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fl_attack.errors import InputError
from fl_attack.plots import canvas
from fl_attack.plots.comparisons import harm, matrix, rounds
from fl_attack.plots.marks import caption, heat, legend
from fl_attack.plots.table import (
    ACCURACY,
    GOAL,
    KB,
    LABELS,
    NUMBERS,
    PARTS,
    Array,
    B,
    Floats,
    K,
    NotVariedError,
    confidence,
    deviations,
    goal_differences,
    means_on_grid,
    read_rounds,
    read_sweep,
    several,
    split,
    told,
)


def curves(folder: Path) -> list[Path]:
    """Accuracy of a run by round, attacked and (where there is a baseline) honest: `curves.png`."""
    file = folder / "summary.json"
    return curves_of(folder, json.loads(file.read_text()) if file.exists() else {"budget": 0})


def curves_of(folder: Path, summary: Mapping[str, Any]) -> list[Path]:
    """The same from a summary that is not in the folder yet, since it says that the run is whole."""
    figure, panels = canvas.panels([""], 6.4, 3.8, "round", "test accuracy")
    axes = panels[""]
    attacked = read_rounds(folder)
    honest = folder / "baseline"
    if (honest / "rounds.csv").exists():
        rows = read_rounds(honest)
        axes.plot(rows["round"], rows["test_accuracy"], color=canvas.HONEST, linestyle="--", label="honest")
    axes.plot(
        attacked["round"],
        attacked["test_accuracy"],
        color=canvas.ATTACKED,
        label="attacked" if len(axes.lines) else "run",
    )
    axes.set(ylim=(0, 1.02), xlim=(0, max(attacked["round"])))
    if summary["budget"]:
        setting = f"write access k = {summary['write_access']:.3g}, local budget b = {summary['budget']:.3g}"
        axes.set_title(setting, fontsize="medium", loc="left")
    axes.legend(frameon=False, loc="lower right")
    return canvas.save(figure, folder, "curves", ("png",))


def heatmap(folder: Path, column: str = ACCURACY) -> list[Path]:
    """Mean of a column, by default the final accuracy, over k and b; a panel for each goal, lines of equal k·b."""
    sweep = read_sweep(folder)
    panel, hidden = sweep.facets()
    figure = _maps(sweep.column(K), sweep.column(B), sweep.column(column), panel, "cividis", _axis(column))
    name = "Final test accuracy" if column == ACCURACY else _axis(column)
    caption(figure, f"{name}, {sweep.over(hidden)}", sweep.note("Lines: equal global budget k·b."))
    return canvas.save(figure, folder, "heatmap" if column == ACCURACY else f"heatmap_{column}")


def difference(folder: Path) -> list[Path]:
    """Final accuracy of the untargeted less that of the targeted attack over k and b, from pairs of cells."""
    sweep = read_sweep(folder)
    if GOAL not in sweep.factors:
        raise NotVariedError("a difference of goals needs a sweep of attack.goal=untargeted,targeted")
    panel, hidden = sweep.facets(GOAL)
    at, values = goal_differences(sweep)
    k, b, unit = sweep.column(K)[at], sweep.column(B)[at], "difference in accuracy (percentage points)"
    figure = _maps(k, b, values, panel[at], "PuOr_r", unit)
    note = sweep.note("Above 0 the targeted attack does more harm. Lines: equal global budget k·b.")
    caption(figure, f"Final accuracy, untargeted less targeted, {sweep.over(hidden)}", note)
    return canvas.save(figure, folder, "difference")


def budget(folder: Path) -> list[Path]:
    """Final accuracy against k·b with confidence bands over seeds.

    Where both k and b vary, several pairs share a product and differ in harm: each k has a line, each goal a panel.
    Else each goal has a line.
    """
    sweep = read_sweep(folder)
    part, hidden = sweep.facets()
    x, k = sweep.column(KB), sweep.column(K)
    several(np.unique(x), "a plot against the global budget", "k·b")
    ks = np.unique(k)
    fan = len(ks) > 1 and len(np.unique(sweep.column(B))) > 1
    shown = ks[np.linspace(0, len(ks) - 1, min(len(ks), PARTS)).round().astype(int)]
    names, width = (sorted(set(part)), 3.7) if fan else ([""], 5.4)
    figure, panels = canvas.panels(names, width, 3.3, NUMBERS[KB][0], NUMBERS[ACCURACY][0])
    for name, axes in panels.items():
        lines = [(f"k = {told(one)}", (part == name) & (k == one)) for one in shown]
        for number, (label, mask) in enumerate(lines if fan else [(one, part == one) for one in sorted(set(part))]):
            cells = np.flatnonzero(mask)
            parts = split(len(cells), x[cells])
            at = np.array([value for (value,) in parts])
            points = [confidence(sweep.seed_means(cells[some])) for some in parts.values()]
            mean, half = np.array(points).reshape(-1, 2).T
            style = canvas.style(number, len(shown) if fan else None)
            axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.22, linewidth=0)
            axes.plot(at, mean, label=label, linestyle="-" if fan else canvas.DASHES[number], **style)
    low, high = axes.get_ylim()  # of all panels; a band may leave what is possible
    axes.set(xlim=(0, None), ylim=(max(low, -2), min(high, 102)))
    legend(figure, panels)
    note = sweep.note(
        "Each line has one k and raises b." if fan else "",
        f"{len(shown)} of {len(ks)} values of k are drawn." if fan and len(shown) < len(ks) else "",
        "Bands: 95 % confidence of the mean over seeds (Student t)." if sweep.repeat.any() else "One seed: no bands.",
    )
    caption(figure, f"Final test accuracy by global budget, {sweep.over(hidden)}", note)
    return canvas.save(figure, folder, "budget")


def spread(folder: Path) -> list[Path]:
    """Standard deviation of the final accuracy over seeds by k, pooled over b, a line for each goal."""
    sweep = read_sweep(folder)
    part, hidden = sweep.facets()
    several(np.unique(sweep.column(K)), "a plot by k", "k")
    figure, panels = canvas.panels([""], 5.4, 3.4, NUMBERS[K][0], "standard deviation (percentage points)")
    deviation = deviations(sweep, part)
    if not np.isfinite(list(deviation.values())).any():
        raise NotVariedError("a standard deviation needs two seeds or more; the sweep has one")
    for number, name in enumerate(sorted(set(part))):
        points = [(at, value) for (line, at), value in deviation.items() if line == name]
        panels[""].plot(*np.array(points).T, label=name, linestyle=canvas.DASHES[number], **canvas.style(number))
    panels[""].set_ylim(bottom=0)
    legend(figure, panels)
    title = f"Standard deviation of the final test accuracy over {len(set(sweep.repeat.tolist()))} seeds"
    over = ", ".join(["b", *hidden])
    caption(figure, title, sweep.note(f"Pooled over {over}: root of the mean variance of each setting."))
    return canvas.save(figure, folder, "spread")


def columns(folder: Path, x: str, y: str, by: str = "") -> list[Path]:
    """Column y against column x: all cells and their mean with its confidence interval, for each value of `by`."""
    sweep = read_sweep(folder)
    across, values, parts = sweep.column(x), sweep.column(y), sweep.column(by) if by else np.full(len(sweep.repeat), "")
    if values.dtype.kind != "f":
        raise InputError(f"{y} is a column of text; the second column must hold numbers")
    known = np.isfinite(values) if across.dtype.kind != "f" else np.isfinite(values) & np.isfinite(across)
    across, values, parts = across[known], values[known], parts[known]
    names = sorted(set(parts))
    if not len(values):
        raise InputError(f"no cell has both {x} and {y}")
    if len(names) > canvas.ENTRIES:
        raise InputError(f"{by} has {len(names)} values; a legend bears at most {canvas.ENTRIES}")
    figure, panels = canvas.panels([""], 5.6, 3.8, LABELS.get(x, (x,))[0], LABELS.get(y, (y,))[0])
    axes, levels = panels[""], sorted(set(across))
    text = across.dtype.kind != "f"
    place = np.array([levels.index(one) for one in across], float) if text else across
    for number, name in enumerate(names):
        mine, label = parts == name, told(name) if by else ""
        shift = (number - (len(names) - 1) / 2) * 0.3 / len(names) if text else 0.0  # side by side over their name
        style, where = (
            canvas.style(number, len(names) if len(names) > len(canvas.OKABE_ITO) else None),
            place[mine] + shift,
        )
        axes.plot(where, values[mine], **style | {"linestyle": "", "alpha": 0.25, "markersize": 3})
        groups = split(len(where), where)
        means, halves = np.array([confidence(values[mine][cells]) for cells in groups.values()]).T
        if len(groups) < len(where) or text:  # else the cells are their own means
            line = "" if text else canvas.DASHES[number % len(canvas.DASHES)]
            at = [value for (value,) in groups]
            axes.errorbar(at, means, np.nan_to_num(halves), label=label, capsize=2.5, linestyle=line, **style)
        else:
            axes.plot([], [], label=label, **style | {"linestyle": ""})
    if text:
        labels = [told(one) for one in levels]
        long = len("  ".join(labels)) > 60
        axes.set_xticks(range(len(levels)), labels, rotation=25 * long, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(levels) - 0.5)
    elif levels[0] > 0 and levels[-1] > 50 * levels[0]:
        axes.set_xscale("log")
    legend(figure, panels, by and LABELS.get(by, (by,))[0])
    lacking = f"{np.sum(~known)} cells have no such number." if not known.all() else ""
    bars = "Bars: 95 % confidence of the mean (Student t) over all cells there; faint: the cells."
    caption(figure, "", sweep.note(bars, lacking))
    return canvas.save(figure, folder, "_".join(filter(None, ["columns", x, y, by])))


def all_of_sweep(folder: Path) -> list[Path]:
    """Every figure that the swept columns allow; other factors than k, b, goal and seed by `columns`."""
    written: list[Path] = []
    for figure in (heatmap, budget, difference, spread):
        with suppress(NotVariedError):
            written += figure(folder)
    with suppress(NotVariedError):
        factors = read_sweep(folder).factors
        goal = [GOAL] if GOAL in factors else []
        for factor in [name for name in factors if name != GOAL] or ([] if written else goal):
            written += columns(folder, factor, ACCURACY, *(goal if factor != GOAL else []))
    return written


PLOTS: dict[str, Callable[..., list[Path]]] = {
    "curves": curves,
    "heatmap": heatmap,
    "budget": budget,
    "difference": difference,
    "spread": spread,
    "columns": columns,
    "matrix": matrix,
    "harm": harm,
    "rounds": rounds,
    "all": all_of_sweep,
}
USAGE = (
    "usage: python -m fl_attack.plots FOLDER [KIND | columns X Y [BY] | heatmap [COLUMN] | matrix [ROWS COLUMNS] | "
    f"rounds [BY]]; kinds: {', '.join(PLOTS)}"
)


def _axis(column: str) -> str:
    return LABELS.get(column, (column,))[0]


def _maps(x: Floats, y: Floats, values: Floats, panel: Array, colours: str, unit: str) -> Any:
    xs, ys = np.unique(x), np.unique(y)
    several(xs, "a heat map", "k")
    several(ys, "a heat map", "b")
    parts = split(len(panel), panel)
    grids = {name: means_on_grid(x[at], y[at], values[at], xs, ys) for (name,), at in parts.items()}
    low, high = (f([f(grid) for grid in grids.values()]) for f in (np.nanmin, np.nanmax))
    if signed := colours != "cividis":  # then 0 is in the middle
        high = max(-low, high, 1e-9)
        low = -high
    width = 0.9 + (0.44 if signed else 0.38) * min(max(len(xs), 8), 12)
    figure, panels = canvas.panels(list(grids), width, 3.9, NUMBERS[K][0], NUMBERS[B][0])
    for name, axes in panels.items():
        image = heat(axes, xs, ys, grids[name], signed, cmap=colours, vmin=low, vmax=high)
    bar = figure.colorbar(image, ax=list(panels.values()), pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize="small")
    bar.set_label(unit, fontsize="small")
    return figure


def draw(folder: Path, kind: str, *names: str) -> list[Path]:
    """A figure by its kind and the columns it is of; InputError where there is none such."""
    columns_of(kind, *names)
    return PLOTS[kind](folder, *names)


def columns_of(kind: str, *names: str) -> list[str]:
    """The columns that a figure is of, those by default included; InputError where there is no such kind."""
    if kind not in PLOTS:
        raise InputError(f"{kind} is not a kind of plot; known: {', '.join(PLOTS)}")
    takes = list(signature(PLOTS[kind]).parameters.values())[1:]
    if not sum(one.default is Parameter.empty for one in takes) <= len(names) <= len(takes):
        raise InputError(USAGE)
    return [name for name in (*names, *(one.default for one in takes[len(names) :])) if name]


def all_asked(folder: Path) -> list[Path]:
    """Every figure that the swept columns allow, and those that the `config.yaml` of the sweep asks for."""
    written = all_of_sweep(folder)
    for figure in asked(folder):
        written += draw(folder, *figure)
    return list(dict.fromkeys(written))


def asked(folder: Path) -> list[list[str]]:
    """`figures` of the settings that a sweep has left; none where these can't be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        return [[str(part) for part in figure] for figure in settings["figures"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return []


def main(arguments: list[str]) -> int:
    """Draw what the command line names, and print the files; gives the exit code."""
    try:
        if not arguments or arguments[-1] in ("-h", "--help"):
            raise InputError(USAGE)
        folder, *rest = arguments
        if not rest and (Path(folder) / "sweep.csv").exists():
            files = all_asked(Path(folder))
        else:
            kind, *names = rest or ["curves"]
            files = draw(Path(folder), kind, *names)
        for file in files:
            print(file)
    except InputError as error:
        print(f"fl-attack: {error}", file=sys.stderr)
        return 2
    return 0
