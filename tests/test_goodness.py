"""Portfolio of one law: false alarms, planted laws, edge laws."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from me_stats.goodness import Portfolio, portfolio
from tests.laws import Floats, log, zipf_pair


@pytest.mark.parametrize(("vocabulary", "n"), [(5_000, 2_000), (12, 60), (3, 5)])
def test_portfolio_false_alarms(vocabulary: int, n: int) -> None:
    rng = np.random.default_rng(3)
    components = zipf_pair(vocabulary)
    p = components.mean(0)
    tests = Portfolio.from_null(log(p), log(components))
    repeats = 1000
    pvalues = np.array([tests.test(rng.multinomial(n, p)).pvalue for _ in range(repeats)])
    for level in (0.05, 0.01, 0.001):
        assert (pvalues <= level).sum() <= stats.binom.isf(1e-4, repeats, level)


def planted(components: Floats) -> dict[str, Floats]:
    """Wrong laws at a total variation of about .01 from the even mixture of two components."""
    p = components.mean(0)
    size = len(p)
    rng = np.random.default_rng(9)
    order = np.argsort(-p)

    def at_tv(q: Floats, tv: float = 0.01) -> Floats:
        q = q / q.sum()
        weight = tv / (0.5 * np.abs(q - p).sum())
        assert weight <= 1
        return np.asarray(p + weight * (q - p))

    tail = p.copy()
    tail[order[size // 10 :]] *= 0.5
    swap = p.copy()
    swap[order[::2]] *= 1.5
    return {
        "weights .55 for .50": np.array([0.55, 0.45]) @ components,
        "another component": at_tv(components[0]),
        "temperature": at_tv(p**0.9),
        "greedy": at_tv((np.arange(size) == order[0]).astype(float)),
        "tail cut": at_tv(tail),
        "one token in twenty raised": at_tv(p * (1 + (rng.random(size) < 0.05))),
        "every other rank": at_tv(swap),
    }


@pytest.mark.parametrize("bug", list(planted(zipf_pair(50))))
def test_portfolio_finds_planted_laws(bug: str) -> None:
    components = zipf_pair(50_257)
    q = planted(components)[bug]
    rng = np.random.default_rng(5)
    result = portfolio(rng.multinomial(1_000_000, q), log(components.mean(0)), component_log_probs=log(components))
    assert result.pvalue < 1e-6, result.worst
    assert result.rejected
    assert result.min_detectable_tv < 0.01


def test_a_token_of_probability_zero_rejects_alone() -> None:
    components = zipf_pair(1000)
    components[:, -1] = 0
    components /= components.sum(1, keepdims=True)
    p = components.mean(0)
    tests = Portfolio.from_null(log(p), log(components))
    counts = np.random.default_rng(0).multinomial(1000, p)
    clean = tests.test(counts)
    assert clean.pvalue > 1e-3
    assert clean.results[0].min_detectable_tv == pytest.approx(1 - 0.2 ** (1 / 1000))
    counts[-1] += 1
    leaked = tests.test(counts)
    assert (leaked.pvalue, leaked.worst.name, leaked.worst.impossible) == (0.0, "support", 1)
    only = tests.test(np.eye(1000, dtype=int)[-1])
    assert only.pvalue == 0.0


@pytest.mark.parametrize("vocabulary", [2, 3, 64, 65, 1000])
@pytest.mark.parametrize("n", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["plain", "one-hot", "identical", "disjoint", "zero weight", "uniform", "single"])
def test_edge_laws_accept_their_own_draws(vocabulary: int, n: int, kind: str) -> None:
    rng = np.random.default_rng(7)
    components, weights = zipf_pair(vocabulary), np.array([0.5, 0.5])
    if kind == "one-hot":
        components[:] = np.eye(vocabulary)[1]
    elif kind == "identical":
        components[1] = components[0]
    elif kind == "disjoint":
        components[0, ::2], components[1, 1::2] = 0, 0
        components /= components.sum(1, keepdims=True)
    elif kind == "zero weight":
        components[0, 0] = 0
        components[0] /= components[0].sum()
        weights = np.array([1.0, 0.0])
    elif kind == "uniform":
        components[:] = 1 / vocabulary
    elif kind == "single":
        components, weights = components[:1], np.ones(1)
    p = weights @ components
    result = portfolio(rng.multinomial(n, p), log(p), component_log_probs=log(components))
    assert result.pvalue > 1e-4
    assert all(np.isfinite(r.pvalue) and not np.isnan(r.min_detectable_tv) for r in result.results)
    if kind == "one-hot":
        assert (result.tests, result.min_detectable_tv) == (0, np.inf)
    if kind == "identical":
        assert next(r for r in result.results if r.name == "lambda score").method == "no information"


def test_three_components_and_a_large_vocabulary_in_two_seconds() -> None:
    rng = np.random.default_rng(0)
    components = np.concatenate([zipf_pair(262_144), zipf_pair(262_144, seed=2)[:1]])
    weights = np.array([0.6, 0.3, 0.1])
    p = weights @ components
    counts = rng.multinomial(1_000_000, p)
    start = time.process_time()
    result = portfolio(counts, log(p), component_log_probs=log(components))
    assert time.process_time() - start < 2
    assert result.pvalue > 1e-4
    assert next(r for r in result.results if r.name == "lambda score").df == 2
    wrong = portfolio(
        rng.multinomial(1_000_000, [0.6, 0.28, 0.12] @ components), log(p), component_log_probs=log(components)
    )
    assert wrong.worst.name == "lambda score"
    assert wrong.rejected


def test_partitions_are_pinned() -> None:
    # A result can only be reproduced elsewhere if token 17 is always in the same bin.
    tests = Portfolio.from_null(np.full(128, -np.log(128)))
    bins = {name: index for name, index, _ in tests.partitions}
    assert bins["hash 64"][:6].tolist() == [47, 52, 15, 44, 27, 42]
    assert np.bincount(bins["rank"]).tolist() == [1, 2, 4, 8, 16, 32, 64, 1]


def test_float32_laws_are_accepted_and_unnormalised_ones_refused() -> None:
    components = zipf_pair(5000)
    p = components.mean(0)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(100_000, p)
    single = portfolio(counts, log(p).astype(np.float32), component_log_probs=log(components).astype(np.float32))
    double = portfolio(counts, log(p), component_log_probs=log(components))
    assert single.pvalue == pytest.approx(double.pvalue, rel=1e-2)
    with pytest.raises(ValueError, match="normalised"):
        portfolio(counts, log(p) + 0.1)
    with pytest.raises(ValueError, match="component_log_probs"):
        portfolio(counts, log(p), component_log_probs=log(p))
    with pytest.raises(ValueError, match="without NaN"):
        portfolio([1, 1], [np.nan, 0.0])


def test_a_score_without_variance_is_no_information() -> None:
    constant = portfolio([10, 10], np.log([0.5, 0.5]))
    assert next(r for r in constant.results if r.name == "mean log p").method == "no information"
