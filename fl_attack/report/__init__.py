"""A page to look at: what runs and sweeps were like, as one HTML file that needs no network.

It reads files only, and the training samples where the data set is there, to show those that were flipped most.
The command is `fl-attack report FOLDER...`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_attack.errors import InputError, one_line
from fl_attack.folder import REPORT
from fl_attack.report.page import render
from fl_attack.report.runs import of_run
from fl_attack.report.sweeps import of_sweep
from fl_attack.result import Result

__all__ = ["main", "offer", "render", "write"]
ABOUT = "Leave one HTML file that shows what runs and sweeps were like; it needs no network."


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of runs and sweeps, one after the other.

    Parameters
    ----------
    folders : sequence of Path
        The folders of results, as commands have left them in `out`.
    out : Path, optional
        The file; by default `report.html` in the first folder.

    Returns
    -------
    Path
        The file of the page.

    Raises
    ------
    InputError
        Where a folder holds no result that can be read, or the file can't be written.
    RunError
        Where the disk is full.
    """
    from fl_attack.data.cache import write_whole

    results = [Result.of_folder(folder) for folder in folders]
    parts = [of_run(one) if one.kind == "run" else of_sweep(one) for one in results]
    file = out or folders[0] / REPORT
    text = render(parts).encode()
    write_whole(file, lambda stream: stream.write(text))
    return file


def offer(folders: Sequence[Path]) -> None:
    """Write the page of these folders, see `write`; an error is only printed, since the results are whole."""
    try:
        write(folders)
    except Exception as error:
        print(f"no report was written: {one_line(error)}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Write the page that the command line asks for and print its file; gives the exit code 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="fl-attack report", description=ABOUT)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the out of a run or a sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the file; by default {REPORT} in the first folder")
    given = parser.parse_args(arguments)
    try:
        print(write(given.folders, given.out))
    except InputError as error:
        print(f"fl-attack: {error}", file=sys.stderr)
        return 2
    return 0
