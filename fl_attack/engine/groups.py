"""Which experiments can be run together: those that see the same minibatch of the same samples in every round."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fl_attack import attack, data, scenario
from fl_attack.config import Settings
from fl_attack.errors import InputError
from fl_attack.scenario import Scenario

HELD = 4  # copies of the parameters of a cell: with those of the optimizer, the gradient and its parts


def check(chosen: Scenario) -> None:
    """Raise InputError where this engine can't run the experiment, or not on this machine."""
    device = chosen.settings.engine.device
    if torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise InputError(f"engine.device={device} is not there: {torch.cuda.device_count()} CUDA devices; use cpu")
    if chosen.settings.strategy.name == "flower":
        raise InputError("strategy=flower is not known to engine=batched; use engine=flower, or a built-in rule")
    chosen.rule()
    attack.try_args(chosen.settings.attack.name, chosen.settings.attack.args, chosen.classes)


def group_key(chosen: Scenario) -> Hashable:
    """The key of experiments that can run together: equal where model, minibatches, precision and evaluations are."""
    settings = chosen.settings
    return (
        chosen.dataset.fingerprint,
        _digest(_Same(chosen.dataset.y_train)),
        _digest(_Same(chosen.partition.client)),
        settings.clients.total,
        settings.model.model_dump_json(),
        settings.worker_momentum > 0,  # such cells are not those of the linear fast path
        settings.seed,
        settings.batch_size,
        settings.local_steps,
        settings.rounds,
        settings.eval_every,
        settings.dtype,
        settings.per_round,
    )


def needs_own_history(cell: Scenario) -> bool:
    """Whether an attack plans, leaves its flips in the data, or sets `attack.direction`: most such cells run alone.

    Those of a linear model who plan do not, see `run.is_linear`.
    """
    threat = cell.settings.attack
    return cell.settings.attacked and (threat.plans or threat.remembers or threat.direction is not None)


def group(scenarios: Sequence[Scenario]) -> list[list[int]]:
    """The positions of the scenarios, one list for each `group_key`, in the order in which the keys first appear."""
    members: dict[Hashable, list[int]] = {}
    for i, chosen in enumerate(scenarios):
        members.setdefault(group_key(chosen), []).append(i)
    return list(members.values())


def memory_of(cells: Sequence[Scenario]) -> int:
    """Roughly the bytes that cells of one group hold, at most `engine.memory_gb`: samples, and copies of parameters."""
    cell = cells[0]
    size = cell.settings.torch_dtype.itemsize
    samples = (len(cell.dataset.y_train) + len(cell.dataset.y_test)) * cell.dataset.x_train[0].size * size
    parameters = len(cells) * cell.theta_shape[0] * cell.theta_shape[1] * size
    return int(min(samples + HELD * parameters, cell.settings.engine.memory_gb * 2**30))


def make_scenarios(all_settings: Iterable[Settings], verify: bool = True) -> list[Scenario]:
    """The scenarios of settings; those that have data, partition and schedule in common share them.

    Parameters
    ----------
    all_settings : iterable of Settings
        The settings of each cell.
    verify : bool
        Whether the files of data sets are compared with their known sums.

    Returns
    -------
    list of Scenario
        In the order of the settings, each as `scenario.of` gives it.

    Raises
    ------
    InputError
        Where data can't be had, or can't be split as asked, or the model or the trusted samples can't be had.
    """
    templates: dict[str, Scenario] = {}
    loaded: dict[str, data.Dataset] = {}  # once: to see that a folder of images has not changed is a matter of seconds
    kept = {"dataset", "partition", "clients", "seed", "batch_size", "local_steps", "early_stop", "model"}
    scenarios = []
    for settings in all_settings:
        key = settings.model_dump_json(include=kept)
        wanted = settings.dataset.model_dump_json()
        if wanted not in loaded:
            loaded[wanted] = data.load(**settings.dataset.model_dump(), verify=verify)
        template = templates.get(key)
        parts = () if template is None else (template.partition, template.schedule)
        scenarios.append(scenario.of(settings, loaded[wanted], *parts))
        templates.setdefault(key, scenarios[-1])
    return scenarios


class _Same:
    """An array as a key: equal only to itself."""

    def __init__(self, array: NDArray[np.int64]) -> None:
        self.array = array

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.array is self.array


@lru_cache(maxsize=1024)
def _digest(same: _Same) -> str:
    """A hash of the contents of an array, in hex digits, computed once for each array."""
    return hashlib.sha256(np.ascontiguousarray(same.array).tobytes()).hexdigest()
