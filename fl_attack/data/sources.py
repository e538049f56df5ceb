"""Where images come from: one reader and one row of `SOURCES` each.

The only user of torchvision and scikit-learn, imported inside the functions that read with them: what the
cache holds is opened without these imports, which take seconds. Where torchvision does not import, `formats`
reads the same files. Readers hand on what they find; `dataset` checks it.
"""

import io
import os
import re
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from fl_attack.data import cache, formats, hugging_face
from fl_attack.errors import InputError, message_or_type

NETWORK_PATIENCE = 5.0  # seconds without an answer
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # of images in folders
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
MNIST_FILES = [f"MNIST/raw/{name}" for name in IDX]
FASHION_MNIST_FILES = [f"FashionMNIST/raw/{name}" for name in IDX]
CIFAR10_FILES = [name for name in formats.MD5 if name.startswith(formats.CIFAR10)]  # the last two: test, names
CIFAR100_FILES = [name for name in formats.MD5 if name.startswith(formats.CIFAR100)]
SVHN_FILES = [name for name in formats.MD5 if name.endswith(".mat")]


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
    files: Callable[..., list[Path]]  # of the place and the option: what will be read, fetched where it can be
    read: Callable[..., Raw]  # of the place and the option
    scale: float | None = None  # of its raw values; None: 255 for integers, 1 for floats
    option: str | None = None  # the setting that both get as well

    def options(self, **settings: object) -> list[object]:
        """What `files` and `read` get after the place: the value of `option` among settings in a list, or none."""
        return [] if self.option is None else [settings[self.option]]


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn whatever the block raises into an InputError that names the file; an InputError stays as it is."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} can't be read: {message_or_type(error)}") from error


def _read_digits(place: Path) -> Raw:
    """The 1797 digits (n, 8, 8) that scikit-learn brings, the last 360 to test with; the place is not used."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    x, y, test = bundled.images.astype(np.uint8), bundled.target, 360
    return Raw(x[:-test], y[:-test], x[-test:], y[-test:])


def _read_mnist(root: Path) -> Raw:
    """MNIST as stored under `root`, images (n, 28, 28)."""
    x_train, y_train, x_test, y_test = _read_idx(root, MNIST_FILES)
    return Raw(x_train, y_train, x_test, y_test)


def _read_fashion_mnist(root: Path) -> Raw:
    """Fashion-MNIST as stored under `root`, images (n, 28, 28), with its names."""
    x_train, y_train, x_test, y_test = _read_idx(root, FASHION_MNIST_FILES)
    return Raw(x_train, y_train, x_test, y_test, formats.CLOTHES)


def _read_emnist(root: Path, split: str | None) -> Raw:
    """A split of EMNIST stored under `root`, images (n, 28, 28) upright, labels from 0, with its names."""
    x_train, y_train, x_test, y_test = _read_idx(root, _emnist_files(split))
    first = int(split == "letters")  # letters count from 1
    upright = x_train.swapaxes(1, 2), x_test.swapaxes(1, 2)  # they are stored lying on their side
    return Raw(upright[0], y_train - first, upright[1], y_test - first, list(formats.EMNIST[str(split)]))


def _emnist_files(split: str | None) -> list[str]:
    """The files of a split of EMNIST, in the order of `IDX`; InputError for an unknown one."""
    if split not in formats.EMNIST:
        raise InputError(f"dataset.split={split} is unknown; use one of {', '.join(formats.EMNIST)}")
    return [f"EMNIST/raw/emnist-{split}-{name.replace('t10k', 'test')}" for name in IDX]


def _torchvision() -> ModuleType | None:
    """torchvision's data sets; None where they can't be imported."""
    try:
        from torchvision import datasets
    except Exception:  # it is not there, or what a torch of another build than its own makes it raise
        return None
    found: ModuleType = datasets
    return found


def _read_idx(root: Path, files: list[str]) -> list[np.ndarray]:
    """Training images, their labels, test images, their labels from files in MNIST's format."""
    library = _torchvision()
    arrays: list[np.ndarray] = []
    for name, kind in zip(files, 2 * ("image", "label"), strict=True):
        with reading(root / name):
            if library is None:
                arrays.append(formats.read_idx(root / name).astype(np.uint8 if kind == "image" else np.int64))
            else:
                arrays.append(getattr(library.mnist, f"read_{kind}_file")(root / name).numpy())
    return arrays


def _refuse_damaged(root: Path, files: list[str]) -> None:
    """InputError where a file does not have the MD5 sum that was published."""
    for name in files:
        if not formats.is_as_published(root, name):
            raise InputError(f"{root / name} is damaged: its MD5 sum is wrong; delete it to download it anew")


def _read_svhn(root: Path) -> Raw:
    """SVHN as stored under `root`, images (n, 3, 32, 32), labels 0 to 9."""
    library = _torchvision()
    arrays: list[np.ndarray] = []
    for part, name in zip(("train", "test"), SVHN_FILES, strict=True):
        _refuse_damaged(root, [name])
        with reading(root / name):
            if library is None:
                arrays += formats.read_svhn(root / name)
            else:
                loaded = library.SVHN(root, split=part)
                arrays += [loaded.data, loaded.labels]
    x_train, y_train, x_test, y_test = arrays
    return Raw(x_train, y_train, x_test, y_test)


