"""`REPLICATION.md` and `claims.csv`: every verdict is computed from the cells."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_attack.config import versions
from fl_attack.data.cache import write_whole
from fl_attack.replication.cells import Cells
from fl_attack.replication.claims import CLAIMS, COUNTS, GOALS, Claim, Finding, mean, measure
from fl_attack.replication.figures import write_table
from fl_attack.replication.plan import EPOCH, FULL, LARGE, STEP, Plan, Run, Source
from fl_attack.replication.verdicts import PARTLY, REPLICATED, Interval, interval, overall

REPORT, FIGURES, TABLE = "REPLICATION.md", "figures", "claims.csv"
COLUMNS = (
    *("figure", "claim", "data", "protocol", "lr", "primary", "measure", "quantity", "paper"),
    *("value", "low", "high", "seeds", "rule", "verdict"),
)
COARSE = ("fig5", "fig6", "fig7", "fig8", "fig9", "fig11")  # claims that the coarse grid of protocols can be asked for
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    run: Run
    cells: Cells
    seconds: float


@dataclass(frozen=True)
class Line:
    """A finding with all that it was found under."""

    claim: Claim
    source: Source
    protocol: str
    rate: str
    primary: bool  # the paper's protocol at the learning rate chosen; the others show how much hangs on these
    finding: Finding

    @property
    def setting(self) -> str:
        """Protocol and learning rate."""
        return ", ".join(filter(None, [self.protocol, self.rate and f"lr {self.rate}"]))


def findings(results: Sequence[Result], rates: Mapping[str, float]) -> list[Line]:
    """Every claim on every data set that it is about, under the paper's protocol and under the others."""
    lines = []
    for claim in CLAIMS:
        own = [result for result in results if result.run.preset == claim.preset]
        for result in own:
            source, primary = result.run.source, result.run.protocol == STEP
            swept = len(set(result.cells["lr"].tolist())) > 1
            rate = "the best for each" if swept else f"{rates[source.name]:g}"
            found = measure(claim, result.cells)
            lines += [Line(claim, source, result.run.protocol, rate, primary, one) for one in found]
            if swept:
                lines += _by_rate(claim, result)
        names = {result.run.source.name for result in own}
        for result in results:
            if claim.preset in COARSE and result.run.preset == "protocols" and result.run.source.name in names:
                lines += _by_rate(claim, result, rates[result.run.source.name])
    return lines


def _by_rate(claim: Claim, result: Result, chosen: float = 0.0) -> list[Line]:
    rates = sorted({float(lr) for lr in result.cells["lr"].tolist() if lr != ""})
    lines = []
    parts = {f"{rate:g}": result.cells.where(lr=rate) for rate in rates} or {f"{chosen:g}": result.cells}
    for rate, cells in parts.items():
        found = measure(claim, cells)
        lines += [Line(claim, result.run.source, result.run.protocol, rate, False, one) for one in found]
    return lines


def write(
    out: Path, plan: Plan, results: Sequence[Result], rates: Mapping[str, float], figures: Iterable[str], command: str
) -> Path:
    """The report and its table; `figures` are the stems of those drawn."""
    lines = findings(results, rates)
    write_table(
        out / TABLE,
        COLUMNS,
        [_csv(line) for line in lines],
    )
    parts = [
        "# Replication of *Approaching the Harm of Gradient Attacks While Only Flipping Labels*",
        _first_page(lines, plan),
        _method(plan, results, rates, command),
        *(_claim(claim, lines) for claim in CLAIMS if any(line.claim is claim for line in lines)),
        *filter(None, [_selection(results), _frequency(results), _rounding(results)]),
        _figures(figures, plan),
    ]
    text = "\n\n".join(parts) + "\n"
    write_whole(out / REPORT, lambda stream: stream.write(text.encode()))
    return out / REPORT


