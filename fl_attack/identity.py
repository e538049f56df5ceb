"""What the numbers of an experiment depend on: the key under which they are kept and found again."""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fl_attack import adaptive, aggregate, numerics, plugins
from fl_attack.config import Settings
from fl_attack.scenario import Scenario

OTHERS_RULES = {"flower": "flwr", "byzfl": "byzfl"}  # the package whose rules a strategy is
# what changes no number
NOT_NUMBERS = {"out", "overwrite", "resume", "verbose", "baseline", "report", "tracker"}
NOT_NUMBERS |= {"launcher", "workers", "figures", "objective"}
# nor, where the fingerprint of the data is known, does the place of these, nor the cluster
ON_DATA: Mapping[str, bool | set[str]] = {
    **dict.fromkeys(NOT_NUMBERS, True),
    "dataset": {"root", "path"},
    "partition": {"path"},
    "engine": {"ray_address"},
}


def twin_key(settings: Settings) -> str:
    """The settings that an experiment and its unattacked twin have in common, in JSON."""
    return settings.model_dump_json(exclude={"attack", *NOT_NUMBERS})


def key_of(scenarios: Sequence[Scenario]) -> str:
    """A hash, 32 hexadecimal digits, of all that the numbers of these cells depend on, with versions of libraries."""
    parts = [numerics.versions()]
    for scenario in scenarios:
        target = scenario.settings.attack.target_path
        own = hashlib.sha256(Path(target).read_bytes()).hexdigest() if target else ""
        settings = scenario.settings
        own += "".join(map(plugins.source_digest, (settings.attack.name, settings.strategy.name, settings.model.name)))
        own += plugins.source_digest(settings.attack.direction or "") + _version_of_strategy(settings)
        if settings.partition.path is not None or settings.partition.name == "hf":
            own += hashlib.sha256(scenario.partition.client.tobytes()).hexdigest()
        if not settings.strategy.averages or settings.attack.writes == "updates" or settings.detectability:
            own += str(numerics.OF_RULES)
        planned = settings.attacked and settings.attack.plans
        if planned or adaptive.searches(scenario) or aggregate.sees(settings.strategy.name):
            own += f"/{numerics.WITH_OTHERS}"
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
    return _digest(
        [str(numerics.NUMERICS), fingerprint, *(one.model_dump_json(exclude=ON_DATA) for one in all_settings)], 16
    )


def _version_of_strategy(settings: Settings) -> str:
    """The version of the package that has the rule, and a hash of the user's file; empty for rules of this package."""
    strategy = settings.strategy
    if strategy.name not in OTHERS_RULES:
        return ""
    found = importlib.metadata.version(OTHERS_RULES[strategy.name])
    spec = importlib.util.find_spec(strategy.path.rpartition(".")[0]) if strategy.path else None
    if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
        found += hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    return found


def _digest(parts: Iterable[str], length: int) -> str:
    """A hash of texts in their order, in this many hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:length]
