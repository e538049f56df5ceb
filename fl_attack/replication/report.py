"""`REPLICATION.md` and `claims.csv`: every verdict is computed from the cells."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fl_attack.config import versions
from fl_attack.data.cache import write_whole
from fl_attack.replication.claims import CLAIMS, Claim, measured
from fl_attack.replication.extensions import (
    format_interval,
    frequency,
    noise,
    noise_map,
    readings,
    rounding,
    selection,
    short_answer,
)
from fl_attack.replication.figures import DIGITS
from fl_attack.replication.findings import Line, ReplicationRecord, RunCells, findings
from fl_attack.replication.plan import (
    CEIL,
    CNN,
    EPOCH,
    FLOOR,
    FULL,
    LARGE,
    LAST,
    MLP,
    PERSIST,
    PROTOCOLS,
    SMALL,
    STEP,
    ReplicationPlan,
    Run,
)
from fl_attack.replication.statistics import LEAST_EFFECT, by_seed, mean
from fl_attack.replication.verdicts import FALSE, REPLICATED, counted, overall
from fl_attack.sweep_table import Cells, write_csv

REPORT, FIGURES, TABLE = "REPLICATION.md", "figures", "claims.csv"
REDUCED = (
    "Where an experiment is dear, fewer were run: on airplane/automobile figure 12 per step alone, on ten classes "
    "fewer budgets, learning rates and seeds, on CIFAR-10 with ten classes figure 9 per step alone."
)
COLUMNS = (
    *("figure", "claim", "data", "protocol", "lr", "primary", "measure", "quantity", "paper"),
    *("value", "low", "high", "seeds", "rule", "verdict"),
)


def write(out: Path, plan: ReplicationPlan, found: ReplicationRecord, command: str) -> Path:
    """Write the report and its table.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    plan : ReplicationPlan
        The runs that were planned.
    found : ReplicationRecord
        The results of the runs that are done.
    command : str
        The command that did it, to be named in the report.

    Returns
    -------
    Path
        `REPLICATION.md` in `out`; `claims.csv` is beside it.
    """
    results, lines = found.results, findings(found.results, found.rates)
    write_csv(out / TABLE, COLUMNS, [_csv(line) for line in lines], DIGITS)
    parts = [
        "# Replication of *Approaching the Harm of Gradient Attacks While Only Flipping Labels*",
        _first_page(results, lines, plan, found.missing),
        *filter(None, [readings(results, lines), _by_figure(lines)]),
        _method(plan, found, command),
        *(_claim(claim, lines) for claim in CLAIMS if any(line.claim is claim for line in lines)),
        *filter(None, [noise(results), noise_map(results), selection(results), frequency(results), rounding(results)]),
        _figures(found.figures, plan),
    ]
    text = "\n\n".join(parts) + "\n"
    write_whole(out / REPORT, lambda stream: stream.write(text.encode()))
    return out / REPORT


def publish(out: Path, docs: Path) -> Path:
    """Copy the report into a folder of docs.

    Parameters
    ----------
    out : Path
        The folder of the replication.
    docs : Path
        The report becomes its `replication.md`, figures and tables go to its `replication/`.

    Returns
    -------
    Path
        The copy of the report.
    """
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
    """The row of `claims.csv` for a line, in the order of `COLUMNS`."""
    claim, found = line.claim, line.finding.found
    return (
        *(claim.figure, claim.text, line.source.title, line.protocol, line.rate, int(line.primary)),
        *(line.finding.label, claim.quantity, claim.paper, found.value, found.low, found.high, found.seeds),
        *(str(claim.criterion), line.finding.verdict),
    )


def _first_page(
    results: Sequence[RunCells], lines: Sequence[Line], plan: ReplicationPlan, missing: Sequence[Run]
) -> str:
    """The first section: under which protocol 0.1 % of the labels do harm, and what became of all claims."""
    page = [*short_answer(results, lines), *_by_verdict(lines)]
    if page:
        page.append(
            f"Every verdict is by the rules below, over all {len(lines)} rows together: at most {100 * FALSE:g} % of "
            "each kind of verdict are false on average."
        )
    text = ["## Under which protocol?", "", *(f"{number}. {line}" for number, line in enumerate(page, 1))]
    if missing:
        of = Counter(run.source.title for run in plan.runs)
        lacking = Counter(run.source.title for run in missing)
        sweeps = "; ".join(f"{title}: {number} of {of[title]} sweeps" for title, number in lacking.items())
        text += ["", f"*Not run yet: {sweeps}.*"]
    if plan.quick:
        text += [
            "",
            "*A quick run on small bundled digits: it shows that the pipeline works, not what the paper claims.*",
        ]
    return "\n".join(text)


def _by_verdict(lines: Sequence[Line]) -> list[str]:
    """A line for each verdict, on the claims that have it under the paper's protocol."""
    by_verdict: dict[str, list[str]] = {}
    for claim in CLAIMS:
        verdicts = [line.finding.verdict for line in lines if line.claim is claim and line.primary]
        if verdicts:
            name = f"{claim.text} (figure {claim.figure}: {counted(verdicts)})"
            by_verdict.setdefault(overall(verdicts), []).append(name)
    return [f"*{verdict.capitalize()}*: {'; '.join(claims)}." for verdict, claims in by_verdict.items()]


