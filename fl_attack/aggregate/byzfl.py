"""ByzFL's rules and pre-aggregators (https://byzfl.epfl.ch), on our updates; the extra `byzfl` installs them.

What calling them takes, learned by trying version 0.0.11: torch's double precision comes back single (so numpy goes
in), some write into what they are given (so copies do), some draw from global generators (seeded here, and put back as
they were), and one vector that is not finite can win (so those become zero).
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
MANY = 20  # subsets of more clients than this take a minute a call


def make(name: str, known: tuple[str, ...], key: str, f: int, m: int, args: Mapping[str, Any]) -> Callable[..., Tensor]:
    """A class of ByzFL as a function of updates (..., m, C, d) and lots (m,); InputError where there is none."""
    if name not in known:
        raise InputError(f"{key}={name} is not one of ByzFL's; known: {', '.join(known)}")
    try:
        library = importlib.import_module("byzfl")
    except ImportError as error:
        raise InputError(
            f"{key}={name} needs ByzFL, which is not here ({error}); pip install 'fl-attack[byzfl]'"
        ) from None
    if name in ("MDA", "SMEA") and m > MANY:
        raise InputError(f"{key}={name} tries all subsets of {m} clients; use at most {MANY}")
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

    def apply(updates: Tensor, lots: Tensor) -> Tensor:
        shape = updates.shape
        cells = updates.reshape(-1, shape[-3], shape[-2] * shape[-1]).cpu().numpy()
        found = []
        for cell in cells:
            with seeded(lots), np.errstate(all="ignore"):
                found.append(np.asarray(function(np.where(np.isfinite(cell), cell, 0.0))))
        return torch.from_numpy(np.stack(found)).to(updates).view(*shape[:-3], *found[0].shape[:-1], *shape[-2:])

    return apply


@contextmanager
def seeded(lots: Tensor) -> Iterator[None]:
    """The global generators in a state that lots decide, then as they were."""
    seed = int(np.random.default_rng(lots.cpu().numpy()).integers(2**31))
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
