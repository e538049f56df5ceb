"""A multirun: all cells of a grid, in one folder, batched where they share minibatches, and resumed where it stopped.

Cells are cut into units of work. A unit that is done is kept under a key of everything that its numbers depend on;
when all are there, the tables are written, which holds no times and so comes out the same however often it was cut.
"""

import csv
import hashlib
import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fl_attack import __version__, engine, federation, plots, plugins, results
from fl_attack.config import Settings, settings_from, to_yaml
from fl_attack.data.cache import write_whole
from fl_attack.detect import MEASURES
from fl_attack.errors import InputError, RunError
from fl_attack.history import COLUMNS, Recorder, best_row, rounds_to_recover
from fl_attack.scenario import Scenario

NUMERICS = 1  # to be raised when a change of the code changes the numbers of a run
UNIT = 512  # cells; what is lost at most when a batched sweep is interrupted
NOT_NUMBERS = {"out", "overwrite", "verbose", "baseline", "launcher", "figures"}  # settings on which none depends
TABLE, CURVES, KEPT = "sweep.csv", "curves.npz", "units"
RESULTS = (
    "write_access",
    "budget",
    "global_budget",
    "seed",
    "final_accuracy",
    "minimum_accuracy",
    "early_stop_accuracy",  # of the model that early stopping keeps; empty without it
    "final_f1",
    "final_loss",
    *MEASURES,  # means over the rounds measured in which there was an attack; empty unless detectability=true
    "drop",  # of the final accuracy from that of the cell's unattacked twin, where the sweep holds it
    "rounds_to_recover",  # likewise: from which on the accuracy is again that of the twin
    "flips",
    "rounds",
    "error",
)


class Cell(NamedTuple):
    """One experiment of a grid."""

    overrides: dict[str, str]  # what sets it apart, as typed
    settings: Settings


@dataclass(frozen=True)
class Unit:
    """Cells that are computed together."""

    cells: list[int]
    key: str


class Numbers(NamedTuple):
    """What is kept of the cells of a unit."""

    table: NDArray[np.float64]  # (cells, evaluations, columns of `history.COLUMNS`); NaN after a cell broke off
    flips: NDArray[np.int64]  # (cells,)
    error: NDArray[np.str_]  # (cells,) empty where a cell ended well


Keep = Callable[[Unit, Numbers], None]


def run(cells: Sequence[Cell]) -> Path:
    """Compute a grid and leave its tables in the `out` that all cells name; gives that folder.

    InputError before any work starts where a cell can't be run or `out` holds a finished sweep. What an interrupted
    call has kept is used again by the next one of the same grid.
    """
    first = cells[0].settings
    out = Path(first.out)
    if (out / TABLE).exists() and not first.overwrite:
        raise InputError(f"out={out} holds a finished sweep; use another folder or overwrite=true")
    scenarios = engine.make_scenarios([cell.settings for cell in cells])
    for made in scenarios:
        (engine.check if made.settings.engine.name == "batched" else federation.check)(made)
    results.prepare(out, overwrite=True)
    if first.overwrite:
        for pattern in (TABLE, CURVES, "*.png", "*.pdf"):
            for file in out.glob(pattern):
                file.unlink()
    write_whole(out / "config.yaml", lambda stream: stream.write(to_yaml(first).encode()))
    done: dict[int, Numbers] = {}
    with Progress(len(cells)) as progress:
        todo = []
        for unit in units(scenarios):
            kept = None if first.overwrite else read(out / KEPT / f"{unit.key}.npz")
            if kept is None:
                todo.append(unit)
            else:
                done |= _by_cell(unit, kept)
                progress.skip(len(unit.cells))

        def keep(unit: Unit, numbers: Numbers) -> None:
            write_whole(out / KEPT / f"{unit.key}.npz", _saver(numbers))
            done.update(_by_cell(unit, numbers))

        compute(todo, scenarios, progress, keep)
    ordered = [done[i] for i in range(len(cells))]
    write_tables(out, cells, scenarios, ordered)
    shutil.rmtree(out / KEPT, ignore_errors=True)
    plots.all_of_sweep(out)
    for figure in first.figures:
        plots.draw(out, *figure)
    return out


