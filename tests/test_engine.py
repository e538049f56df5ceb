"""The batched engine: the trajectory of each experiment alone, flip by flip, however many run beside it."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from elsewhere import elsewhere, is_there

from fl_attack import adversary, attack, engine, plugins, protocol
from fl_attack.aggregate import RULES
from fl_attack.config import AttackSettings, Settings, settings_from
from fl_attack.detect import MEASURES
from fl_attack.engine import batches, features, kernels, kinds, threads
from fl_attack.engine.budgets import Allowances
from fl_attack.engine.linear import client_updates, run, tiling
from fl_attack.errors import InputError
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
    cells = cells_of(settings, small_data(classes), [*shared, "rounds=2"], [[], *changes])
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
