"""What a thousand clients cost lies in products; the plain definitions, which compare each with each, are the test."""

import time

import numpy as np
import pytest
import torch

from fl_attack import detect, protocol
from fl_attack.aggregate.geometry import gram_of


def plain_auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Every pair of a positive and a negative compared."""
    wins = 0.0
    for one in score[positive]:
        for other in score[~positive]:
            equal = one == other or abs(one - other) <= 1e-9 * max(abs(one), abs(other)) < np.inf
            wins += 0.5 if equal else one > other
    return wins / (positive.sum() * (~positive).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_area_by_sorting_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.concatenate(
        [rng.normal(size=40), np.repeat(rng.normal(size=4), 5), [0, 0, -0.0, np.inf, np.inf, -np.inf]]
    )
    score = np.concatenate([score, score[:30] * (1 + 0.9e-9), score[:30] * (1 - 1.1e-9)])
    positive = rng.random(len(score)) < 0.4
    found = detect.auc(torch.from_numpy(score), torch.from_numpy(positive))
    assert found.item() == pytest.approx(plain_auc(score, positive), abs=1e-15)


@pytest.mark.parametrize("clients", [31, 500, 501, 700])
def test_inner_products_are_those_of_all_pairs_in_blocks_of_any_size(clients: int) -> None:
    u = torch.randn(2, clients, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram_of(u), torch.einsum("bmcd,bncd->bmn", u, u), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e7])
def test_distances_by_products_keep_the_digits_of_differences(shift: float) -> None:
    u = torch.randn(2, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u[:, 7] = u[:, 3]  # a copy
    u[:, 8] = u[:, 3] + 1e-9 * u[:, 4]  # nearly one
    u[:, 9] *= 1e6  # far from all others
    u += shift
    centre = u.median(-2).values
    found, exact = detect._distances(u, centre), torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist")
    assert (found[:, 3, 7] == 0).all()
    torch.testing.assert_close(found, exact, rtol=1e-9 if shift < 1e7 else 1e-7, atol=0)


def test_the_samples_of_many_clients_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    shards = tuple(np.sort(part) for part in np.split(rng.permutation(700), np.sort(rng.choice(699, 29, False) + 1)))
    sizes = np.array([max(1, len(shard) // 3) for shard in shards])
    schedule = protocol.Schedule(shards, sizes, 1, seed=3)
    for clients in (np.arange(30), np.arange(4, 20), np.array([1, 5])):
        for round_ in (1, 2, 7, 300, 2):
            alone = [protocol.Schedule(shards, sizes, 1, seed=3).steps(client, round_).ravel() for client in clients]
            samples, counts = schedule.samples(clients, round_)
            assert samples.tolist() == sorted(np.concatenate(alone).tolist())
            assert (counts == 1).all()
            if len(clients) == 30:
                assert samples.tolist() == schedule.round_samples(round_)[0].tolist()


def test_the_orders_that_are_kept_are_one_for_each_client_asked_for() -> None:
    shards = tuple(np.arange(10 * i, 10 * i + 10) for i in range(600))
    schedule = protocol.Schedule(shards, np.full(600, 3), 1, seed=0)
    drawn: list[int] = []
    original = np.random.default_rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda key: [drawn.append(1), original(key)][1])
        for round_ in range(1, 7):  # two passes of three rounds
            for client in range(300, 600):
                schedule.steps(client, round_)
    assert len(drawn) == 2 * 300
    assert len(schedule._orders) == 300


def test_measures_of_a_thousand_clients_take_no_time() -> None:
    u = torch.randn(1000, 10, 80, generator=torch.Generator().manual_seed(0))
    malicious = torch.arange(1000) < 100
    detect.measures(u[:10], malicious[:10])
    began = time.process_time()
    detect.measures(u, malicious)
    assert time.process_time() - began < 2.5  # comparing all pairs by subtraction: 1.2e9 numbers


def test_measures_take_updates_of_any_layout() -> None:
    u = torch.randn(3, 7, 2, 4, generator=torch.Generator().manual_seed(0))
    malicious = (torch.arange(7) < 2).expand(3, 7)
    expected = detect.measures(u, malicious)
    assert torch.equal(detect.measures(u.movedim(1, 0).contiguous().movedim(0, 1), malicious), expected)