def units(scenarios: Sequence[Scenario]) -> list[Unit]:
    """The work, cut: groups of batched cells into pieces of at most `UNIT`, cells of Flower one by one."""
    batched = [i for i, made in enumerate(scenarios) if made.settings.engine.name == "batched"]
    cuts = [[i] for i, made in enumerate(scenarios) if made.settings.engine.name != "batched"]
    for group in engine.group([scenarios[i] for i in batched]):
        pieces = np.array_split(np.array(batched)[group], -(-len(group) // UNIT))
        cuts += [piece.tolist() for piece in pieces]
    return [Unit(cut, key_of([scenarios[i] for i in cut])) for cut in cuts]


def key_of(scenarios: Sequence[Scenario]) -> str:
    """A hash of all that the numbers of these cells depend on, and of the version of the numerics."""
    parts = [f"{__version__}/{NUMERICS}/{torch.__version__}/{np.__version__}"]
    for made in scenarios:
        target = made.settings.attack.target_path
        own = hashlib.sha256(Path(target).read_bytes()).hexdigest() if target else ""
        own += plugins.source_digest(made.settings.attack.name) + plugins.source_digest(made.settings.strategy.name)
        parts += [made.settings.model_dump_json(exclude=NOT_NUMBERS), made.dataset.fingerprint, own]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def compute(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: "Progress", keep: Keep) -> None:
    """Have the numbers of units kept, as they are done."""
    batched = [unit for unit in todo if scenarios[unit.cells[0]].settings.engine.name == "batched"]
    settings = scenarios[0].settings
    if settings.launcher == "ray" or (settings.launcher == "auto" and settings.engine.ray_address):
        _on_a_cluster(batched, scenarios, progress, keep)
    else:
        for unit in batched:
            cells = [scenarios[i] for i in unit.cells]
            keep(unit, batched_numbers(cells, partial(progress.rounds, cells[0].settings.rounds)))
    _one_by_one([unit for unit in todo if unit not in batched], scenarios, progress, keep)


def _on_a_cluster(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: "Progress", keep: Keep) -> None:
    if not todo:
        return
    for unit in todo:
        for i in unit.cells:
            if scenarios[i].settings.attack.goal == "targeted":
                _ = scenarios[i].target  # trained and cached once here, rather than by every worker
    settings = scenarios[todo[0].cells[0]].settings
    threads = torch.get_num_threads()
    jobs = [(threads, [scenarios[i].settings.model_dump_json() for i in unit.cells]) for unit in todo]
    for i, numbers in federation.scatter(numbers_of_job, jobs, settings.engine.ray_address, settings.verbose):
        progress.add(len(todo[i].cells))
        keep(todo[i], numbers)


def _one_by_one(todo: Sequence[Unit], scenarios: Sequence[Scenario], progress: "Progress", keep: Keep) -> None:
    """Cells of the Flower engine, one after the other, over the same clients where they have as many."""
    by_grid: dict[str, list[Unit]] = {}
    for unit in todo:
        settings = scenarios[unit.cells[0]].settings
        by_grid.setdefault(f"{settings.clients.total} {settings.engine}", []).append(unit)
    if not todo:
        return

    def federate_all(alike: Sequence[Unit], federate: federation.Federate) -> None:
        for unit in alike:
            made, error = scenarios[unit.cells[0]], ""
            recorder = Recorder(made, partial(progress.round, made.settings.rounds))
            try:
                federate(recorder)
            except RunError as failure:
                error = str(failure)
            rows = np.array([[row[name] for name in COLUMNS] for row in recorder.history.rows])
            keep(unit, _stack([(rows, recorder.history.flip_count, error)]))

    with federation.ray_session(settings.engine.ray_address, settings.verbose):
        for alike in by_grid.values():
            federation.run(partial(federate_all, alike), scenarios[alike[0].cells[0]].settings)


def batched_numbers(cells: Sequence[Scenario], progress: Callable[[int], None] = lambda rounds: None) -> Numbers:
    """The numbers of cells that can run together."""
    engine_settings = cells[0].settings.engine
    outcomes = engine.run_cells(
        cells,
        device=engine_settings.device,
        memory_gb=engine_settings.memory_gb,
        progress=progress,
        keep_flips=False,
        keep_theta=False,
        full_rows=cells[0].settings.detectability,
    )
    return _stack([(outcome.table, outcome.flip_count, outcome.error or "") for outcome in outcomes])


def numbers_of_job(job: tuple[int, list[str]]) -> Numbers:
    """The numbers of cells given as the threads to use, and settings in JSON: what a worker of a cluster does."""
    threads, settings = job
    torch.set_num_threads(threads)  # as where the job was made, so that sums come out the same
    return batched_numbers(engine.make_scenarios([settings_from(json.loads(text)) for text in settings], verify=False))


def _stack(outcomes: Sequence[tuple[NDArray[np.float64], int, str]]) -> Numbers:
    longest = max(len(table) for table, _, _ in outcomes)
    table = np.full((len(outcomes), longest, len(COLUMNS)), np.nan)
    for i, (rows, _, _) in enumerate(outcomes):
        table[i, : len(rows)] = rows
    return Numbers(table, np.array([n for _, n, _ in outcomes]), np.array([e for _, _, e in outcomes], np.str_))


def _by_cell(unit: Unit, numbers: Numbers) -> dict[int, Numbers]:
    return {cell: Numbers(*(part[i] for part in numbers)) for i, cell in enumerate(unit.cells)}


def _saver(numbers: Numbers) -> Callable[[Any], None]:
    return lambda stream: np.savez_compressed(stream, **numbers._asdict())


def read(file: Path) -> Numbers | None:
    """Numbers kept in a file; None where there is none or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return Numbers(*(stored[name] for name in Numbers._fields))
    except Exception:
        return None


def write_tables(out: Path, cells: Sequence[Cell], scenarios: Sequence[Scenario], numbers: Sequence[Numbers]) -> None:
    """`curves.npz` and, last, `sweep.csv`."""
    rounds = [one.table[:, COLUMNS.index("round")] for one in numbers]
    evaluations = max(rounds, key=lambda column: np.isfinite(column).sum())  # others broke off or stopped earlier
    evaluations = evaluations[np.isfinite(evaluations)]
    accuracy = np.full((len(cells), len(evaluations)), np.nan)
    for i, one in enumerate(numbers):
        measured = one.table[: len(evaluations), COLUMNS.index("test_accuracy")]
        accuracy[i, : len(measured)] = measured
    write_whole(out / CURVES, lambda stream: np.savez(stream, accuracy=accuracy, round=evaluations))
    swept = list(dict.fromkeys(key for cell in cells for key in cell.overrides if key not in RESULTS))
    text = io.StringIO()
    table = csv.DictWriter(text, ["cell", *swept, *RESULTS], restval="", lineterminator="\n")
    table.writeheader()
    honest = {
        _twin(made.settings): one
        for made, one in zip(scenarios, numbers, strict=True)
        if not made.settings.attacked and not one.error
    }
    for i, (cell, made, one) in enumerate(zip(cells, scenarios, numbers, strict=True)):
        mine = {key: value for key, value in cell.overrides.items() if key in swept}
        table.writerow({"cell": i} | mine | row_of(made, one, honest.get(_twin(made.settings))))
    write_whole(out / TABLE, lambda stream: stream.write(text.getvalue().encode()))


def _twin(settings: Settings) -> str:
    """What an experiment and its unattacked twin have in common."""
    return settings.model_dump_json(exclude={"attack", *NOT_NUMBERS})


def row_of(made: Scenario, numbers: Numbers, twin: Numbers | None = None) -> dict[str, Any]:
    """The results of a cell, by the names of `RESULTS`."""
    values = {name: numbers.table[:, i] for i, name in enumerate(COLUMNS)}
    rounds = values["round"][~np.isnan(values["round"])]
    accuracy = values["test_accuracy"][: len(rounds)]
    after_start = accuracy[1:] if len(accuracy) > 1 else accuracy
    best = best_row(values["validation_loss"][: len(rounds)])
    budget = made.settings.label_budget
    found = {
        "write_access": made.write_access,
        "budget": budget,
        "global_budget": made.write_access * budget,
        "seed": made.settings.seed,
        "final_accuracy": accuracy[best],
        "minimum_accuracy": after_start.min(),
        "early_stop_accuracy": "" if made.settings.early_stop.patience is None else accuracy[best],
        "final_f1": values["test_f1"][best],
        "final_loss": values["test_loss"][best],
        **_detected(values, len(rounds) if made.settings.detectability else 0),
        "drop": "" if twin is None or not made.settings.attacked else final_accuracy(twin) - accuracy[best],
        "rounds_to_recover": "" if twin is None else _recovered(made, numbers, twin),
        "flips": int(numbers.flips),
        "rounds": int(rounds[-1]),
        "error": str(numbers.error),
    }
    return {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in found.items()}


def final_accuracy(numbers: Numbers) -> float:
    """Of the model that a cell ends with."""
    rows = numbers.table[~np.isnan(numbers.table[:, COLUMNS.index("round")])]
    return float(rows[best_row(rows[:, COLUMNS.index("validation_loss")]), COLUMNS.index("test_accuracy")])


def _detected(values: dict[str, NDArray[np.float64]], rounds: int) -> dict[str, Any]:
    """Means of `MEASURES` over the rounds in which they have a value."""
    found = {name: values[name][:rounds] for name in MEASURES}
    known = {name: column[np.isfinite(column)] for name, column in found.items()}
    return {name: float(column.mean()) if len(column) else "" for name, column in known.items()}


def _recovered(made: Scenario, numbers: Numbers, twin: Numbers) -> float | str:
    rounds, accuracy, honest = (
        table[:, COLUMNS.index(name)]
        for table, name in ((numbers.table, "round"), (numbers.table, "test_accuracy"), (twin.table, "test_accuracy"))
    )
    if not made.settings.attacked or len(accuracy) != len(honest):
        return ""
    found = rounds_to_recover(rounds, accuracy, honest, made.settings.attack.stop)
    return "" if math.isnan(found) else found


class Progress:
    """How many cells are done, a second and still to come: one bar on a terminal, lines elsewhere."""

    def __init__(self, cells: int) -> None:
        self.cells, self.done, self.told = cells, 0.0, 0
        self.bar = tqdm(total=cells, unit="cell", desc="sweep", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def skip(self, cells: int) -> None:
        """Count cells that need not be computed."""
        if not self.bar.disable:
            self.bar.initial += cells  # so that the rate is that of the others
        self.add(cells)

    def add(self, cells: float) -> None:
        """Count cells, or parts of one."""
        self.done += cells
        self.bar.update(cells)
        tenth = int(self.done * 10 / self.cells + 1e-6)
        if self.bar.disable and tenth > self.told:
            self.told = tenth
            print(f"sweep: {tenth * 10} % of {self.cells} cells", file=sys.stderr, flush=True)

    def rounds(self, of: int, done: int) -> None:
        """Count rounds, of so many that make a cell."""
        self.add(done / of)

    def round(self, of: int, round_: int, row: object) -> None:
        """Count a round of a cell; the observer of a recorder."""
        self.rounds(of, bool(round_))
