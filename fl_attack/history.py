"""What one run was like, round by round."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_attack import detect, plans
from fl_attack.checkpoint import Checkpoint, State
from fl_attack.config import Restore
from fl_attack.detect import MEASURES
from fl_attack.errors import RunError
from fl_attack.scenario import NO_FLIPS, Flips, Scenario

COLUMNS = (
    "round",
    "test_accuracy",
    "test_f1",
    "test_loss",
    "flips",  # labels used that are not the true ones
    "new_flips",  # of them those that were not flipped before: fewer where flips stay (attack.memory)
    "allowed",  # flips that the budget allowed in this round
    "budget_used",  # new_flips / allowed
    "effective_budget",  # flips / labels that all clients used in this round
    "cosine",  # between the aggregated gradient and the clean one
    "repeated",  # share of this round's flipped samples that were flipped in the round before too
    "relabelled",  # share of them that were flipped to another label then
    *MEASURES,  # of the updates that the clients sent
    "validation_loss",  # on the server's validation split; NaN without early stopping
)
COUNTS = ("round", "flips", "new_flips", "allowed")  # the columns that are whole numbers
WITHIN = 0.01  # of accuracy: what counts as recovered
Row = dict[str, Any]
OnRound = Callable[[int, Row], None]  # gets the round and the row last measured


@dataclass
class History:
    """The rows of a run, its flips by round and its parameters so far; `seconds` are those that it has taken."""

    theta: Tensor
    rows: list[Row] = field(default_factory=list)
    flips: list[tuple[int, Flips]] = field(default_factory=list)
    seconds: float = 0.0

    def given(self, restore: Restore) -> Row:
        """The row of the evaluation whose model is the result of the run; see `given_row`."""
        losses = [row["validation_loss"] for row in self.rows]
        return self.rows[given_row(np.array(losses), restore)]

    @property
    def flip_count(self) -> int:
        """The number of flipped labels that were used, in all rounds."""
        return sum(len(flips.samples) for _, flips in self.flips)

    def table(self) -> NDArray[np.float64]:
        """The rows as an array (evaluations, columns), with columns as in `COLUMNS`."""
        return np.array([[row[name] for name in COLUMNS] for row in self.rows], float)

    def flip_table(self) -> dict[str, NDArray[np.int64]]:
        """The round, the sample and the written label of every flip, by these names, (flips,) each."""
        rounds = [np.full(len(flips.samples), round_) for round_, flips in self.flips]
        empty = np.empty(0, np.int64)
        return {
            "round": np.concatenate([empty, *rounds]),
            "sample": np.concatenate([empty, *(flips.samples for _, flips in self.flips)]),
            "label": np.concatenate([empty, *(flips.labels for _, flips in self.flips)]),
        }


def row_of(values: Sequence[float]) -> Row:
    """A row from its values in the order of `COLUMNS`."""
    return {name: int(value) if name in COUNTS else value for name, value in zip(COLUMNS, values, strict=True)}


def given_row(validation_loss: NDArray[np.float64], restore: Restore) -> int:
    """The evaluation whose model is the result of a run.

    Parameters
    ----------
    validation_loss : (evaluations,) array
        NaN in a run without early stopping.
    restore : {"best", "last"}
        Which model early stopping keeps.

    Returns
    -------
    int
        The position of the evaluation with the lowest loss; of the last one with "last" or without early stopping.
    """
    last = restore == "last" or np.isnan(validation_loss).all()
    return len(validation_loss) - 1 if last else int(np.nanargmin(validation_loss))


def packed_flips(flips: Sequence[tuple[int, Flips]]) -> State:
    """Rounds and their flips as a few arrays, for a checkpoint."""
    written = [of_round for _, of_round in flips]
    return {
        "flip_rounds": np.array([round_ for round_, _ in flips], np.int64),
        "flip_counts": np.array([len(of_round.samples) for of_round in written], np.int64),
        "flip_allowed": np.array([of_round.allowed for of_round in written], np.int64),
        "flip_new": np.array([of_round.written for of_round in written], np.int64),
        "flip_samples": np.concatenate([np.empty(0, np.int64), *(of_round.samples for of_round in written)]),
        "flip_labels": np.concatenate([np.empty(0, np.int64), *(of_round.labels for of_round in written)]),
    }


def unpacked_flips(state: State) -> list[tuple[int, Flips]]:
    """The rounds and flips of which `packed_flips` made this."""
    ends = np.cumsum(state["flip_counts"])[:-1]
    samples, labels = (np.split(state[name], ends) for name in ("flip_samples", "flip_labels"))
    written = map(Flips, samples, labels, state["flip_allowed"].tolist(), state["flip_new"].tolist())
    return list(zip(state["flip_rounds"].tolist(), written, strict=True))


class EarlyStop:
    """Whether the validation loss of each of M runs has stopped falling."""

    def __init__(self, patience: NDArray[np.int64]) -> None:
        """`patience` (M,): evaluations without a loss lower than all before after which a run ends."""
        self.patience = patience
        self.lowest = np.full(len(patience), np.inf)
        self.since = np.zeros(len(patience), np.int64)

    def lower(self, losses: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Note the losses (M,) of an evaluation; gives which of them are the lowest so far, (M,) of bool."""
        lower: NDArray[np.bool_] = losses < self.lowest
        self.lowest = np.where(lower, losses, self.lowest)
        self.since = np.where(lower, 0, self.since + 1)
        return lower

    @property
    def over(self) -> NDArray[np.bool_]:
        """Which of the runs (M,) have run out of patience."""
        over: NDArray[np.bool_] = self.since >= self.patience
        return over


