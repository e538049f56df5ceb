"""The tables that a sweep leaves: `sweep.csv`, a row for each cell, and `curves.npz`."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.config import Settings
from fl_attack.data.cache import write_whole
from fl_attack.detect import MEASURES
from fl_attack.folder import CURVES, TABLE
from fl_attack.history import COLUMNS, best_row, rounds_to_recover
from fl_attack.identity import NOT_NUMBERS
from fl_attack.scenario import Scenario
from fl_attack.sweep.units import Numbers

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


OF_MODEL = RESULTS[RESULTS.index("final_accuracy") : RESULTS.index("flips")]


class Cell(NamedTuple):
    """One experiment of a grid."""

    overrides: dict[str, str]  # what sets it apart, as typed
    settings: Settings


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
    columns = columns_of(cells)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    honest = {
        _twin(made.settings): one
        for made, one in zip(scenarios, numbers, strict=True)
        if made.settings.harmless and not one.error
    }
    for i, (cell, made, one) in enumerate(zip(cells, scenarios, numbers, strict=True)):
        mine = {key: value for key, value in cell.overrides.items() if key in columns}
        table.writerow({"cell": i} | mine | row_of(made, one, honest.get(_twin(made.settings))))
    write_whole(out / TABLE, lambda stream: stream.write(text.getvalue().encode()))


def columns_of(cells: Sequence[Cell]) -> list[str]:
    """The columns of the table of these cells."""
    swept = dict.fromkeys(key for cell in cells for key in cell.overrides if key not in RESULTS)
    return ["cell", *swept, *RESULTS]


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
        "drop": "" if twin is None or made.settings.harmless else final_accuracy(twin) - accuracy[best],
        "rounds_to_recover": "" if twin is None else _recovered(made, numbers, twin),
        "flips": int(numbers.flips),
        "rounds": int(rounds[-1]),
        "error": str(numbers.error),
    }
    if found["error"]:  # a model that broke off has no results
        found |= dict.fromkeys(OF_MODEL, "")
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
    if made.settings.harmless or len(accuracy) != len(honest):
        return ""
    found = rounds_to_recover(rounds, accuracy, honest, made.settings.attack.stop)
    return "" if math.isnan(found) else found
