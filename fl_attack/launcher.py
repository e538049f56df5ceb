"""The program's own Hydra sweeper and launcher: a multirun (-m) becomes one sweep.

Hydra's sweeper expands the command line, or `hydra.sweeper.params` of a file, into jobs; the launcher gets them all at
once. Hydra would compose every job anew, a twentieth of a second each: here jobs that choose the same groups are
composed once, and their values set.
"""

import importlib
import itertools
import pickle
import sys
import types
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fl_attack import workers
from fl_attack.errors import InputError, RunError
from fl_attack.overrides import completed, composing, conf_folder, explain, quoted, unknown_key

if TYPE_CHECKING:
    from fl_attack.config import Settings
    from fl_attack.multirun import Cell, Launch

Plugins.instance()  # loads Hydra's own plugins anew, so that only now their classes are the ones it will know
from hydra._internal.callbacks import Callbacks  # noqa: E402
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # noqa: E402

NAME = "fl_attack"
WORTH_WORKERS = 32  # cells, for which workers are begun with before it is known how long these take
UNIT = "unit"  # the key of a job of another launcher: the file of its unit


class AllAtOnce(BasicSweeper):
    """Hydra's sweeper, which neither composes every job before the launcher does nor leaves a file of its own.

    Another launcher of Hydra's than our own is given the units of the sweep as its jobs.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over to a sweeper, see `hydra.plugins.sweeper.Sweeper`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = SweepLauncher()
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Launch all jobs of a command line at once; gives a list of one list, of what the jobs returned."""
        assert self.launcher is not None
        return [self.launcher.launch(self.jobs(arguments), initial_job_idx=0)]

    def jobs(self, arguments: list[str]) -> Sequence[Sequence[str]]:
        """The overrides of each job: the command line, or `hydra.sweeper.params`, expanded.

        A key such as `clients.malicious+attack.budget: 3+1.0,10+0.1` sets several together, in place of what the file
        has for each of them.
        """
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        params = self._parse_config()
        joint = [_joint_cases(param) for param in params if "+" in _key(param)]
        together = {name for param in params if "+" in _key(param) for name in _key(param).split("+")}
        alone = [param for param in params if "+" not in _key(param) and _key(param) not in together]
        (jobs,) = self.split_arguments(parser.parse_overrides([*alone, *arguments]), None)
        chosen = {_key(argument) for argument in arguments}
        return [
            [*(one for case in cases for one in case if _key(one) not in chosen), *job]
            for cases in itertools.product(*joint)
            for job in jobs
        ]


