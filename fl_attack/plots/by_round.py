"""Figures by round: `curves` of a run, `rounds` of a sweep."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.folder import PLAN
from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend
from fl_attack.sweep_table import Floats, format_values, mean_interval, read_csv, read_curves, read_sweep


def curves(folder: Path) -> list[Path]:
    """Draw the accuracy of a run by round, attacked and, where there is a baseline, honest.

    Parameters
    ----------
    folder : Path
        The folder of a run.

    Returns
    -------
    list of Path
        `curves.png` and `.pdf`.

    Raises
    ------
    InputError
        Where the folder has no readable `rounds.csv`.
    """
    file = folder / "summary.json"
    return curves_of(folder, json.loads(file.read_text()) if file.exists() else {"budget": 0})


def curves_of(folder: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Draw `curves` with a summary that is given: its file is written last, since it marks the run as finished.

    Parameters
    ----------
    folder : Path
        The folder of the run, with its table of rounds; the figure goes there.
    summary : mapping
        The content that `summary.json` will have: `budget` and, unless that is 0, `write_access`.

    Returns
    -------
    list of Path
        `curves.png` and `.pdf`.

    Raises
    ------
    InputError
        Where the folder has no readable `rounds.csv`.
    """
    figure, panels = canvas.panels([""], 6.4, 3.8, "round", "test accuracy")
    axes = panels[""]
    attacked = read_rounds(folder)
    honest = folder / "baseline"
    if (honest / "rounds.csv").exists():
        rows = read_rounds(honest)
        axes.plot(rows["round"], rows["test_accuracy"], color=canvas.HONEST, linestyle="--", label="honest")
    label = "attacked" if len(axes.lines) else "run"
    axes.plot(attacked["round"], attacked["test_accuracy"], color=canvas.ATTACKED, label=label)
    axes.set(ylim=(0, 1.02), xlim=(0, max(attacked["round"])))
    if summary["budget"] and canvas.has_titles():
        setting = f"write access k = {summary['write_access']:.3g}, local budget b = {summary['budget']:.3g}"
        axes.set_title(setting, fontsize="medium", loc="left")
    axes.legend(frameon=False, loc="lower right")
    return canvas.save(figure, folder, "curves")


def plan_curves(folder: Path) -> list[Path]:
    """Draw how the objective of planned flips rose from each start, with the planner's passes over the rounds (sweeps).

    Parameters
    ----------
    folder : Path
        The folder of a run with `attack=planned`.

    Returns
    -------
    list of Path
        `plan.png`. Where plans were made anew now and then, a panel for each of the first `PANELS`.

    Raises
    ------
    InputError
        Where the folder has no readable `plan.csv`.
    """
    _, rows = read_csv(folder / PLAN, "a run with attack=planned")
    first = [f"from round {row['first_round']}" for row in rows]
    names = list(dict.fromkeys(first))[: canvas.PANELS]
    figure, panels = canvas.panels(names if len(names) > 1 else [""], 4.6, 3.6, "sweep", "objective: smoothed error")
    starts = list(dict.fromkeys(row["start"] for row in rows))
    for name, axes in panels.items():
        for number, start in enumerate(starts):
            of_start = [
                (int(row["sweep"]), float(row["objective"]))
                for row, at in zip(rows, first, strict=True)
                if row["start"] == start and name in ("", at)
            ]
            style = canvas.style(number, len(starts) if len(starts) > len(canvas.COLOURS) else None) | {"marker": ""}
            axes.plot(*zip(*of_start, strict=True), label=start, **style)
    legend(figure, panels, "start")
    return canvas.save(figure, folder, "plan", ("png",))


def rounds(folder: Path, by: str = "attack.name") -> list[Path]:
    """Draw the mean accuracy over seeds by round, with confidence bands.

    Parameters
    ----------
    folder : Path
        The folder of a sweep.
    by : str
        A column whose values have a line each. All other settings that were swept have a panel for each combination.

    Returns
    -------
    list of Path
        `rounds.png` and `.pdf`.

    Raises
    ------
    InputError
        Where there is no such column, no readable `curves.npz`, or more lines or panels than a figure shows.
    """
    sweep = read_sweep(folder)
    accuracy, at = read_curves(folder)
    accuracy = accuracy[sweep.column("cell").astype(int)]
    panel, line = sweep.labels(sweep.varied(by)), sweep.column(by)
    names = canvas.distinct_values(panel, canvas.PANELS, "panels of a plot by round")
    canvas.distinct_values(line, canvas.ENTRIES, f"{by} in a legend")
    figure, panels = canvas.panels(names, 4.6, 3.6, "round", "test accuracy (%)")
    values = list(dict.fromkeys(line.tolist()))
    for name, axes in panels.items():
        for number, (value, text) in enumerate(zip(values, format_values(values), strict=True)):
            on_line = (panel == name) & (line == value)
            if on_line.any():
                style = canvas.style(number)
                style |= {"marker": "", "linestyle": canvas.DASHES[number % len(canvas.DASHES)]}
                mean, half = _band(accuracy[on_line], sweep.seed_index[on_line])
                axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)
                axes.plot(at, mean, label=text, **style)
    low, high = axes.get_ylim()  # of all panels; a band may leave what is possible
    axes.set_ylim(max(low, -2), min(high, 102))
    legend(figure, panels, canvas.label(by))
    several_seeds = sweep.seed_index.any()
    bands = "Bands: 95 % confidence of the mean over seeds (Student t)." if several_seeds else ""
    caption(figure, f"Test accuracy by round, {sweep.averaging()}", sweep.note(bands))
    return canvas.save(figure, folder, "rounds")


def read_rounds(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's `rounds.csv`, NaN where one is empty; InputError where it can't be read."""
    header, rows = read_csv(folder / "rounds.csv", "a run")
    return {column: [float(row[column] or "nan") for row in rows] for column in header}


def _band(accuracy: Floats, seed: Floats) -> tuple[Floats, Floats]:
    """Mean over seeds (cells,) of curves (cells, evaluations), NaN left out, and half its interval; (evaluations,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # evaluations that no cell of a seed reached stay NaN
        of_seeds = np.array([np.nanmean(accuracy[seed == one], 0) for one in np.unique(seed)])
    finite = [column[np.isfinite(column)] for column in of_seeds.T]
    mean, half = np.transpose([mean_interval(values) if len(values) else (np.nan, np.nan) for values in finite])
    return mean, half
