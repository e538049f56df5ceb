"""Running federations: the Ray session, and the two grids over it."""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_attack import attack
from fl_attack.config import Settings
from fl_attack.errors import InputError, RunError, one_line
from fl_attack.federation.apps import wait_for
from fl_attack.federation.client import client_app
from fl_attack.federation.grid import BlockGrid
from fl_attack.federation.private_ray import handlers_untouched, private_ray
from fl_attack.federation.strategy import make_strategy, start
from fl_attack.history import Recorder
from fl_attack.scenario import Scenario
from fl_attack.waiting import waiting

Federate = Callable[[Recorder], None]  # runs one federation, and leaves its history in the recorder
Drive = Callable[[Federate], None]  # uses what runs one federation, as often as it likes
Runner = Callable[[Drive, Settings], None]  # brings clients up, and gives `Drive` what runs a federation on them
PATIENCE, AT_ONCE = 50.0, 5.0  # seconds that Ray has to start after a first Ctrl-C, Python to obey after a second
# less than the minute after which compiled code of Ray's ends the process on its own
LEAST_STORE, MOST_STORE = 200 * 2**20, 2 * 2**30  # bytes of the object store, through which only messages pass
SHARED_MEMORY = Path("/dev/shm")


def _object_store() -> int:
    """The bytes of shared memory that Ray's object store may use; what a round's messages have beyond goes to disk."""
    # five thousand clients of ten classes send 300 MB a round, which take eight times as long by way of the disk
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return max(LEAST_STORE, min(MOST_STORE, free // 2))


def check(scenario: Scenario) -> None:
    """Raise InputError where strategy, attack or client device can't be used; cheap, to be called before Ray starts.

    Flower's log is silenced from now on, unless the settings are `verbose`.
    """
    engine = scenario.settings.engine
    if engine.client_device == "cuda" and not engine.ray_address and not torch.cuda.is_available():
        raise InputError("engine.client_device=cuda needs a GPU, but this machine has none; use cpu")
    if not scenario.settings.verbose:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
    make_strategy(scenario)
    attack.try_args(scenario.settings.attack.name, scenario.settings.attack.args, scenario.classes)


def run(drive: Drive, settings: Settings, app: ClientApp = client_app) -> None:
    """Start Ray and a grid of clients, and let `drive` run one federation after the other on it.

    Parameters
    ----------
    drive : callable
        Gets a function that runs a federation, given its recorder.
    settings : Settings
        What the federations have in common: the number of clients, and the engine.
    app : ClientApp
        The app that each client runs.

    Raises
    ------
    InputError
        Where nothing listens at `engine.ray_address`, or the cluster has no GPU for `engine.client_device=cuda`.
    RunError
        Where Ray can't be started or joined, or not as many nodes come up as there are clients.
    """
    engine, clients = settings.engine, settings.clients.total
    with ray_session(engine.ray_address, settings.verbose):
        cpus = ray.cluster_resources().get("CPU", 1.0)
        actors = min(engine.actors or max(1, int(cpus)), clients)
        cpus_each = _share(cpus, actors)
        gpus_each = 0.0 if engine.client_device == "cpu" else _share(_gpus(), actors)
        if engine.grid == "stock":

            def on_nodes(grid: Grid) -> None:
                wait_for(grid, clients)  # on a busy machine they come up after the server has started
                drive(partial(start, grid))

            simulate(on_nodes, clients, cpus_each, gpus_each, app)
        else:
            with BlockGrid(app, clients, actors, cpus_each, gpus_each) as grid:
                drive(partial(start, grid))


def _share(resources: float, actors: int) -> float:
    """What each of the actors gets of a resource, at most 1, rounded down to ten-thousandths, in which Ray counts."""
    return int(min(1.0, resources / actors) * 1e4) / 1e4


def _gpus() -> float:
    """The number of GPUs of the Ray cluster; InputError where it has none."""
    gpus = float(ray.cluster_resources().get("GPU", 0.0))
    if not gpus:
        raise InputError("engine.client_device=cuda needs a GPU, but the Ray cluster has none; use cpu")
    return gpus


@contextmanager
def ray_session(address: str | None, verbose: bool) -> Iterator[None]:
    """A block in which there is Ray, which is left as it was found.

    Parameters
    ----------
    address : str or None
        The cluster to join; None starts Ray here, for this machine alone. Not looked at where this process has Ray.
    verbose : bool
        Whether Ray prints what it does.

    Raises
    ------
    InputError
        Where nothing listens at the address.
    RunError
        Where Ray can't be started or joined.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray about GPUs
    if ray.is_initialized():
        yield
        return
    _refuse_unreachable(address)
    with ExitStack() as around:
        if not address:
            around.enter_context(private_ray())
        around.callback(ray.shutdown)  # does nothing where there is none
        _init(address, verbose)
        with _signals_keep_their_errors():
            yield


def _init(address: str | None, verbose: bool) -> None:
    """Start Ray, or join it at `address`; RunError where that fails."""
    # without "local", Ray would join whatever cluster was last started on this machine
    local = {"address": "local", "include_dashboard": False, "object_store_memory": _object_store()}
    level = logging.INFO if verbose else logging.CRITICAL
    try:
        with waiting(f"joining Ray at {address}" if address else "starting Ray"), _signals_postponed():
            ray.init(**({"address": address} if address else local), logging_level=level, log_to_driver=verbose)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"engine.ray_address={address} can't be joined" if address else "Ray can't be started"
        raise RunError(f"{where}: {one_line(error)}") from None


@contextmanager
def _signals_postponed() -> Iterator[None]:
    """Within the block a first SIGINT or SIGTERM waits for its end, `PATIENCE` at most; a second is obeyed at once."""
    # Ray loses an exception that comes while it calls back into Python, and would leave processes that it was just
    # starting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1 and callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        with _signals_end_compiled_code(), handlers_untouched():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _signals_keep_their_errors() -> Iterator[None]:
    """Within the block what the handler of SIGTERM raises comes through; Ray would raise KeyboardInterrupt instead."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    raised: list[BaseException] = []

    def note(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    signal.signal(signal.SIGTERM, note)
    try:
        yield
    except KeyboardInterrupt:
        if raised:
            raise raised[0] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _signals_end_compiled_code() -> Iterator[None]:
    """Within the block a SIGINT or SIGTERM ends the process even if compiled code does not return, after a while.

    After the first that is `PATIENCE` seconds, for Ray to start; after a second one `AT_ONCE`, for Python to obey.
    """
    # Python calls its handlers between its own steps only; the byte of a signal is written whatever it does
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        number = 0
        with suppress(TimeoutError):
            for again in (False, True):
                while (byte := reader.recv(1)) and byte[0] not in (signal.SIGINT, signal.SIGTERM):
                    pass
                if not byte:  # Ray has started
                    return
                number = byte[0]
                if sys.platform != "win32":
                    signal.alarm(0)  # compiled code of Ray's answers SIGTERM with one that aborts, in three seconds
                if not again:
                    print("stopping once Ray has started; the same again stops at once", file=sys.stderr)
                    reader.settimeout(PATIENCE)
            reader.settimeout(AT_ONCE)  # for Python to obey
            while reader.recv(1):
                pass
            return
        print("fl-attack: interrupted while Ray was starting", file=sys.stderr)
        os._exit(128 + number)  # Ray's processes end with the one that started them

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watching.join()
        reader.close()


def _refuse_unreachable(address: str | None) -> None:
    """Raise InputError where nothing listens at the host and port of a Ray address; one without a port is let pass."""
    # Ray itself tries for minutes
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"engine.ray_address={address} can't be joined ({error}); give the host:port of a running Ray cluster, "
            "or auto for the one on this machine"
        ) from None


def simulate(drive: Callable[[Grid], None], clients: int, cpus_each: float, gpus_each: float, app: ClientApp) -> None:
    """Run a function on the grid of Flower's own simulation engine, which is unchanged.

    Parameters
    ----------
    drive : callable
        A function of the grid.
    clients : int
        The number of nodes of the grid.
    cpus_each, gpus_each : float
        What Ray sets aside for each client that trains, in processors and in GPUs.
    app : ClientApp
        The app that each node runs.
    """
    from flwr.simulation import run_simulation  # marked deprecated: this is the only place that calls it

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        drive(grid)

    config: Any = {"client_resources": {"num_cpus": cpus_each, "num_gpus": gpus_each}}
    run_simulation(server_app, app, clients, backend_config=config)
