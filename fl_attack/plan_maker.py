"""How plans of `attack=planned` are made: the training that attackers plan for, and sweeps over it.

The attackers plan as if the server took the mean of all updates. With `attack.foresight=known` they know the
minibatches to come; with `simulated` they draw such of their own, and use the costates alone, along which flips are
greedy in the minibatches that come. What is made here is looked up and kept by `plans`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, planning, protocol, streams, targets
from fl_attack.checkpoint import Checkpoint
from fl_attack.plan_rounds import HeldFeatures, PlannedRounds, imagined
from fl_attack.planning import Minibatch, Problem, Sweeps, TrainingState, Trajectory
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

OnSweep = Callable[[int], None]  # gets the number of the sweep that is done
STARTS = ("gradient", "target", "mean_feature", "-mean_feature")  # what plans begin with; others begin at random
WORTH_THREADS = 2**23  # multiplications of a product


class Plan(NamedTuple):
    """The flips of some rounds, and how they were found."""

    first: int  # the round that it begins with
    rounds: NDArray[np.int64]  # (flips,) ascending
    samples: NDArray[np.int64]  # (flips,) ascending in a round
    labels: NDArray[np.int64]  # (flips,)
    allowed: NDArray[np.int64]  # (T,) flips that the budget allows in each round from the first on
    harm: NDArray[np.float64]  # (sweeps + 1, starts) the objective after each sweep
    part: NDArray[np.float64]  # (sweeps + 1, starts) share of the rounds whose labels the sweep chose anew

    def flips(self, round_: int) -> Flips:
        """The flips of one of the planned rounds, samples ascending; none where its budget is zero."""
        here = slice(*np.searchsorted(self.rounds, [round_, round_ + 1]))
        if not self.allowed[round_ - self.first]:
            return NO_FLIPS
        return Flips(self.samples[here], self.labels[here], int(self.allowed[round_ - self.first]))


class PlanMaker:
    """Makes the plans of cells that share minibatches, from several starts each: plan p is of cell p // starts."""

    def __init__(self, cells: Sequence[Scenario], first: int, thetas: Sequence[Tensor]) -> None:
        """`thetas` (A, B) are the parameters of the cells before round `first`, with which the plans begin."""
        self.cells, self.first = cells, first
        self.template_cell = template = cells[0]
        settings, self.threat = template.settings, template.settings.attack
        self.options = attack.planned_options(self.threat.args)
        self.starts = self.options.starts
        horizon = self.threat.horizon or settings.rounds
        # the last plan may look beyond the end of the run: nothing is gained there
        self.rounds = range(first, min(settings.rounds, first + horizon - 1) + 1)
        self.theta = torch.stack([theta for theta in thetas for _ in range(self.starts)])
        self.memory = settings.engine.memory_gb * 2**30
        features = HeldFeatures(template, self.memory)
        schedules = template.schedule, imagined(template.schedule, first)
        self.coming, self.imagined = (
            PlannedRounds(cells, self.starts, self.rounds, schedule, features) for schedule in schedules
        )

    @contextmanager
    def threads(self) -> Iterator[None]:
        """One thread while the products are so small that waking others takes longer."""
        before, size = torch.get_num_threads(), self.theta.numel() * int(self.template_cell.schedule.sizes.sum())
        torch.set_num_threads(before if size > WORTH_THREADS else 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def make(self, checkpoint: Checkpoint, on_sweep: OnSweep) -> list[Plan]:
        """Make the plans of the cells.

        Parameters
        ----------
        checkpoint : Checkpoint
            Sweeps that it holds are not done again, and it is offered the state after each sweep.
        on_sweep : callable
            Called with how many sweeps are done.

        Returns
        -------
        list of Plan
            In the order of the cells.
        """
        simulated = self.threat.foresight == "simulated"
        problem = self.problem(self.imagined if simulated else self.coming)
        sweeps = Sweeps(problem, self._uniform, self.options.tolerance)
        kept = checkpoint.load()
        if kept:
            sweeps.restore(kept)
            on_sweep(len(sweeps.harm) - 1)
        else:
            sweeps.start_from(self._start)

        def after() -> None:
            """Tell that a sweep is done, and offer the state after it."""
            on_sweep(len(sweeps.harm) - 1)
            checkpoint.offer(sweeps.state)

        found = sweeps.run(self.options.sweeps, after)
        on_sweep(self.options.sweeps)
        labels = self._in_real_minibatches(sweeps.trajectory, found.labels) if simulated else found.labels
        return [self._plan(cell, found, labels) for cell in range(len(self.cells))]

    def problem(self, on: PlannedRounds) -> Problem:
        """The training of all plans, on rounds that come or on imagined ones."""
        settings, P = self.template_cell.settings, len(self.theta)
        lr, decay = (
            torch.tensor([getattr(cell.settings, key) for cell in self.cells], dtype=torch.float64)
            .repeat_interleave(self.starts)
            .view(P, 1, 1)
            for key in ("lr", "weight_decay")
        )
        return Problem(
            planning.derivatives_of(self.template_cell.model),
            settings.server_optimizer,
            TrainingState(self.theta, protocol.initial_state(self.theta)),
            self.rounds,
            batch=on.batch,
            access=on.access,
            lr=lambda round_: lr * (self.template_cell.lr(round_) / settings.lr),
            weight_decay=decay,
            classes=self.template_cell.classes,
            sample=self.sample,
            weights=self._weights().repeat_interleave(self.starts, 1),
            temperature=self.options.temperature,
            selection=self.threat.selection,
            memory=self.memory / 2,
        )

    @cached_property
    def sample(self) -> Minibatch:
        """The training samples that the harm is measured on."""
        return Minibatch(*sample_of(self.template_cell, self.options.sample))

    def _weights(self) -> Tensor:
        """The weights (T + 1, M) of the harm after each round: of the last, or evenly of all that are evaluated."""
        weights = torch.zeros(len(self.rounds) + 1, len(self.cells), dtype=torch.float64)
        for i, cell in enumerate(self.cells):
            if cell.settings.attack.objective == "final":
                weights[-1, i] = 1
                continue
            every, last = cell.settings.eval_every, self.rounds[-1]
            measured = [t for t, round_ in enumerate(self.rounds, 1) if round_ % every == 0 or round_ == last]
            weights[measured, i] = 1 / len(measured)
        return weights

    def _uniform(self, sweep: int) -> Tensor:
        """Random numbers (P, T + 3) for a sweep: the same for every cell, another row for each start."""
        rng = np.random.default_rng([self.template_cell.settings.seed, streams.PLAN, self.first, sweep])
        numbers = rng.random((self.starts, len(self.rounds) + 3))
        return torch.from_numpy(np.tile(numbers, (len(self.cells), 1)))

    def _start(self, theta: Tensor, batch: Minibatch) -> Tensor:
        """The direction (P, A, B) that each plan begins with."""
        by_start = theta.view(len(self.cells), self.starts, *theta.shape[1:])
        found = torch.empty_like(by_start)
        derivatives = planning.derivatives_of(self.template_cell.model)
        for i in range(self.starts):
            at = by_start[:, i]
            if i >= len(STARTS):
                found[:, i] = self._at_random(i)
            elif STARTS[i] == "gradient":
                found[:, i] = derivatives.gradient(at, batch.X, batch.y.expand(len(at), -1))
            elif STARTS[i] == "target":
                found[:, i] = self._targets - at
            else:
                found[:, i] = self._mean_feature(at, STARTS[i])
        return found.view_as(theta)

    @cached_property
    def _targets(self) -> Tensor:
        """The targets (M, A, B)."""
        return torch.stack([targets.target(cell) for cell in self.cells])

    def _mean_feature(self, theta: Tensor, name: str) -> Tensor:
        """The direction of that name of `attack.DIRECTIONS` for theta (M, A, B)."""
        if self.template_cell.model.linear:
            if name not in self._constant:
                self._constant[name] = self._direction(theta[0], name).expand_as(theta)
            return self._constant[name]
        return torch.stack([self._direction(one, name) for one in theta])

    @cached_property
    def _constant(self) -> dict[str, Tensor]:
        """Directions that do not depend on theta, by name."""
        return {}

    def _direction(self, theta: Tensor, name: str) -> Tensor:
        """The direction (A, B) of a name of `attack.DIRECTIONS` that looks at theta (A, B) and the sample alone."""

        def none() -> None:
            """Neither the gradient nor the target is asked for."""

        aim = attack.Aim(
            theta, self.first, self.template_cell.model, gradient=none, target=none, sample=lambda: self.sample
        )
        return attack.direction_of(name, aim)

    def _at_random(self, start: int) -> Tensor:
        """A random direction (A, B), the same in all rounds."""
        rng = np.random.default_rng([self.template_cell.settings.seed, streams.PLAN, self.first, 0, start])
        return torch.from_numpy(rng.standard_normal(self.theta.shape[1:]))

    def _in_real_minibatches(self, trajectory: Trajectory, labels: planning.Labels) -> planning.Labels:
        """The labels that are greedy in the minibatches that come, along the costates of imagined ones."""
        trajectory.run(labels)
        found: planning.Labels = [None] * len(self.rounds)

        def choose(t: int, theta: Tensor, v: Tensor, scores: Tensor) -> None:
            """Put the labels of a round that comes into `found`; scores in the imagined one are of no use."""
            round_ = self.rounds[t]
            access, batch = self.coming.access(round_), self.coming.batch(round_)
            if access is not None:
                X, y = batch.X[access.columns], batch.y[access.columns]
                real_scores = trajectory.problem.derivatives.scores(theta, v, X)
                found[t] = planning.chosen_labels(real_scores, y, access, self.threat.selection)

        trajectory.backwards(choose)
        return found

    def _plan(self, cell: int, found: planning.SweepResult, labels: planning.Labels) -> Plan:
        """The best plan of a cell."""
        starts = slice(cell * self.starts, (cell + 1) * self.starts)
        best = starts.start + int(
            np.nanargmax(np.where(np.isfinite(found.harm[-1, starts]), found.harm[-1, starts], -1))
        )
        rounds, samples, written = [], [], []
        for t, round_ in enumerate(self.rounds):
            access, of_round = self.coming.access(round_), labels[t]
            if access is None or of_round is None:
                continue
            at, own = self.coming.samples(round_)[access.columns.numpy()], of_round[best].numpy()
            changed = own != self.template_cell.dataset.y_train[at]
            rounds.append(np.full(changed.sum(), round_))
            samples.append(at[changed])
            written.append(own[changed])
        none = np.empty(0, np.int64)
        return Plan(
            self.first,
            np.concatenate([none, *rounds]),
            np.concatenate([none, *samples]),
            np.concatenate([none, *written]),
            self.coming.budgets[:, cell].sum(1),
            found.harm[:, starts],
            found.part[:, starts],
        )


def sample_of(cell: Scenario, size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Training samples of clients, drawn once: what attackers measure harm on.

    Parameters
    ----------
    cell : Scenario
        The experiment, whose seed the samples are drawn from.
    size : int
        The largest number of samples.
    device : torch.device or str
        The device of the result.

    Returns
    -------
    X : (n, *inputs) tensor of float64
    y : (n,) tensor of int64
        True labels.
    """
    key = f"sample of {size}"
    if key not in cell.memo:
        held = np.flatnonzero(cell.partition.client >= 0)
        rng = np.random.default_rng([cell.settings.seed, streams.SAMPLE])
        chosen = np.sort(rng.choice(held, min(size, len(held)), replace=False))
        cell.memo[key] = cell.features(chosen).double(), torch.from_numpy(cell.dataset.y_train[chosen])
    X, y = cell.memo[key]
    return X.to(device), y.to(device)
