"""Every defence against every attack: what each costs without attackers, and how much harm is left with them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, colour_bar, ink_on
from fl_attack.sweep_table import ACCURACY, NAME, NUMBERS, NotDrawableError, Sweep, mean_interval, read_sweep, write_csv

ADAPT, PRE, SANITIZE, STRATEGY, UNATTACKED = "attack.adapt", "strategy.pre", "sanitize.name", "strategy.name", "none"
DIGITS = 4  # significant digits of the table


class Meeting(NamedTuple):
    """A defence and an attack that met, over seeds."""

    setting: str  # of what else was swept
    defence: str
    attack: str
    accuracy: NDArray[np.float64]  # (seeds,) in percent
    harm: NDArray[np.float64]  # (cells,) the accuracy of the same defence and seed without attackers, less this one

    @property
    def verdict(self) -> str:
        """Where the interval of the harm is: "harm" above zero, "gain" below, else "includes zero".

        Empty where nobody attacks, and "one seed" where there is no interval.
        """
        mean, half = mean_interval(self.harm)
        if self.attack == UNATTACKED:
            return ""
        if not np.isfinite(half):
            return "one seed"
        return "harm" if mean > half else "gain" if -mean > half else "includes zero"


def arms(folder: Path) -> list[Path]:
    """Draw the mean final accuracy of every defence under every attack; the worst attack of each defence is framed.

    Parameters
    ----------
    folder : Path
        The folder of a sweep such as `experiment=arms_race`. Settings besides attack, its `adapt`, rule,
        pre-aggregators and `sanitize` have a panel each.

    Returns
    -------
    list of Path
        `arms.png`, `.pdf`, and the numbers with their intervals as `arms.csv`.

    Raises
    ------
    InputError
        Where attacks or defences do not vary, or there are more settings than panels.
    """
    from matplotlib.patches import Rectangle

    sweep = read_sweep(folder)
    met = meetings(sweep)
    attacks, defences = (list(dict.fromkeys(getattr(one, kind) for one in met)) for kind in ("attack", "defence"))
    for kind, values in (("attacks", attacks), ("defences", defences)):
        if len(values) < 2:
            raise NotDrawableError(f"arms compares {kind}; the sweep has a single one")
    names = canvas.distinct_values(np.array([one.setting for one in met], object), canvas.PANELS, "panels of arms")
    figure, panels = canvas.panels(names, 2.2 + 0.95 * len(attacks), 1.5 + 0.3 * len(defences), "", "")
    low, high, extend = canvas.limits(np.array([float(one.accuracy.mean()) for one in met]))
    for name, axes in panels.items():
        found = {(one.defence, one.attack): one for one in met if one.setting == name}
        grid = np.full((len(defences), len(attacks)), np.nan)
        for (defence, attack), one in found.items():
            grid[defences.index(defence), attacks.index(attack)] = one.accuracy.mean()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        image = axes.pcolormesh(grid, cmap="cividis", vmin=low, vmax=high)
        axes.set_xticks(np.arange(len(attacks)) + 0.5, attacks, rotation=35, ha="right")
        axes.set_yticks(np.arange(len(defences)) + 0.5, [canvas.shortened(defence) for defence in defences])
        axes.tick_params(length=0)
        axes.set_ylim(len(defences), 0)
        for (row, column), value in np.ndenumerate(grid):
            here = found.get((defences[row], attacks[column]))
            text = "\N{MULTIPLICATION SIGN}" if here is None else _shown(here)
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink_on(image, value))
        for row, defence in enumerate(defences):
            own = [one for one in found.values() if one.defence == defence and one.attack != UNATTACKED]
            if own:
                worst = attacks.index(min(own, key=lambda one: float(one.accuracy.mean())).attack)
                frame = Rectangle((worst + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=2)
                axes.add_patch(frame)
    colour_bar(figure, panels, image, NUMBERS[ACCURACY][0], extend)
    note = "Framed: the worst attack for each defence. ± half the 95 % interval (Student t). °: the harm may be none."
    caption(figure, f"Defences against attacks, {sweep.averaging()}", sweep.note(note))
    header = ["setting", "defence", "attack", "seeds", "mean", "interval", "harm", "harm_interval", "verdict"]
    rows = [
        [*one[:3], len(one.accuracy), *mean_interval(one.accuracy), *mean_interval(one.harm), one.verdict]
        for one in met
    ]
    return [*canvas.save(figure, folder, "arms"), write_csv(folder / "arms.csv", header, rows, DIGITS)]


def _shown(one: Meeting) -> str:
    """Mean accuracy and half its interval in percent, as text that ends with ° where the harm's includes zero."""
    mean, half = mean_interval(one.accuracy)
    spread = f" ± {half:.0f}" if np.isfinite(half) else ""
    return f"{mean:.0f}{spread}" + ("°" if one.verdict == "includes zero" else "")


def meetings(sweep: Sweep) -> list[Meeting]:
    """A meeting for each setting, defence and attack of a sweep, in the order in which the table has them first."""
    setting = sweep.labels(sweep.varied(NAME, ADAPT, STRATEGY, PRE, SANITIZE))
    defence, attack = _defences(sweep), _attacks(sweep)
    accuracy = sweep.column(ACCURACY)
    honest = {
        (setting[i], defence[i], sweep.seed_index[i]): accuracy[i] for i in range(len(sweep)) if attack[i] == UNATTACKED
    }
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i in range(len(sweep)):
        groups.setdefault((setting[i], defence[i], attack[i]), []).append(i)
    return [
        Meeting(
            *which,
            accuracy=sweep.seed_means(np.array(cells)),
            harm=np.array([honest.get((*which[:2], sweep.seed_index[i]), np.nan) - accuracy[i] for i in cells]),
        )
        for which, cells in groups.items()
    ]


def _defences(sweep: Sweep) -> list[str]:
    """The defence of each cell in one text: pre-aggregators, rule, and label sanitization if there is one."""
    pre, rule, left_out = (
        _texts(sweep, name, plain) for name, plain in ((PRE, "[]"), (STRATEGY, "mean"), (SANITIZE, "none"))
    )
    found = []
    for before, name, sanitize in zip(pre, rule, left_out, strict=True):
        steps = [step.strip() for step in before.strip("[]").split(",") if step.strip()]
        found.append(", ".join([*steps, name, *([] if sanitize == "none" else [f"sanitize={sanitize}"])]))
    return found


def _attacks(sweep: Sweep) -> list[str]:
    """The name of each cell's attack, which ends with ", adapted" where it adapts to the rule."""
    name, adapt = (_texts(sweep, column, UNATTACKED) for column in (NAME, ADAPT))
    return [
        f"{one}, adapted" if how == "rule" and one != UNATTACKED else one for one, how in zip(name, adapt, strict=True)
    ]


def _texts(sweep: Sweep, column: str, plain: str) -> list[str]:
    """A column as text, one of each cell; `plain` where the sweep has none such."""
    if column not in sweep.cells.columns:
        return [plain] * len(sweep)
    return [str(value) for value in sweep.column(column).tolist()]
