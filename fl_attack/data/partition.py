"""Who holds which sample: the table of partitioners, and the draw of the malicious clients.

A partitioner deals n samples to clients 0 .. m-1: it maps labels (n,) to clients (n,).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fl_attack.data import hugging_face
from fl_attack.errors import InputError, one_line

# Streams of random numbers, one for each purpose, so that no setting shifts what another one draws.
MALICIOUS, SPLIT, SHARDS, MALICIOUS_SHARDS, HELD_OUT = range(0x5EED_0000, 0x5EED_0005)
DIRICHLET_DRAWS = 100


@dataclass(frozen=True)
class Partition:
    """The client of each sample, and which clients are malicious; every client 0 .. m-1 holds a sample."""

    client: np.ndarray  # (n,) int64: the client of each training sample; -1 where the server holds it out
    malicious: np.ndarray  # ids of the malicious clients, ascending

    @property
    def shards(self) -> list[np.ndarray]:
        """The positions of each client's samples, ascending, by client."""
        by_client = np.argsort(self.client, kind="stable")[len(self.validation) :]
        return np.split(by_client, np.cumsum(np.bincount(self.client[by_client]))[:-1])

    @property
    def validation(self) -> np.ndarray:
        """The positions of the samples of no client, ascending: the server's validation split."""
        return np.flatnonzero(self.client < 0)


def partition(
    labels: np.ndarray,
    *,
    honest: int,
    malicious: int,
    seed: int,
    name: str = "iid",
    alpha: float | None = None,
    s: int | None = None,
    malicious_share: float | None = None,
    balanced: bool = False,
    min_samples: int = 1,
    path: str | Path | None = None,
    partitioner: str = "IidPartitioner",
    args: dict[str, Any] | None = None,
    held_out: float = 0.0,
) -> Partition:
    """Deal the samples with these labels to honest + malicious clients; the same for the same seed.

    Parameters
    ----------
    labels : array of int, (n,)
        The labels of the training samples.
    honest, malicious : int
        How many clients of each kind. The malicious ones are the first of an order drawn by the seed: those of
        malicious=2 are among those of malicious=3, in the same partition, if the total is the same.
    seed : int
        The seed of the experiment.
    name : str
        One of `PARTITIONERS`.
    alpha, s, balanced, path
        See `dirichlet`, `shards`, `dirichlet` and `given`.
    partitioner, args
        See `of_flower`.
    malicious_share : float, optional
        Exactly round(share * n) samples, drawn at random, go to the malicious clients and the rest to the honest.
    min_samples : int
        The least that a client may get.
    held_out : float
        The share of the samples, drawn at random before all that, which the server keeps from the clients.

    Returns
    -------
    Partition
        The client of each sample, -1 where it is held out, and the malicious clients.

    Raises
    ------
    InputError
        Where a client would stay without samples, or a setting has no meaning.
    """
    clients = honest + malicious
    if min(honest, malicious) < 0 or clients < 1:
        raise InputError(f"clients.honest={honest}, clients.malicious={malicious}; use 0 or more, 1 in all")
    if name not in PARTITIONERS:
        raise InputError(f"partition.name={name} is unknown; use one of {', '.join(PARTITIONERS)}")
    if malicious_share is not None:
        _check_share(name, malicious_share, honest, malicious)
    options = {"alpha": alpha, "s": s, "balanced": balanced, "partitioner": partitioner, "args": args}
    deal = Deal(name, options, seed, min_samples)
    chosen = _chosen(seed, clients, malicious)
    client = np.full(len(labels), -1)
    kept = _kept(len(labels), held_out, seed)
    if name == "given":
        client[kept] = _given(path, clients, len(labels))[kept]
        _check_least(client[kept], clients, min_samples)
    elif malicious_share is None:
        client[kept] = deal(labels[kept], clients, SHARDS)
    else:
        client[kept] = _dealt_by_share(labels[kept], deal, chosen, clients, malicious_share)
    return Partition(client, chosen)


def _check_share(name: str, share: float, honest: int, malicious: int) -> None:
    """InputError where the malicious clients can't hold this share of the samples."""
    if name == "given":
        raise InputError(f"partition.malicious_share={share} has no meaning with partition=given; leave it out")
    if not 0 < share < 1 or not malicious or not honest:
        raise InputError(
            f"partition.malicious_share={share} with {malicious} malicious and {honest} honest "
            "clients; it lies between 0 and 1, and needs clients of both kinds"
        )


def _kept(samples: int, held_out: float, seed: int) -> np.ndarray:
    """Positions, ascending, of the samples that clients get: all but those held out; InputError if these are none."""
    if not held_out:
        return np.arange(samples)
    count = round(held_out * samples)
    if not count:
        raise InputError(f"early_stop.share={held_out} holds out none of {samples} samples; raise it")
    return np.sort(np.random.default_rng([seed, HELD_OUT]).permutation(samples)[count:])


