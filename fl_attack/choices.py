"""The settings that are one of a few words; imports nothing, so that a wrong one is reported at once."""

from typing import Literal

Goal = Literal["untargeted", "targeted"]
Knowledge = Literal["full", "honest", "noisy", "own"]
Scope = Literal["pooled", "per_client"]
Rounding = Literal["floor", "carry", "ceil"]
Refresh = Literal["step", "epoch"]
Selection = Literal["gain", "literal"]
Optimizer = Literal["sgd", "momentum", "adam"]
LrSchedule = Literal["constant", "cosine", "step", "inverse"]
Memory = Literal["forget", "persist", "persist_total"]
Adapt = Literal["none", "rule"]
Objective = Literal["final", "average"]
Foresight = Literal["known", "simulated"]
