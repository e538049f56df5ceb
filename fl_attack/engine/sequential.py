"""One experiment by itself, round after round, for any model on any device.

With `client_by_client` every client's update is computed alone, as clients do it: the plain definition that the faster
ways are held to. Else the mean of label attacks is one gradient over the union of the minibatches.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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
        Where gradients are computed.
    progress
        Is called with 1 after every round, and at an early end with the number of rounds that need not be run.
    watch
        Gets after every round what gives the outcome so far.
    checkpoint
        Where the run keeps how far it is, and goes on from what it finds.
    full_rows
        Whether the columns `cosine` and those of `detect.MEASURES` are measured, which takes passes of their own.
    client_by_client
        Whether every client's update is computed by itself where the mean of all would do.

    Returns
    -------
    Outcome
        With `error` where the parameters became infinite; the rows then end before.
    """
    recorder, settings = Recorder(cell), cell.settings
    recorder.measure_on(torch.device(device))
    theta = epoch_theta = recorder.history.theta
    state, momenta, rule = protocol.initial_state(theta), cell.momenta(theta), cell.rule()
    together = not client_by_client and mean_is_enough(cell)
    remembered = None  # what the server's rule keeps between rounds
    stored, error = NO_FLIPS, None
    kept = checkpoint.load() if checkpoint else None
    if kept:
        recorder.restore(kept["recorder"])
        recorder.measure_on(torch.device(device))
        theta, epoch_theta, momenta.table = (kept[name].to(device) for name in ("theta", "epoch_theta", "momenta"))
        first, second = (part.to(device) for part in kept["optimizer"][1:])
        state = protocol.ServerState(kept["optimizer"][0], first, second)
        remembered = aggregate_state(kept["rule"], device)
        stored = Flips(kept["stored"]["samples"], kept["stored"]["labels"], 0)
        progress(recorder.round)
    started = time.perf_counter() - recorder.history.seconds

    def reached() -> State:
        """The state of the run after the last round, as `checkpoint.load` gives it back."""
        recorder.history.seconds = time.perf_counter() - started
        standing = {"samples": stored.samples, "labels": stored.labels}
        parts = {"theta": theta, "epoch_theta": epoch_theta, "momenta": momenta.table, "optimizer": tuple(state)}
        return {"recorder": recorder.state(), "stored": standing, "rule": remembered, **parts}

    def outcome() -> Outcome:
        history = recorder.history
        table = np.array([[row[name] for name in COLUMNS] for row in history.rows])
        seconds = time.perf_counter() - started
        return Outcome(table, history.flip_count, history.theta.cpu(), list(history.flips), seconds, error)

    try:
        if not kept:
            recorder.record(0, theta)
        for round_ in range(recorder.round + 1, settings.rounds + 1) if not recorder.stopped else ():
            if adversary.epoch_start(cell, round_) == round_:
                epoch_theta = theta
            measured = full_rows and (round_ % settings.eval_every == 0 or round_ == settings.rounds)
            clients = cell.schedule.participants(round_)
            before = momenta.of(clients)
            server = adaptive.Server(rule, remembered, before)
            flips = adaptive.flips(cell, theta, round_, server, epoch_theta, stored)
            stored = adversary.remembered(cell, round_, stored, flips)
            updates = None
            if together and not (measured and settings.attacked):
                aggregate = mean_gradient(cell, theta, round_, flips)
            else:
                honest = adversary.updates(cell, theta, round_, flips, before)
                momenta.note(clients, honest)
                updates = adaptive.crafted(cell, theta, round_, honest, server)
                order = torch.from_numpy(protocol.shuffled(settings.seed, round_, len(clients)))
                weights = torch.from_numpy(cell.schedule.sizes[clients])
                seen = cell.seen(round_, theta)
                aggregate, remembered = rule.step(
                    updates, weights.to(theta.device), order.to(theta.device), seen, remembered
                )
            lr = cell.lr(round_)
            theta, state = protocol.server_step(settings.server_optimizer, theta, aggregate, lr, state)
            recorder.record(round_, theta, aggregate if full_rows else None, flips, updates if full_rows else None)
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
        Where the tensors go.

    Returns
    -------
    object
    """
    if not isinstance(state, dict):
        return state
    return {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in state.items()}
