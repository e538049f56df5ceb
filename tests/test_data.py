"""Datasets: every source read alike, damage refused, one cached copy for all."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import inspect
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.error
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fl_attack import data, models
from fl_attack.data import cache, formats, sources
from fl_attack.data.sources import CIFAR10_FILES, CIFAR100_FILES, FASHION_MNIST_FILES, MNIST_FILES, SOURCES, SVHN_FILES
from fl_attack.errors import InputError, RunError

HERE = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FL_ATTACK_TEST_DATA", HERE.parent / "shared" / "data"))
NAMES = ("ant", "bee", "cat", "dog")


def test_classes_and_checksums_are_those_of_torchvision():
    theirs = pytest.importorskip("torchvision.datasets")
    assert set(formats.EMNIST) == set(theirs.EMNIST.splits)
    for split, classes in theirs.EMNIST.classes_split_dict.items():
        assert sorted(formats.EMNIST[split]) == sorted(set(classes) - {"N/A"}), split  # N/A: no letter has label 0
    for folder, source in ((formats.CIFAR10, theirs.CIFAR10), (formats.CIFAR100, theirs.CIFAR100)):
        files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        found = {name: digest for name, digest in formats.MD5.items() if name.startswith(f"{folder}/")}
        assert found == {f"{folder}/{name}": digest for name, digest in files}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FL_ATTACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The same small images, planted in the format of each source.


class Planted(NamedTuple):
    loader: str
    given: dict[str, Any]  # arguments of load
    files: list[Path]
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    names: tuple[str, ...]

    def load(self, **more):
        return data.load(self.loader, **self.given, **more)


def images(labels):
    """Random 32x32 colour images; any two differ."""
    return np.random.default_rng(7).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)


def plant_digits(folder, x_train, y_train, x_test, y_test, monkeypatch):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Planted("digits", {}, [], x[:1437], y[:1437], x[1437:], y[1437:], tuple("0123456789"))


def plant_mnist(folder, x_train, y_train, x_test, y_test, monkeypatch):
    arrays = [x_train[..., 0], y_train, x_test[..., 0], y_test]
    plant_idx(folder, MNIST_FILES, arrays)
    return Planted("mnist", {"root": folder}, [folder / name for name in MNIST_FILES], *arrays, tuple("0123"))


def plant_idx(folder, files, arrays):
    for name, array in zip(files, arrays, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def plant_fashion_mnist(folder, x_train, y_train, x_test, y_test, monkeypatch):
    arrays = [x_train[..., 0], y_train, x_test[..., 0], y_test]
    plant_idx(folder, FASHION_MNIST_FILES, arrays)
    files = [folder / name for name in FASHION_MNIST_FILES]
    return Planted("fashion_mnist", {"root": folder}, files, *arrays, ("T-shirt/top", "Trouser", "Pullover", "Dress"))


def plant_emnist(folder, x_train, y_train, x_test, y_test, monkeypatch):
    arrays = [x_train[..., 0], y_train + 1, x_test[..., 0], y_test + 1]  # letters count from 1, and lie on their side
    names = [f"EMNIST/raw/emnist-letters-{Path(name).name.replace('t10k', 'test')}" for name in FASHION_MNIST_FILES]
    plant_idx(folder, names, [array.swapaxes(1, 2) if array.ndim == 3 else array for array in arrays])
    files = [folder / name for name in names]
    given = {"root": folder, "split": "letters"}
    return Planted("emnist", given, files, arrays[0], y_train, arrays[2], y_test, tuple("abcd"))


def plant_cifar100(folder, x_train, y_train, x_test, y_test, monkeypatch):
    from torchvision.datasets import CIFAR100

    def batch(x, y):
        return {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "fine_labels": y.tolist()}

    files = [folder / name for name in CIFAR100_FILES]
    files[0].parent.mkdir(parents=True)
    contents = [batch(x_train, y_train), batch(x_test, y_test), {"fine_label_names": list(NAMES)}]
    for file, content in zip(files, contents, strict=True):
        with file.open("wb") as stream:
            OldPickler(stream, 2).dump(content)
    sums = [[file.name, hashlib.md5(file.read_bytes()).hexdigest()] for file in files]
    monkeypatch.setattr(formats, "MD5", {name: sum_ for name, (_, sum_) in zip(CIFAR100_FILES, sums, strict=True)})
    monkeypatch.setattr(CIFAR100, "train_list", sums[:1])
    monkeypatch.setattr(CIFAR100, "test_list", sums[1:2])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums[2][1]})
    return Planted("cifar100", {"root": folder}, files, x_train, y_train, x_test, y_test, NAMES)


def plant_svhn(folder, x_train, y_train, x_test, y_test, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    files, sums = [folder / name for name in SVHN_FILES], {}
    for file, part, x, y in ((files[0], "train", x_train, y_train), (files[1], "test", x_test, y_test)):
        # its 0 is stored as 10
        savemat(file, {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]})
        sums[part] = ["unused", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", sums)
    monkeypatch.setattr(formats, "MD5", {name: sum_ for _, name, sum_ in sums.values()})
    parts = [x_train.transpose(0, 3, 1, 2), y_train, x_test.transpose(0, 3, 1, 2), y_test]
    return Planted("svhn", {"root": folder}, files, *parts, tuple("0123"))


class OldPickler(pickle.Pickler):
    """Describes dtypes as numpy did when CIFAR-10 was made."""

    def reducer_override(self, value):
        return (np.dtype, (value.str, 0, 1)) if isinstance(value, np.dtype) else NotImplemented


def plant_cifar10(folder, x_train, y_train, x_test, y_test, monkeypatch):
    from torchvision.datasets import CIFAR10

    def batch(x, y):
        return {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()}

    trains = map(batch, np.array_split(x_train, 5), np.array_split(y_train, 5))
    files = [folder / name for name in CIFAR10_FILES]
    files[0].parent.mkdir(parents=True)
    contents = [*trains, batch(x_test, y_test), {"label_names": list(NAMES)}]
    for file, content in zip(files, contents, strict=True):
        with file.open("wb") as stream:
            OldPickler(stream, 2).dump(content)
    sums = [[file.name, hashlib.md5(file.read_bytes()).hexdigest()] for file in files]
    monkeypatch.setattr(formats, "MD5", {name: sum_ for name, (_, sum_) in zip(CIFAR10_FILES, sums, strict=True)})
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[6][1]})
    return Planted("cifar10", {"root": folder}, files, x_train, y_train, x_test, y_test, NAMES)


def plant_npz(folder, x_train, y_train, x_test, y_test, monkeypatch):
    file = folder / "mine.npz"
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return Planted("npz", {"path": file}, [file], x_train, y_train, x_test, y_test, tuple("0123"))


def plant_image_folder(folder, x_train, y_train, x_test, y_test, monkeypatch):
    files, parts = [], []
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            files.append(folder / part / NAMES[label] / f"{i:04}.png")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(files[-1])
        order = np.argsort(y, kind="stable")  # a folder holds its images by class
        parts += [x[order], y[order]]
    return Planted("image_folder", {"path": folder}, files, *parts, NAMES)


def plant_hf(folder, x_train, y_train, x_test, y_test, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf-cache")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        rows = {"image": [Image.fromarray(image) for image in x], "label": y}
        (folder / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")
    return Planted("hf", {"path": folder / "data"}, [], x_train, y_train, x_test, y_test, NAMES)


PLANTS = {
    "digits": plant_digits,
    "mnist": plant_mnist,
    "cifar10": plant_cifar10,
    "fashion_mnist": plant_fashion_mnist,
    "emnist": plant_emnist,
    "cifar100": plant_cifar100,
    "svhn": plant_svhn,
    "npz": plant_npz,
    "hf": plant_hf,
    "image_folder": plant_image_folder,
}


def plant(loader, tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    y_train, y_test = np.array([3, 0, 2, 1] * 6), np.array([1, 2, 0, 3, 3, 2, 1, 0])
    x = images([*y_train, *y_test])
    return PLANTS[loader](folder, x[:24], y_train, x[24:], y_test, monkeypatch)


@pytest.fixture(params=list(SOURCES))
def planted(request, tmp_path, monkeypatch):
    return plant(request.param, tmp_path, monkeypatch)


@pytest.fixture
def npz(tmp_path, monkeypatch):
    return plant("npz", tmp_path, monkeypatch)


def flat(x):
    return x.reshape(len(x), -1)


def refusal(*args, **kwargs):
    """The one line that refuses a load."""
    with pytest.raises(InputError) as caught:
        data.load(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# What every source promises.


def test_images_come_back_flat_and_in_their_order(planted):
    loaded = planted.load()
    for part in ("train", "test"):
        x, y = getattr(loaded, f"x_{part}"), getattr(loaded, f"y_{part}")
        assert x.dtype == np.uint8 and y.dtype == np.int64
        np.testing.assert_array_equal(x, flat(getattr(planted, f"x_{part}")))
        np.testing.assert_array_equal(y, getattr(planted, f"y_{part}"))
    assert loaded.classes == planted.names
    assert loaded.scale == (16 if planted.loader == "digits" else 255)


def test_picked_classes_are_renumbered_in_the_order_given(planted):
    loaded = planted.load(classes=[2, 0])
    for part in ("train", "test"):
        x, y = getattr(planted, f"x_{part}"), getattr(planted, f"y_{part}")
        picked = (y == 2) | (y == 0)
        np.testing.assert_array_equal(getattr(loaded, f"x_{part}"), flat(x[picked]))
        np.testing.assert_array_equal(getattr(loaded, f"y_{part}"), np.where(y[picked] == 2, 0, 1))
    assert loaded.classes == (planted.names[2], planted.names[0])


def test_classes_may_be_picked_by_name(planted):
    by_name = planted.load(classes=[planted.names[3], planted.names[1]])
    np.testing.assert_array_equal(by_name.y_train, planted.load(classes=[3, 1]).y_train)
    assert by_name.classes == (planted.names[3], planted.names[1])


@pytest.mark.parametrize("classes", [[0, 17], [1, "eel"], [2, 2], [0, 1, 0]])
def test_an_unknown_or_repeated_class_is_named_beside_the_known_ones(planted, classes):
    message = refusal(planted.loader, **planted.given, classes=classes)
    named = next(item for item in classes if item in (17, "eel") or classes.count(item) > 1)
    assert f"dataset.classes={named}" in message and ", ".join(planted.names) in message


@pytest.mark.parametrize("classes", [[], [1]])
def test_fewer_than_two_classes_are_refused(planted, classes):
    assert ", ".join(planted.names) in refusal(planted.loader, **planted.given, classes=classes)


def test_a_truncated_file_is_refused_by_name(planted):
    for file in planted.files:
        whole = file.read_bytes()
        end = 100 if file.suffix == ".png" else 1  # a PNG ends in sums and marks that no decoder misses
        for size in (0, 3, len(whole) // 2, len(whole) - end):
            file.write_bytes(whole[:size])
            assert str(file) in refusal(planted.loader, **planted.given)
        file.write_bytes(whole)


def test_what_is_cached_needs_no_reader(planted, monkeypatch):
    first = planted.load()
    for library in ("torchvision", "sklearn", "PIL"):
        monkeypatch.setitem(sys.modules, library, None)  # whoever imports it fails
    again = planted.load()
    np.testing.assert_array_equal(first.x_train, again.x_train)
    assert (first.classes, first.scale, first.fingerprint) == (again.classes, again.scale, again.fingerprint)


def test_a_folder_of_hugging_face_with_numbers_is_read_side_by_side_and_damage_is_refused(tmp_path):
    import datasets

    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 30), ("test", 12)):
        y = np.arange(count) % 3
        rows = {"width": rng.normal(size=count), "name": ["x"] * count, "height": rng.normal(size=count), "label": y}
        parts[part] = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    loaded = data.load("hf", path=tmp_path / "saved")
    for part, split in parts.items():
        wanted = np.column_stack([split["width"][:], split["height"][:]])
        np.testing.assert_array_equal(getattr(loaded, f"x_{part}"), wanted)
        np.testing.assert_array_equal(getattr(loaded, f"y_{part}"), split["label"][:])
    assert loaded.scale == 1 and loaded.classes == ("0", "1", "2")
    for file in (tmp_path / "saved").glob("train/*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert str(tmp_path / "saved") in refusal("hf", path=tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal("hf", path=tmp_path / "empty")


def test_a_name_of_the_hub_is_asked_for_as_such(tmp_path, monkeypatch):
    import flwr_datasets

    asked = []

    def unplugged(*args, dataset, **how):
        asked.append(dataset)
        raise ConnectionError("no network")

    monkeypatch.setattr(flwr_datasets, "FederatedDataset", unplugged)
    monkeypatch.chdir(tmp_path)
    assert "no network" in refusal("hf", path="hf://owner/name")
    assert asked == ["owner/name"]


OF_TORCHVISION = ["mnist", "fashion_mnist", "emnist", "cifar10", "cifar100", "svhn"]


@pytest.mark.parametrize("loader", OF_TORCHVISION)
def test_without_torchvision_the_same_arrays_are_read_and_damage_is_refused(loader, tmp_path, monkeypatch):
    planted = plant(loader, tmp_path, monkeypatch)
    raws = [planted.load()]
    monkeypatch.setitem(sys.modules, "torchvision", None)  # whoever imports it fails
    monkeypatch.setenv("FL_ATTACK_CACHE", f"{tmp_path}/another")
    raws.append(planted.load())
    assert raws[0].fingerprint == raws[1].fingerprint  # of arrays, their types, and the names
    for file in planted.files:
        whole = file.read_bytes()
        for damaged in (b"", whole[:3], whole[:-1], whole[:2] + b"\x0b" + whole[3:], whole + b"\0"):
            file.write_bytes(damaged)
            assert str(file) in refusal(planted.loader, **planted.given)
        file.write_bytes(whole)


def test_what_is_known_of_files_is_what_torchvision_knows():
    from torchvision import datasets

    known = {}
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        sums = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        known |= {f"{kind.base_folder}/{name}": sum_ for name, sum_ in sums}
    known |= {name: sum_ for _, name, sum_ in (datasets.SVHN.split_list[part] for part in ("train", "test"))}
    assert known == formats.MD5
    assert datasets.FashionMNIST.classes == formats.CLOTHES
    splits = {
        name: [one for one in labels if one != "N/A"] for name, labels in datasets.EMNIST.classes_split_dict.items()
    }
    assert splits == {name: list(labels) for name, labels in formats.EMNIST.items()}


def test_without_torchvision_a_missing_file_and_a_resnet_are_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    message = refusal("mnist", root=tmp_path)
    assert "torchvision" in message and str(tmp_path / MNIST_FILES[0]) in message and "dataset.root" in message
    with pytest.raises(InputError, match=r"resnet18 needs torchvision.*fl-attack\[vision\]"):
        models.make("resnet18", {}, "cross_entropy", (3, 8, 8), 2, 0)


def test_every_source_has_a_yaml_with_the_arguments_of_load():
    files = list((HERE / "conf" / "dataset").glob("*.yaml"))
    assert set(SOURCES) <= {file.stem for file in files}
    for content in (yaml.safe_load(file.read_text()) for file in files):
        assert content["loader"] in SOURCES
        optional = {"channels", "split"} - {SOURCES[content["loader"]].option}
        assert set(content) == set(inspect.signature(data.load).parameters) - {"verify"} - optional


# Sources that aren't there.


@pytest.mark.parametrize(("loader", "first"), [("mnist", MNIST_FILES[0]), ("cifar10", CIFAR10_FILES[0])])
def test_without_a_network_the_missing_file_is_named_quietly(loader, first, tmp_path, monkeypatch, capfd):
    def unplugged(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unplugged)
    message = refusal(loader, root=tmp_path)
    assert str(tmp_path / first) in message and "dataset.root" in message and "no network" in message
    assert capfd.readouterr() == ("", "")


def test_mnist_is_downloaded_quietly_where_it_is_not_there(tmp_path, monkeypatch, capfd):
    from torchvision.datasets import MNIST

    planted, resources = plant("mnist", tmp_path, monkeypatch), []
    (tmp_path / "served").mkdir()
    for file in planted.files:
        packed = gzip.compress(file.read_bytes())
        (tmp_path / "served" / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "served"))
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetched = data.load("mnist", root=tmp_path / "elsewhere")
        server.shutdown()
    np.testing.assert_array_equal(fetched.x_train, flat(planted.x_train))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("loader", ["npz", "image_folder"])
def test_a_missing_path_is_asked_for_and_a_wrong_one_named(loader, tmp_path):
    assert "dataset.path" in refusal(loader)
    assert str(tmp_path / "nowhere") in refusal(loader, path=tmp_path / "nowhere")


def test_an_unknown_loader_is_answered_with_the_known_ones():
    known = "digits, mnist, cifar10, fashion_mnist, emnist, cifar100, svhn, npz, image_folder"
    assert known in refusal("imagenet")


# Arrays that anyone brings.

SOUND = {
    "x_train": np.arange(12.0).reshape(4, 3),
    "y_train": np.array([0, 1, 0, 1]),
    "x_test": np.arange(6.0).reshape(2, 3),
    "y_test": np.array([1, 0]),
}


def saved(tmp_path, **changes):
    """The path of an .npz of sound arrays, some of them changed; None leaves one out."""
    np.savez(tmp_path / "mine.npz", **{k: v for k, v in {**SOUND, **changes}.items() if v is not None})
    return tmp_path / "mine.npz"


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("lacks y_test", {"y_test": None}),
        ("y_train has shape (3,)", {"y_train": np.array([0, 1, 0])}),
        ("y_train has shape (4, 1)", {"y_train": np.array([[0], [1], [0], [1]])}),
        ("samples are (3,) in x_train, (2,) in x_test", {"x_test": np.ones((2, 2))}),
        ("x_test holds NaN", {"x_test": np.array([[0, 1, np.nan]] * 2)}),
        ("x_train holds NaN or infinity", {"x_train": np.full((4, 3), -np.inf)}),
        ("x_train is empty", {"x_train": np.ones((0, 3)), "y_train": np.ones(0, int)}),
        ("x_test is empty", {"x_test": np.ones((0, 3)), "y_test": np.ones(0, int)}),
        ("x_train is empty", {"x_train": np.ones((4, 0)), "x_test": np.ones((2, 0))}),
        ("x_train is empty", {"x_train": np.float64(3)}),
        ("x_train holds <U1", {"x_train": np.full((4, 3), "a")}),
        ("x_train holds complex128", {"x_train": np.full((4, 3), 1j)}),
        ("y_train holds <U3", {"y_train": np.array(["cat", "dog", "cat", "dog"])}),
        ("y_train holds 0.5", {"y_train": np.array([0.5, 1, 0, 1])}),
        ("y_test holds nan", {"y_test": np.array([np.nan, 1])}),
        ("y_test holds 7, y_train only 0, 1", {"y_test": np.array([0, 7])}),
        ("2 classes or more", {"y_train": np.zeros(4, int), "y_test": np.zeros(2, int)}),
        ("x_train is float64, x_test int64", {"x_test": np.ones((2, 3), int)}),
        ("allow_pickle", {"x_train": np.array([{}, []], object)}),
    ],
)
def test_a_damaged_npz_is_refused_with_the_reason_and_the_file(word, changes, tmp_path):
    message = refusal("npz", path=saved(tmp_path, **changes))
    assert word in message and str(tmp_path / "mine.npz") in message


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04", pickle.dumps({"x_train": [1]})])
def test_what_is_no_npz_is_refused(content, tmp_path):
    (tmp_path / "mine.npz").write_bytes(content)
    assert str(tmp_path / "mine.npz") in refusal("npz", path=tmp_path / "mine.npz")


@pytest.mark.parametrize(
    ("given", "top", "stored", "scale"),
    [
        (np.uint8, 255, np.uint8, 255),
        (np.int16, 255, np.uint8, 255),
        (np.int64, 256, np.float32, 255),
        (">i4", -1, np.float32, 255),
        (np.float16, 2, np.float32, 1),
        (np.float32, 2, np.float32, 1),
        (">f8", 2, np.float64, 1),
    ],
)
def test_numbers_are_stored_as_bytes_where_all_are_and_else_as_floats(given, top, stored, scale, tmp_path):
    x_test = np.array([[0, 1, 2], [3, 4, top]]).astype(given)
    loaded = data.load("npz", path=saved(tmp_path, x_train=np.ones((4, 3), given), x_test=x_test))
    assert (loaded.x_train.dtype, loaded.x_test.dtype, loaded.scale) == (stored, stored, scale)
    np.testing.assert_array_equal(loaded.x_test, x_test)


@pytest.mark.parametrize("labels", [(-3, 40), (0.0, 7.0), (False, True)])
def test_labels_of_any_whole_numbers_are_renumbered_as_they_ascend(labels, tmp_path):
    low, high = labels
    path = saved(tmp_path, y_train=np.array([high, low, low, high]), y_test=np.array([low, high]))
    loaded = data.load("npz", path=path)
    assert loaded.y_train.tolist() == [1, 0, 0, 1] and loaded.y_test.tolist() == [0, 1]
    assert loaded.classes == (str(int(low)), str(int(high)))


def test_picked_classes_without_a_test_image_are_refused(tmp_path):
    path = saved(tmp_path, y_train=np.array([0, 1, 2, 2]), y_test=np.array([2, 2]))
    assert "no test image" in refusal("npz", path=path, classes=[0, 1])


def test_columns_of_a_fortran_array_are_read_as_rows(tmp_path):
    path = saved(tmp_path, x_train=np.asfortranarray(SOUND["x_train"]))
    loaded = data.load("npz", path=path)
    assert loaded.x_train.flags.c_contiguous
    np.testing.assert_array_equal(loaded.x_train, SOUND["x_train"])


def test_an_image_of_another_size_is_named(tmp_path, monkeypatch):
    planted = plant("image_folder", tmp_path, monkeypatch)
    odd = tmp_path / "source" / "test" / "bee" / "odd.png"
    Image.new("RGB", (32, 16)).save(odd)
    message = refusal("image_folder", **planted.given)
    assert str(odd) in message and "32 x 16" in message


def test_gray_images_are_read_as_colour(tmp_path, monkeypatch):
    planted = plant("image_folder", tmp_path, monkeypatch)
    first = tmp_path / "source" / "train" / "ant" / "0001.png"
    Image.new("L", (32, 32), 9).save(first)
    assert (planted.load().x_train[0] == 9).all()


def test_train_and_test_folders_must_have_the_same_classes(tmp_path, monkeypatch):
    planted = plant("image_folder", tmp_path, monkeypatch)
    (tmp_path / "source" / "test" / "bee").rename(tmp_path / "source" / "test" / "eel")
    assert "bee, eel" in refusal("image_folder", **planted.given)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_above_zero_is_refused(scale):
    assert f"dataset.scale={scale}" in refusal("digits", scale=scale)


def test_the_fingerprint_tells_contents_classes_and_scale_apart(npz, tmp_path):
    whole = npz.load()
    others = [npz.load(classes=[0, 1]), npz.load(classes=[1, 0]), npz.load(scale=2.0)]
    twin = tmp_path / "twin.npz"
    twin.write_bytes(npz.files[0].read_bytes())
    assert len({whole.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert data.load("npz", path=twin).fingerprint == whole.fingerprint
    assert others[2].scale == 2.0


# Features.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_the_scaled_raw_values_and_a_one_from_read_only_memory(dtype, npz):
    loaded = npz.load()
    X = data.features(loaded.x_train[3:9], loaded.scaling, dtype)
    assert X.dtype == dtype and X.shape == (6, 32 * 32 * 3 + 1)
    assert torch.equal(X[:, :-1], torch.tensor(flat(npz.x_train)[3:9]).to(dtype) / 255)
    assert (X[:, -1] == 1).all()


@given(st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None)
def test_the_constant_is_one_whatever_the_scale(scale, dtype):
    assert (data.features(np.ones((2, 3), np.uint8), data.Scaling(scale), dtype)[:, -1] == 1).all()


@given(
    st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["u1", "f4"]), st.integers(0)
)
@settings(deadline=None, max_examples=40)
def test_features_of_samples_kept_as_stored_are_the_same_to_the_last_bit(scale, dtype, kind, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (20, 37)).astype(kind)
    stored = data.Stored(raw, data.Scaling(scale), dtype)
    for count in (7, 7, 20, 0, 3):
        samples = rng.integers(0, 20, count)
        assert torch.equal(stored.features_of(samples), data.features(raw[samples], data.Scaling(scale), dtype))


# The cache.


def test_ten_loads_share_one_read_only_file(npz):
    loads = [npz.load() for _ in range(10)]
    for name in ("x_train", "y_train", "x_test", "y_test"):
        arrays = [getattr(loaded, name) for loaded in loads]
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
        assert len({os.stat(array.filename).st_ino for array in arrays}) == 1


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def alter(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [truncate, empty, alter, Path.unlink])
def test_a_damaged_cache_is_built_anew(damage, npz, cache_folder):
    before = npz.load()
    (entry,) = (folder for folder in cache_folder.iterdir() if folder.is_dir())
    files = sorted(entry.iterdir())
    assert len(files) == 5
    for file in files:
        whole = file.read_bytes()
        damage(file)
        assert npz.load().fingerprint == before.fingerprint
        assert file.read_bytes() == whole
    np.testing.assert_array_equal(before.x_train, flat(npz.x_train))  # mapped before the damage, held still


def test_altered_facts_are_built_anew(npz, cache_folder):
    npz.load()
    (meta,) = cache_folder.glob("*/meta.json")
    meta.write_text(meta.read_text().replace("255.0", "254.0"))
    assert npz.load().scale == 255


def test_without_verification_a_truncated_cache_is_still_noticed(npz, cache_folder):
    npz.load()
    (file,) = cache_folder.glob("*/x_test.npy")
    for damage in (truncate, empty):
        damage(file)
        np.testing.assert_array_equal(npz.load(verify=False).x_test, flat(npz.x_test))


def test_a_changed_source_is_read_anew(npz, tmp_path):
    npz.load()
    saved(tmp_path / "source")
    assert npz.load().x_train.shape == (4, 3)


def test_a_build_that_fails_leaves_no_entry(npz, cache_folder):
    truncate(npz.files[0])
    refusal("npz", **npz.given)
    assert not [found for found in cache_folder.iterdir() if found.is_dir()]


def test_a_build_starts_afresh_after_one_that_was_killed(npz, cache_folder):
    npz.load()
    (entry,) = (folder for folder in cache_folder.iterdir() if folder.is_dir())
    killed = entry.rename(entry.with_name(f".{entry.name}.unfinished"))
    (killed / "x_test.npy").write_bytes(b"half")
    np.testing.assert_array_equal(npz.load().x_test, flat(npz.x_test))
    assert not killed.exists()


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FL_ATTACK_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal("digits")
    assert str(tmp_path / "file" / "cache") in message and "set FL_ATTACK_CACHE" in message


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("FL_ATTACK_CACHE")
    assert cache.folder() == tmp_path / "xdg" / "fl_attack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "fl_attack"


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "new" / "file"
    cache.write_whole(file, lambda stream: stream.write(b"first"))

    with file.open("rb") as reader:
        cache.write_whole(file, lambda stream: stream.write(b"second"))
        assert reader.read() == b"first"  # who reads meanwhile keeps the old file, whole

    def interrupted(stream):
        stream.write(b"thi")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write_whole(file, interrupted)
    assert file.read_bytes() == b"second"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(InputError, match="can't be written to"):
        cache.write_whole(file / "below", lambda stream: stream.write(b"x"))


BUILDER = """
import sys, time
from pathlib import Path
from unittest.mock import MagicMock

