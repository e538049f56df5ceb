"""Measures of malicious updates: against plain numpy, and on updates of which the answer is known."""

import math

import numpy as np
import pytest
import torch

from fl_attack import detect
from fl_attack.detect import MEASURES
from fl_attack.history import COLUMNS, recovered, rounds_to_recover


def measured(updates: torch.Tensor, malicious: list[bool]) -> dict[str, float]:
    return dict(zip(MEASURES, detect.measures(updates, torch.tensor(malicious)).tolist(), strict=True))


def test_the_measures_are_what_they_say() -> None:
    u = torch.randn(9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    malicious = [i in (1, 4, 5) for i in range(9)]
    found = measured(u, malicious)
    flat, bad = u.flatten(1).numpy(), np.array(malicious)
    norm = np.linalg.norm(flat, axis=1)
    median = np.median(flat, 0)
    cosine = flat @ median / norm / np.linalg.norm(median)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1).sum(1)

    def auc(score: np.ndarray) -> float:
        return float(np.mean([one > other for one in score[bad] for other in score[~bad]]))

    assert found["norm_z"] == pytest.approx(((norm[bad] - norm[~bad].mean()) / norm[~bad].std()).mean())
    assert found["norm_auc"] == pytest.approx(auc(np.abs(norm - norm.mean())))
    assert found["cosine_to_median"] == pytest.approx(cosine[bad].mean())
    assert found["cosine_auc"] == pytest.approx(auc(-cosine))
    assert found["distance_auc"] == pytest.approx(auc(distance))
    share = [(distance[~bad] < one).mean() for one in distance[bad]]
    assert found["distance_rank"] == pytest.approx(np.mean(share))


def test_what_is_far_larger_is_told_apart_by_all_and_a_copy_by_none() -> None:
    u = torch.randn(10, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1 + 1
    malicious = [i >= 8 for i in range(10)]
    u[8:] = -20.0
    found = measured(u, malicious)
    assert found["norm_auc"] == found["cosine_auc"] == found["distance_auc"] == found["distance_rank"] == 1.0
    u[:] = u[0]
    found = measured(u, malicious)
    assert found["norm_auc"] == found["cosine_auc"] == found["distance_auc"] == 0.5


def test_updates_that_are_not_finite_are_told_apart_without_a_stir() -> None:
    u = torch.randn(6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u[3] = math.nan
    found = measured(u, [i == 3 for i in range(6)])
    assert found["norm_auc"] == found["distance_auc"] == 1.0


@pytest.mark.parametrize("malicious", [[False] * 4, [True] * 4])
def test_nothing_is_measured_without_two_kinds_of_clients(malicious: list[bool]) -> None:
    u = torch.ones(4, 1, 2, dtype=torch.float64)
    assert all(math.isnan(value) for value in measured(u, malicious).values())


def test_leading_axes_do_not_mix() -> None:
    u = torch.randn(4, 7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    malicious = torch.stack([torch.arange(7) % 4 == i for i in range(4)])
    one_by_one = torch.stack([detect.measures(cell, mine) for cell, mine in zip(u, malicious, strict=True)])
    torch.testing.assert_close(detect.measures(u, malicious), one_by_one)


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.9, 0.9, 0.5, 0.6, 0.9, 0.9], 20),
        ([0.9, 0.9, 0.5, 0.9, 0.6, 0.9], 30),  # it falls back once more
        ([0.9, 0.9, 0.895, 0.9, 0.9, 0.9], 0),
        ([0.9, 0.9, 0.5, 0.6, 0.7, 0.8], math.nan),
        ([0.1, 0.1, 0.9, 0.9, 0.9, 0.9], 0),  # what was before does not count
    ],
)
def test_recovered_is_from_where_accuracy_stays_near_that_of_the_twin(accuracy: list[float], expected: float) -> None:
    rounds = np.arange(6) * 10.0
    found = rounds_to_recover(rounds, np.array(accuracy), np.full(6, 0.9), 20)
    assert found == pytest.approx(expected, nan_ok=True)
    assert math.isnan(rounds_to_recover(rounds, np.array(accuracy), np.full(6, 0.9), None))


def test_recovery_of_rows_is_none_without_an_end_or_with_other_rows_than_the_twins() -> None:
    table, twin = np.full((2, 3, len(COLUMNS)), np.nan)
    table[:, COLUMNS.index("round")] = 0, 10, 20
    table[:, COLUMNS.index("test_accuracy")], twin[:, COLUMNS.index("test_accuracy")] = (0.1, 0.5, 0.9), 0.9
    assert recovered(table, twin, 10) == 10 and recovered(table, twin, 20) == 0
    assert recovered(table, twin, None) is None and recovered(table[:2], twin, 10) is None
    assert recovered(twin * 0, twin, 10) is None
