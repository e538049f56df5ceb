"""What a run leaves behind in its folder; every file is written whole or not at all."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fl_attack.config import Settings, to_yaml, versions
from fl_attack.data.cache import write_whole
from fl_attack.errors import InputError
from fl_attack.history import COLUMNS, History, rounds_to_recover
from fl_attack.scenario import Scenario
from fl_attack.sweep_table import write_csv
from fl_attack.targets import target

SUMMARY = "summary.json"  # written last: a folder that has one is finished
BASELINE = "baseline"
FILES = ("config.yaml", "rounds.csv", SUMMARY, "model.npz", "partition.npz", "flips.npz", "target.npz", "curves.png")


def prepare(out: Path, overwrite: bool) -> None:
    """Make the folder of a run; InputError where it holds a finished one or can't be written to."""
    if (out / SUMMARY).exists() and not overwrite:
        raise InputError(f"out={out} holds a finished run; use another folder or overwrite=true")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out={out} can't be written to: {error.strerror or error}; use another folder") from None


def clear(out: Path) -> None:
    """Remove what an earlier run left in the folder; other files stay."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    if (out / BASELINE / "config.yaml").exists():
        shutil.rmtree(out / BASELINE)


def write_rounds(out: Path, history: History) -> None:
    """`rounds.csv`, a row for each evaluated round so far."""
    write_csv(out / "rounds.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in history.rows])


def write(out: Path, scenario: Scenario, history: History, finished: bool = True, twin: History | None = None) -> None:
    """All files of a run but its figure; the summary only of a finished one. `twin` is the run without the attack."""
    settings = scenario.settings
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "config.yaml", lambda stream: stream.write(to_yaml(settings).encode()))
    write_rounds(out, history)
    arrays = {
        "model.npz": scenario.model.state(history.theta),
        "partition.npz": {"client": scenario.partition.client, "malicious": scenario.partition.malicious},
        "flips.npz": history.flip_table(),
    }
    if settings.attacked and settings.attack.goal == "targeted":
        arrays["target.npz"] = scenario.model.state(target(scenario))
    for name, content in arrays.items():
        _write(out / name, partial(_savez, content))
    if finished:
        text = json.dumps(summary(scenario, history, twin), indent=2) + "\n"
        _write(out / SUMMARY, lambda stream: stream.write(text.encode()))


def summary(scenario: Scenario, history: History, twin: History | None = None) -> dict[str, Any]:
    """The figures of a run: accuracies and F1 from 0 to 1, shares from 0 to 1, times in seconds."""
    settings: Settings = scenario.settings
    last, best = history.rows[-1]["round"], history.best
    budget = settings.label_budget
    return {
        "final_accuracy": best["test_accuracy"],
        "minimum_accuracy": min(row["test_accuracy"] for row in history.rows[1:]),
        "final_f1": best["test_f1"],
        "minimum_f1": min(row["test_f1"] for row in history.rows[1:]),
        "final_loss": best["test_loss"],
        "attack": settings.attack.name,
        "write_access": scenario.write_access,
        "budget": budget,
        "global_budget": scenario.write_access * budget,
        "flips": history.flip_count,
        "flips_per_round": history.flip_count / last,
        "clients": settings.clients.total,
        "malicious_clients": settings.clients.malicious,
        "training_samples": int((scenario.partition.client >= 0).sum()),
        "validation_samples": len(scenario.partition.validation),
        "test_samples": len(scenario.dataset.y_test),
        "rounds": settings.rounds,
        "stopped_round": last,
        "best_round": best["round"],
        "rounds_to_recover": _recovered(settings, history, twin),
        "seconds": history.seconds,
        "seed": settings.seed,
        "versions": versions(),
    }


def _recovered(settings: Settings, history: History, twin: History | None) -> float | None:
    """See `history.rounds_to_recover`; None where there is no such number."""
    if twin is None or len(twin.rows) != len(history.rows):
        return None
    rounds, accuracy, honest = (
        np.array([row[name] for row in of.rows], float)
        for of, name in ((history, "round"), (history, "test_accuracy"), (twin, "test_accuracy"))
    )
    found = rounds_to_recover(rounds, accuracy, honest, settings.attack.stop)
    return None if np.isnan(found) else found


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Summaries side by side, one row each, for a terminal."""
    columns = {
        "final accuracy": lambda s: f"{s['final_accuracy']:.4f}",
        "minimum accuracy": lambda s: f"{s['minimum_accuracy']:.4f}",
        "final F1": lambda s: f"{s['final_f1']:.4f}",
        "flips a round": lambda s: f"{s['flips_per_round']:.1f}",
        "flips": lambda s: f"{s['flips']:,}",
        "global budget": lambda s: f"{s['global_budget']:.3f}",
        "seconds": lambda s: f"{s['seconds']:.1f}",
    }
    if any(s["best_round"] != s["rounds"] for s in summaries.values()):  # with early stopping
        columns["best round"] = lambda s: f"{s['best_round']} of {s['stopped_round']}"
    rows = [["", *columns], *([name, *(show(s) for show in columns.values())] for name, s in summaries.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _savez(arrays: dict[str, NDArray[Any]], stream: IO[bytes]) -> None:
    np.savez(stream, allow_pickle=False, **arrays)


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from None
