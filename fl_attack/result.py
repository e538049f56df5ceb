"""What a run or a sweep was like, for notebooks: its tables as frames, its model, its figures."""

import csv
import io
import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fl_attack import folder as places
from fl_attack.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fl_attack.config import Settings


class Result:
    """What a run or a sweep left, in memory or in a folder.

    Tables are pandas frames where pandas is installed, else structured arrays: ``result.rounds["test_accuracy"]``
    works with both. What results of this kind do not have, or what is not written yet, raises InputError.

    Attributes
    ----------
    kind : {"run", "sweep"}
        Whether the result is of a run or of a sweep.
    folder : Path or None
        The folder of the result; None if it is in memory only.
    """

    def __init__(
        self, kind: places.ResultKind, folder: Path | None, files: Mapping[str, bytes], inside: str = ""
    ) -> None:
        self.kind, self.folder = kind, folder
        self._files, self._inside = files, inside

    @classmethod
    def of_folder(cls, folder: Path) -> "Result":
        """The result in a folder, whose files are read as they are asked for; InputError where there is none."""
        return cls(_result_kind(folder), folder, {})

    @classmethod
    def of_files(cls, folder: Path) -> "Result":
        """The result in a folder, all of it read now, so that the folder may go; InputError where there is none."""
        kind = _result_kind(folder)
        found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return cls(kind, None, found)

    @cached_property
    def rounds(self) -> Any:
        """The measures `history.COLUMNS` of each evaluated round (of a run), a row each; round 0 is the start model."""
        return frame(self.columns("rounds"))

    @cached_property
    def flips(self) -> Any:
        """Every flip made: `round` (from 1), `sample` (index in the training set as loaded), `label` (of a run)."""
        return frame(self.columns("flips"))

    @cached_property
    def clients(self) -> Any:
        """A row for each client (of a run).

        Its columns are `client`, `malicious` (0 or 1), `samples` (how many it holds), `labels` (which occur) and
        `final_accuracy` (of the final model on these samples, 0 to 1).
        """
        return frame(self.columns("clients"))

    @cached_property
    def partition(self) -> dict[str, NDArray[Any]]:
        """The `client` of each training sample, -1 where none has it, and the ids of `malicious` clients (of a run)."""
        return self._arrays("partition.npz")

    @cached_property
    def table(self) -> Any:
        """A row for each cell: its overrides, then its results (of a sweep)."""
        return frame(self.columns("table"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The figures of a finished run, see `results.summary`: accuracies, F1, shares from 0 to 1, times in seconds.

        Of a sweep the number of `cells`, and how many of them have `broken_off`.
        """
        if self.kind == "sweep":
            errors = [str(one) for one in self.columns("table")["error"]]
            lost = sum(one not in ("", "nan") for one in errors)
            return {"cells": len(errors), "broken_off": lost}
        found: dict[str, Any] = json.loads(self._content(places.SUMMARY, "the run is not finished"))
        return found

    @cached_property
    def settings(self) -> "Settings":
        """The settings of the run, or of the first cell of the sweep."""
        from fl_attack.config import from_yaml

        return from_yaml(self._content("config.yaml").decode())

    @cached_property
    def state_dict(self) -> "dict[str, Tensor]":
        """The parameters of the final model by their names (of a run); of logistic regression `theta` alone."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self._arrays("model.npz").items()}

    @property
    def theta(self) -> NDArray[np.float64]:
        """The parameters of logistic regression, (C, d): C = 1 for two classes, the last of the d is the bias.

        AttributeError for networks, which have a `state_dict`.
        """
        arrays = self._arrays("model.npz")
        if "theta" not in arrays:
            raise AttributeError("a network has no theta; see state_dict")
        return arrays["theta"]

    @cached_property
    def curves(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of a sweep, the rounds evaluated (evaluations,) and the accuracy after each (cells, evaluations), 0 to 1."""
        arrays = self._arrays(places.CURVES)
        return arrays["round"], arrays["accuracy"]

    @cached_property
    def baseline(self) -> "Result | None":
        """The unattacked twin of a run; None without one."""
        if self.kind == "sweep" or self._read(f"{places.BASELINE}/rounds.csv") is None:
            return None
        folder = None if self.folder is None else self.folder / places.BASELINE
        return Result("run", folder, self._files, f"{self._inside}{places.BASELINE}/")

    def plot(self, kind: str | None = None, *columns: str) -> Any:
        """Draw a figure.

        Parameters
        ----------
        kind : str, optional
            A kind of `PLOTS`, as in ``python -m fl_attack.plots FOLDER heatmap``. By default the curves of a run,
            or the first figure that a sweep allows.
        *columns : str
            The columns that the kind takes.

        Returns
        -------
        matplotlib.figure.Figure
            A notebook shows it; ``savefig`` writes it.

        Raises
        ------
        InputError
            Where there is no such kind or column, or the result does not hold what the figure shows.
        """
        from fl_attack import plots
        from fl_attack.plots import canvas

        with tempfile.TemporaryDirectory(prefix="fl-attack-") as scratch, canvas.captured() as figures:
            folder = self.folder
            if folder is None:
                folder = self.save(scratch)
            plots.draw(folder, kind or ("curves" if self.kind == "run" else "all"), *columns)
        if not figures:
            raise InputError("the sweep allows no figure: nothing but the seed was varied")
        figure = figures[0]
        figure._repr_png_ = lambda: _png(figure)  # pyplot, which is not used, would tell a notebook how
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write the files of a result that is in memory to a folder, as a command leaves them; gives the folder.

        InputError where the result is in a folder already, or this one holds a result.
        """
        out = Path(folder)
        if self.folder is not None:
            raise InputError(f"the result is in {self.folder} already")
        if places.holds(out):
            raise InputError(f"{out} holds a {places.holds(out)}; use another folder")
        for name, content in self._files.items():
            if name.startswith(self._inside):
                file = out / name.removeprefix(self._inside)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        return out

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        if self.kind == "sweep":
            return f"<Result of a sweep of {self.summary['cells']} cells, {where}>"
        if self._read(places.SUMMARY) is None:
            return f"<Result of an unfinished run, {where}>"
        facts = self.summary
        return (
            f"<Result of a run of {facts['stopped_round']} rounds: final accuracy {facts['final_accuracy']:.4f}, "
            f"{facts['flips']:,} flips, {where}>"
        )

    def _read(self, name: str) -> bytes | None:
        """The content of a file of the result; None where there is no such file."""
        if self.folder is None:
            return self._files.get(self._inside + name)
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def _content(self, name: str, why: str = "") -> bytes:
        """The content of a file; InputError where it is not there."""
        content = self._read(name)
        if content is None:
            place = "the result" if self.folder is None else str(self.folder)
            raise InputError(f"{place} has no {name}" + (f": {why}" if why else ""))
        return content

    def _arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays in an .npz of the result, by name; InputError where it is not there."""
        with np.load(io.BytesIO(self._content(name)), allow_pickle=False) as stored:
            return {key: stored[key] for key in stored}

    def columns(self, table: Literal["rounds", "flips", "clients", "table"]) -> dict[str, NDArray[Any]]:
        """The columns of the table of that name, without pandas, whose import takes most of a second.

        Parameters
        ----------
        table : {"rounds", "flips", "clients", "table"}
            `table` is of a sweep, the others of a run.

        Returns
        -------
        dict of str to (n,) array

        Raises
        ------
        InputError
            Where results of this kind have none, or it is not there.
        """
        if table == "flips":
            return {name: column.astype(np.int64) for name, column in self._arrays("flips.npz").items()}
        kind: places.ResultKind = "sweep" if table == "table" else "run"
        name = places.TABLE if table == "table" else f"{table}.csv"
        if kind != self.kind:
            raise InputError(f"a {self.kind} has no {name}: that is of a {kind}")
        rows = list(csv.reader(io.StringIO(self._content(name).decode(), newline="")))
        header, cells = rows[0], list(zip(*rows[1:], strict=True)) or [()] * len(rows[0])
        return {column: column_of(values) for column, values in zip(header, cells, strict=True)}


def _png(figure: Any) -> bytes:
    """A figure of matplotlib's as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _result_kind(folder: Path) -> places.ResultKind:
    """The kind of result that a folder holds; InputError where it is none, or has no table yet."""
    kind = places.holds(folder)
    if kind is None:
        raise InputError(f"{folder} holds no result: neither {places.ROUNDS} nor {places.TABLE}")
    if kind == "sweep" and not (folder / places.TABLE).exists():
        raise InputError(f"{folder} holds an unfinished sweep, which has no table yet; the same command goes on")
    if kind == "run" and not (folder / places.ROUNDS).exists():
        raise InputError(f"{folder} holds an unfinished run, which has no {places.ROUNDS} yet")
    return kind


def column_of(texts: tuple[str, ...]) -> NDArray[Any]:
    """The column (n,) of these texts: int64 where all are whole numbers, else float64 (an empty one NaN), else text."""
    for kind in (np.int64, np.float64):
        try:
            return np.array([kind(text) if text or kind is np.int64 else np.nan for text in texts], kind)
        except ValueError:
            continue
    return np.array(texts, object)


def frame(columns: Mapping[str, NDArray[Any]]) -> Any:
    """Columns (n,) as a pandas frame; where pandas is not installed as a structured array (n,)."""
    try:
        import pandas
    except ImportError:
        found = np.empty(len(next(iter(columns.values()))), [(name, array.dtype) for name, array in columns.items()])
        for name, array in columns.items():
            found[name] = array
        return found
    return pandas.DataFrame(dict(columns))
