"""Definitions that all engines share, so that their agreement says nothing: each against one worked out here.

Full batches and one round from theta = 0: what the server took is -theta / lr, and what each client sends is known.
"""

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest
import replay

from fl_attack import engine, experiment
from fl_attack.config import Settings, compose
from fl_attack.engine import sequential
from fl_attack.history import rounds_to_recover
from fl_attack.scenario import Scenario

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
ONE_ROUND = ["rounds=1", "batch_size=full", "lr=0.5", "dtype=float64"]


class Round(NamedTuple):
    """What a round was like."""

    aggregate: np.ndarray  # (C, d)
    gradients: np.ndarray  # (m, C, d) honest ones
    sizes: np.ndarray  # (m,) samples of each client
    malicious: np.ndarray  # ids
    cell: Scenario


@pytest.fixture(params=["client by client", "batched"])
def first_round(request: pytest.FixtureRequest, settings: Compose, small_data: Small) -> Callable[..., Round]:
    """Runs one round in an engine."""

    def run(*overrides: str, train: int = 120) -> Round:
        (cell,) = engine.make_scenarios([settings(*small_data(3, train=train), *ONE_ROUND, *overrides)])
        if request.param == "batched":
            (outcome,) = engine.run_cells([cell])
        else:
            outcome = sequential.run(cell, client_by_client=True)
        assert outcome.theta is not None
        x, y = np.asarray(cell.dataset.x_train, np.float64), cell.dataset.y_train
        X = np.hstack([x, np.ones((len(x), 1))])
        holder = cell.partition.client
        theta = np.zeros(outcome.theta.shape)
        gradients = [replay.softmax_gradient(theta, X[holder == i], y[holder == i]) for i in range(holder.max() + 1)]
        sizes = np.bincount(holder[holder >= 0])
        return Round(-outcome.theta.numpy() / 0.5, np.array(gradients), sizes, cell.partition.malicious, cell)

    return run


