"""A Ray of our own that nobody else can use: it listens on this machine alone, and wants a token.

Ray offers both by variables of the environment that it reads when it is imported, which here is long before it
starts; so what it has read is set anew. The names that Ray does not document are used here and nowhere else, and a test
looks at what listens.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.ray_constants as ray_constants  # undocumented
from ray import _raylet  # undocumented

# Ray takes the address of this machine in its network wherever it may become a cluster, even for a Ray started as
# "local"; on Windows and macOS, where the firewall would ask, it takes the loopback address unless this is set
BECOMES_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"  # https://docs.ray.io/en/latest/ray-security/token-auth.html


@contextmanager
def private_ray() -> Iterator[None]:
    """Within the block a Ray that starts listens on the loopback address alone and answers who has a new token.

    Its processes, and programs started from this one, inherit the token. An authentication that the user has chosen
    (`RAY_AUTH_MODE`) stays as it is.
    """
    chosen = {BECOMES_CLUSTER: "0"}
    if MODE not in os.environ:
        chosen |= {MODE: "token", TOKEN: secrets.token_hex(32)}
    before, becomes_cluster = {name: os.environ.get(name) for name in chosen}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(chosen)
    ray_constants.ENABLE_RAY_CLUSTER = False
    read_anew()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        ray_constants.ENABLE_RAY_CLUSTER = becomes_cluster
        read_anew()


def read_anew() -> None:
    """Have Ray read the mode and the token from the environment."""
    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
