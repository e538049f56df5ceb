"""attack=planned and attack.direction in experiments: budgets, both engines, files, and the settings refused."""

import csv
import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_attack import (
    adversary,
    attack,
    checkpoint,
    engine,
    knowledge,
    plan_maker,
    plan_rounds,
    plans,
    results,
    scenario,
    targets,
)
from fl_attack.attack import DIRECTIONS
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings, compose
from fl_attack.data import cache
from fl_attack.engine import sequential
from fl_attack.errors import InputError, RunError
from fl_attack.federation import wire
from fl_attack.federation.client import OmniscientHook
from fl_attack.scenario import Scenario

SMALL = ("rounds=8", "batch_size=20", "clients.total=4", "clients.malicious=2", "attack.budget=0.4", "lr=0.5")
PLANNED = ("attack=planned", "attack.args={sweeps: 6}", "dtype=float64", "engine=batched")
TEMPERATURE = attack.planned_options({}).temperature
Make = Callable[..., Scenario]


@pytest.fixture
def make(small_data: Callable[..., list[str]]) -> Make:
    data = {classes: small_data(classes) for classes in (2, 3)}

    def scenario_of(*overrides: str, classes: int = 2) -> Scenario:
        return scenario.make(compose(*data[classes], *SMALL, *overrides))

    return scenario_of


def final_harm(cell: Scenario) -> float:
    """The smoothed error after all rounds, on the sample that plans are made for."""
    theta = engine.run_cells([cell])[0].theta
    assert theta is not None
    X, y = plan_maker.sample_of(cell, 1000)
    return attack.smoothed_error(cell.model.logits(theta, X), y, TEMPERATURE).item()


@pytest.mark.parametrize(
    ("classes", "how"),
    [
        (2, ()),
        (3, ("attack.scope=per_client", "attack.rounding=carry", "attack.budget=0.33")),
        (2, ("clients.per_round=3", "attack.every=2", "attack.start=3", "attack.stop=7", "attack.rounding=carry")),
        (2, ("attack.foresight=simulated", "server_optimizer=adam", "lr=0.05", "weight_decay=0.01")),
        (3, ("attack.horizon=3", "attack.objective=average", "attack.selection=literal")),
        (2, ("batch_size=full", "server_optimizer=momentum", "lr_schedule=cosine", "attack.scope=per_client")),
    ],
)
def test_plans_keep_the_budgets_of_greedy_flips(make: Make, classes: int, how: tuple[str, ...]) -> None:
    cell, greedy = make(*PLANNED, *how, classes=classes), make("engine=batched", *how[:0], classes=classes)
    keys = [one for one in how if one.split("=")[0] not in ("attack.foresight", "attack.horizon", "attack.objective")]
    greedy = make("dtype=float64", "engine=batched", *keys, classes=classes)
    outcome = engine.run_cells([cell])[0]
    flips_by_round = dict(outcome.flips)
    theta = greedy.start()
    for round_ in range(1, 9):
        allowed = adversary.flips(greedy, theta, round_)
        flips = flips_by_round.get(round_, scenario.NO_FLIPS)
        assert len(flips.samples) <= allowed.allowed
        if len(flips.samples):
            assert flips.allowed == allowed.allowed
        own = np.isin(flips.samples, cell.schedule.samples(adversary.present(cell, round_), round_)[0])
        assert own.all() and (np.diff(flips.samples) > 0).all()
        assert (flips.labels != cell.dataset.y_train[flips.samples]).all()
        if cell.settings.attack.scope == "per_client":
            used = cell.schedule.used[0]
            counts = np.bincount(cell.partition.client[flips.samples], minlength=4)
            assert (counts <= np.ceil(cell.settings.attack.budget * used)).all()
    assert any(len(flips.samples) for flips in flips_by_round.values())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_planned_flips_do_more_harm_than_the_better_greedy_goal(make: Make, optimizer: str) -> None:
    how = (
        f"server_optimizer={optimizer}",
        "dtype=float64",
        "engine=batched",
        f"lr={0.1 if optimizer == 'adam' else 0.5}",
    )
    greedy = [final_harm(make(*how, f"attack.goal={goal}")) for goal in ("untargeted", "targeted")]
    planned = make(*PLANNED, *how)
    assert final_harm(planned) > max(greedy) + 0.005
    # the harm that the plan promises is that of the training
    assert final_harm(planned) == pytest.approx(plans.plan(planned).harm[-1].max(), abs=1e-9)


def test_plans_made_together_are_those_made_alone(make: Make, tmp_path: Path) -> None:
    changes = (
        ["attack.budget=0.4"],
        ["attack.budget=0.2", "attack.objective=average"],
        ["clients.malicious=3", "lr=0.2"],
    )
    cells = [make(*PLANNED, *change) for change in changes]
    together = plan_maker.PlanMaker(cells, 1, [cell.start() for cell in cells])
    assert len({plans._group_key(cell) for cell in cells}) == 1
    found = plans.load_plans(cells)
    assert together.theta.shape[0] == 12
    for cell, one in zip(cells, found, strict=True):
        work = tmp_path / str(len(list(tmp_path.iterdir())))
        work.mkdir()
        maker = plan_maker.PlanMaker([cell], 1, [cell.start()])
        alone = maker.make(plans.Checkpoint(work, ""), lambda sweep: None)[0]
        np.testing.assert_array_equal(alone.samples, one.samples)
        np.testing.assert_allclose(alone.harm[-1], one.harm[-1], rtol=1e-9)


def test_a_process_that_only_noted_where_a_plan_begins_reads_it_from_the_file_of_another(make: Make) -> None:
    maker, reader = (make(*PLANNED, "attack.horizon=2") for _ in range(2))
    theta = maker.start().double()
    made = plans.plan(maker, 1, theta)
    plans.note_start(reader, 1, theta)
    plans.note_start(reader, 3, theta + 1)  # which nobody has made
    (found,) = plans.plans_made(reader)
    np.testing.assert_array_equal(found.samples, made.samples)