def _by_figure(lines: Sequence[Line]) -> str:
    """The section on what holds and what does not, a line for the claims of each figure; empty without lines."""
    page = ["## What holds and what does not", ""] if lines else []
    groups: dict[tuple[str, int], list[Claim]] = {}
    for number, claim in enumerate(CLAIMS):
        groups.setdefault((claim.figure, number if claim.figure == "5" else 0), []).append(claim)
    for claims in groups.values():
        sentences = []
        for claim in claims:
            of_claim = [line for line in lines if line.claim is claim]
            if of_claim:
                verdict = overall(line.finding.verdict for line in of_claim if line.primary)
                sentences.append(f"{claim.text[0].upper()}{claim.text[1:]}: **{verdict}** ({_extent(of_claim)})")
        if sentences:
            page.append(f"- Figure {claims[0].figure}. " + ". ".join(sentences) + ".")
    return "\n".join(page)


def _extent(lines: Sequence[Line]) -> str:
    """In words, in how many measurements a claim has which verdict under the paper's protocol, and under others."""
    text = counted(line.finding.verdict for line in lines if line.primary)
    others = sorted({line.protocol for line in lines if not line.primary}, key=PROTOCOLS.index)
    counts = []
    for protocol in others:
        found = [line.finding.verdict == REPLICATED for line in lines if line.protocol == protocol and not line.primary]
        name = "other learning rates" if protocol == STEP else protocol.removeprefix("per step, ")
        counts.append(f"{name}: {sum(found)} of {len(found)}")
    return "; ".join([text, *counts])


def _method(plan: ReplicationPlan, found: ReplicationRecord, command: str) -> str:
    """The section on how it was done: setup, protocols, learning rates, the rules of verdicts; in Markdown."""
    text = [
        "## How it was done",
        "",
        *_setup(plan, found, command),
        *_protocols(plan),
        *_choice_of_rate(plan, found),
        _rules_of_verdicts(),
    ]
    if any("JPEG" in source.title for source in plan.sources):
        text += [
            "",
            "CIFAR-10 is a copy as JPEG files, which lose a little: figures are near the true ones, not equal.",
        ]
    return "\n".join(text)


