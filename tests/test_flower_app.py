"""`flwr run .`: the same experiment from Flower's own command."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from fl_attack import experiment, federation, flower_app
from fl_attack.config import Settings, compose
from fl_attack.errors import RunError
from fl_attack.federation.session import wait_for

ROOT = Path(__file__).parents[1]
Small = Callable[..., list[str]]


def test_the_run_configuration_becomes_overrides(small_data: Small, tmp_path: Path, monkeypatch) -> None:
    seen: list[Settings] = []

    def runner(drive: object, settings: Settings) -> None:
        seen.append(settings)
        raise RunError("far enough")

    config = {"rounds": 4, "attack.budget": 0.25, "out": f"{tmp_path}/out", "lr": "", "seed": ""}
    config["overrides"] = " ".join([*small_data(3), "attack.goal=targeted", "batch_size=full"])
    with pytest.raises(SystemExit):
        flower_app.main(config, runner)
    (settings,) = seen
    assert (settings.rounds, settings.attack.budget, settings.attack.goal) == (4, 0.25, "targeted")
    assert settings.lr == compose("out=unused").lr


@pytest.mark.parametrize(
    ("config", "message"),
    [({"rounds": "many"}, "rounds=many is not allowed"), ({"overrides": "foo=1"}, "foo is not a known key")],
)
def test_a_wrong_run_configuration_is_told(
    capsys: pytest.CaptureFixture[str], config: dict[str, str], message: str
) -> None:
    with pytest.raises(SystemExit):
        flower_app.main(config, lambda drive, settings: None)
    assert f"fl-attack: {message}" in capsys.readouterr().out


class Nodes:
    """A grid of which only the nodes matter."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(self.count))


@pytest.mark.parametrize("nodes", [2, 11])
def test_another_number_of_nodes_than_clients_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    monkeypatch.setattr("fl_attack.federation.session.JOINING", 0.0)
    with pytest.raises(RunError, match=f"{nodes} nodes, but the experiment 10 clients.*num-supernodes=10"):
        wait_for(Nodes(nodes), 10)  # type: ignore[arg-type]
    wait_for(Nodes(10), 10)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower of our own, whose SuperLink is ended afterwards."""
    port = free_port()
    scripts = str(Path(sys.executable).parent)  # of the environment, activated or not
    yield os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    table = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    for line in table.splitlines():
        if "flower-superlink" in line and f"--port {port}" in line:
            os.kill(int(line.split()[0]), signal.SIGTERM)


def test_flwr_run_ends_in_the_bits_of_the_command(
    own_ray: None, flower_home: dict[str, str], small_data: Small, tmp_path: Path
) -> None:
    overrides = [*small_data(3), "batch_size=40", "clients.total=4", "clients.malicious=1"]
    config = f'rounds=3 attack.budget=0.5 out="{tmp_path}/flower" overrides="{" ".join(overrides)}"'
    nodes = "num-supernodes=4 client-resources-num-cpus=1"
    call = [
        shutil.which("flwr", path=flower_home["PATH"]) or "flwr",
        "run",
        str(ROOT),
        "--stream",
        "--federation-config",
        nodes,
        "--run-config",
        config,
    ]
    done = subprocess.run(call, env=flower_home, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert (tmp_path / "flower" / "summary.json").exists(), done.stdout + done.stderr
    try:
        experiment.run(compose(*overrides, "rounds=3", "attack.budget=0.5", f"out={tmp_path}/here"), federation.run)
    finally:
        ray.shutdown()
    for name in ("model.npz", "flips.npz"):
        assert (tmp_path / "flower" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert len(np.load(tmp_path / "here" / "flips.npz")["round"]) > 0
