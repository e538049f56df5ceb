"""The client behind each node of a grid, where the server must know, and data of their own that nodes hold."""

from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fl_attack import data
from fl_attack import scenario as scenarios
from fl_attack.config import Settings
from fl_attack.data import own
from fl_attack.errors import RunError
from fl_attack.federation import wire
from fl_attack.scenario import Scenario


def introduced(grid: Grid, scenario: Scenario) -> dict[int, int] | None:
    """The client behind each node of a grid, where the server must know.

    Parameters
    ----------
    grid : Grid
        The grid of nodes that are the clients.
    scenario : Scenario
        The experiment.

    Returns
    -------
    dict of int to int, or None
        The client by node; None where all nodes are sent the same in every round.

    Raises
    ------
    RunError
        Where a node can't be asked, or not every client is there exactly once; checked only if the nodes are asked.
    """
    settings = scenario.settings
    no_memory = not settings.worker_momentum and not (settings.attacked and settings.attack.remembers)
    if scenario.schedule.per_round is None and no_memory:
        return None
    return introductions(grid, scenario.settings.clients.total)


def introductions(grid: Grid, clients: int) -> dict[int, int]:
    """The client behind each node of a grid, as the nodes say: `numbered` of `ask_nodes`, with the errors of both.

    Parameters
    ----------
    grid : Grid
        Its nodes are asked, one message each.
    clients : int
        How many clients there should be, numbered from 0.
    """
    found = {node: introduction.client for node, introduction in ask_nodes(grid, RecordDict()).items()}
    return numbered(found, clients)


def ask_nodes(grid: Grid, question: RecordDict) -> dict[int, wire.Introduction]:
    """What each node of a grid answers to the question which client it is.

    Parameters
    ----------
    grid : Grid
        Its nodes are asked, one message each.
    question : RecordDict
        The content of the message: empty, or `wire.question`, which also asks what data of its own a node holds.

    Returns
    -------
    dict of int to wire.Introduction
        The answer by node; without nodes that do not reply.

    Raises
    ------
    RunError
        Where a node can't be asked.
    """
    questions = [Message(question, node, MessageType.QUERY) for node in sorted(grid.get_node_ids())]
    replies = list(grid.send_and_receive(questions))
    for reply in replies:
        if reply.has_error():
            raise RunError(f"a node can't be asked which client it is: {wire.reason_of(reply)}")
    return {reply.metadata.src_node_id: wire.read_introduction(reply.content) for reply in replies}


def numbered(client_of: Mapping[int, int | None], clients: int) -> dict[int, int]:
    """The client behind each node.

    Parameters
    ----------
    client_of : mapping of int to int or None
        What the nodes say; None where one has no number.
    clients : int
        How many clients there should be, numbered from 0.

    Returns
    -------
    dict of int to int
        The client by node.

    Raises
    ------
    RunError
        Unless each client is there once.
    """
    given = {node: client for node, client in client_of.items() if client is not None}
    if sorted(given.values()) != list(range(clients)):
        raise RunError(
            f"the federation's {len(client_of)} nodes answered as clients {sorted(given.values())}, not as "
            f"each of 0 to {clients - 1} once; give each a partition-id of its own"
        )
    return given


def with_own_data(grid: Grid, settings: Settings) -> tuple[Scenario, dict[int, int]]:
    """The experiment of nodes that train on data of their own.

    Where no node has a number, they are numbered by the fingerprints of their data: the same data in the same order,
    whatever ids Flower gives the nodes.

    Parameters
    ----------
    grid : Grid
        Its nodes are the clients; they are asked what they hold.
    settings : Settings
        The settings of a run with `partition=own`.

    Returns
    -------
    scenario : Scenario
        The experiment as the server knows it: without the samples that nodes hold.
    client_of : dict of int to int
        The client by node.

    Raises
    ------
    InputError
        Where the server's own data set can't be had, or what nodes hold doesn't fit the settings.
    RunError
        Where a node can't be asked, some have numbers and not each client is there exactly once, or not as many nodes
        as `clients.malicious` are malicious.
    """
    dataset = data.load(**settings.dataset.model_dump())
    answers = ask_nodes(grid, wire.question(settings.model_dump_json(), wire.Own(own.layout_of(dataset))))
    if all(one.client is None for one in answers.values()):
        order = sorted(answers, key=lambda node: (answers[node].fingerprint, answers[node].malicious, node))
        client_of = {node: client for client, node in enumerate(order)}
    else:
        client_of = numbered({node: one.client for node, one in answers.items()}, settings.clients.total)
    by_client = [answers[node] for node in sorted(client_of, key=client_of.__getitem__)]
    malicious = [client for client, one in enumerate(by_client) if one.malicious]
    if len(malicious) != settings.clients.malicious:
        raise RunError(
            f"clients.malicious={settings.clients.malicious}, but {len(malicious)} of the {len(answers)} nodes were "
            "started with malicious=true; make both the same"
        )
    counts = [one.samples for one in by_client]
    at_server = own.at_server(dataset, counts, [[one.fingerprint for one in by_client], malicious])
    return scenarios.of_nodes(settings, at_server, counts, malicious), client_of
