"""Runs and sweeps in the stores of trackers: TensorBoard, MLflow, Weights & Biases.

The server alone logs, from the rounds that are recorded there, so that every engine has it. A tracker is a row of
`TRACKERS`; its library is imported when a run that wants it begins, and never otherwise.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fl_attack.errors import InputError
from fl_attack.trackers.about import About, How, Store
from fl_attack.trackers.tracked import Tracked, TrackedSweep, of_run, of_sweep

__all__ = ["TRACKERS", "About", "How", "Store", "Tracked", "TrackedSweep", "check", "of_run", "of_sweep"]


@dataclass(frozen=True)
class TrackerEntry:
    """A tracker: the modules that its extra brings, and what begins or continues a run in its store."""

    needs: tuple[str, ...]
    home: str  # the module here that knows it, whose function `begin` is taken

    @property
    def begin(self) -> Callable[[About, str | None], Store]:
        """The function that begins a run in its store, or with an id continues the one that has it."""
        found: Callable[[About, str | None], Store] = importlib.import_module(self.home).begin
        return found


TRACKERS = {
    "tensorboard": TrackerEntry(("tensorboard",), "fl_attack.trackers.tensorboard"),
    "mlflow": TrackerEntry(("mlflow", "sqlalchemy", "alembic"), "fl_attack.trackers.mlflow"),
    "wandb": TrackerEntry(("wandb",), "fl_attack.trackers.wandb"),
}


def check(names: Sequence[str]) -> None:
    """Check that the libraries of trackers are installed, without importing them.

    Parameters
    ----------
    names : sequence of str
        Keys of `TRACKERS`.

    Raises
    ------
    InputError
        Where one is missing, with the extra that brings it.
    """
    for name in names:
        for module in TRACKERS[name].needs:
            if importlib.util.find_spec(module) is None:
                raise InputError(
                    f"tracker={name} needs {module}, which is not installed; pip install 'fl-attack[{name}]'"
                )
