"""Defences that see more than updates, labels that are left out, and attackers who know the rule, in both engines."""

import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fl_attack import (
    adaptive,
    adversary,
    aggregate,
    attack,
    engine,
    federation,
    knowledge,
    protocol,
    sanitize,
    scenario,
)
from fl_attack.aggregate import Seen
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings
from fl_attack.engine import sequential
from fl_attack.errors import InputError
from fl_attack.federation import grid as grids
from fl_attack.federation.client import client_app
from fl_attack.federation.strategy import start
from fl_attack.history import History, Recorder
from fl_attack.scenario import Scenario

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
COMMON = [
    "rounds=6",
    "clients.total=7",
    "clients.malicious=2",
    "attack.budget=1",
    "lr=0.5",
    "dtype=float64",
    "batch_size=84",
]
M = 9


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small sums gain nothing from more, and lose much where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def updates_of(seed: int, rounds: int = 1, m: int = M) -> Tensor:
    return torch.randn(rounds, m, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scenario_of(settings: Compose, data: list[str], *more: str) -> Scenario:
    return scenario.make(settings(*data, *COMMON, *more))


@pytest.mark.parametrize("name", ["cosine_history", "foolsgold"])
def test_a_rule_with_a_memory_is_that_of_all_rounds_so_far_and_of_the_clients_that_took_part(name: str) -> None:
    rule = aggregate.make(name, f=2, m=5)
    u, taking_part = updates_of(0, 4, 5), [[0, 1, 2, 3, 4], [1, 3, 5, 6, 8], [0, 2, 4, 6, 8], [0, 1, 2, 3, 4]]
    state, summed, cosines = None, np.zeros((M, 6)), [[] for _ in range(M)]
    for updates, clients in zip(u, taking_part, strict=True):
        seen = Seen(clients=torch.tensor(clients), total=M)
        before = None if state is None else {key: part.clone() for key, part in state.items()}
        found, after = rule.step(updates, torch.ones(5), torch.arange(5), seen, state)
        assert before is None or all(torch.equal(before[key], state[key]) for key in before)  # an argument, unchanged
        state = after
        flat = updates.flatten(1).numpy()
        summed[clients] += flat
        median, norm = np.median(flat, 0), np.linalg.norm(flat, axis=1)
        for i, client in enumerate(clients):
            cosines[client].append(flat[i] @ median / norm[i] / np.linalg.norm(median))
        if name == "cosine_history":
            order = np.argsort([-np.mean(cosines[client]) for client in clients])[:3]
            expected = (flat * np.minimum(1, np.median(norm) / norm)[:, None])[order].mean(0)
            np.testing.assert_allclose(found.flatten(), expected, atol=1e-12)
        else:
            np.testing.assert_allclose(state["summed"], summed, atol=1e-12)
            of_sums = aggregate.make(name, f=2, m=5).step(
                torch.from_numpy(summed[clients]).view(5, 2, 3), torch.ones(5), torch.arange(5)
            )
            weights = [one / total for one, total in zip(found.flatten(), of_sums[0].flatten(), strict=True)]
            assert len(set(weights)) == 6  # the weights of the sums, on the updates of the round


@pytest.mark.parametrize("name", ["cosine_history", "foolsgold"])
def test_a_client_that_once_sent_what_is_no_number_counts_again_with_the_next_update(name: str) -> None:
    rule, u = aggregate.make(name, f=1, m=5), updates_of(3, 3, 5) + 0.5
    u[0, 2, 0, 0], u[0, 4, 1, 1] = math.nan, math.inf
    found, state = rule.step(u[0], torch.ones(5), torch.arange(5))
    honest = [0, 1, 3]
    if name == "foolsgold":
        assert found.isfinite().all() and (state["summed"][[2, 4]] == 0).all()
        torch.testing.assert_close(state["summed"][honest], u[0, honest].flatten(1))
    else:  # as far off as can be
        assert state["summed"][[2, 4]].tolist() == [-1, -1] and (state["summed"][honest] > -1).all()
        assert state["rounds"].tolist() == [1] * 5
    for updates in u[1:]:
        found, state = rule.step(updates, torch.ones(5), torch.arange(5), Seen(), state)
        assert found.isfinite().all() and all(part.isfinite().all() for part in state.values())
    if name == "foolsgold":
        torch.testing.assert_close(state["summed"][[2, 4]], u[1:, [2, 4]].sum(0).flatten(1))


def test_sybils_that_push_together_are_silenced_and_honest_clients_are_not() -> None:
    rule, state = aggregate.make("foolsgold", f=3, m=M), None
    for round_ in range(20):
        u = updates_of(round_)[0]
        u[:3], u[:, 1, 2] = 0.01 * u[:3], 0.0
        u[:3, 1, 2] += 1.0  # they push where nobody else does
        found, state = rule.step(u, torch.ones(M), torch.arange(M), Seen(), state)
    assert found[1, 2].abs() < 1e-9
    assert found.norm() > 0.5 * (u[3:].sum(0) / M).norm()


def test_a_client_whose_flips_a_minibatch_hides_is_found_over_the_rounds() -> None:
    rule, state, harm = aggregate.make("cosine_history", f=2, m=M), None, []
    for round_ in range(40):
        u = updates_of(round_)[0] + 0.5
        u[:2] -= 0.8
        _, state = rule.step(u, torch.ones(M), torch.arange(M), Seen(), state)
        mean = (state["summed"] / state["rounds"]).numpy()
        harm.append(set(np.argsort(mean)[:2].tolist()) != {0, 1})
    assert any(harm[:5]) and not any(harm[-20:])


def test_noise_is_in_units_of_the_median_norm_and_the_cluster_is_of_models() -> None:
    u, noise = updates_of(0)[0], updates_of(1)[0, 0]
    plain = aggregate.make("flame", f=2, m=M, args={"noise": 0.0})
    noisy = aggregate.make("flame", f=2, m=M, args={"noise": 0.1})
    given: tuple[Any, ...] = (u, torch.ones(M), torch.arange(M))
    median = u.flatten(1).norm(dim=1).median()
    seen = Seen(noise=lambda: noise)
    torch.testing.assert_close(noisy(*given, seen) - plain(*given, seen), 0.1 * median * noise)
    theta = 100 * updates_of(2)[0, 0]
    models = theta - 0.1 * u
    direct = aggregate.make("flame", f=2, m=M, args={"noise": 0.0, "of": "updates"})
    found = plain(*given, Seen(theta=theta, lr=0.1))
    chosen = direct(models, *given[1:])  # of the models taken for updates, the same clients
    assert not torch.equal(found, direct(*given))
    norms = u.flatten(1).norm(dim=1)
    clipped = u * (median / norms).clamp(max=1)[:, None, None]
    length = models.flatten(1).norm(dim=1)
    of_models = models * (length.median() / length).clamp(max=1)[:, None, None]
    for members in range(2**M):
        who = torch.tensor([members >> i & 1 for i in range(M)], dtype=torch.bool)
        if who.sum() >= 5 and torch.allclose(of_models[who].mean(0), chosen, atol=1e-9):
            torch.testing.assert_close(found, clipped[who].mean(0))
            return
    raise AssertionError("no cluster gives this mean")


def test_a_rule_that_remembers_clients_does_not_go_after_buckets() -> None:
    with pytest.raises(InputError, match=r"strategy=foolsgold remembers clients, which strategy\.pre makes 5 of 9"):
        aggregate.make("foolsgold", f=1, m=M, pre=["bucketing"])
    aggregate.make("foolsgold", f=1, m=M, pre=["nnm", "clipping"])


def test_a_rule_of_ones_own_may_see_and_remember(tmp_path: Path, settings: Compose, small_data: Small) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(updates, weights, f, *, seen, state=None):\n"
        "    mean = updates.mean(-3)\n"
        "    state = mean if state is None else 0.5 * state + mean\n"
        "    return state + 0 * seen.theta, state\n"
    )
    cell = scenario_of(settings, small_data(2), f"strategy.name={tmp_path}/mine.py:mine", "clients.malicious=0")
    theta, remembered = cell.start(), None
    for round_ in range(1, 7):
        mean = adversary.updates(cell, theta, round_).mean(0)
        remembered = mean if remembered is None else 0.5 * remembered + mean
        theta = theta - 0.5 * remembered
    torch.testing.assert_close(engine.run_cells([cell])[0].theta, theta)


