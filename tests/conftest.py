"""What the tests share: a private cache, quiet libraries, and settings composed as the command line does."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import hypothesis
import numpy as np
import pytest

from fl_attack import __main__
from fl_attack.config import Settings, compose

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

DATA = Path(os.environ.get("FL_ATTACK_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache; processes started by tests inherit this."""
    before = os.environ.get("FL_ATTACK_CACHE")
    os.environ["FL_ATTACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FL_ATTACK_CACHE")
    if before is not None:
        os.environ["FL_ATTACK_CACHE"] = before


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
        told = capsys.readouterr()
        return code, told.out, told.err

    return run
