"""`REPLICATION.md` and `claims.csv`: every verdict is computed from the cells."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fl_attack.config import versions
from fl_attack.data.cache import write_whole
from fl_attack.replication.claims import CLAIMS, LEAST_EFFECT, Claim
from fl_attack.replication.extensions import format_interval, frequency, noise, rounding, selection
from fl_attack.replication.figures import DIGITS
from fl_attack.replication.findings import Line, Outcome, Result, findings
from fl_attack.replication.plan import EPOCH, FULL, LARGE, STEP, Plan, Run
from fl_attack.replication.statistics import mean
from fl_attack.replication.verdicts import PARTLY, REPLICATED, overall
from fl_attack.sweep_table import jackknife_interval, write_csv

REPORT, FIGURES, TABLE = "REPLICATION.md", "figures", "claims.csv"
REDUCED = (
    "Where an experiment is dear, fewer were run: on airplane/automobile figures 12 and 14 per step alone, on ten "
    "classes fewer budgets and learning rates, on CIFAR-10 with ten classes figure 9 per step alone. The "
    "20 seeds for the question of 0.1 % are those of airplane/automobile at learning rate 0.01, where it came up."
)
COLUMNS = (
    *("figure", "claim", "data", "protocol", "lr", "primary", "measure", "quantity", "paper"),
    *("value", "low", "high", "seeds", "rule", "verdict"),
)


def write(out: Path, plan: Plan, found: Outcome, command: str) -> Path:
    """Write the report and its table; gives the report's file.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    plan : Plan
        What was to be run.
    found : Outcome
        What has been run.
    command : str
        The command that did it, to be named in the report.
    """
    results, lines = found.results, findings(found.results, found.rates)
    write_csv(out / TABLE, COLUMNS, [_csv(line) for line in lines], DIGITS)
    parts = [
        "# Replication of *Approaching the Harm of Gradient Attacks While Only Flipping Labels*",
        _first_page(lines, plan, found.missing),
        _method(plan, found, command),
        *(_claim(claim, lines) for claim in CLAIMS if any(line.claim is claim for line in lines)),
        *filter(None, [noise(results), selection(results), frequency(results), rounding(results)]),
        _figures(found.figures, plan),
    ]
    text = "\n\n".join(parts) + "\n"
    write_whole(out / REPORT, lambda stream: stream.write(text.encode()))
    return out / REPORT


def publish(out: Path, docs: Path) -> Path:
    """Copy the report to `replication.md` in the folder of docs, its figures and tables to `replication/` beside it."""
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
    """A row of `claims.csv`."""
    claim, found = line.claim, line.finding.interval
    return (
        *(claim.figure, claim.text, line.source.title, line.protocol, line.rate, int(line.primary)),
        *(line.finding.label, claim.quantity, claim.paper, found.value, found.low, found.high, found.seeds),
        *(str(claim.rule), line.finding.verdict),
    )


def _first_page(lines: Sequence[Line], plan: Plan, missing: Sequence[Run]) -> str:
    """The section on what holds and what does not: a line for the claims of each figure."""
    page = ["## What holds and what does not", ""] if lines else []
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
            page.append(f"- Figure {claims[0].figure}. " + ". ".join(halves) + ".")
    if missing:
        told = "; ".join(f"{run.preset}, {run.source.title}, {run.protocol}" for run in missing)
        page += ["", f"*Not run yet: {told}.*"]
    if plan.quick:
        page += [
            "",
            "*A quick run on small bundled digits: it shows that the pipeline works, not what the paper claims.*",
        ]
    return "\n".join(page)


def _extent(lines: Sequence[Line]) -> str:
    """In words, in how many measurements a claim is replicated under the paper's protocol and under others."""
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


