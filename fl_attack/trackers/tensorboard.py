"""TensorBoard: event files in the folder of the run; of a sweep, a folder in it for each cell."""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from fl_attack.folder import TENSORBOARD
from fl_attack.history import Row
from fl_attack.trackers.about import About, How, Value

LONGEST = 150  # characters of the name of a cell's folder


class TensorBoard:
    """The event files of one run: its own, and a folder beside them for each of its parts, which share charts.

    Its id is the folder within `tensorboard/` that holds them all.
    """

    def __init__(self, about: About, id: str) -> None:
        self.id, self.about = id, about
        self.at = about.folder / TENSORBOARD / id
        self._writers: dict[str, Any] = {}

    def rows(self, part: str, rows: Sequence[Row]) -> None:
        """Log rows, each at the step of its round; see `Store.rows`."""
        writer = self._writer(part)
        for row in rows:
            for name, value in row.items():
                if name != "round" and math.isfinite(value):
                    writer.add_scalar(name, value, row["round"])
        writer.flush()

    def summary(self, part: str, facts: Mapping[str, Value]) -> None:
        """Log finite numbers as scalars, all as text, and of the run itself its HPARAMS; see `Store.summary`."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._writer(part)
        numbers = {f"summary/{name}": float(value) for name, value in facts.items() if is_number(value)}
        for name, number in numbers.items():
            writer.add_scalar(name, number, 0)
        writer.add_text("summary", _table(facts))
        if not part:
            shown = {name: value for name, value in self.about.settings.items() if value is not None}
            for one in hparams(shown, numbers):
                writer.file_writer.add_summary(one)
        writer.flush()

    def leave(self) -> None:
        """Close the event files; what is logged later goes to others."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def files(self, folder: Path, files: Sequence[Path]) -> None:
        """Log the files that are PNG as images; all lie beside the event files in any case; see `Store.files`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.at = folder / TENSORBOARD / self.id
        for file in (file for file in files if file.suffix == ".png"):
            content = file.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # where the format has them
            image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content)
            tag = file.relative_to(folder).with_suffix("").as_posix()
            self._writer("").file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), 0)

    def end(self, how: How) -> None:
        """Close the event files; TensorBoard knows no states of runs."""
        self.leave()

    def _writer(self, part: str) -> Any:
        """The `SummaryWriter` of a part, opened when it is first needed."""
        from torch.utils.tensorboard import SummaryWriter

        if part not in self._writers:
            self._writers[part] = SummaryWriter(str(self.at / part))
        return self._writers[part]


def begin(about: About, id: str | None) -> TensorBoard:
    """Begin the event files of a run, or with an id continue them in their folder; see `TensorBoard`."""
    store = TensorBoard(about, id or (_safe(about.name) if about.kind == "cell" else "."))
    if id is None:
        writer = store._writer("")
        writer.add_text("settings", _table(about.settings))
        writer.add_text("command", f"    {about.command}")
        writer.flush()
    return store


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, which a chart can show; no bool is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(facts: Mapping[str, Value]) -> str:
    """Names and values as a table in Markdown."""
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _safe(name: str) -> str:
    """The name of a cell as that of a folder: with "_" for characters that not all can have, and cut to `LONGEST`."""
    return re.sub(r"[^\w.,=+-]+", "_", name)[:LONGEST]
