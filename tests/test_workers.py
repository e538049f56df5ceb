"""Work on all processors: the same bytes whatever their number, and no hang whatever ends a worker."""

import builtins
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fl_attack import engine, workers
from fl_attack.config import compose
from fl_attack.errors import InputError, RunError
from fl_attack.launcher import grid
from fl_attack.multirun import execute
from fl_attack.multirun.units import Unit

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


@pytest.mark.parametrize(
    ("quota", "allowed"),
    [("max 100000", 8), ("250000 100000", 3), ("800000 100000", 8), ("1600000 100000", 8), ("1 100000", 1), ("", 8)],
)
def test_a_control_group_may_allow_fewer_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, allowed: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(workers, "Path", lambda name: file if name == "/sys/fs/cgroup/cpu.max" else Path(name))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    assert workers.processors() == allowed
    file.unlink()
    assert workers.processors() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers.processors() == 1


def test_why_a_worker_was_lost_is_said_with_what_helps() -> None:
    memory = "; if memory is short, use a smaller engine.memory_gb, or fewer workers"
    again = "twice at the same unit of work{}; what is done is kept"
    assert workers._why_lost(-9) == f"a worker process was killed by SIGKILL, {again.format(memory)}"
    assert workers._why_lost(-11) == f"a worker process was killed by SIGSEGV, {again.format('')}"
    assert workers._why_lost(3) == f"a worker process ended with code 3, {again.format('')}"
    assert workers._why_lost(0) == f"a worker process ended with code 0, {again.format('')}"
    assert workers._why_lost(None) == f"a worker process ended with code None, {again.format('')}"


def test_steps_are_reported_now_and_then_and_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [10.0], list[int]()
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step = workers.reported(told.append, 0.5)
    for at in (10.0, 10.5, 10.6, 11.0, 11.1, 11.2):
        now[0] = at
        step(2)
    assert told == [6, 12]  # after 0.6 seconds, and 0.6 later


def test_an_error_of_a_worker_keeps_its_kind_and_its_traceback() -> None:
    try:
        raise ZeroDivisionError("so")
    except ZeroDivisionError as error:
        found = workers._portable(error)
        assert type(found) is ZeroDivisionError and "Traceback" in found.__notes__[0]


def test_workers_neither_see_ctrl_c_nor_import_the_program() -> None:
    main, before = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with workers._ctrl_c_blocked(), workers._without_main():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGINT}
        assert sys.modules["__main__"] is not main and sys.modules["__main__"].__name__ == "__main__"
    assert sys.modules["__main__"] is main and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


