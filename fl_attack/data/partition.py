"""Who holds which sample: the table of partitioners, and the draw of the malicious clients.

A partitioner deals n samples to clients 0 .. m-1: it maps labels (n,) to clients (n,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fl_attack.errors import InputError

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
        """The samples of each client, ascending."""
        by_client = np.argsort(self.client, kind="stable")[len(self.validation) :]
        return np.split(by_client, np.cumsum(np.bincount(self.client[by_client]))[:-1])

    @property
    def validation(self) -> np.ndarray:
        """The samples of no client, ascending: the server's validation split."""
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
    held_out: float = 0.0,
) -> Partition:
    """Deal the samples with these labels to honest + malicious clients; the same for the same seed.

    The malicious clients are the first of an order drawn by the seed: those of malicious=2 are among those of
    malicious=3, in the same partition, if the total is the same. With `malicious_share` exactly
    round(share * n) samples, drawn at random, are dealt to the malicious clients and the rest to the honest.
    Before all that, the share `held_out` of the samples, drawn at random, is kept from all clients.
    InputError where a client would stay without samples.
    """
    clients = honest + malicious
    if min(honest, malicious) < 0 or clients < 1:
        raise InputError(f"clients.honest={honest}, clients.malicious={malicious}; use 0 or more, 1 in all")
    if name not in PARTITIONERS:
        raise InputError(f"partition.name={name} is unknown; use one of {', '.join(PARTITIONERS)}")

    if held_out:
        count = round(held_out * len(labels))
        if not count:
            raise InputError(f"early_stop.share={held_out} holds out none of {len(labels)} samples; raise it")
        rest = np.sort(np.random.default_rng([seed, HELD_OUT]).permutation(len(labels))[count:])
        deal = partition(
            labels[rest],
            honest=honest,
            malicious=malicious,
            seed=seed,
            name=name,
            alpha=alpha,
            s=s,
            malicious_share=malicious_share,
        )
        holder = np.full(len(labels), -1)
        holder[rest] = deal.client
        return Partition(holder, deal.malicious)

    def dealt(labels: np.ndarray, clients: int, stream: int, kind: str = "") -> np.ndarray:
        if clients > len(labels):
            raise InputError(f"{len(labels)} samples are too few for {clients} {kind}clients; each needs one")
        return PARTITIONERS[name](labels, clients, np.random.default_rng([seed, stream]), alpha=alpha, s=s)

    chosen = np.sort(np.random.default_rng([seed, MALICIOUS]).permutation(clients)[:malicious])
    if malicious_share is None:
        return Partition(dealt(labels, clients, SHARDS), chosen)

    if not 0 < malicious_share < 1 or not malicious or not honest:
        raise InputError(
            f"partition.malicious_share={malicious_share} with {malicious} malicious and {honest} honest "
            "clients; it lies between 0 and 1, and needs clients of both kinds"
        )
    order = np.random.default_rng([seed, SPLIT]).permutation(len(labels))
    cut = round(malicious_share * len(labels))
    theirs, others = np.sort(order[:cut]), np.sort(order[cut:])
    kept = np.setdiff1d(np.arange(clients), chosen)
    client = np.empty(len(labels), np.int64)
    client[theirs] = chosen[dealt(labels[theirs], malicious, MALICIOUS_SHARDS, "malicious ")]
    client[others] = kept[dealt(labels[others], honest, SHARDS, "honest ")]
    return Partition(client, chosen)


def iid(labels: np.ndarray, clients: int, rng: np.random.Generator, **_: object) -> np.ndarray:
    """Equal shards at random; sizes differ by at most one."""
    return rng.permutation(np.arange(len(labels)) % clients)


def dirichlet(
    labels: np.ndarray, clients: int, rng: np.random.Generator, *, alpha: float | None, **_: object
) -> np.ndarray:
    """Each class in proportions drawn from Dir(alpha, ..., alpha): a small alpha leaves it to few clients.

    Drawn anew while a client is empty. https://arxiv.org/abs/1909.06335
    """
    if alpha is None or not 0 < alpha < np.inf:
        raise InputError(f"partition.alpha={alpha} must be above 0")
    client = np.empty(len(labels), np.int64)
    for _draw in range(DIRICHLET_DRAWS):
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            ends = len(members) * rng.dirichlet(np.full(clients, alpha)).cumsum()
            client[members] = np.searchsorted(ends[:-1], np.arange(len(members)), side="right")
        if len(np.unique(client)) == clients:
            return client
    raise InputError(
        f"partition.alpha={alpha} left one of {clients} clients without samples in {DIRICHLET_DRAWS} draws; "
        "raise alpha or use fewer clients"
    )


def shards(labels: np.ndarray, clients: int, rng: np.random.Generator, *, s: int | None, **_: object) -> np.ndarray:
    """Samples sorted by label and cut into equal pieces, s pieces at random for each client.

    https://arxiv.org/abs/1602.05629
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


PARTITIONERS: dict[str, Callable[..., np.ndarray]] = {"iid": iid, "dirichlet": dirichlet, "shards": shards}
