"""Jobs side by side on the processors of this machine, each in a process of its own.

Processes, since most of a round is many small steps of Python, of which threads would do one at a time. They come from
a fork server, which imports the libraries once for all of them. Each has a pipe of its own and no lock is shared, so
that one which is killed can't keep the others waiting: its job alone is begun anew.
"""

import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from fl_attack.errors import RunError

Given = TypeVar("Given")
Found = TypeVar("Found")
Step = Callable[[int], None]
REPORT_EVERY = 0.5  # seconds between two reports of a worker
LOST = 2  # workers that may be killed at a job before it is given up
WAITS = 5.0  # seconds for a worker that has nothing left to do to end
IMPORTED = ["fl_attack.multirun.execute", "fl_attack.plots", "matplotlib.figure", "matplotlib.backends.backend_agg"]


def processors() -> int:
    """How many processors this process may use: the least that its affinity and its control group allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # without control groups, or without a limit in them
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def warm_up() -> None:
    """Start the process that workers are forked from, which imports in the background what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    with _ctrl_c_blocked():
        forkserver.ensure_running()


def side_by_side(
    function: Callable[[Any, Step], Found],
    jobs: Sequence[Any],
    workers: int,
    on_progress: Callable[[int, int], None] = lambda i, steps: None,
) -> Iterator[tuple[int, Found]]:
    """`function` of each job, in worker processes: its position and result, in the order in which they are done.

    Parameters
    ----------
    function : callable
        Gets a job and a function that it may call with the number of its further steps; it can be pickled.
    jobs : sequence
        What can be pickled; they are begun in this order.
    workers : int
        The number of processes.
    on_progress : callable
        Gets the position of a job and how many steps it has made, now and then; fewer than before where the job is
        begun anew.

    Yields
    ------
    position : int
        Of the job in `jobs`.
    result : object
        What the function returned.

    Raises
    ------
    RunError
        Where a job was lost with its worker for the second time.
    Exception
        What the function raised, the first of it. Whatever ends the loop ends all workers at once.
    """
    left, lost = deque(range(len(jobs))), Counter[int]()
    crew: dict[connection.Connection, _Worker] = {}
    warm_up()
    try:
        while left or crew:
            while left and len(crew) < workers:
                worker = _Worker(function)
                crew[worker.pipe] = worker
                worker.begin(left[0], jobs)
                left.popleft()
            for pipe in connection.wait(list(crew)):
                assert isinstance(pipe, connection.Connection)
                worker = crew[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, OSError):
                    crew.pop(pipe)
                    code = worker.end()
                    lost[worker.job] += 1
                    if lost[worker.job] == LOST:
                        raise RunError(_why_lost(code)) from None
                    on_progress(worker.job, 0)
                    left.appendleft(worker.job)
                    continue
                if kind == "steps":
                    on_progress(worker.job, content)
                elif kind == "error":
                    raise content
                else:
                    done = worker.job
                    if left:
                        worker.begin(left[0], jobs)
                        left.popleft()
                    else:
                        crew.pop(pipe)
                        worker.dismiss()
                    yield done, content
    finally:
        for worker in crew.values():
            worker.kill()
        for worker in crew.values():
            worker.end()


def mapped(function: Callable[[Given], Found], given: Iterable[Given], workers: int) -> Iterator[Found]:
    """As `map`, with the function called in worker processes.

    Parameters
    ----------
    function : callable
        The function, which is pickled, and so are its results.
    given : iterable
        What the function is called with, one after the other.
    workers : int
        The largest number of processes.

    Returns
    -------
    iterator
        The results in the order of `given`, when all are there.
    """
    parts = list(given)
    results = dict(side_by_side(_without_steps, [(function, part) for part in parts], min(workers, len(parts))))
    return (results[i] for i in range(len(parts)))


def reported(report: Callable[[int], None], every: float) -> Step:
    """A function that a job tells its steps to, which reports how many they are so far, now and then.

    Parameters
    ----------
    report : callable
        Called with the number of steps so far.
    every : float
        Seconds between two reports.

    Returns
    -------
    callable
        Takes the number of further steps.
    """
    done, last = 0, time.monotonic()

    def step(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > every:
            last = time.monotonic()
            report(done)

    return step


def _without_steps(job: tuple[Callable[[Given], Found], Given], step: Step) -> Found:
    """The result of a function of one argument, both of which are the job."""
    function, given = job
    return function(given)


class _Worker:
    """A process that does one job after the other, as seen by who hands them out; `job` is the position of the last."""

    def __init__(self, function: Callable[[Any, Step], Any]) -> None:
        self.pipe, there = multiprocessing.Pipe()
        self.job = -1
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.process = context.Process(target=_process, args=(there, function), daemon=True)
        with _ctrl_c_blocked(), _without_main():
            self.process.start()
        there.close()

    def begin(self, i: int, jobs: Sequence[Any]) -> None:
        """Hand over a job; a worker that was killed meanwhile is seen when its answer is waited for.

        Parameters
        ----------
        i : int
            The number of the job.
        jobs : sequence
            All jobs; this one is pickled.
        """
        self.job = i
        with suppress(OSError):
            self.pipe.send(jobs[i])

    def dismiss(self) -> None:
        """Let the process end by itself."""
        self.pipe.close()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()

    def end(self) -> int | None:
        """Wait, at most `WAITS` seconds, for the end of the process.

        Gives its exit code, or the negative number of the signal that killed it; None where it still runs.
        """
        self.process.join(WAITS)
        self.pipe.close()
        code: int | None = self.process.exitcode
        return code


def _why_lost(code: int | None) -> str:
    """The message on a worker that ended with this exit code, as `_Worker.end` gives it."""
    number = -(code or 0)
    how = f"was killed by {signal.Signals(number).name}" if number in set(signal.Signals) else f"ended with code {code}"
    short = "; if memory is short, use a smaller engine.memory_gb, or fewer workers" if number == 9 else ""
    return f"a worker process {how}, twice at the same unit of work{short}; what is done is kept"


def _process(pipe: connection.Connection, function: Callable[[Any, Step], Any]) -> None:
    """Work in a process of its own, which leaves Ctrl-C to the program: that ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work(pipe, function)


def _work(pipe: connection.Connection, function: Callable[[Any, Step], Any]) -> None:
    """What a worker does until nobody is at the other end of its pipe."""
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            job = pipe.recv()
            step = reported(lambda done: _tell(pipe, ("steps", done)), REPORT_EVERY)
            try:
                answer = "result", function(job, step)
            except SystemExit as error:  # of somebody's library or file
                answer = "error", RunError(f"something called sys.exit({error.code}) before the sweep was finished")
            except Exception as error:
                answer = "error", _portable(error)
            _tell(pipe, answer)


def _tell(pipe: connection.Connection, what: tuple[str, Any]) -> None:
    """Send something; where nobody is there any more, this process ends."""
    try:
        pipe.send(what)
    except OSError:
        os._exit(1)  # from within somebody's function, which may catch whatever is raised


def _portable(error: Exception) -> Exception:
    """The exception with its traceback as a note or, where it can't be pickled, a RuntimeError with its text."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """A block in which processes are started that never see Ctrl-C, which a terminal sends to all of a program's."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers started in the block don't import the program's main module, which may be a script that starts sweeps."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
