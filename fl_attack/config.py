"""The typed border of Hydra: from a command line to settings that are checked once, and back.

The defaults stand in `conf/`, one commented YAML file a group; what is allowed stands in `settings`.
"""

import re
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fl_attack import __version__
from fl_attack.errors import InputError
from fl_attack.overrides import completed, composing, conf_folder, did_you_mean, explain, unknown_key, written
from fl_attack.settings import AttackSettings as AttackSettings
from fl_attack.settings import Restore as Restore
from fl_attack.settings import Settings as Settings
from fl_attack.settings import StrategySettings as StrategySettings


def without_effect(settings: Settings, sweep: bool) -> list[str]:
    """Which settings differ from their defaults without any effect on the run or the sweep.

    Parameters
    ----------
    settings : Settings
        The settings of an experiment, or of the first cell of a sweep.
    sweep : bool
        Whether the settings are those of a sweep.

    Returns
    -------
    list of str
        A line for each such setting, which says why.
    """
    checks = [*_checks_of_attack(settings), *_checks_of_training(settings)]
    checks += [] if sweep else _checks_of_sweep(settings)
    checks += _checks_of_place(settings)
    return [f"{what} has no effect: {why}" for applies, what, why in checks if applies]


_Checks = list[tuple[bool, str, str]]  # whether a setting has no effect, the setting as it is written, and why


def _checks_of_attack(settings: Settings) -> _Checks:
    """Checks of settings of the attack that can be without effect, each with whether it is."""
    threat = settings.attack
    flips = not settings.attacked or threat.writes == "labels"
    few, no_labels = f"there are {settings.rounds} rounds", f"attack={threat.name} flips no labels"
    return [
        (settings.attacked and threat.start > settings.rounds, f"attack.start={threat.start}", few),
        (settings.attacked and (threat.stop or 0) > settings.rounds, f"attack.stop={threat.stop}", few),
        (not flips and threat.scope != "pooled", f"attack.scope={threat.scope}", no_labels),
        (not flips and threat.rounding != "floor", f"attack.rounding={threat.rounding}", no_labels),
        (not flips and threat.refresh != "step", f"attack.refresh={threat.refresh}", no_labels),
        (not flips and threat.memory != "forget", f"attack.memory={threat.memory}", no_labels),
        (threat.unflip and threat.memory == "forget", "attack.unflip=true", "attack.memory=forget keeps no flips"),
        (
            threat.memory == "persist_total" and threat.rounding == "carry",
            "attack.rounding=carry",
            "the one budget of attack.memory=persist_total has no next round",
        ),
        (
            threat.knowledge_fraction != 0.5 and threat.knowledge != "noisy",
            f"attack.knowledge_fraction={threat.knowledge_fraction}",
            "it is of attack.knowledge=noisy",
        ),
    ]


def _checks_of_training(settings: Settings) -> _Checks:
    """Checks of settings of the server and the clients that can be without effect, each with whether it is."""
    from fl_attack.aggregate import RULES, needs

    early, strategy, sanitize = settings.early_stop, settings.strategy, settings.sanitize
    no_knn, of_knn = sanitize.name != "knn", "it is of sanitize=knn"
    no_patience = "patience is not set"
    few = f"there are {settings.rounds} rounds; the last is evaluated"
    return [
        (early.restore != "best" and early.patience is None, f"early_stop.restore={early.restore}", no_patience),
        (
            strategy.root is not None and strategy.name in RULES and "root" not in needs(strategy.name),
            f"strategy.root={strategy.root}",
            f"strategy={strategy.name} asks for no trusted samples",
        ),
        (sanitize.k != 10 and no_knn, f"sanitize.k={sanitize.k}", of_knn),
        (sanitize.share != 0.5 and no_knn, f"sanitize.share={sanitize.share}", of_knn),
        (early.share != 0.1 and early.patience is None, f"early_stop.share={early.share}", no_patience),
        (settings.eval_every > settings.rounds, f"eval_every={settings.eval_every}", few),
    ]


def _checks_of_sweep(settings: Settings) -> _Checks:
    """Checks that settings which have an effect in sweeps alone are left as they are, each with whether it fails."""
    of_sweep = "it is of a sweep (-m)"
    return [
        (bool(settings.figures), "figures", f"{of_sweep}; a run draws its curves"),
        (settings.launcher != "auto", f"launcher={settings.launcher}", of_sweep),
        (settings.workers is not None, f"workers={settings.workers}", of_sweep),
        (settings.detectability, "detectability=true", f"{of_sweep}; a run always measures it"),
    ]


