"""How far from its law can a sampler still be? Confidence bounds on total variation.

"p > .05, so they are equal" is no evidence. These functions bound TV(q, p) between the unknown law q that was
drawn from and a known law p, from above (equivalence) and from below (size of a bug), and say beforehand what
a number of draws can show. `counts` and `probs` are one-dimensional, one entry a cell or token, and `probs`
holds probabilities, not logarithms; the draws must be independent, all from one prefix (or one fixed mixture).
All values are total variation, in [0, 1]. `floor` is the TV by which rounding alone may move p in one step: measure
it, for a long enough exact test rejects correct code. Upper bounds grow by it, lower bounds and margins shrink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, chi2, ncx2, norm

Floats = NDArray[np.float64]

# A float32 log_softmax over 262,144 tokens is 1e-5 off; laws are rescaled to sum to exactly 1.
SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class TVBound:
    """A one-sided confidence bound on TV; the side that was not asked for keeps its trivial value.

    `null_value` is what the bound gives where the statistic takes its expected value under a perfect sampler:
    the sensitivity of these `n` draws. `cells` counts the cells that entered, after pooling; `off_support`
    counts draws of symbols that have probability 0 under p, each a proof that q ≠ p.
    """

    lower: float
    upper: float
    confidence: float
    statistic: float
    n: int
    cells: int
    off_support: int
    null_value: float
    method: str


@dataclass(frozen=True)
class PluginTV:
    """Plug-in TV of a histogram and its expectation under a perfect sampler: never read one without the other."""

    value: float
    null_value: float
    n: int


@dataclass(frozen=True)
class Certificate:
    """White-box bound on the TV of one step and the three terms it is the sum of."""

    weight_term: float
    cache_term: float
    draw_term: float

    @property
    def total(self) -> float:
        return min(1.0, self.weight_term + self.cache_term + self.draw_term)


def tv_upper_bound_cells(
    counts: ArrayLike, probs: ArrayLike, *, confidence: float = 0.95, min_expected: float = 5.0, floor: float = 0.0
) -> TVBound:
    """Upper bound on the TV of a partition into K cells, from Pearson's X².

    TV ≤ ½ √χ²div and X² ~ noncentral χ²(K − 1, n χ²div) give TV_U = ½ √(ν/n) with F(X²; K − 1, ν) = 1 − confidence.
    It certifies this partition only: laws that differ inside a cell look equal.

    Parameters
    ----------
    counts, probs
        (K,) draws and null probabilities of the cells.
    min_expected
        Cells that expect fewer draws are pooled into one, chosen by the null law alone. Without pooling the
        inversion fails: coverage .48 at nominal .95 for 256 Zipf(2) cells, 1000 draws and q ≈ (1 ± .7) p.

    Returns
    -------
    TVBound
        `upper` is never below `null_value`, so that luck (or draws more regular than chance) is not read as
        precision; both include `floor`. One draw of a zero-probability cell makes the statistic infinite, `upper` 1.

    Raises
    ------
    ValueError
        Bad counts or probabilities, or fewer than two cells left after pooling.

    Examples
    --------
    >>> bound = tv_upper_bound_cells([248, 251, 257, 244], [0.25] * 4)
    >>> round(bound.statistic, 3), round(bound.upper, 3)
    (0.36, 0.046)
    """
    draws, law, n = _counts_and_law(counts, probs, floor)
    _confidence(confidence)
    statistic, cells, off_support = _pearson(draws, law, n, min_expected)
    null_value = _noncentral_tv(cells - 1.0, cells, n, confidence)
    upper = 1.0 if off_support else _noncentral_tv(max(statistic, cells - 1.0), cells, n, confidence)
    null_value, upper = min(1.0, null_value + floor), min(1.0, upper + floor)
    method = "noncentral chi-square inversion, cells fixed by the null law"
    return TVBound(0.0, upper, confidence, statistic, n, cells, off_support, null_value, method)


def equivalence_pvalue(
    counts: ArrayLike, probs: ArrayLike, margin: float, *, min_expected: float = 5.0, floor: float = 0.0
) -> float:
    """p-value for H0: TV ≥ margin on a partition into K cells, F_ncx2(X²; K − 1, 4 n (margin − floor)²).

    A small value says "closer than the margin". `tv_upper_bound_cells(...).upper <= margin` implies a p-value of at
    most 1 − confidence; the converse can fail where X² falls below its null expectation, since that
    bound does not reward luck. A draw of a zero-probability cell gives 1. Cells are pooled as in
    `tv_upper_bound_cells`.

    Examples
    --------
    >>> round(equivalence_pvalue([2480, 2510, 2570, 2440], [0.25] * 4, margin=0.05), 6)
    0.0
    """
    draws, law, n = _counts_and_law(counts, probs, floor)
    _open_unit("margin", margin)
    if floor >= margin:
        raise ValueError(f"floor {floor} reaches margin {margin}: no number of draws can show it; widen the margin")
    statistic, cells, off_support = _pearson(draws, law, n, min_expected)
    return 1.0 if off_support else float(ncx2.cdf(statistic, cells - 1, 4.0 * n * (margin - floor) ** 2))


def tv_upper_bound(counts: ArrayLike, probs: ArrayLike, *, confidence: float = 0.95, floor: float = 0.0) -> TVBound:
    """Upper bound on TV over a whole vocabulary, most of which is never drawn.

    With weights w = max(p, 1/V), W = Σw and d = q − p, Cauchy–Schwarz gives TV ≤ ½ √(W Σ d²/w). The statistic
    T = Σ (c(c − 1) − 2(n − 1)pc + n(n − 1)p²)/w has mean μ = n(n − 1) Σ d²/w exactly, and standard deviation at most

        s(μ) = √( 2 (n √(Σ p²/w²) + √(V μ))² + 4 n μ )

    where the bound matters (d of the order of w). TV_U = ½ √(W μ_U / (n(n − 1))), μ_U the largest root of
    μ − z s(μ) = T. The term √(V μ) accounts for the spread that q, not p, puts on rare tokens: without it,
    coverage at nominal .95 drops to .37 for a peaked law with V = 50,000 and n = 1000.

    The normal quantile is an approximation, conservative for few draws, where T is skewed to the right. `upper` is
    never below `null_value`, and both include `floor`. A perfect sampler over 50,000 Zipf tokens certifies TV ≤ .01
    with 1.3 million draws about seven times in ten (100 simulations).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> law = np.full(1000, 1e-3)
    >>> bound = tv_upper_bound(rng.multinomial(100_000, law), law)
    >>> round(bound.null_value, 3), bound.upper < 0.03
    (0.014, True)
    """
    draws, law, n = _counts_and_law(counts, probs, floor)
    _confidence(confidence)
    weights = np.maximum(law, 1.0 / law.size)
    null_spread = n * math.sqrt(np.sum((law / weights) ** 2))
    pairs = n * (n - 1.0)
    # Centred before squaring, so that large counts do not cancel.
    statistic = float(np.sum(((draws - n * law) ** 2 - draws - n * law**2 + 2.0 * law * draws) / weights))
    z = float(norm.isf(1.0 - confidence))

    def excess(mu: float, observed: float) -> float:
        spread = null_spread + math.sqrt(mu / weights.min())
        return mu - z * math.sqrt(2.0 * spread**2 + 4.0 * n * mu) - observed

    def bound(observed: float) -> float:
        # `high` is the μ that gives TV_U = 1. `excess` is convex and negative at `observed`: one root lies above.
        high = 4.0 * pairs / weights.sum()
        if excess(high, observed) <= 0.0:
            return 1.0
        root = brentq(excess, observed, high, args=(observed,))
        return min(1.0, 0.5 * math.sqrt(weights.sum() * root / pairs) + floor)

    off_support = int(draws[law == 0].sum())
    method = "weighted quadratic statistic, normal quantile"
    return TVBound(0.0, bound(max(statistic, 0.0)), confidence, statistic, n, law.size, off_support, bound(0.0), method)


def tv_lower_bound(
    counts_select: ArrayLike, counts_test: ArrayLike, probs: ArrayLike, *, confidence: float = 0.95, floor: float = 0.0
) -> TVBound:
    """Lower bound on TV, the size of a bug, from two independent halves of the draws.

    The first half picks the event A = {p̂ > p}; the second bounds q(A) from below (Clopper–Pearson), and
    TV ≥ q(A) − p(A) − floor. Exact at any n, for any vocabulary; `statistic` estimates q(A) − p(A) without bias.

    Parameters
    ----------
    counts_select, counts_test
        (V,) draws of the two halves. Counting one draw in both voids the bound.
    probs
        (V,) null probabilities.

    Examples
    --------
    >>> bound = tv_lower_bound([600, 400], [590, 410], [0.5, 0.5])
    >>> round(bound.lower, 3), bound.upper
    (0.064, 1.0)
    """
    select, law, n_select = _counts_and_law(counts_select, probs, floor, name="counts_select")
    test, _, n = _counts_and_law(counts_test, probs, name="counts_test")
    _confidence(confidence)
    event = select > n_select * law
    hits, null_mass = int(test[event].sum()), float(law[event].sum())
    # One-sided, so all of 1 − confidence goes to the lower end of a two-sided interval.
    lower = max(0.0, binomial_interval(hits, n, confidence=2.0 * confidence - 1.0)[0] - null_mass - floor)
    off_support = int(test[law == 0].sum())
    method = "sample splitting, Clopper–Pearson"
    return TVBound(lower, 1.0, confidence, hits / n - null_mass, n, law.size, off_support, 0.0, method)


def plugin_tv(counts: ArrayLike, probs: ArrayLike) -> PluginTV:
    """Plug-in TV ½ Σ |c/n − p| with its expectation where q = p, because it is biased upwards.

    The expectation is exact, from De Moivre's mean absolute deviation of a binomial,
    E|c − np| = 2 m (1 − p) P(c = m) with m = ⌊np⌋ + 1. The usual ½ Σ √(2p(1 − p)/(πn)) is its limit for
    large np, and half too large for 50,000 Zipf tokens and 10,000 draws.

    Examples
    --------
    >>> plugin_tv([6, 4], [0.5, 0.5])
    PluginTV(value=0.09..., null_value=0.123..., n=10)
    """
    draws, law, n = _counts_and_law(counts, probs)
    above = np.floor(n * law) + 1.0
    null_value = float(np.sum(above * (1.0 - law) * binom.pmf(above, n, law)) / n)
    return PluginTV(float(0.5 * np.abs(draws / n - law).sum()), null_value, n)


def minimum_detectable_tv(n: int, cells: int, *, level: float, power: float = 0.8) -> float:
    """Smallest TV on a partition that a chi-square test with `n` draws rejects with at least this power.

    δ = ½ √(ν/n) where noncentral χ²(cells − 1, ν) exceeds the critical value at `level` with probability
    `power`. χ²div ≥ 4 TV², so every departure of that TV is found at least as often. Capped at 1.

    Examples
    --------
    >>> round(minimum_detectable_tv(10_000, 16, level=1e-6), 3)
    0.037
    """
    _count("n", n)
    return min(1.0, 0.5 * math.sqrt(_detectable_noncentrality(cells, level, power) / n))


def required_draws(delta: float, cells: int, *, level: float, power: float = 0.8) -> int:
    """Draws that make `delta` the minimum detectable TV: n = ⌈ν / 4δ²⌉, ν as in `minimum_detectable_tv`.

    Examples
    --------
    >>> [required_draws(0.02, 16, level=level, power=0.999) for level in (1e-3, 1e-6, 1e-9)]
    [42495, 59908, 74925]
    """
    _open_unit("delta", delta)
    return math.ceil(_detectable_noncentrality(cells, level, power) / (4.0 * delta**2))


def binomial_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper–Pearson interval for a proportion: never below nominal coverage.

    Examples
    --------
    >>> low, high = binomial_interval(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)
    """
    _open_unit("confidence", confidence)
    _count("n", n)
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}: it must lie between 0 and n = {n}")
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)


