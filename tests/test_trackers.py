"""Trackers: what a real run wrote is read back from their stores, and a run is the same with them and without."""

import json
import math
import re
import sqlite3
import struct
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from fl_attack import InputError, load, run, sweep, trackers
from fl_attack.config import compose
from fl_attack.plots.canvas import captured
from fl_attack.trackers import About, tensorboard, tracked

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


# --- what each tracker is told, by stand-ins for their libraries ----------------------------------------


def about(kind: Any = "run", folder: Path = Path("out"), **more: Any) -> About:
    settings = {"rounds": 3, "lr": 0.5, "attack.stop": None}
    return About(kind, f"a {kind}", more.pop("settings", settings), "fl-attack rounds=3", folder, **more)


ROWS = [
    {"round": 0, "test_accuracy": 0.25, "validation_loss": math.nan},
    {"round": 2, "test_accuracy": 0.5, "validation_loss": math.inf},
]


class Wandb:
    """A run of a stand-in for wandb, which is the module as well: it keeps all calls."""

    Image = staticmethod(lambda file: f"image of {Path(file).name}")

    def __init__(self, folder: Path) -> None:
        self.dir, self.calls, self.summary, self.given = str(folder), [], {}, {}
        self.settings: Any = None

    def Settings(self, **given: Any) -> Any:  # noqa: N802 - as the library has it
        self.settings = SimpleNamespace(silent=False, **given)
        return self.settings

    def init(self, **given: Any) -> "Wandb":
        self.given = given
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **given: self.calls.append((name, *args, given))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Wandb:
    """The stand-in for wandb that is imported here."""
    there = Wandb(tmp_path / "wandb")
    monkeypatch.setitem(sys.modules, "wandb", there)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return there


def test_wandb_names_its_axes_once_and_before_the_rows_of_a_part(wandb: Wandb) -> None:
    store = trackers.TRACKERS["wandb"].begin(about(), None)
    store.rows("", ROWS[:1])
    store.rows("", ROWS[1:])
    store.rows("baseline", ROWS[:1])
    assert wandb.calls == [
        ("define_metric", "round", {"hidden": True}),
        ("define_metric", "test_accuracy", {"step_metric": "round"}),
        ("define_metric", "validation_loss", {"step_metric": "round"}),
        ("log", {"round": 0, "test_accuracy": 0.25}, {}),
        ("log", {"round": 2, "test_accuracy": 0.5}, {}),
        ("define_metric", "baseline/round", {"hidden": True}),
        ("define_metric", "baseline/test_accuracy", {"step_metric": "baseline/round"}),
        ("define_metric", "baseline/validation_loss", {"step_metric": "baseline/round"}),
        ("log", {"baseline/round": 0, "baseline/test_accuracy": 0.25}, {}),
    ]


@pytest.mark.parametrize(("kind", "id"), [("run", None), ("sweep", None), ("cell", None), ("sweep", "abcd1234")])
def test_wandb_groups_a_sweep_with_its_cells_and_continues_the_run_of_an_id(
    wandb: Wandb, monkeypatch: pytest.MonkeyPatch, kind: str, id: str | None
) -> None:
    store = trackers.TRACKERS["wandb"].begin(about(kind, parent="whole" if kind == "cell" else None), id)
    assert re.fullmatch("[0-9a-f]{8}", store.id) and (id is None or store.id == id)
    assert wandb.given == {
        "project": "fl-attack",
        "id": store.id,
        "resume": "allow" if id else None,
        "name": f"a {kind}",
        "notes": "fl-attack rounds=3",
        "config": {"rounds": 3, "lr": 0.5, "attack.stop": None},
        "group": {"run": None, "sweep": store.id, "cell": "whole"}[kind],
        "job_type": kind,
        "reinit": "create_new",
        "settings": wandb.settings,
    }
    assert wandb.settings.console == "off" and wandb.settings.silent == (kind == "cell")
    monkeypatch.setenv("WANDB_PROJECT", "another")
    assert trackers.TRACKERS["wandb"].begin(about(), None).id != store.id and wandb.given["project"] == "another"


