"""The federation on Ray: the same trajectory on every grid, whatever happens to its processes."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from local_ray import LocalRay, in_place_of_ray

from fl_attack import engine, federation, scenario, targets
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings, StrategySettings
from fl_attack.data.own import DataLayout
from fl_attack.engine import sequential
from fl_attack.errors import InputError, RunError
from fl_attack.federation import client as clients
from fl_attack.federation import strategy as strategies
from fl_attack.federation import wire
from fl_attack.federation.client import HonestClient, MaliciousClient, OmniscientHook, client, client_app
from fl_attack.federation.grid import CLIENT_APP_RAISED, BlockGrid, ClientBlock
from fl_attack.federation.session import ray_session
from fl_attack.federation.strategy import CRASHED, complete, start
from fl_attack.federation.wire import Request
from fl_attack.history import History, Recorder
from fl_attack.scenario import Flips

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]

# the apps of this file are made in a module that Ray's workers can't import
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def grid() -> Iterator[BlockGrid]:
    """One Ray and one grid of seven clients for the module: clients keep nothing from one run to the next."""
    with ray_session(None, verbose=False), BlockGrid(client_app, 7, actors=2, cpus_each=0.5) as grid:
        yield grid


def federate(settings: Settings, grid: Grid) -> History:
    recorder = Recorder(scenario.make(settings))
    start(grid, recorder)
    return recorder.history


def alone(settings: Settings) -> tuple[torch.Tensor, list[list[int]]]:
    """The same rounds in this process, client after client."""
    cell = scenario.make(settings)
    hook = OmniscientHook(cell)
    theta, flipped = cell.start(), []
    weights = cell.schedule.sizes / cell.schedule.sizes.sum()
    assert settings.server_optimizer == "sgd"
    for round_ in range(1, settings.rounds + 1):
        clients = [
            MaliciousClient(cell, i, hook) if i in cell.partition.malicious else HonestClient(cell, i)
            for i in range(settings.clients.total)
        ]
        asked = Request(theta, True, round_, "", None, None)
        moved = [client.train(asked).theta for client in clients]
        flipped.append(hook.flips(asked).samples.tolist() if settings.attacked else [])
        theta = sum((w * one for w, one in zip(weights, moved, strict=True)), torch.zeros_like(theta))
    return theta, flipped


def flips_by_round(history: History, rounds: int) -> list[list[int]]:
    table = history.flip_table()
    return [table["sample"][table["round"] == r].tolist() for r in range(1, rounds + 1)]


COMMON = ["rounds=6", "clients.honest=4", "clients.malicious=3", "attack.budget=0.4", "lr=0.5", "dtype=float64"]
CASES = {
    "binary": (2, ["batch_size=40"]),
    "classes": (3, ["batch_size=40", "attack.goal=targeted"]),
    "steps": (3, ["local_steps=3", "batch_size=30", "attack.rounding=carry", "attack.scope=per_client"]),
    "uneven": (2, ["partition=dirichlet", "batch_size=full", "attack.knowledge=own", "attack.selection=literal"]),
    "one": (
        3,
        [
            "partition=shards",
            "partition.malicious_share=0.3",
            "clients.malicious=1",
            "attack.every=2",
            "clients.honest=6",
            "batch_size=40",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_clients_on_ray_go_the_way_of_clients_one_by_one(
    settings: Compose, small_data: Small, grid: BlockGrid, case: str
) -> None:
    classes, overrides = CASES[case]
    chosen = settings(*small_data(classes), *COMMON, *overrides)
    history = federate(chosen, grid)
    theta, flips = alone(chosen)
    torch.testing.assert_close(history.theta, theta, rtol=0, atol=1e-12)
    assert flips_by_round(history, 6) == flips
    assert any(flips)


BATCHED = {
    "some clients a round": (3, ["clients.per_round=4", "batch_size=40"]),
    "epochs": (2, ["attack.refresh=epoch", "batch_size=40", "attack.every=2"]),
    "noisy": (3, ["attack.knowledge=noisy", "batch_size=40"]),
    "random": (2, ["attack.name=random_flip", "batch_size=40", "strategy.name=median"]),
    "confidence": (3, ["attack.name=confidence_flip", "batch_size=40", "strategy.name=krum", "strategy.f=2"]),
    "gaussian": (2, ["attack.name=gaussian", "batch_size=40", "strategy.name=trimmed_mean"]),
    "alie": (3, ["attack.name=alie", "local_steps=2", "batch_size=30", "strategy.pre=[bucketing]"]),
    "largest": (3, ["attack.name=gradient_max", "attack.goal=targeted", "clients.per_round=0.6", "batch_size=40"]),
}


@pytest.mark.parametrize("case", BATCHED)
def test_clients_on_ray_go_the_way_of_the_batched_engine(
    settings: Compose, small_data: Small, grid: BlockGrid, case: str
) -> None:
    classes, overrides = BATCHED[case]
    chosen = settings(*small_data(classes), *COMMON, *overrides)
    history = federate(chosen, grid)
    (outcome,) = engine.run_cells([scenario.make(chosen)])
    batched = outcome.history()
    torch.testing.assert_close(history.theta, batched.theta, rtol=0, atol=1e-9)
    for name, column in history.flip_table().items():
        assert column.tolist() == batched.flip_table()[name].tolist()
    for row, wanted in zip(history.rows, batched.rows, strict=True):
        assert list(row.values()) == pytest.approx(list(wanted.values()), rel=0, abs=1e-7, nan_ok=True)


def test_a_strategy_of_flowers_gets_the_clients_drawn_for_the_round(
    settings: Compose, small_data: Small, grid: BlockGrid
) -> None:
    chosen = settings(*small_data(3), *COMMON, "clients.per_round=3", "batch_size=40")
    theirs = chosen.model_copy(
        update={"strategy": StrategySettings(name="flower", path="flwr.serverapp.strategy.FedAvg")}
    )
    torch.testing.assert_close(federate(theirs, grid).theta, federate(chosen, grid).theta, rtol=0, atol=1e-9)


OWN = """
from fl_attack.attack import Proposal, Updates, View

