"""A multirun is its cells run alone, in one folder, and can be taken up again wherever it stopped."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_attack import data, engine, experiment, federation, multirun, numerics
from fl_attack.config import compose
from fl_attack.detect import MEASURES
from fl_attack.errors import InputError
from fl_attack.history import COLUMNS
from fl_attack.identity import key_of
from fl_attack.launcher import grid
from fl_attack.multirun import execute
from fl_attack.multirun.table import final_accuracy, results_row, write_tables
from fl_attack.multirun.units import (
    Numbers,
    Unit,
    by_cell,
    distinct_experiments,
    mistakes,
    random_numbers,
    read,
    saver,
    stacked,
    units,
)
from fl_attack.scenario import Scenario
from fl_attack.sweep_table import RESULTS

Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str]]
GRID = ["clients.total=6", "clients.malicious=1,2", "attack.budget=0.5", "attack.goal=untargeted,targeted", "seed=0,1"]


@pytest.fixture
def command(command: Callable[..., tuple[int, str, str]]) -> Command:
    """Runs `fl-attack` in this process: exit code and all that it said."""

    def run(*arguments: str) -> tuple[int, str]:
        code, printed, stderr = command(*arguments)
        return code, printed + stderr

    return run


def small_sweep(small_data: Small, out: Path, *more: str) -> list[str]:
    fixed = ["engine=batched", "rounds=12", "eval_every=5", "batch_size=30", "lr=0.5", f"out={out}"]
    return ["-m", *small_data(3), *fixed, *GRID, *more]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_a_sweep_is_its_cells_run_alone(command: Command, small_data: Small, tmp_path: Path) -> None:
    code, stderr = command(*small_sweep(small_data, tmp_path / "sweep"))
    assert code == 0
    assert "sweep: 100 % of 8 cells" in stderr
    table = rows(tmp_path / "sweep")
    assert {file.name for file in (tmp_path / "sweep").iterdir()} >= {"sweep.csv", "curves.npz", "config.yaml"}
    assert not [file for file in (tmp_path / "sweep").iterdir() if file.is_dir()]
    curves = np.load(tmp_path / "sweep" / "curves.npz")
    assert curves["round"].tolist() == [0, 5, 10, 12]
    assert [row["cell"] for row in table] == [str(i) for i in range(8)]
    for row in table:
        overrides = [f"{key}={row[key]}" for key in ("clients.malicious", "attack.goal", "seed")]
        alone = compose(
            *small_data(3),
            *("engine=batched", "rounds=12", "eval_every=5", "batch_size=30", "lr=0.5", "attack.budget=0.5"),
            *("clients.total=6", "baseline=false", f"out={tmp_path}/{row['cell']}", *overrides),
        )
        (summary,) = experiment.run(alone).values()
        assert float(row["final_accuracy"]) == pytest.approx(summary["final_accuracy"])
        assert float(row["minimum_accuracy"]) == pytest.approx(summary["minimum_accuracy"])
        assert float(row["final_loss"]) == pytest.approx(summary["final_loss"], rel=1e-5)
        assert float(row["write_access"]) == pytest.approx(summary["write_access"])
        assert float(row["global_budget"]) == pytest.approx(summary["global_budget"])
        assert int(row["flips"]) == summary["flips"]
        assert float(row["effective_budget"]) == pytest.approx(summary["effective_budget"]) == summary["flips"] / 360
        assert row["early_stop_accuracy"] == ""
        assert curves["accuracy"][int(row["cell"])][-1] == pytest.approx(summary["final_accuracy"])


def test_both_engines_fill_the_same_table(
    shared_ray: None, command: Command, small_data: Small, tmp_path: Path
) -> None:
    for name in ("batched", "flower"):
        grid = [one for one in small_sweep(small_data, tmp_path / name, "dtype=float64") if one != "engine=batched"]
        assert command(*grid, f"engine={name}")[0] == 0
    batched, flower = rows(tmp_path / "batched"), rows(tmp_path / "flower")
    for a, b in zip(batched, flower, strict=True):
        for column, value in a.items():
            try:
                assert float(b[column]) == pytest.approx(float(value), rel=1e-6)
            except ValueError:
                assert b[column] == value


class StoppedError(Exception):
    """What stops a sweep in a test."""


def test_what_is_done_is_kept_and_not_done_again(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*small_sweep(small_data, tmp_path / "whole"))[0] == 0
    computed: list[int] = []
    original = execute.batched_numbers

    def counting(cells: list[object], progress: object = None) -> multirun.Numbers:
        if len(computed) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise StoppedError
        computed.append(len(cells))
        return original(cells)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "batched_numbers", counting)
    code, stderr = command(*small_sweep(small_data, tmp_path / "parts"))
    assert code == 1
    assert "StoppedError" in stderr
    kept = list((tmp_path / "parts" / "units").iterdir())
    assert len(kept) == 1
    assert not (tmp_path / "parts" / "sweep.csv").exists()
    assert command(*small_sweep(small_data, tmp_path / "parts"))[0] == 0
    assert computed == [4, 4]  # two seeds of four cells, each once
    for name in ("sweep.csv", "curves.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert command(*small_sweep(small_data, tmp_path / "parts"))[0] == 2  # finished


@pytest.mark.parametrize("change", ["lr=0.4", "rounds=13", "attack.budget=0.25", "attack.rounding=carry"])
def test_a_changed_parameter_is_never_answered_with_an_old_result(small_data: Small, change: str) -> None:
    base = [*small_data(3), "engine=batched", "rounds=12", "batch_size=30", "out=a"]
    keys = [
        units(engine.make_scenarios([compose(*base, *more)]))[0].key
        for more in ([], [change], ["out=elsewhere", "overwrite=true"])
    ]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]  # where it is written to changes no number


@pytest.mark.parametrize("change", [(), ("strategy=median",), ("attack=sign_flip",), ("detectability=true",)])
def test_work_under_a_rule_is_new_where_the_numbers_of_rules_have_changed(
    small_data: Small, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...]
) -> None:
    (scenario,) = engine.make_scenarios([compose(*small_data(2), "engine=batched", "batch_size=30", "out=a", *change)])
    before = key_of([scenario])
    monkeypatch.setattr(numerics, "OF_RULES", "another")
    assert (key_of([scenario]) != before) == bool(change)


def test_the_same_data_in_another_place_are_the_same_work(small_data: Small, tmp_path: Path) -> None:
    base = [*small_data(3), "engine=batched", "rounds=12", "batch_size=30", "out=a"]
    moved = shutil.copy(next(tmp_path.glob("*.npz")), tmp_path / "moved.npz")
    other = [*small_data(3, seed=1), *base[2:]]
    keys = [
        units(engine.make_scenarios([compose(*overrides)]))[0].key
        for overrides in (base, [*base, f"dataset.path={moved}"], other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_the_cells_of_a_grid_load_their_dataset_once(small_data: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = grid(*small_data(3), "engine=batched", "batch_size=30", "out=a", "seed=range(3)", "clients.malicious=1,2")
    loaded: list[str] = []
    original = data.load

    def counting(loader: str, **more: Any) -> data.Dataset:
        loaded.append(loader)
        return original(loader, **more)

    monkeypatch.setattr(data, "load", counting)
    scenarios = engine.make_scenarios([cell.settings for cell in swept])
    assert len(scenarios) == 6
    assert loaded == ["npz"]


@pytest.mark.parametrize(
    ("more", "cells"),
    [
        ([], 1 + 2 * 2),  # without flips it is one experiment, whatever the attackers would have aimed at
        (["attack.rounding=carry,floor"], 1 + 2 * 2 * 2),
        (["strategy=median"], 2 + 2 * 2),  # a rule that reckons with so many malicious clients
        (["partition.malicious_share=0.3"], 2 + 2 * 2),  # who holds what depends on them
        (["detectability=true"], 4 + 2 * 2),  # they are looked for, also where they do nothing
        (["attack=ipm"], 2),  # has no budget of labels
        (["lr=0.1,0.2"], 2 * (1 + 2 * 2)),
        (["seed=0,1"], 2 * (1 + 2 * 2)),
    ],
)
def test_what_gives_the_same_numbers_is_computed_once(small_data: Small, more: list[str], cells: int) -> None:
    goals = "attack.goal=untargeted" if "attack=ipm" in more else "attack.goal=untargeted,targeted"
    swept = grid(
        *small_data(3), "engine=batched", "clients.total=6", "clients.malicious=1,2", "attack.budget=0,0.5",
        goals, "batch_size=30", "out=unused", *more,
    )  # fmt: skip
    scenarios = engine.make_scenarios([cell.settings for cell in swept])
    kept, place = distinct_experiments(scenarios)
    assert len(kept) == cells
    for asked, at in zip(scenarios, place, strict=True):
        done = kept[at]
        assert done.partition.client.tolist() == asked.partition.client.tolist()
        assert done is asked or done.settings.label_budget == 0 or done.settings == asked.settings
        assert engine.group_key(done)[1:3] == engine.group_key(asked)[1:3]  # type: ignore[index]


@pytest.mark.parametrize("name", ["batched", pytest.param("flower", marks=pytest.mark.ray)])
def test_an_unattacked_cell_is_its_run_alone(
    command: Command, small_data: Small, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [*small_data(3), f"engine={name}", "rounds=6", "batch_size=30", "lr=0.5", "clients.total=6"]
    swept = ["clients.malicious=1,2", "attack.budget=0,0.5", "attack.goal=untargeted,targeted"]
    code, stderr = command("-m", *data, *swept, f"out={tmp_path}/sweep")
    assert code == 0 and "sweep: 100 % of 8 cells" in stderr
    table = rows(tmp_path / "sweep")
    for row in table:
        (twin,) = {
            float(one["final_accuracy"])
            for one in table
            if one["attack.budget"] == "0" and one["clients.malicious"] == row["clients.malicious"]
        }
        lost = twin - float(row["final_accuracy"])
        assert row["drop"] == "" if row["attack.budget"] == "0" else float(row["drop"]) == pytest.approx(lost)
    monkeypatch.setattr(sys.modules["fl_attack.multirun.units"], "plain", lambda scenario: scenario)
    assert command("-m", *data, *swept, f"out={tmp_path}/each")[0] == 0
    for one, other in zip(rows(tmp_path / "sweep"), rows(tmp_path / "each"), strict=True):
        for column, value in one.items():
            try:
                assert float(value) == pytest.approx(float(other[column]), rel=1e-6), column
            except ValueError:
                assert value == other[column], column


def test_a_damaged_unit_is_computed_again(small_data: Small, tmp_path: Path) -> None:
    file = tmp_path / "unit.npz"
    assert read(file) is None
    file.write_bytes(b"PK\x03\x04 damaged")
    assert read(file) is None


def test_a_cell_that_diverges_ends_in_a_row_with_its_error(command: Command, small_data: Small, tmp_path: Path) -> None:
    data = [*small_data(3), "engine=batched", "rounds=6", "batch_size=full", f"out={tmp_path}/out"]
    assert command("-m", *data, "lr=0.5,1e308")[0] == 0
    fine, broken = rows(tmp_path / "out")
    assert fine["error"] == ""
    assert "diverged" in broken["error"]
    assert int(broken["rounds"]) < 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack.budget=0.1,2"], "attack.budget=2.*at most 1"),
        (["clients.malicious=1,9", "clients.total=6"], "malicious=9 is more than total=6"),
        (["attack.budgte=0.1,0.2"], "attack.budgte is not a known key"),
        (["attack=greedy,gredy"], "attack=gredy is not known; known: alie, confidence_flip"),
        (
            ["engine=batched", "strategy=flower", "strategy.path=flwr.serverapp.strategy.FedMedian", "seed=0,1"],
            "engine",
        ),
    ],
)
def test_a_bad_cell_is_told_before_any_is_run(
    command: Command, small_data: Small, tmp_path: Path, overrides: list[str], message: str
) -> None:
    import re

    code, stderr = command("-m", "engine=batched", *small_data(3), "batch_size=30", f"out={tmp_path}/out", *overrides)
    assert code == 2
    assert stderr.count("\n") == 1
    assert re.search(message, stderr)
    assert not (tmp_path / "out").exists()


def test_groups_and_ranges_of_hydra_are_swept(command: Command, small_data: Small, tmp_path: Path) -> None:
    data = [*small_data(3), "engine=batched", "rounds=3", "batch_size=30", f"out={tmp_path}/out"]
    grid = [
        "attack=none,greedy",
        "partition=iid,dirichlet",
        "clients.malicious=range(1,3)",
        "clients.honest=4",
        "hydra.verbose=false",
    ]
    assert command("-m", *data, *grid, "hydra.verbose=false")[0] == 0
    table = rows(tmp_path / "out")
    assert len(table) == 8
    assert {(row["attack"], row["partition"], row["clients.malicious"]) for row in table} == {
        (a, p, m) for a in ("none", "greedy") for p in ("iid", "dirichlet") for m in ("1", "2")
    }
    assert all((int(row["flips"]) == 0) == (row["attack"] == "none") for row in table)


def test_the_table_says_what_each_attack_writes(command: Command, small_data: Small, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fl_attack.attack import Proposal, Updates, View\n\n\n"
        "def zeros(view: View) -> Proposal:\n    return Proposal(view.y * 0, view.noise[:, 0])\n\n\n"
        "def nothing(view: Updates):\n    return view.updates * 0\n"
    )
    data = [*small_data(3), "engine=batched", "rounds=3", "batch_size=30", "clients.total=6", f"out={tmp_path}/out"]
    expected = {"none": "none", "greedy": "labels", "sign_flip": "updates"}
    expected |= {f"{tmp_path}/mine.py:zeros": "labels", f"{tmp_path}/mine.py:nothing": "updates"}
    code, stderr = command("-m", *data, f"attack.name={','.join(expected)}", "clients.malicious=0,2")
    assert code == 0, stderr
    for row in rows(tmp_path / "out"):
        assert row["writes"] == (expected[row["attack.name"]] if row["clients.malicious"] == "2" else "none")


def test_a_sweep_can_stand_in_a_file(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      attack.budget: 0.1,0.5\n      seed: range(2)\n"
    )
    monkeypatch.chdir(tmp_path)
    data = [*small_data(3), "engine=batched", "rounds=3", "batch_size=30", f"out={tmp_path}/out"]
    code, stderr = command("-m", "--config-dir", f"{tmp_path}/conf", "experiment=mine", *data)
    assert code == 0, stderr
    assert [(row["attack.budget"], row["seed"]) for row in rows(tmp_path / "out")] == [
        (b, s) for b in ("0.1", "0.5") for s in ("0", "1")
    ]
    assert not (tmp_path / "multirun.yaml").exists()


def test_a_cluster_fills_the_same_table(shared_ray: None, command: Command, small_data: Small, tmp_path: Path) -> None:
    assert command(*small_sweep(small_data, tmp_path / "here"))[0] == 0
    assert command(*small_sweep(small_data, tmp_path / "ray", "launcher=ray"))[0] == 0
    assert (tmp_path / "here" / "sweep.csv").read_bytes() == (tmp_path / "ray" / "sweep.csv").read_bytes()


def test_workers_tell_how_far_they_are(shared_ray: None, tmp_path: Path) -> None:
    heard = tmp_path / "heard"  # the second job goes on until two of its reports have come, however busy the machine is

    def work(job: int, step: Callable[[int], None]) -> int:
        for _ in range(1 if job == 1 else 200):
            time.sleep(0.6)
            step(2)
            if heard.exists():
                break
        return job * job

    reported: list[tuple[int, int]] = []

    def on_progress(i: int, steps: int) -> None:
        reported.append((i, steps))
        if len({steps for job, steps in reported if job == 1}) >= 2:
            heard.touch()

    found = dict(federation.scatter(work, [1, 9], 1, None, False, on_progress))
    assert found == {0: 1, 1: 81}
    second = [steps for i, steps in reported if i == 1]
    assert second == sorted(second) and 0 < second[0] < second[-1] < 400


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_in_the_same_bytes(
    command: Command, small_data: Small, tmp_path: Path
) -> None:
    def grid(out: str) -> list[str]:
        fixed = ["engine=batched", "rounds=1500", "eval_every=100", "batch_size=30", f"out={tmp_path}/{out}"]
        return ["-m", *small_data(3), *fixed, "clients.malicious=1,2", "seed=range(8)"]

    assert command(*grid("whole"))[0] == 0
    process = subprocess.Popen([sys.executable, "-m", "fl_attack", *grid("killed")], stderr=subprocess.DEVNULL)
    kept = tmp_path / "killed" / "units"
    deadline = time.monotonic() + 120
    while not (kept.exists() and len(list(kept.glob("*.npz"))) >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in kept.glob("*.npz")}
    assert 2 <= len(before) < 8
    assert not (tmp_path / "killed" / "sweep.csv").exists()
    assert command(*grid("killed"))[0] == 0
    assert (tmp_path / "killed" / "sweep.csv").read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()


def test_a_figure_that_cannot_be_drawn_is_refused_before_the_computing_but_tables_need_none(tmp_path: Path) -> None:
    cells = grid("engine=batched", "rounds=2", "seed=0,1", "figures=[[heatmap]]", f"out={tmp_path}/o")
    with pytest.raises(InputError, match=r"^figures=\[\[heatmap\]\]: a heat map needs several values of k"):
        multirun.run(cells)
    assert not (tmp_path / "o").exists()
    assert (multirun.tabulate(cells) / "sweep.csv").exists()


# --- rows of the table, worked out by hand -----------------------------------------------------------------


@cache
def scenario_of(*overrides: str) -> Scenario:
    """An experiment on digits of full batches, of which each label is used once a round."""
    fixed = ["dataset=digits_01", "engine=batched", "batch_size=full", "rounds=6", "seed=3", "out=x"]
    return engine.make_scenarios([compose(*fixed, *overrides)])[0]


def numbers_of(accuracy: list[float], flips: int = 0, error: str = "", missing: int = 0, **columns: Any) -> Numbers:
    """The numbers of a cell that was evaluated every second round, from these accuracies; other columns count up."""
    table = np.arange(len(accuracy) * len(COLUMNS), dtype=float).reshape(len(accuracy), -1) / 100
    known = {"round": 2.0 * np.arange(len(accuracy)), "test_accuracy": accuracy, "validation_loss": np.nan} | columns
    for name, values in known.items():
        table[:, COLUMNS.index(name)] = values
    table = np.vstack([table, np.full((missing, len(COLUMNS)), np.nan)])
    return Numbers(table, np.array(flips), np.array(error), np.zeros(20, np.int64))


def test_a_row_has_the_results_of_the_last_evaluation_and_shares_of_all_labels_used() -> None:
    scenario = scenario_of("attack.budget=0.5")
    samples = sum(map(len, scenario.partition.shards))
    held = sum(len(scenario.partition.shards[client]) for client in scenario.partition.malicious)
    one = numbers_of([0.01, 0.9, 0.4, 0.6], flips=30, missing=2)
    row = results_row(scenario, one)
    assert list(row) == list(RESULTS)
    assert float(row["write_access"]) == pytest.approx(held / samples)
    assert float(row["global_budget"]) == pytest.approx(0.5 * held / samples)
    assert float(row["effective_budget"]) == pytest.approx(30 / (6 * samples))  # six rounds
    assert (row["writes"], row["budget"], row["seed"], row["flips"], row["rounds"]) == ("labels", "0.5", 3, 30, 6)
    assert (row["final_accuracy"], row["minimum_accuracy"]) == ("0.6", "0.4")  # not that of the start
    last = {name: f"{one.table[3, COLUMNS.index(column)]:.9g}" for name, column in
            (("final_f1", "test_f1"), ("final_loss", "test_loss"))}  # fmt: skip
    assert {name: row[name] for name in last} == last
    empty = {"early_stop_accuracy", "validation_loss", "drop", "rounds_to_recover", "error", *MEASURES}
    assert {name for name, value in row.items() if value == ""} == empty
    start = results_row(scenario, numbers_of([0.2]))
    assert (start["minimum_accuracy"], start["effective_budget"], start["rounds"]) == ("0.2", "0", 0)


def test_a_row_of_a_cell_that_stops_early_is_of_the_model_that_is_kept() -> None:
    losses = [3.0, 1.0, 2.0, 2.5]
    one = numbers_of([0.1, 0.7, 0.8, 0.9], validation_loss=losses, missing=1)
    kept = {}
    for restore in ("best", "last"):
        scenario = scenario_of("early_stop.patience=2", f"early_stop.restore={restore}")
        row = results_row(scenario, one)
        kept[restore] = (row["final_accuracy"], row["early_stop_accuracy"], row["validation_loss"])
        assert final_accuracy(one, scenario) == float(row["final_accuracy"])
        assert row["final_f1"] == f"{one.table[1 if restore == 'best' else 3, COLUMNS.index('test_f1')]:.9g}"
    assert kept == {"best": ("0.7", "0.7", "1"), "last": ("0.9", "0.7", "2.5")}


def test_a_row_compares_with_the_twin_and_one_that_broke_off_has_no_model() -> None:
    scenario = scenario_of("attack.stop=2")
    twin, one = numbers_of([0.1, 0.9, 0.9, 0.95]), numbers_of([0.1, 0.3, 0.5, 0.945])
    row = results_row(scenario, one, twin)
    assert float(row["drop"]) == pytest.approx(0.005) and float(row["rounds_to_recover"]) == 4
    never = results_row(scenario, numbers_of([0.1, 0.3, 0.5, 0.6]), twin)
    assert float(never["drop"]) == pytest.approx(0.35) and never["rounds_to_recover"] == ""
    short = results_row(scenario, numbers_of([0.1, 0.9, 0.9]), twin)
    assert short["rounds_to_recover"] == ""  # other rows than the twin's
    honest = results_row(scenario_of("attack=none"), one, twin)
    assert (honest["writes"], honest["drop"], honest["rounds_to_recover"]) == ("none", "", "")
    assert (honest["budget"], honest["global_budget"]) in [("0", "0"), (0, 0), (0.0, 0.0)]
    lost = results_row(scenario, numbers_of([0.1, 0.3], error="diverged", flips=4), twin)
    assert lost["error"] == "diverged" and (lost["flips"], lost["rounds"]) == (4, 2)
    of_model = {"final_accuracy", "minimum_accuracy", "final_f1", "final_loss", "drop", "rounds_to_recover"}
    assert not any(lost[name] for name in of_model)


def test_measures_of_detection_are_means_over_the_evaluations_that_have_them() -> None:
    values = {"norm_z": [np.nan, 1.0, np.inf, 3.0], "cosine_auc": [np.nan] * 4}
    one = numbers_of([0.1, 0.2, 0.3, 0.4], missing=1, **values)
    row = results_row(scenario_of("detectability=true"), one)
    assert (row["norm_z"], row["cosine_auc"]) == ("2", "")
    assert results_row(scenario_of(), one)["norm_z"] == ""


def test_the_tables_of_a_sweep_have_a_row_and_a_curve_of_each_cell(tmp_path: Path) -> None:
    twin = {"seed": "3"}
    cells = [
        multirun.Cell(twin | {"attack": "none"}, scenario_of("attack=none").settings),
        multirun.Cell(twin | {"attack": "greedy", "attack.budget": "0.5"}, scenario_of("attack.budget=0.5").settings),
    ]
    scenarios = [scenario_of("attack=none"), scenario_of("attack.budget=0.5")]
    wrong = [np.arange(20), np.arange(20)[::-1]]
    numbers = [numbers_of([0.1, 0.8], missing=2), numbers_of([0.1, 0.5, 0.6], missing=1)]
    numbers = [one._replace(wrong=parts) for one, parts in zip(numbers, wrong, strict=True)]
    write_tables(tmp_path, cells, scenarios, numbers)
    table = rows(tmp_path)
    assert list(table[0])[:4] == ["cell", "attack", "attack.budget", "writes"]
    assert [(row["cell"], row["attack"], row["attack.budget"], row["seed"]) for row in table] == [
        ("0", "none", "", "3"),
        ("1", "greedy", "0.5", "3"),
    ]
    assert table[0]["drop"] == "" and float(table[1]["drop"]) == pytest.approx(0.2)
    with np.load(tmp_path / "curves.npz") as curves:
        assert curves["round"].tolist() == [0, 2, 4]  # of the cell that went on for longest
        np.testing.assert_array_equal(curves["accuracy"], [[0.1, 0.8, np.nan], [0.1, 0.5, 0.6]])
        assert curves["wrong"].tolist() == [one.tolist() for one in wrong]
        count = len(scenarios[0].dataset.y_test)
        assert curves["images"].tolist() == [len(range(part, count, 20)) for part in range(20)]
    broken = numbers[0]._replace(error=np.array("diverged"))
    write_tables(tmp_path, cells, scenarios, [broken, numbers[1]])
    assert [row["drop"] for row in rows(tmp_path)] == ["", ""]  # a twin that broke off is none
    other = scenario_of("dataset=digits", "attack=none")
    write_tables(tmp_path, cells, [other, scenarios[1]], numbers)
    with np.load(tmp_path / "curves.npz") as curves:
        assert curves["wrong"].shape == (0, 20)  # test sets of several sizes have no parts in common


def test_a_unit_is_read_back_under_its_own_name_alone(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(2, 3, len(COLUMNS)))
    one = Numbers(table, np.array([1, 2]), np.array(["", "lost"]), np.arange(40).reshape(2, 20))

    def write(name: str, numbers: Numbers, key: str) -> Numbers | None:
        with (tmp_path / name).open("wb") as stream:
            saver(numbers, key)(stream)
        return read(tmp_path / name)

    found = write("abc.npz", one, "abc")
    assert found is not None
    for ours, theirs in zip(one, found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert write("abc.npz", one, "abd") is None  # of another unit
    assert write("abc.npz", one._replace(table=table[..., 1:]), "abc") is None  # of an earlier version
    of_cells = by_cell(Unit([7, 4], "abc"), one)
    assert [*of_cells] == [7, 4] and of_cells[4].flips == 2 and of_cells[4].error == "lost"
    np.testing.assert_array_equal(of_cells[7].table, table[0])
    short, long = np.ones((1, len(COLUMNS))), np.zeros((3, len(COLUMNS)))
    both = stacked([(short, 1, "x", np.zeros(20, int)), (long, 2, "", np.ones(20, int))])
    assert both.table.shape == (2, 3, len(COLUMNS)) and np.isnan(both.table[0, 1:]).all()
    assert (both.table[0, 0] == 1).all() and not both.table[1].any() and both.flips.tolist() == [1, 2]
    assert both.error.tolist() == ["x", ""] and both.wrong.sum(1).tolist() == [0, 20]


def test_mistakes_are_counted_by_parts_of_the_test_set() -> None:
    scenario = scenario_of()
    X, y = scenario.test_set()
    theta = torch.zeros(scenario.theta_shape)
    found = scenario.model.class_logits(theta.to(X.dtype), X).argmax(-1) != y
    wanted = [int(found[part::20].sum()) for part in range(20)]
    assert mistakes(scenario, theta, (X, y)).tolist() == wanted and sum(wanted) > 0


def test_figures_are_tried_with_numbers_of_their_own(tmp_path: Path) -> None:
    figures = "figures=[[columns,attack.budget,validation_loss]]"
    cells = grid("dataset=digits_01", "engine=batched", "attack.budget=0.1,0.5", figures, f"out={tmp_path}/out")
    scenarios = engine.make_scenarios([cell.settings for cell in cells])
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr] # noqa: NPY002
    with pytest.raises(InputError, match=r"^figures=\[\[columns,attack\.budget,validation_loss\]\]: "):
        multirun._check_figures(cells, scenarios)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002
    one = random_numbers(scenarios[0], np.random.default_rng(0))
    accuracy = one.table[:, COLUMNS.index("test_accuracy")]
    assert len({*accuracy}) == 2 and (accuracy >= 0.2).all() and (accuracy <= 0.8).all()
    assert one.table[:, 0].tolist() == [0, scenarios[0].settings.rounds] and not one.error
    assert np.isnan(one.table[:, COLUMNS.index("validation_loss")]).all()
    early = random_numbers(scenario_of("early_stop.patience=2"), np.random.default_rng(0))
    assert np.isfinite(early.table).all()


@pytest.mark.parametrize(
    ("cells", "lost", "asked", "used"),
    [(199, 0, None, 1), (200, 0, None, 6), (200, 0, 1, 1), (2, 1, 3, 3), (2, 2, 3, None)],
)
def test_figures_of_many_cells_are_drawn_in_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cells: int, lost: int, asked: int | None, used: int | None
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(multirun, "broken_off", lambda out: (cells, lost))
    monkeypatch.setattr(multirun.workers, "processors", lambda: 6)
    monkeypatch.setattr(multirun.plots, "all_of_sweep", lambda out, mapped: drawn.append(mapped))
    monkeypatch.setattr(multirun.plots, "draw", lambda out, *figure: drawn.append(figure))
    figures = ["figures=[[heatmap],[columns,a,b]]", *([] if asked is None else [f"workers={asked}"])]
    multirun._draw_all(tmp_path, compose("out=x", *figures))
    if used is None:
        assert drawn == []
        return
    mapped, *others = drawn
    assert others == [("heatmap",), ("columns", "a", "b")]
    assert mapped is map if used == 1 else mapped.keywords == {"workers": used}
