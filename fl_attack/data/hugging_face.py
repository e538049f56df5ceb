"""Data sets and partitioners of Flower Datasets, on which Hugging Face's library stands: the only user of both.

Both are an extra, imported where they are used.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fl_attack.errors import InputError, message_or_type

ON_THE_HUB = "hf:"  # hf://owner/name, of which a path makes /folder/hf:/owner/name
NUMBERS = ("int", "uint", "float", "bool")  # types of columns
LABELS = ("label", "labels", "fine_label", "y")  # columns, where none says that it holds classes


def hub_name(place: Path) -> str | None:
    """The name, as in owner/name, of a data set of the Hub in a path; None where the path is one of this machine."""
    parts = place.parts
    return "/".join(parts[parts.index(ON_THE_HUB) + 1 :]) if ON_THE_HUB in parts else None


def files(place: Path) -> list[Path]:
    """The files of a data set on this machine; none of one on the Hub."""
    if hub_name(place) is not None:
        return []
    return sorted(Path(base, name) for base, _, found in os.walk(place, followlinks=True) for name in found)


def arrays(place: Path) -> tuple[list[np.ndarray], list[str] | None]:
    """Training samples, their labels, test samples, their labels; and the names of the labels, None without any.

    Raises
    ------
    InputError
        Where the extra is not installed, a split or the labels are missing, or samples are no images of one size and no
        numbers.
    """
    splits = _splits(place)
    if missing := [name for name in ("train", "test") if name not in splits]:
        raise InputError(f"{place}: there is no split {missing[0]}, only {', '.join(splits)}")
    features = splits["train"].features
    label = _label_column(features, place)
    found = []
    for name in ("train", "test"):
        found += [_samples(splits[name], label, place), splits[name].with_format("arrow")[:][label].to_numpy()]
    return found, list(getattr(features[label], "names", None) or []) or None


def partitioned(name: str, args: dict[str, Any], labels: np.ndarray, clients: int, seed: int) -> np.ndarray:
    """Assign samples to clients with a partitioner of Flower Datasets.

    Parameters
    ----------
    name : str
        A class of `flwr_datasets.partitioner`.
    args : dict
        Arguments of the partitioner, beside the number of clients, the labels and the seed, which it gets where it
        takes them.
    labels : (n,) array of int
        The label of each sample.
    clients : int
        The number of clients.
    seed : int
        The seed of the deal; samples are shuffled by it first.

    Returns
    -------
    (n,) array of int
        The client of each sample.

    Raises
    ------
    InputError
        Where there is no such partitioner, it refuses its arguments, or it does not deal each sample to one client.
    """
    with _imported("partition=hf"):
        from datasets import Dataset
        from flwr_datasets import partitioner as table
    kind = getattr(table, name, None)
    if name not in table.__all__ or kind is None:
        raise InputError(f"partition.partitioner={name} is unknown; use one of {', '.join(table.__all__)}")
    parameters = kind.__init__.__code__.co_varnames
    order = np.random.default_rng(seed).permutation(len(labels))  # as Flower Datasets shuffles before it deals
    defaults = {"num_partitions": clients, "partition_by": "label", "seed": seed}
    try:
        dealer = kind(**{key: value for key, value in defaults.items() if key in parameters} | args)
        dealer.dataset = Dataset.from_dict({"label": labels[order], "sample": order})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out is refused below
            parts = [np.asarray(dealer.load_partition(client)["sample"][:], np.int64) for client in range(clients)]
        dealt = dealer.num_partitions
    except Exception as error:  # whatever a partitioner raises for its arguments
        raise InputError(f"partition.partitioner={name} with partition.args={args}: {message_or_type(error)}") from None
    if dealt != clients:
        raise InputError(f"partition.partitioner={name} makes {dealt} partitions, but clients.total={clients}")
    samples = np.concatenate(parts)
    if not np.array_equal(np.sort(samples), np.arange(len(labels))):
        raise InputError(f"partition.partitioner={name} leaves out samples or deals them twice; each needs one client")
    holder = np.empty(len(labels), np.int64)
    holder[samples] = np.repeat(np.arange(clients), [len(part) for part in parts])
    return holder


def _splits(place: Path) -> Any:
    """The splits of a data set by name, as tables of Hugging Face's; InputError without the extra."""
    with _imported("dataset=hf"):
        import datasets
        from flwr_datasets import FederatedDataset
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a data set that Flower has not tried
        if (place / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(place))
        whole = FederatedDataset(dataset=hub_name(place) or str(place), partitioners={"train": 1}, shuffle=False)
        return {name: whole.load_split(name) for name in ("train", "test")}


def _label_column(features: Any, place: Path) -> str:
    """The name of a column of classes, else of one in `LABELS`, best of one that is both; InputError without any."""
    classes = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    named = [name for name in LABELS if name in features]
    if not classes + named:
        raise InputError(f"{place}: no column holds labels ({', '.join(LABELS)}); there are {', '.join(features)}")
    return str(next((name for name in named if name in classes), (classes + named)[0]))


def _samples(split: Any, label: str, place: Path) -> np.ndarray:
    """The images of a split, (n, H, W) or (n, H, W, 3), else its columns of numbers, (n, columns) or of a list's shape.

    InputError where it has neither, or images of several sizes.
    """
    images = [name for name, kind in split.features.items() if type(kind).__name__ == "Image"]
    if images:
        pictures = (row[images[0]] for row in split.select_columns(images[:1]))
        pixels = [np.asarray(one if one.mode == "L" else one.convert("RGB")) for one in pictures]
        shapes = {one.shape for one in pixels}
        if len(shapes) != 1:
            two = " and ".join(map(str, sorted(shapes)[:2]))
            raise InputError(f"{place}: images are {two}; all must have one size")
        return np.stack(pixels)
    columns, table = [], split.with_format("arrow")[:]
    for name, kind in split.features.items():
        inner = kind
        while hasattr(inner, "feature"):  # of a list, what it is a list of
            inner = inner.feature
        if name == label or not str(inner.dtype).startswith(NUMBERS):
            continue
        nested = inner is not kind or hasattr(kind, "shape")
        values = np.array(table[name].to_pylist(), inner.dtype) if nested else table[name].to_numpy()
        columns.append(values)
    if not columns:
        raise InputError(f"{place}: no column holds images or numbers; there are {', '.join(split.column_names)}")
    return columns[0] if len(columns) == 1 and columns[0].ndim > 1 else np.column_stack(columns)


@contextmanager
def _imported(what: str) -> Iterator[None]:
    """InputError where the imports in the block fail."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs flwr-datasets ({error}); install fl-attack[hf]") from None
