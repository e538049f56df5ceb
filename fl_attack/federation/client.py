"""The clients: what an honest one does, the one thing a malicious one does otherwise, and the Flower app of both.

Clients keep nothing between rounds. What they do is a function of the settings, their number, the round and the
parameters they are sent, so that any process can be any client at any time, and a lost one is replaced.
"""

import json
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_attack import adaptive, adversary, aggregate, protocol, scenario
from fl_attack.config import Settings, settings_from
from fl_attack.data.own import DataLayout, Held, at_node, held
from fl_attack.errors import InputError, RunError
from fl_attack.federation import wire
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

Found = TypeVar("Found")


class OmniscientHook:
    """What the attackers know together: every client's data, so all gradients at the broadcast parameters.

    The malicious clients of a process share one; it remembers its last answers for them.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._rule: aggregate.Combine | None = None
        self._last: dict[str, tuple[tuple[int, bytes], Any]] = {}

    def flips(self, request: wire.Request) -> Flips:
        """The labels that all malicious clients together write in a round; the last answer is remembered."""
        scenario, theta, round_, stored = self.scenario, request.theta, request.round_, request.stored
        server = self._known_server(request)

        def flips() -> Flips:
            return adaptive.best_flips(scenario, theta, round_, server, request.epoch_theta, stored)

        return self._once("flips", round_, theta, flips, stored)

    def _known_server(self, request: wire.Request) -> adaptive.KnownServer | None:
        """What the attackers know of the server in a round; None where they do not search, whatever its strategy is."""
        if not adaptive.searches(self.scenario):
            return None
        if self._rule is None:
            self._rule = self.scenario.rule()
        return adaptive.KnownServer(self._rule, request.rule, request.momentum)

    def updates(self, request: wire.Request) -> tuple[Tensor, Tensor]:
        """What all clients of a round, ascending, would send honestly, and what they send: updates, (m, A, B) each."""
        scenario, theta, round_ = self.scenario, request.theta, request.round_

        def honest_and_sent() -> tuple[Tensor, Tensor]:
            honest = adversary.updates(scenario, theta, round_, momenta=request.momentum)
            return honest, adaptive.best_crafted(scenario, theta, round_, honest, self._known_server(request))

        return self._once("updates", round_, theta, honest_and_sent)

    def _once(
        self, what: str, round_: int, theta: Tensor, work_out: Callable[[], Found], stored: Flips = NO_FLIPS
    ) -> Found:
        """The result of `work_out`, remembered under `what` until another round, theta or `stored` is asked for."""
        key = round_, b"".join([theta.cpu().numpy().tobytes(), stored.samples.tobytes(), stored.labels.tobytes()])
        if what not in self._last or self._last[what][0] != key:
            self._last[what] = key, work_out()
        found: Found = self._last[what][1]
        return found


class HonestClient:
    """A participant that takes gradient steps on the minibatches of its shard."""

    def __init__(self, scenario: Scenario, client: int) -> None:
        self.scenario = scenario
        self.client = client

    def train(self, request: wire.Request) -> wire.Answer:
        """The answer to a request: the parameters after the local steps of a round."""
        return self.trained_on(request, None)

    def trained_on(self, request: wire.Request, flips: Flips | None) -> wire.Answer:
        """A client's answer after the local steps of a round on labels with flips.

        Parameters
        ----------
        request : wire.Request
            The request of the server.
        flips : Flips or None
            The labels of the round that are not the true ones; None says that this client never flips any.

        Returns
        -------
        wire.Answer
            With the parameters after the client's momentum, where it has one.
        """
        own, theta = self.scenario, request.theta
        moved, weight = scenario.client_update(own, self.client, theta, request.round_, flips or NO_FLIPS)
        if not own.settings.worker_momentum:
            return wire.Answer(moved, self.client, weight, flips)
        assert request.momentum is not None
        lr = own.lr(request.round_)
        place = (
            np.searchsorted(own.schedule.participants(request.round_), self.client) if len(request.momentum) > 1 else 0
        )
        after = protocol.with_momentum(own.settings.worker_momentum, request.momentum[place], (theta - moved) / lr)
        return wire.Answer(theta - lr * after, self.client, weight, flips, after)


class MaliciousClient(HonestClient):
    """A participant that does all an honest one does, on labels, or with an update, of the attackers' choice."""

    def __init__(self, scenario: Scenario, client: int, hook: OmniscientHook) -> None:
        super().__init__(scenario, client)
        self.hook = hook

    def train(self, request: wire.Request) -> wire.Answer:
        """The answer of this client: its part of the flips, or of the updates, that the attackers agreed on."""
        if self.scenario.settings.attack.writes == "updates":
            place = np.searchsorted(self.scenario.schedule.participants(request.round_), self.client)
            honest, crafted = (updates[place] for updates in self.hook.updates(request))
            weight = self.scenario.schedule.steps(self.client, request.round_).size
            moved = request.theta - self.scenario.lr(request.round_) * crafted
            momentum = honest if self.scenario.settings.worker_momentum else None
            return wire.Answer(moved, self.client, weight, NO_FLIPS, momentum)
        flips = self.hook.flips(request)
        own = self.scenario.partition.client[flips.samples] == self.client
        return self.trained_on(request, Flips(flips.samples[own], flips.labels[own], flips.allowed, flips.new))


