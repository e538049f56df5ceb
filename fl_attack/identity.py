"""What the numbers of an experiment depend on: the key under which they are kept and found again."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fl_attack import __version__, adaptive, aggregate, plugins
from fl_attack.config import Settings
from fl_attack.scenario import Scenario

NUMERICS = 6  # to be raised when a change of the code changes the numbers of a run
OF_RULES = 4  # likewise, of a run whose server sees what each client sends
WITH_OTHERS = 2  # likewise, of plans, of rules that see more than updates, and of attackers who adapt
# what changes no number
NOT_NUMBERS = {"out", "overwrite", "resume", "verbose", "baseline", "report", "tracker"}
NOT_NUMBERS |= {"launcher", "workers", "figures", "objective"}
# nor, where the fingerprint of the data is known, does the place of these
ON_DATA: Mapping[str, bool | set[str]] = {
    **dict.fromkeys(NOT_NUMBERS, True),
    "dataset": {"root", "path"},
    "partition": {"path"},
}


def twin_key(settings: Settings) -> str:
    """The settings that an experiment and its unattacked twin have in common, in JSON."""
    return settings.model_dump_json(exclude={"attack", *NOT_NUMBERS})


def key_of(scenarios: Sequence[Scenario]) -> str:
    """A hash, 32 hexadecimal digits, of all that the numbers of these cells depend on, with versions of libraries."""
    parts = [f"{__version__}/{NUMERICS}/{torch.__version__}/{np.__version__}"]
    for scenario in scenarios:
        target = scenario.settings.attack.target_path
        own = hashlib.sha256(Path(target).read_bytes()).hexdigest() if target else ""
        of_users = scenario.settings.attack.name, scenario.settings.strategy.name, scenario.settings.model.name
        own += "".join(map(plugins.source_digest, of_users))
        settings = scenario.settings
        if settings.partition.path is not None:
            own += hashlib.sha256(scenario.partition.client.tobytes()).hexdigest()
        if not settings.strategy.averages or settings.attack.writes == "updates" or settings.detectability:
            own += str(OF_RULES)
        planned = settings.attacked and settings.attack.plans
        if planned or adaptive.searches(scenario) or aggregate.sees(settings.strategy.name):
            own += f"/{WITH_OTHERS}"
        parts += [scenario.settings.model_dump_json(exclude=ON_DATA), scenario.dataset.fingerprint, own]
    return _digest(parts, 32)


def key_of_grid(fingerprint: str, all_settings: Iterable[Settings]) -> str:
    """A hash of the settings of a grid, for the name of its folder: without versions of libraries, unlike `key_of`.

    Parameters
    ----------
    fingerprint : str
        The fingerprint of the data set that all cells share.
    all_settings : iterable of Settings
        The settings of each cell.

    Returns
    -------
    str
        16 hexadecimal digits, others with any other setting that a number depends on; but of `partition.path` neither
        the name nor what the file holds counts, of `attack.target_path` the name alone.
    """
    return _digest([str(NUMERICS), fingerprint, *(one.model_dump_json(exclude=ON_DATA) for one in all_settings)], 16)


def _digest(parts: Iterable[str], length: int) -> str:
    """A hash of texts in their order, in this many hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:length]
