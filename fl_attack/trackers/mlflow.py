"""MLflow: runs in the store that its own settings name; the cells of a sweep are its children."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_attack.history import Row
from fl_attack.trackers.about import PROJECT, About, How, Value, tagged

AT_ONCE = 1000  # metrics that MLflow takes in one call
PARAMS_AT_ONCE = 100
LONGEST = 500  # characters of a parameter or a tag that every store of MLflow takes
STATES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MLflow:
    """One run in MLflow's store: a new one, or the one with this id, which goes on."""

    def __init__(self, about: About, id: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        if id is not None:
            self._client.update_run(id, status="RUNNING")
            self.id = id
            return
        tags = {"command": about.command[:LONGEST], "kind": about.kind}
        if about.parent is not None:
            tags["mlflow.parentRunId"] = about.parent
        self.id = self._client.create_run(self._experiment(), run_name=about.name, tags=tags).info.run_id
        params = [Param(name, str(value)[:LONGEST]) for name, value in about.settings.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self.id, params=params[start : start + PARAMS_AT_ONCE])

    def _experiment(self) -> str:
        """The id of the experiment that MLflow's own settings name, else of ours; one that is missing is made."""
        if chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return chosen
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def rows(self, part: str, rows: Sequence[Row]) -> None:
        """Log rows, each at the step of its round; see `Store.rows`."""
        self._log(
            [
                (tagged(part, name), float(value), row["round"])
                for row in rows
                for name, value in row.items()
                if name != "round" and math.isfinite(value)
            ]
        )

    def summary(self, part: str, facts: Mapping[str, Value]) -> None:
        """Log finite numbers as metrics, the rest as tags unless empty; see `Store.summary`."""
        numbers = {}
        for name, value in facts.items():
            key = tagged(part, f"summary/{name}")
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[key] = float(value)
            elif value not in (None, ""):
                self._client.set_tag(self.id, key, str(value)[:LONGEST])
        self._log([(key, number, 0) for key, number in numbers.items()])

    def _log(self, values: Sequence[tuple[str, float, int]]) -> None:
        """Log metrics, of which each is a name, a value and a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self.id, metrics=metrics[start : start + AT_ONCE])

    def leave(self) -> None:
        """Do nothing: no file is open in the folder of the run."""

    def files(self, folder: Path, files: Sequence[Path]) -> None:
        """Keep files as artifacts under their paths within the folder; see `Store.files`."""
        for file in files:
            within = file.parent.relative_to(folder).as_posix()
            self._client.log_artifact(self.id, str(file), None if within == "." else within)

    def end(self, how: How) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.id, STATES[how])


def begin(about: About, id: str | None) -> MLflow:
    """Begin a run, or with its id continue it; see `Store`."""
    return MLflow(about, id)
