"""The command line and its errors; imports nothing slow, so that help and slips of the pen are told at once."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fl_attack.errors import InputError, RunError


def conf_folder() -> Path:
    """The folder of the YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def opened(overrides: Iterable[str]) -> list[str]:
    """Overrides that may also set what no YAML names: the arguments of a model, a strategy or an attack."""
    return [re.sub(r"^\+*(?=(model|strategy|attack)\.args[.=])", "++", override) for override in overrides]


def many(arguments: list[str]) -> list[str]:
    """Arguments of the program; one that names an experiment is a multirun, with or without -m."""
    named = any(argument.lstrip("+").startswith("experiment=") for argument in arguments)
    told = {"-m", "--multirun", "--help", "-h", "--cfg", "-c"} & {argument.split("=")[0] for argument in arguments}
    return ["-m", *arguments] if named and not told else arguments


def explain(error: Exception) -> str:
    """An error of ours, of Hydra or of OmegaConf in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | RunError):
        return text
    key = re.search(r"Could not (?:override|append to config.*?) '([^']*)'", text)
    if key:
        return f"{key[1]} is not a known key here; fl-attack --help lists them"
    choice = re.search(
        r"Could not find '([^'/]*)/([^']*)' Available options in '[^']*': (.*?)(?: Config search|$)", text
    )
    if choice:
        return f"{choice[1]}={choice[2]} is not known; known: {', '.join(choice[3].split())}"
    if "hydra.cc" in text and "override_grammar" in text:
        typed = next((part for part in sys.argv[1:] if _unreadable(part)), "an override")
        return f"{typed} can't be read; quote values with special characters: key='\"value\"'"
    return text


def _unreadable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return True
    return False
