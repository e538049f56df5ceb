"""What the tests share: processors, one Ray, a private cache, and settings composed as the command line does."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import hypothesis
import numpy as np
import pytest
import ray
from matplotlib.figure import Figure

from fl_attack import __main__
from fl_attack.config import Settings, compose

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_WORKERS = 8  # each takes about a gigabyte
RUN_RAY = {"shared_ray", "own_ray", "grid"}  # fixtures
DATA = Path(os.environ.get("FL_ATTACK_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: a worker on each processor for the whole suite, none for tests named one by one."""
    return min(CPUS, MOST_WORKERS) if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_configure(config: pytest.Config) -> None:
    """Workers, and the processes that tests start, share the processors, and Ctrl-C reaches them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if workers := getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CPUS // workers)))


def pytest_itemcollected(item: pytest.Item) -> None:
    """What runs Ray is slow."""
    if RUN_RAY & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.ray)
    if item.get_closest_marker("ray"):
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take parts of the list and then of each other's: Ray's tests fall to one, long ones come early."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("ray", "slow")])


def pytest_unconfigure() -> None:
    """What a grid has frozen is let go, or libraries would report it as lost below pytest's closing line."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def ray_ended() -> Iterator[None]:
    """Ray ends with the tests."""
    yield
    ray.shutdown()


@pytest.fixture
def shared_ray(ray_ended: None) -> None:
    """One running Ray, which runs join where they find it; it stays for the next test that wants it."""
    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)


@pytest.fixture
def own_ray() -> Iterator[None]:
    """No Ray is running: the test starts and ends its own."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache; processes started by tests inherit this."""
    before = os.environ.get("FL_ATTACK_CACHE")
    os.environ["FL_ATTACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FL_ATTACK_CACHE")
    if before is not None:
        os.environ["FL_ATTACK_CACHE"] = before


@pytest.fixture(autouse=True, scope="session")
def quick_files() -> Iterator[None]:
    """No disk is waited for, and a PDF holds no figure: to cut its fonts takes longer than to compute most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Figure, "savefig", _png_alone)
        yield


SAVE = Figure.savefig


def _png_alone(figure: Figure, stream: IO[bytes], *, format: str, **more: Any) -> None:
    """What takes the place of `savefig`, but in tests that ask for `real_pdf`."""
    if format == "pdf":
        stream.write(b"%PDF-1.4\n%%EOF\n")
    else:
        SAVE(figure, stream, format=format, **more)


@pytest.fixture
def real_pdf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are written in all formats."""
    monkeypatch.setattr(Figure, "savefig", SAVE)


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """The folder of MNIST's original files."""
    if not (DATA / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip(f"needs MNIST under {DATA} (or the folder that FL_ATTACK_TEST_DATA names)")
    return str(DATA)


@pytest.fixture(scope="session")
def settings() -> Callable[..., Settings]:
    """Composes settings from overrides, as the command line does."""
    return lambda *overrides: compose("out=unused", *overrides)


@pytest.fixture
def small_data(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a small learnable data set and gives the overrides that load it."""

    def write(classes: int = 2, train: int = 120, test: int = 60, features: int = 6, seed: int = 0) -> list[str]:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(classes, features))
        y = rng.integers(0, classes, train + test)
        x = (centres[y] + rng.normal(size=(train + test, features)) * 0.7).astype(np.float32)
        file = tmp_path / f"small{classes}-{train}-{seed}.npz"
        np.savez(file, x_train=x[:train], y_train=y[:train], x_test=x[train:], y_test=y[train:])
        return ["dataset=npz", f"dataset.path={file}"]

    return write


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `fl-attack` in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fl-attack", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        code = 0
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        stderr = capsys.readouterr()
        return code, stderr.out, stderr.err

    return run
