"""What a minority of updates can do to each rule, at every scale: no more than the rule's bound says."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_attack.aggregate import PRE, RULES, Seen, make

Bound = Callable[[Tensor, int, int], float]  # honest updates (h, d), m, f: the largest distance to their mean
EXTREMES = [1e-45, 1e-30, 1e-22, 1.0, 1e6, 1e12, 1e18, 1e20, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]


def spread(honest: Tensor) -> float:
    """Root of the mean squared distance to their mean."""
    return float((honest - honest.mean(0)).square().sum(-1).mean().sqrt())


def diameter(honest: Tensor) -> float:
    return float(torch.cdist(honest, honest).max())


def kappa(factor: Callable[[float], float]) -> Bound:
    """A bound of Allouah et al. 2023, table 1 (https://arxiv.org/abs/2302.01772): root of kappa times the spread."""
    return lambda honest, m, f: math.sqrt(factor(f / (m - 2 * f))) * spread(honest)


BOUNDS: dict[str, Bound] = {
    "krum": kappa(lambda r: 6 * (1 + r)),
    "geometric_median": kappa(lambda r: 4 * (1 + r) ** 2),
    "median": kappa(lambda r: 4 * (1 + r) ** 2),
    "trimmed_mean": kappa(lambda r: 6 * r * (1 + r)),
    # what is chosen has an honest update among the neighbours that its score, no larger than an honest one's, sums over
    "multi_krum": lambda honest, m, f: (1 + math.sqrt(m - f - 2)) * diameter(honest),
    # in each coordinate the median lies among the honest, and what is kept no further from it than these
    "meamed": lambda honest, m, f: 2 * float((honest.amax(0) - honest.amin(0)).norm()),
    "bulyan": lambda honest, m, f: 2 * (1 + math.sqrt(m)) * diameter(honest),
    # three steps of at most the median distance, each of which adds to it, from a point among the honest
    "centered_clipping": lambda honest, m, f: 8 * float((honest.amax(0) - honest.amin(0)).norm()),
    # nobody is longer than the median norm
    "norm_clipping": lambda honest, m, f: 2 * float(honest.norm(dim=-1).max()),
    # who stays projects no further than an honest update that went, nor is further away than all projections
    "spectral": lambda honest, m, f: 2 * m * diameter(honest),
    # nobody is longer than what the server trusts
    "fltrust": lambda honest, m, f: 2 * float(honest.norm(dim=-1).max()),
    "cosine_history": lambda honest, m, f: 2 * float(honest.norm(dim=-1).max()),
    "flame": lambda honest, m, f: 2 * float(honest.norm(dim=-1).max()),
    # the norm of who stays is no further from the median norm than that of an honest update that went
    "class_norms": lambda honest, m, f: 4 * float(honest.norm(dim=-1).max()),
}


def test_every_rule_has_its_bound() -> None:
    assert set(BOUNDS) == {name for name, row in RULES.items() if "minority" not in row.breaks}


def apply(name: str, f: int, updates: Tensor) -> Tensor:
    m = len(updates)
    # what the server trusts goes the way of the median client; the largest of several exponents, where half are wild
    seen = Seen(root=lambda: updates.nan_to_num(0.0, 0.0, 0.0).median(0).values.view(1, -1))
    return make(name, f=f, m=m)(updates.view(m, 1, -1), torch.ones(m), torch.arange(m), seen).flatten()


@st.composite
def federations(draw: st.DrawFn, name: str) -> tuple[Tensor, Tensor, int]:
    """Updates, who is honest, and f: the others hold anything."""
    m, d = draw(st.integers(7, 12)), draw(st.integers(1, 4))
    f = draw(st.integers(1, min(RULES[name].max_f(m), (m - 1) // 2)))
    seed, shift = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 3.0, 1000.0]))
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(m, d, generator=generator) + shift
    malicious = torch.randperm(m, generator=generator)[:f]
    for at in malicious.tolist():
        updates[at] = torch.tensor([draw(st.sampled_from(EXTREMES)) for _ in range(d)])
    honest = torch.ones(m, dtype=torch.bool)
    honest[malicious] = False
    return updates, honest, f


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_whatever_a_minority_sends_the_result_stays_within_the_bound(name: str, dtype: torch.dtype) -> None:
    @settings(max_examples=40)
    @given(federations(name))
    def check(drawn: tuple[Tensor, Tensor, int]) -> None:
        updates, honest, f = drawn
        found = apply(name, f, updates.to(dtype)).double()
        good = updates[honest].double()
        allowed = BOUNDS[name](good, len(updates), f)
        assert float((found - good.mean(0)).norm()) <= allowed * (1 + 1e-5) + 1e-6 * float(good.abs().max())

    check()


@pytest.mark.parametrize("name", RULES)
def test_a_change_of_scale_by_a_power_of_two_is_exact(name: str) -> None:
    @settings(max_examples=40)
    @given(federations(name), st.integers(-100, 100), st.booleans())
    def check(drawn: tuple[Tensor, Tensor, int], power: int, double: bool) -> None:
        updates, _, f = drawn
        updates = updates.nan_to_num(1.0, 2.0**12, -(2.0**12)).clamp(-(2.0**24), 2.0**24)
        updates = updates.where(updates.abs() > 2.0**-12, 0.5).to(torch.float64 if double else torch.float32)
        found = apply(name, f, updates)
        assert torch.equal(apply(name, f, updates * 2.0**power), found * 2.0**power)

    check()


@pytest.mark.parametrize("name", PRE)
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-40, 1.0, 2.0**40, 2.0**100])
def test_so_it_is_for_what_goes_before_a_rule(name: str, scale: float) -> None:
    updates = torch.randn(9, 1, 5, generator=torch.Generator().manual_seed(3)) + 2
    before, *_ = PRE[name].apply(updates, torch.ones(9), 2, torch.arange(9))
    after, *_ = PRE[name].apply(updates * scale, torch.ones(9), 2, torch.arange(9))
    torch.testing.assert_close(after / scale, before, rtol=2e-6, atol=0)
    if name != "nnm":
        assert torch.equal(after, before * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e15, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("others", [0, 6])
def test_one_large_update_does_not_move_the_geometric_median(size: float, dtype: torch.dtype, others: int) -> None:
    honest = torch.tensor([1.0, 1.01, 0.99, 1.005, *[1.0 + i / 1000 for i in range(others)]], dtype=dtype)
    updates = torch.cat([honest, honest.new_tensor([size])]).unsqueeze(-1)
    found = float(apply("geometric_median", 1, updates))
    assert 0.99 <= found <= 1.01
    ordered = updates.flatten().sort().values
    low, high = float(ordered[(len(updates) - 1) // 2]), float(ordered[len(updates) // 2])
    assert low - 1e-4 <= found <= high + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_krum_breaks_ties_of_whole_numbers_to_the_lower_client(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        updates = torch.randint(0, 2, (7, 6), generator=generator).to(dtype)
        apart = (updates[:, None] - updates[None]).square().sum(-1)
        apart.fill_diagonal_(math.inf)
        best = int(apart.sort(-1).values[:, :3].sum(-1).argmin())
        assert torch.equal(apply("krum", 2, updates), updates[best])


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-22, 1e18, 1e30, 3e37])
@pytest.mark.parametrize("name", BOUNDS)
def test_single_precision_is_right_at_every_scale(name: str, scale: float) -> None:
    updates = torch.randn(9, 5, generator=torch.Generator().manual_seed(7)) + 1
    small = (updates.double() * scale).float()
    exact = apply(name, 1, small.double())
    torch.testing.assert_close(apply(name, 1, small).double() / scale, exact / scale, rtol=1e-5, atol=1e-6)
