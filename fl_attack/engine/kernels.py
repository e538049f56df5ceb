"""The arithmetic of a round over many cells, in place on buffers that are made once.

Shapes: M cells, n columns (samples of the minibatch), C outputs, d features. theta is (M C, d), residuals (M C, n).
Two classes (C = 1) are signed as in `batches`: there the residual is a sigmoid and relabelling a sample gains
the signed score.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import protocol
from fl_attack.checkpoint import State
from fl_attack.engine.threads import pool

SORTED_BY_A_THREAD = 2**14  # numbers that it has to be worth to wake another


class Workspace:
    """Buffers that are used again and again; what a step leaves in them the next one overwrites."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._template = torch.empty(0, device=device, dtype=dtype)
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple[str | int, ...], Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory under a name, which every caller of that name gets again.

        Parameters
        ----------
        name : str
            The name, which says what the memory is used for.
        *shape : int
            The shape that is wanted now.

        Returns
        -------
        tensor
            Contiguous memory, whose values are left over from its last use.
        """
        view = self._views.get((name, *shape))
        if view is None:
            size = math.prod(shape)
            if name not in self._whole or self._whole[name].numel() < size:
                self._whole[name] = self._template.new_empty(size)
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
            view = self._views[name, *shape] = self._whole[name][:size].view(shape)
        return view


def residuals_(Z: Tensor, C: int, encoded: Tensor) -> Tensor:
    """Turn logits into residuals under given labels, in place: times the features they are the summed gradient.

    Parameters
    ----------
    Z : (M C, n) tensor
        Logits; of binary tasks those for label 1, with the sign of the label.
    C : int
        Number of logits of a sample.
    encoded : (C, n) tensor
        One-hot labels; not used where C is 1.

    Returns
    -------
    (M C, n) tensor
        The memory of Z with the residuals in it.
    """
    if C == 1:
        return Z.sigmoid_()
    by_class = Z.view(-1, C, Z.shape[-1])
    torch.softmax(by_class, 1, out=by_class)
    by_class.sub_(encoded)
    return Z


class SelectionPlan(NamedTuple):
    """Where to cut M rows of n priorities, sorted ascending, to take the largest; places count through all rows."""

    allowed: NDArray[np.int64]  # (M,) how many of a row may be taken
    taken: NDArray[np.int64]  # (M,) how many are, if as many reach the floor
    last: NDArray[np.int64]  # (M,) the place of the smallest that is taken
    cut: NDArray[np.bool_]  # (M,) whether some are taken and some left
    before: NDArray[np.int64]  # (M,) where a row is cut the place of the largest left, else any
    bound: NDArray[np.float64]  # (M,) below which nothing is taken: infinite where nothing may be


def selection_plans(
    allowed: NDArray[np.int64], n: int, floor: float | NDArray[np.float64], dtype: torch.dtype
) -> Iterator[SelectionPlan]:
    """For each round, where to cut M rows of n priorities so that at most `allowed` of each are taken.

    Rows are sorted ascending, and what is taken is their end, behind the cut.

    Parameters
    ----------
    allowed : (rounds, M) array of int64
        How many of each row may be taken.
    n : int
        Length of a row.
    floor : float or (M,) array
        The lowest priority that is taken.
    dtype : torch.dtype
        Precision of the priorities.

    Returns
    -------
    iterator of SelectionPlan
        In the order of the rounds.
    """
    taken = allowed.clip(0, n)
    last = np.arange(1, allowed.shape[1] + 1) * n - taken.clip(1)
    cut = (taken > 0) & (taken < n)
    bound = np.where(taken > 0, floor, np.inf).astype(torch.empty(0, dtype=dtype).numpy().dtype)
    return map(SelectionPlan, allowed, taken, last, cut, last - cut, bound)


def take_largest_(
    priority: Tensor, plan: SelectionPlan, scratch: Tensor, samples: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Turn priorities into 1 for the largest `allowed` of each row that reach the floor, else 0.

    `attack.select` is the plain definition, which the tests hold this to; here one sort serves many rows.

    Parameters
    ----------
    priority : (M, n) tensor
        Overwritten by the result.
    plan : SelectionPlan
        How many of each row may be taken, from which floor on.
    scratch : (M, n) tensor
        Contiguous memory that is overwritten.
    samples : (n,) array of int64
        The sample of each column: ties go to the lower one.

    Returns
    -------
    (M,) array of int64
        The number of priorities that are taken of each row.
    """
    scratch.copy_(priority)
    if scratch.is_cuda:
        ranked = scratch.sort(-1).values.view(-1)
        last, before = (ranked[torch.from_numpy(at)].cpu().numpy() for at in (plan.last, plan.before))
    else:  # numpy's sort is vectorised, many times as fast as torch's
        ordered = scratch.numpy()
        sort_rows_(ordered)
        last, before = ordered.take(plan.last), ordered.take(plan.before)
    threshold = np.maximum(last, plan.bound)
    enough = last >= plan.bound
    tied = (before == threshold) & plan.cut
    exact = None
    if tied.any():
        rows = torch.from_numpy(np.flatnonzero(tied)).to(priority.device)
        exact = rows, _exact(priority[rows], plan.allowed[tied], samples)
    priority.ge_(torch.from_numpy(threshold).to(priority.device).unsqueeze(1))
    if exact is not None:
        priority[exact[0]] = exact[1]
    if enough.all():
        return plan.taken
    counted: NDArray[np.int64] = priority.sum(1).cpu().numpy().astype(np.int64)
    return counted


