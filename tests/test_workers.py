"""Work on all processors: the same bytes whatever their number, and no hang whatever ends a worker."""

import builtins
import math
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

from fl_attack import engine, workers
from fl_attack.errors import InputError, RunError
from fl_attack.launcher import grid
from fl_attack.multirun import execute

Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]
JOB = workers._without_steps  # what a worker can import; it takes any function and its argument


def sweep(small_data: Small, out: Path, *more: str) -> list[str]:
    """Six units of four cells."""
    fixed = ["engine=batched", "rounds=12", "eval_every=5", "batch_size=30", "clients.total=6", f"out={out}"]
    return ["-m", *small_data(3), *fixed, "clients.malicious=1,2", "attack.goal=untargeted,targeted", *more]


def test_results_come_with_their_jobs_however_long_these_take() -> None:
    jobs = [(time.sleep, 0.3), (math.sqrt, 9), (math.sqrt, 16)]
    found = dict(workers.side_by_side(JOB, jobs, 2))
    assert found == {0: None, 1: 3, 2: 4}
    assert list(workers.mapped(math.sqrt, [1, 4, 9], 2)) == [1, 2, 3]


def test_a_killed_worker_is_replaced_and_its_job_alone_done_again(tmp_path: Path) -> None:
    code = (
        f"import os, pathlib; mine = pathlib.Path({str(tmp_path)!r}, '{{}}'); first = not mine.exists()\n"
        "mine.open('a').write('x')\nif first and '{}' == '1': os.kill(os.getpid(), 9)"
    )
    done = [i for i, _ in workers.side_by_side(JOB, [(builtins.exec, code.format(i, i)) for i in range(4)], 2)]
    assert sorted(done) == [0, 1, 2, 3]
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "x", "1": "xx", "2": "x", "3": "x"}


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ((signal.raise_signal, signal.SIGKILL), RunError, "killed by SIGKILL, twice at the same unit.*memory_gb"),
        ((os._exit, 3), RunError, "ended with code 3, twice"),
        ((sys.exit, 3), RunError, r"something called sys.exit\(3\)"),
        ((math.sqrt, -1), ValueError, "math domain error|nonnegative"),
        ((builtins.exec, "from fl_attack.errors import *; raise InputError('so')"), InputError, "^so$"),
        ((builtins.exec, "class Odd(Exception): pass\nraise Odd('so')"), RuntimeError, "^Odd: so$"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised_and_ends_the_others(
    job: tuple[object, object], error: type[Exception], message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error) as raised:
        list(workers.side_by_side(JOB, [(time.sleep, 60), job], 2))
    assert re.search(message, str(raised.value))
    assert time.monotonic() - began < 50


def test_a_job_that_kills_its_workers_is_given_up_the_second_time(tmp_path: Path) -> None:
    code = f"import os; open({str(tmp_path / 'begun')!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    with pytest.raises(RunError, match="twice"):
        list(workers.side_by_side(JOB, [(builtins.exec, code)], 1))
    assert (tmp_path / "begun").read_text() == "xx"


def test_steps_are_told_while_a_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, object]] = []
    monkeypatch.setattr(workers, "REPORT_EVERY", -1.0)

    class Pipe:
        def __init__(self) -> None:
            self.jobs = ["job"]

        def recv(self) -> str:
            if not self.jobs:
                raise EOFError
            return self.jobs.pop()

        def send(self, what: tuple[str, object]) -> None:
            sent.append(what)

    workers._work(Pipe(), lambda job, step: [step(2), step(3), job][-1])  # type: ignore[arg-type]
    assert sent == [("steps", 2), ("steps", 5), ("result", "job")]


def test_a_sweep_leaves_the_same_bytes_whatever_the_number_of_workers(
    command: Command, small_data: Small, tmp_path: Path
) -> None:
    for count in ("1", "2", "3"):
        code, _, stderr = command(*sweep(small_data, tmp_path / count, "seed=0,1,2", f"workers={count}"))
        assert code == 0 and stderr.endswith("sweep: 100 % of 12 cells\n")
    for name in ("sweep.csv", "curves.npz"):
        assert len({(tmp_path / count / name).read_bytes() for count in ("1", "2", "3")}) == 1


def test_workers_hold_no_more_than_all_may_together(small_data: Small) -> None:
    def count(*more: str) -> int:
        swept = grid(*sweep(small_data, Path("unused"), "seed=range(8)", *more)[1:])
        scenarios = engine.make_scenarios([cell.settings for cell in swept])
        return execute.worker_count(
            [[scenarios[i] for i in group] for group in engine.group(scenarios)], swept[0].settings
        )

    one = 180 * 7 * 4 / 2**30  # the samples of a unit, in the unit of the setting
    assert count("workers=3") == 3
    assert count("workers=20") == 8
    assert count("workers=8", f"engine.memory_gb={3.9 * one}") == 3
    assert count("workers=8", f"engine.memory_gb={0.5 * one}") == 1
    assert count() == 1  # so little is done sooner than workers could start


@pytest.mark.parametrize("given", ["workers=0", "workers=all"])
def test_a_wrong_number_of_workers_is_told(command: Command, small_data: Small, tmp_path: Path, given: str) -> None:
    code, _, stderr = command(*sweep(small_data, tmp_path / "o", given))
    assert (code, stderr.count("\n")) == (2, 1) and given in stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_and_its_workers_at_once_and_another_number_of_them_goes_on(
    command: Command, small_data: Small, tmp_path: Path
) -> None:
    def run_into(out: str, *more: str) -> list[str]:
        lengthy = ["rounds=1500", "seed=range(8)", *more]
        return [one for one in sweep(small_data, tmp_path / out, *lengthy) if one != "rounds=12"]

    process = subprocess.Popen(
        [sys.executable, "-m", "fl_attack", *run_into("ended", "workers=2")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    kept = tmp_path / "ended" / "units"
    deadline = time.monotonic() + 120
    while not list(kept.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("fl-attack: interrupted; what is done is in ")
    assert "Traceback" not in stderr
    before = {file.name: file.stat().st_mtime_ns for file in kept.glob("*.npz")}
    assert 1 <= len(before) < 8
    computed: list[int] = []
    original = execute.batched_numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "batched_numbers", lambda *given: [computed.append(1), original(*given)][1])
        assert command(*run_into("ended", "workers=1"))[0] == 0
    assert len(computed) == 8 - len(before)
    assert command(*run_into("whole", "workers=3"))[0] == 0
    assert (tmp_path / "ended" / "sweep.csv").read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()
    assert np.load(tmp_path / "ended" / "curves.npz")["accuracy"].shape[0] == 32


def test_threads_of_torch_are_given_back() -> None:
    before = torch.get_num_threads()
    with execute._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
