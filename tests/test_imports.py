"""What the program imports before it answers: modules are counted, since seconds depend on the machine."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

Small = Callable[..., list[str]]
SLOW = {"torch", "ray", "flwr", "matplotlib", "sklearn", "torchvision", "scipy", "sympy", "onnx", "pandas", "numpy"}
# told: what is there when the program ends; computing: when the engine is called
PROGRAM = """
import json, sys
from fl_attack import __main__
seen = {}
def packages():
    return sorted({name.partition(".")[0] for name in sys.modules})
def note():
    from fl_attack import engine
    original = engine.run_cells
    def run_cells(*given, **keys):
        seen.setdefault("computing", packages())
        return original(*given, **keys)
    engine.run_cells = run_cells
if sys.argv.pop(1) == "computing":
    note()
try:
    __main__.main()
except SystemExit as end:
    seen["code"] = end.code
seen |= {"end": packages(), "modules": len(sys.modules)}
print("\\n" + json.dumps(seen))
"""


def imported(*arguments: str, when: str = "message") -> dict[str, object]:
    """The packages that a run of the program has imported, at its end and as it begins to compute."""
    program, plain = [sys.executable, "-c", PROGRAM, when, *arguments], os.environ | {"HYDRA_FULL_ERROR": "0"}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=plain)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_docs_show_the_contract_of_what_may_import_what() -> None:
    root = Path(__file__).parents[1]
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["type"] == "layers"]
    page = (root / "docs/architecture.md").read_text(encoding="utf-8").partition("## What may import what")[2]
    shown = [row.partition("never")[0].split() for row in page.split("```")[1].strip().splitlines()]
    assert shown == [row.replace("(", "").replace(")", "").split(" | ") for row in layers]
    rooms = page.partition("## What may")[0] + (root / "docs/architecture.md").read_text(encoding="utf-8")
    names = {name for row in shown for name in row}
    assert not {name for name in names if f"`{name}`" not in rooms and f"`{name}/`" not in rooms}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["atack=greedy"], 2),
        (["rounds=0"], 2),
        (["attack.budget=2", "attack.goal=targeted"], 2),
        (["-m", "attack.budget=0.1,2"], 2),
    ],
)
def test_help_and_wrong_values_are_answered_without_slow_libraries(arguments: list[str], code: int) -> None:
    found = imported(*arguments)
    assert (found.get("code") or 0) == code
    assert not SLOW & set(found["end"])  # type: ignore[call-overload]
    assert found["modules"] < 800  # type: ignore[operator]  # torch alone brings a thousand


@pytest.mark.parametrize("sweep", [False, True])
def test_a_batched_run_imports_neither_flower_nor_ray_and_draws_after_computing(
    small_data: Small, tmp_path: Path, sweep: bool
) -> None:
    more = ["-m", "seed=0,1"] if sweep else []
    given = [*more, *small_data(2), "engine=batched", "rounds=2", "batch_size=full", f"out={tmp_path}/o"]
    found = imported(*given, when="computing")
    assert not found.get("code")
    assert SLOW & set(found["computing"]) == {"torch", "numpy"}  # type: ignore[call-overload]
    assert not {"ray", "flwr", "sklearn", "torchvision", "pandas", "tensorboard", "mlflow", "wandb"} & set(found["end"])  # type: ignore[call-overload]
