"""Work spread over a Ray cluster, for what needs no federation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fl_attack.federation.session import ray_session
from fl_attack.workers import reported

REPORT_EVERY = 1.0  # seconds between two reports


class Board:
    """How much of each job is done: an actor, since workers can't reach who gave them the job."""

    def __init__(self) -> None:
        self.done: dict[int, int] = {}

    def note(self, i: int, done: int) -> None:
        """Note the progress of a job.

        Parameters
        ----------
        i : int
            The number of the job.
        done : int
            How many of its steps are done; less than before where it was lost and starts anew.
        """
        self.done[i] = done

    def read(self) -> dict[int, int]:
        """The number of steps done of each job, by the job's number; without jobs that have noted none."""
        return self.done


def scatter(
    function: Callable[[Any, Callable[[int], None]], Any],
    jobs: Sequence[Any],
    threads: int,
    address: str | None,
    verbose: bool,
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[int, Any]]:
    """Run a function on jobs, as tasks of Ray; a job whose worker or node is lost is done again on another.

    Parameters
    ----------
    function : callable
        Takes a job, and a function that it tells how many more steps it has done; its result is pickled.
    jobs : sequence
        They are pickled.
    threads : int
        Processors that a job uses; all of a node that has fewer.
    address : str or None
        The cluster to join; None starts Ray here.
    verbose : bool
        Whether Ray prints what it does.
    on_progress : callable
        Gets a job's position and the number of steps that it has done so far.

    Yields
    ------
    position : int
        The position of a job in `jobs`; they come in the order in which they are done.
    result
        The result of the function for this job.
    """
    with ray_session(address, verbose):
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cpus = min(float(threads), largest)
        # on the driver's node, so that no lost one takes it along
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote
        board = remote(num_cpus=0, scheduling_strategy=here)(Board).remote()

        def work(i: int, job: Any) -> Any:
            return function(job, reported(lambda done: board.note.remote(i, done), REPORT_EVERY))

        task = remote(max_retries=-1, num_cpus=cpus, scheduling_strategy="SPREAD")(work)
        pending = {task.remote(i, job): i for i, job in enumerate(jobs)}
        while pending:
            done, _ = ray.wait(list(pending), timeout=REPORT_EVERY)
            if not done:
                for i, steps in ray.get(board.read.remote()).items():
                    if i in pending.values():
                        on_progress(i, steps)
            for one in done:
                yield pending.pop(one), ray.get(one)
