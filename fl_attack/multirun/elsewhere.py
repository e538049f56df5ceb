"""Units of a sweep as jobs of another of Hydra's launchers: a SLURM array, processes of joblib.

A job gets the path of its unit's file, and leaves the unit's numbers beside it. So the folder of the sweep must be one
that all machines see; in return a job that ends after the sweep was broken off is not lost.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fl_attack import engine
from fl_attack.config import settings_from
from fl_attack.data.cache import write_whole
from fl_attack.errors import RunError, message_or_type
from fl_attack.multirun.execute import compute
from fl_attack.multirun.units import Numbers, Unit, read, saver
from fl_attack.progress import Progress
from fl_attack.scenario import Scenario

Launch = Callable[[Sequence[Path]], None]  # has `compute_file` called with each file, and returns when all have ended


def launched(
    todo: Sequence[Unit],
    scenarios: Sequence[Scenario],
    kept: Path,
    launch: Launch,
    done: Callable[[Unit, Numbers], None],
) -> None:
    """Have units computed as jobs of another launcher, and hand on the numbers of each.

    Parameters
    ----------
    todo : sequence of Unit
        The units, in whose order they are handed on.
    scenarios : sequence of Scenario
        The experiments of all cells of the sweep; a unit has their positions.
    kept : Path
        The folder of the files that jobs read and write.
    launch : callable
        Gets the files of the jobs and returns when they have ended.
    done : callable
        Called here, once all jobs have ended, with each unit that has numbers, and these.

    Raises
    ------
    RunError
        Where a job left no numbers; those of the others are kept. An error of the launcher counts only then.
    """
    if not todo:
        return
    files = []
    for unit in todo:
        text = json.dumps([scenarios[i].settings.model_dump_json() for i in unit.cells]).encode()
        files.append(kept / f"{unit.key}.json")
        write_whole(files[-1], lambda stream, text=text: stream.write(text))  # type: ignore[misc]
    reason = ""
    try:
        launch(files)
    except Exception as error:  # whatever a launcher raises for a job that failed, after its own log
        reason = f", the first because {message_or_type(error)}"
    missing = 0
    for unit in todo:
        numbers = read(kept / f"{unit.key}.npz")
        if numbers is None:
            missing += 1
        else:
            done(unit, numbers)
    if missing:
        raise RunError(
            f"{missing} of {len(todo)} jobs left no result{reason[:300]}; the same command goes on with these, and the "
            f"launcher's logs are under {kept.parent}"
        )


def compute_file(file: Path, threads: int) -> None:
    """Compute the unit that a file describes, and leave its numbers beside it in a .npz: what a job does.

    Parameters
    ----------
    file : Path
        A list in JSON of the settings of the unit's cells, each a text in JSON; named by the key of the unit.
    threads : int
        Threads of torch.
    """
    torch.set_num_threads(threads)
    texts = json.loads(file.read_text())
    scenarios = engine.make_scenarios([settings_from(json.loads(text)) for text in texts])
    unit = Unit(list(range(len(scenarios))), file.stem)

    def keep(unit: Unit, numbers: Numbers) -> None:
        write_whole(file.with_suffix(".npz"), saver(numbers, unit.key))

    # the job is one of many as it is, so that it goes no further
    here = [scenario.settings.model_copy(update={"launcher": "local"}) for scenario in scenarios]
    local = [Scenario(own, one.dataset, one.partition, one.schedule) for own, one in zip(here, scenarios, strict=True)]
    with Progress(len(local), f"job {unit.key[:6]}") as progress:
        compute([unit], local, progress, keep)
