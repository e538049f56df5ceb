"""What a run leaves behind in its folder; every file is written whole, or not at all where the disk refuses."""

import json
import math
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.config import Settings, from_yaml, to_yaml, versions
from fl_attack.data.cache import write_whole
from fl_attack.errors import InputError
from fl_attack.folder import BASELINE, OF_RUN, PLAN, SUMMARY
from fl_attack.history import COLUMNS, History, recovered
from fl_attack.identity import NOT_NUMBERS
from fl_attack.models.outputs import predictions
from fl_attack.plan_maker import STARTS, Plan
from fl_attack.plans import plans_made
from fl_attack.scenario import Scenario
from fl_attack.sweep_table import write_csv
from fl_attack.targets import target

FILES = OF_RUN
SAMPLES_AT_ONCE = 8192  # of the training set, whose predictions are worked out together
# sweep: the planner's pass over the rounds, 0 before any; part: of the rounds that was chosen anew in it
PLAN_COLUMNS = ("first_round", "sweep", "start", "objective", "part")
__all__ = [
    "BASELINE",
    "FILES",
    "SUMMARY",
    "is_of",
    "summary",
    "table",
    "write",
    "write_clients",
    "write_config",
    "write_rounds",
    "write_summary",
]


def write_rounds(out: Path, history: History) -> None:
    """Write `rounds.csv`, a row for each evaluated round so far.

    Parameters
    ----------
    out : Path
        The folder of the run; it is there.
    history : History
        The measures of the rounds so far.

    Raises
    ------
    InputError or RunError
        Where the disk refuses.
    """
    write_csv(out / "rounds.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in history.rows])


def write_config(out: Path, settings: Settings) -> None:
    """Write `config.yaml`, which also says whose the folder is while the run is not finished.

    Parameters
    ----------
    out : Path
        As `write_rounds` takes it.
    settings : Settings
        The settings of the run.
    """
    write_whole(out / "config.yaml", lambda stream: stream.write(to_yaml(settings).encode()))


def is_of(out: Path, settings: Settings) -> bool:
    """Whether the folder is that of a run of these settings, as its `config.yaml` tells.

    Parameters
    ----------
    out : Path
        A folder, with or without a run in it.
    settings : Settings
        The settings to compare with; what changes no number (`NOT_NUMBERS`) is left out.

    Returns
    -------
    bool
        False too where the file is missing or damaged.
    """
    try:
        found = from_yaml((out / "config.yaml").read_text())
    except (OSError, InputError, UnicodeDecodeError):
        return False
    return found.model_dump_json(exclude=NOT_NUMBERS) == settings.model_dump_json(exclude=NOT_NUMBERS)


def write(out: Path, scenario: Scenario, history: History) -> None:
    """Write all files of a run, finished or not, but its figures, `clients.csv` and `summary.json`.

    Parameters
    ----------
    out : Path
        As `write_rounds` takes it.
    scenario : Scenario
        The data, the partition and the model of the run.
    history : History
        What was measured, the flips and the last parameters.
    """
    settings = scenario.settings
    write_config(out, settings)
    write_rounds(out, history)
    arrays = {
        "model.npz": scenario.model.state(history.theta),
        "partition.npz": {"client": scenario.partition.client, "malicious": scenario.partition.malicious},
        "flips.npz": history.flip_table(),
    }
    if settings.attacked and settings.attack.steers and not settings.attack.plans:
        arrays["target.npz"] = scenario.model.state(target(scenario))
    for name, content in arrays.items():
        write_whole(out / name, partial(_savez, content))
    last = history.rows[-1]["round"] if history.rows else 0  # cells beside one that stops early may plan on
    if plans := [one for one in plans_made(scenario) if one.first <= max(1, last)]:
        write_csv(out / PLAN, PLAN_COLUMNS, [row for one in plans for row in _plan_rows(one)])


def _plan_rows(plan: Plan) -> list[list[Any]]:
    """The rows of `plan.csv` of one plan, see `PLAN_COLUMNS`: start after start, one for each pass over the rounds."""
    names = [STARTS[start] if start < len(STARTS) else f"random{start}" for start in range(plan.harm.shape[1])]
    return [
        [plan.first, sweep, name, float(plan.harm[sweep, start]), float(plan.part[sweep, start])]
        for start, name in enumerate(names)
        for sweep in range(len(plan.harm))
    ]


def write_clients(out: Path, scenario: Scenario, history: History) -> None:
    """Write `clients.csv`: what each client holds, if it is malicious, and how accurate the final model is on that.

    Parameters
    ----------
    out : Path
        As `write_rounds` takes it.
    scenario : Scenario
        The data and who holds what.
    history : History
        The history of the run, whose parameters are the final model.
    """
    lines = ["client,malicious,samples,labels,final_accuracy"]
    malicious = set(scenario.partition.malicious.tolist())
    is_complete = scenario.dataset.is_complete  # else nodes keep theirs to themselves
    correct = _correct(scenario, history.theta) if is_complete else None
    for client, samples in enumerate(scenario.partition.shards):
        labels, accuracy = "", math.nan
        if correct is not None and len(samples):
            labels = " ".join(str(label) for label in np.unique(scenario.dataset.y_train[samples]).tolist())
            accuracy = float(correct[samples].mean())
        lines.append(f"{client},{int(client in malicious)},{len(samples)},{labels},{accuracy}")
    write_whole(out / "clients.csv", lambda stream: stream.write("\n".join([*lines, ""]).encode()))


def _correct(scenario: Scenario, theta: Tensor) -> NDArray[np.bool_]:
    """Whether a model predicts the label of each training sample (n,)."""
    y, found = scenario.dataset.y_train, []
    for start in range(0, len(y), SAMPLES_AT_ONCE):
        samples = np.arange(start, min(start + SAMPLES_AT_ONCE, len(y)))
        X = scenario.features(samples)
        predicted = predictions(scenario.model.logits_in_pieces(theta.to(X.dtype), X))
        found.append(predicted.numpy() == y[samples])
    return np.concatenate(found)


def write_summary(out: Path, facts: dict[str, Any]) -> None:
    """Write `summary.json`, the last file of a run: it says that the run is finished.

    Parameters
    ----------
    out : Path
        As `write_rounds` takes it.
    facts : dict
        The content, as `summary` gives it.
    """
    text = json.dumps(facts, indent=2) + "\n"
    write_whole(out / SUMMARY, lambda stream: stream.write(text.encode()))


def summary(scenario: Scenario, history: History, twin: History | None = None) -> dict[str, Any]:
    """The figures of a run: accuracies and F1 from 0 to 1, shares from 0 to 1, times in seconds.

    Parameters
    ----------
    scenario : Scenario
        The data and settings of the run.
    history : History
        The measures of the start and of at least one round.
    twin : History, optional
        What was measured of the same run without the attack.

    Returns
    -------
    dict
        The content of `summary.json`. `final_*` are of the model that `early_stop.restore` keeps, `minimum_*` over all
        evaluations after the start; `rounds_to_recover` is None where there is no such number.
    """
    settings: Settings = scenario.settings
    last, best = history.rows[-1]["round"], history.given(settings.early_stop.restore)
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
        "effective_budget": history.flip_count / max(1, scenario.labels_used(last)),
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
        "rounds_to_recover": None if twin is None else recovered(history.table(), twin.table(), settings.attack.stop),
        "seconds": history.seconds,
        "seed": settings.seed,
        "versions": versions(),
    }


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Summaries by the name of their run as a table in text, one row each, for a terminal."""
    columns = {
        "final accuracy": lambda s: f"{s['final_accuracy']:.4f}",
        "minimum accuracy": lambda s: f"{s['minimum_accuracy']:.4f}",
        "final F1": lambda s: f"{s['final_f1']:.4f}",
        "flips a round": lambda s: f"{s['flips_per_round']:.1f}",
        "flips": lambda s: f"{s['flips']:,}",
        "global budget": lambda s: f"{s['global_budget']:.3f}",
        "effective": lambda s: f"{s['effective_budget']:.3f}",
        "seconds": lambda s: f"{s['seconds']:.1f}",
    }
    if any(s["best_round"] != s["rounds"] for s in summaries.values()):  # with early stopping
        columns["best round"] = lambda s: f"{s['best_round']} of {s['stopped_round']}"
    rows = [["", *columns], *([name, *(show(s) for show in columns.values())] for name, s in summaries.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _savez(arrays: dict[str, NDArray[Any]], stream: IO[bytes]) -> None:
    """Write arrays as an .npz that needs no unpickling."""
    np.savez(stream, allow_pickle=False, **arrays)
