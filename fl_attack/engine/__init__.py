"""The batched engine: experiments without clients, those of a linear model as a few large matrix products.

A cell is one experiment of those that run together. Cells of a linear model are cut into chunks that fit in memory,
chunks into blocks that take a step together, and blocks into tiles whose attackers choose together; see
`linear.tiling`. Cells of dense layers are cut into stacks, see `stacked`; others run one by one, see `sequential`.
"""

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
