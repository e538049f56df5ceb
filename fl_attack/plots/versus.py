"""The numbers behind comparisons of attacks and rules: tables that lie beside their figures."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.data.cache import write_whole
from fl_attack.plots.table import ACCURACY, Array, Floats, NotVariedError, Sweep, confidence, split, told

NAME, K = "attack.name", "write_access"
FLIPS = ("greedy", "random_flip", "static_flip", "confidence_flip")


def grid(sweep: Sweep, rows: str, columns: str) -> tuple[list[Any], list[Any], Floats, Floats]:
    """Values of two columns, and mean and half interval of the final accuracy (%) at each pair, (rows, columns)."""
    ys, xs = (list(dict.fromkeys(sweep.column(name).tolist())) for name in (rows, columns))
    for name, values in ((rows, ys), (columns, xs)):
        if len(values) < 2:
            raise NotVariedError(f"a matrix needs several values of {name}")
    mean, half = np.full((2, len(ys), len(xs)), np.nan)
    for (y, x), cells in split(len(sweep.repeat), sweep.column(rows), sweep.column(columns)).items():
        at = ys.index(y), xs.index(x)
        mean[at], half[at] = confidence(sweep.seed_means(cells))
    return ys, xs, mean, half


def worst(names: list[Any], mean: Floats) -> Array:
    """(columns,) the row of the lowest mean among those of an attack."""
    attacked = np.array([name != "none" for name in names])
    lowest: Array = np.where(attacked[:, None] & np.isfinite(mean), mean, np.inf).argmin(0)
    return lowest


def ratios(sweep: Sweep) -> list[dict[str, Any]]:
    """By write access: the drop (points) by the worst flips and by the worst gradients, and the ratio of the two.

    Drops are from the unattacked cells of the same seed; an interval is over seeds (Student t). What is worst is
    decided on the means.
    """
    names, k, accuracy = sweep.column(NAME), sweep.column(K), sweep.column(ACCURACY)
    if "none" not in names:
        raise NotVariedError("a comparison of harm needs unattacked cells: attack.name=none,...")
    found = []
    for (at,), cells in split(len(k), k).items():
        honest = {sweep.repeat[i]: accuracy[i] for i in cells if names[i] == "none"}
        drops: dict[str, dict[int, float]] = {}
        for i in cells:
            if names[i] != "none" and sweep.repeat[i] in honest:
                drops.setdefault(names[i], {})[int(sweep.repeat[i])] = honest[sweep.repeat[i]] - accuracy[i]
        kinds = [[name for name in drops if (name in FLIPS) == flips] for flips in (True, False)]
        if not all(kinds):
            raise NotVariedError("a comparison of harm needs attacks on labels and on gradients")
        flips, gradients = (max(kind, key=lambda name: np.mean(list(drops[name].values()))) for kind in kinds)
        each = [np.array([drops[name][seed] for seed in sorted(drops[name])]) for name in (flips, gradients)]
        (flip_mean, flip_half), (mean, half) = (confidence(one) for one in each)
        found.append(
            {
                "write_access": at,
                "flips": flips,
                "drop_by_flips": flip_mean,
                "drop_by_flips_interval": flip_half,
                "gradients": gradients,
                "drop_by_gradients": mean,
                "drop_by_gradients_interval": half,
                "ratio": flip_mean / mean if mean > 0 else float("nan"),
            }
        )
    return found


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A table of these rows."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(
        {key: told(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    write_whole(file, lambda stream: stream.write(text.getvalue().encode()))
    return file
