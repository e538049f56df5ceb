"""Who trains on what, and the server's step, held to their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_attack import protocol
from fl_attack.errors import InputError
from fl_attack.models import logistic
from fl_attack.protocol import Schedule

SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(SHARDS, st.data())
def test_batch_sizes_add_up_and_follow_the_shards(sizes: list[int], data: st.DataObject) -> None:
    shards = np.array(sizes)
    batch = data.draw(st.integers(len(sizes), int(shards.sum())))
    chosen = protocol.batch_sizes(shards, batch)
    assert chosen.sum() == batch
    assert ((chosen >= 1) & (chosen <= shards)).all()
    fair = shards * batch / shards.sum()
    assert (chosen <= np.maximum(np.ceil(fair), 1)).all()
    assert (np.diff(chosen[np.argsort(shards, kind="stable")]) >= -1).all()


def test_equal_shards_get_batches_that_differ_by_one_at_most() -> None:
    assert protocol.batch_sizes(np.full(10, 100), 128).tolist() == [13] * 8 + [12] * 2


@pytest.mark.parametrize(("batch", "allowed"), [(31, "at most 30"), (2, "at least 3")])
def test_a_batch_that_the_data_can_not_give_is_refused(batch: int, allowed: str) -> None:
    with pytest.raises(InputError, match=f"batch_size={batch}.*{allowed}"):
        protocol.batch_sizes(np.full(3, 10), batch)


def schedule(shards: list[int], sizes: list[int], local_steps: int, seed: int = 3) -> Schedule:
    ends = np.cumsum(shards)
    parts = tuple(np.arange(end - n, end) for n, end in zip(shards, ends, strict=True))
    return Schedule(parts, np.array(sizes), local_steps, seed)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 40))
def test_a_clients_round_is_made_of_its_own_samples(shard: int, size: int, steps: int, round_: int) -> None:
    size = min(size, shard)
    plan = schedule([5, shard], [1, size], steps)
    batches = plan.steps(1, round_)
    assert batches.shape == (steps, size)
    assert np.isin(batches, plan.shards[1]).all()
    assert all(len(set(batch)) == size for batch in batches)  # no sample twice in a step
    assert len(np.unique(batches)) == plan.used[1]
    assert (plan.steps(1, round_) == batches).all()


@given(st.integers(2, 30), st.integers(1, 10), st.integers(1, 3))
def test_a_pass_visits_no_sample_twice_and_leaves_less_than_a_round_out(shard: int, size: int, steps: int) -> None:
    plan = schedule([shard], [min(size, shard)], steps)
    used = int(plan.used[0])
    if used < plan.local_steps * plan.sizes[0]:
        return  # the shard is too small for one round
    rounds = shard // used
    visited = np.concatenate([plan.steps(0, r).ravel() for r in range(1, rounds + 1)])
    assert len(set(visited.tolist())) == rounds * used
    assert shard - rounds * used < used


def test_batches_depend_on_seed_client_and_round_alone() -> None:
    a, b = schedule([50, 50], [5, 5], 1, seed=1), schedule([50, 50], [5, 5], 1, seed=2)
    assert (a.steps(0, 7) != b.steps(0, 7)).any()
    assert (a.steps(0, 7) != a.steps(0, 8)).any()
    assert (a.steps(0, 7) + 50 != a.steps(1, 7)).any()


def test_a_full_batch_has_no_randomness() -> None:
    plan = schedule([4, 6], [4, 6], 2)
    assert plan.steps(1, 1).tolist() == plan.steps(1, 9).tolist() == [[4, 5, 6, 7, 8, 9]] * 2


def test_samples_of_a_round_are_counted() -> None:
    samples, counts = schedule([3, 2], [3, 2], 2).samples([0, 1], 1)
    assert samples.tolist() == [0, 1, 2, 3, 4]
    assert counts.tolist() == [2] * 5


def test_one_local_step_is_gradient_descent_and_more_are_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    X = torch.randn(2, 5, 4, dtype=torch.float64, generator=rng)
    y = torch.randint(3, (2, 5), generator=rng)
    once = theta - 0.3 * logistic.gradient(theta, X[0], y[0])
    torch.testing.assert_close(protocol.local_update(logistic.gradient, theta, X[:1], y[:1], 0.3), once)
    twice = once - 0.3 * logistic.gradient(once, X[1], y[1])
    torch.testing.assert_close(protocol.local_update(logistic.gradient, theta, X, y, 0.3), twice)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.2)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.2)),
    ],
)
def test_the_servers_optimizers_are_those_of_torch(name: protocol.Optimizer, make: object) -> None:
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 3, dtype=torch.float64, generator=rng)
    reference = theta.clone().requires_grad_()
    optimizer = make([reference])  # type: ignore[operator]
    state = protocol.initial_state(theta)
    for _ in range(6):
        reference.grad = torch.randn(2, 3, dtype=torch.float64, generator=rng)
        theta, state = protocol.server_step(name, theta, reference.grad, 0.2, state)
        optimizer.step()
        torch.testing.assert_close(theta, reference.detach())


@pytest.mark.parametrize(
    ("schedule", "more", "expected"),
    [
        ("constant", {}, [1.0] * 7),
        ("step", {}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),  # a third of seven rounds, rounded up
        ("step", {"every": 2, "decay": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        ("inverse", {"every": 1}, [1 / t for t in range(1, 8)]),
        ("inverse", {}, [1, 3 / 4, 3 / 5, 3 / 6, 3 / 7, 3 / 8, 3 / 9]),
        ("cosine", {}, [(1 + math.cos(math.pi * t / 7)) / 2 for t in range(7)]),
    ],
)
def test_the_learning_rate_falls_as_its_schedule_says(
    schedule: protocol.LrSchedule, more: dict[str, float], expected: list[float]
) -> None:
    found = [protocol.lr_factor(schedule, round_, 7, **more) for round_ in range(1, 8)]  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-12)


def test_clients_keep_momenta_of_their_own_and_none_without_a_factor() -> None:
    start = torch.zeros(1, 2, dtype=torch.float64)
    momenta = protocol.Momenta(0.75, 4, start)
    assert momenta.table.shape == (4, 1, 2) and momenta.table.dtype == torch.float64
    first = protocol.with_momentum(0.75, momenta.of([1, 3]), torch.full((2, 1, 2), 4.0))
    assert first.tolist() == [[[1.0, 1.0]]] * 2
    momenta.note([1, 3], first)
    again = protocol.with_momentum(0.75, momenta.of(np.array([0, 3])), torch.full((2, 1, 2), 8.0))
    assert again.tolist() == [[[2.0, 2.0]], [[2.75, 2.75]]]
    assert momenta.table[:, 0, 0].tolist() == [0, 1, 0, 1]
    none = protocol.Momenta(0.0, 4, start)
    none.note([1, 3], first)
    assert none.of([1]) is None and len(none.table) == 0
    assert protocol.with_momentum(0.0, None, first) is first


def schedule_of(*lengths: int, size: int = 2, steps: int = 1, per_round: int | None = None, seed: int = 3) -> Schedule:
    starts = np.cumsum([0, *lengths])
    shards = tuple(np.arange(a, b) for a, b in itertools.pairwise(starts))
    return Schedule(shards, np.full(len(lengths), size), steps, seed, per_round)


def test_labels_are_counted_that_are_used_in_a_round_and_rounds_in_an_epoch() -> None:
    one = schedule_of(7, 4, 2)
    assert one.used.tolist() == [2, 2, 2] and one.labels_used(1) == 6 and one.rounds_per_epoch == 3
    more = schedule_of(7, 4, 2, steps=3)
    assert more.used.tolist() == [6, 4, 2] and more.labels_used(1) == 12 and more.rounds_per_epoch == 1
    assert schedule_of(7, 5, 2).rounds_per_epoch == 3 and schedule_of(6, 6, 2, size=1).rounds_per_epoch == 5
    some = schedule_of(7, 4, 2, steps=3, per_round=2)
    for round_ in range(1, 6):
        clients = some.participants(round_)
        assert len(set(clients.tolist())) == 2 and (np.diff(clients) > 0).all()
        assert some.labels_used(round_) == sum(more.used[clients])
        assert some.samples_of_all(round_).tolist() == some.samples(clients, round_)[0].tolist()
    assert len({tuple(some.participants(round_)) for round_ in range(1, 20)}) == 3
    assert [tuple(one.participants(1)), tuple(some.samples_of_all(None))] == [(0, 1, 2), tuple(range(13))]


@pytest.mark.parametrize("few", [0, 8])
def test_samples_of_a_round_are_the_same_however_they_are_gathered(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FEW", few)
    monkeypatch.setattr(protocol, "CLIENT_ROUNDS_AT_ONCE", 12)  # three rounds of four clients
    one = schedule_of(7, 4, 9, 5)
    for round_ in (1, 3, 4, 2, 8):
        steps = [one.steps(client, round_).ravel() for client in range(4)]
        samples, counts = one.round_samples(round_)
        assert samples.tolist() == sorted(np.concatenate(steps).tolist()) and (counts == 1).all()
        part, counts = one.samples([1, 3], round_)
        assert part.tolist() == sorted([*steps[1], *steps[3]]) and counts.tolist() == [1] * 4
    held, counts = one.samples([3, 0], None)
    assert held.tolist() == [*range(7), *range(20, 25)] and (counts == 1).all()
    for round_ in (1, 5):
        again = schedule_of(5, 3, size=2, steps=4)
        samples, counts = again.samples([1], round_)
        assert len(samples) == 2 and counts.tolist() == [4, 4]


def test_rounds_in_a_row_are_the_rounds_one_by_one_across_passes() -> None:
    one = schedule_of(7, size=2)
    rows = one.samples_of_rounds(0, 2, 6)
    assert rows.shape == (6, 2)
    for i, row in enumerate(rows):
        assert row.tolist() == one.steps(0, 2 + i).ravel().tolist()
    first, second = (sorted(one.samples_of_rounds(0, start, 3).ravel().tolist()) for start in (1, 4))
    assert len(set(first)) == len(set(second)) == 6
    assert schedule_of(7, size=2, seed=4).samples_of_rounds(0, 2, 6).tolist() != rows.tolist()


def test_lots_are_drawn_by_seed_and_round() -> None:
    orders = {(seed, round_): tuple(protocol.shuffled(seed, round_, 9)) for seed in (0, 1) for round_ in (1, 2)}
    assert len(set(orders.values())) == 4 and all(sorted(order) == list(range(9)) for order in orders.values())
    assert tuple(protocol.shuffled(1, 2, 9)) == orders[1, 2]


def test_a_local_step_is_the_mean_over_the_samples_kept_and_weight_decay_alone_where_none_is() -> None:
    theta, X = torch.ones(1, 2, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
    y, kept = torch.tensor([[0, 1, 0], [1, 1, 0]]), torch.tensor([[True, False, True], [False] * 3])
    found = protocol.local_update(logistic.gradient, theta, X, y, 0.5, 0.1, kept)
    step = logistic.gradient(theta, X[0, [0, 2]], y[0, [0, 2]]) + 0.1 * theta
    torch.testing.assert_close(found, (theta - 0.5 * step) * 0.95)
    plain = protocol.local_update(logistic.gradient, theta, X, y, 0.5, 0.0, kept)
    torch.testing.assert_close(plain, theta - 0.5 * (step - 0.1 * theta))
    tensor = protocol.local_update(logistic.gradient, theta, X, y, 0.5, torch.tensor([[0.1]]), kept)
    torch.testing.assert_close(tensor, found)
    single = protocol.local_update(logistic.gradient, theta, X.float(), y, 0.5, 0.1, kept)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, found, rtol=1e-5, atol=1e-6)
