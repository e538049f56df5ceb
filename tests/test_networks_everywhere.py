"""Networks in both engines: one trajectory, whichever way it is computed; and what a run of a network leaves."""

import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import elsewhere, is_there
from torch import nn

from fl_attack import adversary, engine, federation, identity, protocol, scenario, targets
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings
from fl_attack.engine import sequential, stacked
from fl_attack.errors import InputError
from fl_attack.federation.grid import BlockGrid
from fl_attack.federation.session import ray_session
from fl_attack.federation.strategy import start
from fl_attack.history import History, Recorder
from fl_attack.scenario import Scenario, mean_gradient

Compose = Callable[..., Settings]
Command = Callable[..., tuple[int, str, str]]

SMALL = ("dtype=float64", "batch_size=40", "baseline=false", "lr=0.2")
MLP = ("model=mlp", "model.args.widths=[12,9]")


@pytest.fixture(scope="module")
def grid() -> Iterator[BlockGrid]:
    """One Ray and one grid of ten clients for the module."""
    with ray_session(None, False), BlockGrid(federation.client_app, 10, 2, 0.1) as grid:
        yield grid


def assert_same(one: History, other: History, rtol: float = 1e-9) -> None:
    """The same flips in the same rounds, and the same parameters."""
    assert [round_ for round_, _ in one.flips] == [round_ for round_, _ in other.flips]
    for (_, first), (_, second) in zip(one.flips, other.flips, strict=True):
        assert np.array_equal(first.samples, second.samples) and np.array_equal(first.labels, second.labels)
        assert first.allowed == second.allowed
    first, second = one.theta.double(), other.theta.double()
    assert (first - second).norm() <= rtol * first.norm()


VARIED = {
    "untargeted": [],
    "targeted": ["attack.goal=targeted"],
    "the paper's text": ["attack.selection=literal"],
    "each its own budget": ["attack.scope=per_client", "lr=0.1"],
    "carried budgets": ["attack.rounding=carry", "attack.budget=0.03"],
    "own knowledge": ["attack.knowledge=own"],
    "noisy knowledge": ["attack.knowledge=noisy"],
    "some rounds": ["attack.every=2", "attack.start=2", "attack.stop=5"],
    "static": ["attack.name=static_flip"],
    "random": ["attack.name=random_flip", "clients.honest=5", "clients.malicious=5"],
    "confident": ["attack.name=confidence_flip"],
    "decay, schedule and momentum": ["weight_decay=0.01", "lr_schedule=cosine", "server_optimizer=momentum"],
    "adam": ["server_optimizer=adam", "lr=0.01", "attack.goal=targeted"],
    "nobody": ["attack.budget=0"],
}


@pytest.mark.parametrize(
    "shared",
    [
        [],
        ["dataset=digits_01", "clients.per_round=6", "partition=dirichlet"],
        ["model.loss=focal", "early_stop.patience=1", "eval_every=1", "dataset.standardize=true"],
    ],
)
def test_a_stack_of_cells_is_each_of_them_client_by_client(settings: Compose, shared: list[str]) -> None:
    chosen = [settings(*SMALL, *MLP, "engine=batched", "rounds=6", *shared, *more) for more in VARIED.values()]
    cells = engine.make_scenarios(chosen)
    assert all(map(stacked.can_run, cells))
    for cell, outcome in zip(cells, engine.run_cells(cells, full_rows=False), strict=True):
        alone = sequential.run(cell, client_by_client=True)
        assert_same(alone.history(), outcome.history())
        assert outcome.flip_count == alone.flip_count == sum(len(flips.samples) for _, flips in alone.flips)
        np.testing.assert_allclose(outcome.table[:, :7], alone.table[:, :7], rtol=1e-9, atol=1e-12)


def test_a_stack_that_does_not_fit_in_memory_is_gone_through_in_parts(settings: Compose) -> None:
    chosen = [settings(*SMALL, *MLP, "engine=batched", "rounds=4", *more) for more in list(VARIED.values())[:4]]
    cells = engine.make_scenarios(chosen)
    whole = engine.run_cells(cells, full_rows=False)
    parts = engine.run_cells(cells, full_rows=False, memory_gb=1e-4)
    for one, other in zip(whole, parts, strict=True):
        assert_same(one.history(), other.history())


