"""Figures of sweeps: the numbers drawn equal those worked out by hand, and every kind leaves whole files."""

import csv
import itertools
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

from fl_attack import plots, sweep_table
from fl_attack.errors import InputError
from fl_attack.overrides import known_keys
from fl_attack.plots import by_budget, by_round, canvas, maps, marks, versus
from fl_attack.plots import lines as by_table
from fl_attack.plots.arms import Meeting
from fl_attack.plots.planning import attackers
from fl_attack.sweep_table import RESULTS, WORDS, mean_interval

GOALS = ("untargeted", "targeted")
WRITES = {"none": "none", "sign_flip": "updates", "ipm": "updates"}  # all others write labels
OF_SWEEPS = ("heatmap", "budget", "difference", "spread")


def accuracy(malicious, budget, goal="untargeted", seed=0, **_):
    return 0.9 - 0.04 * malicious * budget - (0.1 if goal == "targeted" else 0) + 0.01 * seed * malicious


def sweep(folder, *, broken=(), value=accuracy, wobble=0.0, drop=(), **swept):
    """A sweep of ten clients over the product of these overrides; k wobbles with the seed as a deal of samples does."""
    names = {"malicious": "clients.malicious", "budget": "attack.budget", "goal": "attack.goal"}
    names |= {"attack": "attack.name", "strategy": "strategy.name"}
    swept = {"malicious": [3], "budget": [0.5]} | swept
    header = ["cell", *(names.get(name, name) for name in swept if name != "seed"), *RESULTS]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.csv").open("w", newline="") as lines:
        out = csv.DictWriter(lines, [name for name in header if name not in drop], extrasaction="ignore")
        out.writeheader()
        for cell, values in enumerate(itertools.product(*swept.values())):
            given = dict(zip(swept, values, strict=True))
            k = given["malicious"] / 10 + wobble * (given.get("seed", 0) - 1)
            found = value(**given)
            row = dict.fromkeys(RESULTS, found) | {"cell": cell, "seed": given.get("seed", 0), "rounds": 200}
            writes = WRITES.get(given.get("attack"), "labels")
            b = given["budget"] if writes == "labels" else 0.0
            row |= {"write_access": k, "budget": b, "global_budget": k * b, "error": "", "writes": writes}
            row |= {"minimum_accuracy": found - 0.3} if isinstance(found, float) else {}
            if cell in broken:
                row |= {"error": "diverged in round 3", "final_accuracy": "nan"}
            out.writerow({names.get(name, name): value for name, value in given.items()} | row)
    return folder


def full(folder, **more):
    return sweep(folder, malicious=[1, 2, 4], budget=[0.25, 0.5, 1.0], goal=GOALS, seed=range(3), **more)


def without(text, name):
    """A table whose column of this name is empty."""
    header, *rows = csv.reader(text.splitlines())
    at = header.index(name)
    cleared = ([*row[:at], "", *row[at + 1 :]] for row in rows)
    return "".join(",".join(row) + "\n" for row in [header, *cleared])


def is_whole(file):
    content = file.read_bytes()
    if file.suffix == ".pdf":
        return content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
    place, kinds = 8, []
    while place < len(content):
        size = int.from_bytes(content[place : place + 4])
        kind, body = content[place + 4 : place + 8], content[place + 4 : place + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(content[place + 8 + size : place + 12 + size])
        kinds.append(kind)
        place += 12 + size
    return content.startswith(b"\x89PNG\r\n\x1a\n") and kinds[0] == b"IHDR" and kinds[-1] == b"IEND"


def drawn(monkeypatch):
    """The figures that are saved from here on."""
    figures, save = [], canvas.save

    def keep(figure, *rest):
        figures.append(figure)
        return save(figure, *rest)

    monkeypatch.setattr(canvas, "save", keep)
    return figures


# --- numbers ---------------------------------------------------------------------------------------


def test_means_on_a_grid_have_x_along_columns_and_nan_where_no_cell_is():
    x, y = np.array([0.1, 0.1, 0.2, 0.1]), np.array([1.0, 1.0, 1.0, 2.0])
    grid = maps.means_on_grid(x, y, np.array([4.0, 6.0, 7.0, 9.0]), np.array([0.1, 0.2]), np.array([1.0, 2.0]))
    np.testing.assert_array_equal(grid, [[5, 7], [9, np.nan]])


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_confidence_is_student_s_interval(level):
    values = np.random.default_rng(0).normal(3, 2, 5)
    mean, half = sweep_table.mean_interval(values, level)
    low, high = stats.t.interval(level, 4, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_confidence_of_three_values_by_hand():
    assert sweep_table.mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2, 4.302653 / 3**0.5))


def test_one_value_has_a_mean_and_no_interval():
    mean, half = sweep_table.mean_interval(np.array([7.0]))
    assert mean == 7 and np.isnan(half)


def test_pooled_deviation_knows_no_difference_between_groups():
    one, other = np.array([0.0, 2.0]), np.array([100.0, 101.0, 102.0])
    assert sweep_table.pooled_deviation([one, other, np.array([55.0])]) == pytest.approx(((2 + 2) / 3) ** 0.5)
    assert sweep_table.pooled_deviation([one]) == pytest.approx(one.std(ddof=1))
    assert np.isnan(sweep_table.pooled_deviation([np.array([5.0])]))


def test_a_table_written_is_read_back_to_the_same_bits_or_to_its_digits(tmp_path):
    rows = [("a,b", 0.1 + 0.2, 3, ""), ("c", np.float64(1 / 3), 4, float("nan"))]
    header = ["name", "x", "n", "more"]
    _, found = sweep_table.read_csv(sweep_table.write_csv(tmp_path / "a" / "t.csv", header, rows), "a sweep")
    assert [(row["name"], float(row["x"]), row["n"], row["more"]) for row in found] == [
        ("a,b", 0.1 + 0.2, "3", ""),
        ("c", 1 / 3, "4", "nan"),
    ]
    _, found = sweep_table.read_csv(sweep_table.write_csv(tmp_path / "t.csv", header, rows, 4), "a sweep")
    assert [row["x"] for row in found] == ["0.3", "0.3333"]


def test_split_orders_numbers_as_numbers():
    parts = sweep_table.split(4, np.array([10.0, 9.0, 10.0, 1.0]))
    assert {key: cells.tolist() for key, cells in parts.items()} == {(1.0,): [3], (9.0,): [1], (10.0,): [0, 2]}
    assert list(parts) == [(1.0,), (9.0,), (10.0,)]
    assert sweep_table.split(3)[()].tolist() == [0, 1, 2]


# --- reading ---------------------------------------------------------------------------------------


def test_a_deal_that_moves_with_the_seed_makes_one_k_of_each_number_of_clients(tmp_path):
    found = sweep_table.read_sweep(full(tmp_path, wobble=0.004))
    assert sorted(set(found.column("write_access"))) == [0.1, 0.2, 0.4]
    np.testing.assert_allclose(found.column("global_budget"), found.column("write_access") * found.column("budget"))
    assert found.varied("global_budget") == ["attack.goal"] and sorted(set(found.seed_index)) == [0, 1, 2]


def test_accuracies_are_read_in_percent_and_text_stays_text(tmp_path):
    found = sweep_table.read_sweep(sweep(tmp_path, goal=GOALS))
    np.testing.assert_allclose(found.column("final_accuracy"), [100 * accuracy(3, 0.5, goal) for goal in GOALS])
    assert found.column("attack.goal").tolist() == list(GOALS)


def test_cells_that_broke_off_are_left_out_and_counted(tmp_path):
    found = sweep_table.read_sweep(full(tmp_path, broken=(0, 7)))
    assert found.total == 54 and len(found) == 52
    assert np.isfinite(found.column("final_accuracy")).all()
    assert "2 of 54 cells" in found.note("x.")
    assert sweep_table.read_sweep(full(tmp_path)).note("x.") == "x."


def test_settings_that_differ_in_the_fifth_digit_are_two_lines(tmp_path):
    found = sweep_table.read_sweep(sweep(tmp_path, lr=[1.23456, 1.23457], seed=[0, 1]))
    assert sorted(set(found.labels(["lr"]))) == ["learning rate = 1.23456", "learning rate = 1.23457"]
    assert sweep_table.format_values([0.12345, 0.5, "a", ""]) == ["0.1235", "0.5", "a", "(not given)"]
    assert sweep_table.format_values([0.12345, 0.12346, float("nan"), float("nan")]) == [
        "0.12345",
        "0.12346",
        "nan",
        "nan",
    ]


def test_a_matrix_names_rows_that_differ_in_the_fifth_digit(tmp_path):
    sweep(tmp_path, lr=[1.23456, 1.23457], goal=GOALS)
    plots.draw(tmp_path, "matrix", "lr", "attack.goal")
    with (tmp_path / "matrix.csv").open() as lines:
        assert {row["lr"] for row in csv.DictReader(lines)} == {"1.23456", "1.23457"}


def test_settings_are_the_swept_columns_that_a_figure_does_not_show_and_the_goal_comes_first(tmp_path):
    found = sweep_table.read_sweep(sweep(tmp_path, lr=[0.1, 1.0], goal=GOALS, malicious=[1, 2], seed=[0, 1]))
    assert found.varied() == ["attack.goal", "clients.malicious", "lr"]
    assert found.varied("write_access") == found.varied("global_budget") == ["attack.goal", "lr"]
    assert found.varied("budget") == found.varied()
    assert found.labels(["attack.goal", "lr"])[0] == "untargeted, learning rate = 0.1"
    assert found.averaging() == "mean over 2 seeds"
    assert sweep_table.read_sweep(sweep(tmp_path, lr=[0.1, 1.0])).averaging() == "one seed"


def test_write_access_does_not_tell_what_else_was_swept_of_the_clients(tmp_path):
    more = {"malicious": [2, 4], "clients.per_round": [5, 10]}
    found = sweep_table.read_sweep(sweep(tmp_path, **more))
    assert found.varied("write_access") == ["clients.per_round"]


def test_equal_cells_of_a_seed_are_one_value(tmp_path):
    def value(*, seed, lr, **_):
        return 0.1 * seed + lr

    found = sweep_table.read_sweep(sweep(tmp_path, seed=[0, 1], lr=[0.1, 0.3], broken=(3,), value=value))
    np.testing.assert_allclose(found.seed_means(np.arange(3)), [20, 20])


def test_a_table_without_the_column_writes_is_read_by_the_names_of_attacks(tmp_path):
    found = sweep_table.read_sweep(sweep(tmp_path, attack=["none", "greedy"], drop=("writes",)))
    assert found.column("writes").tolist() == ["none", "labels"]


def test_the_difference_is_that_of_pairs_only(tmp_path):
    found = sweep_table.read_sweep(full(tmp_path, broken=(0,)))
    cells, values = maps.goal_differences(found)
    assert len(cells) == 26
    np.testing.assert_allclose(values, 10)


