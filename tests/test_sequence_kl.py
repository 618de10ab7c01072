from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from me_stats import ConstantMixing, Ensemble, exact
from me_stats.divergence import kl_divergence
from me_stats.models import LanguageModel, TableModel, TopK, Warped
from me_stats.sequence_kl import sequence_kl, tv_bound_from_kl

Floats = NDArray[np.float64]


def stream(seed: int) -> Generator:
    return Generator(Philox(seed))


def table(rng: Generator, size: int = 3, concentration: float = 2.0) -> TableModel:
    return TableModel(rng.dirichlet(np.full(size, concentration), 1 + size + size**2), order=2, eos=(0,))


def walked(p: LanguageModel, q: LanguageModel, steps: int = 4) -> tuple[Floats, Floats, Floats]:
    """Every sequence of p: its probability (M,), its exact step KLs (M, T), its log p(x)/q(x) (M,)."""
    law = exact.sequence_law(p, (1,), max_new_tokens=steps)
    kls, log_ratio = np.zeros(law.sequences.shape), np.zeros(len(law.sequences))
    for row, sequence in enumerate(law.sequences):
        for t, token in enumerate(sequence):
            if token < 0:
                break
            prefix = [(1, *sequence[:t].tolist())]
            log_p, log_q = p.log_probs(prefix)[0], q.log_probs(prefix)[0]
            kls[row, t] = kl_divergence(log_p, log_q)
            log_ratio[row] += float(log_p[token] - log_q[token])
    return np.exp(law.log_probs), kls, log_ratio


def enumerated_kl(p: LanguageModel, q: LanguageModel, steps: int = 4) -> float:
    laws = [exact.sequence_law(model, (1,), max_new_tokens=steps) for model in (p, q)]
    log_p, log_q = laws[0].aligned(laws[1])
    seen = log_p > -math.inf
    return float(np.exp(log_p[seen]) @ (log_p - log_q)[seen])


def variance(mass: Floats, values: Floats) -> float:
    return float(mass @ (values - mass @ values) ** 2)


# --- the chain rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_chain_rule_meets_enumeration_with_less_variance_than_the_log_ratio(seed: int) -> None:
    """Sequences end early, so padding counts too."""
    rng = stream(seed)
    p, q = table(rng), table(rng)
    mass, kls, log_ratio = walked(p, q)
    truth = enumerated_kl(p, q)
    assert (kls[:, -1] == 0).any()
    assert mass @ kls.sum(1) == pytest.approx(truth, abs=1e-12)
    assert mass @ log_ratio == pytest.approx(truth, abs=1e-12)
    assert 2.3 < variance(mass, log_ratio) / variance(mass, kls.sum(1)) < 28  # as the docstring says
    rows = rng.choice(mass.size, size=20_000, p=mass / mass.sum())
    estimate = sequence_kl(kls[rows])
    assert abs(estimate.value - truth) < 5 * estimate.stderr
    assert estimate.stderr == pytest.approx(math.sqrt(variance(mass, kls.sum(1)) / 20_000), rel=0.05)
    assert estimate.normal == pytest.approx(
        (estimate.value - 1.959964 * estimate.stderr, estimate.value + 1.959964 * estimate.stderr), rel=1e-6
    )
    assert (estimate.bounded, estimate.infinite, estimate.n) == (None, False, 20_000)


def test_less_variance_is_the_rule_and_no_theorem() -> None:
    """What the first token adds to log p/q, the second takes away: the log-ratio is constant, the step KLs are not."""
    sure = [1.0, 0.0, 0.0]
    p = TableModel([[0.0, 0.5, 0.5], sure, sure, sure], order=1)
    q = TableModel([[0.0, 0.2, 0.8], sure, sure, [0.25, 0.75, 0.0]], order=1)
    law = exact.sequence_law(p, (), max_new_tokens=2)
    assert law.sequences.tolist() == [[1, 0], [2, 0]]
    first = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    rows = np.array([[first, 0.0], [first, math.log(4)]])
    other = exact.sequence_law(q, (), max_new_tokens=2)
    log_p, log_q = law.aligned(other)
    log_ratio = (log_p - log_q)[log_p > -math.inf]
    assert variance(np.array([0.5, 0.5]), log_ratio) == pytest.approx(0.0, abs=1e-20)
    assert variance(np.array([0.5, 0.5]), rows.sum(1)) > 0.4
    assert rows.sum(1).mean() == pytest.approx(log_ratio.mean())


