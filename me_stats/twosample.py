"""Two samplers of token sequences, neither of whose laws is known: permutation tests that two sets of rows differ.

Rows of one prompt are exchangeable under the null, so every p-value is valid at every size: with B relabellings shared
by all members it is ``(1 + #{relabelled >= observed})/(1 + B)``, never 0, ties counted.

**None of this can certify equality**, nor that ME has the law of CE: a result that is not rejected says only that these
members saw nothing at this size. The bug that matters most for ME, one component per *sequence*, hardly moves the law
of short pieces. Where a law is known, use `goodness` and `martingale`: they need 100 sequences for 20 out of 20 in the
first line below. Rejections out of 20 at level 1e-3, portfolio: members at 1e-3/9 in their order; 500 sequences against
500, 32 tokens, pairs of random Markov chains over 8 tokens (distances of chains: mean TV of their rows)::

    one component per sequence, chains .24 apart     0: 0 0 0 0 0 0 0 0 0  (1 with 1000 against 1000)
    one component per sequence, chains .48 apart    16: 2 6 14 4 0 0 5 7 4
    temperature 1.3                                 18: 0 3 18 0 0 0 3 0 0
    one of 8 tokens never drawn                     20: 20 20 20 20 16 20 20 20 20
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

from me_stats.chi_square import check_level
from me_stats.tails import detectable_noncentrality, detectable_shift

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scores = Mapping[str, tuple[ArrayLike, ArrayLike]]

GRID = 4096  # `spectrum_kernel` is rounded to multiples of 1/GRID: sums of integers are exact, and equal values tie
_CHUNK = 1 << 22  # entries of the largest array of labels
_MEMBERS = 9  # of `two_sample_portfolio`

# What each member sees, and what it can't see.
_SIGHT = {
    "Hamming": ("the law of each position", "any dependence between positions"),
    "positional bigrams": ("the law of neighbours at each position", "dependence beyond neighbours"),
    "2-spectrum": ("how often each bigram is in a row", "where in the row it is, small shifts of many bigrams"),
    "position pairs": ("the joint law of any two positions", "weak dependence, anything of order three"),
    "first token": ("the law of the first token", "everything after it"),
    "last token": ("the law of the last token", "everything before it"),
    "all tokens": ("frequencies of tokens", "order, position, shifts that cancel over prompts"),
    "row means": ("means of row statistics", "changes that keep these means"),
    "row KS": ("laws of row statistics", "changes that keep these laws"),
    "cells": ("the law of the cells", "anything inside a cell"),
}


@dataclass(frozen=True)
class TwoSampleMember:
    """One statistic: what it found, what it sees and what it is blind to.

    `pvalue` is raw; a statistic that all relabellings share is not `informative` and has p-value 1. `found_in` names
    the row statistic with the largest value. `min_detectable` is found with power 0.8 at this member's share of the
    level, in the units of `effect`, by normal approximation; infinite where none is known.
    """

    name: str
    statistic: float
    pvalue: float
    sees: str
    blind: str
    informative: bool
    min_detectable: float = math.inf
    effect: str = ""
    found_in: str = ""


@dataclass(frozen=True)
class TwoSampleResult:
    """Bonferroni combination of the `tests` informative members over n rows of x and m of y: no proof of equality."""

    pvalue: float
    level: float
    n: int
    m: int
    prompts: int
    permutations: int
    tests: int
    smallest_pvalue: float
    members: tuple[TwoSampleMember, ...]

    @property
    def rejected(self) -> bool:
        """Whether the null is rejected at `level`."""
        return self.pvalue <= self.level

    @property
    def worst(self) -> TwoSampleMember:
        """The member with the smallest p-value."""
        return min(self.members, key=lambda member: member.pvalue)

    @property
    def min_detectable_tv(self) -> float:
        """Smallest `min_detectable` among the members that state the TV of one token; `effect` says of which."""
        return min((m.min_detectable for m in self.members if m.effect.startswith("TV")), default=math.inf)


def hamming_kernel(tokens: Ints) -> Ints:
    """Equal positions ``h = #{t : x_t = y_t}`` (N, N) of tokens (N, T); the -1 after a row's end equals nothing.

    >>> hamming_kernel(np.array([[1, 2, 3], [1, 5, 3], [1, 2, -1]])).tolist()
    [[3, 2, 2], [2, 3, 1], [2, 1, 2]]
    """
    total = np.zeros((len(tokens), len(tokens)), dtype=np.int32)
    for column in tokens.T:
        total += (column[:, None] == column) & (column >= 0)
    return total.astype(np.int64)


def positional_bigram_kernel(tokens: Ints) -> Ints:
    """Equal bigrams in place, ``#{t : x_t = y_t and x_{t+1} = y_{t+1}}`` (N, N).

    >>> positional_bigram_kernel(np.array([[1, 2, 3, 4], [1, 2, 3, 5]])).tolist()
    [[3, 2], [2, 3]]
    """
    return hamming_kernel(_bigrams(tokens))


def position_pairs_kernel(equal: Ints) -> Ints:
    """Pairs of equal positions ``#{s < t : x_s = y_s and x_t = y_t} = h(h-1)/2``, from h = `equal`, `hamming_kernel`.

    >>> position_pairs_kernel(np.array([[3, 2], [2, 3]])).tolist()
    [[3, 1], [1, 3]]
    """
    return equal * (equal - 1) // 2


def spectrum_kernel(tokens: Ints) -> Ints:
    """2-spectrum (N, N): cosine of the bags of bigrams, ``sum_ab c_ab(x) c_ab(y)/(|c(x)| |c(y)|)``, times `GRID`.

    c_ab(x) counts a followed by b anywhere in x. A row of fewer than two tokens has kernel 0 with every row.

    >>> spectrum_kernel(np.array([[1, 1, 1], [1, 1, 2], [2, -1, -1]])).tolist()
    [[4096, 2896, 0], [2896, 4096, 0], [0, 0, 0]]
    """
    counts = _counts(_bigrams(tokens))
    # A dense product for common bigrams and a sparse one for rare ones: either alone is slow on toys or on real text.
    common = np.bincount(counts.indices, minlength=counts.shape[1]) * 64 > len(tokens)
    dense, rare = counts[:, common].toarray(), counts[:, ~common]
    gram = dense @ dense.T + (rare @ rare.T).toarray()
    norm = np.sqrt(np.maximum(gram.diagonal(), 1.0))
    return np.rint(GRID * gram / (norm * norm[:, None])).astype(np.int64)


def row_statistics(tokens: Ints) -> dict[str, Floats]:
    """Length, number of distinct tokens and repetitions of each row of (N, T), with -1 after its end.

    Repetitions are the share of tokens equal to the one before, 0 for rows of fewer than two tokens.

    >>> {name: values.tolist() for name, values in row_statistics(np.array([[7, 7, 8], [5, -1, -1]])).items()}
    {'length': [3.0, 1.0], 'distinct tokens': [2.0, 1.0], 'repetitions': [0.5, 0.0]}
    """
    length, ordered = (tokens >= 0).sum(1), np.sort(tokens, axis=1)
    distinct = (np.diff(ordered, axis=1, prepend=-1) > 0).sum(1)
    repeats = ((tokens[:, 1:] == tokens[:, :-1]) & (tokens[:, 1:] >= 0)).sum(1)
    values = (length, distinct, repeats / np.maximum(length - 1, 1))
    return dict(zip(("length", "distinct tokens", "repetitions"), (v.astype(float) for v in values), strict=True))


def closeness_test(
    x: ArrayLike, y: ArrayLike, *, level: float = 1e-3, permutations: int = 9999, rng: np.random.Generator
) -> TwoSampleMember:
    """Do two count vectors (K,) of independent draws have one law? For any K: most cells may be empty.

    ``Z = sum (sqrt(m/n) x - sqrt(n/m) y)^2/(x+y) - K'`` over the K' cells drawn, for n = m that is
    ``sum ((x-y)^2 - x - y)/(x+y)``: Pearson's contingency statistic less a constant. The p-value is by relabelling the
    draws (multivariate hypergeometric). For n = m, ``E Z >= 2 (n TV)^2/(n + K')`` gives `min_detectable`. Raises
    ValueError for what are not counts, fewer than two draws a side, and too few permutations or draws for `level`.
    Source of Z: Chan, Diakonikolas, Valiant and Valiant (2014), Optimal algorithms for testing closeness of discrete
    distributions, SODA.

    >>> found = closeness_test([30, 50, 20], [40, 20, 40], rng=np.random.default_rng(0))
    >>> round(found.statistic, 3), found.pvalue < 1e-3
    (17.952, True)
    """
    counts = [np.asarray(part, dtype=float) for part in (x, y)]
    for name, c in zip("xy", counts, strict=True):
        if c.shape != counts[0].shape or c.ndim != 1 or not ((c >= 0) & (c % 1 == 0)).all() or c.sum() < 2:
            raise ValueError(f"{name} must be a vector of counts, two draws or more, in the same cells as x and y")
    (n, m), both = (int(c.sum()) for c in counts), (counts[0] + counts[1]).astype(np.int64)
    pooled, share = both[both > 0], n / (n + m)
    _check_permutations(permutations, 1, level, [(n, m)])
    expected, weights = np.multiply(share, pooled), 1 / np.multiply(share * (1 - share), pooled)
    values = [_centred_squares(counts[0][None, both > 0], expected, weights)]
    for rows in _chunks(permutations, len(pooled)):
        drawn = rng.multivariate_hypergeometric(pooled, n, size=rows, method="marginals")
        values.append(_centred_squares(drawn, expected, weights))
    tv = _detectable_tv(n, len(pooled), 1, level) if n == m else math.inf
    return _Statistic("cells", np.copy, tv, "TV among cells drawn").member(np.concatenate(values)[:, None])


def permutation_test(
    x: Any, y: Any, *, groups: Any = None, level: float = 1e-3, permutations: int = 9999, rng: np.random.Generator
) -> TwoSampleResult:
    """Unbiased kernel MMD^2 with four string kernels, Bonferroni over them.

    ``MMD^2 = mean_{i!=j} k(x_i,x_j) + mean_{i!=j} k(y_i,y_j) - 2 mean_{ij} k(x_i,y_j)`` within each prompt g, averaged
    over prompts with weights n_g m_g/(n_g+m_g). k: `hamming_kernel`/T, `positional_bigram_kernel`/(T-1),
    `spectrum_kernel`/`GRID`, `position_pairs_kernel`/(T(T-1)/2). Arguments and errors as in `two_sample_portfolio`.
    Source: Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), A kernel two-sample test, JMLR 13.

    >>> rng = np.random.default_rng(0)
    >>> result = permutation_test(rng.integers(4, size=(60, 8)), rng.integers(3, size=(60, 8)), rng=rng)
    >>> result.rejected, result.smallest_pvalue
    (True, 0.0004)
    """
    return _combined(_kernels(design := _Design(x, y, groups)), design, level, permutations, rng)


def two_sample_portfolio(
    x: Any, y: Any, *, groups: Any = None, scores: Scores | None = None, level: float = 1e-3, permutations: int = 9999,
    rng: np.random.Generator,
) -> TwoSampleResult:  # fmt: skip
    """Nine two-sample statistics on the same relabellings, Bonferroni over the informative ones.

    The kernels of `permutation_test`; Z of `closeness_test` for first and for last tokens within each prompt (an empty
    row is a cell of its own) and for all tokens pooled; the largest |z| of a difference of means, and the largest
    Kolmogorov-Smirnov distance, among `row_statistics` and `scores`. The module docstring says what this can't see.

    x and y are independent continuations: ragged lists of token ids, or (N, T) and (M, T') with -1 after a row's end.
    `groups` is the prompt of each row: (N,) if it is that of both, or a pair (N,), (M,); rows are relabelled within
    prompts only. `scores` maps names to pairs (N,), (M,) of more row statistics, such as log-probabilities (nats) under
    any scorer. `level` is the false-alarm probability of the whole call, and needs `permutations` >= 9/level - 1.
    Raises ValueError for malformed rows, groups or scores, for a prompt with fewer than two rows a side, and where
    permutations or rows are too few for any rejection at `level`.

    >>> rng = np.random.default_rng(0)
    >>> fair, same, bad = rng.integers(4, size=(80, 6)), rng.integers(4, size=(80, 6)), rng.integers(3, size=(80, 6))
    >>> two_sample_portfolio(fair, same, rng=rng).rejected, two_sample_portfolio(fair, bad, rng=rng).rejected
    (False, True)
    """
    check_level(level)
    design, share = _Design(x, y, groups), level / _MEMBERS
    statistics = [*_kernels(design), *_closeness(design, share), *_rows(design, scores or {}, share)]
    return _combined(statistics, design, level, permutations, rng)


class _Design:
    """Pooled rows, ordered by prompt and x before y in each; `blocks` are (rows, n_g, m_g), one a prompt."""

    def __init__(self, x: Any, y: Any, groups: Any) -> None:
        a, b = _padded("x", x), _padded("y", y)
        self.n, self.m, width = len(a), len(b), max(a.shape[1], b.shape[1], 1)
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in (a, b)]
        if groups is None:
            groups = (np.zeros(len(a), dtype=np.int64), np.zeros(len(b), dtype=np.int64))
        paired = isinstance(groups, (tuple, list)) and len(groups) == 2 and np.ndim(groups[0]) == 1
        pair = [np.asarray(part) for part in (groups if paired else (groups, groups))]
        for name, part, rows in zip("xy", pair, wide, strict=True):
            if part.shape != (len(rows),) or part.dtype.kind not in "iu":
                what = f"the {len(rows)} rows of {name}, got {part.dtype} {part.shape}"
                raise ValueError(f"groups must hold an integer for each of {what}; give a pair if x and y differ")
        ids, prompt = np.unique(np.concatenate(pair), return_inverse=True)
        self.order = np.argsort(prompt, kind="stable")
        self.prompt, tokens = prompt[self.order], np.concatenate(wide)[self.order]
        # Ids in use are numbered from 0, so that codes of bigrams and of prompt and token can't overflow.
        self.tokens = np.where(tokens >= 0, np.searchsorted(np.unique(tokens[tokens >= 0]), tokens), -1)
        sizes = np.stack([np.bincount(part, minlength=max(len(ids), 1)) for part in np.split(prompt, [self.n])])
        if sizes.min() < 2:
            g = int(sizes.min(0).argmin())
            which = f" of prompt {ids[g]}" if len(ids) > 1 else ""
            raise ValueError(f"x has {sizes[0, g]} and y {sizes[1, g]} rows{which}, at least 2 are needed: draw more")
        stops = sizes.sum(0).cumsum().tolist()
        self.blocks = [(slice(e - n - m, e), n, m) for e, (n, m) in zip(stops, sizes.T.tolist(), strict=True)]
        self.share = np.repeat(sizes[0] / sizes.sum(0), sizes.sum(0))
        self.weight = sum(n * m / (n + m) for _, n, m in self.blocks)
        self.balanced = bool((sizes[0] == sizes[1]).all())

    def labels(self, permutations: int, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
        """Chunks (b, N+M) of labels, 1 for x; the first chunk is the one row that was observed."""
        observed = np.concatenate([np.repeat(np.array([1, 0], dtype=np.float32), (n, m)) for _, n, m in self.blocks])
        yield observed[None]
        for rows in _chunks(permutations, len(observed)):
            chunk = np.tile(observed, (rows, 1))
            for block, _, _ in self.blocks:
                chunk[:, block] = rng.permuted(chunk[:, block], axis=1)
            yield chunk


@dataclass(frozen=True)
class _Statistic:
    """`values` maps labels (b, N+M) to (b,), or to (b, J) where the largest of J `parts` counts."""

    name: str
    values: Callable[[Any], Any]
    min_detectable: float = math.inf
    effect: str = ""
    parts: Sequence[str] = ("",)

    def member(self, values: Floats) -> TwoSampleMember:
        """The result, from values (1 + B, J) of which the first are those observed."""
        largest, part = values.max(1), self.parts[int(values[0].argmax())]
        # Equal values may differ by rounding; taking a few more for ties can only raise the p-value.
        tolerance = 1e-9 * float(np.abs(largest).max())
        p, informative = float((largest >= largest[0] - tolerance).mean()), bool(np.ptp(largest) > tolerance)
        sees, blind = _SIGHT[self.name]
        least = self.min_detectable if informative else math.inf
        return TwoSampleMember(self.name, float(largest[0]), p, sees, blind, informative, least, self.effect, part)


def _combined(
    statistics: Sequence[_Statistic], design: _Design, level: float, permutations: int, rng: np.random.Generator
) -> TwoSampleResult:
    smallest = _check_permutations(permutations, len(statistics), level, [sizes for _, *sizes in design.blocks])
    found: list[list[Floats]] = [[] for _ in statistics]
    for labels in design.labels(permutations, rng):
        for values, statistic in zip(found, statistics, strict=True):
            values.append(statistic.values(labels).reshape(len(labels), -1))
    members = tuple(s.member(np.concatenate(values)) for s, values in zip(statistics, found, strict=True))
    tests = sum(member.informative for member in members)
    p = min(1.0, max(tests, 1) * min(member.pvalue for member in members))
    return TwoSampleResult(p, level, design.n, design.m, len(design.blocks), permutations, tests, smallest, members)


def _kernels(design: _Design) -> list[_Statistic]:
    names, steps = list(_SIGHT)[:4], design.tokens.shape[1]
    grams: list[list[NDArray[Any]]] = [[] for _ in names]
    for block, _, _ in design.blocks:
        equal = hamming_kernel(rows := design.tokens[block])
        kernels = (equal, positional_bigram_kernel(rows), spectrum_kernel(rows), position_pairs_kernel(equal))
        for kept, gram in zip(grams, kernels, strict=True):
            np.fill_diagonal(gram, 0)
            # Below 2^24 integers are exact in float32.
            kept.append(gram.astype(np.float32 if gram.sum(1).max() < 1 << 24 else np.float64))

    def mmd(grams: Sequence[NDArray[Any]], scale: int, labels: NDArray[np.float32]) -> Floats:
        total = np.zeros(len(labels))
        for (block, n, m), gram in zip(design.blocks, grams, strict=True):
            chosen = labels[:, block].astype(gram.dtype, copy=False)
            products = chosen @ gram
            touching = products.sum(1, dtype=np.float64)
            within = np.multiply(products, chosen, out=products).sum(1, dtype=np.float64)
            between = touching - within
            rest = gram.sum(dtype=np.float64) - within - 2 * between
            total += n * m / (n + m) * (within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / (n * m))
        return total / (design.weight * max(scale, 1))

    scales = (steps, steps - 1, GRID, math.comb(steps, 2))
    return [_Statistic(name, partial(mmd, *pair)) for name, *pair in zip(names, grams, scales, strict=True)]


def _closeness(design: _Design, level: float) -> list[_Statistic]:
    tokens, base = design.tokens, int(design.tokens.max()) + 2
    last = np.take_along_axis(tokens, np.maximum((tokens >= 0).sum(1, keepdims=True) - 1, 0), axis=1)
    statistics = [_Statistic("all tokens", partial(_closeness_values, _counts(tokens), design.share))]
    for name, token in (("last token", last), ("first token", tokens[:, :1])):
        counts = _counts(design.prompt[:, None] * base + token + 1)
        tv = _detectable_tv(design.n, counts.shape[1], len(design.blocks), level) if design.balanced else math.inf
        effect = f"TV of the {name}, mean over prompts, among tokens drawn"
        statistics.insert(0, _Statistic(name, partial(_closeness_values, counts, design.share), tv, effect))
    return statistics


def _closeness_values(counts: Any, share: Floats, labels: NDArray[np.float32]) -> Floats:
    law, parts = (counts.T @ share, 1 / (counts.T @ (share * (1 - share)))), -(-len(labels) * counts.shape[1] // _CHUNK)
    return np.concatenate(
        [_centred_squares((counts.T @ part.T).T, *law) for part in np.array_split(labels, max(parts, 1))]
    )


def _centred_squares(drawn: NDArray[Any], expected: Floats, weights: Floats) -> Floats:
    return np.asarray((drawn - expected) ** 2 @ weights) - len(expected)


def _detectable_tv(n: int, cells: int, prompts: int, level: float) -> float:
    df = cells - prompts
    needed = detectable_noncentrality(float(stats.chi2.isf(level, df)), df) if df else math.inf
    tv = math.sqrt(needed * (n + cells) / 2) / n  # E Z >= 2 (n TV)^2/(n + cells)
    return tv if tv < 1 else math.inf


def _rows(design: _Design, scores: Scores, level: float) -> list[_Statistic]:
    columns = row_statistics(design.tokens)
    for name, pair in scores.items():
        both = [np.asarray(part, dtype=float) for part in pair]
        if [p.shape for p in both] != [(design.n,), (design.m,)] or not np.isfinite(np.concatenate(both)).all():
            raise ValueError(f"scores[{name!r}] must be finite, a pair of {design.n} and of {design.m} values")
        columns[name] = np.concatenate(both)[design.order]
    centred, variance = np.stack(list(columns.values()), axis=1), np.zeros(len(columns))
    tiny = 1e-20 * (centred**2).sum(0)  # rounding of a constant
    for block, n, m in design.blocks:
        centred[block] -= centred[block].mean(0)
        variance += n * m / ((n + m) * (n + m - 1)) * (centred[block] ** 2).sum(0)
    scaled = centred / np.sqrt(np.where(variance > tiny, variance, np.inf))
    orders = [np.argsort(values, kind="stable") for values in columns.values()]
    ends = [np.flatnonzero(np.diff(v[order])) for v, order in zip(columns.values(), orders, strict=True)]

    def largest_distance(labels: NDArray[np.float32]) -> Floats:
        off = labels - design.share
        steps = [np.cumsum(off[:, order], axis=1)[:, end] for order, end in zip(orders, ends, strict=True)]
        return np.stack([np.abs(step).max(1, initial=0.0) for step in steps], axis=1) / design.weight

    z = detectable_shift(level / len(columns))
    effect, names = "difference of means, in standard deviations within prompts", tuple(columns)
    means = _Statistic(
        "row means", lambda c: np.abs((c - design.share) @ scaled), z / math.sqrt(design.weight), effect, names
    )
    return [means, _Statistic("row KS", largest_distance, parts=names)]


def _check_permutations(permutations: int, tests: int, level: float, sizes: Sequence[Sequence[int]]) -> float:
    """The smallest p-value that `tests` tests can reach, if it can reach `level`."""
    check_level(level)
    log_ways = sum(math.lgamma(n + m + 1) - math.lgamma(n + 1) - math.lgamma(m + 1) for n, m in sizes)
    # With as many rows of x as of y, exchanging the names changes no statistic.
    floor = tests * math.exp(-log_ways) * (1 + all(n == m for n, m in sizes))
    if floor > level:
        raise ValueError(f"too few rows: {tests} tests reach no p-value below {floor:.2g}; draw more or raise level")
    needed = math.ceil(tests / level * (1 - 1e-9)) - 1
    if not isinstance(permutations, (int, np.integer)) or permutations < needed:
        raise ValueError(f"permutations is {permutations!r}: {tests} tests at level {level:g} need at least {needed}")
    return max(tests / (1 + permutations), floor)


def _chunks(rows: int, width: int) -> list[int]:
    size = max(1, min(rows, _CHUNK // max(width, 1)))
    return [size] * (rows // size) + [rows % size] * (rows % size > 0)


def _bigrams(tokens: Ints) -> Ints:
    return np.where(tokens[:, 1:] >= 0, tokens[:, :-1] * (tokens.max(initial=0) + 1) + tokens[:, 1:], -1)


def _counts(cells: Ints) -> Any:
    """Sparse counts (N, K) of the K distinct cells among (N, C), where -1 is none."""
    row, column = np.nonzero(cells >= 0)
    ids, cell = np.unique(cells[row, column], return_inverse=True)
    return sparse.csr_array((np.ones(len(row), dtype=np.float32), (row, cell)), shape=(len(cells), len(ids)))


def _padded(name: str, rows: Any) -> Ints:
    if not hasattr(rows, "ndim"):
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *(row for row in rows if len(row))])
        rows = np.full((len(lengths), lengths.max(initial=0)), -1, dtype=flat.dtype)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = flat
    grid = np.asarray(rows)
    gaps = grid.ndim != 2 or (grid < -1).any() or ((grid[:, 1:] >= 0) & (grid[:, :-1] < 0)).any()
    if gaps or grid.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer ids, -1 only after a row's end, got {grid.dtype} {grid.shape}")
    return grid.astype(np.int64)
