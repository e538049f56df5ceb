"""From settings to results: the one place where data, engine, files and terminal meet."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fl_attack import attack, engine, folder, identity, plans, plots, report, results, scenario, targets, trackers
from fl_attack.checkpoint import Checkpoint
from fl_attack.config import Settings, without_effect
from fl_attack.errors import Interrupted, RunError
from fl_attack.history import History, OnRound, Recorder, Row, row_of
from fl_attack.progress import Progress
from fl_attack.scenario import Scenario

if TYPE_CHECKING:
    from fl_attack import federation

SAVE_EVERY = 10.0  # seconds
Runs = Mapping[str, tuple[Scenario, Path]]  # the experiment and, before it, its unattacked twin; where each goes


class Keep(Protocol):
    """Writes what a run has measured so far, or has measured in the end."""

    def __call__(self, name: str, history: History, finished: bool = True) -> None:
        """Write the history of a run.

        Parameters
        ----------
        name : {"attacked", "honest"}
            Which run of the experiment it is.
        history : History
            What was measured in its rounds so far.
        finished : bool
            Whether all rounds are done; an unfinished run gets neither a summary nor `clients.csv`.
        """


def run(
    settings: Settings,
    runner: "federation.Runner | None" = None,
    make: Callable[[Settings], Scenario] = scenario.make,
) -> dict[str, dict[str, Any]]:
    """Run an experiment and leave its results in `settings.out`.

    Parameters
    ----------
    settings : Settings
        The checked settings of the experiment.
    runner : federation.Runner, optional
        What brings clients up for `engine=flower`; by default Ray on this machine.
    make : callable, optional
        Gives the scenario of the settings, where they do not say all of it: of nodes with data of their own.

    Returns
    -------
    dict of str to dict
        The summaries of its runs, see `results.summary`: of an attacked experiment `attacked` and, where a baseline is
        asked for, `honest`; of another `honest` alone.

    Raises
    ------
    InputError
        Before any work starts, where the settings can't be met or `out` holds what would be lost.
    RunError
        Where a run can't go on; what it had so far is then written.
    Interrupted
        Where a signal ends it; the message says what is kept and where.
    """
    trackers.check(settings.tracker)
    attacked = make(settings)
    check(attacked)

    def goes_on(at: Path) -> bool:
        return results.is_of(at, attacked.settings)

    for note in without_effect(settings, sweep=False):
        print(f"note: {note}", file=sys.stderr)
    with (
        folder.taken(Path(settings.out), "run", settings.overwrite, goes_on) as place,
        _explain_interruption(place.work),
    ):
        if not settings.resume or not goes_on(place.work):
            folder.clear(place.work)
        with trackers.of_run(attacked.settings, place.work) as tracked:
            if settings.attacked and settings.attack.steers:
                with Progress(settings.rounds, "target", "round") as progress:
                    targets.load_target(attacked, progress)
            if plans.plans_whole_run(attacked):
                with Progress(attack.planned_options(settings.attack.args).sweeps, "plan", "sweep") as progress:
                    plans.load_plans([attacked], on_sweep=progress)
                plans.plan(attacked)
            results.write_config(place.work, attacked.settings)
            summaries = _run(attacked, place.work, runner, tracked)
            tracked.leave()
            folder.settle(place)
            if settings.report:
                report.offer([place.out])
            tracked.files(place.out)
    return summaries


def check(which: Scenario) -> None:
    """InputError where the engine of an experiment can't run it; Flower and Ray are imported only for theirs."""
    if which.settings.engine.name == "batched":
        engine.check(which)
    else:
        from fl_attack import federation

        federation.check(which)


def _run(
    attacked: Scenario, work: Path, runner: "federation.Runner | None", tracked: trackers.Tracked
) -> dict[str, dict[str, Any]]:
    """Run an experiment, write all its files into a folder that is held, and give the summaries of its runs by name."""
    settings = attacked.settings
    runs: dict[str, tuple[Scenario, Path]] = {"attacked" if settings.attacked else "honest": (attacked, work)}
    if settings.baseline and settings.attacked:
        honest = replace(attacked, settings=settings.unattacked())
        runs = {"honest": (honest, work / results.BASELINE)} | runs
    summaries: dict[str, dict[str, Any]] = {}
    twin: History | None = None

    def keep(name: str, history: History, finished: bool = True) -> None:
        nonlocal twin
        which, where = runs[name]
        results.write(where, which, history)
        tracked.rows(history.rows, part_of(name, settings))
        if finished:
            summaries[name] = results.summary(which, history, twin)
            results.write_clients(where, which, history)
        if name == "honest":
            twin = history

    if settings.engine.name == "batched":
        _batched(runs, keep, tracked)
    else:
        _federated(runs, settings, keep, runner, tracked)
    last = summaries["attacked" if settings.attacked else "honest"]
    plots.curves_of(work, last)
    if (work / folder.PLAN).exists():
        plots.plan_curves(work)
    for name, facts in summaries.items():  # the twin first: the summary in the folder itself says that all is there
        results.write_summary(runs[name][1], facts)
        tracked.summary(facts, part_of(name, settings))
    for _, where in runs.values():
        Checkpoint(where, "").remove()
    return summaries


