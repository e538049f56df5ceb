"""Every claim measured on what was run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fl_attack.replication.cells import Cells
from fl_attack.replication.claims import CLAIMS, Claim, Finding, measure
from fl_attack.replication.plan import STEP, Run, Source


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    run: Run
    cells: Cells


@dataclass
class Outcome:
    """All that has been run so far."""

    results: list[Result] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)  # the learning rate chosen for each data set
    drawn: list[str] = field(default_factory=list)  # the stems of figures
    missing: list[Run] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each call that computed something, by data set

    def of(self, source: Source) -> list[Result]:
        """The results on a data set."""
        return [result for result in self.results if result.run.source == source]


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
            source, primary, chosen = result.run.source, result.run.protocol == STEP, rates[result.run.source.name]
            swept = {float(lr) for lr in result.cells["lr"].tolist() if lr != ""}
            looks = claim.own_rate and len(swept) > 1
            if looks or chosen in swept or not swept:
                cells = result.cells.where(lr=chosen) if chosen in swept and not looks else result.cells
                rate = "the best for each" if looks else f"{chosen:g}"
                found = measure(claim, cells)
                lines += [Line(claim, source, result.run.protocol, rate, primary, one) for one in found]
            if swept:
                lines += _by_rate(claim, result, but=None if looks else chosen)
        names = {result.run.source.name for result in own}
        for result in results:
            if result.run.preset in claim.others and result.run.source.name in names:
                lines += _by_rate(claim, result, rates[result.run.source.name])
    return lines


def _by_rate(claim: Claim, result: Result, chosen: float = 0.0, but: float | None = None) -> list[Line]:
    """At each learning rate of a sweep but one; `chosen` is that of a sweep of one."""
    rates = sorted({float(lr) for lr in result.cells["lr"].tolist() if lr != ""} - {but})
    lines = []
    parts = {f"{rate:g}": result.cells.where(lr=rate) for rate in rates}
    if not parts and but is None:
        parts = {f"{chosen:g}": result.cells}
    for rate, cells in parts.items():
        found = measure(claim, cells)
        lines += [Line(claim, result.run.source, result.run.protocol, rate, False, one) for one in found]
    return lines
