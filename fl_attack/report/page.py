"""The page: its parts as data, put into one HTML file with its style and its script."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

PagePart = Mapping[str, Any]  # what the script shows of one folder
DIGITS = 6  # of numbers in the page


def render(parts: Sequence[PagePart]) -> str:
    """The text of an HTML page of these parts, which `runs.of_run` and `sweeps.of_sweep` give."""
    here = files("fl_attack.report")
    # "</" would end the script in which the data stands
    data = json.dumps(_plain({"parts": parts}), allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    page = (here / "page.html").read_text(encoding="utf-8")
    for name, content in {
        "STYLE": (here / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (here / "page.js").read_text(encoding="utf-8"),
        "DATA": data,
    }.items():
        page = page.replace(f"/*{name}*/", content, 1)
    return page


def _plain(tree: Any) -> Any:
    """A tree as JSON has it: arrays as lists, floats to six digits, None for what is not finite."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray):
        return _plain(tree.tolist())
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    if isinstance(tree, float):
        return float(f"{tree:.{DIGITS}g}") if math.isfinite(tree) else None
    return tree
