"""Dependence within a sequence and between the rows of a batch, and what it leaves of a sample.

Tokens of a sequence depend on each other; sequences do not, unless they share draws. So every interval here counts
sequences (or batches), never tokens. `autocorrelation_time` says how many tokens a sequence is worth, `drift` whether a
statistic moves with the position, `survival_curve` and `log_rank_test` when sequences end, and `design_effect` and
`clustered_difference` correct what rows that share component draws do to a test: each row keeps its law, and a mean
over N rows in batches of B has the variance of N/(1 + (B-1) ρ) independent ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, stats

from me_stats.chi_square import check_level
from me_stats.per_sequence import checked_sample
from me_stats.sensitivity.estimate import Estimate
from me_stats.tails import detectable_shift

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def autocovariances(values: ArrayLike, *, centre: ArrayLike | None = None) -> Floats:
    """Sums (N, T) over t of ``(v_t - c)(v_{t+k} - c)`` at lags k = 0..T-1 of rows (N, T), by FFT.

    c is the row's mean, or `centre` (a number, or one per row). Divide by T for the usual estimate, by T-k for an
    unbiased one about a known mean.

    >>> autocovariances([[1.0, 3.0, 2.0, 2.0]]).round(9).tolist()[0][:2]
    [2.0, -1.0]
    """
    v = checked_sample("values", values, ndim=2, at_least=1)
    middle = v.mean(1) if centre is None else np.broadcast_to(np.asarray(centre, dtype=np.float64), len(v))
    steps = v.shape[1]
    size = fft.next_fast_len(2 * steps, real=True)
    spectrum = fft.rfft(v - middle[:, None], size, axis=1)
    return np.asarray(fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :steps])


def geyer_time(autocovariance: ArrayLike) -> Floats:
    """Integrated autocorrelation time (N,) of autocovariances (N, T): Geyer's initial monotone sequence.

    ``tau = -1 + 2 sum_k Γ_k/γ_0``, Γ_k = γ_2k + γ_2k+1 while positive, none larger than one before; at least 1/T.
    Raises ValueError for a row without variance. Source: Geyer (1992), Practical Markov chain Monte Carlo, Statistical
    Science 7. The rule is a theorem for reversible chains, and a usual choice for other stationary sequences.

    >>> geyer_time([0.8 ** np.arange(200)]).round(6).tolist()  # (1 + 0.8)/(1 - 0.8)
    [9.0]
    """
    gamma = np.asarray(autocovariance, dtype=np.float64)
    if gamma.ndim != 2 or gamma.shape[1] < 2 or not np.isfinite(gamma).all():
        raise ValueError(f"autocovariance must be (N, T) finite numbers with T at least 2, got shape {gamma.shape}")
    if not (gamma[:, 0] > 0).all():
        raise ValueError(
            f"row {int(np.argmin(gamma[:, 0]))} has no variance: its autocorrelation is not defined; drop it"
        )
    steps = gamma.shape[1]
    pairs = gamma[:, : steps - steps % 2].reshape(len(gamma), -1, 2).sum(2)
    positive = np.logical_and.accumulate(pairs > 0, axis=1)
    total = np.where(positive, np.minimum.accumulate(pairs, axis=1), 0.0).sum(1)
    return np.asarray(np.maximum(-1 + 2 * total / gamma[:, 0], 1 / steps))


@dataclass(frozen=True, eq=False)
class AutocorrelationTime:
    """`pooled` time over all rows with its interval, the time of each row `rows` (N,), and T = `steps`."""

    pooled: Estimate
    rows: Floats
    steps: int

    @property
    def effective(self) -> Floats:
        """Effective tokens (N,) of each row, T/tau."""
        return self.steps / self.rows

    @property
    def effective_tokens(self) -> float:
        """Effective tokens of the sample, N T/(pooled tau)."""
        return len(self.rows) * self.steps / self.pooled.value


def autocorrelation_time(values: ArrayLike, *, confidence: float = 0.95) -> AutocorrelationTime:
    """Integrated autocorrelation time of a per-token statistic (N, T), by `geyer_time`, per row and pooled.

    Rows are centred at their own mean with divisor T, which is biased low for rows shorter than about 50 tau; a row
    that never moves is worth one token, tau = T. Never drop such rows: that shortens the time.

    The pooled time centres at the common mean with divisor T-k and jackknifes over rows on the log scale: rows are
    independent. Geyer's cut falls where noise first turns negative, so the sum up to it is too high and its jackknife,
    which keeps the cut, too narrow (a 95% interval covered in 90%); half as many lags again mend both. The interval is
    right for rows of 10 tau or more, and too narrow for a statistic that alternates (87% at a correlation of -0.9).
    Rows must have one length (cut them) and no drift (`drift`): a trend is dependence at every lag. Raises ValueError
    for values that are all equal.

    >>> rng = np.random.default_rng(0)
    >>> time = autocorrelation_time(rng.normal(size=(200, 64)))
    >>> time.pooled.interval[0] < 1 < time.pooled.interval[1]
    True
    """
    v = checked_sample("values", values, ndim=2, at_least=3)
    check_level(1 - confidence)
    n, steps = v.shape
    if steps < 4:
        raise ValueError(f"values must have at least 4 steps a row, got {steps}")
    if np.ptp(v) == 0:
        raise ValueError(f"values are all {v[0, 0]:g}: the autocorrelation of a constant is not defined")
    moving = np.ptp(v, axis=1) > 0
    rows = np.full(n, float(steps))
    rows[moving] = geyer_time(autocovariances(v[moving]) / steps) if moving.any() else steps
    unbiased = autocovariances(v, centre=v.mean()) / np.arange(steps, 0, -1)
    together = unbiased.sum(0)
    pairs = together[: steps - steps % 2].reshape(-1, 2).sum(1)
    lags = max(3, 3 * int(np.logical_and.accumulate(pairs > 0).sum()))
    value = float(_time_to(lags, together[None])[0])
    without = np.log(_time_to(lags, together - unbiased))
    spread = math.sqrt((n - 1) * float(without.var()))
    radius = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * spread
    interval = (value * math.exp(-radius), value * _exp(radius))
    return AutocorrelationTime(
        Estimate(value, value * spread, interval, n, "positive pairs, half as many again"), rows, steps
    )


def _time_to(lags: int, gamma: Floats) -> Floats:
    return np.asarray(np.maximum(-1 + 2 * gamma[:, :lags].sum(1) / gamma[:, 0], 1 / gamma.shape[1]))


@dataclass(frozen=True, eq=False)
class Drift:
    """A per-token statistic along the position, from n sequences.

    `starts` (B,) first step of each block, `means`, `lower`, `upper` (B,) intervals that hold together; `slope` change
    per token with its interval; `pvalue` two-sided for slope 0.
    """

    starts: Ints
    means: Floats
    lower: Floats
    upper: Floats
    slope: Estimate
    pvalue: float


def drift(values: ArrayLike, *, blocks: int = 8, confidence: float = 0.95) -> Drift:
    """Block means along the position of a per-token statistic (N, T), with a trend test by sequence.

    Each sequence gives one mean per block and one least-squares slope; t intervals over sequences, Bonferroni over
    blocks. A slope of 0 in the mean is the null, whatever the dependence within a sequence. All rows must have T
    steps: a mean over the rows that are still running compares different rows. Raises ValueError for more blocks than
    steps.

    >>> rng = np.random.default_rng(0)
    >>> drift(rng.normal(size=(200, 40)) + 0.01 * np.arange(40)).pvalue < 1e-6
    True
    """
    v = checked_sample("values", values, ndim=2)
    n, steps = v.shape
    check_level(1 - confidence)
    if steps < 2 or not 1 <= blocks <= steps:
        raise ValueError(f"blocks must lie in 1..{steps} with at least 2 steps a row, got {blocks}")
    starts = np.arange(blocks) * steps // blocks
    sizes = np.diff(np.append(starts, steps))
    per_row = np.add.reduceat(v, starts, axis=1) / sizes
    radius = float(stats.t.isf((1 - confidence) / (2 * blocks), n - 1)) * per_row.std(0, ddof=1) / math.sqrt(n)
    position = np.arange(steps) - (steps - 1) / 2
    slopes = v @ (position / (position @ position))
    value, stderr = float(slopes.mean()), float(slopes.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * stderr
    slope = Estimate(value, stderr, (value - half, value + half), n, "slope per sequence")
    if stderr == 0:
        pvalue = 1.0 if value == 0 else 0.0
    else:
        pvalue = 2 * float(stats.t.sf(abs(value) / stderr, n - 1))
    means = per_row.mean(0)
    return Drift(starts, means, means - radius, means + radius, slope, pvalue)


@dataclass(frozen=True, eq=False)
class Survival:
    """P(more than t tokens), t = 0..T-1: `alive` (T,) with `lower`, `upper`, from n sequences."""

    alive: Floats
    lower: Floats
    upper: Floats
    n: int


def survival_curve(
    lengths: ArrayLike, *, max_new_tokens: int, confidence: float = 0.95, simultaneous: bool = True
) -> Survival:
    """How many sequences are still running after t tokens, with exact binomial (Clopper-Pearson) intervals.

    `lengths` (N,) in 1..T, T = `max_new_tokens`. Nothing is censored before T, so Kaplan-Meier is the share of rows
    with more than t tokens; what would happen after T is not said. `simultaneous` spends Bonferroni's share per t, so
    that all intervals hold together. Raises ValueError for lengths outside 1..T.

    >>> survival_curve([1, 2, 2, 4], max_new_tokens=4).alive.tolist()
    [1.0, 0.75, 0.25, 0.25]
    """
    rows = _lengths("lengths", lengths, max_new_tokens)
    check_level(1 - confidence)
    n = len(rows)
    running = n - np.bincount(rows, minlength=max_new_tokens + 1).cumsum()[:max_new_tokens]
    # Every row writes its first token, so t = 0 is no estimate.
    tail = (1 - confidence) / 2 / (max(1, max_new_tokens - 1) if simultaneous else 1)
    lower = np.where(running > 0, stats.beta.ppf(tail, np.maximum(running, 1), n - running + 1), 0.0)
    upper = np.where(running < n, stats.beta.isf(tail, running + 1, np.maximum(n - running, 1)), 1.0)
    lower[0] = 1.0
    return Survival(running / n, lower, upper, n)


@dataclass(frozen=True)
class LogRank:
    """`statistic` z, positive where x ends earlier; two-sided normal `pvalue`; hazard ratio found with power 0.8."""

    statistic: float
    pvalue: float
    n: int
    m: int
    ends: int
    min_detectable: float
    level: float

    @property
    def rejected(self) -> bool:
        """Whether the null is rejected at `level`."""
        return self.pvalue <= self.level


def log_rank_test(
    x_lengths: ArrayLike, x_ended: ArrayLike, y_lengths: ArrayLike, y_ended: ArrayLike, *, level: float = 1e-3
) -> LogRank:
    """Do two samplers end their sequences at the same times? Log-rank test of lengths (N,), (M,).

    `ended` (N,) is True where an end-of-sequence token stopped the row, False at the length limit (censored). At each
    t: ends of x minus their hypergeometric mean, over the square root of the summed variances. The normal tail is
    asymptotic: with fewer than 100 ends don't ask for levels below 1e-3. `min_detectable` is the ratio of hazards > 1
    found with power 0.8, ``exp((z_{level/2} + z_.8)/sqrt(V))`` (Schoenfeld 1981). No end gives p-value 1. Rows are
    independent: of rows that share component draws take `Trace.one_per_group`.

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.geometric(0.1, 300), rng.geometric(0.2, 300)
    >>> log_rank_test(x, np.ones(300, bool), y, np.ones(300, bool)).rejected
    True
    """
    check_level(level)
    longest = int(max(np.max(x_lengths, initial=1), np.max(y_lengths, initial=1)))
    counts = []
    for name, lengths, ended in (("x", x_lengths, x_ended), ("y", y_lengths, y_ended)):
        rows, stopped = _lengths(f"{name}_lengths", lengths, longest), np.asarray(ended)
        if stopped.shape != rows.shape or stopped.dtype != np.bool_:
            raise ValueError(f"{name}_ended must be {len(rows)} booleans: True where an end-of-sequence token stopped")
        at_risk = len(rows) - np.bincount(rows, minlength=longest + 1).cumsum()[:longest]
        counts.append((at_risk.astype(np.float64), np.bincount(rows[stopped], minlength=longest + 1)[1:], len(rows)))
    (risk_x, ends_x, n), (risk_y, ends_y, m) = counts
    risk, ends = risk_x + risk_y, ends_x + ends_y
    share = np.divide(risk_x, risk, out=np.zeros(longest), where=risk > 0)
    left = np.divide(risk - ends, risk - 1, out=np.zeros(longest), where=risk > 1)
    variance = float((ends * share * (1 - share) * left).sum())
    if variance <= 0:
        return LogRank(0.0, 1.0, n, m, int(ends.sum()), math.inf, level)
    z = float((ends_x - ends * share).sum()) / math.sqrt(variance)
    found = math.exp(detectable_shift(level) / math.sqrt(variance))
    return LogRank(z, 2 * float(stats.norm.sf(abs(z))), n, m, int(ends.sum()), found, level)


def design_effect(values: ArrayLike, batch: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """How much rows that share draws inflate the variance of a mean: ``1 + (B-1) ρ`` for one value per row (N,).

    ρ is the intraclass correlation of `batch` (N,), by one-way analysis of variance: ``(F-1)/(F+B-1)``, F = MSB/MSW;
    B is the batch size, for unequal ones ``(N - sum B_b^2/N)/(batches-1)``. N/(design effect) independent rows say as
    much. The interval jackknifes its logarithm over batches with Student's t, so neither rows nor batches need be
    normal; below 1 means batches that are more even than chance. Ask for 100 batches where values have long tails.
    Raises ValueError for fewer than 4 batches, no batch of two rows, or no variance within batches.

    >>> rng = np.random.default_rng(0)
    >>> batch = np.repeat(np.arange(200), 5)
    >>> effect = design_effect(rng.normal(size=1000) + rng.normal(size=200)[batch], batch)
    >>> effect.interval[0] < 1 + 4 * 0.5 < effect.interval[1]
    True
    """
    v, place, sizes = _grouped(values, batch, "batch")
    v = v - v.mean()
    check_level(1 - confidence)
    count, n = len(sizes), len(v)
    if count < 4 or n == count:
        raise ValueError(f"batch must name at least 4 batches, one of them with two rows, got {count} for {n} rows")
    sums = np.bincount(place, weights=v)
    inner = np.bincount(place, weights=(v - (sums / sizes)[place]) ** 2)
    size = (n - float((sizes**2).sum()) / n) / (count - 1)
    value = _design(_f_ratio(count, n, sums.sum(), (sums**2 / sizes).sum(), inner.sum()), size)
    # Everything but one batch: sums over rows and over batches lose its share.
    ratios = _f_ratio(
        count - 1, n - sizes, sums.sum() - sums, (sums**2 / sizes).sum() - sums**2 / sizes, inner.sum() - inner
    )
    logs = np.log(_design(ratios, size))
    stderr = math.sqrt((count - 1) ** 2 / count * float(logs.var(ddof=1)))
    radius = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * stderr
    interval = (float(value * math.exp(-radius)), float(value * _exp(radius)))
    return Estimate(float(value), float(value * stderr), interval, n, "one-way analysis of variance")


def clustered_mean(values: ArrayLike, groups: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of rows (N,) with a standard error that counts `groups` (N,), not rows: right where a group shares draws.

    ``stderr^2 = k/(k-1) sum_g (sum_{i in g} (x_i - mean))^2/N^2`` over k groups, Student's t with k-1 degrees of
    freedom. Groups of one row give the usual interval. Raises ValueError for fewer than two groups. Source: Liang and
    Zeger (1986), Longitudinal data analysis using generalized linear models, Biometrika 73.

    >>> clustered_mean([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]).stderr
    1.0
    """
    v, place, sizes = _grouped(values, groups, "groups")
    check_level(1 - confidence)
    mean, stderr = float(v.mean()), _clustered_stderr(v - v.mean(), place, len(sizes))
    radius = float(stats.t.ppf(0.5 + confidence / 2, len(sizes) - 1)) * stderr
    return Estimate(mean, stderr, (mean - radius, mean + radius), len(v), f"{len(sizes)} groups")


