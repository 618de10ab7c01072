"""Three ways to one derivative: enumeration, score function, common random numbers; and the ways to get it wrong."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity import (
    Estimate,
    ExpectationPolynomial,
    common_random_number_difference,
    reweight,
    score_function_gradient,
)
from me_stats.trace import Trace
from tests.strategies import LastTokenMixing

STEPS = 4
WEIGHTS = {2: (0.3, 0.7), 3: (0.2, 0.5, 0.3)}


@cache
def toys(count: int) -> tuple[TableModel, ...]:
    return tuple(TableModel.random(3, seed=seed, order=1, eos=(2,)) for seed in range(count))


def draw(weights: tuple[float, ...], n: int, seed: int = 0) -> Trace:
    ensemble = Ensemble(toys(len(weights)), ConstantMixing(weights))
    return MESampler(ensemble).sample([0], n=n, max_new_tokens=STEPS, seed=seed)


@cache
def exact(weights: tuple[float, ...]) -> np.ndarray:
    polynomial = ExpectationPolynomial.enumerate(toys(len(weights)), [0], sum, max_new_tokens=STEPS)
    return polynomial.gradient(weights)


def values(estimates: tuple[Estimate | None, ...]) -> np.ndarray:
    return np.array([np.nan if estimate is None else estimate.value for estimate in estimates])


def rewards(trace: Trace) -> np.ndarray:
    return trace.tokens.clamp(min=0).numpy().astype(float)


@pytest.mark.parametrize("count", [2, 3])
def test_three_ways_agree(count: int) -> None:
    weights = WEIGHTS[count]
    truth, trace = exact(weights), draw(weights, 20_000)
    for f in (sum, rewards(trace)):
        for estimate, slope in zip(score_function_gradient(trace, f), truth, strict=True):
            assert estimate is not None
            assert abs(estimate.value - slope) < 4 * estimate.stderr
            assert estimate.stderr < 0.05
    for i, slope in enumerate(truth):
        towards = np.eye(count)[i] - weights
        paired = common_random_number_difference(
            toys(count), weights, towards, 0.1, sum, prompts=[0], n=20_000, max_new_tokens=STEPS
        )
        assert abs(paired.value - slope) < 4 * paired.stderr + 0.1**2
        assert "step 0.1" in paired.method


def test_common_random_numbers_cancel_noise() -> None:
    options = {"prompts": [0], "n": 4000, "max_new_tokens": STEPS}
    towards = [0.7, -0.7]
    for sampler in (MESampler, CESampler):
        paired = common_random_number_difference(
            toys(2), WEIGHTS[2], towards, 0.05, sum, sampler=sampler, **options  # type: ignore[arg-type]
        )  # fmt: skip
        spread = reweight(draw(WEIGHTS[2], 4000), WEIGHTS[2]).estimate(sum).stderr
        assert paired.stderr < 0.6 * spread * np.sqrt(2) / 0.1  # of two independent runs


def test_bias_of_the_difference_falls_as_the_square_of_the_step() -> None:
    polynomial = ExpectationPolynomial.enumerate(toys(2), [0], sum, max_new_tokens=STEPS)
    at, along = np.array([0.5, 0.5]), np.array([1.0, -1.0])

    def bias(step: float) -> float:
        high, low = polynomial.value(at + step * along), polynomial.value(at - step * along)
        return (high - low) / (2 * step) - polynomial.derivative(at, along)

    third = polynomial.derivative(at, along, order=3) / 6
    assert bias(0.02) == pytest.approx(third * 0.02**2, rel=1e-3)
    assert bias(0.2) / bias(0.1) == pytest.approx(4, rel=0.05)


def small_traces(estimate: object, n: int = 3, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of an estimate over many tiny traces, where a bias of order 1/n is large."""
    whole = draw(WEIGHTS[2], n * count, seed=3)
    found = np.array([estimate(whole, slice(g * n, (g + 1) * n)) for g in range(count)])  # type: ignore[operator]
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(count)


def by_hand(trace: Trace, rows: slice, *, own: bool = False, divide: bool = True) -> np.ndarray:
    """The estimator from its formula, with the bugs that people write."""
    probs = trace.component_log_probs[rows].exp().numpy()
    mixed = trace.log_probs[rows].exp().numpy()[..., None]
    scores = ((probs / mixed - 1) if divide else (probs - mixed)).sum(1)
    f = rewards(trace)[rows].sum(1)
    baseline = f.mean() if own else (f.sum() - f) / (len(f) - 1)
    return np.asarray(((f - baseline)[:, None] * scores).mean(0))


