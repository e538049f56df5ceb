"""The figure `networks`: what is drawn are the means of its table, and its sentence says where greedy does not win."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fl_attack import launcher, plots
from fl_attack.config import compose
from fl_attack.errors import InputError
from fl_attack.overrides import as_multirun, completed
from fl_attack.plots import canvas, equal_budgets
from fl_attack.sweep_table import RESULTS, read_sweep

ATTACKS = (("none", "untargeted"), ("greedy", "untargeted"), ("greedy", "targeted"), ("static_flip", "untargeted"))
PAIRS = ((10, 0.25), (3, 1.0))


def accuracy(model: str, k: float, name: str, goal: str, seed: int) -> float:
    base = {"logistic": 0.9, "mlp": 0.95}[model]
    harm = {"none": 0.0, "greedy": 0.5 if goal == "untargeted" else 0.3, "static_flip": 0.4}[name]
    if (model, name, k) == ("mlp", "static_flip", 0.3):
        harm = 0.6
    return base - harm + 0.01 * seed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep of two models, two pairs of write access and budget, four attacks and three seeds."""
    header = ["cell", "model", "clients.malicious", "attack.budget", "attack.name", "attack.goal", *RESULTS]
    with (tmp_path / "sweep.csv").open("w", newline="") as lines:
        out = csv.DictWriter(lines, header)
        out.writeheader()
        cell = 0
        for model in ("logistic", "mlp"):
            for malicious, b in PAIRS:
                for name, goal in ATTACKS:
                    for seed in range(3):
                        k, attacked = malicious / 10, name != "none"
                        row = dict.fromkeys(RESULTS, 1.0) | {"cell": cell, "model": model, "seed": seed, "error": ""}
                        row |= {"clients.malicious": malicious, "attack.budget": b, "attack.name": name}
                        row |= {"attack.goal": goal, "write_access": k, "budget": b if attacked else 0.0}
                        row |= {"global_budget": k * b if attacked else 0.0, "writes": "labels" if attacked else "none"}
                        out.writerow(row | {"final_accuracy": accuracy(model, k, name, goal, seed)})
                        cell += 1
    return tmp_path


def test_points_stand_at_the_means_with_their_intervals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, save = [], canvas.save
    monkeypatch.setattr(canvas, "save", lambda figure, *rest: (figures.append(figure), save(figure, *rest))[1])
    files = plots.draw(folder, "networks")
    assert [file.name for file in files] == ["networks.png", "networks.pdf", "networks.csv"]
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert list(panels) == ["logistic", "mlp"]
    half = 4.302653 * 1 / np.sqrt(3)  # Student's t of 2 degrees of freedom, of deviations of one point
    for model, axes in panels.items():
        assert [text.get_text() for text in axes.get_xticklabels()] == ["k = 1\nb = 0.25", "k = 0.3\nb = 1"]
        for container in axes.containers:
            name, _, goal = container.get_label().partition(", ")
            expected = [100 * accuracy(model, k, name, goal or "untargeted", 1) for k in (1.0, 0.3)]
            np.testing.assert_allclose(container[0].get_ydata(), expected)
            assert [round(float(x)) for x in container[0].get_xdata()] == [0, 1]
            for bar, mean in zip(container[2][0].get_segments(), expected, strict=True):
                np.testing.assert_allclose(bar[:, 1], [mean - half, mean + half], rtol=1e-5)
        honest = next(line for line in axes.lines if line.get_label() == "unattacked")
        assert honest.get_ydata()[0] == pytest.approx(100 * accuracy(model, 1, "none", "", 1))


def test_the_sentence_names_where_greedy_does_not_win(folder: Path) -> None:
    said = equal_budgets.sentence(equal_budgets.points(read_sweep(folder), "model"))
    assert said == "Greedy does not do most harm in 1 of 4 settings: mlp k = 0.3 b = 1 (static_flip, by 10.0 points)."


def test_one_attack_is_no_comparison(folder: Path) -> None:
    file = folder / "sweep.csv"
    lines = file.read_text().splitlines()
    few = [line for line in lines if not any(name in line for name in ("static_flip", ",targeted"))]
    file.write_text("\n".join(few) + "\n")
    with pytest.raises(InputError, match="compares attacks"):
        plots.draw(folder, "networks")


def test_the_experiment_is_all_pairs_of_budget_and_attack_for_every_model() -> None:
    cells = launcher.grid(*as_multirun(["experiment=networks", "out=unused"])[1:])
    assert len(cells) == 3 * 5 * 6 * 5
    pairs = {(cell.settings.clients.malicious, cell.settings.attack.budget) for cell in cells}
    assert pairs == {(10, 0.1), (10, 0.25), (10, 0.5), (3, 1.0), (5, 1.0)}
    wanted = {(cell.settings.attack.name, cell.settings.attack.goal) for cell in cells}
    assert {("greedy", "untargeted"), ("greedy", "targeted"), ("confidence_flip", "untargeted")} <= wanted
    assert {cell.settings.model.name for cell in cells} == {"logistic", "mlp", "cnn"}


@pytest.mark.parametrize(
    ("given", "loader"),
    [([], "digits"), (["dataset.root=x"], "mnist"), (["dataset.root=x", "dataset=cifar10"], "cifar10")],
)
def test_the_experiment_is_on_mnist_where_its_folder_is_named(given: list[str], loader: str) -> None:
    assert compose("experiment=networks", "out=unused", *given).dataset.loader == loader
    assert completed(["dataset.root=x"]) == ["dataset.root=x"]


def test_values_set_together_must_be_as_many_as_their_keys() -> None:
    assert launcher._joint_cases("a.b+c=1+x, 2+y") == [["a.b=1", "c=x"], ["a.b=2", "c=y"]]
    with pytest.raises(InputError, match=r"a\.b\+c sets 2 keys together; 2 is not 2 values"):
        launcher._joint_cases("a.b+c=1+x,2")
