"""From settings to results: the one place where data, engine, files and terminal meet."""

import itertools
import sys
import time
from pathlib import Path
from typing import Any, Protocol, Self

from tqdm import tqdm

from fl_attack import engine, federation, plots, results, scenario, targets
from fl_attack.config import AttackSettings, Settings
from fl_attack.errors import RunError
from fl_attack.history import History, OnRound, Recorder, Row
from fl_attack.scenario import Scenario

SAVE_EVERY = 10.0  # seconds


class Keep(Protocol):
    """Writes the history of a run, by its name."""

    def __call__(self, name: str, history: History, finished: bool = True) -> None:
        """Write it; an unfinished one without a summary."""


def run(settings: Settings, runner: federation.Runner = federation.run) -> dict[str, dict[str, Any]]:
    """Run an experiment and leave its results in `settings.out`; gives the summaries of its runs by name.

    InputError before any work starts where the settings can't be met; RunError where a run can't go on, with what it
    had so far written.
    """
    out = Path(settings.out)
    attacked = scenario.make(settings)
    batched = settings.engine.name == "batched"
    (engine.check if batched else federation.check)(attacked)
    results.prepare(out, settings.overwrite)
    runs: dict[str, tuple[Scenario, Path]] = {"attacked" if settings.attacked else "honest": (attacked, out)}
    if settings.baseline and settings.attacked:
        honest = Scenario(unattacked(settings), attacked.dataset, attacked.partition, attacked.schedule)
        runs = {"honest": (honest, out / results.BASELINE)} | runs
    if settings.attacked and settings.attack.goal == "targeted":
        with Progress("target", settings.rounds) as progress:
            targets.load_target(attacked, progress)
    summaries: dict[str, dict[str, Any]] = {}
    twin: History | None = None

    def keep(name: str, history: History, finished: bool = True) -> None:
        nonlocal twin
        which, folder = runs[name]
        results.write(folder, which, history, finished, twin)
        if finished:
            summaries[name] = results.summary(which, history, twin)
        twin = history if name == "honest" else twin

    if batched:
        results.clear(out)
        _batched({name: which for name, (which, _) in runs.items()}, keep)
    else:
        _federated(runs, settings, keep, runner)
    plots.curves(out)
    return summaries


def _batched(runs: dict[str, Scenario], keep: Keep) -> None:
    settings = next(iter(runs.values())).settings
    done = itertools.count(1)
    with Progress("batched", settings.rounds) as progress:
        outcomes = engine.run_cells(
            list(runs.values()),
            device=settings.engine.device,
            memory_gb=settings.engine.memory_gb,
            progress=lambda _: progress(next(done)),
        )
    for name, outcome in zip(runs, outcomes, strict=True):
        keep(name, outcome.history(), outcome.error is None)
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise RunError(errors[0])


def _federated(
    runs: dict[str, tuple[Scenario, Path]], settings: Settings, keep: Keep, runner: federation.Runner
) -> None:
    unfinished: dict[str, Recorder] = {}
    print(f"starting Ray and {settings.clients.total} clients", file=sys.stderr, flush=True)

    def drive(federate: federation.Federate) -> None:
        results.clear(Path(settings.out))
        for name, (which, folder) in runs.items():
            with Progress(name, settings.rounds) as progress:
                recorder = unfinished[name] = Recorder(which)
                recorder.on_round = both(progress, saver(folder, recorder.history))
                federate(recorder)
            keep(name, unfinished.pop(name).history)

    try:
        runner(drive, settings)
    except BaseException:
        for name, recorder in unfinished.items():  # what there is of the run that broke off
            keep(name, recorder.history, finished=False)
        raise


def unattacked(settings: Settings) -> Settings:
    """The same experiment with every client honest."""
    return settings.model_copy(update={"attack": AttackSettings(name="none"), "baseline": False})


def saver(folder: Path, history: History) -> OnRound:
    """Writes the growing table of a run now and then, so that not even a power cut takes it all."""
    last = time.monotonic()

    def save(round_: int, row: Row) -> None:
        nonlocal last
        if time.monotonic() - last > SAVE_EVERY:
            results.write_rounds(folder, history)
            last = time.monotonic()

    return save


def both(first: OnRound, second: OnRound) -> OnRound:
    """One observer after the other."""

    def observe(round_: int, row: Row) -> None:
        first(round_, row)
        second(round_, row)

    return observe


class Progress:
    """How far a run is: a live bar on a terminal, a plain line every tenth of the way elsewhere."""

    def __init__(self, name: str, rounds: int) -> None:
        self.name, self.rounds = name, rounds
        self.bar: tqdm | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.rounds, desc=f"{self.name:>8}", unit="round")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, round_: int, row: Row | None = None) -> None:
        """Show that a round is done, and the accuracy last measured."""
        accuracy = f"accuracy {row['test_accuracy']:.4f}" if row else ""
        if self.bar is not None:
            self.bar.set_postfix_str(accuracy, refresh=False)
            self.bar.update(round_ - self.bar.n)
        elif round_ * 10 // self.rounds > (round_ - 1) * 10 // self.rounds and round_:
            print(f"{self.name}: round {round_} of {self.rounds}  {accuracy}".rstrip(), file=sys.stderr, flush=True)
