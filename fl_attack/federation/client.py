"""The clients: what an honest one does, the one thing a malicious one does otherwise, and the Flower app of both.

Clients keep nothing between rounds. What they do is a function of the settings, their number, the round and the
parameters they are sent, so that any process can be any client at any time, and a lost one is replaced.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_attack import adversary, scenario
from fl_attack.errors import RunError
from fl_attack.federation import wire
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

Found = TypeVar("Found")


class Asked(NamedTuple):
    """What the server sends to a client."""

    theta: Tensor  # (C, d)
    round_: int
    anchor: Tensor | None  # theta at the start of the epoch, where attackers choose by epoch


class Trained(NamedTuple):
    """What a client makes of it."""

    theta: Tensor  # (C, d)
    weight: int  # samples used
    flips: Flips | None  # None: not a client that flips


class OmniscientHook:
    """What the attackers know together: every client's data, so all gradients at the broadcast parameters.

    The malicious clients of a process share one; it remembers its last answers for them.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._known: dict[str, tuple[tuple[int, bytes], Any]] = {}

    def flips(self, asked: Asked) -> Flips:
        """The labels that all malicious clients together write in a round."""
        made, (theta, round_, anchor) = self.scenario, asked
        if made.settings.attack.refresh == "step" or anchor is None:
            return self._once("flips", round_, theta, lambda: adversary.flips(made, theta, round_))
        first = adversary.epoch_start(made, round_)
        chosen = self._once("epoch", first, anchor, lambda: adversary.flips_of_epoch(made, anchor, first))
        return adversary.of_round(made, chosen, round_)

    def updates(self, asked: Asked) -> Tensor:
        """What all clients of a round send (m, C, d), honest and malicious."""
        made, (theta, round_, _) = self.scenario, asked

        def crafted() -> Tensor:
            return adversary.crafted(made, theta, round_, adversary.updates(made, theta, round_))

        return self._once("updates", round_, theta, crafted)

    def _once(self, what: str, round_: int, theta: Tensor, work_out: Callable[[], Found]) -> Found:
        key = round_, theta.numpy().tobytes()
        if what not in self._known or self._known[what][0] != key:
            self._known[what] = key, work_out()
        found: Found = self._known[what][1]
        return found


class HonestClient:
    """A participant that takes gradient steps on the minibatches of its shard."""

    def __init__(self, scenario: Scenario, client: int) -> None:
        self.scenario = scenario
        self.client = client

    def train(self, asked: Asked) -> Trained:
        """A round's local steps from the broadcast parameters."""
        return self.trained_on(asked, None)

    def trained_on(self, asked: Asked, flips: Flips | None) -> Trained:
        """The same on labels of which some are flipped."""
        moved, weight = scenario.client_update(self.scenario, self.client, asked.theta, asked.round_, flips or NO_FLIPS)
        return Trained(moved, weight, flips)


class MaliciousClient(HonestClient):
    """A participant that does all an honest one does, on labels, or with an update, of the attackers' choice."""

    def __init__(self, scenario: Scenario, client: int, hook: OmniscientHook) -> None:
        super().__init__(scenario, client)
        self.hook = hook

    def train(self, asked: Asked) -> Trained:
        """This client's part of what the attackers agreed on."""
        if self.scenario.settings.attack.writes == "updates":
            place = np.searchsorted(self.scenario.schedule.drawn(asked.round_), self.client)
            sent = self.hook.updates(asked)[place]
            weight = self.scenario.schedule.steps(self.client, asked.round_).size
            return Trained(asked.theta - self.scenario.settings.lr * sent, weight, NO_FLIPS)
        flips = self.hook.flips(asked)
        own = self.scenario.partition.client[flips.samples] == self.client
        return self.trained_on(asked, Flips(flips.samples[own], flips.labels[own], flips.allowed))


@lru_cache(maxsize=2)
def _hook(settings_json: str) -> OmniscientHook:
    return OmniscientHook(scenario.from_json(settings_json))


@lru_cache(maxsize=4096)
def client(settings_json: str, number: int) -> HonestClient:
    """The client of a number in an experiment."""
    made = scenario.from_json(settings_json)
    if made.settings.attacked and number in made.partition.malicious:
        return MaliciousClient(made, number, _hook(settings_json))
    return HonestClient(made, number)


@cache
def _one_thread() -> None:
    # many clients share a machine; and then no sum depends on how many cores it has
    torch.set_num_threads(1)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A round of the client that this context stands for."""
    _one_thread()
    number = int(str(context.node_config["partition-id"]))
    try:
        asked = wire.read_request(message.content)
        with torch.inference_mode():  # gradients are in closed form; torch need not watch
            answer = client(asked.settings, number).train(Asked(asked.theta, asked.round_, asked.anchor))
    except RunError as error:  # its message says all
        raise RuntimeError(str(error)) from error
    except Exception as error:
        raise RuntimeError(f"client {number}: {type(error).__name__}: {error}") from error
    return Message(
        wire.answer(wire.Answer(answer.theta, number, answer.weight, answer.flips), asked.raw), reply_to=message
    )


@client_app.query()
def introduce(message: Message, context: Context) -> Message:
    """The number of the client behind a node, which Flower leaves to each grid."""
    return Message(wire.introduction(int(str(context.node_config["partition-id"]))), reply_to=message)