def test_trusted_samples_are_drawn_by_their_own_stream_and_have_true_labels(
    settings: Compose, small_data: Small
) -> None:
    cells = [
        scenario_of(settings, small_data(3), "strategy=fltrust", "strategy.root=20", f"seed={seed}") for seed in (0, 1)
    ]
    first, second = (cell.trusted for cell in cells)
    assert len(set(first.tolist())) == 20 and first.tolist() != second.tolist()
    other = scenario_of(settings, small_data(3), "strategy=median")
    np.testing.assert_array_equal(other.partition.client, cells[0].partition.client)  # nothing is held out
    theta = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root = cells[0].seen(1, theta).root
    assert root is not None
    torch.testing.assert_close(root(), cells[0].gradient_of(theta, first, np.ones_like(first)))
    with pytest.raises(InputError, match=r"strategy\.root=9999 is more than the"):
        scenario_of(settings, small_data(3), "strategy=fltrust", "strategy.root=9999")


def test_the_rows_of_classes_are_those_of_a_networks_last_layer(settings: Compose, small_data: Small) -> None:
    cell = scenario_of(settings, small_data(3), "model=mlp", "model.args={widths: [4]}", "strategy=class_norms")
    theta = torch.arange(cell.theta_shape[1], dtype=torch.float64).view(1, -1)
    state = cell.model.state(theta)
    expected = np.concatenate([state["output.weight"], state["output.bias"][:, None]], 1)
    np.testing.assert_array_equal(cell.model.by_class(theta[None])[0], expected)


