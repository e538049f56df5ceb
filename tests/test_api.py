"""The laboratory from Python: the same keys, numbers and refusals as the command's, in memory or in a folder."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fl_attack
from fl_attack import InputError, Result, load, run, sweep
from fl_attack.overrides import written
from fl_attack.result import column_of
from fl_attack.sweep_table import RESULTS

Command = Callable[..., tuple[int, str, str]]
SMALL = ("dataset=digits_01", "engine=batched", "batch_size=64", "rounds=4", "attack.budget=0.5")


@pytest.fixture(scope="module")
def small() -> Result:
    return run(*SMALL)


@pytest.fixture(scope="module")
def grid() -> Result:
    return sweep(*SMALL, grid={"attack.budget": [0.1, 0.5], "seed": range(2)})


def test_a_run_has_the_numbers_of_the_command(small: Result, command: Command, tmp_path: Path) -> None:
    assert command(*SMALL, f"out={tmp_path / 'out'}")[0] == 0
    there = load(tmp_path / "out")
    assert (small.folder, there.folder) == (None, tmp_path / "out")
    assert small.rounds.equals(there.rounds)
    assert small.flips.equals(there.flips) and len(small.flips) == small.summary["flips"] > 0
    assert small.clients.equals(there.clients)
    assert (small.theta == there.theta).all() and small.theta.shape == (1, 65)
    assert torch.equal(small.state_dict["theta"], torch.from_numpy(small.theta))
    assert small.baseline is not None and there.baseline is not None
    assert small.baseline.rounds.equals(there.baseline.rounds) and not small.baseline.flips["round"].any()
    assert small.baseline.summary["final_loss"] < small.summary["final_loss"]
    without = {"seconds"}
    assert {k: v for k, v in small.summary.items() if k not in without} == {
        k: v for k, v in there.summary.items() if k not in without
    }


def test_a_sweep_has_the_table_of_the_command(grid: Result, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("-m", *SMALL[:-1], "attack.budget=0.1,0.5", "seed=0,1", f"out={out}")[0] == 0
    assert grid.table.equals(load(out).table)
    assert list(grid.table["attack.budget"]) == [0.1, 0.1, 0.5, 0.5] and list(grid.table["seed"]) == [0, 1, 0, 1]
    rounds, accuracy = grid.curves
    assert accuracy.shape == (4, len(rounds)) and accuracy[:, -1] == pytest.approx(grid.table["final_accuracy"])
    assert grid.summary == {"cells": 4, "broken_off": 0} and "4 cells, in memory" in repr(grid)


def test_nothing_is_left_behind_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run(*SMALL, rounds=1, baseline=False)
    sweep(*SMALL, rounds=1, grid={"seed": [1, 2]})
    with pytest.raises(InputError):
        run(*SMALL, batch_size=10**6)
    assert os.listdir(tmp_path) == []


def test_out_names_the_folder(tmp_path: Path) -> None:
    result = run(*SMALL, rounds=1, out=tmp_path / "a run")
    assert result.folder == tmp_path / "a run" and (result.folder / "curves.png").exists()
    with pytest.raises(InputError, match="holds a finished run; use another folder or overwrite=true"):
        run(*SMALL, rounds=1, out=tmp_path / "a run")
    assert (run(*SMALL, rounds=1).save(tmp_path / "saved") / "summary.json").exists()
    assert load(tmp_path / "saved").rounds.equals(result.rounds)
    with pytest.raises(InputError, match="holds a run"):
        run(*SMALL, rounds=1).save(tmp_path / "saved")
    with pytest.raises(InputError, match="holds no result"):
        load(tmp_path)


@pytest.mark.parametrize(
    "wrong", ["attack.budgt=1", "attack=gredy", "rounds=0", "clients.total=2", "rounds='", "seed=1,2"]
)
def test_errors_are_the_line_of_the_command(wrong: str, command: Command, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        run(wrong)
    code, _, stderr = command(wrong, f"out={tmp_path}")
    assert code == 2 and stderr.strip() == f"fl-attack: {raised.value}"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: run("-m", "seed=1"), "-m is an option"),
        (lambda: run(3), "3 is not an override"),
        (lambda: run("experiment=harm"), "use sweep"),
        (lambda: sweep(grid={"seed": 3}), "seed=3 is not a list of values"),
        (lambda: sweep(grid={"attack.goal": "targeted"}), "is not a list"),
        (lambda: sweep(grid={"seed": []}), "seed has no values"),
        (lambda: sweep(grid={"sed": [1, 2]}), "sed is not a known key; did you mean seed"),
        (lambda: run(hydra={"run": 1}), "hydra"),
    ],
)
def test_what_is_no_key_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-7,
        "greedy",
        "a b",
        "it's",
        "a,b=c",
        "C:\\d\\'",
        "a b\\",
        ["it's\\"],
        [0, "a b"],
        {"a": 1, "b": [True]},
        "x:y",
    ],
)
def test_values_of_python_arrive_as_they_are(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(written("key", value)).value() == value


def test_values_of_numpy_are_numbers() -> None:
    assert written("lr", np.float64(0.25)) == "lr=0.25" and written("c", np.array([0, 1])) == "c=[0,1]"


def test_without_pandas_tables_are_arrays(small: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    again = load(small.save(tmp_path / "out"))
    assert isinstance(again.rounds, np.ndarray) and len(again.rounds) == 5
    assert (again.rounds["test_accuracy"] == small.rounds["test_accuracy"]).all()
    assert again.flips["sample"].tolist() == small.flips["sample"].tolist()


def test_figures_show_the_numbers(small: Result, grid: Result) -> None:
    (honest, attacked) = small.plot().axes[0].lines[:2]
    assert attacked.get_ydata() == pytest.approx(small.rounds["test_accuracy"])
    assert small.baseline is not None and honest.get_ydata() == pytest.approx(small.baseline.rounds["test_accuracy"])
    assert grid.plot().axes and grid.plot("rounds", "attack.budget").axes
    assert grid.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    with pytest.raises(InputError, match="is not a kind of plot"):
        grid.plot("nothing")
    with pytest.raises(InputError, match="of a sweep"):
        small.table  # noqa: B018
    with pytest.raises(InputError, match="of a run"):
        grid.rounds  # noqa: B018


def test_runs_go_in_threads(small: Result) -> None:
    found: dict[int, Result] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: run(*SMALL, seed=i)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].rounds.equals(small.rounds) and not found[1].rounds.equals(found[2].rounds)


def test_a_network_has_a_state_dict() -> None:
    result = run(*SMALL, "model=mlp", rounds=1, baseline=False)
    assert result.baseline is None and all(isinstance(part, torch.Tensor) for part in result.state_dict.values())
    with pytest.raises(AttributeError, match="see state_dict"):
        result.theta  # noqa: B018


def test_the_package_itself_imports_nothing_slow() -> None:
    code = "import sys, fl_attack; dir(fl_attack); assert not {'torch', 'ray', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_exported_is_there_and_documented() -> None:
    for name in fl_attack.__all__:
        part = getattr(fl_attack, name)
        assert name.isupper() or name == "__version__" or part.__doc__
    assert not hasattr(fl_attack, "nothing") and (Path(fl_attack.__file__).parent / "py.typed").exists()


def test_flower_runs_where_an_event_loop_does(shared_ray: None, small: Result) -> None:
    """As in a notebook, whose cells run in a loop; and in a thread."""

    async def cell() -> Result:
        return run(*SMALL, "engine=flower", "engine.actors=1", baseline=False)

    of_loop = asyncio.run(cell())
    assert of_loop.theta == pytest.approx(small.theta, rel=1e-4, abs=1e-5)
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(run(*SMALL, "engine=flower", "engine.actors=1")))
    thread.start()
    thread.join()
    assert (found[0].theta == of_loop.theta).all() and found[0].flips.equals(of_loop.flips)


def test_the_figures_of_a_run_follow_from_its_tables(small: Result) -> None:
    settings, clients, rounds = small.settings, small.columns("clients"), small.columns("rounds")
    facts, samples = small.summary, int(small.columns("clients")["samples"].sum())
    bad = clients["malicious"] == 1
    assert facts["clients"] == len(bad) == settings.clients.total
    assert facts["malicious_clients"] == bad.sum() == len(small.partition["malicious"])
    assert facts["training_samples"] == samples == (small.partition["client"] >= 0).sum()
    assert facts["write_access"] == pytest.approx(clients["samples"][bad].sum() / samples)
    assert (facts["budget"], facts["attack"], facts["seed"]) == (0.5, settings.attack.name, settings.seed)
    assert facts["global_budget"] == pytest.approx(0.5 * facts["write_access"])
    assert facts["flips"] == len(small.flips) and facts["flips_per_round"] == len(small.flips) / 4
    # 64 samples a round are used, of which some clients' share is rounded
    assert facts["effective_budget"] == pytest.approx(len(small.flips) / (4 * 64), rel=0.1)
    assert facts["final_accuracy"] == rounds["test_accuracy"][-1]
    assert facts["minimum_accuracy"] == rounds["test_accuracy"][1:].min()
    assert (facts["final_f1"], facts["minimum_f1"]) == (rounds["test_f1"][-1], rounds["test_f1"][1:].min())
    assert facts["final_loss"] == rounds["test_loss"][-1]
    assert facts["rounds"] == facts["stopped_round"] == facts["best_round"] == 4
    assert facts["validation_samples"] == 0 and facts["test_samples"] > 50 and facts["seconds"] > 0
    assert {"torch", "numpy"} <= {*facts["versions"]}
    honest = small.baseline
    assert honest is not None and honest.summary["flips"] == honest.summary["effective_budget"] == 0
    for client in range(len(bad)):
        held = small.partition["client"] == client
        assert clients["client"][client] == client and clients["samples"][client] == held.sum()
        assert clients["malicious"][client] == (client in small.partition["malicious"])


def result_of(folder: Path, **files: str) -> Result:
    """What is read of a folder that holds these files, named with _ in place of dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return Result.of_folder(folder)


