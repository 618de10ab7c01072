"""P-values that stay valid in the tail: an approximation as far as it can be trusted, a finite-sample bound beyond.

A chi-square statistic follows its law only in the limit, which comes the later the smaller the p-value. So every test
combines two numbers (`trusted_pvalue`)::

    pvalue = max(chi-square tail, min(trusted level, bound))

The *trusted level* is the p-value down to which skewness kappa of the sum inflates a two-sided normal tail by
at most 2 (`trusted_level`). For a cell with expectation E, kappa = 1/sqrt(E). Measured with one cell of
expectation E among large ones, the chi-square tail is wrong by 2.2x at 1e-4 (2 cells, E=20), 12x at 1e-6, 1.5x at
1e-9 (2 cells, E=1000), and by 1.1x, 1.5x and 4.3x at 1e-4, 1e-6, 1e-9 for 10 cells with E=20.
The *bound* is Agrawal's for multinomial counts (`finite_sample_pvalue`), and a mixture of Delyon's supermartingale for
sums of scores (`supermartingale_pvalue`); neither assumes anything about n.

Each `..._pvalue` has an inverse `..._critical`, the statistic that a level asks for; from it follows the smallest
departure that a test can detect.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

POWER = 0.8
"""Power at which every minimum detectable effect is stated."""

_SCALES = 4.0 ** np.arange(1, -19, -1)  # variances of the mixing normals, for sums of variance 5 to 1e12


def trusted_level(skewness: float) -> float:
    """Two-sided p-value down to which the normal tail is within a factor 2 of a sum with this skewness.

    Edgeworth: the upper tail at z is inflated by about exp(kappa z^3/6); twice the two-sided tail means a factor 4
    on one side, hence ``z = (6 log 4/kappa)^(1/3)``. Above kappa = 1/2 (fewer than 4 draws, whatever the law)
    nothing is trusted: the level is 1.

    >>> [float(f"{trusted_level(e ** -0.5):.1g}") for e in (5, 20, 100, 1000)]
    [0.008, 0.0008, 1e-05, 1e-10]
    """
    if skewness <= 0:
        return 0.0
    if skewness > 0.5:
        return 1.0
    return float(2 * stats.norm.sf((6 * math.log(4) / skewness) ** (1 / 3)))


def finite_sample_pvalue(g: float, cells: int) -> float:
    """P-value of G = 2 sum c log(c/E) that holds at every n and for every null law.

    With x = G/2 = n KL(empirical || null) and K cells, ``p <= exp(-x) (e x/(K-1))^(K-1)`` for x > K-1 and 1
    otherwise, computed in the log domain (0.0 only below 1e-308). Raises ValueError for a negative G or no cell.
    Source: Agrawal (2020), Finite-sample concentration of the multinomial in relative entropy, arXiv:1904.02291.

    >>> finite_sample_pvalue(2.0, 3), round(finite_sample_pvalue(60.0, 10), 5)
    (1.0, 4e-05)
    """
    if cells < 1:
        raise ValueError(f"cells must be at least 1, got {cells}")
    if not g >= -1e-6:
        raise ValueError(f"g must be a non-negative number, got {g}; it is 2 sum c log(c/E)")
    x, shape = g / 2, cells - 1
    if shape == 0 or x <= shape:
        return 1.0
    if math.isinf(x):
        return 0.0
    return math.exp(shape - x + shape * math.log(x / shape))


def supermartingale_pvalue(total: ArrayLike, variation: ArrayLike, covariance: ArrayLike) -> float:
    """P-value of a vector martingale from its value and its two quadratic variations, at any n.

    With S = sum d, W = sum d d^T/3 + 2 sum E[d d^T | past]/3, ``exp(theta.S - theta^T W theta/2)`` is a
    supermartingale for every theta; averaged over theta ~ N(0, tau^2 I) and 20 values of tau^2 = 4 .. 4^-18 it gives
    ``E = mean_tau |I + tau^2 W|^(-1/2) exp(S^T (W + I/tau^2)^-1 S/2)`` and p = min(1, 1/E). No bounded scores, no
    independence between steps. Source: Delyon (2009), Exponential inequalities for sums of weakly dependent
    variables, Electron. J. Probab. 14, from ``exp(x - x^2/6) <= 1 + x + x^2/3``.

    >>> supermartingale_pvalue([80.0], [[100.0]], [[100.0]]) < 1e-9
    True
    """
    s = np.atleast_1d(np.asarray(total, dtype=float))
    w = (np.atleast_2d(variation) + 2 * np.atleast_2d(covariance)) / 3
    values, vectors = np.linalg.eigh(w)
    values = np.maximum(values, 0.0)
    y2 = (vectors.T @ s) ** 2
    scaled = np.outer(_SCALES, values)
    log_e = 0.5 * (_SCALES[:, None] * y2 / (1 + scaled) - np.log1p(scaled)).sum(axis=1)
    log_mean = float(special.logsumexp(log_e)) - math.log(len(_SCALES))
    return math.exp(-max(log_mean, 0.0))


def trusted_pvalue(statistic: float, df: int, trusted: float, bound: float, bound_name: str) -> tuple[float, str]:
    """The combination rule ``max(chi-square tail, min(trusted, bound))``, with the name of what decided.

    >>> trusted_pvalue(3.84, 1, 1e-4, 0.3, "bound")[1], trusted_pvalue(40.0, 1, 1e-4, 1e-8, "bound")
    ('chi-square tail', (1e-08, 'bound'))
    >>> trusted_pvalue(40.0, 1, 1e-4, 0.3, "bound")
    (0.0001, 'chi-square tail, not trusted below 0.0001')
    """
    tail = float(stats.chi2.sf(statistic, df))
    if tail >= trusted:
        return tail, "chi-square tail"
    if bound >= trusted:
        return trusted, f"chi-square tail, not trusted below {trusted:.1g}"
    return max(tail, bound), bound_name


def trusted_critical(level: float, df: int, trusted: float, bound_critical: float) -> float:
    """Statistic at which `trusted_pvalue` falls to `level`, if the bound does so at `bound_critical`.

    >>> round(trusted_critical(0.05, 1, 1e-4, 30.0), 2), trusted_critical(1e-6, 1, 1e-4, 30.0)
    (3.84, 30.0)
    """
    return float(stats.chi2.isf(level, df)) if level >= trusted else bound_critical


def finite_sample_critical(level: float, cells: int) -> float:
    """G at which `finite_sample_pvalue` falls to `level`, for two cells or more.

    >>> round(finite_sample_pvalue(finite_sample_critical(1e-6, 10), 10), 9)
    1e-06
    """
    # exp(-x) (e x/shape)^shape = level: with y = x/shape, y exp(-y) = exp(log(level)/shape - 1), on branch -1.
    shape = cells - 1
    y = -special.lambertw(-math.exp(math.log(level) / shape - 1), k=-1).real
    return float(2 * shape * y) if math.isfinite(y) else math.inf


def supermartingale_critical(level: float, df: int) -> float:
    """X^2 = S^T V^- S at which `supermartingale_pvalue` is at most `level`, where both variations are V.

    It is taken at the mixing variance tau^2 V = 20 I, where the bound is sharpest for few degrees of freedom and the
    levels in use; for many degrees of freedom it asks for more than is needed.

    >>> s = supermartingale_critical(1e-6, 1) ** 0.5
    >>> supermartingale_pvalue([s * 10], [[100.0]], [[100.0]]) < 1e-6
    True
    """
    return (2 * math.log(len(_SCALES) / level) + df * math.log(21)) * 21 / 20


def detectable_shift(level: float = 0.05, power: float = POWER) -> float:
    """Standard errors by which an estimate must be off for a two-sided normal test at `level` to find it.

    >>> round(detectable_shift(), 3)
    2.802
    """
    return float(stats.norm.isf(level / 2) + stats.norm.ppf(power))


def detectable_noncentrality(critical: float, df: int) -> float:
    """Non-centrality at which a chi-square on `df` degrees of freedom passes `critical` with probability 0.8.

    >>> round(detectable_noncentrality(3.84, 1), 2)
    7.85
    """
    return max(0.0, float(special.chndtrinc(critical, df, 1 - POWER)))


def smallest_tv(noncentrality: float, n: int) -> float:
    """Total variation that forces this non-centrality on n draws, infinite where none below 1 does.

    ``TV <= sqrt(chi-square divergence)/2``, and n times that divergence is the non-centrality.

    >>> smallest_tv(4.0, 100), smallest_tv(400.0, 100)
    (0.1, inf)
    """
    tv = 0.5 * math.sqrt(noncentrality / n)
    return tv if tv < 1 else math.inf