def _read_cifar10(root: Path) -> Raw:
    """CIFAR-10 as stored under `root`; see `_read_cifar`."""
    return _read_cifar(root, "CIFAR10", CIFAR10_FILES)


def _read_cifar100(root: Path) -> Raw:
    """CIFAR-100 with its fine labels; see `_read_cifar`."""
    return _read_cifar(root, "CIFAR100", CIFAR100_FILES)


def _read_cifar(root: Path, name: str, files: list[str]) -> Raw:
    """Images (n, 32, 32, 3) and labels under `root`, with names; `name` is that of torchvision's class."""
    _refuse_damaged(root, files)
    library = _torchvision()
    *parts, test, meta = files
    with reading((root / meta).parent), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dtype.*align")  # numpy 2.4.0 to 2.4.4, of old pickles
        if library is None:
            both = *formats.read_cifar(root, parts), *formats.read_cifar(root, [test])
            return Raw(*both, formats.cifar_names(root / meta))
        train, tested = (getattr(library, name)(root, train=part) for part in (True, False))
    return Raw(train.data, np.array(train.targets), tested.data, np.array(tested.targets), train.classes)


def read_training(loader: str, place: Path, *option: object) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """The training samples of a source, their labels and the names of these; test samples need not be there.

    Parameters
    ----------
    loader : str
        A name of `SOURCES`.
    place : Path
        The file or the folder.
    *option : object
        The value of the setting that the source gets as well, if there is one.

    Returns
    -------
    x : (n, ...) array
    y : (n,) array
    names : list of str or None
        Of the labels 0, 1, ..., where the source has some.

    Raises
    ------
    InputError
        Names what is missing or damaged.
    """
    if loader == "npz":
        x, y = _arrays_of(place, Raw._fields[:2])
        return x, y, None
    if loader == "image_folder":
        names = _class_names(place / "train")
        files = _images(place / "train", names)
        if not files:
            raise InputError(f"{place}: there is no image in train")
        channels = 1 if option == (1,) else 3
        first = files[0][0]
        x = _decoded(files, first, _decoded_one(first, channels).shape, channels)
        return x, np.array([label for _, label in files]), names
    raw = SOURCES[loader].read(place, *option)
    return raw.x_train, raw.y_train, raw.names


def _read_npz(file: Path) -> Raw:
    """The four arrays of an .npz file, as they are; InputError where one is missing."""
    x_train, y_train, x_test, y_test = _arrays_of(file, Raw._fields[:4])
    return Raw(x_train, y_train, x_test, y_test)


