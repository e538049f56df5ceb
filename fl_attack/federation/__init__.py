"""The federation on Flower and Ray; nothing outside this package imports Flower.

What stands here is imported when it is asked for: a node of a deployed federation starts a process for each message,
and that needs the client alone, neither Ray nor a strategy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_attack.federation.apps import serve
    from fl_attack.federation.client import client_app
    from fl_attack.federation.session import Federate, Runner, check, ray_session, run
    from fl_attack.federation.tasks import scatter

__all__ = ["Federate", "Runner", "check", "client_app", "ray_session", "run", "scatter", "serve"]
_HOME = {
    "client_app": "client",
    "scatter": "tasks",
    "serve": "apps",
    **dict.fromkeys(("Federate", "Runner", "check", "ray_session", "run"), "session"),
}


def __getattr__(name: str) -> Any:
    """What the package offers under a name of `__all__`, imported on first use; AttributeError for other names."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return found