def publish(out: Path, docs: Path) -> Path:
    """The report as docs/replication.md, with its figures and tables in docs/replication/."""
    place = docs / "replication"
    place.mkdir(parents=True, exist_ok=True)
    for file in sorted((out / FIGURES).iterdir()):
        if file.suffix in (".png", ".csv"):
            shutil.copyfile(file, place / file.name)
    shutil.copyfile(out / TABLE, place / TABLE)
    text = (
        (out / REPORT)
        .read_text()
        .replace(f"]({FIGURES}/", "](replication/")
        .replace(f"]({TABLE})", f"](replication/{TABLE})")
    )
    write_whole(docs / "replication.md", lambda stream: stream.write(text.encode()))
    return docs / "replication.md"


def _csv(line: Line) -> tuple[object, ...]:
    claim, found = line.claim, line.finding.found
    return (
        *(claim.figure, claim.text, line.source.title, line.protocol, line.rate, int(line.primary)),
        *(line.finding.label, claim.quantity, claim.paper, found.value, found.low, found.high, found.seeds),
        *(str(claim.rule), line.finding.verdict),
    )


def _first_page(lines: Sequence[Line], plan: Plan) -> str:
    """What holds and what does not: a line for each of the claims of a figure."""
    told = ["## What holds and what does not", ""] if lines else []
    groups: dict[tuple[str, int], list[Claim]] = {}
    for number, claim in enumerate(CLAIMS):
        groups.setdefault((claim.figure, number if claim.figure == "5" else 0), []).append(claim)
    for claims in groups.values():
        halves = []
        for claim in claims:
            mine = [line for line in lines if line.claim is claim]
            if mine:
                verdict = overall(line.finding.verdict for line in mine if line.primary)
                halves.append(f"{claim.text[0].upper()}{claim.text[1:]}: **{verdict}** ({_extent(mine)})")
        if halves:
            told.append(f"- Figure {claims[0].figure}. " + ". ".join(halves) + ".")
    if plan.quick:
        told += [
            "",
            "*A quick run on small bundled digits: it shows that the pipeline works, not what the paper claims.*",
        ]
    return "\n".join(told)


def _extent(lines: Sequence[Line]) -> str:
    """In how many measurements a claim is borne out, under the paper's protocol and under others."""
    primary = [line.finding.verdict for line in lines if line.primary]
    text = f"in {primary.count(REPLICATED)} of {len(primary)} measurement{'s' * (len(primary) != 1)}"
    if PARTLY in primary:
        text += f", partly in {primary.count(PARTLY)}"
    others = sorted({line.protocol for line in lines if not line.primary}, key=(STEP, LARGE, EPOCH, FULL).index)
    counts = []
    for protocol in others:
        found = [line.finding.verdict == REPLICATED for line in lines if line.protocol == protocol and not line.primary]
        name = "other learning rates" if protocol == STEP else protocol.removeprefix("per step, ")
        counts.append(f"{name}: {sum(found)} of {len(found)}")
    return "; ".join([text, *counts])


