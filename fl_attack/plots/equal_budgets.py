"""Attacks on labels at equal budgets, model by model: where greedy flips do most harm, and where they don't."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend
from fl_attack.sweep_table import (
    ACCURACY,
    BUDGET,
    GOAL,
    NAME,
    NUMBERS,
    WRITES,
    B,
    K,
    NotDrawableError,
    Sweep,
    mean_interval,
    read_sweep,
    write_csv,
)

GREEDY, UNATTACKED = "greedy", "none"
DIGITS = 4  # significant digits of the table
SPREAD = 0.7  # of the room between two settings that the attacks of one share


class Point(NamedTuple):
    """An attack of one write access and budget on one model, over seeds."""

    model: str
    k: float
    b: float
    attack: str  # its name, of greedy with the goal
    accuracy: NDArray[np.float64]  # (seeds,) in percent

    @property
    def is_greedy(self) -> bool:
        """Whether the attack is `greedy`, of whatever goal."""
        return self.attack.startswith(GREEDY)


def networks(folder: Path, by: str = "model") -> list[Path]:
    """Draw the final accuracy under each attack at each write access and budget, a panel for each model.

    Parameters
    ----------
    folder : Path
        The folder of a sweep such as `experiment=networks`.
    by : str
        The column that has a panel for each value.

    Returns
    -------
    list of Path
        `networks.png`, `.pdf`, and the numbers with their intervals as `networks.csv`.

    Raises
    ------
    InputError
        Where the sweep has no such column or a single attack, or was swept over other settings besides.
    """
    sweep = read_sweep(folder)
    found = points(sweep, by)
    others = sweep.varied(by, NAME, GOAL, K, B, BUDGET)
    if others:
        raise NotDrawableError(f"networks shows {by}, attack, k and b; the sweep has several values of {others[0]} too")
    attacks = list(dict.fromkeys(point.attack for point in found if point.attack != UNATTACKED))
    if len(attacks) < 2:
        raise NotDrawableError("networks compares attacks; the sweep has a single one")
    models = list(dict.fromkeys(point.model for point in found))
    attacked = {(point.k, point.b) for point in found if point.attack != UNATTACKED}
    settings = sorted(attacked, key=lambda setting: (-setting[0], setting[1]))
    names = [f"k = {k:g}\nb = {b:g}" for k, b in settings]
    figure, panels = canvas.panels(models, 1.6 + 0.55 * len(settings), 3.4, "", NUMBERS[ACCURACY][0])
    for model, axes in panels.items():
        honest = [point.accuracy.mean() for point in found if point.model == model and point.attack == UNATTACKED]
        if honest:
            axes.axhline(np.mean(honest), color="0.4", linestyle="--", linewidth=1, label="unattacked")
        for number, attack in enumerate(attacks):
            own = [point for point in found if point.model == model and point.attack == attack]
            shift = SPREAD * ((number + 0.5) / len(attacks) - 0.5)
            at = [settings.index((point.k, point.b)) + shift for point in own]
            mean, half = np.array([mean_interval(point.accuracy) for point in own]).reshape(-1, 2).T
            style = canvas.style(number) | {"linestyle": "none"}
            axes.errorbar(at, mean, np.nan_to_num(half), label=attack, capsize=2, elinewidth=1, **style)
        axes.set_xticks(range(len(settings)), names, fontsize="small")
    low, high = axes.get_ylim()  # of all panels; an interval may leave what is possible
    axes.set_ylim(max(low, -2), min(high, 102))
    legend(figure, panels)
    caption(figure, f"Equal budgets of flips, {sweep.averaging()}, 95 % intervals", sweep.note(sentence(found)))
    header = [by, K, B, "attack", "seeds", "mean", "interval"]
    rows = [
        [point.model, point.k, point.b, point.attack, len(point.accuracy), *mean_interval(point.accuracy)]
        for point in found
    ]
    return [*canvas.save(figure, folder, "networks"), write_csv(folder / "networks.csv", header, rows, DIGITS)]


def points(sweep: Sweep, by: str) -> list[Point]:
    """The attacks on labels of a sweep, each at its write access and budget on each model, and the unattacked cells.

    Parameters
    ----------
    sweep : Sweep
        The cells.
    by : str
        The column that tells the models apart.

    Returns
    -------
    list of Point
        In the order in which the table has them first.
    """
    goal = sweep.column(GOAL) if GOAL in sweep.cells.columns else np.full(len(sweep), "untargeted")
    attack = np.array(
        [f"{name}, {aim}" if name == GREEDY else name for name, aim in zip(sweep.column(NAME), goal, strict=True)]
    )
    model, k, b, writes = (sweep.column(name) for name in (by, K, B, WRITES))
    keys: dict[tuple[str, float, float, str], list[int]] = {}
    for i in np.flatnonzero(writes != "updates"):
        keys.setdefault((str(model[i]), float(k[i]), float(b[i]), str(attack[i])), []).append(int(i))
    return [Point(*which, accuracy=sweep.seed_means(np.array(cells))) for which, cells in keys.items()]


def sentence(found: list[Point]) -> str:
    """One sentence: at which settings another attack has a lower mean accuracy than the better goal of greedy flips."""
    settings = dict.fromkeys((point.model, point.k, point.b) for point in found if point.attack != UNATTACKED)
    lost = []
    for setting in settings:
        here = [point for point in found if point[:3] == setting]
        greedy = [point for point in here if point.is_greedy]
        rivals = [point for point in here if not point.is_greedy and point.attack != UNATTACKED]
        if not (greedy and rivals):
            continue
        best, rival = (min(some, key=lambda point: float(point.accuracy.mean())) for some in (greedy, rivals))
        ahead = float(best.accuracy.mean() - rival.accuracy.mean())
        if ahead > 0:
            model, k, b = setting
            lost.append(f"{model} k = {k:g} b = {b:g} ({rival.attack}, by {ahead:.1f} points)")
    if not lost:
        return f"The better goal of greedy does most harm in all {len(settings)} settings."
    return f"Greedy does not do most harm in {len(lost)} of {len(settings)} settings: {'; '.join(lost)}."
