"""Every claim measured on what was run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fl_attack.replication.claims import CLAIMS, Claim, Finding, measure
from fl_attack.replication.plan import STEP, PaperDataset, Run
from fl_attack.replication.verdicts import decide
from fl_attack.sweep_table import Cells


@dataclass(frozen=True)
class RunCells:
    """The cells that a run gave."""

    run: Run
    cells: Cells


@dataclass
class ReplicationRecord:
    """All that has been run and drawn so far."""

    results: list[RunCells] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)  # the learning rate chosen for each data set
    tied: dict[str, list[float]] = field(default_factory=dict)  # those not distinguishable from the best
    figures: list[str] = field(default_factory=list)  # file names without suffix
    missing: list[Run] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each call that computed, by data set


@dataclass(frozen=True)
class Line:
    """A finding with the data set, protocol and learning rate that it was made under."""

    claim: Claim
    source: PaperDataset
    protocol: str
    rate: str
    primary: bool  # whether it is the paper's protocol at the learning rate chosen, on which the claim is decided
    finding: Finding

    @property
    def setting(self) -> str:
        """Protocol and learning rate, as text."""
        return ", ".join(filter(None, [self.protocol, self.rate and f"lr {self.rate}"]))


def findings(results: Sequence[RunCells], rates: Mapping[str, float]) -> list[Line]:
    """Every claim on every data set that it is about, under the paper's protocol and under the others.

    Parameters
    ----------
    results : sequence of RunCells
        The cells of all runs.
    rates : mapping
        The learning rate chosen for each data set, by its name.

    Returns
    -------
    list of Line
        In the order of `CLAIMS`.
    """
    lines = []
    for claim in CLAIMS:
        own = [result for result in results if result.run.preset == claim.preset]
        for result in own:
            source, primary, chosen = result.run.source, result.run.protocol == STEP, rates[result.run.source.name]
            swept = {float(lr) for lr in result.cells["lr"].tolist() if lr != ""}
            chooses = claim.own_rate and len(swept) > 1
            if chooses or chosen in swept or not swept:
                cells = result.cells.where(lr=chosen) if chosen in swept and not chooses else result.cells
                rate = "the best for each" if chooses else f"{chosen:g}"
                found = measure(claim, cells)
                lines += [Line(claim, source, result.run.protocol, rate, primary, one) for one in found]
            if swept:
                lines += _by_rate(claim, result, but=None if chooses else chosen)
        names = {result.run.source.name for result in own}
        for result in results:
            if result.run.preset in claim.others and result.run.source.name in names:
                lines += _by_rate(claim, result, rates[result.run.source.name])
    return decided(lines)


def decided(lines: Sequence[Line]) -> list[Line]:
    """The lines with verdicts that hold for all of them together; see `verdicts.decide`."""
    together = decide([(line.claim.criterion, line.finding.found) for line in lines])
    return [
        replace(line, finding=replace(line.finding, verdict=verdict))
        for line, verdict in zip(lines, together, strict=True)
    ]


def _by_rate(claim: Claim, result: RunCells, chosen: float = 0.0, but: float | None = None) -> list[Line]:
    """Findings at each learning rate swept except `but`; cells without one are labelled `chosen` if `but` is None."""
    rates = sorted({float(lr) for lr in result.cells["lr"].tolist() if lr != ""} - {but})
    lines = []
    parts = {f"{rate:g}": result.cells.where(lr=rate) for rate in rates}
    if not parts and but is None:
        parts = {f"{chosen:g}": result.cells}
    for rate, cells in parts.items():
        found = measure(claim, cells)
        lines += [Line(claim, result.run.source, result.run.protocol, rate, False, one) for one in found]
    return lines