def _checks_of_place(settings: Settings) -> _Checks:
    """Checks that `dataset.path` and `.root` are set only for a loader that reads them, each with whether it fails."""
    place = settings.dataset
    located = {"npz": "path", "image_folder": "path", "hf": "path", "digits": ""}.get(place.loader, "root")
    return [
        (place.path is not None and located != "path", f"dataset.path={place.path}", f"dataset.loader={place.loader}"),
        (place.root != "data" and located != "root", f"dataset.root={place.root}", f"dataset.loader={place.loader}"),
    ]


def compose(*overrides: str) -> Settings:
    """The settings that a command line of overrides gives.

    Parameters
    ----------
    *overrides : str
        As they are typed after `fl-attack`.

    Returns
    -------
    Settings

    Raises
    ------
    InputError
        Where Hydra does not understand them, or a value is not allowed.
    """
    from hydra import compose as hydra_compose  # clients of a deployed federation do without
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    try:
        with composing(), initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = hydra_compose("config", overrides=completed(overrides))
        plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from None
    return settings_from(plain)


def overrides_of(settings: Settings) -> list[str]:
    """A short list of overrides that these settings come from, without those that say where results go.

    Parameters
    ----------
    settings : Settings
        The settings of an experiment.

    Returns
    -------
    list of str
        `compose(*overrides_of(settings))` gives the same settings but for those of `OUTPUT_KEYS`.
    """
    groups = [f"{name}={_choice(name, getattr(settings, name).model_dump(mode='json'))}" for name in GROUPS]
    defaults = leaves_of(_composed_plainly(tuple(groups)))
    default = {override for override in groups if override in _default_groups()}
    clients = {"clients.total"}  # follows from the others
    changed = [
        written(key, value)
        for key, value in leaves_of(settings).items()
        if key not in (clients | OUTPUT_KEYS) and value != defaults.get(key)
    ]
    return [*(override for override in groups if override not in default), *changed]


GROUPS = ("dataset", "partition", "model", "attack", "strategy", "engine")
OUTPUT_KEYS = {"out", "overwrite", "resume", "verbose", "report", "tracker"}  # where results go, and how


@cache
def _composed_plainly(overrides: tuple[str, ...]) -> Settings:
    """The settings that choices such as `attack=greedy` give; what must be given with one is made up."""
    needed = ["strategy.path=given"] if "strategy=flower" in overrides else []
    return compose(*overrides, *needed)


