"""The cells of sweeps as columns, with what the claims are made of: drops from the unattacked twin, late averages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.errors import InputError
from fl_attack.plots.table import read_sweep

Array = NDArray[Any]
LATE = 20  # evaluations whose mean is the late accuracy: epochs, in the presets
FACTORS = {  # of the presets, by the names of their overrides
    "lr": "lr",
    "patience": "early_stop.patience",
    "optimizer": "server_optimizer",
    "selection": "attack.selection",
    "every": "attack.every",
    "rounding": "attack.rounding",
}
HONEST = ("seed", "lr", "patience", "optimizer")  # what an unattacked cell depends on


@dataclass(frozen=True)
class Cells:
    """Columns (cells,): k, b, kb (shares), goal, seed, accuracy, late and f1 (points of 100), and the factors.

    `drop` and `late_drop` are points lost against the unattacked cell (b = 0) of the same seed and training; NaN
    where there is none.
    """

    columns: dict[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["seed"])

    def only(self, mask: Array) -> "Cells":
        """The cells of a mask."""
        return Cells({name: column[mask] for name, column in self.columns.items()})

    def where(self, **wanted: Any) -> "Cells":
        """The cells with these values; numbers to nine digits."""
        mask = np.ones(len(self), bool)
        for name, value in wanted.items():
            column = self.columns[name]
            mask &= np.isclose(column, value, rtol=0, atol=1e-9) if column.dtype.kind == "f" else column == value
        return self.only(mask)

    def parts(self, *names: str) -> Iterator[tuple[tuple[Any, ...], NDArray[np.intp]]]:
        """Each combination of values of columns, in order, and the cells of it."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for i, key in enumerate(zip(*(self.columns[name].tolist() for name in names), strict=True)):
            found.setdefault(key, []).append(i)
        for key in sorted(found):
            yield key, np.array(found[key])


def read(folder: Path, lr: float | None = None) -> Cells:
    """The cells of a sweep's folder; `lr` is that of all of them, where no learning rates are swept."""
    sweep = read_sweep(folder)
    try:
        with np.load(folder / "curves.npz", allow_pickle=False) as stored:
            curves = 100 * stored["accuracy"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'curves.npz'} can't be read: {error}") from None
    late = np.array([_late(curves[int(cell)]) for cell in sweep.columns["cell"]])
    k = np.round(sweep.columns["write_access"], 2)  # ten clients can't share 289 samples quite equally
    columns: dict[str, Array] = {
        "k": k,
        "b": sweep.columns["budget"],
        "kb": np.round(k * sweep.columns["budget"], 9),
        "goal": sweep.columns.get("attack.goal", np.full(len(late), "untargeted", object)),
        "seed": sweep.columns["seed"].astype(np.int64),
        "accuracy": 100 * sweep.columns["final_accuracy"],
        "late": late,
        "f1": 100 * sweep.columns["final_f1"],
    }
    for name, override in FACTORS.items():
        columns[name] = sweep.columns.get(override, np.full(len(late), "", object))
    if lr is not None and (columns["lr"] == "").all():
        columns["lr"] = np.full(len(late), lr)
    return with_drops(columns)


def with_drops(columns: dict[str, Array]) -> Cells:
    """Cells with `drop` and `late_drop` worked out."""
    cells = Cells(columns)
    twins: dict[tuple[Any, ...], int] = {}
    for i in np.flatnonzero(columns["b"] == 0):
        twins.setdefault(tuple(columns[name][i] for name in HONEST), int(i))
    at = [twins.get(tuple(columns[name][i] for name in HONEST)) for i in range(len(cells))]
    for name, measure in {"drop": "accuracy", "late_drop": "late"}.items():
        honest = np.array([np.nan if i is None else columns[measure][i] for i in at], float)
        columns = columns | {name: honest - columns[measure]}
    return Cells(columns)


def joined(several: Sequence[Cells]) -> Cells:
    """The cells of several sweeps."""
    return Cells({name: np.concatenate([cells[name] for cells in several]) for name in several[0].columns})


def _late(curve: NDArray[np.float64]) -> float:
    known = curve[np.isfinite(curve)][-LATE:]
    return float(known.mean()) if len(known) else float("nan")
