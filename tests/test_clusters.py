"""Flower's own engine and a cluster of several Ray nodes give what one process gives."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from local_ray import LocalRay, in_place_of_ray

from fl_attack import federation, scenario
from fl_attack.config import Settings
from fl_attack.engine import sequential
from fl_attack.errors import InputError, RunError
from fl_attack.federation import apps, client, session, tasks
from fl_attack.federation.client import client_app
from fl_attack.federation.grid import BlockGrid
from fl_attack.federation.session import ray_session
from fl_attack.history import Recorder

Compose = Callable[..., Settings]
Small = Callable[..., list[str]]
COMMON = ["rounds=5", "clients.honest=4", "clients.malicious=3", "attack.budget=0.4", "lr=0.5", "batch_size=40"]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import this file


def run(recorders: list[Recorder], app: ClientApp = client_app) -> None:
    """All recorders over the grid of the first one's settings."""
    settings = recorders[0].scenario.settings

    def drive(federate: federation.Federate) -> None:
        for recorder in recorders:
            federate(recorder)

    federation.run(drive, settings, app)


def same(a: Recorder, b: Recorder) -> bool:
    """Whether two runs ended in the same bits, flips included."""
    tables = a.history.flip_table(), b.history.flip_table()
    return torch.equal(a.history.theta, b.history.theta) and all(
        (tables[0][k] == tables[1][k]).all() for k in tables[0]
    )


def test_stock_and_block_end_in_the_same_bits(own_ray: None, settings: Compose, small_data: Small) -> None:
    cases = [
        ["server_optimizer=momentum", "attack.goal=targeted"],
        ["server_optimizer=adam", "partition=dirichlet", "dtype=float64"],
        ["local_steps=2", "batch_size=30"],
    ]
    by_grid = [
        [Recorder(scenario.make(settings(*small_data(3), *COMMON, *case, f"engine.grid={grid}"))) for case in cases]
        for grid in ("block", "stock")
    ]
    for recorders in by_grid:
        run(recorders)
    assert all(same(block, stock) for block, stock in zip(*by_grid, strict=True))
    assert all(recorder.history.flip_count for recorder in by_grid[0])


@pytest.mark.slow
def test_networks_end_in_the_same_bits_on_both_grids(settings: Compose) -> None:
    cases = [
        ["model=mlp", "model.args.widths=[9]", "worker_momentum=0.9", "strategy=median"],
        ["model=cnn", "attack.goal=targeted"],
    ]
    by_grid = [
        [Recorder(scenario.make(settings(*COMMON, "dtype=float64", *case, f"engine.grid={grid}"))) for case in cases]
        for grid in ("block", "stock")
    ]
    for recorders in by_grid:
        run(recorders)
    assert all(same(block, stock) for block, stock in zip(*by_grid, strict=True))
    for recorder in by_grid[0]:
        alone = sequential.run(recorder.scenario).history()
        assert (alone.theta - recorder.history.theta).norm() <= 1e-9 * alone.theta.norm()


def failing_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("no more disk")

    return app


def test_a_client_that_raises_stops_flowers_engine_too(own_ray: None, settings: Compose, small_data: Small) -> None:
    recorder = Recorder(scenario.make(settings(*small_data(3), *COMMON, "engine.grid=stock")))
    with pytest.raises(RunError, match="round 1 failed: no more disk"):
        run([recorder], failing_app())