@dataclass(frozen=True)
class ClusteredDifference:
    """`difference` with its interval, and the two-sided `pvalue` for 0 by Welch's t on groups."""

    difference: Estimate
    pvalue: float


def clustered_difference(
    x: ArrayLike, y: ArrayLike, *, x_groups: ArrayLike, y_groups: ArrayLike,
    of: Literal["mean", "log variance"] = "mean", confidence: float = 0.95,
) -> ClusteredDifference:  # fmt: skip
    """Means, or log variances, of two samples (N,), (M,) whose rows share draws within groups (N,), (M,).

    Standard errors of means as in `clustered_mean`, of log variances by the jackknife over groups; Welch's degrees of
    freedom on groups. Samples must not share groups with each other. Raises
    ValueError for fewer than two groups a side or no variance.

    >>> rng = np.random.default_rng(0)
    >>> batch = np.repeat(np.arange(50), 20)
    >>> x, y = (rng.normal(size=50)[batch] + rng.normal(size=1000) for _ in range(2))
    >>> clustered_difference(x, y, x_groups=batch, y_groups=batch).pvalue > 0.01
    True
    """
    if of not in ("mean", "log variance"):
        raise ValueError(f"of must be 'mean' or 'log variance', got {of!r}")
    check_level(1 - confidence)
    level, squares, degrees, rows = [], [], [], 0
    for name, values, groups in (("x_groups", x, x_groups), ("y_groups", y, y_groups)):
        v, place, sizes = _grouped(values, groups, name)
        centre, error = float(v.mean()), _clustered_stderr(v - v.mean(), place, len(sizes))
        if of == "log variance":
            centre, error = _grouped_log_variance(v - v.mean(), place, sizes)
        level.append(centre)
        squares.append(error**2)
        degrees.append(len(sizes) - 1)
        rows += len(v)
    value, stderr = level[0] - level[1], math.sqrt(sum(squares))
    if stderr == 0:
        return ClusteredDifference(Estimate(value, 0.0, (value, value), rows, "clustered"), float(value == 0))
    df = sum(squares) ** 2 / sum(s**2 / d for s, d in zip(squares, degrees, strict=True))
    radius = float(stats.t.ppf(0.5 + confidence / 2, df)) * stderr
    difference = Estimate(value, stderr, (value - radius, value + radius), rows, f"clustered, difference of {of}s")
    return ClusteredDifference(difference, 2 * float(stats.t.sf(abs(value) / stderr, df)))


