"""What is run: presets of `conf/experiment` on the paper's data sets; figures that share a grid share its sweep."""

import hashlib
import json
import math
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from fl_attack import data, multirun
from fl_attack.config import AttackSettings, compose
from fl_attack.data.cache import folder as cache_folder
from fl_attack.data.cache import write_whole
from fl_attack.data.sources import CIFAR10_FILES
from fl_attack.errors import InputError
from fl_attack.folder import TABLE
from fl_attack.identity import key_of_grid
from fl_attack.launcher import grid
from fl_attack.replication.verdicts import evidence
from fl_attack.sweep_table import Cells

EPOCHS = 200
MEAN_SHARE = 0.05  # share of the labels flipped in a round on average, by attacks in every so many rounds
RUNS = "runs"
ARCHIVE = "cifar10_jpeg.tar"  # CIFAR-10 as a tar of JPEG images, used under --data where the original is not
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # learning rates of figure 14, the same for SGD and Adam
HELD_OUT = ("early_stop.patience=1000000", "early_stop.restore=last")  # a validation split, but no early stop
LEAST_RATE, MOST_RATE = 1e-4, 10.0  # between which the grid of learning rates is extended
STEP, EPOCH, FULL, LARGE = "per step", "per epoch", "full batch", "per step, batches four times as large"
FLOOR, CEIL = "per step, rounded down", "per step, rounded up"
SMALL = "per step, batches of 16, rounded up"
PERSIST, LAST = "full batch, flips stay", "per step, stopped at the last model"
MLP, CNN = "mlp, 20 epochs", "cnn, 2 epochs"
PROTOCOLS = (STEP, FLOOR, CEIL, SMALL, LARGE, LAST, EPOCH, FULL, PERSIST, MLP, CNN)
GRADIENTS = ("fig1", "fig4")  # drawn from one run, not from a sweep
BUDGETS, ALL = "0,0.001,0.01,0.05,0.1,0.25,0.5,0.83", "attack.budget=0,0.05,0.25,0.5,0.7,1"
NOISE_BATCHES = (16, 64, 256)
BINARY = ("fig5", "fig6", "fig7", "fig8", "fig11", "fig12", "fig14")


