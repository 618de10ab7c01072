from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from scipy.stats import beta, chi2, chisquare, ncx2, norm

from me_stats.equivalence import (
    TVBound,
    binomial_interval,
    equivalence_pvalue,
    minimum_detectable_tv,
    plugin_tv,
    required_draws,
    tv_lower_bound,
    tv_upper_bound,
    tv_upper_bound_cells,
    white_box_bound,
)

Floats = NDArray[np.float64]


def stream(seed: int) -> Generator:
    return Generator(Philox(seed))


def zipf(size: int, exponent: float = 1.0) -> Floats:
    law = np.arange(1, size + 1) ** -exponent
    return law / law.sum()


def tv(p: Floats, q: Floats) -> float:
    return float(0.5 * np.abs(p - q).sum())


def tilted(law: Floats, size: float) -> Floats:
    """q = (1 ± size) p: the departure for which TV ≤ ½ √χ²div is tight, so coverage is at its lowest."""
    signs = np.where(np.arange(law.size) % 2, 1.0, -1.0)
    up = law[signs > 0].sum()
    return law * (1.0 + size * signs * np.where(signs > 0, (1 - up) / max(up, 1 - up), up / max(up, 1 - up)))


def moved_to_rare(law: Floats, mass: float, tokens: int) -> Floats:
    """Take a share of every token and give it to the rarest ones."""
    q = law * (1.0 - mass)
    q[np.argsort(law)[:tokens]] += mass / tokens
    return q


# --- upper bound on a partition ------------------------------------------------------------------------------


def test_cells_bound_inverts_the_noncentral_chi_square() -> None:
    law = zipf(12)
    counts = stream(0).multinomial(20_000, tilted(law, 0.1))
    bound = tv_upper_bound_cells(counts, law, confidence=0.99)
    assert bound.statistic == pytest.approx(chisquare(counts, 20_000 * law).statistic)
    assert ncx2.cdf(bound.statistic, 11, 4 * bound.n * bound.upper**2) == pytest.approx(0.01, rel=1e-6)
    assert ncx2.cdf(11, 11, 4 * bound.n * bound.null_value**2) == pytest.approx(0.01, rel=1e-6)
    assert (bound.lower, bound.n, bound.cells, bound.off_support) == (0.0, 20_000, 12, 0)


def coverage(bound: Callable[..., TVBound], law: Floats, q: Floats, n: int, runs: int, seed: int) -> float:
    rng = stream(seed)
    return float(np.mean([bound(rng.multinomial(n, q), law).upper >= tv(law, q) for _ in range(runs)]))


# 400 runs: a correct .95 falls below .91 with probability 3e-4, and the seeds are fixed.
@pytest.mark.parametrize(("n", "size"), [(500, 0.0), (500, 0.3), (5000, 0.1), (50_000, 0.05)])
def test_cells_bound_covers_where_it_is_tight(n: int, size: float) -> None:
    law = np.full(16, 1 / 16)
    q = tilted(law, size)
    assert coverage(tv_upper_bound_cells, law, q, n, runs=400, seed=n) >= 0.91


def test_cells_bound_is_not_merely_conservative() -> None:
    law = np.full(16, 1 / 16)
    assert coverage(tv_upper_bound_cells, law, tilted(law, 0.1), 5000, runs=400, seed=1) <= 0.98


def test_small_cells_are_pooled_by_the_null_law_and_unpooled_cells_would_mislead() -> None:
    law, n = zipf(256, 2.0), 1000
    large = n * law >= 5

    def pool(values: Floats) -> Floats:
        return np.append(values[large], values[~large].sum())

    signs = stream(5).choice([-1.0, 1.0], size=law.size)
    q = law * (1 + 0.7 * signs)
    q /= q.sum()
    draws = stream(3).multinomial(n, q, size=200)
    pooled = [tv_upper_bound_cells(row, law) for row in draws]
    assert {bound.cells for bound in pooled} == {large.sum() + 1}
    assert np.mean([bound.upper >= tv(pool(law), pool(q)) for bound in pooled]) >= 0.93
    unpooled = [tv_upper_bound_cells(row, law, min_expected=0).upper for row in draws]
    assert np.mean(np.array(unpooled) >= tv(law, q)) < 0.6


