"""A Ray that is started here is of no use to anybody else, and can be stopped at any moment of its start."""

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray
from local_ray import LocalRay, in_place_of_ray

from fl_attack.errors import InputError, Interrupted, RunError
from fl_attack.federation import private_ray, session
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
@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGINT, 0.3), (signal.SIGINT, 2.0), (signal.SIGTERM, 1.0), (signal.SIGTERM, 3.5)]
)
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


@pytest.mark.parametrize(("free", "store"), [(64 * 2**20, 200 * 2**20), (2**30 + 1, 2**29), (2**40, 2 * 2**30)])
def test_the_object_store_is_as_large_as_a_rounds_messages_need_where_memory_is_shared(
    free: int, store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    assert session._object_store() == store
    assert isinstance(session._object_store(), int)  # as Ray demands
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path / "absent")
    assert session._object_store() == 200 * 2**20


def test_ray_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "")
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    monkeypatch.setattr(session, "_refuse_unreachable", lambda address: None)
    with in_place_of_ray(LocalRay()) as local:
        with ray_session(None, verbose=False), ray_session("10.0.0.7:6379", verbose=True):  # that of the first
            assert local.running and len(local.started) == 1
            assert os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"
        assert not local.running
        with pytest.raises(ValueError, match="mine"), ray_session(None, verbose=False):
            raise ValueError("mine")
        assert not local.running
        monkeypatch.setattr(local, "init", lambda **how: refuse("no  room\n here"))
        with pytest.raises(RunError, match=r"^Ray can't be started: no room here$"), ray_session(None, False):
            pass
        with pytest.raises(RunError, match=r"^engine\.ray_address=auto can't be joined: no room here$"):
            session._init("auto", False)


def refuse(why: str) -> None:
    raise ConnectionError(why)


@pytest.mark.parametrize(("verbose", "level"), [(False, logging.CRITICAL), (True, logging.INFO)])
def test_a_ray_of_ones_own_has_no_dashboard_and_says_what_it_does_where_asked(verbose: bool, level: int) -> None:
    with in_place_of_ray(LocalRay()) as local:
        for address in (None, "10.0.0.7:6379"):
            session._init(address, verbose)
    own, joined = local.started
    assert own.pop("object_store_memory") >= session.LEAST_STORE
    said = {"logging_level": level, "log_to_driver": verbose}
    assert own == {"address": "local", "include_dashboard": False} | said
    assert joined == {"address": "10.0.0.7:6379"} | said


