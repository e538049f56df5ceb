"""The quick part of `scripts/drill`: each fault is seen as it is expected."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("drill", Path(__file__).parents[1] / "scripts" / "drill.py")
assert spec is not None and spec.loader is not None
drill = importlib.util.module_from_spec(spec)
sys.modules["drill"] = drill
spec.loader.exec_module(drill)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in drill.FAULTS.items() if fault.quick])
def test_a_fault_is_seen_as_it_is_expected(tmp_path: Path, name: str) -> None:
    fault = drill.FAULTS[name]
    try:
        seen = fault.see(tmp_path)
    except drill.NotPossibleError as why:
        pytest.skip(str(why))
    assert seen == fault.expected
