"""The tables that a sweep leaves: `sweep.csv`, a row for each cell, and `curves.npz`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.config import Settings
from fl_attack.data.cache import write_whole
from fl_attack.detect import MEASURES
from fl_attack.folder import CURVES, TABLE
from fl_attack.history import COLUMNS, given_row, recovered
from fl_attack.identity import twin_key
from fl_attack.multirun.units import PARTS, Numbers
from fl_attack.scenario import Scenario
from fl_attack.sweep_table import RESULTS, write_csv

OF_MODEL = RESULTS[RESULTS.index("final_accuracy") : RESULTS.index("flips")]  # of a model that did not break off


class Cell(NamedTuple):
    """One experiment of a grid."""

    overrides: dict[str, str]  # the values that differ from those of other cells, as typed
    settings: Settings


def write_tables(out: Path, cells: Sequence[Cell], scenarios: Sequence[Scenario], numbers: Sequence[Numbers]) -> None:
    """Write `curves.npz` and, last, `sweep.csv`.

    Parameters
    ----------
    out : Path
        The folder that the tables are written to.
    cells, scenarios, numbers : sequences
        The overrides and settings of each cell, its experiment, and its numbers, without an axis of cells.
    """
    rounds = [one.table[:, COLUMNS.index("round")] for one in numbers]
    evaluations = max(rounds, key=lambda column: np.isfinite(column).sum())  # others broke off or stopped earlier
    evaluations = evaluations[np.isfinite(evaluations)]
    accuracy = np.full((len(cells), len(evaluations)), np.nan)
    for i, one in enumerate(numbers):
        measured = one.table[: len(evaluations), COLUMNS.index("test_accuracy")]
        accuracy[i, : len(measured)] = measured
    sizes = {len(scenario.dataset.y_test) for scenario in scenarios}
    counted = len(sizes) == 1  # cells of several test sets have no parts in common
    images = np.bincount(np.arange(max(sizes)) % PARTS, minlength=PARTS)
    wrong = np.array([one.wrong for one in numbers]) if counted else np.empty((0, PARTS), np.int64)
    write_whole(
        out / CURVES,
        lambda stream: np.savez(stream, accuracy=accuracy, round=evaluations, wrong=wrong, images=images),
    )
    columns = columns_of(cells)
    honest = {
        twin_key(scenario.settings): one
        for scenario, one in zip(scenarios, numbers, strict=True)
        if scenario.settings.is_unattacked and not one.error
    }
    rows = []
    for i, (cell, scenario, one) in enumerate(zip(cells, scenarios, numbers, strict=True)):
        results = results_row(scenario, one, honest.get(twin_key(scenario.settings)))
        row = {"cell": i} | {key: value for key, value in cell.overrides.items() if key not in RESULTS} | results
        rows.append([row.get(name, "") for name in columns])
    write_csv(out / TABLE, columns, rows)


def columns_of(cells: Sequence[Cell]) -> list[str]:
    """Names of the columns of these cells' table: `cell`, the keys that they override, and `RESULTS`."""
    swept = dict.fromkeys(key for cell in cells for key in cell.overrides if key not in RESULTS)
    return ["cell", *swept, *RESULTS]


def results_row(scenario: Scenario, numbers: Numbers, twin: Numbers | None = None) -> dict[str, Any]:
    """The results of a cell, by the names of `RESULTS`.

    Parameters
    ----------
    scenario : Scenario
        The experiment of the cell.
    numbers : Numbers
        The numbers that are kept of this one cell.
    twin : Numbers, optional
        The numbers of the unattacked twin; without it, `drop` and `rounds_to_recover` are empty.

    Returns
    -------
    dict
        Floats as text of nine digits; empty text where a result is not defined, as all of the model (`OF_MODEL`) of a
        cell that broke off.
    """
    values = {name: numbers.table[:, i] for i, name in enumerate(COLUMNS)}
    rounds = values["round"][~np.isnan(values["round"])]
    accuracy = values["test_accuracy"][: len(rounds)]
    after_start = accuracy[1:] if len(accuracy) > 1 else accuracy
    best = given_row(values["validation_loss"][: len(rounds)], scenario.settings.early_stop.restore)
    budget = scenario.settings.label_budget
    recovery = None
    if twin is not None and not scenario.settings.is_unattacked:
        recovery = recovered(numbers.table, twin.table, scenario.settings.attack.stop)
    found = {
        "writes": scenario.settings.attack.writes if scenario.settings.attacked else "none",
        "write_access": scenario.write_access,
        "budget": budget,
        "global_budget": scenario.write_access * budget,
        "effective_budget": int(numbers.flips) / max(1, scenario.labels_used(int(rounds[-1]))),
        "seed": scenario.settings.seed,
        "final_accuracy": accuracy[best],
        "minimum_accuracy": after_start.min(),
        "early_stop_accuracy": ""
        if scenario.settings.early_stop.patience is None
        else accuracy[given_row(values["validation_loss"][: len(rounds)], "best")],
        "final_f1": values["test_f1"][best],
        "final_loss": values["test_loss"][best],
        "validation_loss": "" if np.isnan(values["validation_loss"][best]) else values["validation_loss"][best],
        **_detectability(values, len(rounds) if scenario.settings.detectability else 0),
        "drop": ""
        if twin is None or scenario.settings.is_unattacked
        else final_accuracy(twin, scenario) - accuracy[best],
        "rounds_to_recover": "" if recovery is None else recovery,
        "flips": int(numbers.flips),
        "rounds": int(rounds[-1]),
        "error": str(numbers.error),
    }
    if found["error"]:  # a model that broke off has no results
        found |= dict.fromkeys(OF_MODEL, "")
    return {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in found.items()}


def final_accuracy(numbers: Numbers, scenario: Scenario) -> float:
    """Test accuracy of the model that a cell gives: the last, or the best where early stopping restores it.

    Parameters
    ----------
    numbers : Numbers
        The numbers of one cell.
    scenario : Scenario
        The experiment of the cell, which says whether and how it stops early.

    Returns
    -------
    float
        The accuracy, from 0 to 1.
    """
    rows = numbers.table[~np.isnan(numbers.table[:, COLUMNS.index("round")])]
    row = given_row(rows[:, COLUMNS.index("validation_loss")], scenario.settings.early_stop.restore)
    return float(rows[row, COLUMNS.index("test_accuracy")])


def _detectability(values: dict[str, NDArray[np.float64]], rows: int) -> dict[str, Any]:
    """Means of `MEASURES` over those of the first `rows` evaluations in which they are finite, else empty text."""
    found = {name: values[name][:rows] for name in MEASURES}
    finite = {name: column[np.isfinite(column)] for name, column in found.items()}
    return {name: float(column.mean()) if len(column) else "" for name, column in finite.items()}