def _setup(plan: ReplicationPlan, found: ReplicationRecord, command: str) -> list[str]:
    """Lines of Markdown on the command, the machine and the time it took, and on what each experiment is."""
    sweeps = _distinct(found.results)
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        f"`{command}`: {len(sweeps)} sweeps, {sum(len(one.cells) for one in sweeps):,} "
        f"experiments, {_duration(found)} on {os.cpu_count()} processors that together make {_gigaflops():.0f} Gflop/s "
        f"in single precision ({software}).",
        "",
        f"Each experiment: {plan.epochs} epochs of logistic regression by SGD over 10 clients of equal shares, of "
        "which the malicious ones hold k; budgets of less than a flip carry on to the next round "
        "(`attack.rounding=carry`); "
        "final values are of the last iterate unless said otherwise. *Untargeted* turns the gradient from the clean "
        "one, *targeted* steers to the model of fully flipped labels (two classes) or of labels moved to the next "
        "class (ten).",
        "",
    ]


def _protocols(plan: ReplicationPlan) -> list[str]:
    """Lines of Markdown that say what each of `PROTOCOLS` means and, in a full replication, what was left out."""
    return [
        "Protocols, since the source allows each reading:",
        "",
        f"- *{STEP}*: flips are chosen in each minibatch of {plan.batch}, and forgotten after it;",
        f"- *{LARGE}*: the same in steps a quarter as many;",
        f"- *{EPOCH}*: flips are chosen over all that the attackers hold at the start of an epoch, and kept for its "
        "minibatches (`attack.refresh=epoch`);",
        f"- *{FULL}*: one step is one epoch, at learning rates of its own;",
        f"- *{FLOOR}*, *{CEIL}*, *{SMALL}*: a budget of less than a flip is none, or at least one label in every "
        "minibatch, as `attack.rounding` says;",
        f"- *{PERSIST}*: flips stay in the attackers' data and add up (`attack.memory=persist`), 0.1 % new a round;",
        f"- *{LAST}*: early stopping that ends with its last model (`early_stop.restore=last`);",
        f"- *{MLP}*, *{CNN}*: a network in place of logistic regression, trained for fewer epochs.",
        "",
        *([] if plan.quick else [REDUCED, ""]),
    ]


def _choice_of_rate(plan: ReplicationPlan, found: ReplicationRecord) -> list[str]:
    """Lines of Markdown on how the learning rate was chosen, with the unattacked accuracy at each rate tried."""
    return [
        "The learning rate is not in the source at hand. Ours is that of the lowest loss of the unattacked model on a "
        f"validation split of a tenth of the training samples, with minibatches of {plan.batch}; where the choice is "
        "at an edge of the grid, the grid is extended. Test accuracy at each; **chosen**, *not distinguishable from "
        "the best*:",
        "",
        *_rates(found.results, found),
        "",
        *_larger_batches(found.results),
    ]


def _rules_of_verdicts() -> str:
    """A paragraph of Markdown on intervals, and on when a claim has which verdict."""
    return (
        "Intervals are 95 %, over seeds and test images: every cell is paired with the unattacked run of its seed, the "
        "variance over seeds and that of a jackknife over twenty parts of the test set are added (Student's t, degrees "
        "of freedom by Satterthwaite). **The rules, stated before the runs.** A claim is *replicated* where its "
        "statistic is surely within the bounds of its rule, *partly* where it is surely on the claimed side, and by at "
        f"least {LEAST_EFFECT:g} points, but outside, *not replicated* where it is surely out of the bounds, else *too "
        "noisy to tell*. *Surely* is meant over all rows together: of the rows with each of these verdicts at most "
        f"{100 * FALSE:g} % are false on average, however rows depend on each other, as those of the same seeds and "
        "runs do (Benjamini and Yekutieli). Where the paper gives a size, the bounds are half and one and a half times "
        f"of it; where it gives a direction, at least {LEAST_EFFECT:g} points count. Several measurements are counted; "
        "together they are replicated where all are, partly where at least half are replicated or partly, and not "
        f"where at least half are refuted. [All of them]({TABLE})."
    )


def _gigaflops(size: int = 1500, repeats: int = 10) -> float:
    """The speed of this machine in Gflop/s: the fastest of several products of (size, size) matrices in float32."""
    one, seconds = torch.ones(size, size), []
    for _ in range(repeats):
        began = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


