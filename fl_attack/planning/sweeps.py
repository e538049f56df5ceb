"""Forward-backward sweeps: labels of all rounds that raise a harm at the end, chosen anew along the costates.

Training is `theta' = step(theta, g(theta, y'))` in each round. The costates lambda of a trajectory are the derivatives
of the harm by its parameters. Given them, the harm is to first order linear in the labels of each round; the best
labels within the budget are the greedy ones along `v = -d harm / d g`, which for plain gradient descent is the costate
after the round, times the learning rate. A sweep chooses labels anew in a random part of the rounds, and keeps them if
the harm rose; where a single round is left of that part, it moves a flip of that round at random. What is reached is a
local optimum: a lower bound on what the best labels would do.

Shapes: P plans made together, T rounds, n samples of a round, of which w can be written by some plan; parameters are
(A, B).

References
----------
Krylov and Chernousko 1963 (successive approximations to Pontryagin's principle); Griewank 1992 (checkpoints).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import attack, protocol
from fl_attack.planning.adjoint import Costate, pull_back_step
from fl_attack.planning.derivatives import Derivatives

GROW, SHRINK = 1.5, 0.5  # of the part of the rounds that is chosen anew, after labels were kept, or not
COPIES = {"sgd": 1, "momentum": 2, "adam": 3}  # of the parameters, that a state holds
PATIENCE = 8  # sweeps over which a plan has to gain the tolerance


class Minibatch(NamedTuple):
    """The minibatch of a round, of all its clients."""

    X: Tensor  # (n, ...)
    y: Tensor  # (n,) true labels


class WriteAccess(NamedTuple):
    """What the attackers can write in a round."""

    columns: Tensor  # (w,) of the minibatch, ascending
    group: Tensor  # (w,) the budget, from 0 to G - 1, that a column draws on
    mask: Tensor | None  # (P, w) of bool: which columns are a plan's to write; None: all
    budgets: Tensor  # (P, G) labels that may be flipped


class TrainingState(NamedTuple):
    """The parameters (P, A, B) and what the server's optimizer remembers."""

    theta: Tensor
    optimizer: protocol.ServerState


DirectionAt = Callable[[Tensor, Minibatch], Tensor]  # of theta (P, A, B) and the minibatch: v (P, A, B)
Labels = list[Tensor | None]  # by round (P, w) in few bits; None where nobody can write


@dataclass(frozen=True)
class Problem:
    """The training that is planned for, as the attackers know it."""

    derivatives: Derivatives
    optimizer: protocol.Optimizer
    start: TrainingState  # before the first round
    rounds: range  # their numbers, as the functions below take them
    batch: Callable[[int], Minibatch]
    access: Callable[[int], WriteAccess | None]  # None in a round in which nobody can write
    lr: Callable[[int], float | Tensor]  # (P, 1, 1) where plans differ
    weight_decay: float | Tensor
    classes: int
    sample: Minibatch  # what the harm is measured on
    weights: Tensor  # (T + 1, P) of the harm before the first round and after each
    temperature: float = 1.0
    selection: attack.Selection = "gain"
    memory: float = 2.0**30  # bytes that trajectories may take

    @property
    def plans(self) -> int:
        """Number P of plans."""
        return len(self.start.theta)


class SweepResult(NamedTuple):
    """What sweeps have led to."""

    labels: Labels
    harm: NDArray[np.float64]  # (sweeps + 1, P) after each sweep, the start first; it never falls
    part: NDArray[np.float64]  # (sweeps + 1, P) share of the rounds whose labels the sweep chose anew; 0 once ended


