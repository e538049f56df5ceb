"""Figures: the numbers that are drawn, read from the figure itself, and those of the table beside it.

Every column of the tables here has numbers of its own, so that none can stand for another.
"""

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fl_attack import plots
from fl_attack.plots.lines import lines

RESULTS = [
    *("write_access", "budget", "global_budget", "seed", "final_accuracy", "minimum_accuracy", "early_stop_accuracy"),
    *("final_f1", "final_loss", "drop", "flips", "rounds", "writes", "error"),
]
WRITES = {"none": "none", "ipm": "updates", "alie": "updates"}
Draw = Callable[..., Figure]
# final accuracy of one seed; the other has a hundredth more
ATTACKS = {"none": 0.9, "greedy": 0.5, "random_flip": 0.8, "ipm": 0.3, "alie": 0.7}
STRATEGIES = {"mean": 0.0, "median": 0.05, "krum": 0.02}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Draw:
    """The figure that the command of a folder and a kind saves."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))  # drawn in another test

    def run(*arguments: object) -> Figure:
        saved.clear()
        assert plots.main([str(one) for one in arguments]) == 0, capsys.readouterr().err
        return saved[0]

    return run


def write_sweep(folder: Path, accuracy: Callable[..., float], **swept: Any) -> Path:
    """A sweep over the product of these columns; what has no column of its own is derived from the accuracy."""
    names = {
        "attack": "attack.name",
        "strategy": "strategy.name",
        "goal": "attack.goal",
        "malicious": "clients.malicious",
    }
    header = ["cell", *(names.get(name, name) for name in swept if name not in ("seed", "budget")), *RESULTS]
    with (folder / "sweep.csv").open("w", newline="") as lines:
        out = csv.DictWriter(lines, header)
        out.writeheader()
        for cell, values in enumerate(itertools.product(*swept.values())):
            given = dict(zip(swept, values, strict=True))
            k, b, final = given.get("malicious", 3) / 10, given.get("budget", 0.5), accuracy(**given)
            row = {"write_access": k, "budget": b, "global_budget": k * b, "seed": given.get("seed", 0)}
            row |= {"final_accuracy": final, "minimum_accuracy": final - 0.11, "early_stop_accuracy": final + 0.013}
            row |= {"final_f1": final - 0.23, "final_loss": 3 - final, "drop": 0.95 - final, "flips": cell}
            row |= {"rounds": 7, "error": "", "cell": cell, "writes": WRITES.get(given.get("attack", ""), "labels")}
            out.writerow({names.get(name, name): value for name, value in given.items()} | row)
    return folder


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def line(figure: Figure, label: str, panel: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The points of the line that the legend calls so."""
    axes = figure.axes[panel]
    (found,) = [handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True) if name == label]
    points = found if hasattr(found, "get_xdata") else found.lines[0]
    return np.asarray(points.get_xdata(), float), np.asarray(points.get_ydata(), float)


def of_attack(attack: str, strategy: str = "mean", seed: int = 0, malicious: int = 3) -> float:
    return ATTACKS[attack] + STRATEGIES[strategy] + 0.01 * seed - (attack != "none") * 0.02 * malicious


def test_a_matrix_shows_the_mean_of_each_pair_and_frames_the_worst_attack_on_each_rule(
    draw: Draw, tmp_path: Path
) -> None:
    low = {("random_flip", "krum"): 0.1}  # so that not every rule has the same worst one

    def accuracy(attack: str, strategy: str, seed: int) -> float:
        return low.get((attack, strategy), of_attack(attack, strategy)) + 0.01 * seed

    folder = write_sweep(tmp_path, accuracy, attack=ATTACKS, strategy=STRATEGIES, seed=(0, 1))
    axes = draw(folder, "matrix").axes[0]
    wanted = {
        (attack, strategy): 100 * (accuracy(attack, strategy, 0) + 0.005)
        for attack in ATTACKS
        for strategy in STRATEGIES
    }
    rows, columns = ([tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    assert rows == list(ATTACKS) and columns == list(STRATEGIES)
    assert axes.get_xticks().tolist() == [0.5, 1.5, 2.5] and axes.get_yticks().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    shown = {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): float(
            text.get_text().partition(" ± ")[0]
        )
        for text in axes.texts
    }
    assert shown == {pair: pytest.approx(value, abs=0.51) for pair, value in wanted.items()}
    (mesh,) = axes.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()).ravel(), list(wanted.values()))
    framed = {columns[int(patch.get_x())]: rows[int(patch.get_y())] for patch in axes.patches}
    worst = {"mean": "ipm", "median": "ipm", "krum": "random_flip"}
    assert framed == worst
    table = read_table(folder / "matrix.csv")
    assert {row["strategy.name"]: row["attack.name"] for row in table if row["worst"] == "1"} == worst
    for row in table:
        assert float(row["mean"]) == pytest.approx(wanted[row["attack.name"], row["strategy.name"]], rel=1e-3)
        assert float(row["interval"]) == pytest.approx(12.706 * 0.5, rel=1e-3)  # t of one degree, 1 / 2 point


