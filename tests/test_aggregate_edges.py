"""Rules at the edges of their arguments, found by breaking their lines: what no other test notices."""

import numpy as np
import pytest
import torch

from fl_attack import aggregate
from fl_attack.aggregate import rules


def combined(updates: torch.Tensor, name: str, **more: object) -> torch.Tensor:
    """What a rule makes of updates (m, C, d) that weigh the same."""
    m = len(updates)
    rule = aggregate.make(name, f=1, m=m, **more)  # type: ignore[arg-type]
    return rule(updates, torch.ones(m), torch.arange(m))


@pytest.mark.parametrize("clients", [5, 12, 30])
@pytest.mark.parametrize("most", [1, 2, 4, 6])
def test_the_geometric_median_takes_no_more_steps_than_it_may(clients: int, most: int) -> None:
    u = np.random.default_rng(clients).normal(size=(clients, 2, 40)) * np.linspace(1, 2, clients)[:, None, None]
    at = u.mean(0)
    for _ in range(most):
        nearer = 1 / np.sqrt(((u - at) ** 2).sum((1, 2)))
        at = np.tensordot(nearer / nearer.sum(), u, 1)
    found = combined(torch.from_numpy(u), "geometric_median", args={"most": most, "tolerance": 1e-12})
    np.testing.assert_allclose(found, at, rtol=0, atol=1e-12)
    if most == 1:  # however little would be left to do
        for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            args = {"most": 1, "tolerance": tolerance}
            found = combined(torch.from_numpy(u), "geometric_median", args=args)
            np.testing.assert_allclose(found, at, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule", ["CenteredClipping", "GeometricMedian", "Median", "TrMean", "MultiKrum", "MoNNA", "MDA"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_updates_that_are_all_equal_are_what_byzfls_rules_give_without_a_warning(rule: str, value: float) -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (the extra byzfl)")
    updates = torch.full((7, 2, 3), value)
    found = combined(updates, "byzfl", rule=rule)
    assert found.shape == (2, 3)
    if rule != "CenteredClipping" and (rule, value) != (
        "GeometricMedian",
        1e30,
    ):  # clipped, and too large for its squares
        torch.testing.assert_close(found, updates[0])


def test_a_rule_whose_sums_overflow_is_computed_on_smaller_numbers_where_they_do() -> None:
    def mean(updates: torch.Tensor, weights: torch.Tensor, f: int) -> torch.Tensor:
        return updates.sum(-3) / updates.shape[-3]

    updates = torch.tensor([[1.5e308, 3.0]], dtype=torch.float64).expand(4, 1, 2)
    assert mean(updates, torch.ones(4), 0).isinf().tolist() == [[True, False]]
    assert rules.in_range(mean)(updates, torch.ones(4), 0).tolist() == [[1.5e308, 3.0]]
