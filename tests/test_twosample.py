"""Two-sample tests: brute-force kernels, scipy's permutations, false alarms, planted bugs, and what is not seen."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Temperature, Warped
from me_stats.models.toy import MarkovModel
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from me_stats.twosample import (
    GRID,
    TwoSampleMember,
    TwoSampleResult,
    _Design,
    closeness_test,
    hamming_kernel,
    permutation_test,
    position_pairs_kernel,
    positional_bigram_kernel,
    row_statistics,
    spectrum_kernel,
    two_sample_portfolio,
)

KERNELS = ("Hamming", "positional bigrams", "2-spectrum", "position pairs")
MEMBERS = (*KERNELS, "first token", "last token", "all tokens", "row means", "row KS")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ragged(seed: int, n: int, steps: int = 6, vocabulary: int = 3) -> list[list[int]]:
    generator = rng(seed)
    lengths = generator.integers(0, steps + 1, size=n)
    return [generator.integers(vocabulary, size=length).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> np.ndarray:
    width = max(1, *map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def member(result: TwoSampleResult, name: str) -> TwoSampleMember:
    return next(found for found in result.members if found.name == name)


# --- definitions, by loops -----------------------------------------------------------------------------------------


def hamming(x: list[int], y: list[int]) -> float:
    return sum(a == b for a, b in zip(x, y, strict=False))


def bigrams(x: list[int], y: list[int]) -> float:
    return sum(x[t : t + 2] == y[t : t + 2] for t in range(min(len(x), len(y)) - 1))


def pairs(x: list[int], y: list[int]) -> float:
    steps = range(min(len(x), len(y)))
    return sum(x[s] == y[s] and x[t] == y[t] for t in steps for s in range(t))


def spectrum(x: list[int], y: list[int]) -> float:
    bags = [Counter(pairwise(row)) for row in (x, y)]
    norms = [math.sqrt(sum(count**2 for count in bag.values())) for bag in bags]
    return sum(bags[0][ab] * bags[1][ab] for ab in bags[0]) / (norms[0] * norms[1]) if all(norms) else 0.0


BRUTE: dict[str, Callable[[list[int], list[int]], float]] = {
    "Hamming": hamming,
    "positional bigrams": bigrams,
    "2-spectrum": spectrum,
    "position pairs": pairs,
}


def gram(name: str, rows: list[list[int]]) -> np.ndarray:
    return np.array([[BRUTE[name](x, y) for y in rows] for x in rows])


@pytest.mark.parametrize("vocabulary", [1, 3, 10_000])
@pytest.mark.parametrize("n", [2, 130])
def test_kernels_are_what_their_docstrings_say(vocabulary: int, n: int) -> None:
    rows = [*ragged(n, n - 1, steps=9, vocabulary=vocabulary), [0, 1, 0, 1, 0, 1]]
    tokens = padded(rows)
    equal = hamming_kernel(tokens)
    np.testing.assert_array_equal(equal, gram("Hamming", rows))
    np.testing.assert_array_equal(positional_bigram_kernel(tokens), gram("positional bigrams", rows))
    np.testing.assert_array_equal(position_pairs_kernel(equal), gram("position pairs", rows))
    np.testing.assert_allclose(spectrum_kernel(tokens) / GRID, gram("2-spectrum", rows), atol=0.5 / GRID + 1e-6)


def test_row_statistics_are_what_their_docstring_says() -> None:
    rows = ragged(3, 50)
    found = row_statistics(padded(rows))
    repeats = [sum(a == b for a, b in pairwise(row)) for row in rows]
    assert found["length"].tolist() == [len(row) for row in rows]
    assert found["distinct tokens"].tolist() == [len(set(row)) for row in rows]
    assert found["repetitions"].tolist() == [r / max(len(row) - 1, 1) for r, row in zip(repeats, rows, strict=True)]


def mean_and_distance(rows: list[list[int]], scores: list[float], x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    columns = np.stack([*row_statistics(padded(rows)).values(), np.array(scores)], axis=1)
    columns = columns[:, np.ptp(columns, axis=0) > 0]
    n, m = len(x), len(y)
    error = columns.std(0, ddof=1) * math.sqrt(1 / n + 1 / m)
    distances = [stats.ks_2samp(column[x], column[y], method="asymp").statistic for column in columns.T]
    return float(np.max(np.abs(columns[x].mean(0) - columns[y].mean(0)) / error)), max(distances)


def brute(name: str, rows: list[list[int]], scores: list[float]) -> Callable[..., float]:
    """The statistic of one member as a function of the rows labelled x and y, from its textbook form."""
    steps = max(map(len, rows))
    scale = {"Hamming": steps, "positional bigrams": steps - 1, "position pairs": math.comb(steps, 2)}.get(name, 1)

    def statistic(x: np.ndarray, y: np.ndarray) -> float:
        n, m = len(x), len(y)
        if name in BRUTE:
            k = gram(name, rows) if name != "2-spectrum" else spectrum_kernel(padded(rows)) / GRID
            xx, yy, xy = k[np.ix_(x, x)], k[np.ix_(y, y)], k[np.ix_(x, y)]
            within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
            return float(within - 2 * xy.mean()) / scale
        if name.startswith("row"):
            return mean_and_distance(rows, scores, x, y)[name == "row KS"]
        picked = {"first token": slice(0, 1), "last token": slice(-1, None), "all tokens": slice(None)}[name]
        empty = [] if name == "all tokens" else [-1]
        bags = [Counter(token for i in side for token in rows[i][picked] or empty) for side in (x, y)]
        cells = sorted(bags[0] | bags[1])
        if name == "all tokens":
            both = np.array([[sum(row.count(cell) for row in rows) for cell in cells]])
            off = np.array([bags[0][cell] for cell in cells]) - both * n / (n + m)
            return float((off**2 / (both * n * m / (n + m) ** 2)).sum()) - len(cells)
        table = [[bag[cell] for cell in cells] for bag in bags]
        return float(stats.chi2_contingency(table, correction=False).statistic) - len(cells)

    return statistic


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6)])
def test_statistics_and_pvalues_agree_with_scipy_over_all_relabellings(name: str, n: int, m: int) -> None:
    rows = ragged(1, n + m)
    scores = rng(1).normal(size=n + m).tolist()
    permutations = 20_000
    result = two_sample_portfolio(
        rows[:n], rows[n:], scores={"log p": (scores[:n], scores[n:])}, level=0.5, permutations=permutations, rng=rng()
    )
    statistic, found = brute(name, rows, scores), member(result, name)
    assert found.statistic == pytest.approx(statistic(np.arange(n), np.arange(n, n + m)), abs=1e-12)
    index = (np.arange(n), np.arange(n, n + m))
    exact = stats.permutation_test(index, statistic, n_resamples=np.inf, alternative="greater", vectorized=False).pvalue
    error = math.sqrt(exact * (1 - exact) / permutations)
    assert found.pvalue == pytest.approx(exact, abs=6.2 * error + 1 / permutations)


def test_prompts_are_summed_with_their_weights() -> None:
    parts = [(ragged(1, 4), ragged(2, 4)), (ragged(3, 2), ragged(4, 7))]
    x, y = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    groups = ([5] * 4 + [2] * 2, [5] * 4 + [2] * 7)
    result = permutation_test(x, y, groups=groups, level=0.5, permutations=99, rng=rng())
    assert result.prompts == 2
    for name in KERNELS:
        total, weight, steps = 0.0, 0.0, max(map(len, x + y))
        for a, b in parts:
            n, m = len(a), len(b)
            own = max(map(len, a + b))
            scale = {"Hamming": own / steps, "positional bigrams": (own - 1) / (steps - 1)}.get(name, 1.0)
            scale = math.comb(own, 2) / math.comb(steps, 2) if name == "position pairs" else scale
            total += n * m / (n + m) * scale * brute(name, a + b, [])(np.arange(n), np.arange(n, n + m))
            weight += n * m / (n + m)
        assert member(result, name).statistic == pytest.approx(total / weight, abs=1e-12)


def test_all_relabellings_within_prompts_are_equally_likely() -> None:
    design = _Design(np.zeros((5, 1), dtype=int), np.zeros((4, 1), dtype=int), ([1, 1, 0, 0, 0], [0, 0, 1, 1]))
    chunks = list(design.labels(60_000, rng()))
    assert chunks[0].tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 0]]
    labels = np.concatenate(chunks[1:]).astype(int)
    seen = Counter(map(tuple, labels.tolist()))
    assert all(sum(row[:5]) == 3 and sum(row[5:]) == 2 for row in seen)
    assert len(seen) == math.comb(5, 3) * math.comb(4, 2)
    assert stats.chisquare(list(seen.values())).pvalue > 1e-9


# --- closeness of counts -------------------------------------------------------------------------------------------


def test_closeness_is_pearson_less_a_constant_and_agrees_with_its_tail() -> None:
    x, y = np.array([310, 200, 0, 490]), np.array([420, 250, 0, 530])
    found, oracle = closeness_test(x, y, rng=rng()), stats.chi2_contingency(np.stack([x, y])[:, [0, 1, 3]])
    assert found.statistic == pytest.approx(oracle.statistic - 3)
    assert found.pvalue == pytest.approx(oracle.pvalue, abs=6.2 * math.sqrt(oracle.pvalue / 9999))
    assert math.isinf(found.min_detectable)
    a, b = np.array([7, 2, 1, 0]), np.array([3, 5, 1, 1])
    expected = float((((a - b) ** 2 - a - b) / (a + b)).sum())
    assert closeness_test(a, b, rng=rng()).statistic == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m", "cells"), [(30, 30, 4), (40, 25, 200)])
def test_closeness_keeps_its_level_and_rejects_a_planted_law(n: int, m: int, cells: int) -> None:
    generator, runs = rng(5), 1000
    law = generator.dirichlet(np.ones(cells))
    draws = zip(generator.multinomial(n, law, size=runs), generator.multinomial(m, law, size=runs), strict=True)
    p = np.array([closeness_test(x, y, level=0.01, permutations=99, rng=generator).pvalue for x, y in draws])
    for level in (0.05, 0.01):
        assert (p <= level).sum() <= stats.binom.isf(1e-9, runs, level)
    assert (p <= 0.3).sum() >= stats.binom.ppf(1e-9, runs, 0.15)
    planted = np.where(np.arange(cells) < cells // 2, law, 0)
    x, y = generator.multinomial(20 * n, law), generator.multinomial(20 * m, planted / planted.sum())
    assert closeness_test(x, y, rng=generator).pvalue <= 1e-3


@pytest.mark.parametrize(("n", "cells"), [(2000, 8), (300, 400)])
def test_closeness_finds_the_tv_that_it_states(n: int, cells: int) -> None:
    generator, runs = rng(6), 200
    p = np.full(cells, 1 / cells)
    null = closeness_test(*generator.multinomial(n, p, size=2), level=0.05, permutations=99, rng=generator)
    q = p * (1 + 2 * null.min_detectable * np.where(np.arange(cells) % 2, 1, -1))
    assert 0 < null.min_detectable < 0.5
    draws = zip(generator.multinomial(n, p, size=runs), generator.multinomial(n, q, size=runs), strict=True)
    found = sum(closeness_test(x, y, level=0.05, permutations=199, rng=generator).pvalue <= 0.05 for x, y in draws)
    assert found >= stats.binom.ppf(1e-9, runs, 0.8)


# --- false alarms --------------------------------------------------------------------------------------------------


def null_pair(kind: str, generator: np.random.Generator, scale: int = 1) -> tuple[np.ndarray, np.ndarray, Any]:
    if kind == "fixed length":
        return generator.integers(3, size=(10, 5)), generator.integers(3, size=(8, 5)), None
    # Prompt 0 writes other tokens than prompt 1, and x has more of its rows: only relabelling within prompts is valid.
    of_x, of_y = np.repeat([0, 1], [8 * scale, 4 * scale]), np.repeat([0, 1], [3 * scale, 9 * scale])
    tokens = generator.integers(3, size=(24 * scale, 5)) + 2 * np.concatenate([of_x, of_y])[:, None]
    tokens[np.arange(5) >= generator.integers(0, 6, size=24 * scale)[:, None]] = -1
    return tokens[: 12 * scale], tokens[12 * scale :], (of_x, of_y)


@pytest.mark.parametrize("kind", ["fixed length", "ragged, two prompts"])
def test_false_alarms(kind: str) -> None:
    generator, runs = rng(11), 1000
    columns: dict[str, list[float]] = {name: [] for name in ("portfolio", *MEMBERS)}
    for _ in range(runs):
        x, y, groups = null_pair(kind, generator)
        scores = {"log p": (generator.normal(size=len(x)), generator.normal(size=len(y)))}
        result = two_sample_portfolio(x, y, groups=groups, scores=scores, level=0.05, permutations=199, rng=generator)
        columns["portfolio"].append(result.pvalue)
        for found in result.members:
            columns[found.name].append(found.pvalue)
    for name, column in columns.items():
        p = np.array(column)
        for level in (0.05, 0.01):
            assert (p <= level).sum() <= stats.binom.isf(1e-9, runs, level), name
        assert name == "portfolio" or (p <= 0.3).sum() >= stats.binom.ppf(1e-9, runs, 0.2), name


def test_relabelling_across_prompts_would_be_a_false_alarm() -> None:
    x, y, groups = null_pair("ragged, two prompts", rng(1), scale=10)
    assert two_sample_portfolio(x, y, rng=rng()).rejected
    assert two_sample_portfolio(x, y, groups=groups, rng=rng()).pvalue > 0.05


# --- planted bugs --------------------------------------------------------------------------------------------------


def chains(share: float = 0.0, missing: int | None = None) -> Ensemble:
    """Two random chains that share a part of their law; `missing` is a token that neither writes."""
    tables = [MarkovModel.random(8, seed=seed).log_table.exp().numpy() for seed in (1000, 1001, 5000)]
    mixed = [share * tables[2] + (1 - share) * table for table in tables[:2]]
    kept = np.where(np.arange(8) == missing, 0.0, 1.0)
    mixed = [table * kept / (table * kept).sum(1, keepdims=True) for table in mixed]
    return Ensemble([MarkovModel(table[0], table[1:]) for table in mixed], ConstantMixing([0.5, 0.5]))


def draw(sampler: Any, seed: int, n: int = 500, steps: int = 32) -> np.ndarray:
    return sampler.sample((0,), max_new_tokens=steps, n=n, seed=seed).tokens.numpy()


def test_right_samplers_pass_and_planted_ones_are_rejected() -> None:
    model, settings = chains(), dict[str, Any](level=0.01, permutations=999)
    me = draw(MESampler(model), 1)
    assert two_sample_portfolio(me, draw(CESampler(model), 2), rng=rng(), **settings).pvalue > 0.01
    hot = two_sample_portfolio(me, draw(CESampler(Warped(model, Temperature(1.3))), 3), rng=rng(), **settings)
    assert (hot.rejected, hot.worst.name) == (True, "2-spectrum")
    never = two_sample_portfolio(me, draw(MESampler(chains(missing=2)), 4), rng=rng(), **settings)
    assert never.rejected
    assert never.pvalue == pytest.approx(never.smallest_pvalue)
    assert member(never, "all tokens").pvalue == 1 / 1000
    # Components that are close hide one component per sequence. `martingale` rejects it with a fifth of the rows.
    close = chains(share=0.5)
    once = draw(SequenceMixtureSampler(close), 5)
    assert not two_sample_portfolio(draw(MESampler(close), 6), once, rng=rng(), **settings).rejected


def planted(kind: str, generator: np.random.Generator) -> tuple[Any, Any]:
    x, y = generator.integers(4, size=(2, 200, 6))
    if kind == "neighbours":
        y[:, 1::2] = np.where(generator.random((200, 3)) < 0.7, y[:, ::2], y[:, 1::2])
    elif kind == "ends":
        y[:, 5] = y[:, 0]
    elif kind == "first":
        y[:, 0] = np.where(generator.random(200) < 0.5, 0, y[:, 0])
    elif kind == "last":
        y[:, -1] = np.where(generator.random(200) < 0.5, 0, y[:, -1])
    elif kind == "early end":
        y[generator.random(200) < 0.3, 4:] = -1
    return x, y


@pytest.mark.parametrize(
    ("kind", "finder", "blind"),
    [
        ("neighbours", "positional bigrams", "Hamming"),
        ("neighbours", "2-spectrum", "first token"),
        ("ends", "position pairs", "positional bigrams"),
        ("first", "first token", "last token"),
        ("last", "last token", "first token"),
        ("early end", "row means", "first token"),
    ],
)
def test_each_member_finds_what_it_sees(kind: str, finder: str, blind: str) -> None:
    result = two_sample_portfolio(*planted(kind, rng(3)), level=0.01, permutations=1999, rng=rng())
    assert member(result, finder).pvalue <= 0.01 / 9
    assert member(result, blind).pvalue > 0.01


def test_scores_are_tested_for_mean_and_law() -> None:
    generator = rng(4)
    x, y = generator.integers(4, size=(2, 200, 3))
    a, b = generator.normal(size=(2, 200))
    settings: dict[str, Any] = {"level": 0.01, "permutations": 999}
    shifted = two_sample_portfolio(x, y, scores={"log p": (a, b - 0.6)}, rng=rng(), **settings)
    assert (member(shifted, "row means").found_in, member(shifted, "row means").pvalue) == ("log p", 0.001)
    wider = two_sample_portfolio(x, y, scores={"log p": (a, 3 * b - 3 * b.mean() + a.mean())}, rng=rng(), **settings)
    assert (member(wider, "row KS").found_in, member(wider, "row KS").pvalue) == ("log p", 0.001)
    assert member(wider, "row means").pvalue > 0.01
    assert member(wider, "row means").min_detectable == pytest.approx(0.1 * (3.84 + 0.84), rel=0.05)


# --- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1, 2, 3]] * 10, [[1, 2, 3]] * 12),
        ([[]] * 10, [[]] * 10),
        ([[0]] * 10, [[0]] * 10),
        (np.zeros((450, 200), dtype=int), np.zeros((450, 200), dtype=int)),  # sums beyond float32
    ],
    ids=["one row", "empty", "V=1, T=1", "long"],
)
def test_identical_rows_have_pvalue_one(x: Any, y: Any) -> None:
    result = two_sample_portfolio(x, y, level=0.5, permutations=19, rng=rng())
    assert (result.pvalue, result.tests, result.rejected) == (1.0, 0, False)
    assert all(found.pvalue == 1 and not found.informative for found in result.members)
    assert all(np.isfinite(found.statistic) for found in result.members)
    assert math.isinf(result.min_detectable_tv)


def test_one_token_empty_rows_and_one_symbol() -> None:
    generator = rng(5)
    one = two_sample_portfolio(generator.integers(9, size=(90, 1)), generator.integers(5, size=(70, 1)), rng=rng())
    assert one.rejected
    assert {found.name for found in one.members if not found.informative} >= {"positional bigrams", "2-spectrum"}
    lengths = generator.integers(0, 6, size=(2, 60)) // [[1], [3]]
    x, y = ([[7] * length for length in side] for side in lengths)
    short = two_sample_portfolio(x, y, rng=rng())
    assert short.rejected
    assert member(short, "row means").pvalue == 1e-4


def test_the_form_of_the_input_does_not_matter() -> None:
    x, y = ragged(1, 30), ragged(2, 25)
    settings: dict[str, Any] = {"level": 0.1, "permutations": 199}
    lists = two_sample_portfolio(x, y, rng=rng(), **settings)
    assert two_sample_portfolio(torch.from_numpy(padded(x)), padded(y).astype(np.int32), rng=rng(), **settings) == lists
    far = [[10**12 + 7 * token for token in row] for row in x], [[10**12 + 7 * token for token in row] for row in y]
    assert two_sample_portfolio(*far, rng=rng(), **settings) == lists
    wide = np.pad(padded(y), ((0, 0), (0, 5)), constant_values=-1)
    more = two_sample_portfolio(x, wide, rng=rng(), **settings)
    assert [found.pvalue for found in more.members] == [found.pvalue for found in lists.members]
    groups = np.arange(30) % 3
    assert two_sample_portfolio(x, y, groups=(groups, groups[:25]), rng=rng(), **settings).prompts == 3
    shared = two_sample_portfolio(x, x[::-1], groups=groups, rng=rng(), **settings)
    assert (shared.prompts, math.isfinite(shared.min_detectable_tv)) == (3, True)


def test_too_few_permutations_or_rows_are_refused_with_the_number_needed() -> None:
    x, y = ragged(1, 30), ragged(2, 30)
    with pytest.raises(ValueError, match=r"9 tests at level 0\.001 need at least 8999"):
        two_sample_portfolio(x, y, permutations=8998, rng=rng())
    assert two_sample_portfolio(x, y, permutations=8999, rng=rng()).smallest_pvalue == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="need at least 3999"):
        permutation_test(x, y, permutations=999, rng=rng())
    with pytest.raises(ValueError, match="need at least 999"):
        closeness_test([5, 5], [5, 5], permutations=998, rng=rng())
    with pytest.raises(ValueError, match="too few rows"):
        two_sample_portfolio(x[:6], y[:6], rng=rng())
    with pytest.raises(ValueError, match="x has 1 and y 2 rows of prompt 4"):
        permutation_test(x[:3], y[:4], groups=([3, 3, 4], [3, 3, 4, 4]), rng=rng())
    with pytest.raises(ValueError, match="x has 0 and y 30 rows"):
        permutation_test([], y, rng=rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[0.5, 1.0]] * 9}, "x must hold integer ids"),
        ({"y": np.array([[-1, 2]] * 9)}, "y must hold integer ids"),
        ({"y": [[-2, 2]] * 9}, "y must hold integer ids"),
        ({"x": np.zeros(9, dtype=int)}, "x must hold integer ids"),
        ({"groups": np.zeros(8, dtype=int)}, "groups must hold an integer"),
        ({"groups": np.zeros(9)}, "groups must hold an integer"),
        ({"scores": {"s": (np.zeros(9), np.zeros(8))}}, "a pair of 9 and of 9"),
        ({"scores": {"s": (np.zeros(9), np.full(9, -np.inf))}}, "must be finite"),
        ({"level": 0.0}, "level must lie"),
        ({"permutations": 9999.5}, "permutations is 9999.5"),
    ],
)
def test_malformed_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": [[0, 1]] * 9, "y": [[0, 1]] * 9, "rng": rng(), **change}
    with pytest.raises(ValueError, match=message):
        two_sample_portfolio(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2, 3]), ([1.5, 2], [1, 2]), ([1, -1], [1, 2]), ([1, 0], [3, 3])])
def test_vectors_that_are_not_counts_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="must be a vector of counts"):
        closeness_test(x, y, rng=rng())


def test_two_thousand_rows_take_seconds() -> None:
    generator = rng(7)
    x, y = generator.integers(1000, size=(2, 1000, 64))
    start = time.process_time()
    result = two_sample_portfolio(x, y, level=0.01, permutations=999, rng=rng())
    assert time.process_time() - start < 10
    assert not result.rejected
