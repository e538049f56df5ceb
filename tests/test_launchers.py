"""Other launchers and sweepers of Hydra's: a SLURM array, processes of joblib, trials of Optuna."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from fl_attack import launcher, multirun
from fl_attack.errors import InputError, RunError
from fl_attack.launcher import grid
from fl_attack.overrides import quoted

Small = Callable[..., list[str]]
GRID = ["engine=batched", "rounds=6", "batch_size=20", "attack.budget=0.1,0.5", "seed=0,1,2"]
# what SLURM does with an array, done here, one task after the other
SBATCH = """#!/bin/bash
cp "$1" "$SUBMITTED"
(for task in 0 1 2; do
    export SLURM_JOB_ID=$((8 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_PROCID=0
    export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here
    sleep 1
    bash "$1"
done; touch "$SUBMITTED.done") >/dev/null 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
    [[ $1 == --output || $1 == --error ]] && shift
    shift
done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
state=RUNNING
[[ -e $SUBMITTED.done ]] && state=COMPLETED
for task in 0 1 2; do echo "7_$task|$state|here"; done
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of `GRID` in this process."""
    out = tmp_path_factory.mktemp("here") / "out"
    multirun.tabulate(grid(*GRID, f"out={out}"))
    return out


def fl_attack(folder: Path, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder."""
    call = [sys.executable, "-m", "fl_attack", "-m", *overrides]
    return subprocess.run(
        call, cwd=folder, env=os.environ | environ, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_units_as_jobs_leave_one_folder_with_the_bytes_of_a_local_sweep(
    launcher: str, here: Path, tmp_path: Path
) -> None:
    keys = {"submitit_local": "hydra.launcher.timeout_min=5", "joblib": "hydra.launcher.n_jobs=2"}
    done = fl_attack(tmp_path, *GRID, "out=there", f"hydra/launcher={launcher}", keys[launcher])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "sweep.csv").read_bytes() == (here / "sweep.csv").read_bytes()
    assert os.listdir(tmp_path) == ["there"] and not (tmp_path / "there" / "units").exists()


@pytest.mark.slow
def test_a_slurm_array_has_a_task_for_each_unit_and_the_keys_of_the_launcher(here: Path, tmp_path: Path) -> None:
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    keys = {
        "partition": "gpu",
        "gpus_per_node": "2",
        "timeout_min": "90",
        "cpus_per_task": "1",
        "array_parallelism": "2",
    }
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    given = [f"hydra.launcher.{key}={value}" for key, value in keys.items()]
    (tmp_path / "work").mkdir()
    done = fl_attack(
        tmp_path / "work",
        *GRID,
        "out=there",
        "hydra/launcher=submitit_slurm",
        *given,
        PATH=path,
        SUBMITTED=f"{tmp_path}/submitted",
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "submitted").read_text()
    for line in ("array=0-2%2", "partition=gpu", "gpus-per-node=2", "time=90", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in asked
    assert (tmp_path / "work" / "there" / "sweep.csv").read_bytes() == (here / "sweep.csv").read_bytes()


def test_jobs_that_left_nothing_are_told_and_done_by_the_next_call(here: Path, tmp_path: Path) -> None:
    cells, asked = grid(*GRID, f"out={tmp_path}/out"), []

    def lose(files: Sequence[Path]) -> None:
        asked.append(len(files))
        multirun.compute_file(files[0], 1)
        raise OSError("node lost")

    def compute(files: Sequence[Path]) -> None:
        asked.append(len(files))
        for file in files:
            multirun.compute_file(file, 1)

    with pytest.raises(RunError, match="2 of 3 jobs left no result, the first because node lost; the same command"):
        multirun.tabulate(cells, launch=lose)
    assert not (tmp_path / "out" / "sweep.csv").exists()
    multirun.tabulate(cells, launch=compute)
    assert asked == [3, 2]
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == (here / "sweep.csv").read_bytes()


def test_gpus_are_those_of_the_jobs(tmp_path: Path) -> None:
    cells = grid(*GRID, "engine.device=cuda:99", f"out={tmp_path}/out")
    with pytest.raises(InputError, match="cuda:99 is not there"):
        multirun.tabulate(cells)
    with pytest.raises(RunError, match="3 of 3 jobs left no result"):
        multirun.tabulate(cells, launch=lambda files: None)


def test_each_job_gives_its_objective_to_whoever_chose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"launcher": f"hydra_plugins.{launcher.NAME}.{launcher.SweepLauncher.__name__}", "sweeper": "some.Other"}
    ours = launcher.SweepLauncher()
    ours.config = OmegaConf.create({"hydra": {name: {"_target_": target} for name, target in targets.items()}})
    cells = grid(*GRID[:3], "attack.budget=0.9,0.1", "objective=final_loss", f"out={tmp_path}/best")
    monkeypatch.setattr(ours, "cells", lambda jobs: cells)
    jobs = [["attack.budget=0.9"], ["attack.budget=0.1"]]
    done = ours.launch(jobs, 3)
    assert [one.overrides for one in done] == jobs
    with (tmp_path / "best" / "trials" / "3" / "sweep.csv").open() as lines:
        losses = {row["attack.budget"]: float(row["final_loss"]) for row in csv.DictReader(lines)}
    assert [one.return_value for one in done] == [losses["0.9"], losses["0.1"]] and losses["0.9"] != losses["0.1"]


@pytest.mark.slow
def test_three_trials_of_optuna_return_the_objective(tmp_path: Path) -> None:
    asked = ["engine=batched", "rounds=6", "batch_size=20", "attack.budget=interval(0,1)", "objective=final_loss"]
    how = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    done = fl_attack(
        tmp_path, *asked, *how, "hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1", "out=best"
    )
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "best" / "optimization_results.yaml").read_text())
    rows = []
    for trial in range(3):
        with (tmp_path / "best" / "trials" / str(trial) / "sweep.csv").open() as lines:
            rows += list(csv.DictReader(lines))
    losses = {float(row["attack.budget"]): float(row["final_loss"]) for row in rows}
    assert len(losses) == 3  # three budgets
    assert found["best_value"] == max(losses.values()) == losses[found["best_params"]["attack.budget"]]
    assert os.listdir(tmp_path) == ["best"]


