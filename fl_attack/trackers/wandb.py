"""Weights & Biases: runs where its own settings say; the cells of a sweep are a group with it."""

import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_attack.history import Row
from fl_attack.trackers.about import PROJECT, About, How, Value, tagged

CODES = {"finished": 0, "failed": 1, "killed": 130}


class WandB:
    """One run of Weights & Biases. Its steps only rise, so that the axis of its charts is the column `round`."""

    def __init__(self, about: About, id: str | None) -> None:
        import wandb

        self._image, is_cell = wandb.Image, about.kind == "cell"
        settings = wandb.Settings(console="off")  # what is printed is none of its business
        if is_cell:
            settings.silent = True  # thousands of cells need not introduce themselves
        self.id = id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self.id,
            resume="allow" if id else None,
            name=about.name,
            notes=about.command,
            config=dict(about.settings),
            group=about.parent if is_cell else self.id if about.kind == "sweep" else None,
            job_type=about.kind,
            reinit="create_new",  # beside whatever run the caller has
            settings=settings,
        )
        self._axes: set[str] = set()

    def rows(self, part: str, rows: Sequence[Row]) -> None:
        """Log rows, of which the column `round` is the axis; see `Store.rows`."""
        axis = tagged(part, "round")
        if part not in self._axes:
            self._run.define_metric(axis, hidden=True)
            for name in (name for name in rows[0] if name != "round"):
                self._run.define_metric(tagged(part, name), step_metric=axis)
            self._axes.add(part)
        for row in rows:
            self._run.log({tagged(part, name): value for name, value in row.items() if math.isfinite(value)})

    def summary(self, part: str, facts: Mapping[str, Value]) -> None:
        """Add results to the run's summary, which has the values of its last row too; see `Store.summary`."""
        self._run.summary.update({tagged(part, f"summary/{name}"): value for name, value in facts.items()})

    def leave(self) -> None:
        """Do nothing: no file is open in the folder of the run."""

    def files(self, folder: Path, files: Sequence[Path]) -> None:
        """Log files that are PNG as images, and keep copies of all; see `Store.files`."""
        # copies, since the folder may be gone when they are sent
        for file in files:
            name = file.relative_to(folder)
            if file.suffix == ".png":
                self._run.log({name.with_suffix("").as_posix(): self._image(str(file))})
            copy = Path(self._run.dir) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def end(self, how: How) -> None:
        """Say how the run ended."""
        self._run.finish(exit_code=CODES[how])


def begin(about: About, id: str | None) -> WandB:
    """Begin a run, or with its id continue it; see `Store`."""
    return WandB(about, id)
