"""Two samplers on the same test items, each with several runs: how far apart are their accuracies, and how surely?

Scores in [0, 1] (0 or 1 for most tasks) stand in arrays (I, R): item by run, a run being a seed. d_i is the difference
of the two means of item i. Δ = mean d_i has two errors, for two questions:

* *these items*: the benchmark is fixed, only the runs are random. ``V = sum_i (s_i1^2/R + s_i2^2/R')/I^2``, s^2 the
  unbiased variance of an item's runs; where both arms share the seed of run r, that of their differences instead.
* *items like these*: the items are draws too. ``V = sum_i (d_i - Δ)^2/(I (I-1))`` holds both errors, for the runs of an
  item are in d_i already. Runs are no items: I·R "independent" scores give an interval that is far too narrow.

A variance estimated as 0 is no certainty: scores that never moved may move once in I·R. So the variance is taken where
the interval ends, as in Wilson's: if the mean of 0/1 scores moves by H, their variance grows by at most H. With h the
weight of one run, 1/(I min(R, R')), or of one item, 1/I, the half width H solves ``H = z sqrt(V + h H)``:

    H = z^2 h/2 + sqrt(z^2 V + (z^2 h/2)^2),

z normal for these items, Student's with I-1 degrees of freedom for items like these. With V = 0 this is 3.84 h at 95%,
where the exact Poisson bound is 3.69 h; with many items the first term is lost in the second.

Accuracy is the mean of one score, so ``|Δ| <= TV`` of the laws of the samplers' texts. Never the other way round: equal
accuracy bounds no TV, for laws may agree in what a task asks and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.sensitivity.estimate import Estimate
from me_stats.sequence_divergence import betting_interval
from me_stats.tails import POWER

Floats = NDArray[np.float64]
Items = Literal["these items", "items like these"]
Goal = Literal["equivalence", "difference"]


@dataclass(frozen=True)
class Reading:
    """Δ for one set of items: `estimate` with its interval, `pvalue` for Δ = 0, two one-sided tests at `level`.

    `guaranteed` holds at any I and R, without a normal law. `smallest_margin` is the smallest that the two one-sided
    tests would have shown. `equivalence_pvalue` is the larger of their two p-values, None without a margin.
    """

    estimate: Estimate
    pvalue: float
    guaranteed: tuple[float, float]
    level: float
    margin: float | None
    equivalence_pvalue: float | None
    smallest_margin: float

    @property
    def equivalent(self) -> bool | None:
        """Whether ``|Δ| < margin`` is shown at `level`; None without a margin."""
        return None if self.equivalence_pvalue is None else self.equivalence_pvalue <= self.level


@dataclass(frozen=True)
class ScoreSplit:
    """What varies between items and what within: of a score in each arm, and of Δ, Var = ``(between + within/R)/I``.

    `arm_between` is the variance of items' mean scores, `arm_within` the mean variance of an item's runs. `between` is
    the variance of the items' true differences, 0 for samplers of one law, `within` that of one run of each arm about
    them. Estimates of what lies between are unbiased and may be negative; `icc` and forecasts cut them at 0.
    """

    arm_between: tuple[float, float]
    arm_within: tuple[float, float]
    between: float
    within: float

    @property
    def icc(self) -> tuple[float, float]:
        """Intraclass correlation of each arm, between/(between + within); 0 for scores that do not vary."""
        cut = [max(0.0, between) for between in self.arm_between]
        first, second = (b / (b + w) if b + w > 0 else 0.0 for b, w in zip(cut, self.arm_within, strict=True))
        return first, second

    def stderr(self, items: int, runs: int, *, of: Items = "items like these") -> float:
        """Forecast of the standard error of Δ with so many items, and runs of each."""
        _whole(items=items, runs=runs)
        return math.sqrt((max(0.0, self.between) * _is_like(of) + self.within / runs) / items)

    def design_effect(self, runs: int) -> float:
        """Variance of Δ from `runs` runs of I items, over that from one run of `runs` I items: from 1 to `runs`.

        At 1, as for samplers of one law, more runs are worth as many new items; at `runs` they are worth nothing.
        """
        _whole(runs=runs)
        between = max(0.0, self.between)
        return (runs * between + self.within) / (between + self.within) if between + self.within > 0 else 1.0


@dataclass(frozen=True)
class PairedDifference:
    """Mean scores of two arms on the same `items`, Δ = first - second in both readings; no split of one run or item."""

    first: float
    second: float
    items: int
    runs: tuple[int, int]
    these_items: Reading
    items_like_these: Reading
    split: ScoreSplit | None


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, margin: float | None = None, confidence: float = 0.95,
    paired_runs: bool = False,
) -> PairedDifference:  # fmt: skip
    """Mean score of `first` (I, R) minus that of `second` (I, R') on the same items, in both readings.

    Two-sided intervals at `confidence`; two one-sided tests of ``|Δ| >= margin`` at 1 - `confidence`. With one run an
    item ``sum d_i^2/I^2`` stands in for the variance of these items: it is larger in the mean, by the items' squared
    true differences. One item says nothing about items like it. `guaranteed` is Hoeffding's interval for these items,
    and a betting interval of d_i (source: `sequence_tv`) for items like these, whose order must be set beforehand.

    Runs must be independent, but run r of both arms may share draws with `paired_runs`. Raises ValueError for arrays
    that are not 2-D, differ in items or, if paired, runs, or hold a score outside [0, 1]; for a margin outside (0, 1).

    >>> rng = np.random.default_rng(0)
    >>> right = rng.beta(1, 2, size=(400, 1))  # how often each item is answered right
    >>> found = paired_difference(*(rng.uniform(size=(400, 5)) < right for _ in range(2)), margin=0.05)
    >>> [round(end, 3) for end in found.these_items.estimate.interval], found.these_items.equivalent
    ([-0.025, 0.029], True)
    """
    x, y = _scores("first", first), _scores("second", second)
    if len(x) != len(y):
        raise ValueError(f"first has {len(x)} items and second {len(y)}: score both on the same ones, in one order")
    if paired_runs and x.shape != y.shape:
        raise ValueError(f"paired_runs needs run r of both arms, got {x.shape[1]} and {y.shape[1]} runs an item")
    if margin is not None and not 0 < margin < 1:
        raise ValueError(f"margin is {margin}: a difference of accuracies has one in (0, 1), such as 0.02")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: one-sided tests need more than 0.5 and less than 1")
    items, runs = len(x), (x.shape[1], y.shape[1])
    value, fixed, like = map(float, _moments(x, y, paired_runs))
    # Hoeffding: I R numbers of range 1 in each arm, or I R differences of range 2.
    radius = math.sqrt(math.log(2 / (1 - confidence)) / 2 * (1 + paired_runs) * (1 / runs[0] + 1 / runs[1]) / items)
    method = "these items, only runs vary" if min(runs) > 1 else "these items, one run: squared differences"
    bounds = value - radius, value + radius
    these = _read(value, fixed, 1 / (items * min(runs)), None, items, method, margin, confidence, bounds)
    low, high = betting_interval((1 + np.clip(x.mean(1) - y.mean(1), -1, 1)) / 2, confidence=confidence)
    bounds = (2 * low - 1, 2 * high - 1) if items > 1 else (-1.0, 1.0)
    others = _read(value, like, 1 / items, items - 1, items, "items like these", margin, confidence, bounds)
    split = _split(x, y, like * items, fixed * items) if min(*runs, items) > 1 else None
    return PairedDifference(float(x.mean()), float(y.mean()), items, runs, these, others, split)


def items_needed(
    margin: float, *, accuracy: float, within_share: float, runs: int, goal: Goal = "equivalence",
    of: Items = "these items", between: float = 0.0, power: float = POWER, level: float = 0.05,
) -> int:  # fmt: skip
    """Items at which `runs` runs of each arm show a margin, or see a difference of its size, with this power.

    For "equivalence" two one-sided tests at `level` pass where Δ = 0 in truth, for "difference" a two-sided test at
    `level` rejects where Δ = `margin`. Scores vary by a(1-a) about `accuracy` a, of which `within_share` lies between
    the runs of one item (1 - ICC): ``V = (between + 2 within_share a(1-a)/R)/I``. `between`, the variance of the items'
    true differences, is 0 for samplers of one law, and counts for "items like these". ValueError for bad numbers.

    >>> [items_needed(0.02, accuracy=0.5, within_share=0.5, runs=r) for r in (1, 5)]
    [5489, 1098]
    """
    power_of = _power(margin, accuracy, within_share, runs, goal, of, between, power, level)
    low, high = 1, 2
    while power_of(high) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return low if power_of(low) >= power else high


def detectable_margin(
    items: int, *, accuracy: float, within_share: float, runs: int, goal: Goal = "equivalence",
    of: Items = "these items", between: float = 0.0, power: float = POWER, level: float = 0.05,
) -> float:  # fmt: skip
    """Smallest margin that so many items show, or see, with this power: the inverse of `items_needed`; at most 1.

    >>> round(detectable_margin(1319, accuracy=0.5, within_share=1.0, runs=5, goal="difference"), 3)
    0.025
    """
    _whole(items=items)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        reached = _power(middle, accuracy, within_share, runs, goal, of, between, power, level)(items) >= power
        low, high = (low, middle) if reached else (middle, high)
    return high


def _power(
    margin: float, accuracy: float, within_share: float, runs: int, goal: Goal, of: Items, between: float,
    asked: float, level: float,
) -> Callable[[int], float]:  # fmt: skip
    """Power of the goal as a function of the items."""
    if goal not in ("equivalence", "difference"):
        raise ValueError(f"goal must be 'equivalence' or 'difference', got {goal!r}")
    if not 0 < margin < 1 or not 0 < level < asked < 1:
        raise ValueError(f"need margin in (0, 1) and 0 < level < power < 1, got {margin}, {level} and {asked}")
    if not (0 <= accuracy <= 1 and 0 <= within_share <= 1 and 0 <= between <= 1):
        raise ValueError(f"accuracy {accuracy}, within_share {within_share}, between {between}: all must be in [0, 1]")
    _whole(runs=runs)
    like, tail = _is_like(of), level if goal == "equivalence" else level / 2
    one = between * like + 2 * within_share * accuracy * (1 - accuracy) / runs

    def power(items: int) -> float:
        step = 1 / items if like else 1 / (items * runs)
        left = margin - _half_width(_quantile(1 - tail, items - 1 if like else None), one / items, step)
        if one == 0:
            return float(left >= 0)
        missed = stats.norm.sf(left / math.sqrt(one / items))
        return float(1 - missed if goal == "difference" else max(0.0, 1 - 2 * missed))

    return power


def _moments(x: Floats, y: Floats, paired_runs: bool) -> tuple[Any, Any, Any]:
    """Δ and its variance for these items and for items like these, of scores (..., I, R)."""
    away = x.mean(-1) - y.mean(-1)
    items, value = away.shape[-1], away.mean(-1)
    if min(x.shape[-1], y.shape[-1]) == 1:
        own = away**2
    elif paired_runs:
        own = (x - y).var(-1, ddof=1) / x.shape[-1]
    else:
        own = x.var(-1, ddof=1) / x.shape[-1] + y.var(-1, ddof=1) / y.shape[-1]
    like = away.var(-1, ddof=1) / items if items > 1 else np.full_like(value, np.inf)
    return value, own.sum(-1) / items**2, like


def _read(
    value: float, variance: float, step: float, df: int | None, items: int, method: str, margin: float | None,
    confidence: float, guaranteed: tuple[float, float],
) -> Reading:  # fmt: skip
    known = math.isfinite(variance)  # otherwise the interval is all of [-1, 1] and p-values are 1

    def tail(distance: float) -> float:
        """P-value of `distance` from a value at which the variance is larger by `step` times it."""
        spread = math.sqrt(variance + step * abs(distance))
        z = distance / spread if spread > 0 else 0.0
        return float(stats.norm.sf(z) if df is None else stats.t.sf(z, df))

    def clipped(low: float, high: float) -> tuple[float, float]:
        return max(-1.0, low), min(1.0, high)

    levels = (0.5 + confidence / 2, confidence)
    two_sided, one_sided = (_half_width(_quantile(p, df), variance, step) if known else 2.0 for p in levels)
    estimate = Estimate(value, math.sqrt(variance), clipped(value - two_sided, value + two_sided), items, method)
    equal = 2 * tail(abs(value)) if known else 1.0
    shown = None if margin is None else tail(margin - abs(value)) if known else 1.0
    smallest = min(1.0, abs(value) + one_sided)
    return Reading(estimate, equal, clipped(*guaranteed), 1 - confidence, margin, shown, smallest)


def _half_width(z: float, variance: float, step: float) -> float:
    """The root H of ``H = z sqrt(variance + step H)``."""
    bias = z * z * step / 2
    return bias + math.sqrt(z * z * variance + bias**2)


def _quantile(probability: float, df: int | None) -> float:
    return float(stats.norm.ppf(probability) if df is None else stats.t.ppf(probability, max(1, df)))


def _split(x: Floats, y: Floats, total: float, noise: float) -> ScoreSplit:
    """`total` and `noise` are the variances of the two readings times the items: of d_i, and of its runs alone."""
    own = [float(arm.var(1, ddof=1).mean()) for arm in (x, y)]
    between = [float(arm.mean(1).var(ddof=1)) - w / arm.shape[1] for arm, w in zip((x, y), own, strict=True)]
    one = noise * x.shape[1] if x.shape == y.shape else sum(own)  # so that what paired runs share is left out
    return ScoreSplit((between[0], between[1]), (own[0], own[1]), total - noise, one)


def _scores(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must be (I, R) scores, item by run, got shape {array.shape}; one run is (I, 1)")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name} must hold scores in [0, 1] and no NaN; score what was not answered as 0")
    return array


def _is_like(of: Items) -> bool:
    if of not in ("these items", "items like these"):
        raise ValueError(f"of must be 'these items' or 'items like these', got {of!r}")
    return of == "items like these"


def _whole(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
