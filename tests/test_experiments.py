"""The experiments of one command each: they compose, run small, and leave their figures and tables."""

import copy
import csv
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fl_attack import experiment, folder, results, scenario
from fl_attack.config import (
    AttackSettings,
    Settings,
    StrategySettings,
    compose,
    from_yaml,
    leaves_of,
    overrides_of,
    settings_from,
    to_yaml,
    without_effect,
)
from fl_attack.errors import InputError, Interrupted, RunError
from fl_attack.history import COLUMNS, History, Recorder
from fl_attack.overrides import as_multirun, conf_folder
from fl_attack.scenario import Scenario

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


def test_joined_keys_take_the_place_of_each_in_the_grid_of_an_experiment(command: Command, tmp_path: Path) -> None:
    joined = "strategy.name+sanitize.name=mean+none,mean+knn,median+none"
    small = ["rounds=2", "seed=0", "attack.name=none,greedy", "figures=[]", "report=false", f"out={tmp_path}/out"]
    code, _, stderr = command("experiment=defences", joined, *small)
    assert code == 0, stderr
    with (tmp_path / "out" / "sweep.csv").open() as lines:
        found = [(row["strategy.name"], row["sanitize.name"], row["attack.name"]) for row in csv.DictReader(lines)]
    pairs = [("mean", "none"), ("mean", "knn"), ("median", "none")]
    assert sorted(found) == sorted((*pair, attack) for pair in pairs for attack in ("none", "greedy"))


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


# --- settings, and the pieces that a run is put together from ----------------------------------------


PLAIN = compose("attack=greedy", "out=unused").model_dump(mode="json")


def changed(*path: str, to: object) -> Settings:
    """Checked settings of which one is another; None among the keys is a group that is no dict."""
    tree = copy.deepcopy(PLAIN)
    group = tree
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = to
    return settings_from(tree)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("clients",), {"malicious": 2, "total": 5, "per_round": 6}, "clients.per_round=6 is more than the 5 clients"),
        (("clients",), {"malicious": 6, "total": 5}, "clients.malicious=6 is more than total=5 clients"),
        (("clients",), {"malicious": 2, "total": 5, "honest": 4}, "don't add up to total=5"),
        (("clients",), {"malicious": 0, "honest": 0}, "leave no client; use at least one"),
        (("clients",), 3, "clients=3 is not allowed: it must be keys with values"),
        (("clients",), {"honest": 7}, "clients.malicious is missing"),
        (
            ("clients",),
            {"malicious": "many", "honest": 3, "total": 4},
            "clients.malicious=many is not allowed: it must be a whole number",
        ),
        (("attack",), "greedy", "attack=greedy is not allowed: it must be keys with values"),
        (("attack",), {"goal": "targeted"}, "attack.name is missing"),
        (
            ("attack",),
            {"name": "greedy", "goal": "targeted", "direction": "gradient"},
            "attack.goal=targeted contradicts direction=gradient; leave one out",
        ),
        (
            ("attack",),
            {"name": "planned", "adapt": "rule"},
            "attack.adapt=rule has no meaning with name=planned; leave it out",
        ),
        (("attack",), {"name": "greedy", "start": 5, "stop": 4}, "attack.stop=4 is before start=5"),
        (("rounds",), None, "rounds=null is not allowed: it must be a whole number"),
        (("out",), "", "out= is not allowed: it must be a text that is not empty"),
        (("engine", "device"), "gpu", "engine.device=gpu is not allowed: it must be cpu, cuda, or cuda: and a number"),
        (("tracker",), 3, "tracker=3 is not allowed: it must be a list, as in [0,1]"),
        (("baseline",), "perhaps", "baseline=perhaps is not allowed: it must be true or false"),
        (("clients", "malicous"), 3, "clients.malicous is not a known key"),
    ],
)
def test_a_mistake_in_nested_settings_is_told_in_one_line(path: tuple[str, ...], to: object, message: str) -> None:
    with pytest.raises(InputError) as raised:
        changed(*path, to=to)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_settings_in_a_text_that_is_no_yaml_are_refused() -> None:
    with pytest.raises(InputError, match=r"^these are no settings: "):
        from_yaml("a: [1")
    with pytest.raises(InputError, match=r"is missing$"):
        from_yaml("rounds: 3")
    settings = changed("rounds", to=9)
    assert from_yaml(to_yaml(settings)) == settings
    threat = AttackSettings(name="mine.attack", args={"file": Path("here"), "sizes": (1, 2)})
    text = to_yaml(settings.model_copy(update={"attack": threat}))
    assert "    file: here\n    sizes:\n    - 1\n    - 2\n" in text  # of plain values, whatever Python was given