def test_two_ray_nodes_both_get_clients(own_ray: None, settings: Compose, small_data: Small) -> None:
    from ray.cluster_utils import Cluster

    here = Recorder(scenario.make(settings(*small_data(3), *COMMON)))
    run([here])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        there = Recorder(scenario.make(settings(*small_data(3), *COMMON, f"engine.ray_address={cluster.address}")))
        run([there])
        assert not ray.is_initialized()  # the cluster was left, as it was found
        assert same(here, there)
        ray.init(address=cluster.address, log_to_driver=False)
        with BlockGrid(client_app, 7, actors=2, cpus_each=1.0) as grid:
            assert len({ray.get(actor.place.remote())[0] for actor in grid.actors}) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_sweep_outlives_the_loss_of_a_node_and_ends_in_the_same_bytes(
    own_ray: None, small_data: Small, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    def grid(name: str, *more: str) -> list[str]:
        fixed = ["engine=batched", "rounds=4000", "eval_every=200", "batch_size=30", f"out={tmp_path}/{name}"]
        return [sys.executable, "-m", "fl_attack", "-m", *small_data(3), *fixed, "seed=range(6)", *more]

    subprocess.run(grid("here"), check=True, stderr=subprocess.DEVNULL)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = cluster.add_node(num_cpus=1)
    try:
        sweep = subprocess.Popen(grid("ray", f"engine.ray_address={cluster.address}"), stderr=subprocess.DEVNULL)
        kept, deadline = tmp_path / "ray" / "units", time.monotonic() + 120
        while not (kept.exists() and list(kept.glob("*.npz"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        assert 1 <= len(list(kept.glob("*.npz"))) < 6  # in the middle of it
        assert sweep.wait(timeout=300) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (tmp_path / "ray" / "sweep.csv").read_bytes() == (tmp_path / "here" / "sweep.csv").read_bytes()


# two machines made of namespaces, with processes, a network address and a folder of Ray's each: `ray symmetric-run`
# ends with `ray stop`, which then sees no other Ray
TWO_MACHINES = """
trap 'ip netns del $A; ip netns del $B' EXIT
ip netns add $A && ip netns add $B && ip link add eth0 netns $A type veth peer name eth0 netns $B
for one in $A:1 $B:2; do
    ip -n ${one%:*} addr add 10.99.0.${one#*:}/24 dev eth0
    for link in lo eth0; do ip -n ${one%:*} link set $link up; done
done
machine() {
    mkdir -p /tmp/ray $SCRATCH/$1
    exec ip netns exec $1 unshare --pid --fork --kill-child --mount --mount-proc bash -c "
        mount --bind $SCRATCH/$1 /tmp/ray
        ray symmetric-run --address 10.99.0.1:6379 --min-nodes 2 --num-cpus 1 --object-store-memory 100000000 -- $RUN"
}
(machine $B) & worker=$!  # it notices the end of the head after a minute; unshare passes no other signal on
(machine $A)
code=$?
kill -KILL $worker
exit $code
"""


def may_make_namespaces() -> bool:
    tools = shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0
    return bool(tools) and not subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False).returncode


@pytest.mark.slow
@pytest.mark.skipif(not may_make_namespaces(), reason="needs root and iproute2, to make two machines of namespaces")
def test_symmetric_run_spreads_a_sweep_over_two_machines(small_data: Small, tmp_path: Path) -> None:
    run = ["fl-attack", "-m", *small_data(3), "engine=batched", "rounds=30", "batch_size=30", "seed=range(4)"]
    here = subprocess.run(
        [sys.executable, "-m", "fl_attack", *run[1:], f"out={tmp_path}/here"], capture_output=True, check=False
    )
    assert here.returncode == 0, here.stderr
    there = shlex.join([*run, "engine.ray_address=auto", f"out={tmp_path}/there"])
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "180",
        "RAY_worker_niceness": "0",  # or workers wait for the other tests
        "A": f"flA{os.getpid()}",
        "B": f"flB{os.getpid()}",
        "SCRATCH": str(tmp_path),
        "RUN": there,
    }
    call = ["bash", "-c", TWO_MACHINES]
    done = subprocess.run(call, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "On worker node" in done.stdout
    assert (tmp_path / "there" / "sweep.csv").read_bytes() == (tmp_path / "here" / "sweep.csv").read_bytes()


def test_an_address_without_a_cluster_is_told_in_one_line(own_ray: None, settings: Compose, small_data: Small) -> None:
    recorder = Recorder(scenario.make(settings(*small_data(3), *COMMON, "engine.ray_address=127.0.0.1:1")))
    with pytest.raises(InputError, match=r"engine\.ray_address=127\.0\.0\.1:1 can't be joined"):
        run([recorder])


def test_without_an_address_ray_is_started_here_whatever_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    with ray_session(None, verbose=False):
        pass
    assert asked["address"] == "local"


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRay]:
    """A Ray of 7.5 processors and two GPUs, which runs already; actors and tasks are calls."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with in_place_of_ray(LocalRay(CPU=7.5, GPU=2.0)) as local:
        local.running = True
        yield local


def with_engine(chosen: Settings, clients: int = 7, **engine: object) -> Settings:
    """What composing settings with these values of `engine` would give; it takes no time."""
    parts = {
        "engine": chosen.engine.model_copy(update=engine),
        "clients": chosen.clients.model_copy(update={"total": clients}),
    }
    return chosen.model_copy(update=parts)


def test_actors_share_the_processors_of_the_cluster(local: LocalRay, settings: Compose) -> None:
    chosen = settings()
    for clients, engine, actors, cpus, gpus in (
        (9, {}, 7, 1.0, 0.0),
        (3, {}, 3, 1.0, 0.0),
        (9, {"actors": 5}, 5, 1.0, 0.0),
        (30, {"actors": 20, "client_device": "cuda"}, 20, 0.375, 0.1),
        (30, {"actors": 23, "client_device": "cuda"}, 23, 0.326, 0.0869),
        (2, {"client_device": "cuda"}, 2, 1.0, 1.0),
    ):
        before = len(local.made)
        federation.run(lambda federate: None, with_engine(chosen, clients, **engine))
        assert len(local.made) - before == actors
        assert (local.options[-1]["num_cpus"], local.options[-1]["num_gpus"]) == (cpus, gpus)
        assert len(local.killed) == len(local.made)
    assert local.running  # as it was found


def test_a_small_cluster_has_at_least_one_actor(settings: Compose) -> None:
    chosen = settings()
    for resources, cpus, actors in (({"memory": 1.0}, 1.0, 1), ({"CPU": 0.5}, 0.5, 1), ({"CPU": 2.9}, 1.0, 2)):
        with in_place_of_ray(LocalRay(**resources)) as small:
            small.running = True
            federation.run(lambda federate: None, chosen)
            assert len(small.made) == actors
            assert small.options[0]["num_cpus"] == cpus
            with pytest.raises(InputError, match=r"needs a GPU, but the Ray cluster has none; use cpu"):
                federation.run(lambda federate: None, with_engine(chosen, client_device="cuda"))


@pytest.mark.parametrize("grid", ["block", "stock"])
def test_a_federation_runs_on_the_grid_that_is_asked_for(
    local: LocalRay, settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, grid: str
) -> None:
    simulated: list[tuple[object, ...]] = []

    def simulation(server_app: ServerApp, client_app: ClientApp, nodes: int, *, backend_config: object) -> None:
        simulated.append((client_app, nodes, backend_config))
        with BlockGrid(client_app, nodes, 1, 1.0) as nodes_of_flower:
            here = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
            server_app(nodes_of_flower, here)

    monkeypatch.setattr("flwr.simulation.run_simulation", simulation)
    cell = scenario.make(settings(*small_data(3), *COMMON, f"engine.grid={grid}", "engine.client_device=cuda"))
    monkeypatch.setattr(client, "_on", lambda request, device: request)  # there is no GPU
    recorder = Recorder(cell)
    run([recorder])
    torch.testing.assert_close(
        recorder.history.theta, sequential.run(cell).history().theta, rtol=0, atol=1e-6, check_dtype=False
    )
    resources = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.2857}}
    assert simulated == ([] if grid == "block" else [(client_app, 7, resources)])


def test_nodes_of_flowers_engine_are_waited_for(
    local: LocalRay, settings: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, int]] = []
    monkeypatch.setattr(session, "wait_for", lambda grid, clients: asked.append((grid, clients)))
    monkeypatch.setattr(session, "simulate", lambda drive, *how: drive("the grid"))
    federation.run(lambda federate: None, with_engine(settings(), grid="stock"))
    assert asked == [("the grid", 7)]


class Slow:
    """A grid whose nodes come up one with every look."""

    def __init__(self) -> None:
        self.looks = 0

    def get_node_ids(self) -> Iterator[int]:
        self.looks += 1
        return iter(range(self.looks))


def test_nodes_that_come_up_late_are_waited_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [1000.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += 10

    monkeypatch.setattr(apps.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(apps.time, "sleep", sleep)
    apps.wait_for(Slow(), 4)  # type: ignore[arg-type]
    assert len(slept) == 3 and all(0 < seconds <= 1 for seconds in slept)
    with pytest.raises(RunError, match="the federation has 7 nodes, but the experiment 9 clients"):
        apps.wait_for(Slow(), 9)  # type: ignore[arg-type]


def test_what_can_not_run_is_refused_before_ray_starts(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("flwr")
    monkeypatch.setattr(log, "level", logging.INFO)
    cell = scenario.make(settings(*small_data(3), *COMMON))
    chosen = cell.settings
    federation.check(replace(cell, settings=chosen.model_copy(update={"verbose": True})))
    assert log.level == logging.INFO
    federation.check(cell)
    assert log.level == logging.CRITICAL
    on_gpus = replace(cell, settings=with_engine(chosen, client_device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"client_device=cuda needs a GPU, but this machine has none; use cpu"):
        federation.check(on_gpus)
    there = {"client_device": "cuda", "ray_address": "10.0.0.7:6379"}  # where there may be one
    federation.check(replace(cell, settings=with_engine(chosen, **there)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    federation.check(on_gpus)
    wrong = chosen.attack.model_copy(update={"name": "ipm", "args": {"unknown": 1}})
    with pytest.raises(InputError, match="unknown"):
        federation.check(replace(cell, settings=chosen.model_copy(update={"attack": wrong})))


def test_jobs_are_shared_out_with_the_processors_they_use(local: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    local.running, local.idle = False, 2
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(tasks, "REPORT_EVERY", -1.0)

    def work(job: str, step: Callable[[int], None]) -> str:
        assert local.running
        for more in (2, 3) if job != "c" else ():
            step(more)
        return job * 2

    done = tasks.scatter(work, ["a", "b", "c"], 4, None, False, lambda *steps: told.append(steps))
    assert next(done) == (0, "aa")
    assert told == [(0, 5), (1, 5)] * 2
    local.idle = 1
    assert list(done) == [(1, "bb"), (2, "cc")]
    assert told == [(0, 5), (1, 5)] * 2 + [(1, 5)]  # none of a job that is done
    assert not local.running
    assert set(local.waits) == {-1.0}
    board, task = local.options
    assert board["num_cpus"] == 0 and board["scheduling_strategy"].node_id == "0" * 56
    assert not board["scheduling_strategy"].soft
    assert task == {"max_retries": -1, "num_cpus": 4.0, "scheduling_strategy": "SPREAD"}
    assert list(tasks.scatter(work, ["a"], 9, None, False, lambda *steps: None)) == [(0, "aa")]
    assert local.options[-1]["num_cpus"] == 7.5  # all that any node has