def largest(updates, weights, f, *, scale=1.0):
    return scale * updates.amax(-3)

def next_class(view: View) -> Proposal:
    return Proposal((view.y + 1) % view.logits.shape[-1], view.noise[:, 0])

def nothing(view: Updates):
    return view.updates * 0
"""


@pytest.mark.parametrize("attack", ["next_class", "nothing"])
def test_a_rule_and_an_attack_of_ones_own_run_in_both_engines(
    settings: Compose,
    small_data: Small,
    grid: BlockGrid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attack: str,
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)  # where the processes of the grid are not
    own = [f"attack.name=mine.{attack}", "strategy.name=mine:largest", "strategy.args={scale: 0.5}"]
    chosen = settings(*small_data(3), *COMMON, "batch_size=40", *own)
    history = federate(chosen, grid)
    (outcome,) = engine.run_cells([scenario.make(chosen)])
    assert outcome.theta is not None
    torch.testing.assert_close(history.theta, outcome.theta, rtol=0, atol=1e-9)
    assert (history.flip_count > 0) == (attack == "next_class")
    if attack == "next_class":
        y = scenario.make(chosen).dataset.y_train
        table = history.flip_table()
        assert (table["label"] == (y[table["sample"]] + 1) % 3).all()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_servers_optimizer_works_on_the_clients_mean_gradient(
    settings: Compose, small_data: Small, grid: BlockGrid, optimizer: str, steps: int
) -> None:
    common = [*(key for key in COMMON if "attack" not in key), "attack=none", "batch_size=20"]
    chosen = settings(*small_data(3), *common, f"local_steps={steps}", f"server_optimizer={optimizer}")
    torch.testing.assert_close(federate(chosen, grid).theta, targets.train(scenario.make(chosen)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_the_number_of_actors_changes_no_bit(settings: Compose, small_data: Small, grid: BlockGrid, goal: str) -> None:
    chosen = settings(*small_data(3), *COMMON[:-1], "batch_size=40", f"attack.goal={goal}")
    two = federate(chosen, grid)
    with BlockGrid(client_app, 7, actors=3, cpus_each=0.3) as other:
        three = federate(chosen, other)
    assert torch.equal(two.theta, three.theta)
    assert flips_by_round(two, 6) == flips_by_round(three, 6)


def test_an_actor_that_is_killed_is_replaced_and_the_run_ends_the_same(
    settings: Compose, small_data: Small, grid: BlockGrid
) -> None:
    chosen = settings(*small_data(3), *COMMON, "batch_size=40")
    undisturbed = federate(chosen, grid)
    before = [ray.get(actor.place.remote())[1] for actor in grid.actors]

    def kill(round_: int, row: object) -> None:
        if round_ == 3:
            os.kill(before[0], signal.SIGKILL)

    recorder = Recorder(scenario.make(chosen), kill)
    start(grid, recorder)
    after = [ray.get(actor.place.remote())[1] for actor in grid.actors]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert torch.equal(recorder.history.theta, undisturbed.theta)
    assert flips_by_round(recorder.history, 6) == flips_by_round(undisturbed, 6)


def failing_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2 and int(message.content["config"]["server-round"]) == 3:
            raise ValueError("no more disk")
        from fl_attack.federation.client import train

        return train(message, context)

    return app


def test_a_client_that_raises_stops_the_run_with_its_message(
    settings: Compose, small_data: Small, grid: BlockGrid
) -> None:
    chosen = settings(*small_data(3), *COMMON, "batch_size=40")
    with BlockGrid(failing_app(), 7, actors=2, cpus_each=0.1) as failing:
        with pytest.raises(RunError, match="round 3 failed: no more disk"):
            federate(chosen, failing)
        check_promises(failing)


def test_a_client_says_who_it_is_when_it_fails(settings: Compose, small_data: Small, grid: BlockGrid) -> None:
    chosen = settings(*small_data(3), *COMMON, "batch_size=40")
    Path(chosen.dataset.path).write_bytes(b"damaged")
    cell = scenario.make(chosen.model_copy(update={"dataset": settings().dataset}))
    object.__setattr__(cell, "settings", chosen)  # the server has its data, the clients find theirs damaged
    with pytest.raises(RunError, match=r"round 1 failed: client \d: InputError: .*npz"):
        start(grid, Recorder(cell))


class Forgetful:
    """A grid that loses the reply of one client, or gives one twice."""

    def __init__(self, grid: BlockGrid, twice: bool) -> None:
        self.grid, self.twice = grid, twice

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        return replies[1:] + (replies[1:2] if self.twice else [])


@pytest.mark.parametrize("twice", [False, True])
def test_a_round_that_misses_a_client_is_not_averaged_over(
    settings: Compose, small_data: Small, grid: BlockGrid, twice: bool
) -> None:
    chosen = settings(*small_data(3), *COMMON, "batch_size=40")
    with pytest.raises(RunError, match="round 1 failed: 7 clients were asked, 6 answered"):
        federate(chosen, Forgetful(grid, twice))  # type: ignore[arg-type]


def test_a_reply_given_twice_in_a_complete_round_is_not_averaged_over() -> None:
    def reply(client: int) -> Message:
        return SimpleNamespace(has_error=lambda: False, content=wire.introduction(wire.Introduction(client)))  # type: ignore[return-value]

    assert [wire.client_of(one.content) for one in complete([reply(2), reply(0), reply(1)], 3, 4)] == [0, 1, 2]
    with pytest.raises(RunError, match="round 4 failed: client 1 answered more than once"):
        complete([reply(client) for client in (0, 1, 2, 1)], 3, 4)
    with pytest.raises(RunError, match="round 4 failed: 3 clients were asked, 2 answered"):
        complete([reply(client) for client in (0, 1, 1)], 3, 4)


def test_a_diverging_run_stops_and_keeps_its_rounds(settings: Compose, small_data: Small, grid: BlockGrid) -> None:
    recorder = Recorder(
        scenario.make(settings(*small_data(3), *COMMON, "batch_size=full", "lr=1e308", "dataset.scale=0.001"))
    )
    with pytest.raises(RunError, match=r"diverged: theta is not finite after round \d.*smaller lr"):
        start(grid, recorder)
    assert recorder.history.rows
    assert recorder.history.theta.isfinite().all()


@pytest.mark.parametrize(
    ("path", "args"),
    [("FedMedian", "{}"), ("FedTrimmedAvg", "{beta: 0.3}"), ("FedAvg", "{}"), ("FedAdam", "{eta: 0.05}")],
)
def test_any_strategy_of_flowers_runs_by_its_import_path(
    settings: Compose, small_data: Small, grid: BlockGrid, path: str, args: str
) -> None:
    flower = ["strategy=flower", f"strategy.path=flwr.serverapp.strategy.{path}", f"strategy.args={args}"]
    history = federate(settings(*small_data(3), *COMMON, "batch_size=40", *flower), grid)
    assert len(history.rows) == 7
    assert history.flip_count > 0
    mean = federate(settings(*small_data(3), *COMMON, "batch_size=40"), grid)
    same = torch.allclose(history.theta, mean.theta, atol=1e-12)
    assert same == (path == "FedAvg")  # Flower's average is our mean; the others are not


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("flwr.serverapp.strategy.FedMedain", "can't be imported"),
        ("nowhere.FedAvg", "can't be imported"),
        ("FedAvg", "can't be imported"),
        ("collections.OrderedDict", "not a subclass"),
        ("flwr.serverapp.strategy.FedTrimmedAvg", "does not take strategy.args"),
    ],
)
def test_a_strategy_that_is_none_is_refused_before_anything_starts(
    settings: Compose, small_data: Small, path: str, message: str
) -> None:
    flower = ["strategy=flower", f"strategy.path={path}", "strategy.args={unknown: 1}"]
    with pytest.raises(InputError, match=message):
        federation.check(scenario.make(settings(*small_data(3), "batch_size=40", *flower)))


def check_promises(grid: BlockGrid) -> None:
    """What Flower's abstract grid promises beside `send_and_receive`."""
    assert list(grid.send_and_receive([])) == []
    assert len(list(grid.get_node_ids())) == len({node.node_id for node in grid.get_nodes()}) == 7
    content = RecordDict({"config": ConfigRecord({"server-round": 3})})
    asked = [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]
    pushed = list(grid.push_messages(asked))
    assert len(set(pushed)) == 7
    replies = list(grid.pull_messages(pushed))
    assert [reply.metadata.reply_to_message_id for reply in replies] == pushed
    assert all(reply.has_error() for reply in replies)  # there are no settings in this message
    assert list(grid.pull_messages(pushed)) == []


