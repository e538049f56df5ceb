"""Where the wall time of a sweep goes: one worker against several, turn about, in one run.

    .venv/bin/python scripts/bench_sweep.py [--workers 2] [--repeats 5] [--data FOLDER] [overrides of the sweep]

Each time the program is started anew, as a user does. Its wall time is parted into imports, composing (from the command
line to checked cells), data (loading, dealing, keys), computing, writing (kept units, tables), figures, and the rest
(the interpreter, Hydra). Of computing it is also told how much of the workers' time was idle: until they have started,
and when no unit is left. The medians are of the repeats; what is gained is the ratio of the medians of computing.
With --data the sweep is on the MNIST in that folder, else on generated pixels of its shape.
"""

import argparse
import builtins
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BUDGETS = ",".join(f"{i / 10}" for i in range(1, 11))
GRID = ["clients.total=10", "clients.malicious=range(1,11)", f"attack.budget={BUDGETS}", "seed=range(5)"]
FIXED = ["engine=batched", "batch_size=128", "attack.goal=targeted", "rounds=1980", "eval_every=99"]
PARTS = ("imports", "composing", "data", "computing", "writing", "figures", "rest", "all")


class Clocks:
    """Seconds by part; what an inner part takes is not counted in the outer one."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.spent = dict.fromkeys(PARTS, 0.0) | {"busy": 0.0, "computing in all": 0.0}
        self.inner: list[float] = []
        self.workers = 1
        self.is_watched = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds counted."""

        def measured(*given: Any, **keys: Any) -> Any:
            start = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*given, **keys)
            finally:
                took, inner = time.perf_counter() - start, self.inner.pop()
                self.spent[part] += took - inner
                if part == "computing":
                    self.spent["computing in all"] += took
                if self.inner:
                    self.inner[-1] += took

        return measured

    def watch_imports(self) -> None:
        """Count what is imported from now on, and watch the parts of a sweep once they are there."""
        original, depth = builtins.__import__, 0

        def watched(*given: Any, **keys: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return (self.timed("imports", original) if depth == 1 else original)(*given, **keys)
            finally:
                depth -= 1
                if depth == 0 and "fl_attack.multirun" in sys.modules and not self.is_watched:
                    self.is_watched = True
                    self.watch()

        builtins.__import__ = watched

    def watch(self) -> None:
        """Count the parts of a sweep."""
        from fl_attack import engine, multirun, workers
        from fl_attack.multirun import execute

        for part, place, name in (
            ("data", engine, "make_scenarios"),
            ("data", multirun, "units"),
            ("data", multirun, "distinct"),
            ("computing", multirun, "compute"),
            ("writing", multirun, "write_whole"),
            ("writing", multirun, "write_tables"),
            ("figures", multirun, "_draw_all"),
        ):
            setattr(place, name, self.timed(part, getattr(place, name)))
        alone, spread = execute.batched_numbers, workers.side_by_side

        def here(*given: Any) -> Any:
            """A unit in this process."""
            start = time.perf_counter()
            try:
                return alone(*given)
            finally:
                self.spent["busy"] += time.perf_counter() - start

        def elsewhere(function: Any, jobs: Any, number: int, *more: Any) -> Iterator[Any]:
            """Units in workers, which tell their seconds beside the result."""
            if function is not execute.numbers_of_job:
                yield from spread(function, jobs, number, *more)
                return
            import bench_sweep  # this file, under a name by which workers find it

            self.workers = number
            for i, (seconds, found) in spread(bench_sweep.clocked, jobs, number, *more):
                self.spent["busy"] += seconds
                yield i, found

        execute.batched_numbers, workers.side_by_side = here, elsewhere


def clocked(job: Any, step: Callable[[int], None]) -> Any:
    """The seconds of a unit in a worker, and its numbers."""
    from fl_attack.multirun import execute

    start = time.perf_counter()
    found = execute.numbers_of_job(job, step)
    return time.perf_counter() - start, found


def once(arguments: list[str]) -> None:
    """Run the program on arguments in this process, and print what its parts took."""
    clocks = Clocks()
    clocks.watch_imports()
    from fl_attack import __main__, launcher

    launcher.SweepLauncher.cells = clocks.timed("composing", launcher.SweepLauncher.cells)  # type: ignore[method-assign]
    sys.argv = ["fl-attack", *arguments]
    __main__.main()
    spent = clocks.spent
    spent["all"] = time.perf_counter() - clocks.began
    spent["rest"] = spent["all"] - sum(spent[part] for part in PARTS if part != "all")
    print(json.dumps(spent | {"workers": clocks.workers}))


def run(workers: int, arguments: list[str], cache: str) -> dict[str, float]:
    """The seconds that each part of a run of the program took, in a process of its own."""
    here = Path(__file__).resolve()
    paths = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(here), "--once", "-m", *arguments, f"workers={workers}", f"out={folder}/out"]
        environment = os.environ | {"PYTHONPATH": paths, "FL_ATTACK_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def generated(file: Path) -> list[str]:
    """Overrides of a data set of the shape of MNIST 0/1, written to a file."""
    import numpy as np

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 14780)
    x = rng.integers(0, 200, (len(y), 784), np.uint8) + (y[:, None] * (np.arange(784) < 100) * 20).astype(np.uint8)
    np.savez(file, x_train=x[:12665], y_train=y[:12665], x_test=x[12665:], y_test=y[12665:])
    return ["dataset=npz", f"dataset.path={file}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", help="a folder with MNIST")
    given, overrides = parser.parse_known_args()
    chosen = {one.partition("=")[0] for one in overrides}
    fixed = [one for one in (*FIXED, *GRID) if one.partition("=")[0] not in chosen]
    counts = (1, given.workers)
    with tempfile.TemporaryDirectory() as folder:
        mnist = ["dataset=mnist_01", f"dataset.root={given.data}"]
        arguments = [*(mnist if given.data else generated(Path(folder, "data.npz"))), *fixed, *overrides]
        run(given.workers, [*arguments, "rounds=1", "eval_every=1"], folder)  # the cache of data and targets
        run(given.workers, arguments, folder)
        runs = [{count: run(count, arguments, folder) for count in counts} for _ in range(given.repeats)]
    print(f"{'workers':>7} " + " ".join(f"{part:>10}" for part in PARTS) + f" {'idle':>10}")
    for count in counts:
        found = [one[count] for one in runs]
        whole = statistics.median(one["all"] for one in found)
        medians = [statistics.median(one[part] for one in found) for part in PARTS]
        idle = statistics.median(1 - one["busy"] / one["workers"] / one["computing in all"] for one in found)
        print(f"{count:7} " + " ".join(f"{seconds:8.2f} s" for seconds in medians))
        print(f"{'':7} " + " ".join(f"{seconds / whole:10.0%}" for seconds in medians) + f" {idle:10.0%}")
    computing = [statistics.median(one[count]["computing in all"] for one in runs) for count in counts]
    print(f"computing: {computing[0] / computing[1]:.2f} times as fast with {counts[1]} workers")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(sys.argv[2:])
    else:
        main()
