"""The settings of one experiment, group by group: what is allowed in each, and what a group says of itself.

Whatever can be told without the tables of attacks, rules and models is checked as settings are made: these tables bring
torch, which takes seconds to import.
"""

import math
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
from fl_attack.overrides import did_you_mean

if TYPE_CHECKING:
    import torch

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
ROOT = 100  # samples that the server trusts, by default
Restore = Literal["best", "last"]


class Strict(BaseModel):
    """Settings that can't change and refuse keys that they don't know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClientSettings(Strict):
    """How many clients there are, and how many of them attack."""

    honest: Annotated[int, Field(ge=0)]
    malicious: Annotated[int, Field(ge=0)]
    total: Count
    per_round: Count | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        """The settings themselves; ValueError where more clients take part in a round than there are."""
        if isinstance(self.per_round, int) and self.per_round > self.total:
            raise ValueError(f"per_round={self.per_round} is more than the {self.total} clients")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_total(cls, given: Any) -> Any:
        """What is given, with `honest` and `total` filled in; ValueError where the numbers don't add up."""
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
        """ValueError where `name` is neither in `models.MODELS` nor a path, or arguments or loss don't fit."""
        from fl_attack import models

        if models.find(self.name).kind is None and self.loss != "cross_entropy":
            raise ValueError(f"loss={self.loss} has no meaning with name={self.name}; use cross_entropy, or model=mlp")
        models.check_args(self.name, self.args)


class AttackSettings(Strict):
    """What the malicious clients do; see the package `attack`."""

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
        """What is given, with the directions `gradient` and `target` as the goals that they are.

        ValueError where goal and direction contradict each other.
        """
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
        """The name of the direction that the gradient is pushed against: of `attack.DIRECTIONS`, or an import path."""
        return self.direction or {"untargeted": "gradient", "targeted": "target"}[self.goal]

    @property
    def plans(self) -> bool:
        """Whether flips are planned ahead: whether it is `attack=planned`."""
        return self.name == "planned"

    @property
    def steers(self) -> bool:
        """Whether the attackers need the parameters of `targets.target`; InputError without an attack."""
        from fl_attack import attack

        return self.plans or ("goal" in attack.find(self.name).uses and self.aim in ("target", "target_far"))

    @property
    def remembers(self) -> bool:
        """Whether flips stay in the attackers' data after their round."""
        return self.memory != "forget" and self.writes == "labels"

    @cached_property
    def writes(self) -> str:
        """What the attack changes, `labels` or `updates`; `labels` also without an attack."""
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
        """ValueError where `name` is neither in `attack.ATTACKS` nor a path, or arguments or settings don't fit it."""
        from fl_attack import attack

        if self.name == "none":
            return
        chosen = attack.find(self.name)
        attack.check_args(self.name, self.args)
        defaults = {"goal": "untargeted", "direction": None, "knowledge": "full", "target_path": None}
        defaults |= {"selection": "gain", "objective": "final", "foresight": "known", "horizon": None}
        for key, value in defaults.items():
            if key not in chosen.uses and getattr(self, key) != value:
                raise ValueError(f"{key}={getattr(self, key)} has no meaning with name={self.name}; leave it out")
        if self.adapt == "rule" and chosen.writes == "updates" and chosen.tries is None:
            tried = (name for name, row in attack.ATTACKS.items() if row.writes == "labels" or row.tries)
            known = ", ".join(name for name in tried if name != "planned")  # whose flips are chosen before the round
            raise ValueError(f"adapt=rule has no meaning with name={self.name}, which has nothing to try; use {known}")
        uses = attack.find_direction(self.aim).uses
        direction = f"goal={self.goal}" if self.direction is None else f"direction={self.direction}"
        if self.knowledge != "full" and "knowledge" not in uses:
            why = ", whose direction is target - theta and needs no gradient" if self.goal == "targeted" else ""
            raise ValueError(f"knowledge={self.knowledge} has no meaning with {direction}{why}; use knowledge=full")
        if self.target_path is not None and "target_path" not in uses:
            raise ValueError(f"target_path has no meaning with {direction}; use goal=targeted or leave it out")


class StrategySettings(Strict):
    """How the server combines the clients' answers: a built-in rule, or any strategy of Flower's."""

    name: str
    path: str | None = None
    f: Annotated[int, Field(ge=0)] | None = None
    root: Count | None = None
    pre: tuple[str | dict[str, dict[str, Any]], ...] = ()
    rule: str | None = None
    args: dict[str, Any] = {}

    @property
    def trusted(self) -> int:
        """How many training samples the server knows: `root`, else FLTrust's 100 if the rule asks for any, else 0."""
        from fl_attack.aggregate import needs

        return self.root or (ROOT if "root" in needs(self.name) else 0)

    @property
    def averages(self) -> bool:
        """Whether the server's rule is the plain mean."""
        return self.name == "mean" and not self.pre

    def check_names(self) -> None:
        """ValueError where `strategy.name` is no rule of `RULES`, no import path, and neither `byzfl` nor `flower`."""
        from fl_attack.aggregate import RULES, is_known

        if self.name != "flower" and not is_known(self.name):
            names = ", ".join((*RULES, "byzfl", "flower"))
            near = did_you_mean(self.name, (*RULES, "byzfl", "flower"))
            raise ValueError(
                f"name={self.name} is not a strategy; known: {names}, or the import path of a function{near}"
            )

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        """The settings themselves; ValueError where `strategy=flower` has no path."""
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
        """The trackers as a list, where a single one may be given by its name alone."""
        return [given] if isinstance(given, str) else given

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The precision of the clients' arithmetic; the server keeps theta in float64."""
        import torch

        return torch.float32 if self.dtype == "float32" else torch.float64

    @property
    def per_round(self) -> int | None:
        """How many clients take part in a round, a share of them rounded; None where all do."""
        wanted, total = self.clients.per_round, self.clients.total
        if isinstance(wanted, float):
            wanted = max(1, round(wanted * total))
        return None if wanted in (None, total) else wanted

    @property
    def assumed_malicious(self) -> int:
        """How many malicious clients the rule expects in a round: `strategy.f`, else their mean number, rounded up."""
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
        """Whether no label is flipped and no update changed: without an attack, or with a label budget of 0."""
        return not self.attacked or (self.attack.writes == "labels" and self.attack.budget == 0)

    def unattacked(self) -> "Settings":
        """The unattacked twin: the same experiment and clients with `attack=none`, and without a baseline."""
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
                "attack.adapt=rule needs a rule that is known, and strategy=flower is not; use a built-in rule"
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
