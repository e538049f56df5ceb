"""What each aggregation rule costs: ours over many federations at once, beside ByzFL's and Flower's one at a time.

    .venv/bin/python scripts/bench_rules.py [--clients 10 50 100] [--features 785 7850] [--rounds 5] [--keep]

Random updates in float32, f a fifth of the clients (or the most that the rule allows). Ours: milliseconds of all cells
together over the number of cells, in the pieces in which the engine goes through them, side by side where several.
As there, a piece is still in the processor's cache when the rule gets it. ByzFL and Flower: the same call on a few
cells, one after the other, in the cache too. ByzFL three ways: on a list of torch tensors, which is what the server of
its own training hands over, on as many threads as ours and on one (short calls may not be worth waking another), and on
a numpy array (which its clipping changes, so that it finds nothing to clip the next time).

Each is measured in a process of its own, forked from one that has only imported the libraries. A call that needs a few
megabytes of memory can take half of its time to have these from the system, and whether the allocator has kept some
depends on all that the process did before. --keep tells the allocator to keep all, ours and theirs: the other extreme.

A row is measured in several rounds (--rounds), in each of which all take turns in new processes: times are the medians
over the rounds, a ratio the median of the ratios of each round, whose halves saw the machine within a second. `lowest`
is the least of these.

`least` is what no program can do without: to read every number once (write those that the rule makes of them), or to
multiply every two updates with each other, at the rate at which this machine adds up updates and multiplies matrices on
these threads. `at most` is ByzFL's time on tensors over that: the ratio that nothing here could exceed. Sorting has no
such bound.

Where the usual settings differ, those are measured under which both give the same: centered clipping makes one step
from zero with radius 10; ByzFL's geometric median, which has no tolerance, makes as many steps (`steps`) as bring it to
the true one, found in double precision, as near as ours is, or to 1e-6. What the two make of a cell is compared.
"""

import argparse
import ctypes
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fl_attack import aggregate
from fl_attack.aggregate import PRE, RULES
from fl_attack.engine.linear.client_updates import pieces
from fl_attack.engine.threads import side_by_side

BYZFL = {
    "mean": "Average",
    "median": "Median",
    "trimmed_mean": "TrMean",
    "krum": "Krum",
    "multi_krum": "MultiKrum",
    "geometric_median": "GeometricMedian",
    "centered_clipping": "CenteredClipping",
    "meamed": "Meamed",
    "nnm": "NNM",
    "bucketing": "Bucketing",
    "clipping": "Clipping",
}
TAKES_F = ("trimmed_mean", "krum", "multi_krum", "meamed", "nnm")
OURS: dict[str, dict[str, Any]] = {
    "centered_clipping": {"start": "zero", "iterations": 1, "tau": 10.0},
    "clipping": {"c": 2.0},
}
THEIRS: dict[str, dict[str, Any]] = {
    "bucketing": {"s": 2},
    "centered_clipping": {"L": 1, "tau": 10.0},
    "clipping": {"c": 2.0},
}
OTHERWISE = ("krum", "multi_krum", "bucketing")  # other neighbours, other random choices: near, not the same
TOUCHED = {"bucketing": 1.5, "clipping": 2.0, "nnm": 2.0}  # numbers read or written for each that there is; else 1
MULTIPLIED = {"krum": 0.5, "multi_krum": 0.5, "bulyan": 0.5, "nnm": 1.5}  # products of m x d with d x m
MOST_STEPS = 200
NEAR, PRECISE = 1e-4, 1e-6  # of the length of the answer
ENOUGH = 0.1  # seconds of calls
KEPT = ((-1, 2**30), (-3, 2**30))  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and bytes
# before the processes are forked
IMPORTED = [
    "fl_attack.aggregate",
    "fl_attack.engine.linear.client_updates",
    "byzfl",
    "flwr.serverapp.strategy.multikrum",
]


class Case(NamedTuple):
    """A rule on so many updates of so many features."""

    name: str
    m: int
    d: int
    f: int

    def arrays(self, few: int) -> list[np.ndarray]:
        """A list of cells, each of updates (m, d)."""
        return [_drawn(self.m, 1, self.d, seed)[0, :, 0].contiguous().numpy() for seed in range(few)]


def ours(name: str, f: int, m: int) -> Callable[[Tensor], Tensor]:
    """A rule, (cells, 1, d) of updates (cells, m, 1, d), or a pre-aggregator, (cells, fewer, 1, d)."""
    args = OURS.get(name, {})
    weights, order = torch.ones(m), torch.randperm(m, generator=torch.Generator().manual_seed(0))
    if name in PRE:
        return lambda updates: PRE[name].apply(updates, weights, f, order, **args)[0]
    rule = aggregate.make(name, f=f, m=m, args=args)
    return lambda updates: rule(updates, weights, order)