@dataclass
class Sweeps:
    """Plans that are improved sweep by sweep; a sweep is a pass forward and one backward over all planned rounds."""

    problem: Problem
    uniform: Callable[[int], Tensor]  # of the number of a sweep, from 1: (P, T + 3) random numbers in [0, 1)
    tolerance: float = 1e-4  # a plan ends that gains less harm in `PATIENCE` sweeps
    labels: Labels = field(default_factory=list)  # the best so far
    wanted: Labels = field(default_factory=list)  # the greedy ones along the costates of the best
    harm: list[NDArray[np.float64]] = field(default_factory=list)  # (P,) after each sweep
    part: list[NDArray[np.float64]] = field(default_factory=list)  # (P,) of each sweep, see `SweepResult`
    over: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))  # (P,) which plans have ended

    def __post_init__(self) -> None:
        """Nothing is run yet: `start_from` or `restore` comes before `run`."""
        self.trajectory = Trajectory(self.problem)

    def start_from(self, direction: DirectionAt) -> None:
        """Begin with the labels of attackers who in each round are greedy along a direction."""
        self.labels = [None] * len(self.problem.rounds)
        harm = self.trajectory.run(self.labels, direction)
        self.wanted = self.trajectory.best_labels()
        self.harm, self.part = [harm.numpy()], [np.ones(self.problem.plans)]
        self.over = ~np.isfinite(self.harm[0])
        self._next = np.ones(self.problem.plans)

    def run(self, sweeps: int, after: Callable[[], None] = lambda: None) -> SweepResult:
        """Sweep until no plan gains more, or `sweeps` are done.

        Parameters
        ----------
        sweeps : int
            How many sweeps there may be in all, with those that were restored.
        after : callable, optional
            Called after each sweep.

        Returns
        -------
        SweepResult
            The best labels of each plan so far, and the harm after each sweep.
        """
        while len(self.harm) <= sweeps and not self.over.all():
            self.sweep()
            after()
        return SweepResult(self.labels, np.array(self.harm), np.array(self.part))

    def sweep(self) -> None:
        """Choose labels anew in a random part of the rounds; keep those of the plans whose harm rises."""
        number, T, device = len(self.harm), len(self.problem.rounds), self.problem.start.theta.device
        count = np.ceil(self._next * T)
        uniform = self.uniform(number)
        # the rounds of smallest random numbers, as many as are wanted
        place = uniform[:, :T].argsort(1).argsort(1)
        stuck = (count <= 1) & (self._next < 1) & ~self.over
        anew = (place < torch.from_numpy(count)[:, None]) & torch.from_numpy(~self.over & ~stuck)[:, None]
        anew = anew.to(device)
        trial: Labels = [
            None if old is None or new is None else torch.where(anew[:, t, None], new, old)
            for t, (old, new) in enumerate(zip(self.labels, self.wanted, strict=True))
        ]
        for p in np.flatnonzero(stuck).tolist():
            self._move_one(trial, p, int(place[p].argmin()), uniform[p, T:].tolist())
        harm = self.trajectory.run(trial).numpy()
        rose = harm > self.harm[-1]  # not where it is NaN
        if rose.any():
            kept = torch.from_numpy(rose).to(device)[:, None]
            best = self.trajectory.best_labels()
            for t, new in enumerate(best):
                if new is not None:
                    self.labels[t] = torch.where(kept, _required(trial[t]), _required(self.labels[t]))
                    self.wanted[t] = torch.where(kept, new, _required(self.wanted[t]))
        self.part.append(np.where(self.over, 0.0, count / T))
        self._next = np.where(rose, np.minimum(1, GROW * self._next), np.maximum(1 / T, SHRINK * self._next))
        self.harm.append(np.where(rose, harm, self.harm[-1]))
        if len(self.harm) > PATIENCE:
            self.over |= self.harm[-1] - self.harm[-1 - PATIENCE] < self.tolerance

    def _move_one(self, trial: Labels, p: int, t: int, uniform: Sequence[float]) -> None:
        """Write another label into `trial`, for plan p at position t of the rounds, chosen by three random numbers.

        If the budget is used up, one of its flips becomes the true label again. This finds what is better only by the
        curvature of the harm, which costates do not see.
        """
        problem, old = self.problem, trial[t]
        access = problem.access(problem.rounds[t])
        if access is None or old is None:
            return
        own = torch.arange(len(access.columns)) if access.mask is None else access.mask[p].nonzero()[:, 0].cpu()
        if not len(own):
            return
        at = int(own[int(uniform[0] * len(own))])
        y, group = problem.batch(problem.rounds[t]).y[access.columns], access.group
        written = old[p].to(torch.int64)
        flips = ((written != y) & (group == group[at])).nonzero()[:, 0]
        flips = flips[flips != at]
        if len(flips) >= int(access.budgets[p, group[at]]):
            if not len(flips):
                return  # no flip is allowed at all
            give_way = flips[int(uniform[1] * len(flips))]
            written = written.index_copy(0, give_way[None], y[give_way[None]])
        shift = 1 + int(uniform[2] * (problem.classes - 1))
        written[at] = (written[at] + shift) % problem.classes
        trial[t] = old.clone()
        trial[t][p] = written.to(old.dtype)  # type: ignore[index]

    def state(self) -> dict[str, object]:
        """What `restore` takes: the labels, the harm and all else that the next sweep depends on, by name."""
        return {
            "labels": list(self.labels),
            "wanted": list(self.wanted),
            "harm": np.array(self.harm),
            "part": np.array(self.part),
            "over": self.over,
            "next": self._next,
        }

    def restore(self, state: dict[str, object]) -> None:
        """Go back to a state that `state` gave."""
        self.labels, self.wanted = list(state["labels"]), list(state["wanted"])  # type: ignore[call-overload]
        self.harm, self.part = list(state["harm"]), list(state["part"])  # type: ignore[call-overload]
        self.over, self._next = state["over"], state["next"]  # type: ignore[assignment]