def white_box_bound(
    *, weight_error_tv: float, max_component_tv: float, cache_tv: ArrayLike, weights: ArrayLike, draw_tv: float
) -> Certificate:
    """Bound the TV of one ME step by what was measured inside it, without a histogram over the vocabulary.

        TV ≤ ½ ‖λ̂ − λ‖₁ · max_ij TV(P_i, P_j) + Σ_i λ_i TV(P_i used, P_i fresh) + TV_draw

    by the triangle inequality: wrong weights, stale or inexact caches, a biased token draw. For K = 2 and exact
    caches and draws it is an equality. A term that is itself a confidence bound makes the total one.

    Parameters
    ----------
    weight_error_tv
        ½ ‖λ̂ − λ‖₁, the TV between the component frequencies and the weights, or a bound on it.
    max_component_tv
        The largest TV between two components at this prefix, as used.
    cache_tv, weights
        (K,) TV between the law each component used and its fresh law; the weights λ.
    draw_tv
        TV of the token draw given the component, or a bound on it.

    Examples
    --------
    >>> white_box_bound(
    ...     weight_error_tv=0.01, max_component_tv=0.5, cache_tv=[0.0, 0.002], weights=[0.5, 0.5], draw_tv=0.003
    ... ).total
    0.009...
    """
    caches, mixing = np.asarray(cache_tv, dtype=np.float64), _law("weights", weights)
    if caches.shape != mixing.shape:
        raise ValueError(f"cache_tv has shape {caches.shape} and weights {mixing.shape}: give one of each a component")
    scalars = {"weight_error_tv": weight_error_tv, "max_component_tv": max_component_tv, "draw_tv": draw_tv}
    for name, value in [*scalars.items(), *(("cache_tv", float(cache)) for cache in caches)]:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}: a total variation lies in [0, 1]")
    return Certificate(weight_error_tv * max_component_tv, float(mixing @ caches), draw_tv)