class Deal(NamedTuple):
    """A way to deal samples to clients."""

    name: str  # of `PARTITIONERS`
    options: Mapping[str, object]  # of its function
    seed: int
    least: int  # samples that each client must get

    def __call__(self, labels: np.ndarray, clients: int, stream: int, kind: str = "") -> np.ndarray:
        """The client (n,), from 0, of each sample with labels (n,), drawn from a stream of random numbers.

        InputError where a client gets too few; `kind` says in the message which clients they are.
        """
        if clients > len(labels):
            raise InputError(f"{len(labels)} samples are too few for {clients} {kind}clients; each needs one")
        rng = np.random.default_rng([self.seed, stream])
        found = PARTITIONERS[self.name](labels, clients, rng, least=self.least, **self.options)
        _check_least(found, clients, self.least)
        return found


def _dealt_by_share(labels: np.ndarray, deal: Deal, chosen: np.ndarray, clients: int, share: float) -> np.ndarray:
    """The client of each sample, of which malicious clients `chosen` get exactly a share and the honest the rest."""
    order = np.random.default_rng([deal.seed, SPLIT]).permutation(len(labels))
    cut = round(share * len(labels))
    of_malicious, of_honest = np.sort(order[:cut]), np.sort(order[cut:])
    honest = np.setdiff1d(np.arange(clients), chosen)
    client = np.empty(len(labels), np.int64)
    client[of_malicious] = chosen[deal(labels[of_malicious], len(chosen), MALICIOUS_SHARDS, "malicious ")]
    client[of_honest] = honest[deal(labels[of_honest], len(honest), SHARDS, "honest ")]
    return client


def _chosen(seed: int, clients: int, malicious: int) -> np.ndarray:
    """The malicious clients, ascending: the first `malicious` of a random order of all that the seed gives."""
    return np.sort(np.random.default_rng([seed, MALICIOUS]).permutation(clients)[:malicious])


def _check_least(client: np.ndarray, clients: int, least: int) -> None:
    """InputError where a client has fewer samples than the least."""
    counts = np.bincount(client, minlength=clients)
    if counts.min() < least:
        raise InputError(
            f"partition.min_samples={least}: client {int(counts.argmin())} of {clients} has {int(counts.min())} samples"
        )


def iid(labels: np.ndarray, clients: int, rng: np.random.Generator, **_: object) -> np.ndarray:
    """Equal shards at random; sizes differ by at most one.

    Parameters
    ----------
    labels : array of int, (n,)
        The labels of the samples.
    clients : int
        The number of clients.
    rng : numpy.random.Generator
        The generator that a random partition draws from.

    Returns
    -------
    array of int, (n,)
        The client of each sample.
    """
    return rng.permutation(np.arange(len(labels)) % clients)


def dirichlet(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float | None,
    balanced: bool = False,
    least: int = 1,
    **_: object,
) -> np.ndarray:
    """Each class in proportions drawn from Dir(alpha, ..., alpha): a small alpha leaves it to few clients.

    Parameters
    ----------
    labels, clients, rng
        As `iid` takes them.
    alpha : float
        Above 0.
    balanced : bool
        Whether the clients' numbers of samples differ by at most one. A client's proportions of the C classes are then
        drawn from a Dirichlet distribution of parameters alpha C q, for shares q of the classes among all samples.
    least : int
        All is drawn anew, up to `DIRICHLET_DRAWS` times, while a client has fewer samples; not if `balanced`.

    Returns
    -------
    array of int, (n,)
        The client of each sample.

    Raises
    ------
    InputError
        Where `alpha` is not above 0, or no draw leaves each client enough.

    References
    ----------
    Hsu et al. 2019, https://arxiv.org/abs/1909.06335
    """
    if alpha is None or not 0 < alpha < np.inf:
        raise InputError(f"partition.alpha={alpha} must be above 0")
    if balanced:
        return _balanced(labels, clients, rng, alpha)
    client = np.empty(len(labels), np.int64)
    for _draw in range(DIRICHLET_DRAWS):
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            counts = _shared_out(len(members), rng.dirichlet(np.full(clients, alpha)), rng)
            client[members] = np.repeat(np.arange(clients), counts)
        if np.bincount(client, minlength=clients).min() >= least:
            return client
    few = "without samples" if least == 1 else f"with fewer than {least} samples"
    raise InputError(
        f"partition.alpha={alpha} left one of {clients} clients {few} in {DIRICHLET_DRAWS} draws; "
        "raise alpha or use fewer clients" + (", or lower partition.min_samples" if least > 1 else "")
    )