def test_columns_are_whole_numbers_numbers_or_text() -> None:
    columns = [("1", "-2"), ("1", "2.5"), ("1", ""), ("", ""), ("1", "x"), ("", "x"), ("nan", "inf")]
    kinds = [column_of(texts).dtype for texts in columns]
    assert kinds == [np.int64, np.float64, np.float64, np.float64, object, object, np.float64]
    assert column_of(("1", "")).tolist()[0] == 1 and np.isnan(column_of(("1", ""))[1])
    assert column_of(("", "x")).tolist() == ["", "x"] and column_of(()).dtype == np.int64


def test_a_result_says_what_it_is_and_what_it_lacks(tmp_path: Path) -> None:
    run_ = result_of(tmp_path / "run", rounds_csv="round,test_accuracy\n")
    assert repr(run_) == f"<Result of an unfinished run, in {tmp_path / 'run'}>" and run_.baseline is None
    assert {name: len(column) for name, column in run_.columns("rounds").items()} == {"round": 0, "test_accuracy": 0}
    for ask, said in (
        (lambda: run_.summary, r"run has no summary\.json: the run is not finished$"),
        (lambda: run_.clients, r"run has no clients\.csv$"),
        (lambda: run_.table, r"a run has no sweep\.csv: that is of a sweep"),
        (lambda: run_.save(tmp_path / "other"), "the result is in .*run already"),
    ):
        with pytest.raises(InputError, match=said):
            ask()
    facts = '{"stopped_round": 50, "final_accuracy": 0.91239, "flips": 12345}'
    done = result_of(tmp_path / "run", summary_json=facts)
    assert repr(done) == f"<Result of a run of 50 rounds: final accuracy 0.9124, 12,345 flips, in {tmp_path / 'run'}>"
    sweep_ = result_of(tmp_path / "sweep", sweep_csv="cell,error\n0,\n1,nan\n2,diverged\n")
    assert sweep_.summary == {"cells": 3, "broken_off": 1} and sweep_.baseline is None
    assert repr(sweep_) == f"<Result of a sweep of 3 cells, in {tmp_path / 'sweep'}>"
    with pytest.raises(InputError, match=r"a sweep has no rounds\.csv: that is of a run"):
        sweep_.columns("rounds")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), r"holds no result: neither rounds\.csv nor sweep\.csv"),
        (("units/a.npz",), "holds an unfinished sweep, which has no table yet; the same command goes on"),
        (("baseline/rounds.csv",), r"holds an unfinished run, which has no rounds\.csv yet"),
    ],
)
def test_a_folder_without_a_table_is_no_result_yet(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=said):
        load(tmp_path)


