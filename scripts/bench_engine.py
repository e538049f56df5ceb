"""How fast the batched engine is, and how near to the limit that its two matrix products set.

    .venv/bin/python scripts/bench_engine.py [--data ROOT] [--threads 1] [--cells 1 16 256 1024]

Logistic regression on MNIST 0/1 (--data names the folder that holds MNIST, as dataset.root does; else generated data
of its shape) with 10 clients of 32 samples a round, or --batch, a third of them malicious. A step of honest training
is two products, Z = theta X^T and G = R X; "of bound" is the time of these two alone, with the same cells, samples,
threads and features, over the time of a round of the engine. Both are measured in one run, turn about, medians. The
engine leaves out features that are zero in every training sample; "of 785" is against products with all of them.
"""

import argparse
import importlib.util
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fl_attack import adversary, engine, protocol, scenario
from fl_attack.config import Settings, compose
from fl_attack.engine.batches import Batches
from fl_attack.models import logistic
from fl_attack.scenario import Scenario

clock = time.perf_counter
SHARED = ("dataset", "partition", "schedule")  # of cells
BLOCK = 10  # rounds, then as often the products


def settings(data: list[str], batch: int, rounds: int, *change: str) -> Settings:
    """An experiment of which only speed matters."""
    common = ["clients.total=10", f"batch_size={batch}", f"rounds={rounds}", "eval_every=1000000", "lr=0.1"]
    return compose(*data, *common, "out=unused", *change)


def cells(made: list[Scenario], count: int) -> list[Scenario]:
    """As many cells as asked for, of budgets from 0.02 to 0.98, by turns with the malicious clients of `made`."""
    chosen = []
    for i in range(count):
        template = made[i % len(made)]
        threat = template.settings.attack.model_copy(update={"budget": round(0.02 + 0.96 * i / count, 2)})
        one = Scenario(template.settings.model_copy(update={"attack": threat}), *[vars(template)[k] for k in SHARED])
        one.memo["target"] = template.memo.get("target")
        chosen.append(one)
    return chosen


class Turns:
    """An observer of the engine's rounds that takes turns with the products: a block of one, a block of the other."""

    def __init__(self, products: Callable[[], object]) -> None:
        self.products, self.rounds = products, 0
        self.engine, self.bound = [], []
        self.began = clock()

    def __call__(self, done: int) -> None:
        """Note the end of a round of all cells."""
        self.rounds += 1
        if self.rounds % BLOCK:
            return
        middle = clock()
        for _ in range(BLOCK):
            self.products()
        end = clock()
        self.engine.append((middle - self.began) / BLOCK)
        self.bound.append((end - middle) / BLOCK)
        self.began = clock()

    def medians(self) -> tuple[float, float]:
        """Seconds of a round and of its products; the first block warms up."""
        return statistics.median(self.engine[1:]), statistics.median(self.bound[1:])


def two_products(M: int, n: int, d: int) -> Callable[[], object]:
    """The products of a round, on buffers of their own."""
    theta, X, R = torch.randn(M, d), torch.rand(n, d), torch.rand(M, n)
    Z, G = torch.empty(M, n), torch.empty(M, d)
    return lambda: (torch.mm(theta, X.mT, out=Z), torch.mm(R, X, out=G))


def naive(cell: Scenario, rounds: int) -> float:
    """Seconds of a round of one experiment by itself, on the union of all clients' batches."""
    theta, ticks = cell.start(), []
    state = protocol.initial_state(theta)
    for round_ in range(1, rounds + 1):
        began = clock()
        flips = adversary.flips(cell, theta, round_)
        samples, _ = cell.schedule.samples(range(10), round_)
        y = cell.dataset.y_train[samples]
        y[np.searchsorted(samples, flips.samples)] = flips.labels
        X = cell.features(samples)
        gradient = logistic.gradient(theta.to(X.dtype), X, torch.from_numpy(y)).to(theta.dtype)
        theta, state = protocol.server_step("sgd", theta, gradient, cell.settings.lr, state)
        ticks.append(clock() - began)
    return statistics.median(ticks)


