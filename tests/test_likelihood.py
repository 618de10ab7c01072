"""The likelihood of weights and its two solvers: against formulas, other optimisers and each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.optimize import minimize

from me_stats import likelihood as module
from me_stats.likelihood import Maximum, MixtureLikelihood, em, inverse_on_simplex, newton, simplex_basis
from tests.mixture_data import logs, random_logs
from tests.strategies import seeds


def test_derivatives_are_those_of_the_value() -> None:
    log_probs = random_logs(200, 3, 0)
    model = MixtureLikelihood(log_probs)
    at = np.array([0.2, 0.5, 0.3])
    value, u, h = model.derivatives(at)
    direct = np.log(np.exp(log_probs) @ at).mean()
    assert value == pytest.approx(direct, abs=1e-13)
    assert model.value(at) == pytest.approx(direct, abs=1e-13)
    step = 1e-5
    for i, e in enumerate(np.eye(3) * step):
        up, down = model.derivatives(at + e), model.derivatives(at - e)
        assert (up[0] - down[0]) / (2 * step) == pytest.approx(u[i], abs=1e-8)
        np.testing.assert_allclose(-(up[1] - down[1]) / (2 * step), h[i], atol=1e-6)
    np.testing.assert_allclose(h @ at, u, atol=1e-12)  # what the active-set step relies on


@pytest.mark.parametrize("solver", [newton, em])
def test_disjoint_supports_have_a_closed_form(solver: Callable[..., Maximum]) -> None:
    counts = [7, 2, 11]
    one_hot = logs(np.repeat(np.eye(3), counts, axis=0)) - 3.0
    found = solver(MixtureLikelihood(one_hot))
    np.testing.assert_allclose(found.weights, np.array(counts) / 20, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_newton_finds_what_slsqp_finds(seed: int) -> None:
    k = 2 + seed
    model = MixtureLikelihood(random_logs(500, k, seed))
    oracle = minimize(
        lambda w: -model.value(np.maximum(w, 1e-300)),
        np.full(k, 1 / k),
        jac=lambda w: -model.derivatives(np.maximum(w, 1e-300))[1],
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    found = newton(model)
    assert found.value >= -oracle.fun - 1e-12
    np.testing.assert_allclose(found.weights, oracle.x, atol=1e-5)
    assert found.kkt_gap < 1e-12


def test_newton_finds_what_a_grid_finds() -> None:
    model = MixtureLikelihood(random_logs(100, 2, 5))
    grid = np.linspace(0, 1, 10_001)
    values = [model.value(np.array([w, 1 - w])) for w in grid]
    found = newton(model)
    assert found.weights[0] == pytest.approx(grid[int(np.argmax(values))], abs=1e-4)
    assert found.value >= max(values)


@given(seed=seeds, k=st.integers(1, 5), n=st.integers(1, 60), zeros=st.sampled_from([0.0, 0.5]), twin=st.booleans())
@example(seed=1, k=3, n=40, zeros=0.0, twin=True)
@example(seed=1, k=5, n=1, zeros=0.5, twin=False)
def test_em_and_newton_agree(seed: int, k: int, n: int, zeros: float, twin: bool) -> None:
    log_probs = random_logs(n, k, seed, zeros=zeros, size=8)
    assume(np.isfinite(log_probs.max(1)).all())
    if twin and k > 1:
        log_probs[:, 1] = log_probs[:, 0]
        assume(np.isfinite(log_probs.max(1)).all())
    model = MixtureLikelihood(log_probs)
    fast = newton(model)
    assert fast.weights.sum() == pytest.approx(1, abs=1e-12)
    assert (fast.weights >= 0).all()
    # The certificate alone proves the maximum, whatever EM says.
    assert fast.kkt_gap <= 1e-9
    try:
        slow = em(model, max_iterations=4000)
    except ValueError:
        return  # sublinear: a weight that goes to a boundary where the gradient vanishes
    assert abs(fast.value - slow.value) <= 1e-10
    if module.least_information(model.derivatives(fast.weights)[2]) > 1e-2 and slow.kkt_gap < 1e-12:
        np.testing.assert_allclose(fast.weights, slow.weights, atol=1e-8)


@given(seed=seeds, k=st.integers(2, 5), scale=st.sampled_from([5.0, 50.0, 300.0]))
def test_newton_reaches_the_maximum_for_laws_of_any_sharpness(seed: int, k: int, scale: float) -> None:
    found = newton(MixtureLikelihood(random_logs(60, k, seed) * scale))
    assert found.kkt_gap <= 1e-9


def test_em_says_when_it_has_not_converged() -> None:
    with pytest.raises(ValueError, match="use method='newton'"):
        em(MixtureLikelihood(random_logs(50, 2, 0)), max_iterations=2)


@given(seed=seeds, k=st.integers(2, 4))
def test_the_certificate_bounds_the_distance_to_the_maximum(seed: int, k: int) -> None:
    model = MixtureLikelihood(random_logs(40, k, seed))
    at = np.random.default_rng(seed).dirichlet(np.ones(k))
    value, u, _ = model.derivatives(at)
    assert newton(model).value - value <= math.log(u.max()) + 1e-12


def test_no_underflow_and_no_cancellation() -> None:
    log_probs = random_logs(300, 3, 2)
    far = MixtureLikelihood(log_probs - 2000.0)
    near = MixtureLikelihood(log_probs)
    np.testing.assert_allclose(newton(far).weights, newton(near).weights, atol=1e-9)
    assert newton(far).value == pytest.approx(newton(near).value - 2000, abs=1e-9)


def test_blocks_of_a_memory_map_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = random_logs(1000, 3, 3).astype(np.float32)
    np.save(tmp_path / "scores.npy", log_probs)
    monkeypatch.setattr(module, "BLOCK", 128)
    memory = newton(MixtureLikelihood(log_probs))
    monkeypatch.setattr(module, "_CACHED", 0)
    disk = newton(MixtureLikelihood(np.load(tmp_path / "scores.npy", mmap_mode="r")))
    assert disk.weights.tobytes() == memory.weights.tobytes()
    assert (disk.value, disk.iterations) == (memory.value, memory.iterations)


@given(seed=seeds, k=st.integers(2, 4), weight=st.floats(0, 1))
def test_pinning_a_weight_is_a_smaller_mixture(seed: int, k: int, weight: float) -> None:
    model = MixtureLikelihood(random_logs(20, k, seed))
    shares = np.random.default_rng(seed).dirichlet(np.ones(k - 1))
    whole = np.insert((1 - weight) * shares, 1, weight)
    assert model.pinned(1, weight).value(shares) == pytest.approx(model.value(whole), abs=1e-9)


def test_the_inverse_respects_the_constraint() -> None:
    h = MixtureLikelihood(random_logs(200, 4, 1)).derivatives(np.full(4, 0.25))[2]
    inverse = inverse_on_simplex(h)
    np.testing.assert_allclose(inverse.sum(0), 0, atol=1e-12)
    z = simplex_basis(4)
    np.testing.assert_allclose(z.T @ inverse @ h @ z, np.eye(3), atol=1e-8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.1, 0.2], "must be \\(n, K\\)"),
        (np.zeros((0, 2)), "at least one token"),
        (np.zeros((2, 2), dtype=int), "int64"),
        ([[-1.0, math.nan]], "NaN at token 0"),
        ([[-1.0, -2.0], [-1.0, 3.0]], "not logits"),
        ([[-1.0, -2.0], [-math.inf, -math.inf]], "no component can write token 1 "),
    ],
)
def test_bad_scores_are_refused(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureLikelihood(bad)  # type: ignore[arg-type]