def test_a_cell_of_a_stack_that_diverges_ends_alone(settings: Compose) -> None:
    chosen = [settings(*SMALL, *MLP, "engine=batched", "rounds=5", f"lr={lr}") for lr in ("1e300", "0.1")]
    cells = engine.make_scenarios(chosen)
    diverged, fine = engine.run_cells(cells, full_rows=False)
    assert diverged.error is not None and "not finite after round" in diverged.error
    assert fine.error is None
    assert_same(fine.history(), sequential.run(cells[1], client_by_client=True).history())


def test_a_run_that_diverges_counts_every_round_once(settings: Compose) -> None:
    cell = scenario.make(settings(*SMALL, *MLP, "rounds=7", "eval_every=3", "lr=1e60", "server_optimizer=momentum"))
    reported: list[int] = []
    assert sequential.run(cell, progress=reported.append).error is not None
    assert sum(reported) == 7


ALONE = {
    "cnn": ["model=cnn"],
    "cnn, targeted": ["model=cnn", "attack.goal=targeted"],
    "flips of an epoch": [*MLP, "attack.refresh=epoch"],
}


@pytest.mark.parametrize("case", ALONE)
def test_the_gradient_of_the_union_is_the_mean_of_the_clients(settings: Compose, case: str) -> None:
    chosen = settings(*SMALL, "engine=batched", "rounds=5", "eval_every=5", *ALONE[case])
    cell = scenario.make(chosen)
    (together,) = engine.run_cells([cell], full_rows=False)
    assert_same(together.history(), sequential.run(cell, client_by_client=True).history())


@pytest.mark.parametrize("flipped", [0.1, 0.9])
def test_few_flips_are_added_to_the_clean_gradient(settings: Compose, flipped: float) -> None:
    cell = scenario.make(settings(*SMALL, *MLP, "clients.honest=0", "clients.malicious=10", f"attack.budget={flipped}"))
    theta = cell.start()
    clean = mean_gradient(cell, theta, 1)
    flips = adversary.flips(cell, theta, 1)
    assert len(flips.samples)
    anew = Scenario(cell.settings, cell.dataset, cell.partition, cell.schedule)
    torch.testing.assert_close(mean_gradient(cell, theta, 1, flips), mean_gradient(anew, theta, 1, flips))
    assert not torch.allclose(mean_gradient(cell, theta, 1, flips), clean)


