"""The updates of clients in order, coordinate by coordinate: what the coordinate-wise rules spend their time on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

NETWORK_MOST = 48  # clients that a network sorts faster than numpy does
AT_ONCE = 2**15  # coordinates of a network, whose rows stay in the processor's cache
SORTED_AT_ONCE = 2**18  # numbers that numpy sorts
Rows = list[Tensor] | Tensor  # (places, n) values in order, n coordinates
Finish = Callable[[Rows], Tensor]


def by_coordinate(updates: Tensor, wanted: range, finish: Finish) -> Tensor:
    """Of updates (..., m, C, d), what `finish` makes of the values at the wanted places in order, (..., C, d).

    `finish` gets a row for each of these places, of some of the coordinates. Updates that are not finite
    come last in every coordinate.
    """
    if not bool(updates.sum().isfinite()):
        updates = updates.where(finite_rows(updates)[..., None, None], torch.inf)
    if updates.is_cuda:
        return finish(updates.sort(-3).values.movedim(-3, 0)[wanted.start : wanted.stop])
    by_client = updates.movedim(-3, 0)
    m = len(by_client)
    flat = by_client.reshape(m, -1)
    out = torch.empty(flat.shape[1], dtype=flat.dtype)
    small = m <= NETWORK_MOST
    step, order = (AT_ONCE, _by_network) if small else (max(1, SORTED_AT_ONCE // m), _by_numpy)

    def part(first: int) -> None:
        out[first : first + step] = finish(order(flat[:, first : first + step], wanted))

    starts, threads = range(0, flat.shape[1], step), torch.get_num_threads()
    if threads > 1 and len(starts) > 1 and not small:  # the short steps of a network would wait for Python's lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, starts))
    else:
        for first in starts:
            part(first)
    return out.view(by_client.shape[1:])


def ascending(values: Tensor) -> Tensor:
    """Each row in order; what is not a number comes last."""
    if values.is_cuda:
        return values.sort(-1).values
    return torch.from_numpy(np.sort(values.contiguous().numpy()))


def smallest(values: Tensor, count: int, ordered: Tensor) -> Tensor:
    """1 for the `count` smallest of each row, else 0, ties go to the lower index; `ordered` are the rows in order."""
    found = (values <= ordered[..., count - 1 : count]).to(values)
    if bool((found.sum(-1) > count).any()):
        first = values.sort(dim=-1, stable=True).indices[..., :count]
        found = torch.zeros_like(found).scatter_(-1, first, 1.0)
    return found


def _by_numpy(flat: Tensor, wanted: range) -> Rows:
    # numpy's sort of a row is vectorised, many times as fast as torch's over an outer axis; to turn the numbers around
    # takes as long as to sort them unless they are near, which a first copy sees to
    part = np.array(flat.contiguous().mT.numpy(), order="C")  # a copy, whatever its layout
    part.sort(-1)
    return torch.from_numpy(part[:, wanted.start : wanted.stop]).mT


def _by_network(flat: Tensor, wanted: range) -> Rows:
    rows = list(flat.numpy())  # views: each comparison makes new rows, and numpy's are cheaper to make than torch's
    for low, high, needs_low, needs_high in network(len(rows), wanted):
        one, other = rows[low], rows[high]
        if needs_low:
            rows[low] = np.fmin(one, other)  # nothing here is NaN, and `minimum` takes longer
        if needs_high:
            rows[high] = np.fmax(one, other)
    return [torch.from_numpy(row) for row in rows[wanted.start : wanted.stop]]


@cache
def network(m: int, wanted: range) -> list[tuple[int, int, bool, bool]]:
    """Comparisons that put m values in order at the wanted places: two places each, and which of the two matter.

    Batcher's odd-even merge sort (1968, https://doi.org/10.1145/1468075.1468121), without what no wanted place needs.
    """
    pairs = []
    merged = 1
    while merged < m:
        apart = merged
        while apart:
            for start in range(apart % merged, m - apart, 2 * apart):
                for low in range(start, min(start + apart, m - apart)):
                    if low // (2 * merged) == (low + apart) // (2 * merged):
                        pairs.append((low, low + apart))
            apart //= 2
        merged *= 2
    needed, kept = set(wanted), []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return kept[::-1]


def middle(updates: Tensor, start: int, stop: int) -> Tensor:
    """Coordinate-wise mean of the sorted values from start to stop."""
    if start == 0 and stop == updates.shape[-3]:
        return updates.mean(-3)

    def average(rows: Rows) -> Tensor:
        if isinstance(rows, Tensor):
            return rows.mean(0)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total / len(rows)

    return by_coordinate(updates, range(start, stop), average)


def finite_rows(updates: Tensor) -> Tensor:
    """(..., m) which updates are finite."""
    return updates.isfinite().flatten(-2).all(-1)