def _detectable_noncentrality(cells: int, level: float, power: float) -> float:
    _open_unit("level", level)
    _open_unit("power", power)
    if cells < 2:
        raise ValueError(f"cells is {cells}: a partition needs at least two")
    if power <= level:
        raise ValueError(f"power {power} does not exceed level {level}: a test that ignores the draws has that")
    critical = chi2.isf(level, cells - 1)
    high = 1.0
    while ncx2.sf(critical, cells - 1, high) < power:
        high *= 2.0
    return float(brentq(lambda nc: ncx2.sf(critical, cells - 1, nc) - power, 0.0, high))


def _noncentral_tv(statistic: float, cells: int, n: int, confidence: float) -> float:
    def excess(nc: float) -> float:
        return float(ncx2.cdf(statistic, cells - 1, nc)) - (1.0 - confidence)

    # TV = 1 is the noncentrality 4n. A statistic this large is compatible with it.
    return 1.0 if excess(4.0 * n) >= 0.0 else 0.5 * math.sqrt(brentq(excess, 0.0, 4.0 * n) / n)


def _pearson(draws: Floats, law: Floats, n: int, min_expected: float) -> tuple[float, int, int]:
    """Pearson's X², the number of cells after pooling, and the draws outside the support."""
    off_support = int(draws[law == 0].sum())
    order = np.argsort(law, kind="stable")[np.count_nonzero(law == 0) :]
    observed, expected = draws[order], n * law[order]
    pooled = int(np.searchsorted(expected, min_expected))
    if pooled:
        # The pooled cell has to be large enough itself.
        pooled = max(pooled, int(np.searchsorted(np.cumsum(expected), min_expected)) + 1)
        observed = np.concatenate([[observed[:pooled].sum()], observed[pooled:]])
        expected = np.concatenate([[expected[:pooled].sum()], expected[pooled:]])
    if expected.size < 2:
        raise ValueError(
            f"counts: n = {n} draws leave {expected.size} cell(s) that expect {min_expected:g} draws, and a "
            "partition needs two; draw more, choose coarser cells, or use tv_upper_bound"
        )
    statistic = math.inf if off_support else float(np.sum((observed - expected) ** 2 / expected))
    return statistic, expected.size, off_support


