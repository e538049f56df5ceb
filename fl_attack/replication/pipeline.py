"""From the plan to the report: sweeps that are not there yet are computed and drawn, data set after data set."""

from dataclasses import replace
from pathlib import Path

from fl_attack import multirun
from fl_attack.replication import figures, gradients, plan, report
from fl_attack.replication.cells import joined, read
from fl_attack.replication.findings import ReplicationRecord, RunCells
from fl_attack.replication.plan import PaperDataset, ReplicationPlan, Run
from fl_attack.sweep_table import Cells


def run(out: Path, todo: ReplicationPlan, command: str, so_far: bool, only: str | None) -> Path:
    """Leave figures, tables and the report in a folder.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    todo : ReplicationPlan
        The runs of the replication.
    command : str
        The command line, to be named in the report.
    so_far : bool
        Whether to report what is there and compute nothing.
    only : str, optional
        The one figure that is wanted.

    Returns
    -------
    Path
        The report.
    """
    (out / report.FIGURES).mkdir(parents=True, exist_ok=True)
    # as many cells as at the learning rates that are still to be chosen
    grids = [plan.cells(one, todo.epochs, 0.1) for one in todo.runs]
    experiments = sum({plan.folder_of(out, cells): len(cells) for cells in grids}.values())
    found = ReplicationRecord()
    with multirun.Progress(experiments, "replicate") as progress:
        for source in todo.sources:
            progress.bar.set_description(source.title)
            _one_source(source, todo, out, found, None if so_far else progress, only)
    return report.write(out, todo, found, command)


def _one_source(
    source: PaperDataset,
    todo: ReplicationPlan,
    out: Path,
    found: ReplicationRecord,
    progress: multirun.Progress | None,
    only: str | None,
) -> None:
    """Run and draw all that is planned on a data set, adding it to `found`; without `progress` nothing is computed."""
    runs = [one for one in todo.runs if one.source == source]
    first = [one for one in runs if one.preset == "honest"]  # it decides the learning rate of the others
    clock = plan.folder_of(out, plan.cells(first[0], todo.epochs, None)).with_suffix(".seconds")
    computed = False
    with plan.timed(clock, lambda: computed):
        for together in (first, [one for one in runs if one not in first]):
            grids, place = {}, {}
            for one in together:
                cells = plan.cells(one, todo.epochs, found.rates.get(source.name))
                place[one] = plan.folder_of(out, cells)
                grids[place[one]] = cells
            if progress is not None:
                computed = computed or bool(plan.lacking(grids))
                plan.compute(out, grids, progress)
            kept = {at: read(at, cells[0].settings.lr) for at, cells in grids.items() if plan.is_there(at)}
            if together is first and place[first[0]] in kept:
                kept[place[first[0]]] = _extended(first[0], todo, out, kept[place[first[0]]], progress)
            for one in together:
                if place[one] not in kept:
                    found.missing.append(one)
                    continue
                found.results.append(RunCells(one, kept[place[one]]))
                _draw(out / report.FIGURES, place[one], found, only)
    found.seconds[source.title] = plan.seconds_taken(clock)


def _extended(honest: Run, todo: ReplicationPlan, out: Path, cells: Cells, progress: multirun.Progress | None) -> Cells:
    """The unattacked cells, and those of more learning rates while the best one is at an edge of the grid."""
    while (wider := plan.extension(cells)) is not None:
        more = plan.cells(replace(honest, overrides=(*honest.overrides, f"lr={wider:g}")), todo.epochs, None)
        place = plan.folder_of(out, more)
        if progress is not None:
            progress.extend(0 if plan.is_there(place) else len(more))
            plan.compute(out, {place: more}, progress)
        if not plan.is_there(place):
            break
        cells = joined(cells, read(place, wider))
    return cells


def _draw(folder: Path, place: Path, found: ReplicationRecord, only: str | None) -> None:
    """Draw the figure of the last result in `found`, where it has one, and note its name there.

    Of unattacked runs it shows the gradients; they also decide the learning rate, which is noted too.
    """
    result = found.results[-1]
    one, source = result.run, result.run.source
    if one.preset == "honest":
        best = found.rates[source.name] = plan.best_rate(result.cells)
        found.tied[source.name] = plan.tied_rates(result.cells)
        if only in (None, *plan.GRADIENTS) and source.binary:
            found.figures.append(gradients.draw(folder, source, best))
    elif one.preset in figures.FIGURES and one.protocol == plan.STEP:
        figures.draw(folder, place, one.preset, source.name, source.title, result.cells)
        found.figures.append(f"{one.preset}-{source.name}")
