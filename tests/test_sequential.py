from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, chisquare, dirichlet_multinomial, multinomial

from me_stats.sequential import Look, dirichlet_log_evalue, sequential_test

Floats = NDArray[np.float64]


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def within(hits: int, runs: int, rate: float) -> bool:
    """Whether a count is likelier than 1e-6 to be at most, and at least, this large."""
    return bool(min(binom.cdf(hits, runs, rate), binom.sf(hits - 1, runs, rate)) > 1e-6)


def histograms(n: int, cells: int) -> Floats:
    return np.array([c for c in itertools.product(range(n + 1), repeat=cells) if sum(c) == n], dtype=float)


def tilted(cells: int, tv: float) -> tuple[Floats, Floats]:
    """Equal cells and the law at this TV with the smallest chi-square divergence: the hardest to find."""
    law = np.full(cells, 1 / cells)
    return law, law * (1 + 2 * tv * np.where(np.arange(cells) % 2, 1.0, -1.0))


# --- Dirichlet e-value ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [[0.5, 0.5], [0.99, 0.01], [0.6, 0.3, 0.1], [0.25] * 4, [0.7, 0.0, 0.3]])
@pytest.mark.parametrize("tv", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_mean_is_one_under_the_null(law: list[float], tv: float, n: int) -> None:
    counts = histograms(n, len(law))
    mass = multinomial.pmf(counts, n, law)
    values = np.exp([dirichlet_log_evalue(c, law, tv=tv) for c in counts[mass > 0]])
    assert mass[mass > 0] @ values == pytest.approx(1.0, abs=1e-10)


@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.floats(1e-3, 0.5), st.integers(1, 10**5))
@settings(deadline=None, max_examples=50)
def test_equals_scipys_ratio_of_laws(seed: int, cells: int, tv: float, n: int) -> None:
    rng = rng_of(seed)
    law = rng.dirichlet(np.full(cells, 2.0))
    counts = rng.multinomial(n, rng.dirichlet(np.full(cells, 2.0)))
    concentration = (cells - 1) / (4 * tv**2)
    expected = dirichlet_multinomial(concentration * law, n).logpmf(counts) - multinomial(n, law).logpmf(counts)
    assert dirichlet_log_evalue(counts, law, tv=tv) == pytest.approx(expected, rel=1e-9, abs=1e-5)


def test_is_exact_where_log_gammas_cancel() -> None:
    """Against the product of predictive probabilities, at a concentration where log-gamma has lost seven digits."""
    law, n = np.array([0.3, 0.7]), 1000
    counts = np.array([330, 670])
    for tv in (0.3, 3e-3, 1e-5):  # both branches, and both at once
        concentration = 1 / (4 * tv**2)
        rising = [
            math.fsum(math.log1p(j / (concentration * p)) for j in range(c)) for p, c in zip(law, counts, strict=True)
        ]
        expected = math.fsum(rising) - math.fsum(math.log1p(j / concentration) for j in range(n))
        assert dirichlet_log_evalue(counts, law, tv=tv) == pytest.approx(expected, rel=1e-6, abs=1e-11)


def test_edges() -> None:
    assert dirichlet_log_evalue([0, 0], [0.5, 0.5]) == 0.0
    assert dirichlet_log_evalue([1, 0], [0.3, 0.7]) == pytest.approx(0.0, abs=1e-12)
    assert dirichlet_log_evalue([1000, 0], [1.0, 0.0]) == 0.0
    assert dirichlet_log_evalue([1000, 1], [1.0, 0.0]) == math.inf
    assert dirichlet_log_evalue([9, 9, 1], [0.5, 0.5, 0.0]) == math.inf
    # Cells of probability zero that were not drawn do not count.
    assert dirichlet_log_evalue([30, 70, 0], [0.5, 0.5, 0.0]) == dirichlet_log_evalue([30, 70], [0.5, 0.5])
    assert math.isfinite(dirichlet_log_evalue([10**9, 10**9], [0.5, 0.5]))
    assert dirichlet_log_evalue([5, 5], [1 - 1e-300, 1e-300]) > 1000


