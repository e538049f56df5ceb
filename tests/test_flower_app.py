"""`flwr run .`: the same experiment from Flower's own command."""

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import ray
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_attack import experiment, federation, flower_app, results, scenario
from fl_attack.config import Settings, compose
from fl_attack.data import load, own
from fl_attack.errors import RunError
from fl_attack.federation import apps, wire
from fl_attack.federation.apps import wait_for
from fl_attack.federation.client import node_of
from fl_attack.federation.nodes import introductions

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


def test_an_app_that_can_not_go_on_ends_as_flower_expects() -> None:
    """On the main thread with an error that Flower reports at once, in the thread of a simulation without a word."""

    def main(*_: object) -> NoReturn:
        raise SystemExit(1) from RunError("no way on")

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    app = apps.serve(main)
    with pytest.raises(RunError, match="no way on") as raised:
        app(Nodes(1), context)  # type: ignore[arg-type]
    ends: list[BaseException] = []

    def simulation() -> None:
        try:
            app(Nodes(1), context)  # type: ignore[arg-type]
        except BaseException as end:
            ends.append(end)

    thread = threading.Thread(target=simulation)
    thread.start()
    thread.join()
    assert [type(end) for end in ends] == [SystemExit]
    flower_log, shown = logging.getLogger("flwr"), []
    for error in (raised.value, ZeroDivisionError("a bug")):
        told = (type(error), error, error.__traceback__)
        record = flower_log.makeRecord("flwr", logging.ERROR, "run.py", 1, "ServerApp raised an exception", (), told)
        assert flower_log.filter(record)
        shown.append(logging.Formatter().format(record))
    flower_log.removeFilter(apps._without_traceback)
    assert shown[0] == "ServerApp raised an exception" and "ZeroDivisionError: a bug" in shown[1]


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
    monkeypatch.setattr("fl_attack.federation.apps.JOINING", 0.0)
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


APP = "@fl-attack/fl-attack"


