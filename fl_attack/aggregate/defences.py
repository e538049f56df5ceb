"""Rules that look at more than one round's updates: at history, at trusted data, at classes.

Shapes as in `rules`: updates (..., m, C, d). What a rule may know besides the updates is in `Seen`. A rule that keeps
something between rounds takes it as `state`, None before the first round, and gives it back beside the aggregate; its
leading axes are those of the updates. An update that is not finite is left out; by `class_norms` and `spectral`, which
leave f updates out, where there are at most f such.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fl_attack.aggregate.geometry import careful_products, combined, exponent_of, norms, power_of_two
from fl_attack.aggregate.ordering import ascending, finite_rows, middle, smallest
from fl_attack.aggregate.rules import clip, clip_shares, mean_by_shares

State = dict[str, Tensor]
DECIMALS = 12  # of a cosine; what is beyond are rounding errors
SMALLEST_DIFFERENCE = 10.0**-DECIMALS
BITS = 36  # likewise of a score


class Seen(NamedTuple):
    """What the server knows of a round besides the updates; a field that is None is read as its comment says."""

    clients: Tensor | None = None  # (m,) int64, the number of each client; None: 0 to m - 1
    total: int | None = None  # clients there are, in this round or not; None: m
    theta: Tensor | None = None  # (..., C, d) the parameters that were broadcast; None: zero
    lr: float | Tensor = 1.0  # learning rate of the round, a number or (..., 1, 1)
    root: Callable[[], Tensor] | None = None  # gives (..., C, d), the update of the server on data that it trusts
    noise: Callable[[], Tensor] | None = None  # gives (C, d), standard normal numbers; None: zero
    by_class: Callable[[Tensor], Tensor] | None = None  # (..., C, d) to (..., classes, width), the last layer


def fltrust(updates: Tensor, weights: Tensor, f: int, *, seen: Seen) -> Tensor:
    """Mean of the updates scaled to the norm of the server's own, weighted by their cosine to it where it is positive.

    Zero where no update points the server's way.

    References
    ----------
    Cao, Fang, Liu, Gong (2021). FLTrust: Byzantine-robust federated learning via trust bootstrapping. arXiv 2012.13995.

    Parameters
    ----------
    updates, weights, f
        As all rules take them, see `rules`; the last two are not used.
    seen : Seen
        Its `root` gives the server's own update.

    Returns
    -------
    (..., C, d) tensor

    Raises
    ------
    ValueError
        Where the server has no samples of its own.
    """
    if seen.root is None:
        raise ValueError("fltrust needs samples that the server trusts; give strategy.root, how many")
    root = seen.root().unsqueeze(-3)
    root_unit, root_norm = directions(root), norms(root)
    unit = directions(updates)
    trust = (unit @ root_unit.mT).squeeze(-1).clamp(min=0)
    total = trust.sum(-1, keepdim=True)
    share = trust / total.where(total > 0, 1.0) * root_norm
    return (share.unsqueeze(-2) @ unit).view(*updates.shape[:-3], *updates.shape[-2:]).to(updates)


def cosine_history(
    updates: Tensor, weights: Tensor, f: int, *, seen: Seen, state: State | None
) -> tuple[Tensor, State]:
    """Mean of the m - f updates of the clients nearest in angle to the median, on the average of all rounds so far.

    A client's cosine to the coordinate-wise median is averaged over the rounds in which it took part. What is averaged
    is clipped to the median norm, since an angle says nothing of a length. Averaging over rounds makes much of a small
    bias, which a single minibatch hides (Karimireddy, He, Jaggi 2021, arXiv 2012.10333); cosines as a sign of flipped
    labels are Awan, Luo, Li's (2021, CONTRA, ESORICS).

    Parameters
    ----------
    updates, weights, f
        See `rules`.
    seen : Seen
        The numbers of the clients.
    state : dict or None
        Sums of cosines and numbers of rounds by client, (..., clients) each; None before the first round.

    Returns
    -------
    aggregate : (..., C, d) tensor
    state : dict
        What the rule is given as `state` in the next round.
    """
    m = updates.shape[-3]
    median = middle(updates, (m - 1) // 2, m // 2 + 1).unsqueeze(-3)
    cosine = (directions(updates) @ directions(median).mT).squeeze(-1)
    finite = finite_rows(updates)
    clients, total = _numbers(seen, m, updates.device)
    if state is None:
        none = cosine.new_zeros(*cosine.shape[:-1], total)
        state = {"summed": none, "rounds": none}
    summed = state["summed"].index_add(-1, clients, cosine.where(finite, -1.0))
    rounds = state["rounds"].index_add(-1, clients, torch.ones_like(cosine))
    distance = significant((-summed / rounds)[..., clients]).where(finite, torch.inf)
    kept = smallest(distance, m - f, ascending(distance))
    clipped, _ = clip_shares(updates, None)
    share = torch.where(kept > 0, clipped / (m - f), 0.0)
    return mean_by_shares(updates.where((kept > 0)[..., None, None], 0.0), share), {"summed": summed, "rounds": rounds}


def class_norms(updates: Tensor, weights: Tensor, f: int, *, seen: Seen) -> Tensor:
    """Mean (..., C, d) without the f updates whose rows of the last layer, one a class, have the strangest norms.

    A flipped label adds to the rows of two classes. The norms of a client's rows are a point, and those f farthest from
    the coordinate-wise median of all clients' points are left out. That flipped labels show in these rows is Jebreel
    et al.'s observation (2022, arXiv 2207.01982), who cluster the two rows that differ most.

    Parameters
    ----------
    updates, weights, f
        See `rules`; weights are not used.
    seen : Seen
        Its `by_class` gives the rows of the last layer; without it they are the updates' own rows, C of them.
    """
    m = updates.shape[-3]
    rows = _last_layer_rows(seen, updates)
    norm = norms(rows.unsqueeze(-2))  # (..., m, classes)
    finite = norm.isfinite().all(-1) & finite_rows(updates)
    point = norm.where(finite.unsqueeze(-1), torch.inf)
    centre = middle(point.unsqueeze(-2), (m - 1) // 2, m // 2 + 1)
    distance = significant((point - centre).square().sum(-1)).where(finite, torch.inf)
    return combined(updates, smallest(distance, m - f, ascending(distance)) / (m - f))


def spectral(updates: Tensor, weights: Tensor, f: int) -> Tensor:
    """Mean (..., C, d) without the f updates that stick out along the top principal component, left out one by one.

    Each time the component is worked out anew from those that remain, so that one far away does not hide the next.
    Shejwalkar and Houmansadr leave all of them out at once, on random coordinates.

    References
    ----------
    Tran, Li, Madry (2018). Spectral signatures in backdoor attacks. arXiv 1811.00636.
    Shejwalkar, Houmansadr (2021). Manipulating the Byzantine. https://doi.org/10.14722/ndss.2021.24498.

    Parameters
    ----------
    updates, weights
        See `rules`; weights are not used.
    f : int
        The number of updates that are left out.
    """
    gram, finite = careful_products(updates)
    m = updates.shape[-3]
    kept = torch.ones_like(finite)
    for _ in range(f):
        share = (kept & finite).double()
        share = share / share.sum(-1, keepdim=True).clamp(min=1.0)
        to_mean = gram - (gram @ share.unsqueeze(-1)) - (gram @ share.unsqueeze(-1)).mT
        to_mean = to_mean + (share.unsqueeze(-2) @ gram @ share.unsqueeze(-1))
        both = (share > 0).unsqueeze(-1) & (share > 0).unsqueeze(-2)
        score = significant(torch.linalg.eigh(to_mean.where(both, 0.0)).eigenvectors[..., -1].abs())
        score = score.where(finite, torch.inf).where(kept, -1.0)
        last = m - 1 - score.flip(-1).argmax(-1, keepdim=True)  # of equal ones the lower client stays
        kept = kept.scatter(-1, last, False)
    return combined(updates, kept.to(updates) / (m - f))


def foolsgold(
    updates: Tensor, weights: Tensor, f: int, *, seen: Seen, state: State | None, kappa: float = 1.0
) -> tuple[Tensor, State]:
    """Sum of the updates over m, each weighted by how unlike the others its client has been in all rounds so far.

    Parameters
    ----------
    updates, weights, f
        As in all rules; f is not used.
    seen : Seen
        Who the clients are; similarity is measured on summed updates of the last layer.
    state : dict or None
        `summed` (..., clients, n), the summed updates of each client.
    kappa : float
        Confidence: how steeply weights rise with dissimilarity.

    Returns
    -------
    aggregate : (..., C, d) tensor
        The plain mean where every weight is 1, as where all clients are alike, so that nobody stands out.
    state : dict
        What the rule is given as `state` in the next round.

    Raises
    ------
    ValueError
        Where kappa is not above 0.

    References
    ----------
    Fung, Yoon, Beschastnikh (2020). The limitations of federated learning in sybil settings. arXiv 1808.04866.
    """
    if not kappa > 0:
        raise ValueError(f"kappa={kappa} must be above 0")
    m = updates.shape[-3]
    finite = finite_rows(updates)
    usable = updates.where(finite[..., None, None], 0.0)
    features = _last_layer_rows(seen, usable).flatten(-2).double()
    clients, total = _numbers(seen, m, updates.device)
    before = features.new_zeros(*features.shape[:-2], total, features.shape[-1]) if state is None else state["summed"]
    summed = before.index_add(-2, clients, features)
    unit = directions(summed[..., clients, :].unsqueeze(-2))
    similarity = (unit @ unit.mT).clamp(min=0)
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    nearest = similarity.amax(-1)
    # a client is pardoned that is like one who is even more like somebody else
    pardon = nearest.unsqueeze(-1) / nearest.unsqueeze(-2).where(nearest.unsqueeze(-2) > 0, 1.0)
    dissimilarity = (1 - (similarity * pardon.clamp(max=1.0)).amax(-1)).clamp(0, 1).where(finite, 0.0)
    largest = dissimilarity.amax(-1, keepdim=True)
    relative = (dissimilarity / largest.where(largest > SMALLEST_DIFFERENCE, 1.0)).clamp(max=0.99)
    weight = (
        (kappa * (torch.logit(relative) + 0.5)).clamp(0, 1).where(largest > SMALLEST_DIFFERENCE, 1.0).where(finite, 0.0)
    )
    return combined(usable, weight / m), {"summed": summed}


def flame(
    updates: Tensor,
    weights: Tensor,
    f: int,
    *,
    seen: Seen,
    noise: float = 0.001,
    of: Literal["models", "updates"] = "models",
) -> Tensor:
    """Mean of the largest cluster of clients, clipped to the median norm, with a little noise.

    The cluster is HDBSCAN's with the paper's parameters, more than half of the clients and one neighbour: what single
    linkage joins first, from the smallest cosine distance on, until there are so many.

    Parameters
    ----------
    updates, weights, f
        As in all rules; f is not used.
    seen : Seen
        The parameters that were broadcast and the learning rate, which tell the clients' models, and the noise.
    noise : float
        Standard deviation of the noise in each parameter, in median norms: the paper's lambda.
    of : "models" or "updates"
        Between what cosines are taken; the paper takes models.

    Returns
    -------
    (..., C, d) tensor

    Raises
    ------
    ValueError
        Where an argument is out of range.

    References
    ----------
    Nguyen et al. (2022). FLAME: Taming backdoors in federated learning. arXiv 2101.02281.
    """
    if not noise >= 0:
        raise ValueError(f"noise={noise} must be 0 or more")
    if of not in ("models", "updates"):
        raise ValueError(f"of={of} is not known; use models or updates")
    m, finite = updates.shape[-3], finite_rows(updates)
    models = updates
    if of == "models" and seen.theta is not None:
        rate = seen.lr.unsqueeze(-3) if isinstance(seen.lr, Tensor) else seen.lr
        models = seen.theta.unsqueeze(-3).double() - rate * updates.double()
    unit = directions(models)
    both = finite.unsqueeze(-1) & finite.unsqueeze(-2)
    distance = (1 - unit @ unit.mT).clamp(min=0).round(decimals=DECIMALS)
    member = largest_cluster(distance.where(both, torch.inf), m // 2 + 1) & finite
    share, _ = clip_shares(updates, None)
    share = torch.where(member, share / member.sum(-1, keepdim=True).clamp(min=1), 0.0)
    found = mean_by_shares(updates.where(member[..., None, None], 0.0), share)
    if noise and seen.noise is not None:
        radius = norms(clip(updates, None)).amax(-1)[..., None, None]  # the median norm
        found = found + (noise * radius * seen.noise().to(radius)).to(found)
    return found


def largest_cluster(distance: Tensor, size: int) -> Tensor:
    """The first cluster that is large enough, as single linkage joins clients by distance.

    Parameters
    ----------
    distance : (..., m, m) tensor
        Distances between the updates of each two clients.
    size : int
        How many clients the cluster must have at least.

    Returns
    -------
    (..., m) tensor of bool
        Who is in it; of two clusters at once, the one with the lowest client.
    """
    m = distance.shape[-1]
    linked = distance.clone()
    linked.diagonal(dim1=-2, dim2=-1).zero_()
    for k in range(m):  # to the shortest of the longest links of all ways between two clients
        linked = torch.minimum(linked, torch.maximum(linked[..., :, k, None], linked[..., None, k, :]))
    link_of_cluster = ascending(linked)[..., size - 1]  # the link at which the cluster of each client has so many
    first = link_of_cluster.argmin(-1, keepdim=True)
    row = linked.gather(-2, first.unsqueeze(-1).expand(*first.shape, m)).squeeze(-2)
    member: Tensor = row <= link_of_cluster.gather(-1, first)
    return member


def directions(updates: Tensor) -> Tensor:
    """Updates (..., m, C, d) as unit vectors (..., m, C d) of float64; zero where one is zero or not finite."""
    whole = updates.flatten(-2).double()
    finite = whole.isfinite().all(-1, keepdim=True)
    whole = whole.where(finite, 0.0)
    # by a power of two, so that no square overflows and a change of scale by one changes no bit
    whole = whole * power_of_two(-exponent_of(whole.abs().amax(-1, keepdim=True)))
    length = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
    unit: Tensor = whole / length.where(length > 0, 1.0)
    return unit


def significant(score: Tensor) -> Tensor:
    """Scores rounded to `BITS` binary digits, so that a rounding error does not tell two equal ones apart."""
    mantissa, exponent = torch.frexp(score)
    found: Tensor = torch.ldexp((mantissa * 2.0**BITS).round() / 2.0**BITS, exponent)
    return found


def _numbers(seen: Seen, m: int, device: torch.device) -> tuple[Tensor, int]:
    """The numbers (m,) of the clients of a round, and how many there are in all."""
    clients = torch.arange(m, device=device) if seen.clients is None else seen.clients.to(device)
    return clients, m if seen.total is None else seen.total


def _last_layer_rows(seen: Seen, updates: Tensor) -> Tensor:
    """The rows (..., m, classes, width) of the last layer in updates (..., m, C, d)."""
    return updates if seen.by_class is None else seen.by_class(updates)
