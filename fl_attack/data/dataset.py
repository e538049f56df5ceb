"""Datasets: checked, classes picked, cached, and turned into features.

Shapes: n samples of p raw numbers each; features are (n, p), or (n, p + 1) with a constant 1 last for the bias;
inputs of networks are (n, C, H, W) where the samples are images.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fl_attack.data import cache
from fl_attack.data.sources import SOURCES, Raw, reading
from fl_attack.errors import InputError, RunError

CACHE_FORMAT = 6  # of what is stored; another number leaves old entries aside
NUMBERS_AT_ONCE = 2**15  # features that are made in one go
CHANNELS = (1, 3, 4)  # of images: grey, colour, colour and transparency


class Scaling(NamedTuple):
    """What raw values go through: divided by `scale`, then where given less `mean` and over `deviation`, (p,) each."""

    scale: float
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """Images as loaded, classes picked: n training samples of p numbers each. The arrays are read-only."""

    x_train: np.ndarray  # (n, p) memory-mapped uint8, float32 or float64, in the order of the stored array
    y_train: np.ndarray  # (n,) int64, 0 .. C-1
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]  # name of each label
    scale: float  # raw values are divided by this
    fingerprint: str  # hash of all of the above and below
    shape: tuple[int, ...] = ()  # of a sample as it was stored: (H, W), (H, W, C), (C, H, W) or (p,)
    standardize: bool = False  # whether each channel gets mean 0 and deviation 1 over the training samples
    first: int = 0  # the training sample in the first row of x_train; others are elsewhere, see `data.own`

    def rows(self, samples: NDArray[np.int64]) -> np.ndarray:
        """Raw values (n, p) of training samples (n,); RunError where one of them is not held here."""
        x = np.asarray(self.x_train)  # indexing the bare array is quicker than the memory map
        if not self.is_complete:
            samples = samples - self.first
            if len(samples) and not 0 <= samples.min() <= samples.max() < len(x):
                raise RunError("data that another node holds were asked for")
        return x if len(samples) == len(x) and (np.diff(samples) == 1).all() else x[samples]

    @property
    def is_complete(self) -> bool:
        """Whether all training samples are here."""
        return len(self.x_train) == len(self.y_train)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a sample as networks take it: (C, H, W) of an image, else (p,)."""
        shape = self.shape or self.x_train.shape[1:]
        if len(shape) == 2:
            return (1, *shape)
        if len(shape) == 3:
            return (shape[2], *shape[:2]) if self.channels_last else tuple(shape)
        return (math.prod(shape),)

    @property
    def channels_last(self) -> bool:
        """Whether samples are images that were stored as (H, W, C)."""
        return len(self.shape) == 3 and self.shape[2] in CHANNELS and self.shape[0] not in CHANNELS

    def images(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, p) as networks take them, (n, C, H, W) or (n, p)."""
        if not self.channels_last:
            return features.view(len(features), *self.image_shape)
        return features.view(len(features), *self.shape).movedim(-1, 1).contiguous()

    @cached_property
    def scaling(self) -> Scaling:
        """What raw values go through to be features."""
        if not self.standardize:
            return Scaling(self.scale)
        shape = self.image_shape
        of_pixel = np.arange(self.x_train.shape[1])  # the channel of each; of plain features each is one by itself
        if len(shape) == 3:
            of_pixel = of_pixel % shape[0] if self.channels_last else of_pixel // math.prod(shape[1:])
        sums, squares = np.zeros((2, self.x_train.shape[1]))
        for start in range(0, len(self.x_train), 4096):
            part = self.x_train[start : start + 4096] / np.float64(self.scale)
            sums += part.sum(0)
            squares += (part**2).sum(0)
        count = len(self.x_train) * np.bincount(of_pixel)
        mean = np.bincount(of_pixel, sums) / count
        deviation = np.sqrt(np.maximum(np.bincount(of_pixel, squares) / count - mean**2, 0))
        deviation[deviation < 1e-12] = 1  # a channel that never changes becomes 0
        return Scaling(self.scale, mean[of_pixel], deviation[of_pixel])


def load(
    loader: str,
    *,
    root: str | Path = "data",
    path: str | Path | None = None,
    classes: Sequence[int | str] | None = None,
    scale: float | None = None,
    standardize: bool = False,
    channels: int | None = None,
    split: str | None = None,
    verify: bool = True,
) -> Dataset:
    """A data set of `SOURCES`, from the cache where it was loaded before; samples keep their order.

    Parameters
    ----------
    loader : str
        A name of `SOURCES`.
    root, path : str or Path
        Where its files are: the folder of several data sets, or the place of this one.
    classes : sequence of int or str, optional
        The classes to pick, by label or name, in that order: label 1 is `classes[1]`.
    scale : float, optional
        What raw values are divided by; by default 255 for integers, 1 for floats, 16 for digits.
    standardize : bool
        Whether each channel gets mean 0 and deviation 1 over the training samples; plain features are a channel each.
    channels : {1, 3}, optional
        Whether images of `image_folder` are read grey or coloured, which is the default.
    split : str, optional
        The part of `emnist`.
    verify : bool
        Whether to compare checksums of the cache; workers whose parent has loaded need not.

    Returns
    -------
    Dataset
        Raw arrays, mapped from the disk, and what they go through.

    Raises
    ------
    InputError
        Names what is missing, damaged or unknown, or integers whose scale is unclear.
    """
    if loader not in SOURCES:
        raise InputError(f"dataset.loader={loader} is unknown; use one of {', '.join(SOURCES)}")
    if scale is not None and not 0 < scale < math.inf:
        raise InputError(f"dataset.scale={scale} must be above 0")
    source, place = SOURCES[loader], _place(loader, root, path)
    wanted = None if classes is None else list(classes)
    option = source.options(channels=channels, split=split)
    key = cache.digest([CACHE_FORMAT, [stamp(file) for file in source.files(place, *option)], wanted, *option])
    entry = cache.entry(f"{loader}-{key}", partial(_read, loader, place, option, wanted), verify=verify)
    if scale is None:
        scale = _usual_scale(entry.facts, loader, place, verify)
    scale = float(scale)
    return Dataset(
        **entry.arrays,  # type: ignore[arg-type]
        classes=tuple(entry.facts["classes"]),
        scale=scale,
        fingerprint=cache.digest([entry.fingerprint, scale, *(["standardized"] if standardize else [])]),
        shape=tuple(entry.facts["shape"]),
        standardize=standardize,
    )


def _place(loader: str, root: str | Path, path: str | Path | None) -> Path:
    """The file or folder that holds the data of a loader; InputError where the setting that names it is missing."""
    located = {"root": root, "path": path, None: "."}[SOURCES[loader].setting]
    if located is None:
        raise InputError(f"dataset={loader} needs dataset.path, the place of its data")
    return Path(located).expanduser().resolve()


def _read(
    loader: str, place: Path, option: Sequence[Any], wanted: list[int | str] | None
) -> tuple[cache.Arrays, cache.Facts]:
    """The arrays of a source with the wanted classes alone, and what the cache is to know of them."""
    source = SOURCES[loader]
    where = str(place) if source.setting else loader
    raw = source.read(place, *option)
    arrays, names = _picked(checked(raw, where), wanted, where)
    return arrays, {
        "classes": names,
        "scale": source.scale or (1.0 if raw.x_train.dtype.kind == "f" else 255.0),
        "largest": float(max(arrays["x_train"].max(), arrays["x_test"].max())),
        "shape": raw.x_train.shape[1:] or (1,),
    }


def _usual_scale(facts: cache.Facts, loader: str, place: Path, verify: bool) -> float:
    """What raw values are divided by where no setting says it; InputError or a note as `_doubt_scale` has them."""
    scale: float = facts["scale"]
    if scale == 255 and facts["largest"] <= 1:
        _doubt_scale(loader, place, verify)
    return scale


def _doubt_scale(loader: str, place: Path, verify: bool) -> None:
    """Tell that whole numbers of at most 1 are hardly pixels of 0 to 255: for an .npz by an InputError, else a note."""
    if loader == "npz":
        raise InputError(
            f"{place} holds whole numbers of at most 1, which don't look like pixels of 0 to 255; say by what they are "
            "divided, as in dataset.scale=1"
        )
    if verify:
        note = f"note: {place} holds pixels of at most 1, which are divided by 255; is dataset.scale=1 meant?"
        print(note, file=sys.stderr)


def features(raw: np.ndarray, scaling: Scaling, dtype: torch.dtype, constant: bool = True) -> torch.Tensor:
    """Raw values scaled, as a tensor of samples.

    Parameters
    ----------
    raw : array, (n, p)
        Values as stored.
    scaling : Scaling
        What the values are divided and shifted by.
    dtype : torch.dtype
        The precision of the result.
    constant : bool
        Whether a constant 1 is appended, the feature of the bias.

    Returns
    -------
    Tensor, (n, p) or (n, p + 1)
        The samples in their order.
    """
    X = torch.empty(len(raw), raw.shape[1] + constant, dtype=dtype)
    view = X.numpy()  # numpy converts and copies in one pass, from read-only memory too
    scale, mean, deviation = scaling
    width, rows = raw.shape[1], max(1, NUMBERS_AT_ONCE // view.shape[1])
    for start in range(0, len(raw), rows):  # so few that they are still in the cache when they are divided
        part = view[start : start + rows]
        part[:, :width] = raw[start : start + rows]
        part[:, width:] = scale
        part /= scale  # numpy again: for a minibatch, waking torch's threads costs more than the division
        if mean is not None:
            part[:, :width] -= mean
            part[:, :width] /= deviation
    return X


class Stored:
    """Samples of which some are taken again and again, kept as they are stored: bytes are a quarter of what is read."""

    def __init__(self, raw: np.ndarray, scaling: Scaling, dtype: torch.dtype, constant: bool = True) -> None:
        """Take in raw samples (n, p), which are held as they are where their features would take more memory."""
        small = raw.dtype.itemsize < dtype.itemsize and scaling.mean is None
        self._raw = torch.tensor(raw) if small else features(raw, scaling, dtype, constant)
        self._scale = scaling.scale if small else None
        self._width = raw.shape[1] + constant
        self._taken = self._raw[:0]  # memory is used again: pages that are new each time take as long as the rest
        self._features = torch.empty(0, dtype=dtype)

    def features_of(self, samples: NDArray[np.int64]) -> torch.Tensor:
        """`features` (k, p) or (k, p + 1) of the raw samples at positions (k,); the next call overwrites them."""
        at = torch.from_numpy(samples)
        if len(self._taken) != len(at):
            self._taken = self._raw.new_empty(len(at), self._raw.shape[1])
        torch.index_select(self._raw, 0, at, out=self._taken)
        if self._scale is None:
            return self._taken
        if len(self._features) != len(at):
            self._features = self._features.new_ones(len(at), self._width)
        # a division of bytes would take longer
        self._features[:, : self._taken.shape[1]].copy_(self._taken).div_(self._scale)
        return self._features


def stamp(file: Path) -> tuple[str, int, int]:
    """Path, bytes and time of change (ns) of a file, which tell one state of it from another; InputError without it."""
    with reading(file):
        state = file.stat()
    return str(file), state.st_size, state.st_mtime_ns


def checked(raw: Raw, where: str) -> Raw:
    """Raw data with flat pixels of one type and int64 labels.

    Parameters
    ----------
    raw : Raw
        The data as a reader has given them.
    where : str
        The file or folder that the data are from, for the error.

    Returns
    -------
    Raw
        Samples (n, p), each kind in the type that both can be stored as; the names are those given.

    Raises
    ------
    InputError
        Where samples are no finite numbers, differ in shape or kind, or labels are not whole numbers, one a sample.
    """
    x_train = _numbers(raw.x_train, f"{where}: x_train")
    x_test = _numbers(raw.x_test, f"{where}: x_test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(f"{where}: samples are {x_train.shape[1:]} in x_train, {x_test.shape[1:]} in x_test")
    if (x_train.dtype.kind == "f") != (x_test.dtype.kind == "f"):
        raise InputError(f"{where}: x_train is {x_train.dtype}, x_test {x_test.dtype}; store both alike")
    kind = np.result_type(_compact_type(x_train), _compact_type(x_test))
    x_train, x_test = (np.ascontiguousarray(x.reshape(len(x), -1), kind) for x in (x_train, x_test))
    y_train = _labels(raw.y_train, len(x_train), f"{where}: y_train")
    y_test = _labels(raw.y_test, len(x_test), f"{where}: y_test")
    return Raw(x_train, y_train, x_test, y_test, raw.names)


def _numbers(x: np.ndarray, name: str) -> np.ndarray:
    """The samples as they are; InputError where there are none, or they are no finite numbers."""
    if x.dtype.kind not in "uif":
        raise InputError(f"{name} holds {x.dtype}; images are integers or floats")
    if not x.ndim or not x.size:
        raise InputError(f"{name} is empty: its shape is {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"{name} holds NaN or infinity; images are finite")
    return x


def _compact_type(x: np.ndarray) -> type[np.generic]:
    """The type to store numbers as: uint8 for integers from 0 to 255, float64 for wider floats, else float32."""
    if x.dtype.kind == "f":
        return np.float64 if x.dtype.itemsize > 4 else np.float32
    return np.uint8 if x.dtype == np.uint8 or (x.min() >= 0 and x.max() <= 255) else np.float32


def _labels(y: np.ndarray, count: int, name: str) -> np.ndarray:
    """The labels (count,) as int64; InputError where they are not as many, or no whole numbers."""
    if y.shape != (count,):
        raise InputError(f"{name} has shape {y.shape}; with a label per image it is ({count},)")
    if y.dtype.kind not in "buif":
        raise InputError(f"{name} holds {y.dtype}; labels are integers")
    with np.errstate(invalid="ignore"):
        whole = y.astype(np.int64)
    if (odd := y[whole != y]).size:
        raise InputError(f"{name} holds {odd[0]}; labels are integers")
    return whole


def _picked(raw: Raw, wanted: list[int | str] | None, where: str) -> tuple[cache.Arrays, tuple[str, ...]]:
    """Arrays of the samples of the wanted classes, labels in the order wanted, and the names of these classes.

    InputError where these are fewer than two, no test sample is of them, or with all wanted one is of another.
    """
    labels = np.unique(raw.y_train).tolist()
    names = [raw.names[label] if raw.names else str(label) for label in labels]
    chosen = range(len(labels)) if wanted is None else _places(wanted, labels, names)
    picked = tuple(names[place] for place in chosen)
    if len(picked) < 2:
        raise InputError(f"{where}: a classifier needs 2 classes or more; known: {', '.join(names)}")
    new_train, new_test = np.full(len(raw.y_train), -1), np.full(len(raw.y_test), -1)
    for new, place in enumerate(chosen):
        new_train[raw.y_train == labels[place]] = new
        new_test[raw.y_test == labels[place]] = new
    train, test = new_train >= 0, new_test >= 0
    if wanted is None and not test.all():
        raise InputError(f"{where}: y_test holds {raw.y_test[~test][0]}, y_train only {', '.join(names)}")
    if not test.any():
        raise InputError(f"{where}: no test image is of the classes {', '.join(picked)}")
    x_train, x_test = raw.x_train[train], raw.x_test[test]
    arrays = {"x_train": x_train, "y_train": new_train[train], "x_test": x_test, "y_test": new_test[test]}
    return arrays, picked


def _places(wanted: list[int | str], labels: list[int], names: list[str]) -> list[int]:
    """Positions of the wanted classes: of words among the names, of numbers among the labels.

    Where all names are numbers, a number wanted is a name. InputError where one is unknown, or wanted twice.
    """
    places: list[int] = []
    if all(name.isdecimal() for name in names):  # of folders: the third may be called 10
        labels = [int(name) for name in names]
    for item in wanted:
        known: list[int] | list[str] = names if isinstance(item, str) else labels
        if item not in known:
            raise InputError(f"dataset.classes={item} is unknown; known: {', '.join(names)}")
        places.append(known.index(item))  # type: ignore[arg-type]
        if places[-1] in places[:-1]:
            raise InputError(f"dataset.classes={item} is there twice; known: {', '.join(names)}")
    return places
