"""From the plan to the report: what is not there yet is computed, data set after data set, and drawn."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fl_attack import federation, sweep
from fl_attack.replication import figures, plan, reach, report
from fl_attack.replication.cells import read
from fl_attack.replication.findings import Outcome, Result
from fl_attack.replication.plan import Plan, Source


def run(out: Path, todo: Plan, command: str, so_far: bool, only: str | None) -> Path:
    """Leave figures, tables and the report in a folder; `so_far` computes nothing. Gives the report's file."""
    (out / report.FIGURES).mkdir(parents=True, exist_ok=True)
    likely = [plan.cells(one, todo.epochs, 0.1) for one in todo.runs]  # as many as at the rates still to be chosen
    experiments = sum({plan.folder_of(out, made): len(made) for made in likely}.values())
    found = Outcome()
    with _parallel(todo.quick or so_far), sweep.Progress(experiments, "replicate") as progress:
        for source in todo.sources:
            progress.bar.set_description(source.title)
            _one_source(source, todo, out, found, None if so_far else progress, only)
    return report.write(out, todo, found, command)


@contextmanager
def _parallel(here: bool) -> Iterator[None]:
    """Sweeps whose units run side by side, a processor for each; in this process where that is not worth the start."""
    if here or (os.cpu_count() or 1) == 1:
        yield
        return
    torch.set_num_threads(1)
    with federation.ray_session(None, verbose=False):
        yield


def _one_source(
    source: Source, todo: Plan, out: Path, found: Outcome, progress: sweep.Progress | None, only: str | None
) -> None:
    """All that is asked of a data set; without `progress` nothing is computed."""
    runs = [one for one in todo.runs if one.source == source]
    first = [one for one in runs if one.preset == "honest"]  # the others hang on the learning rate that it shows
    clock = plan.folder_of(out, plan.cells(first[0], todo.epochs, None)).with_suffix(".seconds")
    worked = False
    with plan.timed(clock, lambda: worked):
        for together in (first, [one for one in runs if one not in first]):
            grids, place = {}, {}
            for one in together:
                made = plan.cells(one, todo.epochs, found.rates.get(source.name))
                place[one] = plan.folder_of(out, made)
                grids[place[one]] = made
            if progress is not None:
                worked = worked or bool(plan.lacking(grids))
                plan.compute(out, grids, progress, "local" if todo.quick else "ray")
            kept = {at: read(at, made[0].settings.lr) for at, made in grids.items() if plan.is_there(at)}
            for one in together:
                if place[one] not in kept:
                    found.missing.append(one)
                    continue
                found.results.append(Result(one, kept[place[one]]))
                _draw(out / report.FIGURES, place[one], found, only)
    found.seconds[source.title] = plan.seconds(clock)


def _draw(folder: Path, place: Path, found: Outcome, only: str | None) -> None:
    """The figure of the last result, where there is one; of the unattacked ones those of the gradients."""
    result = found.results[-1]
    one, source = result.run, result.run.source
    if one.preset == "honest":
        best = found.rates[source.name] = plan.best_rate(result.cells)
        if only in (None, *plan.GRADIENTS) and source.binary:
            found.drawn.append(reach.draw(folder, source, best))
    elif one.preset in figures.FIGURES and one.protocol == plan.STEP:
        figures.draw(folder, place, one.preset, source.name, source.title, result.cells)
        found.drawn.append(f"{one.preset}-{source.name}")
