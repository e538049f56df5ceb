"""Functions of users: what they get is their own, and what they give is checked, alike in both engines."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_attack import scenario
from fl_attack.config import compose
from fl_attack.engine import Outcome, sequential


def run_alone(cell: scenario.Scenario) -> Outcome:
    """One experiment, client by client."""
    return sequential.run(cell, client_by_client=True)


Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]
MINE = """
import sys
import torch
from fl_attack.attack import Proposal, Updates, View

def turned(view: Updates):
    return -view.updates

def turned_in_place(view: Updates):
    return view.updates.neg_()

def next_class(view: View):
    return Proposal((view.y + 1) % view.logits.shape[-1], view.noise[:, 0])

def next_class_in_place(view: View):
    made = Proposal((view.y + 1) % view.logits.shape[-1], view.noise[:, 0].clone())
    for part in (view.y, view.w, view.noise, view.logits, view.scores):
        part.zero_()
    return made

def average(updates, weights, f):
    return updates.mean(-3)

def average_in_place(updates, weights, f):
    made = updates.mean(-3)
    updates.zero_()
    weights.zero_()
    return made

def below(view: View):
    return Proposal(torch.full_like(view.y, -1), view.noise[:, 0])

def above(view: View):
    return Proposal(view.y + 1, view.noise[:, 0])

def fractions(view: View):
    return Proposal(view.y * 0.5, view.noise[:, 0])

def too_few(view: View):
    return Proposal(view.y[1:], view.noise[1:, 0])

def wanted_nan(view: View):
    return Proposal(1 - view.y.clamp(max=1), view.noise[:, 0] * float("nan"))

def nothing(view: View):
    return None

def one_row(view: Updates):
    return view.updates[..., :1, :, :]

def imaginary(view: Updates):
    return view.updates * 1j

def sent_nan(view: Updates):
    return view.updates * float("nan")

def leaves(view: View):
    sys.exit(0)

def fails(view: Updates):
    return {}["missing"]

def rule_nan(updates, weights, f):
    return updates.mean(-3) * float("nan")

def rule_shape(updates, weights, f):
    return updates

def rule_leaves(updates, weights, f):
    sys.exit(0)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize(
    ("key", "name"),
    [("attack.name", "turned"), ("attack.name", "next_class"), ("strategy.name", "average")],
)
def test_what_a_function_writes_into_its_input_changes_nothing(
    command: Command, small_data: Small, tmp_path: Path, mine: str, key: str, name: str
) -> None:
    run = [*small_data(3), "engine=batched", "rounds=6", "batch_size=30", "attack.budget=0.5"]
    for which in (name, f"{name}_in_place"):
        assert command(*run, f"{key}={mine}:{which}", f"out={tmp_path}/{which}")[0] == 0
    for file in ("model.npz", "flips.npz", "rounds.csv"):
        assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}_in_place" / file).read_bytes()
    alone = [run_alone(scenario.make(compose(*run, f"{key}={mine}:{which}"))) for which in (name, f"{name}_in_place")]
    np.testing.assert_array_equal(alone[0].theta, alone[1].theta)
    assert alone[0].flip_count == alone[1].flip_count


