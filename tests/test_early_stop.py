"""Early stopping: where a run ends, which model it gives, and that all engines agree on both."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_attack import data, engine, experiment, scenario
from fl_attack.config import Settings, compose
from fl_attack.engine import sequential
from fl_attack.errors import InputError
from fl_attack.history import COLUMNS, EarlyStop, Recorder
from fl_attack.models import logistic, outputs

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
COMMON = ["rounds=60", "clients.total=7", "clients.malicious=3", "attack.budget=0.9", "lr=2", "dtype=float64"]
LOSS = COLUMNS.index("validation_loss")


def last_row(losses: Sequence[float], patience: int) -> int:
    """The slow way: the first of `patience` evaluations in a row, none of them below all before."""
    for end in range(patience, len(losses)):
        if min(losses[end - patience + 1 : end + 1]) >= min(losses[: end - patience + 1]):
            return end
    return len(losses) - 1


@pytest.mark.parametrize("patience", [1, 2, 5, 50])
def test_patience_ends_where_the_loss_has_not_fallen_for_so_long(patience: int) -> None:
    rng = np.random.default_rng(patience)
    losses = np.round(rng.normal(size=(30, 20)) * 2) - np.arange(20) / 4  # with equal ones
    for run in losses:
        rule, ended = EarlyStop(np.array([patience])), 19
        for at, loss in enumerate(run):
            rule.lower(np.array([loss]))
            if rule.over[0]:
                ended = at
                break
        assert ended == last_row(run.tolist(), patience)


def check_ended(folder: Path, settings: Settings, patience: int) -> None:
    """Rows end where they should; model and summary are those of the lowest validation loss."""
    with (folder / "rounds.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    losses = [float(row["validation_loss"]) for row in rows]
    assert last_row(losses, patience) == len(rows) - 1
    best = rows[int(np.argmin(losses))]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_round"] == int(rows[-1]["round"])
    assert summary["best_round"] == int(best["round"])
    assert summary["final_accuracy"] == pytest.approx(float(best["test_accuracy"]))
    assert summary["final_loss"] == pytest.approx(float(best["test_loss"]))
    cell = scenario.make(settings)
    theta = torch.from_numpy(np.load(folder / "model.npz")["theta"])
    X, y = cell.test_set()
    measured = [float(best[f"test_{k}"]) for k in ("accuracy", "f1", "loss")]
    assert outputs.quality(logistic.logits(theta, X), y) == pytest.approx(measured)
    client = np.load(folder / "partition.npz")["client"]
    held = data.features(cell.dataset.x_train[client < 0], cell.dataset.scaling, torch.float64)
    y = torch.from_numpy(cell.dataset.y_train[client < 0])
    loss = outputs.losses(logistic.logits(theta, held), y).mean().item()
    assert loss == pytest.approx(min(losses))
    flips = np.load(folder / "flips.npz")
    assert flips["round"].max() == summary["stopped_round"]
    assert len(flips["round"]) == summary["flips"]
    assert (client[flips["sample"]] >= 0).all()


@pytest.mark.parametrize("grid", ["block", "stock"])
def test_all_engines_stop_in_the_same_round_with_the_same_model(
    own_ray: None, small_data: Small, tmp_path: Path, grid: str
) -> None:
    patience = 3
    folders = {}
    for name, engine_of in {
        "batched": ["engine=batched"],
        "flower": [f"engine.grid={grid}", "engine.actors=2"],
    }.items():
        folders[name] = tmp_path / name
        chosen = compose(
            *small_data(3),
            *COMMON,
            f"early_stop.patience={patience}",
            "batch_size=40",
            f"out={folders[name]}",
            *engine_of,
        )
        summaries = experiment.run(chosen)
        check_ended(folders[name], chosen, patience)
        assert 3 < summaries["attacked"]["stopped_round"] < 60
        assert summaries["honest"]["final_accuracy"] > summaries["attacked"]["final_accuracy"]
    for part in (".", "baseline"):
        ours, theirs = (np.load(folder / part / "model.npz")["theta"] for folder in folders.values())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        one, other = (np.load(folder / part / "flips.npz") for folder in folders.values())
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key])
        ours, theirs = (np.genfromtxt(folder / part / "rounds.csv", delimiter=",")[1:] for folder in folders.values())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("classes", "every"), [(2, 4), (3, 1)])
def test_cells_of_a_batch_end_one_by_one_as_each_does_alone(
    settings: Compose, small_data: Small, classes: int, every: int
) -> None:
    changes = [
        [
            f"early_stop.patience={patience}",
            f"attack.budget={budget}",
            f"attack.goal={goal}",
            f"early_stop.restore={give}",
        ]
        for patience in (1, 3, 1000)
        for budget in (0, 0.5, 1)
        for goal, give in (("untargeted", "best"), ("targeted", "best"), ("untargeted", "last"))
    ]
    base = [*small_data(classes), *COMMON, "batch_size=40", f"eval_every={every}"]
    cells = engine.make_scenarios([settings(*base, *change) for change in changes])
    assert len(engine.group(cells)) == 1
    outcomes = engine.run_cells(cells)
    ends = set()
    for outcome, cell in zip(outcomes, cells, strict=True):
        alone = sequential.run(cell, client_by_client=True)
        assert outcome.table.shape == alone.table.shape
        np.testing.assert_allclose(outcome.table[:, LOSS], alone.table[:, LOSS], rtol=0, atol=1e-9)
        torch.testing.assert_close(outcome.theta, alone.theta, rtol=0, atol=1e-9)
        assert outcome.flip_count == alone.flip_count == outcome.history().flip_count
        for (round_, flips), (wanted_round, wanted) in zip(outcome.flips, alone.flips, strict=True):
            assert round_ == wanted_round
            np.testing.assert_array_equal(flips.samples, wanted.samples)
        ends.add(int(outcome.table[-1, 0]))
    assert len(ends) >= 4 and 60 in ends
    early = [cell for cell in cells if cell.settings.early_stop.patience == 1]
    reported: list[int] = []
    for outcome, cell in zip(engine.run_cells(early, progress=reported.append), early, strict=True):
        torch.testing.assert_close(outcome.theta, sequential.run(cell, client_by_client=True).theta, rtol=0, atol=1e-9)
    assert sum(reported) == 60 * len(early)
    assert len(reported) < 60  # the rounds end with the last of the cells


def test_a_run_gives_the_model_of_the_lowest_validation_loss_or_of_the_round_it_stopped_in(
    small_data: Small, tmp_path: Path
) -> None:
    base = [*small_data(3), *COMMON, "batch_size=40", "early_stop.patience=4", "engine=batched", "attack.budget=1"]
    found = {}
    for give in ("best", "last"):
        out = tmp_path / give
        found[give] = experiment.run(compose(*base, f"early_stop.restore={give}", f"out={out}"))["attacked"]
        with (out / "rounds.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        row = {"best": min(rows, key=lambda row: float(row["validation_loss"])), "last": rows[-1]}[give]
        summary = json.loads((out / "summary.json").read_text())
        assert summary["final_accuracy"] == float(row["test_accuracy"])
        assert summary["best_round"] == int(row["round"])
        cell = scenario.make(compose(*base, "out=unused"))
        theta = torch.from_numpy(np.load(out / "model.npz")["theta"])
        assert cell.model.measure(theta, *cell.test_set()).loss == pytest.approx(float(row["test_loss"]))
    assert found["best"]["stopped_round"] == found["last"]["stopped_round"] == found["best"]["best_round"] + 4
    assert found["best"]["final_loss"] < found["last"]["final_loss"]


def test_a_cell_that_diverges_before_it_stops_is_told_as_diverged(settings: Compose, small_data: Small) -> None:
    base = [*small_data(3), *COMMON, "batch_size=40"]
    changes = [["early_stop.patience=5", "lr=1e308"], ["early_stop.patience=1000"]]
    cells = engine.make_scenarios([settings(*base, *change) for change in changes])
    broken, fine = engine.run_cells(cells)
    assert "diverged: theta is not finite after round" in str(broken.error)
    assert fine.error is None
    torch.testing.assert_close(fine.theta, sequential.run(cells[1], client_by_client=True).theta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("deal", [[], ["partition.malicious_share=0.4"], ["partition=dirichlet"], ["partition=shards"]])
def test_the_split_belongs_to_no_client_and_write_access_is_a_share_of_the_rest(
    settings: Compose, small_data: Small, deal: list[str]
) -> None:
    stop = ["early_stop.patience=5", "early_stop.share=0.25"]
    cell = scenario.make(settings(*small_data(2), *COMMON, "batch_size=40", *deal, *stop))
    parts = cell.partition
    assert len(parts.validation) == 30 == (parts.client == -1).sum()
    assert sorted(np.concatenate([*parts.shards, parts.validation]).tolist()) == list(range(120))
    for client, shard in enumerate(parts.shards):
        assert (parts.client[shard] == client).all()
    assert cell.write_access == pytest.approx(sum(len(parts.shards[i]) for i in parts.malicious) / 90)
    if deal == ["partition.malicious_share=0.4"]:
        assert cell.write_access == pytest.approx(0.4)
    other = scenario.make(settings(*small_data(2), *COMMON, "batch_size=40", *deal, *stop, "seed=1"))
    assert set(other.partition.validation) != set(parts.validation)
    longer = scenario.make(settings(*small_data(2), *COMMON, "batch_size=40", *deal, *stop, "early_stop.patience=9"))
    np.testing.assert_array_equal(longer.partition.client, parts.client)


def test_without_patience_nothing_is_held_out(settings: Compose, small_data: Small) -> None:
    cell = scenario.make(settings(*small_data(2), *COMMON, "batch_size=40", "early_stop.share=0.5"))
    assert len(cell.partition.validation) == 0
    outcome = sequential.run(cell, client_by_client=True)
    assert np.isnan(outcome.table[:, LOSS]).all()
    assert all(outcome.history().given(restore)["round"] == 60 for restore in ("best", "last"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["early_stop.patience=0"], r"early_stop.patience=0 is not allowed: it must be at least 1|.*greater"),
        (["early_stop.share=1", "early_stop.patience=1"], "early_stop.share=1.* is not allowed"),
        (["early_stop.share=0.001", "early_stop.patience=1"], "early_stop.share=0.001 holds out none of 120"),
        (["early_stop.share=0.97", "early_stop.patience=1"], "4 samples are too few for 7 clients"),
        (["early_stop.share=0.8", "early_stop.patience=1"], "batch_size=40 is more than the 24 training samples"),
    ],
)
def test_a_split_that_can_not_be_is_told_in_one_line(
    settings: Compose, small_data: Small, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        scenario.make(settings(*small_data(2), *COMMON, "batch_size=40", *overrides))
    assert "\n" not in str(raised.value)


def test_a_sweep_gives_the_accuracy_of_the_model_kept(
    shared_ray: None, command: Callable[..., tuple[int, str, str]], small_data: Small, tmp_path: Path
) -> None:
    grid = [*small_data(3), *COMMON, "batch_size=40", "early_stop.patience=null,2", "attack.budget=0.2,1"]
    grid += ["early_stop.restore=best,last"]
    tables = []
    for name in ("batched", "flower"):
        out = tmp_path / name
        assert command("-m", *grid, f"engine={name}", f"out={out}")[0] == 0
        with (out / "sweep.csv").open() as lines:
            tables.append(list(csv.DictReader(lines)))
        curves = np.load(out / "curves.npz")
        assert curves["round"].tolist() == list(range(61))
        for row, curve in zip(tables[-1], curves["accuracy"], strict=True):
            known = curve[np.isfinite(curve)]
            assert len(known) == int(row["rounds"]) + 1
            assert np.isclose(known, float(row["final_accuracy"])).any()
            if row["early_stop.restore"] == "last":
                assert np.isclose(known[-1], float(row["final_accuracy"]))
    kept = {
        row["attack.budget"]: row["final_accuracy"]
        for row in tables[0]
        if row["early_stop.patience"] == "2" and row["early_stop.restore"] == "best"
    }
    for row, other in zip(*tables, strict=True):
        stops = row["early_stop.patience"] == "2"
        assert row["early_stop_accuracy"] == (kept[row["attack.budget"]] if stops else "")
        assert (int(row["rounds"]) < 60) == stops
        assert row["rounds"] == other["rounds"] and row["flips"] == other["flips"]
        assert float(row["final_loss"]) == pytest.approx(float(other["final_loss"]))


@pytest.mark.parametrize("restore", ["best", "last"])
def test_a_recorder_stops_out_of_patience_and_keeps_the_best_model_or_the_last(
    settings: Compose, small_data: Small, restore: str
) -> None:
    rounds = ["rounds=10", "eval_every=2", "clients.total=3", "clients.malicious=0", "dtype=float64", "batch_size=30"]
    stop = ["early_stop.patience=2", f"early_stop.restore={restore}"]
    cell = scenario.make(settings(*small_data(2), *rounds, *stop))
    good = torch.from_numpy(np.linalg.lstsq(*as_problem(cell), rcond=None)[0]).T.contiguous()
    seen: list[tuple[int, int]] = []
    recorder = Recorder(cell, on_round=lambda round_, row: seen.append((round_, int(row["round"]))))
    for round_, scale in enumerate((0.0, 9.0, 0.5, 9.0, -0.5, 9.0, 0.1, 9.0)):
        assert not recorder.stopped
        recorder.record(round_, scale * good)
        if recorder.stopped:
            break
    assert seen == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (6, 6)]
    losses = [row["validation_loss"] for row in recorder.history.rows]
    assert losses[1] < losses[3] < losses[0] < losses[2]  # so that rounds 4 and 6 are no lower than round 2
    torch.testing.assert_close(recorder.history.theta, (0.5 if restore == "best" else 0.1) * good)
    assert recorder.history.given(restore)["round"] == (2 if restore == "best" else 6)  # type: ignore[arg-type]
    again = Recorder(cell)
    again.restore(recorder.state())
    assert again.stopped and again.round == 6 and str(again.history.rows) == str(recorder.history.rows)
    assert not Recorder(cell).stopped


def as_problem(cell: scenario.Scenario) -> tuple[np.ndarray, np.ndarray]:
    """The held-out samples, and +1 for those of label 1, else -1."""
    X, y = cell.validation_set()
    return X.numpy(), np.where(y.numpy()[:, None] == 1, 1.0, -1.0)


def test_the_columns_that_the_docs_explain_are_those_of_the_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    table = text.split("| Column of `rounds.csv` | Meaning |")[1].split("\n\n")[0]
    first = [row.split("|")[1] for row in table.split("\n") if row.startswith("| `")]
    explained = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert len(explained) >= 15 and set(explained) <= set(COLUMNS)
