"""A Ray that is started here is of no use to anybody else, and can be stopped at any moment of its start."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray

from fl_attack.federation import session
from fl_attack.federation.private_ray import read_anew
from fl_attack.federation.session import ray_session

Small = Callable[..., list[str]]
LISTENING = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # as /proc writes it

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc, as Linux has it")


def with_mark(mark: str) -> list[Path]:
    """The processes in whose environment a mark stands."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(process)
        except OSError:  # somebody else's, or gone
            continue
    return found


def listens_at(processes: list[Path]) -> dict[str, str]:
    """The addresses at which processes listen, each with the program's name."""
    sockets = {}
    for process in processes:
        for file in (process / "fd").glob("*"):
            try:
                sockets[os.readlink(file)] = (process / "comm").read_text().strip()
            except OSError:
                continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {
        line[1]: sockets[f"socket:[{line[9]}]"]
        for line in lines
        if line[3] == LISTENING and f"socket:[{line[9]}]" in sockets
    }


def answer(address: str, token: str | None) -> grpc.StatusCode:
    """The code with which Ray's control service answers a question."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=20, metadata=[("authorization", f"Bearer {token}")] if token else [])
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_ray_listens_to_this_machine_alone_and_wants_a_token(own_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FL_ATTACK_TEST_MARK", mark)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    tokens = set()
    for _ in range(2):  # the second of a process is as closed as the first
        with ray_session(None, verbose=False):
            assert ray.get(ray.remote(lambda: 7).remote()) == 7
            tokens.add(token := os.environ["RAY_AUTH_TOKEN"])
            at = listens_at([*with_mark(mark), Path("/proc/self")])
            assert {"gcs_server", "raylet"} <= set(at.values())
            assert {address.partition(":")[0] for address in at} <= LOOPBACK, at
            address = ray.get_runtime_context().gcs_address
            assert answer(address, None) == answer(address, "0" * 64) == grpc.StatusCode.UNAUTHENTICATED
            assert answer(address, token) == grpc.StatusCode.OK
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} & set(os.environ)
    assert len(tokens) == 2


@pytest.fixture
def chosen_token(own_ray: None) -> Iterator[str]:
    """A token that the user has chosen; Ray has forgotten it when the next one of this process starts."""
    token = "1" * 64
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", token)
        yield token
    read_anew()


@pytest.mark.ray
def test_an_authentication_that_the_user_has_chosen_stays(chosen_token: str) -> None:
    with ray_session(None, verbose=False):
        assert answer(ray.get_runtime_context().gcs_address, chosen_token) == grpc.StatusCode.OK
    assert os.environ["RAY_AUTH_TOKEN"] == chosen_token


HANGING = """
import ctypes, sys, time
import ray
from fl_attack import __main__
from fl_attack.federation import session

def hang(**_):
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    print("hanging", file=sys.stderr, flush=True)
    lock(mutex), lock(mutex) if {in_c} else time.sleep(1000)

ray.init = hang
session.PATIENCE, session.AT_ONCE = {patience}, 0.5
__main__.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("in_c", "patience", "signals"), [(True, 1000, 2), (True, 0.5, 1), (False, 1000, 2)])
def test_a_start_of_ray_that_hangs_is_ended_by_ctrl_c(
    small_data: Small, tmp_path: Path, in_c: bool, patience: float, signals: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(in_c=in_c, patience=patience), *small_data(2), "batch_size=full"],
        cwd=tmp_path,
        env=os.environ | {"HYDRA_FULL_ERROR": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    stderr = ""
    for word in ("hanging", "the same again stops at once")[:signals]:
        stderr += "".join(itertools.takewhile(lambda line, word=word: word not in line, process.stderr))
        process.send_signal(signal.SIGINT)
    stderr += process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("fl-attack: interrupted")
    assert "Traceback" not in stderr


@pytest.mark.ray
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 0.3), (signal.SIGINT, 2.0), (signal.SIGTERM, 1.0)])
def test_ctrl_c_ends_the_start_of_ray_at_any_moment(
    small_data: Small, tmp_path: Path, number: signal.Signals, after: float
) -> None:
    mark = uuid.uuid4().hex
    run = [*small_data(2), f"out={tmp_path}/o", "rounds=1000000", "eval_every=1000", "batch_size=full"]
    said = tmp_path / "said"  # no pipe, which would stay open as long as any process of Ray
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "fl_attack", *run],
            env=os.environ | {"FL_ATTACK_TEST_MARK": mark, "HYDRA_FULL_ERROR": "0"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    deadline = time.monotonic() + 60
    while "starting Ray" not in said.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(after)  # seconds
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(timeout=60) == 128 + number, said.read_text()
    message = said.read_text()
    assert message.splitlines()[-1].startswith("fl-attack: ")
    assert "Traceback" not in message
    deadline = time.monotonic() + 20
    while (left := with_mark(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


@pytest.mark.parametrize(
    ("address", "told"), [(None, "starting Ray"), ("10.0.0.7:6379", "joining Ray at 10.0.0.7:6379")]
)
def test_the_line_of_the_wait_tells_a_ray_of_its_own_from_one_that_is_joined(
    address: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(session, "waiting", lambda text: lines.append(text) or contextlib.nullcontext())
    monkeypatch.setattr(ray, "init", lambda **how: calls.append(how))
    session._init(address, False)
    assert lines == [told]
    assert [how["address"] for how in calls] == [address or "local"]


@pytest.mark.parametrize(("free", "store"), [(64 * 2**20, 200 * 2**20), (2**30, 2**29), (2**40, 2 * 2**30)])
def test_the_object_store_is_as_large_as_a_rounds_messages_need_where_memory_is_shared(
    free: int, store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    assert session._object_store() == store
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path / "absent")
    assert session._object_store() == 200 * 2**20
