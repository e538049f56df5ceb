"""Many experiments of a linear model at once: chunks of cells that fit in memory, in blocks that fit in the cache."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fl_attack import aggregate
from fl_attack.checkpoint import Checkpoint, State
from fl_attack.engine import ending
from fl_attack.engine.batches import Batches
from fl_attack.engine.kernels import Workspace
from fl_attack.engine.linear import tiling
from fl_attack.engine.linear.block import blocks_of
from fl_attack.engine.linear.measure import MeasuredSamples
from fl_attack.engine.linear.shared import shared_by
from fl_attack.engine.linear.targets import Targets
from fl_attack.engine.linear.tile import Tile
from fl_attack.engine.log import Log
from fl_attack.engine.outcome import OnRounds, Outcome, Watch
from fl_attack.engine.stopping import Stopping
from fl_attack.scenario import Scenario

WORTH_THREADS = 2e7  # multiplications of a product


def run_cells(
    scenarios: Sequence[Scenario],
    *,
    device: str,
    memory_gb: float,
    progress: OnRounds,
    watch: Watch,
    keep_flips: bool,
    keep_theta: bool,
    full_rows: bool,
    checkpoints: Sequence[Checkpoint] = (),
) -> list[Outcome]:
    """The outcomes of cells of a linear model, whose clients have no momentum.

    Where all of them fit in memory together, the last of `checkpoints` is that of them all; else none is used.

    Parameters
    ----------
    scenarios, device, memory_gb, progress, watch, keep_flips, keep_theta, full_rows, checkpoints
        As `engine.run_cells` takes them.

    Returns
    -------
    list of Outcome
        In the order of the cells.
    """
    with _threads(scenarios):
        work = Work(scenarios, torch.device(device), memory_gb * 2**30, keep_flips, keep_theta, full_rows)
        outcomes: dict[int, Outcome] = {}
        chunks = work.chunks()
        kept = Kept(checkpoints[-1], [one.key for one in checkpoints]) if checkpoints and len(chunks) == 1 else None
        for chunk in chunks:
            outcomes |= zip(chunk, Chunk(work, chunk).run(progress, watch, kept), strict=True)
    return [outcomes[i] for i in range(len(scenarios))]


@contextmanager
def _threads(scenarios: Sequence[Scenario]) -> Iterator[None]:
    """Within the block torch uses one thread if a round is too small for more: to wake them can take milliseconds."""
    C, d = scenarios[0].theta_shape
    multiplications = len(scenarios) * C * d * int(scenarios[0].schedule.sizes.sum())
    before = torch.get_num_threads()
    try:
        if multiplications < WORTH_THREADS:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


class Kept:
    """The checkpoint of cells that run together."""

    def __init__(self, checkpoint: Checkpoint, cells: list[str]) -> None:
        """`cells` are the keys of all the cells, since in other company their numbers differ in the last digit."""
        self.checkpoint, self.cells = checkpoint, cells

    def labelled(self, state: State) -> State:
        """A state with the keys of the cells that it is of."""
        return {"cells": self.cells, "chunk": state}

    def save(self, state: State) -> None:
        """Save the state of these cells."""
        self.checkpoint.save(self.labelled(state))

    def load(self) -> State | None:
        """The state of these cells; None where there is none, or one of other cells."""
        found = self.checkpoint.load()
        if found is None or found.get("cells") != self.cells:
            return None
        state: State = found["chunk"]
        return state


class Work:
    """The cells of one call, what all of them share, and what is to be kept of them."""

    def __init__(
        self,
        cells: Sequence[Scenario],
        device: torch.device,
        memory: float,
        keep_flips: bool,
        keep_theta: bool,
        full_rows: bool,
    ) -> None:
        """`memory` is in bytes, and `keep_flips` and the others are as `engine.run_cells` takes them."""
        self.cells, self.device, self.memory = cells, device, memory
        self.keep_flips, self.keep_theta, self.full_rows = keep_flips, keep_theta, full_rows
        total = cells[0].settings.clients.total
        counts = sum(np.bincount(cell.partition.malicious, minlength=total) for cell in cells)
        clients = np.argsort(-np.asarray(counts), kind="stable")
        sends_updates = any(cell.settings.attacked and cell.settings.attack.writes == "updates" for cell in cells)
        noisy = any("noise" in aggregate.needs(cell.settings.strategy.name) for cell in cells)
        self.batches = Batches(cells[0], clients, device, memory / 2, every_feature=sends_updates or noisy)
        dataset, split = cells[0].dataset, cells[0].partition.validation
        self.test_set = MeasuredSamples(self.batches, dataset.x_test, dataset.y_test)
        self.validation = (
            MeasuredSamples(self.batches, dataset.x_train[split], dataset.y_train[split]) if len(split) else None
        )
        self.targets = Targets(cells, self.batches)

    @property
    def theta_bytes(self) -> int:
        """Bytes of the parameters of a cell."""
        return self.cells[0].theta_shape[0] * self.batches.features.d * self.batches.dtype.itemsize

    def chunks(self) -> list[list[int]]:
        """The numbers of the cells in the order in which they are run, as many at a time as fit in memory."""
        C, d = self.cells[0].theta_shape
        held = self.batches.bytes + self.test_set.X.nbytes + (self.validation.X.nbytes if self.validation else 0)
        held += len(self.cells) * C * d * self.batches.dtype.itemsize * self.keep_theta
        order = tiling.order(self.cells, self.targets.number)
        return tiling.chunks(self.cells, order, self.memory, held, self.theta_bytes, self.validation is not None)


class Chunk:
    """Cells that are in memory together, and how far they are."""

    def __init__(self, work: Work, numbers: list[int]) -> None:
        """`numbers` are those of the cells among all of `work`."""
        self.work, self.numbers, self.cells = work, numbers, [work.cells[i] for i in numbers]
        self.settings = self.cells[0].settings
        batches, C, M = work.batches, self.cells[0].theta_shape[0], len(numbers)
        self.theta = torch.zeros(M * C, batches.features.d, dtype=batches.dtype, device=work.device)
        fits = tiling.fitting(M, work.theta_bytes, work.device.type)
        self.cuts = tiling.tiles(self.cells, fits)
        self.tiles = [
            Tile(self.cells[at], batches, self.theta[at.start * C : at.stop * C], work.targets.of(numbers[at]))
            for at in self.cuts
        ]
        self.attackers = [tile.attackers for tile in self.tiles]
        self.blocks = blocks_of(self.tiles, self.theta, fits)
        self.log = Log(M, len(batches.y), work.keep_flips, work.full_rows)
        early = work.validation
        self.stopping = None if early is None else Stopping(self.cells, early, self.theta)
        self.workspace = Workspace(work.device, batches.dtype)
        self.evaluated = ending.evaluated_rounds(self.settings)
        self.began = time.perf_counter()

    def run(self, progress: OnRounds, watch: Watch, kept: Kept | None = None) -> list[Outcome]:
        """The outcomes of the cells after all rounds.

        Parameters
        ----------
        progress : callable
            Called with how many more rounds are done, summed over the cells; those of `kept`, or after an early end,
            count.
        watch : callable
            Gets after each round the numbers of the cells, and a function that gives their outcomes so far.
        kept : Kept, optional
            The checkpoint of the cells: rounds that it holds are not done again.

        Returns
        -------
        list of Outcome
            In the order of the cells.
        """
        done, ended = 0, False
        if kept is not None and (state := kept.load()) is not None:
            done = self.restore(state)
            progress(len(self.cells) * done)
        else:
            ended = self.measure(0)
        for round_ in range(done + 1, self.settings.rounds + 1):
            self.step(round_)
            if round_ in self.evaluated:
                ended = self.measure(round_)
            progress(len(self.cells) * (self.settings.rounds - round_ + 1 if ended else 1))
            try:
                watch(self.numbers, lambda: self.outcomes(ended=False))
            except KeyboardInterrupt:
                if kept is not None and not ended:
                    kept.save(self.state(round_))
                raise
            if ended:
                break
            if kept is not None:
                kept.checkpoint.offer(lambda round_=round_: kept.labelled(self.state(round_)))  # type: ignore[misc]
        return self.outcomes(ended=True)

    def state(self, round_: int) -> State:
        """The state that `restore` needs to go on after a round."""
        return {
            "round": round_,
            "seconds": time.perf_counter() - self.began,
            "theta": self.theta,
            "optimizers": [block.optimizer.state() for block in self.blocks],
            "tiles": [tile.state(round_) for tile in self.tiles],
            "log": self.log.state(),
            "stopping": self.stopping and self.stopping.state(),
        }

    def restore(self, state: State) -> int:
        """Go back to a state that `state` gave; gives the round after which it was."""
        round_: int = state["round"]
        self.began = time.perf_counter() - state["seconds"]
        self.theta.copy_(state["theta"])
        for block, of_block in zip(self.blocks, state["optimizers"], strict=True):
            block.optimizer.restore(of_block)
        for tile, of_tile in zip(self.tiles, state["tiles"], strict=True):
            tile.restore(of_tile, round_)
        self.log.restore(state["log"])
        if self.stopping is not None:
            self.stopping.restore(state["stopping"])
        return round_

    def step(self, round_: int) -> None:
        """Run a round of all cells."""
        batch = self.work.batches.at(round_, self.workspace)
        accesses = [tile.attackers.access(round_, batch.layout) for tile in self.tiles]
        asking = [(tile.attackers, access) for tile, access in zip(self.tiles, accesses, strict=True)]
        shared = shared_by(asking, round_, batch, self.work.targets, self.workspace)
        measured = self.work.full_rows and round_ in self.evaluated
        before_one = self.work.full_rows and round_ + 1 in self.evaluated
        watched = self.work.keep_flips or measured or before_one
        place = 0
        for block in self.blocks:
            of_block = slice(place, place + len(block.tiles))
            reports = block.step(shared, accesses[of_block], self.workspace, watched, measured)
            for cut, report in zip(self.cuts[of_block], reports, strict=True):
                if report is not None:
                    self.log.watch(round_, cut.start, batch, report)
            place = of_block.stop

    def measure(self, round_: int) -> bool:
        """Note how good the cells are after a round; gives whether none need go on, see `ending.measure`."""
        return ending.measure(round_, self.theta, self.work.test_set, self.log, self.attackers, self.stopping)

    def outcomes(self, ended: bool) -> list[Outcome]:
        """The outcomes of all cells, as `ending.outcomes` gives them; so far, where they have not `ended`."""
        whole = self.work.batches.features.restore if self.work.keep_theta else None
        seconds = time.perf_counter() - self.began
        return ending.outcomes(self.cells, self.theta, whole, self.log, self.attackers, self.stopping, seconds, ended)
