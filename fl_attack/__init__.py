"""Label-flipping attacks on federated learning, on Flower and Ray.

`from fl_attack import run, sweep, load`. What stands here is imported when it is asked for: the package itself
takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_attack.aggregate import PRE, RULES, Pre, Rule
    from fl_attack.api import load, run, sweep
    from fl_attack.attack import ATTACKS, Attack, Proposal, Updates, View, select
    from fl_attack.config import Settings, compose
    from fl_attack.detect import MEASURES
    from fl_attack.errors import InputError, RunError
    from fl_attack.models import MODELS, Model, logistic
    from fl_attack.plots import PLOTS
    from fl_attack.result import Result

__version__ = "0.1.0"
__all__ = [
    "ATTACKS",
    "MEASURES",
    "MODELS",
    "PLOTS",
    "PRE",
    "RULES",
    "Attack",
    "InputError",
    "Model",
    "Pre",
    "Proposal",
    "Result",
    "Rule",
    "RunError",
    "Settings",
    "Updates",
    "View",
    "__version__",
    "compose",
    "load",
    "logistic",
    "run",
    "select",
    "sweep",
]
_HOMES = {
    "aggregate": ("PRE", "RULES", "Pre", "Rule"),
    "api": ("load", "run", "sweep"),
    "attack": ("ATTACKS", "Attack", "Proposal", "Updates", "View", "select"),
    "config": ("Settings", "compose"),
    "detect": ("MEASURES",),
    "errors": ("InputError", "RunError"),
    "models": ("MODELS", "Model", "logistic"),
    "plots": ("PLOTS",),
    "result": ("Result",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public name `name`, whose module is imported now; AttributeError where there is none of that name."""
    if name not in _HOME:
        raise AttributeError(f"module 'fl_attack' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"fl_attack.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
