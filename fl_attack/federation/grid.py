"""A grid for Flower on Ray without Flower's polling: each actor owns a block of clients, one call a round.

It takes the place of Flower's scheduler. Apps, messages and strategies are Flower's. The three names that Flower does
not document are used here and nowhere else; the tests hold this grid to the results of the stock one.
"""

import gc
import itertools
import pickle
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import ray
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run  # undocumented
from flwr.supercore.task_identity import TaskIdentity  # undocumented

RUN_ID, SERVER_NODE, TASK_ID = 1, 1, 1
FIRST_NODE = 2  # node ids of clients count on from here
PICKLE = 5  # Ray's own pickling, made for functions and classes of scripts, takes twice as long for messages
CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION is not public


class ClientBlock:
    """The clients of one Ray actor, in its process."""

    def __init__(self, app: ClientApp, clients: Sequence[int], total: int) -> None:
        gc.freeze()  # or every few rounds Python would search all of its libraries for the garbage of messages
        self.app = app
        self.contexts = {
            client + FIRST_NODE: Context(
                run_id=RUN_ID,
                node_id=client + FIRST_NODE,
                node_config={"partition-id": client, "num-partitions": total},
                state=RecordDict(),
                run_config={},
            )
            for client in clients
        }

    def handle(self, messages: bytes) -> bytes:
        """The clients' replies to a list of messages, in its order, both pickled; an error reply where one raises."""
        return pickle.dumps([self._reply(message) for message in pickle.loads(messages)], PICKLE)

    def _reply(self, message: Message) -> Message:
        """The reply of the client that a message is for; an error reply where it raises."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)

    def place(self) -> tuple[str, int]:
        """The id of the Ray node, and of the process, that this block runs in."""
        import os

        return ray.get_runtime_context().get_node_id(), os.getpid()


class BlockGrid(Grid):
    """Clients in blocks on Ray actors, spread over the cluster's nodes."""

    def __init__(self, app: ClientApp, clients: int, actors: int, cpus_each: float, gpus_each: float = 0.0) -> None:
        """`clients` and `actors` are numbers; `cpus_each` and `gpus_each` are what Ray sets aside for each actor."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, TASK_ID
        self._run = Run.create_empty(RUN_ID)
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        # clients keep nothing, so the round of a lost actor is simply done again by its successor
        block_actor = ray.remote(
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=cpus_each,
            num_gpus=gpus_each,
            scheduling_strategy="SPREAD",
        )(ClientBlock)
        blocks = [block for block in np.array_split(np.arange(clients), actors) if len(block)]
        self.actors: list[Any] = [block_actor.remote(app, block.tolist(), clients) for block in blocks]
        self._actor_of = {
            int(client) + FIRST_NODE: actor
            for actor, block in zip(self.actors, blocks, strict=True)
            for client in block
        }
        gc.freeze()  # as in the blocks
        ray.get([actor.place.remote() for actor in self.actors])  # so that no round waits for a process to start

    def set_run(self, run: Run) -> None:
        """Take the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node, see `flwr.serverapp.Grid.create_message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of the clients' nodes, in the order of the clients."""
        return list(self._actor_of)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered, which takes until all are, and give their ids, for `pull_messages`."""
        replies = list(self.send_and_receive(messages))
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to pushed messages of these ids, once each: those already given, or unknown, are left out."""
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies; one call to each actor, whatever the number of its clients.

        Parameters
        ----------
        messages : iterable of Message
            One to each client that takes part.
        timeout : float, optional
            Seconds to wait; by default until all have answered.

        Returns
        -------
        iterable of Message
            The replies of all clients of those actors that were done in time.
        """
        by_actor: dict[Any, list[Message]] = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))  # undocumented
            by_actor.setdefault(self._actor_of[message.metadata.dst_node_id], []).append(message)
        calls: list[Any] = [actor.handle.remote(pickle.dumps(batch, PICKLE)) for actor, batch in by_actor.items()]
        if not calls:
            return []
        try:
            done = ray.get(calls, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            done = ray.get(ray.wait(calls, num_returns=len(calls), timeout=0)[0])
        return [reply for replies in done for reply in pickle.loads(replies)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self.actors:
            ray.kill(actor)
        gc.unfreeze()  # or libraries whose objects it holds report them as leaked when Python ends
