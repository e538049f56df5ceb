"""What is shown while something takes seconds of which nobody knows how many."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_EVERY = 0.5  # seconds


@contextmanager
def waiting(for_what: str, on_terminals_only: bool = False) -> Iterator[None]:
    """Say on standard error what is waited for: on a terminal with the seconds so far, elsewhere in one line.

    Parameters
    ----------
    for_what : str
        What is waited for, as in "starting Ray".
    on_terminals_only : bool
        Whether to say nothing where nobody watches.
    """
    if not sys.stderr.isatty():
        if not on_terminals_only:
            print(for_what, file=sys.stderr)
        yield
        return
    began, over = time.monotonic(), threading.Event()

    def show() -> None:
        while not over.wait(SHOWN_EVERY):
            print(f"\r{for_what} {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)

    shown = threading.Thread(target=show, daemon=True)
    print(for_what, end="", file=sys.stderr, flush=True)
    shown.start()
    try:
        yield
    finally:
        over.set()
        shown.join()
        print(f"\r{for_what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
