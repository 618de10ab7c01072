"""One chi-square test of a known law: of the counts of its cells, or of a score whose mean it fixes.

Both give a `GoodnessResult` with a p-value by the rule of `tails`, and keep the `ScoreSums` that add up over prefixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from me_stats.tails import (
    detectable_noncentrality,
    finite_sample_critical,
    finite_sample_pvalue,
    smallest_tv,
    supermartingale_critical,
    supermartingale_pvalue,
    trusted_critical,
    trusted_level,
    trusted_pvalue,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SUMMED_CELLS = 1024
"""Counts of more cells keep no `ScoreSums`, which hold two matrices of this size."""

_TOLERANCE = 1e-10  # information per draw below which a direction is rounding error, not signal


@dataclass(frozen=True, eq=False)
class ScoreSums:
    """Sums over draws of a score d with E[d | past] = 0 under the null; they add over prefixes.

    `total` is sum d (k,), `covariance` sum E[d d^T | past] (k, k), `variation` sum d d^T (k, k), `skewness` the largest
    sum |d|^3 over directions of unit variance, and `expected` the expected counts (k,) when d indicates cells.
    """

    total: Floats
    covariance: Floats
    variation: Floats
    skewness: float
    n: int
    expected: Floats | None = None


@dataclass(frozen=True)
class GoodnessResult:
    """One test of one law: what it found and what it could have found.

    `pvalue` is raw. `cells` counts cells of positive null probability, `pooled_cells` those merged because
    the null expects too few draws in them. `min_detectable_tv` is the total variation *on the partition `name`*
    that a test at `level` finds with power 0.8; for a score u it holds along p(1 + eps u). It is infinite
    where no departure can be found. `statistic` is infinite when `impossible` draws hit a cell of probability zero.
    """

    name: str
    statistic: float
    pvalue: float
    df: int
    n: int
    cells: int
    pooled_cells: int
    method: str
    min_detectable_tv: float
    level: float
    impossible: int = 0
    g_statistic: float | None = None
    sums: ScoreSums | None = field(default=None, repr=False, compare=False)

    @property
    def rejected(self) -> bool:
        """Whether the null is rejected at `level`."""
        return self.pvalue <= self.level


def chi_square_gof(
    counts: ArrayLike, probs: ArrayLike, *, level: float = 1e-6, name: str = "cells", min_expected: float = 5.0
) -> GoodnessResult:
    """Pearson's chi-square of counts (K,) against cell probabilities (K,), with a tail that can be trusted.

    ``X^2 = sum (c - E)^2/E`` on K-1 degrees of freedom. Cells whose null expectation is below `min_expected` are
    merged into one (never by what was observed). The chi-square tail is used down to `trusted_level(min E^-1/2)`
    and `finite_sample_pvalue` of G below. A draw in a cell of probability zero gives
    p-value 0.0 with method "impossible cell". One cell left gives p-value 1. Raises ValueError for counts
    that are not non-negative integers, no draw, or probabilities that do not sum to one.

    >>> result = chi_square_gof([30, 20, 50], [0.3, 0.2, 0.5])
    >>> result.statistic, result.pvalue, result.df
    (0.0, 1.0, 2)
    >>> chi_square_gof([3, 1], [1.0, 0.0]).method
    'impossible cell'
    """
    c, p = validated_counts(counts, probs, "probs")
    check_level(level)
    n, possible = int(c.sum()), p > 0
    impossible = int(c[~possible].sum())
    if impossible:
        return impossible_cell(name, n, level, impossible, cells=int(possible.sum()))
    sums = _cell_sums(c, p, n) if len(c) <= MAX_SUMMED_CELLS else None
    c, p = c[possible], p[possible]
    groups = pool_cells(n * p, min_expected)
    merged = np.bincount(groups)
    pooled = int(merged[merged > 1].sum())
    observed = np.bincount(groups, weights=c)
    expected = n * np.bincount(groups, weights=p)
    df = len(expected) - 1
    if df == 0:
        return no_information(name, n, level, cells=len(c), pooled=pooled, sums=sums)
    x2 = float(((observed - expected) ** 2 / expected).sum())
    g = max(0.0, float(2 * (special.xlogy(observed, observed / expected)).sum()))
    smallest = float(expected.min())
    trusted = trusted_level(smallest**-0.5)
    bound = finite_sample_pvalue(g, df + 1)
    pvalue, method = trusted_pvalue(x2, df, trusted, bound, "finite-sample bound on G")
    critical = trusted_critical(level, df, trusted, finite_sample_critical(level, df + 1))
    tv = smallest_tv(detectable_noncentrality(critical, df), n)
    return GoodnessResult(name, x2, pvalue, df, n, len(c), pooled, method, tv, level, g_statistic=g, sums=sums)


def score_chi_square(sums: ScoreSums, *, name: str, level: float = 1e-6) -> GoodnessResult:
    """Chi-square test that a score has mean zero: ``X^2 = S^T V^- S`` on rank V degrees of freedom.

    `sums` holds S = sum d and V = sum E[d d^T | past]; d may come from a sequence, a draw per prefix, or independent
    draws. The chi-square tail is asymptotic: it is used down to `trusted_level(sums.skewness)`, and
    `supermartingale_pvalue` below. V = 0 gives p-value 1 with method "no information".

    >>> one = ScoreSums(np.array([5.0]), np.eye(1) * 100, np.eye(1) * 100, 0.1, 100)
    >>> score_chi_square(one, name="mean").statistic
    0.25
    """
    check_level(level)
    whiten = whitener(sums.covariance, sums.n)
    df = whiten.shape[1]
    if df == 0:
        return no_information(name, sums.n, level, sums=sums)
    x2 = float(((sums.total @ whiten) ** 2).sum())
    trusted = trusted_level(sums.skewness)
    bound = supermartingale_pvalue(sums.total, sums.variation, sums.covariance)
    pvalue, method = trusted_pvalue(x2, df, trusted, bound, "supermartingale bound")
    tv = smallest_tv(score_noncentrality(sums, df, level), sums.n)
    return GoodnessResult(name, x2, pvalue, df, sums.n, 0, 0, method, tv, level, sums=sums)


def score_noncentrality(sums: ScoreSums, df: int, level: float) -> float:
    """Non-centrality delta^T V delta at which `score_chi_square` rejects at `level` with probability 0.8.

    >>> one = ScoreSums(np.zeros(1), np.eye(1), np.eye(1), 0.0, 1)
    >>> round(score_noncentrality(one, 1, 0.05), 2)
    7.85
    """
    critical = trusted_critical(level, df, trusted_level(sums.skewness), supermartingale_critical(level, df))
    return detectable_noncentrality(critical, df)


def score_skewness(increments: Floats, covariance: Floats, n: int, *, weights: Floats | None = None) -> float:
    """Largest sum |d|^3 over the principal directions of V, each scaled to unit variance; increments (n, k).

    It bounds the skewness of each standardised sum, and is large when few terms dominate.

    >>> score_skewness(np.full((4, 1), 1.0), np.eye(1) * 4, 4)
    0.5
    """
    whitened = np.abs(increments @ whitener(covariance, n)) ** 3
    total = whitened.sum(0) if weights is None else weights @ whitened
    return float(total.max(initial=0.0))


def whitener(covariance: Floats, n: int) -> Floats:
    """W (k, rank V) with ``W^T V W = I`` and ``W W^T = V^-``; n terms made V, which sets what counts as zero.

    >>> whitener(np.diag([4.0, 0.0]), 1).tolist()
    [[0.5], [0.0]]
    """
    values, vectors = np.linalg.eigh(covariance)
    keep = values > _TOLERANCE * max(n, float(values.max(initial=0.0)))
    return np.asarray(vectors[:, keep] / np.sqrt(values[keep]))


def pool_cells(expected: Floats, min_expected: float) -> Ints:
    """Group of each cell (K,): all that expect less than `min_expected` are merged into group 0, the others are alone.

    >>> pool_cells(np.array([60.0, 38.0, 1.0, 0.6, 0.4]), 5.0).tolist()
    [1, 0, 0, 0, 0]
    """
    order = np.argsort(expected, kind="stable")
    merged = int((expected < min_expected).sum())
    if merged:  # the merged cell must itself expect enough: take in the next smallest until it does
        merged = max(merged, int(np.searchsorted(np.cumsum(expected[order]), min_expected)) + 1)
    groups = np.zeros(len(expected), dtype=np.int64)
    groups[order[merged:]] = np.arange(len(expected) - min(merged, len(expected))) + (merged > 0)
    return groups


def no_information(
    name: str, n: int, level: float, *, cells: int = 0, pooled: int = 0, sums: ScoreSums | None = None
) -> GoodnessResult:
    """Result of a test that the null leaves nothing to see: one cell, or no variance."""
    return GoodnessResult(name, 0.0, 1.0, 0, n, cells, pooled, "no information", math.inf, level, sums=sums)


def impossible_cell(name: str, n: int, level: float, draws: int, *, cells: int = 0) -> GoodnessResult:
    """Result of `draws` draws in cells of probability zero: rejected, whatever the other draws say."""
    return GoodnessResult(name, math.inf, 0.0, 0, n, cells, 0, "impossible cell", math.inf, level, draws)


def validated_counts(counts: ArrayLike, probs: ArrayLike, name: str) -> tuple[Floats, Floats]:
    """Counts (K,) and probabilities (K,), renormalised; ValueError, which calls the latter `name`, if they are not."""
    c, p = np.asarray(counts, dtype=float), np.asarray(probs, dtype=float)
    if c.ndim != 1 or c.shape != p.shape:
        raise ValueError(f"counts and {name} must be vectors of one length, got {c.shape} and {p.shape}")
    if not (np.isfinite(c).all() and (c >= 0).all() and (c == np.floor(c)).all()):
        raise ValueError("counts must be non-negative integers; count draws with numpy.bincount")
    if not c.sum() > 0:
        raise ValueError("counts must hold at least one draw")
    if not (p >= 0).all() or abs(p.sum() - 1) > 1e-4:
        raise ValueError(f"{name} must be non-negative and sum to one, got {p.sum():.6g}; normalise it")
    return c, p / p.sum()


def check_level(level: float) -> None:
    """ValueError unless `level` lies in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _cell_sums(c: Floats, p: Floats, n: int) -> ScoreSums:
    outer = np.outer(p, p)
    cross = np.outer(c, p)
    variation = np.diag(c) - cross - cross.T + n * outer
    return ScoreSums(c - n * p, n * (np.diag(p) - outer), variation, 0.0, n, n * p)
