"""The fast path of linear models: cells that share minibatches, as a few large matrix products."""

from fl_attack.engine.linear.run import run_cells

__all__ = ["run_cells"]
