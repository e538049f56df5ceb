"""How far a sweep is."""

import sys

from tqdm import tqdm


class Progress:
    """How many cells are done, a second and still to come: one bar on a terminal, lines elsewhere."""

    def __init__(self, cells: int, name: str = "sweep") -> None:
        self.cells, self.name, self.done, self.printed = cells, name, 0.0, 0
        self.bar = tqdm(total=cells, unit="cell", desc=name, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def skip(self, cells: int) -> None:
        """Count cells that need not be computed."""
        if not self.bar.disable:
            self.bar.initial += cells  # so that the rate is that of the others
        self.add(cells)

    def add(self, cells: float) -> None:
        """Count cells, or parts of one."""
        self.done += cells
        self.bar.update(round(self.done, 1) - self.bar.n)  # parts of cells would be shown to the last digit
        tenth = int(self.done * 10 / self.cells + 1e-6)
        if self.bar.disable and tenth > self.printed:
            self.printed = tenth
            print(f"{self.name}: {tenth * 10} % of {self.cells} cells", file=sys.stderr, flush=True)

    def rounds(self, of: int, done: int) -> None:
        """Count `done` rounds of a cell that has `of` rounds."""
        self.add(done / of)

    def round(self, of: int, round_: int, row: object) -> None:
        """Count a round of a cell; the observer of a recorder."""
        self.rounds(of, bool(round_))