def test_the_average_is_of_all_evaluations_and_the_end_of_the_last_round(make: Make) -> None:
    cells = [make(*PLANNED, f"attack.objective={one}", "eval_every=3") for one in ("average", "final")]
    weights = plan_maker.PlanMaker(cells, 1, [cell.start() for cell in cells])._weights()
    third = 1 / 3  # after the rounds 3, 6 and 8, the last
    assert weights[:, 0].tolist() == [0, 0, 0, third, 0, 0, third, 0, third]
    assert weights[:, 1].tolist() == [0] * 8 + [1]


def test_imagined_minibatches_are_of_the_same_shards_but_not_those_that_come(make: Make) -> None:
    cell = make(*PLANNED, "attack.foresight=simulated")
    maker = plan_maker.PlanMaker([cell], 1, [cell.start()])
    for round_ in range(1, 5):
        assert len(maker.imagined.samples(round_)) == len(maker.coming.samples(round_)) == 20
        assert maker.imagined.samples(round_).tolist() != maker.coming.samples(round_).tolist()
    owners = [np.bincount(cell.partition.client[one.samples(1)]).tolist() for one in (maker.coming, maker.imagined)]
    assert owners[0] == owners[1]


@pytest.mark.parametrize("scope", ["pooled", "per_client"])
def test_who_takes_part_in_imagined_rounds_is_imagined_too(make: Make, scope: str) -> None:
    cell = make(*(*PLANNED, "attack.foresight=simulated", f"attack.scope={scope}", "clients.per_round=2", "rounds=40"))
    maker = plan_maker.PlanMaker([cell], 1, [cell.start()])
    malicious, differs = set(cell.partition.malicious.tolist()), 0
    for rounds, schedule in ((maker.coming, cell.schedule), (maker.imagined, maker.imagined.schedule)):
        for round_ in range(1, 41):
            there = sorted(malicious & set(schedule.participants(round_).tolist()))
            differs += there != sorted(malicious & set(cell.schedule.participants(round_).tolist()))
            access = rounds.access(round_)
            allowed = [int(0.4 * schedule.used[client]) for client in there]
            assert (access is None) == (not there)
            if access is not None:
                samples = rounds.samples(round_)[access.columns.numpy()]
                assert sorted({*cell.partition.client[samples].tolist()}) == there
                total = int(0.4 * sum(schedule.used[client] for client in there)) if scope == "pooled" else sum(allowed)
                assert (access.budgets.sum(1) == total).all() and total > 0
                if scope == "per_client":
                    assert access.budgets[0, there].tolist() == allowed
    assert differs > 10


