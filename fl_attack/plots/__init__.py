"""Figures of what runs and sweeps left behind; reads files only. `python -m fl_attack.plots FOLDER [KIND]`

A figure is a function of a folder and names of columns that gives the files it wrote, and a row of `PLOTS`. It averages
over seeds alone: every other setting that was swept is an axis, a line or a panel.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from inspect import Parameter, signature
from itertools import chain
from pathlib import Path

import yaml

from fl_attack.errors import InputError
from fl_attack.folder import TABLE
from fl_attack.overrides import did_you_mean
from fl_attack.plots.arms import arms
from fl_attack.plots.by_budget import budget, spread
from fl_attack.plots.by_column import columns
from fl_attack.plots.by_round import curves, curves_of, plan_curves, rounds
from fl_attack.plots.canvas import captured, untitled
from fl_attack.plots.comparisons import harm, matrix
from fl_attack.plots.equal_budgets import networks
from fl_attack.plots.maps import difference, heatmap
from fl_attack.plots.planning import planning
from fl_attack.sweep_table import ACCURACY, GOAL, KB, NotDrawableError, read_sweep

__all__ = [
    "PLOTS",
    "all_asked",
    "all_of_sweep",
    "arms",
    "asked",
    "budget",
    "captured",
    "columns",
    "columns_of",
    "curves",
    "curves_of",
    "difference",
    "draw",
    "harm",
    "heatmap",
    "main",
    "matrix",
    "networks",
    "plan_curves",
    "planning",
    "rounds",
    "spread",
    "untitled",
]


def all_of_sweep(folder: Path, mapped: Callable[..., Iterable[list[Path]]] = map) -> list[Path]:
    """Draw `heatmap`, `budget`, `difference`, `spread` where the swept columns allow them, and `columns` of others.

    That is the final accuracy against each setting that was swept besides k, b, goal and seed; against the goal where
    nothing else can be drawn.

    Parameters
    ----------
    folder : Path
        The folder of the sweep, which the figures go to.
    mapped : callable, optional
        Does what `map` does, perhaps in several processes.

    Returns
    -------
    list of Path
        The files written; none where all cells broke off.

    Raises
    ------
    InputError
        Where the folder has no readable `sweep.csv`.
    """
    wanted: list[tuple[str, ...]] = [("heatmap",), ("budget",), ("difference",), ("spread",)]
    goal: list[str] = []
    with suppress(NotDrawableError):
        factors = read_sweep(folder).varied(KB)
        goal = [GOAL] if GOAL in factors else []
        wanted += [("columns", factor, ACCURACY, *goal) for factor in factors if factor != GOAL]
    written = list(chain.from_iterable(mapped(partial(_if_drawable, folder), wanted)))
    if goal and not written:
        written = _if_drawable(folder, ("columns", GOAL, ACCURACY))
    return written


def _if_drawable(folder: Path, figure: Sequence[str]) -> list[Path]:
    """Draw a figure, its kind and columns, and give its files; none where the sweep does not hold what it shows."""
    try:
        return draw(folder, *figure)
    except NotDrawableError:
        return []


PLOTS: dict[str, Callable[..., list[Path]]] = {
    "curves": curves,
    "heatmap": heatmap,
    "budget": budget,
    "difference": difference,
    "spread": spread,
    "columns": columns,
    "matrix": matrix,
    "harm": harm,
    "networks": networks,
    "arms": arms,
    "rounds": rounds,
    "plan": plan_curves,
    "planning": planning,
    "all": all_of_sweep,
}
BARE = "--no-titles"
USAGE = (
    "usage: python -m fl_attack.plots FOLDER [KIND | columns X Y [BY] | heatmap [COLUMN] | matrix [ROWS COLUMNS] | "
    f"rounds [BY] | networks [BY]] [{BARE}]; kinds: {', '.join(PLOTS)}"
)


def draw(folder: Path, kind: str, *names: str) -> list[Path]:
    """Draw a figure by its kind.

    Parameters
    ----------
    folder : Path
        The folder of a run or a sweep.
    kind : str
        A name of `PLOTS`.
    names : str
        The columns that the kind takes.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        Where there is no such kind or column, or the sweep does not hold what the figure shows.
    """
    columns_of(kind, *names)
    return PLOTS[kind](folder, *names)


def columns_of(kind: str, *names: str) -> list[str]:
    """The columns that a figure takes, those by default included and empty ones left out.

    Parameters
    ----------
    kind : str
        A name of `PLOTS`.
    *names : str
        The columns that are given.

    Returns
    -------
    list of str
        In the order in which the figure takes them.

    Raises
    ------
    InputError
        Where there is no such kind, or it takes another number of columns.
    """
    if kind not in PLOTS:
        raise InputError(f"{kind} is not a kind of plot; known: {', '.join(PLOTS)}{did_you_mean(kind, PLOTS)}")
    _, *others = signature(PLOTS[kind]).parameters.values()
    takes = [one for one in others if one.default is Parameter.empty or not callable(one.default)]  # columns
    if not sum(one.default is Parameter.empty for one in takes) <= len(names) <= len(takes):
        raise InputError(USAGE)
    return [name for name in (*names, *(one.default for one in takes[len(names) :])) if name]


def all_asked(folder: Path) -> list[Path]:
    """Draw `all_of_sweep` and what the `config.yaml` of the sweep asks for; gives the files, each once."""
    written = all_of_sweep(folder)
    for figure in asked(folder):
        written += draw(folder, *figure)
    return list(dict.fromkeys(written))


def asked(folder: Path) -> list[list[str]]:
    """The figures that the `config.yaml` of a sweep asks for, each a kind and columns; none where it can't be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        return [[str(part) for part in figure] for figure in settings["figures"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return []


def main(arguments: list[str]) -> int:
    """Draw what the command line names and print the files, or with --help the usage; gives 0, or 2 for bad input."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        titled, arguments = BARE not in arguments, [one for one in arguments if one != BARE]
        if not arguments:
            raise InputError(USAGE)
        folder, *rest = arguments
        with nullcontext() if titled else untitled():
            if not rest and (Path(folder) / TABLE).exists():
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
