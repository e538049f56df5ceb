"""A multirun: all cells of a grid, in one folder, batched where they share minibatches, and resumed where it stopped.

Cells are cut into units of work. A unit that is done is kept under a key of everything that its numbers depend on;
when all are there, the tables are written, which hold no times and so come out the same however often it was cut.
"""

import csv
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from fl_attack import engine, experiment, folder, plots, report, trackers, workers
from fl_attack.config import Settings, to_yaml, without_effect
from fl_attack.data.cache import write_whole
from fl_attack.errors import InputError, Interrupted, RunError
from fl_attack.identity import key_of
from fl_attack.multirun.children import Children
from fl_attack.multirun.elsewhere import Launch, compute_file, launched
from fl_attack.multirun.execute import compute
from fl_attack.multirun.table import Cell, write_tables
from fl_attack.multirun.units import Numbers, Unit, by_cell, distinct_experiments, random_numbers, read, saver, units
from fl_attack.overrides import written
from fl_attack.progress import Progress
from fl_attack.scenario import Scenario
from fl_attack.waiting import waiting

__all__ = [
    "Cell",
    "Launch",
    "Numbers",
    "Progress",
    "Unit",
    "broken_off",
    "column",
    "compute_file",
    "key_of",
    "run",
    "tabulate",
    "tabulate_together",
]
WORTH_WORKERS = 200  # cells, of which figures are drawn in workers
Drawn = Callable[[Path], object]  # draws the figures of the sweep whose tables are in a folder


def run(cells: Sequence[Cell], progress: Progress | None = None, launch: Launch | None = None) -> Path:
    """Compute a grid, leave its tables in the `out` that all cells name, and draw what they allow.

    Parameters
    ----------
    cells : sequence of Cell
        Settings and the overrides by which they differ, one of each cell.
    progress : Progress, optional
        What counts the cells that are done; by default it writes to the terminal.
    launch : callable, optional
        With it the units are jobs of another of Hydra's launchers; see `elsewhere.Launch`.

    Returns
    -------
    Path
        The folder of the tables and figures.

    Raises
    ------
    InputError
        Before any work starts, where a cell can't be run, a figure can't be drawn, or `out` holds what would be lost.
    RunError
        Where all cells broke off, or as `tabulate` raises it.
    Interrupted
        Where a signal ends it; the message says what is kept and where.
    """
    trackers.check(cells[0].settings.tracker)
    notes = [dict.fromkeys(without_effect(cell.settings, sweep=True)) for cell in cells]
    for note in [note for note in notes[0] if all(note in of_cell for of_cell in notes)]:
        print(f"note: {note}", file=sys.stderr)
    with trackers.of_sweep(cells) as tracked:
        draw = partial(_draw_all, settings=cells[0].settings)
        out = tabulate(cells, progress, draw, launch, tracked)
        if cells[0].settings.report:
            report.offer([out])
        total, lost = broken_off(out)
        tracked.files(out, {"cells": total, "broken_off": lost})
        if lost == total:
            with (out / folder.TABLE).open() as lines:
                error = next(csv.DictReader(lines))["error"]
            raise RunError(f"all {total} cells broke off, the first because {error}; see the column error of {out}")
    return out


def broken_off(out: Path) -> tuple[int, int]:
    """How many cells the table of a sweep in a folder has, and how many of them broke off."""
    with (out / folder.TABLE).open() as lines:
        errors = [row["error"] for row in csv.DictReader(lines)]
    return len(errors), sum(map(bool, errors))


def column(out: Path, name: str) -> list[float]:
    """The numbers in a column of a sweep's table.

    Parameters
    ----------
    out : Path
        The folder of the sweep.
    name : str
        The column.

    Returns
    -------
    list of float
        One of each cell, in their order; NaN where there is none.

    Raises
    ------
    KeyError
        Where the table has no such column.
    ValueError
        Where the column holds text.
    """
    with (out / folder.TABLE).open() as lines:
        return [float(row[name] or "nan") for row in csv.DictReader(lines)]