def test_flips_of_f_attackers_stay_within_those_of_more(settings: Compose, small_data: Small) -> None:
    few, many = (
        scenario.make(settings(*small_data(3), "clients.total=8", f"clients.malicious={f}", "batch_size=40"))
        for f in (2, 3)
    )
    assert set(few.partition.malicious) < set(many.partition.malicious)
    assert (few.partition.client == many.partition.client).all()


def test_the_flips_of_all_clients_together_are_those_agreed_on(settings: Compose, small_data: Small) -> None:
    cell = scenario.make(settings(*small_data(3), *COMMON, "batch_size=40"))
    asked = Request(torch.ones(cell.theta_shape, dtype=torch.float64), True, 2, "", None, None)
    agreed = OmniscientHook(cell).flips(asked)
    clients = [MaliciousClient(cell, int(i), OmniscientHook(cell)) for i in cell.partition.malicious]
    parts = [flips for client in clients if (flips := client.train(asked).flips) is not None]
    assert len(parts) == 3
    assert sorted(np.concatenate([part.samples for part in parts]).tolist()) == agreed.samples.tolist()
    assert HonestClient(cell, 0).train(asked).flips is None


def test_codes_of_errors_are_those_of_flower() -> None:
    assert (CLIENT_APP_RAISED, CRASHED) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.CLIENT_APP_CRASHED)