def byzfl(name: str, f: int, **more: Any) -> Callable[[Any], Any] | None:
    """ByzFL's rule of the same name, of one cell: an array (m, d) or a list of tensors (d,)."""
    if name not in BYZFL or importlib.util.find_spec("byzfl") is None:
        return None
    import byzfl as library

    kind, args = getattr(library, BYZFL[name]), THEIRS.get(name, {}) | ({"f": f} if name in TAKES_F else {}) | more
    return lambda cell: kind(**args)(cell)  # a new one each time: some remember their last answer


def flower(name: str, f: int, m: int) -> Callable[[np.ndarray], object] | None:
    """The function that Flower's strategy of the same name spends its time in, of one cell (m, d)."""
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
    from flwr.serverapp.strategy.multikrum import select_multikrum

    def krum(cell: np.ndarray) -> object:
        return select_multikrum([RecordDict({"a": ArrayRecord({"t": Array(row)})}) for row in cell], f, 1)

    found: dict[str, Callable[[np.ndarray], object]] = {
        "median": lambda cell: np.median(cell, axis=0),
        "trimmed_mean": lambda cell: trim_mean(cell, (f + 0.5) / m),
        "krum": krum,
    }
    return found.get(name)


def distance(answer: Any, other: np.ndarray) -> float:
    """How far an answer is from another, over the length of that."""
    found, other = np.asarray(answer, dtype=np.float64).ravel(), other.astype(np.float64).ravel()
    return float(np.linalg.norm(found - other) / np.linalg.norm(other))


def ours_takes(case: Case, cells: int) -> float:
    """Seconds a cell."""
    parts = pieces(cells, 4 * case.m * case.d)
    threads = min(len(parts), torch.get_num_threads())
    resident = [_drawn(case.m, parts[0].stop, case.d, seed) for seed in range(threads)]
    rule = ours(case.name, case.f, case.m)

    def piece(i: int) -> None:  # as in the engine, what a rule makes of a piece is not kept
        rule(resident[i % threads][: parts[i].stop - parts[i].start])

    return seconds(lambda: side_by_side(piece, range(len(parts)))) / cells


def ours_makes(case: Case) -> np.ndarray:
    """Our rule's aggregate of the first cell."""
    rule = ours(case.name, case.f, case.m)
    return rule(torch.from_numpy(case.arrays(1)[0]).view(1, case.m, 1, case.d))[0].numpy()


def byzfl_takes(case: Case, few: int, threads: int, as_tensors: bool, more: dict[str, Any]) -> float | None:
    """Seconds a cell of ByzFL's rule; None where it has none."""
    torch.set_num_threads(threads)
    found = byzfl(case.name, case.f, **more)
    arrays = case.arrays(few)
    given = [list(torch.from_numpy(cell)) for cell in arrays] if as_tensors else arrays
    return None if found is None else seconds(lambda: [found(cell) for cell in given]) / few


def flower_takes(case: Case, few: int) -> float | None:
    """Seconds a cell of Flower's function; None where it has none."""
    found, arrays = flower(case.name, case.f, case.m), case.arrays(few)
    return None if found is None else seconds(lambda: [found(cell) for cell in arrays]) / few


def same(case: Case, mine: np.ndarray) -> tuple[dict[str, Any], str]:
    """The settings under which ByzFL's rule gives the same as ours, and what is to be said of these."""
    found, cell = byzfl(case.name, case.f), list(torch.from_numpy(case.arrays(1)[0]))
    if found is None or case.name in OTHERWISE:
        return {}, ""
    if case.name != "geometric_median":
        away = distance(found(cell), mine)
        return {}, "" if away < NEAR else f"differs by {away:.1e}"
    exact = aggregate.make(case.name, f=case.f, m=case.m, args={"tolerance": 1e-12, "most": 10_000})
    weights, order = torch.ones(case.m), torch.arange(case.m)
    true = exact(torch.stack(cell).double().unsqueeze(1), weights, order).numpy()
    settings: dict[str, Any] = {}
    for steps in range(1, MOST_STEPS + 1):
        settings = {"T": steps, "nu": 1e-6}
        found = byzfl(case.name, case.f, **settings)
        assert found is not None
        if distance(found(cell), true) < max(distance(mine, true), PRECISE):
            return settings, f"{steps} steps"
    return settings, f"not the same in {MOST_STEPS} steps"


