"""How far a run is, kept in its folder now and then, so that it can go on where it stopped.

A state is a tree of dicts with names as keys, lists, tuples, numpy arrays, torch tensors, numbers, texts and None. It
is stored as arrays and one JSON text, never pickled: a foreign file can do no harm, and zip's checksums find damage.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_attack.data.cache import write_whole

State = dict[str, Any]
FILE = "checkpoint.npz"
FORMAT = 3  # of what is stored; another number leaves old files aside
EVERY = 5.0  # seconds between two
SHARE = 20  # of the time that saving one takes, at least as many pass until the next


def save(folder: Path, state: State, key: str) -> None:
    """Leave a state in a folder, in place of an earlier one.

    Parameters
    ----------
    folder : Path
        The folder of the run; made if it is missing.
    state : State
        The tree to store.
    key : str
        What the state depends on, as of `identity.key_of`.

    Raises
    ------
    InputError or RunError
        Where the disk refuses; the earlier state is then still there.
    TypeError
        Where something in the state can't be stored.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps({"format": FORMAT, "key": key, "state": _packed(state, arrays)})
    arrays["tree"] = np.frombuffer(text.encode(), np.uint8)
    write_whole(folder / FILE, lambda stream: np.savez(stream, allow_pickle=False, **arrays))


def load(folder: Path, key: str) -> State | None:
    """The state that `save` left in a folder under this key.

    Parameters
    ----------
    folder : Path
        The folder of the run.
    key : str
        The key that was given to `save`.

    Returns
    -------
    State | None
        None where there is none, or only one that is damaged or of another key, which a line on standard error tells.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored}
        tree = json.loads(arrays.pop("tree").tobytes())
        if (tree["format"], tree["key"]) != (FORMAT, key):
            why = "is of other settings, data or versions"
        else:
            state: State = _unpacked(tree["state"], arrays)
            return state
    except Exception:  # damage can raise anything
        why = "is damaged"
    print(f"{file} {why}; the run starts anew", file=sys.stderr)
    return None


class Checkpoint:
    """The state of a run in its folder, under a key.

    At least `every` seconds pass between two that are saved, and `SHARE` times as many as saving the last one took.
    """

    def __init__(self, folder: Path, key: str, every: float = EVERY) -> None:
        self.folder, self.key, self.every = folder, key, every
        self._due = time.monotonic() + every

    def offer(self, state: Callable[[], State | None]) -> None:
        """Save the state that `state` gives, if enough time has passed since the last; None is not saved."""
        began = time.monotonic()
        if began < self._due:
            return
        if (now := state()) is not None:
            self.save(now)
        ended = time.monotonic()
        self._due = ended + max(self.every, SHARE * (ended - began))

    def save(self, state: State) -> None:
        """Store a state in the folder now, see the function `save`."""
        save(self.folder, state, self.key)

    def load(self) -> State | None:
        """The state stored in the folder under this key, or None; see the function `load`."""
        return load(self.folder, self.key)

    def remove(self) -> None:
        """Remove the state: the run is finished."""
        (self.folder / FILE).unlink(missing_ok=True)


def storable(state: State) -> State:
    """The state itself; TypeError where something in it can't be stored."""
    _packed(state, {})
    return state


def _packed(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree as values of JSON, its arrays added to `arrays` under numbers; TypeError where something else is in it."""
    pack = partial(_packed, arrays=arrays)
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, np.generic):
        return pack(tree.item())
    if isinstance(tree, np.ndarray | torch.Tensor):
        name = str(len(arrays))
        arrays[name] = tree.cpu().numpy() if isinstance(tree, torch.Tensor) else tree
        return {"tensor" if isinstance(tree, torch.Tensor) else "array": name}
    if isinstance(tree, list | tuple):
        return {"list" if isinstance(tree, list) else "tuple": [pack(part) for part in tree]}
    if isinstance(tree, dict) and all(isinstance(name, str) for name in tree):
        return {"dict": {name: pack(part) for name, part in tree.items()}}
    raise TypeError(f"{type(tree).__name__} can't be stored in a checkpoint")


def _unpacked(packed: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The tree of which `_packed` made this JSON and these arrays."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "array":
        return arrays[content]
    if kind == "tensor":
        return torch.from_numpy(arrays[content])
    if kind == "dict":
        return {name: _unpacked(part, arrays) for name, part in content.items()}
    parts = [_unpacked(part, arrays) for part in content]
    return parts if kind == "list" else tuple(parts)
