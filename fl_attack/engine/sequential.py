"""One experiment by itself, round after round, for any model on any device.

With `client_by_client` every client's update is computed alone, as clients do it: the plain definition that the faster
ways are held to. Else the mean of label attacks is one gradient over the union of the minibatches.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_attack import adaptive, adversary, protocol
from fl_attack.checkpoint import Checkpoint, State
from fl_attack.engine.outcome import Outcome
from fl_attack.errors import RunError
from fl_attack.history import COLUMNS, Recorder
from fl_attack.scenario import NO_FLIPS, Flips, Scenario, mean_gradient


def run(
    cell: Scenario,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda rounds: None,
    watch: Callable[[Callable[[], Outcome]], None] = lambda so_far: None,
    checkpoint: Checkpoint | None = None,
    full_rows: bool = True,
    client_by_client: bool = False,
) -> Outcome:
    """Run one experiment.

    Parameters
    ----------
    cell
        The experiment.
    device
        The device that gradients are computed on.
    progress
        Is called with the number of rounds done since the last call: 1, and what a checkpoint or an early end spares.
    watch
        Gets after every round a function that gives the outcome so far.
    checkpoint
        Where the run keeps how far it is, and goes on from what it finds.
    full_rows
        Whether the columns `cosine` and those of `detect.MEASURES` are measured, which takes passes of their own.
    client_by_client
        Whether every client's update is computed by itself where the mean of all would do.

    Returns
    -------
    Outcome
        With `error` where a round has raised RunError, as where the parameters are not finite any more; the rows then
        end before it.
    """
    recorder, settings = Recorder(cell), cell.settings
    recorder.measure_on(torch.device(device))
    training = Training(cell, recorder.history.theta, together=not client_by_client and mean_is_enough(cell))
    error = None
    kept = checkpoint.load() if checkpoint else None
    if kept:
        recorder.restore(kept["recorder"])
        recorder.measure_on(torch.device(device))
        training.restore(kept, device)
        progress(recorder.round)
    started = time.perf_counter() - recorder.history.seconds

    def reached() -> State:
        """The state of the run after the last round, as `checkpoint.load` gives it back."""
        recorder.history.seconds = time.perf_counter() - started
        return {"recorder": recorder.state(), **training.state()}

    def outcome() -> Outcome:
        history = recorder.history
        table = np.array([[row[name] for name in COLUMNS] for row in history.rows])
        seconds = time.perf_counter() - started
        return Outcome(table, history.flip_count, history.theta.cpu(), list(history.flips), seconds, error)

    try:
        if not kept:
            recorder.record(0, training.theta)
        for round_ in range(recorder.round + 1, settings.rounds + 1) if not recorder.stopped else ():
            measured = full_rows and (round_ % settings.eval_every == 0 or round_ == settings.rounds)
            aggregate, flips, updates = training.step(round_, measured)
            recorder.record(
                round_, training.theta, aggregate if full_rows else None, flips, updates if full_rows else None
            )
            progress(settings.rounds - round_ + 1 if recorder.stopped else 1)
            watch(outcome)
            if recorder.stopped:
                break
            if checkpoint:
                checkpoint.offer(reached)
    except RunError as failure:
        error = str(failure)
        progress(settings.rounds - recorder.round)
    if checkpoint and error is None:
        checkpoint.save(reached())  # for the twin, should its run be cut off
    return outcome()


class Training:
    """An experiment between two of its rounds: the parameters, and what server, attackers and clients keep.

    Parameters
    ----------
    cell : Scenario
        The experiment.
    theta : (A, B) tensor of float64
        The parameters before the first round, on the device of the run.
    together : bool
        Whether the gradient of the union of the minibatches stands for the mean of what clients send.
    """

    def __init__(self, cell: Scenario, theta: Tensor, together: bool) -> None:
        self.cell, self.together = cell, together
        self.theta = self.epoch_theta = theta
        self.optimizer, self.momenta = protocol.initial_state(theta), cell.momenta(theta)
        self.rule, self.rule_state = cell.rule(), None  # what the server's rule keeps between rounds
        self.stored = NO_FLIPS  # what stands in the attackers' data

    def step(self, round_: int, measured: bool) -> tuple[Tensor, Flips, Tensor | None]:
        """Take a round.

        Parameters
        ----------
        round_ : int
            The round, counted from 1.
        measured : bool
            Whether the updates of clients are wanted where someone attacks.

        Returns
        -------
        aggregate : (A, B) tensor
            The gradient that the server has stepped against.
        flips : Flips
            The labels of the round that are not the true ones.
        updates : (m, A, B) tensor or None
            What the clients of the round, ascending, have sent; None where it was not computed.
        """
        cell, settings = self.cell, self.cell.settings
        if adversary.epoch_start(cell, round_) == round_:
            self.epoch_theta = self.theta
        before = self.momenta.of(cell.schedule.participants(round_))
        server = adaptive.KnownServer(self.rule, self.rule_state, before)
        flips = adaptive.best_flips(cell, self.theta, round_, server, self.epoch_theta, self.stored)
        self.stored = adversary.remembered(cell, round_, self.stored, flips)
        updates = None
        if self.together and not (measured and settings.attacked):
            aggregate = mean_gradient(cell, self.theta, round_, flips)
        else:
            updates = self._updates_sent(round_, flips, server)
            aggregate = self._combined(round_, updates)
        lr = cell.lr(round_)
        self.theta, self.optimizer = protocol.server_step(
            settings.server_optimizer, self.theta, aggregate, lr, self.optimizer
        )
        return aggregate, flips, updates

    def _updates_sent(self, round_: int, flips: Flips, server: adaptive.KnownServer) -> Tensor:
        """The updates (m, A, B) that the clients of a round send, whose momenta are noted."""
        honest = adversary.updates(self.cell, self.theta, round_, flips, server.momenta)
        self.momenta.note(self.cell.schedule.participants(round_), honest)
        return adaptive.best_crafted(self.cell, self.theta, round_, honest, server)

    def _combined(self, round_: int, updates: Tensor) -> Tensor:
        """The aggregate (A, B) of updates (m, A, B) by the server's rule; what the rule remembers is noted."""
        cell, device = self.cell, self.theta.device
        clients = cell.schedule.participants(round_)
        order = torch.from_numpy(protocol.shuffled(cell.settings.seed, round_, len(clients))).to(device)
        weights = torch.from_numpy(cell.schedule.sizes[clients]).to(device)
        seen = cell.seen(round_, self.theta)
        aggregate, self.rule_state = self.rule.step(updates, weights, order, seen, self.rule_state)
        return aggregate

    def state(self) -> State:
        """The state that `restore` needs to go on after the last round."""
        return {
            "theta": self.theta,
            "epoch_theta": self.epoch_theta,
            "momenta": self.momenta.table,
            "optimizer": tuple(self.optimizer),
            "rule": self.rule_state,
            "stored": {"samples": self.stored.samples, "labels": self.stored.labels},
        }

    def restore(self, state: State, device: torch.device | str) -> None:
        """Go back to a state that `state` gave.

        Parameters
        ----------
        state : dict
            What `state` gave; other keys are not looked at.
        device : torch.device or str
            The device that the run goes on with.
        """
        self.theta, self.epoch_theta, self.momenta.table = (
            state[name].to(device) for name in ("theta", "epoch_theta", "momenta")
        )
        first, second = (part.to(device) for part in state["optimizer"][1:])
        self.optimizer = protocol.ServerState(state["optimizer"][0], first, second)
        self.rule_state = aggregate_state(state["rule"], device)
        self.stored = Flips(state["stored"]["samples"], state["stored"]["labels"], 0)


def mean_is_enough(cell: Scenario) -> bool:
    """Whether the mean of what clients send is the gradient of the union of their minibatches."""
    settings = cell.settings
    labels = not settings.attacked or settings.attack.writes == "labels"
    one = settings.local_steps == 1 and not settings.worker_momentum and settings.sanitize.name == "none"
    return settings.strategy.averages and labels and one


def aggregate_state(state: Any, device: torch.device | str) -> Any:
    """What a rule remembers, with its tensors on a device.

    Parameters
    ----------
    state
        What the rule gave; others than dicts are left as they are.
    device : torch.device or str
        The device that the tensors are moved to.

    Returns
    -------
    object
        A new dict, or what was given.
    """
    if not isinstance(state, dict):
        return state
    return {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in state.items()}