@dataclass(frozen=True)
class PaperDataset:
    """A data set of the paper's table 2, or a smaller one in its place."""

    name: str
    title: str
    binary: bool
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A preset on a data set under a protocol."""

    preset: str
    source: PaperDataset
    protocol: str = STEP
    overrides: tuple[str, ...] = ()
    batch: int | str = 128
    rates: tuple[float, ...] | None = ()  # learning rates besides the one chosen; None: those of preset and overrides
    epochs: int | None = None  # by default those of the plan


@dataclass(frozen=True)
class ReplicationPlan:
    """All runs of a replication, and what they share."""

    sources: tuple[PaperDataset, ...]
    runs: tuple[Run, ...]
    epochs: int
    batch: int
    quick: bool


def sources(quick: bool, root: Path | None) -> tuple[PaperDataset, ...]:
    """The data sets of a replication.

    Parameters
    ----------
    quick : bool
        The bundled digits in place of the paper's data sets.
    root : Path, optional
        The folder of MNIST and CIFAR-10, by default `data`.

    Returns
    -------
    tuple of PaperDataset
        Those of two classes and those of ten.

    Raises
    ------
    InputError
        Where a data set can't be had.
    """
    if quick:
        return (
            PaperDataset("digits_01", "digits 0/1", True, ("dataset=digits_01",)),
            PaperDataset("digits", "digits, 10 classes", False, ("dataset=digits",)),
        )
    root = root or Path("data")
    here = f"dataset.root={_quoted(root)}"
    pictures: tuple[str, ...] = (here,)
    title, both = "CIFAR-10", ("dataset=cifar10_plane_auto", "dataset=cifar10")
    if not all((root / file).exists() for file in CIFAR10_FILES) and (root / ARCHIVE).exists():
        title, both = "CIFAR-10 (JPEG copies)", ("dataset=image_folder", "dataset=image_folder")
        pictures = (f"dataset.path={_quoted(_unpacked_archive(root / ARCHIVE))}",)
    two = ("dataset.classes=[airplane,automobile]",) if "JPEG" in title else ()
    found = (
        PaperDataset("mnist_01", "MNIST 0/1", True, ("dataset=mnist_01", here)),
        PaperDataset("cifar10_plane_auto", f"{title}, airplane/automobile", True, (both[0], *pictures, *two)),
        PaperDataset("mnist", "MNIST, 10 classes", False, ("dataset=mnist", here)),
        PaperDataset("cifar10", f"{title}, 10 classes", False, (both[1], *pictures)),
    )
    for source in found:
        samples(source)
    return found


def make(quick: bool, only: str | None, root: Path | None) -> ReplicationPlan:
    """The plan of a replication.

    Parameters
    ----------
    quick : bool
        Whether to take the bundled digits and fewer epochs.
    only : str, optional
        The one figure that is wanted, a name of `FIGURES`.
    root : Path, optional
        The folder of MNIST and CIFAR-10.

    Returns
    -------
    ReplicationPlan
        On each data set an unattacked run comes first: it decides the learning rate of the others.

    Raises
    ------
    InputError
        Where `only` is no figure or a data set can't be had.
    """
    if only is not None and only not in FIGURES:
        raise InputError(f"--only {only} is not a figure; known: {', '.join(FIGURES)}")
    chosen = sources(quick, root)
    runs = [run for source in chosen for run in (_quick if quick else _whole)(source)]
    if only is not None:
        own, wanted = FIGURES[only][:1], ("honest", *FIGURES[only])
        having = {run.source for run in runs if run.preset in own or (only in GRADIENTS and run.source.binary)}
        runs = [run for run in runs if run.source in having and run.preset in wanted]
        chosen = tuple(source for source in chosen if source in having)
    return ReplicationPlan(chosen, tuple(runs), 40 if quick else EPOCHS, 32 if quick else 128, quick)


FIGURES: dict[str, tuple[str, ...]] = {  # what --only takes, and the presets that it needs, its own first
    "fig1": (),
    "fig4": (),  # the same picture
    "fig5": ("fig5", "protocols", "smallest"),
    "readings": ("smallest",),
    "noise": ("noise",),
    **{name: (name, "protocols") for name in ("fig6", "fig7", "fig8", "fig9", "fig11")},
    **{name: (name,) for name in ("fig12", "fig14", "selection", "frequency", "rounding")},
}


def _whole(source: PaperDataset) -> Iterator[Run]:
    """The runs on a data set of the full replication."""
    if not source.binary:
        yield from _ten_classes(source)
        return
    for run in _two_classes(source):  # ten seeds at least
        more = () if run.preset in ("smallest", "noise", "honest") else ("seed=range(10)",)
        yield replace(run, overrides=(*run.overrides, *more))


def _two_classes(source: PaperDataset) -> Iterator[Run]:
    """The runs on a data set of two classes."""
    pictures = source.name == "cifar10_plane_auto"  # an experiment costs four times as much as with digits
    full = "0.01" if pictures else "1"  # the learning rate that serves steps which are few and precise
    yield Run("honest", source, overrides=HELD_OUT, rates=None)
    for preset in BINARY:
        more = {"fig5": ("clients.malicious=3,5,10", f"attack.budget={BUDGETS}"), "fig14": (*HELD_OUT, ALL)}
        yield Run(
            preset, source, overrides=more.get(preset, ()), rates={"fig12": (0.01,), "fig14": RATES}.get(preset, ())
        )
    yield Run("fig12", source, LAST, ("early_stop.restore=last",), rates=(0.01,))
    yield from _readings(source, full)
    for batch in NOISE_BATCHES:
        yield Run("noise", source, batch=batch, rates=None)
    yield Run("selection", source, overrides=("attack.budget=0,0.05,0.25",) if pictures else ())
    for preset in ("frequency", "rounding"):
        yield Run(preset, source)
    if not pictures:
        one = ("attack.budget=0,0.25",)
        yield Run("fig12", source, LARGE, one, batch=512)
        yield Run("fig12", source, EPOCH, (*one, "attack.refresh=epoch"))
        yield Run("fig12", source, FULL, (*one, f"lr={full}"), batch="full", rates=None)
    yield Run("protocols", source, LARGE, batch=512)
    yield Run("protocols", source, STEP, rates=(0.01,) if pictures else (0.001, 0.01))
    yield Run("protocols", source, EPOCH, ("attack.refresh=epoch",))
    yield Run("protocols", source, FULL, (f"lr={full}",), batch="full", rates=None)


def _readings(source: PaperDataset, full: str) -> Iterator[Run]:
    """The runs on what 0.1 % of the labels can mean."""
    rates = (0.01,) if source.name == "cifar10_plane_auto" else ()
    few = ("seed=range(10)",)
    yield Run("smallest", source, rates=rates)
    for malicious, budget in ((5, 0.002), (3, 0.0033)):
        yield Run("smallest", source, overrides=(f"clients.malicious={malicious}", f"attack.budget=0,{budget:g}", *few))
    for protocol, rounding in ((FLOOR, "floor"), (CEIL, "ceil")):
        yield Run("smallest", source, protocol, (f"attack.rounding={rounding}", *few))
    if not rates:
        yield Run("smallest", source, SMALL, ("attack.rounding=ceil", *few), batch=16, rates=(1.0,))
    yield Run("smallest", source, EPOCH, ("attack.refresh=epoch", *few))
    # with k = 1 full batches know no randomness: every seed gives the same
    whole = (f"lr={full},0.1", "seed=range(2)")
    yield Run("smallest", source, FULL, whole, batch="full", rates=None)
    yield Run("smallest", source, PERSIST, (*whole, "attack.memory=persist"), batch="full", rates=None)


def _ten_classes(source: PaperDataset) -> Iterator[Run]:
    """The runs on a data set of ten classes."""
    # an experiment costs ten times as much as with two, and on CIFAR-10 thirty times
    yield Run("honest", source, overrides=("lr=0.001,0.01,0.1", *HELD_OUT), rates=None)
    if source.name == "cifar10":
        yield Run("fig9", source, overrides=("clients.malicious=10", "attack.budget=0,0.05,0.25"))
        return
    few = ("clients.malicious=10", "attack.budget=0,0.05")
    yield Run("fig9", source, overrides=("clients.malicious=10",))
    yield Run("fig14", source, overrides=("lr=0.001,0.01", "attack.budget=0,0.25,0.7,1", *HELD_OUT), rates=None)
    yield Run("protocols", source, LARGE, few, batch=512)
    yield Run("protocols", source, STEP, (*few, "lr=0.001,0.01"), rates=None)
    yield Run("protocols", source, EPOCH, (*few, "attack.refresh=epoch"))
    yield Run("protocols", source, FULL, (*few, "lr=0.1,1"), batch="full", rates=None)
    # networks learn in few epochs, each of which costs as much as a whole training of logistic regression
    yield Run("fig9", source, MLP, (*few, "model=mlp", "lr=0.1"), rates=None, epochs=20)
    yield Run("fig9", source, CNN, (*few, "model=cnn", "lr=0.1"), rates=None, epochs=2)


def _quick(source: PaperDataset) -> Iterator[Run]:
    """The runs on a data set of the quick replication: five seeds, batches a quarter as large."""
    for run in _whole(source):
        batch = run.batch if run.batch == "full" else max(10, int(run.batch) // 4)  # one of each client at least
        yield replace(run, overrides=(*run.overrides, "seed=range(5)"), batch=batch)


def samples(source: PaperDataset) -> int:
    """The number of training samples of a data set; InputError where it can't be had."""
    return len(_dataset(source.overrides).y_train)


