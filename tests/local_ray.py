"""A stand-in for Ray in this process: actors and tasks are calls, made at once, and what Ray is asked for is noted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray


class Ref:
    """What a call gives; `ready` is false while `get` and `wait` are to find nothing there."""

    def __init__(self, value: Any) -> None:
        self.value, self.ready = value, True


class LocalRay:
    """The functions of Ray that the package calls."""

    exceptions = ray.exceptions

    def __init__(self, **resources: float) -> None:
        self.resources = resources or {"CPU": 2.0}
        self.running = False
        self.options: list[dict[str, Any]] = []  # of each actor class and task
        self.started: list[dict[str, Any]] = []  # arguments of `init`
        self.made: list[Any] = []  # the objects of actors
        self.killed: list[Any] = []
        self.late: set[int] = set()  # numbers of actors that do not answer in time
        self.idle = 0  # so many times `wait` finds nothing done
        self.waits: list[float | None] = []  # for how long it was to wait

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def decorated(what: Any) -> Any:
            def call(*arguments: Any) -> Any:
                made = what(*arguments)
                if not isinstance(what, type):
                    return Ref(made)
                self.made.append(made)
                return Actor(self, len(self.made) - 1, made)

            self.options.append(options)
            return SimpleNamespace(remote=call)

        return decorated

    def get(self, refs: Any, *, timeout: float | None = None) -> Any:
        if isinstance(refs, Ref):
            return refs.value
        if timeout is not None and not all(ref.ready for ref in refs):
            raise ray.exceptions.GetTimeoutError
        return [ref.value for ref in refs]

    def wait(self, refs: list[Ref], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], Any]:
        self.waits.append(timeout)
        self.idle -= 1
        ready = [ref for ref in refs if ref.ready][:num_returns] if self.idle < 0 else []
        return ready, [ref for ref in refs if ref not in ready]

    def nodes(self) -> list[dict[str, Any]]:
        gone, small = {"Resources": {"CPU": 64.0}, "Alive": False}, {"Resources": {}, "Alive": True}
        return [gone, {"Resources": self.resources, "Alive": True}, small]

    def init(self, **how: Any) -> None:
        self.running = True
        self.started.append(how)

    def shutdown(self) -> None:
        self.running = False

    def is_initialized(self) -> bool:
        return self.running

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "0" * 56)


class Actor:
    """The handle of an actor."""

    def __init__(self, of: LocalRay, number: int, made: Any) -> None:
        self._of, self._number, self._made = of, number, made

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Ref:
            ref = Ref(getattr(self._made, name)(*arguments))
            ref.ready = self._number not in self._of.late
            return ref

        return SimpleNamespace(remote=call)


@contextmanager
def in_place_of_ray(local: LocalRay) -> Iterator[LocalRay]:
    """The package calls the stand-in within the block."""
    from fl_attack.federation import grid, session, tasks

    with pytest.MonkeyPatch.context() as patch:
        for module in (grid, session, tasks):
            patch.setattr(module, "ray", local)
        yield local
