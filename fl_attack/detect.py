"""How plainly malicious updates differ from honest ones, by what a server could look at.

Shapes: updates (..., m, C, d), malicious (..., m) bool; leading axes broadcast.
"""

import torch
from torch import Tensor

MEASURES = (
    "norm_z",  # mean over malicious clients: norm in standard deviations above the mean of the honest ones'
    "norm_auc",  # how well |z| over all clients tells malicious from honest: 1 perfectly, 0.5 not at all
    "cosine_to_median",  # mean over malicious clients: cosine between update and coordinate-wise median
    "cosine_auc",  # how well a small one tells malicious from honest
    "distance_rank",  # mean over malicious clients: share of honest ones that are nearer to the others, on average
    "distance_auc",  # how well a large mean distance to the other clients tells malicious from honest
)

ROUNDING = 1e-9


def measures(updates: Tensor, malicious: Tensor) -> Tensor:
    """`MEASURES` (..., 6) in float64; NaN where there is no malicious client or no honest one.

    An update that is not finite counts as one of infinite norm and distance, and as opposite to the median.
    """
    flat = updates.flatten(-2).double()  # (..., m, C d)
    finite = flat.isfinite().all(-1)
    flat = flat.where(finite.unsqueeze(-1), 0.0)
    norm = flat.norm(dim=-1)
    deviating = _z(norm, finite).abs().where(finite, torch.inf)
    median = _median(flat.where(finite.unsqueeze(-1), torch.nan))
    scale = norm * median.norm(dim=-1, keepdim=True)
    cosine = ((flat * median.unsqueeze(-2)).sum(-1) / scale.where(scale > 0, 1.0)).where(finite, -1.0)
    distance = _distances(flat).sum(-1).where(finite, torch.inf)
    honest = ~malicious
    found = [
        _mean(_z(norm, honest & finite).where(finite, torch.inf), malicious),
        auc(deviating, malicious),
        _mean(cosine, malicious),
        auc(-cosine, malicious),
        _mean(_share_below(distance, honest), malicious),
        auc(distance, malicious),
    ]
    undefined = ~(malicious.any(-1) & honest.any(-1))
    return torch.stack(found, -1).masked_fill(undefined.unsqueeze(-1), torch.nan)


def auc(score: Tensor, positive: Tensor) -> Tensor:
    """Probability (...,) that a positive of (..., m) has a larger score than a negative; equal ones count half.

    Scores are equal within rounding: otherwise the last bit would decide between two clients.
    """
    one, other = score.unsqueeze(-1), score.unsqueeze(-2)
    equal = (one == other) | ((one - other).abs() <= ROUNDING * torch.maximum(one.abs(), other.abs()))
    equal &= one.isfinite() == other.isfinite()
    larger = (one > other) & ~equal
    pairs = (positive.unsqueeze(-1) & ~positive.unsqueeze(-2)).double()
    return ((larger.double() + equal.double() / 2) * pairs).sum((-1, -2)) / pairs.sum((-1, -2))


def _z(values: Tensor, of: Tensor) -> Tensor:
    mean = _mean(values, of).unsqueeze(-1)
    deviation = _mean((values - mean) ** 2, of).sqrt().unsqueeze(-1)
    return (values - mean) / deviation.where(deviation > 0, 1.0)


def _mean(values: Tensor, of: Tensor) -> Tensor:
    return values.where(of, 0.0).sum(-1) / of.sum(-1)


def _median(flat: Tensor) -> Tensor:
    """Of (..., m, n), the middle of the finite rows or the mean of the two middle ones."""
    ordered = flat.sort(-2).values  # NaN last
    count = (~flat.isnan()).sum(-2, keepdim=True).clamp(min=1)
    low, high = (count - 1) // 2, count // 2
    middle = (ordered.gather(-2, low) + ordered.gather(-2, high)) / 2
    return middle.squeeze(-2).nan_to_num(0.0)


def _distances(flat: Tensor) -> Tensor:
    centred = flat - flat.mean(-2, keepdim=True)
    return torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")


def _share_below(score: Tensor, honest: Tensor) -> Tensor:
    below = (score.unsqueeze(-1) > score.unsqueeze(-2)) & honest.unsqueeze(-2)
    return below.sum(-1) / honest.sum(-1, keepdim=True)