# --- labels that are left out ---------------------------------------------------------------------


def test_labels_that_most_neighbours_contradict_are_left_out() -> None:
    X = torch.cat([torch.zeros(5, 1), torch.full((5, 1), 9.0)]) + torch.arange(10)[:, None] * 0.01
    y = torch.tensor([0, 0, 1, 0, 0, 1, 1, 1, 1, 0])
    near = sanitize.nearest(X, 4)
    assert all(set(row) == set(range(i - i % 5, i - i % 5 + 5)) - {i} for i, row in enumerate(near.tolist()))
    bad = sanitize.contradicted_by_neighbours(y, y[torch.from_numpy(near)], 2, 0.5)
    assert bad.nonzero().flatten().tolist() == [2, 9]
    half = torch.tensor([[1, 1, 0, 0]])
    assert not sanitize.contradicted_by_neighbours(torch.tensor([0]), half, 2, 0.5).any()  # as many agree
    assert sanitize.contradicted_by_neighbours(torch.tensor([2]), torch.tensor([[1, 1, 0, 3]]), 4, 0.5).all()
    assert not sanitize.contradicted_by_neighbours(torch.tensor([2]), torch.tensor([[1, 1, 0, 3]]), 4, 0.6).any()


@pytest.mark.parametrize("at_once", [1, 3, 1024])
def test_nearest_others_are_found_in_pieces_and_few_where_there_are_few(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "ROWS_AT_ONCE", at_once)
    X = torch.tensor([[0.0, 0.0], [3, 4], [0, 1], [6, 8], [0, 2.5]])
    apart = torch.cdist(X.double(), X.double()).fill_diagonal_(torch.inf)
    assert sanitize.nearest(X, 2).tolist() == apart.argsort(1)[:, :2].tolist()
    assert sanitize.nearest(X, 9).tolist() == apart.argsort(1)[:, :4].tolist()
    far = sanitize.nearest(X.repeat(1, 1) * 1e-3 + 1e4, 1)  # in double precision, where single would lose the digits
    assert far.dtype == np.int64 and far.shape == (5, 1)
    assert sanitize.nearest(X[:1], 3).shape == (1, 0)


