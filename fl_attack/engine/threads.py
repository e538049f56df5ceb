"""Work side by side on the processors of this process, beside what torch shares out itself.

Worth it where a piece of work is many small steps, of which no single one is worth waking a thread for.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Given = TypeVar("Given")
Found = TypeVar("Found")


def side_by_side(work: Callable[[Given], Found], parts: Sequence[Given]) -> list[Found]:
    """The results of a function on parts, on as many threads as torch uses, each of which works alone.

    Parameters
    ----------
    work : callable
        It must not change what another call of it reads.
    parts : sequence
        The arguments, one for each call.

    Returns
    -------
    list
        In the order of the parts. Where a call raises, so does this, and no further part is begun.
    """
    threads = torch.get_num_threads()
    if min(threads, len(parts)) < 2:
        return [work(part) for part in parts]
    results: dict[int, Found] = {}
    left = iter(range(len(parts)))

    def some() -> None:
        try:
            for i in left:  # shared: to hand over a part at a time would cost as much as a short one takes
                results[i] = work(parts[i])
        finally:
            deque(left, maxlen=0)  # where one has failed the others need not go on

    torch.set_num_threads(1)
    try:
        for done in [pool(threads).submit(some) for _ in range(min(threads, len(parts)))]:
            done.result()
    finally:
        deque(left, maxlen=0)  # where this one is interrupted, too
        torch.set_num_threads(threads)
    return [results[i] for i in range(len(parts))]


@lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    """A pool of this number of threads, kept until one of another number is asked for."""
    return ThreadPoolExecutor(threads)
