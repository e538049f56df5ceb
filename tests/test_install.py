"""An installation that fits: no CUDA, no torchvision, either Flower, and the numbers of the whole environment."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data import plant  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[1]
LARGEST = 1500  # MB
FLOWERS = ("1.41.0", "1.42.0")
RUNS = """
import hashlib, json, sys
from pathlib import Path
import ray
from fl_attack import experiment
from fl_attack.config import compose
from fl_attack.data import formats

out, sums, runs = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
formats.MD5.update(sums)
ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
for name, overrides in runs.items():
    engines = ["engine=batched"], ["engine=flower"], ["engine=flower", "engine.grid=stock"]
    for engine in engines[: 3 if name == "digits" else 2]:  # Flower's own scheduler once
        folder = out / f"{name}-{'-'.join(one.partition('=')[2] for one in engine)}"
        experiment.run(compose(*overrides, *engine, f"out={folder}"))
ray.shutdown()
try:
    import torchvision
except ImportError:
    print("without torchvision")
"""


def cpu_wheel() -> dict[str, str]:
    """What names a wheel of torch for processors on this machine, if there is one."""
    tag = f"cp3{sys.version_info.minor}"
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    found = sorted(file for link in links for file in Path(link).glob(f"torch-*+cpu-{tag}-{tag}-*.whl"))
    return {"TORCH": str(found[-1])} if found else {}


@pytest.mark.slow
def test_a_small_environment_runs_digits_mnist_cifar_and_image_folders_on_either_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, scripts = tmp_path / "small", Path(sys.executable).parent
    environ = os.environ | cpu_wheel() | {"PYTHON": sys.executable}
    built = subprocess.run(
        [ROOT / "scripts" / "cpu_environment", place], env=environ, capture_output=True, text=True, check=False
    )
    if built.returncode and "TORCH" not in environ:
        pytest.skip(f"no wheel of torch for processors is to be had: {built.stderr.strip()[-200:]}")
    assert built.returncode == 0, built.stderr

    runs, sums = {"digits": ["dataset=digits"]}, {}
    for loader in ("mnist", "cifar10", "image_folder"):
        (tmp_path / loader).mkdir()
        planted = plant(loader, tmp_path / loader, monkeypatch)
        ((key, root),) = planted.given.items()
        runs[loader] = [f"dataset={loader}", f"dataset.{key}={root}"]
        if loader == "cifar10":
            sums = {str(file.relative_to(root)): hashlib.md5(file.read_bytes()).hexdigest() for file in planted.files}
    for name, overrides in runs.items():
        batch = "batch_size=20" if name != "digits" else "batch_size=100"
        overrides += ["rounds=3", "baseline=false", "clients.total=4", "clients.malicious=2", "dtype=float64", batch]
    results = {}
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}  # it counts, too
    for version in FLOWERS:
        uv = [scripts / "uv", "pip", "install", "-q", "--python", place / "bin" / "python", f"flwr=={version}"]
        done = subprocess.run(uv, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"flwr {version} is not to be had: {done.stderr.strip()[-200:]}")
        call = [place / "bin" / "python", "-c", RUNS, tmp_path / version, json.dumps(sums), json.dumps(runs)]
        cache = {"FL_ATTACK_CACHE": f"{tmp_path}/cache-{version}"}
        ran = subprocess.run(
            call, cwd=tmp_path, env=bare | cache, capture_output=True, text=True, check=False, timeout=400
        )
        assert ran.returncode == 0 and "without torchvision" in ran.stdout, ran.stdout + ran.stderr
        for folder in sorted((tmp_path / version).iterdir()):
            with np.load(folder / "model.npz") as model, np.load(folder / "flips.npz") as flips:
                results[version, folder.name] = model["theta"], flips["sample"], flips["label"]
    assert len(results) == 18 and all(len(flips) for _, flips, _ in results.values())
    for (version, name), found in results.items():
        here = results[FLOWERS[0], f"{name.partition('-')[0]}-flower"]
        exact = "flower" in name
        for one, other in zip(found, here, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=0 if exact else 1e-9, err_msg=f"{version} {name}")
    megabytes = int(subprocess.run(["du", "-sm", place], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"{megabytes} MB after the runs")
    assert megabytes <= LARGEST
    shutil.rmtree(place)
