"""What travels in Flower's messages.

To clients: the parameters, the round and the settings of the experiment as JSON. Back: the client's parameters, its
id, the number of samples it used, and the labels it flipped. Clients keep nothing between rounds, so that any process
can be any client: where they have a momentum, it travels too, and the server keeps it for them.
"""

from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_attack.data.own import DataLayout
from fl_attack.scenario import NO_FLIPS, Flips

ARRAYS, CONFIG, METRICS, FLIPS, EPOCH_THETA = "arrays", "config", "metrics", "flips", "epoch_theta"
MOMENTUM, STORED, RULE, OWN = "momentum", "stored", "rule", "own"
SETTINGS, ROUND = "settings", "server-round"  # the round is put in by Flower's strategies themselves
WEIGHT, CLIENT = "num-examples", "client"
# The bytes of the array alone: Flower's own format parses a numpy file header in every message, a quarter of a small
# client's time. Its strategies know only their own, so clients answer in the format they were asked in.
RAW = "fl_attack.raw"


class Own(NamedTuple):
    """What the server sends to a node with data of its own: how the data of all clients are laid out."""

    layout: DataLayout
    client: int = -1  # its number, once it has one
    counts: tuple[int, ...] = ()  # samples of each client


class Request(NamedTuple):
    """The content of a message to a client."""

    theta: Tensor  # (A, B) float64
    raw: bool  # how to answer
    round_: int
    settings: str  # JSON
    epoch_theta: Tensor | None  # theta at the start of the epoch, where attackers choose by epoch
    momentum: Tensor | None  # the client's (1, A, B), or for attackers who use them those of all of the round (m, A, B)
    stored: Flips = NO_FLIPS  # what stands in the attackers' data, of all of them, where flips stay there
    rule: dict[str, Tensor] | None = None  # what the server's rule remembers, for attackers who know it
    own: Own | None = None  # where nodes train on data of their own


class Introduction(NamedTuple):
    """What a node says of itself."""

    client: int | None  # its number; None where it was given none
    samples: int = 0  # of data of its own
    fingerprint: str = ""
    malicious: bool = False


class Answer(NamedTuple):
    """The content of a client's reply."""

    theta: Tensor  # (A, B) float64
    client: int
    weight: int  # samples used
    flips: Flips | None  # None: not a client that flips
    momentum: Tensor | None = None  # (A, B) after the round, where clients have one


def pack(theta: Tensor, raw: bool) -> ArrayRecord:
    """Parameters as Flower's record.

    Parameters
    ----------
    theta : (A, B) tensor of float64
        The parameters to send.
    raw : bool
        Whether they travel as bare bytes, which only our own strategy understands.

    Returns
    -------
    ArrayRecord
        With one array, named `theta`.
    """
    values = theta.numpy()
    arrays = ArrayRecord()
    arrays["theta"] = Array(str(values.dtype), values.shape, RAW, values.tobytes()) if raw else Array(values)
    return arrays


def unpack(arrays: ArrayRecord) -> Tensor:
    """The parameters (A, B) of a record of `pack`, in float64."""
    array = arrays["theta"]
    if array.stype == RAW:
        return torch.frombuffer(bytearray(array.data), dtype=torch.float64).view(array.shape)
    return torch.from_numpy(array.numpy().astype(np.float64))


def to_plain(arrays: ArrayRecord) -> dict[str, dict[str, Any]]:
    """A record as a dict that a checkpoint can store: type, shape, format and bytes of each array, by name."""
    return {
        name: {
            "dtype": array.dtype,
            "shape": tuple(array.shape),
            "stype": array.stype,
            "data": np.frombuffer(array.data, np.uint8),
        }
        for name, array in arrays.items()
    }


def from_plain(plain: dict[str, dict[str, Any]]) -> ArrayRecord:
    """The record of which `to_plain` made this, to the bit."""
    arrays = ArrayRecord()
    for name, parts in plain.items():
        arrays[name] = Array(parts["dtype"], parts["shape"], parts["stype"], parts["data"].tobytes())
    return arrays


def read_request(content: Any) -> Request:
    """The request in the content of a message to a client."""
    array, config = content[ARRAYS]["theta"], content[CONFIG]
    raw = array.stype == RAW
    theta = _broadcast(array.data, array.shape) if raw else unpack(content[ARRAYS])
    epoch_theta = unpack(content[EPOCH_THETA]) if EPOCH_THETA in content else None
    momentum = _numbers(content[MOMENTUM]["values"]).view(-1, *theta.shape) if MOMENTUM in content else None
    stored = NO_FLIPS
    if STORED in content:
        samples, labels = (np.frombuffer(content[STORED][key], np.int64) for key in ("samples", "labels"))
        stored = Flips(samples, labels, 0)
    rule = _state(content[RULE]) if RULE in content else None
    own = read_own(content)
    return Request(theta, raw, int(config[ROUND]), config[SETTINGS], epoch_theta, momentum, stored, rule, own)


def own_record(own: Own) -> ConfigRecord:
    """What the server sends to a node with data of its own, as a record.

    Parameters
    ----------
    own : Own
        The layout of the data, the number of the client, and how many samples each client holds.

    Returns
    -------
    ConfigRecord
        As `read_own` reads it.
    """
    classes, shape, kind = own.layout
    facts: dict[str, Any] = {
        "classes": list(classes),
        "shape": list(shape),
        "kind": kind,
        "counts": list(own.counts) or [0],
    }
    return ConfigRecord(facts | {"client": own.client})