def test_finds_one_component_per_sequence() -> None:
    """The planted bug keeps every marginal: KL of the sequence mixture against the mixture, from posterior laws."""
    parts, weights = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), np.array([0.5, 0.5])
    rng, n, steps = stream(3), 4000, 6
    component = rng.integers(2, size=n)
    tokens = (rng.random((n, steps, 1)) > parts.cumsum(1)[component][:, None]).sum(2).clip(max=2)
    posterior, kls = np.tile(weights, (n, 1)), np.zeros((n, steps))
    q = weights @ parts
    for t in range(steps):
        law = posterior @ parts
        kls[:, t] = (law * np.log(law / q)).sum(1)
        posterior = posterior * parts[:, tokens[:, t]].T
        posterior /= posterior.sum(1, keepdims=True)
    estimate = sequence_kl(kls, max_step_kl=math.log(2))  # q mixes with ½ what the posterior mixes
    clean = sequence_kl(np.zeros((n, steps)), max_step_kl=math.log(2))
    assert estimate.bounded is not None
    assert clean.bounded is not None
    assert estimate.bounded[0] > 0.1 > clean.bounded[1]
    assert clean.tv_upper < 0.1


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_cover() -> None:
    rng = stream(4)
    p, q = table(rng), table(rng)
    mass, kls, _ = walked(p, q)
    truth, most = enumerated_kl(p, q), 1.2 * float(kls.max())
    drawn = rng.choice(mass.size, size=(1000, 300), p=mass / mass.sum())
    estimates = [sequence_kl(kls[rows], max_step_kl=most) for rows in drawn]
    normal = np.mean([e.normal[0] <= truth <= e.normal[1] for e in estimates])
    bounded = np.mean([e.bounded[0] <= truth <= e.bounded[1] for e in estimates if e.bounded])
    assert 0.93 <= normal <= 0.97
    assert bounded >= 0.95
    tv = exact.sequence_law(p, (1,), max_new_tokens=4).tv_distance(exact.sequence_law(q, (1,), max_new_tokens=4))
    assert np.mean([e.tv_upper >= tv for e in estimates]) == 1.0


def test_rare_divergence_fools_the_normal_interval_and_not_the_bounded_one() -> None:
    """One prefix in 500 carries all of the KL: few rows see it."""
    rng, n, most = stream(5), 200, 2.0
    rows = np.where(rng.random((500, n)) < 1 / 500, most, 0.0)
    estimates = [sequence_kl(row[:, None], max_step_kl=most) for row in rows]
    truth = most / 500
    assert np.mean([e.normal[1] >= truth for e in estimates]) < 0.5
    assert np.mean([e.bounded[1] >= truth for e in estimates if e.bounded]) >= 0.95


