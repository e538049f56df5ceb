"""What the attacker does over the rounds of an experiment: budgets, knowledge, targets."""

import math
import sys
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest
import torch

from fl_attack import adversary, knowledge, scenario, targets
from fl_attack.config import Settings
from fl_attack.data import cache
from fl_attack.errors import InputError
from fl_attack.federation import client as clients
from fl_attack.federation import wire
from fl_attack.models import logistic, outputs
from fl_attack.scenario import Scenario

Make = Callable[..., Scenario]


@pytest.fixture
def make(settings: Callable[..., Settings], small_data: Callable[..., list[str]]) -> Make:
    """Makes a scenario on small data from overrides."""

    def build(*overrides: str, classes: int = 3) -> Scenario:
        common = ["clients.honest=4", "clients.malicious=3", "rounds=12", "batch_size=full", "dtype=float64"]
        return scenario.make(settings(*small_data(classes), *common, *overrides))

    return build


def some_theta(cell: Scenario, seed: int = 0) -> torch.Tensor:
    return torch.randn(cell.theta_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scope", ["pooled", "per_client"])
@pytest.mark.parametrize("rounding", ["floor", "carry", "ceil"])
@pytest.mark.parametrize("batch", ["full", "17", "40"])
def test_the_budget_holds_in_every_round_and_in_the_long_run(make: Make, scope: str, rounding: str, batch: str) -> None:
    budget = 0.23
    cell = make(
        f"attack.budget={budget}", f"attack.scope={scope}", f"attack.rounding={rounding}", f"batch_size={batch}"
    )
    malicious = cell.partition.malicious
    writable = cell.schedule.used[malicious]
    spent = np.zeros(len(malicious), int)
    for round_ in range(1, 13):
        flips = adversary.flips(cell, some_theta(cell, round_), round_)
        owner = cell.partition.client[flips.samples]
        counts = np.array([(owner == client).sum() for client in malicious])
        used = cell.schedule.samples(malicious, round_)[0]
        assert np.isin(flips.samples, used).all()
        assert len(set(flips.samples)) == len(flips.samples) <= flips.allowed
        assert (flips.labels != cell.dataset.y_train[flips.samples]).all()
        spent += counts
        if rounding == "floor" and scope == "pooled":
            assert counts.sum() <= math.floor(budget * writable.sum())
        elif rounding == "floor":
            assert (counts <= np.floor(budget * writable)).all()
        elif rounding == "ceil" and scope == "pooled":
            assert counts.sum() <= math.ceil(budget * writable.sum()) == flips.allowed
        elif rounding == "ceil":
            assert (counts <= np.ceil(budget * writable)).all()
        elif scope == "pooled":
            assert spent.sum() <= budget * writable.sum() * round_
        else:
            assert (spent <= budget * writable * round_).all()
    if rounding != "floor" and batch == "17":
        assert spent.sum() > 0  # where floor would give nothing to a client of two samples
    assert spent.sum() == 0 or spent.sum() > 0.5 * budget * writable.sum() * 12 or rounding == "floor"


def test_a_budget_below_one_flip_never_writes_under_floor_and_does_now_and_then_under_carry(make: Make) -> None:
    def rounds_with_flips(rounding: str) -> int:
        cell = make("attack.budget=0.1", f"attack.rounding={rounding}", "batch_size=14")  # 6 of the attackers
        return sum(len(adversary.flips(cell, some_theta(cell), r).samples) > 0 for r in range(1, 11))

    assert rounds_with_flips("floor") == 0
    assert rounds_with_flips("ceil") == 10
    assert rounds_with_flips("carry") == 6


@pytest.mark.parametrize("overrides", [["attack.budget=0"], ["attack=none"], ["clients.malicious=0"]])
def test_without_budget_attack_or_attackers_nothing_is_flipped(make: Make, overrides: list[str]) -> None:
    cell = make(*overrides)
    assert len(adversary.flips(cell, some_theta(cell), 1).samples) == 0


def test_an_attacker_with_everything_flips_every_label_that_helps(make: Make) -> None:
    cell = make("clients.honest=0", "attack.budget=1")
    theta = some_theta(cell)
    flips = adversary.flips(cell, theta, 1)
    X, y = cell.features(np.arange(120)), cell.dataset.y_train
    v = cell.gradient(theta, range(3), 1)
    assert cell.write_access == 1
    labels = logistic.scores(v, X).argmax(-1).numpy()
    assert flips.samples.tolist() == np.flatnonzero(labels != y).tolist()
    assert (flips.labels == labels[flips.samples]).all()


def test_only_attacked_rounds_are_written_to(make: Make) -> None:
    cell = make("attack.every=3", "attack.start=2", "attack.stop=9", "attack.budget=0.5")
    written = [r for r in range(1, 13) if len(adversary.flips(cell, some_theta(cell), r).samples)]
    assert written == [2, 5, 8]


@pytest.mark.parametrize(("known", "who"), [("full", range(7)), ("honest", None), ("own", None)])
def test_the_direction_is_the_clean_gradient_of_what_is_known(make: Make, known: str, who: range | None) -> None:
    cell = make(f"attack.knowledge={known}")
    malicious = set(cell.partition.malicious.tolist())
    clients = {"honest": set(range(7)) - malicious, "own": malicious}.get(known, set(range(7)))
    samples = np.flatnonzero(np.isin(cell.partition.client, list(clients)))
    theta, X = some_theta(cell), cell.features(samples)
    expected = logistic.gradient(theta, X, torch.tensor(cell.dataset.y_train[samples]))
    torch.testing.assert_close(knowledge.direction(cell, theta, 1), expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_an_untargeted_attack_turns_the_union_gradient_away_and_a_targeted_one_towards_its_target(
    make: Make, classes: int
) -> None:
    for goal in ("untargeted", "targeted"):
        cell = make(f"attack.goal={goal}", "attack.budget=0.6", classes=classes)
        theta = some_theta(cell)
        flips = adversary.flips(cell, theta, 1)
        y = cell.dataset.y_train.copy()
        y[flips.samples] = flips.labels
        X, v = cell.features(np.arange(120)), knowledge.direction(cell, theta, 1)
        honest, attacked = (
            (logistic.gradient(theta, X, torch.tensor(labels)) * v).sum().item() for labels in (cell.dataset.y_train, y)
        )
        assert attacked < honest


def test_data_and_labels_are_never_changed(make: Make) -> None:
    cell = make("attack.budget=1", "local_steps=3", "batch_size=60")
    before = cell.dataset.x_train.copy(), cell.dataset.y_train.copy()
    for client in range(7):
        flips = adversary.flips(cell, some_theta(cell), 2)
        scenario.client_update(cell, client, some_theta(cell), 2, flips)
    assert (cell.dataset.x_train == before[0]).all()
    assert (cell.dataset.y_train == before[1]).all()


def test_flips_reach_the_gradient_of_their_owner_alone(make: Make) -> None:
    cell = make("attack.budget=0.5")
    theta = some_theta(cell)
    flips = adversary.flips(cell, theta, 1)
    for client in range(7):
        clean, _ = scenario.client_update(cell, client, theta, 1, scenario.NO_FLIPS)
        dirty, _ = scenario.client_update(cell, client, theta, 1, flips)
        touched = (cell.partition.client[flips.samples] == client).any()
        assert torch.equal(clean, dirty) != touched
        assert not touched or client in cell.partition.malicious


@pytest.mark.parametrize("classes", [2, 3])
def test_the_target_is_trained_on_fully_flipped_labels_with_the_runs_own_settings(make: Make, classes: int) -> None:
    cell = make("attack.goal=targeted", "rounds=9", "lr=0.4", "server_optimizer=momentum", classes=classes)
    X, y = cell.features(np.arange(120)), torch.tensor((cell.dataset.y_train + 1) % classes)
    theta = torch.zeros(cell.theta_shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.4, momentum=0.9)
    for _ in range(9):
        optimizer.zero_grad()
        outputs.losses(logistic.logits(theta, X), y).mean().backward()
        optimizer.step()
    torch.testing.assert_close(targets.target(cell), theta.detach())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_target_is_trained_once_and_a_damaged_one_again(
    make: Make, steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("FL_ATTACK_CACHE", str(tmp_path))
    overrides = ("attack.goal=targeted", f"local_steps={steps}", "batch_size=50")
    first = targets.target(make(*overrides))
    (file,) = cache.folder().glob("targets/*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(targets, "train_all", lambda *_: pytest.fail("trained again"))
        assert torch.equal(targets.target(make(*overrides)), first)
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(targets.target(make(*overrides)), first)
    targets.target(make(*overrides, "lr=0.01"))
    assert len(list(cache.folder().glob("targets/*.npz"))) == 2


@pytest.mark.parametrize("more", [[], ["local_steps=2"], ["server_optimizer=adam"], ["clients.per_round=3"]])
def test_targets_trained_together_are_those_trained_alone(make: Make, more: list[str]) -> None:
    cells = [make("attack.goal=targeted", "batch_size=50", f"lr={lr}", *more) for lr in (0.1, 0.3, 1)]
    cells.append(make("attack.goal=targeted", "batch_size=50", "lr=1", *more, "server_optimizer=momentum"))
    together = targets.train_all(cells)
    for cell, theta in zip(cells, together, strict=True):
        assert torch.equal(targets.train(cell), theta)
    assert not torch.equal(together[0], together[1])
    found = targets.load_targets([cells[2], cells[0], cells[2]])
    assert torch.equal(found[0], targets.target(cells[2])) and torch.equal(found[1], targets.target(cells[0]))
    assert torch.equal(found[2], found[0])
    assert len({tuple(theta.ravel().tolist()) for theta in together}) == 4


@pytest.mark.parametrize("more", [[], ["clients.total=7", "batch_size=61", "partition=dirichlet", "seed=3"]])
def test_many_samples_are_gone_through_in_pieces(make: Make, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make("attack.goal=targeted", *more)
    whole = targets.train(cell)
    monkeypatch.setattr(targets, "PIECE", 7 * cell.theta_shape[1])
    torch.testing.assert_close(targets.train(cell), whole, rtol=1e-12, atol=1e-12)


def test_a_target_of_ones_own_is_taken_or_refused(make: Make, tmp_path: object) -> None:
    file = f"{tmp_path}/mine.npz"
    overrides = ("attack.goal=targeted", f"attack.target_path={file}")
    with pytest.raises(InputError, match=r"mine\.npz can't be read as a target"):
        targets.target(make(*overrides))
    np.savez(file, theta=np.ones((2, 2)))
    with pytest.raises(InputError, match=r"shape \(2, 2\).*\(3, 7\)"):
        targets.target(make(*overrides))
    np.savez(file, theta=np.ones((3, 7)))
    assert (targets.target(make(*overrides)) == 1).all()


@pytest.mark.parametrize("refresh", ["step", "epoch"])
@pytest.mark.parametrize("attack", ["greedy", "random_flip", "confidence_flip"])
def test_theta_visits_what_attackers_do_once_on_its_way_through_a_client(make: Make, attack: str, refresh: str) -> None:
    cell = make(f"attack.name={attack}", f"attack.refresh={refresh}", "attack.budget=0.5")
    theta, visits = some_theta(cell), []
    malicious = clients.MaliciousClient(cell, int(cell.partition.malicious[0]), clients.OmniscientHook(cell))

    def note(frame: FrameType, event: str, _: object) -> None:
        caller, here = frame.f_back, frame.f_code
        while caller is not None and "fl_attack" not in caller.f_code.co_filename:
            caller = caller.f_back  # through functions of others, such as a partial
        if event == "call" and here.co_filename == adversary.__file__ != (caller and caller.f_code.co_filename):
            visits.append(here.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        answer = malicious.train(wire.Request(theta, False, 1, "", theta, None))
    finally:
        sys.setprofile(before)
    assert answer.flips is not None and len(answer.flips.samples) and visits == ["flips"]
