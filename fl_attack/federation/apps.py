"""The server app for `flwr run`, on the grid that Flower gives it: of a simulation, or of nodes that are deployed."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_attack.config import Settings
from fl_attack.errors import InputError, RunError

if TYPE_CHECKING:
    from fl_attack.federation.session import Drive, Runner
    from fl_attack.scenario import Scenario

    Make = Callable[[Settings], Scenario]

JOINING = 60.0  # seconds that Flower's nodes have to come up


def serve(main: "Callable[[dict[str, Any], Runner, Make], None]") -> ServerApp:
    """A server app for `flwr run`.

    Parameters
    ----------
    main : callable
        What the app does. It gets the run's configuration, a dict; a `session.Runner`, which runs federations on
        Flower's grid; and a function that gives the scenario of settings, which with `partition=own` asks the nodes
        what they hold. Both functions may raise InputError or RunError.

    Returns
    -------
    ServerApp
    """
    server_app = ServerApp()

    @server_app.main()
    def on_grid(grid: Grid, context: Context) -> None:
        # not where only the client app is wanted
        from fl_attack import scenario
        from fl_attack.federation.nodes import introductions, with_own_data
        from fl_attack.federation.strategy import start

        client_of: dict[int, int] = {}

        def make(settings: Settings) -> "Scenario":
            if settings.partition.name != "own":
                return scenario.make(settings)
            wait_for(grid, settings.clients.total)
            found, numbers = with_own_data(grid, settings)
            client_of.update(numbers)
            return found

        def runner(drive: "Drive", settings: Settings) -> None:
            if not client_of:
                wait_for(grid, settings.clients.total)
                # nodes with a wrong partition-id are reported before any round
                client_of.update(introductions(grid, settings.clients.total))
            drive(partial(start, grid, client_of=client_of))

        with _ended_as_flower_expects():
            main(dict(context.run_config), runner, make)

    return server_app


@contextmanager
def _ended_as_flower_expects() -> Iterator[None]:
    """A block whose SystemExit ends an app at once, and without a traceback, in a simulation and on deployed nodes.

    A simulation runs the app in a thread, which SystemExit ends quietly; of any other error Flower shows more than the
    line that was printed. On the main thread of a deployed app SystemExit would pass by what tells the SuperLink that
    the run has failed, and whoever waits for the run would wait another minute for a heartbeat.
    """
    try:
        yield
    except SystemExit as end:
        if threading.current_thread() is not threading.main_thread() or end.__cause__ is None:
            raise
        logging.getLogger("flwr").addFilter(_without_traceback)
        raise end.__cause__ from None


def _without_traceback(record: logging.LogRecord) -> bool:
    """True, for every record; one on an error with a message for users loses its traceback."""
    if record.exc_info and isinstance(record.exc_info[1], InputError | RunError):
        record.exc_info = None
    return True


def wait_for(grid: Grid, clients: int) -> None:
    """Wait until the grid has as many nodes as there are clients, for at most `JOINING` seconds.

    Parameters
    ----------
    grid : Grid
        The grid of nodes that Flower gives the server app.
    clients : int
        How many clients the experiment has.

    Raises
    ------
    RunError
        Where the grid ends up with another number of nodes.
    """
    deadline = time.monotonic() + JOINING
    while (nodes := len(list(grid.get_node_ids()))) < clients and time.monotonic() < deadline:
        time.sleep(0.1)
    if nodes != clients:
        raise RunError(
            f"the federation has {nodes} nodes, but the experiment {clients} clients; start it with "
            f"--federation-config 'num-supernodes={clients}' or change clients.total"
        )
