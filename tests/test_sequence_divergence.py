from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from scipy.stats import beta

from me_stats import ConstantMixing, Ensemble, exact
from me_stats.divergence import escaped_mass
from me_stats.models import LanguageModel, TableModel, TopK, Warped
from me_stats.sequence_divergence import (
    betting_interval,
    escaped_mass_bound,
    sequence_tv,
    support_violation_bound,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


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


# --- numerical floor --------------------------------------------------------------------------------------------------


def test_floor_widens_both_intervals_and_nothing_else() -> None:
    ratios = stream(14).normal(-0.02, 0.2, size=2000)
    plain, floored = sequence_tv(ratios), sequence_tv(ratios, floor=0.01)
    for before, after in ((plain.interval, floored.interval), (plain.hoeffding, floored.hoeffding)):
        assert after == pytest.approx((before[0] - 0.01, before[1] + 0.01), abs=1e-15)
    assert (floored.value, floored.stderr, floored.n) == (plain.value, plain.stderr, plain.n)
    assert sequence_tv(ratios, floor=0.0) == plain
    assert sequence_tv(ratios, floor=1.0).interval == (0.0, 1.0)


@pytest.mark.parametrize("direction", [1, -1])
def test_floor_of_the_steps_times_their_number_covers_the_true_tv(direction: int) -> None:
    """p is scored as if it were δ a step nearer to q, or further: without 4 δ the interval misses the TV."""
    delta, paths = 0.01, np.array(list(itertools.product(range(3), repeat=4)))
    law, shift = np.array([0.4, 0.25, 0.35]), np.array([1.0, 0.0, -1.0])
    p, scored, q = ((law + size * shift)[paths].prod(1) for size in (0.0, direction * delta, 2 * delta))
    log_ratios = np.log(q / scored)[stream(15).choice(p.size, size=(40, 20_000), p=p)]
    truth = tv(p, q)
    assert 0.01 < tv(p, scored) <= 4 * delta
    # With every sequence counted, the miss is at most the TV that scoring is off by.
    miss = p @ np.maximum(1 - q / scored, 0) - truth
    assert 0.5 * tv(p, scored) < -direction * miss <= tv(p, scored)
    for floor, covered in ((4 * delta, 1.0), (0.0, 0.0)):
        found = [sequence_tv(row, floor=floor).interval for row in log_ratios]
        assert np.mean([low <= truth <= high for low, high in found]) == covered


# --- support ----------------------------------------------------------------------------------------------------------


def truncations(seed: int, size: int = 4) -> tuple[LanguageModel, LanguageModel]:
    """p: top 2 of each component, then mixed; q: mixed, then top 2. p reaches tokens that q excludes."""
    rng = stream(seed)
    toys = [TableModel(rng.dirichlet(np.full(size, 0.7), 1 + size + size**2), order=2, eos=(0,)) for _ in range(2)]
    mixing = ConstantMixing([0.6, 0.4])
    before = Ensemble([Warped(toy, TopK(2)) for toy in toys], mixing)
    return before, Warped(Ensemble(toys, mixing), TopK(2))


def walked(p: LanguageModel, q: LanguageModel, steps: int = 3) -> tuple[Floats, Floats, Bools]:
    """Every sequence of p: its probability (M,), escaped masses (M, T), and which tokens q excludes (M, T)."""
    law = exact.sequence_law(p, (1,), max_new_tokens=steps)
    masses, outside = np.zeros(law.sequences.shape), np.zeros(law.sequences.shape, dtype=bool)
    for row, sequence in enumerate(law.sequences):
        for t, token in enumerate(sequence):
            if token < 0:
                break
            prefix = [(1, *sequence[:t].tolist())]
            log_p, log_q = p.log_probs(prefix)[0], q.log_probs(prefix)[0]
            masses[row, t] = escaped_mass(log_p, log_q)
            outside[row, t] = bool(log_q[token] == -math.inf)
    return np.exp(law.log_probs), masses, outside


def restricted(mass: Floats, masses: Floats, outside: Bools) -> tuple[Floats, Floats]:
    """The law that redraws until q allows the token: p(x)/Π(1 − m) on sequences without a violation."""
    allowed = ~outside.any(1)
    return mass[allowed] / np.prod(1 - masses[allowed], axis=1), masses[allowed]


@pytest.mark.parametrize("seed", range(8))
def test_which_mean_is_right_under_which_law(seed: int) -> None:
    """P(violation) by enumeration, against both formulas of `escaped_mass_bound`, and against the tempting third."""
    p, q = truncations(seed)
    mass, masses, outside = walked(p, q)
    violation = float(mass @ outside.any(1))
    assert mass.sum() == pytest.approx(1)
    # It is the mass of p outside the support of q over sequences, hence a lower bound on TV.
    laws = [exact.sequence_law(model, (1,), max_new_tokens=3) for model in (p, q)]
    log_p, log_q = laws[0].aligned(laws[1])
    assert violation == pytest.approx(np.exp(log_p[log_q == -math.inf]).sum(), abs=1e-12)
    assert violation <= laws[0].tv_distance(laws[1]) + 1e-12
    weights, along = restricted(mass, masses, outside)
    assert weights.sum() == pytest.approx(1)
    assert weights @ (1 - np.prod(1 - along, axis=1)) == pytest.approx(violation, abs=1e-12)
    until_first = (masses * (np.cumsum(outside, axis=1) - outside == 0)).sum(1)
    assert mass @ until_first == pytest.approx(violation, abs=1e-12)
    assert mass @ np.minimum(until_first, 1) <= violation + 1e-12
    # The values that the function computes are these: rows repeated in proportion would average to the same.
    direct = escaped_mass_bound(along, outside=None).value
    assert direct == pytest.approx((1 - np.prod(1 - along, axis=1)).mean())
    assert escaped_mass_bound(masses, outside=outside).value == pytest.approx(np.minimum(until_first, 1).mean())


def test_the_product_along_rows_of_p_overstates() -> None:
    """A token that q excludes leads to more of them: the product over whole rows of p counts what comes after."""
    calm, wild = [1.0, 0.0, 0.0], [0.0, 0.1, 0.9]
    p = TableModel([[0.8, 0.0, 0.2], calm, calm, wild], order=1)
    q = TableModel([calm, calm, calm, [0.0, 1.0, 0.0]], order=1)
    law = exact.sequence_law(p, (), max_new_tokens=3)
    mass, outside = np.exp(law.log_probs), law.sequences == 2
    masses = np.where(np.roll(law.sequences, 1, axis=1) == 2, 0.9, 0.0)
    masses[:, 0] = 0.2
    violation = mass @ outside.any(1)
    assert violation == pytest.approx(0.2)
    assert exact.sequence_law(q, (), max_new_tokens=3).tv_distance(law) == pytest.approx(violation)
    assert mass @ (1 - np.prod(1 - masses, axis=1)) > violation + 0.15
    rows = stream(16).choice(mass.size, size=4000, p=mass)
    misused = escaped_mass_bound(masses[rows], outside=None)
    assert misused.lower > violation
    right = escaped_mass_bound(masses[rows], outside=outside[rows])
    assert right.lower <= violation
    assert right.value == pytest.approx(violation)


def test_violation_bounds_hold_their_confidence() -> None:
    p, q = truncations(2)
    mass, masses, outside = walked(p, q)
    violation = float(mass @ outside.any(1))
    weights, along = restricted(mass, masses, outside)
    assert 0.05 < violation < 0.95
    rng, n = stream(17), 300
    drawn = rng.choice(mass.size, size=(300, n), p=mass / mass.sum())
    kept = rng.choice(weights.size, size=(300, n), p=weights / weights.sum())
    bounds = {
        "counted": [support_violation_bound(outside[rows].any(1)) for rows in drawn],
        "first": [escaped_mass_bound(masses[rows], outside=outside[rows]) for rows in drawn],
        "restricted": [escaped_mass_bound(along[rows], outside=None) for rows in kept],
    }
    for name, found in bounds.items():
        assert np.mean([b.lower <= violation for b in found]) >= 0.93, name
        assert np.mean([b.lower for b in found]) > 0.6 * violation, name
    # Counting is exact, so its coverage must not be far above nominal either.
    assert np.mean([b.lower <= violation for b in bounds["counted"]]) <= 0.99


def test_exact_masses_see_violations_that_never_happened() -> None:
    masses = np.full((500, 20), 2e-4)
    truth = 1 - (1 - 2e-4) ** 20
    assert support_violation_bound(np.zeros(500, dtype=bool)).lower == 0.0
    assert 0.3 * truth < escaped_mass_bound(masses, outside=None).lower < truth
    none = escaped_mass_bound(np.zeros((500, 20)), outside=None)
    assert (none.value, none.lower) == (0.0, 0.0)
    certain = escaped_mass_bound(np.ones((500, 1)), outside=np.ones((500, 1), dtype=bool))
    assert certain.value == 1.0
    assert 0.98 < certain.lower < 1.0


def test_support_violation_bound_by_hand() -> None:
    bound = support_violation_bound([True] * 7 + [False] * 3, confidence=0.9)
    assert bound.lower == pytest.approx(beta.ppf(0.1, 7, 4))
    assert (bound.value, bound.n, bound.confidence) == (0.7, 10, 0.9)


def test_betting_interval_keeps_the_sample_mean() -> None:
    low, high = betting_interval(np.linspace(0.2, 0.3, 500))  # sorted: no mean survives both bets
    assert low <= 0.25 <= high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_tv([0.0, 0.0], floor=2.0), "floor is 2.0"),
        (lambda: sequence_tv([0.0, 0.0], floor=math.nan), "floor is nan"),
        (lambda: support_violation_bound([0, 1]), "outside must hold bools"),
        (lambda: support_violation_bound(np.zeros((3, 2), dtype=bool)), r"outside has shape \(3, 2\)"),
        (lambda: support_violation_bound(np.zeros(0, dtype=bool)), r"outside has shape \(0,\)"),
        (lambda: support_violation_bound([True], confidence=0.4), "confidence is 0.4"),
        (lambda: escaped_mass_bound([0.1, 0.2], outside=None), r"step_mass has shape \(2,\)"),
        (lambda: escaped_mass_bound([[0.1], [1.2]], outside=None), "step_mass must hold probabilities"),
        (lambda: escaped_mass_bound([[0.1], [math.nan]], outside=None), "step_mass must hold"),
        (lambda: escaped_mass_bound([[0.1], [0.1]], outside=[True, False]), r"outside has shape \(2,\)"),
        (lambda: escaped_mass_bound([[0.1], [0.0]], outside=[[True], [True]]), "where step_mass is 0"),
        (lambda: escaped_mass_bound([[0.1], [0.1]], outside=None, confidence=1.0), "confidence is 1.0"),
        (lambda: betting_interval([0.5, 1.5]), "values must be"),
        (lambda: betting_interval([0.5, math.nan]), "values must be"),
        (lambda: betting_interval([]), "values must be"),
    ],
)
def test_bad_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
