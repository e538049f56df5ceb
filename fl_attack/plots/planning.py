"""How far planned flips go beyond the better of the two greedy goals, and where they do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend
from fl_attack.sweep_table import (
    ACCURACY,
    GOAL,
    NAME,
    B,
    Floats,
    K,
    NotDrawableError,
    Sweep,
    format_value,
    mean_interval,
    read_curves,
    read_sweep,
    write_csv,
)

OBJECTIVE, FORESIGHT, START, EARLY = "attack.objective", "attack.foresight", "attack.start", "early_stop_accuracy"
DIGITS = 4  # significant digits of the tables
SPREAD = 0.6  # of the room between two settings that the plans of one share


class Gap(NamedTuple):
    """How much lower an accuracy is under planned flips than under the better greedy goal, pair by pair of seeds."""

    k: float
    b: float
    goal: str  # the better one: of lower accuracy in the mean
    plan: str
    mean: float  # points
    half: float  # of the 95 % interval; NaN for one seed

    @property
    def is_sure(self) -> bool:
        """Whether there is an interval and it leaves zero out."""
        return abs(self.mean) > self.half


def planning(folder: Path) -> list[Path]:
    """Draw the gap of the better greedy goal to each kind of plan: in final, average and the early stop's accuracy.

    Parameters
    ----------
    folder : Path
        The folder of a sweep such as `experiment=planning`.

    Returns
    -------
    list of Path
        `planning.png`, `.pdf`; `planning.csv` with the accuracy under each attacker and its interval, and
        `planning_gaps.csv` with the gaps and whether their interval includes zero.

    Raises
    ------
    InputError
        Where the sweep does not hold greedy and planned flips.
    """
    sweep = read_sweep(folder)
    names = attackers(sweep)
    if not any(name.startswith("planned") for name in names) or not any(name.startswith("greedy") for name in names):
        raise NotDrawableError("planning compares greedy and planned flips; sweep attack.name=greedy,planned")
    measures = dict(_measures(sweep, folder))
    gaps = {what: list(_gaps(sweep, names, values)) for what, values in measures.items()}
    figure, panels = canvas.panels(list(measures), 4.2, 3.6, "gap to the better greedy goal (points)", "")
    plans = list(dict.fromkeys(gap.plan for found in gaps.values() for gap in found))
    settings = list(dict.fromkeys((gap.k, gap.b) for found in gaps.values() for gap in found))
    for what, axes in panels.items():
        axes.axvline(0, color="0.4", linewidth=0.8)
        for number, plan in enumerate(plans):
            of_plan = [gap for gap in gaps[what] if gap.plan == plan]
            offset = SPREAD * ((number + 0.5) / len(plans) - 0.5)
            at = [settings.index((gap.k, gap.b)) + offset for gap in of_plan]
            style = canvas.style(number) | {"linestyle": "", "capsize": 2}
            half = np.nan_to_num([gap.half for gap in of_plan])
            axes.errorbar([gap.mean for gap in of_plan], at, xerr=half, label=plan, **style)
        axes.set_yticks(range(len(settings)), [f"k = {k:.3g}, b = {b:.3g}" for k, b in settings])
        axes.set_ylim(len(settings) - 0.5, -0.5)
    legend(figure, panels)
    note = "Positive: planned flips leave less. Bars: 95 % confidence over paired seeds (Student t)."
    caption(figure, f"Accuracy lost beyond the better greedy goal, {sweep.averaging()}", sweep.note(note))
    return [
        *canvas.save(figure, folder, "planning"),
        _write_accuracies(folder, sweep, names, measures),
        _write_gaps(folder, gaps),
    ]


def attackers(sweep: Sweep) -> NDArray[np.object_]:
    """(cells,) who attacks, in words: an attack and what distinguishes it from others of its name."""

    def column(name: str, usual: str | float) -> list[str | float]:
        """The values of a column; `usual` for each cell where there is none such."""
        return sweep.cells[name].tolist() if name in sweep.cells.columns else [usual] * len(sweep)

    found = []
    settings = zip(column(NAME, ""), column(GOAL, "untargeted"), column(START, 1.0), strict=True)
    plans = zip(column(OBJECTIVE, "final"), column(FORESIGHT, "known"), strict=True)
    for (name, goal, start), (objective, foresight) in zip(settings, plans, strict=True):
        if name == "greedy":
            late = f" from round {format_value(start)}" if start != 1 else ""
            found.append(f"greedy {goal}{late}")
        else:
            found.append(f"planned {objective}, {foresight}" if name == "planned" else str(name))
    return np.array(found, object)


def _measures(sweep: Sweep, folder: Path) -> Iterator[tuple[str, Floats]]:
    """Yield the names of what is compared, each with its values (cells,) in percent."""
    yield "final accuracy", sweep.numbers(ACCURACY)
    accuracy, _ = read_curves(folder)
    yield "average over the evaluations", np.nanmean(accuracy[sweep.column("cell").astype(int), 1:], 1)
    if EARLY in sweep.cells.columns and np.isfinite(sweep.numbers(EARLY)).any():
        yield "model of early stopping", sweep.numbers(EARLY)


def _by_seed(sweep: Sweep, values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Mean of values over the cells of a mask for each seed, (seeds,); NaN where a seed has none."""
    seeds = range(int(sweep.seed_index.max()) + 1)
    picked = [values[mask & (sweep.seed_index == seed)] for seed in seeds]
    return np.array([part.mean() if len(part) else np.nan for part in picked])


