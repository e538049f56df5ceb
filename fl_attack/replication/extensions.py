"""The sections of the report that go beyond the paper: selections, frequencies, roundings and noise compared."""

from collections.abc import Iterator, Sequence

import numpy as np

from fl_attack.replication.claims import MEASURES, TENTH, measured
from fl_attack.replication.findings import Line, RunCells
from fl_attack.replication.plan import MEAN_SHARE, PROTOCOLS, STEP
from fl_attack.replication.statistics import GOALS, LEAST_EFFECT, by_seed, mean
from fl_attack.replication.verdicts import NOISY, NOT, PARTLY, REPLICATED, Criterion, Evidence, decide
from fl_attack.sweep_table import Cells, Floats

DROPS = ("drop", "late_drop")
MINUS = "\N{MINUS SIGN}"


def format_interval(found: Evidence) -> str:
    """A statistic with its 95 % interval, where it has one, as in `2.31 [1.90, 2.72]`; empty where it is NaN."""
    if np.isnan(found.value):
        return ""
    return str(found) if np.isfinite(found.error) else f"{found.value:.2f}".replace("-", MINUS)


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
    """The mean drop at one value of a column less that at another, over seeds, with its interval, as text."""

    def gap(some: Cells) -> Floats:
        return by_seed(some, lambda of: mean(of["drop"][of[factor] == one]) - mean(of["drop"][of[factor] == other]))

    return format_interval(measured(gap, cells))


def _drop(cells: Cells, name: str = "drop") -> Evidence:
    """The mean over seeds of a column of drops, in points, with its error."""
    return measured(lambda some: by_seed(some, lambda of: mean(of[name])), cells)


def selection(results: Sequence[RunCells]) -> str:
    """The section on the exact selection against the printed one, in Markdown; empty where it was not run."""
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


def frequency(results: Sequence[RunCells]) -> str:
    """The section on few large attacks against many small ones at equal total flips; empty where it was not run."""
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


def rounding(results: Sequence[RunCells]) -> str:
    """The section on `carry` against `floor` at small budgets; empty where it was not run."""
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


def noise(results: Sequence[RunCells]) -> str:
    """The section on whether 0.1 % of the labels do harm or the last step is noisy; empty where it was not run."""
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if (one.run.preset, one.run.protocol) == ("smallest", STEP)):
        whole = result.cells.where(k=1.0)
        for (lr,), _ in whole.parts("lr") if len(whole) else ():
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


def cause(last: Evidence, late: Evidence) -> str:
    """What a drop is due to, in words.

    Parameters
    ----------
    last, late : Evidence
        The drop at the last iterate, and that of the average over late rounds, in points.

    Returns
    -------
    str
        "the attack", "the noise of the last step", "no harm", or that it is too noisy to tell.
    """
    of_last, of_late = (decide([(Criterion(LEAST_EFFECT), found)])[0] for found in (last, late))
    if of_late == REPLICATED:
        return "the attack"
    if of_last == REPLICATED:
        return "the noise of the last step"
    return "no harm" if {of_last, of_late} == {NOT} else NOISY


def short_answer(results: Sequence[RunCells], lines: Sequence[Line]) -> list[str]:
    """In a few sentences, under which protocol 0.1 % of the labels cost as much as the paper says.

    Parameters
    ----------
    results, lines
        What was run, and the verdicts on claims, as `readings` takes them.

    Returns
    -------
    list of str
        Paragraphs in Markdown; none where nothing of this was run.
    """
    smallest = [line for line in lines if line.claim.preset == "smallest"]
    if not smallest:
        return []
    texts = [
        line for line in smallest if line.primary and line.finding.label in (f"{goal}, last iterate" for goal in GOALS)
    ]
    text = "; ".join(f"{one.source.title}, {_goal(one)}: {format_interval(one.finding.found)}" for one in texts)
    page = [f"**0.1 % of the labels, flips chosen in each minibatch and then forgotten, cost (points):** {text}."]
    for verdict, what in (
        (REPLICATED, "The paper's 6 points (surely 3 to 9) come out"),
        (PARTLY, f"Harm of another size (surely more than 0, at least {LEAST_EFFECT:g} points, not surely 3 to 9)"),
    ):
        found = [line for line in smallest if line.finding.verdict == verdict]
        places: dict[str, list[Line]] = {}
        for line in sorted(found, key=lambda one: PROTOCOLS.index(one.protocol)):
            places.setdefault(f"{line.protocol}, {line.source.title}", []).append(line)
        each = [f"{place} ({_sizes(at)})" for place, at in places.items()]
        page.append(f"**{what}:** {'; '.join(each) or 'under no protocol'}.")
    chance = []
    for title, lr, batch, ends in _unattacked(results):
        chance.append((lost_by_chance(ends), title, lr, batch))
    if chance:
        worst = {title: max(one for one in chance if one[1] == title) for _, title, _, _ in chance}
        text = "; ".join(
            f"{title} in {100 * share:.0f} % (lr {lr:g}, {batch})" for share, title, lr, batch in worst.values()
        )
        page.append(f"**By chance**, of two unattacked runs with other seeds the second loses {LOSS:g} points: {text}.")
    return page


