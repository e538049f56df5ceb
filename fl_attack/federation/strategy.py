"""The server: the mean as a Flower strategy, and what is kept of every round whatever the strategy."""

import importlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy import concatenate
from torch import Tensor

from fl_attack import adaptive, adversary, checkpoint, plans, protocol
from fl_attack.checkpoint import State
from fl_attack.data import own
from fl_attack.errors import InputError, RunError
from fl_attack.federation import wire
from fl_attack.federation.nodes import introduced
from fl_attack.history import Recorder
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

ASKED_AGAIN = 2  # times that a node is asked again in a round, where its client app has crashed
CRASHED = 8  # flwr.common.constant.ErrorCode.CLIENT_APP_CRASHED is not public


class RuleStrategy(FedAvg):
    """FedAvg with one of our aggregation rules in place of its average, and our server optimizers.

    After each round its attributes hold what the round was: `answers`, `updates` and `aggregate`.
    """

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(**all_clients(scenario))
        self.settings = scenario.settings
        self.scenario, self.rule = scenario, scenario.rule()
        self.aggregate = scenario.start()  # the aggregated gradient of the last round
        self.answers: list[wire.Answer] = []  # of the last round
        self.updates = self.aggregate.new_empty(0)  # (m, A, B) those of its clients
        self._theta = scenario.start()
        self._state = protocol.initial_state(self._theta)
        self.remembered: Any = None  # what the rule keeps between rounds

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The parameters after the server's step on the aggregate of the clients' updates; no metrics.

        For the arguments see `flwr`'s `Strategy`; replies are in the order of the clients.
        """
        self.answers = [wire.read_answer(reply.content) for reply in replies]
        weights = torch.tensor([answer.weight for answer in self.answers])
        client_order = torch.from_numpy(protocol.shuffled(self.settings.seed, server_round, len(self.answers)))
        lr = self.scenario.lr(server_round)
        self.updates = updates_of(self.answers, self._theta, lr)
        seen = self.scenario.seen(server_round, self._theta)
        self.aggregate, self.remembered = self.rule.step(self.updates, weights, client_order, seen, self.remembered)
        self._theta, self._state = protocol.server_step(
            self.settings.server_optimizer, self._theta, self.aggregate, lr, self._state
        )
        return wire.pack(self._theta, raw=True), None

    def state(self) -> State:
        """The state that the rounds to come need of those gone by."""
        return {"theta": self._theta, "optimizer": tuple(self._state), "rule": self.remembered}

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave."""
        self._theta, self._state = state["theta"], protocol.ServerState(*state["optimizer"])
        self.remembered = state["rule"]


def state_of(strategy: Strategy) -> State:
    """The state that a strategy keeps between rounds: of one that is not ours all attributes but functions.

    A checkpoint may not be able to store these, which `checkpoint.storable` tells.
    """
    if isinstance(strategy, RuleStrategy):
        return strategy.state()
    return {
        name: {"record": wire.to_plain(value)} if isinstance(value, ArrayRecord) else value
        for name, value in vars(strategy).items()
        if not callable(value)
    }


def restore(strategy: Strategy, state: State) -> None:
    """Put a strategy into the state of another run of the same experiment.

    Parameters
    ----------
    strategy : Strategy
        A strategy, of this package or of Flower, which is changed.
    state : dict
        What `state_of` gave of the strategy of the other run.
    """
    if isinstance(strategy, RuleStrategy):
        return strategy.restore(state)
    for name, value in state.items():
        record = isinstance(value, dict) and list(value) == ["record"]
        setattr(strategy, name, wire.from_plain(value["record"]) if record else value)


def updates_of(answers: Sequence[wire.Answer], theta: Tensor, lr: float) -> Tensor:
    """The updates of clients, as gradients.

    Parameters
    ----------
    answers : sequence of wire.Answer, m of them
        The clients' replies.
    theta : (A, B) tensor
        The parameters that they started from.
    lr : float
        The learning rate of the round.

    Returns
    -------
    (m, A, B) tensor
        `(theta - moved) / lr`, where `moved` are the parameters that a client has sent.
    """
    moved = torch.stack([answer.theta for answer in answers])
    return moved.neg_().add_(theta).div_(lr)  # in place: a thousand clients send tens of megabytes


class _StoppedEarly(Exception):  # noqa: N818 - no error
    """The way out of the loop over rounds of Flower's `Strategy.start`, which knows no other."""