def rounds_to_recover(
    rounds: NDArray[np.float64], accuracy: NDArray[np.float64], honest: NDArray[np.float64], stop: int | None
) -> float:
    """Rounds after the attack from which on the accuracy is never more than `WITHIN` below that of the unattacked twin.

    Parameters
    ----------
    rounds : (evaluations,) array
        The rounds after which both were measured.
    accuracy, honest : (evaluations,) array
        Test accuracy of the attacked run and of its twin, from 0 to 1.
    stop : int or None
        The last attacked round; None where the attack has no end.

    Returns
    -------
    float
        From `stop` to the first such evaluation; NaN without a `stop`, or where the accuracy does not come back.
    """
    if stop is None:
        return math.nan
    after = rounds >= stop
    away = np.flatnonzero((accuracy < honest - WITHIN) & after)
    back = np.flatnonzero(after) if not len(away) else np.arange(away[-1] + 1, len(rounds))
    return float(rounds[back[0]] - stop) if len(back) else math.nan


def recovered(table: NDArray[np.float64], twin: NDArray[np.float64], stop: int | None) -> float | None:
    """The rounds that a run took to recover, from its rows and those of its unattacked twin.

    Parameters
    ----------
    table, twin : (evaluations, columns) arrays
        The rows of both, with columns as in `COLUMNS`.
    stop : int or None
        As `rounds_to_recover` takes it.

    Returns
    -------
    float or None
        As `rounds_to_recover` gives it; None where that is NaN, or the twin has another number of rows.
    """
    if len(table) != len(twin):
        return None
    rounds, accuracy = (table[:, COLUMNS.index(name)] for name in ("round", "test_accuracy"))
    found = rounds_to_recover(rounds, accuracy, twin[:, COLUMNS.index("test_accuracy")], stop)
    return None if math.isnan(found) else found


