"""The typed border of Hydra: settings that are checked once and trusted from there on.

The defaults stand in `conf/`, one commented YAML file a group; here stands what is allowed. Whatever can be told
without the tables of attacks, rules and models is: these bring torch, which takes seconds to import.
"""

import math
import re
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fl_attack import __version__
from fl_attack.choices import (
    Adapt,
    Foresight,
    Goal,
    Knowledge,
    LrSchedule,
    Memory,
    Objective,
    Optimizer,
    Refresh,
    Rounding,
    Scope,
    Selection,
)
from fl_attack.errors import InputError
from fl_attack.overrides import completed, composing, conf_folder, did_you_mean, explain, unknown_key, written

if TYPE_CHECKING:
    import torch

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
ROOT = 100  # samples that the server trusts, by default
Restore = Literal["best", "last"]


class Strict(BaseModel):
    """Settings that can't change and know all their keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClientSettings(Strict):
    """How many clients there are, and how many of them attack."""

    honest: Annotated[int, Field(ge=0)]
    malicious: Annotated[int, Field(ge=0)]
    total: Count
    per_round: Count | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if isinstance(self.per_round, int) and self.per_round > self.total:
            raise ValueError(f"per_round={self.per_round} is more than the {self.total} clients")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_total(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # refused below
        honest, malicious, total = (given.get(key) for key in ("honest", "malicious", "total"))
        if not all(isinstance(number, int | None) for number in (honest, malicious, total)) or malicious is None:
            return given  # the types are refused below
        if total is not None and malicious > total:
            raise ValueError(f"malicious={malicious} is more than total={total} clients")
        if honest is None:
            honest = 7 if total is None else total - malicious
        if total not in (None, honest + malicious):
            raise ValueError(f"honest={honest} and malicious={malicious} don't add up to total={total}; leave one out")
        if honest + malicious < 1:
            raise ValueError("honest=0 and malicious=0 leave no client; use at least one")
        return given | {"honest": honest, "total": honest + malicious}


class DatasetSettings(Strict):
    """Where the images come from; see `data.load`."""

    loader: str
    root: str = "data"
    path: str | None = None
    classes: tuple[int | str, ...] | None = None
    scale: Positive | None = None
    standardize: bool = False
    channels: Literal[1, 3] | None = None
    split: str | None = None


class PartitionSettings(Strict):
    """How the samples are dealt to the clients; see `data.partition`."""

    name: Literal["iid", "dirichlet", "shards", "given", "hf", "own"]
    balanced: bool = False
    min_samples: Count = 1
    path: str | None = None
    alpha: Positive | None = None
    s: Count | None = None
    partitioner: str = "IidPartitioner"
    args: dict[str, Any] = {}
    malicious_share: Annotated[float, Field(gt=0, lt=1)] | None = None


class ModelSettings(Strict):
    """What is trained; see `models.make`."""

    name: str = "logistic"
    args: dict[str, Any] = {}
    loss: Literal["cross_entropy", "label_smoothing", "focal", "brier"] = "cross_entropy"

    def check_names(self) -> None:
        """ValueError where the table has no such model, or it does not take these arguments."""
        from fl_attack import models

        if models.find(self.name).kind is None and self.loss != "cross_entropy":
            raise ValueError(f"loss={self.loss} has no meaning with name={self.name}; use cross_entropy, or model=mlp")
        models.check_args(self.name, self.args)


class AttackSettings(Strict):
    """What the malicious clients do; see `attack`."""

    name: str
    goal: Goal = "untargeted"
    direction: str | None = None
    budget: Share = 0.0
    selection: Selection = "gain"
    scope: Scope = "pooled"
    rounding: Rounding = "floor"
    knowledge: Knowledge = "full"
    knowledge_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    refresh: Refresh = "step"
    adapt: Adapt = "none"
    memory: Memory = "forget"
    unflip: bool = False
    args: dict[str, Any] = {}
    every: Count = 1
    start: Count = 1
    stop: Count | None = None
    target_path: str | None = None
    objective: Objective = "final"
    foresight: Foresight = "known"
    horizon: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _goal_of_direction(cls, given: Any) -> Any:
        """The two directions that are goals, by the name of the goal."""
        if not isinstance(given, dict):
            return given  # refused below
        goals = {"gradient": "untargeted", "target": "targeted"}
        goal = goals.get(given.get("direction") or "")
        if goal is None:
            return given
        if given.get("goal") == "targeted" != goal:
            raise ValueError(f"goal=targeted contradicts direction={given['direction']}; leave one out")
        return given | {"goal": goal, "direction": None}

    @property
    def aim(self) -> str:
        """The direction that the gradient is pushed against, of `attack.DIRECTIONS` or an import path."""
        return self.direction or {"untargeted": "gradient", "targeted": "target"}[self.goal]

    @property
    def plans(self) -> bool:
        """Whether flips are planned ahead."""
        return self.name == "planned"

    @property
    def steers(self) -> bool:
        """Whether the attackers need theta_target."""
        from fl_attack import attack

        return self.plans or ("goal" in attack.find(self.name).uses and self.aim in ("target", "target_far"))

    @property
    def remembers(self) -> bool:
        """Whether flips stay in the attackers' data after their round."""
        return self.memory != "forget" and self.writes == "labels"

    @cached_property
    def writes(self) -> str:
        """What the attack changes: labels or updates."""
        from fl_attack import attack

        return "labels" if self.name == "none" else attack.find(self.name).writes

    @property
    def exact_budget(self) -> Fraction:
        """The budget as it was typed: 0.29 of 100 labels are 29, although 0.29 * 100 < 29 in floating point."""
        return Fraction(repr(self.budget))

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.name == "none":
            return self
        for key, plain in (("refresh", "step"), ("memory", "forget")):
            if self.adapt == "rule" and getattr(self, key) != plain:
                raise ValueError(
                    f"adapt=rule has no meaning with {key}={getattr(self, key)}: it chooses anew in every round; use "
                    f"{key}={plain}"
                )
        if self.memory != "forget" and self.refresh != "step":
            raise ValueError(
                f"refresh={self.refresh} has no meaning with memory={self.memory}, whose flips stay for good; use "
                "refresh=step"
            )
        if self.stop is not None and self.stop < self.start:
            raise ValueError(f"stop={self.stop} is before start={self.start}; use start or later, or null for no end")
        if self.direction is not None and self.goal == "targeted":
            raise ValueError(f"goal=targeted has no meaning with direction={self.direction}; leave it out")
        if self.plans and self.adapt != "none":
            raise ValueError(f"adapt={self.adapt} has no meaning with name=planned; leave it out")
        if self.plans and self.memory != "forget":
            raise ValueError(f"memory={self.memory} can't be planned by name=planned; use memory=forget")
        if self.plans and self.refresh != "step":
            raise ValueError(f"refresh={self.refresh} has no meaning with name=planned; leave it out, or use horizon")
        return self

    def check_names(self) -> None:
        """ValueError where the table has no such attack, or it does not take these arguments and settings."""
        from fl_attack import attack

        if self.name == "none":
            return
        chosen = attack.find(self.name)
        attack.check_args(self.name, self.args)
        usual = {"goal": "untargeted", "direction": None, "knowledge": "full", "target_path": None, "selection": "gain"}
        usual |= {"objective": "final", "foresight": "known", "horizon": None}
        for key, value in usual.items():
            if key not in chosen.uses and getattr(self, key) != value:
                raise ValueError(f"{key}={getattr(self, key)} has no meaning with name={self.name}; leave it out")
        if self.adapt == "rule" and chosen.writes == "updates" and chosen.tries is None:
            known = ", ".join(name for name, row in attack.ATTACKS.items() if row.writes == "labels" or row.tries)
            raise ValueError(f"adapt=rule has no meaning with name={self.name}, which has nothing to try; use {known}")
        uses = attack.find_direction(self.aim).uses
        direction = f"goal={self.goal}" if self.direction is None else f"direction={self.direction}"
        if self.knowledge != "full" and "knowledge" not in uses:
            why = " whose direction is target - theta and needs no gradient" if self.goal == "targeted" else ""
            raise ValueError(f"knowledge={self.knowledge} has no meaning with {direction},{why}; use knowledge=full")
        if self.target_path is not None and "target_path" not in uses:
            raise ValueError(f"target_path has no meaning with {direction}; use goal=targeted or leave it out")