@pytest.fixture
def local() -> Iterator[LocalRay]:
    """Actors in this process."""
    with in_place_of_ray(LocalRay(CPU=2.0)) as local:
        yield local


@pytest.fixture
def blocks(local: LocalRay) -> Iterator[BlockGrid]:
    """Seven clients in three blocks of this process."""
    with BlockGrid(client_app, 7, actors=3, cpus_each=0.25, gpus_each=0.125) as blocks:
        yield blocks


def test_clients_are_shared_out_to_actors_that_are_started_again_when_lost(local: LocalRay, blocks: BlockGrid) -> None:
    (asked,) = local.options
    assert asked == {
        "max_restarts": -1,
        "max_task_retries": -1,
        "num_cpus": 0.25,
        "num_gpus": 0.125,
        "scheduling_strategy": "SPREAD",
    }
    assert [len(block.contexts) for block in local.made] == [3, 2, 2]
    of_clients = [context for block in local.made for context in block.contexts.values()]
    assert [context.node_config["partition-id"] for context in of_clients] == list(range(7))
    assert {type(context.node_config["partition-id"]) for context in of_clients} == {int}  # no number of numpy's
    assert {context.node_config["num-partitions"] for context in of_clients} == {7}
    assert [context.node_id for context in of_clients] == list(blocks.get_node_ids())
    assert len(set(blocks.get_node_ids())) == 7 and 1 not in blocks.get_node_ids()  # 1 is the server's
    assert local.made[1].place() == ("0" * 56, os.getpid())
    blocks.__exit__()
    assert local.killed == blocks.actors
    with BlockGrid(client_app, 2, actors=5, cpus_each=1.0) as few:  # no actor without a client
        assert len(few.actors) == len(list(few.get_node_ids())) == 2
    assert local.options[-1]["num_gpus"] == 0.0