def _arrays_of(file: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names in an .npz file, in their order; InputError where one is missing."""
    if file.is_file() and not zipfile.is_zipfile(file):
        raise InputError(f"{file} is not an .npz file, or damaged; an .npz dataset holds {', '.join(keys)}")
    with reading(file), file.open("rb") as stream:  # numpy leaves a damaged file that it has opened open
        stored = np.load(stream, allow_pickle=False)
        if missing := [key for key in keys if key not in stored]:
            raise InputError(f"{file} lacks {', '.join(missing)}; an .npz dataset holds {', '.join(keys)}")
        return [stored[key] for key in keys]


def _read_image_folder(folder: Path, channels: int | None) -> Raw:
    """Images (n, height, width, channels) in `train/CLASS/` and `test/CLASS/`, with the classes as names.

    InputError where classes or sizes differ, or there is no image.
    """
    classes = {part: _class_names(folder / part) for part in ("train", "test")}
    if odd := sorted(set(classes["train"]) ^ set(classes["test"])):
        raise InputError(f"{folder}: train and test need the same classes; only one has {', '.join(odd)}")
    names = classes["train"]
    images = {part: _images(folder / part, names) for part in classes}
    if not images["train"] or not images["test"]:
        raise InputError(f"{folder}: there is no image in {'train' if not images['train'] else 'test'}")
    first = images["train"][0][0]
    shape = _decoded_one(first, channels or 3).shape
    x_train, x_test = (_decoded(files, first, shape, channels or 3) for files in images.values())
    kind = np.result_type(x_train, x_test)
    if kind != np.uint8:  # some have 16 bits, so that all are shares of what their type can hold
        x_train, x_test = (x if x.dtype == kind else x / np.float32(255) for x in (x_train, x_test))
    y_train, y_test = (np.array([label for _, label in files]) for files in images.values())
    return Raw(x_train, y_train, x_test, y_test, names)


def _read_hf(place: Path) -> Raw:
    """A data set of Hugging Face's; see `hugging_face.arrays`."""
    with reading(place):
        (x_train, y_train, x_test, y_test), names = hugging_face.arrays(place)
        return Raw(x_train, y_train, x_test, y_test, names)


def _class_names(folder: Path) -> list[str]:
    """Names of the folders in a folder: by number if every name is one, else by text; InputError without any."""
    with reading(folder):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise InputError(f"{folder} can't be read: it has no folder for each class")
    return sorted(names, key=int) if all(re.fullmatch("[0-9]+", name) for name in names) else names


def _images(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    """The paths of the images in each class's folder, each with the position of the class as its label."""
    return [
        (file, label)
        for label, name in enumerate(names)
        for file in _files(folder / name)
        if file.suffix.lower() in SUFFIXES
    ]


def _files(folder: Path) -> list[Path]:
    """All files at any depth of a folder, by folder and name."""
    walk = os.walk(folder, followlinks=True)
    return [Path(base, name) for base, _, found in sorted(walk) for name in sorted(found)]


def _decoded(images: list[tuple[Path, int]], first: Path, shape: tuple[int, ...], channels: int) -> np.ndarray:
    """Images of one shape as (n, height, width, channels) uint8, or where one has 16 bits float32 from 0 to 1.

    InputError where one is not of the `shape`, which is that of the file `first`.
    """
    from tqdm import tqdm

    pixels: np.ndarray = np.empty((len(images), *shape), np.uint8)
    progress = tqdm(images, "decoding images", disable=None, leave=False)  # None: on terminals only
    for row, (file, _) in enumerate(progress):
        image = _decoded_one(file, channels)
        if image.shape != shape:
            sizes = "{1} x {0}".format(*image.shape), "{1} x {0}".format(*shape)
            raise InputError(f"{file} is {sizes[0]} pixels, {first} is {sizes[1]}; all must have one size")
        if image.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = pixels / np.float32(255)
        if pixels.dtype != np.uint8:
            image = image / np.float32(np.iinfo(image.dtype).max)
        pixels[row] = image
    return pixels


def _decoded_one(file: Path, channels: int) -> np.ndarray:
    """An image as (height, width, channels) uint8 or uint16, of an animation the first; InputError for other files."""
    from PIL import Image, UnidentifiedImageError

    with reading(file):
        try:
            with Image.open(file, formats=FORMATS) as image:  # others would start programs such as Ghostscript
                mode = image.mode
                if mode.startswith("I;16"):
                    grey = np.asarray(image).astype(np.uint16)[..., None]
                    return np.broadcast_to(grey, (*grey.shape[:2], channels))
                if mode in ("I", "F"):
                    raise InputError(f"{file} holds 32-bit numbers, whose range is not known; store 8 or 16 bits")
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except UnidentifiedImageError:
            raise InputError(f"{file} is not an image of the formats {', '.join(FORMATS)}, or damaged") from None
    return pixels[..., None] if channels == 1 else pixels


def _under(folder: Path) -> list[Path]:
    """All files below `train` and `test` in a folder of images, sorted."""
    return sorted(file for part in ("train", "test") for file in _files(folder / part))


def _fetched(name: str, files: list[str], root: Path, **how: str) -> list[Path]:
    """The paths of files under `root`, downloaded by torchvision's class `name` if one is missing; else InputError."""
    expected = [root / file for file in files]
    missing = next((file for file in expected if not file.is_file()), None)
    if missing is None:
        return expected
    with cache.lock("download"):  # torchvision writes in place
        try:
            _download(name, root, **how)
        except Exception as error:
            reason = message_or_type(error).rpartition("got: ")[2]  # of the mirror that was tried last
            raise InputError(
                f"{missing} is not there and can't be downloaded: {reason}; "
                f"copy it there, or set dataset.root to the folder that holds {missing.relative_to(root)}"
            ) from error
    return expected


def _download(name: str, root: Path, **how: str) -> None:
    """Download with torchvision's class `name`: with a progress bar on terminals, and no long wait for the network."""
    library = _torchvision()
    if library is None:
        raise InputError("torchvision, which downloads, does not import")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_PATIENCE)
    try:
        watched = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with redirect_stdout(sys.stderr), watched:
            for more in [how] if name != "SVHN" else ({"split": "train"}, {"split": "test"}):
                getattr(library, name)(root, download=True, **more)
    finally:
        socket.setdefaulttimeout(patience)


SOURCES = {
    "digits": Source(None, lambda place: [], _read_digits, scale=16.0),
    "mnist": Source("root", lambda root: _fetched("MNIST", MNIST_FILES, root), _read_mnist),
    "cifar10": Source("root", lambda root: _fetched("CIFAR10", CIFAR10_FILES, root), _read_cifar10),
    "fashion_mnist": Source(
        "root", lambda root: _fetched("FashionMNIST", FASHION_MNIST_FILES, root), _read_fashion_mnist
    ),
    "emnist": Source(
        "root",
        lambda root, split: _fetched("EMNIST", _emnist_files(split), root, split=split),
        _read_emnist,
        option="split",
    ),
    "cifar100": Source("root", lambda root: _fetched("CIFAR100", CIFAR100_FILES, root), _read_cifar100),
    "svhn": Source("root", lambda root: _fetched("SVHN", SVHN_FILES, root), _read_svhn),
    "npz": Source("path", lambda file: [file], _read_npz),
    "image_folder": Source("path", lambda folder, channels: _under(folder), _read_image_folder, option="channels"),
    "hf": Source("path", hugging_face.files, _read_hf),
}