@contextmanager
def _explain_interruption(work: Path) -> Iterator[None]:
    """A block in which a KeyboardInterrupt becomes an Interrupted that says what is kept."""
    try:
        yield
    except KeyboardInterrupt as signalled:
        parts = work, work / results.BASELINE
        kept = any((part / "rounds.csv").exists() for part in parts)
        goes_on = any((part / folder.STATE).exists() for part in parts)
        then = "goes on" if goes_on else "begins anew"
        what = f"what was measured is in {work}; the same command {then}" if kept else "nothing was measured yet"
        code = signalled.code if isinstance(signalled, Interrupted) else 130
        raise Interrupted(f"interrupted; {what}", code) from None


def part_of(name: str, settings: Settings) -> str:
    """The part that a run is for trackers, see `trackers.Store`: `baseline` for the twin of an attack, else empty.

    Parameters
    ----------
    name : {"attacked", "honest"}
        Which of the two runs of an experiment it is.
    settings : Settings
        The settings of the experiment.
    """
    return results.BASELINE if settings.attacked and name == "honest" else ""


def _batched(runs: Runs, keep: Keep, tracked: trackers.Tracked) -> None:
    """Run an experiment and its twin side by side in this process; both are kept before a RunError of either."""
    settings = list(runs.values())[-1][0].settings
    names, done, due = list(runs), 0, time.monotonic() + SAVE_EVERY

    def step(rounds: int) -> None:
        """Count rounds of one run; what is shown is the mean over the runs."""
        nonlocal done
        before, done = done, done + rounds
        for round_ in range(before // len(runs) + 1, done // len(runs) + 1):
            progress(round_)

    def watch(cells: list[int], so_far: Callable[[], list[engine.Outcome]]) -> None:
        """Write and log the rounds so far now and then; after a signal write them and raise Interrupted."""
        nonlocal due
        parts = [part_of(names[cell], settings) for cell in cells]
        if any(map(tracked.is_due, parts)):
            for part, outcome in zip(parts, so_far(), strict=True):
                later = outcome.table[outcome.table[:, 0] > tracked.last(part)]
                tracked.rows([row_of(values) for values in later.tolist()], part)
        if not signalled() and time.monotonic() < due:
            return
        for cell, outcome in zip(cells, so_far(), strict=True):
            keep(names[cell], outcome.history(), finished=False)
        due = time.monotonic() + SAVE_EVERY
        if code := signalled():
            raise Interrupted("", code)

    with Progress(settings.rounds, "batched", "round") as progress, _between_rounds() as signalled:
        outcomes = engine.run_cells(
            [which for which, _ in runs.values()],
            checkpoints=[Checkpoint(where, identity.key_of([which])) for which, where in runs.values()],
            device=settings.engine.device,
            memory_gb=settings.engine.memory_gb,
            progress=step,
            watch=watch,
        )
    for name, outcome in zip(runs, outcomes, strict=True):
        keep(name, outcome.history(), outcome.error is None)
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise RunError(errors[0])


@contextmanager
def _between_rounds() -> Iterator[Callable[[], int]]:
    """A block with a function that gives the exit code of a Ctrl-C or SIGTERM which has come, 0 before.

    A second signal raises Interrupted at once. Off the main thread, which alone gets signals, it always gives 0.
    """
    came = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: object) -> None:
        nonlocal came
        came, again = 128 + number, came
        if again:
            raise Interrupted("", came)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _federated(
    runs: Runs, settings: Settings, keep: Keep, runner: "federation.Runner | None", tracked: trackers.Tracked
) -> None:
    """Run an experiment and its twin one after the other, over the same clients; by default those of Ray."""
    from fl_attack import federation

    unfinished: dict[str, Recorder] = {}

    def drive(federate: "federation.Federate") -> None:
        for name, (which, where) in runs.items():
            with Progress(settings.rounds, name, "round") as progress:
                recorder = Recorder(which, checkpoint=Checkpoint(where, identity.key_of([which])))
                logged = tracked.observer(recorder.history, part_of(name, settings))
                recorder.on_round = both(both(progress, saver(where, recorder.history)), logged)
                unfinished[name] = recorder
                federate(recorder)
            keep(name, unfinished.pop(name).history)

    try:
        (runner or federation.run)(drive, settings)
    except BaseException:
        for name, recorder in unfinished.items():  # what there is of the run that broke off
            if recorder.history.rows:
                keep(name, recorder.history, finished=False)
        raise


def saver(folder: Path, history: History) -> OnRound:
    """An observer of rounds that writes the growing table of a run, so that not even a power cut takes it all.

    Parameters
    ----------
    folder : Path
        The folder of the run's files.
    history : History
        What the run has measured; it grows.

    Returns
    -------
    callable
        Writes `rounds.csv`, at most every `SAVE_EVERY` seconds.
    """
    last = time.monotonic()

    def save(round_: int, row: Row) -> None:
        nonlocal last
        if time.monotonic() - last > SAVE_EVERY:
            results.write_rounds(folder, history)
            last = time.monotonic()

    return save


def both(first: OnRound, second: OnRound) -> OnRound:
    """An observer of rounds that calls two others, one after the other.

    Parameters
    ----------
    first, second : callable
        Each gets the number of a round and its row of measures.

    Returns
    -------
    callable
        An observer that takes the same arguments.
    """

    def observe(round_: int, row: Row) -> None:
        first(round_, row)
        second(round_, row)

    return observe
