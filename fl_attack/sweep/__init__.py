"""A multirun: all cells of a grid, in one folder, batched where they share minibatches, and resumed where it stopped.

Cells are cut into units of work. A unit that is done is kept under a key of everything that its numbers depend on;
when all are there, the tables are written, which holds no times and so comes out the same however often it was cut.
"""

import itertools
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fl_attack import engine, federation, plots, results
from fl_attack.config import Settings, to_yaml
from fl_attack.data.cache import write_whole
from fl_attack.errors import InputError
from fl_attack.sweep.execute import compute
from fl_attack.sweep.progress import Progress
from fl_attack.sweep.table import Cell, write_tables
from fl_attack.sweep.units import Numbers, Unit, by_cell, distinct, key_of, read, saver, units
from fl_attack.sweep_table import CURVES, TABLE

__all__ = ["Cell", "Numbers", "Progress", "Unit", "key_of", "run", "tabulate", "tabulate_together"]
KEPT = "units"


def run(cells: Sequence[Cell], progress: Progress | None = None) -> Path:
    """Compute a grid, leave its tables in the `out` that all cells name and draw what they allow; gives that folder."""
    out = tabulate(cells, progress)
    plots.all_of_sweep(out)
    for figure in cells[0].settings.figures:
        plots.draw(out, *figure)
    return out


def tabulate(cells: Sequence[Cell], progress: Progress | None = None) -> Path:
    """Compute a grid and leave its tables, without figures, in the `out` that all cells name; gives that folder.

    InputError before any work starts where a cell can't be run or `out` holds a finished sweep. What an interrupted
    call has kept is used again by the next one of the same grid.
    """
    out = Path(cells[0].settings.out)
    tabulate_together([cells], out / KEPT, progress)
    return out


def tabulate_together(grids: Sequence[Sequence[Cell]], kept: Path, progress: Progress | None = None) -> None:
    """As `tabulate` of each grid, which have an `out` each; what they have in common is computed once.

    `kept` is the folder of what an interrupted call leaves for the next one. `progress` reckons with all cells.
    """
    firsts = [cells[0].settings for cells in grids]
    for first in firsts:
        if (Path(first.out) / TABLE).exists() and not first.overwrite:
            raise InputError(f"out={first.out} holds a finished sweep; use another folder or overwrite=true")
    cells = list(itertools.chain(*grids))
    scenarios = engine.make_scenarios([cell.settings for cell in cells])
    for made in scenarios:
        (engine.check if made.settings.engine.name == "batched" else federation.check)(made)
    for first in firsts:
        _prepare(Path(first.out), first)
    apart, place = distinct(scenarios)
    done: dict[int, Numbers] = {}
    with nullcontext(progress) if progress else Progress(len(cells)) as progress:
        progress.skip(len(cells) - len(apart))
        todo = []
        for unit in units(apart):
            numbers = None if firsts[0].overwrite else read(kept / f"{unit.key}.npz")
            if numbers is None:
                todo.append(unit)
            else:
                done |= by_cell(unit, numbers)
                progress.skip(len(unit.cells))

        def keep(unit: Unit, numbers: Numbers) -> None:
            write_whole(kept / f"{unit.key}.npz", saver(numbers))
            done.update(by_cell(unit, numbers))

        compute(todo, apart, progress, keep)
    all_of_it = zip(cells, scenarios, (done[at] for at in place), strict=True)
    for grid in grids:
        write_tables(Path(grid[0].settings.out), *zip(*itertools.islice(all_of_it, len(grid)), strict=True))
    shutil.rmtree(kept, ignore_errors=True)


def _prepare(out: Path, settings: Settings) -> None:
    results.prepare(out, overwrite=True)
    if settings.overwrite:
        for pattern in (TABLE, CURVES, "*.png", "*.pdf"):
            for file in out.glob(pattern):
                file.unlink()
    write_whole(out / "config.yaml", lambda stream: stream.write(to_yaml(settings).encode()))
