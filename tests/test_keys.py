"""Keys: whatever changes a number changes the key that the number is kept under, and nothing else does.

Each setting is changed by itself. A trained target, the kept work of a sweep and the group that cells are computed in
are all found again by a key; one that leaves out a setting gives an old or another cell's number for the new one.
"""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from fl_attack import engine, experiment, identity, numerics, plans, scenario, targets
from fl_attack.config import Settings, compose
from fl_attack.engine import sequential
from fl_attack.errors import InputError
from fl_attack.multirun.units import distinct_experiments, units
from fl_attack.scenario import Scenario

BASE = ["rounds=4", "batch_size=20", "clients.total=5", "clients.malicious=2", "attack.budget=0.6", "lr=0.5"]


class Change(NamedTuple):
    """A setting that is changed, against what, and what becomes of the numbers."""

    to: str
    where: tuple[str, ...] = ()  # settings without which the change would have no meaning
    numbers: bool = True  # are others
    together: bool = True  # can be computed in one call with what it was


# every key of the settings
CHANGES: dict[str, Change] = {
    "clients.malicious": Change("clients.malicious=3"),
    "clients.honest": Change("clients.honest=2", ("clients.total=null", "clients.honest=3"), together=False),
    "clients.total": Change("clients.total=6", together=False),
    "clients.per_round": Change("clients.per_round=3", together=False),
    "dataset.path": Change("dataset.path={other}", together=False),
    "dataset.classes": Change("dataset.classes=[0,1]", together=False),
    "dataset.scale": Change("dataset.scale=2", together=False),
    "dataset.standardize": Change("dataset.standardize=true", together=False),
    "partition.name": Change("partition=dirichlet", together=False),
    "partition.alpha": Change("partition.alpha=0.1", ("partition=dirichlet",), together=False),
    "partition.s": Change("partition.s=1", ("partition=shards",), together=False),
    "partition.balanced": Change("partition.balanced=true", ("partition=dirichlet",), together=False),
    "partition.min_samples": Change(
        "partition.min_samples=9", ("partition=dirichlet", "partition.alpha=0.1"), together=False
    ),
    "partition.path": Change("partition.path={holders}", ("partition=given", "partition.path={users}"), together=False),
    "partition.partitioner": Change("partition.partitioner=LinearPartitioner", ("partition=hf",), together=False),
    "partition.args": Change(
        "partition.args={alpha: 0.1, min_partition_size: 1}",
        (
            "partition=hf",
            "partition.partitioner=DirichletPartitioner",
            "partition.args={alpha: 9, min_partition_size: 1}",
        ),
        together=False,
    ),
    "partition.malicious_share": Change("partition.malicious_share=0.2", together=False),
    "attack.name": Change("attack=random_flip"),
    "attack.goal": Change("attack.goal=targeted"),
    "attack.direction": Change("attack.direction=mean_feature"),
    "attack.objective": Change("attack.objective=average", ("attack=planned",)),
    "attack.foresight": Change("attack.foresight=simulated", ("attack=planned",)),
    "attack.horizon": Change("attack.horizon=2", ("attack=planned",)),
    "attack.budget": Change("attack.budget=0.2"),
    "attack.selection": Change("attack.selection=literal"),
    "attack.scope": Change("attack.scope=per_client", ("attack.budget=0.4",)),
    "attack.rounding": Change("attack.rounding=carry", ("attack.budget=0.19",)),
    "attack.knowledge": Change("attack.knowledge=own"),
    "attack.knowledge_fraction": Change("attack.knowledge_fraction=0.3", ("attack.knowledge=noisy",)),
    "attack.refresh": Change("attack.refresh=epoch"),
    "attack.memory": Change("attack.memory=persist", ("attack.budget=0.2", "rounds=12")),
    "attack.unflip": Change("attack.unflip=true", ("attack.memory=persist", "lr=30", "rounds=12")),
    "attack.args": Change("attack.args={map: cyclic}", ("attack.name=static_flip",)),
    "attack.every": Change("attack.every=2"),
    "attack.start": Change("attack.start=2"),
    "attack.stop": Change("attack.stop=3"),
    "attack.target_path": Change("attack.target_path={target}", ("attack.goal=targeted",)),
    "strategy.name": Change("strategy.name=median"),
    "strategy.f": Change("strategy.f=1", ("strategy.name=trimmed_mean",)),
    "strategy.root": Change("strategy.root=20", ("strategy=fltrust", "strategy.root=40")),
    "sanitize.name": Change("sanitize=confident"),
    "sanitize.k": Change("sanitize.k=2", ("sanitize=knn",)),
    "sanitize.share": Change("sanitize.share=0.9", ("sanitize=knn",)),
    "attack.adapt": Change("attack.adapt=rule", ("strategy.name=krum", "strategy.f=1", "attack.name=ipm")),
    "strategy.pre": Change("strategy.pre=[nnm]", ("strategy.name=median",)),
    "strategy.args": Change("strategy.args={c: 0.01}", ("strategy.name=norm_clipping",)),
    "model.name": Change("model=mlp", together=False),
    "model.args": Change("model.args={widths: [3]}", ("model=mlp",), together=False),
    "model.loss": Change("model.loss=brier", ("model=mlp",), together=False),
    "rounds": Change("rounds=5", together=False),
    "eval_every": Change("eval_every=2", together=False),
    "batch_size": Change("batch_size=30", together=False),
    "local_steps": Change("local_steps=2", together=False),
    "lr": Change("lr=0.3"),
    "lr_schedule": Change("lr_schedule=cosine"),
    "lr_every": Change("lr_every=1", ("lr_schedule=inverse",)),
    "lr_decay": Change("lr_decay=0.5", ("lr_schedule=step", "lr_every=1")),
    "weight_decay": Change("weight_decay=0.01"),
    "worker_momentum": Change("worker_momentum=0.5", together=False),
    "server_optimizer": Change("server_optimizer=momentum"),
    "early_stop.patience": Change("early_stop.patience=1", together=False),
    "early_stop.restore": Change("early_stop.restore=last", ("early_stop.patience=1", "lr=30", "rounds=9")),
    "early_stop.share": Change("early_stop.share=0.3", ("early_stop.patience=1",), together=False),
    "seed": Change("seed=1", together=False),
    "dtype": Change("dtype=float32", together=False),
    "dataset.root": Change("dataset.root={moved}", numbers=False),
    "baseline": Change("baseline=false", numbers=False),
    "figures": Change("figures=[[harm]]", numbers=False),
    "objective": Change("objective=final_f1", numbers=False),
    "launcher": Change("launcher=ray", numbers=False),
    "engine.ray_address": Change("engine.ray_address=127.0.0.1:6379", numbers=False),
    "workers": Change("workers=3", numbers=False),
    "report": Change("report=false", numbers=False),
    "tracker": Change("tracker=tensorboard", numbers=False),
    "out": Change("out=elsewhere", numbers=False),
    "overwrite": Change("overwrite=true", numbers=False),
    "resume": Change("resume=false", numbers=False),
    "verbose": Change("verbose=true", numbers=False),
}
# what an experiment is computed by, whose numbers are the same up to rounding, and what is measured besides
UP_TO_ROUNDING = {f"engine.{key}" for key in ("name", "grid", "actors", "device", "client_device", "memory_gb")}
MEASURED_BESIDES = {"detectability"}
# what needs another data set, whose fingerprint is in every key, or rules that are others'
OF_OTHERS = {"dataset.channels", "dataset.split", "dataset.loader", "strategy.path", "strategy.rule"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two data sets of the same labels, one of them twice, and a target."""
    tmp_path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    x = (rng.normal(size=(3, 6))[y] + rng.normal(size=(150, 6))).astype(np.float32)
    files = {name: tmp_path / f"{name}.npz" for name in ("data", "other")}
    for file, pixels in zip(files.values(), (x, x[:, ::-1]), strict=True):
        np.savez(file, x_train=pixels[:90], y_train=y[:90], x_test=pixels[90:], y_test=y[90:])
    (tmp_path / "moved").mkdir()
    shutil.copy(files["data"], tmp_path / "moved" / "data.npz")
    np.savez(tmp_path / "target.npz", theta=rng.normal(size=(3, 7)))
    holders = {"users": np.arange(90) % 5, "holders": np.arange(90) // 18}
    for name, client in holders.items():
        np.savez(tmp_path / f"{name}.npz", client=client)
    return {name: f"{tmp_path}/{name}.npz" for name in (*files, *holders)} | {
        "target": f"{tmp_path}/target.npz",
        "moved": f"{tmp_path}/moved",
    }


def overrides_of(places: dict[str, str], *overrides: str) -> tuple[str, ...]:
    """All overrides of an experiment in this process, with the places that they name."""
    data = ("dataset=npz", f"dataset.path={places['data']}", "engine=batched", "out=unused")
    for name, place in places.items():
        overrides = tuple(text.replace(f"{{{name}}}", place) for text in overrides)
    return (*data, "dtype=float64", *BASE, *overrides)


def scenario_of(places: dict[str, str], *overrides: str) -> Scenario:
    """The experiment of these overrides."""
    return engine.make_scenarios([compose(*overrides_of(places, *overrides))])[0]


def work_key(experiment: Scenario) -> str:
    """What a sweep keeps the numbers of an experiment under."""
    return units([experiment])[0].key


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full names of all settings."""
    for name, one in kind.model_fields.items():
        if isinstance(one.annotation, type) and issubclass(one.annotation, BaseModel):
            yield from leaves(one.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_is_changed_here_or_said_to_change_no_number() -> None:
    assert set(leaves(Settings)) == CHANGES.keys() | UP_TO_ROUNDING | MEASURED_BESIDES | OF_OTHERS


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_changes_keys_and_groups_exactly_where_it_changes_numbers(
    places: dict[str, str], setting: str
) -> None:
    change = CHANGES[setting]
    cells = [scenario_of(places, *change.where), scenario_of(places, *change.where, change.to)]
    alone = [sequential.run(cell, client_by_client=True) for cell in cells]
    was, now = alone
    same = was.table.shape == now.table.shape and np.array_equal(was.table, now.table, equal_nan=True)
    assert (not same or not torch.equal(was.theta, now.theta)) == change.numbers  # or the change tests nothing
    assert (work_key(cells[0]) != work_key(cells[1])) == change.numbers
    assert len(distinct_experiments(cells)[0]) == 2 or not change.numbers
    groups = engine.group(cells)
    assert (len(groups) == 1) == (change.together or not change.numbers)
    for members in groups:  # each gives what it gives alone
        for at, found in zip(members, engine.run_cells([cells[i] for i in members]), strict=True):
            near = 1e-3 if (setting, at) == ("dtype", 1) else 1e-9
            np.testing.assert_allclose(found.table, alone[at].table, rtol=0, atol=max(near, 1e-7))
            torch.testing.assert_close(found.theta.double(), alone[at].theta.double(), rtol=0, atol=near)


IDLE = [  # what is set beside others, and a change of it that has no effect there
    *((("attack=sign_flip",), f"attack.{change}") for change in ("budget=0.2", "scope=per_client", "rounding=carry")),
    (("attack=ipm", "strategy=median"), "attack.refresh=epoch"),
    (("strategy=mean",), "strategy.f=1"),
    (("strategy=mean",), "strategy.root=20"),
    ((), "attack.knowledge_fraction=0.3"),
    ((), "attack.unflip=true"),
    ((), "early_stop.restore=last"),
    ((), "early_stop.share=0.3"),
    (("lr_schedule=cosine",), "lr_decay=0.5"),
]


@pytest.mark.parametrize(("where", "change"), IDLE)
def test_a_setting_without_effect_is_no_work_of_its_own(
    places: dict[str, str], where: tuple[str, ...], change: str
) -> None:
    cells = [scenario_of(places, *where), scenario_of(places, *where, change)]
    was, now = (sequential.run(cell, client_by_client=True) for cell in cells)
    assert np.array_equal(was.table, now.table, equal_nan=True) and torch.equal(was.theta, now.theta)
    kept, place = distinct_experiments(cells)
    assert len(kept) == 1 and place == [0, 0]
    keys = [work_key(distinct_experiments([cell])[0][0]) for cell in cells]
    assert keys[0] == keys[1]


def test_the_same_data_moved_are_the_same_work(places: dict[str, str]) -> None:
    moved = places | {"data": f"{places['moved']}/data.npz"}
    assert work_key(scenario_of(places)) == work_key(scenario_of(moved))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("strategy.name", "def mine(updates, weights, f):\n    return updates.mean(-3) * {factor}\n"),
        (
            "attack.name",
            "from fl_attack.attack import Updates\n\n\ndef mine(view: Updates):\n    return view.updates * {factor}\n",
        ),
        ("attack.direction", "def mine(aim):\n    return aim.theta * {factor}\n"),
        (
            "model.name",
            "from torch import nn\n\n\ndef mine(shape, classes):\n    return nn.Linear(6, 3, bias={factor} > 1)\n",
        ),
    ],
)
def test_a_function_of_the_users_that_has_changed_is_new_work(
    places: dict[str, str], tmp_path: Path, name: str, text: str
) -> None:
    keys = []
    for factor in (1, 2, 1):
        (tmp_path / "mine.py").write_text(text.format(factor=factor))
        keys.append(work_key(scenario_of(places, f"{name}={tmp_path}/mine.py:mine")))
    assert keys[0] == keys[2] != keys[1]


