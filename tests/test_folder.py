"""A result is never overwritten or mixed by accident, and what was measured survives whatever ends a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_attack import checkpoint, engine, experiment, folder, multirun, plots
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import compose
from fl_attack.errors import InputError, Interrupted

Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]
BYTES = ("model.npz", "flips.npz", "rounds.csv", "partition.npz", "curves.png", "config.yaml")


def short(small_data: Small, out: Path, *more: str) -> list[str]:
    return [*small_data(2), "engine=batched", "rounds=6", "batch_size=full", f"out={out}", *more]


def names(at: Path) -> set[str]:
    return {file.name for file in at.rglob("*")}


@pytest.mark.parametrize("first", ["run", "sweep"])
def test_a_folder_is_of_one_run_or_one_sweep(command: Command, small_data: Small, tmp_path: Path, first: str) -> None:
    run, grid = short(small_data, tmp_path / "o"), ["-m", *short(small_data, tmp_path / "o", "seed=1,2")]
    one, other = (run, grid) if first == "run" else (grid, run)
    assert command(*one)[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "o").rglob("*") if file.is_file()}
    code, _, stderr = command(*other)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"holds a finished {first}, not a " in stderr
    assert {file: file.read_bytes() for file in (tmp_path / "o").rglob("*") if file.is_file()} == before
    assert command(*other, "overwrite=true")[0] == 0
    fresh = [one.replace("/o", "/fresh") if one.startswith("out=") else one for one in other]
    assert command(*fresh)[0] == 0
    assert names(tmp_path / "o") == names(tmp_path / "fresh")  # nothing of the old kind is left


def test_a_folder_in_use_is_refused_to_others(command: Command, small_data: Small, tmp_path: Path) -> None:
    with folder.taken(tmp_path / "o", "run", False, lambda at: False):
        for more in ([], ["overwrite=true"]):
            code, _, stderr = command(*short(small_data, tmp_path / "o", *more))
            assert code == 2
            assert "is in use by another process" in stderr
        assert command("-m", *short(small_data, tmp_path / "o", "seed=1,2"))[0] == 2
    assert command(*short(small_data, tmp_path / "o"))[0] == 0
    assert not (tmp_path / "o" / folder.LOCK).exists()


def test_runs_started_at_the_same_time_have_folders_of_their_own() -> None:
    outs = {compose().out for _ in range(20)}
    assert len(outs) == 20


def test_a_sweep_without_out_has_one_folder(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = [*small_data(2), "engine=batched", "rounds=3", "batch_size=full", "attack=greedy,random_flip"]
    code, printed, _ = command("-m", *run)
    assert code == 0
    assert (tmp_path / printed.strip().rpartition("results in ")[2] / "sweep.csv").exists()


def test_a_sweep_over_folders_is_refused(command: Command, small_data: Small, tmp_path: Path) -> None:
    run = [one for one in short(small_data, tmp_path) if not one.startswith("out=")]
    code, _, stderr = command("-m", *run, f"out={tmp_path}/a,{tmp_path}/b")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "give each folder a sweep of its own" in stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"])
def test_folders_of_hydra_are_refused(command: Command, tmp_path: Path, key: str) -> None:
    code, _, stderr = command(f"{key}={tmp_path}/h", f"out={tmp_path}/o")
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{key} has no effect here" in stderr and "out=" in stderr


def test_several_experiments_at_once_are_refused(command: Command, tmp_path: Path) -> None:
    code, _, stderr = command("experiment=harm,recovery", f"out={tmp_path}/o")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "names several" in stderr


def test_a_sweep_stopped_as_it_draws_is_not_finished(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = [
        "-m",
        *short(small_data, tmp_path / "o", "attack.budget=0.1,0.5", "figures=[[columns,attack.budget,flips]]"),
    ]

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plots, "all_of_sweep", stops)
        code, _, stderr = command(*grid)
        assert code == 130
        assert stderr.splitlines()[-1].endswith(f"what is done is in {tmp_path}/o; the same command goes on from there")
    assert not list((tmp_path / "o").glob("*.png"))
    monkeypatch.setattr(multirun.execute, "batched_numbers", lambda *_: pytest.fail("computed again"))
    assert command(*grid)[0] == 0
    drawn = {file.name for file in (tmp_path / "o").glob("*.png")}
    assert "columns_attack-budget_flips.png" in drawn
    for file in (tmp_path / "o").glob("*.p*"):
        file.unlink()
    assert plots.main([str(tmp_path / "o")]) == 0  # all that the sweep drew, and nothing less
    assert {file.name for file in (tmp_path / "o").glob("*.png")} == drawn
    assert command(*grid)[0] == 2


@pytest.mark.parametrize(
    "figure", ["[nonsense]", "[columns,attack.budget,nothing]", "[matrix]", "[columns]", "[heatmap]"]
)
def test_a_figure_that_can_not_be_is_refused_before_anything_is_computed(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    monkeypatch.setattr(multirun.execute, "batched_numbers", lambda *_: pytest.fail("computed"))
    code, _, stderr = command("-m", *short(small_data, tmp_path / "o", "attack.budget=0.1,0.5", f"figures=[{figure}]"))
    assert (code, stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_an_unfinished_result_of_other_settings_is_not_replaced_unless_asked_to(
    command: Command, small_data: Small, tmp_path: Path, kind: str
) -> None:
    run = short(small_data, tmp_path / "o")
    run = ["-m", *run, "seed=1,2"] if kind == "sweep" else run
    assert command(*run)[0] == 0
    if kind == "run":
        (tmp_path / "o" / "summary.json").unlink()
    else:
        (tmp_path / "o" / "units").mkdir()
        (tmp_path / "o" / "units" / "1234.npz").touch()
    code, _, stderr = command(*run, "lr=0.3")
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"holds an unfinished {kind} of other settings" in stderr
    assert command(*run, "lr=0.3", "overwrite=true")[0] == 0


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_an_old_result_stays_until_the_new_one_is_whole(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, at = short(small_data, tmp_path / "o"), tmp_path / "o"
    run = ["-m", *run, "attack.budget=0.1,0.5"] if kind == "sweep" else run
    assert command(*run)[0] == 0
    (at / "mine.txt").write_text("notes")
    before = {file: file.read_bytes() for file in at.rglob("*") if file.is_file()}

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plots, "curves_of", stops)
        patch.setattr(plots, "all_of_sweep", stops)
        assert command(*run, "lr=0.3", "overwrite=true")[0] == 130
    assert {file: file.read_bytes() for file in before} == before
    assert command(*run, "lr=0.3")[0] == 2  # the old one still is whole
    assert command(*run, "lr=0.3", "overwrite=true")[0] == 0
    assert {file: file.read_bytes() for file in before} != before
    assert (at / "mine.txt").exists() and not (at / folder.UNFINISHED).exists()
    assert names(at) == {file.name for file in before} | ({"baseline"} if kind == "run" else set())


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_batched_run_keeps_what_was_measured(
    small_data: Small, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "o"
    run = [*small_data(2), "engine=batched", "rounds=1000000", "eval_every=50", "batch_size=full", f"out={out}"]
    process = subprocess.Popen([sys.executable, "-m", "fl_attack", *run], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == f"fl-attack: interrupted; what was measured is in {out}; the same command goes on"
    for at in (out, out / "baseline"):
        assert len((at / "rounds.csv").read_text().splitlines()) > 3
        assert np.isfinite(np.load(at / "model.npz")["theta"]).all()
    assert len(np.load(out / "flips.npz")["round"]) > 0
    assert not (out / "summary.json").exists()


def test_what_an_interrupted_batched_run_keeps_is_the_beginning_of_the_whole(
    small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [*small_data(3), "engine=batched", "batch_size=30"]
    experiment.run(compose(*base, "rounds=7", f"out={tmp_path}/short"))

    def stops(*arguments: object, watch: Callable[..., None], **keys: object) -> object:
        def also(cells: list[int], so_far: Callable[[], list[engine.Outcome]]) -> None:
            also.round += 1  # type: ignore[attr-defined]
            if also.round == 7:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGINT)
            watch(cells, so_far)

        also.round = 0  # type: ignore[attr-defined]
        return run_cells(*arguments, watch=also, **keys)

    run_cells = engine.run_cells
    monkeypatch.setattr(engine, "run_cells", stops)
    with pytest.raises(Interrupted, match="interrupted; what was measured is in"):
        experiment.run(compose(*base, "rounds=20", f"out={tmp_path}/cut"))
    for name in ("model.npz", "flips.npz", "rounds.csv"):
        for at in ("", "baseline"):
            one, other = ((tmp_path / of / at / name).read_bytes() for of in ("short", "cut"))
            assert one == other


CUT = {
    "epochs": ["attack.refresh=epoch", "attack.scope=per_client", "attack.rounding=carry", "server_optimizer=adam"],
    "carry": ["attack.rounding=carry", "attack.budget=0.07", "clients.per_round=0.5", "server_optimizer=momentum"],
    "early stop": ["attack.goal=targeted", "early_stop.patience=9", "eval_every=2", "local_steps=2"],
    "a rule": ["attack=alie", "strategy=median", "eval_every=3"],
}


@pytest.mark.parametrize("more", CUT.values(), ids=CUT)
def test_linear_runs_go_on_where_they_were_cut_and_end_in_the_same_bytes(
    small_data: Small, tmp_path: Path, more: list[str]
) -> None:
    chosen = compose(*small_data(3), "engine=batched", "rounds=12", "batch_size=30", "lr=0.5", "out=unused", *more)
    cells = engine.make_scenarios([chosen.unattacked(), chosen])
    whole = engine.run_cells(cells)
    place = tmp_path / "honest", tmp_path / "attacked"
    for cut in (3, 8):  # the second time from where the first one ended
        done: list[int] = []

        def stop(cells: list[int], so_far: object, cut: int = cut, done: list[int] = done) -> None:
            if sum(done) >= cut * len(cells):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.run_cells(
                cells, progress=done.append, watch=stop, checkpoints=[Checkpoint(at, at.name) for at in place]
            )
        assert sum(done) == cut * len(cells)
    steps: list[int] = []
    ended = engine.run_cells(cells, progress=steps.append, checkpoints=[Checkpoint(at, at.name) for at in place])
    assert steps[0] == 8 * len(cells) and sum(steps) == 12 * len(cells)
    for one, other in zip(ended, whole, strict=True):
        assert one.theta is not None and other.theta is not None
        assert one.theta.numpy().tobytes() == other.theta.numpy().tobytes()
        assert one.table.tobytes() == other.table.tobytes() and one.flip_count == other.flip_count
        flips, others = one.history().flip_table(), other.history().flip_table()
        assert all(flips[name].tolist() == others[name].tolist() for name in others)
        assert [f.allowed for _, f in one.flips] == [f.allowed for _, f in other.flips]
    steps.clear()
    engine.run_cells(cells[1:], progress=steps.append, checkpoints=[Checkpoint(place[1], "attacked")])
    assert steps[0] == 1  # the state is of two cells, and of no use to one


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = {
        "tensor": torch.tensor([[1.5, float("nan")], [float("inf"), -0.0]], dtype=torch.float64),
        "array": np.arange(3, dtype=np.int64),
        "nested": {"list": [1, 2.5, "text", None, True], "tuple": (np.float32(0.1), [])},
    }
    checkpoint.save(tmp_path, state, "key")
    found = checkpoint.load(tmp_path, "key")
    assert found is not None
    assert found["tensor"].numpy().tobytes() == state["tensor"].numpy().tobytes()  # type: ignore[attr-defined]
    assert found["array"].dtype == np.int64 and found["array"].tolist() == [0, 1, 2]
    assert found["nested"] == {"list": [1, 2.5, "text", None, True], "tuple": (float(np.float32(0.1)), [])}
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, {"set": {1}}, "key")


def test_a_foreign_or_damaged_state_is_left_aside_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.load(tmp_path, "key") is None
    assert capsys.readouterr().err == ""
    checkpoint.save(tmp_path, {"a": np.arange(1000)}, "key")
    assert checkpoint.load(tmp_path, "another") is None
    assert "is of other settings" in capsys.readouterr().err
    file = tmp_path / checkpoint.FILE
    whole = file.read_bytes()
    for damage in (whole[:-30], whole[:200] + b"?" + whole[201:], b"", b"PK nonsense"):
        file.write_bytes(damage)
        assert checkpoint.load(tmp_path, "key") is None
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1 and "is damaged" in stderr


RESUMED = {
    "epochs and early stopping": ["attack.refresh=epoch", "early_stop.patience=400", "server_optimizer=adam"],
    "a strategy of Flower's": ["strategy=flower", "strategy.path=flwr.serverapp.strategy.FedAdam"],
    "without a twin": ["baseline=false", "clients.per_round=0.5", "eval_every=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("more", RESUMED.values(), ids=RESUMED)
def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_bytes(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    def run(out: str) -> list[str]:
        return [*small_data(3), "rounds=300", "batch_size=30", f"out={tmp_path}/{out}", *more]

    begin = (
        "import sys; from fl_attack import checkpoint, __main__; checkpoint.Checkpoint.__init__.__defaults__ = (0.0,); "
        "checkpoint.SHARE = 0; sys.argv[0] = 'fl-attack'; __main__.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", begin, *run("killed")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / checkpoint.FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    state = np.load(tmp_path / "killed" / checkpoint.FILE)
    (tmp_path / "killed" / ".rounds.csv.0123abcd").touch()  # what a killed process was writing
    done = json.loads(state["tree"].tobytes())["state"]["dict"]["recorder"]["dict"]["round"]
    assert 0 < done < 300
    code, _, stderr = command(*run("killed"), "resume=true")
    assert code == 0
    assert f"going on after round {done} of 300" in stderr
    assert command(*run("whole"))[0] == 0
    for at in ("", "baseline") if "baseline=false" not in more else ("",):
        for name in BYTES[:-1]:
            if (tmp_path / "whole" / at / name).exists():
                assert (tmp_path / "killed" / at / name).read_bytes() == (tmp_path / "whole" / at / name).read_bytes()
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


# --- what is whose, by files that are nothing but names ----------------------------------------------------


def put(at: Path, *files: str) -> set[str]:
    """Make files, whose content is their name; gives what the folder holds then."""
    for name in files:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(name)
    return held(at)


def held(at: Path) -> set[str]:
    """The files in a folder, by their paths in it."""
    return {file.relative_to(at).as_posix() for file in at.rglob("*") if file.is_file()}


def test_the_names_of_a_result_s_files_are_those_that_the_documentation_tells() -> None:
    told = " ".join(file.read_text() for file in (Path(__file__).parents[1] / "docs").glob("*.md"))
    ours = (folder.PLAN, folder.SUMMARY, folder.BASELINE, folder.ROUNDS, folder.REPORT, folder.TABLE, folder.CURVES)
    ours += (*folder.OF_RUN, folder.STATE, folder.TRACKERS, folder.TENSORBOARD, folder.UNITS, folder.UNFINISHED)
    assert not [name for name in ours if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", told)]
    assert len({*ours}) == len(ours) - 3  # three of them are of a run too


@pytest.mark.parametrize(
    ("files", "kind", "finished"),
    [
        ([], None, False),
        (["config.yaml", "model.npz", "curves.npz"], None, False),
        (["summary.json"], "run", True),
        (["rounds.csv"], "run", False),
        (["baseline/rounds.csv"], "run", False),
        (["baseline/summary.json"], "run", False),
        (["sweep.csv"], "sweep", True),
        (["sweep.csv", "units/a.npz"], "sweep", False),
        (["units/a.npz"], "sweep", False),
        (["sweep.csv", "rounds.csv"], "sweep", True),
    ],
)
def test_a_result_is_known_by_its_files(tmp_path: Path, files: list[str], kind: str | None, finished: bool) -> None:
    put(tmp_path, *files)
    assert folder.holds(tmp_path) == kind
    assert kind is None or folder.is_finished(tmp_path, kind) == finished  # type: ignore[arg-type]


OF_RUN = {"summary.json", "rounds.csv", "model.npz", "checkpoint.npz", "report.html", "curves.png", "plan.csv"}
OF_SWEEP = {"sweep.csv", "curves.npz", "config.yaml", "heatmap.png", "columns_a_b.pdf", "report.html"}


def test_a_result_is_cleared_with_what_belongs_to_it_and_nothing_else(tmp_path: Path) -> None:
    mine = {"notes.txt", "mine.py", "more/rounds.csv", "tensorboard/of-another-program"}
    put(tmp_path / "run", *OF_RUN, "baseline/rounds.csv", "baseline/model.npz", *mine, "photo.png")
    folder.clear(tmp_path / "run")
    assert held(tmp_path / "run") == mine | {"photo.png"}  # figures of runs have names of their own
    put(tmp_path / "sweep", *OF_SWEEP, "units/a.npz", *mine)
    folder.clear(tmp_path / "sweep")
    assert held(tmp_path / "sweep") == mine and not (tmp_path / "sweep" / "units").exists()
    put(tmp_path / "run", *OF_RUN, "trackers.json", "baseline/notes.txt")
    folder.clear(tmp_path / "run")
    assert held(tmp_path / "run") == mine - {"tensorboard/of-another-program"} | {"photo.png", "baseline/notes.txt"}
    put(tmp_path / "run", "baseline/config.yaml")
    folder.clear(tmp_path / "run")
    assert "baseline/notes.txt" not in held(tmp_path / "run")  # it was a run's
    folder.clear(tmp_path / "nowhere")


def test_a_folder_is_held_while_it_is_written_to_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with folder.taken(out, "run", False, lambda at: False) as place:
        assert place == (out, out) and [file.name for file in out.iterdir()] == [".lock"]
        with (
            pytest.raises(InputError, match="is in use by another process; wait for it"),
            folder.taken(out, "run", True, lambda at: True),
        ):
            pass
        assert (out / ".lock").exists()  # another's is not removed
    assert out.is_dir() and not [*out.iterdir()]
    with folder.taken(out, "run", False, lambda at: False):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"can't be written to: (File exists|Not a directory); use another folder"):
        folder.taken(tmp_path / "file", "run", False, lambda at: False).__enter__()


LEFT = {".rounds.csv.0123abcd", "units/.x.npz.00000000", "baseline/.summary.json.ffffffff", ".report.html.12345678"}
OTHER = {
    ".rounds.csv.0123abc",
    ".notes.txt.0123abcd",
    ".rounds.csv",
    "rounds.csv.0123abcd",
    ".hidden",
    ".a.csv.0123ABCD",
}


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    put(tmp_path, *LEFT, *OTHER, "more/.rounds.csv.0123abcd")
    with folder.taken(tmp_path, "sweep", False, lambda at: True):
        assert held(tmp_path) == OTHER | {"more/.rounds.csv.0123abcd", ".lock"}


@pytest.mark.parametrize(
    ("files", "kind", "goes_on", "said"),
    [
        (["summary.json"], "run", True, "holds a finished run; use another folder or overwrite=true"),
        (
            ["summary.json"],
            "sweep",
            True,
            "holds a finished run, not a sweep; use another folder, or overwrite=true to",
        ),
        (["sweep.csv", "units/a.npz"], "run", True, "holds an unfinished sweep, not a run; use another folder"),
        (["rounds.csv"], "run", False, "holds an unfinished run of other settings; use another folder, or overwrite=t"),
        (["rounds.csv"], "run", True, ""),
        (["model.npz"], "run", False, ""),
    ],
)
def test_what_would_be_lost_is_refused_unless_it_may_be_replaced(
    tmp_path: Path, files: list[str], kind: folder.ResultKind, goes_on: bool, said: str
) -> None:
    before = put(tmp_path, *files)
    if said:
        with pytest.raises(InputError) as raised:
            folder.taken(tmp_path, kind, False, lambda at: goes_on).__enter__()
        assert f"out={tmp_path} {said}" in str(raised.value) and held(tmp_path) == before
    else:
        with folder.taken(tmp_path, kind, False, lambda at: goes_on) as place:
            assert place.work == tmp_path
    with folder.taken(tmp_path, kind, True, lambda at: goes_on) as place:
        finished = files == ["summary.json"]
        assert place.work == (tmp_path / "unfinished" if finished else tmp_path) and place.work.is_dir()
        keeps = finished or (goes_on and kind == "run" and files == ["rounds.csv"])
        assert held(tmp_path) - {".lock"} == (before if keeps else set()) or files == ["model.npz"]


def test_a_new_result_takes_the_place_of_the_old_when_it_is_whole(tmp_path: Path) -> None:
    put(tmp_path, *OF_RUN, "notes.txt", "baseline/rounds.csv", "baseline/model.npz")
    work = tmp_path / "unfinished"
    put(work, "sweep.csv", "curves.npz", "figure.png")
    folder.settle(folder.Place(tmp_path, work))
    assert held(tmp_path) == {"notes.txt", "sweep.csv", "curves.npz", "figure.png"} and not work.exists()
    put(work, "rounds.csv", "summary.json", "baseline/rounds.csv")
    put(tmp_path, "baseline/of-nobody")  # in the way
    folder.settle(folder.Place(tmp_path, work))
    assert held(tmp_path) == {"notes.txt", "rounds.csv", "summary.json", "baseline/rounds.csv"}
    folder.settle(folder.Place(tmp_path, tmp_path))
    assert "summary.json" in held(tmp_path)


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_what_says_that_a_result_is_whole_is_moved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    last = "summary.json" if kind == "run" else "sweep.csv"
    put(tmp_path / "unfinished", last, "a.npz", "z.npz")
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    folder.settle(folder.Place(tmp_path, tmp_path / "unfinished"))
    assert moved == ["a.npz", "z.npz", last]