class StrategySettings(Strict):
    """How the server combines the clients' answers: a rule of ours, or any strategy of Flower's."""

    name: str
    path: str | None = None
    f: Annotated[int, Field(ge=0)] | None = None
    root: Count | None = None
    pre: tuple[str | dict[str, dict[str, Any]], ...] = ()
    rule: str | None = None
    args: dict[str, Any] = {}

    @property
    def trusted(self) -> int:
        """How many samples the server has itself; as many as in FLTrust's paper where a rule needs some."""
        from fl_attack.aggregate import needs

        return self.root or (ROOT if "root" in needs(self.name) else 0)

    @property
    def averages(self) -> bool:
        """Whether the server's rule is the plain mean."""
        return self.name == "mean" and not self.pre

    def check_names(self) -> None:
        """ValueError where the table has no such rule."""
        from fl_attack.aggregate import RULES, is_known

        if self.name != "flower" and not is_known(self.name):
            names = ", ".join((*RULES, "byzfl", "flower"))
            near = did_you_mean(self.name, (*RULES, "byzfl", "flower"))
            raise ValueError(
                f"name={self.name} is not a strategy; known: {names}, or the import path of a function{near}"
            )

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if self.name == "flower" and not self.path:
            raise ValueError(
                "path is missing; give the import path of a Flower strategy, as in "
                "strategy.path=flwr.serverapp.strategy.FedMedian"
            )
        return self


