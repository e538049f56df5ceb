"""Flips planned over many rounds: optimal control of the training by forward-backward sweeps, on arrays alone."""

from fl_attack.planning.adjoint import Costate, pull_back_step
from fl_attack.planning.derivatives import Derivatives, General, Linear, derivatives_of
from fl_attack.planning.objective import smoothed_error, smoothed_error_residuals
from fl_attack.planning.sweeps import Access, Batch, Found, Problem, State, Sweeps, Trajectory

__all__ = [
    "Access",
    "Batch",
    "Costate",
    "Derivatives",
    "Found",
    "General",
    "Linear",
    "Problem",
    "State",
    "Sweeps",
    "Trajectory",
    "derivatives_of",
    "pull_back_step",
    "smoothed_error",
    "smoothed_error_residuals",
]
