"""What each aggregation rule costs: ours over many federations at once, beside ByzFL's and Flower's one at a time.

    .venv/bin/python scripts/bench_rules.py [--clients 10 50 100] [--features 785 7850] [--cells 256]

Random updates in float32, f a fifth of the clients (or the most that the rule allows). Ours: milliseconds of all cells
together over the number of cells, in the pieces in which the engine goes through them. ByzFL and Flower:
the same call on a few of these cells, one after the other. All take turns in one run; medians.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fl_attack import aggregate
from fl_attack.aggregate import RULES
from fl_attack.engine.sent import BYTES_AT_ONCE

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


def ours(name: str, f: int, m: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A rule, or a pre-aggregator before the mean, of updates (cells, m, 1, d)."""
    made = aggregate.make(name, f=f, m=m) if name in RULES else aggregate.make("mean", f=f, m=m, pre=[name])
    weights, lots = torch.ones(m), torch.randperm(m, generator=torch.Generator().manual_seed(0))
    return lambda updates: made(updates, weights, lots)


def byzfl(name: str, f: int) -> Callable[[np.ndarray], object] | None:
    """ByzFL's rule of the same name, of one cell (m, d)."""
    if name not in BYZFL or importlib.util.find_spec("byzfl") is None:
        return None
    import byzfl as library

    kind = getattr(library, BYZFL[name])
    if name in ("trimmed_mean", "krum", "multi_krum", "meamed", "nnm"):
        return kind(f)
    return kind(s=2) if name == "bucketing" else kind()


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


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of some calls, the first of which warms up."""
    ticks = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        ticks.append(time.perf_counter() - began)
    return statistics.median(ticks[1:])


def rows(given: argparse.Namespace) -> Iterator[str]:
    """A line for each rule, number of clients and number of features."""
    for m in given.clients:
        for d in given.features:
            chunk = max(1, min(given.cells, BYTES_AT_ONCE // (4 * m * d)))
            # as the engine keeps them: client after client
            updates = torch.randn(m, chunk, 1, d, generator=torch.Generator().manual_seed(0)).movedim(0, 1)
            few = [np.ascontiguousarray(cell[:, 0].numpy()) for cell in updates[: given.few]]
            for name in given.rules:
                f = max(0, min(m // 5, RULES[name].most(m))) if name in RULES else m // 5
                rule = ours(name, f, m)
                mine = seconds(lambda: rule(updates), given.repeats) / chunk  # noqa: B023
                cells = [f"{name:>18} {m:7} {d:8} {f:3} {1e3 * mine:10.3f}"]
                for other in (byzfl(name, f), flower(name, f, m)):
                    if other is None:
                        cells.append(f"{'-':>10} {'-':>7}")
                        continue
                    theirs = seconds(lambda: [other(cell.copy()) for cell in few], given.repeats) / len(few)  # noqa: B023
                    cells.append(f"{1e3 * theirs:10.3f} {theirs / mine:6.1f}x")
                yield " ".join(cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--features", type=int, nargs="+", default=[785, 7850])
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--few", type=int, default=4, help="cells that the others are called on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rules", nargs="+", default=[*RULES, "nnm", "bucketing", "clipping"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if importlib.util.find_spec("byzfl") is None:
        print("ByzFL: skipped, not installed (pip install byzfl)")
    print(f"{given.cells} cells, {given.threads} threads, float32; ms a cell, and how many times ours is as fast")
    print(f"{'rule':>18} {'clients':>7} {'features':>8} {'f':>3} {'ours':>10} {'ByzFL':>10} {'':>7} {'Flower':>10}")
    for row in rows(given):
        print(row, flush=True)


if __name__ == "__main__":
    main()