def _method(plan: Plan, results: Sequence[Result], rates: Mapping[str, float], command: str) -> str:
    hours = sum(result.seconds for result in _distinct(results))
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = [
        "## How it was done",
        "",
        f"`{command}`: {len(_distinct(results))} sweeps, {sum(len(one.cells) for one in _distinct(results)):,} "
        f"experiments, {hours / 60:.1f} minutes of computing on {os.cpu_count()} processors ({software}).",
        "",
        f"Each experiment: {plan.epochs} epochs of logistic regression by SGD over 10 clients of equal shares, of "
        "which the malicious ones hold k; budgets of less than a flip carry on to the next round "
        "(`attack.rounding=carry`); "
        "final values are of the last iterate unless said otherwise. *Untargeted* turns the gradient from the clean "
        "one, *targeted* steers to the model of fully flipped labels (two classes) or of labels moved to the next "
        "class (ten).",
        "",
        "Protocols, since the source allows each reading:",
        "",
        f"- *{STEP}*: flips are chosen in each minibatch of {plan.batch}, and forgotten after it;",
        f"- *{LARGE}*: the same in steps a quarter as many;",
        f"- *{EPOCH}*: flips are chosen over all that the attackers hold at the start of an epoch, and kept for its "
        "minibatches (`attack.refresh=epoch`);",
        f"- *{FULL}*: one step is one epoch.",
        "",
        "The learning rate is not in the source at hand. Ours is the one with the best mean accuracy of the unattacked "
        f"model, with minibatches of {plan.batch}:",
        "",
        *_rates(results, rates),
        "",
        "Intervals are 95 % over seeds (jackknife, Student's t), every cell paired with the unattacked run of its "
        "seed. **The rules, stated before the runs.** A claim is *replicated* where the whole interval is within the "
        "bounds of its rule, *too noisy to tell* where only part of it is, else *not replicated*, or *partly* where "
        "the interval is surely on the claimed side but outside the bounds. Where the paper gives a size, the bounds "
        f"are half and one and a half times of it; where it gives a direction, at least {COUNTS:g} points count. Over "
        "several measurements a claim is replicated where it is in all, partly where it is in some, and not where it "
        f"is refuted in one and borne out in none. [All of them]({TABLE}).",
    ]
    if any("JPEG" in source.title for source in plan.sources):
        text += [
            "",
            "CIFAR-10 is a copy as JPEG files, which lose a little: figures are near the true ones, not equal.",
        ]
    return "\n".join(text)


def _rates(results: Sequence[Result], rates: Mapping[str, float]) -> list[str]:
    honest = [result for result in results if result.run.preset == "honest"]
    every = sorted({float(lr) for result in honest for lr in result.cells["lr"].tolist()})
    rows = ["| | " + " | ".join(f"lr {lr:g}" for lr in every) + " |", "|---|" + "---|" * len(every)]
    for result in honest:
        cells, told = result.cells, []
        for lr in every:
            mine = cells.where(lr=lr)
            if not len(mine):
                told.append("")
                continue
            found = interval(lambda mask, of=mine: mean(of["accuracy"][mask]), mine["seed"])  # type: ignore[misc]
            bold = "**" if lr == rates[result.run.source.name] else ""
            told.append(f"{bold}{found.value:.2f} ± {found.high - found.value:.2f}{bold}")
        rows.append(f"| {result.run.source.title} | " + " | ".join(told) + " |")
    return rows


def _claim(claim: Claim, lines: Sequence[Line]) -> str:
    mine = [line for line in lines if line.claim is claim]
    verdict = overall(line.finding.verdict for line in mine if line.primary)
    text = [
        f"## Figure {claim.figure}: {claim.text}",
        "",
        f"**{verdict[0].upper()}{verdict[1:]}.** Paper: {claim.paper}. Measured: {claim.quantity}; replicated: "
        f"{claim.rule}.",
        "",
        "| Data | Attack | Protocol | Ours, 95 % | Seeds | |",
        "|---|---|---|---|---|---|",
    ]
    text += [_row(line) for line in mine if line.primary]
    others = [line for line in mine if not line.primary]
    if others:
        text += ["", f"<details><summary>Other protocols and learning rates ({_extent(mine)})</summary>", ""]
        text += text[4:6] + [_row(line) for line in others] + ["", "</details>"]
    return "\n".join(text)


def _row(line: Line) -> str:
    found, verdict = line.finding.found, line.finding.verdict
    strong = "**" if line.primary else ""
    told = (line.source.title, line.finding.label or "both", line.setting, _told(found), str(found.seeds))
    return "| " + " | ".join((*told, f"{strong}{verdict}{strong}")) + " |"


def _told(found: Interval) -> str:
    if np.isnan(found.value):
        return ""
    return str(found) if np.isfinite(found.low) else f"{found.value:.2f}".replace("-", MINUS)


