"""What is logged while something runs: rows as they are recorded, once each, also after an interruption.

A file in the folder of the result tells the runs that trackers have of it, and which rounds they know. A tracker that
fails is left out from there on, with a line on standard error: the run is worth more than its log.
"""

import hashlib
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fl_attack import folder as places
from fl_attack.config import OUTPUT_KEYS, Settings, leaves_of, overrides_of
from fl_attack.data.cache import write_whole
from fl_attack.errors import InputError, message_or_type
from fl_attack.history import History, OnRound, Row
from fl_attack.identity import NOT_NUMBERS
from fl_attack.trackers.about import About, How, Store, Value

LOG_EVERY = 1.0  # seconds between two looks at what was recorded


class Journal:
    """The file that tells, by run and tracker, the id that the tracker gave and the last round that it knows.

    `content` is what the file in the folder tells; empty where there is none that can be read, or all is done anew.
    """

    def __init__(self, folder: Path, anew: bool = False) -> None:
        self.folder = folder
        try:
            self.content: dict[str, dict[str, Any]] = {} if anew else json.loads((folder / places.TRACKERS).read_text())
        except (OSError, ValueError):
            self.content = {}

    def entry(self, key: str, tracker: str) -> dict[str, Any]:
        """What is known of a run in a tracker; begun where nothing is.

        Parameters
        ----------
        key : str
            The key of a cell of a sweep; empty for the run or sweep itself.
        tracker : str
            The name of the tracker.

        Returns
        -------
        dict
            `id`, None before the run has one, and `rounds`, the last round known of each part. What is changed in it
            is saved with the journal.
        """
        entry: dict[str, Any] = self.content.setdefault(key, {}).setdefault(tracker, {"id": None, "rounds": {}})
        return entry

    def save(self) -> None:
        """Write the file; where the disk refuses, warn: after an interruption trackers would begin new runs."""
        text = json.dumps(self.content).encode()
        try:
            write_whole(self.folder / places.TRACKERS, lambda stream: stream.write(text))
        except Exception as error:
            _warn(f"{self.folder / places.TRACKERS} can't be written ({_line(error)})")


