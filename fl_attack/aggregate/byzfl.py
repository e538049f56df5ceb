"""ByzFL's rules and pre-aggregators (https://byzfl.epfl.ch), on our updates; the extra `byzfl` installs them.

What calling version 0.0.11 takes: torch's double precision comes back single (so numpy goes in), some classes write
into what they are given (so copies do), some draw from global generators (seeded here, and put back as they were), and
one vector that is not finite can win (so those become zero).
"""

import importlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_attack.errors import InputError

RULES = (
    *("Average", "Median", "TrMean", "GeometricMedian", "Krum", "MultiKrum", "CenteredClipping"),
    *("MDA", "MoNNA", "Meamed", "CAF", "SMEA"),
)
PRE = ("NNM", "Bucketing", "Clipping", "ARC")
MAX_FOR_SUBSETS = 20  # clients; all subsets of more take a minute a call


def make(name: str, known: tuple[str, ...], key: str, f: int, m: int, args: Mapping[str, Any]) -> Callable[..., Tensor]:
    """A class of ByzFL as a function.

    Parameters
    ----------
    name : str
        The class.
    known : tuple of str
        The classes allowed here.
    key : str
        The setting that names it, for messages.
    f, m : int
        Malicious clients, and clients.
    args : mapping
        Arguments of the class by name.

    Returns
    -------
    callable
        updates (..., m, C, d) and client_order (m,), which decides what is drawn, to (..., C, d), or to (..., k, C, d)
        for a pre-aggregator that makes k updates.

    Raises
    ------
    InputError
        Where ByzFL is not installed, or has no such class or argument, or refuses the numbers.
    """
    if name not in known:
        raise InputError(f"{key}={name} is not one of ByzFL's; known: {', '.join(known)}")
    try:
        library = importlib.import_module("byzfl")
    except ImportError as error:
        raise InputError(
            f"{key}={name} needs ByzFL, which is not installed ({error}); pip install 'fl-attack[byzfl]'"
        ) from None
    if name in ("MDA", "SMEA") and m > MAX_FOR_SUBSETS:
        raise InputError(f"{key}={name} tries all subsets of {m} clients; use at most {MAX_FOR_SUBSETS}")
    takes = signature(getattr(library, name).__init__).parameters
    given = ({"f": int(f)} if "f" in takes else {}) | dict(args)
    unknown = [one for one in given if one not in takes or (name, one) == ("CenteredClipping", "m")]
    if unknown:
        raise InputError(f"{unknown[0]} is not an argument of ByzFL's {name}; it takes {', '.join(list(takes)[1:])}")
    try:
        function = getattr(library, name)(**given)
        function(1.0 + np.arange(m)[:, None])
    except Exception as error:
        raise InputError(f"{key}={name} does not take f={f} of {m} clients with {dict(args)}: {error}") from None

    def apply(updates: Tensor, client_order: Tensor) -> Tensor:
        """What the class makes of the updates, one federation after the other."""
        shape = updates.shape
        federations = updates.reshape(-1, shape[-3], shape[-2] * shape[-1]).cpu().numpy()
        found = []
        for vectors in federations:
            with seeded(client_order), np.errstate(all="ignore"):
                found.append(np.asarray(function(np.where(np.isfinite(vectors), vectors, 0.0))))
        return torch.from_numpy(np.stack(found)).to(updates).view(*shape[:-3], *found[0].shape[:-1], *shape[-2:])

    return apply


@contextmanager
def seeded(client_order: Tensor) -> Iterator[None]:
    """The global generators of random, numpy and torch in a state that the order decides, then as they were."""
    seed = int(np.random.default_rng(client_order.cpu().numpy()).integers(2**31))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - ByzFL's own
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