def test_samples_that_stay_share_the_weight_of_those_left_out() -> None:
    kept = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4, [True] * 4])
    expected = [[4 / 3, 4 / 3, 0, 4 / 3], [0, 4, 0, 0], [0] * 4, [1] * 4]
    torch.testing.assert_close(sanitize.step_weights(kept), torch.tensor(expected, dtype=torch.float64))


def test_labels_that_the_model_confidently_contradicts_are_left_out() -> None:
    p = torch.tensor(
        [[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.85, 0.15, 0], [0.1, 0.45, 0.45], [0.3, 0.3, 0.4]]
    )
    y = torch.tensor([0, 0, 1, 1, 1, 2])
    # means: class 0 (0.9 + 0.8) / 2, class 1 (0.7 + 0.15 + 0.45) / 3, class 2 0.4
    expected = []
    for row, label in zip(p.tolist(), y.tolist(), strict=True):
        sure = [(q, c) for c, (q, t) in enumerate(zip(row, (0.85, 1.3 / 3, 0.4), strict=True)) if q >= t - 1e-6]
        best = max((q for q, _ in sure), default=0)
        expected.append(bool(sure) and label not in [c for q, c in sure if q > best - 1e-6])
    assert expected == [False, False, False, True, False, False]
    assert sanitize.contradicted_by_model(y, p).tolist() == expected
    assert not sanitize.contradicted_by_model(y, torch.full((6, 3), 1 / 3)).any()  # before the first round


@pytest.mark.parametrize("how", ["knn", "confident"])
def test_a_client_trains_on_the_mean_of_the_labels_that_stay(settings: Compose, small_data: Small, how: str) -> None:
    cell = scenario_of(settings, small_data(3), f"sanitize={how}", "local_steps=2", "batch_size=60")
    theta = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flips, left_out = adversary.flips(cell, theta, 2), 0
    for client in range(7):
        steps = cell.schedule.steps(client, 2)
        kept = scenario.kept_samples(cell, client, theta, 2, flips)
        assert kept is not None and kept.shape == steps.shape
        left_out += int((~kept).sum())
        at = theta
        for samples, keep in zip(steps, kept.numpy(), strict=True):
            if keep.any():
                X, _, _ = cell.batch(samples[keep], np.ones(keep.sum()))
                y = torch.from_numpy(scenario.relabelled(cell.dataset.y_train, samples[keep], flips))
                at = at - 0.5 * cell.model.gradient(at, X, y)
        torch.testing.assert_close(scenario.client_update(cell, client, theta, 2, flips)[0], at)
    assert left_out


def test_the_model_contradicts_by_its_probabilities(settings: Compose, small_data: Small) -> None:
    cell = scenario_of(settings, small_data(3), "sanitize=confident", "batch_size=60")
    theta = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flips, differ = adversary.flips(cell, theta, 2), False
    for client in range(7):
        samples = cell.schedule.steps(client, 2)[0]
        y = torch.from_numpy(scenario.relabelled(cell.dataset.y_train, samples, flips))
        logits = cell.features(samples) @ theta.T
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        kept = scenario.kept_samples(cell, client, theta, 2, flips)
        assert kept is not None
        order = np.argsort(samples)  # means depend on which samples there are, not on their order
        assert kept[0][order].tolist() == (~sanitize.contradicted_by_model(y, p))[order].tolist()
        differ |= bool((sanitize.contradicted_by_model(y, p) != sanitize.contradicted_by_model(y, logits)).any())
    assert differ  # so that the one can't be taken for the other


