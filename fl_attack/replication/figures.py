"""The paper's figures from the cells of sweeps: a table for each, and the figure drawn from it."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_attack import plots
from fl_attack.folder import TABLE
from fl_attack.plots.lines import lines
from fl_attack.replication.statistics import GOALS, at_best
from fl_attack.sweep_table import Cells, jackknife_interval, pooled_deviation, write_csv

LOST = "accuracy lost (points)"
DIGITS = 6  # significant digits of the tables
BANDS = "Bands: 95 % intervals over seeds."
FigureRow = tuple[str, str, float, float, float]  # panel, line, x, mean, half interval (NaN with a single seed)


def means(cells: Cells, panel: Callable[[Cells], str], line: Callable[[Cells], str], x: str, y: str) -> list[FigureRow]:
    """Mean of a column over seeds at each point of a figure.

    Parameters
    ----------
    cells : Cells
        The cells of a sweep.
    panel, line : callable
        The name of the panel and of the line, from the cells of a point, which differ in their seed alone.
    x, y : str
        The columns along the axes.

    Returns
    -------
    list of FigureRow
        The panel of the untargeted attack first.
    """
    order = {goal: place for place, goal in enumerate(GOALS)}
    rows = []
    for _, at in cells.parts("goal", "k", "b", "patience", "optimizer", "lr", "selection", "every", "rounding"):
        point = cells.only(np.isin(np.arange(len(cells)), at))
        over_seeds = jackknife_interval(lambda mask, of=point: float(of[y][mask].mean()), point["seed"])  # type: ignore[misc]
        rows.append((panel(point), line(point), float(point[x][0]), over_seeds.value, over_seeds.half))
    return sorted(rows, key=lambda row: order.get(row[0], 0))


def shared_goal(cells: Cells) -> str:
    """The goal that all cells of a point share."""
    return str(cells["goal"][0])


def access(cells: Cells) -> str:
    """The write access that all cells of a point share, as in `k = 0.5`."""
    return f"k = {cells['k'][0]:g}"


def rate(cells: Cells) -> str:
    """The learning rate that all cells of a point share, as in `, lr 0.1`; empty where none was swept."""
    lr = cells["lr"][0]
    return "" if lr == "" else f", lr {lr:g}"


def by_budget(file: Path, cells: Cells, title: str) -> None:
    """Draw figures 5 and 9: accuracy against the global budget, a line for each k.

    Parameters
    ----------
    file : Path
        The table (.csv) to write; the figure, a .png and a .pdf, takes its name.
    cells : Cells
        The cells of a run.
    title : str
        The title of the figure.
    """
    rows = means(cells, shared_goal, access, "kb", "accuracy")
    write_csv(file, ("goal", "k", "global_budget", "final_accuracy", "interval"), rows, DIGITS)
    lines(file, title, BANDS, log=True)


def standard_deviation(cells: Cells, goal: str) -> float:
    """Standard deviation of the accuracy over seeds, pooled over attacked settings.

    Parameters
    ----------
    cells : Cells
        The cells of a run.
    goal : str
        The goal of the attack in the cells that count.

    Returns
    -------
    float
        The deviation, in points.
    """
    attacked = cells.where(goal=goal).only(cells.where(goal=goal)["b"] > 0)
    return pooled_deviation(attacked["accuracy"][at] for _, at in attacked.parts("k", "b"))


def _deviation_among(cells: Cells, goal: str, mask: NDArray[np.bool_]) -> float:
    """The `standard_deviation` of the cells of a mask (cells,)."""
    return standard_deviation(cells.only(mask), goal)


def deviation(file: Path, cells: Cells, title: str) -> None:
    """Draw figure 6: standard deviation over seeds, pooled over b, against k; arguments as of `by_budget`."""
    rows = []
    for (k,), at in cells.parts("k"):
        on_line = cells.only(np.isin(np.arange(len(cells)), at))
        for name in GOALS:
            found = jackknife_interval(partial(_deviation_among, on_line, name), on_line["seed"])
            rows.append(("", name, float(k), found.value, found.half))
    write_csv(file, ("panel", "goal", "write_access", "standard deviation (points)", "interval"), rows, DIGITS)
    lines(file, title, f"Pooled over b. {BANDS}", floor=0.0)


def stopped(file: Path, cells: Cells, title: str) -> None:
    """Draw figure 12: accuracy with and without early stopping; arguments as of `by_budget`."""
    rows = means(
        cells,
        shared_goal,
        lambda point: ("last model" if point["patience"][0] == "null" else "stopped early") + rate(point),
        "kb",
        "accuracy",
    )
    write_csv(file, ("goal", "stopping", "global_budget", "final_accuracy", "interval"), rows, DIGITS)
    lines(file, title, f"Full write access, k = 1; patience of 10 epochs. {BANDS}", log=True)


def optimizers(file: Path, cells: Cells, title: str) -> None:
    """Draw figure 14: accuracy under SGD and Adam, each at its best learning rate; arguments as of `by_budget`."""
    rows = []
    for name in ("sgd", "adam"):
        best = at_best(cells.where(optimizer=name))
        rows += means(best, shared_goal, lambda point: f"{point['optimizer'][0]}{rate(point)}", "kb", "accuracy")
    write_csv(file, ("goal", "optimizer", "global_budget", "final_accuracy", "interval"), rows, DIGITS)
    lines(file, title, f"Each at the learning rate that serves the unattacked model best; k = 1. {BANDS}", log=True)


def compared(factor: str) -> Callable[[Path, Cells, str], None]:
    """A function that draws the drop against the global budget, with a line for each value of a column.

    It takes the arguments of `by_budget`.
    """

    def draw(file: Path, cells: Cells, title: str) -> None:
        rows = means(cells, shared_goal, lambda point: str(point[factor][0]), "kb", "drop")
        write_csv(file, ("goal", factor, "global_budget", LOST, "interval"), rows, DIGITS)
        lines(file, title, f"Full write access, k = 1. {BANDS}", log=True)

    return draw


def frequencies(file: Path, cells: Cells, title: str) -> None:
    """Draw the drop against the rounds between attacks, a line for each share flipped; arguments as of `by_budget`."""
    attacked = cells.only(cells["b"] > 0)
    rows = means(
        attacked,
        shared_goal,
        lambda point: f"{100 * point['kb'][0] / point['every'][0]:g} % a round",
        "every",
        "late_drop",
    )
    write_csv(file, ("goal", "labels flipped, on average", "rounds between attacks", LOST, "interval"), rows, DIGITS)
    note = f"Mean of the last 20 epochs: it does not matter how long ago the last attack was. k = 1. {BANDS}"
    lines(file, title, note)


def map_of(kind: str, *columns: str) -> Callable[[Path, Cells, str], None]:
    """A function that draws a kind of `fl_attack.plots`, and writes a table of means.

    Parameters
    ----------
    kind : str
        A name of `plots.PLOTS`.
    *columns : str
        The columns that the figure is of.

    Returns
    -------
    callable
        Takes the arguments of `by_budget`.
    """

    def draw(file: Path, cells: Cells, title: str) -> None:
        y = "f1" if columns else "accuracy"
        of_points = means(cells, shared_goal, access, "b", y)
        rows = [(*row[:2], float(row[1].removeprefix("k = ")), *row[2:]) for row in of_points]
        write_csv(file, ("goal", "write_access", "budget", y, "interval"), [(row[0], *row[2:]) for row in rows], DIGITS)
        for drawn in plots.draw(file.parent, kind, *columns):
            drawn.rename(file.with_suffix(drawn.suffix))

    return draw


FIGURES: Mapping[str, tuple[Callable[[Path, Cells, str], None], str]] = {  # by preset: how it is drawn, and its title
    "fig5": (by_budget, "Accuracy against global budget"),
    "fig6": (deviation, "Standard deviation of the final accuracy over seeds"),
    "fig7": (map_of("difference"), "Untargeted less targeted accuracy"),
    "fig8": (map_of("heatmap"), "Accuracy over write access and budget"),
    "fig9": (by_budget, "Accuracy against global budget, ten classes"),
    "fig11": (map_of("heatmap", "final_f1"), "F1 over write access and budget"),
    "fig12": (stopped, "Early stopping"),
    "fig14": (optimizers, "Adam and SGD"),
    "selection": (compared("selection"), "Exact selection and the algorithm as printed"),
    "frequency": (frequencies, "Attacks in every round and in every so many"),
    "rounding": (compared("rounding"), "Budgets of less than a flip in a round"),
}


def draw(folder: Path, run: Path, preset: str, name: str, title: str, cells: Cells) -> None:
    """Draw a preset's figure of a data set and write its table, unless both are newer than the sweep.

    Parameters
    ----------
    folder : Path
        Where `<preset>-<name>.png`, `.pdf` and `.csv` go.
    run : Path
        The folder of the sweep.
    preset, name, title : str
        The preset, and the data set in file names and in titles.
    cells : Cells
        The cells of the sweep.
    """
    how, what = FIGURES[preset]
    folder.mkdir(parents=True, exist_ok=True)
    file, finished = folder / f"{preset}-{name}.csv", (run / TABLE).stat().st_mtime
    parts = [file.with_suffix(suffix) for suffix in (".csv", ".png", ".pdf")]
    if all(part.exists() and part.stat().st_mtime > finished for part in parts):
        return  # drawn before
    shutil.copyfile(run / TABLE, folder / TABLE)  # what the maps are drawn from
    try:
        how(file, cells, f"{what}: {title}")
    finally:
        (folder / TABLE).unlink()