class Trajectory:
    """The rounds of a problem under labels, forwards, and the costates along them, backwards.

    What a round backwards needs of the state before it is kept for a segment of the rounds at a time; the segments
    before are run again from the state at their start, so that memory grows with the root of the number of rounds.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        T = len(problem.rounds)
        bytes_each = COPIES[problem.optimizer] * problem.start.theta.nbytes
        self.segment = T if T * bytes_each <= problem.memory else max(1, math.isqrt(T))
        self.labels: Labels = []
        self._checkpoints: list[TrainingState] = []
        self._kept: list[TrainingState] = []  # before each round of the last segment that was run
        self._store: list[Tensor] = []  # their parameters and what the optimizer remembers, in one piece each

    def run(self, labels: Labels, direction: DirectionAt | None = None) -> Tensor:
        """Train with labels in all rounds of a plan, forward, and keep what going back needs.

        Parameters
        ----------
        labels : Labels
            The labels written in each round, by plan; where a direction is given, those chosen along it are put into
            this list.
        direction : callable, optional
            Gives v (P, A, B) from parameters and a minibatch: labels are first chosen along it, round after round.

        Returns
        -------
        (P,) tensor
            The harm that each plan does.
        """
        problem, state = self.problem, self.problem.start
        self.labels, self._checkpoints = labels, []
        harm = problem.weights[0] * self._harm(0, state)
        for t in range(len(problem.rounds)):
            if t % self.segment == 0:
                self._checkpoints.append(state)
                self._kept = []
            self._keep(state)
            if direction is not None:
                batch, access = problem.batch(problem.rounds[t]), problem.access(problem.rounds[t])
                if access is not None:
                    X = batch.X[access.columns]
                    scores = problem.derivatives.scores(state.theta, direction(state.theta, batch), X)
                    labels[t] = chosen_labels(scores, batch.y[access.columns], access, problem.selection)
            state = self.step(state, t)
            harm = harm + self._harm(t + 1, state)
        return harm.cpu()

    def _keep(self, state: TrainingState) -> None:
        """Keep a copy of the state before a round of the segment, in memory that is taken once for all segments."""
        (step, *of_optimizer), place = state.optimizer, len(self._kept)
        copies = COPIES[self.problem.optimizer]
        parts = [state.theta, *of_optimizer]
        if not self._store:
            length = min(self.segment, len(self.problem.rounds))
            self._store = [part.new_empty(length, *part.shape) for part in parts[:copies]]
        for store, part in zip(self._store, parts[:copies], strict=True):
            store[place] = part
        theta, first, second = [*(store[place] for store in self._store), *parts[copies:]]
        self._kept.append(TrainingState(theta, protocol.ServerState(step, first, second)))

    def step(self, state: TrainingState, t: int) -> TrainingState:
        """The state after a round.

        Parameters
        ----------
        state : TrainingState
            Parameters and optimizer before the round.
        t : int
            The position of the round in the plan, from 0.

        Returns
        -------
        TrainingState
        """
        problem, round_ = self.problem, self.problem.rounds[t]
        theta, optimizer = protocol.server_step(
            problem.optimizer, state.theta, self._gradient(state, t), problem.lr(round_), state.optimizer
        )
        return TrainingState(theta, optimizer)

    def best_labels(self) -> Labels:
        """The labels of each round, greedy along the costates of the last `run`; `run` again before another call."""
        found: Labels = [None] * len(self.problem.rounds)

        def choose(t: int, theta: Tensor, v: Tensor, scores: Tensor) -> None:
            """Put the labels of a round into `found`."""
            batch, access = self.problem.batch(self.problem.rounds[t]), self.problem.access(self.problem.rounds[t])
            if access is not None:
                columns = access.columns
                found[t] = chosen_labels(scores[:, columns], batch.y[columns], access, self.problem.selection)

        self.backwards(choose)
        return found

    def backwards(self, visit: Callable[[int, Tensor, Tensor, Tensor], None]) -> Costate:
        """Go back over the last `run` and give the costate before its first round; `run` again before another call.

        `visit` gets of each round, the last first, its place t, the parameters theta (P, A, B) before it, the
        direction v (P, A, B) along which a lower gradient raises the harm, and the scores (P, n, classes) along it.
        """
        problem, T = self.problem, len(self.problem.rounds)
        state = self.step(self._kept[-1], T - 1)
        none = torch.zeros_like(state.theta)
        costate = Costate(self._harm_gradient(T, state), none, none)
        for start in reversed(range(0, T, self.segment)):
            end = min(T, start + self.segment)
            if end < T:
                self._kept = []
                self._keep(self._checkpoints[start // self.segment])
                for t in range(start, end - 1):
                    self._keep(self.step(self._kept[-1], t))
            for t in reversed(range(start, end)):
                state, round_ = self._kept[t - start], problem.rounds[t]
                batch, y = problem.batch(round_), self._labels(t)
                # only adam's step is not linear in the gradient
                gradient = self._gradient(state, t) if problem.optimizer == "adam" else none
                costate, by_gradient = pull_back_step(
                    problem.optimizer, gradient, problem.lr(round_), state.optimizer, costate
                )
                v = -by_gradient
                scores, product = problem.derivatives.scores_and_product(state.theta, v, batch.X, y)
                visit(t, state.theta, v, scores)
                theta = costate.theta - product - problem.weight_decay * v + self._harm_gradient(t, state)
                costate = costate._replace(theta=theta)
        return costate

    def _labels(self, t: int) -> Tensor:
        """The labels (P, n) of the minibatch of round `problem.rounds[t]`, true ones and written ones."""
        batch, access = self.problem.batch(self.problem.rounds[t]), self.problem.access(self.problem.rounds[t])
        y, written = batch.y.expand(self.problem.plans, -1), self.labels[t]
        if access is None or written is None:
            return y
        return y.index_copy(1, access.columns, written.to(torch.int64))

    def _gradient(self, state: TrainingState, t: int) -> Tensor:
        """The aggregate (P, A, B) of round `problem.rounds[t]` with weight decay, at the parameters `state.theta`."""
        batch = self.problem.batch(self.problem.rounds[t])
        gradient = self.problem.derivatives.gradient(state.theta, batch.X, self._labels(t))
        return gradient + self.problem.weight_decay * state.theta

    def _harm(self, t: int, state: TrainingState) -> Tensor:
        """The weighted harm (P,) of the parameters after t rounds."""
        problem = self.problem
        if not problem.weights[t].any():
            return torch.zeros_like(problem.weights[t])
        X, y = problem.sample
        Z = problem.derivatives.logits(state.theta, X)
        return problem.weights[t] * attack.smoothed_error(Z, y, problem.temperature).to(problem.weights)

    def _harm_gradient(self, t: int, state: TrainingState) -> Tensor:
        """The derivative (P, A, B) of the weighted harm by the parameters after t rounds."""
        problem = self.problem
        if not problem.weights[t].any():
            return torch.zeros_like(state.theta)
        X, y = problem.sample
        Z = problem.derivatives.logits(state.theta, X)
        R = attack.smoothed_error_residuals(Z, y, problem.temperature) * problem.weights[t][:, None, None].to(Z)
        return problem.derivatives.pull_back(state.theta, X, R)


def chosen_labels(scores: Tensor, y: Tensor, access: WriteAccess, selection: attack.Selection = "gain") -> Tensor:
    """The labels of the samples that can be written, after greedy attackers have flipped the best of them.

    Parameters
    ----------
    scores : (P, w, classes) tensor
        What each label gains, of the samples that can be written.
    y : (w,) tensor of int64
        The true labels of the samples.
    access : WriteAccess
        Which samples each plan can write, and how many flips it has.
    selection : {"gain", "literal"}
        As the setting `attack.selection`.

    Returns
    -------
    (P, w) tensor of uint8, or of int16 with more than 256 classes
        The true label wherever there is no flip.
    """
    view = attack.View(
        y, torch.ones_like(scores[0, :, 0]), scores=scores, logits=scores, noise=scores, selection=selection
    )
    proposal = attack.ATTACKS["greedy"].function(view)
    priority = proposal.priority
    if access.mask is not None:
        priority = priority.masked_fill(~access.mask, -math.inf)
    chosen = attack.select(priority, access.group, access.budgets)
    found: Tensor = torch.where(chosen, proposal.labels, y)
    return found.to(torch.uint8 if scores.shape[-1] <= 256 else torch.int16)


def _required(labels: Tensor | None) -> Tensor:
    """Labels of a round, which are not None since attackers can write in it."""
    assert labels is not None
    return labels