def test_a_deal_of_flower_datasets_that_has_changed_is_new_work(places: dict[str, str]) -> None:
    cell = scenario_of(places)
    dealt = cell.settings.model_copy(update={"partition": cell.settings.partition.model_copy(update={"name": "hf"})})
    deals = [cell.partition, replace(cell.partition, client=cell.partition.client[::-1].copy())]
    assert len({identity.key_of([replace(cell, settings=dealt, partition=deal)]) for deal in deals}) == 2


def test_a_flower_strategy_whose_file_has_changed_is_new_work(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    how = ("engine=flower", "strategy=flower", "strategy.path=users_strategy.Mine")
    keys = []
    for text in ("", "# changed", ""):
        (tmp_path / "users_strategy.py").write_text(f"from flwr.serverapp.strategy import FedAvg as Mine  {text}\n")
        keys.append(identity.key_of([scenario_of(places, *how)]))
    assert keys[0] == keys[2] != keys[1]
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"another {package}")
    assert identity.key_of([scenario_of(places, *how)]) != keys[0]


@pytest.mark.parametrize("constant", ["NUMERICS", "WITH_OTHERS"])
def test_numbers_that_the_code_has_changed_are_new_work_targets_and_plans(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    cell = scenario_of(places, "attack=planned")

    def keys() -> list[object]:
        return [identity.key_of([cell]), plans._file(cell, 1, cell.start()), targets._target_file(cell)]

    before = keys()
    monkeypatch.setattr(numerics, constant, 1000)
    changed = [one != other for one, other in zip(before, keys(), strict=True)]
    assert changed == [True, True, constant == "NUMERICS"]  # a target depends on no attack and no rule


def test_cells_of_a_sweep_are_checked_as_they_are_alone(places: dict[str, str]) -> None:
    settings = [compose(*overrides_of(places, "strategy=fltrust", f"strategy.root={root}")) for root in (20, 100_000)]
    with pytest.raises(InputError, match=r"strategy\.root=100000 is more than the 90 samples") as alone:
        scenario.of(settings[1], scenario_of(places).dataset)
    with pytest.raises(InputError) as together:
        engine.make_scenarios(settings)
    assert str(together.value) == str(alone.value)
    first, second = engine.make_scenarios([settings[0]] * 2)
    assert second.schedule is first.schedule and second.partition is first.partition
    assert second.settings == first.settings == scenario.of(settings[0], first.dataset).settings


def test_a_target_file_that_has_changed_is_new_work(places: dict[str, str]) -> None:
    keys = []
    for value in (1.0, 2.0, 1.0):
        np.savez(places["target"], theta=np.full((3, 7), value))
        keys.append(work_key(scenario_of(places, "attack.goal=targeted", f"attack.target_path={places['target']}")))
    assert keys[0] == keys[2] != keys[1]


def test_a_deal_in_a_file_that_has_changed_is_new_work(places: dict[str, str], tmp_path: Path) -> None:
    keys = []
    for client in (np.arange(90) % 5, np.arange(90) // 18, np.arange(90) % 5):
        np.savez(tmp_path / "users.npz", client=client)
        keys.append(work_key(scenario_of(places, "partition=given", f"partition.path={tmp_path}/users.npz")))
    assert keys[0] == keys[2] != keys[1]


# whether the model that was trained honestly on flipped labels is another one
TARGETS = {
    "rounds=5": True,
    "batch_size=30": True,
    "local_steps=2": True,
    "lr=0.3": True,
    "lr_schedule=cosine": True,
    "weight_decay=0.01": True,
    "worker_momentum=0.5": True,
    "model=mlp": True,
    "dataset.standardize=true": True,
    "server_optimizer=momentum": True,
    "seed=1": True,
    "dtype=float32": True,
    "clients.per_round=3": True,
    "clients.total=6": True,
    "partition=dirichlet": True,
    "partition.malicious_share=0.2": True,
    "early_stop.patience=5": True,
    "dataset.path={other}": True,
    "dataset.scale=2": True,
    "dataset.classes=[0,1]": True,
    "eval_every=2": False,
    "clients.malicious=3": False,
    "attack.budget=0.2": False,
    "attack.selection=literal": False,
    "attack.scope=per_client": False,
    "attack.rounding=carry": False,
    "attack.every=2": False,
    "attack.refresh=epoch": False,
    "attack.name=gradient_max": False,
    "strategy.name=median": False,
    "dataset.path={moved}/data.npz": False,
}


def target_of(places: dict[str, str], out: Path, *overrides: str) -> np.ndarray:
    """The target that a run leaves."""
    experiment.run(compose(*overrides_of(places, "attack.goal=targeted", "baseline=false", *overrides, f"out={out}")))
    with np.load(out / "target.npz") as stored:
        return np.concatenate([stored[name].ravel() for name in stored.files])


@pytest.fixture(scope="module")
def before(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A cache that knows one target, and that target."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FL_ATTACK_CACHE", f"{folder}/cache")
        theta = target_of(places, folder / "out")
    return folder / "cache", theta


@pytest.mark.parametrize("change", TARGETS)
def test_a_target_is_trained_anew_exactly_where_it_is_another_one(
    places: dict[str, str],
    before: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: str,
) -> None:
    shutil.copytree(before[0], tmp_path / "cache")
    monkeypatch.setenv("FL_ATTACK_CACHE", f"{tmp_path}/cache")
    theta = target_of(places, tmp_path / "out", change)
    other = theta.shape != before[1].shape or bool((theta != before[1]).any())
    assert other == TARGETS[change]  # or the change tests nothing
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 1 + other