def test_it_is_the_formula() -> None:
    trace = draw(WEIGHTS[2], 50)
    assert values(score_function_gradient(trace, sum)) == pytest.approx(by_hand(trace, slice(None)))
    assert values(score_function_gradient(trace, rewards(trace).sum(1))) == pytest.approx(by_hand(trace, slice(None)))


def test_leaving_the_own_row_out_is_what_makes_it_unbiased() -> None:
    truth = exact(WEIGHTS[2])
    mean, stderr = small_traces(by_hand)
    assert (np.abs(mean - truth) < 4 * stderr).all()
    mean, stderr = small_traces(lambda trace, rows: by_hand(trace, rows, own=True))
    assert (np.abs(mean - truth) > 5 * stderr).all()
    mean, stderr = small_traces(lambda trace, rows: by_hand(trace, rows, divide=False))
    assert (np.abs(mean - truth) > 5 * stderr).all()


@pytest.mark.parametrize("causal", [False, True])
def test_intervals_cover(causal: bool) -> None:
    truth, hits = exact(WEIGHTS[2]), []
    for seed in range(200):
        trace = draw(WEIGHTS[2], 200, seed=seed)
        first = score_function_gradient(trace, rewards(trace) if causal else sum)[0]
        assert first is not None
        hits.append(first.interval[0] <= truth[0] <= first.interval[1])
    assert 0.888 <= np.mean(hits) < 1  # four binomial standard deviations around 0.95


def test_later_rewards_are_all_that_a_score_needs() -> None:
    trace = draw(WEIGHTS[3], 10_000)
    total, causal = (score_function_gradient(trace, f) for f in (sum, rewards(trace)))
    for whole, step in zip(total, causal, strict=True):
        assert whole is not None
        assert step is not None
        assert step.stderr < whole.stderr
        assert abs(step.value - whole.value) < 4 * whole.stderr


def test_elsewhere_by_re_weighting() -> None:
    weights = (0.4, 0.6)
    for estimate, slope in zip(
        score_function_gradient(draw(WEIGHTS[2], 20_000), sum, weights=weights), exact(weights), strict=True
    ):
        assert estimate is not None
        assert abs(estimate.value - slope) < 4 * estimate.stderr
        assert estimate.method == "score function, re-weighted from λ=(0.3, 0.7)"


def test_a_corner_from_inside_sees_what_only_the_other_component_writes() -> None:
    disjoint = [TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)]
    inside = MESampler(Ensemble(disjoint, ConstantMixing([0.5, 0.5]))).sample([], n=5000, max_new_tokens=3)
    towards = score_function_gradient(inside, sum, weights=[1.0, 0.0])
    for estimate, slope in zip(towards, (0.0, 3.0), strict=True):
        assert estimate is not None
        assert abs(estimate.value - slope) <= 4 * estimate.stderr
    there = MESampler(Ensemble(disjoint, ConstantMixing([1.0, 0.0]))).sample([], n=100, max_new_tokens=3)
    own, other = score_function_gradient(there, sum)
    assert other is None
    assert own is not None
    assert own.value == 0.0


def test_bad_input_names_the_argument() -> None:
    trace = draw(WEIGHTS[2], 20)
    with pytest.raises(ValueError, match="drawn at weights"):
        score_function_gradient(trace, rewards(trace), weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="f must be finite"):
        score_function_gradient(trace, np.full(20, np.inf))
    with pytest.raises(ValueError, match="f has shape"):
        score_function_gradient(trace, np.ones(3))
    with pytest.raises(ValueError, match="1 rows"):
        score_function_gradient(draw(WEIGHTS[2], 1), sum)
    routed = LastTokenMixing(np.full((4, 2), 0.5))
    with pytest.raises(ValueError, match="drawn by a router"):
        score_function_gradient(MESampler(Ensemble(toys(2), routed)).sample([0], n=4, max_new_tokens=2), sum)
    options = {"prompts": [0], "n": 4, "max_new_tokens": 2}
    for direction, step, message in (
        ([1.0, 0.0], 0.1, "sum to 0"),
        ([1.0, -1.0], 0.5, "leaves the simplex"),
        ([1.0, -1.0], 0.0, "step must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            common_random_number_difference(toys(2), WEIGHTS[2], direction, step, sum, **options)  # type: ignore[arg-type]