def _gaps(sweep: Sweep, names: NDArray[np.object_], values: Floats) -> Iterator[Gap]:
    """Yield the gap of each k, b and plan in values (cells,), where a seed has greedy flips too."""
    for (k, b), cells in sweep.cells.parts(K, B):
        here = np.zeros(len(sweep), bool)
        here[cells] = True
        greedy = {
            name: _by_seed(sweep, values, here & (names == name))
            for name in ("greedy untargeted", "greedy targeted")
            if np.isfinite(values[here & (names == name)]).any()
        }
        if not greedy:
            continue
        better = min(greedy, key=lambda name: np.nanmean(greedy[name]))
        for plan in sorted({name for name in names[here] if name.startswith("planned")}):
            gap = greedy[better] - _by_seed(sweep, values, here & (names == plan))
            paired = gap[np.isfinite(gap)]
            if len(paired):
                yield Gap(k, b, better.removeprefix("greedy "), plan, *mean_interval(paired))


def _write_accuracies(folder: Path, sweep: Sweep, names: NDArray[np.object_], measures: dict[str, Floats]) -> Path:
    """Write `planning.csv`, the mean over seeds of each measure by k, b and attacker, and give the file."""
    rows = []
    for what, values in measures.items():
        for (k, b), cells in sweep.cells.parts(K, B):
            for name in dict.fromkeys(names[cells]):
                here = np.zeros(len(sweep), bool)
                here[cells[names[cells] == name]] = True
                by_seed = _by_seed(sweep, values, here)
                finite = by_seed[np.isfinite(by_seed)]
                if len(finite):
                    rows.append([k, b, what, name, *mean_interval(finite), len(finite)])
    header = ["write_access", "budget", "measure", "attacker", "mean", "interval", "seeds"]
    return write_csv(folder / "planning.csv", header, rows, DIGITS)


def _write_gaps(folder: Path, gaps: dict[str, list[Gap]]) -> Path:
    """Write `planning_gaps.csv`, a row for each gap, and give the file; `gaps` are by measure."""
    header = ["write_access", "budget", "measure", "better_goal", "plan", "gap", "interval", "includes_zero"]
    rows = [
        [gap.k, gap.b, what, gap.goal, gap.plan, gap.mean, gap.half, "no" if gap.is_sure else "yes"]
        for what, found in gaps.items()
        for gap in found
    ]
    return write_csv(folder / "planning_gaps.csv", header, rows, DIGITS)
