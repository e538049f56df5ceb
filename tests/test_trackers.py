"""Trackers: what a real run wrote is read back from their stores, and a run is the same with them and without."""

import json
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_attack import InputError, load, run, sweep, trackers
from fl_attack.config import compose
from fl_attack.plots.canvas import captured
from fl_attack.trackers import About, tracked

Command = Callable[..., tuple[int, str, str]]
SMALL = ("dataset=digits_01", "engine=batched", "batch_size=64", "rounds=6", "eval_every=2", "attack.budget=0.5")
GRID = {"attack.budget": [0.1, 0.5], "seed": [0, 1]}


class Store:
    """The store of a tracker that keeps what it is told; `after` rows it does what `then` does."""

    kept: dict[str, "Store"] = {}  # noqa: RUF012 - emptied by the fixture
    after, then = sys.maxsize, staticmethod(lambda: None)

    def __init__(self, about: About, id: str | None) -> None:
        self.id, self.about = id or f"id{len(self.kept)}", about
        before = self.kept.get(self.id)
        self.calls: list[tuple[str, list[int]]] = before.calls if before else []
        self.told: dict[str, dict[str, Any]] = {}
        self.names: list[str] = []
        self.ended: list[str] = before.ended if before else []
        self.kept[self.id] = self

    def rows(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        self.calls.append((part, [row["round"] for row in rows]))
        if sum(len(rounds) for _, rounds in self.calls) > self.after:
            self.then()

    def summary(self, part: str, facts: dict[str, Any]) -> None:
        self.told[part] = facts

    def leave(self) -> None:
        pass

    def files(self, folder: Path, files: Sequence[Path]) -> None:
        self.names = [file.relative_to(folder).as_posix() for file in files]

    def end(self, how: str) -> None:
        self.ended.append(how)

    def rounds(self, part: str = "") -> list[int]:
        return [round_ for name, rounds in self.calls if name == part for round_ in rounds]


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Store]]:
    """What the tracker `wandb` is told, which is a `Store` here; it is told at once. No figures, which take time."""
    monkeypatch.setattr(Store, "kept", {})
    monkeypatch.setattr(tracked, "LOG_EVERY", 0.0)
    monkeypatch.setattr(trackers.TrackerEntry, "begin", property(lambda self: Store))
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": trackers.TrackerEntry((), "")})
    with captured():
        yield Store.kept


def test_a_name_that_is_no_tracker_is_refused_and_one_needs_no_list() -> None:
    assert compose("tracker=mlflow", "out=x").tracker == ("mlflow",) and compose("out=x").tracker == ()
    with pytest.raises(InputError, match=r"tracker\.1=mlfow is not allowed.*did you mean mlflow"):
        compose("tracker=[wandb,mlfow]", "out=x")