def test_pooling_keeps_every_expected_count_above_the_minimum() -> None:
    # Expected counts 1, 2, 4, 93: the three small ones together expect 7.
    bound = tv_upper_bound_cells([0, 3, 4, 93], [0.01, 0.02, 0.04, 0.93])
    assert bound.cells == 2
    assert bound.statistic == pytest.approx(0.0)
    assert tv_upper_bound_cells([0, 3, 4, 93], [0.01, 0.02, 0.04, 0.93], min_expected=0).cells == 4
    # One small cell alone takes in the next one.
    assert tv_upper_bound_cells([1, 9, 90], [0.01, 0.09, 0.90]).cells == 2


def test_zero_probability_cells_are_dropped_or_decisive() -> None:
    clean = tv_upper_bound_cells([50, 50, 0], [0.5, 0.5, 0.0])
    assert (clean.cells, clean.off_support) == (2, 0)
    assert clean.upper == tv_upper_bound_cells([50, 50], [0.5, 0.5]).upper
    drawn = tv_upper_bound_cells([500, 499, 1], [0.5, 0.5, 0.0])
    assert (drawn.upper, drawn.statistic, drawn.off_support) == (1.0, math.inf, 1)
    assert equivalence_pvalue([500, 499, 1], [0.5, 0.5, 0.0], 0.5) == 1.0


def test_luck_is_not_precision() -> None:
    perfect = tv_upper_bound_cells([250] * 4, [0.25] * 4)
    assert perfect.statistic == 0.0
    assert perfect.upper == perfect.null_value > 0.02
    too_regular = tv_upper_bound([10] * 1000, np.full(1000, 1e-3))
    assert too_regular.statistic < 0
    assert too_regular.upper == too_regular.null_value > 0.02


def test_cells_bound_catches_a_planted_bug() -> None:
    """λ + .05 on components at TV .8 moves TV by .04: a margin of .02 must not be certified, .06 must."""
    first, second = np.array([0.5, 0.4, 0.05, 0.05]), np.array([0.05, 0.05, 0.4, 0.5])
    law, wrong = (weight * first + (1 - weight) * second for weight in (0.5, 0.55))
    for seed in range(20):
        rng = stream(seed)
        bad, good = rng.multinomial(50_000, wrong), rng.multinomial(50_000, law)
        assert tv_upper_bound_cells(bad, law).upper > tv(law, wrong)
        assert tv_upper_bound_cells(good, law).upper < 0.02
        assert equivalence_pvalue(bad, law, 0.02) > 0.999
        assert equivalence_pvalue(bad, law, 0.06) < 1e-3
        assert equivalence_pvalue(good, law, 0.02) < 1e-6


def test_a_partition_certifies_itself_only() -> None:
    law, q = np.full(4, 0.25), np.array([0.5, 0.0, 0.25, 0.25])
    counts = stream(3).multinomial(100_000, q)
    merged = tv_upper_bound_cells([counts[:2].sum(), counts[2:].sum()], [0.5, 0.5])
    assert merged.upper < 0.01 < tv(law, q) < tv_upper_bound_cells(counts, law).upper


def test_equivalence_pvalue_holds_its_level_at_the_margin() -> None:
    law = np.full(16, 1 / 16)
    q = tilted(law, 0.1)
    draws = stream(4).multinomial(5000, q, size=2000)
    rejected = np.mean([equivalence_pvalue(row, law, tv(law, q)) <= 0.05 for row in draws])
    assert 0.03 <= rejected <= 0.06


@st.composite
def histograms(draw: st.DrawFn) -> tuple[Floats, Floats]:
    size = draw(st.integers(2, 8))
    raw = np.array(draw(st.lists(st.floats(0.05, 1.0), min_size=size, max_size=size)))
    counts = draw(st.lists(st.integers(0, 3000), min_size=size, max_size=size).filter(lambda row: sum(row) >= 200))
    return np.array(counts, dtype=float), raw / raw.sum()


