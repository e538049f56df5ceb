"""The batched engine: experiments without clients, those of a linear model as a few large matrix products."""

from fl_attack.engine.groups import check, group, group_key, make_scenarios, memory_of
from fl_attack.engine.outcome import Outcome
from fl_attack.engine.run import cells_at_once, is_linear, run_cells

__all__ = [
    "Outcome",
    "cells_at_once",
    "check",
    "group",
    "group_key",
    "is_linear",
    "make_scenarios",
    "memory_of",
    "run_cells",
]
