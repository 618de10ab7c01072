from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from me_stats.sequence_divergence import sequence_tv

Floats = NDArray[np.float64]


def stream(seed: int) -> Generator:
    return Generator(Philox(seed))


def tv(p: Floats, q: Floats) -> float:
    return float(0.5 * np.abs(p - q).sum())


def markov_pair() -> tuple[Floats, Floats]:
    """Laws of all 4-token sequences of a two-component mixture: fresh component a step, and one a sequence."""
    first, second = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    paths = np.array(list(itertools.product(range(3), repeat=4)))
    per_step = (0.5 * first + 0.5 * second)[paths].prod(1)
    per_sequence = 0.5 * first[paths].prod(1) + 0.5 * second[paths].prod(1)
    return per_step, per_sequence


def test_sequence_tv_finds_one_component_per_sequence() -> None:
    """The planted bug keeps every marginal; the estimate meets the enumerated TV and excludes 0."""
    p, q = markov_pair()
    paths = stream(10).choice(p.size, size=4000, p=p)
    estimate = sequence_tv(np.log(q / p)[paths])
    assert tv(p, q) > 0.1
    assert abs(estimate.value - tv(p, q)) < 5 * estimate.stderr
    for low, high in (estimate.interval, estimate.hoeffding):
        assert 0.05 < low < tv(p, q) < high


@pytest.mark.parametrize(
    "law",
    [
        {0.0: 0.99, 1.0: 0.01},
        {0.0: 0.5, 1.0: 0.5},
        {0.0: 0.9, 0.02: 0.09, 0.9: 0.01},
        {0.1: 1 / 3, 0.11: 1 / 3, 0.12: 1 / 3},
    ],
)
@pytest.mark.parametrize("n", [50, 1000])
def test_sequence_intervals_cover(law: dict[float, float], n: int) -> None:
    rng = stream(n)
    values, weights = np.array(list(law)), np.array(list(law.values()))
    with np.errstate(divide="ignore"):
        log_ratios = np.log1p(-rng.choice(values, size=(200, n), p=weights))
    truth = values @ weights
    estimates = [sequence_tv(row) for row in log_ratios]
    for intervals in ([e.interval for e in estimates], [e.hoeffding for e in estimates]):
        assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.94
    if n == 1000 and values @ weights < 0.2:
        widths = np.array([(e.interval[1] - e.interval[0], e.hoeffding[1] - e.hoeffding[0]) for e in estimates])
        assert (widths[:, 0] < 0.6 * widths[:, 1]).all()


def test_betting_interval_is_the_set_of_means_that_survive() -> None:
    """Bisection against the definition: both capitals on a dense grid of means, running maximum."""
    values, alpha = stream(11).beta(1, 4, size=300), 0.1
    n, grid = values.size, np.linspace(0, 1, 2001)[1:-1]
    mean, variance, log_capitals = 0.5, 0.25, np.zeros((2, grid.size))
    spread, total, alive = 0.25, 0.5, np.ones(grid.size, dtype=bool)
    for t, x in enumerate(values, 1):
        bet = math.sqrt(2 * math.log(2 / alpha) / (n * variance))
        log_capitals[0] += np.log1p(np.minimum(bet, 0.5 / grid) * (x - grid))
        log_capitals[1] += np.log1p(-np.minimum(bet, 0.5 / (1 - grid)) * (x - grid))
        alive &= 0.5 * np.exp(log_capitals.max(0)) < 1 / alpha
        total += x
        mean = total / (t + 1)
        spread += (x - mean) ** 2
        variance = spread / (t + 1)
    low, high = sequence_tv(np.log1p(-values), confidence=1 - alpha).interval
    assert grid[alive][0] == pytest.approx(low, abs=1e-3)
    assert grid[alive][-1] == pytest.approx(high, abs=1e-3)
    assert low < values.mean() < high


@given(st.lists(st.floats(-50, 50) | st.just(-math.inf), min_size=2, max_size=40), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=50)
def test_sequence_tv_stays_in_range(log_ratio: list[float], confidence: float) -> None:
    estimate = sequence_tv(log_ratio, confidence=confidence)
    for low, high in (estimate.interval, estimate.hoeffding):
        assert 0 <= low <= high <= 1
        assert not math.isnan(low + high)
    assert estimate.hoeffding[0] <= estimate.value <= estimate.hoeffding[1]


def test_long_sequences_with_wild_ratios() -> None:
    """At T = 1e5, q/p overflows and underflows; (1 − q/p)_+ does not care."""
    estimate = sequence_tv(stream(12).normal(-1e4, 2e4, size=500))
    assert 0.5 < estimate.value < 1
    assert sequence_tv([0.0] * 10_000).interval[1] < 1e-3


@pytest.mark.parametrize(
    ("log_ratio", "message"),
    [
        ([], r"log_ratio has shape \(0,\)"),
        ([0.0, math.nan], "log_ratio holds NaN"),
        ([0.0, math.inf], "log_ratio holds NaN or"),
    ],
)
def test_bad_ratios_are_refused(log_ratio: Sequence[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_tv(log_ratio)


def test_bad_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence is 95"):
        sequence_tv([0.0, 0.0], confidence=95)
