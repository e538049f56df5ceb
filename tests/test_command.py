"""The command as a user types it: what it leaves behind, and what it says to what can't be."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import replay
import yaml

from fl_attack import experiment, results
from fl_attack.config import Settings, compose
from fl_attack.data import load
from fl_attack.errors import InputError
from fl_attack.federation.session import ray_session
from fl_attack.overrides import explain
from fl_attack.results import FILES

Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray is running, and starting one fails the test."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "rounds.csv").open() as lines:
        return list(csv.DictReader(lines))


BAD = {
    "foo=1": "foo is not a known key",
    "attack.budgt=1": "attack.budgt is not a known key",
    "+attack.budgt=1": "attack.budgt is not a known key",
    "attack=gredy": "attack=gredy is not known; known: alie, confidence_flip",
    "dataset=mnsit": "dataset=mnsit is not known; known: cifar10, ",
    "rounds=0": "rounds=0 is not allowed: it must be at least 1",
    "rounds=many": "rounds=many is not allowed: it must be a whole number",
    "batch_size=all": "batch_size=all is not allowed: it must be a whole number or 'full'",
    "attack.budget=1.5": "attack.budget=1.5 is not allowed: it must be at most 1",
    "attack.budget=-0.1": "attack.budget=-0.1 is not allowed: it must be at least 0",
    "attack.goal=best": "attack.goal=best is not allowed: it must be 'untargeted' or 'targeted'",
    "attack.stop=0": "attack.stop=0 is not allowed",
    "lr=nan": "lr=nan is not allowed: it must be a finite number",
    "lr=-1": "lr=-1 is not allowed: it must be greater than 0",
    "seed=-1": "seed=-1 is not allowed",
    "clients.total=2": "clients.malicious=3 is more than total=2 clients",
    "clients.malicious=-1": "clients.malicious=-1 is not allowed",
    "clients.honest=7 clients.total=5": "don't add up to total=5",
    "clients=3": "clients=3 is not allowed: it must be keys with values",
    "early_stop=3": "early_stop=3 is not allowed: it must be keys with values",
    "rounds=null": "rounds=null is not allowed: it must be a whole number",
    "clients.honest=0 clients.malicious=0": "leave no client",
    "clients.total=2000": "2000 clients",
    "batch_size=100000": "batch_size=100000 is more than the 1437 training samples",
    "batch_size=9": "batch_size=9 .*use at least 10",
    "dataset.classes=[1,12]": "12",
    "dataset.classes=[1]": "classes",
    "dataset=npz": "path",
    "dataset=npz dataset.path=nowhere.npz": r"nowhere\.npz",
    "dataset=image_folder dataset.path=nowhere": "nowhere",
    "partition=dirichlet partition.alpha=0": "partition.alpha=0 is not allowed: it must be greater than 0",
    "partition.malicious_share=0.5 clients.malicious=0": "needs a malicious and an honest client",
    "attack=none attack.budget=0.5": "attack.budget is not a known key",
    "attack.goal=targeted attack.knowledge=own": "attack.knowledge=own has no meaning with goal=targeted",
    "attack.target_path=mine.npz": "attack.target_path has no meaning with goal=untargeted",
    "attack.goal=targeted attack.target_path=mine.npz": "mine.npz can't be read as a target",
    "attack.knowledge=honest clients.honest=0": "needs honest clients",
    "attack.start=5 attack.stop=4": "attack.stop=4 is before start=5",
    "strategy=flower": "strategy.path is missing",
    "strategy=flower strategy.path=flwr.nothing": "can't be imported",
    "strategy=flower strategy.path=flwr.serverapp.strategy.FedAvg strategy.args.x=1": "does not take",
    "strategy=flower strategy.path=flwr.serverapp.strategy.FedAvg server_optimizer=adam": "is not applied",
    "engine.grid=fast": "engine.grid=fast is not allowed: it must be 'block' or 'stock'",
    "engine=batched engine.device=cuda:99": r"engine\.device=cuda:99 is not there",
    "engine=batched engine.device=tpu": "engine.device=tpu is not allowed",
    "engine=batched engine.memory_gb=0": "engine.memory_gb=0 is not allowed: it must be greater than 0",
    "engine.actors=0": "engine.actors=0 is not allowed",
    "clients.malicious=[1": r"clients\.malicious=\[1 can't be read; quote values",
    "dataset.root=~/data": r"dataset\.root=~/data can't be read; quote values",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_ray_starts(
    command: Command, refused_ray: None, tmp_path: Path, overrides: str
) -> None:
    import re

    out = [] if "out=" in overrides else [f"out={tmp_path}/out"]
    code, printed, stderr = command(*out, *overrides.split())
    assert code == 2
    assert printed == ""
    assert stderr.count("\n") == 1
    assert re.match(f"fl-attack: .*{BAD[overrides]}", stderr)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_that_can_not_be_written_is_told(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, stderr = command(f"out={tmp_path}/file/run")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "can't be written to" in stderr


def test_help_names_groups_keys_and_examples(command: Command) -> None:
    code, printed, _ = command("--help")
    assert code == 0
    for piece in (
        "attack: alie, confidence_flip, ",
        "experiment: arms_race, ",
        "clients.honest",
        "attack.budget",
        "engine.grid",
        "selection: gain",
    ):
        assert piece in printed
    assert printed.count("\n  fl-attack ") >= 5


@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_run_can_be_replayed_from_what_it_leaves_by_another_program(
    command: Command, small_data: Small, shared_ray: None, tmp_path: Path, classes: int, goal: str
) -> None:
    data = small_data(classes)
    out = tmp_path / "out"
    code, printed, stderr = command(
        *data, f"out={out}", "batch_size=full", "rounds=15", f"attack.goal={goal}", "attack.budget=0.3", "lr=0.5"
    )
    assert code == 0
    assert "attacked" in printed
    assert "Traceback" not in stderr
    assert "attacked: round 15 of 15" in stderr  # plain lines where there is no terminal
    with np.load(data[1].removeprefix("dataset.path=")) as stored:
        theta, flips = replay.replay(out, stored["x_train"], stored["y_train"])
    with np.load(out / "model.npz") as stored:
        np.testing.assert_allclose(stored["theta"], theta, rtol=1e-3, atol=1e-6)
    assert replay.made_flips(out, 15) == flips
    assert sum(map(len, flips)) > 0
    expected = {*FILES, "baseline", "report.html"} - {
        "plan.csv",
        "plan.png",
        *({"target.npz"} if goal == "untargeted" else set()),
    }
    assert {file.name for file in out.iterdir()} == expected
    honest = rows(out / "baseline")
    attacked = rows(out)
    assert [int(row["round"]) for row in attacked] == list(range(16))
    assert [len(f) for f in flips] == [int(row["flips"]) for row in attacked[1:]]
    assert all(float(row["cosine"]) == pytest.approx(1, abs=1e-5) for row in honest[1:])
    assert all(float(row["cosine"]) < 0.99999 for row in attacked[1:])
    assert all(int(row["flips"]) <= int(row["allowed"]) for row in attacked)
    again = [len(set(a) & set(b)) / max(1, len(b)) for a, b in zip([{}, *flips], flips, strict=False)]
    assert [float(row["repeated"]) for row in attacked[1:]] == pytest.approx(again)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["write_access"] == pytest.approx(36 / 120)
    assert summary["global_budget"] == pytest.approx(0.3 * 36 / 120)
    assert summary["flips_per_round"] == pytest.approx(np.mean([len(f) for f in flips]))
    assert summary["minimum_accuracy"] == min(float(row["test_accuracy"]) for row in attacked[1:])
    assert summary["final_accuracy"] == float(attacked[-1]["test_accuracy"])


@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_the_batched_engine_leaves_the_same_artefacts_without_ray(
    command: Command, small_data: Small, refused_ray: None, tmp_path: Path, goal: str
) -> None:
    data, out = small_data(3), tmp_path / "out"
    run = ["engine=batched", "batch_size=full", "rounds=15", f"attack.goal={goal}", "attack.budget=0.3", "lr=0.5"]
    assert command(*data, *run, f"out={out}")[0] == 0
    with np.load(data[1].removeprefix("dataset.path=")) as stored:
        theta, flips = replay.replay(out, stored["x_train"], stored["y_train"])
    with np.load(out / "model.npz") as stored:
        np.testing.assert_allclose(stored["theta"], theta, rtol=1e-3, atol=1e-6)
    assert replay.made_flips(out, 15) == flips
    expected = {*FILES, "baseline", "report.html"} - {
        "plan.csv",
        "plan.png",
        *({"target.npz"} if goal == "untargeted" else set()),
    }
    assert {file.name for file in out.iterdir()} == expected
    assert all(float(row["cosine"]) < 0.99999 for row in rows(out)[1:])


def test_the_default_shows_harm_plainly_and_the_same_command_gives_the_same_bytes(
    command: Command, shared_ray: None, tmp_path: Path
) -> None:
    files = {}
    for name, extra in {"first": [], "again": ["engine.actors=3"]}.items():
        code, _, _ = command(f"out={tmp_path}/{name}", *extra)
        assert code == 0
        files[name] = [(tmp_path / name / file).read_bytes() for file in ("model.npz", "flips.npz", "rounds.csv")]
    assert files["first"] == files["again"]
    attacked, honest = (
        json.loads((tmp_path / "first" / folder / "summary.json").read_text()) for folder in ("", "baseline")
    )
    assert honest["final_accuracy"] > 0.85
    assert attacked["final_accuracy"] < honest["final_accuracy"] - 0.2


def test_a_finished_run_is_not_replaced_unless_asked_to(
    command: Command, small_data: Small, shared_ray: None, tmp_path: Path
) -> None:
    run = [*small_data(2), f"out={tmp_path}/out", "rounds=2", "batch_size=full", "baseline=false"]
    assert command(*run)[0] == 0
    before = (tmp_path / "out" / "model.npz").read_bytes()
    code, _, stderr = command(*run, "lr=0.2")
    assert code == 2
    assert "holds a finished run; use another folder or overwrite=true" in stderr
    assert (tmp_path / "out" / "model.npz").read_bytes() == before
    (tmp_path / "out" / "mine.txt").write_text("notes")
    assert command(*run, "lr=0.2", "overwrite=true")[0] == 0
    assert (tmp_path / "out" / "model.npz").read_bytes() != before
    assert (tmp_path / "out" / "mine.txt").exists()


def test_evaluation_is_thinned_and_ends_with_the_last_round(
    command: Command, small_data: Small, shared_ray: None, tmp_path: Path
) -> None:
    run = [*small_data(3), f"out={tmp_path}/out", "rounds=8", "eval_every=3", "batch_size=full", "attack=none"]
    assert command(*run)[0] == 0
    assert [row["round"] for row in rows(tmp_path / "out")] == ["0", "3", "6", "8"]
    assert not (tmp_path / "out" / "baseline").exists()  # nothing to compare with itself
    assert len(np.load(tmp_path / "out" / "flips.npz")["round"]) == 0


def test_a_diverging_run_says_so_and_keeps_what_it_has(
    command: Command, small_data: Small, shared_ray: None, tmp_path: Path
) -> None:
    run = [*small_data(3), f"out={tmp_path}/out", "rounds=8", "lr=1e308", "batch_size=full", "baseline=false"]
    code, _, stderr = command(*run)
    assert code == 1
    assert "diverged" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"rounds.csv", "model.npz", "flips.npz", "partition.npz", "config.yaml"} <= kept
    assert "summary.json" not in kept
    assert len(rows(tmp_path / "out")) >= 1


def test_a_diverging_batched_run_keeps_what_it_and_its_twin_have(
    command: Command, small_data: Small, tmp_path: Path
) -> None:
    run = [*small_data(3), "engine=batched", f"out={tmp_path}/out", "rounds=8", "lr=1e308", "batch_size=full"]
    code, _, stderr = command(*run)
    assert code == 1
    assert "diverged" in stderr.splitlines()[-1] and "Traceback" not in stderr
    for folder in (tmp_path / "out", tmp_path / "out" / "baseline"):
        assert len(rows(folder)) >= 1
        assert not (folder / "summary.json").exists()


def test_the_settings_left_behind_run_again(small_data: Small, shared_ray: None, tmp_path: Path) -> None:
    settings = compose(*small_data(2), f"out={tmp_path}/out", "rounds=3", "batch_size=full", "clients.total=5")
    experiment.run(settings)
    left = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert left["clients"] == {"honest": 2, "malicious": 3, "total": 5, "per_round": None}
    assert left["dataset"]["scale"] == 1.0
    again = Settings.model_validate(left | {"out": f"{tmp_path}/again"})
    experiment.run(again)
    assert (tmp_path / "out" / "model.npz").read_bytes() == (tmp_path / "again" / "model.npz").read_bytes()


@pytest.mark.parametrize(
    ("dataset", "rounds", "goal"),
    [
        ("mnist_01", 40, "untargeted"),
        ("mnist_01", 40, "targeted"),
        ("mnist", 8, "untargeted"),
        ("mnist", 8, "targeted"),
    ],
)
def test_mnist_at_full_batch_is_replayed_to_a_thousandth(
    command: Command, shared_ray: None, mnist_root: str, tmp_path: Path, dataset: str, rounds: int, goal: str
) -> None:
    out = tmp_path / "out"
    code, _, _ = command(
        *(f"dataset={dataset}", f"dataset.root={mnist_root}", "batch_size=full", f"rounds={rounds}"),
        *("clients.honest=7", "clients.malicious=3", "attack.budget=0.3", f"attack.goal={goal}"),
        *("baseline=false", f"out={out}"),
    )
    assert code == 0
    data = load("mnist", root=mnist_root, classes=[0, 1] if dataset == "mnist_01" else None)
    theta, flips = replay.replay(out, np.asarray(data.x_train, np.float64), data.y_train)
    with np.load(out / "model.npz") as stored:
        error = np.abs(stored["theta"] - theta).max() / np.abs(theta).max()
    assert error < 1e-3
    assert replay.made_flips(out, rounds) == flips


@pytest.mark.ray
def test_ctrl_c_ends_the_run_in_one_line_and_keeps_its_rounds(small_data: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [*small_data(2), f"out={out}", "rounds=1000000", "eval_every=10", "batch_size=full", "baseline=false"]
    process = subprocess.Popen([sys.executable, "-m", "fl_attack", *run], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("rounds.csv")) and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert len(rows(out)) > 1


def test_errors_of_other_libraries_become_one_line() -> None:
    assert explain(InputError("one\n  two")) == "one two"
    assert "\n" not in explain(ValueError("a\nb"))


def test_what_nobody_expected_is_one_line_too(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(experiment, "run", broken)
    code, _, stderr = command(f"out={tmp_path}/out")
    assert code == 1
    assert stderr == "fl-attack: ZeroDivisionError: a b (HYDRA_FULL_ERROR=1 shows where)\n"


def test_a_running_ray_is_left_running(shared_ray: None) -> None:
    with ray_session(None, verbose=False):
        pass
    assert ray.is_initialized()
    assert os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


def test_a_key_may_refer_to_another(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(experiment, "run", lambda settings: asked.append(settings) or {})
    monkeypatch.setattr(results, "table", lambda summaries: "its table")
    code, printed, _ = command("rounds=7", "eval_every=${rounds}", f"out={tmp_path}/out")
    assert code == 0 and (asked[0].rounds, asked[0].eval_every) == (7, 7)
    assert printed == f"its table\nresults in {tmp_path}/out\n" and not (tmp_path / "out").exists()
