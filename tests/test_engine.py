"""The batched engine: the trajectory of each experiment alone, flip by flip, however many run beside it."""

import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from pathlib import Path
from types import FrameType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from elsewhere import elsewhere, is_there

from fl_attack import adversary, attack, engine, plugins, protocol, scenario, targets
from fl_attack.aggregate import RULES
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import AttackSettings, Settings, settings_from
from fl_attack.detect import MEASURES
from fl_attack.engine import (
    batches,
    budgets,
    ending,
    features,
    groups,
    kernels,
    kinds,
    log,
    sequential,
    stopping,
    threads,
)
from fl_attack.engine.budgets import Allowances
from fl_attack.engine.choices import Change
from fl_attack.engine.linear import client_updates, run, tile, tiling
from fl_attack.engine.linear import targets as linear_targets
from fl_attack.errors import InputError, RunError
from fl_attack.history import COLUMNS, History, Recorder
from fl_attack.scenario import Scenario

Small = Callable[..., list[str]]
Compose = Callable[..., Settings]
COMMON = ["rounds=7", "eval_every=2", "clients.total=7", "clients.malicious=3", "attack.budget=0.4", "lr=0.5"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small sums gain nothing from more, and lose much where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(cell: Scenario) -> History:
    """The rounds of one experiment, client after client, each by the functions that define it."""
    recorder, chosen = Recorder(cell), cell.settings
    theta = epoch_theta = cell.start()
    state, rule, remembered = protocol.initial_state(theta), cell.rule(), None
    recorder.record(0, theta)
    for round_ in range(1, chosen.rounds + 1):
        epoch_theta = theta if adversary.epoch_start(cell, round_) == round_ else epoch_theta
        flips = adversary.flips(cell, theta, round_, epoch_theta)
        clients = cell.schedule.participants(round_)
        updates = adversary.updates(cell, theta, round_, flips)
        updates = adversary.crafted(cell, theta, round_, updates)
        weights = torch.from_numpy(cell.schedule.sizes[clients])
        if chosen.strategy.name == "mean" and not chosen.strategy.pre:
            aggregate = torch.tensordot(weights / weights.sum().double(), updates, 1)
        else:
            client_order = torch.from_numpy(protocol.shuffled(chosen.seed, round_, len(clients)))
            seen = cell.seen(round_, theta)
            aggregate, remembered = rule.step(updates, weights, client_order, seen, remembered)
        theta, state = protocol.server_step(chosen.server_optimizer, theta, aggregate, chosen.lr, state)
        recorder.record(round_, theta, aggregate, flips, updates)
    return recorder.history


def check_same(outcome: engine.Outcome, expected: History, atol: float = 1e-9) -> None:
    """Parameters, every flip and every row."""
    history = outcome.history()
    assert outcome.error is None
    assert history.theta.dtype == torch.float64
    torch.testing.assert_close(history.theta, expected.theta, rtol=0, atol=atol)
    ours, theirs = history.flip_table(), expected.flip_table()
    for name in theirs:
        assert ours[name].tolist() == theirs[name].tolist(), name
    assert [f.allowed for _, f in history.flips] == [f.allowed for _, f in expected.flips]
    assert outcome.flip_count == expected.flip_count
    assert len(history.rows) == len(expected.rows)
    for row, wanted in zip(history.rows, expected.rows, strict=True):
        assert tuple(row) == COLUMNS
        assert [type(value) for value in row.values()] == [type(value) for value in wanted.values()]
        assert list(row.values()) == pytest.approx(list(wanted.values()), rel=0, abs=1e-7, nan_ok=True)


def check_together(cells: Sequence[Scenario], **options: object) -> list[History]:
    """Each cell of the batch goes the way it goes alone."""
    expected = [alone(cell) for cell in cells]
    outcomes = engine.run_cells(cells, **options)  # type: ignore[arg-type]
    for outcome, one in zip(outcomes, expected, strict=True):
        check_same(outcome, one)
    return expected


CHANGES = {  # what may differ from cell to cell
    "goal": ["attack.goal=targeted"],
    "one": ["clients.malicious=1"],
    "all": ["clients.malicious=7"],
    "none": ["attack=none"],
    "nobody": ["clients.malicious=0"],
    "budget": ["attack.budget=0.05"],
    "everything": ["attack.budget=1"],
    "nothing": ["attack.budget=0"],
    "literal": ["attack.selection=literal"],
    "literal targeted": ["attack.selection=literal", "attack.goal=targeted", "attack.budget=0.9"],
    "scope": ["attack.scope=per_client", "clients.malicious=4"],
    "carry": ["attack.rounding=carry", "attack.budget=0.07"],
    "ceil": ["attack.rounding=ceil", "attack.budget=0.01"],
    "ceil per client": ["attack.rounding=ceil", "attack.budget=0.01", "attack.scope=per_client"],
    "carry per client": ["attack.rounding=carry", "attack.budget=0.11", "attack.scope=per_client"],
    "honest": ["attack.knowledge=honest"],
    "own": ["attack.knowledge=own", "clients.malicious=2"],
    "every": ["attack.every=3", "attack.start=2"],
    "stop": ["attack.stop=3", "attack.goal=targeted"],
    "late carry": ["attack.rounding=carry", "attack.budget=0.13", "attack.every=2", "attack.start=3"],
    "lr": ["lr=0.05"],
    "lr targeted": ["lr=0.05", "attack.goal=targeted"],
    "sgd": ["server_optimizer=sgd", "attack.goal=targeted", "lr=0.3"],
    "momentum": ["server_optimizer=momentum", "attack.goal=targeted", "lr=0.3"],
    "adam": ["server_optimizer=adam", "attack.goal=targeted", "lr=0.3"],
    "adam under a rule": ["server_optimizer=adam", "strategy.name=median"],
    "noisy": ["attack.knowledge=noisy", "attack.knowledge_fraction=0.4"],
    "epoch": ["attack.refresh=epoch"],
    "epoch targeted": ["attack.refresh=epoch", "attack.goal=targeted", "attack.scope=per_client"],
    "epoch carry": ["attack.refresh=epoch", "attack.rounding=carry", "attack.budget=0.03", "attack.every=2"],
    "epoch literal": ["attack.refresh=epoch", "attack.selection=literal", "attack.knowledge=noisy"],
    "epoch random": ["attack.refresh=epoch", "attack.name=random_flip"],
    "random": ["attack.name=random_flip"],
    "random per client": ["attack.name=random_flip", "attack.scope=per_client", "attack.rounding=carry"],
    "static": ["attack.name=static_flip", "attack.args={map: cyclic}"],
    "source": ["attack.name=static_flip", "attack.args={source: 1, target: 0}"],
    "confidence": ["attack.name=confidence_flip"],
    "least": ["attack.name=confidence_flip", "attack.args={certain: least}", "attack.budget=0.2"],
    "sign": ["attack.name=sign_flip"],
    "gaussian": ["attack.name=gaussian", "attack.args={sigma: 2}", "attack.every=2"],
    "ipm": ["attack.name=ipm", "attack.args={epsilon: 0.5}", "attack.stop=5"],
    "alie": ["attack.name=alie"],
    "mimic": ["attack.name=mimic"],
    "minmax": ["attack.name=minmax", "strategy.name=median"],
    "minsum": ["attack.name=minsum", "attack.args={perturbation: sign}"],
    "largest": ["attack.name=gradient_max"],
    "largest targeted": ["attack.name=gradient_max", "attack.goal=targeted"],
    "largest own": ["attack.name=gradient_max", "attack.knowledge=own"],
    "median": ["strategy.name=median"],
    "median of alie": ["strategy.name=median", "attack.name=alie"],
    "mean of norms": ["strategy.name=norm_clipping", "attack.refresh=epoch"],
    # not after nnm: updates that nearly coincide have a geometric median to 5e-9 only, which Adam makes more of
    "geometric": ["strategy.name=geometric_median", "attack.goal=targeted", "strategy.pre=[clipping]"],
    "two before": ["strategy.name=centered_clipping", "attack.goal=targeted", "strategy.pre=[nnm, clipping]"],
}
RULED = {  # the same, where seven clients take part
    name: [f"strategy.name={name}", f"strategy.f={min(2, row.max_f(7))}", *more]
    for (name, row), more in zip(
        RULES.items(),
        itertools.cycle(
            [["attack.goal=targeted"], ["attack.name=ipm"], ["attack.scope=per_client"], ["strategy.pre=[clipping]"]]
        ),
    )
} | {
    # not before Krum: at parameters of zero, mixed updates of few samples are equally near up to rounding
    "mixed": ["strategy.name=trimmed_mean", "strategy.pre=[nnm]"],
    "buckets": ["strategy.name=median", "strategy.pre=[{bucketing: {s: 2}}]"],
    "nobody": ["strategy.name=krum", "attack.name=none", "strategy.f=2"],
    "less": ["strategy.name=trimmed_mean", "strategy.f=1"],
}
SHARED = {  # what is the same for all cells
    "binary": (2, ["batch_size=40"]),
    "classes": (3, ["batch_size=40"]),
    "momentum": (2, ["batch_size=40", "server_optimizer=momentum"]),
    "adam": (3, ["batch_size=30", "server_optimizer=adam"]),
    "full batch": (2, ["batch_size=full", "partition=dirichlet"]),
    "uneven": (3, ["batch_size=40", "partition=dirichlet"]),
    "shards": (2, ["batch_size=35", "partition=shards"]),
    "steps": (3, ["batch_size=30", "local_steps=3"]),
    "steps that repeat some": (3, ["batch_size=50", "local_steps=3"]),  # 14 of 17 samples, 7 of them twice
    "two classes repeated": (2, ["batch_size=50", "local_steps=3"]),
    "some": (2, ["batch_size=40", "clients.per_round=4"]),
    "some of several classes": (3, ["batch_size=40", "clients.per_round=0.3", "partition=dirichlet"]),
    "some in steps": (3, ["batch_size=30", "local_steps=3", "clients.per_round=5"]),
    "steps again": (2, ["batch_size=100", "local_steps=3", "server_optimizer=momentum"]),
}


def changed(base: Settings, change: Sequence[str]) -> Settings:
    """What the command line would give with these overrides too; composing each anew takes much longer."""
    values = base.model_dump()
    values["clients"]["honest"] = None
    for override in change:
        key, value = override.split("=", 1)
        *path, last = key.split(".")
        if override == "attack=none":
            values["attack"] = {"name": "none"}
        else:
            reduce(dict.__getitem__, path, values)[last] = yaml.safe_load(value)
    return settings_from(values)


def cells_of(settings: Compose, data: list[str], shared: list[str], changes: Sequence[list[str]]) -> list[Scenario]:
    """A cell for each change, in double precision."""
    base = settings(*data, *COMMON, "dtype=float64", *shared)
    return engine.make_scenarios([changed(base, change) for change in changes])


@pytest.mark.parametrize("case", SHARED)
def test_cells_of_one_batch_go_the_way_each_goes_alone(settings: Compose, small_data: Small, case: str) -> None:
    classes, shared = SHARED[case]
    cells = cells_of(settings, small_data(classes), shared, [[], *CHANGES.values()])
    histories = check_together(cells)
    flipping = [cell for cell in cells if cell.settings.attacked and cell.settings.attack.writes == "labels"]
    assert sum(history.flip_count > 0 for history in histories) >= len(flipping) - 4


@pytest.mark.parametrize("case", ["binary", "adam", "uneven", "steps"])
def test_cells_under_every_rule_go_the_way_each_goes_alone(settings: Compose, small_data: Small, case: str) -> None:
    classes, shared = SHARED[case]
    check_together(cells_of(settings, small_data(classes), shared, [[], *RULED.values()]))


@pytest.mark.parametrize("case", ["binary", "classes", "steps"])
def test_a_cell_by_itself_goes_the_same_way(settings: Compose, small_data: Small, case: str) -> None:
    classes, shared = SHARED[case]
    for name in ("goal", "literal", "scope", "own", "late carry"):
        check_together(cells_of(settings, small_data(classes), shared, [CHANGES[name]]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("classes", [2, 4])
def test_every_combination_goes_the_way_it_goes_alone(
    settings: Compose, small_data: Small, classes: int, steps: int, partition: str, optimizer: str
) -> None:
    kinds = [
        [f"attack.{key}={value}" for key, value in zip(("selection", "scope", "rounding"), kind, strict=True)]
        for kind in itertools.product(("gain", "literal"), ("pooled", "per_client"), ("floor", "carry"))
    ]
    aims = ["attack.goal=targeted", *(f"attack.knowledge={known}" for known in ("full", "honest", "own"))]
    budgets = [["attack.budget=0.07", "attack.every=2"], ["attack.budget=0.45", "clients.malicious=5"]]
    changes = [[*kind, aim, *budget] for kind in kinds for aim in aims for budget in budgets]
    shared = [f"server_optimizer={optimizer}", f"partition={partition}", f"local_steps={steps}", "batch_size=45"]
    check_together(cells_of(settings, small_data(classes), shared, changes))


def test_malicious_clients_of_a_fixed_share_make_groups_of_their_own(settings: Compose, small_data: Small) -> None:
    share = ["partition.malicious_share=0.3", "batch_size=40"]
    changes = [[f"clients.malicious={f}", f"attack.budget={b}"] for f in (1, 2) for b in (0.2, 0.6)]
    cells = cells_of(settings, small_data(3), share, changes)
    assert engine.group(cells) == [[0, 1], [2, 3]]
    for members in engine.group(cells):
        check_together([cells[i] for i in members])
    with pytest.raises(InputError, match="differ in what"):
        engine.run_cells(cells)


@pytest.mark.parametrize(
    "change", ["seed=1", "batch_size=30", "local_steps=2", "rounds=8", "dtype=float32", "clients.total=8"]
)
def test_cells_that_see_other_batches_form_another_group(settings: Compose, small_data: Small, change: str) -> None:
    cells = cells_of(settings, small_data(2), ["batch_size=40"], [[], ["lr=1"], [change], ["attack.budget=0.1"]])
    assert engine.group(cells) == [[0, 1, 3], [2]]


def test_flipped_labels_make_another_group(settings: Compose, small_data: Small) -> None:
    (cell,) = cells_of(settings, small_data(2), ["batch_size=40"], [[]])
    assert engine.group_key(cell) != engine.group_key(cell.relabelled(1 - cell.dataset.y_train))


def test_memory_is_that_of_the_optimizer_which_keeps_most(settings: Compose, small_data: Small) -> None:
    def chunks(*optimizers: str) -> int:
        changes = [[f"server_optimizer={name}", f"lr=0.{i + 1}"] for i, name in enumerate(optimizers)]
        cells = cells_of(settings, small_data(5, features=900), ["batch_size=60"], changes)
        work = run.Work(cells, torch.device("cpu"), 2.1e6, False, False, False)
        return len(list(work.chunks()))

    assert chunks(*["sgd"] * 8) < chunks(*["sgd"] * 7, "adam") == chunks(*["adam"] * 8)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize("case", ["binary", "adam", "steps"])
def test_memory_and_tiles_change_no_result(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, case: str, device: str
) -> None:
    classes, shared = SHARED[case]
    cells = cells_of(settings, small_data(classes), shared, [[], *CHANGES.values()] * 2)
    whole = engine.run_cells(cells)
    monkeypatch.setattr(tiling, "CACHE", 1)
    monkeypatch.setattr(tiling, "FEWEST", 2)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(batches, "SAMPLES_AT_ONCE", 120)
    reported: list[int] = []
    parts = engine.run_cells(cells, memory_gb=2e-5, progress=reported.append, device=device)
    assert len(reported) > 3 * 7
    assert sum(reported) == 7 * len(cells)
    for part, one in zip(parts, whole, strict=True):
        check_same(part, one.history(), 1e-10)


ON_A_CARD = (
    "goal",
    "literal",
    "scope",
    "none",
    "own",
    "noisy",
    "epoch",
    "epoch targeted",
    "epoch literal",
    "lr targeted",
)
ON_A_CARD += ("random", "confidence", "alie", "median", "largest targeted", "momentum", "adam under a rule")


@pytest.mark.parametrize("case", ["binary", "steps that repeat some"])
def test_what_is_computed_on_a_card_stays_on_it(settings: Compose, small_data: Small, case: str) -> None:
    classes, shared = SHARED[case]
    changes = [CHANGES[name] for name in ON_A_CARD]
    more = ["rounds=2", "eval_every=1", *(["early_stop.patience=1"] if classes == 2 else [])]
    cells = cells_of(settings, small_data(classes), [*shared, *more], [[], *changes])
    here = engine.run_cells(cells)
    with elsewhere():
        there = engine.run_cells(cells, device="cuda")
    for one, other in zip(there, here, strict=True):
        assert one.theta is not None and not is_there(one.theta)
        check_same(one, other.history(), 1e-10)


@pytest.mark.parametrize("case", ["binary", "classes"])
def test_pieces_side_by_side_are_pieces_one_after_the_other(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    classes, shared = SHARED[case]
    changes = [[*some, f"attack.budget={b}"] for some in RULED.values() for b in (0.2, 0.5, 0.9)]
    cells = cells_of(settings, small_data(classes), shared, changes)
    whole = engine.run_cells(cells)
    monkeypatch.setattr(client_updates, "BYTES_AT_ONCE", 1)
    monkeypatch.setattr(run, "WORTH_THREADS", 0)
    torch.set_num_threads(2)
    parts = engine.run_cells(cells)
    torch.set_num_threads(1)
    for part, one in zip(parts, whole, strict=True):
        check_same(part, one.history(), 1e-10)


def test_parts_are_worked_on_at_the_same_time_and_come_back_in_order() -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2)

    def work(part: int) -> tuple[int, int]:
        both.wait(60)  # for the other thread, or broken
        return part, torch.get_num_threads()

    found = threads.side_by_side(work, [3, 1, 2, 0])
    assert found == [(3, 1), (1, 1), (2, 1), (0, 1)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert threads.side_by_side(lambda part: threading.get_ident(), [0, 1]) == [threading.get_ident()] * 2


def test_a_part_that_fails_ends_the_others() -> None:
    torch.set_num_threads(2)
    begun: list[int] = []
    failed = threading.Event()

    def work(part: int) -> None:
        begun.append(part)
        if part == 0:
            failed.set()
            raise ValueError("a part")
        failed.wait(60)
        time.sleep(0.01)  # long enough for the other thread to say so

    with pytest.raises(ValueError, match="a part"):
        threads.side_by_side(work, range(100))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    time.sleep(0.5)
    assert len(begun) < 10


def test_functions_of_others_are_not_called_side_by_side(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "noted.py").write_text(
        "import threading\nseen = set()\n"
        "def mean(updates, weights, f):\n    seen.add(threading.get_ident())\n    return updates.mean(-3)\n"
    )
    path = f"{tmp_path / 'noted.py'}:mean"
    cells = cells_of(
        settings, small_data(2), ["batch_size=40"], [[f"strategy.name={path}", f"lr={lr}"] for lr in (1, 2)]
    )
    monkeypatch.setattr(client_updates, "BYTES_AT_ONCE", 1)
    monkeypatch.setattr(run, "WORTH_THREADS", 0)
    torch.set_num_threads(2)
    engine.run_cells(cells)
    torch.set_num_threads(1)
    seen = plugins.load(path).__globals__["seen"]
    assert seen == {threading.get_ident()}


def test_less_is_kept_where_less_is_asked_for(settings: Compose, small_data: Small) -> None:
    cells = cells_of(settings, small_data(3), ["batch_size=40"], [[], ["attack.goal=targeted"]])
    whole = engine.run_cells(cells)
    lean = engine.run_cells(cells, keep_flips=False, keep_theta=False, full_rows=False)
    costly = [COLUMNS.index(name) for name in ("cosine", "repeated", "relabelled", *MEASURES)]
    for one, other in zip(whole, lean, strict=True):
        assert other.theta is None and not other.flips
        assert other.flip_count == one.flip_count > 0
        assert np.isnan(other.table[1:, costly]).all()
        np.testing.assert_array_equal(np.delete(other.table, costly, 1), np.delete(one.table, costly, 1))


@pytest.mark.parametrize("classes", [2, 3])
def test_single_precision_stays_near_single_precision_of_the_clients(
    settings: Compose, small_data: Small, classes: int
) -> None:
    data = small_data(classes, train=400, features=20)
    # Adam divides gradients by their size: where one is zero but for rounding, rounding decides where to go
    changes = [["rounds=10", *change] for name, change in CHANGES.items() if not name.startswith("adam")]
    cells = cells_of(settings, data, ["batch_size=60", "dtype=float32"], changes)
    for outcome, cell in zip(engine.run_cells(cells), cells, strict=True):
        expected = alone(cell).theta
        assert outcome.theta is not None and outcome.theta.dtype == torch.float32
        assert (outcome.theta - expected).norm() < 1e-4 * expected.norm()


def test_a_batch_visits_a_tile_once_a_round(settings: Compose, small_data: Small) -> None:
    (cell,) = cells_of(settings, small_data(3), ["batch_size=40"], [[]])
    work = run.Work([cell], torch.device("cpu"), 1e9, True, True, True)
    chunk, visits = run.Chunk(work, [0]), []

    def note(frame: FrameType, event: str, _: object) -> None:
        caller, here = frame.f_back, frame.f_code
        if event == "call" and here.co_filename == tile.__file__ != (caller and caller.f_code.co_filename):
            visits.append(here.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        chunk.step(1)
    finally:
        sys.setprofile(before)
    assert visits == ["step"] and chunk.tiles[0].attackers.flips.item() > 0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_cell_that_diverges_ends_there_and_disturbs_no_other(
    settings: Compose, small_data: Small, steps: int
) -> None:
    shared = ["batch_size=40", f"local_steps={steps}"]
    bad = ["lr=1e308"]
    cells = cells_of(settings, small_data(3), shared, [[], bad, ["attack.goal=targeted"], [*bad, "attack=none"]])
    with_bad = engine.run_cells(cells)
    for i in (0, 2):
        check_same(with_bad[i], alone(cells[i]))
    for i in (1, 3):
        assert "diverged: theta is not finite after round" in str(with_bad[i].error)
        history = with_bad[i].history()
        assert history.theta.isfinite().all()
        assert 1 <= len(history.rows) < 5


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_a_cell_whose_target_diverges_ends_there_and_disturbs_no_other(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    shared, aimed = ["batch_size=40", "rounds=4", f"model.name={model}"], ["attack.goal=targeted"]
    changes = [aimed, [*aimed, "lr=1e308"], [], ["lr=1e308", "attack.name=planned", "attack.args={sweeps: 1}"]]
    cells = cells_of(settings, small_data(3), shared, changes)
    trained: list[int] = []
    train_all = targets.train_all
    monkeypatch.setattr(targets, "train_all", lambda some, *more: trained.append(len(some)) or train_all(some, *more))
    assert targets.diverging(cells) == [1, 3] and sum(trained) == 2  # one for each learning rate
    outcomes = engine.run_cells(cells, full_rows=False)
    assert sum(trained) == 2  # one that diverged is not trained again
    for i in (0, 2):
        assert outcomes[i].error is None
        torch.testing.assert_close(outcomes[i].theta.double(), alone(cells[i]).theta, rtol=1e-4, atol=1e-4)
    why = "has no target: honest training on flipped labels diverges (lr=1e+308); use a smaller lr"
    assert outcomes[1].error == f"attack=greedy {why}, or give attack.target_path"
    assert outcomes[3].error == f"attack=planned {why}"
    with pytest.raises(RunError, match="has no target"):
        targets.target(cells[1])


def test_a_target_of_the_users_that_is_not_finite_is_refused(
    settings: Compose, small_data: Small, tmp_path: Path
) -> None:
    np.savez(tmp_path / "target.npz", theta=np.full((3, 5), np.inf))
    how = ["attack.goal=targeted", f"attack.target_path={tmp_path / 'target.npz'}"]
    (cell,) = cells_of(settings, small_data(3, features=4), ["batch_size=40"], [how])
    assert targets.diverging([cell]) == []
    with pytest.raises(InputError, match=r"theta in .*target\.npz is not finite"):
        targets.target(cell)


@pytest.mark.parametrize("case", ["binary", "adam", "steps"])
def test_features_that_are_zero_everywhere_are_left_out_and_put_back(
    settings: Compose, small_data: Small, case: str
) -> None:
    classes, shared = SHARED[case]
    data = small_data(classes, features=9)
    file = data[1].split("=", 1)[1]
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["x_train"][:, [0, 4, 5]] = 0
    np.savez(file, **arrays)  # the test set keeps its numbers there
    cells = cells_of(settings, data, shared, [[], ["attack.goal=targeted"]])
    minibatches = batches.Batches(cells[0], np.arange(7), torch.device("cpu"), 1e9)
    assert minibatches.features.seen.sum() == 7 and minibatches.features.d == features.padded(7) == 16
    check_together(cells)
    for outcome in engine.run_cells(cells):
        assert outcome.theta is not None
        assert (outcome.theta[:, [0, 4, 5]] == 0).all()
        assert (outcome.theta[:, [1, 2, 3, 6, 7, 8, 9]] != 0).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_equal_gains_go_to_the_lower_sample(settings: Compose, small_data: Small, classes: int) -> None:
    data = small_data(classes, train=128)
    file = data[1].split("=", 1)[1]
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["x_train"] = np.round(
        arrays["x_train"][np.arange(128) // 16 * 16]
    )  # many alike, and of sums of quarters over 128 that are exact in any order
    arrays["y_train"] = arrays["y_train"][np.arange(128) // 16 * 16]
    np.savez(file, **arrays)
    changes = [["attack.scope=per_client"], ["attack.selection=literal"], ["clients.malicious=5"], []]
    cells = cells_of(settings, data, ["batch_size=full", "rounds=1"], changes)
    assert check_together(cells)[0].flip_count > 0


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_exactly_zero_flip_what_the_definition_flips(
    settings: Compose, small_data: Small, tmp_path: Path, classes: int
) -> None:
    target = np.zeros((1 if classes == 2 else classes, 7))
    np.savez(tmp_path / "target.npz", theta=target)
    here = [f"attack.target_path={tmp_path / 'target.npz'}", "attack.goal=targeted"]
    changes = [[*here, f"attack.selection={selection}"] for selection in ("literal", "gain")]
    literal, gain = check_together(cells_of(settings, small_data(classes), ["batch_size=40"], changes))
    assert literal.flips[0][0] == 1  # theta is zero too
    assert all(round_ > 1 for round_, _ in gain.flips)


def test_the_largest_are_taken_as_the_definition_takes_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        M, n = rng.integers(1, 6), int(rng.integers(1, 12))
        priority = torch.from_numpy(rng.integers(-2, 4, (M, n)).astype(float))
        priority[torch.from_numpy(rng.random((M, n)) < 0.2)] = -math.inf
        allowed, samples = rng.integers(0, n + 2, M), rng.permutation(n)
        order = samples.argsort()
        sorted_ = priority[:, order].masked_fill(priority[:, order] <= 0, -math.inf)
        expected = torch.empty(M, n, dtype=torch.bool)
        expected[:, order] = attack.select(sorted_, torch.zeros(n, dtype=torch.int64), torch.tensor(allowed)[:, None])
        (plan,) = kernels.selection_plans(allowed[None], n, 5e-324, torch.double)
        scratch = torch.empty(M, n, dtype=torch.double)
        counts = kernels.take_largest_(priority, plan, scratch, samples)
        assert torch.equal(priority.bool(), expected)
        assert counts.tolist() == expected.sum(1).tolist()


def test_allowances_are_those_of_the_definition_in_every_round() -> None:
    kinds = [
        {"budget": budget, "rounding": rounding} | when
        for budget in (0.0, 0.1, 0.29, 1 / 3, 0.123456789012345, 1.0)
        for rounding in ("floor", "carry", "ceil")
        for when in ({}, {"every": 3, "start": 2}, {"start": 5, "stop": 30})
    ]
    threats = [AttackSettings(name="greedy", **kind) for kind in kinds]  # type: ignore[arg-type]
    writable = np.array([[7 + i, 3] for i in range(len(threats))])
    allowances = Allowances(threats, int(writable.max()), 60)
    for round_ in range(1, 61):
        for threat, row, got in zip(threats, writable, allowances.at(round_, writable), strict=True):
            before = attack.attacked_before(round_, threat.every, threat.start, threat.stop)
            budget = Fraction(repr(threat.budget))
            for n, allowed in zip(row.tolist(), got, strict=True):
                part = 0 if before is None else attack.flip_allowance(budget, before * n, n, threat.rounding)
                assert allowed == part


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize("size", [31, 64, 120, "full"])
def test_columns_hold_what_the_schedule_gives_each_client(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch, partition: str, size: object
) -> None:
    shared = [f"batch_size={size}", f"partition={partition}", "rounds=40"]
    (cell,) = cells_of(settings, small_data(2), shared, [[]])
    monkeypatch.setattr(batches, "SAMPLES_AT_ONCE", 500)
    order, cpu = np.array([3, 1, 0, 2, 6, 5, 4]), torch.device("cpu")
    minibatches, workspace = batches.Batches(cell, order, cpu, 1e9), kernels.Workspace(cpu, torch.double)
    for round_ in (*range(1, 41), 7):
        batch = minibatches.at(round_, workspace)
        for client in order:
            columns = batch.layout.columns(client)
            samples = batch.samples[columns]
            assert samples.tolist() == cell.schedule.steps(int(client), round_)[0].tolist()
            sign = torch.from_numpy(1 - 2 * cell.dataset.y_train[samples])[:, None]
            X = cell.features(samples)[:, minibatches.features.seen] * sign
            assert torch.equal(batch.X[columns, : X.shape[1]], X)
            assert not batch.X[:, X.shape[1] :].any()


def test_rules_that_are_not_batched_are_refused(settings: Compose, small_data: Small) -> None:
    flower = ["strategy=flower", "strategy.path=flwr.serverapp.strategy.FedMedian"]
    (cell,) = cells_of(settings, small_data(2), ["batch_size=40", *flower], [[]])
    with pytest.raises(InputError, match="strategy=flower is not known to engine=batched; use engine=flower"):
        engine.run_cells([cell])
    assert engine.run_cells([]) == []
    assert kinds.kind_of(cell).goal == "untargeted"


def test_rows_are_as_narrow_as_lines_of_the_cache_allow() -> None:
    for wanted in (1, 15, 16, 17, 239, 240, 241, 255, 256, 257, 512, 785):
        allowed = (width for width in itertools.count(wanted) if width % 16 == 0 and width % 256)
        assert features.padded(wanted) == next(allowed)


def test_buffers_are_made_once_and_grow() -> None:
    workspace = kernels.Workspace(torch.device("cpu"), torch.float64)
    first = workspace.buffer("a", 2, 3)
    assert first.shape == (2, 3) and first.dtype == torch.float64
    first.fill_(7)
    assert workspace.buffer("a", 2, 3) is first
    assert (workspace.buffer("a", 6) == 7).all() and workspace.buffer("a", 4).shape == (4,)
    other = workspace.buffer("b", 2, 3).fill_(1)
    larger = workspace.buffer("a", 3, 3).fill_(5)
    assert (other == 1).all() and workspace.buffer("b", 2, 3) is other
    small = workspace.buffer("a", 2, 3)
    assert small.data_ptr() == larger.data_ptr() and (small == 5).all()  # not the one before it grew


def test_evaluations_are_every_so_many_rounds_and_at_both_ends(settings: Compose) -> None:
    chosen = settings()
    for rounds, every in ((7, 2), (6, 3), (1, 5), (10, 1)):
        one = chosen.model_copy(update={"rounds": rounds, "eval_every": every})
        wanted = {r for r in range(rounds + 1) if r % every == 0 or r == rounds}
        assert ending.evaluated_rounds(one) == wanted


def test_memory_is_that_of_samples_and_of_copies_of_parameters(settings: Compose, small_data: Small) -> None:
    (cell,) = cells_of(settings, small_data(3), ["batch_size=40"], [[]])
    values = (120 + 60) * 6  # of double precision
    assert engine.memory_of([cell]) == 8 * (values + groups.HELD * 3 * 7)
    assert engine.memory_of([cell] * 5) == 8 * (values + 5 * groups.HELD * 3 * 7)
    tight = cell.settings.engine.model_copy(update={"memory_gb": 1e-6})
    little = replace(cell, settings=cell.settings.model_copy(update={"engine": tight}))
    assert engine.memory_of([little] * 5) == int(1e-6 * 2**30)
    assert isinstance(engine.memory_of([little]), int)


def test_chunks_fit_in_memory_and_are_about_equal(settings: Compose, small_data: Small) -> None:
    (cell,) = cells_of(settings, small_data(3), ["batch_size=40", "server_optimizer=adam"], [[]])
    order, row, held = [3, 1, 4, 0, 2, 9, 8, 7, 6, 5], 1000, 500.0
    evaluations = 1 + 3 + 1  # after rounds 0, 2, 4, 6 and the last, 7
    each = 4 * row + 8 * evaluations * len(COLUMNS) + 200  # Adam's two copies, and for early stopping the best
    for fits in (1, 2, 3, 4, 9, 10, 30):
        for spare, early in ((0.5, True), (row + 0.5, False)):
            memory = held + fits * (each if early else each - row) + min(spare, 0.5)
            parts = tiling.chunks([cell] * 10, order, memory, held, row, early)
            assert [i for part in parts for i in part] == order
            assert len(parts) == math.ceil(10 / min(fits, 10))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert tiling.chunks([cell] * 10, order, held - 1, held, row, True) == [[i] for i in order]
    assert tiling.fitting(7, 2**12, "cuda") == 7
    assert tiling.fitting(7, 2**12, "cpu") == 2**23 // 2**12
    assert tiling.fitting(7, 2**22, "cpu") == tiling.FEWEST


def test_updates_are_worked_out_in_pieces_that_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_updates, "BYTES_AT_ONCE", 100)
    assert client_updates.pieces(7, 33) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert client_updates.pieces(4, 25) == [slice(0, 4)]
    assert client_updates.pieces(2, 101) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("size", [1000, 50])
def test_allowances_go_on_where_they_stopped(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(budgets, "NUMBERS_AHEAD", size)
    ways = [{"rounding": rounding, "every": every} for rounding in ("floor", "carry", "ceil") for every in (1, 3)]
    shares = [0.123456789012345, 0.5] * 3  # the first of them is beyond what 64 bits hold
    threats = [AttackSettings(name="greedy", budget=b, **way) for b, way in zip(shares, ways, strict=True)]  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    by_round = np.repeat(rng.integers(0, 2**40, (9, len(threats), 2)), 7, axis=0)  # as many seven times in a row
    whole, parts = Allowances(threats, 2**40, 63), Allowances(threats, 2**40, 63)
    taken = np.zeros((len(threats), 2), object)
    for round_, writable in enumerate(by_round, 1):
        found = whole.at(round_, writable)
        if round_ % 5 == 0:
            kept, parts = parts.past(round_), Allowances(threats, 2**40, 63)
            parts.restore(round_, kept)
        assert np.array_equal(parts.at(round_, writable), found)
        taken += found
    for threat, total, n in zip(threats, taken, by_round.transpose(1, 2, 0), strict=True):
        if threat.rounding == "carry":  # nothing is lost, and nothing is too much
            attacked = n[:, :: threat.every].astype(object).sum(1)
            assert total.tolist() == [math.floor(Fraction(repr(threat.budget)) * count) for count in attacked]


@pytest.mark.parametrize("when", [{"start": 2}, {"stop": 4}, {"every": 2}, {}])
def test_nothing_is_allowed_in_rounds_without_attack(when: dict[str, int]) -> None:
    threat, always = AttackSettings(name="greedy", budget=0.5, **when), AttackSettings(name="greedy", budget=0.5)  # type: ignore[arg-type]
    rounds = range(when.get("start", 1), when.get("stop", 6) + 1, when.get("every", 1))
    for threats in ([threat], [threat, always]):  # by itself and beside another
        allowances = Allowances(threats, 8, 6)
        writable = np.full((len(threats), 1), 8)
        found = [allowances.at(round_, writable)[0, 0] for round_ in range(1, 7)]
        assert found == [4 if round_ in rounds else 0 for round_ in range(1, 7)]


def test_rows_are_sorted_side_by_side_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 40))
    asked: list[int] = []
    monkeypatch.setattr(kernels, "pool", lambda number: asked.append(number) or threads.pool(number))
    torch.set_num_threads(3)
    for worth, used in ((1, 3), (90, 2), (101, None), (201, None)):
        monkeypatch.setattr(kernels, "SORTED_BY_A_THREAD", worth)
        asked.clear()
        ours = rows.copy()
        kernels.sort_rows_(ours)
        assert np.array_equal(ours, np.sort(rows, -1))
        assert asked == ([] if used is None else [used])
    torch.set_num_threads(1)
    assert threads.pool(3) is threads.pool(3)


def test_small_rounds_wake_no_thread(settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells_of(settings, small_data(3), ["batch_size=40"], [[]])
    torch.set_num_threads(2)
    multiplications = 5 * 3 * 7 * int(cell.schedule.sizes.sum())
    for worth, used in ((multiplications + 1, 1), (multiplications, 2)):
        monkeypatch.setattr(run, "WORTH_THREADS", worth)
        with run._threads([cell] * 5):
            assert torch.get_num_threads() == used
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_time_of_cells_is_shared_by_them(
    settings: Compose, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = [50.0], []

    def progress(rounds: int) -> None:
        clock[0] += 6

    def watch(numbers: list[int], so_far: Callable[[], list[engine.Outcome]]) -> None:
        seen.append([outcome.seconds for outcome in so_far()])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    linear_cells = cells_of(settings, small_data(3), ["batch_size=40", "rounds=3"], [[], ["lr=0.1"], ["lr=1"]])
    mlp = ["model.name=mlp", "model.args={widths: [4]}"]
    networks = engine.make_scenarios([changed(cell.settings, mlp) for cell in linear_cells])
    for cells, full_rows in ((linear_cells, True), (networks, False)):
        found = engine.run_cells(cells, progress=progress, watch=watch, full_rows=full_rows)
        assert [outcome.seconds for outcome in found] == [6.0] * 3  # three rounds of six seconds, by three
        assert seen == [[2.0] * 3, [4.0] * 3, [6.0] * 3]
        seen.clear()
    half = replace(networks[0], settings=networks[0].settings.model_copy(update={"rounds": 2}))
    first = sequential.run(half, progress=progress, checkpoint=Checkpoint(tmp_path, "key"))
    assert first.seconds == 12
    kept = Checkpoint(tmp_path, "key").load()
    assert kept is not None and kept["recorder"]["seconds"] == 12
    clock[0] += 1000
    parts: list[float] = []
    rest = sequential.run(
        networks[0],
        progress=progress,
        watch=lambda so_far: parts.append(so_far().seconds),
        checkpoint=Checkpoint(tmp_path, "key"),
    )
    assert rest.seconds == 18 and parts == [18]


class Fixed:
    """A validation split on which these are the losses."""

    def __init__(self, *losses: list[float]) -> None:
        self.losses = iter(losses)

    def quality(self, theta: torch.Tensor) -> np.ndarray:
        return np.array([[0.5, 0.5, loss] for loss in next(self.losses)])


@pytest.mark.parametrize("interrupted", [False, True])
def test_each_cell_stops_for_itself_and_gives_its_best(settings: Compose, small_data: Small, interrupted: bool) -> None:
    restore = ["early_stop.patience=2", "early_stop.restore=last"]
    changes = [["early_stop.patience=2"], restore, ["early_stop.patience=3"], ["early_stop.patience=1"]]
    cells = cells_of(settings, small_data(2), ["batch_size=40", "early_stop.patience=2"], changes)
    losses = [[3, 3, 3, math.nan], [2, 2, 4, math.nan], [2, 2, 4, 9], [2.5, 3, 2, 9], [1, 1, 2, 9], [1, 1, 2, 9]]
    split = Fixed(*losses)
    rows = [torch.full((4, 3), float(round_)) for round_ in range(6)]
    for theta in rows:
        theta[3] = math.nan  # has diverged
    stop = stopping.Stopping(cells, split, rows[0] - 1)
    ended = []
    for round_, theta in enumerate(rows):
        ended.append(stop.note(round_, stop.losses(theta), theta, np.full(4, 10 * round_)))
        if interrupted:
            kept = {name: part.clone() if torch.is_tensor(part) else part.copy() for name, part in stop.state().items()}
            stop = stopping.Stopping(cells, split, rows[0] - 1)
            stop.restore(kept)
    assert stop.over.tolist() == [True, True, False, False]
    assert stop.rounds.tolist() == [3, 3, 7, 7]
    assert stop.flips.tolist() == [30, 30, 50, 50]
    assert stop.given[:3, 0].tolist() == [1, 3, 3]  # the lowest first met; the last; the lowest
    assert ended == [False] * 6
    assert stop.note(6, np.array([1, 1, 2, 9]), rows[5], np.full(4, 60))  # the third, too, and the fourth has diverged
    assert stop.rounds.tolist() == [3, 3, 6, 7]
    assert stop.flips.tolist() == [30, 30, 60, 60]


def test_data_are_read_once_and_verified_where_asked(
    settings: Compose, small_data: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    load = groups.data.load
    monkeypatch.setattr(groups.data, "load", lambda *, verify, **how: (read.append(verify), load(**how))[1])
    base = settings(*small_data(3), *COMMON, "batch_size=40")
    chosen = [changed(base, [change]) for change in ("lr=1", "seed=1", "attack.budget=0.1", "clients.malicious=2")]
    cells = engine.make_scenarios(chosen, verify=False)
    assert read == [False]
    assert engine.make_scenarios(chosen[:1]) and read == [False, True]
    assert [cell.settings for cell in cells] == [scenario.of(one, cells[0].dataset).settings for one in chosen]
    assert cells[0].partition is cells[2].partition and cells[0].schedule is cells[2].schedule
    assert cells[0].partition is not cells[1].partition and cells[0].partition is not cells[3].partition
    assert len({id(cell.dataset) for cell in cells}) == 1


def test_targets_are_multiplied_with_the_minibatch_where_there_are_many(
    settings: Compose, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, changes = np.random.default_rng(0), []
    for name in ("one", "other"):
        np.savez(tmp_path / f"{name}.npz", theta=rng.normal(size=(3, 7)))
        changes.append(["attack.goal=targeted", "rounds=3", f"attack.target_path={tmp_path / name}.npz"])
    cells = cells_of(settings, small_data(3), ["batch_size=40"], changes)
    once = engine.run_cells(cells)
    monkeypatch.setattr(linear_targets, "TARGETS_KEPT", 5)  # rows; there are six
    for one, other in zip(engine.run_cells(cells), once, strict=True):
        check_same(one, other.history(), 1e-12)


def test_a_checkpoint_of_other_company_is_left_aside(tmp_path: Path) -> None:
    ours = run.Kept(Checkpoint(tmp_path, "last"), ["a", "b"])
    assert ours.load() is None
    ours.save({"round": 3})
    assert ours.load() == {"round": 3}
    assert run.Kept(Checkpoint(tmp_path, "last"), ["b", "a"]).load() is None


def report(flips: list[tuple[int, int, int]], allowed: list[int], **measured: torch.Tensor) -> log.Report:
    """What cells did in a round, given cell, column and label of each flip."""
    change = Change(*torch.tensor(flips, dtype=torch.int64).view(-1, 3).T)
    return log.Report(change, np.array(allowed), measured.get("cosine"), measured.get("detection"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_rows_say_what_was_flipped_again_and_to_what(interrupted: bool) -> None:
    def minibatch(*samples: int) -> SimpleNamespace:
        return SimpleNamespace(samples=np.array(samples))

    def after(last: list[int], allowed: list[int]) -> list[SimpleNamespace]:
        schedule = SimpleNamespace(labels_used=lambda round_: 10 * round_)
        parts = [SimpleNamespace(cell=SimpleNamespace(schedule=schedule))] * 2
        return [
            SimpleNamespace(**vars(part), last=np.array(last[at]), allowed=np.array(allowed[at]))
            for part, at in zip(parts, (slice(0, 2), slice(2, 3)), strict=True)
        ]

    def row(cell: int) -> dict[str, float]:
        return dict(zip(COLUMNS, noted.table(cell, 9)[-1].tolist(), strict=True))

    noted = log.Log(3, 100, keep_flips=True, full_rows=True)
    quality = np.arange(9.0).reshape(3, 3)
    noted.measure(0, quality, math.nan)
    # two tiles, of cells 0 and 1, and of cell 2
    noted.watch(1, 0, minibatch(40, 7, 9), report([(1, 0, 2), (0, 1, 1), (0, 0, 0), (1, 2, 0)], [5, 2]))
    noted.watch(1, 2, minibatch(40, 7, 9), report([(0, 1, 1)], [1]))
    if interrupted:
        kept, noted = noted.state(), log.Log(3, 100, keep_flips=True, full_rows=True)
        noted.restore(kept)
    cosine, detection = torch.tensor([0.25, 0.5]), torch.ones(2, len(MEASURES))
    noted.watch(
        2,
        0,
        minibatch(9, 7, 40),
        report([(0, 1, 2), (0, 2, 0), (0, 0, 0), (1, 2, 2)], [4, 2], cosine=cosine, detection=detection),
    )
    noted.watch(2, 2, minibatch(9, 7, 40), report([], [0]))
    noted.measure(2, quality, np.array([0.1, 0.2, 0.3]), after([3, 1, 0], [4, 2, 0]))  # type: ignore[arg-type]
    first, second, third = (row(cell) for cell in range(3))
    assert (first["round"], first["test_accuracy"], third["test_accuracy"]) == (2, 0, 6)
    assert (first["repeated"], first["relabelled"]) == (2 / 3, 1 / 3)  # samples 7 and 40, of which 7 to another label
    assert (second["repeated"], second["relabelled"]) == (1, 0)
    assert (third["repeated"], third["relabelled"], third["flips"], third["budget_used"]) == (0, 0, 0, 0)
    assert (first["flips"], first["new_flips"], first["allowed"], first["budget_used"]) == (3, 3, 4, 0.75)
    assert (first["effective_budget"], second["effective_budget"]) == (3 / 20, 1 / 20)
    assert (first["cosine"], second["cosine"], first[MEASURES[0]]) == (0.25, 0.5, 1)
    assert math.isnan(third["cosine"]) and math.isnan(third[MEASURES[0]])
    assert [row(cell)["validation_loss"] for cell in range(3)] == [0.1, 0.2, 0.3]
    flips = [
        [(round_, one.samples.tolist(), one.labels.tolist(), one.allowed) for round_, one in noted.flips(i, 9)]
        for i in range(3)
    ]
    assert flips == [
        [(1, [7, 40], [1, 0], 5), (2, [7, 9, 40], [2, 0, 0], 4)],
        [(1, [9, 40], [0, 2], 2), (2, [40], [2], 2)],
        [(1, [7], [1], 1)],
    ]
    assert [round_ for round_, _ in noted.flips(0, 1)] == [1] and len(noted.table(0, 1)) == 1
