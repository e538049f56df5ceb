"""The kind of attack of a cell, which says what cells can choose their flips together."""

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

from fl_attack.scenario import Scenario


class Kind(NamedTuple):
    """The attack of a cell, without its malicious clients, its budget and its rounds; `NOBODY` where there is none."""

    name: str  # none where nobody attacks
    goal: str = ""
    selection: str = ""
    scope: str = ""
    knowledge: str = ""
    fraction: float = 0.0
    refresh: str = ""
    args: str = ""
    adapt: str = "none"

    @property
    def exact(self) -> bool:
        """Whether the attack is greedy and chooses in every round, for which there is a fast way."""
        return self.name == "greedy" and self.refresh == "step"

    @property
    def tile_key(self) -> "Kind":
        """The kind as all cells of a tile have it in common: without goal and selection where it is `exact`."""
        return self._replace(goal="", selection="") if self.exact else self


NOBODY = Kind("none")


def kind_of(cell: Scenario) -> Kind:
    """The kind of attack of a cell; `NOBODY` where it is not attacked."""
    threat = cell.settings.attack
    if not cell.settings.attacked:
        return NOBODY
    return Kind(
        threat.name,
        threat.goal,
        threat.selection,
        threat.scope,
        threat.knowledge,
        threat.knowledge_fraction,
        threat.refresh,
        json.dumps(threat.args, sort_keys=True),
        threat.adapt,
    )


class Part(NamedTuple):
    """Consecutive cells of a tile whose flips have one goal and one way of selection."""

    cells: slice
    goal: str
    selection: str

    @property
    def size(self) -> int:
        """The number of these cells."""
        return int(self.cells.stop - self.cells.start)


def parts_of(cells: Sequence[Scenario]) -> list[Part]:
    """The parts of a tile of these cells: they are cut, in their order, where goal or selection changes."""
    wanted = [(kind.goal, kind.selection) for kind in map(kind_of, cells)]
    edges = [0, *(i for i in range(1, len(cells)) if wanted[i] != wanted[i - 1]), len(cells)]
    return [Part(slice(start, end), *wanted[start]) for start, end in itertools.pairwise(edges)]