def test_nearest_neighbours_undo_flips_where_classes_lie_apart(settings: Compose) -> None:
    digits = ["dataset=digits_01", *COMMON, "batch_size=full", "engine=batched"]
    cell = scenario.make(settings(*digits, "sanitize=knn", "attack=random_flip", "attack.budget=0.15"))
    flips = adversary.flips(cell, cell.start(), 1)
    dropped = []
    for client in range(7):
        steps, kept = cell.schedule.steps(client, 1), scenario.kept_samples(cell, client, cell.start(), 1, flips)
        assert kept is not None
        dropped += steps[~kept.numpy()].tolist()
    assert len(flips.samples) and set(flips.samples.tolist()) <= set(dropped)
    assert len(dropped) <= 1.05 * len(flips.samples) + 2


# --- attackers who know the rule ------------------------------------------------------------------


def test_flips_are_dealt_out_in_proportion_largest_remainders_first() -> None:
    flips, sizes = np.array([5, 0, 7]), np.array([[2, 3, 4], [1, 1, 1], [3, 3, 1]])
    assert attack.dealt_out(flips, sizes).tolist() == [[1, 2, 2], [0, 0, 0], [3, 3, 1]]
    assert attack.dealt_out(np.array([0]), np.array([[0, 0]])).tolist() == [[0, 0]]


def test_of_equal_harm_the_first_way_is_taken_and_what_is_no_number_never() -> None:
    products = [
        torch.tensor([1.0, torch.nan, 2.0]),
        torch.tensor([1.0, 3.0, -1.0]),
        torch.tensor([5.0, 3.0, torch.nan]),
    ]
    assert attack.most_harmful(products).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("cosine_history", "greedy"),
        ("fltrust", "greedy"),
        ("class_norms", "greedy"),
        ("krum", "ipm"),
        ("median", "alie"),
    ],
)
def test_adapting_attackers_do_the_most_harm_of_what_they_try_and_never_less_than_without(
    settings: Compose, small_data: Small, strategy: str, name: str
) -> None:
    cell = scenario_of(settings, small_data(3), f"strategy={strategy}", f"attack={name}", "attack.adapt=rule")
    rule, state, theta, better, full = cell.rule(), None, cell.start(), 0, 0
    for round_ in range(1, 7):
        server, v = adaptive.KnownServer(rule, state), knowledge.direction(cell, theta, round_)
        seen, clients = cell.seen(round_, theta), cell.schedule.participants(round_)
        weights = torch.from_numpy(cell.schedule.sizes[clients])
        order = torch.from_numpy(protocol.shuffled(cell.settings.seed, round_, len(clients)))

        def harm(updates: Tensor) -> float:
            return float((rule(updates, weights, order, seen, state) * v).sum())  # noqa: B023

        honest = adversary.updates(cell, theta, round_)
        if name == "greedy":
            flips = adaptive.best_flips(cell, theta, round_, server)
            sent = adversary.updates(cell, theta, round_, flips)
            tried = [adversary.flips(cell, theta, round_, percent=percent) for percent in attack.PERCENTS]
            assert len(flips.samples) <= tried[0].allowed
            harms = [harm(adversary.updates(cell, theta, round_, one)) for one in tried]
        else:
            sent = adaptive.best_crafted(cell, theta, round_, honest, server)
            key, values = attack.ATTACKS[name].tries
            args = [{}, *({key: value} for value in values)]
            view = attack.Updates(
                honest,
                torch.from_numpy(np.isin(clients, cell.partition.malicious)),
                direction=lambda: v,  # noqa: B023
                noise=lambda: honest,  # noqa: B023
            )
            made_up = [
                torch.where(view.malicious[:, None, None], attack.craft(name, view, one), honest) for one in args
            ]
            harms = [harm(one) for one in made_up]
        assert len(harms) <= 8
        assert harm(sent) == pytest.approx(min(harms), abs=1e-12)
        better += harm(sent) < harms[0] - 1e-9
        full += harms[0] < min(harms[1:]) - 1e-9
        aggregate_, state = rule.step(sent, weights, order, seen, state)
        theta = theta - 0.5 * aggregate_
    assert better
    assert full or strategy != "class_norms"  # where all of the budget is best, all of it is used


