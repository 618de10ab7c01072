"""Two samplers compared by one value per sequence: sequences are independent, pooled tokens are not.

CE and ME have one law, so means, variances and whole laws of any row statistic agree; a gap is a bug, or rows that
depend on each other (`dependence`). Each test says what it could have found.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.chi_square import check_level
from me_stats.sensitivity.estimate import Estimate
from me_stats.tails import POWER, detectable_shift
from me_stats.twosample import Scores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

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
    return math.exp(detectable_shift(level, power) * math.sqrt(2 * (kurtosis - 1) / n))


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
    """Bonferroni over `tests` on n and m sequences. Not rejected: no difference of the listed sizes, not equality.

    `groups` counts what is independent on each side: (n, m), or the groups of sequences that share draws.
    """

    pvalue: float
    level: float
    n: int
    m: int
    groups: tuple[int, int]
    tests: tuple[SequenceTest, ...]

    @property
    def rejected(self) -> bool:
        """Whether the null is rejected at `level`."""
        return self.pvalue <= self.level


def sequence_tests(
    scores: Scores, *, x_groups: ArrayLike | None = None, y_groups: ArrayLike | None = None, level: float = 1e-3,
    permutations: int = 9999, rng: np.random.Generator,
) -> SequenceTests:  # fmt: skip
    """Kolmogorov-Smirnov and a permutation test of means for each statistic: one value per sequence, never per token.

    `scores` maps names to pairs (N,), (M,), such as CE's and ME's row log-probabilities. KS p-values are exact or
    asymptotic as scipy chooses, conservative at ties; those of means are (1+#)/(1+B) on relabellings shared by all
    statistics.

    Sequences must be independent, or `x_groups` (N,) and `y_groups` (M,) say which of them share draws
    (`Trace.groups`). Whole groups are then relabelled, among groups of one size, and both kinds of p-value are
    (1+#)/(1+B): exact where groups of one size are exchangeable, so where both sides are drawn in the same way (the
    same prompts in each group, shared draws on both sides, and none between the sides: other seeds). Two sides that are
    not: `dependence.clustered_difference`, or one row per group. `min_detectable` counts effective sequences, N over
    the design effect of the mean, and of the worst decile for KS.

    Raises ValueError for malformed scores, groups on one side alone, or too few permutations or groups to reject at
    `level`.

    >>> rng = np.random.default_rng(0)
    >>> pair = rng.normal(size=200), rng.normal(1.0, 1.0, size=200)
    >>> [test.pvalue < 1e-3 for test in sequence_tests({"score": pair}, rng=rng).tests]
    [True, True]
    >>> shared = np.repeat(np.arange(8), 25)  # a shift of each group, which 200 independent rows would not have
    >>> pair = tuple(rng.normal(size=200) + rng.normal(size=8)[shared] for _ in range(2))
    >>> sequence_tests({"score": pair}, x_groups=shared, y_groups=shared, level=0.01, rng=rng).rejected
    False
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
    if (x_groups is None) != (y_groups is None):
        raise ValueError(
            "x_groups and y_groups must be given together: groups on one side alone are not exchangeable with single "
            "sequences on the other; use dependence.clustered_difference, or one row per group (Trace.one_per_group)"
        )
    grouped = x_groups is not None
    units = _Units.of(n, m, x_groups, y_groups)
    if grouped and math.log2(units.relabellings) < math.log2(2 * count / level):
        raise ValueError(
            f"{units.counts[0]} and {units.counts[1]} groups allow {units.relabellings:,} relabellings, which "
            f"exchange groups of one size: too few to reject {count} tests at {level:g}; draw more groups"
        )
    share, scale = level / count, math.sqrt(1 / n + 1 / m)
    z = detectable_shift(share)
    columns = np.stack([np.concatenate(pair) for pair in pairs.values()], 1)
    # Where the true distance is D, the empirical one is about N(D, at most scale^2/4) at the same point.
    ks_floor = (math.sqrt(-math.log(share / 2) / 2) + float(stats.norm.ppf(POWER)) / 2) * scale
    mean_pvalues, distances, ks_pvalues = _permuted(columns, units, permutations, rng, with_ks=grouped)
    tests = []
    for i, (name, (a, b)) in enumerate(pairs.items()):
        inside = np.concatenate([a - a.mean(), b - b.mean()])
        spread = math.sqrt(float((inside**2).sum())) / math.sqrt(n + m - 2)
        floor = z * spread * scale * units.inflation(inside)
        tests.append(SequenceTest(name, "mean", float(a.mean() - b.mean()), float(mean_pvalues[i]), floor))
        if grouped:
            below = (inside[:, None] <= np.quantile(inside, np.arange(1, 10) / 10)).astype(np.float64)
            worst = max(map(units.inflation, (below - below.mean(0)).T))
            ks = float(distances[i]), float(ks_pvalues[i]), min(1.0, ks_floor * worst)
        else:
            with warnings.catch_warnings():  # scipy says when it turns from the exact law to the asymptotic one
                warnings.simplefilter("ignore", RuntimeWarning)
                found = stats.ks_2samp(a, b)
            ks = float(found.statistic), float(found.pvalue), min(1.0, ks_floor)
        tests.append(SequenceTest(name, "KS", *ks))
    return SequenceTests(min(1.0, count * min(t.pvalue for t in tests)), level, n, m, units.counts, tuple(tests))


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


@dataclass(frozen=True, eq=False)
class _Units:
    """What is relabelled: `place` (N+M,) the unit of each row, `size` (G,) its rows, `first` (G,) True on side x."""

    place: Ints
    size: Ints
    first: Bools

    @classmethod
    def of(cls, n: int, m: int, x_groups: ArrayLike | None, y_groups: ArrayLike | None) -> _Units:
        places: list[Ints] = []
        sizes: list[Ints] = []
        for name, rows, labels in (("x_groups", n, x_groups), ("y_groups", m, y_groups)):
            given = np.arange(rows) if labels is None else np.asarray(labels)
            if given.shape != (rows,):
                raise ValueError(f"{name} must name one group for each of the {rows} rows, got shape {given.shape}")
            _, place, size = np.unique(given, return_inverse=True, return_counts=True)
            if len(size) < 2:
                raise ValueError(f"{name} must name at least two groups; one group is one observation")
            places.append(place + sum(len(size) for size in sizes))
            sizes.append(size)
        size = np.concatenate(sizes)
        return cls(np.concatenate(places), size, np.arange(len(size)) < len(sizes[0]))

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.first.sum()), int((~self.first).sum())

    @property
    def relabellings(self) -> int:
        own = [self.first[self.size == size] for size in np.unique(self.size)]
        return math.prod(math.comb(len(part), int(part.sum())) for part in own)

    def sums(self, columns: Floats) -> Floats:
        """Sums over each unit (G, S) of columns (N+M, S)."""
        total = np.zeros((len(self.size), columns.shape[1]))
        np.add.at(total, self.place, columns)
        return total

    def draw(self, count: int, rng: np.random.Generator) -> Bools:
        """Relabellings (count, G): each takes as many x units of every size as there are."""
        labels = np.empty((count, len(self.size)), dtype=bool)
        for size in np.unique(self.size):
            own = self.size == size
            labels[:, own] = rng.permuted(np.tile(self.first[own], (count, 1)), axis=1)
        return labels

    def inflation(self, centred: Floats) -> float:
        """Standard error of the difference of means over what independent rows would have; 1 without groups."""
        if len(self.size) == len(self.place):
            return 1.0
        rows = self.first[self.place]
        sums, variance = self.sums(centred[:, None])[:, 0], float((centred**2).sum()) / (len(centred) - 2)
        if not variance > 0:
            return 1.0
        n, m = int(rows.sum()), int((~rows).sum())
        clustered = sum(
            k / (k - 1) * float((sums[side] ** 2).sum()) / r**2
            for k, r, side in zip(self.counts, (n, m), (self.first, ~self.first), strict=True)
        )
        return math.sqrt(clustered / (variance * (1 / n + 1 / m)))