class SweepLauncher(Launcher):
    """Runs all jobs as one sweep."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over to a launcher, see `hydra.plugins.launcher.Launcher`."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs as one sweep, whose results are in the folder that they name.

        Parameters
        ----------
        job_overrides : sequence of sequences of str
            The overrides of each job.
        initial_job_idx : int
            The number of the first one; not 0 where a sweeper chooses further jobs by the results of earlier ones.

        Returns
        -------
        sequence of JobReturn
            Of each job the value in the column that `objective` names, for such sweepers; NaN where it broke off.

        Raises
        ------
        InputError, RunError, Interrupted
            As `multirun.run`; RunError also where something calls sys.exit.
        """
        try:
            cells = self.cells(job_overrides)
            from fl_attack import multirun  # slow to import; bad input is reported before

            if not self._hands_over_all_jobs():
                cells = [cell._replace(settings=_of_trials(cell.settings, initial_job_idx)) for cell in cells]
            out = multirun.run(cells, launch=self._other())
            total, lost = multirun.broken_off(out)
            print(f"results in {out}" + (f"; {lost} of {total} cells broke off: see the column error" if lost else ""))
        except SystemExit as error:  # of somebody's library or file: the sweep is not finished
            raise RunError(f"something called sys.exit({error.code}) before the sweep was finished") from None
        values = multirun.column(out, cells[0].settings.objective)
        return [
            JobReturn(overrides=one, status=JobStatus.COMPLETED, _return_value=value)
            for one, value in zip(job_overrides, values, strict=True)
        ]

    def _hands_over_all_jobs(self) -> bool:
        """Whether the sweeper hands over all jobs at once, as ours does."""
        return str(self.config.hydra.sweeper._target_) == f"hydra_plugins.{NAME}.{AllAtOnce.__name__}"

    def _other(self) -> "Launch | None":
        """A function that has files of units computed by the launcher that was chosen; None where that is this one."""
        if str(self.config.hydra.launcher._target_) == f"hydra_plugins.{NAME}.{SweepLauncher.__name__}":
            return None

        def launch(files: "Sequence[Path]") -> None:
            context, config = self.hydra_context, self.config
            threads = int(config.hydra.launcher.get("cpus_per_task") or 1)
            other = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=partial(compute_unit, threads=threads), config=config
            )
            named = self.config.hydra.launcher._target_.rpartition(".")[2]
            print(f"{len(files)} jobs to {named}", file=sys.stderr)
            out = str(files[0].parents[1].absolute())  # where Hydra makes a folder for each job
            jobs = [[f"+{UNIT}={quoted(str(file.absolute()))}", f"out={quoted(out)}"] for file in files]
            for returned in other.launch(jobs, initial_job_idx=0):
                _ = returned.return_value  # raises what the job raised

        return launch

    def cells(self, job_overrides: Sequence[Sequence[str]]) -> "list[Cell]":
        """The cell that the overrides of each job make, named by its seed and the overrides that not all jobs share.

        InputError where there are none, one is wrong, or they name several `out`.
        """
        from fl_attack.config import Settings, check_names, typed

        constant = [set(overrides) for overrides in job_overrides]
        shared = set.intersection(*constant) if len(constant) > 1 else set()
        if not job_overrides:
            raise InputError("the sweep has no cell: one of its ranges or lists is empty")
        shown_of: list[tuple[dict[str, str], Settings]] = []
        out = str(self.config.out)  # composed at another time, the default is another
        named = any(_key(one) == "out" for overrides in job_overrides for one in overrides)
        for overrides in job_overrides:
            shown = [override for override in overrides if override not in shared or _key(override) == "seed"]
            settings = typed(self._composed(overrides))
            if not named:
                settings = settings.model_copy(update={"out": out})
            typed_in = {_key(one): one.partition("=")[2].replace("\\:", ":") for one in shown}
            shown_of.append((typed_in, settings))
        out = shown_of[0][1].out
        if outs := {settings.out for _, settings in shown_of} - {out}:
            raise InputError(
                f"out={out} and out={min(outs)}: a sweep leaves one table in one folder; give each "
                "folder a sweep of its own"
            )
        if len(shown_of) >= WORTH_WORKERS and settings.workers != 1 and settings.engine.name == "batched":
            workers.warm_up()  # beside the imports of this process
        from fl_attack.multirun import Cell

        for _, settings in shown_of:
            check_names(settings)
        return [Cell(*one) for one in shown_of]

    def _composed(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The unchecked settings that overrides make, as nested dicts."""
        groups = tuple(one for one in overrides if not self._is_value(one))
        plain: dict[str, Any] = pickle.loads(self._base(groups))  # ten times as fast as a deep copy
        for one in overrides:
            if self._is_value(one):
                _set(plain, *_value(one))
        return plain

    def _is_value(self, override: str) -> bool:
        """Whether an override sets the value of one key, and nothing else."""
        # what adds or deletes, refers to other keys, or chooses a file is left to Hydra
        key = _key(override)
        plain = override[0].isalpha() and "${" not in override and not key.startswith("hydra.")
        return plain and "@" not in key and "/" not in key and key not in self._groups

    @cached_property
    def _groups(self) -> list[str]:
        """The names of the groups of configuration files, such as attack."""
        return self.hydra_context.config_loader.list_groups("")

    @cache  # noqa: B019 - there are few launchers in a process
    def _base(self, groups: tuple[str, ...]) -> bytes:
        """The settings with these choices of files, before any value is set, as pickled nested dicts."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(groups))
        with open_dict(config):
            del config["hydra"]
        return pickle.dumps(OmegaConf.to_container(config, resolve=True))


def grid(*overrides: str) -> "list[Cell]":
    """The cells of a multirun with these overrides; InputError where one is wrong."""
    register()
    try:
        with composing(), initialize_config_dir(str(conf_folder()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("config", completed(overrides), RunMode.MULTIRUN)
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            sweeper = AllAtOnce(None, config.hydra.sweeper.params)
            sweeper.setup(hydra_context=context, task_function=_unused, config=config)
            assert isinstance(sweeper.launcher, SweepLauncher)
            return sweeper.launcher.cells(sweeper.jobs(OmegaConf.to_container(config.hydra.overrides.task)))  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from None


def compute_unit(config: DictConfig, threads: int) -> None:
    """Compute a unit of a sweep: the job of another launcher of Hydra's.

    Parameters
    ----------
    config : DictConfig
        Its key `unit` is the file of the unit.
    threads : int
        Threads of torch.
    """
    from fl_attack import multirun

    multirun.compute_file(Path(config[UNIT]), threads)


def _of_trials(settings: "Settings", first: int) -> "Settings":
    """Settings whose results go to the folder `trials/<first>` in their `out`: those of jobs from that number on."""
    return settings.model_copy(update={"out": f"{settings.out}/trials/{first}"})


def _unused(config: DictConfig) -> None:
    """What Hydra would run for each job."""


def _joint_cases(param: str) -> list[list[str]]:
    """The cases of a parameter such as `a+b=1+2,3+4`, here [[a=1, b=2], [a=3, b=4]]; InputError where one is short."""
    keys, _, values = param.partition("=")
    names = keys.split("+")
    cases = [case.strip().split("+") for case in values.split(",")]
    if wrong := next((case for case in cases if len(case) != len(names)), None):
        given = "+".join(wrong) or "nothing"
        raise InputError(f"{keys} sets {len(names)} keys together; {given} is not {len(names)} values joined by +")
    return [[f"{name}={value}" for name, value in zip(names, case, strict=True)] for case in cases]


def _key(override: str) -> str:
    """The key of an override, as in `lr` of `+lr=1`."""
    return override.partition("=")[0].lstrip("+~")


@lru_cache(maxsize=4096)
def _value(override: str) -> tuple[str, Any]:
    """The key of an override and its value, as Hydra reads it."""
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    """Set a key with dots of nested dicts, in place; InputError where it is not there."""
    *path, last = key.split(".")
    for part in path:
        plain = plain.get(part) if isinstance(plain, dict) else None  # type: ignore[assignment]
    if not isinstance(plain, dict) or last not in plain:
        raise InputError(unknown_key(key))
    plain[last] = value


def register() -> None:
    """Make `AllAtOnce` and `SweepLauncher` known to Hydra, under the names that conf/hydra/ gives them."""
    _appear_in_hydra_plugins()
    for part in (AllAtOnce, SweepLauncher):
        part.__module__ = f"hydra_plugins.{NAME}"
        Plugins.instance().register(part)


def _appear_in_hydra_plugins() -> None:
    """Make this module importable under `hydra_plugins`, where Hydra looks for plugins."""
    # Hydra takes plugins from a package of that name only, where others may have put theirs
    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        package.__path__ = []
    sys.modules[f"hydra_plugins.{NAME}"] = sys.modules[__name__]
    setattr(package, NAME, sys.modules[__name__])
