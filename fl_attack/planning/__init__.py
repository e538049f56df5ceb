"""Flips planned over many rounds: optimal control of the training by forward-backward sweeps, on arrays alone."""

from fl_attack.planning.adjoint import Costate, pull_back_step
from fl_attack.planning.derivatives import Derivatives, General, Linear, derivatives_of
from fl_attack.planning.sweeps import Access, Batch, Found, Labels, Problem, State, Sweeps, Trajectory, chosen_labels

__all__ = [
    "Access",
    "Batch",
    "Costate",
    "Derivatives",
    "Found",
    "General",
    "Labels",
    "Linear",
    "Problem",
    "State",
    "Sweeps",
    "Trajectory",
    "chosen_labels",
    "derivatives_of",
    "pull_back_step",
]