@pytest.mark.parametrize(
    ("clients", "f", "per_round", "assumed"),
    [
        ({"total": 10, "malicious": 3}, None, None, 3),
        ({"total": 10, "malicious": 3}, 1, None, 1),
        ({"total": 10, "malicious": 3}, 0, None, 0),
        ({"total": 10, "malicious": 3, "per_round": 10}, None, None, 3),
        ({"total": 10, "malicious": 3, "per_round": 4}, None, 4, 2),  # 1.2 on average
        ({"total": 10, "malicious": 3, "per_round": 0.36}, None, 4, 2),
        ({"total": 10, "malicious": 0, "per_round": 4}, None, 4, 0),
        ({"total": 10, "malicious": 10, "per_round": 0.01}, None, 1, 1),
        ({"total": 10, "malicious": 3, "per_round": 1.0}, None, None, 3),
        ({"malicious": 3}, None, None, 3),
    ],
)
def test_who_takes_part_and_how_many_of_them_a_rule_expects(
    clients: dict[str, object], f: int | None, per_round: int | None, assumed: int
) -> None:
    settings = changed("clients", to=clients).model_copy(update={"strategy": StrategySettings(name="median", f=f)})
    assert (settings.per_round, settings.assumed_malicious) == (per_round, assumed)
    assert settings.clients.honest + settings.clients.malicious == settings.clients.total
    assert "total" in clients or settings.clients.total == 10


def test_what_attacks_and_what_does_not() -> None:
    def of(name: str, budget: float, malicious: int = 3) -> tuple[bool, bool, float]:
        settings = changed("clients", to={"total": 10, "malicious": malicious}).model_copy(
            update={"attack": AttackSettings(name=name, budget=budget)}
        )
        return settings.attacked, settings.is_unattacked, settings.label_budget

    assert of("greedy", 0.25) == (True, False, 0.25)
    assert of("greedy", 0.0) == (True, True, 0.0)
    assert of("greedy", 0.25, malicious=0) == (False, True, 0.0)
    assert of("none", 0.25) == (False, True, 0.0)
    assert of("sign_flip", 0.0) == (True, False, 0.0)  # it needs no budget
    assert of("sign_flip", 0.5) == (True, False, 0.0)
    twin = changed("attack", to={"name": "sign_flip"}).unattacked()
    assert not twin.attacked and not twin.baseline and twin.clients.malicious == PLAIN["clients"]["malicious"]
    assert AttackSettings(name="none").writes == AttackSettings(name="greedy").writes == "labels"
    assert [AttackSettings(name="greedy", memory=memory).remembers for memory in ("forget", "persist")] == [False, True]
    assert not AttackSettings(name="sign_flip", memory="persist").remembers
    steers = {
        "planned": AttackSettings(name="planned").steers,
        "greedy": AttackSettings(name="greedy").steers,
        "greedy to a target": AttackSettings(name="greedy", goal="targeted").steers,
        "greedy far off": AttackSettings(name="greedy", direction="target_far").steers,
        "sign_flip": AttackSettings(name="sign_flip").steers,
    }
    assert [name for name, does in steers.items() if does] == ["planned", "greedy to a target", "greedy far off"]
    assert AttackSettings(name="greedy", direction="target") == AttackSettings(name="greedy", goal="targeted")
    assert AttackSettings(name="greedy", budget=0.29).exact_budget * 100 == 29
    trusted = {name: StrategySettings(name=name).trusted for name in ("mean", "fltrust")}
    assert trusted == {"mean": 0, "fltrust": 100} and StrategySettings(name="fltrust", root=7).trusted == 7
    assert StrategySettings(name="mean").averages and not StrategySettings(name="mean", pre=("nnm",)).averages
    assert not StrategySettings(name="median").averages