def test_deviations_are_over_seeds_and_not_over_budgets(tmp_path):
    found = sweep_table.read_sweep(full(tmp_path))
    deviations = by_budget.deviations_over_seeds(found, *by_budget.panel_and_line(found, "global_budget"))
    assert deviations == pytest.approx({("", goal, m / 10): m for goal in GOALS for m in (1, 2, 4)})


# --- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_SWEEPS)
def test_a_kind_leaves_a_whole_png_and_pdf_the_same_each_time(kind, tmp_path, real_pdf):
    full(tmp_path, broken=(0, 1, 2))
    files = plots.PLOTS[kind](tmp_path)
    assert [file.name for file in files] == [f"{kind}.png", f"{kind}.pdf"]
    assert all(map(is_whole, files))
    before = [file.read_bytes() for file in files]
    assert not any(b"CreationDate" in content for content in before)
    assert [file.read_bytes() for file in plots.PLOTS[kind](tmp_path)] == before


def test_a_heat_map_shows_the_means_on_one_scale(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.heatmap(full(tmp_path, wobble=0.004))
    *panels, bar = figures[0].axes
    assert [axes.get_title("left") for axes in panels] == ["targeted", "untargeted"]
    for axes, goal in zip(panels, reversed(GOALS), strict=True):
        image = axes.collections[0]
        expected = [[100 * accuracy(m, b, goal, seed=1) for m in (1, 2, 4)] for b in (0.25, 0.5, 1.0)]
        np.testing.assert_allclose(image.get_array(), expected)
        texts = [text.get_text() for text in axes.texts if not text.get_text().startswith("k·b")]
        assert texts == [f"{value:.1f}" for row in expected for value in row]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert panels[0].collections[0].get_clim() == panels[1].collections[0].get_clim()
    assert bar.get_ylabel() == "final test accuracy (%)"


def test_lines_of_equal_product_pass_through_cells_of_that_product(tmp_path, monkeypatch):
    ks, bs = np.array([0.1, 0.2, 0.4, 0.8]), np.array([0.125, 0.25, 0.5, 1.0])
    figures = drawn(monkeypatch)
    plots.heatmap(sweep(tmp_path, malicious=[1, 2, 4, 8], budget=bs.tolist()))
    axes = figures[0].axes[0]
    texts = [text.get_text() for text in axes.texts if text.get_text().startswith("k·b")]
    chosen = marks.products_to_label(ks, bs)
    assert texts == [f"k·b = {product:.3g}" for product in chosen]
    for product, line in zip(chosen, axes.lines[1::2], strict=True):
        for (row, column), value in np.ndenumerate(np.outer(bs, ks)):
            if value == pytest.approx(product):  # the line goes through its centre
                distance = np.abs(line.get_xydata() - (column + 0.5, row + 0.5)).max(1).min()
                assert distance < 0.01


def test_products_are_those_that_cells_share_and_never_zero():
    tenths = np.arange(0, 11) / 10
    shared = marks.products_to_label(tenths, tenths)
    every = np.round(np.outer(tenths, tenths), 9)
    assert len(shared) >= 3 and min(shared) > 0 and all((every == product).sum() > 1 for product in shared)
    assert marks.products_to_label(np.array([0.0, 0.0]), np.array([0.0, 1.0])) == []


def test_large_maps_print_no_values(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.heatmap(sweep(tmp_path, malicious=[1, 2], budget=[i / 13 for i in range(1, 14)]))
    assert not [text for text in figures[0].axes[0].texts if text.get_text() and "k·b" not in text.get_text()]


def test_the_difference_is_centred_at_zero(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.difference(full(tmp_path))
    image = figures[0].axes[0].collections[0]
    np.testing.assert_allclose(image.get_array(), 10)
    assert image.get_clim() == pytest.approx((-10, 10))


def test_the_budget_plot_has_a_line_for_each_k_and_bands_over_seeds(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.budget(full(tmp_path))
    targeted, untargeted = figures[0].axes
    assert [line.get_label() for line in untargeted.lines] == ["k = 0.1", "k = 0.2", "k = 0.4"]
    for axes, goal in ((untargeted, "untargeted"), (targeted, "targeted")):
        for line, band, m in zip(axes.lines, axes.collections, (1, 2, 4), strict=True):
            bs = np.array([0.25, 0.5, 1.0])
            expected = 100 * accuracy(m, bs, goal, seed=1)
            np.testing.assert_allclose(line.get_xydata(), np.transpose([m / 10 * bs, expected]))
            half = stats.t.ppf(0.975, 2) * m / 3**0.5
            heights = band.get_paths()[0].vertices
            for x, mean in zip(m / 10 * bs, expected, strict=True):
                at = heights[np.isclose(heights[:, 0], x), 1]
                assert (at.min(), at.max()) == pytest.approx((mean - half, mean + half))
        low, high = axes.get_ylim()
        assert all(low <= line.get_ydata().min() and line.get_ydata().max() <= high for line in axes.lines)


def test_with_one_k_the_budget_plot_has_a_line_for_each_goal(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.budget(sweep(tmp_path, budget=[0.1, 0.5], goal=GOALS))
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["targeted", "untargeted"]
    assert "no bands" in figures[0]._supxlabel.get_text()


def test_columns_draw_means_and_intervals_over_seeds_with_a_panel_for_each_setting(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    files = plots.columns(full(tmp_path), "clients.malicious", "minimum_accuracy", "attack.goal")
    assert [file.name for file in files] == [
        f"columns_clients-malicious_minimum_accuracy_attack-goal.{kind}" for kind in ("png", "pdf")
    ]
    assert all(map(is_whole, files))
    assert [axes.get_title("left") for axes in figures[0].axes] == [f"local budget b = {b:g}" for b in (0.25, 0.5, 1)]
    for axes, b in zip(figures[0].axes, (0.25, 0.5, 1.0), strict=True):
        for (line, _, (bars,)), goal in zip(axes.containers, sorted(GOALS), strict=True):
            assert line.get_xdata().tolist() == [1, 2, 4]
            for at, m in enumerate((1, 2, 4)):
                cells = [100 * (accuracy(m, b, goal, seed) - 0.3) for seed in range(3)]
                mean, half = np.mean(cells), stats.t.ppf(0.975, 2) * stats.sem(cells)
                assert line.get_ydata()[at] == pytest.approx(mean)
                assert bars.get_segments()[at][:, 1] == pytest.approx([mean - half, mean + half])
    assert axes.get_ylabel() == "" and figures[0].axes[0].get_ylabel() == "minimum test accuracy (%)"
    assert axes.get_xlabel() == "malicious clients"


def test_a_column_of_results_against_another_is_drawn_as_cells_alone(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.columns(sweep(tmp_path, seed=range(3), lr=[0.1, 1.0]), "final_accuracy", "minimum_accuracy")
    (axes,) = figures[0].axes
    assert not axes.containers and len(axes.lines[0].get_xdata()) == 6


def test_a_column_of_text_is_an_axis_of_names(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.columns(sweep(tmp_path, strategy=["median", "mean"], seed=range(3)), "strategy.name", "final_accuracy")
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == ["mean", "median"]


@pytest.mark.parametrize(
    ("swept", "kinds"),
    [
        ({"seed": range(3)}, set()),
        ({"budget": [0.1, 0.5]}, {"budget"}),
        ({"malicious": [1, 2], "seed": range(2)}, {"budget", "spread"}),
        ({"malicious": [1, 2], "budget": [0.1, 0.5]}, {"heatmap", "budget"}),
        ({"malicious": [1, 2], "budget": [0.1, 0.5], "goal": GOALS}, {"heatmap", "budget", "difference"}),
        ({"goal": GOALS}, {"columns_attack-goal_final_accuracy"}),
        ({"lr": [0.1, 1.0], "goal": GOALS}, {"columns_lr_final_accuracy_attack-goal"}),
    ],
)
def test_all_that_a_sweep_allows_is_drawn_and_nothing_else(swept, kinds, tmp_path):
    files = plots.all_of_sweep(sweep(tmp_path, **swept))
    assert {file.stem for file in files} == kinds
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} - {"sweep.csv"}


def test_a_sweep_that_broke_off_everywhere_draws_nothing(tmp_path):
    assert plots.all_of_sweep(sweep(tmp_path, seed=[0, 1], broken=(0, 1))) == []
    with pytest.raises(InputError, match="all 2 cells"):
        plots.heatmap(tmp_path)


# --- what each kind averages and leaves out -----------------------------------------------------------


def skewed(*, attack="greedy", strategy="mean", malicious=3, budget=1.0, seed=0, **_):
    """An accuracy whose mean over seeds is neither its median nor its minimum."""
    harm = {"none": 0.0, "greedy": 0.5, "mine.py:flip": 0.2, "sign_flip": 0.25, "ipm": 0.1}[attack]
    return 0.9 - harm * malicious / 10 * budget - (0.1 if strategy == "krum" else 0.0) + 0.01 * seed**2


SEEDS = 3
OVER_SEEDS = 100 * np.mean([0.01 * seed**2 for seed in range(SEEDS)])


def mean_of(**setting):
    return 100 * skewed(**setting) + OVER_SEEDS


@pytest.mark.parametrize("kind", ["budget", "heatmap"])
def test_attacks_on_updates_do_not_stand_at_a_budget_of_labels(kind, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    swept = {"malicious": [1, 2], "budget": [0.5, 1.0], "seed": range(SEEDS), "attack": ["greedy", "sign_flip"]}
    plots.PLOTS[kind](sweep(tmp_path, value=skewed, **swept))
    axes = figures[0].axes[0]
    assert len(figures[0].axes) == 1 + (kind == "heatmap")  # a colour bar
    if kind == "budget":
        for line, m in zip(axes.lines, (1, 2), strict=True):
            np.testing.assert_allclose(line.get_xdata(), [m / 20, m / 10])
            np.testing.assert_allclose(line.get_ydata(), [mean_of(malicious=m, budget=b) for b in (0.5, 1.0)])
    else:
        expected = [[mean_of(malicious=m, budget=b) for m in (1, 2)] for b in (0.5, 1.0)]
        np.testing.assert_allclose(axes.collections[0].get_array(), expected)
    assert "12 cells that flip no labels" in " ".join(figures[0]._supxlabel.get_text().split())
    with pytest.raises(InputError, match="no budget of labels"):
        plots.PLOTS[kind](sweep(tmp_path, value=skewed, **(swept | {"attack": ["ipm", "sign_flip"]})))


def test_unattacked_cells_are_a_point_at_budget_zero_and_no_panel_of_a_heat_map(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    swept = {"malicious": [1, 2], "budget": [0.5, 1.0], "attack": ["none", "greedy"]}

    def value(*, attack, budget, **more):
        return skewed(attack=attack, budget=budget, **more) if attack != "none" else 0.95

    folder = sweep(tmp_path, value=value, **swept)
    plots.budget(folder)
    panels = {axes.get_title("left"): axes for axes in figures[0].axes}
    assert all(set(line.get_xdata()) == {0} for line in panels["attack = none"].lines)
    plots.heatmap(folder)
    assert [axes.get_title("left") for axes in figures[1].axes[:-1]] == [""]
    assert np.isfinite(figures[1].axes[0].collections[0].get_array()).all()


def test_the_budget_plot_has_a_line_for_each_rule_and_averages_none_of_them(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.budget(sweep(tmp_path, value=skewed, budget=[0.5, 1.0], strategy=["mean", "krum"], seed=range(SEEDS)))
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["aggregation rule = krum", "aggregation rule = mean"]
    for line, band, rule in zip(axes.lines, axes.collections, ("krum", "mean"), strict=True):
        expected = np.array([mean_of(strategy=rule, budget=b) for b in (0.5, 1.0)])
        np.testing.assert_allclose(line.get_xydata(), np.transpose([[0.15, 0.3], expected]))
        values = [100 * skewed(strategy=rule, budget=0.5, seed=seed) for seed in range(SEEDS)]
        low, high = stats.t.interval(0.95, SEEDS - 1, np.mean(values), stats.sem(values))
        corners = band.get_paths()[0].vertices
        heights = corners[np.isclose(corners[:, 0], 0.15), 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))


def test_more_settings_than_lines_are_panels_and_more_than_panels_are_refused(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rules, rates = [f"rule{i}" for i in range(4)], [0.1, 0.2, 0.3]
    plots.budget(sweep(tmp_path, budget=[0.5, 1.0], strategy=rules, lr=rates, seed=[0, 1]))
    assert [axes.get_title("left") for axes in figures[0].axes] == [f"aggregation rule = {rule}" for rule in rules]
    assert [line.get_label() for line in figures[0].axes[0].lines] == [f"learning rate = 0.{i}" for i in (1, 2, 3)]
    for kind in ("budget", "heatmap"):
        many = {"malicious": [1, 2], "budget": [0.5, 1.0], "strategy": [f"rule{i}" for i in range(13)]}
        with pytest.raises(InputError, match="a figure shows at most 12, the sweep has 13"):
            plots.PLOTS[kind](sweep(tmp_path, **many))


def test_the_matrix_shows_means_and_frames_the_lowest_attacked_one(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)

    def value(*, attack, strategy, seed, **_):
        if attack == "none":
            return 0.1  # lower than any attacked one
        return skewed(
            attack="ipm" if (attack, strategy) == ("greedy", "krum") else attack, strategy=strategy, seed=seed
        )

    attacks, rules = ["none", "greedy", "sign_flip"], ["mean", "krum"]
    files = plots.matrix(sweep(tmp_path, value=value, attack=attacks, strategy=rules, seed=range(SEEDS)))
    axes = figures[0].axes[0]
    expected = np.array(
        [[100 * np.mean([value(attack=a, strategy=s, seed=i) for i in range(SEEDS)]) for s in rules] for a in attacks]
    )
    np.testing.assert_allclose(axes.collections[0].get_array(), expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == attacks
    assert [label.get_text() for label in axes.get_xticklabels()] == rules
    halves = [
        mean_interval(np.array([100 * value(attack=a, strategy=s, seed=i) for i in range(SEEDS)]))[1]
        for a in attacks
        for s in rules
    ]
    shown = [f"{one:.0f} ± {half:.0f}" for one, half in zip(expected.ravel(), halves, strict=True)]
    assert [text.get_text() for text in axes.texts] == shown
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("attack", "aggregation rule")
    frames = [(round(patch.get_x()), round(patch.get_y())) for patch in axes.patches]
    assert frames == [(0, 1), (1, 2)]  # greedy is the worst for the mean, sign_flip for Krum
    with files[-1].open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["attack.name"], row["strategy.name"]) for row in rows if row["worst"] == "1"] == [
        ("greedy", "mean"),
        ("sign_flip", "krum"),
    ]
    for row in rows:
        at = attacks.index(row["attack.name"]), rules.index(row["strategy.name"])
        assert float(row["mean"]) == pytest.approx(expected[at], rel=1e-3)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([80, 82, 85, 90, 95], (80, 95, "neither")),
        ([10, 80, 82, 85, 90, 95], (80, 95, "min")),  # one cell is farther off than all others from each other
        ([10, 80, 82, 85, 90, 200, float("nan")], (80, 90, "both")),
        ([10, 20, 82, 85, 90, 95], (10, 95, "neither")),  # two of six are no exception
        ([10, 95], (10, 95, "neither")),
        ([*range(100, 200), 900, 901], (100, 199, "max")),
    ],
)
def test_a_few_cells_do_not_stretch_a_colour_scale(values, wanted):
    assert canvas.limits(np.array(values, float)) == wanted


def test_a_cell_far_off_has_an_arrow_on_the_colour_bar_and_its_number(tmp_path, monkeypatch):
    figures, grid = drawn(monkeypatch), {"malicious": [1, 2, 4], "budget": [0.25, 0.5, 1.0]}
    plots.heatmap(
        sweep(
            tmp_path, value=lambda malicious, budget, **_: 0.1 if malicious * budget == 4 else 0.8 + budget / 10, **grid
        )
    )
    axes, bar = figures[0].axes
    assert axes.collections[0].get_clim() == pytest.approx((82.5, 90.0))
    assert "10.0" in [text.get_text() for text in axes.texts] and bar._colorbar.extend == "min"


def test_no_two_lines_of_a_figure_look_alike():
    looks = [canvas.style(number) for number in range(3 * canvas.ENTRIES)]
    assert len({(look["color"], look["marker"]) for look in looks}) == len(looks)
    assert len({look["color"] for look in looks[: canvas.ENTRIES]}) == canvas.ENTRIES


def test_without_titles_a_figure_is_left_to_its_caption(tmp_path, monkeypatch):
    figures, folder = drawn(monkeypatch), full(tmp_path)
    for option in ([], ["--no-titles"]):
        assert plots.main([str(folder), "heatmap", *option]) == 0
    told = [[text.get_text() for text in (figure._suptitle, figure._supxlabel) if text] for figure in figures]
    assert len(told[0]) == 2 and told[1] == []


def test_every_word_is_of_a_setting_that_there_is():
    assert set(WORDS) <= {*known_keys(), "attack", "dataset", "model", "partition", "sanitize", "strategy"}


def test_a_matrix_frames_no_row_where_nobody_attacks(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    folder = sweep(tmp_path, attack=["none"], strategy=["mean", "median"], malicious=[1, 2])
    plots.matrix(folder, "strategy.name", "clients.malicious")
    assert not figures[0].axes[0].patches
    with (folder / "matrix.csv").open() as lines:
        assert {row["worst"] for row in csv.DictReader(lines)} == {"0"}


def test_a_matrix_of_several_budgets_is_several(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    swept = {"attack": ["none", "greedy"], "strategy": ["mean", "krum"], "budget": [0.5, 1.0]}
    files = plots.matrix(sweep(tmp_path, value=skewed, **swept))
    *panels, _ = figures[0].axes
    assert [axes.get_title("left") for axes in panels] == ["local budget b = 0.5", "local budget b = 1"]
    for axes, b in zip(panels, (0.5, 1.0), strict=True):
        assert axes.collections[0].get_array()[1, 0] == pytest.approx(100 * skewed(budget=b))
    with files[-1].open() as lines:
        rows = [
            row for row in csv.DictReader(lines) if (row["attack.name"], row["strategy.name"]) == ("greedy", "mean")
        ]
    assert [(row["attack.budget"], row["mean"]) for row in rows] == [("0.5", "82.5"), ("1", "75")]


HARM = {"attack": ["none", "greedy", "mine.py:flip", "sign_flip", "ipm"], "malicious": [1, 4], "budget": [1.0]}


def test_harm_draws_each_attack_over_write_access_and_a_user_s_flips_are_flips(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.harm(sweep(tmp_path, value=skewed, seed=range(SEEDS), **HARM))
    (axes,) = figures[0].axes
    looks = {}
    for container in axes.containers:
        line, _, (bars,) = container
        name = container.get_label()
        looks[name] = line.get_linestyle()
        means = [mean_of(attack=name, malicious=m) for m in (1, 4)]
        np.testing.assert_allclose(line.get_xydata(), np.transpose([[0.1, 0.4], means]))
        values = [100 * skewed(attack=name, malicious=4, seed=seed) for seed in range(SEEDS)]
        low, high = stats.t.interval(0.95, SEEDS - 1, np.mean(values), stats.sem(values))
        assert bars.get_segments()[1][:, 1] == pytest.approx([low, high])
    assert looks == {"none": ":", "greedy": "-", "mine.py:flip": "-", "sign_flip": "--", "ipm": "--"}


def test_the_long_path_of_a_user_s_attack_is_shortened_and_leaves_room_for_the_figure(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    path = "/a/long/way/to/the/folder/of/a/user/who/keeps/everything/in/its/place/mine.py:flip"
    swept = HARM | {"attack": ["none", "greedy", path, "sign_flip"]}
    plots.harm(sweep(tmp_path, value=lambda attack, **more: 0.5, **swept))  # a warning would be an error here
    (legend,) = figures[0].legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[2].endswith("mine.py:flip") and len(shown[2]) == 32


def test_the_ratio_of_harm_is_the_drop_by_the_worst_flips_over_that_by_the_worst_updates(tmp_path):
    files = plots.harm(sweep(tmp_path, value=skewed, seed=range(SEEDS), **HARM))
    with files[-1].open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["write_access"] for row in rows] == ["0.1", "0.4"]
    for row in rows:
        k = float(row["write_access"])
        assert (row["flips"], row["gradients"]) == ("greedy", "sign_flip")
        assert float(row["drop_by_flips"]) == pytest.approx(50 * k)
        assert float(row["drop_by_gradients"]) == pytest.approx(25 * k)
        assert float(row["ratio"]) == pytest.approx(2)
        assert float(row["drop_by_flips_interval"]) == pytest.approx(0, abs=1e-9)  # equal in all seeds
    without = HARM | {"attack": ["none", "greedy", "mine.py:flip"]}
    with pytest.raises(InputError, match="attacks on labels and on gradients"):
        plots.harm(sweep(tmp_path, value=skewed, seed=range(SEEDS), **without))
    with pytest.raises(InputError, match="unattacked cells"):
        plots.harm(sweep(tmp_path, value=skewed, **(HARM | {"attack": ["greedy", "ipm"]})))


def test_rounds_draw_the_mean_of_seeds_with_bands_a_panel_for_each_rule(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    swept = {"attack": ["none", "greedy"], "strategy": ["mean", "krum"], "seed": range(SEEDS)}
    folder = sweep(tmp_path, value=skewed, **swept)
    settings = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    curves = np.array([[0.1, skewed(**one) / 2, skewed(**one)] for one in settings])
    np.savez(folder / "curves.npz", accuracy=curves, round=np.array([0.0, 5.0, 10.0]))
    plots.rounds(folder)
    assert [axes.get_title("left") for axes in figures[0].axes] == [
        "aggregation rule = krum",
        "aggregation rule = mean",
    ]
    for axes, rule in zip(figures[0].axes, ("krum", "mean"), strict=True):
        assert [line.get_label() for line in axes.lines] == ["none", "greedy"]
        for line, band, attack in zip(axes.lines, axes.collections, ("none", "greedy"), strict=True):
            mean = mean_of(attack=attack, strategy=rule)
            np.testing.assert_allclose(line.get_xydata(), [[0, 10], [5, mean / 2], [10, mean]])
            values = [100 * skewed(attack=attack, strategy=rule, seed=seed) for seed in range(SEEDS)]
            corners = band.get_paths()[0].vertices
            heights = corners[np.isclose(corners[:, 0], 10), 1]
            interval = stats.t.interval(0.95, SEEDS - 1, np.mean(values), stats.sem(values))
            assert (heights.min(), heights.max()) == pytest.approx(interval)


def test_the_spread_drawn_is_the_deviation_over_seeds(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plots.spread(full(tmp_path))
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == sorted(GOALS)
    for line in axes.lines:
        np.testing.assert_allclose(line.get_xydata(), [[m / 10, m] for m in (1, 2, 4)])  # 0, m, 2 m points


def test_a_heat_map_of_another_column_shows_that_column(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    files = plots.heatmap(full(tmp_path), "minimum_accuracy")
    assert files[0].name == "heatmap_minimum_accuracy.png"
    grid = figures[0].axes[1].collections[0].get_array()
    assert grid[2, 0] == pytest.approx(100 * (accuracy(1, 1.0, seed=1) - 0.3))  # untargeted, b = 1, k = 0.1


def test_curves_draw_the_attacked_run_and_its_honest_twin_by_their_names(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    (tmp_path / "baseline").mkdir()
    for folder, last in ((tmp_path, 0.5), (tmp_path / "baseline", 0.9)):
        (folder / "rounds.csv").write_text(f"round,test_accuracy,test_loss\n0,0.1,2\n1,{last},1\n")
    plots.curves(tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines == {"honest": [[0, 0.1], [1, 0.9]], "attacked": [[0, 0.1], [1, 0.5]]}


def test_lines_of_a_table_are_drawn_with_their_bands_under_their_names(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    header = ("goal", "k", "global_budget", "final_accuracy", "interval")
    rows = [
        *(("untargeted", "k = 1", x, 90 - 100 * x, 1.0) for x in (0.5, 0.0, 0.001)),
        *(("untargeted", "k = 0.5", x, 80 - 50 * x, 2.0) for x in (0.0, 0.001, 0.5)),
        *(("targeted", "k = 1", x, 70 - 20 * x, 3.0) for x in (0.0, 0.001, 0.5)),
    ]
    file = sweep_table.write_csv(tmp_path / "fig.csv", header, rows)
    by_table.lines(file, "a title", "a note", log=True, floor=0.0)
    panels = {axes.get_title("left"): axes for axes in figures[0].axes}
    assert set(panels) == {"untargeted", "targeted"}
    for name, axes in panels.items():
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {row[1] for row in rows if row[0] == name}
        for (label, line), band in zip(lines.items(), axes.collections, strict=True):
            expected = sorted(row[2:] for row in rows if row[:2] == (name, label))
            np.testing.assert_allclose(line.get_xydata(), [row[:2] for row in expected])
            x, mean, half = expected[1]
            corners = band.get_paths()[0].vertices
            heights = corners[np.isclose(corners[:, 0], x), 1]
            assert (heights.min(), heights.max()) == pytest.approx((mean - half, mean + half))
        assert axes.get_ylim()[0] == 0 and axes.get_xscale() == "symlog"
    assert figures[0].axes[0].get_ylabel() == "final test accuracy (%)"


def test_gradients_are_drawn_where_the_table_has_them(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    points = [
        ("b = 0.1", "random flips", 0.9, 0.1),
        ("b = 0.1", "random flips", 0.8, -0.2),
        ("b = 0.1", "clean", 1.0, 0.0),
    ]
    file = sweep_table.write_csv(tmp_path / "fig1.csv", ("budget", "kind", "first", "second"), points)
    by_table.gradients(file, "a title", "a note")
    (axes,) = figures[0].axes
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}
    assert found == {"random flips": [[0.9, 0.1], [0.8, -0.2]], "clean": [[1.0, 0.0]]}
    (arrow,) = [text for text in axes.texts if text.arrow_patch is not None]
    assert arrow.xy == pytest.approx((1, 0)) and arrow.get_position() == (0, 0)


# --- the border ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heat"], "heat is not a kind of plot; known: curves, heatmap,"),
        (["heatmap", "budget", "flips"], "usage:"),
        (["columns", "budget"], "usage:"),
        (["heatmap"], "a heat map needs several values of k; the sweep has only 0.3"),
        (["difference"], "attack.goal=untargeted,targeted"),
        (["spread"], "a plot by k needs several values of k"),
        (["columns", "budget", "accuracy"], "no column accuracy; known: cell, clients.malicious,"),
        (["columns", "budget", "strategy.name"], "strategy.name is a column of text"),
        (["heatmap", "drop"], "no cell has a number in drop"),
        (["all", "drop"], "usage: python -m fl_attack.plots"),
        (
            ["columns", "budget", "flips", "cell"],
            "at most 12, the sweep has 14 (0, 1, ...)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(arguments, message, tmp_path, capsys):
    sweep(tmp_path, strategy=["mean", "median"], budget=[i / 7 for i in range(7)])
    table = tmp_path / "sweep.csv"
    table.write_text(without(table.read_text(), "drop"))
    assert plots.main([str(tmp_path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.csv"]


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["FOLDER", "heatmap", "--help"]])
def test_help_is_printed_and_is_no_error(arguments, capsys):
    assert plots.main(arguments) == 0
    assert capsys.readouterr() == (plots.USAGE + "\n", "")
    assert plots.main([]) == 2  # while a line that names no folder is one
    assert capsys.readouterr() == ("", f"fl-attack: {plots.USAGE}\n")


def test_one_seed_has_no_spread(tmp_path):
    with pytest.raises(InputError, match="two seeds"):
        plots.spread(sweep(tmp_path, malicious=[1, 2]))


def test_folders_and_tables_that_are_none_are_told(tmp_path, capsys):
    for kind in ("heatmap", "all", "curves"):
        assert plots.main([str(tmp_path), kind]) == 2
        assert "No such file" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"sweep\.csv can't be read"):
        plots.all_of_sweep(tmp_path)
    (tmp_path / "sweep.csv").write_bytes(b"\xff\xfe\x00")
    assert plots.main([str(tmp_path)]) == 2
    sweep(tmp_path, drop=("final_loss",))
    with pytest.raises(InputError, match="no column final_loss"):
        plots.heatmap(tmp_path)
    sweep(tmp_path, value=lambda **_: "good")
    with pytest.raises(InputError, match="text in final_accuracy"):
        plots.heatmap(tmp_path)
    (tmp_path / "sweep.csv").write_text("cell,seed\n")
    with pytest.raises(InputError, match="no rows"):
        plots.heatmap(tmp_path)


def test_curves_of_a_run_are_drawn_without_a_kind(tmp_path, capsys):
    (tmp_path / "rounds.csv").write_text("round,test_accuracy,flips\n0,0.1,\n1,0.5,3\n")
    assert by_round.read_rounds(tmp_path)["round"] == [0, 1]
    assert plots.main([str(tmp_path)]) == 0
    files = [tmp_path / f"curves.{kind}" for kind in ("png", "pdf")]
    assert capsys.readouterr().out.split() == [str(file) for file in files] and all(map(is_whole, files))


def test_the_command_draws_all_of_a_sweep_and_names_the_files(tmp_path):
    sweep(tmp_path, budget=[0.1, 0.5])
    command = [sys.executable, "-W", "error", "-m", "fl_attack.plots", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(tmp_path / f"budget.{end}") for end in ("png", "pdf")]


# --- what a figure says besides its numbers ----------------------------------------------------------


MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def figures():
    """The figures that are drawn in the test, which no file is made of."""
    with canvas.captured() as kept:
        yield kept


def noted(figure):
    """The title and the note of a figure, each in one line."""
    return [" ".join(text.get_text().split()) if text else "" for text in (figure._suptitle, figure._supxlabel)]


@pytest.mark.parametrize(
    ("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (5, 3, 2), (7, 3, 3)]
)
def test_panels_stand_in_rows_and_only_the_outer_ones_name_the_axes(count, across, down):
    names = [f"a panel of number {number}" for number in range(count)]
    figure, panels = canvas.panels(names, 3.0, 2.0, "x", "y")
    assert list(panels) == names and list(panels.values()) == figure.axes
    assert figure.get_size_inches().tolist() == [3 * across, 2 * down]
    for number, (name, axes) in enumerate(panels.items()):
        place = axes.get_subplotspec()
        assert (place.rowspan.start, place.colspan.start) == divmod(number, across)
        lowest = number + across >= count  # none is below it
        assert axes.get_xlabel() == ("x" if lowest else "") and axes.get_ylabel() == ("" if number % across else "y")
        assert axes.xaxis.get_tick_params()["labelbottom"] == lowest
        assert axes.get_title("left") == name and axes.title.get_text() == ""
        assert count == 1 or axes.get_shared_x_axes().joined(axes, figure.axes[number - 1])
        assert count == 1 or axes.get_shared_y_axes().joined(axes, figure.axes[number - 1])
    narrow, _ = canvas.panels(["x" * 40], 3.0, 2.0, "", "")
    assert narrow.axes[0].get_title("left") == "\N{HORIZONTAL ELLIPSIS}" + "x" * 32  # 11 characters an inch


def test_a_text_as_long_as_there_is_room_for_stays_whole():
    assert canvas.shortened("abcd", 4) == "abcd" and canvas.shortened("abcde", 4) == "\N{HORIZONTAL ELLIPSIS}cde"
    assert len(canvas.shortened("x" * 99)) == 32


def test_lines_that_follow_an_order_go_from_dark_to_light():
    for shades in (2, 7, 20):
        light = [np.dot(canvas.style(number, shades)["color"][:3], (0.299, 0.587, 0.114)) for number in range(shades)]
        assert light == sorted(light) and len({*light}) == shades
        assert light[0] < 0.2 and 0.6 < light[-1] < 0.8  # the palest would be lost on white
    assert canvas.style(0, 1)["color"] == canvas.style(0, 9)["color"]
    assert [canvas.style(number)["color"] for number in range(12)] == [*canvas.COLOURS]
    assert canvas.style(12)["color"] == canvas.HONEST


@pytest.mark.parametrize("count", [11, 12, 13])
def test_so_many_lines_as_there_are_colours_have_one_each_and_more_are_shaded(count, tmp_path, figures):
    rows = [("", f"line {number:02d}", x, number + x, 0.1) for number in range(count) for x in (0.0, 1.0)]
    by_table.lines(sweep_table.write_csv(tmp_path / "t.csv", ("p", "line", "x", "y", "half"), rows), "", "")
    (axes,) = figures[0].axes
    colours = [line.get_color() for line in axes.lines]
    assert len({*colours}) == count
    assert (tuple(colours) == canvas.COLOURS[:count]) == (count <= 12)
    plan = [(f"{i}", 0, f"start {i:02d}", 0.5, 1) for i in range(count)]
    sweep_table.write_csv(tmp_path / "plan.csv", ("first_round", "sweep", "start", "objective", "part"), plan)
    (tmp_path / "one").mkdir()
    same = [("1", sweep, start, float(sweep), 1) for _, _, start, *_ in plan for sweep in (0, 1)]
    sweep_table.write_csv(tmp_path / "one/plan.csv", ("first_round", "sweep", "start", "objective", "part"), same)
    plots.plan_curves(tmp_path / "one")
    colours = [line.get_color() for line in figures[1].axes[0].lines]
    assert len({*colours}) == count and (tuple(colours) == canvas.COLOURS[:count]) == (count <= 12)
    (legend,) = figures[1].legends
    assert legend.get_title().get_text() == "start" and len(legend.get_texts()) == count


def test_the_plans_of_a_run_have_a_panel_for_each_round_that_one_was_made_in(tmp_path, figures):
    rows = [(f, s, start, f + s / 10 + (start == "b"), 1) for f in (1, 5) for start in "ab" for s in range(3)]
    header = ("first_round", "sweep", "start", "objective", "part")
    sweep_table.write_csv(tmp_path / "plan.csv", header, rows)
    plots.plan_curves(tmp_path)
    assert [axes.get_title("left") for axes in figures[0].axes] == ["from round 1", "from round 5"]
    for axes, first in zip(figures[0].axes, (1, 5), strict=True):
        found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert found == {name: [[s, first + s / 10 + more] for s in range(3)] for name, more in (("a", 0), ("b", 1))}
    sweep_table.write_csv(tmp_path / "plan.csv", header, [(first, 0, "a", 0.1, 1) for first in range(20)])
    plots.plan_curves(tmp_path)
    assert len(figures[1].axes) == canvas.PANELS


def test_small_shares_begin_at_zero_and_the_axis_is_linear_up_to_the_least(tmp_path, figures):
    rows = [("", name, x, 50 - 100 * x, 70.0) for name in ("first", "other") for x in (0.0, 0.01, 0.3)]
    file = sweep_table.write_csv(tmp_path / "t.csv", ("panel", "line", "attack.budget", "drop", "half"), rows)
    by_table.lines(file, "What is drawn", "And why.", log=True, floor=-7.0)
    (axes,) = figures[0].axes
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= 0.3 and axes.get_ylim()[0] == -7 < 0 < axes.get_ylim()[1]
    assert axes.xaxis.get_transform().linthresh == 0.01 and not len(axes.xaxis.get_minorticklocs())
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "local budget b",
        "drop of the final accuracy by the attack (points)",
    )
    assert noted(figures[0]) == ["What is drawn", "And why."]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "other"]
    assert len({line.get_linestyle() for line in axes.lines}) == 2  # for prints in grey
    by_table.lines(file, "", "")
    (axes,) = figures[1].axes
    assert axes.get_xlim()[0] < 0 and axes.get_ylim()[0] < -20 and noted(figures[1]) == ["", ""]


def test_many_gradients_of_a_kind_are_points_and_a_single_one_an_arrow_in_its_colour(tmp_path, figures):
    points = [("b = 1", "flips", 0.9, 0.1), ("b = 1", "flips", 0.8, -0.2), ("b = 1", "clean", 1.0, 0.5)]
    points += [("b = 2", "flips", -1.0, 0.0)]
    file = sweep_table.write_csv(tmp_path / "f.csv", ("budget", "kind", "first", "second"), points)
    by_table.gradients(file, "Title", "Note.")
    one, other = figures[0].axes
    assert [one.get_title("left"), other.get_title("left")] == ["b = 1", "b = 2"]
    assert one.get_xlabel() == "along the first direction" and one.get_ylabel() == "along the second"
    for axes, arrows in ((one, [(1.0, 0.5)]), (other, [(-1.0, 0.0)])):
        found = [text for text in axes.texts if text.arrow_patch is not None]
        assert [tuple(text.xy) for text in found] == arrows and all(text.get_position() == (0, 0) for text in found)
        named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert all(line.get_linestyle() == "None" for line in named.values())
        crossing = [line.get_xydata().tolist() for line in axes.lines if line.get_label().startswith("_")]
        assert crossing == [[[0, 0], [1, 0]], [[0, 0], [0, 1]]]  # the axes through the origin
    clean = next(line for line in one.lines if line.get_label() == "clean")
    (arrow,) = [text.arrow_patch for text in one.texts if text.arrow_patch is not None]
    assert to_hex(arrow.get_edgecolor()) == to_hex(clean.get_color())
    flips = next(line for line in one.lines if line.get_label() == "flips")
    assert flips.get_alpha() < 1 and flips.get_markersize() < clean.get_markersize()
    assert flips.get_color() == next(line for line in other.lines if line.get_label() == "flips").get_color()
    assert len(figures[0].legends) == 1 and noted(figures[0]) == ["Title", "Note."]


def heat_map(grid, signed=False, low=0.0, high=10.0, colours="cividis"):
    """The axes of a heat map of a grid, and its image."""
    _, panels = canvas.panels([""], 4.0, 3.0, "k", "b")
    grid = np.array(grid, float)
    xs, ys = np.arange(1, grid.shape[1] + 1) / 10, np.arange(1, grid.shape[0] + 1) / 100
    return panels[""], marks.heat(panels[""], xs, ys, grid, signed, cmap=colours, vmin=low, vmax=high)


def printed(axes):
    """The texts on the cells of a heat map, by column and row."""
    return {text.get_position(): text for text in axes.texts if not text.get_text().startswith("k·b")}


def test_values_are_printed_in_the_middle_of_their_cells_in_ink_that_is_read_on_them():
    axes, image = heat_map([[0.0, 9.94, np.nan], [5.06, 10.0, 1.0]])
    texts = printed(axes)
    assert {at: text.get_text() for at, text in texts.items()} == {
        (0.5, 0.5): "0.0",
        (1.5, 0.5): "9.9",
        (2.5, 0.5): "\N{MULTIPLICATION SIGN}",
        (0.5, 1.5): "5.1",
        (1.5, 1.5): "10.0",
        (2.5, 1.5): "1.0",
    }
    assert texts[0.5, 0.5].get_color() == "white" and texts[1.5, 1.5].get_color() == "black"  # dark and light ground
    assert texts[2.5, 0.5].get_color() == "0.4"
    for at, text in texts.items():  # the ground of a text is its cell's, so that no line crosses the figures
        value = image.get_array()[int(at[1]), int(at[0])]
        ground = text.get_bbox_patch().get_facecolor()
        assert np.ma.is_masked(value) or np.isnan(value) or ground == pytest.approx(image.cmap(image.norm(value)))
    assert axes.get_xlim() == (0, 3) and axes.get_ylim() == (0, 2)
    assert axes.get_xticks().tolist() == [0.5, 1.5, 2.5] and axes.get_yticks().tolist() == [0.5, 1.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.01", "0.02"]
    assert image.get_clim() == (0, 10) and image.cmap.name == "cividis"


def test_signed_values_have_their_sign_and_in_large_maps_the_minus_alone():
    axes, _ = heat_map([[-1.0, 2.0], [0.5, -10.0]], signed=True, low=-10, colours="PuOr_r")
    assert [text.get_text() for text in printed(axes).values()] == [f"{MINUS}1.0", "+2.0", "+0.5", f"{MINUS}10.0"]
    for rows, columns in ((13, 2), (2, 13)):
        grid = np.where(np.arange(rows * columns).reshape(rows, columns) % 3, 1.0, -1.0)
        axes, _ = heat_map(grid, signed=True, low=-1, high=1, colours="PuOr_r")
        for (column, row), text in printed(axes).items():
            assert text.get_text() == (MINUS if grid[int(row), int(column)] < 0 else "")
            assert text.get_bbox_patch() is None
        axes, _ = heat_map(grid, low=-1, high=1)
        assert not any(text.get_text() for text in printed(axes).values())
        ticks = axes.get_xticks() if columns == 13 else axes.get_yticks()
        assert ticks.tolist() == [0.5 + at for at in range(0, 13, 2)]
    axes, _ = heat_map(np.ones((12, 12)), high=2)
    assert len(axes.get_xticks()) == 12 and {text.get_text() for text in printed(axes).values()} == {"1.0"}


@pytest.mark.parametrize(
    ("xs", "ys"),
    [
        ((0.5, 1.0), (0.5, 1.0)),
        (np.arange(1, 11) / 10, np.arange(1, 11) / 10),
        ((0.1, 0.2, 0.4, 0.8), (0.125, 0.25, 0.5, 1.0)),
        ((0.0, 0.3, 0.4), (0.0, 0.5, 0.9, 1.0)),
    ],
)
def test_each_line_of_equal_products_ends_at_its_label_on_the_right_edge(xs, ys):
    xs, ys = np.array(xs), np.array(ys)
    _, panels = canvas.panels([""], 4.0, 3.0, "k", "b")
    axes = panels[""]
    marks.equal_products(axes, xs, ys)
    edges = [np.array([one[0] - (one[1] - one[0]) / 2, *one, one[-1] + (one[-1] - one[-2]) / 2]) for one in (xs, ys)]
    places = [np.array([0, *(np.arange(len(one)) + 0.5), len(one)]) for one in (xs, ys)]
    height = {one: np.interp(one / edges[0][-1], edges[1], places[1]) for one in marks.products_to_label(xs, ys)}
    labels = {float(text.get_text().split("=")[1]): text.xy for text in axes.texts}
    assert labels.keys() <= {float(f"{one:.3g}") for one in height} and min(height.values()) in [
        pytest.approx(at[1]) for at in labels.values()
    ]
    assert all(at == (len(xs), pytest.approx(height[product], abs=1e-2)) for product, at in labels.items())
    assert len(axes.lines) == 2 * len(labels)
    for number, product in enumerate(labels):
        wide, thin = axes.lines[2 * number : 2 * number + 2]
        assert (wide.get_color(), thin.get_color()) == (
            "white",
            "black",
        ) and wide.get_linewidth() > thin.get_linewidth()
        across, up = thin.get_xydata().T
        assert wide.get_xydata().tolist() == thin.get_xydata().tolist()
        x, y = np.interp(across, places[0], edges[0]), np.interp(up, places[1], edges[1])
        np.testing.assert_allclose(x * y, product, rtol=6e-3, atol=1e-4)
        assert across[-1] == len(xs) and (np.diff(up) <= 0).all()
        # it begins where it leaves the map: at its top, or on the left
        assert up[0] == pytest.approx(len(ys), abs=0.1) or across[0] == pytest.approx(0, abs=0.05)
    heights = sorted(at[1] for at in labels.values())
    assert (np.diff(heights) >= 0.05 * len(ys)).all() and axes.get_xlim() == (0, len(xs))


def test_products_of_which_few_are_shared_are_rounded_and_lie_on_lines_that_reach_the_edge():
    primes = np.array([0.02, 0.03, 0.05, 0.07, 0.11])
    found = marks.products_to_label(primes, np.array([0.01, 0.17, 0.6]))
    assert found == sorted({*found}) and 1 < len(found) <= 4 and all(f"{one:.1g}" == f"{one:.6g}" for one in found)
    shared = marks.products_to_label(np.arange(1, 11) / 10, np.arange(1, 11) / 10)
    assert len(shared) == 4 and min(shared) >= 0.1  # below, a line leaves the map at its lower edge
    low, high = (np.quantile(np.outer(primes[:4], primes[:4]), at) for at in (0.0, 1.0))
    assert all(low <= one <= high for one in marks.products_to_label(primes[:4], primes[:4]))


@pytest.mark.parametrize(("scale", "beyond"), [(1.0, "neither"), (-1.0, "neither")])
def test_differences_are_seen_on_a_scale_of_both_signs(scale, beyond, tmp_path, figures):

    def value(*, malicious, budget, goal, **_):
        return 0.5 + (scale * 0.02 * malicious * budget if goal == "untargeted" else 0.0)

    plots.difference(sweep(tmp_path, malicious=[1, 2], budget=[0.5, 1.0], goal=GOALS, value=value))
    axes, bar = figures[0].axes
    image = axes.collections[0]
    np.testing.assert_allclose(image.get_array(), scale * np.array([[1, 2], [2, 4]]), atol=1e-9)
    assert image.get_clim() == pytest.approx((-4, 4)) and bar._colorbar.extend == beyond
    assert bar.get_ylabel() == "difference in accuracy (percentage points)"
    signs = {text.get_text()[0] for text in printed(axes).values()}
    assert signs == {"+" if scale > 0 else MINUS} and image.cmap.name == "PuOr_r"
    assert "untargeted less targeted, one seed" in noted(figures[0])[0]
    assert noted(figures[0])[1].startswith("Above 0 the targeted attack does more harm.")


@pytest.mark.parametrize(
    ("far", "beyond"), [({(1, 0.1): -50}, "min"), ({(1, 0.1): 50}, "max"), ({(1, 0.1): -50, (8, 0.7): 50}, "both")]
)
def test_a_difference_far_off_has_an_arrow_at_its_end_of_the_scale(far, beyond, tmp_path, figures):

    def value(*, malicious, budget, goal, **_):
        apart = far.get((malicious, budget), malicious + budget)
        return 0.6 - (apart / 100 if goal == "targeted" else 0.0)

    side = 8 if beyond == "both" else 4  # one of fifty cells may be far off, here at either end
    budgets = [i / 10 for i in range(1, side)]
    folder = sweep(tmp_path, malicious=range(1, side + 1), budget=budgets, goal=GOALS, value=value)
    plots.difference(folder)
    axes, bar = figures[0].axes
    low, high = axes.collections[0].get_clim()
    assert -low == high < 10 and bar._colorbar.extend == beyond


def test_goals_that_do_the_same_differ_by_nothing_and_are_drawn_all_the_same(tmp_path, figures):
    plots.difference(sweep(tmp_path, malicious=[1, 2], budget=[0.5, 1.0], goal=GOALS, value=lambda **_: 0.5))
    image = figures[0].axes[0].collections[0]
    assert not image.get_array().any() and -image.get_clim()[0] == image.get_clim()[1] > 0
    with pytest.raises(InputError, match="untargeted and targeted cells of the same k, b and seed"):
        plots.difference(sweep(tmp_path, malicious=[1, 2], budget=[0.5], goal=GOALS, broken=(0, 3)))


def apart(*, attack="greedy", goal="untargeted", budget=1.0, malicious=3, seed=0, **_):
    """An accuracy of which two seeds tell so little that its interval leaves what is possible at both ends."""
    return 0.2 + 0.6 * seed - 0.1 * (attack == "ipm") - 0.02 * (goal == "targeted")


WIDE = {
    "budget": {"budget": [0.5, 1.0]},
    "harm": {"attack": ["none", "greedy", "ipm"], "malicious": [1, 2]},
    "rounds": {"attack": ["none", "greedy"]},
    "networks": {"model": ["logistic", "mlp"], "attack": ["none", "greedy", "random_flip"]},
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("several", [True, False])
def test_axes_of_accuracies_show_what_is_possible_and_say_what_their_bars_are(kind, several, tmp_path, figures):
    value = apart if several else lambda **more: 0.5 + 0.01 * apart(**more)
    folder = sweep(tmp_path, value=value, **WIDE[kind], seed=range(1 + several))
    cells = len((folder / "sweep.csv").read_text().splitlines()) - 1
    finals = [[0.1, value(seed=cell % 2)] for cell in range(cells)]
    np.savez(folder / "curves.npz", accuracy=np.array(finals), round=np.array([0.0, 5.0]))
    plots.PLOTS[kind](folder)
    for axes in figures[0].axes:
        low, high = axes.get_ylim()
        if several:
            assert -2 <= low <= 0 and 100 < high <= 102
        elif kind != "rounds":
            assert (low == 0 if kind == "harm" else 40 < low < 50.2) and 50 < high < 55
    title, note = noted(figures[0])
    if kind in ("budget", "rounds", "networks"):
        assert ("mean over 2 seeds" in title) == several and ("one seed" in title) == (not several)
    if kind == "budget":
        said = "Bands: 95 % confidence of the mean over seeds (Student t)." if several else "One seed: no bands."
        assert note.startswith(said) and figures[0].axes[0].get_xlim()[0] == 0
    if kind == "rounds":
        assert note == ("Bands: 95 % confidence of the mean over seeds (Student t)." if several else "")
        (legend,) = figures[0].legends
        assert legend.get_title().get_text() == "attack"
    if kind == "harm":
        assert title == "Final test accuracy by write access" and note.startswith("Solid: label flips; dashed: grad")


@pytest.mark.parametrize("seeds", [1, 2])
def test_notes_tell_of_intervals_only_where_there_are_some(seeds, tmp_path, figures):
    swept = {"attack": ["none", "greedy"], "strategy": ["mean", "krum"], "seed": range(seeds)}
    plots.matrix(sweep(tmp_path, value=skewed, **swept))
    title, note = noted(figures[0])
    assert title.endswith("mean over 2 seeds" if seeds > 1 else "one seed")
    half = "± half the 95 % interval over seeds (Student t)."
    assert note == "Framed: the worst for each column." + (f" {half}" if seeds > 1 else "")
    assert all(("±" in text.get_text()) == (seeds > 1) for text in figures[0].axes[0].texts)
    assert figures[0].axes[-1].get_ylabel() == "final test accuracy (%)"
    assert figures[0].axes[0].get_ylim() == (2, 0)  # the first row is on top


def test_a_matrix_has_a_cross_where_no_cell_is_and_panels_of_single_cells(tmp_path, figures):
    swept = {"attack": ["none", "greedy"], "strategy": ["mean", "krum"], "budget": [0.5, 1.0]}
    files = plots.matrix(sweep(tmp_path, value=skewed, broken=(4, 5, 6), **swept))  # of b = 1 one cell is left
    half, whole, _ = figures[0].axes
    assert [text.get_text() for text in whole.texts] == ["\N{MULTIPLICATION SIGN}"] * 3 + ["65"]
    assert "\N{MULTIPLICATION SIGN}" not in [text.get_text() for text in half.texts]
    with files[-1].open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["attack.budget"] == "1"]
    assert [row["mean"] for row in rows] == ["nan", "nan", "nan", "65"] and rows[0]["worst"] == "0"
    assert [(round(patch.get_x()), round(patch.get_y())) for patch in whole.patches] == [(1, 1)]
    assert noted(figures[0])[1].endswith("Left out: 3 of 8 cells broke off.")
    with pytest.raises(InputError, match=r"a matrix needs several values of strategy\.name"):
        plots.matrix(sweep(tmp_path, value=skewed, attack=["none", "greedy"], strategy=["mean"]))


def test_harm_has_a_panel_and_rows_for_each_other_setting(tmp_path, figures):
    swept = {"attack": ["greedy", "none", "ipm"], "malicious": [1, 4], "strategy": ["mean", "krum"]}
    files = plots.harm(sweep(tmp_path, value=skewed, **swept))
    assert [axes.get_title("left") for axes in figures[0].axes] == [
        "aggregation rule = krum",
        "aggregation rule = mean",
    ]
    assert [one.get_label() for one in figures[0].axes[0].containers] == ["none", "greedy", "ipm"]
    unattacked, *others = [one[0] for one in figures[0].axes[0].containers]
    assert unattacked.get_color() == "0.4" and unattacked.get_marker() in ("", "None")
    assert [line.get_color() for line in others] == [*canvas.COLOURS[1:3]]
    assert figures[0].axes[0].get_xlabel() == "write access k (share of all samples)"
    with files[-1].open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["strategy.name"], row["write_access"]) for row in rows] == [
        *(("krum", "0.1"), ("krum", "0.4"), ("mean", "0.1"), ("mean", "0.4"))
    ]
    assert {row["ratio"] for row in rows} == {"5"}


def test_a_fan_draws_some_of_many_k_and_says_so(tmp_path, figures):
    for count in (6, 8):
        plots.budget(sweep(tmp_path, malicious=range(1, count + 1), budget=[0.5, 1.0]))
    few, many = ([line.get_label() for line in figure.axes[0].lines] for figure in figures)
    assert few == [f"k = 0.{m}" for m in range(1, 7)]
    assert len(many) == 6 and (many[0], many[-1]) == ("k = 0.1", "k = 0.8")
    each = "Each line has one k and raises b."
    assert [noted(figure)[1].partition(" Labels")[0] for figure in figures] == [
        f"{each} One seed: no bands.",
        f"{each} 6 of 8 values of k are drawn. One seed: no bands.",
    ]
    colours = [np.dot(line.get_color()[:3], (0.299, 0.587, 0.114)) for line in figures[0].axes[0].lines]
    assert colours == sorted(colours) and all(line.get_linestyle() == "-" for line in figures[0].axes[0].lines)


@pytest.mark.parametrize("kind", ["budget", "spread"])
def test_six_settings_are_lines_in_colours_and_seven_make_panels_or_shades(kind, tmp_path, figures):
    for count in (6, 7):
        swept = {"budget": [0.5, 1.0]} if kind == "budget" else {"malicious": [1, 2]}
        rules = {"strategy": [f"rule{i}" for i in range(count)]}
        plots.PLOTS[kind](sweep(tmp_path, seed=[0, 1], **rules, **swept))
    for figure, count in zip(figures, (6, 7), strict=True):
        (axes,) = figure.axes
        assert [line.get_label() for line in axes.lines] == [f"aggregation rule = rule{i}" for i in range(count)]
        colours = [line.get_color() for line in axes.lines]
        assert (tuple(colours) == canvas.COLOURS[:6]) == (count == 6) and len({*colours}) == count
        assert len({line.get_linestyle() if count == 6 else str(line) for line in axes.lines}) >= 4
    if kind == "spread":
        assert figures[0].axes[0].get_ylim()[0] == 0
        title, note = noted(figures[0])
        assert title == "Standard deviation of the final test accuracy over 2 seeds"
        assert note.startswith("Pooled over b: root of the mean variance")
        assert figures[0].axes[0].get_ylabel() == "standard deviation (percentage points)"


def test_a_budget_that_varies_between_settings_alone_is_no_line(tmp_path):
    budgets = {"a": 0.5, "b": 1.0}

    def value(*, strategy, **_):
        return 0.5

    folder = sweep(tmp_path, strategy=[*budgets], value=value)
    text = (folder / "sweep.csv").read_text().splitlines()
    (folder / "sweep.csv").write_text("\n".join([*text[:2], text[2].replace("0.5,0.15", "1.0,0.3")]) + "\n")
    with pytest.raises(InputError, match=r"several values of k·b in a setting"):
        plots.budget(folder)


def test_names_on_an_axis_have_their_lines_side_by_side(tmp_path, figures):
    rules = ["mean", "krum", "a rule of a long name indeed", "another of a name as long"]
    swept = {"strategy": rules, "goal": GOALS, "seed": [0, 1]}
    plots.columns(sweep(tmp_path, value=skewed, **swept), "strategy.name", "final_accuracy", "attack.goal")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == sorted(rules)
    assert axes.get_xlim() == (-0.5, 3.5) and axes.get_xticks().tolist() == [0, 1, 2, 3]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {25} and axes.get_xscale() == "linear"
    places = [np.asarray(container[0].get_xdata(), float) for container in axes.containers]
    np.testing.assert_allclose(np.mean(places, 0), range(4), atol=1e-9)
    assert (places[0] < places[1]).all() and np.ptp(places) < 3.5
    faint = [line for line in axes.lines if line.get_alpha() and line.get_alpha() < 1]
    for cells, at in zip(faint, places, strict=True):  # the cells stand under their mean
        assert sorted({*cells.get_xdata()}) == pytest.approx(sorted(at)) and len(cells.get_xdata()) == 8
    assert all(container[0].get_linestyle() == "None" for container in axes.containers)
    (legend,) = figures[0].legends
    assert legend.get_title().get_text() == "goal"
    assert noted(figures[0])[1] == "Bars: 95 % confidence of the mean over seeds (Student t); faint: the cells."


def test_an_axis_over_several_magnitudes_is_logarithmic(tmp_path, figures):
    for rates in ([0.1, 5.0], [0.1, 5.1], [0.0, 9.0], [-1.0, 9.0]):
        plots.columns(sweep(tmp_path, lr=rates, seed=[0, 1]), "lr", "final_accuracy")
    assert [figure.axes[0].get_xscale() for figure in figures] == ["linear", "log", "linear", "linear"]
    (axes,) = figures[0].axes
    assert axes.containers[0][0].get_xdata().tolist() == [0.1, 5.0] and axes.get_xlabel() == "learning rate"
    assert not figures[0].legends  # a single line has no name


def test_cells_without_a_number_are_counted_under_the_figure(tmp_path, figures):
    folder = sweep(tmp_path, lr=[0.1, 1.0], seed=[0, 1, 2])
    with (folder / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for row, found in zip(rows, ("0.5", "", "0.3", "0.2", "", ""), strict=True):
        row["drop"] = found
    sweep_table.write_csv(folder / "sweep.csv", [*rows[0]], [[*row.values()] for row in rows])
    plots.columns(folder, "lr", "drop")
    plots.columns(folder, "drop", "final_accuracy")
    plots.columns(folder, "cell", "drop")
    assert [noted(figure)[1] for figure in figures] == [
        "Bars: 95 % confidence of the mean over seeds (Student t); faint: the cells. 3 cells have no such number.",
        *["3 cells have no such number."] * 2,
    ]
    assert figures[0].axes[0].containers[0][0].get_ydata() == pytest.approx([40, 20])
    assert figures[1].axes[0].lines[0].get_xdata().tolist() == pytest.approx([50, 30, 20])
    assert figures[2].axes[0].lines[0].get_xdata().tolist() == [0, 2, 3] and not figures[2].axes[0].containers


@pytest.mark.parametrize("budget", [0, 0.25])
def test_the_curves_of_a_run_name_its_budget_and_stand_on_the_whole_axis(budget, tmp_path, figures):
    (tmp_path / "rounds.csv").write_text("round,test_accuracy\n0,0.1\n40,0.5\n")
    (tmp_path / "summary.json").write_text(f'{{"budget": {budget}, "write_access": 0.30004}}')
    plots.curves(tmp_path)
    with canvas.untitled():
        plots.curves(tmp_path)
    titled, untitled = (figure.axes[0] for figure in figures)
    assert titled.get_xlim() == (0, 40) and titled.get_ylim() == (0, 1.02)
    assert (titled.get_xlabel(), titled.get_ylabel()) == ("round", "test accuracy")
    assert titled.get_title("left") == ("write access k = 0.3, local budget b = 0.25" if budget else "")
    assert untitled.get_title("left") == ""
    assert [text.get_text() for text in titled.get_legend().get_texts()] == ["run"]  # nobody is compared with


def test_what_the_configuration_of_a_sweep_asks_for_is_drawn_once_and_besides(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: None)  # drawn in other tests
    folder = sweep(tmp_path, budget=[0.1, 0.5], strategy=["mean", "krum"])
    (folder / "config.yaml").write_text("figures: [[columns, budget, flips], [budget]]\n")
    assert plots.asked(folder) == [["columns", "budget", "flips"], ["budget"]]
    names = [file.name for file in plots.all_asked(folder)]
    stems = ["budget", "columns_strategy-name_final_accuracy", "columns_budget_flips"]
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")]
    for content in (b"figures: 3", b"lr: 1", b"- x", b"{", b"\xff\xfe"):
        (folder / "config.yaml").write_bytes(content)
        assert plots.asked(folder) == []
    assert plots.columns_of("columns", "a", "b") == ["a", "b"] and plots.columns_of("matrix", "a") == [
        *("a", "strategy.name"),
    ]
    assert plots.columns_of("heatmap") == ["final_accuracy"] and plots.columns_of("all") == []


def test_a_map_is_as_wide_as_its_columns_need_up_to_a_dozen(tmp_path, figures):
    for count in (2, 8, 10, 12, 20):
        plots.heatmap(sweep(tmp_path, malicious=range(1, count + 1), budget=[0.5, 1.0]))
    two, eight, ten, twelve, twenty = (figure.get_figwidth() for figure in figures)
    assert two == eight < ten < twelve == twenty
    plots.difference(sweep(tmp_path, malicious=[1, 2], budget=[0.5, 1.0], goal=GOALS))
    assert figures[-1].get_figwidth() > two  # signs take room


def test_the_last_of_several_settings_is_the_line_and_all_others_are_the_panel(tmp_path):
    swept = {"lr": [0.1, 0.2], "strategy": ["mean", "krum"], "local_steps": [1, 2]}
    panel, line = by_budget.panel_and_line(sweep_table.read_sweep(sweep(tmp_path, **swept)), "global_budget")
    assert set(line) == {"local steps = 1", "local steps = 2"} and len(set(panel)) == 4
    assert "learning rate = 0.1, aggregation rule = mean" in panel


@pytest.mark.parametrize(
    ("attack", "harm", "verdict"),
    [
        ("greedy", [0.0, 0.0, 0.0], "includes zero"),  # it does nothing at all
        ("greedy", [1.0, 1.0, 1.0], "harm"),
        ("greedy", [-1.0, -1.0, -1.0], "gain"),
        ("greedy", [3.0, -2.0, 1.0], "includes zero"),
        ("greedy", [5.0], "one seed"),
        ("none", [1.0, 1.0, 1.0], ""),
    ],
)
def test_harm_is_told_from_none_by_its_interval(attack, harm, verdict):
    assert Meeting("", "mean", attack, np.full(len(harm), 50.0), np.array(harm)).verdict == verdict


def test_words_of_people_have_no_underscores_and_columns_are_those_of_the_table():
    words = [*WORDS.values(), *(label for label, _ in sweep_table.LABELS.values())]
    assert not [word for word in words if "_" in word]
    assert sweep_table.LABELS.keys() <= {*RESULTS} and sweep_table.NUMBERS.keys() <= sweep_table.LABELS.keys()
    for name, (label, factor) in sweep_table.LABELS.items():
        assert factor == (100 if "(%)" in label or "(points)" in label else 1), name


def planned(*, attack, malicious, budget, seed, goal="untargeted", **more):
    """An accuracy of which plans leave less, those of the final one least; the targeted goal is the better one."""
    gain = {"final": 0.2, "average": 0.1}[more["attack.objective"]] * budget if attack == "planned" else 0.0
    return 0.9 - 0.02 * malicious - gain - 0.05 * (goal == "targeted") + 0.01 * seed * (1 + (attack == "planned"))


def test_the_gaps_of_plans_stand_around_their_setting_with_bars_over_pairs_of_seeds(tmp_path, figures):
    objective = {"attack.objective": ["final", "average"]}
    swept = {"malicious": [2, 5], "budget": [0.25, 0.5], "attack": ["greedy", "planned"], "seed": [0, 1]}
    folder = sweep(tmp_path, value=planned, **swept, **objective)
    cells = len((folder / "sweep.csv").read_text().splitlines()) - 1
    np.savez(folder / "curves.npz", accuracy=np.full((cells, 3), [0.9, 0.5, 0.7]), round=np.arange(3))
    plots.planning(folder)
    assert [axes.get_title("left") for axes in figures[0].axes] == [
        *("final accuracy", "average over the evaluations", "model of early stopping")
    ]
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == [
        *(f"k = {k:g}, b = {b:g}" for k in (0.2, 0.5) for b in (0.25, 0.5))
    ]
    for axes in figures[0].axes:
        assert axes.get_ylim() == (3.5, -0.5) and axes.get_yticks().tolist() == [0, 1, 2, 3]
        zero = next(line for line in axes.lines if line.get_label().startswith("_"))
        assert zero.get_xdata() == [0, 0]
    assert figures[0].axes[0].get_xlabel() == "gap to the better greedy goal (points)"
    first, second = figures[0].axes[0].containers  # in the order of their names
    assert [first.get_label(), second.get_label()] == ["planned average, known", "planned final, known"]
    for container, gain, side in ((first, 10, -1), (second, 20, 1)):
        points, _, (bars,) = container
        means = [gain * b - 0.5 for _ in (2, 5) for b in (0.25, 0.5)]  # in one seed a whole point less
        assert points.get_xdata() == pytest.approx(means)
        offsets = np.asarray(points.get_ydata(), float) - np.arange(4)
        assert offsets == pytest.approx(np.full(4, offsets[0])) and 0 < side * offsets[0] < 0.5
        for mean, bar in zip(means, bars.get_segments(), strict=True):
            assert bar[:, 0] == pytest.approx([mean - 12.706 * 0.5, mean + 12.706 * 0.5], rel=1e-4)
        assert points.get_linestyle() == "None"
    offsets = [one[0].get_ydata()[0] for one in (first, second)]
    assert sum(offsets) == pytest.approx(0) and offsets[1] - offsets[0] < 0.5
    title, note = noted(figures[0])
    assert title == "Accuracy lost beyond the better greedy goal, mean over 2 seeds"
    assert note.startswith("Positive: planned flips leave less.")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["planned average, known", "planned final, known"]
    with (folder / "planning.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["seeds"] for row in rows} == {"2"} and len(rows) == 3 * 4 * 3
    for attack in (["greedy"], ["planned"]):
        with pytest.raises(InputError, match=r"sweep attack\.name=greedy,planned"):
            plots.planning(sweep(tmp_path, value=planned, **(swept | {"attack": attack}), **objective))


def test_greedy_and_planned_flips_without_a_seed_in_common_have_no_gap(tmp_path):
    swept = {"budget": [0.25, 0.5], "attack": ["greedy", "planned"], "seed": [0, 1], "attack.objective": ["final"]}
    # at the budget 0.25 cells 0 and 3 broke off: greedy flips of seed 0 and planned ones of seed 1
    folder = sweep(tmp_path, value=planned, broken=[0, 3], **swept)
    np.savez(folder / "curves.npz", accuracy=np.full((8, 3), [0.9, 0.5, 0.7]), round=np.arange(3))
    plots.planning(folder)
    with (folder / "planning_gaps.csv").open() as lines:
        gaps = [row for row in csv.DictReader(lines) if row["measure"] == "final accuracy"]
    assert [(row["budget"], row["plan"]) for row in gaps] == [("0.5", "planned final, known")]


def test_attackers_are_told_apart_by_what_distinguishes_them(tmp_path):
    swept = {"attack": ["greedy", "planned", "ipm"], "goal": GOALS, "attack.start": [1, 11]}
    found = sweep_table.read_sweep(sweep(tmp_path, value=lambda **_: 0.5, **swept))
    assert attackers(found).tolist() == [
        *("greedy untargeted", "greedy untargeted from round 11", "greedy targeted", "greedy targeted from round 11"),
        *["planned final, known"] * 4,
        *["ipm"] * 4,
    ]
    plain = sweep_table.read_sweep(sweep(tmp_path, value=lambda **_: 0.5, attack=["greedy", "planned"]))
    assert attackers(plain).tolist() == ["greedy untargeted", "planned final, known"]


def test_attacks_at_equal_budgets_stand_side_by_side_and_two_are_enough(tmp_path, figures):
    harm = {"none": 0.0, "greedy": 0.2, "random_flip": 0.1, "static_flip": 0.3}
    pairs = {"malicious": [2, 10], "budget": [0.25, 1.0]}

    def value(*, attack, malicious, budget, **_):
        return 0.9 - harm[attack] * budget - 0.001 * malicious

    for attacks in (["none", "greedy", "random_flip"], [*harm]):
        sweep(tmp_path, value=value, model=["mlp"], attack=attacks, **pairs)
        plots.networks(tmp_path, "model")
    for figure, attacks in zip(figures, (["greedy", "random_flip"], [*harm][1:]), strict=True):
        (axes,) = figure.axes
        order = ["k = 1\nb = 0.25", "k = 1\nb = 1", "k = 0.2\nb = 0.25", "k = 0.2\nb = 1"]
        assert [label.get_text() for label in axes.get_xticklabels()] == order
        names = [container.get_label().removesuffix(", untargeted") for container in axes.containers]
        assert names == attacks
        places = np.array([np.asarray(one[0].get_xdata(), float) for one in axes.containers])
        by_place = np.argsort(places[0])
        np.testing.assert_allclose(np.sort(places, 1).mean(0), range(4), atol=1e-9)
        assert (np.diff(places, axis=0) > 0.1).all() and np.ptp(places, axis=0).max() < 0.7
        for container, attack in zip(axes.containers, attacks, strict=True):
            wanted = [100 * value(attack=attack, malicious=m, budget=b) for m in (10, 2) for b in (0.25, 1.0)]
            assert np.asarray(container[0].get_ydata())[by_place] == pytest.approx(wanted)
        honest = next(line for line in axes.lines if line.get_label() == "unattacked")
        assert honest.get_ydata()[0] == pytest.approx(100 * np.mean([0.898, 0.89]))
    assert noted(figures[0])[1] == "The better goal of greedy does most harm in all 4 settings."
    assert noted(figures[1])[1].startswith(
        "Greedy does not do most harm in 4 of 4 settings: mlp k = 0.2 b = 0.25 (stat"
    )
    with (tmp_path / "networks.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["seeds"] for row in rows} == {"1"} and {row["interval"] for row in rows} == {"nan"}
    with pytest.raises(InputError, match="the sweep has several values of lr too"):
        plots.networks(sweep(tmp_path, value=value, model=["mlp"], lr=[0.1, 0.2], attack=[*harm], **pairs), "model")
    with pytest.raises(InputError, match="networks compares attacks; the sweep has a single one"):
        plots.networks(sweep(tmp_path, value=value, model=["mlp"], attack=["none", "greedy"], **pairs), "model")


def test_defences_are_named_by_their_parts_and_what_did_not_meet_is_a_cross(tmp_path, figures):
    swept = {"attack": ["none", "greedy"], "strategy.pre": ["[]", "[nnm, clip]"], "sanitize.name": ["none", "knn"]}
    low = {"greedy": 0.5, "none": 0.9}
    folder = sweep(tmp_path, value=lambda attack, **_: low[attack], broken=(7,), **swept)
    plots.arms(folder)
    axes, bar = figures[0].axes
    defences = ["mean", "mean, sanitize=knn", "nnm, clip, mean", "nnm, clip, mean, sanitize=knn"]
    assert [label.get_text() for label in axes.get_yticklabels()] == defences
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "greedy"]
    shown = {(int(text.get_position()[0]), int(text.get_position()[1])): text.get_text() for text in axes.texts}
    assert [shown[1, row] for row in range(4)] == ["50"] * 3 + ["\N{MULTIPLICATION SIGN}"]
    assert [shown[0, row] for row in range(4)] == ["90"] * 4 and axes.get_ylim() == (4, 0)
    assert {(int(patch.get_x()), int(patch.get_y())) for patch in axes.patches} == {(1, 0), (1, 1), (1, 2)}
    assert all(0.9 < patch.get_width() == patch.get_height() < 1 for patch in axes.patches)
    assert bar.get_ylabel() == "final test accuracy (%)" and axes.collections[0].get_clim() == (50, 90)
    assert noted(figures[0])[0] == "Defences against attacks, one seed"
    with (folder / "arms.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["harm"], row["verdict"]) for row in rows if row["attack"] == "greedy"] == [("40", "one seed")] * 3
    for left_out, said in (("attack", "attacks"), ("strategy.pre", "defences")):
        less = {name: values[:1] if name in (left_out, "sanitize.name") else values for name, values in swept.items()}
        with pytest.raises(InputError, match=f"arms compares {said}; the sweep has a single one"):
            plots.arms(sweep(tmp_path, value=lambda attack, **_: low[attack], **less))


def test_the_ratio_of_harm_is_of_pairs_of_seeds_and_none_where_gradients_do_no_harm(tmp_path):
    def value(*, attack, malicious, seed, **_):
        drop = {"none": 0.0, "greedy": 0.2 + 0.1 * seed, "ipm": 0.1 if malicious == 4 else -0.1 * (malicious > 0)}
        return 0.9 + 0.01 * seed - drop[attack]

    swept = {"attack": ["none", "greedy", "ipm"], "malicious": [1, 4], "seed": [0, 1]}
    found = sweep_table.read_sweep(sweep(tmp_path, value=value, **swept))
    first, second = versus.ratios(found, np.ones(len(found), bool))
    assert (first["write_access"], second["write_access"]) == (0.1, 0.4)
    assert np.isnan(first["ratio"]) and second["ratio"] == pytest.approx(2.5)
    assert second["drop_by_flips"] == pytest.approx(25) and first["drop_by_gradients"] == pytest.approx(-10)
    assert second["drop_by_flips_interval"] == pytest.approx(12.7062 * 5, rel=1e-4)
    assert second["drop_by_gradients_interval"] == pytest.approx(0, abs=1e-9)
    mean = np.array([[1.0, np.nan, 5.0], [2.0, np.nan, 4.0], [3.0, 1.0, np.nan]])
    assert versus.worst_attacks(mean, np.array([False, True, True])).tolist() == [1, 2, 1]
    assert versus.worst_attacks(mean, np.array([True, True, False])).tolist() == [0, -1, 1]
    both = np.array([True] * len(found))
    assert versus.writes_of(found, both) == "updates"
    assert versus.writes_of(found, found.column("attack.name") != "ipm") == "labels"
    assert versus.writes_of(found, found.column("attack.name") == "none") == "none"


def test_what_an_attack_on_labels_alone_leaves_is_not_swept_any_more(tmp_path):
    folder = sweep(tmp_path, value=skewed, budget=[0.5, 1.0], attack=["greedy", "sign_flip"])
    found = sweep_table.read_sweep(folder)
    assert found.swept == ["attack.budget", "attack.name"] and len(found) == 4
    labels = found.label_attacks()
    assert labels.swept == ["attack.budget"] and len(labels) == 2 and labels.left_out == 2
    assert labels.note("So.") == "So. Left out: 2 cells that flip no labels."
    attacked = sweep_table.read_sweep(sweep(tmp_path, value=skewed, budget=[0.5, 1.0], attack=["greedy", "none"]))
    assert len(attacked.label_attacks()) == 4 and len(attacked.label_attacks(unattacked=False)) == 2
    alone = sweep_table.read_sweep(sweep(tmp_path, value=skewed, budget=[0.5, 1.0], attack=["none"]))
    assert len(alone.label_attacks(unattacked=False)) == 2  # attacks do not vary


def test_a_line_along_the_lowest_row_has_its_label_however_many_rows_there_are(monkeypatch):
    for rows in (2, 20, 60):
        _, panels = canvas.panels([""], 4.0, 3.0, "k", "b")
        xs, ys = np.array([0.5, 1.0]), np.arange(1, rows + 1) / rows
        monkeypatch.setattr(marks, "products_to_label", lambda xs, ys: [xs[-1] * ys[0], 1.001 * xs[-1] * ys[0], 0.9])
        marks.equal_products(panels[""], xs, ys)
        low, high = (text.xy[1] for text in panels[""].texts)  # the second would lie on the first
        assert low < 0.5 < high
