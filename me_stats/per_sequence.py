"""Two samplers compared by one value per sequence: sequences are independent, pooled tokens are not.

CE and ME have one law, so means, variances and whole laws of any row statistic agree; a gap is a bug, or rows that
depend on each other (`dependence`). Each test says what it could have found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.chi_square import check_level
from me_stats.sensitivity.estimate import Estimate
from me_stats.tails import POWER
from me_stats.twosample import Scores

Floats = NDArray[np.float64]

_CHUNK = 1 << 22  # entries of the largest array of labels


def variance_ratio(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Var x/Var y of independent samples (N,), (M,), one value per sequence; the interval needs no normality.

    Jackknife of log s^2 in each sample, Welch's t on the log scale; `stderr` is that of the ratio. Raises ValueError
    for fewer than 4 values a side or a sample without variance. Source: Miller (1968), Jackknifing variances, Ann.
    Math. Statist. 39.

    >>> rng = np.random.default_rng(0)
    >>> ratio = variance_ratio(rng.exponential(size=500), rng.exponential(size=500))
    >>> ratio.interval[0] < 1 < ratio.interval[1]
    True
    """
    check_level(1 - confidence)
    parts = [_log_variance(name, values) for name, values in (("x", x), ("y", y))]
    (first, a, n), (second, b, m) = parts
    value, spread = math.exp(first - second), math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    radius = float(stats.t.ppf(0.5 + confidence / 2, df)) * spread
    interval = (value * math.exp(-radius), value * math.exp(radius))
    return Estimate(value, value * spread, interval, n + m, "jackknife of log variances")


def detectable_ratio(n: int, *, kurtosis: float = 3.0, level: float = 0.05, power: float = POWER) -> float:
    """Smallest ratio > 1 of two variances that `variance_ratio` tells from 1 with n sequences a side.

    ``exp((z_{1-level/2} + z_power) sqrt(2 (kurtosis-1)/n))``, kurtosis E(x-mu)^4/sigma^4: 3 for a normal statistic.

    >>> round(detectable_ratio(1000), 3), round(detectable_ratio(1000, kurtosis=9), 3)
    (1.194, 1.425)
    """
    check_level(level)
    if n < 2 or not kurtosis >= 1 or not 0 < power < 1:
        raise ValueError(f"need n >= 2, kurtosis >= 1 and power in (0, 1), got {n}, {kurtosis}, {power}")
    z = float(stats.norm.isf(level / 2) + stats.norm.ppf(power))
    return math.exp(z * math.sqrt(2 * (kurtosis - 1) / n))


@dataclass(frozen=True)
class SequenceTest:
    """One test of one statistic: `pvalue` is raw, `min_detectable` is found with power 0.8 at its share of the level.

    For `kind` "mean" `statistic` is the difference of means and `min_detectable` in its units; for "KS" both are
    distances of distribution functions.
    """

    name: str
    kind: str
    statistic: float
    pvalue: float
    min_detectable: float


@dataclass(frozen=True)
class SequenceTests:
    """Bonferroni over `tests` on n and m sequences. Not rejected: no difference of the listed sizes, not equality."""

    pvalue: float
    level: float
    n: int
    m: int
    tests: tuple[SequenceTest, ...]

    @property
    def rejected(self) -> bool:
        """Whether the null is rejected at `level`."""
        return self.pvalue <= self.level


