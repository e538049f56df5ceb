"""The sections of the report that go beyond the paper: selections, frequencies, roundings and noise compared."""

from collections.abc import Sequence

import numpy as np

from fl_attack.replication.claims import LEAST_EFFECT
from fl_attack.replication.findings import Result
from fl_attack.replication.plan import MEAN_SHARE
from fl_attack.replication.statistics import GOALS, mean
from fl_attack.replication.verdicts import NOISY, NOT, REPLICATED, Rule
from fl_attack.sweep_table import Cells, Interval, jackknife_interval

DROPS = ("drop", "late_drop")
MINUS = "\N{MINUS SIGN}"


def format_interval(interval: Interval) -> str:
    """A statistic with its interval, where it has one; empty where it is NaN."""
    if np.isnan(interval.value):
        return ""
    return str(interval) if np.isfinite(interval.low) else f"{interval.value:.2f}".replace("-", MINUS)


def _section(title: str, text: str, rows: list[tuple[str, ...]]) -> str:
    """A section in Markdown: a heading, a text and a table whose first row is its head; empty without rows."""
    if not rows:
        return ""
    head, *body = rows
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(
        [f"## Beyond the paper: {title}", "", text, "", *table, *("| " + " | ".join(r) + " |" for r in body)]
    )


def _difference(cells: Cells, factor: str, one: object, other: object) -> str:
    """The mean drop at one value of a factor less that at another, with its interval, as text."""

    def gap(mask: np.ndarray) -> float:
        some = cells.only(mask)
        return mean(some["drop"][some[factor] == one]) - mean(some["drop"][some[factor] == other])

    return format_interval(jackknife_interval(gap, cells["seed"]))


def _drop(cells: Cells, name: str = "drop") -> Interval:
    """The mean of a drop over cells, with its interval over seeds."""
    return jackknife_interval(lambda mask: mean(cells[name][mask]), cells["seed"])


def selection(results: Sequence[Result]) -> str:
    """The section on the exact selection against the printed one."""
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "selection"):
        for goal in GOALS:
            for (b,), _ in result.cells.parts("b"):
                cells = result.cells.where(goal=goal, b=b)
                if b > 0:
                    each = [format_interval(_drop(cells.where(selection=name))) for name in ("gain", "literal")]
                    short = _difference(cells, "selection", "gain", "literal")
                    rows.append((result.run.source.title, goal, f"{100 * b:g} %", *each, short))
    head = ("Data", "Attack", "Budget", "Exact", "As printed", "Falls short by")
    text = (
        "The printed algorithm ranks samples by their score and not by what a flip changes, so part of its budget is "
        "spent on labels that already are the harmful ones. Drop of the accuracy (points) at k = 1, and by how much "
        "the printed one falls short."
    )
    return _section("the exact selection", text, rows and [head, *rows])


def frequency(results: Sequence[Result]) -> str:
    """The section on few large attacks against many small ones, at equal total flips."""
    counts = {1: "round", 2: "2nd", 5: "5th", 10: "10th"}
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "frequency"):
        for goal in GOALS:
            each = []
            for every in counts:
                cells = result.cells.where(goal=goal, every=float(every), b=MEAN_SHARE * every)
                each.append(format_interval(_drop(cells, "late_drop")))
            rows.append((result.run.source.title, goal, *each))
    head = ("Data", "Attack", *(f"every {name}, {100 * MEAN_SHARE * every:g} %" for every, name in counts.items()))
    text = (
        "The same number of flips in all, in few rounds or in many. Drop of the accuracy (points), mean of the last 20 "
        "epochs, k = 1."
    )
    return _section("how often to attack", text, rows and [head, *rows])


def rounding(results: Sequence[Result]) -> str:
    """The section on `carry` against `floor` at small budgets."""
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "rounding"):
        for goal in GOALS:
            for (b,), _ in result.cells.parts("b"):
                cells = result.cells.where(goal=goal, b=b)
                if b > 0:
                    each = [format_interval(_drop(cells.where(rounding=name))) for name in ("carry", "floor")]
                    rows.append((result.run.source.title, goal, f"{100 * b:g} %", *each))
    head = ("Data", "Attack", "Budget", "carry", "floor")
    text = (
        "A budget of 0.1 % of 128 labels is an eighth of a flip: `floor` never makes one, `carry` one in every eighth "
        "round. Drop of the accuracy (points) at k = 1."
    )
    return _section("budgets of less than a flip", text, rows and [head, *rows])


def noise(results: Sequence[Result]) -> str:
    """The section on whether 0.1 % of the labels do harm or the last step is noisy."""
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "smallest"):
        for (lr,), _ in result.cells.parts("lr"):
            honest = result.cells.where(lr=lr, goal="untargeted", b=0.0)
            spread = (f"{honest[name].std(ddof=1):.2f}" for name in ("accuracy", "late"))
            for number, goal in enumerate(GOALS):
                cells = result.cells.where(lr=lr, goal=goal, b=0.001)
                drops = [_drop(cells, name) for name in DROPS]
                spreads = spread if number == 0 else ("", "")
                where = (result.run.source.title, f"{lr:g}", str(drops[0].seeds))
                rows.append((*where, goal, *spreads, *map(format_interval, drops), cause(*drops)))
    head = ("Data", "lr", "Seeds", "Attack", "sd, last", "sd, late", "Drop, last", "Drop, late", "What it is")
    text = (
        "A single run ends where its last step happens to leave it. Standard deviation over seeds of the unattacked "
        "accuracy, of the last iterate and of the mean of the last 20 epochs; the drop of both by 0.1 % of the labels, "
        f"paired by seed (points). It is *the attack* where the late drop is surely {LEAST_EFFECT:g} points or more, "
        "*the noise of the last step* where only the last one is, *no harm* where neither can be."
    )
    title = "0.1 % of the labels, or the noise of the last step?"
    return _section(title, text, rows and [head, *rows])


def cause(last: Interval, late: Interval) -> str:
    """In words, what a drop is due to, from its interval at the last iterate and that of the late average."""
    rule = Rule(LEAST_EFFECT)
    if rule.verdict(late) == REPLICATED:
        return "the attack"
    if rule.verdict(last) == REPLICATED:
        return "the noise of the last step"
    return "no harm" if {rule.verdict(last), rule.verdict(late)} == {NOT} else NOISY