class WatchedStrategy(Strategy):
    """Any strategy, its replies checked and put in the order of the clients, its rounds recorded.

    Flower averages over whoever answered; here a round counts only if every client asked answered once.
    """

    def __init__(self, strategy: Strategy, recorder: Recorder, client_of: Mapping[int, int] | None) -> None:
        """`client_of` names the client behind each node, where clients are not all asked the same."""
        self.strategy = strategy
        self.recorder = recorder
        self.client_of = client_of
        self._asked = 0
        self._grid: Grid | None = None
        self._messages: list[Message] = []  # the messages of the round
        self._clock = time.perf_counter()  # when the first round would have begun, had there been no interruption
        self._done = 0  # rounds of an earlier process, which Flower's loop does not count
        self._arrays = wire.pack(recorder.history.theta, raw=isinstance(strategy, RuleStrategy))
        self._epoch_theta = wire.pack(recorder.history.theta, raw=True)
        self._momenta = recorder.scenario.momenta(recorder.history.theta)
        self._stored = NO_FLIPS  # what stands in the attackers' data, which they do not keep themselves

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of the wrapped strategy to the clients that take part in a round, see `flwr`'s `Strategy`.

        To them is added what clients, who keep nothing, must know of earlier rounds: momenta, the parameters at the
        start of the epoch, flips that stay, and the state of the server's rule; and of the others' data, where each
        brings its own. RunError where `attack.adapt=rule` meets a rule whose state can't be sent.
        """
        scenario, server_round = self.recorder.scenario, server_round + self._done
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        if self.client_of is not None:
            participants = set(scenario.schedule.participants(server_round).tolist())
            messages = [message for message in messages if self.client_of[message.metadata.dst_node_id] in participants]
        self._asked = len(messages)
        if adversary.keeps_theta(scenario):
            if adversary.epoch_start(scenario, server_round) == server_round:
                if scenario.settings.attack.plans:
                    plans.note_start(scenario, server_round, self.recorder.history.theta)
                self._epoch_theta = wire.pack(self.recorder.history.theta, raw=True)
            for message in messages:  # the strategy may have given the same content to all
                message.content[wire.EPOCH_THETA] = self._epoch_theta
        remembered = getattr(self.strategy, "remembered", None)
        if remembered is not None and adaptive.searches(scenario):
            parts = remembered.values() if isinstance(remembered, dict) else [None]
            if not all(isinstance(part, torch.Tensor) for part in parts):
                raise RunError("attack.adapt=rule needs a rule whose state is a dict of tensors; this one's is another")
            for message in messages:
                message.content[wire.RULE] = wire.state_record(remembered)
        if scenario.settings.attacked and scenario.settings.attack.remembers:
            assert self.client_of is not None
            for message in messages:
                if self.client_of[message.metadata.dst_node_id] in scenario.partition.malicious:
                    standing = {wire.STORED: wire.stored_record(self._stored)}
                    message.content = RecordDict(dict(message.content) | standing)
        if scenario.settings.worker_momentum:
            assert self.client_of is not None
            for message in messages:
                content = RecordDict(dict(message.content))
                content[wire.MOMENTUM] = self._momentum_for(self.client_of[message.metadata.dst_node_id], server_round)
                message.content = content
        if scenario.settings.partition.name == "own":
            assert self.client_of is not None
            layout, counts = own.layout_of(scenario.dataset), tuple(map(len, scenario.schedule.shards))
            for message in messages:
                own_data = wire.Own(layout, self.client_of[message.metadata.dst_node_id], counts)
                message.content = RecordDict(dict(message.content) | {wire.OWN: wire.own_record(own_data)})
        self._grid, self._messages = grid, messages
        return messages

    def _asked_again(self, replies: list[Message], round_: int) -> list[Message]:
        """Replies, those of client apps that crashed replaced by what their nodes say to the same messages again.

        They are asked again at most `ASKED_AGAIN` times; replies that still report a crash then stay. Clients keep
        nothing, so no number depends on how often they are asked; Flower counts a task as crashed, too, whose process a
        busy machine leaves no time to say that it is alive.
        """
        for _ in range(ASKED_AGAIN):
            crashed = {one.metadata.src_node_id for one in replies if one.has_error() and one.error.code == CRASHED}
            if not crashed or self._grid is None:
                break
            print(
                f"round {round_}: the client apps of {len(crashed)} nodes crashed; asking them again", file=sys.stderr
            )
            again = [
                Message(one.content, node, one.metadata.message_type, group_id=one.metadata.group_id)
                for one in self._messages
                if (node := one.metadata.dst_node_id) in crashed
            ]
            replies = [one for one in replies if one.metadata.src_node_id not in crashed]
            replies += self._grid.send_and_receive(again)
        return replies

    def _momentum_for(self, client: int, round_: int) -> ConfigRecord:
        """The record of the momentum for a client: its own, or for attackers who use them those of all of the round."""
        scenario = self.recorder.scenario
        settings = scenario.settings
        uses_all = settings.attacked and (settings.attack.writes == "updates" or adaptive.searches(scenario))
        knows_all = uses_all and client in scenario.partition.malicious
        momenta = self._momenta.of(scenario.schedule.participants(round_) if knows_all else [client])
        assert momenta is not None
        return wire.momentum_record(momenta)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The result of the wrapped strategy on replies in the order of the clients, see `flwr`'s `Strategy`.

        The round is measured before the next one begins. RunError where a reply is missing or an error, or the strategy
        gives no parameters, or such as are not finite; `_StoppedEarly` where the run is to end with this round.
        """
        server_round += self._done
        ordered = complete(self._asked_again(list(replies), server_round), self._asked, server_round)
        before, lr = self.recorder.history.theta, self.recorder.scenario.lr(server_round)
        rule_strategy = self.strategy if isinstance(self.strategy, RuleStrategy) else None
        if rule_strategy is None:  # read first: strategies of Flower's take the arrays out of the replies
            answers = [wire.read_answer(reply.content) for reply in ordered]
            updates = updates_of(answers, before, lr)
        try:
            arrays, metrics = self.strategy.aggregate_train(server_round, ordered)
        except SystemExit as error:
            raise RunError(f"{type(self.strategy).__name__} called sys.exit({error.code})") from None
        if arrays is None:
            raise RunError(
                f"{type(self.strategy).__name__} gave no parameters in round {server_round}: it has its own minimum of "
                f"replies, and {len(ordered)} came"
            )
        theta = wire.unpack(arrays)
        if rule_strategy is not None:
            answers, updates, aggregate = rule_strategy.answers, rule_strategy.updates, rule_strategy.aggregate
        else:  # the step it took
            aggregate = (before - theta) / lr
        momenta = [answer.momentum for answer in answers if answer.momentum is not None]
        if momenta:
            self._momenta.note([answer.client for answer in answers], torch.stack(momenta))
        flips = all_flips(ordered, own_allowances=self.recorder.scenario.settings.partition.name == "own")
        self._stored = adversary.remembered(self.recorder.scenario, server_round, self._stored, flips)
        self.recorder.record(server_round, theta, aggregate, flips, updates)
        self._arrays = arrays
        if self.recorder.stopped:
            raise _StoppedEarly
        if self.recorder.checkpoint is not None:
            self.recorder.checkpoint.offer(self.state)
        return arrays, metrics

    def state(self) -> State | None:
        """What `run` needs to go on after the last round; None where the strategy keeps what can't be stored."""
        try:
            strategy = checkpoint.storable(state_of(self.strategy))
        except TypeError:
            return None
        self.recorder.history.seconds = time.perf_counter() - self._clock
        return {
            "recorder": self.recorder.state(),
            "strategy": strategy,
            "arrays": wire.to_plain(self._arrays),
            "epoch_theta": wire.to_plain(self._epoch_theta),
            "momenta": self._momenta.table,
            "stored": {"samples": self._stored.samples, "labels": self._stored.labels},
        }

    def run(self, grid: Grid) -> None:
        """Run all rounds, or those that an earlier process has not done; the recorder then holds the history.

        RunError where a round fails, see `configure_train` and `aggregate_train`.
        """
        recorder, kept = self.recorder, self.recorder.checkpoint
        history, settings = recorder.history, recorder.scenario.settings
        state = kept.load() if kept else None
        if state is None:
            recorder.record(0, history.theta)
        else:
            recorder.restore(state["recorder"])
            restore(self.strategy, state["strategy"])
            self._arrays, self._epoch_theta = (wire.from_plain(state[name]) for name in ("arrays", "epoch_theta"))
            self._momenta.table = state["momenta"]
            self._stored = Flips(state["stored"]["samples"], state["stored"]["labels"], 0)
            self._done = recorder.round
            if self._done < settings.rounds and not recorder.stopped:
                print(f"going on after round {self._done} of {settings.rounds}", file=sys.stderr)
            recorder.on_round(recorder.round, history.rows[-1])
        self._clock = time.perf_counter() - history.seconds
        try:
            if not recorder.stopped and self._done < settings.rounds:
                self.start(
                    grid,
                    self._arrays,
                    num_rounds=settings.rounds - self._done,
                    train_config=ConfigRecord({wire.SETTINGS: settings.model_dump_json()}),
                )
        except _StoppedEarly:
            pass
        finally:
            history.seconds = time.perf_counter() - self._clock
        if kept is not None and (state := self.state()) is not None:
            kept.save(state)  # for the twin, should its run be cut off

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages, since the server evaluates; see `flwr`'s `Strategy`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """No metrics, since the server evaluates; see `flwr`'s `Strategy`."""
        return None

    def summary(self) -> None:
        """Have the wrapped strategy log its summary."""
        self.strategy.summary()


def complete(replies: list[Message], expected: int, round_: int) -> list[Message]:
    """The replies to a round's messages in the order of the clients.

    Parameters
    ----------
    replies : list of Message
        The replies that came back.
    expected : int
        The number of clients that were asked.
    round_ : int
        The round, for the error.

    Returns
    -------
    list of Message
        One of each client.

    Raises
    ------
    RunError
        Where a client has failed, is missing, or has answered more than once.
    """
    for reply in replies:
        if reply.has_error():
            raise RunError(f"round {round_} failed: {wire.reason_of(reply)}")
    ordered = sorted(replies, key=lambda reply: wire.client_of(reply.content))
    clients = [wire.client_of(reply.content) for reply in ordered]
    if len(set(clients)) != expected:
        raise RunError(f"round {round_} failed: {expected} clients were asked, {len(set(clients))} answered")
    if again := [one for one, other in pairwise(clients) if one == other]:
        raise RunError(f"round {round_} failed: client {again[0]} answered more than once")
    return ordered


def all_flips(replies: Iterable[Message], own_allowances: bool) -> Flips:
    """The flips of all clients in a round, by ascending sample.

    Parameters
    ----------
    replies : iterable of Message
        The replies of the clients.
    own_allowances : bool
        Whether each client reports what it was allowed itself; else each reports what all of them were together.

    Returns
    -------
    Flips
        `NO_FLIPS` where no reply says anything of flips.
    """
    parts = [flips for reply in replies if (flips := wire.flips_of(reply.content)) is not None]
    if not parts:
        return NO_FLIPS
    samples = concatenate([part.samples for part in parts])
    labels = concatenate([part.labels for part in parts])
    order = samples.argsort(kind="stable")
    new = [part.new for part in parts if part.new is not None]
    if own_allowances:
        return Flips(samples[order], labels[order], sum(part.allowed for part in parts), sum(new) if new else None)
    return Flips(samples[order], labels[order], max(part.allowed for part in parts), max(new, default=None))


def make_strategy(scenario: Scenario) -> Strategy:
    """A `RuleStrategy`, or the one of `strategy.path`; InputError where the settings don't give one."""
    settings = scenario.settings.strategy
    if settings.path is None or settings.name != "flower":
        return RuleStrategy(scenario)
    module, _, name = settings.path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever a user's module raises as it is imported
        raise InputError(
            f"strategy.path={settings.path} can't be imported ({error}); give the import path of a Flower strategy, "
            "as in flwr.serverapp.strategy.FedMedian"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise InputError(f"strategy.path={settings.path} is not a subclass of flwr.serverapp.strategy.Strategy")
    try:
        return kind(**(all_clients(scenario) | settings.args))
    except (Exception, SystemExit) as error:
        raise InputError(
            f"strategy.path={settings.path} does not take strategy.args={settings.args}: {error}"
        ) from None


def all_clients(scenario: Scenario) -> dict[str, Any]:
    """Arguments for Flower's strategies, to ask every client in every round; by default they wait for two.

    They also say under which keys our messages hold what these strategies look for.
    """
    clients = scenario.settings.clients.total
    return {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": clients,
        "min_available_nodes": clients,
        "weighted_by_key": wire.WEIGHT,
        "arrayrecord_key": wire.ARRAYS,
        "configrecord_key": wire.CONFIG,
    }


def start(grid: Grid, recorder: Recorder, client_of: Mapping[int, int] | None = None) -> None:
    """Run all rounds of an experiment over a grid.

    Parameters
    ----------
    grid : Grid
        Its nodes are the clients of the experiment.
    recorder : Recorder
        What measures the rounds; it holds the scenario, and what an interrupted run has left.
    client_of : mapping of int to int, optional
        The client by node, where it is known; else nodes are asked where it matters.

    Raises
    ------
    InputError
        Where the settings give no strategy.
    RunError
        Where a round fails, or nodes that are asked are not the clients.
    """
    strategy = make_strategy(recorder.scenario)
    WatchedStrategy(strategy, recorder, client_of or introduced(grid, recorder.scenario)).run(grid)