@cache
def _dataset(overrides: tuple[str, ...]) -> data.Dataset:
    """The data set that overrides name, loaded once."""
    return _loaded(compose("out=unused", *overrides).dataset.model_dump_json())


@cache
def _loaded(settings: str) -> data.Dataset:
    """The data set of settings in JSON, loaded once: checking that a folder of images is unchanged takes seconds."""
    return data.load(**json.loads(settings))


def cells(run: Run, epochs: int, lr: float | None) -> list[multirun.Cell]:
    """The cells of a run.

    Parameters
    ----------
    run : Run
        A preset on a data set, with its overrides.
    epochs : int
        The length of training, where the run has none of its own.
    lr : float, optional
        The learning rate chosen, used beside those of the run; by default the preset's own are used.

    Returns
    -------
    list of multirun.Cell
        Of "frequency" only those that flip `MEAN_SHARE` of the labels a round on average, or none.
    """
    batches = 1 if run.batch == "full" else -(-samples(run.source) // int(run.batch))
    rounds = (run.epochs or epochs) * batches
    length = [f"batch_size={run.batch}", f"rounds={rounds}", f"eval_every={batches}"]
    rates: list[str] = []
    if lr is not None and run.rates is not None:
        rates = [f"lr={','.join(f'{one:g}' for one in sorted({*run.rates, lr}))}"]
    grid_cells = grid(f"experiment={run.preset}", *run.source.overrides, *length, *rates, *run.overrides, "out=unused")
    return [cell for cell in grid_cells if run.preset != "frequency" or _has_mean_share(cell.settings.attack)]


def _has_mean_share(attack: AttackSettings) -> bool:
    """Whether an attack flips no label, or `MEAN_SHARE` of them a round on average."""
    return attack.budget == 0 or math.isclose(attack.budget, MEAN_SHARE * attack.every)


Grids = dict[Path, list[multirun.Cell]]
"""The cells of sweeps by the folder in which these are kept."""


def folder_of(out: Path, cells: Sequence[multirun.Cell]) -> Path:
    """The folder of a sweep, whose name changes with any setting that a number depends on.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    cells : sequence of multirun.Cell
        The cells of the sweep.

    Returns
    -------
    Path
        A folder in `out/runs`, which need not be there.
    """
    fingerprint = _loaded(cells[0].settings.dataset.model_dump_json()).fingerprint
    return out / RUNS / key_of_grid(fingerprint, (cell.settings for cell in cells))


def lacking(grids: Grids) -> Grids:
    """The grids whose sweep is not finished."""
    return {place: cells for place, cells in grids.items() if not is_there(place)}


def compute(out: Path, grids: Grids, progress: multirun.Progress) -> None:
    """Compute, together, the sweeps of grids that are not finished.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    grids : Grids
        Cells by the folder of their sweep.
    progress : multirun.Progress
        The progress bar, which counts all cells.
    """
    todo = lacking(grids)
    progress.skip(sum(map(len, grids.values())) - sum(map(len, todo.values())))
    if todo:
        kept = out / RUNS / f"{hashlib.sha256(' '.join(map(str, todo)).encode()).hexdigest()[:16]}.units"
        grids_there = [_with_place(cells, place) for place, cells in todo.items()]
        multirun.tabulate_together(grids_there, kept, progress)


def _with_place(cells: Sequence[multirun.Cell], place: Path) -> list[multirun.Cell]:
    """The cells with the folder of their sweep among their settings."""
    update = {"out": str(place)}
    return [multirun.Cell(cell.overrides, cell.settings.model_copy(update=update)) for cell in cells]


@contextmanager
def timed(file: Path, worth: Callable[[], bool]) -> Iterator[None]:
    """A block whose duration is added to a file, in seconds, also when it is interrupted.

    Parameters
    ----------
    file : Path
        The file, which gets a line for each time.
    worth : callable
        Asked at the end of the block whether its time counts.
    """
    began = time.perf_counter()
    try:
        yield
    finally:
        if worth():
            lines = [*seconds_taken(file), time.perf_counter() - began]
            write_whole(file, lambda stream: stream.writelines(f"{line:.3f}\n".encode() for line in lines))


def is_there(place: Path) -> bool:
    """Whether the sweep of a folder has been finished."""
    return (place / TABLE).exists()


def seconds_taken(file: Path) -> list[float]:
    """The seconds of each call, as `timed` has written them; none where the file is lost or damaged."""
    try:
        return [float(line) for line in file.read_text().split()]
    except (OSError, ValueError):
        return []


def best_rate(honest: Cells) -> float:
    """The learning rate whose unattacked models have the lowest mean validation loss; the largest of equals."""
    loss = {float(lr): round(float(honest["validation"][at].mean()), 9) for (lr,), at in honest.parts("lr")}
    return min(loss, key=lambda lr: (loss[lr], -lr))


def tied_rates(honest: Cells) -> list[float]:
    """The learning rates, the best one among them, whose validation loss is not surely higher, paired by seed."""
    best, found = best_rate(honest), []
    least = {seed: honest.where(lr=best, seed=seed)["validation"].mean() for seed in set(honest["seed"].tolist())}
    for (lr,), at in honest.parts("lr"):
        more = [value - least[seed] for seed, value in zip(honest["seed"][at], honest["validation"][at], strict=True)]
        if float(lr) == best or evidence(np.array(more)).above(0.0) > 0.05:
            found.append(float(lr))
    return found


def extension(honest: Cells) -> float | None:
    """The learning rate, about a third or three times the best one, to try where that is at an edge of the grid.

    None where it is at none, or the next is not within `LEAST_RATE` and `MOST_RATE`.
    """
    rates, best = sorted({float(lr) for lr in honest["lr"].tolist()}), best_rate(honest)
    wider = {rates[0]: float(f"{best / 3:.0e}"), rates[-1]: float(f"{best * 3.3:.0e}")}.get(best)
    return wider if wider is not None and LEAST_RATE <= wider <= MOST_RATE else None


def _unpacked_archive(archive: Path) -> Path:
    """The folder of an archive's images, unpacked once; InputError where that can't be done."""
    stamp = f"{archive.stat().st_size}-{int(archive.stat().st_mtime)}"
    place = cache_folder() / "unpacked" / f"{archive.stem}-{stamp}"
    if not place.exists():
        partial = place.with_name(f"{place.name}.partial")
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"{archive} can't be unpacked: {error}") from None
        partial.rename(place)
    return place


def _quoted(path: Path) -> str:
    """The full path, quoted as the value of an override."""
    text = str(path.expanduser().resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
