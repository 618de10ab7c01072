"""Many prefixes: one draw from each, and combined results; false alarms, planted shifts, edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from me_stats.chi_square import GoodnessResult, chi_square_gof, score_chi_square
from me_stats.goodness import portfolio
from me_stats.prefixes import combine_prefixes, martingale_chi_square
from tests.laws import LEVELS, Floats, Ints, log, zipf_pair


def test_martingale_chi_square_is_pearson_when_the_prefix_is_fixed() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    draws = rng.choice(4, size=500, p=p)
    one = martingale_chi_square(draws, np.tile(p, (500, 1)))
    assert one.statistic == pytest.approx(stats.chisquare(np.bincount(draws), 500 * p).statistic)
    assert one.df == 3


def one_draw_each(rng: np.random.Generator, n: int, *, tilt: float = 0.0) -> tuple[Ints, Floats]:
    pi = rng.dirichlet(np.full(8, 0.3), size=n)
    q = pi * np.exp(tilt * np.arange(8))
    cumulative = (q / q.sum(1, keepdims=True)).cumsum(1)
    return (rng.random((n, 1)) > cumulative).sum(1).clip(max=7), pi


def test_martingale_chi_square_false_alarms_and_power() -> None:
    rng = np.random.default_rng(1)
    pvalues = np.array([martingale_chi_square(*one_draw_each(rng, 200)).pvalue for _ in range(1000)])
    for level in (0.05, 0.01, 0.001):
        assert (pvalues <= level).sum() <= stats.binom.isf(1e-4, 1000, level)
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-4
    assert martingale_chi_square(*one_draw_each(rng, 3000, tilt=0.15)).rejected


def test_near_certain_bins_do_not_pass_for_large_counts() -> None:
    # Both bins expect 100 draws, yet all that varies is a handful of surprises, each way: enumerate them.
    m, rare = 100, 0.01
    pi = np.repeat([[1 - rare, rare], [rare, 1 - rare]], m, axis=0)
    pvalues, mass = [], []
    for a in range(12):
        for b in range(12):
            draws = np.repeat([0, 1], m)
            draws[:a], draws[m : m + b] = 1, 0
            pvalues.append(martingale_chi_square(draws, pi).pvalue)
            mass.append(stats.binom.pmf(a, m, rare) * stats.binom.pmf(b, m, rare))
    for level in LEVELS[:4]:
        assert np.array(mass)[np.array(pvalues) <= level].sum() <= 2.2 * level


def test_martingale_chi_square_edges() -> None:
    pi = np.tile([0.5, 0.5, 0.0], (30, 1))
    assert martingale_chi_square([2, *[0] * 29], pi).method == "impossible cell"
    assert martingale_chi_square(np.zeros(30, dtype=int), np.tile([1.0, 0.0], (30, 1))).method == "no information"
    assert martingale_chi_square([0], [[0.5, 0.5]]).pvalue == 1.0
    for index, probs, message in (
        ([3], [[0.5, 0.5]], "integers in"),
        ([0], [0.5, 0.5], "must be"),
        ([0], [[1, 1]], "sum"),
    ):
        with pytest.raises(ValueError, match=message):
            martingale_chi_square(index, probs)


@pytest.mark.parametrize("test", ["top 64", "lambda score"])
def test_combining_prefixes_both_ways(test: str) -> None:
    rng = np.random.default_rng(2)

    def run(weights: list[float]) -> list[GoodnessResult]:
        results = []
        for i, weight in enumerate(weights):
            components = zipf_pair(50, seed=i)
            null = components.mean(0)
            drawn = rng.multinomial(2000, np.array([weight, 1 - weight]) @ components)
            found = portfolio(drawn, log(null), component_log_probs=log(components))
            results.append(next(r for r in found.results if r.name == test))
        return results

    assert combine_prefixes(run([0.5] * 60)).pvalue > 1e-3
    added, pooled = combine_prefixes(run([0.5] * 59 + [0.95])).results
    assert added.pvalue < 1e-6
    assert added.pvalue < pooled.pvalue
    if test == "lambda score":  # cells of different prefixes move in different directions; the score does not
        added, pooled = combine_prefixes(run([0.53] * 60)).results
        assert pooled.pvalue < 1e-6
        assert pooled.pvalue < added.pvalue


def test_pooled_cells_find_a_shift_in_every_prefix() -> None:
    rng = np.random.default_rng(4)
    laws = rng.dirichlet(np.ones(10), size=100)
    shift = laws * (1 + 0.1 * (np.arange(10) == 0))
    shifted = [chi_square_gof(rng.multinomial(1000, q / q.sum()), p) for q, p in zip(shift, laws, strict=True)]
    added, pooled = combine_prefixes(shifted).results
    assert pooled.rejected
    assert pooled.pvalue < added.pvalue
    fair = combine_prefixes([chi_square_gof(rng.multinomial(1000, p), p) for p in laws])
    assert fair.pvalue > 1e-3


def test_combining_edges() -> None:
    fair = chi_square_gof([50, 50], [0.5, 0.5])
    assert combine_prefixes([fair, chi_square_gof([3, 1], [1.0, 0.0])]).pvalue == 0.0
    nothing = chi_square_gof([5], [1.0])
    components = zipf_pair(10)
    supports = [portfolio([1] * 10, log(components[0])).results[0] for _ in range(3)]
    assert combine_prefixes(supports).pvalue == 1.0
    assert combine_prefixes([nothing, nothing]).pvalue == 1.0
    with pytest.raises(ValueError, match="at least one"):
        combine_prefixes([])
    with pytest.raises(ValueError, match="one test"):
        combine_prefixes([fair, chi_square_gof([50, 50], [0.5, 0.5], name="other")])
    with pytest.raises(ValueError, match="one shape"):
        combine_prefixes([fair, nothing])


def test_sums_keep_every_bin() -> None:
    sums = martingale_chi_square([0, 1] * 20, np.full((40, 2), 0.5)).sums
    assert sums is not None
    assert score_chi_square(sums, name="x").df == 1
