"""The numerical floor in the bounds of `equivalence`: a law that rounding has moved is still covered."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from me_stats.equivalence import TVBound, equivalence_pvalue, tv_lower_bound, tv_upper_bound, tv_upper_bound_cells

Floats = NDArray[np.float64]
LAW = np.full(16, 1 / 16)
COUNTS = np.random.default_rng(0).multinomial(20_000, LAW)
FLOOR = 0.01


def moved(law: Floats, tv: float) -> Floats:
    """The law at this TV with the smallest chi-square divergence: where the bounds are tightest."""
    return law * (1 + 2 * tv * np.where(np.arange(law.size) % 2, 1.0, -1.0))


@pytest.mark.parametrize("bound", [tv_upper_bound_cells, tv_upper_bound])
def test_upper_bounds_grow_by_the_floor(bound: Callable[..., TVBound]) -> None:
    plain, floored = bound(COUNTS, LAW), bound(COUNTS, LAW, floor=FLOOR)
    assert floored.upper == pytest.approx(plain.upper + FLOOR, abs=1e-15)
    assert floored.null_value == pytest.approx(plain.null_value + FLOOR, abs=1e-15)
    assert (floored.lower, floored.statistic, floored.n) == (plain.lower, plain.statistic, plain.n)
    assert bound(COUNTS, LAW, floor=0.0) == plain
    assert bound(COUNTS, LAW, floor=1.0).upper == 1.0
    assert bound(COUNTS, LAW, floor=1.0).null_value == 1.0


def test_lower_bound_shrinks_by_the_floor() -> None:
    select, test = np.array([600, 400]), np.array([590, 410])
    plain = tv_lower_bound(select, test, [0.5, 0.5])
    assert tv_lower_bound(select, test, [0.5, 0.5], floor=0.05).lower == pytest.approx(plain.lower - 0.05)
    assert tv_lower_bound(select, test, [0.5, 0.5], floor=0.1).lower == 0.0
    assert tv_lower_bound(select, test, [0.5, 0.5], floor=0.1).statistic == plain.statistic


def test_equivalence_tests_the_margin_less_the_floor() -> None:
    assert equivalence_pvalue(COUNTS, LAW, 0.03, floor=0.01) == pytest.approx(equivalence_pvalue(COUNTS, LAW, 0.02))
    assert equivalence_pvalue(COUNTS, LAW, 0.03) == equivalence_pvalue(COUNTS, LAW, 0.03, floor=0.0)
    bound = tv_upper_bound_cells(COUNTS, LAW, floor=FLOOR)
    assert equivalence_pvalue(COUNTS, LAW, bound.upper, floor=FLOOR) <= 0.05 + 1e-9


# The worst case: the true law, the one computed with rounding and the one drawn from lie on one line.
def test_coverage_of_the_true_law_needs_the_floor() -> None:
    """Draws at TV .03 from the true law, tested against a computed one at .02 from the draws: 400 runs."""
    drawn, computed = moved(LAW, 0.03), moved(LAW, FLOOR)
    rng, n = np.random.default_rng(1), 20_000
    draws = rng.multinomial(n, drawn, size=400)
    truth = 0.5 * np.abs(drawn - LAW).sum()
    covered = np.mean([tv_upper_bound_cells(row, computed, floor=FLOOR).upper >= truth for row in draws])
    assert 0.92 <= covered <= 0.98
    assert np.mean([tv_upper_bound_cells(row, computed).upper >= truth for row in draws]) < 0.5
    rejected = np.mean([equivalence_pvalue(row, computed, truth, floor=FLOOR) <= 0.05 for row in draws])
    assert 0.02 <= rejected <= 0.08
    assert np.mean([equivalence_pvalue(row, computed, truth) <= 0.05 for row in draws]) > 0.5


def test_a_right_sampler_with_rounding_is_not_called_a_bug() -> None:
    """Enough draws find the rounding itself; less the floor, the lower bound stays at 0."""
    computed = moved(LAW, FLOOR)
    halves = np.random.default_rng(2).multinomial(10**6, LAW, size=2)
    assert tv_lower_bound(*halves, computed).lower > 0.008
    assert tv_lower_bound(*halves, computed, floor=FLOOR).lower == 0.0
    # A bug that is larger than the floor is still seen.
    wrong = np.random.default_rng(3).multinomial(10**6, moved(LAW, -0.03), size=2)
    assert 0.02 < tv_lower_bound(*wrong, computed, floor=FLOOR).lower < 0.03


@pytest.mark.parametrize("floor", [-0.01, 1.01, math.nan])
def test_bad_floors_are_refused(floor: float) -> None:
    for call in (
        lambda: tv_upper_bound(COUNTS, LAW, floor=floor),
        lambda: tv_upper_bound_cells(COUNTS, LAW, floor=floor),
        lambda: tv_lower_bound(COUNTS, COUNTS, LAW, floor=floor),
        lambda: equivalence_pvalue(COUNTS, LAW, 0.5, floor=floor),
    ):
        with pytest.raises(ValueError, match=r"floor is (-0\.01|1\.01|nan)"):
            call()


@pytest.mark.parametrize("floor", [0.02, 0.03])
def test_a_margin_within_the_floor_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=rf"floor {floor} reaches margin 0.02: no number of draws"):
        equivalence_pvalue(COUNTS, LAW, 0.02, floor=floor)