def test_arms_show_each_defence_under_each_attack_with_its_interval_and_frame_the_worst(
    draw: Draw, tmp_path: Path
) -> None:
    attacks, defences = (
        {"none": 0.9, "greedy": 0.7, "greedy, adapted": 0.6, "ipm": 0.65},
        ("mean", "median", "nnm, mean"),
    )
    names = ("attack.name", "attack.adapt", "strategy.name", "strategy.pre", "sanitize.name", "partition.name")
    # median is not told from its honest accuracy under greedy flips, and better against attackers who adapt
    other = {("greedy", "median"): 0.93, ("greedy, adapted", "median"): 0.8}

    def accuracy(attack: str, defence: str, partition: str, seed: int) -> float:
        first = other.get((attack, defence), attacks[attack] + 0.03 * defences.index(defence))
        apart = 0.2 if (attack, defence) == ("greedy", "median") else 0.02
        return first - (0.1 if partition == "dirichlet" else 0.0) + apart * seed * (attack != "none")

    met = list(itertools.product(attacks, defences, ("iid", "dirichlet")))
    with (tmp_path / "sweep.csv").open("w", newline="") as lines:
        out = csv.writer(lines)
        out.writerow(["cell", *names, *RESULTS])
        for cell, ((attack, defence, partition), seed) in enumerate(itertools.product(met, (0, 1))):
            name, *adapts = attack.split(", ")
            pre, rule = ("[nnm]", "mean") if "nnm" in defence else ("[]", defence)
            final = accuracy(attack, defence, partition, seed)
            results = dict.fromkeys(RESULTS, 0.5) | {"seed": seed, "final_accuracy": final, "error": ""}
            results["writes"] = WRITES.get(name, "labels")
            chosen = [name, "rule" if adapts else "none", rule, pre, "none", partition]
            out.writerow([cell, *chosen, *results.values()])
    figure = draw(tmp_path, "arms")
    table = {(row["setting"], row["defence"], row["attack"]): row for row in read_table(tmp_path / "arms.csv")}
    rows = [one.get_text() for one in figure.axes[0].get_yticklabels()]  # of both panels
    for axes, partition in zip(figure.axes, ("dirichlet", "iid"), strict=False):  # as names sort
        assert axes.get_title("left") == f"partition = {partition}"
        columns = [one.get_text() for one in axes.get_xticklabels()]
        assert (columns, rows) == (list(attacks), list(defences))
        shown = {}
        for text in axes.texts:
            shown[columns[int(text.get_position()[0])], rows[int(text.get_position()[1])]] = text.get_text()
        for attack, defence in itertools.product(attacks, defences):
            two = [100 * accuracy(attack, defence, partition, seed) for seed in (0, 1)]
            half = 12.706 * abs(two[1] - two[0]) / 2  # Student's t of one degree of freedom
            loss = 100 * accuracy("none", defence, partition, 0) - np.array(two)
            unsure = attack != "none" and abs(loss.mean()) <= 12.706 * abs(loss[1] - loss[0]) / 2
            assert shown[attack, defence] == f"{np.mean(two):.0f} ± {half:.0f}" + "°" * bool(unsure)
            row = next(one for key, one in table.items() if partition in key[0] and key[1:] == (defence, attack))
            numbers = [float(row[name]) for name in ("mean", "interval", "harm", "harm_interval")]
            assert numbers == pytest.approx([np.mean(two), half, loss.mean(), half], rel=1e-3, abs=1e-9)
        framed = {(int(patch.get_x()), int(patch.get_y())) for patch in axes.patches}
        worst = {"mean": "greedy, adapted", "median": "ipm", "nnm, mean": "greedy, adapted"}
        assert framed == {(columns.index(attack), rows.index(defence)) for defence, attack in worst.items()}


def test_harm_is_the_worst_flips_drop_over_the_worst_gradients_drop(draw: Draw, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, of_attack, attack=ATTACKS, malicious=(1, 3), seed=(0, 1))
    figure = draw(folder, "harm")
    for name in ATTACKS:
        at, mean = line(figure, name)
        assert at.tolist() == [0.1, 0.3]
        assert mean == pytest.approx([100 * of_attack(name, malicious=f) + 0.5 for f in (1, 3)])
    rows = read_table(folder / "harm.csv")
    assert [float(row["write_access"]) for row in rows] == [0.1, 0.3]
    for row, f in zip(rows, (1, 3), strict=True):
        flips, gradients = (100 * (0.9 - of_attack(name, malicious=f)) for name in ("greedy", "ipm"))
        assert (row["flips"], row["gradients"]) == ("greedy", "ipm")
        assert float(row["drop_by_flips"]) == pytest.approx(flips, rel=1e-3)
        assert float(row["drop_by_gradients"]) == pytest.approx(gradients, rel=1e-3)
        assert float(row["ratio"]) == pytest.approx(flips / gradients, rel=1e-3)