def read_own(content: Any) -> Own | None:
    """What the server has sent to a node with data of its own, from the content of its message.

    Parameters
    ----------
    content : RecordDict
        Of a request or of a question.

    Returns
    -------
    Own or None
        None where the run deals its data.
    """
    if OWN not in content:
        return None
    facts = content[OWN]
    layout = DataLayout(tuple(facts["classes"]), tuple(facts["shape"]), facts["kind"])
    return Own(layout, facts["client"], tuple(facts["counts"]))


def question(settings: str, own: Own) -> RecordDict:
    """The question to a node what data of its own it has.

    Parameters
    ----------
    settings : str
        The settings of the run, as JSON.
    own : Own
        The layout of the data.

    Returns
    -------
    RecordDict
        The content of the message.
    """
    return RecordDict({CONFIG: ConfigRecord({SETTINGS: settings}), OWN: own_record(own)})


def stored_record(stored: Flips) -> ConfigRecord:
    """A record of the flips that stay in the attackers' data, as `read_request` reads it."""
    return ConfigRecord({"samples": stored.samples.tobytes(), "labels": stored.labels.tobytes()})


def momentum_record(momentum: Tensor) -> ConfigRecord:
    """Momenta in float64 as a record; no `ArrayRecord`, of which Flower's strategies allow one to a reply."""
    return ConfigRecord({"values": momentum.numpy().tobytes()})


def state_record(state: dict[str, Tensor]) -> ConfigRecord:
    """A record of what a rule remembers, tensors by name, in float64."""
    parts: dict[str, Any] = {}
    for name, part in state.items():
        parts[f"{name}.shape"] = list(part.shape)
        parts[f"{name}.values"] = part.double().numpy().tobytes()
    return ConfigRecord(parts)


def _state(record: ConfigRecord) -> dict[str, Tensor]:
    """The tensors that a rule remembers, by name, from a record of `state_record`."""
    names = [key.removesuffix(".values") for key in record if key.endswith(".values")]
    return {name: _numbers(record[f"{name}.values"]).view(list(record[f"{name}.shape"])) for name in names}  # type: ignore[arg-type]


def _numbers(values: bytes) -> Tensor:
    """The tensor (n,) of float64 that these bytes are."""
    return torch.frombuffer(bytearray(values), dtype=torch.float64)


@lru_cache(maxsize=1)
def _broadcast(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """The parameters of this shape that bytes of float64 are; the last are shared, and not to be changed."""
    # the clients of a block are sent the same bytes
    return torch.frombuffer(bytearray(data), dtype=torch.float64).view(shape)


def answer(answer: Answer, raw: bool) -> RecordDict:
    """The content of a client's reply.

    Parameters
    ----------
    answer : Answer
        The result of the client's local steps.
    raw : bool
        Whether parameters travel as bare bytes, which strategies of Flower's can't read.

    Returns
    -------
    RecordDict
        It has exactly one array and one metric record, as Flower's strategies demand; flips and momenta are beside
        them.
    """
    metrics = MetricRecord({WEIGHT: answer.weight, CLIENT: answer.client})
    content = RecordDict({ARRAYS: pack(answer.theta, raw), METRICS: metrics})
    if answer.flips is not None:
        samples, labels, allowed, new = answer.flips
        content[FLIPS] = ConfigRecord({"samples": samples.tobytes(), "labels": labels.tobytes(), "allowed": allowed})
        if new is not None:
            cast(ConfigRecord, content[FLIPS])["new"] = new
    if answer.momentum is not None:
        content[MOMENTUM] = momentum_record(answer.momentum)
    return content


def introduction(introduced: Introduction) -> RecordDict:
    """The content of a node's reply to the question which client it is, as `read_introduction` reads it."""
    numbers = MetricRecord({CLIENT: -1 if introduced.client is None else introduced.client})
    own = ConfigRecord(
        {"samples": introduced.samples, "fingerprint": introduced.fingerprint, "malicious": introduced.malicious}
    )
    return RecordDict({METRICS: numbers, OWN: own})


def read_introduction(content: Any) -> Introduction:
    """What a node has said of itself.

    Parameters
    ----------
    content : RecordDict
        The content of the node's reply.

    Returns
    -------
    Introduction
    """
    number, own = client_of(content), content[OWN]
    return Introduction(None if number < 0 else number, own["samples"], own["fingerprint"], own["malicious"])


def client_of(content: Any) -> int:
    """The number of the client that the content of a reply is from; below 0 where its node was given none."""
    return int(content[METRICS][CLIENT])


def flips_of(content: Any) -> Flips | None:
    """The flips in the content of a client's reply; None where it is not from a client that flips."""
    if FLIPS not in content:
        return None
    record = content[FLIPS]
    samples, labels = (np.frombuffer(record[key], np.int64) for key in ("samples", "labels"))
    return Flips(samples, labels, record["allowed"], record.get("new"))


def read_answer(content: Any) -> Answer:
    """The answer in the content of a client's reply."""
    theta = unpack(content[ARRAYS])
    momentum = _numbers(content[MOMENTUM]["values"]).view(theta.shape) if MOMENTUM in content else None
    return Answer(theta, client_of(content), content[METRICS][WEIGHT], flips_of(content), momentum)


def reason_of(reply: Message) -> str:
    """What the client says in a reply that is an error: its own text, without what Flower puts around it."""
    reason = (reply.error.reason or "").rsplit("Message: ", 1)[-1].strip().removesuffix("'>")
    return reason.replace("\\'", "'") or "a client gave no reason"
