"""The batched engine: experiments without clients, those of a linear model as a few large matrix products."""

from fl_attack.engine.groups import check, group, group_key, make_scenarios
from fl_attack.engine.outcome import Outcome
from fl_attack.engine.run import run_cells

__all__ = ["Outcome", "check", "group", "group_key", "make_scenarios", "run_cells"]