@given(histograms(), st.floats(0.6, 0.999), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_properties_of_both_upper_bounds(case: tuple[Floats, Floats], confidence: float, random: object) -> None:
    counts, law = case
    order = np.array(random.sample(range(law.size), law.size))  # type: ignore[attr-defined]
    for function in (tv_upper_bound_cells, tv_upper_bound):
        bound = function(counts, law, confidence=confidence)
        assert 0 < bound.null_value <= bound.upper <= 1
        assert function(counts[order], law[order], confidence=confidence).upper == pytest.approx(bound.upper)
        assert function(counts, law, confidence=0.9999).upper >= bound.upper - 1e-12
    cells = tv_upper_bound_cells(counts, law, confidence=confidence)
    if cells.upper < 1:
        assert equivalence_pvalue(counts, law, cells.upper) <= 1 - confidence + 1e-9


# --- upper bound on a vocabulary --------------------------------------------------------------------------------


def test_the_statistic_is_unbiased() -> None:
    """E T = n(n − 1) Σ d²/w, by enumerating every histogram of four draws."""
    law, q, n = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3]), 4
    total = 0.0
    for path in itertools.product(range(3), repeat=n):
        total += q[list(path)].prod() * tv_upper_bound(np.bincount(path, minlength=3), law).statistic
    weights = np.maximum(law, 1 / 3)
    assert total == pytest.approx(n * (n - 1) * ((q - law) ** 2 / weights).sum(), rel=1e-12)


def test_the_root_solves_the_equation_in_the_docstring() -> None:
    law = zipf(1000)
    counts = stream(5).multinomial(200_000, moved_to_rare(law, 0.05, 500))
    bound = tv_upper_bound(counts, law, confidence=0.9)
    weights, n = np.maximum(law, 1e-3), bound.n
    mu = (2 * bound.upper) ** 2 * n * (n - 1) / weights.sum()
    spread = 2 * (n * math.sqrt((law**2 / weights**2).sum()) + math.sqrt(1000 * mu)) ** 2 + 4 * n * mu
    assert mu - norm.ppf(0.9) * math.sqrt(spread) == pytest.approx(bound.statistic, rel=1e-9)


@pytest.mark.parametrize(("n", "departure"), [(2000, 0.0), (2000, 0.1), (50_000, 0.02), (50_000, 0.2)])
def test_vocabulary_bound_covers_on_256_tokens(n: int, departure: float) -> None:
    law = zipf(256)
    for q in (moved_to_rare(law, departure, 128), tilted(law, departure)):
        assert coverage(tv_upper_bound, law, q, n, runs=300, seed=n) >= 0.93


@pytest.mark.parametrize(("n", "departure"), [(50_000, 0.0), (50_000, 0.05), (1_300_000, 0.01)])
def test_vocabulary_bound_covers_on_50k_tokens(n: int, departure: float) -> None:
    law = zipf(50_000)
    assert coverage(tv_upper_bound, law, moved_to_rare(law, departure, 25_000), n, runs=60, seed=n) >= 0.9


def test_a_million_draws_certify_a_hundredth_over_50k_tokens() -> None:
    law = zipf(50_000)
    bounds = [tv_upper_bound(stream(seed).multinomial(1_300_000, law), law) for seed in range(20)]
    assert bounds[0].null_value == pytest.approx(0.0086, abs=1e-4)
    assert np.median([bound.upper for bound in bounds]) < 0.01
    # The same draws must not certify a sampler that is .02 away.
    moved = moved_to_rare(law, 0.02, 25_000)
    assert min(tv_upper_bound(stream(s).multinomial(1_300_000, moved), law).upper for s in range(20)) > tv(law, moved)


