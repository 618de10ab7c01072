"""Goodness of fit over many prefixes: one draw from each (`martingale_chi_square`), or many (`combine_prefixes`).

The laws differ between prefixes, so counts must not be added; the `ScoreSums` of centred counts, or of any score, may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from me_stats.chi_square import (
    MAX_SUMMED_CELLS,
    GoodnessResult,
    ScoreSums,
    impossible_cell,
    no_information,
    pool_cells,
    score_chi_square,
    whitener,
)
from me_stats.goodness import PortfolioResult, bonferroni
from me_stats.tails import (
    detectable_noncentrality,
    finite_sample_critical,
    finite_sample_pvalue,
    smallest_tv,
    supermartingale_critical,
    trusted_critical,
    trusted_level,
    trusted_pvalue,
)


def martingale_chi_square(
    bin_index: ArrayLike, bin_probs: ArrayLike, *, level: float = 1e-6, name: str = "bins", min_expected: float = 5.0
) -> GoodnessResult:
    """Chi-square for one draw per prefix: draw t fell in bin b_t (n,) that had probabilities pi_t (n, B).

    ``S_b = sum_t (1[b_t = b] - pi_tb)``, ``V = sum_t (diag pi_t - pi_t pi_t^T)``, ``S^T V^- S ~ chi^2(rank V)``. Bins
    must be chosen per prefix from the null alone. Prefixes may contain earlier draws. Bins that expect less
    than `min_expected` draws in all are merged. A draw in a bin of probability zero gives p-value 0.0.

    >>> martingale_chi_square([0, 1, 1, 0], np.full((4, 2), 0.5), min_expected=1).pvalue
    1.0
    """
    index, pi = np.asarray(bin_index), np.asarray(bin_probs, dtype=float)
    if pi.ndim != 2 or index.shape != pi.shape[:1] or not len(index):
        raise ValueError(f"bin_probs must be (n, B) and bin_index (n,), got {pi.shape} and {index.shape}")
    if not np.issubdtype(index.dtype, np.integer) or index.min() < 0 or index.max() >= pi.shape[1]:
        raise ValueError(f"bin_index must hold integers in [0, {pi.shape[1]})")
    if not (pi >= 0).all() or not np.allclose(pi.sum(1), 1, atol=1e-4):
        raise ValueError("bin_probs must be non-negative with rows that sum to one; renormalise each row")
    n, bins = pi.shape
    pi = pi / pi.sum(1, keepdims=True)
    impossible = int((pi[np.arange(n), index] == 0).sum())
    if impossible:
        return impossible_cell(name, n, level, impossible, cells=bins)
    d = -pi
    d[np.arange(n), index] += 1
    expected = pi.sum(0)
    sums = ScoreSums(d.sum(0), np.diag(expected) - pi.T @ pi, d.T @ d, 0.0, n, expected)
    return _pooled_bins(sums, name, level=level, min_expected=min_expected)


def combine_prefixes(results: Sequence[GoodnessResult], *, level: float = 1e-6) -> PortfolioResult:
    """Combine the same test run on independent prefixes, in both ways.

    "sum of X^2" adds statistics and degrees of freedom and finds one bad prefix; "pooled score" adds S and V
    before forming ``S^T V^- S`` and finds a small shift everywhere. Bonferroni over the two. Raises ValueError for
    results of different tests.

    >>> from me_stats.chi_square import chi_square_gof
    >>> a = chi_square_gof([60, 40], [0.5, 0.5]); b = chi_square_gof([40, 60], [0.5, 0.5])
    >>> both = combine_prefixes([a, b])
    >>> [result.statistic for result in both.results]
    [8.0, 0.0]
    """
    if not results:
        raise ValueError("results must hold at least one result")
    if len({r.name for r in results}) > 1:
        raise ValueError(f"results must come from one test, got {sorted({r.name for r in results})}")
    name, n = results[0].name, sum(r.n for r in results)
    impossible = sum(r.impossible for r in results)
    if impossible:
        return PortfolioResult(0.0, level, n, 1, (impossible_cell(f"{name}: support", n, level, impossible),))
    if all(r.df == 0 for r in results):
        return PortfolioResult(1.0, level, n, 0, (no_information(name, n, level),))
    sums = [r.sums for r in results if r.sums is not None]
    if len(sums) < len(results) or len({s.total.shape for s in sums}) > 1:
        raise ValueError(
            f"results must carry score sums of one shape: use the same partition, of at most {MAX_SUMMED_CELLS} cells"
        )
    added = _sum_of_statistics(results, f"{name}: sum of X^2", n, level / 2)
    expected = [s.expected for s in sums if s.expected is not None]
    total = ScoreSums(
        np.sum([s.total for s in sums], axis=0),
        np.sum([s.covariance for s in sums], axis=0),
        np.sum([s.variation for s in sums], axis=0),
        max(s.skewness for s in sums),  # the skewness of a sum of independent parts is at most the largest
        n,
        np.sum(expected, axis=0) if expected else None,
    )
    pooled_name = f"{name}: pooled score"
    if total.expected is None:
        pooled = score_chi_square(total, name=pooled_name, level=level / 2)
    else:
        pooled = _pooled_bins(total, pooled_name, level=level / 2, min_expected=5.0)
    return bonferroni((added, pooled), level=level, n=n)


def _pooled_bins(sums: ScoreSums, name: str, *, level: float, min_expected: float) -> GoodnessResult:
    assert sums.expected is not None
    live = sums.expected > 0
    groups = np.zeros(len(live), dtype=np.int64)
    groups[live] = pool_cells(sums.expected[live], min_expected)
    merge = np.zeros((int(groups.max()) + 1, len(live)))
    merge[groups, np.arange(len(live))] = live
    covariance = merge @ sums.covariance @ merge.T
    # The largest jump along each unit direction bounds its skewness. Expected counts alone would not: bins that are all
    # but certain at each prefix expect many draws and vary by few.
    whiten = whitener(covariance, sums.n)
    jump = float(np.ptp(whiten, axis=0).max(initial=0.0))
    merged = ScoreSums(merge @ sums.total, covariance, merge @ sums.variation @ merge.T, jump, sums.n)
    result = score_chi_square(merged, name=name, level=level)
    sizes = merge.sum(1)
    return replace(result, cells=int(live.sum()), pooled_cells=int(sizes[sizes > 1].sum()), sums=sums)


def _sum_of_statistics(results: Sequence[GoodnessResult], name: str, n: int, level: float) -> GoodnessResult:
    df = sum(r.df for r in results)
    x2 = sum(r.statistic for r in results)
    informative = [r for r in results if r.df > 0]
    g = [r.g_statistic for r in informative if r.g_statistic is not None]
    # Two bounds, corrected for taking the better: the worst prefix alone, and (cells only) the sum of G, since the
    # moment bound behind `finite_sample_pvalue` multiplies over prefixes.
    bound = 2 * len(informative) * min(r.pvalue for r in informative)
    if len(g) == len(informative):
        bound = min(bound, 2 * finite_sample_pvalue(sum(g), df + 1))
    trusted = max([1e-4, *(trusted_level(r.sums.skewness) for r in informative if r.sums is not None)])
    pvalue, method = trusted_pvalue(x2, df, trusted, min(bound, 1.0), "finite-sample bound")
    # What can be detected is stated for a departure that lies in one prefix only.
    df_one, share = max(r.df for r in informative), level / (2 * len(informative))
    alone = finite_sample_critical(share, df_one + 1) if g else supermartingale_critical(share, df_one)
    critical = trusted_critical(level, df, trusted, alone)
    tv = smallest_tv(detectable_noncentrality(critical, df), min(r.n for r in informative))
    cells, pooled = sum(r.cells for r in results), sum(r.pooled_cells for r in results)
    return GoodnessResult(name, x2, pvalue, df, n, cells, pooled, method, tv, level)
