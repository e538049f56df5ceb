"""Measures of how much malicious updates differ from honest ones, by what a server could look at.

Shapes: updates (..., m, C, d), malicious (..., m) of bool; leading axes broadcast.
"""

import torch
from torch import Tensor

from fl_attack.aggregate.geometry import gram_of
from fl_attack.aggregate.ordering import middle

MEASURES = (
    "norm_z",  # mean over malicious clients: norm in standard deviations above the mean of the honest ones'
    "norm_auc",  # AUC of |z| over all clients as a score of malice: 1 tells all apart, 0.5 none
    "cosine_to_median",  # mean over malicious clients: cosine between update and coordinate-wise median
    "cosine_auc",  # AUC of the negated cosine
    "distance_rank",  # mean over malicious clients: share of honest ones with a smaller mean distance to the others
    "distance_auc",  # AUC of the mean distance to the other clients
)

ROUNDING = 1e-9  # relative difference up to which scores are equal
CLOSE = 1e-5  # share of the squared norms below which a squared distance from products has lost digits that count
PAIRS = 2**12  # pairs of clients that are subtracted at a time


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
    median = _median(flat, finite)
    scale = norm * median.norm(dim=-1, keepdim=True)
    cosine = ((flat * median.unsqueeze(-2)).sum(-1) / scale.where(scale > 0, 1.0)).where(finite, -1.0)
    distance = _distances(flat, median).sum(-1).where(finite, torch.inf)
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
        Scores that differ by rounding alone count as equal: otherwise the last bit would decide between two clients.
    positive : (..., m) tensor of bool

    Returns
    -------
    (...) tensor
        The probability that a positive has a larger score than a negative, equal scores counted as a half; NaN without
        both.
    """
    ordered, count = _ordered(score, ~positive)
    # equal is what lies between: the larger of two numbers that differ by the share r is 1 / (1 - r) times the smaller
    ends = torch.stack([score * (1 - ROUNDING), score / (1 - ROUNDING)])
    below = torch.searchsorted(ordered, ends.amin(0).contiguous()).minimum(count)
    below_or_equal = torch.searchsorted(ordered, ends.amax(0).contiguous(), right=True).minimum(count)
    wins = (below + below_or_equal).double() / 2
    return wins.where(positive, 0.0).sum(-1) / (positive.sum(-1) * count.squeeze(-1))


def _z_score(values: Tensor, reference: Tensor) -> Tensor:
    """Values (..., m) in standard deviations above the mean of the clients of a mask."""
    mean = _mean(values, reference).unsqueeze(-1)
    deviation = _mean((values - mean) ** 2, reference).sqrt().unsqueeze(-1)
    return (values - mean) / deviation.where(deviation > 0, 1.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (...) of values (..., m) over the clients of a mask."""
    return values.where(mask, 0.0).sum(-1) / mask.sum(-1)


def _median(flat: Tensor, finite: Tensor) -> Tensor:
    """Coordinate-wise median (..., n) of the rows of flat (..., m, n) that are finite (..., m); zero without any."""
    m = flat.shape[-2]
    if bool(finite.all()):
        return middle(flat.unsqueeze(-1), (m - 1) // 2, m // 2 + 1).squeeze(-1)
    flat = flat.where(finite.unsqueeze(-1), torch.nan)
    ordered = flat.sort(-2).values  # NaN last
    count = (~flat.isnan()).sum(-2, keepdim=True).clamp(min=1)
    low, high = (count - 1) // 2, count // 2
    both = ordered.gather(-2, low) + ordered.gather(-2, high)
    return (both / 2).squeeze(-2).nan_to_num(0.0)


def _distances(flat: Tensor, centre: Tensor) -> Tensor:
    """Euclidean distances (..., m, m) between the rows of flat (..., m, n), of which most are around a centre (..., n).

    By one product, but for rows so close that it would cost digits: these are subtracted.
    """
    away = flat - centre.unsqueeze(-2)
    products = gram_of(away.unsqueeze(-2))
    square = products.diagonal(dim1=-2, dim2=-1)
    both = square.unsqueeze(-1) + square.unsqueeze(-2)
    squared = both.sub(products, alpha=2)
    close = (squared < CLOSE * both).triu(1).nonzero(as_tuple=True)
    squared.clamp_(min=0).diagonal(dim1=-2, dim2=-1).zero_()
    *cells, one, other = close
    for start in range(0, len(one), PAIRS):
        part = slice(start, start + PAIRS)
        at, i, j = tuple(cell[part] for cell in cells), one[part], other[part]
        exact = (flat[(*at, i)] - flat[(*at, j)]).square().sum(-1)
        squared[(*at, i, j)] = squared[(*at, j, i)] = exact
    return squared.sqrt_()


def _share_below(score: Tensor, honest: Tensor) -> Tensor:
    """Share (..., m) of the honest clients whose score is below each client's."""
    ordered, count = _ordered(score, honest)
    return torch.searchsorted(ordered, score.contiguous()).minimum(count) / count


def _ordered(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (..., m) of the clients of a mask in ascending order, before Inf for the others; and their number."""
    ordered: Tensor = score.where(mask, torch.inf).sort(-1).values.contiguous()
    return ordered, mask.sum(-1, keepdim=True)