def test_peaked_law_needs_the_spread_of_rare_tokens() -> None:
    """Mass on tokens that the null law hardly knows: the null variance alone covers far too seldom."""
    law, n = zipf(50_000, 4.0), 1000
    q = moved_to_rare(law, 0.2, 49_995)
    rng, weights = stream(6), np.maximum(law, 1 / 50_000)
    bounds = [tv_upper_bound(rng.multinomial(n, q), law) for _ in range(100)]
    assert np.mean([bound.upper >= tv(law, q) for bound in bounds]) >= 0.95
    mu = (2 * tv(law, q) * n) ** 2 / weights.sum()
    null_only = mu - norm.ppf(0.95) * math.sqrt(2 * n**2 * (law**2 / weights**2).sum() + 4 * n * mu)
    assert np.mean([bound.statistic >= null_only for bound in bounds]) < 0.6


def test_vocabulary_bound_counts_draws_outside_the_support_and_stays_finite() -> None:
    bound = tv_upper_bound([600, 399, 1], [0.6, 0.4, 0.0])
    assert bound.off_support == 1
    assert bound.upper < 0.2
    assert tv_upper_bound([0, 0, 1000], [0.6, 0.4, 0.0]).upper == 1.0


# --- lower bound, plug-in ---------------------------------------------------------------------------------------


def test_lower_bound_is_valid_and_finds_the_bug() -> None:
    law, rng = zipf(256), stream(7)
    q = moved_to_rare(law, 0.05, 128)
    bounds = [tv_lower_bound(*rng.multinomial(20_000, q, size=2), law) for _ in range(400)]
    assert np.mean([bound.lower <= tv(law, q) for bound in bounds]) >= 0.95
    # What is lost to not knowing the event, and to its interval, is modest.
    assert np.median([bound.lower for bound in bounds]) > 0.6 * tv(law, q)
    null = [tv_lower_bound(*rng.multinomial(2000, law, size=2), law) for _ in range(400)]
    false_alarms = np.mean([bound.lower > 0 for bound in null])
    assert false_alarms <= 0.08
    # The control: selecting and testing on the same draws sees a bug in every correct sampler.
    same = [tv_lower_bound(counts, counts, law).lower for counts in rng.multinomial(2000, law, size=50)]
    assert min(same) > 0.05


def test_lower_bound_by_hand() -> None:
    bound = tv_lower_bound([60, 40], [70, 30], [0.5, 0.5], confidence=0.95)
    assert bound.lower == pytest.approx(beta.ppf(0.05, 70, 31) - 0.5)
    assert bound.statistic == pytest.approx(0.2)
    assert (bound.upper, bound.null_value, bound.n) == (1.0, 0.0, 100)
    assert tv_lower_bound([60, 40], [30, 70], [0.5, 0.5]).lower == 0.0
    assert tv_lower_bound([50, 50], [70, 30], [0.5, 0.5]).lower == 0.0
    off = tv_lower_bound([50, 49, 1], [50, 45, 5], [0.5, 0.5, 0.0])
    assert (off.off_support, off.lower > 0) == (5, True)


def test_plugin_null_value_is_exact() -> None:
    law, n = np.array([0.6, 0.3, 0.1]), 5
    total = sum(
        law[list(path)].prod() * plugin_tv(np.bincount(path, minlength=3), law).value
        for path in itertools.product(range(3), repeat=n)
    )
    assert plugin_tv([5, 0, 0], law).null_value == pytest.approx(total, rel=1e-12)
    assert plugin_tv([5, 0, 0], [1.0, 0.0, 0.0]).null_value == 0.0


def test_plugin_bias_on_a_large_vocabulary() -> None:
    law, rng = zipf(50_000), stream(8)
    for n in (10_000, 1_000_000):
        estimates = [plugin_tv(rng.multinomial(n, law), law) for _ in range(10)]
        assert np.mean([e.value for e in estimates]) == pytest.approx(estimates[0].null_value, rel=0.01)
        normal = 0.5 * np.sqrt(2 * law * (1 - law) / (math.pi * n)).sum()
        # The normal formula is right for a million draws and useless for ten thousand.
        assert normal == pytest.approx(estimates[0].null_value, rel=0.01) if n > 10**5 else normal > 0.5
    assert estimates[0].value > 0.05


# --- planning ----------------------------------------------------------------------------------------------------


