"""Random streams: another one in every round, under every seed and for every purpose, and the same one again."""

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_attack import engine, streams
from fl_attack.config import Settings
from fl_attack.engine import Outcome, sequential
from fl_attack.scenario import Scenario

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
ROUNDS = 3
# theta stays where it is, and each round sees all samples: without chance its step is that of the round before
STILL = ["batch_size=full", "lr=1e-9", "dtype=float64", "clients.total=6", "clients.malicious=2", "attack.budget=0.5"]
CHANCE = {
    "which samples are used": ["clients.malicious=0", "batch_size=30"],
    "which clients take part": ["clients.malicious=0", "clients.per_round=3"],
    "which clients share a bucket": ["clients.malicious=0", "strategy.name=median", "strategy.pre=[bucketing]"],
    "which clients are known": ["attack.knowledge=noisy", "attack.knowledge_fraction=0.3"],
    "which labels are flipped": ["attack=random_flip", "clients.malicious=6"],
    "which labels of a map are flipped": ["attack=static_flip", "clients.malicious=6"],
    "what noise is sent": ["attack=gaussian", "clients.malicious=6"],
    "what noise the server adds": ["clients.malicious=0", "strategy.name=flame", "strategy.args={noise: 1}"],
}
WITHOUT_CLIENTS = [name for name, more in CHANCE.items() if "clients.malicious=6" in more]


def together(cell: Scenario) -> Outcome:
    return engine.run_cells([cell])[0]


def alone(cell: Scenario) -> Outcome:
    return sequential.run(cell, client_by_client=True)


@pytest.fixture(params=[alone, together])
def steps(request: pytest.FixtureRequest, settings: Compose, small_data: Small) -> Callable[..., list[Tensor]]:
    """The step of each round, in both engines."""

    def run(*overrides: str) -> list[Tensor]:
        chosen = settings(*small_data(3), *STILL, *overrides)
        thetas = [torch.zeros(3, 7, dtype=torch.float64)]
        for rounds in range(1, ROUNDS + 1):
            (cell,) = engine.make_scenarios([chosen.model_copy(update={"rounds": rounds})])
            found = request.param(cell).theta
            assert found is not None
            thetas.append(found)
        return [(after - before) / chosen.lr for before, after in itertools.pairwise(thetas)]

    return run


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_without_chance_every_round_is_the_same(steps: Callable[..., list[Tensor]]) -> None:
    for overrides in ([], ["strategy.name=median"], ["attack=static_flip", "attack.budget=1"]):
        first, *others = steps(*overrides)
        assert all(same(first, other) for other in others)


@pytest.mark.parametrize("what", CHANCE)
def test_chance_is_new_in_every_round(steps: Callable[..., list[Tensor]], what: str) -> None:
    found = steps(*CHANCE[what])
    assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("what", WITHOUT_CLIENTS)
def test_chance_is_new_under_every_seed_and_the_same_under_the_same(
    steps: Callable[..., list[Tensor]], what: str
) -> None:
    zero, again, one = (steps(*CHANCE[what], seed) for seed in ("seed=0", "seed=0", "seed=1"))
    assert all(torch.equal(a, b) for a, b in zip(zero, again, strict=True))
    assert not any(same(a, b) for a, b in itertools.product(zero, one))


def test_no_two_purposes_seeds_or_rounds_share_a_stream(
    steps: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = np.random.default_rng
    users: dict[tuple[int, ...], set[tuple[str, int, int]]] = {}  # of each stream: file, line, seed
    seed = 0

    def noted(key: object) -> np.random.Generator:
        frame = sys._getframe(1)
        state = tuple(np.random.SeedSequence(key).generate_state(4).tolist())  # type: ignore[arg-type]
        if frame.f_globals["__name__"].startswith("fl_attack"):
            users.setdefault(state, set()).add((frame.f_code.co_filename, frame.f_lineno, seed))
        return original(key)  # type: ignore[arg-type]

    monkeypatch.setattr(np.random, "default_rng", noted)
    for seed, more in itertools.product((71, 72), CHANCE.values()):
        mixed = [
            "clients.per_round=4",
            "local_steps=2",
            "batch_size=30",
            "early_stop.patience=9",
            "partition=dirichlet",
        ]
        steps(*more, *mixed, f"seed={seed}")
    places = {place for of_stream in users.values() for place in of_stream}
    assert len({line for _, line, _ in places}) >= 6  # minibatches, takers, buckets, known, flips, noise; the partition
    assert not [of_stream for of_stream in users.values() if len(of_stream) > 1]


def test_streams_keep_their_numbers() -> None:
    """Another number would change results that people have published."""
    numbers = {name: value for name, value in vars(streams).items() if name.isupper() and isinstance(value, int)}
    purposes = ["BATCHES", "PARTICIPANTS", "LABEL_NOISE", "UPDATE_NOISE", "KNOWN_CLIENTS", "CLIENT_ORDER", "PLAN"]
    wanted = {name: number for number, name in enumerate([*purposes, "SAMPLE", "TRUSTED", "SERVER_NOISE"], 1)}
    assert numbers == wanted | {"IMAGINED": 9}
