"""Nodes of a deployed federation that train on data of their own, which nobody else sees."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from fl_attack import experiment, flower_app
from fl_attack.config import compose
from fl_attack.data import load, own
from fl_attack.errors import InputError, RunError
from fl_attack.federation import client

SIDE, CLASSES = 4, 3
NODES = (7, 3, 11, 5)  # as Flower draws them
Given = dict[str, str | int | bool]
OWN = ["partition=own", "attack.knowledge=own", "clients.total=4", "clients.malicious=1", "baseline=false"]
COMMON = ["rounds=5", "batch_size=30", "lr=0.5", "dtype=float64", "attack.budget=0.5", "report=false"]


class Nodes:
    """A grid in this process, whose nodes were started with these configurations."""

    def __init__(self, *configs: Given, crashes: int = 0) -> None:
        self.crashes = crashes  # so many messages of training to the first node are lost with their process
        self.configs = dict(zip(NODES, configs, strict=True))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self) -> list[int]:
        return list(self.configs)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(number)
            node = message.metadata.dst_node_id
            context = Context(run_id=1, node_id=node, node_config=self.configs[node], state=RecordDict(), run_config={})
            if node == NODES[0] and message.metadata.message_type == "train" and self.crashes:
                self.crashes -= 1
                yield Message(Error(8, "ClientApp has crashed"), reply_to=message)
                continue
            try:
                yield flower_app.client_app(message, context)
            except Exception as error:
                yield Message(Error(1, f"{type(error)}:<'{error}'>"), reply_to=message)


class Shards:
    """Small images, written as files for nodes, for the server, and all together."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(3)
        self.folder = folder
        self.y = [rng.integers(0, top, size) for size, top in ((40, 3), (25, 3), (31, 2), (18, 3))]  # one lacks a class
        centres = rng.integers(80, 175, (CLASSES, SIDE, SIDE, 3))
        self.x = [(centres[y] + rng.integers(-80, 81, (len(y), SIDE, SIDE, 3))).astype(np.uint8) for y in self.y]
        test = rng.integers(0, CLASSES, 50)
        self.test = (centres[test] + rng.integers(-80, 81, (50, SIDE, SIDE, 3))).astype(np.uint8), test
        x, y = self.test
        self.server = folder / "server.npz"
        np.savez(self.server, x_train=x[:9], y_train=y[:9], x_test=x, y_test=y)
        self.files = [folder / f"node{i}.npz" for i in range(3)]
        for file, x, y in zip(self.files, self.x, self.y, strict=False):
            np.savez(file, x_train=x, y_train=y)
        self.files.append(folder / "images")
        order = np.argsort(self.y[3], kind="stable")  # as its folders have them
        self.x[3], self.y[3] = self.x[3][order], self.y[3][order]
        for i, (pixels, label) in enumerate(zip(self.x[3], self.y[3], strict=True)):
            place = self.files[3] / "train" / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{i:03}.png")

    def order(self) -> list[int]:
        """The files in the order of the clients, where nodes have no numbers."""
        layout = own.layout_of(load("npz", path=self.server))
        return sorted(range(4), key=lambda i: own.held(self.files[i], layout).fingerprint)

    def together(self, order: list[int]) -> list[str]:
        """The overrides of a run that deals the same shards, in this order, here."""
        x, y = (np.concatenate([part[i] for i in order]) for part in (self.x, self.y))
        np.savez(self.folder / "all.npz", x_train=x, y_train=y, x_test=self.test[0], y_test=self.test[1])
        np.save(self.folder / "users.npy", np.repeat(np.arange(4), [len(self.y[i]) for i in order]))
        return [
            "dataset=npz",
            f"dataset.path={self.folder}/all.npz",
            "partition=given",
            f"partition.path={self.folder}/users.npy",
        ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(tmp_path_factory.mktemp("own"))


def serve(nodes: Nodes, *overrides: str) -> None:
    """The server app over nodes, as Flower calls it."""
    config = {"overrides": " ".join(overrides)}
    flower_app.server_app(nodes, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))  # type: ignore[arg-type]


def of_server(shards: Shards) -> list[str]:
    return ["dataset=npz", f"dataset.path={shards.server}"]