@cache
def _default_groups() -> frozenset[str]:
    """The choices that are made where none is given, as overrides such as `attack=none`."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return frozenset(f"{group}={choice}" for group, choice in re.findall(r"^  - (\w+): (\w+)$", text, re.M))


def _choice(group: str, values: dict[str, Any]) -> str:
    """The choice of a group, as in `greedy`, from which the fewest of these values differ.

    One that sets the same name (or loader) goes before all others.
    """

    def distance(name: str) -> tuple[bool, int, str]:
        chosen = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{name}.yaml"))
        assert isinstance(chosen, dict)
        name_key = "loader" if group == "dataset" else "name"
        differing = sum(values.get(str(key)) != value for key, value in chosen.items())
        return chosen.get(name_key, name) != values.get(name_key), differing, name

    return min((file.stem for file in (conf_folder() / group).glob("*.yaml")), key=distance)


def leaves_of(settings: Settings) -> dict[str, Any]:
    """Every setting, as JSON has it, by its key with dots; each `args` is one value, a dict."""
    return _leaves(settings.model_dump(mode="json"))


def _leaves(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The values of a tree by their keys with dots, each after `before`; each `args` is one value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "args":
            found |= _leaves(value, f"{before}{key}.")
        else:
            found[before + key] = value
    return found


def settings_from(given: Any) -> Settings:
    """Checked settings from nested plain values.

    Parameters
    ----------
    given : dict
        As YAML or JSON holds them.

    Returns
    -------
    Settings

    Raises
    ------
    InputError
        With the first mistake, and what is allowed in its place: a key, a type, a range, or a name of no table.
    """
    settings = typed(given)
    check_names(settings)
    return settings


def typed(given: Any) -> Settings:
    """Settings that are checked but for what `check_names` checks, whose imports take seconds.

    Parameters
    ----------
    given : dict
        As `settings_from` takes it.

    Returns
    -------
    Settings

    Raises
    ------
    InputError
        With the first mistake, and what is allowed in its place.
    """
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise InputError(_first_mistake(error)) from None


def check_names(settings: Settings) -> None:
    """InputError where a name is of no model, attack or rule, its arguments don't fit, or nodes lack the data.

    The last is only of `partition=own`, where each node has data of its own.
    """
    for group in ("model", "attack", "strategy"):
        try:
            getattr(settings, group).check_names()
        except ValueError as error:
            key = f"{group}.name=" if str(error).startswith(getattr(settings, group).name) else f"{group}."
            raise InputError(f"{key}{error}") from None
    if settings.partition.name == "own":
        _check_own_data(settings)


def _check_own_data(settings: Settings) -> None:
    """InputError where settings with `partition=own` need data that each node keeps to itself."""
    from fl_attack import attack

    threat, patience = settings.attack, settings.early_stop.patience
    refused = [
        (settings.engine.name == "batched", "engine=batched", "engine=flower"),
        (settings.dataset.standardize, "dataset.standardize=true", "dataset.standardize=false"),
        (patience is not None, f"early_stop.patience={patience}", "early_stop.patience=null"),
        (settings.strategy.trusted > 0, f"strategy={settings.strategy.name} with a root", "another strategy"),
    ]
    if settings.attacked:
        aimed = "goal" in attack.find(threat.name).uses
        ignores_knowledge = aimed and "knowledge" not in attack.find_direction(threat.aim).uses
        aim = f"attack.goal={threat.goal}" if threat.direction is None else f"attack.direction={threat.direction}"
        refused += [
            (threat.plans or threat.writes != "labels", f"attack={threat.name}", "an attack on labels, such as greedy"),
            (threat.adapt != "none", f"attack.adapt={threat.adapt}", "attack.adapt=none"),
            (ignores_knowledge, aim, "attack.goal=untargeted attack.knowledge=own"),
            (aimed and threat.knowledge != "own", f"attack.knowledge={threat.knowledge}", "attack.knowledge=own"),
            (
                threat.scope == "pooled" and settings.clients.malicious > 1,
                "attack.scope=pooled",
                "attack.scope=per_client, or clients.malicious=1",
            ),
        ]
    for wrong, setting, instead in refused:
        if wrong:
            raise InputError(
                f"{setting} can't be had with partition=own, in which no node sees another's data; use {instead}"
            )


def _first_mistake(error: ValidationError) -> str:
    """The message on the first mistake, with every alternative that would be allowed in its place."""
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["input"] is None)
    key = _key(mistakes[0]["loc"])
    kind, given = mistakes[0]["type"], mistakes[0]["input"]
    messages = dict.fromkeys(mistake["msg"] for mistake in mistakes if _key(mistake["loc"]) == key)
    if kind == "value_error":  # a check of ours on a group, which names its keys itself
        return ".".join(part for part in (key, next(iter(messages)).removeprefix("Value error, ")) if part)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        return unknown_key(key)
    allowed = " or ".join(_in_plain_words(message) for message in messages)
    for long, short in {"greater than or equal to": "at least", "less than or equal to": "at most"}.items():
        allowed = allowed.replace(long, short)
    near = did_you_mean(str(given), re.findall(r"'(\w+)'", allowed))
    shown = f"{key}=" if given == "" else written(key, given)
    return f"{shown} is not allowed: it must be {allowed}{near}"


IN_PLAIN_WORDS = {  # what pydantic says
    "a valid tuple": "a list, as in [0,1]",
    "a valid dictionary": "keys with values",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "String should have at least 1 character": "a text that is not empty",
}


def _in_plain_words(message: str) -> str:
    """What pydantic says of a value, without the names of its types and patterns."""
    if "should match pattern" in message:
        return "cpu, cuda, or cuda: and a number"
    plain = message.removeprefix("Input should be ").partition(", unable to ")[0].partition(" or instance of ")[0]
    return IN_PLAIN_WORDS.get(plain, plain)


def _key(loc: tuple[int | str, ...]) -> str:
    # pydantic names the alternatives of a union as if they were keys: int, constrained-int, literal['full']
    """The key of a setting from where pydantic found a mistake."""
    return ".".join(str(part) for part in loc if not re.search(r"^(int|str|float)$|[\[-]", str(part)))


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on, by name."""
    from importlib.metadata import version

    return {"fl_attack": __version__} | {name: version(name) for name in ("flwr", "ray", "torch", "numpy")}


def to_yaml(settings: Settings) -> str:
    """Settings as the YAML that a run leaves behind."""
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))


def from_yaml(text: str) -> Settings:
    """The settings that `to_yaml` has written.

    Parameters
    ----------
    text : str
        YAML, such as a run's `config.yaml`.

    Returns
    -------
    Settings

    Raises
    ------
    InputError
        Where the text is not of settings, or one of them is not allowed.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # whatever YAML's parser and OmegaConf raise
        raise InputError(f"these are no settings: {explain(error)}") from None
    return settings_from(plain)