@lru_cache(maxsize=2)
def _hook(settings_json: str) -> OmniscientHook:
    """The hook that the malicious clients of a process share in an experiment."""
    return OmniscientHook(scenario.from_json(settings_json))


@lru_cache(maxsize=4096)
def client(settings_json: str, number: int) -> HonestClient:
    """A client of an experiment.

    Parameters
    ----------
    settings_json : str
        The experiment's settings, as they travel.
    number : int
        The number of the client.

    Returns
    -------
    HonestClient
        A `MaliciousClient` where it is one of the attackers.
    """
    cell = scenario.from_json(settings_json)
    if cell.settings.attacked and number in cell.partition.malicious:
        return MaliciousClient(cell, number, _hook(settings_json))
    return HonestClient(cell, number)


@cache
def _one_thread() -> None:
    """Have torch use one thread in this process from now on."""
    # many clients share a machine; and then no sum depends on how many cores it has
    torch.set_num_threads(1)


client_app = ClientApp()


class Node(NamedTuple):
    """What a node was started with."""

    number: int | None
    data: str | None  # the path of data of its own
    loader: str | None
    malicious: bool


def node_of(context: Context, own: bool) -> Node:
    """What the node of a context was started with.

    Parameters
    ----------
    context : Context
        Flower's facts about the node.
    own : bool
        Whether the run's clients train on data of their own.

    Returns
    -------
    Node
        The number of the node, where its data are, and whether it is malicious.

    Raises
    ------
    RuntimeError
        Where what the node was started with is missing, has another form, or does not fit the run.
    """
    given = context.node_config
    number, data = str(given.get("partition-id", "")), given.get("data-path")
    if (number or data is None) and not number.isdigit():
        raise RuntimeError(
            f"a node was started with partition-id={number or 'nothing'}; give each flower-supernode one of its own, "
            "counted from 0: --node-config 'partition-id=0 num-partitions=3', or data: data-path=\"/data/mine.npz\""
        )
    name = f"the node of partition-id={number}" if number else f"the node of data-path={data}"
    if own != (data is not None):
        way_out = 'give each flower-supernode its own, as in data-path="/data/mine.npz"' if own else "use partition=own"
        raise RuntimeError(f"{name} has {'no ' if own else ''}data of its own, and the run asks otherwise; {way_out}")
    malicious = given.get("malicious", False)
    if str(malicious).lower() not in ("true", "false"):
        raise RuntimeError(f"{name} was started with malicious={malicious}; it is true or false")
    loader = given.get("data-loader")
    is_malicious = str(malicious).lower() == "true"
    if is_malicious and not own:
        raise RuntimeError(
            f"{name} was started with malicious=true, but the run draws who is malicious; use clients.malicious, or "
            "data of its own"
        )
    path = None if data is None else str(data)
    return Node(int(number) if number else None, path, None if loader is None else str(loader), is_malicious)


def held_by(node: Node, settings: Settings, layout: DataLayout, verify: bool) -> Held:
    """The data of a node with its own.

    Parameters
    ----------
    node : Node
        What the node was started with.
    settings : Settings
        The settings of the run.
    layout : DataLayout
        What the server says of all nodes' samples.
    verify : bool
        Whether to compare checksums of the cache.

    Returns
    -------
    Held
        The samples and labels of the node.

    Raises
    ------
    InputError
        Where they can't be read, or are not as the server says.
    """
    assert node.data is not None
    chosen = settings.dataset.model_dump(include={"classes", "channels", "split"})
    return held(node.data, layout, loader=node.loader, verify=verify, **chosen)


