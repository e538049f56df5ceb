"""Figures by global budget or write access: `budget` and `spread`."""

from pathlib import Path

import numpy as np

from fl_attack.plots import canvas
from fl_attack.plots.marks import caption, legend, require_several
from fl_attack.sweep_table import (
    ACCURACY,
    KB,
    NUMBERS,
    Array,
    B,
    Floats,
    K,
    NotDrawableError,
    Sweep,
    format_value,
    mean_interval,
    pooled_deviation,
    read_sweep,
    split,
)

LINES = 6  # lines that are told apart by colour and dash in one panel


def budget(folder: Path) -> list[Path]:
    """Draw the final accuracy against the global budget k·b, with confidence bands over seeds.

    Where both k and b vary, several pairs share a product and differ in harm: each k has a line, each setting a panel.
    Else each setting has a line. Attacks on updates have no budget of labels and are left out.

    Parameters
    ----------
    folder : Path
        The folder of a sweep.

    Returns
    -------
    list of Path
        `budget.png` and `.pdf`.

    Raises
    ------
    NotDrawableError
        Where no setting has several values of k·b, or there are more settings than panels.
    """
    sweep = read_sweep(folder).label_attacks()
    product, k, b = (sweep.column(name) for name in (KB, K, B))
    require_several(product, "a plot against the global budget", "k·b")
    setting = sweep.labels(sweep.varied(KB))
    if not any(len(set(product[cells])) > 1 for cells in split(len(sweep), setting).values()):
        raise NotDrawableError("a plot against the global budget needs several values of k·b in a setting")
    fan = any(len(set(k[cells])) > 1 and len(set(b[cells])) > 1 for cells in split(len(sweep), setting).values())
    if fan:
        ks = np.unique(k)
        shown = ks[np.linspace(0, len(ks) - 1, min(len(ks), LINES)).round().astype(int)]
        panel, lines = setting, {f"k = {format_value(one)}": k == one for one in shown.tolist()}
        note = "Each line has one k and raises b."
        note += f" {len(shown)} of {len(ks)} values of k are drawn." if len(shown) < len(ks) else ""
    else:
        panel, line = panel_and_line(sweep, KB)
        lines = {name: line == name for name in canvas.distinct_values(line, canvas.ENTRIES, "lines of a panel")}
        note = ""
    names = canvas.distinct_values(panel, canvas.PANELS, "panels of a plot against the global budget")
    figure, panels = canvas.panels(names, 3.7 if fan else 5.4, 3.3, NUMBERS[KB][0], NUMBERS[ACCURACY][0])
    for name, axes in panels.items():
        for number, (label, mask) in enumerate(lines.items()):
            cells = np.flatnonzero((panel == name) & mask)
            points = split(len(cells), product[cells], k[cells], b[cells])
            if not points:
                continue
            at = np.array([value for value, _, _ in points])
            mean, half = np.transpose([mean_interval(sweep.seed_means(cells[same])) for same in points.values()])
            style = canvas.style(number, len(lines) if fan or len(lines) > LINES else None)
            dash = "-" if fan else canvas.DASHES[number % len(canvas.DASHES)]
            axes.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.22, linewidth=0)
            axes.plot(at, mean, label=label, linestyle=dash, **style)
    low, high = axes.get_ylim()  # of all panels; a band may leave what is possible
    axes.set(xlim=(0, None), ylim=(max(low, -2), min(high, 102)))
    legend(figure, panels)
    several_seeds = sweep.seed_index.any()
    bands = "Bands: 95 % confidence of the mean over seeds (Student t)." if several_seeds else "One seed: no bands."
    caption(
        figure, f"Final test accuracy by global budget, {sweep.averaging()}", sweep.note(note, bands, sweep.effective())
    )
    return canvas.save(figure, folder, "budget")


def spread(folder: Path) -> list[Path]:
    """Draw the standard deviation of the final accuracy over seeds by k, pooled over b: a line for each setting.

    Returns `spread.png` and `.pdf`; NotDrawableError where k does not vary, no setting has two seeds, or there are more
    settings than panels.
    """
    sweep = read_sweep(folder)
    require_several(sweep.column(K), "a plot by k", "k")
    panel, line = panel_and_line(sweep, KB)
    deviation = deviations_over_seeds(sweep, panel, line)
    if not np.isfinite(list(deviation.values())).any():
        raise NotDrawableError("a standard deviation needs two seeds or more; the sweep has one")
    names = canvas.distinct_values(panel, canvas.PANELS, "panels of a plot by k")
    lines = canvas.distinct_values(line, canvas.ENTRIES, "lines of a panel")
    figure, panels = canvas.panels(names, 5.4, 3.4, NUMBERS[K][0], "standard deviation (percentage points)")
    for name, axes in panels.items():
        for number, label in enumerate(lines):
            points = [(k, value) for (*at, k), value in deviation.items() if at == [name, label]]
            if points:
                dash, shades = canvas.DASHES[number % len(canvas.DASHES)], len(lines) if len(lines) > LINES else None
                axes.plot(*np.transpose(points), label=label, linestyle=dash, **canvas.style(number, shades))
        axes.set_ylim(bottom=0)
    legend(figure, panels)
    title = f"Standard deviation of the final test accuracy over {len(set(sweep.seed_index.tolist()))} seeds"
    caption(figure, title, sweep.note("Pooled over b: root of the mean variance of each setting."))
    return canvas.save(figure, folder, "spread")


def panel_and_line(sweep: Sweep, *shown: str) -> tuple[Array, Array]:
    """Part the cells of a sweep into panels, and these into lines.

    Parameters
    ----------
    sweep : Sweep
        Its swept columns that those shown do not tell are the settings.
    shown : str
        Columns that are on an axis of the figure.

    Returns
    -------
    panel, line : (cells,) arrays of text
        Up to six settings are lines of one panel; of more the last column is the line, and all others the panel.
    """
    names = sweep.varied(*shown)
    setting = sweep.labels(names)
    if len(set(setting)) <= LINES:
        return np.full(len(sweep), "", object), setting
    return sweep.labels(names[:-1]), sweep.labels(names[-1:])


def deviations_over_seeds(sweep: Sweep, panel: Array, line: Array) -> dict[tuple[str, str, float], float]:
    """Standard deviations of the final accuracy over seeds, pooled over budgets.

    Parameters
    ----------
    sweep : Sweep
        The cells.
    panel, line : (cells,) arrays of str
        The panel and the line that each cell belongs to.

    Returns
    -------
    dict of (str, str, float) to float
        In percentage points, by panel, line and write access k; NaN where no setting has two seeds.
    """
    k, accuracy = sweep.column(K), sweep.column(ACCURACY)
    groups: dict[tuple[str, str, float], list[Floats]] = {}
    for cells in split(len(sweep), *(sweep.column(name) for name in (K, B, *sweep.swept))).values():
        groups.setdefault((panel[cells[0]], line[cells[0]], k[cells[0]]), []).append(accuracy[cells])
    return {key: pooled_deviation(values) for key, values in groups.items()}