@pytest.mark.parametrize("how", [(), ("attack.horizon=3",), ("attack.foresight=simulated",)])
def test_flower_clients_write_the_flips_of_the_batched_engine(make: Make, how: tuple[str, ...]) -> None:
    cell = make(*PLANNED, *how)
    outcome = sequential.run(cell)
    flips, hook = dict(outcome.flips), OmniscientHook(make(*PLANNED, *how))
    theta = epoch_theta = cell.start()
    for round_ in range(1, 9):
        if adversary.epoch_start(cell, round_) == round_:
            epoch_theta = theta
        asked = wire.Request(theta, True, round_, "", epoch_theta if adversary.keeps_theta(cell) else None, None)
        found = hook.flips(asked)
        np.testing.assert_array_equal(found.samples, flips.get(round_, scenario.NO_FLIPS).samples)
        gradient = scenario.mean_gradient(cell, theta, round_, found)
        theta = theta - cell.lr(round_) * gradient
    torch.testing.assert_close(theta, outcome.theta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_planned_cells_of_a_batch_are_those_run_alone(make: Make, classes: int, tmp_path: Path) -> None:
    part = ("attack.foresight=simulated", "attack.scope=per_client", "attack.every=2", "clients.per_round=3")
    cells = [
        make(*PLANNED, *how, "attack.args={sweeps: 2}", classes=classes)
        for how in ((), ("attack.objective=average", "attack.budget=1"), ("strategy=median", "weight_decay=0.1"))
    ]
    assert all(engine.is_linear(cell) for cell in cells)
    others = [make("engine=batched", "dtype=float64", classes=classes)]  # one of another kind between them
    together = engine.run_cells([cells[0], *others, *cells[1:]])
    del together[1]
    drawn = make(*PLANNED, *part, "attack.args={sweeps: 2}", classes=classes)
    for cell, outcome in zip([*cells, drawn], [*together, *engine.run_cells([drawn])], strict=True):
        alone = sequential.run(cell)
        torch.testing.assert_close(outcome.theta, alone.theta, rtol=0, atol=1e-9)
        np.testing.assert_allclose(outcome.table, alone.table, atol=1e-9)
        assert [round_ for round_, _ in outcome.flips] == [round_ for round_, _ in alone.flips] != []
        for (_, one), (_, other) in zip(outcome.flips, alone.flips, strict=True):
            assert all(map(np.array_equal, one[:3], other[:3]))


@pytest.mark.parametrize("classes", [2, 3])
def test_cells_of_a_batch_that_plan_now_and_then_are_those_run_alone(
    make: Make, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hows = (
        ("attack.horizon=3",),
        ("attack.horizon=3", "attack.budget=0.2", "attack.objective=average", "lr=0.2"),
        ("attack.horizon=2", "attack.start=3", "attack.every=2", "attack.stop=7"),
        ("attack.horizon=3", "attack.start=9"),  # after the last round: there is no plan
        ("attack.foresight=simulated",),
    )
    args = "attack.args={sweeps: 1, starts: 2}"
    cells, alone = ([make(*PLANNED, *how, args, classes=classes) for how in hows] for _ in range(2))
    others = [make("engine=batched", "dtype=float64", classes=classes)]
    assert all(engine.is_linear(cell) for cell in cells)
    outcomes = [sequential.run(cell) for cell in alone]
    shutil.rmtree(cache.folder() / "plans")  # so that the batch makes its own
    made: list[tuple[int, int]] = []
    make_and_keep = plans._make_and_keep
    monkeypatch.setattr(
        plans,
        "_make_and_keep",
        lambda some, first, *more: (made.append((first, len(some))), make_and_keep(some, first, *more)),
    )
    together = engine.run_cells([cells[0], *others, *cells[1:]])
    del together[1]
    for cell, other, outcome, single in zip(cells, alone, together, outcomes, strict=True):
        torch.testing.assert_close(outcome.theta, single.theta, rtol=0, atol=1e-9)
        np.testing.assert_allclose(outcome.table, single.table, atol=1e-9)
        assert [round_ for round_, _ in outcome.flips] == [round_ for round_, _ in single.flips]
        for (_, ours), (_, theirs) in zip(outcome.flips, single.flips, strict=True):
            assert all(map(np.array_equal, ours[:3], theirs[:3]))
        firsts = [[one.first for one in plans.plans_made(which)] for which in (cell, other)]
        assert firsts[0] == firsts[1]
    assert [[one.first for one in plans.plans_made(cell)] for cell in cells] == [
        [1, 4, 7],
        [1, 4, 7],
        [3, 5, 7],
        [],
        [1],
    ]
    assert sorted(made) == [(1, 1), (1, 2), (3, 1), (4, 2), (5, 1), (7, 1), (7, 2)]


@pytest.mark.parametrize("at", [2, 5, 6])
def test_a_batch_that_plans_now_and_then_goes_on_after_an_interruption(make: Make, at: int, tmp_path: Path) -> None:
    hows = [("attack.horizon=3",), ("attack.horizon=3", "lr=0.2"), ()]

    def run(watch: Callable[..., None], name: str) -> tuple[list[Scenario], list[engine.Outcome]]:
        cells = [make(*PLANNED, *how) for how in hows]
        kept = [Checkpoint(tmp_path / name / str(i), f"key {i}") for i in range(len(cells))]
        return cells, engine.run_cells(cells, checkpoints=kept, watch=watch)

    def stop(cells: list[int], so_far: Callable[[], list[engine.Outcome]]) -> None:
        if len(so_far()[0].table) == at + 1:  # there is a row for the start
            raise KeyboardInterrupt

    whole, outcomes = run(lambda cells, so_far: None, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stop, "cut")
    rest, found = run(lambda cells, so_far: None, "cut")
    for one, other in zip(found, outcomes, strict=True):
        assert torch.equal(one.theta, other.theta)
        np.testing.assert_array_equal(one.table, other.table)
    for one, other in zip(rest, whole, strict=True):
        pairs = list(zip(plans.plans_made(one), plans.plans_made(other), strict=True))
        assert [plan.first for plan, _ in pairs] == ([1, 4, 7] if one.settings.attack.horizon else [1])
        assert all(np.array_equal(plan.harm, its.harm) for plan, its in pairs)


def test_a_cell_that_has_diverged_makes_no_more_plans_and_disturbs_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "diverging", lambda cells: [])  # as where the attack alone is too much
    how = ("attack.horizon=3", "attack.args={sweeps: 2, starts: 1}")  # a start that needs no target
    cells = [make(*PLANNED, *how, *more, classes=3) for more in (("lr=1e308",), ())]
    broken, outcome = engine.run_cells(cells)
    assert broken.error is not None and "finite" in broken.error and outcome.error is None
    assert [[one.first for one in plans.plans_made(cell)] for cell in cells] == [[1], [1, 4, 7]]
    alone = sequential.run(make(*PLANNED, *how, classes=3))
    torch.testing.assert_close(outcome.theta, alone.theta, rtol=0, atol=1e-9)


def test_plans_beyond_the_last_round_of_a_run_are_not_listed(make: Make, tmp_path: Path) -> None:
    """As of a cell that stops early beside others, which go on."""
    cell = make(*PLANNED, "attack.horizon=3", "attack.args={sweeps: 1}")
    history = sequential.run(cell).history()
    for last, firsts in ((8, {"1", "4", "7"}), (6, {"1", "4"}), (0, {"1"})):
        history.rows = [row for row in history.rows if row["round"] <= last]
        results.write(tmp_path, cell, history)
        with (tmp_path / "plan.csv").open() as lines:
            assert {row["first_round"] for row in csv.DictReader(lines)} == firsts


def test_each_plan_imagines_minibatches_of_its_own(make: Make) -> None:
    schedule = make(*PLANNED).schedule
    orders = [plan_rounds.imagined(schedule, first).round_samples(5)[0].tolist() for first in (1, 4, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_a_direction_of_the_users_names_its_file_in_any_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def v(view):\n    return view.theta\n")
    monkeypatch.chdir(tmp_path)
    cell = make("engine=batched", "attack.direction=mine.py:v")
    assert cell.settings.attack.direction == f"{tmp_path.resolve()}/mine.py:v"
    assert make("engine=batched", "attack.direction=target_far").settings.attack.direction == "target_far"


def test_a_run_that_plans_now_and_then_knows_its_plans_after_an_interruption(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = make(*PLANNED, "attack.horizon=3"), make(*PLANNED, "attack.horizon=3")
    sequential.run(whole)
    kept = Checkpoint(tmp_path, "key", every=0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)  # after every round

    def stop(so_far: object) -> None:
        if len(plans.plans_made(short)) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sequential.run(short, checkpoint=kept, watch=stop)
    rest = make(*PLANNED, "attack.horizon=3")
    sequential.run(rest, checkpoint=Checkpoint(tmp_path, "key"))
    found = plans.plans_made(rest)
    assert [one.first for one in found] == [1, 4, 7]
    for one, other in zip(found, plans.plans_made(whole), strict=True):
        np.testing.assert_array_equal(one.harm, other.harm)


def test_a_plan_of_the_whole_run_is_better_than_one_of_short_sight(make: Make) -> None:
    whole, short = make(*PLANNED), make(*PLANNED, "attack.horizon=2")
    assert final_harm(whole) > final_harm(short)
    assert [one.first for one in plans.plans_made(short)] == [1, 3, 5, 7]


def test_networks_are_planned_too(small_data: Callable[..., list[str]]) -> None:
    data = [*small_data(3), *SMALL, "rounds=4", "model=mlp", "model.args={widths: [4]}"]
    cell = scenario.make(compose(*data, *PLANNED, "attack.args={sweeps: 3, starts: 2, sample: 50}"))
    one_plan = plans.plan(cell)
    assert (np.diff(one_plan.harm, axis=0) >= 0).all()
    assert one_plan.harm[-1].max() > one_plan.harm[0].max()
    assert engine.run_cells([cell])[0].flip_count == len(one_plan.samples) > 0


def test_a_run_leaves_its_plan_and_the_figure(
    small_data: Callable[..., list[str]], command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, said = command(*small_data(), *SMALL, *PLANNED, f"out={out}", "seed=11")
    assert code == 0 and "plan: sweep" in said
    with (out / "plan.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["start"] for row in rows} == set(plan_maker.STARTS)
    assert [int(row["sweep"]) for row in rows if row["start"] == "target"][-1] <= 6
    for start in plan_maker.STARTS:
        harm = [float(row["objective"]) for row in rows if row["start"] == start]
        assert all(later >= earlier for earlier, later in itertools.pairwise(harm))
    assert (out / "plan.png").stat().st_size > 1000
    assert not (out / "baseline" / "plan.csv").exists()


def test_those_who_wait_for_a_plan_do_not_mind_that_its_folder_is_removed(tmp_path: Path) -> None:
    work, entered = tmp_path / "one.unfinished", []

    def wait() -> None:
        with plans._held(work):
            entered.append(work.is_dir())

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    with plans._held(work):
        for one in waiting:
            one.start()
        time.sleep(0.2)
        assert not entered
        shutil.rmtree(work)
        time.sleep(0.2)
    for one in waiting:
        one.join(10)
    assert entered == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("how", [("engine=batched",), ("engine=flower",)], ids=" ".join)
def test_a_planned_run_that_is_killed_twice_goes_on_and_ends_in_the_same_bytes(
    small_data: Callable[..., list[str]],
    command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: tuple[str, ...],
) -> None:
    chosen = [
        "attack=planned",
        "rounds=120",
        "batch_size=40",
        "clients.total=4",
        "clients.malicious=2",
        "baseline=false",
    ]
    run = [*small_data(3), *chosen, "attack.budget=0.4", *how]
    begin = (  # whatever can be kept is kept at once
        "import sys; from fl_attack import checkpoint, __main__; checkpoint.Checkpoint.__init__.__defaults__ = (0.0,); "
        "checkpoint.SHARE = 0; sys.argv[0] = 'fl-attack'; __main__.main()"
    )

    def killed_when(there: Callable[[], object]) -> None:
        process = subprocess.Popen([sys.executable, "-c", begin, *run, f"out={out}"], stderr=subprocess.DEVNULL)
        while not there() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
        process.wait()

    def rounds_done() -> int:
        try:
            with np.load(out / checkpoint.FILE) as kept:
                state = json.loads(kept["tree"].tobytes())["state"]["dict"]
        except FileNotFoundError:
            return 0
        chunk = state.get("chunk") or state["recorder"]
        return int(chunk["dict"]["round"])

    out, cache = tmp_path / "killed", tmp_path / "cache"
    monkeypatch.setenv("FL_ATTACK_CACHE", str(cache))
    killed_when(lambda: list(cache.glob(f"plans/*.unfinished/{checkpoint.FILE}")))
    assert not list(cache.glob("plans/*.npz")) and not rounds_done()
    killed_when(lambda: rounds_done() > 25)
    assert 25 < rounds_done() < 120 and not (out / "summary.json").exists()
    assert command(*run, f"out={out}", "resume=true")[0] == 0
    monkeypatch.setenv("FL_ATTACK_CACHE", str(tmp_path / "another"))
    assert command(*run, f"out={tmp_path}/whole")[0] == 0
    for name in ("rounds.csv", "model.npz", "flips.npz", "partition.npz", "plan.csv", "clients.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (("local_steps=2",), "use local_steps=1"),
        (("worker_momentum=0.9",), "use worker_momentum=0"),
        (("attack.horizon=3", "server_optimizer=adam"), "attack.horizon=null"),
        (("attack.refresh=epoch",), "use horizon"),
        (("attack.memory=persist",), "use memory=forget"),
        (("attack.goal=targeted",), "has no meaning with name=planned"),
        (("attack.direction=mean_feature",), "has no meaning with name=planned"),
        (("attack.args={sweeps: 0}",), "must be 1 or more"),
        (("attack.args={temperature: 0}",), "must be more than 0"),
        (("attack.args={steps: 3}",), "it takes sweeps, starts, tolerance, sample, temperature"),
        (("attack.objective=worst",), "'final' or 'average'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    small_data: Callable[..., list[str]], command: Callable[..., tuple[int, str, str]], how: tuple[str, ...], says: str
) -> None:
    code, _, said = command(*small_data(), *SMALL, "attack=planned", "engine=batched", *how)
    assert code == 2 and says in said and len(said.strip().splitlines()) == 1


# --- directions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("classes", [2, 3])
def test_flips_lower_the_inner_product_with_their_direction(make: Make, name: str, classes: int) -> None:
    cell = make(f"attack.direction={name}", "engine=batched", "dtype=float64", "attack.budget=1", classes=classes)
    theta = 0.1 * torch.randn(cell.theta_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = knowledge.direction(cell, theta, 1)
    assert v.shape == theta.shape and v.isfinite().all() and v.any()
    flips = adversary.flips(cell, theta, 1)
    clean, written = (scenario.mean_gradient(cell, theta, 1, one) for one in (scenario.NO_FLIPS, flips))
    assert len(flips.samples)
    assert (written * v).sum() < (clean * v).sum()
    # no flip is missing, and none is one too many
    for sample, label in itertools.product(range(20), range(classes)):
        one = scenario.Flips(np.array([sample]), np.array([label]), 1)
        if cell.partition.client[sample] in cell.partition.malicious and sample not in flips.samples:
            assert (scenario.mean_gradient(cell, theta, 1, one) * v).sum() >= (clean * v).sum() - 1e-12


def test_directions_raise_what_they_are_named_for(make: Make) -> None:
    step = 1e-5

    def slope(name: str, of: Callable[[Scenario, torch.Tensor], float]) -> tuple[float, float]:
        cell = make(f"attack.direction={name}", "engine=batched", "dtype=float64", classes=3)
        theta = 0.1 * torch.randn(cell.theta_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        v = knowledge.direction(cell, theta, 1)
        return (of(cell, theta + step * v) - of(cell, theta - step * v)) / (2 * step), (v**2).sum().item()

    def loss(cell: Scenario, theta: torch.Tensor) -> float:
        return cell.model.mean_loss(theta, *plan_maker.sample_of(cell, 1000))

    def error(cell: Scenario, theta: torch.Tensor) -> float:
        X, y = plan_maker.sample_of(cell, 1000)
        return attack.smoothed_error(cell.model.logits(theta, X), y, attack.directions.TEMPERATURE).item()

    for name, of in {"validation_loss": loss, "smoothed_error": error}.items():
        found, expected = slope(name, of)
        assert found == pytest.approx(expected, rel=1e-5), name  # its slope along itself: it is the gradient
    cell = make("attack.direction=mean_feature", "engine=batched", classes=3)
    X, _ = plan_maker.sample_of(cell, 1000)
    for name, row in {"mean_feature": 2, "-mean_feature": 0}.items():
        v = knowledge.direction(make(f"attack.direction={name}", classes=3), cell.start(), 1)
        torch.testing.assert_close(v[row], X.mean(0))
        assert not v[[i for i in range(3) if i != row]].any()
    plus, minus = (knowledge.direction(make(f"attack.direction={n}mean_feature"), make().start(), 1) for n in ("", "-"))
    torch.testing.assert_close(plus, -minus)


def test_far_targets_are_the_targets(make: Make) -> None:
    cell, near = make("attack.direction=target_far"), make("attack.goal=targeted")
    theta = torch.ones(cell.theta_shape, dtype=torch.float64)
    far, way = knowledge.direction(cell, theta, 1), knowledge.direction(near, theta, 1)
    torch.testing.assert_close(far - theta, way)


def test_goals_are_directions_by_another_name(make: Make) -> None:
    for direction, goal in {"gradient": "untargeted", "target": "targeted"}.items():
        named, old = make(f"attack.direction={direction}"), make(f"attack.goal={goal}")
        assert named.settings.attack == old.settings.attack


@pytest.mark.parametrize("name", ["smoothed_error", "-mean_feature"])
def test_directions_work_on_networks(small_data: Callable[..., list[str]], name: str) -> None:
    data = [*small_data(3), *SMALL, "rounds=3", "model=mlp", "model.args={widths: [4]}", "engine=batched"]
    cell = scenario.make(compose(*data, f"attack.direction={name}"))
    assert engine.run_cells([cell])[0].flip_count > 0


def test_a_users_direction_is_called_and_checked(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def far(view):\n    v = view.target\n    view.theta.fill_(3)\n    return v\n"
        "def short(view):\n    return view.theta[:, :2]\n"
        "def endless(view):\n    return view.gradient / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    own, built_in = (make(f"attack.direction={name}", "engine=batched") for name in ("mine.py:far", "target_far"))
    one, other = (engine.run_cells([cell], full_rows=False)[0] for cell in (own, built_in))
    assert one.theta is not None and other.theta is not None and torch.equal(one.theta, other.theta)
    for name, says in {"short": "gave shape", "endless": "not finite"}.items():
        with pytest.raises(RunError, match=says):
            knowledge.direction(make(f"attack.direction=mine.py:{name}"), make().start(), 1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (("attack.direction=sideways",), "known: gradient, target, target_far"),
        (("attack.direction=nowhere.py:f",), "can't be imported"),
        (("attack.direction=mean_feature", "attack.goal=targeted"), "goal=targeted has no meaning"),
        (("attack.direction=mean_feature", "attack.knowledge=own"), "knowledge=own has no meaning"),
        (("attack=random_flip", "attack.direction=mean_feature"), "has no meaning with name=random_flip"),
        (("attack.horizon=5",), "horizon=5 has no meaning with name=greedy"),
    ],
)
def test_directions_without_meaning_are_refused(
    settings: Callable[..., Settings], how: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        settings(*how)


# --- experiment=planning ------------------------------------------------------------------------------


def test_gaps_are_those_to_the_better_goal_seed_by_seed(tmp_path: Path) -> None:
    from fl_attack.plots import planning
    from fl_attack.sweep_table import RESULTS, write_csv

    final = {  # two seeds
        ("greedy", "untargeted", "final", "known"): (0.70, 0.72),
        ("greedy", "targeted", "final", "known"): (0.65, 0.61),
        ("planned", "untargeted", "final", "known"): (0.45, 0.40),
        ("planned", "untargeted", "average", "known"): (0.66, 0.58),
    }
    settings = ("attack.name", "attack.goal", "attack.objective", "attack.foresight")
    rows, curves = [], []
    for cell, (who, seed) in enumerate(itertools.product(final, (0, 1))):
        accuracy = final[who][seed]
        row = dict(zip(settings, who, strict=True)) | {"writes": "labels", "write_access": 1, "budget": 0.25}
        row |= {
            "seed": seed,
            "final_accuracy": accuracy,
            "early_stop_accuracy": accuracy + 0.1,
            "flips": 1,
            "rounds": 2,
        }
        row |= {"global_budget": 0.25, "minimum_accuracy": accuracy, "final_f1": 0.5, "final_loss": 1.0}
        rows.append([cell, *(row.get(name, "") for name in (*settings, *RESULTS))])
        curves.append([0.1, accuracy + 0.2, accuracy])
    write_csv(tmp_path / "sweep.csv", ["cell", *settings, *RESULTS], rows)
    np.savez(tmp_path / "curves.npz", accuracy=np.array(curves), round=np.arange(3))
    files = planning(tmp_path)
    assert {file.name for file in files} == {"planning.png", "planning.pdf", "planning.csv", "planning_gaps.csv"}
    with (tmp_path / "planning_gaps.csv").open() as lines:
        found = {(row["measure"], row["plan"]): row for row in csv.DictReader(lines)}
    sure, unsure = (found["final accuracy", f"planned {objective}, known"] for objective in ("final", "average"))
    assert sure["better_goal"] == "targeted"
    assert float(sure["gap"]) == pytest.approx((20 + 21) / 2)
    assert float(sure["interval"]) == pytest.approx(12.706 * 0.5, rel=1e-3)  # Student's t of one degree, deviation 0.5
    assert float(unsure["gap"]) == pytest.approx((-1 + 3) / 2)
    assert (sure["includes_zero"], unsure["includes_zero"]) == ("no", "yes")
    assert {measure for measure, _ in found} == {
        *("final accuracy", "average over the evaluations", "model of early stopping")
    }
    with (tmp_path / "planning.csv").open() as lines:
        means = {(row["measure"], row["attacker"]): float(row["mean"]) for row in csv.DictReader(lines)}
    assert means["average over the evaluations", "greedy targeted"] == pytest.approx(63 + 10)
    assert means["model of early stopping", "greedy targeted"] == pytest.approx(73)


# --- what a plan depends on, and how it is made ---------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """As `make`, but each scenario is made once for all tests that ask for it: to compose settings takes long."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("shared")
    for classes in (2, 3):
        x, y = rng.normal(size=(180, 6)).astype(np.float32), np.arange(180) % classes
        np.savez(folder / f"{classes}.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])

    @functools.cache
    def scenario_of(*overrides: str, classes: int = 2) -> Scenario:
        data = ("out=unused", "dataset=npz", f"dataset.path={folder / f'{classes}.npz'}")
        return scenario.make(compose(*data, *SMALL, *overrides))

    return scenario_of


def test_a_plan_begins_anew_every_horizon_from_the_first_attacked_round_on(shared: Make) -> None:
    def begins(*how: str) -> list[int]:
        cell = shared(*PLANNED, *how)
        return [plans.first_round(cell, round_) for round_ in range(1, 9)]

    assert begins() == begins("attack.start=3") == [1] * 8
    assert begins("attack.horizon=3") == [1, 1, 1, 4, 4, 4, 7, 7]
    assert begins("attack.horizon=2", "attack.start=3") == [1, 1, 3, 3, 5, 5, 7, 7]
    assert begins("attack.horizon=3", "attack.start=2") == [1, 2, 2, 2, 5, 5, 5, 8]
    assert [adversary.epoch_start(shared(*PLANNED, "attack.horizon=3"), round_) for round_ in (1, 4, 8)] == [1, 4, 7]
    kinds = ((), ("attack.horizon=3",), ("clients.malicious=0",))
    assert [plans.plans_whole_run(shared(*PLANNED, *how)) for how in kinds] == [True, False, False]
    assert not plans.plans_whole_run(shared("engine=batched"))


def test_the_time_that_plans_take_grows_with_cells_sweeps_starts_rounds_samples_and_parameters(shared: Make) -> None:
    cell = shared(*PLANNED)  # 6 sweeps of 4 starts, 8 rounds, 20 samples, 7 parameters
    seconds = plans.planning_seconds([cell])
    assert seconds == pytest.approx(6 * 8 * (4e-4 + 5 * 4 * 20 * 7 / 5e9), rel=1e-12)
    assert plans.planning_seconds([shared("engine=batched"), shared(*PLANNED, "clients.malicious=0")]) == 0
    assert plans.planning_seconds([shared("engine=batched"), cell]) == seconds
    one = 6 * 8 * 5 * 4 * 20 * 7 / 5e9  # what the multiplications of a cell take
    assert plans.planning_seconds([cell] * 1001) - seconds == pytest.approx(1000 * one, rel=1e-9)
    three = plans.planning_seconds([shared(*PLANNED, classes=3)])
    assert three - seconds == pytest.approx(2 * one, rel=1e-6)


def test_plans_are_made_in_as_many_pieces_as_memory_needs_and_of_networks_alone(
    shared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, members = [shared(*PLANNED)] * 5, [10, 11, 12, 13, 14]
    assert plans._pieces(cells, members, 1) == [members]
    # a state of 7 numbers in float64, twice the root of 8 rounds of them, and 3 bytes a sample; half the memory
    each = 4 * (2 * 8**0.5 * 7 * 8 + 3 * 8 * 20)

    def pieces(share: float, *how: str, first: int = 1) -> list[list[int]]:
        return plans._pieces([shared(*PLANNED, f"engine.memory_gb={share / 2**29}", *how)] * 5, members, first)

    assert pieces(2.001 * each) == [[10, 11], [12, 13], [14]]
    assert pieces(1.999 * each) == pieces(each / 100) == [[one] for one in members]
    adam = 4 * (2 * 8**0.5 * 3 * 7 * 8 + 3 * 8 * 20)
    assert pieces(2.001 * adam, "server_optimizer=adam") == [[10, 11], [12, 13], [14]]
    assert pieces(1.999 * adam, "server_optimizer=adam") == [[one] for one in members]
    momentum = 4 * (2 * 8**0.5 * 2 * 7 * 8 + 3 * 8 * 20)
    assert len(pieces(2.001 * momentum, "server_optimizer=momentum")) == 3
    assert len(pieces(1.999 * momentum, "server_optimizer=momentum")) == 5
    later = 4 * (2 * 3**0.5 * 7 * 8 + 3 * 3 * 20)  # rounds 6, 7 and 8
    assert len(pieces(2.001 * later, first=6)) == 3 and len(pieces(1.999 * later, first=6)) == 5
    monkeypatch.setattr(type(cells[0].model), "linear", False)
    assert plans._pieces(cells[:2], [3, 7], 1) == [[3], [7]]


@pytest.mark.parametrize(
    ("change", "together", "same_file"),
    [
        ("attack.budget=0.2", True, False),
        ("clients.malicious=3", True, False),
        ("lr=0.2", True, False),
        ("weight_decay=0.1", False, False),
        ("attack.scope=per_client", False, False),
        ("attack.horizon=3", False, False),
        ("attack.args={sweeps: 5}", False, False),
        ("clients.per_round=3", False, False),
        ("rounds=7", False, False),
        ("strategy=median", True, True),
        ("overwrite=true", True, True),
    ],
)
def test_plans_share_a_making_and_a_file_where_they_can(
    shared: Make, change: str, together: bool, same_file: bool
) -> None:
    one, other = shared(*PLANNED), shared(*PLANNED, change)
    assert (plans._group_key(one) == plans._group_key(other)) == together
    theta = one.start()
    assert (plans._file(one, 1, theta) == plans._file(other, 1, theta)) == same_file
    assert plans._file(one, 1, theta) != plans._file(one, 2, theta) != plans._file(one, 2, theta + 1)
    assert plans._file(one, 1, theta).parent.name == "plans" and len(plans._file(one, 1, theta).stem) == 24


def test_a_plan_is_looked_up_once_and_again_from_other_parameters(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, object]] = []
    none = np.empty(0, np.int64)

    def load(cells: list[Scenario], first: int, thetas: list[torch.Tensor] | None) -> list[plan_maker.Plan]:
        asked.append((first, thetas and thetas[0].sum().item()))
        return [plan_maker.Plan(first, none, none, none, none, np.zeros((len(asked), 1)), np.zeros((1, 1)))]

    monkeypatch.setattr(plans, "load_plans", load)
    cell = make(*PLANNED)
    theta = torch.ones(cell.theta_shape, dtype=torch.float64)
    assert plans.plan(cell) is plans.plan(cell)
    assert plans.plan(cell, 4, theta) is plans.plan(cell, 4, theta.clone())
    assert asked == [(1, None), (4, 7.0)]
    assert plans.plan(cell, 4, theta * 2) is not plans.plan(cell)
    assert asked[2:] == [(4, 14.0)]
    assert [one.first for one in plans.plans_made(cell)] == [1, 4]
    again = make(*PLANNED)
    plans.restore_sweeps(again, plans.sweeps_of(cell))
    assert [(one.first, len(one.harm), len(one.samples)) for one in plans.plans_made(again)] == [(1, 1, 0), (4, 3, 0)]


def test_a_damaged_plan_is_made_again_and_one_for_two_cells_alike_but_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    whole = plan_maker.PlanMaker.make
    monkeypatch.setattr(
        plan_maker.PlanMaker, "make", lambda self, *how: made.append(len(self.cells)) or whole(self, *how)
    )
    cells = [
        make(*PLANNED, "seed=5", "attack.args={sweeps: 1}", one) for one in ("lr=0.5", "strategy=median", "lr=0.3")
    ]
    first = plans.load_plans(cells)
    assert made == [2]
    np.testing.assert_array_equal(first[0].samples, first[1].samples)
    file = plans._file(cells[2], 1, cells[2].start())
    file.write_bytes(file.read_bytes()[:50])
    told: list[int] = []
    again = plans.load_plans(cells, on_sweep=told.append)
    assert made == [2, 1] and told == [1, 1]  # after the only sweep, and at the end
    np.testing.assert_array_equal(again[2].samples, first[2].samples)
    assert not list(file.parent.glob("*.unfinished"))


def test_flips_of_a_round_are_those_of_the_plan_within_its_budget() -> None:
    rounds, samples, labels = np.array([2, 2, 4]), np.array([5, 9, 1]), np.array([1, 0, 1])
    one = plan_maker.Plan(2, rounds, samples, labels, np.array([3, 0, 2, 1]), np.zeros((1, 1)), np.zeros((1, 1)))
    found = {round_: one.flips(round_) for round_ in (2, 3, 4, 5)}
    assert [found[round_].samples.tolist() for round_ in found] == [[5, 9], [], [1], []]
    assert [found[round_].labels.tolist() for round_ in found] == [[1, 0], [], [1], []]
    assert [found[round_].allowed for round_ in found] == [3, 0, 2, 1]


def test_starts_beyond_the_named_ones_are_at_random_the_same_in_all_rounds(shared: Make) -> None:
    cells = [shared(*PLANNED, "attack.args={sweeps: 1, starts: 6}", lr) for lr in ("lr=0.5", "lr=0.1")]
    maker = plan_maker.PlanMaker(cells, 1, [cell.start() for cell in cells])
    theta = maker.theta + torch.randn(
        maker.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    batch = maker.coming.batch(1)
    v = maker._start(theta, batch).view(2, 6, *cells[0].theta_shape)
    again = maker._start(theta + 1, maker.coming.batch(2)).view_as(v)
    assert torch.equal(v[:, 4:], again[:, 4:]) and torch.equal(v[0, 4:], v[1, 4:])
    assert not torch.allclose(v[0, 4], v[0, 5]) and v.isfinite().all()
    assert not torch.allclose(v[:, 0], again[:, 0]) and not torch.allclose(v[0, 0], v[1, 0])
    torch.testing.assert_close(again[:, 1], v[:, 1] - 1)  # the way to the target
    torch.testing.assert_close(v[:, 2], -v[:, 3])
    torch.testing.assert_close(v[0, 2, 0], maker.sample.X.mean(0))
    at, (X, y) = theta.view_as(v), maker.coming.batch(1)
    for i, cell in enumerate(cells):
        torch.testing.assert_close(v[i, 0], cell.model.gradient(at[i, 0], X, y))
        torch.testing.assert_close(v[i, 1], maker._targets[i] - at[i, 1])
    other = plan_maker.PlanMaker(cells, 4, [cell.start() for cell in cells])
    assert not torch.allclose(other._at_random(4), maker._at_random(4))


def test_random_numbers_of_a_sweep_are_each_starts_own_and_the_same_for_every_cell(shared: Make) -> None:
    cells = [shared(*PLANNED, lr) for lr in ("lr=0.5", "lr=0.1")]
    maker = plan_maker.PlanMaker(cells, 1, [cell.start() for cell in cells])
    one, other = maker._uniform(1), maker._uniform(2)
    assert one.shape == (8, 8 + 3) and ((one >= 0) & (one < 1)).all()
    assert torch.equal(one[:4], one[4:]) and len({row[0].item() for row in one[:4]}) == 4
    assert not torch.equal(one, other) and torch.equal(one, maker._uniform(1))


def test_minibatches_of_a_plan_are_those_that_come_whether_kept_or_fetched(shared: Make) -> None:
    for memory in ("engine.memory_gb=1", "engine.memory_gb=1e-9"):
        cell = shared(*PLANNED, memory)
        maker = plan_maker.PlanMaker([cell], 1, [cell.start()])
        assert (maker.coming._features._resident is None) == (memory == "engine.memory_gb=1e-9")
        for round_ in (3, 4, 3):
            samples = cell.schedule.round_samples(round_)[0]
            batch = maker.coming.batch(round_)
            torch.testing.assert_close(batch.X, cell.features(samples).double(), rtol=0, atol=0)
            assert batch.y.tolist() == cell.dataset.y_train[samples].tolist()
            assert maker.coming.batch(round_) is batch
    full = shared(*PLANNED, "batch_size=full")
    maker = plan_maker.PlanMaker([full], 1, [full.start()])
    assert maker.coming.batch(1) is maker.coming.batch(2)
    assert maker.coming.access(1) is maker.coming.access(2)


def test_what_a_plan_can_write_is_what_its_malicious_clients_use(shared: Make) -> None:
    how = ("attack.scope=per_client", "attack.every=3")
    cells = [shared(*PLANNED, *how, one) for one in ("clients.malicious=1", "clients.malicious=3")]
    maker = plan_maker.PlanMaker(cells, 1, [cell.start() for cell in cells])
    assert maker.coming.access(2) is None  # is not attacked
    access = maker.coming.access(1)
    assert access is not None and access.mask is not None
    samples = cells[0].schedule.round_samples(1)[0]
    holder = cells[0].partition.client[samples[access.columns.numpy()]]
    assert access.group.tolist() == holder.tolist()
    assert set(holder.tolist()) == set(cells[1].partition.malicious.tolist())
    for plan, cell in enumerate([cells[0]] * 4 + [cells[1]] * 4):
        assert access.mask[plan].tolist() == np.isin(holder, cell.partition.malicious).tolist()
        budget = np.where(np.isin(np.arange(4), cell.partition.malicious), np.floor(0.4 * cell.schedule.used), 0)
        assert access.budgets[plan].tolist() == budget.tolist()
    pooled = plan_maker.PlanMaker([shared(*PLANNED)], 1, [cells[0].start()]).coming.access(1)
    assert pooled is not None and pooled.mask is None and not pooled.group.any()
    assert pooled.budgets.tolist() == [[4]] * 4
    assert maker.problem(maker.coming).memory == maker.memory / 2 == 2**30 * cells[0].settings.engine.memory_gb / 2


def test_the_sample_of_harm_is_drawn_once_of_what_clients_hold(shared: Make) -> None:
    cell = shared(*PLANNED)
    X, y = plan_maker.sample_of(cell, 30)
    assert X.shape == (30, 7) and X.dtype == torch.float64 and y.shape == (30,)
    assert plan_maker.sample_of(cell, 30)[0] is X and plan_maker.sample_of(cell, 5)[0].shape == (5, 7)
    assert torch.equal(plan_maker.sample_of(shared(*PLANNED), 30)[0], X)
    assert not torch.equal(plan_maker.sample_of(shared(*PLANNED, "seed=1"), 30)[0], X)
    whole, _ = plan_maker.sample_of(cell, 1000)
    torch.testing.assert_close(whole, cell.features(np.arange(120)).double(), rtol=0, atol=0)


def test_one_thread_works_while_products_are_small(shared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = shared(*PLANNED)
    maker = plan_maker.PlanMaker([cell], 1, [cell.start()])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for worth, threads in ((4 * 7 * 20, 1), (4 * 7 * 20 - 1, 2)):
            monkeypatch.setattr(plan_maker, "WORTH_THREADS", worth)
            with maker.threads():
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_of_features_are_kept_of_the_samples_that_clients_hold(shared: Make) -> None:
    cell = shared(*PLANNED)
    client = cell.partition.client.copy()
    client[[0, 1, 5]] = -1
    some = dataclasses.replace(cell, partition=dataclasses.replace(cell.partition, client=client))
    maker = plan_maker.PlanMaker([some], 1, [cell.start()])
    assert (
        maker.coming._features._row[:8].tolist() == [-1, -1, 0, 1, 2, -1, 3, 4]
        and maker.coming._features._row[-1] == 116
    )
    resident = maker.coming._features._resident
    assert resident is not None
    torch.testing.assert_close(resident, cell.features(np.flatnonzero(client >= 0)).double(), rtol=0, atol=0)


def test_directions_that_do_not_look_at_theta_are_worked_out_once(
    shared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = shared(*PLANNED)
    maker = plan_maker.PlanMaker([cell] * 2, 1, [cell.start()] * 2)
    theta = torch.arange(14.0).view(2, *cell.theta_shape)
    asked: list[str] = []
    monkeypatch.setattr(maker, "_direction", lambda one, name: asked.append(name) or one * 2)
    monkeypatch.setattr(type(cell.model), "linear", False)
    assert torch.equal(maker._mean_feature(theta, "mean_feature"), theta * 2)
    monkeypatch.setattr(type(cell.model), "linear", True)
    asked.clear()
    for at in (theta, theta + 1):
        assert torch.equal(maker._mean_feature(at, "mean_feature"), theta[:1].expand_as(theta) * 2)
    maker._mean_feature(theta, "-mean_feature")
    assert asked == ["mean_feature", "-mean_feature"]