def test_an_unknown_objective_is_told_before_any_work(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, stderr = command("-m", "objective=speed", "seed=0,1", "engine=batched")
    assert code == 2 and stderr.startswith("fl-attack: objective=speed is not allowed") and "final_accuracy" in stderr


@pytest.mark.parametrize("text", ["plain", "it's", "a\\b", "trailing\\", "a 'b' c", "\\'", "x,y", ""])
def test_a_path_of_any_characters_is_one_value(text: str) -> None:
    assert launcher._value(f"+unit={quoted(text)}") == ("unit", text)


def test_a_value_is_set_where_there_is_a_key_and_nowhere_else() -> None:
    plain = {"attack": {"budget": 0.1, "args": {"z": 1}}, "lr": 0.5}
    launcher._set(plain, "attack.args.z", 2)
    launcher._set(plain, "lr", None)
    assert plain == {"attack": {"budget": 0.1, "args": {"z": 2}}, "lr": None}
    for key in ("attack.buget", "atack.budget", "lr.rate", "attack.budget.more", "rate"):
        with pytest.raises(InputError, match=f"{key} is not a known key"):
            launcher._set(plain, key, 1)
    assert [launcher._key(one) for one in ("lr=1", "+lr=1", "++lr=a=b", "~lr")] == ["lr"] * 4
    trials = launcher._of_trials(grid(*GRID[:1], "out=best")[0].settings, 3)
    assert trials.out == "best/trials/3"


def test_an_other_launcher_gets_a_job_for_each_file_and_its_errors_are_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []
    fails: list[bool] = []

    class Job:
        @property
        def return_value(self) -> None:
            if fails:
                raise OSError("node lost")

    class Other:
        def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[Job]:
            given.append((jobs, initial_job_idx))
            return [Job() for _ in jobs]

    def made(hydra_context: Any, task_function: Any, config: Any) -> Other:
        given.append((hydra_context, task_function, config))
        return Other()

    monkeypatch.setattr(launcher.Plugins.instance(), "instantiate_launcher", made)
    ours = launcher.SweepLauncher()
    target = f"hydra_plugins.{launcher.NAME}.{launcher.SweepLauncher.__name__}"
    ours.hydra_context = "context"  # type: ignore[assignment]
    ours.config = OmegaConf.create({"hydra": {"launcher": {"_target_": target}}})
    assert ours._other() is None
    for threads in (None, 3):
        more = {} if threads is None else {"cpus_per_task": threads}
        ours.config = OmegaConf.create({"hydra": {"launcher": {"_target_": "some.Slurm"} | more}})
        launch = ours._other()
        assert launch is not None
        given.clear()
        files = [tmp_path / "out" / "units" / name for name in ("a.json", "b's.json")]
        launch(files)
        (context, task, config), (jobs, first) = given
        assert (context, config, first) == ("context", ours.config, 0)
        assert task.func is launcher.compute_unit and task.keywords == {"threads": threads or 1}
        assert [dict(launcher._value(one) for one in job) for job in jobs] == [
            {"unit": str(file), "out": str(tmp_path / "out")} for file in files
        ]
        assert [job[0].startswith("+unit=") for job in jobs] == [True, True]
        assert capsys.readouterr().err == "2 jobs to Slurm\n"
    fails.append(True)
    with pytest.raises(OSError, match="node lost"):
        launch(files)


def test_a_job_computes_the_unit_of_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[Path, int]] = []
    monkeypatch.setattr(multirun, "compute_file", lambda file, threads: called.append((file, threads)))
    launcher.compute_unit(OmegaConf.create({"unit": str(tmp_path / "a.json")}), 3)
    assert called == [(tmp_path / "a.json", 3)]


