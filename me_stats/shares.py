"""Shares of the component path: step by step from pairs of runs, and from several rows on each path.

`variance.pick_freeze` takes one number a row, and pairs. Here `path_shares` reads every step and every running sum of
such pairs at once, and `nested` puts R rows on each of G paths, a one-way analysis of variance.

Which design? At N rows in all the variance of the share S is about ``2 (1-S)^2 (1+(R-1)S)^2/((R-1) N)`` for a normal
statistic (Fisher), least at R = 1 + 1/S: pairs (R = 2) for shares near 1, about ten rows a path for a share near 0.1,
with a third of the variance that pairs have there. Pairs are the better choice where S is unknown and may be large;
`pick_freeze` also gives the share of the token draws, which rows on one path cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.chi_square import check_level
from me_stats.models.ensemble import Ensemble
from me_stats.per_sequence import checked_sample
from me_stats.samplers.mixture import MESampler
from me_stats.sensitivity.estimate import Estimate
from me_stats.sensitivity.exact import Statistic
from me_stats.vocabulary import Prompt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PathShares:
    """Var E(F_t | m)/Var F_t for T statistics: `value`, `stderr`, pointwise interval `lower`, `upper`, each (T,).

    `variance` (T,) is Var F_t within prompts, `n` the number of independent units (pairs or paths).
    """

    value: Floats
    stderr: Floats
    lower: Floats
    upper: Floats
    variance: Floats
    n: int
    method: str


@dataclass(frozen=True)
class NestedSplit:
    """`within` E Var(F | m) and `between` Var E(F | m), both unbiased, and the `share` between/(within + between).

    From `paths` component paths with `rows` rows each (a mean size where they differ). `between` may come out negative
    where the truth is near 0: cutting it off would bias it.
    """

    within: float
    between: float
    share: Estimate
    paths: int
    rows: float

    @property
    def variance(self) -> float:
        """Var F, pooled within prompts."""
        return self.within + self.between


def path_shares(
    x: ArrayLike, y: ArrayLike, *, groups: ArrayLike | None = None, cumulative: bool = False, pooled: bool = False,
    confidence: float = 0.95,
) -> PathShares:  # fmt: skip
    """Share of the path at each of T steps, from two runs x (N, T), y (N, T) whose rows share their component draws.

    Column t is ``variance.shared_variance`` of x_t and y_t within `groups` (N,) (the prompts), or with `cumulative` of
    the sums of the first t columns: pairs are paths of two rows, so the intervals are those of `nested_split`. With
    `pooled` one share of all columns together, ``sum_t Var E(F_t | m)/sum_t Var F_t``, much narrower where columns
    hardly depend on each other; whether they do or not, pairs are what is left out. Give 0 after the end of a row.
    Intervals are pointwise. Raises ValueError for shapes that differ, fewer than 4 pairs, a
    group of one pair, or a column that does not vary.

    >>> rng = np.random.default_rng(0)
    >>> path, x, y = rng.normal(size=(3, 500, 20))
    >>> shares = path_shares(path + x, path + y, cumulative=True)
    >>> bool(shares.lower[-1] < 0.5 < shares.upper[-1])
    True
    """
    first, second = checked_sample("x", x, ndim=2), checked_sample("y", y, ndim=2)
    if first.shape != second.shape:
        raise ValueError(f"x and y must be pairs of one shape, got {first.shape} and {second.shape}")
    n = len(first)
    place, sizes = _labels("groups", groups, n)
    if sizes.min() < 2:
        raise ValueError("groups must have at least two pairs in each")
    both = np.concatenate([first, second])
    pairs = _Anova.of(both.cumsum(1) if cumulative else both, np.tile(np.arange(n), 2), np.tile(place, 2))
    return (pairs.pooled() if pooled else pairs).shares(confidence, "pick-freeze")


def nested_split(
    values: ArrayLike, paths: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95
) -> NestedSplit:
    """The split of Var F from rows (N,) of which several share a component path, named by `paths` (N,).

    One-way analysis of variance: ``within = MSW``, ``between = (MSB - MSW)/R``, R the rows of a path (for unequal ones
    ``(N - sum n_g^2/N)/(G-1)``). `groups` (N,) are prompts: a path belongs to one of them, and means of prompts are
    taken out. The interval of the share jackknifes log(MSB/MSW) over paths with Student's t, so neither rows nor path
    means need be normal; where a single path decides, it is all that a share can be and `stderr` is infinite. With two
    rows a path the share is that of `variance.shared_variance`. Raises ValueError for fewer than 4 paths, no path of
    two rows, a path in two groups, or a statistic that does not vary.

    >>> rng = np.random.default_rng(0)
    >>> paths = np.repeat(np.arange(100), 8)
    >>> split = nested_split(rng.normal(size=100)[paths] + 3 * rng.normal(size=800), paths)
    >>> split.share.interval[0] < 0.1 < split.share.interval[1]
    True
    """
    anova = _Anova.of(checked_sample("values", values)[:, None], paths, groups)
    found = anova.shares(confidence)
    interval = (float(found.lower[0]), float(found.upper[0]))
    share = Estimate(float(found.value[0]), float(found.stderr[0]), interval, len(anova.labels), found.method)
    return NestedSplit(float(anova.within[0]), float(anova.between[0]), share, found.n, anova.size)


def nested_shares(
    values: ArrayLike, paths: ArrayLike, *, groups: ArrayLike | None = None, cumulative: bool = False,
    confidence: float = 0.95,
) -> PathShares:  # fmt: skip
    """`nested_split` of every column of a per-step statistic (N, T), or with `cumulative` of its running sums.

    >>> rng = np.random.default_rng(0)
    >>> paths = np.repeat(np.arange(100), 4)
    >>> shares = nested_shares(rng.normal(size=(100, 9))[paths] + rng.normal(size=(400, 9)), paths, cumulative=True)
    >>> bool(shares.lower[-1] < 0.5 < shares.upper[-1])
    True
    """
    v = checked_sample("values", values, ndim=2)
    return _Anova.of(v.cumsum(1) if cumulative else v, paths, groups).shares(confidence)


def nested(
    ensemble: Ensemble, prompts: Prompt | Sequence[Prompt], f: Statistic, *, paths: int, rows: int,
    max_new_tokens: int, seed: int, confidence: float = 0.95,
) -> NestedSplit:  # fmt: skip
    """The split of Var F from one ME run: `paths` component paths per prompt with `rows` rows on each.

    Rows of one path share the component uniforms of every step (``MESampler(shared_rows=rows)``); under a router, whose
    weights move with the tokens, that is what is frozen. `f` takes the token ids of one continuation. Raises ValueError
    for fewer than 2 rows a path, or as `nested_split`.

    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import TableModel
    >>> coins = Ensemble([TableModel([[1 - p, p]], order=0) for p in (0.1, 0.9)], ConstantMixing([0.5, 0.5]))
    >>> split = nested(coins, [], sum, paths=500, rows=4, max_new_tokens=4, seed=0)
    >>> split.share.interval[0] < 0.64 < split.share.interval[1]
    True
    """
    for name, count in (("paths", paths), ("rows", rows)):
        if not isinstance(count, (int, np.integer)) or count < 2:
            raise ValueError(f"{name} must be an integer of at least 2, got {count!r}")
    sampler = MESampler(ensemble, shared_rows=rows)
    trace = sampler.sample(prompts, n=paths * rows, max_new_tokens=max_new_tokens, seed=seed)
    values = [float(f(row)) for row in trace.sequences()]
    if not np.isfinite(values).all():
        raise ValueError("f must be finite on every continuation")
    # n is a multiple of `rows`, so no path reaches over two prompts.
    return nested_split(values, trace.groups.numpy(), groups=trace.prompt_index.numpy(), confidence=confidence)


@dataclass(frozen=True, eq=False)
class _Anova:
    """Sums of squares of C columns, in all and without each of G paths; `strata` is the number of groups."""

    labels: Ints  # (N,)
    strata: int
    size: float
    outer: Floats  # (C,) between paths
    inner: Floats  # (C,) within paths
    outer_without: Floats  # (G, C)
    inner_without: Floats  # (G, C)
    inner_df: Floats  # (G, 1) without each path

    @classmethod
    def of(cls, values: Floats, paths: ArrayLike, groups: ArrayLike | None) -> _Anova:
        n = len(values)
        place, sizes = _labels("paths", paths, n)
        stratum, counts = _labels("groups", groups, n)
        count, strata = len(sizes), len(counts)
        own = np.empty(count, dtype=np.int64)
        own[place] = stratum
        if (own[place] != stratum).any():
            raise ValueError("paths must lie in one group each; number the paths of different groups differently")
        if count - strata < 3 or n == count or np.bincount(own).min() < 2:
            raise ValueError(
                f"paths must name at least 4 paths, one of them with two rows, and two in each group, got {count} "
                f"for {n} rows in {strata} groups"
            )
        v = values - (_sums(values, stratum, strata) / counts[:, None])[stratum]
        sums = _sums(v, place, count)
        squares = sums**2 / sizes[:, None]
        inner = _sums((v - (sums / sizes[:, None])[place]) ** 2, place, count)
        _refuse_constant((v**2).mean(0), (values**2).mean(0))
        # Groups sum to 0, so without a path its group sums to minus that path.
        lost = squares + sums**2 / (counts[own] - sizes)[:, None]
        size = (n - float((sizes**2 / counts[own]).sum())) / (count - strata)
        outer, whole = squares.sum(0), inner.sum(0)
        degrees = np.asarray((n - count - (sizes - 1))[:, None], dtype=np.float64)
        return cls(place, strata, size, outer, whole, outer - lost, whole - inner, degrees)

    @property
    def paths(self) -> int:
        return len(self.outer_without)

    @property
    def within(self) -> Floats:
        """(C,) mean square within paths."""
        return np.asarray(self.inner / (len(self.labels) - self.paths))

    @property
    def between(self) -> Floats:
        """(C,) unbiased variance of path means without what rows add to it."""
        return np.asarray((self.outer / (self.paths - self.strata) - self.within) / self.size)

    def pooled(self) -> _Anova:
        """All columns as one: their sums of squares added up, in all and without each path."""
        return replace(
            self,
            outer=self.outer.sum(keepdims=True),
            inner=self.inner.sum(keepdims=True),
            outer_without=self.outer_without.sum(1, keepdims=True),
            inner_without=self.inner_without.sum(1, keepdims=True),
        )

    def shares(self, confidence: float, method: str = "nested rows") -> PathShares:
        check_level(1 - confidence)
        count, total = self.paths, self.outer + self.inner
        fixed = self.inner <= 1e-12 * total  # the path decides everything
        # One path alone decides a mean square: its error is unknown, and the interval is all that a share can be.
        lone = ~fixed & ((self.outer_without <= 1e-12 * total) | (self.inner_without <= 1e-12 * total)).any(0)
        usual = ~(fixed | lone)
        ratio = self.outer / (count - self.strata) / np.where(fixed, 1.0, self.inner / (len(self.labels) - count))
        logs = np.log(np.where(usual, self.outer_without, 1.0) / (count - 1 - self.strata))
        logs -= np.log(np.where(usual, self.inner_without, 1.0) / np.maximum(self.inner_df, 1))
        spread = np.sqrt((count - 1) ** 2 / count * logs.var(0, ddof=1))
        radius = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * spread
        value, lower, upper = (
            np.where(fixed, 1.0, (at - 1) / (at + self.size - 1))
            for at in (ratio, ratio * np.exp(-radius), ratio * np.exp(radius))
        )
        stderr = np.where(fixed, 0.0, spread * ratio * self.size / (ratio + self.size - 1) ** 2)
        stderr, lower, upper = (
            np.where(lone, unknown, known)
            for unknown, known in ((np.inf, stderr), (-1 / (self.size - 1), lower), (1.0, upper))
        )
        return PathShares(value, stderr, lower, upper, self.within + self.between, count, method)


def _labels(name: str, labels: ArrayLike | None, n: int) -> tuple[Ints, Ints]:
    """Place of each row's label among the distinct ones, and how often each occurs; None is one label for all."""
    given: NDArray[Any] = np.zeros(n, dtype=np.int64) if labels is None else np.asarray(labels)
    if given.shape != (n,):
        raise ValueError(f"{name} must name one for each of the {n} rows, got shape {given.shape}")
    _, place, sizes = np.unique(given, return_inverse=True, return_counts=True)
    return place, sizes


def _sums(values: Floats, place: Ints, count: int) -> Floats:
    """(count, C) sums of the rows (N, C) at each place."""
    out = np.zeros((count, values.shape[1]))
    np.add.at(out, place, values)
    return out


def _refuse_constant(variance: Floats, scale: Floats) -> None:
    constant = np.flatnonzero(variance <= 1e-24 * scale)
    if len(constant):
        raise ValueError(
            f"column {constant[0]} does not vary: no share of a variance of 0 is defined; drop it ({len(constant)} "
            "such columns)"
        )
