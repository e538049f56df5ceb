"""Many experiments of dense layers at once: their parameters in one stack, over the minibatches that they share.

What all cells share is done once: the samples, and the products of the first layer, where most of the work is. The
direction of an untargeted attack is never spelled out in that layer: with `v = D^T X` for residuals D of the layer,
`X v^T = (X X^T) D`, a small matrix of inner products.

Shapes: M cells, n samples, C classes, P parameters, T targets; activations are (M, n, width).
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import adversary, knowledge, targets
from fl_attack.engine import choices, ending, groups, kernels, sequential
from fl_attack.engine.access import RoundAccess
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.batches import Batch, Batches
from fl_attack.engine.choices import Change, no_change
from fl_attack.engine.kinds import kind_of
from fl_attack.engine.linear import tiling
from fl_attack.engine.log import Log, Report
from fl_attack.engine.outcome import OnRounds, Outcome, Watch
from fl_attack.engine.stopping import Stopping
from fl_attack.models import Mlp
from fl_attack.models.networks import shared_product
from fl_attack.scenario import Scenario

# Cells in a stack, measured with scripts/bench_models.py: on a CPU more of them no longer fit its cache.
CELLS = {"cpu": 32, "cuda": 512}
COPIES = 6  # of the parameters, that a step holds at most: with the optimizer's, the gradient and its parts


def can_run(cell: Scenario) -> bool:
    """Whether a cell can be in a stack: dense layers, the plain mean, and flips that are chosen round by round."""
    by_round = cell.settings.attack.refresh == "step" and not groups.needs_own_history(cell)
    stackable = isinstance(cell.model, Mlp) and sequential.mean_is_enough(cell)
    return stackable and (by_round or not cell.settings.attacked)


def run_cells(
    cells: Sequence[Scenario],
    *,
    device: str,
    memory_gb: float,
    progress: OnRounds,
    watch: Watch,
    keep_flips: bool,
    keep_theta: bool,
) -> list[Outcome]:
    """The outcomes of cells of a model whose parameters can be stacked.

    Parameters
    ----------
    cells, device, memory_gb, progress, watch, keep_flips, keep_theta
        As `engine.run_cells` takes them.

    Returns
    -------
    list of Outcome
        In the order of the cells, without what `full_rows` asks for.
    """
    order = sorted(range(len(cells)), key=lambda i: (_tile_key(cells[i]), i))
    kind = torch.device(device).type
    each = COPIES * cells[0].theta_shape[1] * cells[0].settings.torch_dtype.itemsize
    size = max(1, min(CELLS[kind], int(memory_gb * 2**29 / each)))
    found: dict[int, Outcome] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        stack = Stack([cells[i] for i in chunk], torch.device(device), memory_gb * 2**29, keep_flips, keep_theta)
        found |= zip(chunk, stack.run(progress, partial(watch, chunk)), strict=True)
    return [found[i] for i in range(len(cells))]


def _tile_key(cell: Scenario) -> str:
    """The key of the cells whose attackers choose together: their attack and how the server steps."""
    return f"{kind_of(cell)} {tiling.training_key(cell)}"


class Attacked:
    """Consecutive cells of a stack whose attackers choose their flips together."""

    def __init__(self, cells: Sequence[Scenario], rows: slice, batches: Batches) -> None:
        """`rows` are the cells' rows of the stack's theta."""
        self.cells, self.rows = cells, rows
        self.attackers = Attackers(cells, batches, batches.all)


class Stack:
    """Cells that are stepped together, and all that they share."""

    def __init__(
        self, cells: Sequence[Scenario], device: torch.device, memory: float, keep_flips: bool, keep_theta: bool
    ) -> None:
        """`memory` is in bytes, as `Batches` takes it; the cells are of one `group_key`."""
        self.cells, self.settings = cells, cells[0].settings
        self.model = cast(Mlp, cells[0].model)
        total = self.settings.clients.total
        held = sum(np.bincount(cell.partition.malicious, minlength=total) for cell in cells)
        client_order = np.argsort(-np.asarray(held), kind="stable")
        self.batches = Batches(cells[0], client_order, device, memory, every_feature=True)
        self.workspace = kernels.Workspace(device, self.batches.dtype)
        self.keep_theta = keep_theta
        start = self.model.start().to(device, self.batches.dtype)
        self.theta = start.expand(len(cells), -1).clone()
        self.log = Log(len(cells), len(self.batches.y), keep_flips, full_rows=False)
        self.test_set = Measured(cells[0], cells[0].test_set(), device)
        early = self.settings.early_stop.patience is not None
        split = Measured(cells[0], cells[0].validation_set(), device) if early else None
        self.stopping = Stopping(cells, split, self.theta) if split else None
        keys = [_tile_key(cell) for cell in cells]
        edges = [0, *(i for i in range(1, len(cells)) if keys[i] != keys[i - 1]), len(cells)]
        pairs = itertools.pairwise(edges)
        self.tiles = [Attacked(cells[start:end], slice(start, end), self.batches) for start, end in pairs]
        self.attackers = [tile.attackers for tile in self.tiles]
        self.optimizers = [self._optimizer(tile) for tile in self.tiles]
        self.targets, self.target_of = self._targets(device)

    def _optimizer(self, tile: Attacked) -> kernels.ServerOptimizer:
        """The server's optimizer of some cells, which moves their rows of theta in place."""
        theta = self.theta[tile.rows]
        lr, decay = (
            torch.tensor([getattr(cell.settings, key) for cell in tile.cells], dtype=theta.dtype, device=theta.device)
            for key in ("lr", "weight_decay")
        )
        return kernels.ServerOptimizer(tile.cells[0].settings.server_optimizer, theta, lr[:, None], decay[:, None])

    def _targets(self, device: torch.device) -> tuple[Tensor, NDArray[np.int64]]:
        """The different targets (T, P), and which of them each cell has, (M,), -1 for none."""
        found: list[Tensor] = []
        target_of = np.full(len(self.cells), -1)
        for i, cell in enumerate(self.cells):
            if not (cell.settings.attacked and cell.settings.attack.goal == "targeted"):
                continue
            target = targets.target(cell)
            number = next((j for j, other in enumerate(found) if torch.equal(other, target)), len(found))
            found += [target] if number == len(found) else []
            target_of[i] = number
        stacked = torch.cat(found) if found else torch.empty(0, self.theta.shape[1])
        return stacked.to(device, self.batches.dtype), target_of

    def run(self, progress: OnRounds, watch: Callable[[Callable[[], list[Outcome]]], None]) -> list[Outcome]:
        """The outcomes of the stack's cells after all rounds.

        Parameters
        ----------
        progress : callable
            Called with how many more rounds are done, summed over the cells; those after an early end count.
        watch : callable
            Gets after each round a function that gives the outcomes so far.

        Returns
        -------
        list of Outcome
            In the order of the cells.
        """
        began, evaluated = time.perf_counter(), ending.evaluated_rounds(self.settings)
        ended = self._measure(0)
        for round_ in range(1, self.settings.rounds + 1):
            self.step(round_)
            if round_ in evaluated:
                ended = self._measure(round_)
            progress(len(self.cells) * (self.settings.rounds - round_ + 1 if ended else 1))
            watch(lambda: self._outcomes(time.perf_counter() - began, ended=False))
            if ended:
                break
        return self._outcomes(time.perf_counter() - began, ended=True)

    def _outcomes(self, seconds: float, ended: bool) -> list[Outcome]:
        """The outcomes of all cells, as `ending.outcomes` gives them; so far, where they have not `ended`."""
        whole = (lambda rows: rows.cpu()) if self.keep_theta else None
        return ending.outcomes(self.cells, self.theta, whole, self.log, self.attackers, self.stopping, seconds, ended)

    def _measure(self, round_: int) -> bool:
        """Note how good the cells are after a round; gives whether none need go on, see `ending.measure`."""
        return ending.measure(round_, self.theta, self.test_set, self.log, self.attackers, self.stopping)

    def step(self, round_: int) -> None:
        """Run a round of all cells."""
        batch = self.batches.at(round_, self.workspace)
        X, y, n = batch.X, batch.y, len(batch.X)
        accesses = [tile.attackers.access(round_, batch.layout) for tile in self.tiles]
        theta = self.theta[:, None]
        first = shared_product(X, *self.model.layers(theta)[0])
        anyone_flips = any(access is not None and access.selection_plans is not None for access in accesses)
        along_targets = self._along_targets(X, first, accesses) if anyone_flips and len(self.targets) else {}
        activations = self.model.forward(theta, X, first)
        labels = y.expand(len(self.cells), n).clone()
        gram = _once(lambda: X @ X.mT)
        for number, (tile, access) in enumerate(zip(self.tiles, accesses, strict=True)):
            change = no_change(X.device)
            tile.attackers.note(None, None)
            if access is not None and access.selection_plans is not None:
                change = self._choose(tile, access, batch, activations, along_targets.get(number), gram, round_)
                tile.attackers.note(change.per_cell(len(tile.cells)), access.allowed)
                labels[tile.rows.start + change.cells, change.columns] = change.labels
            if self.log.keep_flips:
                self.log.watch(round_, tile.rows.start, batch, Report(change, tile.attackers.allowed, None, None))
        R = self.model.residuals(activations[-1], labels) / n
        gradient = self.model.pull_back(theta, X, activations, R)[:, 0]
        for tile, optimizer in zip(self.tiles, self.optimizers, strict=True):
            first_cell = tile.cells[0]
            factor = first_cell.lr(round_) / first_cell.settings.lr
            optimizer.step(gradient[tile.rows], factor)

    def _along_targets(self, X: Tensor, first: Tensor, accesses: Sequence[RoundAccess | None]) -> dict[int, Tensor]:
        """By a targeted tile's number, its first layer's outputs with parameters `target - theta`, (M, n, width)."""
        of_targets = shared_product(X, *self.model.layers(self.targets[:, None])[0])
        found = {}
        for number, (tile, access) in enumerate(zip(self.tiles, accesses, strict=True)):
            place = self.target_of[tile.rows]
            if access is not None and access.selection_plans is not None and place[0] >= 0:
                at = torch.from_numpy(place).to(X.device)
                found[number] = of_targets[at, : access.n] - first[tile.rows, : access.n]
        return found

    def _choose(
        self,
        tile: Attacked,
        access: RoundAccess,
        batch: Batch,
        activations: list[Tensor],
        along_targets: Tensor | None,
        gram: Callable[[], Tensor],
        round_: int,
    ) -> Change:
        """The labels that the attackers of a tile write in a round."""
        rows, n = tile.rows, access.n
        writable = [part[rows, :n] for part in activations]

        def scores() -> Tensor:
            theta = self.theta[rows, None]
            if along_targets is not None:
                at = torch.from_numpy(self.target_of[rows]).to(theta.device)
                other_layers = self.model.layers(self.targets[at, None] - theta)[1:]
                return self.model.forward_scores(theta, writable, along_targets, other_layers)
            of_cells = [part[rows] for part in activations]
            R = self.model.residuals(of_cells[-1], batch.y)
            if access.known is not None:
                R = R * access.known[..., None]
            deltas = self.model.deltas(theta, of_cells, R / R.shape[1])
            along_first = torch.matmul(gram()[:n], deltas[0]).add_(deltas[0].sum(1, keepdim=True))
            return self.model.forward_scores(
                theta, writable, along_first, self.model.pull_back_others(of_cells, deltas)
            )

        counts = None if batch.counts is None else batch.counts[:n]
        all_samples = batch.samples
        seen = knowledge.VisibleSamples(
            batch.y[:n], counts, all_samples[:n], lambda: all_samples, scores, lambda: writable[-1]
        )
        proposal = adversary.propose(tile.cells[0], round_, seen, (len(tile.cells), n), writable[-1].dtype)
        return choices.of_proposal(proposal, batch, access, self.workspace.buffer("sorted", len(tile.cells), n))


class Measured:
    """Samples on a device that the cells of a stack are measured on."""

    def __init__(self, cell: Scenario, samples: tuple[Tensor, Tensor], device: torch.device) -> None:
        self.model = cell.model
        self.X, self.y = (part.to(device) for part in samples)

    def quality(self, theta: Tensor) -> NDArray[np.float64]:
        """Accuracy, F1 and mean loss of each cell of theta (M, P), (M, 3)."""
        return np.array([self.model.measure(row[None], self.X, self.y) for row in theta])


def _once(work_out: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that gives the result of `work_out`, which it calls the first time only."""
    found: list[Tensor] = []

    def ask() -> Tensor:
        if not found:
            found.append(work_out())
        return found[0]

    return ask
