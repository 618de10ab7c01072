"""The polynomial E_λ f, its value and derivatives, against laws and differences computed another way."""

from __future__ import annotations

import numpy as np
import pytest

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import MESampler
from me_stats.sensitivity import ExpectationPolynomial, exact_curvature, exact_expectation, exact_gradient

STEPS = 4


def toys(count: int, *, size: int = 3, eos: tuple[int, ...] = (2,)) -> list[TableModel]:
    return [TableModel.random(size, seed=seed, order=2, eos=eos) for seed in range(count)]


def rough(row: object) -> float:
    """A function of the whole continuation, neither additive nor symmetric."""
    return float(sum((i + 1) ** 1.5 * token for i, token in enumerate(row)) - len(row) ** 2)  # type: ignore[arg-type, var-annotated]


WEIGHTS = {1: [1.0], 2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_value_is_the_mean_under_the_law(count: int) -> None:
    components, weights = toys(count), WEIGHTS[count]
    law = sequence_law(Ensemble(components, ConstantMixing(weights)), [0], max_new_tokens=STEPS)
    expected = sum(
        np.exp(log_p) * rough([token for token in row if token >= 0])
        for row, log_p in zip(law.sequences.tolist(), law.log_probs, strict=True)
    )
    assert exact_expectation(components, [0], rough, weights, max_new_tokens=STEPS) == pytest.approx(
        expected, rel=1e-12
    )


def test_value_is_the_mean_of_what_me_writes() -> None:
    components = toys(2)
    law = sampler_law(MESampler(Ensemble(components, ConstantMixing([0.3, 0.7]))), [0], max_new_tokens=3)
    written = sum(
        np.exp(log_p) * rough([token for token in row if token >= 0])
        for row, log_p in zip(law.sequences.tolist(), law.log_probs, strict=True)
    )
    assert exact_expectation(components, [0], rough, [0.3, 0.7], max_new_tokens=3) == pytest.approx(written, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_derivatives_are_the_limits_of_differences(count: int) -> None:
    polynomial = ExpectationPolynomial.enumerate(toys(count), [0], rough, max_new_tokens=STEPS)
    at, step = np.array(WEIGHTS[count]), 1e-4
    gradient = polynomial.gradient(at)
    for i in range(count):
        towards = np.eye(count)[i] - at
        up, down = polynomial.value(at + step * towards), polynomial.value(at - step * towards)
        assert gradient[i] == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-6)
        second = polynomial.derivative(at, towards, order=2)
        assert second == pytest.approx((up - 2 * polynomial.value(at) + down) / step**2, rel=1e-4, abs=1e-4)
    assert abs(at @ gradient) < 1e-12
    along = np.eye(count)[0] - np.eye(count)[1]
    assert polynomial.derivative(at, along) == pytest.approx(gradient[0] - gradient[1], rel=1e-12)


def test_degree_is_at_most_the_number_of_steps() -> None:
    polynomial = ExpectationPolynomial.enumerate(toys(2, eos=()), [0], rough, max_new_tokens=3)
    along = [1.0, -1.0]
    assert abs(polynomial.derivative([0.4, 0.6], along, order=3)) > 1e-3
    assert polynomial.derivative([0.4, 0.6], along, order=4) == 0.0
    # A Taylor series of degree T is the polynomial itself.
    series = sum(polynomial.derivative([0.4, 0.6], along, order=k) * 0.6**k / f for k, f in enumerate((1, 1, 2, 6)))
    assert polynomial.value([1.0, 0.0]) == pytest.approx(series, rel=1e-12)


def test_what_only_a_component_of_weight_zero_writes_enters_the_derivative() -> None:
    components = [TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)]
    gradient = exact_gradient(components, [], sum, [1.0, 0.0], max_new_tokens=5)
    assert gradient.tolist() == [0.0, 5.0]
    assert exact_curvature(components, [], sum, [1.0, 0.0], [-1.0, 1.0], max_new_tokens=5) == 0.0


def test_one_component_has_no_derivative() -> None:
    assert exact_gradient(toys(1), [0], rough, [1.0], max_new_tokens=3).tolist() == [0.0]


def test_bad_input_names_the_argument() -> None:
    polynomial = ExpectationPolynomial.enumerate(toys(2), [0], rough, max_new_tokens=2)
    for weights, message in (([0.5, 0.6], "sum to 1"), ([1.0], "1 entries for 2"), ([float("nan"), 1], "finite")):
        with pytest.raises(ValueError, match=message):
            polynomial.value(weights)
    with pytest.raises(ValueError, match="direction must sum to 0"):
        polynomial.derivative([0.5, 0.5], [1.0, 0.0])
    with pytest.raises(ValueError, match="direction must be 2"):
        polynomial.derivative([0.5, 0.5], [1.0, -0.5, -0.5])
    with pytest.raises(ValueError, match="order"):
        polynomial.derivative([0.5, 0.5], [1.0, -1.0], order=-1)
    with pytest.raises(ValueError, match="f must be finite"):
        ExpectationPolynomial.enumerate(toys(2), [0], lambda row: float("nan"), max_new_tokens=2)