WRONG = {
    "attack.name=below": r"gave the label -1; wanted: 0 to 2",
    "attack.name=above": r"gave the label 3; wanted: 0 to 2",
    "attack.name=fractions": r"gave labels of shape \(.*\), float32; wanted: whole numbers",
    "attack.name=too_few": r"gave labels of shape \(.*\), int64; wanted: one for each of \d+ samples",
    "attack.name=wanted_nan": "gave a priority of NaN; wanted: real numbers",
    "attack.name=nothing": r"gave NoneType; wanted: Proposal\(labels, priority\)",
    "attack.name=one_row": r"gave shape \(.*1, 3, 7\), float\d\d; wanted: an update for each client",
    "attack.name=imaginary": r"gave shape \(.*\), complex\d+; wanted: real numbers",
    "attack.name=sent_nan": "gave NaN; wanted: real numbers",
    "attack.name=leaves": r"raised sys.exit\(0\) in line",
    "attack.name=fails": r"raised KeyError: 'missing' in line \d+",
    "strategy.name=rule_nan": r"gave NaN or infinity; wanted: an aggregate of shape \(.*3, \d+\)",
    "strategy.name=rule_shape": r"gave shape \(.*\), float\d\d; wanted: an aggregate",
    "strategy.name=rule_leaves": r"raised sys.exit\(0\) in line",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_a_function_gives_is_checked_alike_in_both_engines(
    command: Command, small_data: Small, tmp_path: Path, mine: str, given: str
) -> None:
    key, name = given.split("=")
    run = [*small_data(3), "rounds=3", "batch_size=30", "attack.budget=0.5", f"{key}={mine}:{name}"]
    line = MINE[: MINE.index(f"def {name}(")].count("\n") + 1
    said = rf"mine\.py:{name} \(.*mine\.py:{line}\) {WRONG[given]}"
    for more in ([], ["-m", "seed=0,1"]):
        code, _, stderr = command(*more[:1], *run, "engine=batched", f"out={tmp_path}/o", *more[1:], "overwrite=true")
        assert code == 1
        assert re.search(f"fl-attack: {said}", stderr.splitlines()[-1])
        assert not (tmp_path / "o" / "summary.json").exists() and not (tmp_path / "o" / "sweep.csv").exists()
    error = run_alone(scenario.make(compose(*run))).error  # as the clients and the server of engine=flower do it
    assert error is not None and re.search(said, error)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["attack.name=leaves", "strategy.name=rule_leaves", "attack.name=below"])
def test_a_wrong_function_ends_a_federation_in_one_line(
    command: Command, small_data: Small, tmp_path: Path, mine: str, given: str
) -> None:
    key, name = given.split("=")
    run = [*small_data(3), "rounds=3", "batch_size=30", "attack.budget=0.5", f"{key}={mine}:{name}", "baseline=false"]
    code, _, stderr = command(*run, f"out={tmp_path}/o")
    assert code == 1
    assert re.search(rf"fl-attack: .*mine\.py:{name} \(.*{WRONG[given]}", stderr.splitlines()[-1])


def test_a_file_that_leaves_as_it_is_imported_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    code, _, stderr = command(f"attack.name={tmp_path}/leaves.py:attack", f"out={tmp_path}/o")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "can't be imported: SystemExit" in stderr


@pytest.mark.parametrize(
    ("given", "message"),
    {
        "attack=static_flip attack.args.map=nonsense": "map=nonsense is not allowed; it must be opposite or cyclic",
        "attack=static_flip attack.args.source=1": "source and target go together",
        "attack=static_flip attack.args.source=1 attack.args.target=99": "two different labels from 0 to 9",
        "attack=ipm attack.args.epsilon=abc": "args.epsilon=abc is not allowed; it must be a number",
        "attack=gaussian attack.args.sigma=-1": "sigma=-1 is not allowed; it must be 0 or more",
        "attack=alie attack.args.z=[1]": "args.z=.* is not allowed; it must be a number or null",
        "attack=confidence_flip attack.args.certain=maybe": "must be most or least",
        "strategy.name=MINE:average strategy.args.x=1": "unexpected keyword argument 'x'",
    }.items(),
)
@pytest.mark.parametrize("engine", ["batched", "flower"])
def test_arguments_are_checked_before_anything_starts(
    command: Command, tmp_path: Path, mine: str, given: str, message: str, engine: str
) -> None:
    code, _, stderr = command(f"engine={engine}", *given.replace("MINE", mine).split(), f"out={tmp_path}/o")
    assert (code, stderr.count("\n")) == (2, 1)
    assert re.search(message, stderr)
    assert not (tmp_path / "o").exists()


def test_the_rule_is_named_where_it_is_what_breaks(small_data: Small) -> None:
    run = [*small_data(3), "rounds=3", "batch_size=30", "lr=1e308"]
    error = run_alone(scenario.make(compose(*run))).error
    assert error is not None and "a smaller lr" in error
    sent = ["attack=sign_flip", "attack.args.scale=inf"]
    error = run_alone(scenario.make(compose(*run, *sent, "lr=0.1"))).error
    assert error is not None and "a smaller lr" not in error
    assert "attack=sign_flip sent values that are not finite in round 1 of 3" in error