def _compared(results: Sequence[Result], preset: str, title: str, text: str, rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(
        [f"## Beyond the paper: {title}", "", text, "", *table, *("| " + " | ".join(r) + " |" for r in body)]
    )


def _difference(cells: Cells, factor: str, one: object, other: object) -> str:
    """Mean drop of one value of a factor less that of another."""

    def gap(mask: np.ndarray) -> float:
        some = cells.only(mask)
        return mean(some["drop"][some[factor] == one]) - mean(some["drop"][some[factor] == other])

    return _told(interval(gap, cells["seed"]))


def _drop(cells: Cells, name: str = "drop") -> str:
    return _told(interval(lambda mask: mean(cells[name][mask]), cells["seed"]))


def _selection(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "selection"):
        for goal in GOALS:
            for (b,), _ in result.cells.parts("b"):
                cells = result.cells.where(goal=goal, b=b)
                if b > 0:
                    each = [_drop(cells.where(selection=name)) for name in ("gain", "literal")]
                    short = _difference(cells, "selection", "gain", "literal")
                    rows.append((result.run.source.title, goal, f"{100 * b:g} %", *each, short))
    head = ("Data", "Attack", "Budget", "Exact", "As printed", "Falls short by")
    text = (
        "The printed algorithm ranks samples by their score and not by what a flip changes, so part of its budget is "
        "spent on labels that already are the harmful ones. Drop of the accuracy (points) at k = 1, and by how much "
        "the printed one falls short."
    )
    return _compared(results, "selection", "the exact selection", text, rows and [head, *rows])


def _frequency(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "frequency"):
        for goal in GOALS:
            told = []
            for every, b in ((1, 0.05), (2, 0.1), (5, 0.25), (10, 0.5)):
                told.append(_drop(result.cells.where(goal=goal, every=float(every), b=b), "late_drop"))
            rows.append((result.run.source.title, goal, *told))
    head = ("Data", "Attack", "every round, 5 %", "every 2nd, 10 %", "every 5th, 25 %", "every 10th, 50 %")
    text = (
        "The same number of flips in all, in few rounds or in many. Drop of the accuracy (points), mean of the last 20 "
        "epochs, k = 1."
    )
    return _compared(results, "frequency", "how often to attack", text, rows and [head, *rows])


def _rounding(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = []
    for result in (one for one in results if one.run.preset == "rounding"):
        for goal in GOALS:
            for (b,), _ in result.cells.parts("b"):
                cells = result.cells.where(goal=goal, b=b)
                if b > 0:
                    each = [_drop(cells.where(rounding=name)) for name in ("carry", "floor")]
                    rows.append((result.run.source.title, goal, f"{100 * b:g} %", *each))
    head = ("Data", "Attack", "Budget", "carry", "floor")
    text = (
        "A budget of 0.1 % of 128 labels is an eighth of a flip: `floor` never makes one, `carry` one in every eighth "
        "round. Drop of the accuracy (points) at k = 1."
    )
    return _compared(results, "rounding", "budgets of less than a flip", text, rows and [head, *rows])


def _figures(stems: Iterable[str], plan: Plan) -> str:
    titles = {source.name: source.title for source in plan.sources}
    text = ["## Figures"]
    for stem in stems:
        preset, _, name = stem.partition("-")
        what = preset.replace("fig", "Figure ") if preset.startswith("fig") else preset.capitalize()
        what = "Figures 1 and 4" if preset == "fig1" else what
        text += [
            "",
            f"**{what}, {titles[name]}** ([table]({FIGURES}/{stem}.csv))",
            "",
            f"![{what}, {titles[name]}]({FIGURES}/{stem}.png)",
        ]
    return "\n".join(text)


def _distinct(results: Sequence[Result]) -> list[Result]:
    return list({id(result.cells): result for result in results}.values())