def test_rounds_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, now, saved = History(torch.zeros(1)), [100.0], list[tuple[object, float]]()
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(experiment.results, "write_rounds", lambda *what: saved.append((what, now[0])))
    seen: list[tuple[str, int]] = []
    observe = experiment.both(
        experiment.saver(tmp_path, history),
        experiment.both(lambda round_, row: seen.append(("a", round_)), lambda round_, row: seen.append(("b", round_))),
    )
    for second in (101, 110, 111, 112, 121, 122, 140):
        now[0] = float(second)
        observe(second, {})
    assert [when for _, when in saved] == [111, 122, 140]  # more than ten seconds after the last
    assert all(what == (tmp_path, history) for what, _ in saved)
    assert seen[:4] == [("a", 101), ("b", 101), ("a", 110), ("b", 110)]


def test_a_signal_waits_for_the_round_and_a_second_does_not() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with experiment._between_rounds() as signalled:
            assert signalled() == 0
            signal.raise_signal(number)
            assert signalled() == 128 + number
            with pytest.raises(Interrupted) as raised:
                signal.raise_signal(signal.SIGTERM)
            assert raised.value.code == 128 + signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def elsewhere() -> None:
        with experiment._between_rounds() as signalled:
            found.append(signalled())
            found.append(signal.getsignal(signal.SIGINT) is before[0])

    found: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [0, True]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], "nothing was measured yet"),
        (["rounds.csv"], "what was measured is in WORK; the same command begins anew"),
        (["baseline/rounds.csv"], "what was measured is in WORK; the same command begins anew"),
        (["rounds.csv", "checkpoint.npz"], "what was measured is in WORK; the same command goes on"),
        (["rounds.csv", "baseline/checkpoint.npz"], "what was measured is in WORK; the same command goes on"),
    ],
)
@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt(), 130), (Interrupted("", 143), 143)])
def test_an_interrupted_run_says_what_is_kept(
    tmp_path: Path, files: list[str], what: str, signalled: KeyboardInterrupt, code: int
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(Interrupted) as raised, experiment._explain_interruption(tmp_path):
        raise signalled
    assert str(raised.value) == f"interrupted; {what.replace('WORK', str(tmp_path))}"
    assert raised.value.code == code


def test_only_the_twin_of_an_attack_is_a_baseline() -> None:
    attacked = changed("clients", to={"total": 10, "malicious": 3})
    both = (attacked, attacked.unattacked())
    parts = {(name, one.attacked): experiment.part_of(name, one) for one in both for name in ("attacked", "honest")}
    assert parts == {
        ("attacked", True): "",
        ("honest", True): "baseline",
        ("attacked", False): "",
        ("honest", False): "",
    }


GREEDY, SIGNS = {"name": "greedy"}, {"name": "sign_flip"}
NO_EFFECT: dict[str, tuple[dict[str, object], str]] = {  # by the note: groups of settings, and why
    "attack.start=7": ({"rounds": 6, "attack": GREEDY | {"start": 7}}, "there are 6 rounds"),
    "attack.stop=7": ({"rounds": 6, "attack": GREEDY | {"stop": 7}}, "there are 6 rounds"),
    "attack.scope=per_client": ({"attack": SIGNS | {"scope": "per_client"}}, "attack=sign_flip flips no labels"),
    "attack.rounding=ceil": ({"attack": SIGNS | {"rounding": "ceil"}}, "attack=sign_flip flips no labels"),
    "attack.refresh=epoch": ({"attack": SIGNS | {"refresh": "epoch"}}, "attack=sign_flip flips no labels"),
    "attack.memory=persist": ({"attack": SIGNS | {"memory": "persist"}}, "attack=sign_flip flips no labels"),
    "attack.unflip=true": ({"attack": GREEDY | {"unflip": True}}, "attack.memory=forget keeps no flips"),
    "attack.rounding=carry": (
        {"attack": GREEDY | {"memory": "persist_total", "rounding": "carry"}},
        "the one budget of attack.memory=persist_total has no next round",
    ),
    "attack.knowledge_fraction=0.3": (
        {"attack": GREEDY | {"knowledge_fraction": 0.3}},
        "it is of attack.knowledge=noisy",
    ),
    "early_stop.restore=last": ({"early_stop": {"restore": "last"}}, "patience is not set"),
    "early_stop.share=0.2": ({"early_stop": {"share": 0.2}}, "patience is not set"),
    "strategy.root=7": ({"strategy": {"name": "median", "root": 7}}, "strategy=median asks for no trusted samples"),
    "sanitize.k=9": ({"sanitize": {"name": "confident", "k": 9}}, "it is of sanitize=knn"),
    "sanitize.share=0.6": ({"sanitize": {"name": "none", "share": 0.6}}, "it is of sanitize=knn"),
    "eval_every=7": ({"rounds": 6, "eval_every": 7}, "there are 6 rounds; the last is evaluated"),
    "figures": ({"figures": [["harm"]]}, "it is of a sweep (-m); a run draws its curves"),
    "launcher=ray": ({"launcher": "ray"}, "it is of a sweep (-m)"),
    "workers=2": ({"workers": 2}, "it is of a sweep (-m)"),
    "detectability=true": ({"detectability": True}, "it is of a sweep (-m); a run always measures it"),
    "dataset.path=here": ({"dataset": {"loader": "mnist", "path": "here"}}, "dataset.loader=mnist"),
    "dataset.root=here": ({"dataset": {"loader": "npz", "root": "here", "path": "x"}}, "dataset.loader=npz"),
}
EFFECTIVE: list[dict[str, object]] = [
    {"rounds": 6, "attack": GREEDY | {"start": 6, "stop": 6}, "eval_every": 6},
    {"rounds": 6, "attack": {"name": "none", "start": 7, "stop": 7}},
    {"attack": GREEDY | {"scope": "per_client", "rounding": "carry", "refresh": "epoch"}},
    {"attack": GREEDY | {"memory": "persist", "rounding": "carry", "unflip": True}},
    {"attack": GREEDY | {"memory": "persist_total", "rounding": "ceil"}},
    {"attack": GREEDY | {"knowledge": "noisy", "knowledge_fraction": 0.3}},
    {"early_stop": {"patience": 3, "restore": "last", "share": 0.2}},
    {"strategy": {"name": "fltrust", "root": 7}},
    {"sanitize": {"name": "knn", "k": 9, "share": 0.6}},
    *({"dataset": {"loader": loader, "path": "here"}} for loader in ("npz", "image_folder", "hf")),
    {"dataset": {"loader": "mnist", "root": "here"}},
    {"dataset": {"loader": "digits"}},
]


@pytest.mark.parametrize("setting", NO_EFFECT)
def test_what_changes_nothing_is_told_with_the_reason(setting: str) -> None:
    groups, why = NO_EFFECT[setting]
    settings = settings_from(PLAIN | groups)
    assert without_effect(settings, sweep=False) == [f"{setting} has no effect: {why}"]
    assert without_effect(settings, sweep=True) == ([] if "(-m)" in why else [f"{setting} has no effect: {why}"])


@pytest.mark.parametrize("groups", EFFECTIVE)
def test_what_changes_something_is_not_told(groups: dict[str, object]) -> None:
    assert without_effect(settings_from(PLAIN | groups), sweep=False) == []


@pytest.mark.parametrize(
    "given",
    [
        ["attack=none"],
        ["attack=sign_flip", "attack.args={scale:3}", "partition=dirichlet", "partition.alpha=0.3", "clients.honest=9"],
        ["strategy=flower", "strategy.path=flwr.serverapp.strategy.FedMedian"],
        ["strategy=median", "strategy.pre=[nnm]", "dataset=mnist_01", "model=mlp", "engine=batched", "lr=0.25"],
        ["dataset=npz", "attack=planned", "dataset.path=here", "dataset.classes=[2,5]", "figures=[[harm]]"],
    ],
)
def test_the_overrides_of_settings_are_the_few_that_make_them_anew(given: list[str]) -> None:
    settings = compose(*given, "out=unused", "verbose=true")
    found = overrides_of(settings)
    assert set(found) == set(given) and len(found) == len(given)
    assert compose(*found, "out=unused") == settings.model_copy(update={"verbose": False})
    leaves = leaves_of(settings)
    assert json.loads(json.dumps(leaves)) == leaves  # lists, not tuples
    assert not [key for key, value in leaves.items() if isinstance(value, dict) and key.split(".")[-1] != "args"]
    assert leaves["clients.malicious"] == settings.clients.malicious and leaves["rounds"] == settings.rounds


def test_what_breaks_a_run_is_named_after_what_came_first(small_data: Small) -> None:
    small = [*small_data(3), "clients.total=3", "clients.malicious=1", "batch_size=30", "rounds=9", "lr=0.1"]
    shape, cells = torch.ones(3, 7, dtype=torch.float64), dict[tuple[str, ...], Scenario]()

    def why(aggregate: float, sent: list[float], *overrides: str) -> str:
        """What is said of a theta that is not finite after these updates and this aggregate."""
        if overrides not in cells:
            cells[overrides] = scenario.make(compose(*small, *overrides, "out=unused"))
        recorder = Recorder(cells[overrides])
        recorder.record(0, shape)
        updates = torch.stack([one * shape for one in sent]) if sent else None
        with pytest.raises(RunError) as raised:
            recorder.record(1, shape * math.nan, shape * aggregate, updates=updates)
        assert [row["round"] for row in recorder.history.rows] == [0]
        assert torch.equal(recorder.history.theta, shape)
        return str(raised.value)

    diverged = "the run diverged: theta is not finite after round 1 of 9 (lr=0.1); a smaller lr keeps it finite"
    rule = "strategy median gave values that are not finite in round 1 of 9, from updates that all are"
    attack = "attack=sign_flip sent values that are not finite in round 1 of 9, and strategy=median let them pass"
    attacked = ["strategy=median", "attack=sign_flip"]
    assert why(1.0, [1.0] * 3, *attacked) == why(math.inf, [], *attacked) == diverged
    (bad,) = cells[tuple(attacked)].partition.malicious
    sent = [math.inf if client == bad else 1.0 for client in range(3)]
    by_another = [math.inf if client == (bad + 1) % 3 else 1.0 for client in range(3)]
    assert why(math.inf, sent, *attacked) == why(1.0, sent, *attacked) == attack
    assert why(math.inf, by_another, *attacked) == why(math.inf, [math.inf] * 3, *attacked) == diverged
    assert why(math.inf, sent, "strategy=median", "attack=greedy") == diverged  # it changes no update
    assert why(math.inf, [1.0] * 3, *attacked) == why(math.nan, [1.0] * 3, "strategy=median") == rule
    flower = ["strategy=flower", "strategy.path=mine.Strategy"]
    assert why(math.inf, [1.0] * 3, *flower).startswith("strategy mine.Strategy gave values that are not finite")


def test_an_unfinished_run_goes_on_only_if_that_is_wanted(
    small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(attacked: Scenario, work: Path, *_: object) -> None:
        found.append((work / folder.STATE).exists())
        raise RunError("stopped")

    found: list[bool] = []
    monkeypatch.setattr(experiment, "_run", stops)
    run = [*small_data(2), "engine=batched", "rounds=3", "batch_size=30", f"out={tmp_path}/out"]
    results.write_config(tmp_path / "out", scenario.make(compose(*run)).settings)
    (tmp_path / "out" / folder.STATE).touch()
    for more in ([], ["resume=false"], []):
        with pytest.raises(RunError, match="stopped"):
            experiment.run(compose(*run, *more))
    assert found == [True, False, False]


def test_a_batch_shows_rounds_saves_now_and_then_and_keeps_all_before_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed("engine", to={"name": "batched", "device": "cuda:1", "memory_gb": 0.5})
    now, shown, kept = [0.0], list[int](), list[tuple[object, ...]]()
    logged: list[tuple[list[float], str]] = []
    tracked = SimpleNamespace(
        is_due=lambda part: part == "" and now[0] == 3,
        last=lambda part: {"": 1, "baseline": 0}[part],
        rows=lambda rows, part: logged.append(([row["round"] for row in rows], part)),
    )
    table = np.zeros((3, len(COLUMNS)))
    table[:, 0] = 0, 1, 2
    error: list[str | None] = [None, None]
    outcomes = [SimpleNamespace(history=lambda name=name: f"of {name}", table=table) for name in ("honest", "attacked")]

    def run_cells(cells: list[object], **how: object) -> list[SimpleNamespace]:
        assert cells == ["the twin", "the run"] and (how["device"], how["memory_gb"]) == ("cuda:1", 0.5)
        places = [(one.folder, one.key) for one in how["checkpoints"]]  # type: ignore[attr-defined]
        assert places == [(tmp_path / "baseline", "key of the twin"), (tmp_path, "key of the run")]
        for second in (3, 9, 10, 19, 21):
            now[0] = second
            how["progress"](1)  # type: ignore[operator]
            how["progress"](2)  # type: ignore[operator]
            how["watch"]([1, 0], lambda: outcomes[::-1])  # type: ignore[operator]
        for outcome, of_outcome in zip(outcomes, error, strict=True):
            outcome.error = of_outcome
        return outcomes

    @contextmanager
    def progress(*named: object) -> Iterator[Callable[[int], None]]:
        assert named == (settings.rounds, "batched", "round")
        yield shown.append

    monkeypatch.setattr(experiment.engine, "run_cells", run_cells)
    monkeypatch.setattr(experiment, "Progress", progress)
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(experiment.identity, "key_of", lambda cells: f"key of {cells[0]}")

    class Named(str):  # in place of a scenario
        pass

    twin, run = Named("the twin"), Named("the run")
    run.settings = settings  # type: ignore[attr-defined]
    runs = {"honest": (twin, tmp_path / "baseline"), "attacked": (run, tmp_path)}

    def keep(name: str, history: object, finished: bool = True) -> None:
        kept.append((now[0], name, history, finished))

    for broke_off in (None, "it diverged"):
        now[0], error[1] = 0.0, broke_off
        for noted in (shown, kept, logged):
            noted.clear()
        if broke_off:
            with pytest.raises(RunError, match=broke_off):
                experiment._batched(runs, keep, tracked)  # type: ignore[arg-type]
        else:
            experiment._batched(runs, keep, tracked)  # type: ignore[arg-type]
        assert shown == [1, 2, 3, 4, 5, 6, 7]  # of two runs with 15 rounds between them
        assert logged == [([2], ""), ([1, 2], "baseline")]
        saved = [(when, name, f"of {name}", False) for when in (10, 21) for name in ("attacked", "honest")]
        ends = [(21, "honest", "of honest", True), (21, "attacked", "of attacked", broke_off is None)]
        assert kept == [*saved, *ends]