def test_blocks_keep_what_flower_promises_of_a_grid(blocks: BlockGrid) -> None:
    check_promises(blocks)
    run = Run.create_empty(7)
    assert blocks.run.run_id == 1
    blocks.set_run(run)
    assert blocks.run is run
    message = blocks.create_message(RecordDict(), "train.some", 4, "group", ttl=77.0)
    told = message.metadata
    assert (told.dst_node_id, told.message_type, told.group_id, told.ttl) == (4, "train.some", "group", 77.0)


def test_who_is_not_done_in_time_is_left_out_of_the_replies(local: LocalRay, blocks: BlockGrid) -> None:
    def answered(timeout: float | None) -> list[int]:
        asked = [Message(RecordDict(), node, "query") for node in reversed(list(blocks.get_node_ids()))]
        return [wire.client_of(reply.content) for reply in blocks.send_and_receive(asked, timeout=timeout)]

    assert answered(None) == [6, 5, 4, 3, 2, 1, 0]
    local.late = {1}  # of clients 3 and 4
    assert answered(0.5) == [6, 5, 2, 1, 0]
    assert local.waits == [0]
    assert answered(None) == [6, 5, 4, 3, 2, 1, 0]


def test_an_actor_says_what_its_client_raised(local: LocalRay) -> None:
    with BlockGrid(failing_app(), 7, actors=2, cpus_each=0.1) as failing:
        asked = [Message(RecordDict({"config": ConfigRecord({"server-round": 3})}), 4, "train")]
        (reply,) = failing.send_and_receive(asked)
    assert (reply.error.code, reply.error.reason) == (2, "no more disk")
    assert wire.reason_of(reply) == "no more disk"
    around = "<class 'flwr.X'>:<'Exception ClientApp raised. Message: it\\'s full'>\n"
    flowers = Message(Error(2, around), reply_to=reply)
    assert wire.reason_of(flowers) == "it's full"
    assert wire.reason_of(Message(Error(2), reply_to=reply)) == "a client gave no reason"


IN_BLOCKS = {
    "attackers of labels": ["attack.goal=targeted", "server_optimizer=adam"],
    "epochs, some clients": ["attack.refresh=epoch", "clients.per_round=4", "server_optimizer=momentum"],
    "updates and momenta": ["attack=alie", "worker_momentum=0.5", "strategy=median"],
}


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_clients_in_blocks_go_the_way_of_one_experiment(
    settings: Compose, small_data: Small, blocks: BlockGrid, case: str
) -> None:
    chosen = settings(*small_data(3), *COMMON, "rounds=4", "batch_size=40", *IN_BLOCKS[case])
    history = federate(chosen, blocks)
    expected = sequential.run(scenario.make(chosen)).history()
    torch.testing.assert_close(history.theta, expected.theta, rtol=0, atol=1e-9)
    for name, column in history.flip_table().items():
        assert column.tolist() == expected.flip_table()[name].tolist()
    for row, wanted in zip(history.rows, expected.rows, strict=True):
        assert list(row.values()) == pytest.approx(list(wanted.values()), rel=0, abs=1e-7, nan_ok=True)


def test_clients_are_malicious_where_the_scenario_says_so_and_share_what_they_know(
    settings: Compose, small_data: Small
) -> None:
    cell = scenario.make(settings(*small_data(3), *COMMON, "batch_size=40"))
    clients = [client(cell.settings.model_dump_json(), number) for number in range(7)]
    of_attackers = {i for i, one in enumerate(clients) if isinstance(one, MaliciousClient)}
    assert of_attackers == set(cell.partition.malicious.tolist())
    assert len({id(one.hook) for one in clients if isinstance(one, MaliciousClient)}) == 1
    assert [one.client for one in clients] == list(range(7))