def _shared_out(count: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers that add up to a count, in these shares; what is left by rounding goes to the largest remainders.

    Equal remainders are drawn by lot, so that no client is favoured.
    """
    exact = count * shares
    counts = np.floor(exact).astype(np.int64)
    client_order = rng.permutation(len(shares))
    order = client_order[np.argsort(-(exact - counts)[client_order], kind="stable")]
    counts[order[: count - int(counts.sum())]] += 1
    found: np.ndarray = counts
    return found


def _balanced(labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float) -> np.ndarray:
    """The client (n,) of each sample: in turns, clients draw one of a class by their proportions of those left."""
    classes, of_class = np.unique(labels, return_inverse=True)
    left = np.bincount(of_class)
    prior = left / len(labels) * len(classes)
    wanted = np.maximum(rng.dirichlet(alpha * prior, clients), 1e-300)
    members = [rng.permutation(np.flatnonzero(of_class == label)).tolist() for label in range(len(classes))]
    client = np.empty(len(labels), np.int64)
    order = np.concatenate([rng.permutation(clients) for _ in range(-(-len(labels) // clients))])[: len(labels)]
    for receiver, uniform in zip(order.tolist(), rng.random(len(labels)).tolist(), strict=True):
        cumulative = np.cumsum(wanted[receiver] * (left > 0))
        drawn = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        label = min(drawn, int(np.flatnonzero(left)[-1]))
        left[label] -= 1
        client[members[label].pop()] = receiver
    return client


def given(
    labels: np.ndarray, clients: int, rng: np.random.Generator, *, path: str | Path | None, **_: object
) -> np.ndarray:
    """Who holds what as a file says: natural users, for instance.

    Parameters
    ----------
    labels, clients, rng
        As `iid` takes them; `rng` is not used, and the file must hold as many clients.
    path : str or Path
        An .npz with an array `client`, an .npy, or a text with a number in each line: each sample's client, from 0.

    Returns
    -------
    array of int, (n,)
        The client of each sample.

    Raises
    ------
    InputError
        Where the file is missing, or is not of as many samples and clients.
    """
    return _given(path, clients, len(labels))


def _given(path: str | Path | None, clients: int, samples: int) -> np.ndarray:
    """The client (samples,) of each sample from a file, as `given` describes it."""
    if path is None:
        raise InputError("partition=given needs partition.path, a file with the client of each training sample")
    file = Path(path).expanduser()
    try:
        if file.suffix in (".npz", ".npy"):
            loaded = np.load(file, allow_pickle=False)
            client = loaded["client"] if file.suffix == ".npz" else loaded
        else:
            client = np.array([int(line) for line in file.read_text().split()])
    except Exception as error:  # whatever a damaged file makes numpy raise
        raise InputError(f"{file} can't be read as clients: {one_line(error)}") from None
    if client.shape != (samples,) or client.dtype.kind not in "iu":
        raise InputError(
            f"{file} holds {client.dtype} of shape {client.shape}; wanted: a whole number for each of {samples} samples"
        )
    present = np.unique(client)
    if not np.array_equal(present, np.arange(len(present))):
        raise InputError(f"{file} holds clients from {present[0]} to {present[-1]}, not each of 0, 1, 2, ...")
    if len(present) != clients:
        raise InputError(
            f"{file} holds {len(present)} clients, but clients.total={clients}; use clients.total={len(present)}"
        )
    return np.asarray(client, np.int64)


def of_flower(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    *,
    partitioner: str,
    args: dict[str, Any] | None = None,
    **_: object,
) -> np.ndarray:
    """Clients as a partitioner of Flower Datasets deals them, see `hugging_face.partitioned`.

    Parameters
    ----------
    labels, clients, rng
        As `iid` takes them; the seed of the partitioner is drawn from `rng`.
    partitioner : str
        A class of `flwr_datasets.partitioner`.
    args : dict, optional
        Arguments of the partitioner.

    Returns
    -------
    array of int, (n,)
        The client of each sample.

    Raises
    ------
    InputError
        As `hugging_face.partitioned` raises it.

    References
    ----------
    https://flower.ai/docs/datasets/
    """
    return hugging_face.partitioned(partitioner, args or {}, labels, clients, int(rng.integers(2**31)))


def shards(labels: np.ndarray, clients: int, rng: np.random.Generator, *, s: int | None, **_: object) -> np.ndarray:
    """Samples sorted by label and cut into equal pieces, some pieces at random for each client.

    Parameters
    ----------
    labels, clients, rng
        As `iid` takes them.
    s : int
        Pieces for each client.

    Returns
    -------
    array of int, (n,)
        The client of each sample.

    Raises
    ------
    InputError
        Where `s` is below 1, or there are fewer samples than pieces.

    References
    ----------
    McMahan et al. 2017, https://arxiv.org/abs/1602.05629
    """
    if s is None or s < 1:
        raise InputError(f"partition.s={s} must be 1 or more")
    pieces = clients * s
    if pieces > len(labels):
        raise InputError(
            f"partition.s={s} makes {pieces} pieces of {len(labels)} samples; "
            f"use at most s={len(labels) // clients}, or fewer clients"
        )
    owner = rng.permutation(np.arange(pieces) % clients)
    client = np.empty(len(labels), np.int64)
    client[np.argsort(labels, kind="stable")] = owner[np.arange(len(labels)) * pieces // len(labels)]
    return client


PARTITIONERS: dict[str, Callable[..., np.ndarray]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "given": given,
    "hf": of_flower,
}
