"""Other launchers and sweepers of Hydra's: a SLURM array, processes of joblib, trials of Optuna."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fl_attack import launcher, multirun
from fl_attack.errors import InputError, RunError
from fl_attack.launcher import grid

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