sys.modules["torch"] = MagicMock()  # takes seconds to import and has no part in this
from fl_attack import data
from fl_attack.data import sources

read = sources.SOURCES["npz"].read
def slow(file):
    print("built")
    time.sleep(0.3)
    return read(file)
sources.SOURCES["npz"] = sources.Source("path", lambda file: [file], slow)
me, folder = sys.argv[1], Path(sys.argv[2])
(folder / me).touch()
while not all((folder / name).exists() for name in ("one", "two")):
    time.sleep(0.01)
print(data.load("npz", path=folder / "mine.npz").fingerprint)
print(*{"torchvision", "sklearn"} & set(sys.modules))
"""


def test_of_two_processes_at_once_one_builds_and_neither_imports_torchvision(npz, tmp_path):
    folder = npz.files[0].parent
    commands = [[sys.executable, "-c", BUILDER, name, str(folder)] for name in ("one", "two")]
    processes = [subprocess.Popen(line, cwd=HERE, stdout=subprocess.PIPE, text=True) for line in commands]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    fingerprint = npz.load().fingerprint
    assert sorted(outputs, key=len) == [[fingerprint], ["built", fingerprint]]


# The real ones.


@pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason=f"no MNIST in {SHARED}")
def test_the_zeros_and_ones_of_mnist_are_as_many_as_the_paper_has():
    loaded = data.load("mnist", root=SHARED, classes=[0, 1])
    assert loaded.x_train.shape == (12665, 784) and loaded.x_test.shape == (2115, 784)
    assert np.bincount(loaded.y_train).tolist() == [5923, 6742]
    assert loaded.x_train.max() == 255 and loaded.scale == 255


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10_jpeg.tar").is_file(), reason=f"no cifar10_jpeg.tar in {SHARED}")
def test_all_of_cifar10_loads_from_a_folder_of_images(tmp_path):
    with tarfile.open(SHARED / "cifar10_jpeg.tar") as archive:
        archive.extractall(tmp_path / "cifar10", filter="data")
    loaded = data.load("image_folder", path=tmp_path / "cifar10")
    assert loaded.x_train.shape == (50000, 3072) and loaded.x_test.shape == (10000, 3072)
    assert loaded.classes[:2] == ("airplane", "automobile")
    assert np.bincount(loaded.y_train).tolist() == [5000] * 10
    two = data.load("image_folder", path=tmp_path / "cifar10", classes=["airplane", "automobile"])
    assert two.x_train.shape == (10000, 3072) and two.x_test.shape == (2000, 3072)


# Images as people have them.


def picture(file, pixels, mode=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(file)


def two_classes(folder, make, names=("a", "b"), suffix=".png"):
    """Two classes of two images in each part; `make` gives the pixels of a class."""
    for part in ("train", "test"):
        for label, name in enumerate(names):
            for i in range(2):
                picture(folder / part / name / f"{i}{suffix}", make(label))


@pytest.mark.parametrize(("given", "size"), [({"channels": 1}, 20), ({}, 60)])
def test_images_of_16_bits_are_shares_of_what_16_bits_hold(tmp_path, given, size):
    two_classes(tmp_path, lambda label: np.full((4, 5), (100, 60000)[label], np.uint16))
    loaded = data.load("image_folder", path=tmp_path, **given)
    assert loaded.x_train.shape == (4, size) and loaded.scale == 1.0
    np.testing.assert_allclose(loaded.x_train[:, 0], np.array([100, 100, 60000, 60000]) / 65535, rtol=1e-6)


def test_one_image_of_16_bits_is_on_the_scale_of_the_others(tmp_path):
    two_classes(tmp_path, lambda label: np.full((4, 5), (51, 204)[label], np.uint8))
    picture(tmp_path / "test" / "a" / "1.png", np.full((4, 5), 65535, np.uint16))
    loaded = data.load("image_folder", path=tmp_path)
    assert loaded.x_train.shape == (4, 60)
    np.testing.assert_allclose(loaded.x_train[:, 0], [0.2, 0.2, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(loaded.x_test[:, 0], [0.2, 1.0, 0.8, 0.8], rtol=1e-6)


def test_images_of_floats_are_refused(tmp_path):
    two_classes(tmp_path, lambda label: np.full((4, 5), label / 2, np.float32), suffix=".tiff")
    assert "holds 32-bit numbers, whose range is not known" in refusal("image_folder", path=tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tiff", ".gif", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_named_is_read_grey_or_in_colour(tmp_path, suffix, channels):
    two_classes(tmp_path, lambda label: np.full((4, 5), (0, 255)[label], np.uint8), suffix=suffix)
    loaded = data.load("image_folder", path=tmp_path, channels=channels)
    assert loaded.x_train.shape == (4, 20 * channels) and loaded.scale == 255
    assert loaded.x_train.tolist() == [[0] * 20 * channels] * 2 + [[255] * 20 * channels] * 2


def test_what_only_claims_to_be_an_image_starts_no_program(tmp_path):
    two_classes(tmp_path, lambda label: np.full((4, 5), label, np.uint8))
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\nshowpage\n%%EOF\n"
    (tmp_path / "train" / "a" / "0.png").write_text(postscript)
    assert "0.png is not an image of the formats PNG, JPEG" in refusal("image_folder", path=tmp_path)


def test_folders_named_by_numbers_are_in_their_order(tmp_path):
    two_classes(tmp_path, lambda label: np.full((4, 5), label, np.uint8), names=("1", "2", "10"))
    assert data.load("image_folder", path=tmp_path).classes == ("1", "2", "10")
    for classes in (["2", "10"], [2, 10]):
        assert data.load("image_folder", path=tmp_path, classes=classes).classes == ("2", "10")


@pytest.mark.parametrize(
    ("low", "high", "refused"), [(0, 1, True), (-1, 1, True), (0, 2, False), (0, 255, False), (0, 256, False)]
)
def test_whole_numbers_that_are_no_pixels_are_not_scaled_by_a_guess(tmp_path, low, high, refused):
    x, y = np.where(np.eye(6, dtype=int) > 0, high, low), np.arange(6) % 2
    np.savez(tmp_path / "bits.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    if refused:
        wanted = "holds whole numbers of at most 1, which don't look like pixels of 0 to 255"
        assert wanted in refusal("npz", path=tmp_path / "bits.npz")
    else:
        assert data.load("npz", path=tmp_path / "bits.npz").scale == 255
    assert data.load("npz", path=tmp_path / "bits.npz", scale=1.0).scale == 1
    np.savez(tmp_path / "floats.npz", x_train=x * 1.0, y_train=y, x_test=x * 1.0, y_test=y)
    assert data.load("npz", path=tmp_path / "floats.npz").scale == 1


def test_images_of_pixels_0_and_1_are_pointed_out(tmp_path, capsys):
    two_classes(tmp_path, lambda label: np.full((4, 5), label, np.uint8))
    for scale, notes in ((None, 1), (1.0, 0)):
        data.load("image_folder", path=tmp_path, scale=scale)
        said = capsys.readouterr().err
        assert said.count("is dataset.scale=1 meant?") == said.count("\n") == notes


def test_an_unknown_part_of_emnist_is_refused(tmp_path):
    assert "dataset.split=all is unknown; use one of balanced" in refusal("emnist", root=tmp_path, split="all")


def test_checksums_are_compared_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FL_ATTACK_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return {"x": np.arange(1000, dtype=np.int64)}, {"n": 1}

    cache.entry("some", build)
    file = tmp_path / "some" / "x.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    assert cache.entry("some", build, verify=False).arrays["x"][-1] == 0 and len(built) == 1
    assert cache.entry("some", build).arrays["x"][-1] == 999 and len(built) == 2
    file.write_bytes(whole[:-8])
    assert cache.entry("some", build, verify=False).arrays["x"][-1] == 999 and len(built) == 3


# What samples are shaped as, and what raw values go through.


def stored(shape, standardize=False, samples=5):
    size = int(np.prod(shape))
    x = np.random.default_rng(0).integers(0, 255, (samples, size)).astype(np.uint8)
    y = np.zeros(samples, np.int64)
    return data.Dataset(x, y, x, y, ("a", "b"), 2.0, "", shape=tuple(shape), standardize=standardize)


@pytest.mark.parametrize(
    ("shape", "image", "last"),
    [
        ((4, 5), (1, 4, 5), False), ((6, 5, 3), (3, 6, 5), True), ((3, 4, 5), (3, 4, 5), False), ((6,), (6,), False),
        ((6, 5, 1), (1, 6, 5), True), ((5, 4, 4), (4, 5, 4), True), ((3, 5, 3), (3, 5, 3), False),
        ((2, 5, 2), (2, 5, 2), False), ((2, 3, 4, 5), (120,), False),
    ],
)  # fmt: skip
def test_images_have_their_channels_first_wherever_they_were_stored(shape, image, last):
    loaded = stored(shape)
    assert loaded.image_shape == image and loaded.channels_last == last
    features = torch.from_numpy(loaded.x_train).float()
    images = loaded.images(features)
    assert images.shape == (5, *image) and images.is_contiguous()
    whole = loaded.x_train.reshape(5, *shape)
    if len(image) == 3:
        whole = whole.transpose(0, 3, 1, 2) if last else whole.reshape(5, *image)
    np.testing.assert_array_equal(images.numpy(), whole.reshape(images.shape))


@pytest.mark.parametrize("shape", [(6, 5, 3), (3, 4, 5), (4, 5), (6,)])
def test_standardized_channels_have_mean_zero_and_deviation_one(shape):
    loaded = stored(shape, True, 5000 if shape == (6,) else 5)
    loaded.x_train[:, 0 if shape == (6,) else slice(0)] = 7  # a feature that never changes
    scaling = loaded.scaling
    assert scaling.scale == 2 and scaling.mean.shape == scaling.deviation.shape == (loaded.x_train.shape[1],)
    made = (loaded.x_train / 2.0 - scaling.mean) / scaling.deviation
    made = loaded.images(torch.from_numpy(made))
    axes = (0, 2, 3) if made.ndim == 4 else (0,)
    assert made.mean(axes).numpy() == pytest.approx(np.zeros(made.shape[1]), abs=1e-9)
    expected = np.array([0, 1, 1, 1, 1, 1]) if shape == (6,) else np.ones(made.shape[1])
    assert made.std(axes, correction=0).numpy() == pytest.approx(expected, abs=1e-9)
    plain = stored(shape).scaling
    assert plain.mean is None and plain.deviation is None


def test_rows_are_those_of_the_samples_asked_for_and_of_no_other_node():
    loaded = stored((6,))
    for samples in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2], [], [1, 3]):
        np.testing.assert_array_equal(loaded.rows(np.array(samples, np.int64)), loaded.x_train[samples])
    part = dataclasses.replace(loaded, x_train=loaded.x_train[2:4], first=2)
    assert loaded.is_complete and not part.is_complete
    np.testing.assert_array_equal(part.rows(np.array([3, 2])), loaded.x_train[[3, 2]])
    assert len(part.rows(np.array([], np.int64))) == 0
    for beyond in ([1, 2], [3, 4], [0], [4]):
        with pytest.raises(RunError, match="data that another node holds were asked for"):
            part.rows(np.array(beyond))


def test_a_download_waits_shortly_for_the_network_and_leaves_patience_as_it_was(tmp_path, monkeypatch):
    seen = []

    class Library:
        @staticmethod
        def SVHN(root, download, split):  # noqa: N802 - torchvision's
            seen.append((root, download, split, socket.getdefaulttimeout()))
            if split == "test":
                raise OSError("unplugged")

    monkeypatch.setattr(sources, "_torchvision", lambda: Library)
    socket.setdefaulttimeout(77.0)
    try:
        with pytest.raises(OSError, match="unplugged"):
            sources._download("SVHN", tmp_path)
        assert socket.getdefaulttimeout() == 77.0
    finally:
        socket.setdefaulttimeout(None)
    assert seen == [(tmp_path, True, split, sources.NETWORK_PATIENCE) for split in ("train", "test")]
    assert 1 < sources.NETWORK_PATIENCE < 120