def _exp(x: float) -> float:
    """Few rows and a high confidence leave an end without bound."""
    return math.exp(x) if x < 700 else math.inf


def _f_ratio(count: int, n: Any, total: Any, between: Any, inner: Any) -> Any:
    if not np.all(inner > 1e-12 * np.abs(between)):
        raise ValueError("values do not vary within batches: one value per batch is all there is; compare those")
    return (between - total**2 / n) / (count - 1) / (inner / (n - count))


def _design(ratio: Any, size: float) -> Any:
    """1 + (B-1) ρ with ρ = (F-1)/(F+B-1), which is F B/(F+B-1)."""
    return ratio * size / (ratio + size - 1)


def _clustered_stderr(centred: Floats, place: Ints, count: int) -> float:
    sums = np.bincount(place, weights=centred, minlength=count)
    return math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(centred)


def _grouped_log_variance(centred: Floats, place: Ints, sizes: Ints) -> tuple[float, float]:
    """Log variance, and its standard error from leaving out one group at a time."""
    n, count = len(centred), len(sizes)
    one, two = np.bincount(place, weights=centred), np.bincount(place, weights=centred**2)
    total = float(two.sum())
    left, kept = two.sum() - two, n - sizes
    without = (left - (one.sum() - one) ** 2 / kept) / np.maximum(kept - 1, 1)
    if not total > 0 or not (without > 1e-12 * total / n).all():
        raise ValueError("values must vary in more than one group; their log variance has no error otherwise")
    return math.log(total / (n - 1)), math.sqrt((count - 1) ** 2 / count * float(np.log(without).var(ddof=1)))


def _grouped(values: ArrayLike, groups: ArrayLike, name: str) -> tuple[Floats, Ints, Ints]:
    v, labels = checked_sample("values", values), np.asarray(groups)
    if labels.shape != v.shape:
        raise ValueError(f"{name} must name one group for each of the {len(v)} rows, got shape {labels.shape}")
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(f"{name} must name at least two groups; one group is one observation")
    return v, place, sizes


def _lengths(name: str, lengths: ArrayLike, longest: int) -> Ints:
    rows = np.asarray(lengths)
    integral = rows.ndim == 1 and rows.size > 0 and np.issubdtype(rows.dtype, np.integer)
    if not integral or rows.min() < 1 or rows.max() > longest:
        raise ValueError(f"{name} must be (N,) integers in 1..{longest}, got shape {rows.shape}")
    return rows.astype(np.int64)
