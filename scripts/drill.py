"""A drill: what becomes of runs and sweeps under faults, as a table of fault, expected and seen.

    scripts/drill          the quick part, without Ray: about two minutes
    scripts/drill --all    on Flower and Ray too: about twenty

Each fault is a function that gets an empty folder and says what it saw; it is wrong where that is not what is expected.
"""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = ("model.npz", "flips.npz", "rounds.csv")
QUICK = ["engine=batched", "rounds=40", "batch_size=128"]
SWEEP = ["-m", "engine=batched", "rounds=300", "eval_every=50", "clients.malicious=1,2", "seed=range(6)"]


WITHOUT_SHARED_MEMORY = [  # a file system of a page, which nobody can write to, in a name space of its own
    *("unshare", "--mount", "sh", "-c"),
    'mount -t tmpfs -o ro,size=4k none /dev/shm && exec "$@"',
    "sh",
]


class NotPossibleError(Exception):
    """A fault that can't be made on this machine, and why."""


class Fault(NamedTuple):
    """A row of the table."""

    expected: str
    see: Callable[[Path], str]
    quick: bool = True


def environment(at: Path, **more: str | None) -> dict[str, str]:
    """The environment of a program under test: a cache of its own, and changes; None removes a variable."""
    changed = {**os.environ, "FL_ATTACK_CACHE": str(at / "cache"), "HYDRA_FULL_ERROR": "0"} | more
    return {key: value for key, value in changed.items() if value is not None}