def test_planned_draws_give_the_planned_power() -> None:
    level, power, cells = 1e-3, 0.8, 16
    n = required_draws(0.02, cells, level=level, power=power)
    assert minimum_detectable_tv(n, cells, level=level, power=power) == pytest.approx(0.02, rel=1e-4)
    law = np.full(cells, 1 / cells)
    q = tilted(law, 0.04)
    assert tv(law, q) == pytest.approx(0.02)
    draws = stream(9).multinomial(n, q, size=4000)
    statistics = ((draws - n * law) ** 2 / (n * law)).sum(1)
    assert np.mean(statistics > chi2.isf(level, cells - 1)) == pytest.approx(power, abs=0.03)


@given(st.integers(10, 10**7), st.integers(2, 500), st.floats(1e-12, 1e-2), st.floats(0.1, 0.999))
@settings(deadline=None, max_examples=50)
def test_planning_is_monotone_and_inverts(n: int, cells: int, level: float, power: float) -> None:
    delta = minimum_detectable_tv(n, cells, level=level, power=power)
    assert minimum_detectable_tv(2 * n, cells, level=level, power=power) <= delta
    assert minimum_detectable_tv(n, cells, level=level / 10, power=power) >= delta
    if delta < 1:
        assert required_draws(delta, cells, level=level, power=power) in (n, n + 1)


# --- binomial, white box ---------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0.01, 0.999))
def test_binomial_interval_against_beta_quantiles(n: int, share: float, confidence: float) -> None:
    k, alpha = round(n * share), 1 - confidence
    low, high = binomial_interval(k, n, confidence=confidence)
    assert low == pytest.approx(beta.ppf(alpha / 2, k, n - k + 1) if k else 0.0, rel=1e-6, abs=1e-12)
    assert high == pytest.approx(beta.isf(alpha / 2, k + 1, n - k) if k < n else 1.0, rel=1e-6, abs=1e-12)