def tabulate(
    cells: Sequence[Cell],
    progress: Progress | None = None,
    draw: Drawn | None = None,
    launch: Launch | None = None,
    tracked: trackers.TrackedSweep | None = None,
) -> Path:
    """Compute a grid and leave its tables, without figures, in the `out` that all cells name.

    What an interrupted call has kept is used again by the next one of the same grid.

    Parameters
    ----------
    cells, progress, launch
        As `run` takes them.
    draw : callable, optional
        Draws the figures of the settings, which are checked before any work: it gets the folder of the tables, and the
        sweep counts as finished only after that.
    tracked : trackers.TrackedSweep, optional
        The sweep in its trackers, which log the cells as they are done.

    Returns
    -------
    Path
        The folder of the tables.

    Raises
    ------
    InputError
        Before any work starts, where a cell can't be run or `out` holds what would be lost.
    RunError
        Where jobs left no numbers, were lost with their workers, or the disk is full; what is done is kept.
    Interrupted
        Where a signal ends it.
    """
    out = Path(cells[0].settings.out)
    tabulate_together([cells], None, progress, draw, launch, tracked)
    return out


def tabulate_together(
    grids: Sequence[Sequence[Cell]],
    kept: Path | None,
    progress: Progress | None = None,
    draw: Drawn | None = None,
    launch: Launch | None = None,
    tracked: trackers.TrackedSweep | None = None,
) -> None:
    """Compute grids that have an `out` each, what they have in common once, and leave the tables of each in its `out`.

    Parameters
    ----------
    grids : sequence of sequences of Cell
        The cells of each grid.
    kept : Path or None
        The folder of what an interrupted call leaves for the next one, removed when all is done; None: the folder
        `units` in the `out` of a single grid.
    progress : Progress, optional
        The progress bar, which counts the cells of all grids.
    draw, launch, tracked
        As `tabulate` takes them; `tracked` is for a single grid.

    Raises
    ------
    InputError, RunError, Interrupted
        As `tabulate` raises them, for any of the grids.
    """
    cells = list(itertools.chain(*grids))
    scenarios = engine.make_scenarios([cell.settings for cell in cells])
    for scenario in scenarios:
        checked = scenario if launch is None else _on_a_processor(scenario)  # jobs may have GPUs that are not here
        experiment.check(checked)
    of_grids = iter(scenarios)
    for grid in grids if draw else ():
        _check_figures(grid, list(itertools.islice(of_grids, len(grid))))
    kept_scenarios, place = distinct_experiments(scenarios)
    work = units(kept_scenarios)
    own = {f"{unit.key}.npz" for unit in work}

    def goes_on(at: Path) -> bool:
        """Whether what an earlier call kept in a folder is of this work: one of its units, or nothing at all."""
        there = {file.name for file in (at / folder.UNITS).glob("*.npz")}
        return bool(there & own) or not there

    with ExitStack() as held:
        places = []
        for grid in grids:
            first = grid[0].settings
            places.append(held.enter_context(folder.taken(Path(first.out), "sweep", first.overwrite, goes_on)))
        kept = places[0].work / folder.UNITS if kept is None else kept
        held.enter_context(_explain_interruption(places[0].work, kept))
        for grid, at in zip(grids, places, strict=True):
            text = to_yaml(grid[0].settings).encode()
            write_whole(at.work / "config.yaml", lambda stream, text=text: stream.write(text))  # type: ignore[misc]
        anew = grids[0][0].settings.overwrite
        if tracked:
            tracked.begin(places[0].work, anew)
        children = Children(tracked, scenarios, place)
        numbers = _computed(work, kept_scenarios, kept, anew, progress, len(cells), launch, children)
        rows = zip(cells, scenarios, (numbers[at] for at in place), strict=True)
        for grid, at in zip(grids, places, strict=True):
            write_tables(at.work, *zip(*itertools.islice(rows, len(grid)), strict=True))
            if draw:
                draw(at.work)
        if tracked:
            tracked.leave()
        shutil.rmtree(kept, ignore_errors=True)
        for at in places:
            folder.settle(at)