def test_bounded_interval_scales_with_its_unit() -> None:
    rows = stream(6).beta(1, 5, size=(200, 4))
    small, large = sequence_kl(rows, max_step_kl=1.0), sequence_kl(10 * rows, max_step_kl=10.0)
    assert small.bounded is not None
    assert large.bounded == pytest.approx((10 * small.bounded[0], 10 * small.bounded[1]), rel=1e-9)
    assert small.tv_upper == tv_bound_from_kl(small.bounded[1])
    assert sequence_kl(rows).tv_upper == tv_bound_from_kl(small.normal[1])


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 5), st.booleans(), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=50)
def test_ranges(seed: int, n: int, steps: int, infinite: bool, confidence: float) -> None:
    kls = stream(seed).gamma(0.3, 1.0, size=(n, steps))
    most = None if infinite else float(kls.max())
    if infinite:
        kls[seed % n, seed % steps] = math.inf
    estimate = sequence_kl(kls, max_step_kl=most, confidence=confidence)
    assert estimate.infinite == infinite
    for low, high in filter(None, (estimate.normal, estimate.bounded)):
        assert 0 <= low <= estimate.value <= high
    assert 0 <= estimate.tv_upper <= 1
    assert not any(math.isnan(x) for x in (estimate.value, estimate.stderr, estimate.tv_upper))


def test_an_excluded_token_is_a_flagged_infinity() -> None:
    """Truncation before mixing against after: KL is +inf by enumeration too."""
    rng = stream(7)
    toys = [table(rng, size=4, concentration=0.7) for _ in range(2)]
    mixing = ConstantMixing([0.6, 0.4])
    p, q = Ensemble([Warped(toy, TopK(2)) for toy in toys], mixing), Warped(Ensemble(toys, mixing), TopK(2))
    _, kls, _ = walked(p, q, steps=2)
    assert enumerated_kl(p, q, steps=2) == math.inf
    estimate = sequence_kl(kls)
    assert estimate.infinite
    assert (estimate.value, estimate.normal, estimate.bounded) == (math.inf, (math.inf, math.inf), None)
    assert estimate.tv_upper == 1.0


# --- TV from KL -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(0.05, 5.0))
@settings(deadline=None, max_examples=100)
def test_tv_bound_holds_for_any_two_laws(seed: int, size: int, concentration: float) -> None:
    p, q = stream(seed).dirichlet(np.full(size, concentration), size=2) * (1 - 1e-9) + 1e-9 / size
    assert 0.5 * np.abs(p - q).sum() <= tv_bound_from_kl(float(kl_divergence(np.log(p), np.log(q)))) + 1e-9


def test_tv_bound_is_the_smaller_of_the_two() -> None:
    assert tv_bound_from_kl(0.0) == 0.0
    assert tv_bound_from_kl(1.5) == pytest.approx(math.sqrt(0.75))
    assert tv_bound_from_kl(1.7) == pytest.approx(math.sqrt(1 - math.exp(-1.7)))
    assert tv_bound_from_kl(1e-12) == pytest.approx(math.sqrt(0.5e-12), rel=1e-9)
    # Two coins at .5 ± ε attain Pinsker to first order.
    eps = 1e-3
    kl = (0.5 + eps) * math.log1p(2 * eps) + (0.5 - eps) * math.log1p(-2 * eps)
    assert tv_bound_from_kl(kl) == pytest.approx(eps, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_kl([0.1, 0.2]), r"step_kl has shape \(2,\)"),
        (lambda: sequence_kl([[0.1, 0.2]]), r"step_kl has shape \(1, 2\)"),
        (lambda: sequence_kl(np.zeros((3, 0))), r"step_kl has shape \(3, 0\)"),
        (lambda: sequence_kl([[0.1], [math.nan]]), "step_kl holds NaN or negative"),
        (lambda: sequence_kl([[0.1], [-0.1]]), "not log-ratios of samples"),
        (lambda: sequence_kl([[0.1], [0.2]], max_step_kl=0.15), "above max_step_kl 0.15"),
        (lambda: sequence_kl([[0.1], [math.inf]], max_step_kl=1.0), "step_kl reaches inf"),
        (lambda: sequence_kl([[0.1], [0.2]], max_step_kl=0.0), "max_step_kl is 0.0"),
        (lambda: sequence_kl([[0.1], [0.2]], confidence=95), "confidence is 95"),
        (lambda: tv_bound_from_kl(-0.1), "kl is -0.1"),
        (lambda: tv_bound_from_kl(math.nan), "kl is nan"),
    ],
)
def test_bad_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
