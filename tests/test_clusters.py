"""Flower's own engine and a cluster of several Ray nodes give what one process gives."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_attack import federation, scenario
from fl_attack.config import Settings
from fl_attack.engine import sequential
from fl_attack.errors import InputError, RunError
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
(machine $B) & worker=$!  # it notices the end of the head after a minute
(machine $A)
code=$?
kill $worker
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