@pytest.mark.parametrize("path", ["FedAvg", "FedAdam", "FedMedian"])
def test_a_strategy_of_flowers_goes_on_where_it_stopped(
    settings: Compose,
    small_data: Small,
    blocks: BlockGrid,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
) -> None:
    flower = ["strategy=flower", f"strategy.path=flwr.serverapp.strategy.{path}"]
    cell = scenario.make(settings(*small_data(3), *COMMON, "rounds=4", "batch_size=40", *flower))
    half = replace(cell, settings=cell.settings.model_copy(update={"rounds": 2}))
    rows: list[int] = []
    whole = Recorder(cell)
    rest = Recorder(cell, lambda round_, row: rows.append(round_), Checkpoint(tmp_path, "key"))
    start(blocks, whole)
    start(blocks, Recorder(half, checkpoint=Checkpoint(tmp_path, "key")))
    assert capsys.readouterr().err == ""
    start(blocks, rest)
    assert capsys.readouterr().err == "going on after round 2 of 4\n"
    assert rows == [2, 3, 4]
    assert torch.equal(rest.history.theta, whole.history.theta)
    assert flips_by_round(rest.history, 4) == flips_by_round(whole.history, 4)
    tables = [[list(row.values()) for row in one.history.rows] for one in (rest, whole)]
    np.testing.assert_array_equal(*tables)
    again = Recorder(cell, checkpoint=Checkpoint(tmp_path, "key"))
    start(blocks, again)  # nothing is left to do
    assert capsys.readouterr().err == ""
    assert torch.equal(again.history.theta, whole.history.theta)
    mean = federate(settings(*small_data(3), *COMMON, "rounds=4", "batch_size=40"), blocks)
    assert torch.allclose(whole.history.theta, mean.theta, atol=1e-12) == (path == "FedAvg")


class Always(Checkpoint):
    """A checkpoint that takes every state it is offered."""

    def __init__(self, folder: Path, offered: list[dict[str, dict[str, object]]]) -> None:
        super().__init__(folder, "key")
        self.offered = offered

    def offer(self, state: Callable[[], dict[str, dict[str, object]] | None]) -> None:
        now = state()
        assert now is not None
        self.offered.append(now)


