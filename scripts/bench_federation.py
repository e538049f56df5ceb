"""How fast a round of the federation is: Flower's stock grid, the block grid, and bare Ray actors as the limit.

    .venv/bin/python scripts/bench_federation.py [--clients 10 100 1000] [--classes 2 10] [--rounds 200]

Logistic regression of 785 features (generated data of the shape of MNIST), 128 samples a round or four a client,
no attack unless --malicious says so. Stock takes seconds a round with more than a hundred clients: it is left out.
All in one run, so that the ratios hold on a machine that does other things too. "bare Ray" does the same gradient steps
in as many actors, with neither Flower's messages nor its apps: what is left to gain.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch

from fl_attack import federation, scenario
from fl_attack.config import Settings, compose
from fl_attack.federation.client import client_app
from fl_attack.federation.grid import BlockGrid
from fl_attack.federation.session import ray_session, simulate
from fl_attack.federation.strategy import start
from fl_attack.history import Recorder
from fl_attack.scenario import NO_FLIPS

STOCK = 100  # clients, at most, of the stock grid


class Clock:
    """Times rounds as a recorder's observer: the first ones warm up."""

    def __init__(self, warm_up: int = 5) -> None:
        self.warm_up, self.ticks, self.began = warm_up, [], time.perf_counter()

    def __call__(self, round_: int, row: object) -> None:
        """Note the end of a round."""
        self.ticks.append(time.perf_counter())

    @property
    def start_up(self) -> float:
        """Seconds from making the clock to the end of the first round."""
        return self.ticks[1] - self.began

    @property
    def per_round(self) -> float:
        """Median seconds of a round."""
        return statistics.median(np.diff(self.ticks[self.warm_up :]))


def settings(data: Path, clients: int, malicious: int, rounds: int, actors: int) -> Settings:
    """The experiment that all of them run."""
    overrides = [
        "dataset=npz",
        f"dataset.path={data}",
        f"clients.total={clients}",
        f"clients.malicious={malicious}",
        f"rounds={rounds}",
        "eval_every=1000000",
        f"batch_size={max(128, 4 * clients)}",
        f"engine.actors={actors}",
        "out=unused",
    ]
    return compose(*overrides)


@ray.remote
class Bare:
    """A block of clients as plain arrays and calls."""

    def __init__(self, settings_json: str, clients: list[int]) -> None:
        torch.set_num_threads(1)
        self.scenario, self.clients = scenario.from_json(settings_json), clients

    def round(self, theta: np.ndarray, round_: int) -> list[np.ndarray]:
        """Each client's parameters."""
        at = torch.from_numpy(theta.copy())
        return [scenario.client_update(self.scenario, c, at, round_, NO_FLIPS)[0].numpy() for c in self.clients]


def bare(chosen: Settings, actors: int) -> tuple[Clock, torch.Tensor]:
    """The federation of `block` on bare Ray actors, without Flower."""
    clock, made = Clock(), scenario.make(chosen)
    clients = chosen.clients.total
    text = chosen.model_dump_json()
    blocks = [Bare.remote(text, block.tolist()) for block in np.array_split(np.arange(clients), actors)]
    weights = made.schedule.sizes / made.schedule.sizes.sum()
    theta = made.start().numpy()
    clock(0, None)
    for round_ in range(1, chosen.rounds + 1):
        moved = ray.get([block.round.remote(theta, round_) for block in blocks])
        theta = np.tensordot(weights, np.stack([one for block in moved for one in block]), 1)
        clock(round_, None)
    for block in blocks:
        ray.kill(block)
    return clock, torch.from_numpy(theta)


def flower(chosen: Settings, grid: str, actors: int) -> tuple[Clock, torch.Tensor]:
    """The federation on one of the two grids."""
    clock = Clock()
    recorder = Recorder(scenario.make(chosen), clock)
    if grid == "stock":
        simulate(lambda grid: start(grid, recorder), chosen.clients.total, 1.0, 0.0, client_app)
    else:
        with BlockGrid(client_app, chosen.clients.total, actors, 1.0) as blocks:
            start(blocks, recorder)
    return clock, recorder.history.theta


def actors_memory() -> float:
    """Resident megabytes of this process's Ray workers together, at their peak."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--malicious", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=200, help="of block and bare Ray; stock makes a fifth")
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        x = rng.integers(0, 256, (12665, 784), np.uint8)
        print(f"{given.actors} actors, 785 features, {given.malicious} malicious clients")
        columns = ("rounds/s", 9), ("ms/round", 9), ("start-up s", 10), ("stock/this", 10), ("this/bare", 9)
        print(f"{'classes':>7} {'clients':>7} {'grid':>9} " + " ".join(f"{name:>{width}}" for name, width in columns))

        for classes in given.classes:
            data = Path(folder, f"{classes}.npz")
            y = x[:, 0].astype(np.int64) * classes // 256
            np.savez(data, x_train=x, y_train=y, x_test=x[:2000], y_test=y[:2000])
            for clients in given.clients:
                rounds = max(20, given.rounds * 100 // max(100, clients))
                measure(data, classes, clients, given.malicious, rounds, given.actors)
    print(f"peak memory: this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def measure(data: Path, classes: int, clients: int, malicious: int, rounds: int, actors: int) -> None:
    """One row a way of running, for one number of clients."""
    chosen = settings(data, clients, malicious, rounds, actors)
    fewer = chosen.model_copy(update={"rounds": max(20, rounds // 5)})
    federation.check(scenario.make(chosen))
    clocks, thetas = {}, {}
    with ray_session(None, verbose=False):
        clocks["bare Ray"], thetas["bare Ray"] = bare(chosen, actors)
        clocks["block"], thetas["block"] = flower(chosen, "block", actors)
        if clients <= STOCK:
            _, thetas["block, as far as stock"] = flower(fewer, "block", actors)
            clocks["stock"], thetas["stock"] = flower(fewer, "stock", actors)  # this ends Ray
    stock = clocks["stock"].per_round if "stock" in clocks else float("nan")
    for name, clock in clocks.items():
        print(
            f"{classes:7} {clients:7} {name:>9} "
            f"{1 / clock.per_round:9.1f} {clock.per_round * 1e3:9.2f} {clock.start_up:10.1f} "
            f"{stock / clock.per_round:10.1f} {clock.per_round / clocks['bare Ray'].per_round:9.2f}"
        )
    said = []
    if "stock" in thetas:
        equal = torch.equal(thetas["stock"], thetas["block, as far as stock"])
        said.append(f"stock and block {'equal to the bit' if equal else 'DIFFER'}")
    if not malicious:
        said.append(f"block and bare Ray differ by {(thetas['block'] - thetas['bare Ray']).abs().max():.1e}")
    print(f"{classes:7} {clients:7} theta: {', '.join(said) or 'not compared'}")


if __name__ == "__main__":
    main()