@pytest.mark.parametrize(
    ("case", "malicious"),
    [
        (["clients.per_round=3", "attack.rounding=carry", "attack.every=2"], 1),
        (["attack.memory=persist", "local_steps=2", "strategy=median", "worker_momentum=0.5"], 1),
        (["attack=random_flip", "attack.knowledge=full", "attack.scope=per_client", "attack.refresh=epoch"], 2),
    ],
)
def test_data_of_their_own_end_in_the_numbers_of_the_same_shards_dealt_here(
    shards: Shards, tmp_path: Path, case: list[str], malicious: int
) -> None:
    order = shards.order()
    both = [*COMMON, "attack.knowledge=own", "clients.total=4", *case, f"clients.malicious={malicious}"]
    here = compose(*both, *shards.together(order), "engine=batched", f"out={tmp_path}/here")
    experiment.run(here)
    chosen = np.load(tmp_path / "here" / "partition.npz")["malicious"]
    attackers = {order[client] for client in chosen}
    nodes = Nodes(*({"data-path": str(file), "malicious": i in attackers} for i, file in enumerate(shards.files)))
    serve(nodes, *both, "partition=own", *of_server(shards), f"out={tmp_path}/there")
    for part in (".", "baseline"):
        there, expected = (dict(np.load(tmp_path / one / part / "model.npz")) for one in ("there", "here"))
        np.testing.assert_allclose(there["theta"], expected["theta"], rtol=0, atol=1e-9)
    for file in ("flips.npz", "partition.npz"):
        there, expected = (np.load(tmp_path / one / file) for one in ("there", "here"))
        assert all(np.array_equal(there[key], expected[key]) for key in expected)
    assert len(np.load(tmp_path / "there" / "flips.npz")["round"]) > 5
    rows = [np.genfromtxt(tmp_path / one / "rounds.csv", delimiter=",", names=True) for one in ("there", "here")]
    for name in ("test_accuracy", "flips", "new_flips", "allowed", "effective_budget", "repeated"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], atol=1e-12, err_msg=name)
    assert np.isnan(rows[0]["cosine"]).all()  # of the clean gradient, which nobody knows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack.knowledge=full"], "attack.knowledge=full can't be had with partition=own, in which no node sees"),
        (["attack.knowledge=full", "attack.goal=targeted"], "attack.goal=targeted can't be had with partition=own"),
        (["attack.knowledge=full", "attack.direction=mean_feature"], "attack.direction=mean_feature can't be had"),
        (["attack=sign_flip", "attack.knowledge=full"], "attack=sign_flip can't be had with partition=own"),
        (["attack=planned", "attack.knowledge=full"], "attack=planned can't be had with partition=own"),
        (["attack.adapt=rule"], "attack.adapt=rule can't be had"),
        (["clients.malicious=2"], "attack.scope=pooled can't be had with partition=own"),
        (["early_stop.patience=3"], "early_stop.patience=3 can't be had"),
        (["strategy=fltrust"], "strategy=fltrust with a root can't be had"),
        (["dataset.standardize=true"], "dataset.standardize=true can't be had"),
        (["engine=batched"], "engine=batched can't be had"),
    ],
)
def test_what_needs_the_data_of_others_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        compose(*OWN, *overrides, "out=unused")


def test_a_run_without_nodes_is_told_in_one_line(
    command: Callable[..., tuple[int, str, str]], shards: Shards, tmp_path: Path
) -> None:
    code, _, said = command(*of_server(shards), *OWN, f"out={tmp_path}/out")
    assert code == 2 and said.count("\n") == 1 and not (tmp_path / "out").exists()
    assert said.startswith("fl-attack: partition=own needs a deployed federation, whose nodes bring data of their own")


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({0: {"data-path": None}}, [], "a node was started with partition-id=nothing; give each flower-supernode one"),
        ({0: {"data-path": None, "partition-id": 0}}, [], "the node of partition-id=0 has no data of its own"),
        ({}, ["partition=iid", "batch_size=9"], "has data of its own, and the run asks otherwise"),
        ({1: {"partition-id": 2}}, [], r"4 nodes answered as clients \[2\], not as each of 0 to 3 once"),
        ({1: {"malicious": "false"}}, [], "clients.malicious=1, but 0 of the 4 nodes were started with malicious=true"),
        ({1: {"malicious": "perhaps"}}, [], "malicious=perhaps; it is true or false"),
        ({1: {"data-path": "/nowhere.npz"}}, [], "/nowhere.npz can't be read"),
        ({1: {"data-loader": "tapes"}}, [], "data-loader=tapes is unknown; use one of mnist,.*npz"),
    ],
)
def test_a_node_that_can_not_take_part_is_told_before_any_round(
    shards: Shards,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[int, Given],
    overrides: list[str],
    message: str,
) -> None:
    configs = [
        {"data-path": str(file), "malicious": i == 1} | changes.get(i, {}) for i, file in enumerate(shards.files)
    ]
    nodes = Nodes(*({key: value for key, value in one.items() if value is not None} for one in configs))
    if overrides:
        nodes.configs = {node: one | {"partition-id": i} for i, (node, one) in enumerate(nodes.configs.items())}
    with pytest.raises((InputError, RunError), match=message):
        serve(nodes, *COMMON, *of_server(shards), *OWN, *overrides, f"out={tmp_path}/out")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fl-attack: ")]
    assert len(lines) == 1 and re.search(message, lines[0])
    assert not (tmp_path / "out" / "rounds.csv").exists()


