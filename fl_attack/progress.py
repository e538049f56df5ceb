"""How far something is that counts its rounds or its cells."""

import importlib.util
import sys
from typing import Any, Self

from tqdm import tqdm


class Progress:
    """Shows how many of `total` units are done: by a bar on a terminal, elsewhere by a line every tenth of the way.

    `name` stands before the count, and `unit` is what is counted.
    """

    def __init__(self, total: int, name: str = "sweep", unit: str = "cell") -> None:
        self.total, self.name, self.unit, self.done, self.printed = total, name, unit, 0.0, 0
        self.bar = _bar(total=total, unit=unit, desc=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def extend(self, amount: int) -> None:
        """Expect this many units more than at first."""
        self.total += amount
        self.bar.total = self.total

    def skip(self, amount: float) -> None:
        """Count units that need not be computed, which are left out of the rate."""
        if not self.bar.disable:
            self.bar.initial += amount  # so that the rate is that of the others
        self.add(amount)

    def add(self, amount: float, note: str = "") -> None:
        """Count what is done.

        Parameters
        ----------
        amount : float
            The number of units that are done, or parts of one.
        note : str
            A text that is shown beside the bar.
        """
        self.done += amount
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(round(self.done, 1) - self.bar.n)  # parts of cells would be shown to the last digit
        tenth = int(self.done * 10 / self.total + 1e-6)
        if self.bar.disable and tenth > self.printed:
            self.printed = tenth
            one_by_one = f"{self.unit} {self.done:.0f} of {self.total}  {note}".rstrip()
            far = f"{tenth * 10} % of {self.total} cells" if self.unit == "cell" else one_by_one
            print(f"{self.name}: {far}", file=sys.stderr)

    def rounds(self, of: int, done: float) -> None:
        """Count rounds of a cell, where the bar counts cells.

        Parameters
        ----------
        of : int
            How many rounds the cell has.
        done : float
            How many further rounds of the cell are done.
        """
        self.add(done / of)

    def round(self, of: int, round_: int, row: object) -> None:
        """Count a round of a cell, as the observer of a recorder.

        Parameters
        ----------
        of : int
            How many rounds the cell has.
        round_ : int
            The number of the round that is done; 0 is none.
        row : object
            The measures of the round, which are not used.
        """
        self.rounds(of, bool(round_))

    def __call__(self, round_: int, row: dict[str, Any] | None = None) -> None:
        """Show that a run has done this round, and the accuracy last measured; the observer of a recorder."""
        self.add(round_ - self.done, f"accuracy {row['test_accuracy']:.4f}" if row else "")


def _bar(**options: Any) -> Any:
    """The bar of a terminal, or of a notebook that has ipywidgets; elsewhere one that shows nothing."""
    if not _is_notebook():
        return tqdm(**options, disable=not sys.stderr.isatty())
    from tqdm.auto import tqdm as of_notebooks  # which warns where there are no widgets

    return of_notebooks(**options)


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook that can show widgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ()) and importlib.util.find_spec("ipywidgets") is not None