def sort_rows_(rows: NDArray[np.float64]) -> None:
    """Sort each row (M, n) in place, ascending, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), rows.size // SORTED_BY_A_THREAD)
    if threads < 2:
        rows.sort(axis=-1)
    else:
        list(pool(threads).map(lambda part: part.sort(axis=-1), np.array_split(rows, threads)))


def _exact(priority: Tensor, allowed: NDArray[np.int64], samples: NDArray[np.int64]) -> Tensor:
    """1 for the largest `allowed` (M,) of each row of priorities (M, n), else 0; ties go to the lower sample."""
    by_sample = torch.from_numpy(samples.argsort()).to(priority.device)
    order = by_sample[priority[:, by_sample].argsort(dim=-1, descending=True, stable=True)]
    within = torch.arange(priority.shape[1]) < torch.from_numpy(allowed)[:, None]
    return torch.zeros_like(priority).scatter_(-1, order, within.to(priority))


class ServerOptimizer:
    """The server's optimizer for many cells, in place; see `protocol.server_step`."""

    def __init__(self, optimizer: protocol.Optimizer, theta: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
        """`theta` (M C, d) is moved in place; `lr` and `weight_decay` (M C, 1) are those of each row."""
        self.optimizer, self.theta, self.lr = optimizer, theta, lr
        self.weight_decay = weight_decay if weight_decay.any() else None
        self.one_lr = lr[0].item() if (lr == lr[0]).all() else None
        self.first = torch.zeros_like(theta) if optimizer != "sgd" else None
        self.second = torch.zeros_like(theta) if optimizer == "adam" else None
        self.steps_done = 0

    def descend(self, R: Tensor, X: Tensor, workspace: Workspace, factor: float) -> None:
        """Step against the gradient of residuals, `R X / n`, and the weight decay.

        Parameters
        ----------
        R : (M C, n) tensor
            Residuals, which are overwritten.
        X : (n, d) tensor
            Features.
        workspace : Workspace
            Memory for the gradient.
        factor : float
            The factor of the learning rates in this round.
        """
        n = X.shape[0]
        if self.optimizer == "adam" or self.weight_decay is not None:
            self.step(torch.mm(R, X, out=workspace.buffer("gradient", *self.theta.shape)).div_(n), factor)
        elif self.optimizer == "sgd":
            if self.one_lr is None:
                self.theta.addmm_(R.mul_(self.lr), X, alpha=-factor / n)
            else:
                self.theta.addmm_(R, X, alpha=-self.one_lr * factor / n)
            self.steps_done += 1
        else:
            assert self.first is not None
            self.first.addmm_(R, X, beta=protocol.MOMENTUM, alpha=1 / n)
            self._follow(self.first, factor)
            self.steps_done += 1

    def step(self, gradient: Tensor, factor: float, decayed: bool = False) -> None:
        """Step against an aggregated gradient, and the weight decay.

        Parameters
        ----------
        gradient : (M C, d) tensor
            The aggregate, which is overwritten.
        factor : float
            The factor of the learning rates in this round.
        decayed : bool
            Whether the gradient holds the weight decay already, as where it is made of clients' updates.
        """
        self.steps_done += 1
        if self.weight_decay is not None and not decayed:
            gradient.addcmul_(self.theta, self.weight_decay)
        if self.optimizer == "sgd":
            self._follow(gradient, factor)
            return
        assert self.first is not None
        if self.optimizer == "momentum":
            self._follow(self.first.mul_(protocol.MOMENTUM).add_(gradient), factor)
            return
        assert self.second is not None
        beta1, beta2 = protocol.ADAM_BETAS
        self.first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = torch.div(self.second, 1 - beta2**self.steps_done, out=gradient).sqrt_().add_(protocol.ADAM_EPS)
        self._follow(torch.div(self.first, scale, out=gradient).div_(1 - beta1**self.steps_done), factor)

    def state(self) -> State:
        """The state that `restore` needs to go on, without theta."""
        return {"step": self.steps_done, "first": self.first, "second": self.second}

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave."""
        self.steps_done = state["step"]
        for own, kept in ((self.first, state["first"]), (self.second, state["second"])):
            if own is not None:
                own.copy_(kept)

    def _follow(self, way: Tensor, factor: float) -> None:
        """Take `way` (M C, d), times `factor` and the learning rates, from theta."""
        if self.one_lr is None:
            self.theta.addcmul_(way, self.lr, value=-factor)
        else:
            self.theta.add_(way, alpha=-self.one_lr * factor)