def test_a_result_in_memory_is_saved_with_its_twin_where_nothing_is_lost(tmp_path: Path) -> None:
    result_of(tmp_path / "run" / "baseline", rounds_csv="round\n0\n")
    result_of(tmp_path / "run", rounds_csv="round\n0\n1\n")
    kept = Result.of_files(tmp_path / "run")
    assert kept.folder is None and "unfinished run, in memory" in repr(kept)
    assert kept.baseline is not None and kept.baseline.columns("rounds")["round"].tolist() == [0]
    with pytest.raises(InputError, match=r"^the result has no summary\.json: the run is not finished"):
        kept.summary  # noqa: B018
    assert (kept.save(tmp_path / "again") / "baseline" / "rounds.csv").exists()
    with pytest.raises(InputError, match="again holds a run; use another folder"):
        kept.save(tmp_path / "again")
    twin = kept.baseline.save(tmp_path / "twin")
    assert (twin / "rounds.csv").read_text() == "round\n0\n" and not (twin / "baseline").exists()


def test_a_notebook_shows_a_figure_as_an_image(tmp_path: Path) -> None:
    result = result_of(tmp_path, rounds_csv="round,test_accuracy\n0,0.1\n4,0.5\n")
    figure = result.plot()
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0.1], [4, 0.5]]
    assert figure._repr_png_().startswith(b"\x89PNG") and [file.name for file in tmp_path.iterdir()] == ["rounds.csv"]
    header = ",".join(["cell", *RESULTS])
    alone = result_of(tmp_path / "sweep", sweep_csv=header + "\n" + ",".join(["0"] * len(RESULTS) + [""]) + "\n")
    with pytest.raises(InputError, match="the sweep allows no figure: nothing but the seed was varied"):
        alone.plot()