def seconds(call: Callable[[], object]) -> float:
    """Of a call, after one that warms up; of short ones the median of several."""
    ticks: list[float] = []
    while len(ticks) < 2 or sum(ticks) < ENOUGH:
        began = time.perf_counter()
        call()
        ticks.append(time.perf_counter() - began)
    return statistics.median(ticks[1:])


class Machine:
    """How fast this machine reads and multiplies, on the threads that torch uses."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        resident = [torch.randn(100, 7850) for _ in range(threads)]
        again = [part for _ in range(32) for part in resident]
        reads = (Tensor.sum, lambda part: torch.ones(100) @ part, lambda part: torch.dot(part.view(-1), part.view(-1)))
        took = min(seconds(lambda: side_by_side(read, again)) for read in reads)  # noqa: B023
        self.bytes = sum(part.nbytes for part in again) / took
        square = torch.randn(2048, 2048)
        self.flops = 2 * len(square) ** 3 / seconds(lambda: square @ square)

    def least(self, name: str, m: int, d: int) -> float:
        """Seconds without which a rule can't be."""
        return max(
            4 * m * d * TOUCHED.get(name, 1.0) / self.bytes, 2 * m * m * d * MULTIPLIED.get(name, 0) / self.flops
        )


class Apart:
    """Calls, each in a new process."""

    def __init__(self, threads: int, keep: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._pool = ProcessPoolExecutor(1, context, _settled, (threads, keep), max_tasks_per_child=1)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """The value that the function returns."""
        return self._pool.submit(function, *args).result()


def _settled(threads: int, keep: bool) -> None:
    torch.set_num_threads(threads)
    if keep:
        for option, most in KEPT:
            ctypes.CDLL(None).mallopt(option, most)


def rows(given: argparse.Namespace, machine: Machine, apart: Apart) -> Iterator[str]:
    """A line for each rule, number of clients and number of features."""
    for m in given.clients:
        for d in given.features:
            for name in given.rules:
                case = Case(name, m, d, max(0, min(m // 5, RULES[name].max_f(m))) if name in RULES else m // 5)
                least = machine.least(name, m, d)
                more, said = apart(same, case, apart(ours_makes, case))
                ways = ((given.threads, True), (1, True), (given.threads, False))
                mine, others = [], []
                for _ in range(given.rounds):
                    mine.append(apart(ours_takes, case, given.cells))
                    theirs = [apart(byzfl_takes, case, given.few, *way, more) for way in ways]
                    others.append([*theirs, apart(flower_takes, case, given.few)])
                cells = [f"{name:>18} {m:7} {d:8} {case.f:3} {1e3 * statistics.median(mine):10.3f} {1e3 * least:8.3f}"]
                for i, took in enumerate(zip(*others, strict=True)):
                    if None in took:
                        cells.append(f"{'-':>10} {'-':>8}" + f" {'-':>8} {'-':>8}" * (i == 0))
                        continue
                    median, ratios = statistics.median(took), [a / b for a, b in zip(took, mine, strict=True)]
                    cells.append(f"{1e3 * median:10.3f} {statistics.median(ratios):7.1f}x")
                    if i == 0:
                        cells.append(f"{min(ratios):7.1f}x {median / least:7.1f}x")
                yield " ".join([*cells, said]).rstrip()


def _drawn(m: int, cells: int, d: int, seed: int) -> Tensor:
    """Updates (cells, m, 1, d) as the engine keeps them: client after client."""
    return torch.randn(m, cells, 1, d, generator=torch.Generator().manual_seed(seed)).movedim(0, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--features", type=int, nargs="+", default=[785, 7850])
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--few", type=int, default=4, help="cells that the others are called on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rules", nargs="+", default=[*RULES, *PRE])
    parser.add_argument("--keep", action="store_true", help="have the allocator (glibc's) keep all memory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if importlib.util.find_spec("byzfl") is None:
        print("ByzFL: skipped, not installed (pip install byzfl)")
    print(f"{given.cells} cells, {given.threads} threads, float32; ms a cell, and how many times ours is as fast")
    machine = Machine()
    print(f"adding up updates: {machine.bytes / 1e9:.0f} GB/s; products of matrices: {machine.flops / 1e9:.0f} Gflop/s")
    others = ("ByzFL", "torch"), ("ByzFL", "1 thread"), ("ByzFL", "numpy"), ("Flower", "")
    heads = [f"{a:>10} {b:>8}" + f" {'lowest':>8} {'at most':>8}" * (i == 0) for i, (a, b) in enumerate(others)]
    print(f"{'rule':>18} {'clients':>7} {'features':>8} {'f':>3} {'ours':>10} {'least':>8}", *heads)
    for row in rows(given, machine, Apart(given.threads, given.keep)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
