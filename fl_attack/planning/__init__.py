"""Flips planned over many rounds: optimal control of the training by forward-backward sweeps, on arrays alone."""

from fl_attack.planning.adjoint import Costate, pull_back_step
from fl_attack.planning.derivatives import Derivatives, General, Linear, derivatives_of
from fl_attack.planning.sweeps import (
    Labels,
    Minibatch,
    Problem,
    SweepResult,
    Sweeps,
    TrainingState,
    Trajectory,
    WriteAccess,
    chosen_labels,
)

__all__ = [
    "Costate",
    "Derivatives",
    "General",
    "Labels",
    "Linear",
    "Minibatch",
    "Problem",
    "SweepResult",
    "Sweeps",
    "TrainingState",
    "Trajectory",
    "WriteAccess",
    "chosen_labels",
    "derivatives_of",
    "pull_back_step",
]