def test_white_box_bound_is_sharp_for_wrong_weights_of_two_components() -> None:
    components = stream(13).dirichlet(np.ones(30), size=2)
    gap = tv(np.array([0.4, 0.6]) @ components, np.array([0.45, 0.55]) @ components)
    certificate = white_box_bound(
        weight_error_tv=0.05, max_component_tv=tv(*components), cache_tv=[0, 0], weights=[0.4, 0.6], draw_tv=0
    )
    assert certificate.total == pytest.approx(gap, rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_white_box_bound_holds_and_every_term_is_needed(seed: int) -> None:
    rng = stream(seed)
    size = int(rng.integers(2, 5))
    weights, used_weights = rng.dirichlet(np.full(size, 5.0), size=2)
    fresh = rng.dirichlet(np.full(10, 0.3), size=size)
    used = 0.9 * fresh + 0.1 * rng.dirichlet(np.full(10, 0.3), size=size)
    drawn = 0.95 * (used_weights @ used) + 0.05 * rng.dirichlet(np.full(10, 0.3))
    certificate = white_box_bound(
        weight_error_tv=tv(weights, used_weights),
        max_component_tv=max(tv(a, b) for a in used for b in used),
        cache_tv=[tv(a, b) for a, b in zip(used, fresh, strict=True)],
        weights=weights,
        draw_tv=tv(drawn, used_weights @ used),
    )
    assert tv(drawn, weights @ fresh) <= certificate.total + 1e-12
    assert certificate.total == pytest.approx(
        min(1.0, certificate.weight_term + certificate.cache_term + certificate.draw_term)
    )


def test_white_box_bound_of_a_single_component_is_its_cache_and_draw() -> None:
    certificate = white_box_bound(weight_error_tv=0, max_component_tv=0, cache_tv=[0.75], weights=[1.0], draw_tv=0.5)
    assert (certificate.cache_term, certificate.draw_term, certificate.total) == (0.75, 0.5, 1.0)


def test_white_box_bound_sees_a_stale_cache() -> None:
    fresh, stale = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.9, 0.1], [0.7, 0.3]])
    weights = np.array([0.5, 0.5])
    certificate = white_box_bound(
        weight_error_tv=0,
        max_component_tv=tv(*stale),
        cache_tv=[tv(a, b) for a, b in zip(fresh, stale, strict=True)],
        weights=weights,
        draw_tv=0,
    )
    actual = tv(weights @ fresh, weights @ stale)
    assert certificate.cache_term == pytest.approx(actual) == pytest.approx(0.25)
    # Without the cache term the certificate would call this sampler exact.
    assert certificate.weight_term + certificate.draw_term == 0.0


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tv_upper_bound([1, 2, 3], [0.5, 0.5]), r"counts has shape \(3,\) and probs \(2,\)"),
        (lambda: tv_upper_bound([1.5, 2], [0.5, 0.5]), "counts must hold whole numbers"),
        (lambda: tv_upper_bound([-1, 2], [0.5, 0.5]), "none negative"),
        (lambda: tv_upper_bound([math.nan, 2], [0.5, 0.5]), "counts must hold"),
        (lambda: tv_upper_bound([0, 1], [0.5, 0.5]), "total of counts is 1: at least 2"),
        (lambda: tv_upper_bound([5, 5], [0.5, 0.4]), "probs must be non-negative and sum to 1"),
        (lambda: tv_upper_bound([5, 5], [math.nan, 0.4]), "probs must be"),
        (lambda: tv_upper_bound([5, 5], np.log([0.5, 0.5])), "pass exp of log-probs"),
        (lambda: tv_upper_bound([[5, 5]], [[0.5, 0.5]]), "one dimension"),
        (lambda: tv_upper_bound([5, 5], [0.5, 0.5], confidence=95), "confidence is 95"),
        (lambda: tv_upper_bound_cells([5, 5], [0.5, 0.5], confidence=0.3), "confidence is 0.3"),
        (lambda: tv_upper_bound_cells([3, 3], [0.5, 0.5]), "n = 6 draws leave 1 cell"),
        (lambda: tv_upper_bound_cells([9, 0], [1.0, 0.0]), "use tv_upper_bound"),
        (lambda: equivalence_pvalue([50, 50], [0.5, 0.5], 0.0), "margin is 0.0"),
        (lambda: tv_lower_bound([5, 5], [5, 5, 5], [0.5, 0.5]), "counts_test has shape"),
        (lambda: tv_lower_bound([5.5, 5], [5, 5], [0.5, 0.5]), "counts_select must hold"),
        (lambda: minimum_detectable_tv(0, 16, level=1e-3), "n is 0"),
        (lambda: minimum_detectable_tv(10, 1, level=1e-3), "cells is 1"),
        (lambda: minimum_detectable_tv(10, 2, level=0), "level is 0"),
        (lambda: minimum_detectable_tv(10, 2, level=0.5, power=0.4), "power 0.4 does not exceed level 0.5"),
        (lambda: required_draws(0.0, 16, level=1e-3), "delta is 0.0"),
        (lambda: binomial_interval(5, 4), "successes is 5"),
        (
            lambda: white_box_bound(
                weight_error_tv=0, max_component_tv=1.2, cache_tv=[0, 0], weights=[0.5, 0.5], draw_tv=0
            ),
            "max_component_tv is 1.2",
        ),
        (
            lambda: white_box_bound(
                weight_error_tv=0, max_component_tv=1, cache_tv=[0, math.nan], weights=[0.5, 0.5], draw_tv=0
            ),
            "cache_tv is nan",
        ),
        (
            lambda: white_box_bound(weight_error_tv=0, max_component_tv=1, cache_tv=[0], weights=[0.5, 0.5], draw_tv=0),
            r"cache_tv has shape \(1,\)",
        ),
    ],
)
def test_bad_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_torch_and_float32_laws_are_accepted() -> None:
    torch = pytest.importorskip("torch")
    law = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).softmax(0)
    counts = torch.bincount(torch.multinomial(law, 10_000, True, generator=torch.Generator().manual_seed(0)))
    counts = torch.nn.functional.pad(counts, (0, 50_000 - counts.numel()))
    assert tv_upper_bound(counts, law).n == 10_000