def test_wandb_keeps_copies_of_files_and_shows_figures(wandb: Wandb, tmp_path: Path) -> None:
    store = trackers.TRACKERS["wandb"].begin(about(), None)
    files = [tmp_path / "out/curves.png", tmp_path / "out/baseline/rounds.csv"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    store.summary("", {"flips": 3})
    store.summary("baseline", {"flips": 0, "error": "none"})
    assert wandb.summary == {"summary/flips": 3, "baseline/summary/flips": 0, "baseline/summary/error": "none"}
    store.leave()
    store.files(tmp_path / "out", files)
    kept = [tmp_path / "wandb/curves.png", tmp_path / "wandb/baseline/rounds.csv"]
    assert [file.read_text() for file in kept] == ["curves.png", "rounds.csv"]
    saved = [("save", str(file), {"base_path": wandb.dir, "policy": "now"}) for file in kept]
    assert wandb.calls == [("log", {"curves": "image of curves.png"}, {}), *saved]
    wandb.calls.clear()
    for how in ("finished", "failed", "killed"):
        store.end(how)  # type: ignore[arg-type]
    assert wandb.calls == [("finish", {"exit_code": code}) for code in (0, 1, 130)]


class Client:
    """A stand-in for MLflow's client, with a store that all of them share."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.experiments: dict[str, str] = {}

    def __call__(self) -> "Client":
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, f"experiment {len(self.experiments)}")

    def create_run(self, experiment: str, **given: Any) -> Any:
        self.calls.append(("create_run", experiment, given))
        return SimpleNamespace(info=SimpleNamespace(run_id="run0"))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **given: self.calls.append((name, *args, given))


class Metric(NamedTuple):
    """As MLflow's: its arguments and their order."""

    key: str
    value: float
    timestamp: int
    step: int


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """The stand-in for MLflow that is imported here."""
    there = Client()
    param = namedtuple("Param", ["key", "value"])
    for name in ("mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Metric=Metric, Param=param, MlflowClient=there))
    for name in ("ID", "NAME"):
        monkeypatch.delenv(f"MLFLOW_EXPERIMENT_{name}", raising=False)
    return there


def test_mlflow_begins_a_run_with_its_settings_in_the_experiment_that_is_chosen(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {f"key{i}": "x" * 600 if i == 7 else i for i in range(250)}
    begin = trackers.TRACKERS["mlflow"].begin
    assert begin(about(settings=settings), None).id == "run0"
    (_, experiment, given), *batches = client.calls
    assert experiment == client.experiments["fl-attack"]
    assert given == {"run_name": "a run", "tags": {"command": "fl-attack rounds=3", "kind": "run"}}
    assert [(name, run) for name, run, _ in batches] == [("log_batch", "run0")] * 3
    assert [len(one["params"]) for *_, one in batches] == [100, 100, 50]
    params = [tuple(param) for *_, one in batches for param in one["params"]]
    assert params == [(key, str(value)[:500]) for key, value in settings.items()]
    begin(about("cell", parent="whole"), None)
    tags = {"command": "fl-attack rounds=3", "kind": "cell", "mlflow.parentRunId": "whole"}
    assert client.calls[4] == ("create_run", experiment, {"run_name": "a cell", "tags": tags})
    assert list(client.experiments) == ["fl-attack"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    begin(about(), None)
    assert client.calls[6][1] == client.experiments["mine"] != experiment
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
    begin(about(), None)
    assert client.calls[8][1] == "17"
    client.calls.clear()
    assert begin(about(), "earlier").id == "earlier"
    assert client.calls == [("update_run", "earlier", {"status": "RUNNING"})]


def test_mlflow_has_each_measure_at_its_round_a_thousand_at_a_time(client: Client, tmp_path: Path) -> None:
    store = trackers.TRACKERS["mlflow"].begin(about(settings={}), None)
    client.calls.clear()
    before = time.time() * 1000 - 1
    store.rows("", ROWS)
    store.rows("baseline", ROWS[1:])
    logged = [[tuple(metric) for metric in given["metrics"]] for *_, given in client.calls]
    assert [[(key, value, step) for key, value, _, step in one] for one in logged] == [
        [("test_accuracy", 0.25, 0), ("test_accuracy", 0.5, 2)],
        [("baseline/test_accuracy", 0.5, 2)],
    ]
    assert all(before <= one[2] <= time.time() * 1000 for batch in logged for one in batch)  # milliseconds
    client.calls.clear()
    store.rows("", [{"round": i, "test_loss": 0.5} for i in range(2300)])
    assert [len(given["metrics"]) for *_, given in client.calls] == [1000, 1000, 300]
    assert [metric.step for *_, given in client.calls for metric in given["metrics"]] == [*range(2300)]
    client.calls.clear()
    facts = {"flips": 3, "drop": math.nan, "attack": "greedy" * 100, "error": "", "rounds_to_recover": None}
    store.summary("baseline", facts)
    *tags, (_, run, given) = client.calls
    assert tags == [
        ("set_tag", "run0", "baseline/summary/drop", "nan", {}),
        ("set_tag", "run0", "baseline/summary/attack", ("greedy" * 100)[:500], {}),
    ]
    assert run == "run0" and [(one.key, one.value, one.step) for one in given["metrics"]] == [
        ("baseline/summary/flips", 3.0, 0)
    ]
    client.calls.clear()
    store.leave()
    store.files(tmp_path, [tmp_path / "rounds.csv", tmp_path / "baseline" / "rounds.csv"])
    for how in ("finished", "failed", "killed"):
        store.end(how)  # type: ignore[arg-type]
    assert client.calls == [
        ("log_artifact", "run0", str(tmp_path / "rounds.csv"), None, {}),
        ("log_artifact", "run0", str(tmp_path / "baseline" / "rounds.csv"), "baseline", {}),
        *[("set_terminated", "run0", state, {}) for state in ("FINISHED", "FAILED", "KILLED")],
    ]


def test_tensorboard_names_folders_that_every_system_takes_and_counts_finite_numbers_alone() -> None:
    at = Path("out")
    name = "0001 attack.name=a/b\\c:d,e strategy.pre=[nnm]"
    assert tensorboard.begin(about("cell", at), "there").id == "there"
    assert tensorboard._safe(name) == "0001_attack.name=a_b_c_d,e_strategy.pre=_nnm_"
    assert len(tensorboard._safe("x" * 400)) == 150
    assert [tensorboard.is_number(one) for one in (1, 0.5, True, math.nan, math.inf, "1", None)] == [True] * 2 + [
        False
    ] * 5
    assert tensorboard._table({"a": "x|y", "b": None}) == "| | |\n|---|---|\n| a | x\\|y |\n| b | None |"


# --- what is logged when ---------------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, Any]:
    """What the journal in a folder tells, which is then removed."""
    file = folder / "trackers.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    return found


def test_the_journal_is_written_as_soon_as_something_new_is_logged(stores: dict[str, Store], tmp_path: Path) -> None:
    one = tracked.Tracked(["wandb"], about(folder=tmp_path), tracked.Journal(tmp_path))
    assert kept(tmp_path) == {"": {"wandb": {"id": "id0", "rounds": {}}}}
    assert one.last() == one.last("baseline") == -1 and one.is_due()
    one.rows(ROWS)
    assert kept(tmp_path) == {"": {"wandb": {"id": "id0", "rounds": {"": 2}}}} and one.last() == 2
    one.rows(ROWS)
    assert kept(tmp_path) == {} and stores["id0"].rounds() == [0, 2]  # nothing is new
    one.rows([*ROWS, {"round": 4}], "baseline")
    one.rows([*ROWS, {"round": 4}])
    assert kept(tmp_path)[""]["wandb"]["rounds"] == {"": 4, "baseline": 4}
    assert stores["id0"].rounds() == stores["id0"].rounds("baseline") == [0, 2, 4]
    one.summary({"flips": 3, "versions": {"torch": "2", "numpy": "1"}}, "baseline")
    assert stores["id0"].told == {"baseline": {"flips": 3, "versions/torch": "2", "versions/numpy": "1"}}
    one.end("finished")
    assert one.last() == sys.maxsize and not one.is_due() and stores["id0"].ended == ["finished"]
    cell = tracked.Tracked(["wandb"], about("cell", tmp_path), one.journal, "key", set())
    cell.rows(ROWS)  # the sweep saves for all of its cells
    assert kept(tmp_path) == {} and stores["id1"].about.parent == "id0" and cell.last() == 2


def test_rows_are_due_again_after_a_while(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [100.0]
    monkeypatch.setattr(tracked, "LOG_EVERY", 1.0)
    monkeypatch.setattr(tracked, "time", SimpleNamespace(monotonic=lambda: now[0]))
    one = tracked.Tracked(["wandb"], about(folder=tmp_path), tracked.Journal(tmp_path))
    history = SimpleNamespace(rows=[])
    observe = one.observer(history)  # type: ignore[arg-type]
    for round_, at in enumerate((100.0, 100.9, 101.0, 101.5, 102.5)):
        now[0] = at
        history.rows.append({"round": round_})
        observe(round_, history.rows[-1])
    assert [rounds for _, rounds in stores["id0"].calls] == [[0], [1, 2], [3, 4]]
    assert one.is_due("baseline") and not one.is_due()


def test_a_run_that_cannot_be_continued_begins_anew_in_one_line(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trackers.json").write_text('{"": {"wandb": {"id": "gone", "rounds": {"": 2}}}}')

    def begin(about: About, id: str | None) -> Store:
        if id == "gone":
            raise OSError("not\nthere" + "!" * 400)
        return Store(about, id)

    monkeypatch.setattr(trackers.TrackerEntry, "begin", property(lambda self: begin))
    one = tracked.Tracked(["wandb"], about(folder=tmp_path), tracked.Journal(tmp_path))
    one.rows(ROWS)
    assert stores["id0"].rounds() == [0, 2] and kept(tmp_path)[""]["wandb"] == {"id": "id0", "rounds": {"": 2}}
    (told,) = capsys.readouterr().err.splitlines()
    reason = ("not there" + "!" * 400)[:300]
    assert told == f"the earlier run gone of a tracker can't be continued ({reason}); a new one begins"
    (tmp_path / "trackers.json").write_text('{"": {"wandb": {"id": "id0", "rounds": {"": 2}}}}')
    assert tracked.Journal(tmp_path).entry("", "wandb")["id"] == "id0"
    assert tracked.Journal(tmp_path, anew=True).content == {}
    (tmp_path / "trackers.json").write_text("{")
    assert tracked.Journal(tmp_path).content == {}


def test_a_tracker_that_cannot_begin_ends_the_others_whose_runs_the_next_call_continues(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = {name: trackers.TrackerEntry((), name) for name in ("wandb", "mlflow")}
    monkeypatch.setattr(trackers, "TRACKERS", entries)

    def begin(about: About, id: str | None) -> Store:
        raise ValueError

    monkeypatch.setattr(
        trackers.TrackerEntry, "begin", property(lambda self: begin if self.home == "mlflow" else Store)
    )
    with pytest.raises(InputError, match=r"tracker=mlflow can't begin: ValueError$"):
        tracked.Tracked(["wandb", "mlflow"], about(folder=tmp_path), tracked.Journal(tmp_path))
    assert stores["id0"].ended == ["failed"] and kept(tmp_path)[""]["wandb"]["id"] == "id0"
    failed = {"wandb"}  # as of an earlier cell
    tracked.Tracked(["wandb", "mlflow"], about("cell", tmp_path), tracked.Journal(tmp_path), "key", failed)
    assert failed == {"wandb", "mlflow"} and len(stores) == 1


def test_what_is_open_is_closed_before_a_folder_moves(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left: list[str] = []
    monkeypatch.setattr(Store, "leave", lambda self: left.append(self.about.kind))
    one = tracked.Tracked(["wandb"], about(folder=tmp_path), tracked.Journal(tmp_path))
    one.leave()
    settings = compose(*SMALL, "tracker=[wandb]", f"out={tmp_path}")
    with trackers.of_sweep([({"seed": "0"}, settings)]) as whole:
        whole.leave()  # nothing is begun yet
        whole.begin(tmp_path, anew=True)
        whole.leave()
        (tmp_path / "trackers.json").unlink()
        whole.done(0, [{"round": 0}], {"flips": 1}, "diverged")
        whole.done(0, [{"round": 0}], {"flips": 1}, "")  # it is done
    assert left == ["run", "sweep"]
    assert {store.about.kind: store.ended for store in stores.values()} == {
        "run": [],
        "sweep": ["finished"],
        "cell": ["failed"],
    }
    note = kept(tmp_path)
    (key,) = note.keys() - {""}
    assert len(key) == 16 and note[key]["done"] == {} and note[key]["wandb"]["rounds"] == {"": 0}


@pytest.mark.parametrize(("name", "needs"), [("tensorboard", 1), ("mlflow", 3), ("wandb", 1)])
def test_every_module_of_a_tracker_is_looked_for(monkeypatch: pytest.MonkeyPatch, name: str, needs: int) -> None:
    asked: list[str] = []
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: asked.append(module) or module)
    trackers.check([name])
    assert asked[0] == name and len(asked) == needs
    for missing in asked:
        monkeypatch.setattr(
            trackers.importlib.util, "find_spec", lambda module, missing=missing: module != missing or None
        )
        told = rf"^tracker={name} needs {missing}, which is not installed; pip install 'fl-attack\[{name}\]'$"
        with pytest.raises(InputError, match=told):
            trackers.check([name])
    if name == "mlflow":
        assert asked[1:] == ["sqlalchemy", "alembic"]  # mlflow-skinny comes without them
