"""attack=planned and attack.direction in experiments: budgets, both engines, files, and the settings refused."""

import csv
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

from fl_attack import adversary, attack, checkpoint, engine, knowledge, plan_maker, plans, scenario
from fl_attack.attack import DIRECTIONS
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings, compose
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


def test_plans_made_together_are_those_made_alone(make: Make) -> None:
    changes = (
        ["attack.budget=0.4"],
        ["attack.budget=0.2", "attack.objective=average"],
        ["clients.malicious=3", "lr=0.2"],
    )
    cells = [make(*PLANNED, *change) for change in changes]
    together = plan_maker.Maker(cells, 1, [cell.start() for cell in cells])
    assert len({plans._group_key(cell) for cell in cells}) == 1
    found = plans.load_plans(cells)
    assert together.theta.shape[0] == 12
    for cell, one in zip(cells, found, strict=True):
        alone = plan_maker.Maker([cell], 1, [cell.start()]).make(
            plans.Checkpoint(Path("nowhere"), ""), lambda sweep: None
        )[0]
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
    weights = plan_maker.Maker(cells, 1, [cell.start() for cell in cells])._weights()
    third = 1 / 3  # after the rounds 3, 6 and 8, the last
    assert weights[:, 0].tolist() == [0, 0, 0, third, 0, 0, third, 0, third]
    assert weights[:, 1].tolist() == [0] * 8 + [1]


def test_imagined_minibatches_are_of_the_same_shards_but_not_those_that_come(make: Make) -> None:
    cell = make(*PLANNED, "attack.foresight=simulated")
    maker = plan_maker.Maker([cell], 1, [cell.start()])
    for round_ in range(1, 5):
        assert len(maker._samples(round_, True)) == len(maker._samples(round_, False)) == 20
        assert maker._samples(round_, True).tolist() != maker._samples(round_, False).tolist()
    owners = [np.bincount(cell.partition.client[maker._samples(1, one)]).tolist() for one in (False, True)]
    assert owners[0] == owners[1]


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
