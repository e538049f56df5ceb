"""Accuracy and F1 as scikit-learn has them, alike in both engines, and of each client."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from fl_attack import experiment, results, scenario
from fl_attack.config import compose
from fl_attack.engine import Outcome, sequential

Small = Callable[..., list[str]]


def run_alone(cell: scenario.Scenario) -> Outcome:
    """One experiment, client by client."""
    return sequential.run(cell, client_by_client=True)


def last_row(folder: Path) -> dict[str, str]:
    with (folder / "rounds.csv").open() as lines:
        return list(csv.DictReader(lines))[-1]


@pytest.mark.parametrize("test_classes", [2, 3])
def test_f1_is_the_mean_over_the_classes_that_occur(tmp_path: Path, test_classes: int) -> None:
    rng = np.random.default_rng(0)
    centres, y_train = 4 * rng.normal(size=(3, 5)), np.arange(90) % 3
    y_test = np.arange(30) % test_classes  # of two of three classes, or all
    x_train, x_test = (centres[y] + rng.normal(size=(len(y), 5)) / 4 for y in (y_train, y_test))
    np.savez(tmp_path / "d.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    run = ["dataset=npz", f"dataset.path={tmp_path}/d.npz", "rounds=40", "lr=0.5", "batch_size=full", "attack=none"]
    experiment.run(compose(*run, "engine=batched", f"out={tmp_path}/o"))
    alone = run_alone(scenario.make(compose(*run))).table[-1]
    row = last_row(tmp_path / "o")
    assert float(row["test_accuracy"]) == pytest.approx(alone[1], abs=0) == 1.0
    assert float(row["test_f1"]) == pytest.approx(alone[2], abs=1e-12) == 1.0  # a class that is nowhere counts nothing


def test_two_class_accuracy_is_exact(small_data: Small, tmp_path: Path) -> None:
    run = [*small_data(2, test=71), "rounds=3", "batch_size=full", "attack.budget=0.4"]
    experiment.run(compose(*run, "engine=batched", f"out={tmp_path}/o"))
    alone = run_alone(scenario.make(compose(*run))).table
    with (tmp_path / "o" / "rounds.csv").open() as lines:
        accuracy = [float(row["test_accuracy"]) for row in csv.DictReader(lines)]
    assert accuracy == [round(value * 71) / 71 for value in accuracy] == alone[:, 1].tolist()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_numbers_are_scikit_learns(small_data: Small, tmp_path: Path, classes: int) -> None:
    settings = compose(*small_data(classes), "rounds=5", "engine=batched", "batch_size=full", f"out={tmp_path}/o")
    experiment.run(settings)
    cell, theta = scenario.make(settings), np.load(tmp_path / "o" / "model.npz")["theta"]
    X, y = cell.test_set()
    Z = X.double().numpy() @ theta.T
    predicted = (Z[:, 0] > 0).astype(int) if classes == 2 else Z.argmax(1)
    average = "binary" if classes == 2 else "macro"
    row = last_row(tmp_path / "o")
    assert float(row["test_accuracy"]) == pytest.approx(accuracy_score(y, predicted), abs=1e-12)
    assert float(row["test_f1"]) == pytest.approx(f1_score(y, predicted, average=average), abs=1e-12)


def test_each_clients_accuracy_on_its_own_data_is_told(
    small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SAMPLES_AT_ONCE", 50)  # of 120: the last piece is a smaller one
    run = ["rounds=8", "engine=batched", "partition=dirichlet", "batch_size=30", f"out={tmp_path}/o"]
    settings = compose(*small_data(3), *run)
    experiment.run(settings)
    theta = torch.from_numpy(np.load(tmp_path / "o" / "model.npz")["theta"])
    dealt = np.load(tmp_path / "o" / "partition.npz")
    cell = scenario.make(settings)
    with (tmp_path / "o" / "clients.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["client"]) for row in rows] == list(range(10))
    assert [i for i, row in enumerate(rows) if row["malicious"] == "1"] == dealt["malicious"].tolist()
    for i, row in enumerate(rows):
        mine = np.flatnonzero(dealt["client"] == i)
        y = cell.dataset.y_train[mine]
        assert int(row["samples"]) == len(mine)
        assert row["labels"] == " ".join(map(str, np.unique(y)))
        correct = (cell.features(mine).double() @ theta.T).argmax(1).numpy() == y
        assert float(row["final_accuracy"]) == pytest.approx(correct.mean())
    total = sum(float(row["final_accuracy"]) * int(row["samples"]) for row in rows)
    assert 0 < total <= 120
    assert (tmp_path / "o" / "baseline" / "clients.csv").exists()
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["clients"] == 10