@pytest.fixture
def hub(flower_home: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The same environment, with this app built and laid on a hub of our own, which speaks as Flower's does."""
    app = tmp_path / "source" / "fl-attack"
    for name in ("fl_attack", "conf"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    flower(flower_home, tmp_path / "source", "build", "--app", app)
    (fab,) = (tmp_path / "source").glob("**/*.fab")
    offered = {"/app.fab": fab.read_bytes(), "/app.zip": zipped(app)}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["app_id"] == APP
            kind = self.path.removeprefix("/hub/fetch-")
            link = f"http://127.0.0.1:{self.server.server_address[1]}/app.{kind}"
            self.answer(json.dumps({f"{kind}_url": link}).encode())

        def do_GET(self) -> None:
            self.answer(offered[self.path])

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield flower_home | {"FLWR_SUPERGRID_API_URL": f"http://127.0.0.1:{server.server_address[1]}"}
        server.shutdown()


def zipped(folder: Path) -> bytes:
    """A folder as the one thing in a zip file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return content.getvalue()


def flower(environ: dict[str, str], folder: Path, *words: object) -> str:
    """What a command of Flower's says."""
    flwr = shutil.which("flwr", path=environ["PATH"]) or "flwr"
    call = [flwr, *map(str, words)]
    done = subprocess.run(call, env=environ, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_app_from_a_hub_ends_in_the_bits_of_the_command(
    own_ray: None, hub: dict[str, str], small_data: Small, tmp_path: Path
) -> None:
    flower(hub, tmp_path, "new", APP)
    app_folder = tmp_path / "fl-attack"
    assert {"LICENSE", "pyproject.toml", "fl_attack/flower_app.py", "conf/config.yaml"} <= {
        str(file.relative_to(app_folder)) for file in app_folder.rglob("*")
    }
    overrides = [*small_data(3), "batch_size=40", "clients.total=4", "clients.malicious=1"]
    nodes = "num-supernodes=4 client-resources-num-cpus=1"
    try:
        experiment.run(compose(*overrides, "rounds=3", "attack.budget=0.5", f"out={tmp_path}/here"), federation.run)
    finally:
        ray.shutdown()
    assert len(np.load(tmp_path / "here" / "flips.npz")["round"]) > 0
    for app, out in ((app_folder, "folder"), (APP, "remote")):
        config = f'rounds=3 attack.budget=0.5 out="{tmp_path}/{out}" overrides="{" ".join(overrides)}"'
        said = flower(hub, tmp_path, "run", app, "--stream", "--federation-config", nodes, "--run-config", config)
        assert (tmp_path / out / "summary.json").exists(), said
        for name in ("model.npz", "flips.npz"):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_client_app_starts_without_what_only_servers_and_readers_need() -> None:
    ask = """
import sys
from fl_attack import flower_app
assert flower_app.client_app
print(*{"ray", "hydra", "sklearn", "torchvision", "matplotlib", "scipy"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "\n"


def context(**node: str | int) -> Context:
    return Context(run_id=1, node_id=1, node_config=dict(node), state=RecordDict(), run_config={})


def test_a_node_without_a_number_is_told_how_to_get_one() -> None:
    assert node_of(context(**{"partition-id": 3}), own=False).number == 3
    for given in ({}, {"partition-id": "first"}, {"partition-id": -1}):
        with pytest.raises(RuntimeError, match=r"partition-id=(nothing|first|-1); give each flower-supernode one"):
            node_of(context(**given), own=False)


DATA = {"data-path": "/data/mine.npz"}


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        ({"partition-id": 3}, False, (3, None, None, False)),
        ({"partition-id": "3", "malicious": "False"}, False, (3, None, None, False)),
        (DATA, True, (None, "/data/mine.npz", None, False)),
        (DATA | {"partition-id": 0, "malicious": True}, True, (0, "/data/mine.npz", None, True)),
        (DATA | {"data-loader": "npz", "malicious": "TRUE"}, True, (None, "/data/mine.npz", "npz", True)),
        (DATA | {"partition-id": "x"}, True, "started with partition-id=x; give each flower-supernode one of its own"),
        (DATA, False, "the node of data-path=/data/mine.npz has data of its own, and .*; use partition=own$"),
        (DATA | {"partition-id": 2}, False, "the node of partition-id=2 has data of its own, .*; use partition=own$"),
        (
            {"partition-id": 2},
            True,
            "partition-id=2 has no data of its own, .*; give each flower-supernode its own, as",
        ),
        ({"partition-id": 2, "malicious": "no"}, False, "partition-id=2 was started with malicious=no; it is true or"),
        (
            {"partition-id": 2, "malicious": True},
            False,
            "malicious=true, but the run draws who is malicious; use clients",
        ),
    ],
)
def test_what_a_node_was_started_with_is_read_or_refused(
    given: dict[str, str | int], own: bool, expected: tuple[object, ...] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=expected):
            node_of(context(**given), own=own)
    else:
        assert node_of(context(**given), own=own) == expected


def test_the_server_app_prints_the_summary_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[object, ...]] = []
    monkeypatch.setattr(experiment, "run", lambda *given: ran.append(given) or "the result")
    monkeypatch.setattr(results, "table", lambda result: f"the table of {result}")

    def runner(drive: object, settings: Settings) -> None:
        pass

    def make(settings: Settings) -> None:
        pass

    for given, used in (((), scenario.make), ((make,), make)):
        flower_app.main({"out": f"{tmp_path}/out", "rounds": 3}, runner, *given)  # type: ignore[arg-type]
        ((settings, *others),) = ran
        assert others == [runner, used] and isinstance(settings, Settings) and settings.rounds == 3
        assert capsys.readouterr().out == f"the table of the result\nresults in {tmp_path}/out\n"
        ran.clear()


class Answering(Nodes):
    """A grid whose nodes say that they are these clients."""

    def __init__(self, *clients: int) -> None:
        super().__init__(len(clients))
        self.clients = clients

    def send_and_receive(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = "1"
            said = wire.Introduction(self.clients[message.metadata.dst_node_id])
            yield Message(wire.introduction(said), reply_to=message)


def test_two_nodes_of_one_number_are_told_before_any_round() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as in a process of a server app
    assert introductions(Answering(1, 0), 2) == {0: 1, 1: 0}  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"3 nodes answered as clients \[0, 1, 1\].*a partition-id of its own"):
        introductions(Answering(1, 0, 1), 3)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "drawn"), [("", "clients.per_round=2"), ("--plain", "clients.per_round=null")])
def test_a_deployed_federation_ends_in_the_bytes_of_a_run_here(
    small_data: Small, tmp_path: Path, way: str, drawn: str
) -> None:
    overrides = [*small_data(3), "rounds=2", "batch_size=30", "clients.malicious=1", "attack.budget=0.5", drawn]
    overrides += ["baseline=false", "dtype=float64"]
    call = [sys.executable, ROOT / "scripts" / "deploy_demo.py", "--out", tmp_path / "there", *way.split(), *overrides]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    experiment.run(compose(*overrides, "clients.total=3", f"out={tmp_path}/here"))
    for name in ("model.npz", "flips.npz"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert len(np.load(tmp_path / "here" / "flips.npz")["round"]) > 0


@pytest.mark.slow
def test_deployed_nodes_with_files_of_their_own_end_in_the_numbers_of_the_same_shards_dealt_here(
    small_data: Small, tmp_path: Path
) -> None:
    overrides = ["rounds=2", "batch_size=30", "clients.malicious=1", "attack.knowledge=own", "attack.budget=0.5"]
    overrides += [*small_data(3), "baseline=false", "dtype=float64"]
    data = dict(np.load(tmp_path / "small3-120-0.npz"))
    users, files = np.arange(120) * 3 // 120, [tmp_path / f"node{node}.npz" for node in range(3)]
    for node, file in enumerate(files):
        np.savez(file, x_train=data["x_train"][users == node], y_train=data["y_train"][users == node])
    layout = own.layout_of(load("npz", path=tmp_path / "small3-120-0.npz"))
    order = sorted(range(3), key=lambda node: own.held(files[node], layout).fingerprint)
    moved = np.concatenate([np.flatnonzero(users == node) for node in order])
    np.savez(tmp_path / "all.npz", **(data | {key: data[key][moved] for key in ("x_train", "y_train")}))
    np.save(tmp_path / "users.npy", np.repeat(np.arange(3), 40))
    given = [f"dataset.path={tmp_path}/all.npz", "partition=given", f"partition.path={tmp_path}/users.npy"]
    experiment.run(compose(*overrides, *given, "clients.total=3", "engine=batched", f"out={tmp_path}/here"))
    (attacker,) = np.load(tmp_path / "here" / "partition.npz")["malicious"]
    names = ["--files", ",".join(map(str, files)), "--malicious", str(order[attacker])]
    call = [sys.executable, ROOT / "scripts" / "deploy_demo.py", "--own-data", *names, "--plain"]
    done = subprocess.run(
        [*call, "--out", tmp_path / "there", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    there, here = (np.load(tmp_path / name / "model.npz")["theta"] for name in ("there", "here"))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-9)
    written = [np.load(tmp_path / name / "flips.npz") for name in ("there", "here")]
    assert all(np.array_equal(written[0][key], written[1][key]) for key in ("round", "sample", "label"))
    assert len(written[0]["round"]) > 0


@pytest.mark.slow
def test_a_deployed_node_without_a_number_is_told_in_one_line(small_data: Small, tmp_path: Path) -> None:
    call = [sys.executable, ROOT / "scripts" / "deploy_demo.py", "--nodes", "2", "--ids", "0,none", "--plain"]
    done = subprocess.run(
        [*call, "--out", tmp_path / "out", *small_data(3), "batch_size=30", "clients.malicious=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 1
    assert "a node was started with partition-id=nothing; give each flower-supernode one" in done.stderr
