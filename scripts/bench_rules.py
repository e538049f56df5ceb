"""What each aggregation rule costs: ours over many federations at once, beside ByzFL's and Flower's one at a time.

    .venv/bin/python scripts/bench_rules.py [--clients 10 50 100] [--features 785 7850] [--cells 256]

Random updates in float32, f a fifth of the clients (or the most that the rule allows). Ours: milliseconds of all cells
together over the number of cells, in the pieces in which the engine goes through them, side by side on all threads.
As there, a piece is still in the processor's cache when the rule gets it. ByzFL and Flower: the same call on a few
cells, one after the other, in the cache too. ByzFL twice: on a list of torch tensors, which is what the server of its
own training hands over, and on a numpy array. All take turns in one run; medians.

`least` is what no program can do without: to read every number once (write those that the rule makes of them), or to
multiply every two updates with each other, at the rate at which this machine adds up updates and multiplies matrices on
these threads. `at most` is ByzFL's time on tensors over that: the ratio that nothing here could exceed. Sorting has no
such bound.

Where the usual settings differ, those are measured under which both give the same: centered clipping makes one step
from zero with radius 10; ByzFL's geometric median, which has no tolerance, makes as many steps as bring it as near as
ours is (`steps`). What the two make of a cell is compared.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_attack import aggregate
from fl_attack.aggregate import PRE, RULES
from fl_attack.engine.sent import pieces
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
OTHERWISE = ("krum", "multi_krum", "bucketing")  # other neighbours, other lots: near, not the same
TOUCHED = {"bucketing": 1.5, "clipping": 2.0, "nnm": 2.0}  # numbers read or written for each that there is; else 1
MULTIPLIED = {"krum": 0.5, "multi_krum": 0.5, "bulyan": 0.5, "nnm": 1.5}  # products of m x d with d x m
MOST_STEPS = 200
NEAR = 1e-4  # of the length of ours


def ours(name: str, f: int, m: int) -> Callable[[Tensor], Tensor]:
    """A rule, (cells, 1, d) of updates (cells, m, 1, d), or a pre-aggregator, (cells, fewer, 1, d)."""
    args = OURS.get(name, {})
    weights, lots = torch.ones(m), torch.randperm(m, generator=torch.Generator().manual_seed(0))
    if name in PRE:
        return lambda updates: PRE[name].apply(updates, weights, f, lots, **args)[0]
    made = aggregate.make(name, f=f, m=m, args=args)
    return lambda updates: made(updates, weights, lots)


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


def distance(theirs: Any, mine: Tensor) -> float:
    """How far ByzFL's answer is from ours, over the length of ours."""
    found, mine = torch.as_tensor(np.asarray(theirs), dtype=torch.float64), mine.double()
    return float((found.view_as(mine) - mine).norm() / mine.norm())


def same(name: str, f: int, cell: list[Tensor], mine: Tensor) -> tuple[Callable[[Any], Any] | None, str]:
    """ByzFL's rule with the settings under which it gives the same, and what is to be said of these."""
    found = byzfl(name, f)
    if found is None or name in OTHERWISE:
        return found, ""
    if name != "geometric_median":
        away = distance(found(cell), mine)
        return found, "" if away < NEAR else f"differs by {away:.1e}"
    for steps in range(1, MOST_STEPS + 1):
        found = byzfl(name, f, T=steps, nu=1e-6)
        assert found is not None
        if distance(found(cell), mine) < NEAR:
            return found, f"{steps} steps"
    return found, f"not the same in {MOST_STEPS} steps"


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of some calls, the first of which warms up."""
    ticks = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        ticks.append(time.perf_counter() - began)
    return statistics.median(ticks[1:])


class Machine:
    """How fast this machine reads and multiplies, on the threads that torch uses."""

    def __init__(self, repeats: int) -> None:
        threads = torch.get_num_threads()
        resident = [torch.randn(100, 7850) for _ in range(threads)]
        again = [part for _ in range(32) for part in resident]
        reads = (Tensor.sum, lambda part: torch.ones(100) @ part, lambda part: torch.dot(part.view(-1), part.view(-1)))
        took = min(seconds(lambda: side_by_side(read, again), repeats) for read in reads)  # noqa: B023
        self.bytes = sum(part.nbytes for part in again) / took
        square = torch.randn(2048, 2048)
        self.flops = 2 * len(square) ** 3 / seconds(lambda: square @ square, repeats)

    def least(self, name: str, m: int, d: int) -> float:
        """Seconds without which a rule can't be."""
        return max(
            4 * m * d * TOUCHED.get(name, 1.0) / self.bytes, 2 * m * m * d * MULTIPLIED.get(name, 0) / self.flops
        )


def rows(given: argparse.Namespace, machine: Machine) -> Iterator[str]:
    """A line for each rule, number of clients and number of features."""
    for m in given.clients:
        for d in given.features:
            parts = pieces(given.cells, 4 * m * d)
            resident = [_drawn(m, parts[0].stop, d, seed) for seed in range(min(len(parts), given.threads))]
            arrays = [_drawn(m, 1, d, seed)[0, :, 0].contiguous().numpy() for seed in range(given.few)]
            lists = [list(torch.from_numpy(cell)) for cell in arrays]
            for name in given.rules:
                f = max(0, min(m // 5, RULES[name].most(m))) if name in RULES else m // 5
                rule = ours(name, f, m)

                def piece(i: int) -> None:  # as in the engine, what a rule makes of a piece is not kept
                    rule(resident[i % len(resident)][: parts[i].stop - parts[i].start])  # noqa: B023

                mine = seconds(lambda: side_by_side(piece, range(len(parts))), given.repeats) / given.cells  # noqa: B023
                least = machine.least(name, m, d)
                theirs, said = same(name, f, lists[0], rule(torch.from_numpy(arrays[0]).view(1, m, 1, d))[0])
                cells = [f"{name:>18} {m:7} {d:8} {f:3} {1e3 * mine:10.3f} {1e3 * least:8.3f}"]
                for other, given_to in ((theirs, lists), (theirs, arrays), (flower(name, f, m), arrays)):
                    most = given_to is lists
                    if other is None:
                        cells.append(f"{'-':>10} {'-':>7}" + f" {'-':>8}" * most)
                        continue
                    took = seconds(lambda: [other(cell) for cell in given_to], given.repeats) / len(given_to)  # noqa: B023
                    cells.append(f"{1e3 * took:10.3f} {took / mine:6.1f}x" + f" {took / least:7.1f}x" * most)
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rules", nargs="+", default=[*RULES, *PRE])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if importlib.util.find_spec("byzfl") is None:
        print("ByzFL: skipped, not installed (pip install byzfl)")
    print(f"{given.cells} cells, {given.threads} threads, float32; ms a cell, and how many times ours is as fast")
    machine = Machine(given.repeats)
    print(f"adding up updates: {machine.bytes / 1e9:.0f} GB/s; products of matrices: {machine.flops / 1e9:.0f} Gflop/s")
    heads = (f"{'ByzFL':>10} {'torch':>7} {'at most':>8}", f"{'ByzFL':>10} {'numpy':>7}", f"{'Flower':>10} {'':>7}")
    print(f"{'rule':>18} {'clients':>7} {'features':>8} {'f':>3} {'ours':>10} {'least':>8}", *heads)
    for row in rows(given, machine):
        print(row, flush=True)


if __name__ == "__main__":
    main()