def generated(folder: Path) -> list[str]:
    """Overrides for random data of the shape of MNIST 0/1, of whose features 168 are zero everywhere."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12665 + 2115, 784), np.uint8)
    x[:, rng.permutation(784)[:168]] = 0
    y = (x.astype(float) @ rng.normal(size=784) > 0).astype(np.int64)
    np.savez(folder / "data.npz", x_train=x[:12665], y_train=y[:12665], x_test=x[12665:], y_test=y[12665:])
    return ["dataset=npz", f"dataset.path={folder / 'data.npz'}"]


def rows(data: list[str], given: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """A line for each measurement, its batch and its cell-steps a second."""
    for n in given.batch:
        for goal in ("targeted", "untargeted"):
            change = [f"attack.goal={goal}", "attack.budget=0.5"]
            made = []
            for f in given.malicious:
                made.append(scenario.make(settings(data, n, given.rounds, *change, f"clients.malicious={f}")))
                made[-1].memo["target"] = torch.randn(made[-1].theta_shape, dtype=torch.float64)
            d = int(Batches(made[0], np.arange(10), torch.device("cpu"), 2e9).features.seen.sum())
            full = made[0].theta_shape[1]
            for M in given.cells:
                times = []
                for features in (d, full):
                    turns = Turns(two_products(M, n, features))
                    engine.run_cells(cells(made, M), progress=turns, keep_flips=False, full_rows=False)
                    times.append(turns.medians())
                (round_, bound), (again, wide) = times
                row = (
                    f"{M:6} {n:5} {goal:>11} {1e3 * round_:9.3f} {M / round_:13,.0f} {bound / round_:9.0%} "
                    f"{wide / again:7.0%} {4 * M * n * d / bound / 1e9:9.0f} {peak():8.0f}"
                )
                yield row, n, M / round_
            seconds = naive(made[0], given.rounds)
            row = f"{1:6} {n:5} {goal:>11} {1e3 * seconds:9.3f} {1 / seconds:13,.0f}   a single experiment, naively"
            yield row, n, 0.0


def rivals(data: list[str], given: argparse.Namespace, fastest: dict[int, float]) -> Iterator[str]:
    """A line for each other way to make the steps of one experiment of 10 clients, and how much faster we are."""
    n = max(fastest)
    others: dict[str, Callable[[], float]] = {}
    if given.byzfl and importlib.util.find_spec("byzfl") is None:
        yield "ByzFL: skipped, not installed (pip install byzfl)"
    elif given.byzfl:
        others["ByzFL, 8 + 2 clients, its own loop"] = lambda: byzfl_step(data, n, given.rounds)
    if given.flower:
        others["Flower's stock grid, 7 + 3 clients"] = lambda: flower_step(data, n, "stock", given.rounds)
        others["our block grid on Flower, 7 + 3 clients"] = lambda: flower_step(data, n, "block", given.rounds)
    for name, measured in others.items():
        seconds = measured()
        ratio = fastest[n] * seconds
        yield f"{name}: {1 / seconds:,.1f} steps/s with |B| = {n}; the engine makes {ratio:,.0f} times as many"


def flower_step(data: list[str], n: int, grid: str, rounds: int) -> float:
    """Seconds of a round on Flower and Ray."""
    import bench_federation

    from fl_attack.federation.session import ray_session

    chosen = settings(data, n, max(25, rounds // 4), "clients.malicious=3", "attack.budget=0.5")
    with ray_session(None, verbose=False):
        clock_, _ = bench_federation.flower(chosen, grid, os.cpu_count() or 1)
    return clock_.per_round


def byzfl_step(data: list[str], n: int, rounds: int) -> float:
    """Seconds of a step of ByzFL's own clients and server: the same samples, model, mean and number of clients."""
    from byzfl import ByzantineClient, Client, Server
    from byzfl.fed_framework import models
    from torch.utils.data import DataLoader, TensorDataset

    class Logistic(torch.nn.Module):
        """The binary model, which ByzFL has for ten classes only."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(made.theta_shape[1] - 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Logits (n,)."""
            return self.linear(x)[:, 0]

    made = scenario.make(settings(data, n, rounds, "clients.malicious=2"))
    models.logistic_01 = Logistic
    common = {"model_name": "logistic_01", "device": "cpu", "learning_rate": 0.1, "loss_name": "BCEWithLogitsLoss"}
    common |= {"weight_decay": 0.0, "milestones": [], "learning_rate_decay": 1.0, "optimizer_name": "SGD"}
    common |= {"LabelFlipping": False, "nb_labels": 2, "momentum": 0.0, "store_per_client_metrics": False}

    def loader(samples: np.ndarray) -> DataLoader:
        X = made.features(samples)[:, :-1].float()
        y = torch.from_numpy(made.dataset.y_train[samples]).float()
        return DataLoader(TensorDataset(X, y), batch_size=n // 10, shuffle=True, drop_last=True)

    honest = np.setdiff1d(np.arange(10), made.partition.malicious)
    clients = [Client(common | {"training_dataloader": loader(made.schedule.shards[c])}) for c in honest]
    attackers = ByzantineClient({"name": "SignFlipping", "f": 2, "parameters": {}})
    average = {"aggregator_info": {"name": "Average", "parameters": {}}, "pre_agg_list": []}
    server = Server(common | average | {"test_loader": loader(made.schedule.shards[0])})
    ticks = []
    for _ in range(rounds):
        began = clock()
        for client in clients:
            client.compute_gradients()
        sent = [client.get_flat_gradients_with_momentum() for client in clients]
        server.update_model_with_gradients(sent + attackers.apply_attack(sent))
        state = server.get_dict_parameters()
        for client in clients:
            client.set_model_state(state)
        ticks.append(clock() - began)
    return statistics.median(ticks)


def memory(data: list[str], given: argparse.Namespace) -> Iterator[str]:
    """The largest memory of many cells at once: a few rounds, with an evaluation at the start and at the end."""
    if not given.memory:
        return
    made = [scenario.make(settings(data, given.batch[0], 3, "attack.budget=0.5", "clients.malicious=3"))]
    before, began = peak(), clock()
    engine.run_cells(cells(made, given.memory), memory_gb=2.0, keep_flips=False, full_rows=False)
    yield (
        f"{given.memory:,} cells with memory_gb=2, 3 rounds and 2 evaluations on {len(made[0].dataset.y_test):,} test "
        f"samples: {peak():.0f} MB at the peak of the process ({before:.0f} MB before), {clock() - began:.0f} s"
    )


def peak() -> float:
    """Most resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder that holds MNIST")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cells", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 320], help="samples a round over all clients")
    parser.add_argument("--malicious", type=int, nargs="+", default=[3], help="of 10 clients; several make a mixture")
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--byzfl", action=argparse.BooleanOptionalAction, default=True, help="measure ByzFL beside it")
    parser.add_argument("--flower", action=argparse.BooleanOptionalAction, default=True, help="and Flower's two grids")
    parser.add_argument("--memory", type=int, default=0, metavar="CELLS", help="and what so many cells take at once")
    parser.add_argument("--dataset", default="mnist_01", help="of --data: mnist_01 or mnist")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, on a machine that does other things")
    given = parser.parse_args()
    if given.cpu_time:
        given.threads = 1
        globals()["clock"] = time.thread_time
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = [] if given.data is None else [f"dataset={given.dataset}", f"dataset.root={given.data}"]
        data = root or generated(Path(folder))
        name = given.dataset if root else "generated data"
        print(f"{name}, {given.threads} threads, malicious clients: {given.malicious} of 10, float32")
        columns = "M", "|B|", "goal", "ms/round", "cell-steps/s", "of bound", "of 785", "Gflop/s", "peak MB"
        print("{:>6} {:>5} {:>11} {:>9} {:>13} {:>9} {:>7} {:>9} {:>8}".format(*columns))
        fastest = {}
        for row, n, rate in rows(data, given):
            fastest[n] = max(rate, fastest.get(n, 0.0))
            print(row, flush=True)
        for row in (*rivals(data, given, fastest), *memory(data, given)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
