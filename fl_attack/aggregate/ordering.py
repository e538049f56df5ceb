"""Values of clients in ascending order, coordinate by coordinate: most of the cost of the coordinate-wise rules."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

MAX_OF_NETWORK = 48  # clients; of more numpy sorts faster than a sorting network
NETWORK_CHUNK = 2**15  # coordinates at once, so that rows stay in the processor's cache
SORT_CHUNK = 2**18  # numbers that numpy sorts at once
Rows = list[Tensor] | Tensor
"""(places, n) values in ascending order, of n coordinates."""
Reduce = Callable[[Rows], Tensor]


def by_coordinate(updates: Tensor, places: range, reduce: Reduce) -> Tensor:
    """Sort the values of the clients in each coordinate, and reduce some of them to one.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        Updates that are not finite come last in every coordinate.
    places : range
        The places in ascending order that are reduced, from 0 to m - 1.
    reduce : callable
        Takes a row for each of these places, of some of the coordinates, and gives one row.

    Returns
    -------
    (..., C, d) tensor
    """
    if not bool(updates.sum().isfinite()):
        updates = updates.where(finite_rows(updates)[..., None, None], torch.inf)
    if updates.is_cuda:
        return reduce(updates.sort(-3).values.movedim(-3, 0)[places.start : places.stop])
    by_client = updates.movedim(-3, 0)
    m = len(by_client)
    flat = by_client.reshape(m, -1)
    out = torch.empty(flat.shape[1], dtype=flat.dtype)
    by_network = m <= MAX_OF_NETWORK
    step, order = (NETWORK_CHUNK, _by_network) if by_network else (max(1, SORT_CHUNK // m), _by_numpy)

    def fill(first: int) -> None:
        """Reduce the coordinates of a chunk, into their place."""
        out[first : first + step] = reduce(order(flat[:, first : first + step], places))

    starts, threads = range(0, flat.shape[1], step), torch.get_num_threads()
    if threads > 1 and len(starts) > 1 and not by_network:  # the short steps of a network would wait for Python's lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    else:
        for first in starts:
            fill(first)
    return out.view(by_client.shape[1:])


def ascending(values: Tensor) -> Tensor:
    """Values (..., n) with each row in ascending order; NaN comes last."""
    if values.is_cuda:
        return values.sort(-1).values
    return torch.from_numpy(np.sort(values.contiguous().numpy()))


def smallest(values: Tensor, count: int, ordered: Tensor) -> Tensor:
    """Mark the smallest values of each row.

    Parameters
    ----------
    values : (..., n) tensor
    count : int
        How many; of equal values the one of the lower index.
    ordered : (..., n) tensor
        The values with each row in ascending order.

    Returns
    -------
    (..., n) tensor
        1 for the smallest, else 0, in the type of the values.
    """
    found = (values <= ordered[..., count - 1 : count]).to(values)
    if bool((found.sum(-1) > count).any()):
        first = values.sort(dim=-1, stable=True).indices[..., :count]
        found = torch.zeros_like(found).scatter_(-1, first, 1.0)
    return found


def _by_numpy(flat: Tensor, places: range) -> Rows:
    """The values of flat (m, n) at these places in ascending order, sorted by numpy."""
    # numpy's sort of a row is vectorised, many times as fast as torch's over an outer axis; transposing takes as long
    # as sorting unless the numbers are near in memory, which a first copy sees to
    part = np.array(flat.contiguous().mT.numpy(), order="C")  # a copy, whatever its layout
    part.sort(-1)
    return torch.from_numpy(part[:, places.start : places.stop]).mT


def _by_network(flat: Tensor, places: range) -> Rows:
    """The values of flat (m, n) at these places in ascending order, by a sorting network."""
    rows = list(flat.numpy())  # views: each comparison makes new rows, and numpy's are cheaper to make than torch's
    for low, high, needs_low, needs_high in network(len(rows), places):
        one, other = rows[low], rows[high]
        if needs_low:
            rows[low] = np.fmin(one, other)  # nothing here is NaN, and `minimum` takes longer
        if needs_high:
            rows[high] = np.fmax(one, other)
    return [torch.from_numpy(row) for row in rows[places.start : places.stop]]


@cache
def network(m: int, places: range) -> list[tuple[int, int, bool, bool]]:
    """The comparisons of a sorting network, without those that no place asked for needs.

    Parameters
    ----------
    m : int
        The number of values that are sorted.
    places : range
        Places in ascending order whose values are asked for, from 0.

    Returns
    -------
    list of (low, high, needs_low, needs_high)
        The smaller of two values goes to place `low`, the larger to `high`; and which of the two are needed.

    References
    ----------
    Batcher, K. E. (1968). Sorting networks and their applications. https://doi.org/10.1145/1468075.1468121.
    """
    pairs = []
    merged = 1
    while merged < m:
        stride = merged
        while stride:
            for start in range(stride % merged, m - stride, 2 * stride):
                for low in range(start, min(start + stride, m - stride)):
                    if low // (2 * merged) == (low + stride) // (2 * merged):
                        pairs.append((low, low + stride))
            stride //= 2
        merged *= 2
    needed, kept = set(places), []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return kept[::-1]


def middle(updates: Tensor, start: int, stop: int) -> Tensor:
    """Coordinate-wise mean of the values at some places in ascending order.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        The values of each coordinate are those of m clients.
    start, stop : int
        The first place, from 0, and the one after the last.

    Returns
    -------
    (..., C, d) tensor
        Updates that are not finite are Inf in every coordinate, unless all places are averaged: then they stay as they
        are.
    """
    if start == 0 and stop == updates.shape[-3]:
        return updates.mean(-3)

    def average(rows: Rows) -> Tensor:
        """The mean of the rows."""
        if isinstance(rows, Tensor):
            return rows.mean(0)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total / len(rows)

    return by_coordinate(updates, range(start, stop), average)


def finite_rows(updates: Tensor) -> Tensor:
    """Whether each update is finite, (..., m)."""
    return updates.isfinite().flatten(-2).all(-1)
