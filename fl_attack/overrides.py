"""The command line and its errors; imports nothing slow, so that help and slips of the pen are reported at once."""

import difflib
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fl_attack.errors import InputError, RunError, one_line

NOT_HERE = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.chdir")


# of Hydra's command line
OPTIONS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)


_composing = threading.RLock()
PARAMS = "hydra.sweeper.params"  # a grid: values by key, or by keys that are set together
ON_MNIST = ("experiment=networks",)  # grids that take MNIST where dataset.root is given


@contextmanager
def composing() -> Iterator[None]:
    """A block in which nobody else composes settings, since Hydra's state is global; it leaves that state as it was."""
    from hydra.core.global_hydra import GlobalHydra  # not where only the client app is wanted

    with _composing:
        before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = before


def conf_folder() -> Path:
    """The folder of the YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def allow_new_args(overrides: Iterable[str]) -> list[str]:
    """Overrides, those of `args` with ++ in front: they may set arguments that no YAML names, as of a model."""
    return [re.sub(r"^\+*(?=(model|strategy|attack|partition)\.args[.=])", "++", override) for override in overrides]


def completed(overrides: Iterable[str]) -> list[str]:
    """Overrides as Hydra takes them, see `allow_new_args` and `_joint`.

    `dataset=mnist` is added to grids of `ON_MNIST` where `dataset.root` is given and no data set.
    """
    found = [_joint(override) for override in allow_new_args(overrides)]
    keys = {override.partition("=")[0].lstrip("+") for override in found}
    if any(one.lstrip("+") in ON_MNIST for one in found) and "dataset.root" in keys and "dataset" not in keys:
        found.append("dataset=mnist")
    return found


def _joint(override: str) -> str:
    """An override that sets keys together, `a+b=1+2,3+4`, as a parameter of Hydra's sweeper; any other as it is."""
    keys, equals, cases = override.lstrip("+").partition("=")
    if "+" not in keys or not equals or override.startswith("-"):
        return override
    plain = cases.strip("'\"")
    return f"++{PARAMS}={{{keys}:'{plain}'}}"  # beside those of an experiment


def as_multirun(arguments: list[str]) -> list[str]:
    """Arguments of the program, with -m in front, if it lacks, where they name an experiment or set keys together.

    InputError where they ask for what one command can't do.
    """
    for argument in arguments:
        if argument.startswith("-") and argument.partition("=")[0] not in OPTIONS:
            way = argument.lstrip("-").partition("=")[0]
            raise InputError(f"{argument} is not an option; settings are given as {way or 'key'}=value, without dashes")
        key, _, value = argument.lstrip("+~").partition("=")
        if (conf_folder() / key).is_dir() and value and (value == "null" or value[0] in "[{"):
            raise InputError(f"{argument} is not allowed; choose one by its name, as in attack=none")
        if key in NOT_HERE:
            raise InputError(f"{key} has no effect here: all results go to out, as in out={value or 'results/mine'}")
        if key == "experiment" and "," in value:
            raise InputError(
                f"{argument} names several; an experiment is a grid of its own: give each a command, and an out"
            )
    if {"--cfg", "-c"} & {*arguments} and {"-m", "--multirun"} & {*arguments}:
        raise InputError("--cfg shows the settings of one run; leave out -m")
    named = any(_joint(argument).lstrip("+").startswith(("experiment=", f"{PARAMS}=")) for argument in arguments)
    explicit = {"-m", "--multirun", "--help", "-h", "--cfg", "-c"} & {argument.split("=")[0] for argument in arguments}
    return ["-m", *arguments] if named and not explicit else arguments


def written(key: str, value: Any) -> str:
    """A setting as an override: `written("lr", None)` is `lr=null`.

    Parameters
    ----------
    key : str
        The key with dots, as in `attack.budget`.
    value
        A value of Python: None, a bool, a number, a text, or lists and dicts of such.

    Returns
    -------
    str
        What Hydra reads as that value, quoted where it must be.
    """
    return f"{key}={_literal(value)}"


