"""Data of its own on a node of a deployed federation: samples that nobody else sees, in the classes of the server's.

The server's data set, which it tests on, says what all nodes' samples have in common: a `DataLayout`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fl_attack.data import cache
from fl_attack.data.dataset import CACHE_FORMAT, Dataset, checked, stamp
from fl_attack.data.sources import SOURCES, Raw, read_training
from fl_attack.errors import InputError


class DataLayout(NamedTuple):
    """What the samples of all nodes have in common."""

    classes: tuple[str, ...]  # name of each label
    shape: tuple[int, ...]  # of a sample as it is stored
    kind: str  # of the numbers as they are stored: "u" or "f"


class Held(NamedTuple):
    """What one node holds: n samples of p numbers each."""

    x: np.ndarray  # (n, p) memory-mapped uint8, float32 or float64
    y: np.ndarray  # (n,) int64, labels of the layout
    fingerprint: str  # hash of both, wherever they lie


def layout_of(dataset: Dataset) -> DataLayout:
    """The layout of a data set.

    Parameters
    ----------
    dataset : Dataset
        The data set of the server.

    Returns
    -------
    DataLayout
    """
    return DataLayout(dataset.classes, tuple(dataset.shape), dataset.x_train.dtype.kind)


def held(
    path: str | Path,
    layout: DataLayout,
    *,
    loader: str | None = None,
    classes: object = None,
    channels: int | None = None,
    split: str | None = None,
    verify: bool = True,
    **_: Any,
) -> Held:
    """The training samples at a path, from the cache where they were read before.

    Parameters
    ----------
    path : str or Path
        An .npz file with `x_train` and `y_train`, or a folder `train` with a folder of images for each class; test
        samples need not be there.
    layout : DataLayout
        The layout that the samples must have.
    loader : str, optional
        Another name of `SOURCES`, for a folder as `dataset.root` or `dataset.path` names it.
    classes, channels, split, verify
        As of `load`: where classes are picked, samples of others than the layout's are left out. Other settings of
        `dataset` may be given, and are not used.

    Returns
    -------
    Held
        In the order of the files. A label without a name is the number of a class of the layout, or where all of its
        names are numbers, the name of one.

    Raises
    ------
    InputError
        Names what is missing, damaged or not as the layout says.
    """
    place = Path(path).expanduser().resolve()
    kind = _loader_of(place, loader)
    option = SOURCES[kind].options(channels=channels, split=split)
    stamps = [stamp(file) for file in SOURCES[kind].files(place, *option)]
    picked = classes is not None
    key = cache.digest([CACHE_FORMAT, stamps, layout, kind, option, picked])
    entry = cache.entry(f"own-{key}", partial(_read, kind, place, option, layout, picked), verify=verify)
    return Held(entry.arrays["x"], entry.arrays["y"], entry.fingerprint)


def _loader_of(place: Path, loader: str | None) -> str:
    """The name of the source of a place: `loader`, else that of image folders or .npz; InputError if unknown."""
    kind = loader or ("image_folder" if place.is_dir() else "npz")
    if kind not in SOURCES or SOURCES[kind].setting is None:
        names = ", ".join(name for name, source in SOURCES.items() if source.setting)
        raise InputError(f"data-loader={kind} is unknown; use one of {names}")
    return kind


def _read(
    kind: str, place: Path, option: list[object], layout: DataLayout, picked: bool
) -> tuple[cache.Arrays, cache.Facts]:
    """The arrays `x` and `y` at a place, as a cache entry of no facts; InputError where they don't fit the layout."""
    x, y, names = read_training(kind, place, *option)
    shape = x.shape[1:] or (1,)
    if shape != layout.shape:
        raise InputError(f"{place}: a sample is {shape}, of the server's data {layout.shape}")
    raw = checked(Raw(x, y, x[:1], y[:1], names), str(place))
    if raw.x_train.dtype.kind != layout.kind:
        stored = {"u": "bytes", "f": "floats"}
        raise InputError(
            f"{place}: numbers are {stored[raw.x_train.dtype.kind]}, of the server's data {stored[layout.kind]}; "
            "store both alike"
        )
    labels = _labels(raw, layout, str(place), picked)
    kept = labels >= 0
    if not kept.any():
        raise InputError(f"{place}: no sample is of the classes {', '.join(layout.classes)}")
    return {"x": raw.x_train[kept], "y": labels[kept]}, {}


def _labels(raw: Raw, layout: DataLayout, where: str, picked: bool) -> np.ndarray:
    """The number (n,) of each sample's class among those of the layout, -1 where the class is none of them.

    A class that is none of them is an InputError, unless `dataset.classes` has `picked` some of all classes.
    """
    numbers = all(name.isdigit() for name in layout.classes)
    found = np.full(len(raw.y_train), -1)
    for label in np.unique(raw.y_train).tolist():
        if raw.names is None and not numbers:
            name = layout.classes[label] if 0 <= label < len(layout.classes) else str(label)
        else:
            name = str(label) if raw.names is None else raw.names[label]
        if name in layout.classes:
            found[raw.y_train == label] = layout.classes.index(name)
        elif not picked:
            raise InputError(f"{where}: class {name} is none of the server's: {', '.join(layout.classes)}")
    return found


def at_server(dataset: Dataset, counts: Sequence[int], contents: object) -> Dataset:
    """The training set of all nodes together as the server knows it: no sample, and no label (-1).

    Parameters
    ----------
    dataset : Dataset
        The data set that the server tests on.
    counts : sequence of int, (m,)
        How many samples each client holds; the set has them one client after the other.
    contents : object
        What the fingerprint of the result depends on besides, as JSON.

    Returns
    -------
    Dataset
    """
    return replace(
        dataset,
        x_train=dataset.x_train[:0],
        y_train=np.full(sum(counts), -1),
        fingerprint=cache.digest([dataset.fingerprint, contents]),
    )


def at_node(held: Held, layout: DataLayout, scale: float, counts: Sequence[int], client: int) -> Dataset:
    """The training set of all nodes together as a client knows it: its own samples in their place; nothing to test on.

    Parameters
    ----------
    held : Held
        The samples of the client.
    layout : DataLayout
        The layout of all nodes' samples, as the server has given it.
    scale : float
        What raw values are divided by.
    counts : sequence of int, (m,)
        How many samples each client holds.
    client : int
        The number of the client.

    Returns
    -------
    Dataset
    """
    first = sum(counts[:client])
    y = np.full(sum(counts), -1)
    y[first : first + len(held.y)] = held.y
    none = np.empty((0, held.x.shape[1]), held.x.dtype), np.empty(0, np.int64)
    return Dataset(held.x, y, *none, layout.classes, scale, held.fingerprint, layout.shape, first=first)