def _duration(found: ReplicationRecord) -> str:
    """In words, the minutes that were computed, in all and for each data set, and in how many calls."""
    each = {title: sum(calls) for title, calls in found.seconds.items() if calls}
    calls = max(map(len, found.seconds.values()), default=0)
    minutes = ", ".join(f"{title} {seconds / 60:.1f}" for title, seconds in each.items())
    return f"{sum(each.values()) / 60:.1f} minutes in {calls} call{'s' * (calls != 1)} ({minutes})"


def _accuracy(cells: Cells) -> str:
    """The mean accuracy of cells, over seeds and in percent, with half its 95 % interval, as text."""
    found = measured(lambda some: by_seed(some, lambda of: mean(of["accuracy"])), cells)
    return f"{found.value:.2f} ± {found.half:.2f}"


def _rates(results: Sequence[RunCells], found: ReplicationRecord) -> list[str]:
    """The table of the unattacked accuracy at each learning rate, as lines of Markdown."""
    honest = [result for result in results if result.run.preset == "honest"]
    every = sorted({float(lr) for result in honest for lr in result.cells["lr"].tolist()})
    rows = ["| | " + " | ".join(f"lr {lr:g}" for lr in every) + " |", "|---|" + "---|" * len(every)]
    for result in honest:
        name, row = result.run.source.name, []
        for lr in every:
            at_rate = result.cells.where(lr=lr)
            mark = "**" if lr == found.rates[name] else "*" if lr in found.tied.get(name, []) else ""
            row.append(f"{mark}{_accuracy(at_rate)}{mark}" if len(at_rate) else "")
        rows.append(f"| {result.run.source.title} | " + " | ".join(row) + " |")
    return rows


def _larger_batches(results: Sequence[RunCells]) -> list[str]:
    """A sentence on the unattacked accuracy with larger batches, as lines of Markdown; none where that was not run."""
    accuracies = []
    for result in results:
        if (result.run.preset, result.run.protocol) == ("protocols", LARGE):
            honest = result.cells.where(b=0.0)
            accuracies.append(f"{result.run.source.title} {_accuracy(honest)}")
    text = "Nor is the batch size. With batches four times as large the unattacked models come, at these rates, to "
    return [f"{text}{', '.join(accuracies)}.", ""] if accuracies else []


def _claim(claim: Claim, lines: Sequence[Line]) -> str:
    """The section of a claim: its verdict, its rule and a row for each measurement."""
    of_claim = [line for line in lines if line.claim is claim]
    verdict = overall(line.finding.verdict for line in of_claim if line.primary)
    text = [
        f"## Figure {claim.figure}: {claim.text}",
        "",
        f"**{verdict[0].upper()}{verdict[1:]}.** Paper: {claim.paper}. Measured: {claim.quantity}; replicated: "
        f"{claim.criterion}.",
        "",
        "| Data | Attack | Protocol | Ours, 95 % | Seeds | |",
        "|---|---|---|---|---|---|",
    ]
    text += [_row(line) for line in of_claim if line.primary]
    others = [line for line in of_claim if not line.primary]
    if others:
        text += ["", f"<details><summary>Other protocols and learning rates ({_extent(of_claim)})</summary>", ""]
        text += text[4:6] + [_row(line) for line in others] + ["", "</details>"]
    return "\n".join(text)


def _row(line: Line) -> str:
    """A measurement as a row of a table in Markdown."""
    found, verdict = line.finding.found, line.finding.verdict
    strong = "**" if line.primary else ""
    parts = (line.source.title, line.finding.label or "both", line.setting, format_interval(found), str(found.seeds))
    return "| " + " | ".join((*parts, f"{strong}{verdict}{strong}")) + " |"


def _figures(stems: Iterable[str], plan: ReplicationPlan) -> str:
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


def _distinct(results: Sequence[RunCells]) -> list[RunCells]:
    """One result for each sweep, which several figures may share."""
    return list({id(result.cells): result for result in results}.values())
