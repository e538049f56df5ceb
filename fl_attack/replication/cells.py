"""The cells of sweeps as the claims need them: short names, points of 100, late averages, drops from the twin."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import Array, Cells, read_curves, read_mistakes, read_sweep

LATE = 20  # evaluations whose mean is the late accuracy: epochs, in the presets
FACTORS = {  # settings that presets vary, by short name; the override of each
    "lr": "lr",
    "patience": "early_stop.patience",
    "optimizer": "server_optimizer",
    "selection": "attack.selection",
    "every": "attack.every",
    "rounding": "attack.rounding",
}
DROPS = {"drop": "accuracy", "late_drop": "late", "minimum_drop": "minimum", "drop_moved": "moved"}  # and of what
TRAINING = ("seed", "lr", "patience", "optimizer")  # what an unattacked cell depends on


def read(folder: Path, lr: float | None = None) -> Cells:
    """The cells of a sweep.

    Parameters
    ----------
    folder : Path
        The folder of a finished sweep.
    lr : float, optional
        The learning rate of all its cells, where none are swept.

    Returns
    -------
    Cells
        Columns k, b, kb, effective (shares of 1), goal, seed, accuracy, late, minimum and f1 (points of 100),
        validation (nats), those of `FACTORS`, and drop, late_drop and minimum_drop: points lost against the unattacked
        cell (b = 0) of the same seed and training, NaN where there is none; moved and drop_moved (cells, parts): by how
        much accuracy and drop are others without each part of the test images.

    Raises
    ------
    InputError
        Where the folder holds no readable sweep.
    """
    table = read_sweep(folder).cells
    curves, _ = read_curves(folder)
    late = np.array([late_mean(curves[int(cell)]) for cell in table["cell"]])
    k = np.round(table["write_access"], 2)  # ten clients can't share 289 samples quite equally
    columns: dict[str, Array] = {
        "k": k,
        "b": table["budget"],
        "kb": np.round(k * table["budget"], 9),
        "goal": table.columns.get("attack.goal", np.full(len(late), "untargeted", object)),
        "seed": table["seed"].astype(np.int64),
        "accuracy": 100 * table["final_accuracy"],
        "late": late,
        "minimum": 100 * table["minimum_accuracy"],
        "f1": 100 * table["final_f1"],
        "validation": table.columns.get("validation_loss", np.full(len(late), np.nan)),
        "effective": table.columns.get("effective_budget", np.full(len(late), np.nan)),
    }
    parts = read_mistakes(folder)
    if parts is not None:
        wrong, images = parts[0][table["cell"].astype(np.int64)], parts[1]
        right = 100 * (1 - (wrong.sum(1, keepdims=True) - wrong) / (images.sum() - images))
        columns["moved"] = right - 100 * (1 - wrong.sum(1, keepdims=True) / images.sum())
    for name, override in FACTORS.items():
        columns[name] = table.columns.get(override, np.full(len(late), "", object))
    if lr is not None and (columns["lr"] == "").all():
        columns["lr"] = np.full(len(late), lr)
    return with_drops(columns)


def with_drops(columns: dict[str, Array]) -> Cells:
    """Cells of these columns with those of `DROPS`: the measure of the unattacked cell less that of the cell.

    Compared are cells of the same `TRAINING`; NaN where there is no unattacked one.
    """
    cells = Cells(columns)
    twins: dict[tuple[Any, ...], int] = {}
    for i in np.flatnonzero(columns["b"] == 0):
        twins.setdefault(tuple(columns[name][i] for name in TRAINING), int(i))
    twin_of = [twins.get(tuple(columns[name][i] for name in TRAINING)) for i in range(len(cells))]
    for name, measure in DROPS.items():
        if measure in columns:
            nothing = np.full(columns[measure].shape[1:], np.nan)
            honest = np.array([nothing if twin is None else columns[measure][twin] for twin in twin_of], float)
            columns = columns | {name: honest - columns[measure]}
    return Cells(columns)


def without_part(cells: Cells, part: int) -> Cells:
    """The cells as they would be without a part of the test images.

    Late averages, minima and F1 are taken to move as the accuracy of the model given does.

    Parameters
    ----------
    cells : Cells
        They have the columns `moved` and, where they have drops, `drop_moved`.
    part : int
        The number of the part that is left out.

    Returns
    -------
    Cells
        With the measures and drops, in points, that the other parts of the test images give.
    """
    measures = [name for name in ("accuracy", "late", "minimum", "f1") if name in cells.columns]
    moved: dict[str, Array] = dict.fromkeys(measures, cells["moved"][:, part])
    moved |= {name: cells["drop_moved"][:, part] for name in DROPS if name in cells.columns and name != "drop_moved"}
    return Cells(cells.columns | {name: cells[name] + by for name, by in moved.items()})


def joined(*several: Cells) -> Cells:
    """The cells of several sweeps that have the same columns."""
    return Cells({name: np.concatenate([cells[name] for cells in several]) for name in several[0].columns})


def late_mean(curve: NDArray[np.float64]) -> float:
    """Mean of the last `LATE` evaluations that a cell reached; NaN where it reached none."""
    reached = curve[np.isfinite(curve)][-LATE:]
    return float(reached.mean()) if len(reached) else float("nan")