def _on_a_processor(scenario: Scenario) -> Scenario:
    """The experiment with its engine and its clients on the processor."""
    update = {"device": "cpu", "client_device": "cpu"}
    chosen = scenario.settings.model_copy(update={"engine": scenario.settings.engine.model_copy(update=update)})
    return Scenario(chosen, scenario.dataset, scenario.partition, scenario.schedule)


def _computed(
    work: Sequence[Unit],
    scenarios: Sequence[Scenario],
    kept: Path,
    anew: bool,
    progress: Progress | None,
    cells: int,
    launch: Launch | None,
    children: Children,
) -> dict[int, Numbers]:
    """The numbers of scenarios by their positions: read from `kept` unless `anew`, the others computed and kept there.

    `cells` are what the progress bar counts to, more than scenarios where cells share one.
    """
    done: dict[int, Numbers] = {}
    with nullcontext(progress) if progress else Progress(cells) as progress:
        progress.skip(cells - len(scenarios))
        todo = []
        for unit in work:
            numbers = None if anew else read(kept / f"{unit.key}.npz")
            if numbers is None:
                todo.append(unit)
            else:
                done |= by_cell(unit, numbers)
                children.done(unit, numbers)
                progress.skip(len(unit.cells))

        def keep(unit: Unit, numbers: Numbers) -> None:
            write_whole(kept / f"{unit.key}.npz", saver(numbers, unit.key))
            done.update(by_cell(unit, numbers))
            children.done(unit, numbers)

        def note(unit: Unit, numbers: Numbers) -> None:
            done.update(by_cell(unit, numbers))
            children.done(unit, numbers)
            progress.skip(len(unit.cells))

        if launch is None:
            compute(todo, scenarios, progress, keep, children.observer)
        else:
            launched(todo, scenarios, kept, launch, note)
    return done


@contextmanager
def _explain_interruption(out: Path, kept: Path) -> Iterator[None]:
    """Turn a signal's KeyboardInterrupt in the block into an Interrupted that says what is kept."""
    try:
        yield
    except KeyboardInterrupt as signalled:
        there = any(kept.glob("*.npz"))
        what = f"what is done is in {out}; the same command goes on from there" if there else "nothing was done yet"
        raise Interrupted(f"interrupted; {what}", getattr(signalled, "code", 130)) from None


def _check_figures(cells: Sequence[Cell], scenarios: Sequence[Scenario]) -> None:
    """InputError where a figure of `figures` can't be drawn: each is tried with random numbers, and not kept."""
    if not cells[0].settings.figures:
        return
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, plots.captured():
        write_tables(Path(folder), cells, scenarios, [random_numbers(scenario, rng) for scenario in scenarios])
        for figure in cells[0].settings.figures:
            if not figure:
                raise InputError("figures holds an empty list; give a kind of plot and its columns")
            try:
                plots.draw(Path(folder), *figure)
            except InputError as error:
                raise InputError(f"{written('figures', [figure])}: {error}") from None


def _draw_all(out: Path, settings: Settings) -> None:
    """Draw the figures that a sweep's table allows and those asked for; none where all cells broke off.

    The former are drawn in worker processes where there are many cells, or `settings.workers` asks for several.
    """
    cells, lost = broken_off(out)
    if cells == lost:
        return
    count = settings.workers or (workers.processors() if cells >= WORTH_WORKERS else 1)
    with waiting("drawing figures", on_terminals_only=True):
        plots.all_of_sweep(out, map if count == 1 else partial(workers.mapped, workers=count))
        for figure in settings.figures:
            plots.draw(out, *figure)