def test_a_target_of_a_network_is_trained_from_the_same_start_on_flipped_labels(settings: Compose) -> None:
    more = ["weight_decay=0.01", "lr_schedule=step", "lr_every=2"]
    cell = scenario.make(settings(*SMALL, *MLP, "rounds=5", "batch_size=full", "attack.goal=targeted", *more))
    module = cell.model._module  # type: ignore[attr-defined]
    net = nn.Sequential(*module).double()
    trained = {name: torch.from_numpy(value) for name, value in cell.model.state(cell.start()).items()}
    module.double().load_state_dict(trained)
    held = np.flatnonzero(cell.partition.client >= 0)
    X, y = cell.features(held), torch.from_numpy((cell.dataset.y_train[held] + 1) % 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimizer.step()
        schedule.step()
    expected = torch.cat([value.detach().ravel() for value in net.parameters()])[None]
    torch.testing.assert_close(targets.target(cell), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attacked", [["attack.name=ipm"], ["attack.goal=targeted"]])
def test_what_clients_send_is_their_momentum(settings: Compose, attacked: list[str]) -> None:
    chosen = settings(*SMALL, "worker_momentum=0.9", "rounds=4", "clients.per_round=6", "strategy=median", *attacked)
    cell = scenario.make(chosen)
    theta, m = cell.start(), torch.zeros(10, *cell.theta_shape, dtype=torch.float64)
    rule = cell.rule()
    for round_ in range(1, 5):
        clients = cell.schedule.participants(round_)
        flips = adversary.flips(cell, theta, round_)
        m[clients] = 0.9 * m[clients] + 0.1 * adversary.updates(
            cell.__class__(
                chosen.model_copy(update={"worker_momentum": 0.0}), cell.dataset, cell.partition, cell.schedule
            ),
            theta,
            round_,
            flips,
        )
        sent = adversary.crafted(cell, theta, round_, m[clients])
        order = torch.from_numpy(protocol.shuffled(chosen.seed, round_, len(clients)))
        theta = theta - 0.2 * rule(sent, torch.from_numpy(cell.schedule.sizes[clients]), order)
    (outcome,) = engine.run_cells([cell])
    assert outcome.theta is not None
    torch.testing.assert_close(outcome.theta, theta, rtol=1e-9, atol=1e-12)


def test_learning_rates_follow_their_schedule() -> None:
    rates = {name: [protocol.lr_factor(name, t, 6, None, 0.1) for t in range(1, 7)] for name in ("cosine", "step")}  # type: ignore[arg-type]
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for name, schedule in (
        ("cosine", torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)),
        ("step", torch.optim.lr_scheduler.StepLR(torch.optim.SGD([parameter], lr=1.0), 2)),
    ):
        found = []
        for _ in range(6):
            found.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        assert found == pytest.approx(rates[name])
    assert [protocol.lr_factor("inverse", t, 6, 2) for t in (1, 3, 5)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert protocol.lr_factor("constant", 5, 6) == 1


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["strategy=trimmed_mean", "local_steps=2"],
        ["server_optimizer=adam", "lr=0.01", "attack.goal=targeted"],
        ["server_optimizer=momentum", "attack.refresh=epoch"],
        ["attack.name=ipm", "strategy=krum"],
    ],
)
def test_logistic_regression_with_decay_and_schedule_is_the_same_in_its_fast_path(
    settings: Compose, more: list[str]
) -> None:
    chosen = [
        settings(*SMALL, "engine=batched", "rounds=6", "lr=0.1", *more, *training)
        for training in (["weight_decay=0.05"], ["lr_schedule=inverse", "lr_every=2"], ["lr_schedule=cosine"], [])
    ]
    cells = engine.make_scenarios(chosen)
    outcomes = engine.run_cells(cells)
    for cell, outcome in zip(cells, outcomes, strict=True):
        alone = sequential.run(cell, client_by_client=True)
        assert_same(alone.history(), outcome.history())
        np.testing.assert_allclose(outcome.table[:, :8], alone.table[:, :8], rtol=1e-9, atol=1e-9)
    thetas = [outcome.theta for outcome in outcomes]
    assert len({tuple(theta.ravel()[:50].tolist()) for theta in thetas if theta is not None}) == 4


ON_FLOWER = {
    "mlp": [*MLP],
    "mlp, targeted, median": [*MLP, "attack.goal=targeted", "strategy=median"],
    "cnn": ["model=cnn"],
    "cnn, targeted, trimmed mean": ["model=cnn", "attack.goal=targeted", "strategy=trimmed_mean"],
    "mlp, momentum of clients, some drawn": [
        *MLP,
        "worker_momentum=0.9",
        "strategy=krum",
        "clients.per_round=7",
        "clients.honest=8",
        "clients.malicious=2",
    ],
    "mlp, momentum, attack on updates": [*MLP, "worker_momentum=0.5", "attack.name=alie", "strategy=median"],
    "mlp, local steps, schedule and decay": [*MLP, "local_steps=3", "lr_schedule=cosine", "weight_decay=0.01"],
    "logistic, momentum of clients": ["worker_momentum=0.9", "attack.goal=targeted"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FLOWER)
def test_flower_and_batched_give_one_trajectory(settings: Compose, grid: BlockGrid, case: str) -> None:
    rounds = 50 if case in list(ON_FLOWER)[:4] else 8
    common = (*SMALL, "batch_size=30", f"rounds={rounds}", "eval_every=10", "lr=0.05", *ON_FLOWER[case])
    recorder = Recorder(scenario.make(settings(*common)))
    start(grid, recorder)
    (batched,) = engine.run_cells([scenario.make(settings(*common, "engine=batched"))])
    assert_same(recorder.history, batched.history())


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, shape, classes, width=8):
        super().__init__(nn.Conv2d(shape[0], width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))
        self(__import__("torch").zeros(1, *shape))