def sequence_tests(
    scores: Scores, *, level: float = 1e-3, permutations: int = 9999, rng: np.random.Generator
) -> SequenceTests:
    """Kolmogorov-Smirnov and a permutation test of means for each statistic: one value per sequence, never per token.

    `scores` maps names to pairs (N,), (M,), such as CE's and ME's row log-probabilities. KS p-values are exact or
    asymptotic as scipy chooses, conservative at ties; those of means are (1+#)/(1+B) on relabellings shared by all
    statistics. Sequences must be independent: correct shared draws first (`dependence.clustered_difference`). Raises
    ValueError for malformed scores, or too few permutations to reject at `level`.

    >>> rng = np.random.default_rng(0)
    >>> pair = rng.normal(size=200), rng.normal(1.0, 1.0, size=200)
    >>> [test.pvalue < 1e-3 for test in sequence_tests({"score": pair}, rng=rng).tests]
    [True, True]
    """
    check_level(level)
    if not scores:
        raise ValueError("scores must name at least one statistic")
    pairs = {
        k: (checked_sample(f"scores[{k!r}]", a), checked_sample(f"scores[{k!r}]", b)) for k, (a, b) in scores.items()
    }
    sizes = {(len(a), len(b)) for a, b in pairs.values()}
    if len(sizes) > 1:
        raise ValueError(f"scores must all have the same sequences, got sizes {sorted(sizes)}")
    ((n, m),) = sizes
    count = 2 * len(pairs)
    if permutations < math.ceil(count / level * (1 - 1e-9)) - 1:
        raise ValueError(
            f"permutations is {permutations}: {count} tests at {level:g} need {math.ceil(count / level) - 1}"
        )
    share, scale = level / count, math.sqrt(1 / n + 1 / m)
    z = float(stats.norm.isf(share / 2) + stats.norm.ppf(POWER))
    mean_pvalues = _permuted_means(np.stack([np.concatenate(pair) for pair in pairs.values()], 1), n, permutations, rng)
    # Where the true distance is D, the empirical one is about N(D, at most scale^2/4) at the same point.
    ks_floor = (math.sqrt(-math.log(share / 2) / 2) + float(stats.norm.ppf(POWER)) / 2) * scale
    tests = []
    for (name, (a, b)), pvalue in zip(pairs.items(), mean_pvalues.tolist(), strict=True):
        spread = math.sqrt(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / math.sqrt(n + m - 2)
        tests.append(SequenceTest(name, "mean", float(a.mean() - b.mean()), pvalue, z * spread * scale))
        ks = stats.ks_2samp(a, b)
        tests.append(SequenceTest(name, "KS", float(ks.statistic), float(ks.pvalue), min(1.0, ks_floor)))
    return SequenceTests(min(1.0, count * min(test.pvalue for test in tests)), level, n, m, tuple(tests))


def checked_sample(name: str, values: ArrayLike, *, ndim: int = 1, at_least: int = 2) -> Floats:
    """`values` as float64 with `ndim` dimensions and `at_least` finite rows, or a ValueError that says `name`."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or len(array) < at_least or array.size == 0 or not np.isfinite(array).all():
        shape = "(N,)" if ndim == 1 else "(N, T)"
        raise ValueError(f"{name} must be {shape} finite numbers with N at least {at_least}, got shape {array.shape}")
    return array


def _log_variance(name: str, values: ArrayLike) -> tuple[float, float, int]:
    """Jackknifed log variance, its squared standard error, and n."""
    sample = checked_sample(name, values, at_least=4)
    n = len(sample)
    squares = (sample - sample.mean()) ** 2
    total = float(squares.sum())
    without = (total - squares * n / (n - 1)) / (n - 2)
    if not (without > 1e-12 * total / n).all():
        raise ValueError(f"{name} must vary in more than one value; its variance has no scale otherwise")
    pseudo = n * math.log(total / (n - 1)) - (n - 1) * np.log(without)
    return float(pseudo.mean()), float(pseudo.var(ddof=1)) / n, n


def _permuted_means(columns: Floats, n: int, permutations: int, rng: np.random.Generator) -> Floats:
    """Two-sided p-values of differences of means of columns (N + M, S), the first n rows against the rest."""
    centred = columns - columns.mean(0)
    observed = np.abs(centred[:n].sum(0))
    slack = 1e-9 * np.abs(centred).sum(0)  # equal relabellings differ by rounding
    labels = np.arange(len(columns)) < n
    extreme, size = np.zeros(columns.shape[1]), max(1, _CHUNK // len(columns))
    for begin in range(0, permutations, size):
        drawn = rng.permuted(np.tile(labels, (min(size, permutations - begin), 1)), axis=1)
        extreme += (np.abs(drawn.astype(np.float64) @ centred) >= observed - slack).sum(0)
    return (1 + extreme) / (1 + permutations)