def _goal(line: Line) -> str:
    """The goal of the attack that a line on 0.1 % of the labels is about, as its label begins with it."""
    return line.finding.label.partition(",")[0]


def _sizes(lines: Sequence[Line]) -> str:
    """In words, the goals of lines and the least and the largest drop of each, as in `targeted 3.1 to 5.2`."""
    ranges = []
    for goal in GOALS:
        sizes = [line.finding.found.value for line in lines if _goal(line) == goal]
        if sizes:
            ranges.append(f"{goal} {min(sizes):.1f}" + (f" to {max(sizes):.1f}" if len(sizes) > 1 else ""))
    return ", ".join(ranges)


def readings(results: Sequence[RunCells], lines: Sequence[Line]) -> str:
    """What 0.1 % of the labels cost under each reading of the paper.

    Parameters
    ----------
    results : sequence of RunCells
        All that was run.
    lines : sequence of Line
        The verdicts on claims, of which those of `smallest` are used.

    Returns
    -------
    str
        A table in Markdown, bold where the paper's size comes out; empty without such runs.
    """
    borne = {
        (line.source.title, line.protocol, line.rate, line.finding.label)
        for line in lines
        if line.claim.preset == "smallest" and line.finding.verdict == REPLICATED
    }
    rows: list[tuple[str, ...]] = []
    smallest = [one for one in results if one.run.preset == "smallest" and (one.cells["k"] == 1).any()]
    for result in sorted(smallest, key=lambda one: PROTOCOLS.index(one.run.protocol)):
        for (lr,), _ in result.cells.parts("lr"):
            for goal in GOALS:
                cells = result.cells.where(lr=lr, goal=goal, k=1.0, b=TENTH[1.0])
                each = []
                for label, name in MEASURES.items():
                    text = format_interval(_drop(cells, name)) if len(cells) else ""
                    key = result.run.source.title, result.run.protocol, f"{float(lr):g}", f"{goal}, {label}"
                    each.append(f"**{text}**" if key in borne else text)
                share = f"{100 * mean(cells['effective']):.2g} %" if len(cells) else ""
                seeds = str(len(set(cells["seed"].tolist())))
                rows.append((result.run.protocol, result.run.source.title, goal, f"{float(lr):g}", share, *each, seeds))
    if not rows:
        return ""
    head = ("Reading", "Data", "Attack", "lr", "Labels flipped", "Last iterate", "Last 20 epochs", "Least", "Seeds")
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [
            "**Under which reading do 0.1 % of the labels cost 6 points?** Points lost, 95 %; bold where the paper's "
            "size comes out. *Labels flipped*: the share of all labels used that were not the true ones.",
            "",
            *table,
        ]
    )


LOSS = 6.0  # points that the paper's single runs lose


def noise_map(results: Sequence[RunCells]) -> str:
    """The section on how far apart unattacked runs end, by learning rate and batch size; empty where it was not run."""
    found: dict[tuple[str, float], dict[str, str]] = {}
    batches: dict[str, None] = {}
    for title, lr, batch, ends in _unattacked(results):
        batches[batch] = None
        found.setdefault((title, lr), {})[batch] = f"{ends.std(ddof=1):.2f}; {100 * lost_by_chance(ends):.0f} %"
    rows = [(title, f"{lr:g}", *(row.get(batch, "") for batch in batches)) for (title, lr), row in found.items()]
    text = (
        "Standard deviation over seeds of the last iterate's accuracy without any attack (points), and how likely it "
        f"is that of two runs with other seeds the second is {LOSS:g} points or more below the first: what a single "
        "run can lose by chance alone."
    )
    return _section("what a single run loses by chance", text, rows and [("Data", "lr", *batches), *rows])


def _unattacked(results: Sequence[RunCells]) -> Iterator[tuple[str, float, str, Floats]]:
    """Data set, learning rate, batch size and final accuracies (seeds,), in points, of unattacked runs at each."""
    for result in (one for one in results if one.run.preset == "noise"):
        for (lr,), at in result.cells.parts("lr"):
            yield result.run.source.title, float(lr), f"batches of {result.run.batch}", result.cells["accuracy"][at]


def lost_by_chance(ends: Floats, points: float = LOSS) -> float:
    """How often an unattacked run alone would seem to be harmed.

    Parameters
    ----------
    ends : (seeds,) array
        Accuracies of runs that differ in their seed alone, in points.
    points : float
        The least loss that counts as harm, in points.

    Returns
    -------
    float
        The share of ordered pairs of runs of which the second ends so many points or more below the first.
    """
    lost = ends[:, None] - ends[None, :] >= points - 1e-9
    return float(lost.sum() / (len(ends) * (len(ends) - 1)))