"""


def test_a_users_module_runs_and_its_result_loads_into_it(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(NET)
    overrides = [f"model.name={file}:Net", "model.args.width=3", "engine=batched", "rounds=3", f"out={tmp_path}/out"]
    code, out, err = command(*overrides)
    assert code == 0, err
    namespace = runpy.run_path(str(file))
    net = namespace["Net"]((1, 8, 8), 10, width=3)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in np.load(tmp_path / "out" / "model.npz").items()})
    X, y = scenario.make(Settings.model_validate(_config(tmp_path / "out"))).test_set()
    accuracy = (net(X).argmax(1) == y).float().mean().item()
    assert f"{accuracy:.4f}" in out


def _config(folder: Path) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def test_a_sweep_over_models_has_a_row_for_each(command: Command, tmp_path: Path) -> None:
    overrides = ["-m", "engine=batched", "rounds=2", "model=logistic,mlp,cnn", "attack.budget=0.2,0.6"]
    code, _, err = command(*overrides, f"out={tmp_path}/out")
    assert code == 0, err
    rows = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["logistic"] * 2 + ["mlp"] * 2 + ["cnn"] * 2


class StoppedError(Exception):
    """What the test below cuts a run off with."""


@pytest.mark.parametrize(
    "more",
    [
        ["model=cnn", "server_optimizer=adam", "lr=0.01", "early_stop.patience=5"],
        [*MLP, "worker_momentum=0.9", "strategy=median", "clients.per_round=7", "attack.refresh=epoch"],
    ],
)
def test_a_run_of_a_network_goes_on_where_it_stopped(settings: Compose, tmp_path: Path, more: list[str]) -> None:
    cell = scenario.make(settings(*SMALL, "engine=batched", "rounds=8", *more))
    whole = sequential.run(cell)
    kept = Checkpoint(tmp_path, "key", every=0)
    done = 0

    def cut_off(rounds: int) -> None:
        nonlocal done
        done += rounds
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        sequential.run(cell, progress=cut_off, checkpoint=kept)
    reported: list[int] = []
    resumed = sequential.run(cell, progress=reported.append, checkpoint=Checkpoint(tmp_path, "key"))
    assert reported[0] >= 1 and sum(reported) == 8
    assert resumed.theta is not None and whole.theta is not None and torch.equal(resumed.theta, whole.theta)
    assert np.array_equal(resumed.table, whole.table, equal_nan=True)
    assert_same(resumed.history(), whole.history(), rtol=0)


def test_a_users_module_that_changes_is_another_unit_and_another_target(settings: Compose, tmp_path: Path) -> None:
    keys, files = set(), set()
    for width in (3, 4):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "mine.py").write_text(NET.replace("width=8", f"width={width}"))
        cell = scenario.make(settings(f"model.name={folder}/mine.py:Net", "attack.goal=targeted", "rounds=2"))
        keys.add(identity.key_of([cell]).replace(str(width), ""))
        files.add(targets._target_file(cell).name)
    assert len(keys) == len(files) == 2


@pytest.mark.parametrize(
    "change",
    [
        *("model=mlp", "model=cnn", "lr_schedule=cosine", "weight_decay=0.1", "worker_momentum=0.5", "lr=0.3"),
        *("dataset.standardize=true", "seed=1", "local_steps=2", "rounds=3", "clients.per_round=5"),
    ],
)
def test_what_changes_the_target_changes_its_file(settings: Compose, change: str) -> None:
    cells = [scenario.make(settings("attack.goal=targeted", "rounds=2", *more)) for more in ([], [change])]
    assert len({targets._target_file(cell) for cell in cells}) == 2


@pytest.mark.parametrize("same", ["attack.budget=0.1", "strategy=median", "engine=batched", "eval_every=2"])
def test_what_does_not_change_the_target_keeps_its_file(settings: Compose, same: str) -> None:
    cells = [scenario.make(settings("attack.goal=targeted", "rounds=2", *more)) for more in ([], [same])]
    assert len({targets._target_file(cell) for cell in cells}) == 1


def test_standardized_channels_have_mean_0_and_deviation_1(settings: Compose, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((6, 6, 3), (3, 6, 6), (6, 6), (5,)):
        x = rng.integers(0, 256, (40, *shape)).astype(np.uint8)
        y = np.arange(40) % 2
        np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        common = [
            "dataset=npz",
            f"dataset.path={tmp_path}/x.npz",
            "dataset.standardize=true",
            "dtype=float64",
            "batch_size=20",
        ]
        cell = scenario.make(settings(*common, "model=mlp"))
        X, _ = cell.test_set()
        axes = (0, 2, 3) if X.ndim == 4 else (0,)
        assert X.shape[1:] == {(6, 6, 3): (3, 6, 6), (3, 6, 6): (3, 6, 6), (6, 6): (1, 6, 6), (5,): (5,)}[shape]
        assert X.mean(axes).numpy() == pytest.approx(0, abs=1e-9)
        assert X.std(axes, correction=0).numpy() == pytest.approx(1)
        flat = scenario.make(settings(*common)).test_set()[0]
        assert flat[:, :-1].sort(1).values.numpy() == pytest.approx(X.flatten(1).sort(1).values.numpy())
        assert (flat[:, -1] == 1).all()


def test_pixels_reach_a_network_in_the_order_of_channels_rows_and_columns(settings: Compose, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x, y_test=np.arange(20) % 2)
    cell = scenario.make(settings("dataset=npz", f"dataset.path={tmp_path}/x.npz", "model=mlp", "batch_size=20"))
    X = cell.features(np.array([3, 1]))
    np.testing.assert_allclose(X.numpy(), x[[3, 1]].transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "more", [[*MLP], ["model=cnn", "attack.goal=targeted"], ["worker_momentum=0.9", "strategy=median"]]
)
@pytest.mark.parametrize("full_rows", [True, False])
def test_a_gpu_gives_what_the_processor_gives(settings: Compose, more: list[str], full_rows: bool) -> None:
    cell = scenario.make(settings(*SMALL, "engine=batched", "rounds=5", *more))
    here, there = (engine.run_cells([cell], device=device, full_rows=full_rows)[0] for device in ("cpu", "cuda"))
    assert_same(here.history(), there.history())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.slow
def test_clients_on_a_gpu_give_what_those_on_a_processor_give(settings: Compose) -> None:
    found = []
    for device in ("cpu", "cuda"):
        chosen = settings(*SMALL, "batch_size=30", "rounds=3", "model=cnn", f"engine.client_device={device}")
        recorder = Recorder(scenario.make(chosen))
        federation.run(lambda federate, recorder=recorder: federate(recorder), chosen)  # type: ignore[misc]
        found.append(recorder.history)
    assert_same(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_clients_on_a_gpu_that_is_not_there_are_refused(settings: Compose) -> None:
    chosen = settings(*SMALL, "model=cnn", "engine.client_device=cuda")
    with pytest.raises(InputError, match=r"engine\.client_device=cuda needs a GPU"):
        federation.check(scenario.make(chosen))


def test_a_stack_on_a_card_stays_on_it(settings: Compose, tmp_path: Path) -> None:
    base = scenario.make(settings(*SMALL, *MLP, "engine=batched", "rounds=2", "eval_every=1", "early_stop.patience=1"))
    target = torch.randn(base.theta_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.savez(tmp_path / "target.npz", theta=target)
    aimed = {"goal": "targeted", "target_path": str(tmp_path / "target.npz")}
    cells = []
    for change in (
        {},
        aimed,
        {"knowledge": "noisy"},
        {"scope": "per_client"},
        {"name": "static_flip"},
        {"budget": 0.0},
    ):
        threat = base.settings.attack.model_copy(update=change)
        cells.append(replace(base, settings=base.settings.model_copy(update={"attack": threat})))
    here = engine.run_cells(cells, full_rows=False)
    with elsewhere():
        there = engine.run_cells(cells, full_rows=False, device="cuda")
    for one, other in zip(there, here, strict=True):
        assert one.theta is not None and not is_there(one.theta)
        assert_same(one.history(), other.history())


@pytest.mark.parametrize("more", [["worker_momentum=0.5", "strategy=cosine_history"], ["server_optimizer=adam"]])
def test_one_experiment_goes_on_on_a_card(settings: Compose, tmp_path: Path, more: list[str]) -> None:
    cell = scenario.make(settings(*SMALL, "engine=batched", "rounds=3", "early_stop.patience=3", *more))
    half = replace(cell, settings=cell.settings.model_copy(update={"rounds": 2}))
    with elsewhere():
        sequential.run(half, device="cuda", checkpoint=Checkpoint(tmp_path, "key"))
        found = sequential.run(cell, device="cuda", checkpoint=Checkpoint(tmp_path, "key"))
    assert found.error is None and found.theta is not None and not is_there(found.theta)
    assert_same(found.history(), sequential.run(cell).history())