class Crew:
    """Stand-ins for worker processes: each does its job at once, but the first does not survive `dies` of its jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: int = 0) -> None:
        self.begun: list[int] = []
        self.ends: list[str] = []
        self.dies, self.count = dies, 0
        crew = self

        class Worker:
            def __init__(self, function: object) -> None:
                self.pipe, self.there = multiprocessing.Pipe()
                self.job, crew.count = -1, crew.count + 1

            def begin(self, i: int, jobs: list[int]) -> None:
                self.job = i
                crew.begun.append(i)
                if i == 0 and crew.begun.count(0) <= crew.dies:
                    self.there.close()
                    return
                self.there.send(("steps", 1))
                self.there.send(("result", jobs[i] * 10))

            def dismiss(self) -> None:
                crew.ends.append("dismissed")
                self.pipe.close()

            def kill(self) -> None:
                crew.ends.append("killed")

            def end(self) -> int:
                crew.ends.append("ended")
                self.pipe.close()
                return -9

        monkeypatch.setattr(workers, "_Worker", Worker)
        monkeypatch.setattr(workers, "warm_up", lambda: None)


def test_jobs_are_begun_in_their_order_by_no_more_workers_than_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, steps = Crew(monkeypatch), list[tuple[int, int]]()
    found = dict(workers.side_by_side(JOB, [1, 2, 3, 4, 5], 2, lambda i, done: steps.append((i, done))))
    assert found == {i: 10 * (i + 1) for i in range(5)} and crew.begun == [0, 1, 2, 3, 4] and crew.count == 2
    assert sorted(steps) == [(i, 1) for i in range(5)] and crew.ends == ["dismissed"] * 2
    assert dict(workers.side_by_side(JOB, [1], 7)) == {0: 10} and crew.count == 3
    assert dict(workers.side_by_side(JOB, [], 2)) == {}


def test_a_lost_job_is_the_next_one_and_its_steps_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, steps = Crew(monkeypatch, dies=1), list[tuple[int, int]]()
    found = dict(workers.side_by_side(JOB, [1, 2, 3], 1, lambda i, done: steps.append((i, done))))
    assert found == {0: 10, 1: 20, 2: 30} and crew.begun == [0, 0, 1, 2] and crew.count == 2
    assert steps == [(0, 0), (0, 1), (1, 1), (2, 1)] and crew.ends == ["ended", "dismissed"]
    crew = Crew(monkeypatch, dies=2)
    with pytest.raises(RunError, match="killed by SIGKILL, twice"):
        list(workers.side_by_side(JOB, [1, 2, 3], 1))
    assert crew.begun == [0, 0]
    crew = Crew(monkeypatch)
    jobs = workers.side_by_side(JOB, [1, 2, 3], 2)
    next(jobs)
    jobs.close()  # type: ignore[attr-defined]
    assert crew.ends == ["killed"] * 2 + ["ended"] * 2


@pytest.mark.parametrize(
    ("given", "seconds", "memory", "wanted"),
    [
        ({"workers": 3}, 0.0, [1, 1, 1, 1], 3),
        ({"workers": 8}, 0.0, [1, 1, 1, 1], 4),  # no more than jobs
        ({}, 0.9, [1, 1, 1, 1], 1),  # together less than four seconds
        ({}, 1.0, [1, 1, 1, 1], 4),
        ({"workers": 4}, 0.0, [1, 1, 2, 3], 2),  # 3 + 2 of 5.5 GiB, whichever of them these are
        ({"workers": 4}, 0.0, [9, 9, 9, 9], 1),
        ({"workers": 4, "engine.device": "cuda"}, 9.0, [1, 1, 1, 1], 1),
    ],
)
def test_so_many_workers_are_begun_as_are_worth_it_and_fit(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], seconds: float, memory: list[int], wanted: int
) -> None:
    settings = compose(
        "engine=batched", "engine.memory_gb=5.5", "out=x", *(f"{key}={one}" for key, one in given.items())
    )
    monkeypatch.setattr(execute, "_seconds_of", lambda cells: seconds)
    monkeypatch.setattr(execute.engine, "memory_of", lambda cells: cells[0] * 2**30)
    monkeypatch.setattr(workers, "processors", lambda: 6)
    assert execute.worker_count([[one] for one in memory], settings) == wanted  # type: ignore[list-item]


def test_a_sweep_goes_where_it_is_sent_and_else_to_the_cluster_that_its_engine_names() -> None:
    flower = ("engine=flower", "out=x")
    assert execute.launcher_of(compose("engine=batched", "out=x")) == execute.launcher_of(compose(*flower)) == "local"
    assert execute.launcher_of(compose(*flower, "engine.ray_address=auto")) == "ray"
    assert execute.launcher_of(compose(*flower, "engine.ray_address=auto", "launcher=local")) == "local"
    assert {*execute.LAUNCHERS} == {"local", "ray"}


def cell_of(rounds: int) -> Any:
    settings = SimpleNamespace(rounds=rounds, launcher="local", engine=SimpleNamespace(name="batched"))
    return SimpleNamespace(settings=settings)


def test_the_longest_units_are_begun_first_and_all_of_their_rounds_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell_of(10), cell_of(10), cell_of(4), cell_of(4), cell_of(4)]
    todo = [Unit([0], "a"), Unit([2, 3, 4], "b"), Unit([1], "c")]
    seconds = {"a": 1.0, "b": 3.0, "c": 2.0}
    begun: list[int] = []

    def launch(jobs: list[execute.UnitJob], settings: Any, on_steps: Callable[[int, int], None]) -> Any:
        begun.extend(len(job.cells) for job in jobs)
        assert jobs[1].cells == [cells[1]] and settings is cells[2].settings
        on_steps(0, 5)
        on_steps(0, 3)  # begun anew
        yield 2, "of a"
        yield 0, "of b"
        yield 1, "of c"

    counted: list[tuple[int, float]] = []
    kept: list[tuple[str, Any]] = []
    monkeypatch.setattr(execute, "LAUNCHERS", {"local": launch})
    monkeypatch.setattr(execute, "_seconds", lambda unit, scenarios: seconds[unit.key])
    bar = SimpleNamespace(rounds=lambda of, done: counted.append((of, done)))
    execute.compute(todo, cells, bar, lambda unit, numbers: kept.append((unit.key, numbers)))  # type: ignore[arg-type]
    assert begun == [3, 1, 1] and kept == [("a", "of a"), ("b", "of b"), ("c", "of c")]
    assert counted == [(4, 5), (4, -2), (10, 10), (4, 9), (10, 10)]


@pytest.mark.parametrize(("linear", "asked", "threads"), [(True, None, 2), (True, 1, 1), (False, None, 1)])
def test_jobs_in_this_process_tell_their_steps_and_give_threads_back(
    monkeypatch: pytest.MonkeyPatch, linear: bool, asked: int | None, threads: int
) -> None:
    told: list[tuple[int, int]] = []
    used: list[int] = []

    def numbers(cells: list[Any], step: Callable[[int], None]) -> str:
        used.append(torch.get_num_threads())
        step(2)
        step(3)
        return f"of {len(cells)}"

    monkeypatch.setattr(execute, "batched_numbers", numbers)
    monkeypatch.setattr(execute, "worker_count", lambda jobs, settings: 1)
    monkeypatch.setattr(execute.engine, "is_linear", lambda cell: linear)
    monkeypatch.setattr(workers, "processors", lambda: 8)
    jobs = [execute.UnitJob([cell_of(9)]), execute.UnitJob([cell_of(9)] * 2)]
    with execute._threads(2):
        settings: Any = SimpleNamespace(workers=asked)
        found = list(execute._local(jobs, settings, lambda i, done: told.append((i, done))))
        assert torch.get_num_threads() == 2
    assert found == [(0, "of 1"), (1, "of 2")] and told == [(0, 2), (0, 5), (1, 2), (1, 5)] and used == [threads] * 2


def test_jobs_for_workers_share_the_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(execute, "worker_count", lambda jobs, settings: 3)
    monkeypatch.setattr(execute.engine, "is_linear", lambda cell: True)
    monkeypatch.setattr(workers, "processors", lambda: 8)
    monkeypatch.setattr(workers, "side_by_side", lambda *given: sent.append(given) or iter([(0, "numbers")]))
    job = SimpleNamespace(packed=lambda threads: (threads, []), cells=[])
    for asked, threads in ((None, 2), (3, 1), (2, 1)):
        settings: Any = SimpleNamespace(workers=asked)
        assert list(execute._local([job], settings, print)) == [(0, "numbers")]  # type: ignore[list-item, arg-type]
        assert sent.pop()[1:] == ([(threads, [])], 3, print)