def test_nodes_may_say_which_client_they_are(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[bool] = []
    monkeypatch.setattr(client, "held", lambda *of, verify, **how: (verified.append(verify), own.held(*of, **how))[1])
    configs = (
        {"data-path": str(file), "malicious": i == 1, "partition-id": 3 - i} for i, file in enumerate(shards.files)
    )
    serve(Nodes(*configs), *COMMON, *of_server(shards), *OWN, "rounds=1", f"out={tmp_path}/out")
    table = np.genfromtxt(tmp_path / "out" / "clients.csv", delimiter=",", names=True)
    assert table["samples"].tolist() == [len(y) for y in reversed(shards.y)]
    assert table["malicious"].tolist() == [0, 0, 1, 0]
    assert verified == [True] * 4 + [False] * 4  # checksums are compared once, when nodes are asked


def test_data_that_are_not_like_the_servers_are_told(shards: Shards, tmp_path: Path) -> None:
    layout = own.layout_of(load("npz", path=shards.server))
    x, y = shards.x[0], shards.y[0]

    def held(classes: object = None, **arrays: np.ndarray) -> own.Held:
        np.savez(tmp_path / "mine.npz", **arrays)
        return own.held(tmp_path / "mine.npz", layout, classes=classes)

    with pytest.raises(InputError, match=r"a sample is \(4, 4\), of the server's data \(4, 4, 3\)"):
        held(x_train=x[..., 0], y_train=y)
    with pytest.raises(InputError, match="numbers are floats, of the server's data bytes; store both alike"):
        held(x_train=x / 255, y_train=y)
    with pytest.raises(InputError, match="class 7 is none of the server's: 0, 1, 2"):
        held(x_train=x, y_train=np.where(y == 2, 7, y))
    with pytest.raises(InputError, match="lacks y_train"):
        held(x_train=x)
    picked = held(["0", "1", "2"], x_train=x, y_train=np.where(y == 2, 7, y))
    assert np.array_equal(picked.x, x.reshape(len(x), -1)[y != 2]) and np.array_equal(picked.y, y[y != 2])


def test_labels_without_names_count_the_classes_of_the_server(shards: Shards, tmp_path: Path) -> None:
    layout = own.layout_of(load("npz", path=shards.server))._replace(classes=("cat", "dog", "owl"))
    np.savez(tmp_path / "mine.npz", x_train=shards.x[0], y_train=shards.y[0])
    assert np.array_equal(own.held(tmp_path / "mine.npz", layout).y, shards.y[0])
    for number, name in enumerate(("owl", "cat")):  # a folder names its classes
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.fromarray(shards.x[0][number]).save(tmp_path / "images" / "train" / name / "a.png")
    assert own.held(tmp_path / "images", layout).y.tolist() == [0, 2]


def test_what_another_node_holds_can_not_be_read(shards: Shards) -> None:
    layout = own.layout_of(load("npz", path=shards.server))
    mine = own.held(shards.files[1], layout)
    dataset = own.at_node(mine, layout, 255.0, [4, len(mine.y), 3], 1)
    assert np.array_equal(dataset.rows(np.array([4, 6])), mine.x[[0, 2]])
    for outside in (3, 4 + len(mine.y)):
        with pytest.raises(RunError, match="data that another node holds were asked for"):
            dataset.rows(np.array([outside, 5]))


def test_a_node_whose_client_app_crashes_is_asked_again(
    shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [{"data-path": str(file), "malicious": i == 1} for i, file in enumerate(shards.files)]
    both = [*COMMON, *of_server(shards), *OWN, "rounds=2"]
    for crashes in (0, 2):
        serve(Nodes(*configs, crashes=crashes), *both, f"out={tmp_path}/{crashes}")
    assert capsys.readouterr().err.count("the client apps of 1 nodes crashed; asking them again") == 2
    for name in ("model.npz", "flips.npz"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    with pytest.raises(RunError, match="round 1 failed"):
        serve(Nodes(*configs, crashes=3), *both, f"out={tmp_path}/3")
    assert "fl-attack: round 1 failed: ClientApp has crashed" in capsys.readouterr().out