@pytest.mark.parametrize("more", [[], ["-m", "seed=0,1"]])
def test_a_missing_library_is_told_in_one_line_before_any_work(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str]
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    code, _, told = command(*more, *SMALL, "tracker=tensorboard", f"out={tmp_path / 'out'}")
    assert code == 2 and told.count("\n") == 1 and told.endswith("pip install 'fl-attack[tensorboard]'\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_rounds_are_logged_once_each_while_a_run_goes_on(stores: dict[str, Store], tmp_path: Path, model: str) -> None:
    result = run(*SMALL, f"model={model}", tracker=["wandb"], out=tmp_path)
    (store,) = stores.values()
    for part, rounds in (("", result.rounds), ("baseline", result.baseline.rounds)):
        assert store.rounds(part) == list(rounds["round"]) == [0, 2, 4, 6]
        assert len([name for name, _ in store.calls if name == part]) >= 3  # not all of them at the end
        assert store.told[part]["final_accuracy"] == rounds["test_accuracy"].iloc[-1]
    assert store.about.kind == "run" and store.about.settings["attack.budget"] == 0.5
    assert compose(*store.about.command.split()[1:], "out=x") == result.settings.model_copy(
        update={"out": "x", "tracker": ()}
    )
    assert {"report.html", "flips.npz", "baseline/rounds.csv"} <= {*store.names}
    assert store.ended == ["finished"] and not {*store.names} & {"trackers.json", "checkpoint.npz"}


def test_a_tracker_that_fails_costs_a_line_and_no_number(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise OSError("no space\nleft on device")

    monkeypatch.setattr(Store, "after", 2)
    monkeypatch.setattr(Store, "then", staticmethod(fails))
    with_it = run(*SMALL, tracker=["wandb"], out=tmp_path / "with")
    told = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert told == ["tracker=wandb failed, and is left out from here on: no space left on device"]
    assert [store.ended for store in stores.values()] == [["failed"]]
    without = run(*SMALL, out=tmp_path / "without")
    assert with_it.rounds.equals(without.rounds) and (with_it.theta == without.theta).all()
    table = sweep(*SMALL, grid=GRID, tracker="wandb", out=tmp_path / "grid").table
    assert capsys.readouterr().err.count("tracker=wandb failed") == 1 and not table["error"].notna().any()


def test_one_that_cannot_begin_ends_the_run_before_any_work(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuses(about: About, id: str | None) -> Store:
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackers.TrackerEntry, "begin", property(lambda self: refuses))
    for call in (run, sweep):
        with pytest.raises(InputError, match="tracker=wandb can't begin: no API key"):
            call(*SMALL, tracker=["wandb"], out=tmp_path / call.__name__)
        assert not [file for file in tmp_path.rglob("*") if file.suffix in (".csv", ".npz")]


def test_a_run_that_was_interrupted_goes_on_in_the_same_run_of_the_tracker(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "after", 4)
        patch.setattr(Store, "then", staticmethod(stop))
        with pytest.raises(KeyboardInterrupt):
            run(*SMALL, tracker=["wandb"], out=tmp_path)
    assert json.loads((tmp_path / "trackers.json").read_text())[""]["wandb"]["id"] == "id0"
    result = run(*SMALL, tracker=["wandb"], out=tmp_path)
    assert [*stores] == ["id0"] and stores["id0"].ended == ["killed", "finished"]
    assert sorted({*stores["id0"].rounds()}) == list(result.rounds["round"])
    run(*SMALL, tracker=["wandb"], out=tmp_path, overwrite=True)
    assert [*stores] == ["id0", "id1"]  # another run


def test_a_sweep_is_a_run_with_a_child_for_each_cell(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    given = (*SMALL, "tracker=[wandb]", f"out={tmp_path}")
    grid = GRID | {"attack.budget": [0, 0.5], "attack.goal": ["targeted", "untargeted"]}  # budget 0: computed once
    with monkeypatch.context() as patch:
        patch.setattr(
            Store,
            "summary",
            lambda self, part, facts: stop() if len(self.kept) == 4 else self.told.update({part: facts}),
        )
        with pytest.raises(KeyboardInterrupt):
            sweep(*given, grid=grid)
    result = sweep(*given, grid=grid)
    whole, *cells = stores.values()
    assert whole.about.kind == "sweep" and whole.told[""]["cells"] == 8
    assert {"sweep.csv", "report.html"} <= {*whole.names}
    assert whole.about.settings["rounds"] == 6 and "attack.budget" not in whole.about.settings
    by_name = {store.about.name: store for store in cells}
    assert len(by_name) == len(cells) == 8 and {store.about.parent for store in cells} == {whole.id}
    assert whole.ended == ["killed", "finished"]
    for cell, row in result.table.iterrows():
        budget = "0.5" if row["attack.budget"] else "0"
        name = f"{cell:04d} attack.budget={budget} seed={row['seed']} attack.goal={row['attack.goal']}"
        store = by_name[name]
        assert store.rounds() == [0, 2, 4, 6] and store.ended.count("finished") == 1  # done once, not anew
        assert store.told[""]["final_accuracy"] == pytest.approx(row["final_accuracy"])
        assert "drop" not in store.told[""]  # it needs the twin: in the table alone
        assert store.told[""]["flips"] == row["flips"] and store.about.settings["seed"] == row["seed"]


def test_cells_that_name_different_trackers_are_refused(stores: dict[str, Store], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a sweep is one run in all of its trackers"):
        sweep(*SMALL, grid={"tracker": ["wandb", "mlflow"]}, out=tmp_path)


def test_tensorboard_has_what_a_run_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(InputError, match="tracker=tensorboard leaves its files in out; give out="):
        run(*SMALL, tracker=["tensorboard"])
    result = run(*SMALL, tracker=["tensorboard"], out=tmp_path / "run")
    for part, there in (("", result), ("baseline", result.baseline)):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / part)).Reload()
        for name in ("test_accuracy", "test_loss", "flips"):
            found = {one.step: one.value for one in events.Scalars(name)}
            assert found == pytest.approx(dict(zip(there.rounds["round"], there.rounds[name], strict=True)), rel=1e-6)
        (final,) = events.Scalars("summary/final_accuracy")
        assert final.value == pytest.approx(there.summary["final_accuracy"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| attack.budget | 0.5 |" in settings.tensor_proto.string_val[0]
    (image,) = events.Images("curves")
    content = (tmp_path / "run" / "curves.png").read_bytes()
    assert image.encoded_image_string == content and (image.width, image.height) == struct.unpack(">II", content[16:24])
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"attack.budget" in hparams
    # a sweep: a folder for each cell
    table = sweep(*SMALL, grid=GRID, tracker="tensorboard", out=tmp_path / "grid").table
    cells = sorted(folder for folder in (tmp_path / "grid" / "tensorboard").iterdir() if folder.is_dir())
    assert [cell.name for cell in cells][1] == "0001_attack.budget=0.1_seed=1" and len(cells) == len(table) == 4
    for cell, final in zip(cells, table["final_accuracy"], strict=True):
        events = EventAccumulator(str(cell)).Reload()
        assert events.Scalars("test_accuracy")[-1].value == pytest.approx(final)
    # replaced by another result, it is gone with the old one
    run(*SMALL, rounds=4, overwrite=True, out=tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists() and not (tmp_path / "run" / "trackers.json").exists()


@pytest.mark.slow
def test_mlflow_has_in_its_database_what_runs_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    result = run(*SMALL, tracker=["mlflow"])  # in memory: MLflow has the files
    table = sweep(*SMALL, grid=GRID, tracker="mlflow", out=tmp_path / "grid", workers=2).table
    with sqlite3.connect(tmp_path / "store.db") as store:

        def metrics(run_id: str, key: str) -> list[tuple[int, float]]:
            text = "select step, value from metrics where run_uuid = ? and key = ? order by step"
            return store.execute(text, (run_id, key)).fetchall()

        (experiment,) = store.execute("select experiment_id from experiments where name = 'fl-attack'").fetchone()
        text = "select run_uuid, status, artifact_uri from runs where experiment_id = ? order by start_time"
        (first, status, artifacts), whole, *cells = store.execute(text, (experiment,)).fetchall()
        for prefix, there in (("", result), ("baseline/", result.baseline)):
            logged = metrics(first, f"{prefix}test_accuracy")
            assert logged == list(zip(there.rounds["round"], there.rounds["test_accuracy"], strict=True))
            assert metrics(first, f"{prefix}summary/final_loss") == [(0, there.summary["final_loss"])]
        params = dict(store.execute("select key, value from params where run_uuid = ?", (first,)))
        assert params["attack.budget"] == "0.5" and params["clients.malicious"] == "3" and status == "FINISHED"
        names = {file.name for file in Path(artifacts.removeprefix("file://")).rglob("*")}
        assert {"curves.png", "rounds.csv", "flips.npz"} <= names
        assert len(cells) == len(table) == 4 and whole[1] == "FINISHED"
        finals = []
        for cell, state, _ in cells:
            tags = dict(store.execute("select key, value from tags where run_uuid = ?", (cell,)))
            assert tags["mlflow.parentRunId"] == whole[0] and state == "FINISHED"
            finals.append((tags["mlflow.runName"], metrics(cell, "test_accuracy")[-1][1]))
        assert [final for _, final in sorted(finals)] == pytest.approx(list(table["final_accuracy"]))
        assert (Path(whole[2].removeprefix("file://")) / "sweep.csv").exists()


def records(file: Path) -> list[Any]:
    """The records in a file of Weights & Biases: a log in the format of LevelDB, in blocks of 32 kB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def ended(file: Path) -> list[Any]:
    """The records of a run that has ended: its service writes them a little later."""
    for _ in range(300):
        found = records(file)
        if any(one.WhichOneof("record_type") == "exit" for one in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def values(items: Any) -> dict[str, Any]:
    """The items of a record by their names."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_wandb_has_in_its_files_what_runs_wrote_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    result = run(*SMALL, tracker=["wandb"], out=tmp_path / "run")
    table = sweep(*SMALL, grid=GRID, tracker="wandb", out=tmp_path / "grid").table
    found = {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        of_file = ended(file)
        (told,) = (one.run for one in of_file if one.WhichOneof("record_type") == "run")
        rows = [values(one.history.item) for one in of_file if one.WhichOneof("record_type") == "history"]
        summary = {}
        for one in of_file:
            summary |= values(one.summary.update) if one.WhichOneof("record_type") == "summary" else {}
        found[told.run_id] = told, rows, summary, file.parent / "files"
    assert len(found) == 6
    ids = {name: one["wandb"]["id"] for name, one in json.loads((tmp_path / "run/trackers.json").read_text()).items()}
    told, rows, summary, files = found[ids[""]]
    for prefix, there in (("", result), ("baseline/", result.baseline)):
        logged = {row[f"{prefix}round"]: row[f"{prefix}test_accuracy"] for row in rows if f"{prefix}test_loss" in row}
        assert logged == dict(zip(there.rounds["round"], there.rounds["test_accuracy"], strict=True))
        assert summary[f"{prefix}summary/final_loss"] == there.summary["final_loss"]
    assert values(told.config.update)["attack.budget"] == 0.5 and told.project == "fl-attack"
    assert {"curves.png", "rounds.csv", "baseline", "media"} <= {file.name for file in files.iterdir()}
    ids = {name: one["wandb"]["id"] for name, one in json.loads((tmp_path / "grid/trackers.json").read_text()).items()}
    cells = [found[id] for name, id in ids.items() if name]
    assert {told.run_group for told, *_ in cells} == {ids[""]} == {found[ids[""]][0].run_group}
    cells.sort(key=lambda cell: cell[0].display_name)
    assert [rows[-1]["test_accuracy"] for _, rows, *_ in cells] == pytest.approx(list(table["final_accuracy"]))


def test_flower_logs_while_it_runs_and_so_do_the_cells_of_its_sweeps(
    shared_ray: None, stores: dict[str, Store], tmp_path: Path
) -> None:
    flower = (*SMALL, "engine=flower", "tracker=[wandb]")
    result = run(*flower, out=tmp_path / "run")
    table = sweep(*flower, grid={"attack.budget": [0.1, 0.5]}, out=tmp_path / "grid").table
    first, whole, *cells = stores.values()
    for part in ("", "baseline"):
        assert first.rounds(part) == [0, 2, 4, 6] and len([name for name, _ in first.calls if name == part]) == 4
    assert np.isclose(first.told[""]["final_accuracy"], result.rounds["test_accuracy"].iloc[-1])
    assert whole.about.kind == "sweep" and [len(cell.calls) for cell in cells] == [4, 4]
    assert [cell.told[""]["final_accuracy"] for cell in cells] == pytest.approx(list(table["final_accuracy"]))
    assert load(tmp_path / "grid").summary["cells"] == 2