class SanitizeSettings(Strict):
    """Which labels are left out before a client trains; see `sanitize`."""

    name: Literal["none", "knn", "confident"] = "none"
    k: Count = 10
    share: Annotated[float, Field(ge=0.5, le=1)] = 0.5


class EngineSettings(Strict):
    """The program that runs the rounds, and what it may use of the machine."""

    name: Literal["flower", "batched"]
    grid: Literal["block", "stock"] = "block"
    actors: Count | None = None
    client_device: Literal["cpu", "cuda"] = "cpu"
    ray_address: str | None = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    memory_gb: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 2.0  # a million: a petabyte


class EarlyStopSettings(Strict):
    """When the server ends a run before its last round; see `history.EarlyStop`."""

    patience: Count | None = None
    restore: Restore = "best"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @property
    def held_out(self) -> float:
        """Share of the training samples that the server keeps from the clients."""
        return 0.0 if self.patience is None else self.share


class Settings(Strict):
    """The checked settings of one experiment; see `docs/settings.md` for each of them."""

    dataset: DatasetSettings
    partition: PartitionSettings
    model: ModelSettings
    attack: AttackSettings
    strategy: StrategySettings
    sanitize: SanitizeSettings = SanitizeSettings()
    engine: EngineSettings
    clients: ClientSettings
    rounds: Count
    eval_every: Count
    baseline: bool
    batch_size: Count | Literal["full"]
    local_steps: Count
    lr: Positive
    lr_schedule: LrSchedule = "constant"
    lr_every: Count | None = None
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    worker_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_optimizer: Optimizer
    early_stop: EarlyStopSettings
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    dtype: Literal["float32", "float64"]
    launcher: Literal["auto", "local", "ray"] = "auto"
    workers: Count | None = None
    detectability: bool = False
    figures: tuple[tuple[str, ...], ...] = ()
    objective: Literal["final_accuracy", "minimum_accuracy", "final_f1", "final_loss", "flips"] = "final_accuracy"
    out: Annotated[str, Field(min_length=1)]
    overwrite: bool
    resume: bool = True
    report: bool = True
    tracker: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    verbose: bool

    @field_validator("tracker", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        """One name as a list of it."""
        return [given] if isinstance(given, str) else given

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The precision of the clients' arithmetic; the server keeps theta in float64."""
        import torch

        return torch.float32 if self.dtype == "float32" else torch.float64

    @property
    def per_round(self) -> int | None:
        """Clients that take part in a round; None where all do."""
        wanted, total = self.clients.per_round, self.clients.total
        if isinstance(wanted, float):
            wanted = max(1, round(wanted * total))
        return None if wanted in (None, total) else wanted

    @property
    def assumed_malicious(self) -> int:
        """The malicious clients f that the server's rule reckons with in a round."""
        if self.strategy.f is not None:
            return self.strategy.f
        share = 1.0 if self.per_round is None else self.per_round / self.clients.total
        return math.ceil(self.clients.malicious * share)

    @property
    def label_budget(self) -> float:
        """Share b of the malicious clients' labels that may be flipped; 0 where nobody flips labels."""
        return self.attack.budget if self.attacked and self.attack.writes == "labels" else 0.0

    @property
    def attacked(self) -> bool:
        """Whether there are malicious clients, and an attack for them."""
        return self.attack.name != "none" and self.clients.malicious > 0

    @property
    def is_unattacked(self) -> bool:
        """Whether it is an unattacked twin: no label is flipped, no update is changed."""
        return not self.attacked or (self.attack.writes == "labels" and self.attack.budget == 0)

    def unattacked(self) -> "Settings":
        """The unattacked twin: the same experiment with every client honest."""
        return self.model_copy(update={"attack": AttackSettings(name="none"), "baseline": False})

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.strategy.name == "flower" and self.server_optimizer != "sgd":
            raise ValueError(
                f"server_optimizer={self.server_optimizer} is not applied by strategy=flower, which has its own; use "
                "server_optimizer=sgd, or a strategy such as flwr.serverapp.strategy.FedAdam"
            )
        if self.attacked and self.attack.adapt == "rule" and self.strategy.name == "flower":
            raise ValueError(
                "attack.adapt=rule needs a rule that is known, and strategy=flower is not; use a rule of ours"
            )
        if self.lr_every is not None and self.lr_schedule not in ("step", "inverse"):
            raise ValueError(
                f"lr_every={self.lr_every} has no meaning with lr_schedule={self.lr_schedule}; use step or inverse"
            )
        if self.attacked and self.attack.knowledge in ("honest", "noisy") and self.clients.honest == 0:
            raise ValueError(
                f"attack.knowledge={self.attack.knowledge} needs honest clients, but clients.honest=0; use full or own"
            )
        if self.attacked and self.attack.plans:
            self._check_plannable()
        share, malicious, honest = self.partition.malicious_share, self.clients.malicious, self.clients.honest
        if share is not None and 0 in (malicious, honest):
            raise ValueError(
                f"partition.malicious_share={share} needs a malicious and an honest client, but "
                f"clients.malicious={malicious} and clients.honest={honest}"
            )
        return self

    def _check_plannable(self) -> None:
        """ValueError where the training is none that `attack=planned` can plan."""
        if self.local_steps > 1:
            raise ValueError(f"local_steps={self.local_steps} can't be planned by attack=planned; use local_steps=1")
        if self.worker_momentum:
            raise ValueError(
                f"worker_momentum={self.worker_momentum} can't be planned by attack=planned; use worker_momentum=0"
            )
        if self.attack.horizon is not None and self.server_optimizer != "sgd":
            raise ValueError(
                f"attack.horizon={self.attack.horizon} needs the state of server_optimizer={self.server_optimizer}, "
                "which the server does not broadcast; use sgd, or plan all rounds with attack.horizon=null"
            )


def without_effect(settings: Settings, sweep: bool) -> list[str]:
    """What is set but changes nothing.

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
    from fl_attack.aggregate import RULES, needs

    threat, early, place = settings.attack, settings.early_stop, settings.dataset
    flips = not settings.attacked or threat.writes == "labels"
    located = {"npz": "path", "image_folder": "path", "hf": "path", "digits": ""}.get(place.loader, "root")
    few, no_labels = f"there are {settings.rounds} rounds", f"attack={threat.name} flips no labels"
    of_sweep, of_knn = "it is of a sweep (-m)", "it is of sanitize=knn"
    checks: list[tuple[bool, str, str]] = [
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
        (
            early.restore != "best" and early.patience is None,
            f"early_stop.restore={early.restore}",
            "patience is not set",
        ),
        (
            settings.strategy.root is not None
            and "root" not in needs(settings.strategy.name)
            and settings.strategy.name in RULES,
            f"strategy.root={settings.strategy.root}",
            f"strategy={settings.strategy.name} asks for no trusted samples",
        ),
        (settings.sanitize.k != 10 and settings.sanitize.name != "knn", f"sanitize.k={settings.sanitize.k}", of_knn),
        (
            settings.sanitize.share != 0.5 and settings.sanitize.name != "knn",
            f"sanitize.share={settings.sanitize.share}",
            of_knn,
        ),
        (early.share != 0.1 and early.patience is None, f"early_stop.share={early.share}", "patience is not set"),
        (settings.eval_every > settings.rounds, f"eval_every={settings.eval_every}", f"{few}; the last is evaluated"),
        (bool(settings.figures) and not sweep, "figures", f"{of_sweep}; a run draws its curves"),
        (settings.launcher != "auto" and not sweep, f"launcher={settings.launcher}", of_sweep),
        (settings.workers is not None and not sweep, f"workers={settings.workers}", of_sweep),
        (settings.detectability and not sweep, "detectability=true", f"{of_sweep}; a run always measures it"),
        (place.path is not None and located != "path", f"dataset.path={place.path}", f"dataset.loader={place.loader}"),
        (place.root != "data" and located != "root", f"dataset.root={place.root}", f"dataset.loader={place.loader}"),
    ]
    return [f"{what} has no effect: {why}" for applies, what, why in checks if applies]


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
    """The shortest list of overrides that these settings come from, without those that say where results go.

    Parameters
    ----------
    settings : Settings
        The settings of an experiment.

    Returns
    -------
    list of str
        `compose(*overrides_of(settings))` gives the same settings.
    """
    groups = [f"{name}={_choice(name, getattr(settings, name).model_dump(mode='json'))}" for name in GROUPS]
    usual = leaves_of(_composed_plainly(tuple(groups)))
    default = {override for override in groups if override in _default_groups()}
    clients = {"clients.total"}  # follows from the others
    changed = [
        written(key, value)
        for key, value in leaves_of(settings).items()
        if key not in (clients | OUTPUT_KEYS) and value != usual.get(key)
    ]
    return [*(override for override in groups if override not in default), *changed]


GROUPS = ("dataset", "partition", "model", "attack", "strategy", "engine")
OUTPUT_KEYS = {"out", "overwrite", "resume", "verbose", "report", "tracker"}  # where results go, and how


@cache
def _composed_plainly(overrides: tuple[str, ...]) -> Settings:
    """The settings that these choices of files give, values that must be given filled in."""
    needed = ["strategy.path=given"] if "strategy=flower" in overrides else []
    return compose(*overrides, *needed)


@cache
def _default_groups() -> frozenset[str]:
    """The choices of files that are made where none is given, as overrides."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return frozenset(f"{group}={choice}" for group, choice in re.findall(r"^  - (\w+): (\w+)$", text, re.M))


def _choice(group: str, values: dict[str, Any]) -> str:
    """The file of a group that is nearest to these values; one that sets the same name, if there is one."""

    def distance(name: str) -> tuple[bool, int, str]:
        chosen = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{name}.yaml"))
        assert isinstance(chosen, dict)
        own = "loader" if group == "dataset" else "name"
        unlike = sum(values.get(str(key)) != value for key, value in chosen.items())
        return chosen.get(own, name) != values.get(own), unlike, name

    return min((file.stem for file in (conf_folder() / group).glob("*.yaml")), key=distance)


def leaves_of(settings: Settings) -> dict[str, Any]:
    """Every setting by its key, with dots; arguments of somebody's functions are one value."""
    return _leaves(settings.model_dump(mode="json"))


def _leaves(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The values of a tree by their keys, with dots; what holds arguments of somebody's is a value."""
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
    """Settings of which only the names in tables are unchecked, without seconds of imports.

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
        raise InputError(_one_line(error)) from None


def check_names(settings: Settings) -> None:
    """InputError where a table has no such model, attack or rule, or it does not take its arguments."""
    for group in ("model", "attack", "strategy"):
        try:
            getattr(settings, group).check_names()
        except ValueError as error:
            key = f"{group}.name=" if str(error).startswith(getattr(settings, group).name) else f"{group}."
            raise InputError(f"{key}{error}") from None
    if settings.partition.name == "own":
        _check_own_data(settings)


def _check_own_data(settings: Settings) -> None:
    """InputError where something needs data that nodes with data of their own keep to themselves."""
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


def _one_line(error: ValidationError) -> str:
    """The first mistake, with every alternative that would be allowed in its place."""
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
        Where it is something else.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # whatever YAML's parser and OmegaConf raise
        raise InputError(f"these are no settings: {explain(error)}") from None
    return settings_from(plain)
