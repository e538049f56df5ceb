"""Where images come from: one reader and one row of `SOURCES` each.

The only user of torchvision and scikit-learn, imported inside the functions that read with them: what the
cache holds is opened without these imports, which take seconds. Readers hand on what they find; `dataset`
checks it.
"""

import io
import os
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fl_attack.data import cache
from fl_attack.errors import InputError

NETWORK_PATIENCE = 5.0  # seconds without an answer
MNIST_FILES = [
    f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
CIFAR10_FILES = [
    f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
]


class Raw(NamedTuple):
    """What a source holds: images of any shape, a label each, and names of the labels 0, 1, ... if any."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    names: list[str] | None = None


@dataclass(frozen=True)
class Source:
    """A row of the table of sources."""

    setting: str | None  # what locates it: "root", "path" or nothing
    files: Callable[[Path], list[Path]]  # what will be read, fetched where it can be; not opened yet
    read: Callable[[Path], Raw]
    scale: float | None = None  # of its raw values; None: 255 for integers, 1 for floats


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Whatever a library raises on a damaged file, as an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} can't be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_digits(place: Path) -> Raw:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    x, y, test = bundled.images.astype(np.uint8), bundled.target, 360
    return Raw(x[:-test], y[:-test], x[-test:], y[-test:])


def _read_mnist(root: Path) -> Raw:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    arrays = []
    for name, read in zip(MNIST_FILES, 2 * (read_image_file, read_label_file), strict=True):
        with reading(root / name):
            arrays.append(read(root / name).numpy())
    return Raw(*arrays)


def _read_cifar10(root: Path) -> Raw:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5

    sums = dict(CIFAR10.train_list + CIFAR10.test_list + [[CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    for file in (root / name for name in CIFAR10_FILES):
        if not check_md5(file, sums[file.name]):
            raise InputError(f"{file} is damaged: its MD5 sum is wrong; delete it to download it anew")
    with reading(root / CIFAR10.base_folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dtype.*align")  # numpy 2.4.0 to 2.4.4, of old pickles
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return Raw(train.data, np.array(train.targets), test.data, np.array(test.targets), train.classes)


def _read_npz(file: Path) -> Raw:
    keys = Raw._fields[:4]
    if file.is_file() and not zipfile.is_zipfile(file):
        raise InputError(f"{file} is not an .npz file, or damaged; an .npz dataset holds {', '.join(keys)}")
    with reading(file), file.open("rb") as stream:  # numpy leaves a damaged file that it has opened open
        stored = np.load(stream, allow_pickle=False)
        if missing := [key for key in keys if key not in stored]:
            raise InputError(f"{file} lacks {', '.join(missing)}; an .npz dataset holds {', '.join(keys)}")
        return Raw(*(stored[key] for key in keys))


def _read_image_folder(folder: Path) -> Raw:
    from torchvision.datasets import ImageFolder

    with reading(folder):
        train, test = (ImageFolder(folder / part) for part in ("train", "test"))
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise InputError(f"{folder}: train and test need the same classes; only one has {', '.join(odd)}")
    first = train.imgs[0][0]
    with reading(first):
        shape = np.asarray(train.loader(first)).shape
    x_train, x_test = (_decoded(part.imgs, first, shape) for part in (train, test))
    return Raw(x_train, np.array(train.targets), x_test, np.array(test.targets), train.classes)


def _decoded(images: list[tuple[str, int]], first: str, shape: tuple[int, ...]) -> np.ndarray:
    """Images of one shape as (n, height, width, 3) uint8; InputError names the first that differs."""
    from torchvision.datasets.folder import default_loader
    from tqdm import tqdm

    pixels = np.empty((len(images), *shape), np.uint8)
    progress = tqdm(images, "decoding images", disable=None, leave=False)  # None: on terminals only
    for row, (file, _) in enumerate(progress):
        with reading(file):
            image = np.asarray(default_loader(file))
        if image.shape != shape:
            sizes = "{1} x {0}".format(*image.shape), "{1} x {0}".format(*shape)
            raise InputError(f"{file} is {sizes[0]} pixels, {first} is {sizes[1]}; all must have one size")
        pixels[row] = image
    return pixels


def _under(folder: Path) -> list[Path]:
    """All files of an image folder."""
    walks = [os.walk(folder / part, followlinks=True) for part in ("train", "test")]
    return sorted(Path(base, name) for walk in walks for base, _, names in walk for name in names)


def _fetched(name: str, files: list[str], root: Path) -> list[Path]:
    """The files under `root`, downloaded by torchvision's class of that name if one is not there."""
    expected = [root / file for file in files]
    missing = next((file for file in expected if not file.is_file()), None)
    if missing is None:
        return expected
    with cache.lock("download"):  # torchvision writes in place
        try:
            _download(name, root)
        except Exception as error:
            reason = _one_line(error).rpartition("got: ")[2]  # of the mirror that was tried last
            raise InputError(
                f"{missing} is not there and can't be downloaded: {reason}; "
                f"copy it there, or set dataset.root to the folder that holds {missing.relative_to(root)}"
            ) from error
    return expected


def _download(name: str, root: Path) -> None:
    """With a progress bar for those who watch, and no long wait for a network that is not there."""
    from torchvision import datasets

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_PATIENCE)
    try:
        watched = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with redirect_stdout(sys.stderr), watched:
            getattr(datasets, name)(root, download=True)
    finally:
        socket.setdefaulttimeout(patience)


SOURCES = {
    "digits": Source(None, lambda place: [], _read_digits, scale=16.0),
    "mnist": Source("root", lambda root: _fetched("MNIST", MNIST_FILES, root), _read_mnist),
    "cifar10": Source("root", lambda root: _fetched("CIFAR10", CIFAR10_FILES, root), _read_cifar10),
    "npz": Source("path", lambda file: [file], _read_npz),
    "image_folder": Source("path", _under, _read_image_folder),
}