def _permuted(
    columns: Floats, units: _Units, permutations: int, rng: np.random.Generator, *, with_ks: bool
) -> tuple[Floats, Floats, Floats]:
    """P-values of differences of means (S,) of columns (N+M, S), and KS distances (S,) with theirs if asked for."""
    centred = columns - columns.mean(0)
    sums, slack = units.sums(centred), 1e-9 * np.abs(centred).sum(0)  # equal relabellings differ by rounding
    observed = np.abs(sums[units.first].sum(0))
    curves = [_Steps(column, units) for column in columns.T] if with_ks else []
    distances = np.array([curve.distances(units.first[None])[0] for curve in curves])
    extreme, further = np.zeros((2, columns.shape[1]))
    size = max(1, _CHUNK // len(columns))
    for begin in range(0, permutations, size):
        drawn = units.draw(min(size, permutations - begin), rng)
        extreme += (np.abs(drawn.astype(np.float64) @ sums) >= observed - slack).sum(0)
        for i, curve in enumerate(curves):
            further[i] += (curve.distances(drawn) >= distances[i] - 1e-9).sum()
    return (1 + extreme) / (1 + permutations), distances, (1 + further) / (1 + permutations)


class _Steps:
    """The pooled values of one statistic in order, for the distance of distribution functions of any labelling."""

    def __init__(self, values: Floats, units: _Units) -> None:
        order = np.argsort(values, kind="stable")
        self._place, ordered = units.place[order], values[order]
        self._last = np.append(ordered[1:] > ordered[:-1], True)  # of equal values
        n = int(units.size[units.first].sum())
        self._step = 1 / n + 1 / (len(values) - n)
        self._expected = np.arange(1, len(values) + 1) / (len(values) - n)

    def distances(self, labels: Bools) -> Floats:
        """KS distances (R,) of labellings (R, G) of the units."""
        gaps = labels[:, self._place].cumsum(1) * self._step - self._expected
        return np.asarray(np.abs(gaps[:, self._last]).max(1))
