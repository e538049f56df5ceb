"""Flips that stay in the attackers' data: the exact choice, the laws of their budgets, all engines the same way."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import replay
import torch

from fl_attack import adversary, attack, engine, experiment, knowledge, scenario
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings, compose
from fl_attack.engine import sequential
from fl_attack.errors import InputError
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
MEMORIES = [("persist", False), ("persist", True), ("persist_total", False), ("persist_total", True)]
KINDS = [[f"attack.memory={memory}", f"attack.unflip={str(unflip).lower()}"] for memory, unflip in MEMORIES]
FEW = ["clients.honest=3", "clients.malicious=2", "dtype=float64", "lr=2", "rounds=8"]


def some_theta(cell: Scenario, seed: int) -> torch.Tensor:
    return torch.randn(cell.theta_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def allowed_labels(
    y: np.ndarray,
    before: np.ndarray,
    owner: np.ndarray,
    memory: str,
    unflip: bool,
    outside: np.ndarray,
    b: float,
    classes: int,
) -> list[np.ndarray]:
    """The slow way: every label set of the samples (n,) that the attackers may leave after a round.

    `before` are the labels that stand there, `outside` the flips of each budget on samples that the round does not use,
    `owner` the budget of each sample.
    """
    held = np.bincount(owner, minlength=len(outside))
    found = []
    for labels in itertools.product(range(classes), repeat=len(y)):
        after = np.array(labels)
        was, now = before != y, after != y
        if not unflip and (after[was] != before[was]).any():
            continue
        new = np.bincount(owner[now & ~was], minlength=len(outside))
        standing = np.bincount(owner[now], minlength=len(outside)) + outside
        limit = np.floor(b * (held if memory == "persist" else held + 3) + 1e-9)  # 3 more of each are not in use
        if (new <= limit).all() if memory == "persist" else (standing <= limit).all():
            found.append(after)
    return found


@pytest.mark.parametrize(("memory", "unflip"), MEMORIES)
@pytest.mark.parametrize("scope", ["pooled", "per_client"])
@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_written_is_the_best_of_all_label_sets_that_may_be_left(
    settings: Compose, small_data: Small, memory: str, unflip: bool, scope: str, classes: int
) -> None:
    budget = 0.34 if memory == "persist" else 0.5
    shared = [*small_data(classes, train=30), *FEW, f"attack.memory={memory}", f"attack.unflip={str(unflip).lower()}"]
    shared += [f"attack.scope={scope}", f"attack.budget={budget}", "batch_size=15", "model=logistic"]
    cell = scenario.make(settings(*shared))  # each client holds 6 samples and uses 3 a round
    y_all, holder = cell.dataset.y_train, cell.partition.client
    malicious = cell.partition.malicious
    stored, kinds = NO_FLIPS, set()
    for round_ in range(1, 9):
        theta = some_theta(cell, round_)
        found = adversary.flips(cell, theta, round_, stored=stored)
        samples = cell.schedule.samples(malicious, round_)[0]
        before = scenario.relabelled(y_all, samples, stored)
        after = scenario.relabelled(y_all, samples, found)
        assert np.isin(found.samples, samples).all()
        owner = np.zeros(6, int) if scope == "pooled" else np.searchsorted(malicious, holder[samples])
        away = stored.samples[~np.isin(stored.samples, samples)]
        outside = np.array([len(away)])
        if scope != "pooled":
            outside = np.array([(holder[away] == client).sum() for client in malicious])
        b = budget if memory == "persist" or scope == "per_client" else budget * 12 / 9  # of 12 held, by 6 + 3 above
        sets = allowed_labels(y_all[samples], before, owner, memory, unflip, outside, b, classes)
        v = knowledge.direction(cell, theta, round_)
        scores = cell.model.scores(theta, v, cell.features(samples)).numpy()
        harm = [scores[np.arange(6), labels].sum() for labels in sets]
        assert scores[np.arange(6), after].sum() == pytest.approx(max(harm), abs=1e-12)
        assert any((labels == after).all() for labels in sets)
        kinds |= {("new", bool(((after != y_all[samples]) & (before == y_all[samples])).any()))}
        kinds |= {("restored", bool(((after == y_all[samples]) & (before != y_all[samples])).any()))}
        assert found.new == ((after != y_all[samples]) & (before == y_all[samples])).sum()
        stored = adversary.remembered(cell, round_, stored, found)
        assert (scenario.relabelled(y_all, samples, stored) == after).all()
    assert ("new", True) in kinds
    assert (("restored", True) in kinds) == unflip


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("rounding", ["floor", "carry", "ceil"])
@pytest.mark.parametrize("name", ["greedy", "random_flip", "confidence_flip"])
def test_budgets_hold_for_new_flips_of_a_round_or_for_all_that_stand(
    settings: Compose, small_data: Small, kind: list[str], rounding: str, name: str
) -> None:
    written = ["attack.budget=0.07", f"attack.rounding={rounding}", "batch_size=40", f"attack.name={name}"]
    cell = scenario.make(settings(*small_data(3), *FEW, "rounds=20", *written, *kind))
    held = sum(len(cell.schedule.shards[client]) for client in cell.partition.malicious)
    used = int(cell.schedule.used[cell.partition.malicious].sum())
    stored, total = NO_FLIPS, 0
    for round_ in range(1, 21):
        found = adversary.flips(cell, some_theta(cell, round_), round_, stored=stored)
        after = adversary.remembered(cell, round_, stored, found)
        assert (after.labels != cell.dataset.y_train[after.samples]).all()
        assert (np.diff(after.samples) > 0).all()
        new = len(np.setdiff1d(after.samples, stored.samples))
        assert new == found.written <= found.allowed
        total += new
        if "attack.memory=persist" in kind:
            most = {"floor": math.floor, "ceil": math.ceil}.get(rounding)
            assert new <= most(0.07 * used) if most else total <= 0.07 * used * round_
        else:
            whole = math.ceil(0.07 * held) if rounding == "ceil" else math.floor(0.07 * held)
            assert len(after.samples) <= whole
        if "attack.unflip=false" in kind:
            assert np.isin(stored.samples, after.samples).all()
        stored = after
    assert len(stored.samples) > 0


def test_in_rounds_that_are_not_attacked_nothing_is_written_and_what_stands_is_used(
    settings: Compose, small_data: Small
) -> None:
    timed = ["attack.memory=persist", "attack.start=2", "attack.stop=3", "attack.budget=0.2", "batch_size=full"]
    cell = scenario.make(settings(*small_data(2), *FEW, *timed))
    outcome = sequential.run(cell)
    rows = outcome.history().rows
    new = [row["new_flips"] for row in rows]
    assert new[:2] == [0, 0] and new[2] == new[3] > 0 and not any(new[4:])
    assert [row["flips"] for row in rows] == np.cumsum(new).tolist()
    assert rows[3]["budget_used"] == 1 and rows[5]["allowed"] == 0


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_a_run_is_replayed_from_what_it_left(small_data: Small, tmp_path: Path, kind: list[str], goal: str) -> None:
    run = ["engine=batched", "batch_size=full", "attack.budget=0.06", f"attack.goal={goal}", f"out={tmp_path}/out"]
    data = small_data(3)
    experiment.run(compose(*data, *FEW, "rounds=12", *run, *kind))
    with np.load(data[1].partition("=")[2]) as stored:
        theta, flips = replay.replay(tmp_path / "out", stored["x_train"], stored["y_train"])
    assert replay.made_flips(tmp_path / "out", 12) == flips
    np.testing.assert_allclose(np.load(tmp_path / "out" / "model.npz")["theta"], theta, rtol=0, atol=1e-9)
    assert len(flips[-1]) > len(flips[0]) or "total" in kind[0]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["flips"] == sum(map(len, flips))
    assert summary["effective_budget"] == pytest.approx(sum(map(len, flips)) / (12 * 120))


@pytest.mark.parametrize("model", [[], ["model=mlp", "model.args={widths: [5]}"], ["strategy=median"]])
def test_the_batched_engine_remembers_as_clients_one_by_one_do(
    settings: Compose, small_data: Small, model: list[str]
) -> None:
    usual = [*small_data(3), *FEW, "batch_size=40", "attack.budget=0.1", *model]
    changes = [*KINDS, [], ["attack.memory=persist", "clients.per_round=3"], ["attack.memory=persist", "local_steps=2"]]
    for group in (changes[:5], changes[5:6], changes[6:]):
        cells = engine.make_scenarios([settings(*usual, *change) for change in group])
        for outcome, cell in zip(engine.run_cells(cells), cells, strict=True):
            alone = sequential.run(cell, client_by_client=True)
            assert outcome.theta is not None and alone.theta is not None
            torch.testing.assert_close(outcome.theta.double(), alone.theta.double(), rtol=0, atol=1e-9)
            ours, theirs = outcome.history(), alone.history()
            for one, other in zip(ours.rows, theirs.rows, strict=True):
                assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-7, nan_ok=True)
            for name, column in ours.flip_table().items():
                assert column.tolist() == theirs.flip_table()[name].tolist()


class StoppedError(Exception):
    """What cuts a run off in a test."""


@pytest.mark.parametrize("kind", KINDS[1:3], ids=" ".join)
def test_a_run_that_was_cut_off_remembers_what_stood(
    settings: Compose, small_data: Small, tmp_path: Path, kind: list[str]
) -> None:
    cell = scenario.make(settings(*small_data(3), *FEW, "batch_size=40", "attack.budget=0.1", *kind))
    whole, done = sequential.run(cell), 0

    def cut_off(rounds: int) -> None:
        nonlocal done
        done += rounds
        if done == 5:
            raise StoppedError

    kept = Checkpoint(tmp_path, "key", every=0.0)
    with pytest.raises(StoppedError):
        sequential.run(cell, progress=cut_off, checkpoint=kept)
    resumed = sequential.run(cell, checkpoint=Checkpoint(tmp_path, "key"))
    assert resumed.theta is not None and whole.theta is not None and torch.equal(resumed.theta, whole.theta)
    assert np.array_equal(resumed.table, whole.table, equal_nan=True)
    once: list[int] = []  # the end is kept too: were the twin cut off, this run would not be computed again
    again = sequential.run(cell, progress=once.append, checkpoint=Checkpoint(tmp_path, "key"))
    assert once == [8] and np.array_equal(again.table, whole.table, equal_nan=True)


def test_the_attackers_own_data_change_and_nobody_elses(settings: Compose, small_data: Small) -> None:
    cell = scenario.make(settings(*small_data(2), *FEW, "batch_size=40", "attack.memory=persist"))
    stored = Flips(np.array([3]), np.array([1 - cell.dataset.y_train[3]]), 0)
    assert adversary.remembered(cell, 1, stored, NO_FLIPS).samples.tolist() in ([], [3])
    plain = scenario.make(settings(*small_data(2), *FEW, "batch_size=40"))
    assert adversary.remembered(plain, 1, stored, stored) is NO_FLIPS


@pytest.mark.parametrize("memory", ["persist", "persist_total"])
def test_what_an_attack_wants_no_more_gets_its_true_label_back(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    kind = [f"attack.memory={memory}", "attack.unflip=true", "attack.budget=0.5"]
    cell = scenario.make(settings(*small_data(3), *FEW, "batch_size=40", *kind))
    unwanted = set(cell.schedule.samples(cell.partition.malicious, 1)[0].tolist()[::3])

    def some(of: Scenario, round_: int, seen: attack.View, *_: object) -> attack.Proposal:
        samples = cell.schedule.samples(cell.partition.malicious, round_)[0].tolist()
        no = torch.tensor([sample in unwanted for sample in samples])
        return attack.Proposal(
            (seen.y + 1) % 3, torch.ones(len(samples), dtype=torch.float64).masked_fill(no, -math.inf)
        )

    monkeypatch.setattr(adversary, "propose", some)
    y, stood = cell.dataset.y_train, np.sort(np.array([*unwanted]))
    stored = Flips(stood, (y[stood] + 2) % 3, 0)
    found = adversary.flips(cell, cell.start(), 1, stored=stored)
    assert len(found.samples) and not unwanted & set(found.samples.tolist())


@pytest.mark.parametrize("grid", ["block", "stock"])
def test_clients_of_flower_are_sent_what_stands(own_ray: None, small_data: Small, tmp_path: Path, grid: str) -> None:
    usual = [*small_data(3), *FEW, "batch_size=40", "attack.budget=0.1", "attack.memory=persist", "attack.unflip=true"]
    for name, engine_of in (("batched", ["engine=batched"]), ("flower", [f"engine.grid={grid}", "engine.actors=2"])):
        experiment.run(compose(*usual, *engine_of, f"out={tmp_path}/{name}"))
    one, other = (np.load(tmp_path / name / "model.npz")["theta"] for name in ("batched", "flower"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
    ours, theirs = (np.load(tmp_path / name / "flips.npz") for name in ("batched", "flower"))
    for key in ours.files:
        np.testing.assert_array_equal(ours[key], theirs[key])
    tables = [np.genfromtxt(tmp_path / name / "rounds.csv", delimiter=",")[1:] for name in ("batched", "flower")]
    np.testing.assert_allclose(*tables, rtol=0, atol=1e-7)


def test_flips_that_stay_are_not_chosen_by_epoch(settings: Compose) -> None:
    with pytest.raises(
        InputError, match=r"attack.refresh=epoch has no meaning with memory=persist, .*; use refresh=step"
    ):
        settings("attack.memory=persist", "attack.refresh=epoch")
