"""One chi-square test: exact sizes where outcomes can be enumerated, scipy as oracle, edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from me_stats.chi_square import ScoreSums, chi_square_gof, score_chi_square
from tests.laws import LEVELS


@pytest.mark.parametrize("n", [1, 9, 30, 200, 2000])
@pytest.mark.parametrize("p", [0.5, 0.2, 0.03, 0.004])
def test_exact_size_of_pearson_on_two_cells(n: int, p: float) -> None:
    # Binomial, so the size is a sum: at most twice the level at every level, which is what `trusted_level` promises.
    c = np.arange(n + 1)
    pvalues = np.array([chi_square_gof([k, n - k], [p, 1 - p]).pvalue for k in c])
    mass = stats.binom.pmf(c, n, p)
    for level in LEVELS:
        assert mass[pvalues <= level].sum() <= 2.2 * level


def test_plain_chi_square_tail_fails_that_size() -> None:
    c, n, p = np.arange(2001), 2000, 0.004
    plain = np.array([stats.chisquare([k, n - k], [n * p, n * (1 - p)]).pvalue for k in c])
    assert stats.binom.pmf(c, n, p)[plain <= 1e-6].sum() > 10e-6


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(2, 40))
def test_statistics_agree_with_scipy(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(cells, 5.0)) * 0.5 + 0.5 / cells
    n = 100 * cells
    c = rng.multinomial(n, p)
    result = chi_square_gof(c, p)
    assert result.statistic == pytest.approx(stats.chisquare(c, n * p).statistic)
    assert result.g_statistic == pytest.approx(stats.power_divergence(c, n * p, lambda_="log-likelihood").statistic)
    assert result.df == cells - 1
    assert result.method != "chi-square tail" or result.pvalue == pytest.approx(stats.chisquare(c, n * p).pvalue)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(1, 30), n=st.integers(1, 200), alpha=st.floats(0.01, 5))
def test_any_input_gives_a_pvalue_that_ignores_the_order_of_cells(seed: int, cells: int, n: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(cells, alpha))
    p[rng.random(cells) < 0.2] = 0
    p = p / p.sum() if p.sum() > 0 else np.eye(cells)[0]
    c = rng.multinomial(n, rng.dirichlet(np.ones(cells)))
    shuffle = rng.permutation(cells)
    one, two = chi_square_gof(c, p), chi_square_gof(c[shuffle], p[shuffle])
    assert 0 <= one.pvalue <= 1
    assert one.min_detectable_tv > 0
    assert two.pvalue == pytest.approx(one.pvalue)
    assert (one.pvalue == 0.0) or one.impossible == 0


def test_pooling_looks_at_the_null_only() -> None:
    p = np.array([0.6, 0.38, 0.01, 0.006, 0.004])
    results = [chi_square_gof(c, p) for c in ([60, 38, 1, 1, 0], [0, 0, 100, 0, 0], [50, 50, 0, 0, 0])]
    assert {(r.df, r.cells, r.pooled_cells) for r in results} == {(1, 5, 4)}  # 2 expected in three cells: take the next


def test_degenerate_partitions() -> None:
    assert chi_square_gof([7], [1.0]).pvalue == 1.0
    assert chi_square_gof([7, 0], [1.0, 0.0]).method == "no information"
    assert chi_square_gof([1, 0, 0], [0.2, 0.3, 0.5]).pvalue == 1.0
    leaked = chi_square_gof([7, 1], [1.0, 0.0])
    assert (leaked.pvalue, leaked.statistic, leaked.impossible, leaked.rejected) == (0.0, np.inf, 1, True)


@pytest.mark.parametrize(
    ("counts", "probs", "message"),
    [
        ([1, 2], [0.5, 0.3, 0.2], "one length"),
        ([1, -1], [0.5, 0.5], "non-negative integers"),
        ([0.5, 0.5], [0.5, 0.5], "non-negative integers"),
        ([1, 2], [0.5, 0.6], "sum to one"),
        ([1, 2], [np.nan, 0.5], "sum to one"),
        ([0, 0], [0.5, 0.5], "at least one draw"),
    ],
)
def test_bad_input(counts: list[float], probs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chi_square_gof(counts, probs)
    with pytest.raises(ValueError, match="level"):
        chi_square_gof([1, 1], [0.5, 0.5], level=0)


@pytest.mark.parametrize("level", [1e-3, 1e-9])
def test_minimum_detectable_tv_is_found_four_times_in_five(level: float) -> None:
    # The least favourable departure of that TV: up on half of the cells and down on the other half.
    rng = np.random.default_rng(0)
    cells, n = 16, 20_000
    p = np.full(cells, 1 / cells)
    tv = chi_square_gof(np.full(cells, n // cells), p, level=level).min_detectable_tv
    q = p * (1 + 2 * tv * np.where(np.arange(cells) % 2, 1, -1))
    found = np.mean([chi_square_gof(rng.multinomial(n, q), p, level=level).rejected for _ in range(1000)])
    assert 0.75 < found < 0.88


def test_a_score_is_tested_on_the_directions_that_vary() -> None:
    varies = ScoreSums(np.array([3.0, 7.0]), np.diag([9.0, 0.0]), np.diag([9.0, 0.0]), 0.1, 9)
    result = score_chi_square(varies, name="x")
    assert (result.df, result.statistic) == (1, pytest.approx(1.0))
    constant = ScoreSums(np.zeros(2), np.zeros((2, 2)), np.zeros((2, 2)), 0.0, 9)
    result = score_chi_square(constant, name="x")
    assert (result.method, result.pvalue, result.min_detectable_tv) == ("no information", 1.0, np.inf)