def test_the_time_of_a_run_is_that_of_all_its_parts(
    settings: Compose, small_data: Small, blocks: BlockGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    cell = scenario.make(settings(*small_data(3), *COMMON, "rounds=4", "batch_size=40"))
    half = replace(cell, settings=cell.settings.model_copy(update={"rounds": 2}))
    monkeypatch.setattr(strategies.time, "perf_counter", lambda: clock[0])
    offered: list[dict[str, dict[str, object]]] = []

    def five_seconds(round_: int, row: object) -> None:
        clock[0] += 5

    first = Recorder(half, five_seconds, Always(tmp_path, offered))
    start(blocks, first)
    assert first.history.seconds == 10
    clock[0] += 1000  # in which nothing runs
    second = Recorder(cell, five_seconds, Always(tmp_path, offered))
    start(blocks, second)
    assert second.history.seconds == 20
    assert [state["recorder"]["seconds"] for state in offered] == [5, 10, 15, 20]
    assert [state["recorder"]["round"] for state in offered] == [1, 2, 3, 4]


class Sent:
    """A grid that notes what is sent to each node."""

    def __init__(self, grid: BlockGrid) -> None:
        self.grid = grid
        self.content: dict[int, list[RecordDict]] = {}

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        for message in asked:
            self.content.setdefault(message.metadata.dst_node_id, []).append(message.content)
        return self.grid.send_and_receive(asked, timeout=timeout)


def test_honest_clients_are_sent_nothing_of_others(settings: Compose, small_data: Small, blocks: BlockGrid) -> None:
    chosen = settings(*small_data(3), *COMMON, "rounds=2", "batch_size=40", "attack=alie", "worker_momentum=0.5")
    cell, sent = scenario.make(chosen), Sent(blocks)
    recorder = Recorder(cell)
    start(sent, recorder)  # type: ignore[arg-type]
    one = 8 * cell.start().numel()  # bytes
    for client_, node in enumerate(blocks.get_node_ids()):
        requests = [content for content in sent.content[node] if "momentum" in content]
        assert len(requests) == 2
        bytes_ = {len(content["momentum"]["values"]) for content in requests}  # type: ignore[arg-type, index]
        assert bytes_ == {7 * one if client_ in cell.partition.malicious else one}


def test_a_client_goes_on_with_its_own_momentum_among_those_of_a_round(settings: Compose, small_data: Small) -> None:
    more = ["batch_size=40", "worker_momentum=0.5", "clients.per_round=2"]
    cell = scenario.make(settings(*small_data(3), *COMMON, *more))
    one = torch.ones(cell.theta_shape, dtype=torch.float64)
    request = Request(0 * one, True, 1, "", None, torch.stack([one, 3 * one]))
    answers = [HonestClient(cell, int(i)).train(request) for i in cell.schedule.participants(1)]
    without = [
        HonestClient(cell, answer.client).train(request._replace(momentum=0 * request.momentum)) for answer in answers
    ]
    for answer, other, expected in zip(answers, without, (0.5, 1.5), strict=True):
        assert answer.momentum is not None and other.momentum is not None
        torch.testing.assert_close(answer.momentum - other.momentum, expected * one, rtol=0, atol=1e-12)
        torch.testing.assert_close(answer.theta, -cell.lr(1) * answer.momentum, rtol=0, atol=1e-12)


def test_all_that_a_request_holds_goes_to_the_device() -> None:
    part = torch.ones(2, 3)
    request = Request(part, True, 1, "", part, part, rule={"a": part, "b": part})
    moved = clients._on(request, "meta")
    assert moved.rule is not None and list(moved.rule) == ["a", "b"]
    for tensor in (moved.theta, moved.epoch_theta, moved.momentum, *moved.rule.values()):
        assert tensor is not None and tensor.device.type == "meta" and tensor.shape == part.shape
    empty = clients._on(Request(part, True, 1, "", None, None), "meta")
    assert (empty.epoch_theta, empty.momentum, empty.rule) == (None, None, None)


class Stubborn(FedAvg):
    """A strategy of Flower's that gives no parameters, or ends the program."""

    ends = False
    summaries = 0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        if self.ends:
            sys.exit(3)
        return None, None

    def summary(self) -> None:
        self.summaries += 1


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (False, r"Stubborn gave no parameters in round 1: it has its own minimum of replies, and 7 came"),
        (True, r"Stubborn called sys.exit\(3\)"),
    ],
)
def test_a_strategy_that_gives_nothing_is_named(
    settings: Compose, small_data: Small, blocks: BlockGrid, ends: bool, message: str
) -> None:
    recorder = Recorder(scenario.make(settings(*small_data(3), *COMMON, "batch_size=40")))
    stubborn = Stubborn(**strategies.all_clients(recorder.scenario))
    stubborn.ends = ends
    watched = strategies.WatchedStrategy(stubborn, recorder, None)
    with pytest.raises(RunError, match=message):
        watched.run(blocks)
    before = stubborn.summaries
    watched.summary()
    assert stubborn.summaries == before + 1
    assert [row["round"] for row in recorder.history.rows] == [0]


def test_strategies_of_flowers_wait_for_all_clients_and_evaluate_on_none(settings: Compose, small_data: Small) -> None:
    cell = scenario.make(settings(*small_data(3), *COMMON, "batch_size=40"))
    fedavg = FedAvg(**strategies.all_clients(cell))
    assert (fedavg.fraction_train, fedavg.fraction_evaluate) == (1.0, 0.0)
    assert (fedavg.min_train_nodes, fedavg.min_available_nodes) == (7, 7)
    watched = strategies.WatchedStrategy(fedavg, Recorder(cell), None)
    assert list(watched.configure_evaluate(1, fedavg, fedavg, fedavg)) == []  # type: ignore[arg-type]
    assert watched.aggregate_evaluate(1, []) is None


class Elsewhere:
    """A block of clients in another process."""

    def __init__(self, *given: object) -> None:
        pass

    def place(self) -> None:
        pass