class Compiled:
    """What stands for the part of Ray that has read the environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[str | None, str | None]] = []
        self.Config = self.AuthenticationTokenLoader = self
        monkeypatch.setattr(private_ray, "_raylet", self)

    def initialize(self, config: str) -> None:
        assert config == ""
        self.read.append((os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")))

    def instance(self) -> "Compiled":
        return self

    def reset_cache(self) -> None:
        self.read.append((os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")))


def test_the_environment_of_a_private_ray_holds_within_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    compiled = Compiled(monkeypatch)
    monkeypatch.setattr(private_ray.ray_constants, "ENABLE_RAY_CLUSTER", True)
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    tokens = []

    def fails() -> None:
        with private_ray.private_ray():
            tokens.append(token := os.environ["RAY_AUTH_TOKEN"])
            assert [os.environ[name] for name in names] == ["token", token, "0"]
            assert not private_ray.ray_constants.ENABLE_RAY_CLUSTER
            assert len(token) == 64 and int(token, 16)  # 256 bits
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert not set(names) & set(os.environ)
        assert private_ray.ray_constants.ENABLE_RAY_CLUSTER
        assert compiled.read == [("token", tokens[-1])] * 2 + [(None, None)] * 2  # mode and token, before and after
        compiled.read.clear()
    assert len(set(tokens)) == 2
    monkeypatch.setenv(names[0], "token")
    monkeypatch.setenv(names[1], "mine")
    monkeypatch.setenv(names[2], "1")
    with private_ray.private_ray():
        assert [os.environ[name] for name in names] == ["token", "mine", "0"]
    assert [os.environ[name] for name in names] == ["token", "mine", "1"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_while_ray_starts_waits_until_it_has(
    number: signal.Signals,
    error: type[BaseException],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(session.os, "_exit", ended.append)
    steps: list[str] = []

    def start(signals: int) -> None:
        with session._signals_postponed():
            for _ in range(signals):
                steps.append("asked")
                signal.raise_signal(number)
            steps.append("started")

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    waked = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(waked)
    try:
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(error):
            start(1)
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
        with session._signals_postponed():  # and nothing is left of it
            steps.append("again")
        with pytest.raises(error):
            start(2)  # the second is obeyed at once
    finally:
        signal.signal(signal.SIGTERM, before)
    now = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(now)
    assert now == waked
    assert steps == ["asked", "started", "again", "asked", "asked"]
    assert ended == []
    said = "stopping once Ray has started; the same again stops at once\n"
    assert capfd.readouterr().err.count(said) >= 1


def test_ray_sets_no_handler_of_sigterm_while_it_starts() -> None:
    register, before = private_ray.utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    with session._signals_postponed():
        ours = signal.getsignal(signal.SIGTERM)
        private_ray.utils.set_sigterm_handler(lambda *_: sys.exit(1))
        assert signal.getsignal(signal.SIGTERM) is ours
    assert private_ray.utils.set_sigterm_handler is register
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_raised_for_sigterm_is_not_lost_to_rays_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_init", lambda *_: None)

    def terminated(number: int, frame: object) -> None:
        raise Interrupted("terminated", 128 + number)

    def run(number: signal.Signals) -> None:
        with ray_session("auto", verbose=False):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None  # as Ray does

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(Interrupted, match="terminated") as raised:
            run(signal.SIGTERM)
        assert raised.value.code == 143
        with pytest.raises(KeyboardInterrupt) as plain:
            run(signal.SIGINT)
        assert not isinstance(plain.value, Interrupted)
        assert signal.getsignal(signal.SIGTERM) is terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_without_a_handler_of_sigterm_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_init", lambda *_: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with ray_session("auto", verbose=False):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray ends its processes by the group of this program")
def test_processes_of_ray_lead_groups_that_end_with_the_block() -> None:
    popen = private_ray.services.ConsolePopen
    with private_ray.private_ray():
        parent = private_ray.services.ConsolePopen(
            ["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True
        )
        child = int(parent.stdout.readline())
        assert [os.getpgid(parent.pid), os.getpgid(child)] == [parent.pid, parent.pid]
        ended = private_ray.services.ConsolePopen(["true"])
        assert ended.wait() == 0
    assert private_ray.services.ConsolePopen is popen
    assert parent.wait(timeout=20) == -signal.SIGKILL
    assert parent.stdout.read() == ""  # which ends with the last process that could write there
    parent.stdout.close()


def test_an_abort_that_rays_compiled_code_has_set_for_sigterm_is_called_off() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with session._signals_postponed():
            signal.alarm(1000)  # as Ray does, to abort the process in a few seconds
            signal.raise_signal(signal.SIGTERM)
        assert signal.alarm(0) == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)


def test_other_threads_get_no_signals_to_postpone() -> None:
    handlers: list[object] = []

    def start() -> None:
        with session._signals_postponed():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize(("signals", "patience", "at_once"), [(1, 0.05, 60.0), (2, 60.0, 0.05)])
def test_a_signal_ends_compiled_code_that_does_not_return(
    signals: int,
    patience: float,
    at_once: float,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, over = [], threading.Event()
    monkeypatch.setattr(session.os, "_exit", lambda code: (ended.append(code), over.set()))
    monkeypatch.setattr(session, "PATIENCE", patience)
    monkeypatch.setattr(session, "AT_ONCE", at_once)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with session._signals_end_compiled_code():
            signal.raise_signal(signal.SIGUSR1)  # is none of them
            assert not over.wait(0.1)
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
            assert over.wait(20)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended == [128 + signal.SIGTERM]
    assert capfd.readouterr().err.splitlines() == [
        "stopping once Ray has started; the same again stops at once",
        "fl-attack: interrupted while Ray was starting",
    ]


def test_an_address_at_which_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, int], float]] = []

    def connect(address: tuple[str, int], timeout: float) -> object:
        asked.append((address, timeout))
        if address[1] == 1:
            raise OSError("refused")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(session.socket, "create_connection", connect)
    for address in (None, "auto", "local", "ray://head:10001", "10.0.0.7:6379"):
        session._refuse_unreachable(address)
    assert [address for address, _ in asked] == [("head", 10001), ("10.0.0.7", 6379)]
    assert all(0 < timeout < 60 for _, timeout in asked)
    with (
        pytest.raises(InputError, match=r"^engine\.ray_address=here:1 can't be joined \(refused\); give the host:port"),
        ray_session("here:1", verbose=False),
    ):
        pass