class Tracked:
    """A run, a sweep or a cell in the trackers that take it."""

    def __init__(
        self, names: Sequence[str], about: About, journal: Journal, key: str = "", failed: set[str] | None = None
    ):
        """Begin or continue with each tracker; see `Journal.entry` for `key`.

        `failed` names the trackers that are left out, and those that fail are added; where it is None, a tracker that
        can't begin is an InputError.
        """
        from fl_attack.trackers import TRACKERS

        self.journal, self.about, self.failed = journal, about, set() if failed is None else failed
        self.stores: dict[str, Store] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._due: dict[str, float] = {}
        for name in (name for name in names if name not in self.failed):
            self._entries[name] = journal.entry(key, name)
            parent = journal.entry("", name)["id"] if about.kind == "cell" else None
            own_about = About(about.kind, about.name, about.settings, about.command, about.folder, parent)
            try:
                self.stores[name] = self._begun(TRACKERS[name].begin, own_about, self._entries[name])
            except Exception as error:
                if failed is None:
                    journal.save()  # with the runs that others have begun, which the next call continues
                    self.end("failed")
                    raise InputError(f"tracker={name} can't begin: {_line(error)}") from None
                self._leave_out(name, error)
        if self.stores and about.kind != "cell":
            journal.save()

    @staticmethod
    def _begun(begin: Callable[[About, str | None], Store], about: About, entry: dict[str, Any]) -> Store:
        """The run that an entry names, continued; a new one where there is none, or it is not there any more."""
        if entry["id"] is not None:
            try:
                return begin(about, entry["id"])
            except Exception as error:
                _warn(
                    f"the earlier run {entry['id']} of a tracker can't be continued ({_line(error)}); a new one begins"
                )
        store = begin(about, None)
        entry |= {"id": store.id, "rounds": {}}
        return store

    def is_due(self, part: str = "") -> bool:
        """Whether rows of a part were last logged `LOG_EVERY` seconds ago or more; never without a tracker in use."""
        return bool(self.stores) and time.monotonic() >= self._due.get(part, 0.0)

    def last(self, part: str = "") -> int:
        """The last round of a part that every tracker in use knows: -1 before round 0, `sys.maxsize` without any."""
        return min((self._entries[name]["rounds"].get(part, -1) for name in self.stores), default=sys.maxsize)

    def observer(self, history: History, part: str = "") -> OnRound:
        """The observer of a recorder that logs its history while it grows; of the part see `Store`."""

        def observe(round_: int, row: Row) -> None:
            if self.is_due(part):
                self.rows(history.rows, part)

        return observe

    def rows(self, rows: Sequence[Row], part: str = "") -> None:
        """Log what is new among the rows so far, in the order of their rounds; of the part see `Store`."""

        def log(name: str, store: Store) -> None:
            rounds = self._entries[name]["rounds"]
            last = rounds.get(part, -1)
            if new := rows[bisect_right(rows, last, key=lambda row: int(row["round"])) :]:
                store.rows(part, new)
                rounds[part] = new[-1]["round"]

        before = self.last(part)
        self._each(log)
        if self.stores and self.about.kind != "cell" and self.last(part) > before:
            self.journal.save()
        self._due[part] = time.monotonic() + LOG_EVERY

    def summary(self, facts: Mapping[str, Any], part: str = "") -> None:
        """Log the results of a whole run, those in a dict as `name/key`; of the part see `Store`."""
        flat: dict[str, Value] = {}
        for name, value in facts.items():
            flat |= {f"{name}/{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        self._each(lambda name, store: store.summary(part, flat))

    def leave(self) -> None:
        """Close what is open in the folder, which is about to be moved."""
        self._each(lambda name, store: store.leave())

    def files(self, folder: Path) -> None:
        """Keep the files of a finished result, from the folder where it is now."""
        self.journal.folder = folder
        files = [file for file in _files_of(folder) if file.is_file()]
        self._each(lambda name, store: store.files(folder, files))

    def end(self, how: How) -> None:
        """Say how it ended; no tracker is in use any more."""
        self._each(lambda name, store: store.end(how))
        self.stores = {}

    def _each(self, do: Callable[[str, Store], None]) -> None:
        """Have every tracker do something; one that fails is left out from there on."""
        for name, store in list(self.stores.items()):
            try:
                do(name, store)
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        """Go on without a tracker, and tell so in one line."""
        if name not in self.failed:
            self.failed.add(name)
            _warn(f"tracker={name} failed, and is left out from here on: {_line(error)}")
        if store := self.stores.pop(name, None):
            with suppress(Exception):  # it has failed already
                store.end("failed")


class TrackedSweep:
    """A sweep in the trackers: a run of its own, and a child for each cell as it is done, or while it runs."""

    def __init__(self, cells: Sequence[tuple[Mapping[str, str], Settings]]) -> None:
        """`cells` has of each the overrides that tell it from the others, and its settings; nothing is begun yet."""
        self.cells, self.names = cells, cells[0][1].tracker
        self.whole: Tracked | None = None
        self._failed: set[str] = set()
        self._running: dict[int, Tracked] = {}

    def begin(self, folder: Path, anew: bool) -> None:
        """Begin the run of the sweep, or continue it.

        Parameters
        ----------
        folder : Path
            The folder that the sweep is written to.
        anew : bool
            Whether what trackers have of an interrupted sweep is left aside.

        Raises
        ------
        InputError
            Where a tracker can't begin.
        """
        if not self.names:
            return
        journal = Journal(folder, anew)
        leaves = [leaves_of(settings) for _, settings in self.cells]
        shared = {
            key: value for key, value in leaves[0].items() if all(one.get(key, leaves) == value for one in leaves)
        }
        command = " ".join(["fl-attack", "-m", *overrides_of(self.cells[0][1])])
        about = About("sweep", str(self.cells[0][1].out), _as_values(shared), command, folder)
        self.whole = Tracked(self.names, about, journal)
        self.whole.failed = self._failed

    def observer(self, cell: int, history: History) -> OnRound | None:
        """The observer that logs a cell while it runs.

        Parameters
        ----------
        cell : int
            The number of the cell.
        history : History
            The history that the recorder of the cell extends.

        Returns
        -------
        OnRound or None
            The observer of the recorder; None without trackers, before `begin`, or where the cell is already done.
        """
        return self._child(cell).observer(history) if self.whole and not self._is_done(cell) else None

    def done(self, cell: int, rows: Sequence[Row], facts: Mapping[str, Any], error: str) -> None:
        """Log what is not logged yet of a cell, and end its run; nothing before `begin` or where it is done.

        Parameters
        ----------
        cell : int
            The number of the cell.
        rows : sequence of Row
            All rows of the cell.
        facts : mapping
            The results of the cell, by name.
        error : str
            Why the cell broke off; empty where it did not.
        """
        if self.whole is None or self._is_done(cell):
            return
        child = self._child(cell)
        child.rows(rows)
        child.summary(facts)
        child.end("failed" if error else "finished")
        self._running.pop(cell)
        self._note(cell)["done"] = {}

    def leave(self) -> None:
        """Close what is open in the folder of the sweep, which is about to be moved."""
        if self.whole:
            self.whole.leave()

    def files(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Keep the files of the finished sweep, and log how large it was.

        Parameters
        ----------
        folder : Path
            The folder where the sweep is now.
        facts : mapping
            The numbers of its cells and of those that broke off, by name.
        """
        if self.whole:
            self.whole.files(folder)
            self.whole.summary(facts)

    def save(self) -> None:
        """Write down what was logged so far, for after an interruption; see `Journal.save`."""
        if self.whole:
            self.whole.journal.save()

    def end(self, how: How) -> None:
        """End the runs of all cells that are not done, and that of the sweep."""
        self.save()
        for child in self._running.values():
            child.end(how)
        if self.whole:
            self.whole.end(how)

    def _note(self, cell: int) -> dict[str, Any]:
        """What the journal has of a cell: an entry for each tracker, and `done` once it is logged whole."""
        assert self.whole is not None
        return self.whole.journal.content.setdefault(self._key(cell), {})

    def _is_done(self, cell: int) -> bool:
        """Whether a cell is logged whole, by this call or an interrupted one."""
        return "done" in self._note(cell)

    def _key(self, cell: int) -> str:
        """16 hex digits that a cell is known by after an interruption, also where the grid has grown since."""
        overrides, settings = self.cells[cell]
        text = f"{dict(overrides)}{settings.model_dump_json(exclude=NOT_NUMBERS)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _child(self, cell: int) -> Tracked:
        """The run of a cell, begun where it is not."""
        assert self.whole is not None
        if cell not in self._running:
            overrides, settings = self.cells[cell]
            name = " ".join([f"{cell:04d}", *(f"{key}={value}" for key, value in overrides.items())])
            command = " ".join(["fl-attack", *overrides_of(settings)])
            about = About("cell", name, _as_values(leaves_of(settings)), command, self.whole.about.folder)
            journal = self.whole.journal
            self._running[cell] = Tracked(self.names, about, journal, self._key(cell), self._failed)
        return self._running[cell]


@contextmanager
def of_run(settings: Settings, folder: Path) -> Iterator[Tracked]:
    """A run in its trackers while the block runs, which continues the one that an interrupted run left in the folder.

    Parameters
    ----------
    settings : Settings
        The settings of the run, whose `tracker` names the trackers.
    folder : Path
        The folder that the run is written to; it is there.

    Yields
    ------
    Tracked
        The run; without trackers its methods do nothing.

    Raises
    ------
    InputError
        Where a tracker can't begin.
    """
    names = settings.tracker
    if names:
        command = " ".join(["fl-attack", *overrides_of(settings)])
        about = About("run", str(settings.out), _as_values(leaves_of(settings)), command, folder)
    else:
        about = About("run", "", {}, "", folder)
    tracked = Tracked(names, about, Journal(folder))
    with _ended(tracked.end):
        yield tracked


@contextmanager
def of_sweep(cells: Sequence[tuple[Mapping[str, str], Settings]]) -> Iterator[TrackedSweep]:
    """A sweep in the trackers of its cells; its `begin` has to be called.

    Parameters
    ----------
    cells : sequence of (mapping, Settings)
        The overrides that tell each cell from the others, and its settings.

    Yields
    ------
    TrackedSweep
        The sweep; without trackers its methods do nothing.

    Raises
    ------
    InputError
        Where cells name different trackers.
    """
    if other := next((one for _, one in cells if one.tracker != cells[0][1].tracker), None):
        raise InputError(
            f"tracker={','.join(cells[0][1].tracker)} and tracker={','.join(other.tracker)}: a sweep is one run in "
            "all of its trackers; write tracker=[tensorboard,mlflow]"
        )
    sweep = TrackedSweep(cells)
    with _ended(sweep.end):
        yield sweep


@contextmanager
def _ended(end: Callable[[How], None]) -> Iterator[None]:
    """Call `end` as the block ends: with "killed" after a signal, "failed" after another error, else "finished"."""
    how: How = "failed"
    try:
        yield
        how = "finished"
    except KeyboardInterrupt:
        how = "killed"
        raise
    finally:
        end(how)


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield the files that the result in a folder may have, there or not; the folder's other files are not its own."""
    if places.holds(folder) == "sweep":
        yield from (folder / name for name in ("config.yaml", places.TABLE, places.CURVES, places.REPORT))
        for pattern in places.FIGURES:
            yield from sorted(folder.glob(pattern))
        return
    for at in (folder, folder / places.BASELINE):
        yield from (at / name for name in (*places.OF_RUN, places.REPORT))


def _as_values(leaves: Mapping[str, Any]) -> dict[str, Value]:
    """Settings by key without those of the output; lists and the like as JSON."""
    plain = str, int, float, bool, type(None)
    return {
        key: value if isinstance(value, plain) else json.dumps(value)
        for key, value in leaves.items()
        if key not in OUTPUT_KEYS
    }


def _line(error: Exception) -> str:
    """The message of an error in one line, cut to 300 characters; its type where there is none."""
    return message_or_type(error)[:300]


def _warn(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)
