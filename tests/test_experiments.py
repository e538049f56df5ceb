"""The experiments of one command each: they compose, run small, and leave their figures and tables."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_attack.config import compose
from fl_attack.overrides import as_multirun, conf_folder

EXPERIMENTS = sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))
Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]
LEFT = {
    "defences": ["matrix.png", "matrix.csv"],
    "harm": ["harm.png", "harm.csv"],
    "noniid": ["columns_partition-alpha_drop_strategy-name.png"],
    "recovery": ["rounds.png", "columns_attack-name_rounds_to_recover_attack-stop.png"],
    "knowledge": ["columns_attack-budget_final_accuracy_attack-knowledge.png"],
    "detectability": ["columns_attack-name_norm_auc.png", "columns_attack-name_cosine_auc.png"],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_for_the_batched_engine(name: str) -> None:
    assert compose(f"experiment={name}", "out=unused").engine.name == "batched"


def test_an_experiment_is_a_multirun_by_itself() -> None:
    assert as_multirun(["experiment=harm", "rounds=3"]) == ["-m", "experiment=harm", "rounds=3"]
    assert as_multirun(["-m", "experiment=harm"]) == ["-m", "experiment=harm"]
    assert as_multirun(["rounds=3"]) == ["rounds=3"]


@pytest.mark.parametrize("pairs", ["10+0.1,5+0.2", "'10+0.1, 5+0.2'"])
def test_keys_joined_by_a_plus_are_set_together(command: Command, tmp_path: Path, pairs: str) -> None:
    small = ["dataset=digits_01", "engine=batched", "clients.total=10", "rounds=2", "figures=[]", "report=false"]
    code, _, stderr = command(*small, f"clients.malicious+attack.budget={pairs}", "seed=0,1", f"out={tmp_path}/out")
    assert code == 0, stderr
    with (tmp_path / "out" / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    found = [(row["clients.malicious"], row["attack.budget"], row["seed"]) for row in rows]
    assert sorted(found) == [("10", "0.1", "0"), ("10", "0.1", "1"), ("5", "0.2", "0"), ("5", "0.2", "1")]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("clients.malicious+attack.budget=10+0.1,5", "5 is not 2 values joined by +"),
        ("lr=[", "lr=[ can't be read"),
    ],
)
def test_the_word_to_blame_is_named(command: Command, override: str, line: str) -> None:
    code, _, stderr = command("-m", override)
    assert code == 2
    assert line in stderr


@pytest.mark.parametrize("name", LEFT)
def test_an_experiment_leaves_its_figures_and_tables(
    command: Command, small_data: Small, tmp_path: Path, name: str
) -> None:
    seeds = "0" if name == "defences" else "0,1"  # it has a cell for each rule and attack
    run = ["rounds=6", "eval_every=2", "batch_size=90", f"seed={seeds}", f"out={tmp_path}/out"]
    small = [*small_data(3, train=300), *run]
    if name == "recovery":
        small += ["attack.start=3", "attack.stop=3,4"]
    code, _, stderr = command(f"experiment={name}", *small)
    assert code == 0, stderr
    assert {"sweep.csv", *LEFT[name]} <= {file.name for file in (tmp_path / "out").iterdir()}
    with (tmp_path / "out" / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert not [row["error"] for row in rows if row["error"]]
    if name in ("noniid", "harm"):
        alike = {
            tuple(row[key] for key in row if key.startswith(("partition", "strategy", "clients", "seed"))): row
            for row in rows
            if row["attack.name"] == "none"
        }
        for row in rows:
            twin = alike[tuple(row[key] for key in row if key.startswith(("partition", "strategy", "clients", "seed")))]
            if row["attack.name"] != "none":
                expected = float(twin["final_accuracy"]) - float(row["final_accuracy"])
                assert float(row["drop"]) == pytest.approx(expected, abs=1e-8)
    if name == "recovery":
        assert any(row["rounds_to_recover"] for row in rows)
    if name == "detectability":
        assert all(0 <= float(row["norm_auc"]) <= 1 for row in rows)


def test_rules_and_attacks_of_ones_own_appear_in_the_comparison(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from fl_attack.attack import Proposal, View\n\n\n"
        "def zeros(view: View) -> Proposal:\n    return Proposal(view.y * 0, view.noise[:, 0])\n\n\n"
        "def first(updates, weights, f):\n    return updates[..., 0, :, :]\n"
    )
    monkeypatch.chdir(tmp_path)
    small = [*small_data(3, train=300), "rounds=3", "batch_size=90", "seed=0", f"out={tmp_path}/out"]
    names = ["attack.name=none,greedy,mine.zeros", "strategy.name=mean,median,mine:first"]
    code, _, stderr = command("experiment=defences", *small, *names)
    assert code == 0, stderr
    with (tmp_path / "out" / "matrix.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["attack.name"] for row in rows} == {"none", "greedy", "mine.zeros"}
    assert {row["strategy.name"] for row in rows} == {"mean", "median", "mine:first"}
    assert sum(int(row["worst"]) for row in rows) == 3
    assert not [name for name in sys.modules if name == "mine"]  # loaded by its file, not left among modules
