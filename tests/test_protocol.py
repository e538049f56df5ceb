"""Who trains on what, and the server's step, held to their definitions."""

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
