"""Readers of the files that torchvision reads, for where it does not import: beside a torch of another build, say.

They read the same arrays; the tests compare both. What is known of these files, their names and sums, stands here
once, for both ways.
"""

import hashlib
import pickle
import string
from pathlib import Path
from typing import Any

import numpy as np

CLOTHES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
MERGED_LETTERS = "cijklmopsuvwxyz"  # small letters that some splits of EMNIST count as their capitals
LETTERS = "".join(letter for letter in string.ascii_lowercase if letter not in MERGED_LETTERS)
EMNIST = {
    "balanced": string.digits + string.ascii_uppercase + LETTERS,
    "byclass": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "bymerge": string.digits + string.ascii_uppercase + LETTERS,
    "letters": string.ascii_lowercase,
    "digits": string.digits,
    "mnist": string.digits,
}
CIFAR10, CIFAR100 = "cifar-10-batches-py", "cifar-100-python"
MD5 = {
    f"{CIFAR10}/data_batch_1": "c99cafc152244af753f735de768cd75f",
    f"{CIFAR10}/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    f"{CIFAR10}/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    f"{CIFAR10}/data_batch_4": "634d18415352ddfa80567beed471001a",
    f"{CIFAR10}/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    f"{CIFAR10}/test_batch": "40351d587109b95175f43aff81a1287e",
    f"{CIFAR10}/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    f"{CIFAR100}/train": "16019d7e3df5f24257cddd939b257f8d",
    f"{CIFAR100}/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    f"{CIFAR100}/meta": "7973b15100ade9c7d40fb424638fde48",
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def is_as_published(root: Path, name: str) -> bool:
    """Whether a file has the content that was published.

    Parameters
    ----------
    root : Path
        The folder that the file is in.
    name : str
        The name of the file, one of the table `MD5`.

    Returns
    -------
    bool
        Whether its MD5 sum is that of the table.
    """
    with (root / name).open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest() == MD5[name]


def read_idx(file: Path) -> np.ndarray:
    """Bytes of any shape in MNIST's format: two zeros, the type 8, the axes, their lengths, the values.

    Raises
    ------
    ValueError
        Where the file holds something else, or another number of values.
    """
    content = file.read_bytes()
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int(size) for size in np.frombuffer(content[4:start], ">i4")]
    if not axes or len(shape) != axes or len(content) - start != np.prod(shape, dtype=object):
        raise ValueError("it is not in the format of MNIST, or damaged")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar(root: Path, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of CIFAR-10 or CIFAR-100.

    Parameters
    ----------
    root : Path
        The folder of the pickled batches.
    files : list of str
        The names of the batches. Their sums must have been checked: to unpickle is to run.

    Returns
    -------
    images : (n, 32, 32, 3) array of uint8
        Pixels by row, column and colour.
    labels : (n,) array of int
        The labels; of CIFAR-100 the fine ones.
    """
    batches = [_unpickled(root / name) for name in files]
    labels = np.concatenate([batch.get("labels", batch.get("fine_labels")) for batch in batches])
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


def cifar_names(file: Path) -> list[str]:
    """The names of the classes, from `batches.meta` or `meta`."""
    meta = _unpickled(file)
    return list(meta.get("label_names") or meta["fine_label_names"])


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary in a pickled file of Python 2, whose sum must have been checked: to unpickle is to run."""
    with file.open("rb") as stream:
        found: dict[str, Any] = pickle.load(stream, encoding="latin1")
    return found


def read_svhn(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) of uint8 and labels (n,), 0 to 9, of a file that has 10 for 0."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    content = loadmat(file)
    labels = content["y"].astype(np.int64).squeeze(-1)
    return content["X"].transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels)