def average(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.tensordot(sizes / sizes.sum(), values, 1)


@pytest.mark.parametrize("clients", [6, 7, 8, 9])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_a_little_is_enough_goes_as_far_as_a_majority_still_covers(
    first_round: Callable[..., Round], clients: int, f: int
) -> None:
    found = first_round("attack=alie", f"clients.total={clients}", f"clients.malicious={f}")
    supporters = max(1, math.floor(clients / 2 + 1) - f)
    z = max(0.0, NormalDist().inv_cdf((clients - f - supporters) / (clients - f)))
    sent = found.gradients.copy()
    honest = np.delete(sent, found.malicious, 0)
    sent[found.malicious] = honest.mean(0) - z * honest.std(0)
    np.testing.assert_allclose(found.aggregate, average(sent, found.sizes), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("fraction", "known"), [(0.05, 1), (0.1, 1), (0.29, 1), (0.3, 2), (0.5, 3), (0.7, 4), (0.89, 4), (0.9, 5), (1, 5)]
)
def test_a_fraction_of_the_honest_clients_is_rounded_half_up_and_at_least_one_of_them_known(
    first_round: Callable[..., Round], fraction: float, known: int
) -> None:
    noisy = ["attack.name=gradient_max", "attack.knowledge=noisy", f"attack.knowledge_fraction={fraction}"]
    found = first_round(*noisy, "clients.total=6", "clients.malicious=1")
    (attacker,) = found.malicious
    shares = found.sizes / found.sizes.sum()
    honest = [i for i in range(6) if i != attacker]
    sent = (found.aggregate - sum(shares[i] * found.gradients[i] for i in honest)) / shares[attacker]

    def cosine(some: tuple[int, ...]) -> float:
        v = average(found.gradients[list(some)], found.sizes[list(some)])
        return float((sent * v).sum() / np.linalg.norm(sent) / np.linalg.norm(v))

    subsets = [some for count in range(1, 6) for some in itertools.combinations(honest, count)]
    against = [some for some in subsets if cosine(some) < -1 + 1e-9]
    assert [len(some) for some in against] == [known]


OWN = """
def noted(updates, weights, f):
    "Nothing but what it was given: f, the weights, and the first coordinate of the updates."
    found = updates.mean(-3) * 0
    found[..., 0, 0] = f
    found[..., 1, : len(weights)] = weights
    found[..., 2, : len(weights)] = updates[..., 0, 0]
    return found
"""


@pytest.fixture
def own_rule(tmp_path: Path) -> str:
    """The override of a rule that gives what it was given."""
    (tmp_path / "own.py").write_text(OWN)
    return f"strategy.name={tmp_path}/own.py:noted"


@pytest.mark.parametrize(
    ("overrides", "f"),
    [
        (["clients.malicious=3"], 3),
        (["clients.malicious=0"], 0),
        (["clients.malicious=3", "strategy.f=1"], 1),
        (["clients.malicious=0", "strategy.f=2"], 2),
        (["clients.malicious=2", "clients.per_round=4"], 2),  # 1.14 of 4 clients
        (["clients.malicious=3", "clients.per_round=2"], 1),  # 0.86 of 2
        (["clients.malicious=1", "clients.per_round=0.5"], 1),
        (["clients.malicious=3", "clients.per_round=7"], 3),
    ],
)
def test_a_rule_is_told_how_many_malicious_clients_to_reckon_with(
    first_round: Callable[..., Round], own_rule: str, overrides: list[str], f: int
) -> None:
    assert first_round(own_rule, "clients.total=7", *overrides).aggregate[0, 0] == pytest.approx(f)


@pytest.mark.parametrize(("clients", "size"), [(4, 2), (5, 2), (5, 3), (6, 4), (3, 5)])
def test_a_bucket_is_the_mean_of_its_clients_and_weighs_what_they_weigh_together(
    first_round: Callable[..., Round], own_rule: str, clients: int, size: int
) -> None:
    pre = f"strategy.pre=[{{bucketing: {{s: {size}}}}}]"
    found = first_round(own_rule, pre, "partition=dirichlet", "clients.malicious=0", f"clients.total={clients}")
    assert len(set(found.sizes)) > 1  # else weights tell nothing
    buckets = -(-clients // size)
    weights, coordinates = found.aggregate[1, :buckets], found.aggregate[2, :buckets]

    def buckets_of(order: tuple[int, ...]) -> list[list[int]]:
        return [list(order[at : at + size]) for at in range(0, clients, size)]

    assert any(
        np.allclose(weights, [found.sizes[some].sum() for some in parts])
        and np.allclose(coordinates, [found.gradients[some, 0, 0].mean() for some in parts])
        for parts in map(buckets_of, itertools.permutations(range(clients)))
    )


@pytest.mark.parametrize("drawn", [[], ["clients.per_round=3"], ["local_steps=3"]])
@pytest.mark.parametrize("batched", [True, False])
def test_the_effective_budget_is_the_flipped_share_of_the_labels_that_were_used(
    small_data: Small, tmp_path: Path, drawn: list[str], batched: bool
) -> None:
    run = ["rounds=5", "attack.rounding=ceil", "attack.budget=0.01", "batch_size=30", "clients.total=5", *drawn]
    chosen = compose(*small_data(3), *run, "engine=batched", "baseline=false", f"out={tmp_path}/out")
    (cell,) = engine.make_scenarios([chosen])
    if batched:
        experiment.run(chosen)
        with (tmp_path / "out" / "rounds.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        total = json.loads((tmp_path / "out" / "summary.json").read_text())["effective_budget"]
    else:
        outcome = sequential.run(cell, client_by_client=True)
        rows, total = outcome.history().rows, outcome.flip_count / cell.labels_used(5)
    used = [len(cell.schedule.samples(cell.schedule.participants(r), r)[0]) for r in range(1, 6)]
    flips = [int(row["flips"]) for row in rows[1:]]
    assert max(flips) == 1 and float(rows[0]["effective_budget"]) == 0
    assert [float(row["effective_budget"]) for row in rows[1:]] == pytest.approx(np.divide(flips, used))
    assert total == pytest.approx(sum(flips) / sum(used))


def test_the_least_of_each_measure_is_its_own(small_data: Small, tmp_path: Path) -> None:
    unlike = []
    for seed in range(4):
        out = tmp_path / str(seed)
        run = ["engine=batched", "rounds=9", "batch_size=30", "lr=2", "attack.budget=0.7", "clients.malicious=5"]
        experiment.run(compose(*small_data(3), *run, f"seed={seed}", "baseline=false", f"out={out}"))
        summary = json.loads((out / "summary.json").read_text())
        with (out / "rounds.csv").open() as lines:
            start, *rows = csv.DictReader(lines)
        assert start["round"] == "0"
        for name in ("accuracy", "f1"):
            measured = [float(row[f"test_{name}"]) for row in rows]
            assert summary[f"minimum_{name}"] == pytest.approx(min(measured))
            assert summary[f"final_{name}"] == pytest.approx(measured[-1])
        assert summary["final_loss"] == pytest.approx(float(rows[-1]["test_loss"]))
        unlike.append(summary["minimum_f1"] != pytest.approx(summary["minimum_accuracy"]))
    assert any(unlike)


@pytest.mark.parametrize(
    ("accuracy", "found"),
    [
        ([0.9, 0.5, 0.6, 0.7], math.nan),
        ([0.9, 0.5, 0.6, 0.8901], 20),
        ([0.9, 0.5, 0.6, 0.8899], math.nan),
        ([0.9, 0.5, 0.95, 0.9], 10),  # better is not away
        ([0.9, 0.8901, 0.6, 0.9], 20),  # from which on it stays
        ([0.5, 0.8901, 0.9, 0.9], 0),  # what was before the end of the attack does not count
    ],
)
def test_recovered_is_within_a_point_of_the_twin_from_then_on(accuracy: list[float], found: float) -> None:
    rounds, honest = np.array([0.0, 10, 20, 30]), np.full(4, 0.9)
    assert rounds_to_recover(rounds, np.array(accuracy), honest, 10) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(("share", "held"), [(0.1, 12), (0.12, 14), (0.13, 16), (0.25, 30), (0.004, 0), (0.005, 1)])
def test_what_is_held_out_is_a_share_of_the_samples_rounded(
    settings: Compose, small_data: Small, share: float, held: int
) -> None:
    overrides = [*small_data(3), "early_stop.patience=3", f"early_stop.share={share}", "batch_size=40"]
    if held == 0:
        with pytest.raises(Exception, match="holds out none"):
            engine.make_scenarios([settings(*overrides)])
        return
    (cell,) = engine.make_scenarios([settings(*overrides)])
    assert (cell.partition.client == -1).sum() == held