def test_a_look_after_every_draw_keeps_the_level() -> None:
    """The maximum over n passes 1/alpha in at most alpha of the runs (Ville), and nearly so in some: no slack."""
    law, runs, draws = np.array([0.5, 0.3, 0.2]), 4000, 2000
    rng, tv = rng_of(1), 0.05
    cells = rng.choice(3, size=(runs, draws), p=law)
    counts, log_e, top = np.zeros((runs, 3)), np.zeros(runs), np.zeros(runs)
    concentration = 2 / (4 * tv**2)
    for n in range(draws):  # the predictive law is the mean of the Dirichlet posterior
        drawn = (np.arange(runs), cells[:, n])
        log_e += np.log((concentration * law[cells[:, n]] + counts[drawn]) / (concentration + n) / law[cells[:, n]])
        counts[drawn] += 1
        top = np.maximum(top, log_e)
    ends = [dirichlet_log_evalue(c, law, tv=tv) for c in counts[:50]]
    np.testing.assert_allclose(log_e[:50], ends, atol=1e-9)
    for alpha in (0.5, 0.2, 0.05):
        assert binom.sf((top >= -math.log(alpha)).sum() - 1, runs, alpha) > 1e-6
    assert (top >= -math.log(0.2)).mean() > 0.02
    # The control: a p-value that is looked at as often is no test.
    looks = [
        chisquare(np.bincount(row[:n], minlength=3), n * law).pvalue for row in cells[:60] for n in range(50, 2000, 50)
    ]
    assert (np.array(looks).reshape(60, -1).min(1) <= 0.05).mean() > 0.15


def test_draws_to_a_billion() -> None:
    """The figures of the docstring, which has them from 1000 runs: 41,500 draws at the median."""
    law, wrong = tilted(16, 0.02)
    assert 0.5 * np.abs(law - wrong).sum() == pytest.approx(0.02)
    stops = []
    for run in range(100):
        counts = rng_of(run).multinomial(250, wrong, size=400).cumsum(0)
        log_e = (dirichlet_log_evalue(row, law) for row in counts)
        stops.append(250 * (1 + next(look for look, value in enumerate(log_e) if value >= math.log(1e9))))
    assert 37_000 <= np.median(stops) <= 46_000
    # A right sampler ends far below 1, and nowhere near 1e9.
    right = rng_of(0).multinomial(250, law, size=400).cumsum(0)
    values = [dirichlet_log_evalue(row, law) for row in right]
    assert max(values) < math.log(1e3)
    assert values[-1] < -5


def test_a_larger_departure_is_found_sooner() -> None:
    law, wrong = tilted(16, 0.1)
    counts = rng_of(3).multinomial(6000, wrong)
    assert dirichlet_log_evalue(counts, law) > math.log(1e9)
    assert dirichlet_log_evalue(counts, law, tv=0.1) > dirichlet_log_evalue(counts, law)


# --- sequential test --------------------------------------------------------------------------------------------------


def uniform(seed: int) -> Callable[[int, int], float]:
    rng = rng_of(seed)
    return lambda n, look: float(rng.random())


@pytest.mark.parametrize(("level", "looks"), [(0.05, 7), (0.05, 1), (0.3, 3), (0.9, 5)])
def test_false_alarms_are_the_level_exactly_for_uniform_pvalues(level: float, looks: int) -> None:
    runs = 20_000
    draw = uniform(looks)
    results = [sequential_test(draw, level=level, first=10, looks=looks) for _ in range(runs)]
    gamma = (level / looks) ** (1 / looks)
    # Where γ + β passes 1 no look accepts, and the level is no longer attained.
    attained = gamma + gamma <= 1
    hits = sum(r.rejected for r in results)
    assert within(hits, runs, level) if attained else binom.sf(hits - 1, runs, level) > 1e-6
    taken = np.array([len(r.looks) for r in results])
    if attained:
        expected = (1 - gamma**looks) / (1 - gamma)
        assert taken.mean() == pytest.approx(expected, abs=5 * max(taken.std(), 1e-12) / math.sqrt(runs))
    assert taken.max() <= looks


def rejection_probability(level: float, looks: int, worst: Callable[[float, float], tuple[float, float]]) -> float:
    """Exact recursion; worst(β, γ + β) gives P(p ≤ β) and P(p ≤ γ + β)."""
    beta = level / looks
    gamma, reached, total = beta ** (1 / looks), 1.0, 0.0
    for _ in range(looks):
        reject, stay = worst(beta, min(1.0, gamma + beta))
        total += reached * reject
        reached *= stay - reject
        beta /= gamma
    return total


@pytest.mark.parametrize("level", [0.5, 0.05, 1e-6, 1e-12])
@pytest.mark.parametrize("looks", [1, 2, 7, 12])
def test_level_by_recursion(level: float, looks: int) -> None:
    exact = rejection_probability(level, looks, lambda low, high: (low, high))
    assert exact <= level * (1 + 1e-12)
    if 2 * (level / looks) ** (1 / looks) <= 1:
        assert exact == pytest.approx(level, rel=1e-9)
    # A discrete p-value that takes only the multiples of 1/B is smaller at both thresholds.
    for grid in (3, 20, 1000):
        discrete = rejection_probability(
            level, looks, lambda low, high, b=grid: (math.floor(low * b) / b, math.floor(high * b) / b)
        )
        assert discrete <= level * (1 + 1e-12)
    # Conservative where it would reject and yet exact where it would accept.
    assert rejection_probability(level, looks, lambda low, high: (0.3 * low, high)) <= level * (1 + 1e-12)