@pytest.mark.parametrize(("cells", "given", "begun"), [(32, (), 1), (31, (), 0), (40, ("workers=1",), 0)])
def test_workers_are_begun_with_before_many_cells(
    monkeypatch: pytest.MonkeyPatch, cells: int, given: tuple[str, ...], begun: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(launcher.workers, "warm_up", lambda: calls.append(1))
    assert len(grid("engine=batched", f"seed=range({cells})", "out=x", *given)) == cells
    assert len(calls) == begun


def test_what_sys_exit_ends_and_cells_that_broke_off_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = launcher.SweepLauncher()
    monkeypatch.setattr(ours, "cells", lambda jobs: grid("engine=batched", "out=x"))
    monkeypatch.setattr(ours, "_hands_over_all_jobs", lambda: True)
    monkeypatch.setattr(ours, "_other", lambda: None)
    monkeypatch.setattr(multirun, "run", lambda cells, launch: Path(cells[0].settings.out))
    monkeypatch.setattr(multirun, "column", lambda out, name: [0.5])
    for lost, said in ((0, "results in x\n"), (1, "results in x; 1 of 3 cells broke off: see the column error\n")):
        monkeypatch.setattr(multirun, "broken_off", lambda out, lost=lost: (3, lost))
        (done,) = ours.launch([["seed=0"]], 0)
        assert done.return_value == 0.5 and list(done.overrides or []) == ["seed=0"]
        assert capsys.readouterr().out == said
    monkeypatch.setattr(multirun, "run", lambda cells, launch: sys.exit(3))
    with pytest.raises(RunError, match=r"something called sys\.exit\(3\) before the sweep was finished"):
        ours.launch([["seed=0"]], 0)


def test_cells_are_named_by_values_as_they_are_meant() -> None:
    cells = grid("dataset=npz", r"dataset.path=a\:b.npz,c.npz", "engine=batched", "out=x")
    assert [cell.overrides["dataset.path"] for cell in cells] == ["a:b.npz", "c.npz"]
    assert [str(cell.settings.dataset.model_dump()["path"]) for cell in cells] == ["a:b.npz", "c.npz"]
