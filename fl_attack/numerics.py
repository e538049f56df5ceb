"""Versions of what computes the numbers: they are in every key under which numbers are kept and found again."""

import numpy as np
import torch

from fl_attack import __version__

NUMERICS = 6  # to be raised when a change of the code changes the numbers of a run, or a target
OF_RULES = 4  # likewise, of a run whose server sees what each client sends
WITH_OTHERS = 2  # likewise, of plans, of rules that see more than updates, and of attackers who adapt


def versions() -> str:
    """The versions of this package, of `NUMERICS` and of the libraries that all numbers depend on, in one text."""
    return f"{__version__}/{NUMERICS}/{torch.__version__}/{np.__version__}"