def test_objects_of_libraries_are_no_garbage_to_search_while_a_grid_stands(
    local: LocalRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.unfreeze()
    ClientBlock(client_app, [0], 1)
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    monkeypatch.setattr("fl_attack.federation.grid.ClientBlock", Elsewhere)
    with BlockGrid(client_app, 2, actors=1, cpus_each=1.0):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_clients_use_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    clients._one_thread.__wrapped__()
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == 1


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_packed_is_unpacked(raw: bool) -> None:
    theta = torch.arange(6, dtype=torch.float64).view(2, 3) / 7
    record = wire.pack(theta, raw)
    assert (record["theta"].stype == wire.RAW) == raw
    for found in (wire.unpack(record), wire.unpack(wire.from_plain(wire.to_plain(record)))):
        assert found.dtype == torch.float64 and torch.equal(found, theta)
    flips = Flips(np.array([4, 9]), np.array([1, 0]), 5, 2)
    for sent in (
        wire.Answer(theta, 3, 40, flips, 2 * theta),
        wire.Answer(theta, 0, 1, flips._replace(new=None)),
        wire.Answer(theta, 6, 2, None),
    ):
        found = wire.read_answer(wire.answer(sent, raw))
        assert torch.equal(found.theta, theta) and (found.client, found.weight) == (sent.client, sent.weight)
        assert (found.flips is None) == (sent.flips is None)
        if found.flips is not None and sent.flips is not None:
            assert [part.tolist() for part in found.flips[:2]] == [[4, 9], [1, 0]]
            assert found.flips[2:] == sent.flips[2:]
        assert (found.momentum is None) == (sent.momentum is None)
        assert found.momentum is None or torch.equal(found.momentum, 2 * theta)
    config = ConfigRecord({"settings": "{}", "server-round": 7})
    own = wire.Own(DataLayout(("a", "b"), (2, 3), "bytes"), 4, (5, 6))
    state = {"history": theta.view(1, 6), "weights": torch.ones(2, dtype=torch.float64)}
    content = RecordDict({"arrays": record, "config": config})
    plain = wire.read_request(content)
    assert torch.equal(plain.theta, theta) and plain[1:4] == (raw, 7, "{}")
    assert (plain.epoch_theta, plain.momentum, plain.rule, plain.own) == (None, None, None, None)
    assert len(plain.stored.samples) == 0
    content[wire.EPOCH_THETA] = wire.pack(3 * theta, raw)
    content[wire.MOMENTUM] = wire.momentum_record(torch.stack([theta, 2 * theta]))
    content[wire.STORED] = wire.stored_record(flips)
    content[wire.RULE], content[wire.OWN] = wire.state_record(state), wire.own_record(own)
    full = wire.read_request(content)
    assert full.epoch_theta is not None and torch.equal(full.epoch_theta, 3 * theta)
    assert full.momentum is not None and torch.equal(full.momentum, torch.stack([theta, 2 * theta]))
    assert (full.stored.samples.tolist(), full.stored.labels.tolist()) == ([4, 9], [1, 0])
    assert full.rule is not None and set(full.rule) == set(state)
    assert all(torch.equal(full.rule[name], part) for name, part in state.items())
    assert full.own == own
    asked = wire.question("{}", wire.Own(own.layout))
    assert wire.read_own(asked) == wire.Own(own.layout, -1, (0,)) and wire.read_own(RecordDict()) is None
    for introduced in (wire.Introduction(None, 3, "abc", True), wire.Introduction(0)):
        assert wire.read_introduction(wire.introduction(introduced)) == introduced


def test_flips_of_clients_are_put_together_by_sample() -> None:
    def reply(flips: Flips | None) -> Message:
        content = wire.answer(wire.Answer(torch.zeros(1, 1, dtype=torch.float64), 0, 1, flips), True)
        return SimpleNamespace(content=content)  # type: ignore[return-value]

    parts = [Flips(np.array([9, 4]), np.array([1, 0]), 5, 2), None, Flips(np.array([6]), np.array([2]), 3, 1)]
    for apart, allowed, new in ((True, 8, 3), (False, 5, 2)):
        found = strategies.all_flips(map(reply, parts), apart)
        assert (found.samples.tolist(), found.labels.tolist()) == ([4, 6, 9], [0, 2, 1])
        assert (found.allowed, found.new) == (allowed, new)
        unknown = [None if part is None else part._replace(new=None) for part in parts]
        assert strategies.all_flips(map(reply, unknown), apart).new is None
        assert len(strategies.all_flips([reply(None)], apart).samples) == 0


def test_the_package_offers_what_it_names() -> None:
    for name in federation.__all__:
        assert getattr(federation, name).__module__.startswith(
            ("fl_attack.federation.", "flwr", "typing", "collections")
        )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = federation.nothing
