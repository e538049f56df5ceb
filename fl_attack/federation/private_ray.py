"""A Ray of our own that nobody else can use: it listens on this machine alone, wants a token, and ends with its block.

Ray offers the first two by variables of the environment that it reads when it is imported, which here is long before it
starts; so what it has read is set anew. The names that Ray does not document are used here and nowhere else, and tests
look at what listens and at what is left.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray._private.ray_constants as ray_constants  # undocumented
from ray import _raylet  # undocumented
from ray._private import services, utils  # undocumented

# Ray takes the address of this machine in its network wherever it may become a cluster, even for a Ray started as
# "local"; on Windows and macOS, where the firewall would ask, it takes the loopback address unless this is set
BECOMES_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"  # https://docs.ray.io/en/latest/ray-security/token-auth.html


@contextmanager
def private_ray() -> Iterator[None]:
    """Within the block a Ray that starts listens on the loopback address alone and answers who has a new token.

    Its processes, and programs started from this one, inherit the token. An authentication that the user has chosen
    (`RAY_AUTH_MODE`) stays as it is. What is left of its processes at the end of the block is killed.
    """
    chosen = {BECOMES_CLUSTER: "0"}
    if MODE not in os.environ:
        chosen |= {MODE: "token", TOKEN: secrets.token_hex(32)}
    before, becomes_cluster = {name: os.environ.get(name) for name in chosen}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(chosen)
    ray_constants.ENABLE_RAY_CLUSTER = False
    read_anew()
    try:
        with _groups_of_its_own():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        ray_constants.ENABLE_RAY_CLUSTER = becomes_cluster
        read_anew()


@contextmanager
def _groups_of_its_own() -> Iterator[None]:
    """Within the block each program that Ray starts leads a process group, which is killed at the end of the block.

    So a signal to the group of this program, as a terminal or `timeout` sends it, ends a run that still has its Ray.
    """
    if sys.platform != "linux":  # elsewhere Ray ends the group of this program where that was killed
        yield
        return
    # Ray's agents look for the program that started them, and for a minute if its control service is gone as well
    groups: list[int] = []
    starter: Any = services
    popen = starter.ConsolePopen

    def start(*command: Any, **how: Any) -> "subprocess.Popen[bytes]":
        process: subprocess.Popen[bytes] = popen(*command, **how, process_group=0)
        groups.append(process.pid)
        return process

    starter.ConsolePopen = start
    try:
        yield
    finally:
        starter.ConsolePopen = popen
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@contextmanager
def handlers_untouched() -> Iterator[None]:
    """Within the block Ray sets no handler of SIGTERM; its own ends the program, with Ray half started."""
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler


def read_anew() -> None:
    """Have Ray read the mode and the token from the environment."""
    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
