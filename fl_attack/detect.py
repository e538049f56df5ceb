"""Measures of how much malicious updates differ from honest ones, by what a server could look at.

Shapes: updates (..., m, C, d), malicious (..., m) of bool; leading axes broadcast.
"""

import torch
from torch import Tensor

MEASURES = (
    "norm_z",  # mean over malicious clients: norm in standard deviations above the mean of the honest ones'
    "norm_auc",  # AUC of |z| over all clients as a score of malice: 1 tells all apart, 0.5 none
    "cosine_to_median",  # mean over malicious clients: cosine between update and coordinate-wise median
    "cosine_auc",  # AUC of the negated cosine
    "distance_rank",  # mean over malicious clients: share of honest ones with a smaller mean distance to the others
    "distance_auc",  # AUC of the mean distance to the other clients
)

ROUNDING = 1e-9  # relative difference up to which scores are equal


def measures(updates: Tensor, malicious: Tensor) -> Tensor:
    """All of `MEASURES` for the updates of a round.

    Parameters
    ----------
    updates : (..., m, C, d) tensor
        What the clients sent. An update that is not finite counts as one of infinite norm and distance, and as
        opposite to the median.
    malicious : (..., m) tensor of bool

    Returns
    -------
    (..., 6) tensor of float64
        In the order of `MEASURES`; NaN where there is no malicious client or no honest one.
    """
    flat = updates.flatten(-2).double()  # (..., m, C d)
    finite = flat.isfinite().all(-1)
    flat = flat.where(finite.unsqueeze(-1), 0.0)
    norm = flat.norm(dim=-1)
    deviation = _z_score(norm, finite).abs().where(finite, torch.inf)
    median = _median(flat.where(finite.unsqueeze(-1), torch.nan))
    scale = norm * median.norm(dim=-1, keepdim=True)
    cosine = ((flat * median.unsqueeze(-2)).sum(-1) / scale.where(scale > 0, 1.0)).where(finite, -1.0)
    distance = _distances(flat).sum(-1).where(finite, torch.inf)
    honest = ~malicious
    found = [
        _mean(_z_score(norm, honest & finite).where(finite, torch.inf), malicious),
        auc(deviation, malicious),
        _mean(cosine, malicious),
        auc(-cosine, malicious),
        _mean(_share_below(distance, honest), malicious),
        auc(distance, malicious),
    ]
    undefined = ~(malicious.any(-1) & honest.any(-1))
    return torch.stack(found, -1).masked_fill(undefined.unsqueeze(-1), torch.nan)


def auc(score: Tensor, positive: Tensor) -> Tensor:
    """Area under the receiver operating characteristic.

    Parameters
    ----------
    score : (..., m) tensor
        Scores are equal within rounding: otherwise the last bit would decide between two clients.
    positive : (..., m) tensor of bool

    Returns
    -------
    (...) tensor
        The probability that a positive has a larger score than a negative, equal scores counted as a half; NaN without
        both.
    """
    one, other = score.unsqueeze(-1), score.unsqueeze(-2)
    equal = (one == other) | ((one - other).abs() <= ROUNDING * torch.maximum(one.abs(), other.abs()))
    equal &= one.isfinite() == other.isfinite()
    larger = (one > other) & ~equal
    pairs = (positive.unsqueeze(-1) & ~positive.unsqueeze(-2)).double()
    return ((larger.double() + equal.double() / 2) * pairs).sum((-1, -2)) / pairs.sum((-1, -2))


def _z_score(values: Tensor, reference: Tensor) -> Tensor:
    """Values (..., m) in standard deviations above the mean of the clients of a mask."""
    mean = _mean(values, reference).unsqueeze(-1)
    deviation = _mean((values - mean) ** 2, reference).sqrt().unsqueeze(-1)
    return (values - mean) / deviation.where(deviation > 0, 1.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (...) of values (..., m) over the clients of a mask."""
    return values.where(mask, 0.0).sum(-1) / mask.sum(-1)


def _median(flat: Tensor) -> Tensor:
    """Coordinate-wise median (..., n) of the rows of flat (..., m, n) that are not NaN; zero without any."""
    ordered = flat.sort(-2).values  # NaN last
    count = (~flat.isnan()).sum(-2, keepdim=True).clamp(min=1)
    low, high = (count - 1) // 2, count // 2
    middle = (ordered.gather(-2, low) + ordered.gather(-2, high)) / 2
    return middle.squeeze(-2).nan_to_num(0.0)


def _distances(flat: Tensor) -> Tensor:
    """Euclidean distances (..., m, m) between the rows of flat (..., m, n)."""
    centred = flat - flat.mean(-2, keepdim=True)
    return torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")


def _share_below(score: Tensor, honest: Tensor) -> Tensor:
    """Share (..., m) of the honest clients whose score is below each client's."""
    below = (score.unsqueeze(-1) > score.unsqueeze(-2)) & honest.unsqueeze(-2)
    return below.sum(-1) / honest.sum(-1, keepdim=True)
