"""What the page shows of a run."""

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_attack import data
from fl_attack.config import Settings, leaves_of, overrides_of
from fl_attack.data import Dataset
from fl_attack.errors import InputError
from fl_attack.folder import SUMMARY
from fl_attack.report.page import PagePart
from fl_attack.result import Result

POINTS = 400  # of a curve, at most
BINS = 24  # spans of rounds in which flips are counted, at most
CLASSES = 20  # rows of the matrix of flips, at most
SAMPLES = 24  # that were flipped most


def of_run(result: Result) -> PagePart:
    """The part of a run: its settings, curves, flips and clients; of an unfinished one no summary and no clients."""
    assert result.folder is not None
    settings, twin = result.settings, result.baseline
    finished = (result.folder / SUMMARY).exists()
    dataset = _dataset(settings)
    threat = settings.attack
    return {
        "kind": "run",
        "name": str(result.folder),
        "command": " ".join(["fl-attack", *overrides_of(settings)]),
        "settings": leaves_of(settings),
        "summary": result.summary if finished else {},
        "attacked": settings.attacked,
        "window": [threat.start, min(threat.stop or settings.rounds, settings.rounds), threat.every],
        "rounds": _curves(result),
        "honest": None if twin is None else _curves(twin),
        "honest_accuracy": twin.summary["final_accuracy"] if twin and finished else None,
        "clients": _clients(result) if finished else None,
        **_flips(result, settings, dataset),
    }


def _curves(result: Result) -> dict[str, NDArray[Any]]:
    """The columns of a run's table of rounds, of which at most `POINTS` are left, spread evenly from first to last."""
    columns = result.columns("rounds")
    count = len(columns["round"])
    at = np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int))
    return {name: column.astype(float)[at] for name, column in columns.items()}


def _clients(result: Result) -> dict[str, Any]:
    """Columns of the table of clients, and `flips`: how many flips in all rounds were of each one's samples."""
    table = result.columns("clients")
    names = ("client", "malicious", "samples", "labels", "final_accuracy")
    columns: dict[str, Any] = {name: table[name] for name in names}
    client_of = result.partition["client"]
    owners = client_of[result.columns("flips")["sample"]]
    columns["flips"] = np.bincount(owners[owners >= 0], minlength=len(columns["client"]))
    return columns


def _dataset(settings: Settings) -> Dataset | None:
    """The data of a run, as it loads it; None where it is not there any more, or was that of nodes."""
    if settings.partition.name == "own":
        return None
    try:
        return data.load(verify=False, **settings.dataset.model_dump())
    except InputError:
        return None


def _flips(result: Result, settings: Settings, dataset: Dataset | None) -> dict[str, Any]:
    """The entries `flips`, counts by span of rounds, true and written class, and `samples`, those flipped most.

    `flips` is None where there are none; without the data set all true classes are one, "any".
    """
    flips = result.columns("flips")
    rounds, samples, labels = (flips[name] for name in ("round", "sample", "label"))
    if not len(rounds):
        return {"flips": None, "samples": []}
    if dataset is not None and samples.max() >= len(dataset.y_train):
        dataset = None  # not the one of the run any more
    if dataset is None:
        classes = [str(label) for label in range(int(labels.max()) + 1)]
        true = np.zeros_like(labels)
        names = ["any"]
    else:
        classes = names = list(dataset.classes)
        true = dataset.y_train[samples]
    edges = np.unique(np.linspace(0, settings.rounds, min(BINS, settings.rounds) + 1).astype(int))
    span = np.searchsorted(edges, rounds) - 1
    count = np.zeros((len(edges) - 1, len(names), len(classes)), int)
    np.add.at(count, (span, true, labels), 1)
    shown = slice(CLASSES)
    return {
        "flips": {
            "edges": edges,
            "from": names[shown],
            "to": classes[shown],
            "counts": count[:, shown, shown],
            "left_out": max(0, len(classes) - CLASSES),
        },
        "samples": _most_flipped(samples, labels, dataset, classes),
    }


def _most_flipped(
    samples: NDArray[np.int64], labels: NDArray[np.int64], dataset: Dataset | None, classes: list[str]
) -> list[dict[str, Any]]:
    """The `SAMPLES` flipped most often, each with how often, its true label, the written ones and its picture."""
    found, times = np.unique(samples, return_counts=True)
    order = np.lexsort((found, -times))[:SAMPLES]
    shown = []
    for sample, count in zip(found[order].tolist(), times[order].tolist(), strict=True):
        written, counts = np.unique(labels[samples == sample], return_counts=True)
        shown.append(
            {
                "sample": sample,
                "times": count,
                "to": {classes[label]: n for label, n in zip(written.tolist(), counts.tolist(), strict=True)},
                "label": classes[dataset.y_train[sample]] if dataset else None,
                "picture": picture(dataset, sample) if dataset else None,
            }
        )
    return shown


def picture(dataset: Dataset, sample: int) -> str | None:
    """A training sample as an image in a page.

    Parameters
    ----------
    dataset : Dataset
        The data set that the sample is of.
    sample : int
        A position in the training set.

    Returns
    -------
    str or None
        The address (`data:`) of a PNG that holds it; None where samples are no images.
    """
    shape = dataset.image_shape
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        return None
    raw = np.asarray(dataset.x_train[sample], np.float64) / dataset.scale
    pixels = raw.reshape(dataset.shape if dataset.channels_last else shape)
    pixels = pixels if dataset.channels_last else np.moveaxis(pixels, 0, -1)
    return "data:image/png;base64," + base64.b64encode(png((255 * pixels.clip(0, 1)).round().astype(np.uint8))).decode()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG file of an image (H, W, C) with 1, 3 or 4 channels."""
    height, width, channels = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        """A chunk of the format: length, kind, content and checksum."""
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(lines.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts.items())
