"""Many experiments of a linear model at once: chunks of cells that fit in memory, in blocks that fit in the cache."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import targets
from fl_attack.engine import ending
from fl_attack.engine.attackers import Kind, kind_of
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.kernels import Workspace
from fl_attack.engine.linear.block import Block
from fl_attack.engine.linear.measure import Samples
from fl_attack.engine.linear.tile import Shared, Tile
from fl_attack.engine.log import Log
from fl_attack.engine.outcome import Outcome
from fl_attack.engine.stopping import Stopping
from fl_attack.history import COLUMNS
from fl_attack.scenario import Scenario

Progress = Callable[[int], None]
Watch = Callable[[list[int], Callable[[], list[Outcome]]], None]
CACHE = 2**23  # bytes of parameters in a block
TARGETS_KEPT = 64  # rows of targets of which the logits of all samples are worked out once
WORTH_THREADS = 2e7  # multiplications of a product
COPIES = {"sgd": 1, "momentum": 2, "adam": 3}  # of the parameters, that an optimizer keeps
FEWEST = 128  # cells a tile, where there are as many, before another set of attackers gets its own


def run_cells(
    scenarios: Sequence[Scenario],
    *,
    device: str,
    memory_gb: float,
    progress: Progress,
    watch: Watch,
    keep_flips: bool,
    keep_theta: bool,
    full_rows: bool,
) -> list[Outcome]:
    """The outcomes of cells of a linear model, whose clients have no momentum, as `engine.run_cells` gives them."""
    with _threads(scenarios):
        work = _Work(scenarios, torch.device(device), memory_gb * 2**30, keep_flips, keep_theta, full_rows)
        outcomes: dict[int, Outcome] = {}
        for chunk in work.chunks():
            outcomes |= zip(chunk, work.run(chunk, progress, watch), strict=True)
    return [outcomes[i] for i in range(len(scenarios))]


@contextmanager
def _threads(scenarios: Sequence[Scenario]) -> Iterator[None]:
    """One thread where a round is too small to be worth waking others, which takes milliseconds on a busy machine."""
    C, d = scenarios[0].theta_shape
    multiplications = len(scenarios) * C * d * int(scenarios[0].schedule.sizes.sum())
    before = torch.get_num_threads()
    try:
        if multiplications < WORTH_THREADS:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _tile_key(cell: Scenario) -> tuple[tuple[Any, ...], Kind, str, int]:
    """The key of the cells that can be in one tile: how the server steps, the attack, and the rule."""
    settings = cell.settings
    strategy, training = settings.strategy, _training(cell)
    if strategy.averages:
        return training, kind_of(cell).tile_key, "", 0
    return training, kind_of(cell).tile_key, strategy.model_dump_json(), settings.assumed_malicious


def _training(cell: Scenario) -> tuple[Any, ...]:
    """The key of the cells that can be in one block: how the server steps; rates may differ, their schedule may not."""
    settings = cell.settings
    return settings.server_optimizer, settings.lr_schedule, settings.lr_every or 0, settings.lr_decay


def _same_attackers(cell: Scenario, other: Scenario) -> bool:
    """Whether the same clients are malicious in two cells of a tile, and want the same."""
    same = np.array_equal(cell.partition.malicious, other.partition.malicious)
    return same and kind_of(cell) == kind_of(other)


def _share_a_block(tile: Tile, other: Tile) -> bool:
    """Whether two tiles can be stepped as one block: under one optimizer, of which neither needs client updates."""
    return tile.training == other.training and not (tile.needs_client_updates or other.needs_client_updates)


class _Targets(NamedTuple):
    """The different targets of the cells, and which of them each cell has."""

    theta: Tensor  # (T C, d)
    number: NDArray[np.int64]  # by cell


class _Work:
    """The cells of one call, and what all of them share."""

    def __init__(
        self,
        cells: Sequence[Scenario],
        device: torch.device,
        memory: float,
        keep_flips: bool,
        keep_theta: bool,
        full_rows: bool,
    ) -> None:
        self.cells, self.device, self.memory = cells, device, memory
        self.keep_flips, self.keep_theta, self.full_rows = keep_flips, keep_theta, full_rows
        self.settings = cells[0].settings
        total = self.settings.clients.total
        counts = sum(np.bincount(cell.partition.malicious, minlength=total) for cell in cells)
        clients = np.argsort(-np.asarray(counts), kind="stable")
        crafted = any(cell.settings.attacked and cell.settings.attack.writes == "updates" for cell in cells)
        self.batches = Batches(cells[0], clients, device, memory / 2, every_feature=crafted)
        dataset, split = cells[0].dataset, cells[0].partition.validation
        self.test_set = Samples(self.batches, dataset.x_test, dataset.y_test)
        self.validation = Samples(self.batches, dataset.x_train[split], dataset.y_train[split]) if len(split) else None
        self.targets = self._targets()
        self._logits_of_all: Tensor | None = None

    def chunks(self) -> Iterator[list[int]]:
        """The cells in the order in which they are run, as many at a time as fit in memory."""
        numbers = self.targets.number

        def sort_key(i: int) -> tuple[object, ...]:
            cell = self.cells[i]
            threat, malicious = cell.settings.attack, cell.partition.malicious
            wanted = threat.goal, threat.selection
            return (
                *_tile_key(cell),
                *wanted,
                len(malicious),
                malicious.tolist(),
                numbers[i],
                cell.settings.lr,
                threat.budget,
            )

        order = sorted(range(len(self.cells)), key=sort_key)
        C, d = self.cells[0].theta_shape
        held = self.batches.bytes + self.test_set.X.nbytes + (self.validation.X.nbytes if self.validation else 0)
        held += len(self.cells) * C * d * self.batches.dtype.itemsize * self.keep_theta
        copies = max(COPIES[cell.settings.server_optimizer] for cell in self.cells) + bool(self.validation)
        each = C * self.batches.d * self.batches.dtype.itemsize * copies
        each += 8 * len(ending.evaluated_rounds(self.settings)) * len(COLUMNS) + 200
        size = max(1, int(min((self.memory - held) / each, len(order))))
        pieces = -(-len(order) // size)
        for piece in np.array_split(np.array(order), pieces):
            yield piece.tolist()

    def run(self, chunk: list[int], progress: Progress, watch: Watch) -> list[Outcome]:
        """The outcomes of the cells of a chunk after all rounds, in their order."""
        began = time.perf_counter()
        cells = [self.cells[i] for i in chunk]
        C, d = cells[0].theta_shape[0], self.batches.d
        theta = torch.zeros(len(cells) * C, d, dtype=self.batches.dtype, device=self.device)
        cuts = self._cuts(cells)
        tiles = [
            Tile(cells[start:end], self.batches, theta[start * C : end * C], self._target_of(chunk[start:end]))
            for start, end in cuts
        ]
        blocks = self._blocks(tiles, theta)
        log = Log(len(cells), len(self.batches.y), self.keep_flips, self.full_rows)
        stopping = None if self.validation is None else Stopping(cells, self.validation, theta)
        ended = self._measure(0, theta, log, stopping)
        evaluated, workspace = ending.evaluated_rounds(self.settings), Workspace(self.device, self.batches.dtype)

        def outcomes(ended: bool) -> list[Outcome]:
            flips = np.concatenate([tile.attackers.flips for tile in tiles])
            whole = self.batches.restore_features if self.keep_theta else None
            seconds = time.perf_counter() - began
            return ending.outcomes(cells, theta, whole, log, flips, stopping, seconds, ended)

        for round_ in range(1, self.settings.rounds + 1):
            shared = self._shared(round_, tiles, workspace)
            evaluates = round_ in evaluated
            measured = self.full_rows and evaluates
            watched = self.keep_flips or measured or (self.full_rows and round_ + 1 in evaluated)
            by_block = (block.step(shared, workspace, watched, measured) for block in blocks)
            reports = itertools.chain.from_iterable(by_block)
            for (start, _), report in zip(cuts, reports, strict=True):
                if report is not None:
                    log.watch(round_, start, shared.batch, report)
            if evaluates:
                ended = self._measure(round_, theta, log, stopping, tiles)
            progress(len(cells) * (self.settings.rounds - round_ + 1 if ended else 1))
            watch(chunk, lambda: outcomes(ended=False))
            if ended:
                break
        return outcomes(ended=True)

    def _measure(
        self, round_: int, theta: Tensor, log: Log, stopping: Stopping | None, tiles: Sequence[Tile] = ()
    ) -> bool:
        """Note how good the cells are after a round; gives whether all have stopped early."""
        losses = stopping.losses(theta) if stopping else np.nan
        log.measure(round_, self.test_set.quality(theta), losses, tiles)
        if stopping is None:
            return False
        flips = np.concatenate([tile.attackers.flips for tile in tiles]) if tiles else np.zeros(log.M, np.int64)
        return stopping.note(round_, np.asarray(losses), theta, flips)

    def _cuts(self, cells: list[Scenario]) -> list[tuple[int, int]]:
        """Where tiles begin and end: at another kind of attack, once there are enough at other attackers, when full."""
        fits = self._fits(len(cells))
        cuts: list[tuple[int, int]] = []
        start = 0
        for end in range(1, len(cells) + 1):
            goes_on = end < len(cells) and _tile_key(cells[end]) == _tile_key(cells[start])
            if goes_on and (end - start < FEWEST or _same_attackers(cells[end], cells[end - 1])):
                continue
            pieces = -(-(end - start) // fits)
            edges = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
            cuts += itertools.pairwise(edges)
            start = end
        return cuts

    def _fits(self, cells: int) -> int:
        """The number of cells, of this many, that a block may have."""
        if self.device.type != "cpu":
            return cells
        return max(FEWEST, CACHE // (self.cells[0].theta_shape[0] * self.batches.d * self.batches.dtype.itemsize))

    def _blocks(self, tiles: Sequence[Tile], theta: Tensor) -> list[Block]:
        """The blocks of consecutive tiles of one optimizer, as many together as fit."""
        together: list[list[Tile]] = []
        fits = self._fits(sum(tile.M for tile in tiles))
        for tile in tiles:
            last = together[-1] if together else []
            if last and _share_a_block(last[-1], tile) and sum(other.M for other in last) + tile.M <= fits:
                last.append(tile)
            else:
                together.append([tile])
        rows = theta.split([sum(len(tile.theta) for tile in some) for some in together])
        return [Block(some, part) for some, part in zip(together, rows, strict=True)]

    def _shared(self, round_: int, tiles: Sequence[Tile], workspace: Workspace) -> Shared:
        """What the tiles share in a round: the minibatch, and the products that serve several of them."""
        batch = self.batches.at(round_, workspace)
        for tile in tiles:
            tile.prepare(round_, batch.layout)
        gram = target_logits = None
        if aware := [tile for tile in tiles if tile.scored_columns("untargeted")]:
            n = max(tile.scored_columns("untargeted") for tile in aware)
            rows = sum(tile.C * tile.seeking["untargeted"] for tile in aware)
            if self._gram_pays(batch, n, rows):
                gram = torch.mm(batch.X, batch.X[:n].mT, out=workspace.buffer("gram", len(batch.X), n))
        if aimed := [tile for tile in tiles if tile.scored_columns("targeted")]:
            n, C = max(tile.scored_columns("targeted") for tile in aimed), aimed[0].C
            target_logits = self._target_logits(batch, n).view(-1, C, n)
        return Shared(round_, batch, gram, target_logits, self.targets.theta)

    def _target_logits(self, batch: Batch, n: int) -> Tensor:
        """Logits of the targets on the first n columns, (T C, n)."""
        if self.batches.resident is None or len(self.targets.theta) > TARGETS_KEPT:
            return torch.mm(self.targets.theta, batch.X[:n].mT)
        if self._logits_of_all is None:  # those of all samples, once
            self._logits_of_all = torch.mm(self.targets.theta, self.batches.resident.mT)
        return self._logits_of_all.index_select(1, self.batches.row[batch.at[:n]].to(self.device))

    def _gram_pays(self, batch: Batch, n: int, rows: int) -> bool:
        """Whether inner products of n samples with all cost less than `rows` products with the features."""
        # multiplications: once for the matrix and once for each row, or there and back through the features
        size, d = batch.X.shape
        return size * n * (d + rows) < rows * d * (size + n)

    def _targets(self) -> _Targets:
        """The targets of all targeted cells, each different one once."""
        aimed: dict[object, Scenario] = {}
        keys: list[object] = []
        for cell in self.cells:
            settings = cell.settings
            trained = settings.attack.target_path, _training(cell), settings.lr, settings.weight_decay
            key = trained if kind_of(cell).goal == "targeted" else None
            keys.append(key)
            if key is not None:
                aimed.setdefault(key, cell)
        thetas = [self.batches.drop_features(theta) for theta in targets.load_targets(list(aimed.values()))]
        theta = torch.cat([torch.empty(0, self.batches.d), *thetas]).to(self.device, self.batches.dtype)
        place = {key: i for i, key in enumerate(aimed)}
        return _Targets(theta, np.array([place.get(key, -1) for key in keys]))

    def _target_of(self, chunk: list[int]) -> Tensor | None:
        """The number (M,) of the target of each cell of a chunk; None where there is only one."""
        number = torch.from_numpy(self.targets.number[chunk]).to(self.device)
        return None if len(self.targets.theta) == self.cells[0].theta_shape[0] else number
