"""P-values in the tail: exact sizes where outcomes can be enumerated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from me_stats.tails import (
    finite_sample_critical,
    finite_sample_pvalue,
    supermartingale_critical,
    supermartingale_pvalue,
    trusted_level,
    trusted_pvalue,
)
from tests.laws import LEVELS


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("p", [0.5, 0.1, 0.003])
def test_finite_sample_bound_holds_for_every_outcome(n: int, p: float) -> None:
    c = np.arange(n + 1)
    mass = stats.binom.pmf(c, n, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        g = 2 * np.nansum([c * np.log(c / (n * p)), (n - c) * np.log((n - c) / (n * (1 - p)))], axis=0)
    for value in g:
        assert finite_sample_pvalue(max(value, 0.0), 2) >= mass[g >= value].sum() - 1e-12


def test_finite_sample_bound_in_the_log_domain() -> None:
    assert finite_sample_pvalue(1200.0, 2) == pytest.approx(np.exp(1 - 600 + np.log(600)), rel=1e-9)
    assert 0 < finite_sample_pvalue(1400.0, 2) < 1e-290
    assert finite_sample_pvalue(1e9, 64) == 0.0
    assert finite_sample_pvalue(5.0, 1) == 1.0
    with pytest.raises(ValueError, match="cells"):
        finite_sample_pvalue(1.0, 0)
    with pytest.raises(ValueError, match="non-negative"):
        finite_sample_pvalue(float("nan"), 3)


@pytest.mark.parametrize("p", [0.5, 0.05])
def test_supermartingale_bound_has_exact_size(p: float) -> None:
    # A biased walk of 400 steps, and the grid of outcomes is enumerable: P(pvalue <= level) <= level, no factor.
    n, c = 400, np.arange(401)
    variation = c * (1 - p) ** 2 + (n - c) * p**2
    pvalues = np.array(
        [supermartingale_pvalue([k - n * p], [[v]], [[n * p * (1 - p)]]) for k, v in zip(c, variation, strict=True)]
    )
    mass = stats.binom.pmf(c, n, p)
    for level in LEVELS:
        assert mass[pvalues <= level].sum() <= level
    assert pvalues.min() < 1e-12


def test_delyon_inequality() -> None:
    x = np.linspace(-60, 60, 200_001)
    assert (np.exp(x - x**2 / 6) <= 1 + x + x**2 / 3 + 1e-12).all()


def test_trusted_level_is_monotone_and_gives_up_below_four_draws() -> None:
    levels = [trusted_level(k) for k in (0.0, 0.01, 0.1, 0.3, 0.5, 0.51, 9.0)]
    assert levels == sorted(levels)
    assert levels[0] == 0.0
    assert levels[-2:] == [1.0, 1.0]


@pytest.mark.parametrize("level", LEVELS)
def test_critical_values_invert_the_bounds(level: float) -> None:
    for cells in (2, 10, 64):
        assert finite_sample_pvalue(finite_sample_critical(level, cells), cells) == pytest.approx(level)
    for df in (1, 3, 31):
        for variance in np.geomspace(20, 1e10, 30):
            total = np.eye(df)[0] * np.sqrt(supermartingale_critical(level, df) * variance)
            covariance = np.eye(df) * variance
            assert supermartingale_pvalue(total, covariance, covariance) <= level


def test_the_combined_pvalue_never_goes_below_the_tail_nor_below_an_unproven_level() -> None:
    for statistic in np.linspace(0, 60, 25):
        tail = stats.chi2.sf(statistic, 2)
        for bound in (1.0, 1e-3, 1e-5, 1e-30):
            pvalue, _ = trusted_pvalue(statistic, 2, 1e-4, bound, "bound")
            assert pvalue == max(tail, min(1e-4, bound))