def _method(plan: Plan, found: Outcome, command: str) -> str:
    results, rates = found.results, found.rates
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = [
        "## How it was done",
        "",
        f"`{command}`: {len(_distinct(results))} sweeps, {sum(len(one.cells) for one in _distinct(results)):,} "
        f"experiments, {_took(found)} on {os.cpu_count()} processors ({software}).",
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
        f"- *{FULL}*: one step is one epoch, at learning rates of its own.",
        "",
        *([] if plan.quick else [REDUCED, ""]),
        "The learning rate is not in the source at hand. Ours is the one with the best mean accuracy of the unattacked "
        f"model, with minibatches of {plan.batch}:",
        "",
        *_rates(results, rates),
        "",
        *_larger(results),
        "Intervals are 95 % over seeds (jackknife, Student's t), every cell paired with the unattacked run of its "
        "seed. **The rules, stated before the runs.** A claim is *replicated* where the whole interval is within the "
        "bounds of its rule, *too noisy to tell* where only part of it is, else *not replicated*, or *partly* where "
        "the interval is surely on the claimed side but outside the bounds. Where the paper gives a size, the bounds "
        f"are half and one and a half times of it; where it gives a direction, at least {LEAST_EFFECT:g} points count. "
        "Over several measurements a claim is replicated where it is in all, partly where it is in some, and not where "
        f"it is refuted in one and borne out in none. [All of them]({TABLE}).",
    ]
    if any("JPEG" in source.title for source in plan.sources):
        text += [
            "",
            "CIFAR-10 is a copy as JPEG files, which lose a little: figures are near the true ones, not equal.",
        ]
    return "\n".join(text)


def _took(found: Outcome) -> str:
    """In words, the minutes that were computed, in all and for each data set."""
    each = {title: sum(calls) for title, calls in found.seconds.items() if calls}
    calls = max(map(len, found.seconds.values()), default=0)
    told = ", ".join(f"{title} {seconds / 60:.1f}" for title, seconds in each.items())
    return f"{sum(each.values()) / 60:.1f} minutes in {calls} call{'s' * (calls != 1)} ({told})"


def _rates(results: Sequence[Result], rates: Mapping[str, float]) -> list[str]:
    """The table of the unattacked accuracy at each learning rate, as lines of Markdown."""
    honest = [result for result in results if result.run.preset == "honest"]
    every = sorted({float(lr) for result in honest for lr in result.cells["lr"].tolist()})
    rows = ["| | " + " | ".join(f"lr {lr:g}" for lr in every) + " |", "|---|" + "---|" * len(every)]
    for result in honest:
        cells, row = result.cells, []
        for lr in every:
            mine = cells.where(lr=lr)
            if not len(mine):
                row.append("")
                continue
            found = jackknife_interval(lambda mask, of=mine: mean(of["accuracy"][mask]), mine["seed"])  # type: ignore[misc]
            bold = "**" if lr == rates[result.run.source.name] else ""
            row.append(f"{bold}{found.value:.2f} ± {found.half:.2f}{bold}")
        rows.append(f"| {result.run.source.title} | " + " | ".join(row) + " |")
    return rows


def _larger(results: Sequence[Result]) -> list[str]:
    """A sentence on the unattacked accuracy with larger batches, as lines of Markdown; none where that was not run."""
    told = []
    for result in results:
        if (result.run.preset, result.run.protocol) == ("protocols", LARGE):
            honest = result.cells.where(b=0.0)
            found = jackknife_interval(lambda mask, of=honest: mean(of["accuracy"][mask]), honest["seed"])  # type: ignore[misc]
            told.append(f"{result.run.source.title} {found.value:.2f} ± {found.half:.2f}")
    text = "Nor is the batch size. With batches four times as large the unattacked models come, at these rates, to "
    return [f"{text}{', '.join(told)}.", ""] if told else []


def _claim(claim: Claim, lines: Sequence[Line]) -> str:
    """The section of a claim: its verdict, its rule and a row for each measurement."""
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
    """A measurement as a row of a table in Markdown."""
    found, verdict = line.finding.interval, line.finding.verdict
    strong = "**" if line.primary else ""
    parts = (line.source.title, line.finding.label or "both", line.setting, format_interval(found), str(found.seeds))
    return "| " + " | ".join((*parts, f"{strong}{verdict}{strong}")) + " |"


def _figures(stems: Iterable[str], plan: Plan) -> str:
    """The section of the figures, from their file names without suffix."""
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
    """One result for each sweep, which several figures may share."""
    return list({id(result.cells): result for result in results}.values())