def test_schedule_by_hand() -> None:
    calls = []

    def pvalue(n: int, look: int) -> float:
        calls.append((n, look))
        return [0.1, 0.2, 1e-9][look]

    result = sequential_test(pvalue, level=0.002, first=100, looks=3)
    beta = 0.002 / 3
    gamma = beta ** (1 / 3)  # .0874: .1 and .2 need one more look only while γ + β lies above them
    assert calls == [(100, 0)]
    assert (result.rejected, result.looks, result.draws) == (False, (Look(100, 0.1, beta),), 100)

    result = sequential_test(lambda n, look: [0.05, 0.06, 1e-9][look], level=0.002, first=100, looks=3)
    assert result.rejected
    assert [look.n for look in result.looks] == [100, 400, 400]
    assert result.draws == 900
    np.testing.assert_allclose([look.threshold for look in result.looks], [beta, beta / gamma, beta / gamma**2])
    assert result.looks[-1].threshold == pytest.approx(gamma)
    assert result.level == 0.002
    # The last look decides: not rejected is accepted.
    last = sequential_test(lambda n, look: gamma + 1e-6, level=0.002, first=100, looks=3)
    assert (last.rejected, len(last.looks)) == (False, 3)
    assert sequential_test(lambda n, look: 0.0, level=1e-12, first=1).rejected


def test_finds_a_planted_bug_and_spares_the_right_sampler() -> None:
    """A loaded die, 6 a third too often."""
    law, wrong = np.full(6, 1 / 6), np.array([14, 14, 14, 14, 14, 20]) / 90

    def pvalue(die: Floats, seed: int) -> Callable[[int, int], float]:
        return lambda n, look: float(chisquare(rng_of(1000 * seed + look).multinomial(n, die), n * law).pvalue)

    found = [sequential_test(pvalue(wrong, s), level=1e-6, first=2000) for s in range(100)]
    clean = [sequential_test(pvalue(law, s), level=1e-6, first=2000) for s in range(300)]
    assert np.mean([r.rejected for r in found]) > 0.95
    assert not any(r.rejected for r in clean)
    assert np.mean([r.draws for r in clean]) < 1.5 * 2000
    # One look at the same level misses the bug more often.
    once = [sequential_test(pvalue(wrong, s), level=1e-6, first=2000, looks=1) for s in range(100)]
    assert np.mean([r.rejected for r in once]) < np.mean([r.rejected for r in found]) - 0.05


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dirichlet_log_evalue([1, 2, 3], [0.5, 0.5]), r"counts has shape \(3,\)"),
        (lambda: dirichlet_log_evalue([], []), r"counts has shape \(0,\)"),
        (lambda: dirichlet_log_evalue([0.5, 2], [0.5, 0.5]), "counts must hold whole"),
        (lambda: dirichlet_log_evalue([-1, 2], [0.5, 0.5]), "none negative"),
        (lambda: dirichlet_log_evalue([math.nan, 2], [0.5, 0.5]), "counts must hold"),
        (lambda: dirichlet_log_evalue([1, 2], [0.5, 0.4]), "probs must be non-negative and sum to 1"),
        (lambda: dirichlet_log_evalue([1, 2], np.log([0.5, 0.5])), "pass exp of log-probs"),
        (lambda: dirichlet_log_evalue([1, 2], [0.5, 0.5], tv=0.0), "tv is 0.0"),
        (lambda: sequential_test(lambda n, look: 0.5, level=0.0, first=1), "level is 0.0"),
        (lambda: sequential_test(lambda n, look: 0.5, level=0.1, first=0), "first is 0"),
        (lambda: sequential_test(lambda n, look: 0.5, level=0.1, first=1, looks=0), "looks is 0"),
        (lambda: sequential_test(lambda n, look: 0.5, level=0.1, first=1, growth=0), "growth is 0"),
        (lambda: sequential_test(lambda n, look: math.nan, level=0.1, first=1), "pvalue returned nan at look 0"),
        (lambda: sequential_test(lambda n, look: 1.5, level=0.1, first=1), "pvalue returned 1.5"),
    ],
)
def test_bad_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