class Recorder:
    """Turns what happens in a run into its history; an engine calls `record` after every round."""

    def __init__(
        self,
        scenario: Scenario,
        on_round: OnRound = lambda round_, row: None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.scenario = scenario
        self.on_round = on_round
        self.checkpoint = checkpoint  # where an engine keeps how far it is, and may find it
        self.round = 0  # the last one recorded
        self.history = History(scenario.start())
        self._test_set = scenario.test_set()
        self._validation_set: tuple[Tensor, Tensor] | None = None
        self._last = NO_FLIPS
        self._row: Row = {}
        patience = scenario.settings.early_stop.patience
        self._early_stop = None if patience is None else EarlyStop(np.array([patience]))
        if self._early_stop:
            self._validation_set, self._best = scenario.validation_set(), self.history.theta

    def measure_on(self, device: torch.device) -> None:
        """Keep what is measured on a device: the one that `record` is given parameters on."""
        X, y = self._test_set
        self._test_set = X.to(device), y.to(device)
        if self._validation_set:
            X, y = self._validation_set
            self._validation_set = X.to(device), y.to(device)
        self.history.theta = self.history.theta.to(device)
        if self._early_stop:
            self._best = self._best.to(device)

    @property
    def stopped(self) -> bool:
        """Whether early stopping ends the run here; its history then holds the parameters of `early_stop.restore`."""
        return self._early_stop is not None and bool(self._early_stop.over[0])

    def record(
        self,
        round_: int,
        theta: Tensor,
        aggregate: Tensor | None = None,
        flips: Flips = NO_FLIPS,
        updates: Tensor | None = None,
    ) -> None:
        """Note what a round has led to, with a row where the round is one to be evaluated.

        Parameters
        ----------
        round_ : int
            The round; 0 is the start.
        theta : (A, B) tensor
            The parameters after it.
        aggregate : (A, B) tensor, optional
            The gradient of the server's step that led to these parameters; without it `cosine` is NaN.
        flips : Flips
            The labels that were flipped in it.
        updates : (m, A, B) tensor, optional
            The updates of the round's clients, in their order; without them `MEASURES` are NaN.

        Raises
        ------
        RunError
            Where the parameters are not finite any more; the history then ends with the round before.
        """
        settings = self.scenario.settings
        if not theta.isfinite().all():
            raise RunError(self._why_not_finite(round_, aggregate, updates))
        before, self.history.theta = self.history.theta, theta
        if len(flips.samples):
            self.history.flips.append((round_, flips))
        if round_ % settings.eval_every == 0 or round_ == settings.rounds:
            self._row = self._measure(round_, before, aggregate, flips, updates)
            self.history.rows.append(self._row)
            if self._early_stop and self._early_stop.lower(np.array([self._row["validation_loss"]]))[0]:
                self._best = theta
        if settings.early_stop.restore == "best" and self._early_stop and (self.stopped or round_ == settings.rounds):
            self.history.theta = self._best
        self._last, self.round = flips, round_
        self.on_round(round_, self._row)

    def _why_not_finite(self, round_: int, aggregate: Tensor | None, updates: Tensor | None) -> str:
        """The message on what made theta NaN or infinite: an attack, the rule, or the step itself."""
        settings, when = self.scenario.settings, f"in round {round_} of {self.scenario.settings.rounds}"
        if updates is not None and settings.attacked and settings.attack.writes == "updates":
            malicious = np.isin(self.scenario.schedule.participants(round_), self.scenario.partition.malicious)
            finite = updates.flatten(1).isfinite().all(1).cpu().numpy()
            if finite[~malicious].all() and not finite.all():
                return (
                    f"attack={settings.attack.name} sent values that are not finite {when}, and "
                    f"strategy={settings.strategy.name} let them pass"
                )
        sound = updates is not None and bool(updates.isfinite().all())
        if sound and aggregate is not None and not aggregate.isfinite().all():
            name = settings.strategy.path or settings.strategy.name
            return f"strategy {name} gave values that are not finite {when}, from updates that all are"
        return (
            f"the run diverged: theta is not finite after round {round_} of {settings.rounds} "
            f"(lr={settings.lr:g}); a smaller lr keeps it finite"
        )

    def state(self) -> State:
        """The state that `restore` needs to go on after the last round recorded."""
        history = self.history
        return {
            "round": self.round,
            "seconds": history.seconds,
            "theta": history.theta,
            "rows": history.table(),
            **packed_flips(history.flips),
            "plans": plans.sweeps_of(self.scenario) if self.scenario.settings.attack.horizon else [],
            "early_stop": self._early_stop
            and {"lowest": self._early_stop.lowest, "since": self._early_stop.since, "best": self._best},
        }

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave."""
        history, self.round = self.history, state["round"]
        history.seconds, history.theta = state["seconds"], state["theta"]
        history.rows = [row_of(values) for values in state["rows"].tolist()]
        self._row = history.rows[-1]
        history.flips = unpacked_flips(state)
        plans.restore_sweeps(self.scenario, state["plans"])
        if history.flips and history.flips[-1][0] == self.round:
            self._last = history.flips[-1][1]
        if self._early_stop:
            kept = state["early_stop"]
            self._early_stop.lowest, self._early_stop.since, self._best = kept["lowest"], kept["since"], kept["best"]

    def _measure(
        self, round_: int, before: Tensor, aggregate: Tensor | None, flips: Flips, updates: Tensor | None
    ) -> Row:
        """The row of a round, in which theta `before` (A, B) became that of the history."""
        X, y = self._test_set
        quality = self.scenario.model.measure(self.history.theta.to(X.dtype), X, y)
        cosine = math.nan
        if aggregate is not None and self.scenario.dataset.is_complete:
            clean = self.scenario.gradient(before, self.scenario.schedule.participants(round_), round_)
            if decay := self.scenario.settings.weight_decay:
                clean = clean + decay * before
            norms = (aggregate.norm() * clean.norm()).item()
            cosine = (aggregate * clean).sum().item() / norms if norms > 0 else math.nan
        _, at_now, at_last = np.intersect1d(flips.samples, self._last.samples, assume_unique=True, return_indices=True)
        changed = flips.labels[at_now] != self._last.labels[at_last]
        count = len(flips.samples)
        values = (
            round_,
            *quality,
            count,
            flips.written,
            flips.allowed,
            flips.written / flips.allowed if flips.allowed else 0.0,
            count / self.scenario.schedule.labels_used(round_) if round_ else 0.0,
            cosine,
            len(at_now) / max(1, count),
            int(changed.sum()) / max(1, count),
            *self._detection(round_, updates),
            self._validation_loss(),
        )
        return dict(zip(COLUMNS, values, strict=True))

    def _detection(self, round_: int, updates: Tensor | None) -> list[float]:
        """The values of `detect.MEASURES` for the updates (m, A, B) of a round; NaN without updates or attack."""
        scenario = self.scenario
        if updates is None or not scenario.settings.attacked:
            return [math.nan] * len(MEASURES)
        malicious = np.isin(scenario.schedule.participants(round_), scenario.partition.malicious)
        found: list[float] = detect.measures(updates, torch.from_numpy(malicious).to(updates.device)).tolist()
        return found

    def _validation_loss(self) -> float:
        """Mean loss of the model on the validation split; NaN without one."""
        if self._validation_set is None:
            return math.nan
        X, y = self._validation_set
        return self.scenario.model.mean_loss(self.history.theta.to(X.dtype), X, y)