def test_rounds_are_the_mean_over_seeds_of_each_attack(draw: Draw, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, of_attack, attack=("none", "greedy"), seed=(0, 1))
    curves = np.random.default_rng(0).uniform(size=(4, 5))
    np.savez(folder / "curves.npz", accuracy=curves, round=np.array([0.0, 2, 4, 6, 7]))
    figure = draw(folder, "rounds")
    for name, cells in {"none": [0, 1], "greedy": [2, 3]}.items():
        at, mean = line(figure, name)
        assert at.tolist() == [0, 2, 4, 6, 7]
        assert mean == pytest.approx(100 * curves[cells].mean(0))


def test_a_heat_map_shows_means_of_its_column_at_its_k_and_b(draw: Draw, tmp_path: Path) -> None:
    def accuracy(malicious: int, budget: float, seed: int) -> float:
        return 0.9 - 0.01 * malicious - 0.2 * budget + 0.02 * seed

    folder = write_sweep(tmp_path, accuracy, malicious=(1, 2, 4), budget=(0.25, 0.5), seed=(0, 1))
    for column, shift, unit in (
        ("final_accuracy", 0.0, 100),
        ("minimum_accuracy", -0.11, 100),
        ("final_loss", None, 1),
    ):
        axes = draw(folder, "heatmap", column).axes[0]
        final = np.array([[accuracy(f, b, 0) + 0.01 for f in (1, 2, 4)] for b in (0.25, 0.5)])  # rows are b
        wanted = 3 - final if shift is None else final + shift
        np.testing.assert_allclose(np.asarray(axes.collections[0].get_array()).reshape(2, 3), unit * wanted)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "0.2", "0.4"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0.25", "0.5"]


def test_columns_draw_the_named_column_for_each_value_of_another(draw: Draw, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, of_attack, attack=("greedy", "ipm"), strategy=("mean", "krum"), seed=(0, 1))
    for column, shift, unit in (("final_accuracy", 0.0, 100), ("minimum_accuracy", -0.11, 100), ("final_f1", -0.23, 1)):
        figure = draw(folder, "columns", "strategy.name", column, "attack.name")
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["krum", "mean"]
        for name in ("greedy", "ipm"):
            _, means = line(figure, name)
            wanted = [unit * (of_attack(name, rule) + 0.005 + shift) for rule in ("krum", "mean")]
            assert means == pytest.approx(wanted)


def test_the_curves_of_a_run_are_its_own_and_its_twins(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    text = "round,test_accuracy,test_f1,flips\n0,0.1,0.01,\n1,{},0.02,3\n2,{},0.03,3\n"
    (tmp_path / "rounds.csv").write_text(text.format(0.5, 0.4))
    (tmp_path / "baseline" / "rounds.csv").write_text(text.format(0.8, 0.9))
    figure = draw(tmp_path, "curves")
    assert [one.tolist() for one in line(figure, "attacked")] == [[0, 1, 2], [0.1, 0.5, 0.4]]
    assert [one.tolist() for one in line(figure, "honest")] == [[0, 1, 2], [0.1, 0.8, 0.9]]


def test_a_budget_plot_draws_each_goal_at_its_global_budgets(draw: Draw, tmp_path: Path) -> None:
    def accuracy(goal: str, budget: float, seed: int) -> float:
        return 0.9 - budget * (0.5 if goal == "targeted" else 0.3) + 0.02 * seed

    goals = ("untargeted", "targeted")
    folder = write_sweep(tmp_path, accuracy, goal=goals, budget=(0.2, 0.4, 0.8), seed=(0, 1))
    figure = draw(folder, "budget")
    for goal in goals:
        at, mean = line(figure, goal)
        assert at == pytest.approx([0.06, 0.12, 0.24])
        assert mean == pytest.approx([100 * (accuracy(goal, b, 0) + 0.01) for b in (0.2, 0.4, 0.8)])
    difference = draw(
        write_sweep(tmp_path, accuracy_of_both, goal=goals, malicious=(1, 2), budget=(0.2, 0.4)), "difference"
    )
    found = np.asarray(difference.axes[0].collections[0].get_array()).reshape(2, 2)
    np.testing.assert_allclose(
        found, [[2, 4], [4, 8]], atol=1e-9
    )  # untargeted less targeted: above 0 where that does more


def accuracy_of_both(goal: str, malicious: int, budget: float) -> float:
    return 0.9 - malicious * budget * (0.3 if goal == "targeted" else 0.2)


@pytest.mark.parametrize("log", [True, False])
def test_the_axis_of_small_shares_has_a_mark_for_each_that_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: bool
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    shares = (0.0, 0.001, 0.0012, 0.01, 0.1)
    rows = "".join(f"panel,line,{k},{90 - 100 * k},1.5\n" for k in shares)
    (tmp_path / "drawn.csv").write_text(f"panel,line,share,accuracy,interval\n{rows}")
    lines(tmp_path / "drawn.csv", "title", "note", log=log)
    axes = saved[0].axes[0]
    assert [one.tolist() for one in line(saved[0], "line")] == [[*shares], [90 - 100 * k for k in shares]]
    if log:
        assert axes.get_xticks().tolist() == [0.0, 0.001, 0.01, 0.1]  # 0.0012 would lie on 0.001
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.001", "0.01", "0.1"]
    assert axes.get_xscale() == ("symlog" if log else "linear")