def _literal(value: Any, inside: bool = False) -> str:
    """A value as Hydra's grammar has it: a text quoted unless read as one word, `inside` lists and dicts or alone."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(one, True)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple | range | set | frozenset):
        return "[" + ",".join(_literal(one, True) for one in value) + "]"
    if hasattr(value, "tolist"):  # of numpy or torch
        return _literal(value.tolist(), inside)
    text = str(value)
    if isinstance(value, int | float) or re.fullmatch(r"[\w./:+-]+" if not inside else r"[\w./+-]+", text):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """A text in quotes, as Hydra reads it: backslashes stand for themselves but before a quote and at the end."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def explain(error: Exception, words: Iterable[str] | None = None) -> str:
    """An error of ours, of Hydra or of OmegaConf in one line.

    Parameters
    ----------
    error : Exception
        The exception that was raised.
    words : iterable of str, optional
        The overrides that may be to blame; by default those of the command line.

    Returns
    -------
    str
        What is wrong and, where that is known, what is allowed.
    """
    text = one_line(error)
    if isinstance(error, InputError | RunError):
        return text
    key = re.search(r"Could not (?:override|append to config.*?) '([^']*)'", text)
    if key:
        return unknown_key(key[1])
    choice = re.search(
        r"Could not find '([^'/]*)/([^']*)' Available options in '[^']*': (.*?)(?: Config search|$)", text
    )
    if choice:
        known = choice[3].split()
        return f"{choice[1]}={choice[2]} is not known; known: {', '.join(known)}{did_you_mean(choice[2], known)}"
    if several := re.match(r"Ambiguous value for argument '(.*?)' 1\.", text):
        return (
            f"{several[1]} are several values: a sweep takes them (-m, in Python sweep); if it is one, write a list as "
            f"in key=[1,2], or quote a text: key='\"value\"'"
        )
    if "hydra.cc" in text and "override_grammar" in text:
        typed_words = [word for word in (sys.argv[1:] if words is None else words) if not word.startswith("-")]
        typed = next((word for word in typed_words if _unreadable(word)), "an override")
        return f"{typed} can't be read; quote values with special characters: key='\"value\"'"
    return text


def unknown_key(key: str) -> str:
    """The message on a key that is not there: which choice has it, or which key may be meant."""
    choices = known_keys().get(key)
    if choices:
        return f"{key} is not a known key here: it needs {' or '.join(choices)}"
    return (
        f"{key} is not a known key{did_you_mean(key, [*known_keys(), *_groups()]) or '; fl-attack --help lists them'}"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words, as the end of a message.

    Parameters
    ----------
    word : str
        The word that was typed.
    known : iterable of str
        The words that would be understood.

    Returns
    -------
    str
        As in "; did you mean greedy?", or empty where none is near.
    """
    near = difflib.get_close_matches(word, list(known), 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


@cache
def known_keys() -> dict[str, list[str]]:
    """Every key of `conf/`, and the choices that have it, as in `attack=greedy`: none where it is always there."""
    found: dict[str, list[str]] = {}
    for file in sorted(conf_folder().glob("**/*.yaml")):
        group = file.parent.name if file.parent != conf_folder() else ""
        if group in ("experiment", "fl_attack", "help", "launcher", "sweeper", "hydra"):
            continue
        for key in _keys(yaml.safe_load(file.read_text()) or {}, f"{group}." if group else ""):
            if not key.startswith(("hydra.", "defaults")):
                found.setdefault(key, []).extend([f"{group}={file.stem}"] if group else [])
    return found


def _groups() -> list[str]:
    """The names of the groups of configuration files, such as attack."""
    return [folder.name for folder in conf_folder().iterdir() if folder.is_dir()]


def _keys(tree: dict[str, Any], before: str) -> Iterator[str]:
    """Every key of nested dicts, of inner ones too, with dots, each after `before`."""
    for name, value in tree.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{name}.")


def _unreadable(override: str) -> bool:
    """Whether Hydra can't read a word of the command line as an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return True
    return False
