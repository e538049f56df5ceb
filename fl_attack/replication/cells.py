"""The cells of sweeps as the claims need them: short names, points of 100, late averages, drops from the twin."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.sweep_table import Array, Cells, read_curves, read_sweep

LATE = 20  # evaluations whose mean is the late accuracy: epochs, in the presets
FACTORS = {  # settings that presets vary, by short name; the override of each
    "lr": "lr",
    "patience": "early_stop.patience",
    "optimizer": "server_optimizer",
    "selection": "attack.selection",
    "every": "attack.every",
    "rounding": "attack.rounding",
}
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
        Columns k, b, kb (shares of 1), goal, seed, accuracy, late and f1 (points of 100), those of `FACTORS`, and
        drop and late_drop: points lost against the unattacked cell (b = 0) of the same seed and training, NaN where
        there is none.

    Raises
    ------
    InputError
        Where the folder holds no readable sweep.
    """
    table = read_sweep(folder).cells
    curves, _ = read_curves(folder)
    late = np.array([_late(curves[int(cell)]) for cell in table["cell"]])
    k = np.round(table["write_access"], 2)  # ten clients can't share 289 samples quite equally
    columns: dict[str, Array] = {
        "k": k,
        "b": table["budget"],
        "kb": np.round(k * table["budget"], 9),
        "goal": table.columns.get("attack.goal", np.full(len(late), "untargeted", object)),
        "seed": table["seed"].astype(np.int64),
        "accuracy": 100 * table["final_accuracy"],
        "late": late,
        "f1": 100 * table["final_f1"],
    }
    for name, override in FACTORS.items():
        columns[name] = table.columns.get(override, np.full(len(late), "", object))
    if lr is not None and (columns["lr"] == "").all():
        columns["lr"] = np.full(len(late), lr)
    return with_drops(columns)


def with_drops(columns: dict[str, Array]) -> Cells:
    """Cells with `drop` and `late_drop` computed from the unattacked cells among them."""
    cells = Cells(columns)
    twins: dict[tuple[Any, ...], int] = {}
    for i in np.flatnonzero(columns["b"] == 0):
        twins.setdefault(tuple(columns[name][i] for name in TRAINING), int(i))
    twin_of = [twins.get(tuple(columns[name][i] for name in TRAINING)) for i in range(len(cells))]
    for name, measure in {"drop": "accuracy", "late_drop": "late"}.items():
        honest = np.array([np.nan if twin is None else columns[measure][twin] for twin in twin_of], float)
        columns = columns | {name: honest - columns[measure]}
    return Cells(columns)


def _late(curve: NDArray[np.float64]) -> float:
    """Mean of the last evaluations that a cell reached; NaN where it reached none."""
    reached = curve[np.isfinite(curve)][-LATE:]
    return float(reached.mean()) if len(reached) else float("nan")