def test_under_the_mean_adapting_changes_nothing(settings: Compose, small_data: Small) -> None:
    ends = [
        engine.run_cells([scenario_of(settings, small_data(2), "attack.budget=0.3", *more)])[0].theta
        for more in ([], ["attack.adapt=rule"])
    ]
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["attack=mimic", "attack.adapt=rule"],
            "name=mimic, which has nothing to try; use greedy, random_flip, .*, alie$",
        ),
        (["attack.direction=target_far", "attack.knowledge=own"], "with direction=target_far; use knowledge=full$"),
        (["attack.adapt=rule", "attack.refresh=epoch"], "adapt=rule has no meaning with refresh=epoch"),
        (
            ["attack.adapt=rule", "strategy=flower", "strategy.path=flwr.serverapp.strategy.FedMedian"],
            "attack.adapt=rule needs a rule that is known",
        ),
        (["sanitize=cleanlab"], "sanitize"),
        (["sanitize=knn", "sanitize.share=0.4"], "sanitize.share=0.4 is not allowed: it must be at least 0.5"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_in_one_line(settings: Compose, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings("dataset=digits", *more)


# --- in Flower, and after an interruption ---------------------------------------------------------

EVERYWHERE = {
    "history": ["strategy=cosine_history", "attack.adapt=rule", "clients.per_round=5"],
    "trust": ["strategy=fltrust", "strategy.root=30", "attack=ipm", "attack.adapt=rule", "local_steps=2"],
    "sybils": ["strategy=foolsgold", "attack=minmax", "worker_momentum=0.5"],
    "noise": ["strategy=flame", "sanitize=knn"],
    "classes": ["strategy=class_norms", "sanitize=confident", "model=mlp", "model.args={widths: [4]}"],
    "momentum": ["strategy=krum", "attack.adapt=rule", "worker_momentum=0.5"],
}


class Here(grids.BlockGrid):
    """The grid of blocks with its one block in this process, to which the messages travel as to an actor."""

    def __init__(self, clients: int) -> None:
        grids.TaskIdentity.run_id, grids.TaskIdentity.node_id, grids.TaskIdentity.task_id = 1, 1, 1
        self._run, self._ids = grids.Run.create_empty(1), itertools.count(1)
        self.block = grids.ClientBlock(client_app, list(range(clients)), clients)
        self._actor_of = dict.fromkeys(range(grids.FIRST_NODE, grids.FIRST_NODE + clients))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
        return pickle.loads(self.block.handle(pickle.dumps(asked)))[::-1]


def check_same(history: History, alone: engine.Outcome) -> None:
    torch.testing.assert_close(history.theta, alone.theta, rtol=0, atol=1e-9)
    for (round_, ours), (same, theirs) in zip(history.flips, alone.flips, strict=True):
        assert round_ == same and ours.samples.tolist() == theirs.samples.tolist()


@pytest.mark.parametrize("case", EVERYWHERE)
def test_clients_of_flower_go_the_same_way(settings: Compose, small_data: Small, case: str) -> None:
    cell = scenario_of(settings, small_data(3), "engine=flower", *EVERYWHERE[case])
    recorder = Recorder(cell)
    start(Here(7), recorder)
    check_same(recorder.history, sequential.run(cell))


@pytest.mark.parametrize("grid", ["block", "stock"])
def test_so_they_do_on_ray(shared_ray: None, settings: Compose, small_data: Small, grid: str) -> None:
    cases = ["history", "sybils"] if grid == "stock" else ["history"]
    chosen = ["engine=flower", f"engine.grid={grid}", "engine.actors=2", "rounds=3"]
    cells = [scenario_of(settings, small_data(3), *chosen, *EVERYWHERE[case]) for case in cases]
    recorders = [Recorder(cell) for cell in cells]

    def drive(federate: federation.Federate) -> None:
        for recorder in recorders:
            federate(recorder)

    federation.run(drive, cells[0].settings)
    for recorder, cell in zip(recorders, cells, strict=True):
        check_same(recorder.history, sequential.run(cell))


@pytest.mark.parametrize(
    ("classes", "how"), [(2, ()), (3, ("local_steps=2", "weight_decay=0.05", "clients.per_round=6"))]
)
def test_rules_and_attackers_who_know_them_do_in_a_batch_what_they_do_alone(
    settings: Compose, small_data: Small, classes: int, how: tuple[str, ...], tmp_path: Path
) -> None:
    rules = ("cosine_history", "fltrust", "foolsgold", "class_norms", "spectral", "flame", "krum")
    attacks = (
        ["attack=greedy"],
        ["attack=ipm", "attack.adapt=rule", "attack.every=2"],
        ["attack=alie", "attack.adapt=rule"],
    )
    chosen = [(rule, one) for i, rule in enumerate(rules) for one in (attacks[0], attacks[1 + i % 2])]
    chosen.append(("fltrust", ["lr=0.3"]))  # in one tile with others
    make = partial(scenario_of, settings, small_data(classes), *how, "rounds=3", "strategy.f=1")
    cells = [make(f"strategy={rule}", *one) for rule, one in chosen]
    assert all(engine.is_linear(cell) for cell in cells)
    together = engine.run_cells(cells)
    for cell, outcome in zip(cells, together, strict=True):
        alone = sequential.run(cell)
        torch.testing.assert_close(outcome.theta, alone.theta, rtol=0, atol=1e-9)
        np.testing.assert_allclose(outcome.table, alone.table, atol=1e-8)

    def kept() -> list[Checkpoint]:
        return [Checkpoint(tmp_path, "key", every=0.0)] * len(cells)

    def stop(numbers: list[int], so_far: object) -> None:
        if len(numbers) and next(rounds) == 2:
            raise KeyboardInterrupt

    rounds = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        engine.run_cells(cells, checkpoints=kept(), watch=stop)
    for rest, outcome in zip(engine.run_cells(cells, checkpoints=kept()), together, strict=True):
        torch.testing.assert_close(rest.theta, outcome.theta, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["cosine_history", "foolsgold"])
def test_an_interrupted_run_goes_on_with_what_the_rule_remembers(
    settings: Compose, small_data: Small, tmp_path: Path, strategy: str
) -> None:
    cell = scenario_of(settings, small_data(3), f"strategy={strategy}", "rounds=6")
    kept = Checkpoint(tmp_path, "key", every=0.0)
    kept._due = 0.0
    half = replace(cell, settings=cell.settings.model_copy(update={"rounds": 3}))
    sequential.run(half, checkpoint=kept)
    rest = sequential.run(cell, checkpoint=Checkpoint(tmp_path, "key"))
    torch.testing.assert_close(rest.theta, sequential.run(cell).theta, rtol=0, atol=0)
    assert not torch.equal(rest.theta, sequential.run(half).theta)


@pytest.mark.parametrize(
    "keeps",
    [["strategy=cosine_history"], ["strategy=foolsgold"], ["attack.memory=persist", "attack.budget=0.2"]],
    ids=["cosine_history", "foolsgold", "flips that stay"],
)
def test_an_interrupted_federation_goes_on_with_what_the_server_keeps(
    settings: Compose, small_data: Small, tmp_path: Path, keeps: list[str]
) -> None:
    cell = scenario_of(settings, small_data(3), "engine=flower", "rounds=6", *keeps)
    half = replace(cell, settings=cell.settings.model_copy(update={"rounds": 3}))
    whole, rest = Recorder(cell), Recorder(cell, checkpoint=Checkpoint(tmp_path, "key"))
    start(Here(7), whole)
    start(Here(7), Recorder(half, checkpoint=Checkpoint(tmp_path, "key")))
    start(Here(7), rest)
    assert rest.round == 6 and torch.equal(rest.history.theta, whole.history.theta)
    flips = [history.flip_table() for history in (rest.history, whole.history)]
    assert all(np.array_equal(flips[0][name], flips[1][name]) for name in flips[0])