def _counts_and_law(
    counts: ArrayLike, probs: ArrayLike, floor: float = 0.0, *, name: str = "counts"
) -> tuple[Floats, Floats, int]:
    draws, law = np.asarray(counts, dtype=np.float64), _law("probs", probs)
    if draws.shape != law.shape:
        raise ValueError(f"{name} has shape {draws.shape} and probs {law.shape}: give one of each a cell")
    if not (np.isfinite(draws) & (draws >= 0) & (draws == np.floor(draws))).all():
        raise ValueError(f"{name} must hold whole numbers of draws, none negative; pass counts, not frequencies")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}: a total variation lies in [0, 1]")
    n = int(draws.sum())
    _count(f"the total of {name}", n, minimum=2)
    return draws, law, n


def _law(name: str, probs: ArrayLike) -> Floats:
    law = np.asarray(probs, dtype=np.float64)
    if law.ndim != 1 or law.size == 0:
        raise ValueError(f"{name} has shape {law.shape}: give one dimension with at least one entry")
    total = law.sum()
    if not (law >= 0).all() or not abs(total - 1.0) <= SUM_TOLERANCE:
        raise ValueError(f"{name} must be non-negative and sum to 1, got a sum of {total}; pass exp of log-probs")
    return law / total


def _count(name: str, value: int, *, minimum: int = 1) -> None:
    if value < minimum:
        raise ValueError(f"{name} is {value}: at least {minimum} draw(s) are needed")


def _confidence(value: float) -> None:
    if not 0.5 < value < 1.0:
        raise ValueError(f"confidence is {value}: a one-sided bound needs more than 0.5 and less than 1")


def _open_unit(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}: it must lie strictly between 0 and 1")