def begin(
    at: Path, *overrides: str, limit: int | None = None, within: Sequence[str] = (), **more: str | None
) -> subprocess.Popen[str]:
    """Start the program, by the command `within`; `limit` is the size in bytes beyond which no file may grow."""
    return subprocess.Popen(
        [*within, sys.executable, "-m", "fl_attack", *overrides],
        env=environment(at, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def ended(process: subprocess.Popen[str]) -> str:
    """The exit code, and how many lines were said beside progress and notes."""
    _, told = process.communicate(timeout=1800)
    lines = [line for line in told.splitlines() if line.startswith("fl-attack: ")]
    traceback = ", a traceback" if "Traceback" in told else ""
    return f"rc {process.returncode}, {len(lines)} lines{traceback}"


def run(at: Path, *overrides: str, limit: int | None = None, **more: str | None) -> str:
    """As `ended`, from the start."""
    return ended(begin(at, *overrides, limit=limit, **more))


def wait_for(there: Callable[[], bool], seconds: float = 120) -> None:
    """Return when something is there, or after a while."""
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.02)


def same(one: Path, other: Path, names: Sequence[str] = RESULTS) -> str:
    """Whether two results have the same bytes."""
    equal = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return "same bytes" if equal else "other bytes"


def killed_sweep(at: Path) -> str:
    """A sweep killed after its second unit goes on."""
    run(at, *SWEEP, f"out={at}/whole")
    process, units = begin(at, *SWEEP, f"out={at}/cut"), at / "cut" / "units"
    wait_for(lambda: len(list(units.glob("*.npz"))) >= 2)
    process.kill()
    process.communicate()
    said = run(at, *SWEEP, f"out={at}/cut")
    return f"{said}, {same(at / 'whole', at / 'cut', ['sweep.csv', 'curves.npz'])}"


def swapped_unit(at: Path) -> str:
    """A unit of another computation under a unit's name is not believed."""
    run(at, *SWEEP, f"out={at}/whole")
    process, units = begin(at, *SWEEP, f"out={at}/cut"), at / "cut" / "units"
    wait_for(lambda: len(list(units.glob("*.npz"))) >= 2)
    process.kill()
    process.communicate()
    one, other = sorted(units.glob("*.npz"))[:2]
    shutil.copyfile(one, other)
    said = run(at, *SWEEP, f"out={at}/cut")
    return f"{said}, {same(at / 'whole', at / 'cut', ['sweep.csv', 'curves.npz'])}"


def terminated_run(at: Path) -> str:
    """SIGTERM ends a batched run with what was measured."""
    process = begin(at, *QUICK, "rounds=1000000", "eval_every=100", f"out={at}/o")
    wait_for((at / "o" / "config.yaml").exists)
    time.sleep(1.0)
    process.terminate()
    said = ended(process)
    with (at / "o" / "rounds.csv").open() as lines:
        return f"{said}, {'rounds kept' if len(list(csv.DictReader(lines))) > 1 else 'no rounds'}"


def full_disk(at: Path) -> str:
    """A disk on which no file may grow beyond 2 kB."""
    return run(at, *QUICK, f"out={at}/o") and run(at, *QUICK, "rounds=400", f"out={at}/p", limit=2048)


def read_only(at: Path) -> str:
    """A folder in which nobody can write."""
    return run(at, *QUICK, "out=/proc/fl-attack")


def two_writers(at: Path) -> str:
    """Two programs, one folder."""
    both = [begin(at, *QUICK, "rounds=3000", f"out={at}/o") for _ in range(2)]
    return " and ".join(sorted(ended(one) for one in both))


def two_sweeps(at: Path) -> str:
    """Two sweeps, one folder."""
    both = [begin(at, *SWEEP, f"out={at}/o") for _ in range(2)]
    return " and ".join(sorted(ended(one) for one in both))


def one_cache(at: Path) -> str:
    """Two programs that fill one cache, with different results."""
    both = [begin(at, *QUICK, "attack.goal=targeted", f"out={at}/o{i}") for i in range(2)]
    said = " and ".join(sorted(ended(one) for one in both))
    return f"{said}, {same(at / 'o0', at / 'o1')}"


def damaged_cache(at: Path) -> str:
    """Bytes changed in every file of the cache."""
    run(at, *QUICK, "attack.goal=targeted", f"out={at}/first")
    rng = random.Random(0)
    for file in [file for file in (at / "cache").rglob("*") if file.is_file() and file.stat().st_size]:
        content = bytearray(file.read_bytes())
        for _ in range(20):
            content[rng.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
    said = run(at, *QUICK, "attack.goal=targeted", f"out={at}/again")
    return f"{said}, {same(at / 'first', at / 'again')}"


def no_home(at: Path) -> str:
    """No place for a cache: HOME is nowhere."""
    return run(at, *QUICK, f"out={at}/o", FL_ATTACK_CACHE=None, XDG_CACHE_HOME=None, HOME="/proc/nowhere")


def closed_streams(at: Path) -> str:
    """Standard output and error are closed."""
    command = f"{sys.executable} -m fl_attack {' '.join(QUICK)} out={at}/o >&- 2>&-"
    code = subprocess.run(command, shell=True, env=environment(at)).returncode
    return f"rc {code}, {'a result' if (at / 'o' / 'summary.json').exists() else 'no result'}"


def deleted_folder(at: Path) -> str:
    """The folder is deleted in mid-run."""
    process = begin(at, *QUICK, "rounds=6000", f"out={at}/o")
    wait_for((at / "o" / "config.yaml").exists)
    shutil.rmtree(at / "o")
    said = ended(process)
    return f"{said}, {'a result' if (at / 'o' / 'summary.json').exists() else 'no result'}"


def no_shared_memory(at: Path, *overrides: str) -> str:
    """Nobody can write to /dev/shm."""
    try:
        tried = subprocess.run([*WITHOUT_SHARED_MEMORY, "true"], capture_output=True, text=True)
    except OSError as error:
        raise NotPossibleError(str(error)) from None
    if tried.returncode:
        raise NotPossibleError(" ".join(tried.stderr.split()))
    run(at, *overrides, f"out={at}/with")
    said = ended(begin(at, *overrides, f"out={at}/without", within=WITHOUT_SHARED_MEMORY))
    names = ["sweep.csv", "curves.npz"] if "-m" in overrides else RESULTS
    return f"{said}, {same(at / 'with', at / 'without', names)}"


def many_clients(at: Path, *overrides: str) -> str:
    """5,000 clients of two samples."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10100, 4)), rng.integers(0, 2, 10100)
    np.savez(at / "d.npz", x_train=x[100:], y_train=y[100:], x_test=x[:100], y_test=y[:100])
    data = ["dataset=npz", f"dataset.path={at}/d.npz", "clients.total=5000", "clients.malicious=500"]
    return run(at, *data, "batch_size=full", "rounds=3", f"out={at}/o", *overrides)


def killed_run(at: Path) -> str:
    """A run on Flower killed in its middle goes on."""
    flower = ["rounds=6000", "eval_every=50", "baseline=false"]
    process = begin(at, *flower, f"out={at}/cut")
    wait_for((at / "cut" / "checkpoint.npz").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said = run(at, *flower, f"out={at}/cut")
    run(at, *flower, f"out={at}/whole")
    return f"{said}, {same(at / 'whole', at / 'cut')}"


def ten_ways(at: Path) -> str:
    """Ten runs on Flower, over numbers of actors and both grids."""
    run(at, "rounds=20", f"out={at}/first")
    ways = [["engine.grid=stock"], *(["engine.grid=block", f"engine.actors={1 + i % 5}"] for i in range(9))]
    said = {run(at, "rounds=20", f"out={at}/{i}", *way) for i, way in enumerate(ways)}
    bytes_of = {same(at / "first", at / str(i)) for i in range(len(ways))}
    return f"{', '.join(sorted(said))}, {', '.join(sorted(bytes_of))}"


FAULTS: dict[str, Fault] = {
    "a sweep is killed": Fault("rc 0, 0 lines, same bytes", killed_sweep),
    "a unit of a sweep is swapped": Fault("rc 0, 0 lines, same bytes", swapped_unit),
    "a batched run gets SIGTERM": Fault("rc 143, 1 lines, rounds kept", terminated_run),
    "the disk is full": Fault("rc 1, 1 lines", full_disk),
    "the folder is read-only": Fault("rc 2, 1 lines", read_only),
    "two runs, one folder": Fault("rc 0, 0 lines and rc 2, 1 lines", two_writers),
    "two sweeps, one folder": Fault("rc 0, 0 lines and rc 2, 1 lines", two_sweeps),
    "two runs fill one cache": Fault("rc 0, 0 lines and rc 0, 0 lines, same bytes", one_cache),
    "the cache is damaged": Fault("rc 0, 0 lines, same bytes", damaged_cache),
    "there is no HOME": Fault("rc 2, 1 lines", no_home),
    "output and error are closed": Fault("rc 0, a result", closed_streams),
    "the folder is deleted in mid-run": Fault("rc 0, 0 lines, a result", deleted_folder),
    "no shared memory, a sweep": Fault("rc 0, 0 lines, same bytes", lambda at: no_shared_memory(at, *SWEEP)),
    "5,000 clients, batched": Fault("rc 0, 0 lines", lambda at: many_clients(at, "engine=batched")),
    "5,000 clients, Flower": Fault("rc 0, 0 lines", many_clients, quick=False),
    "no shared memory, Flower": Fault(
        "rc 0, 0 lines, same bytes", lambda at: no_shared_memory(at, "rounds=20"), quick=False
    ),
    "a run on Flower is killed": Fault("rc 0, 0 lines, same bytes", killed_run, quick=False),
    "actors and grids, ten times": Fault("rc 0, 0 lines, same bytes", ten_ways, quick=False),
}


def drill(names: Sequence[str]) -> int:
    """Print the table of these faults; gives how many were not as expected."""
    wrong = 0
    print(f"{'fault':34}  {'expected':46}  seen", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="drill") as folder:
            try:
                seen = FAULTS[name].see(Path(folder))
            except NotPossibleError as why:
                print(f"{name:34}  {FAULTS[name].expected:46}  not tried: {why}", flush=True)
                continue
            except Exception as error:  # a file that is not there, a program that does not end
                seen = f"{type(error).__name__}: {error}"
        wrong += seen != FAULTS[name].expected
        print(f"{name:34}  {FAULTS[name].expected:46}  {seen if seen != FAULTS[name].expected else 'so'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, drill([name for name, fault in FAULTS.items() if fault.quick or "--all" in sys.argv[1:]])))
