"""Work spread over a Ray cluster, for what needs no federation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from fl_attack.federation.session import ray_session

Job = Any


def scatter(
    function: Callable[[Job], Any], jobs: Sequence[Job], threads: int, address: str | None, verbose: bool
) -> Iterator[tuple[int, Any]]:
    """`function` of each job, as Ray tasks: its position and result, in the order in which they are done.

    A job takes as many processors as it uses `threads`, or all of a node that has fewer. One whose worker or node is
    lost is done again on another.
    """
    with ray_session(address, verbose):
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cpus = min(float(threads), largest)
        task = ray.remote(max_retries=-1, num_cpus=cpus, scheduling_strategy="SPREAD")(function)
        pending = {task.remote(job): i for i, job in enumerate(jobs)}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(done), ray.get(done)