@lru_cache(maxsize=64)
def client_of_node(settings_json: str, node: Node, own: wire.Own) -> HonestClient:
    """The client of a node with data of its own.

    Parameters
    ----------
    settings_json : str
        As `Settings.model_dump_json` gives it.
    node : Node
        What the node was started with.
    own : wire.Own
        What the server has sent it about the others: how many samples they hold.

    Returns
    -------
    HonestClient
        A `MaliciousClient` where the node is malicious and the run has an attack; it then knows of no other attacker.

    Raises
    ------
    InputError
        Where the data can't be read, or are not as the server says.
    """
    settings = settings_from(json.loads(settings_json))
    assert settings.dataset.scale is not None  # spelled out by the server
    node_data = held_by(node, settings, own.layout, verify=False)
    dataset = at_node(node_data, own.layout, settings.dataset.scale, own.counts, own.client)
    cell = scenario.of_nodes(settings, dataset, own.counts, [own.client] if node.malicious else [])
    if node.malicious and cell.settings.attacked:
        return MaliciousClient(cell, own.client, OmniscientHook(cell))
    return HonestClient(cell, own.client)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A round of the client that this context stands for: what Flower calls for messages of the kind "train".

    Parameters
    ----------
    message : Message
        Its content is read by `wire.read_request`.
    context : Context
        Flower's facts about the node.

    Returns
    -------
    Message
        The reply, with the content of `wire.answer`.

    Raises
    ------
    RuntimeError
        In one line, which travels to the server as the error of the reply.
    """
    _one_thread()
    node, number = node_of(context, own=wire.OWN in message.content), None
    try:
        request = wire.read_request(message.content)
        number = request.own.client if request.own else node.number
        with torch.inference_mode():  # derivatives are in closed form or by torch.func; torch need not watch
            if request.own:
                participant = client_of_node(request.settings, node, request.own)
            else:
                assert node.number is not None
                participant = client(request.settings, node.number)
            device = participant.scenario.settings.engine.client_device
            answer = participant.train(request if device == "cpu" else _on(request, device))
    except RunError as error:  # its message says all
        raise RuntimeError(str(error)) from error
    except Exception as error:
        raise RuntimeError(f"client {number}: {type(error).__name__}: {error}") from error
    momentum = None if answer.momentum is None else answer.momentum.cpu()
    answer = answer._replace(theta=answer.theta.cpu(), momentum=momentum)
    return Message(wire.answer(answer, request.raw), reply_to=message)


def _on(request: wire.Request, device: str) -> wire.Request:
    """A request with its parameters on a device."""
    moved = (None if part is None else part.to(device) for part in (request.epoch_theta, request.momentum))
    epoch_theta, momentum = moved
    rule = None if request.rule is None else {name: part.to(device) for name, part in request.rule.items()}
    return request._replace(theta=request.theta.to(device), epoch_theta=epoch_theta, momentum=momentum, rule=rule)


@client_app.query()
def introduce(message: Message, context: Context) -> Message:
    """Answer which client is behind a node, which Flower leaves to each grid, and what data of its own it has.

    Parameters
    ----------
    message : Message
        The server's question; its content is that of `wire.question` where nodes have data of their own.
    context : Context
        As `train` takes it.

    Returns
    -------
    Message
        The reply, with the content of `wire.introduction`.

    Raises
    ------
    RuntimeError
        Where the node was started with what does not fit the run, or its data can't be read; Flower tells the server.
    """
    own = wire.read_own(message.content)
    node = node_of(context, own=own is not None)
    if own is None:
        return Message(wire.introduction(wire.Introduction(node.number)), reply_to=message)
    try:
        settings = settings_from(json.loads(str(message.content[wire.CONFIG][wire.SETTINGS])))
        node_data = held_by(node, settings, own.layout, verify=True)
    except InputError as error:
        raise RuntimeError(str(error)) from error
    introduction = wire.Introduction(node.number, len(node_data.y), node_data.fingerprint, node.malicious)
    return Message(wire.introduction(introduction), reply_to=message)
