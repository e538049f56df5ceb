"""What the page shows of a sweep."""

import math
from typing import Any

import numpy as np

from fl_attack.config import overrides_of
from fl_attack.overrides import known_keys, written
from fl_attack.report.page import PagePart
from fl_attack.result import Result
from fl_attack.sweep_table import LABELS, RESULTS, WORDS, mean_interval

ROWS = 4000  # of the table that the page holds, at most
SEEDS = 60  # up to which intervals are exact


def of_sweep(result: Result) -> PagePart:
    """The part of a sweep: its first `ROWS` cells with the command of each, and what was varied among all."""
    assert result.folder is not None
    columns = result.columns("table")
    names, cells = list(columns), len(columns["cell"])
    overrides = [name for name in names if name not in (*RESULTS, "cell")]
    first = overrides_of(result.settings)
    count = min(cells, ROWS)
    rows = [{name: columns[name][i] for name in names} for i in range(count)]
    return {
        "kind": "sweep",
        "name": str(result.folder),
        "cells": cells,
        "broken_off": result.summary["broken_off"],
        "columns": {name: columns[name][:count] for name in names},
        "varied": [name for name in overrides if name != "seed" and len(set(columns[name].tolist())) > 1],
        "results": [name for name in names if name in LABELS and _has_numbers(columns[name])],
        "labels": WORDS | {name: label for name, (label, _) in LABELS.items()},
        "factors": {name: factor for name, (_, factor) in LABELS.items()},
        "commands": [command_of(first, {key: row[key] for key in (*overrides, "seed") if key in row}) for row in rows],
        # Student's t for means over n seeds, from n = 2 on
        "t": [mean_interval(np.arange(n, dtype=float))[1] / _deviation(n) * n**0.5 for n in range(2, SEEDS)],
    }


def command_of(first: list[str], row: dict[str, Any]) -> str:
    """The command that runs a cell of a sweep by itself.

    Parameters
    ----------
    first : list of str
        Overrides that give the settings of the sweep's first cell.
    row : dict
        The overrides of this cell, by key, which take the place of those of `first`.

    Returns
    -------
    str
        The command, which begins with `fl-attack`.
    """
    groups = {key: str(value) for key, value in row.items() if "." not in key and _is_group(key)}
    kept = []
    for override in first:
        key = override.partition("=")[0]
        group = key.partition(".")[0]
        needs = known_keys().get(key, [])
        if key in row or (group in groups and needs and f"{group}={groups[group]}" not in needs):
            continue
        kept.append(override)
    overrides = [
        written(key, int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else value)
        for key, value in row.items()
        if not (isinstance(value, float | np.floating) and math.isnan(value)) and value != ""
    ]
    overrides.sort(key=lambda one: "." in one.partition("=")[0])  # what chooses a file before its keys
    return " ".join(["fl-attack", *kept, *overrides])


def _is_group(key: str) -> bool:
    """Whether a key, such as `attack`, chooses a file of `conf/`."""
    return any(f"{key}=" in choice for choices in known_keys().values() for choice in choices)


def _has_numbers(column: Any) -> bool:
    """Whether a column is of numbers, and one of them finite."""
    return column.dtype.kind in "if" and bool(np.isfinite(column.astype(float)).any())


def _deviation(n: int) -> float:
    """Standard deviation of 0, 1, ..., n - 1, with n - 1 degrees of freedom."""
    return float(np.arange(n, dtype=float).std(ddof=1))
