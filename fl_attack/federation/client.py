"""The clients: what an honest one does, the one thing a malicious one does otherwise, and the Flower app of both.

Clients keep nothing between rounds. What they do is a function of the settings, their number, the round and the
parameters they are sent, so that any process can be any client at any time, and a lost one is replaced.
"""

from functools import cache, lru_cache

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_attack import scenario
from fl_attack.federation import wire
from fl_attack.scenario import NO_FLIPS, Flips, Scenario


class OmniscientHook:
    """What the attackers know together: every client's data, so the clean gradient at the broadcast parameters.

    The malicious clients of a process share one; it remembers the last round's answer for them.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._key: tuple[int, bytes] | None = None
        self._flips = NO_FLIPS

    def flips(self, theta: Tensor, round_: int) -> Flips:
        """The labels that all malicious clients together write in this round."""
        key = (round_, theta.numpy().tobytes())
        if key != self._key:
            self._flips, self._key = self.scenario.flips(theta, round_), key
        return self._flips


class HonestClient:
    """A participant that takes gradient steps on the minibatches of its shard."""

    def __init__(self, scenario: Scenario, client: int) -> None:
        self.scenario = scenario
        self.client = client

    def flips(self, theta: Tensor, round_: int) -> Flips | None:
        """The labels that this client changes before it trains: none."""
        return None

    def train(self, theta: Tensor, round_: int) -> tuple[Tensor, int, Flips | None]:
        """Parameters (C, d) after a round's local steps from theta, the samples used, and the labels flipped."""
        flips = self.flips(theta, round_)
        moved, weight = scenario.client_update(self.scenario, self.client, theta, round_, flips or NO_FLIPS)
        return moved, weight, flips


class MaliciousClient(HonestClient):
    """A participant that does all an honest one does, on labels of the attackers' choice."""

    def __init__(self, scenario: Scenario, client: int, hook: OmniscientHook) -> None:
        super().__init__(scenario, client)
        self.hook = hook

    def flips(self, theta: Tensor, round_: int) -> Flips:
        """This client's part of what the attackers agreed to flip."""
        flips = self.hook.flips(theta, round_)
        own = self.scenario.partition.client[flips.samples] == self.client
        return Flips(flips.samples[own], flips.labels[own], flips.allowed)


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
            moved, weight, flips = client(asked.settings, number).train(asked.theta, asked.round_)
    except Exception as error:
        raise RuntimeError(f"client {number}: {type(error).__name__}: {error}") from error
    return Message(wire.answer(wire.Answer(moved, number, weight, flips), asked.raw), reply_to=message)
