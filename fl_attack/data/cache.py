"""Files that are there whole or not at all, and decoded arrays that all processes of a machine share.

An entry of the cache is a folder of .npy files, opened as memory maps so that any number of processes hold
one copy, beside a `meta.json` with the checksum of each. What is missing, truncated or altered is built anew.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from fl_attack.errors import InputError, RunError

Arrays = dict[str, np.ndarray]
Facts = dict[str, Any]


@dataclass(frozen=True)
class CacheEntry:
    """Memory-mapped arrays, the facts stored with them, and a hash of both."""

    arrays: Arrays
    facts: Facts
    fingerprint: str


def folder() -> Path:
    """The folder of the cache: `$FL_ATTACK_CACHE`, else `$XDG_CACHE_HOME/fl_attack`, else `~/.cache/fl_attack`."""
    if own := os.environ.get("FL_ATTACK_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl_attack"


def digest(value: object) -> str:
    """24 hex digits, the same for equal JSON values; what JSON does not have counts by its `repr`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file what `write` puts into a stream: all of it, or on any failure what it was before.

    Parameters
    ----------
    path : Path
        The file to write; missing folders are made.
    write : callable
        Gets a binary stream to write to.

    Raises
    ------
    InputError or RunError
        Where the disk refuses: RunError where it is full or fails.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def entry(key: str, build: Callable[[], tuple[Arrays, Facts]], *, verify: bool = True) -> CacheEntry:
    """An entry of the cache, built where it is not there whole.

    Parameters
    ----------
    key : str
        The name of the entry; where the content would differ, so must the name.
    build : callable
        Gives its arrays and facts. Of several processes one builds, the others wait for it.
    verify : bool
        Whether to compare checksums; without, only truncated files are found.

    Returns
    -------
    CacheEntry
        The entry, its arrays mapped from the disk, read-only.

    Raises
    ------
    InputError
        Where the folder can't be written to.
    RunError
        Where the disk is full.
    """
    place = folder() / key
    if found := _opened(place, verify):
        return found
    with lock(key):
        found = _opened(place, verify=True)
        if found is None:
            _store(place, *build())
            found = _opened(place, verify=False)
    if found is None:
        raise InputError(f"{place} changed while it was being built; leave the cache folder to the program")
    return found


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock of this name, which one process has at a time, while the block runs; it ends with the process.

    InputError or RunError where its file can't be written.
    """
    file = folder() / f"{name}.lock"
    held = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise _refusal(file, error) from error
    try:
        yield
    finally:
        held.release()


def _opened(place: Path, verify: bool) -> CacheEntry | None:
    """The entry at `place`; None where a part of it is missing or truncated, or altered, which only `verify` finds."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        fingerprint = meta.pop("fingerprint")
        if fingerprint != digest(meta):
            return None
        files = {name: place / f"{name}.npy" for name in meta["checksums"]}
        if verify and {name: _checksum(file) for name, file in files.items()} != meta["checksums"]:
            return None
        # A truncated file can't be mapped.
        arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    except Exception:  # damage can raise anything
        return None
    return CacheEntry(arrays, meta["facts"], fingerprint)


def _store(place: Path, arrays: Arrays, facts: Facts) -> None:
    """Replace the entry at `place`; the lock of its key is held."""
    unfinished = place.with_name(f".{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed process left it
    checksums = {}
    try:
        for name, array in arrays.items():
            file = unfinished / f"{name}.npy"
            write_whole(file, lambda stream, array=array: np.save(stream, array))  # type: ignore[misc]
            checksums[name] = _checksum(file)
        meta = {"checksums": checksums, "facts": facts}
        text = json.dumps(meta | {"fingerprint": digest(meta)})
        write_whole(unfinished / "meta.json", lambda stream: stream.write(text.encode()))
        shutil.rmtree(place, ignore_errors=True)  # damaged; who has mapped it keeps its pages
        os.rename(unfinished, place)
    except OSError as error:
        raise _refusal(place, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _checksum(file: Path) -> int:
    """The CRC-32 of the content of a file."""
    return zlib.crc32(np.memmap(file, np.uint8, "r"))  # type: ignore[arg-type]  # mapped: half the time of reading


def _refusal(path: Path, error: OSError) -> InputError | RunError:
    """The error that says that a file can't be written, and why: a RunError where the disk is full or fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # nothing that the user typed is wrong
        return RunError(f"{path} can't be written: {error.strerror}")
    way_out = "; set FL_ATTACK_CACHE to a writable folder" if path.is_relative_to(folder()) else ""
    return InputError(f"{path.parent} can't be written to: {error.strerror or error}{way_out}")
