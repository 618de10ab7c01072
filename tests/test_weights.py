"""λ̂ and its intervals: coverage on simulated text, at and away from the boundary, and bugs that coverage must show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from me_stats import weights as module
from me_stats.likelihood import inverse_on_simplex
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import MESampler
from me_stats.weights import fit_from_components, fit_weights, held_out_nll, profile_interval, weights_agree
from tests.mixture_data import SEPARATE, draw_tokens, logs, random_logs
from tests.strategies import seeds


def coverage(laws: np.ndarray, weights: list[float], *, n: int, runs: int, seed: int, **options: object) -> np.ndarray:
    """Share of simulated texts whose interval holds the true weight, for each component."""
    held = np.zeros(len(weights))
    for tokens in draw_tokens(laws, weights, (runs, n), seed):
        fit = fit_weights(logs(laws[:, tokens].T), **options)  # type: ignore[arg-type]
        low, high = fit.intervals.T
        held += (low - 1e-12 <= weights) & (np.array(weights) <= high + 1e-12)
    return held / runs


@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.03, 0.97]])
def test_intervals_of_two_components_cover(weights: list[float]) -> None:
    assert 0.93 <= coverage(SEPARATE[:2], weights, n=250, runs=500, seed=1)[0] <= 0.97


@pytest.mark.parametrize("weights", [[0.0, 1.0], [1.0, 0.0]])
def test_intervals_at_the_boundary_are_conservative(weights: list[float]) -> None:
    # Half of the time λ̂ is at the boundary itself: the level is 97.5%, not 95%.
    assert 0.955 <= coverage(SEPARATE[:2], weights, n=250, runs=500, seed=2)[0] <= 0.99


def test_intervals_of_three_components_cover() -> None:
    covered = coverage(SEPARATE, [0.3, 0.3, 0.4], n=600, runs=500, seed=3)
    assert ((covered >= 0.93) & (covered <= 0.97)).all()


def test_profiles_of_three_components_cover_near_the_boundary() -> None:
    covered = coverage(SEPARATE, [0.0, 0.05, 0.95], n=150, runs=150, seed=4)
    assert (covered >= 0.92).all()


@pytest.mark.parametrize(
    "bug",
    [
        lambda h: np.linalg.inv(h),  # forgets that weights sum to 1
        lambda h: -inverse_on_simplex(h),  # the Hessian in place of the information
        lambda h: inverse_on_simplex(h @ h),  # the inverse twice
    ],
    ids=["no constraint", "sign", "squared"],
)
def test_wrong_information_fails_the_coverage(bug: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "inverse_on_simplex", bug)
    sharp = 0.02 + 0.94 * np.eye(3)
    covered = coverage(sharp, [0.2, 0.2, 0.6], n=600, runs=500, seed=3)
    assert ((covered < 0.93) | (covered > 0.97)).any()


def test_sharp_laws_cover_without_the_bugs() -> None:
    covered = coverage(0.02 + 0.94 * np.eye(3), [0.2, 0.2, 0.6], n=600, runs=500, seed=3)
    assert ((covered >= 0.93) & (covered <= 0.97)).all()


@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.3, 0.3, 0.4]])
def test_groups_allow_for_tokens_that_go_together(weights: list[float]) -> None:
    laws, documents, copies, runs = SEPARATE[: len(weights)], 200, 4, 300
    groups = np.repeat(np.arange(documents), copies)
    robust = naive = 0
    for tokens in draw_tokens(laws, weights, (runs, documents), 5):
        log_probs = logs(laws[:, np.repeat(tokens, copies)].T)  # each document says one token over and over
        with_groups, without = fit_weights(log_probs, groups=groups), fit_weights(log_probs)
        robust += with_groups.intervals[0, 0] <= weights[0] <= with_groups.intervals[0, 1]
        naive += without.intervals[0, 0] <= weights[0] <= without.intervals[0, 1]
    assert 0.92 <= robust / runs <= 0.98
    assert naive / runs < 0.8


def test_the_ends_of_a_profile_have_the_stated_likelihood() -> None:
    log_probs = random_logs(300, 2, 4)
    fit = fit_weights(log_probs)
    for end in fit.intervals[0]:
        fall = fit.log_likelihood + 300 * held_out_nll(log_probs, [end, 1 - end])
        assert 2 * fall == pytest.approx(stats.chi2.ppf(0.95, 1), abs=1e-4)
    assert profile_interval(log_probs, 0) == pytest.approx(fit.intervals[0])
    np.testing.assert_allclose(fit.intervals[1], 1 - fit.intervals[0][::-1], atol=1e-8)


@given(seed=seeds, k=st.integers(1, 5), n=st.integers(1, 40), zeros=st.sampled_from([0.0, 0.4]))
@settings(max_examples=30)
def test_results_make_sense_for_any_text(seed: int, k: int, n: int, zeros: float) -> None:
    log_probs = random_logs(n, k, seed, zeros=zeros, size=6)
    log_probs[np.isinf(log_probs).all(1)] = -1.0
    fit = fit_weights(log_probs)
    assert ConstantMixing(fit.weights).n_components == k
    assert (fit.intervals[:, 0] <= fit.weights + 1e-9).all()
    assert (fit.weights <= fit.intervals[:, 1] + 1e-9).all()
    assert (fit.intervals >= 0).all()
    assert (fit.intervals <= 1).all()
    assert not np.isnan(fit.stderr).any()
    assert fit.nll == pytest.approx(held_out_nll(log_probs, fit.weights), abs=1e-12)
    assert (fit.score_norm <= 1e-5) or not fit.identified
    for rival in (*np.eye(k), np.full(k, 1 / k)):
        assert fit.nll <= held_out_nll(log_probs, rival) + 1e-9


def test_methods_agree_and_bytes_count() -> None:
    log_probs = random_logs(2000, 4, 7)
    fast, slow = fit_weights(log_probs, n_bytes=5000), fit_weights(log_probs, method="em")
    np.testing.assert_allclose(fast.weights, slow.weights, atol=1e-8)
    assert fast.iterations < slow.iterations
    assert fast.bits_per_byte == pytest.approx(fast.nll * 2000 / 5000 / np.log(2))
    assert slow.bits_per_byte is None


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_equal_components_are_not_identified(noise: float) -> None:
    log_probs = np.repeat(random_logs(2000, 1, 0), 2, axis=1) - 1
    log_probs += noise * np.random.default_rng(0).standard_normal(log_probs.shape)
    fit = fit_weights(log_probs)
    assert not fit.identified
    assert "same probabilities" in fit.reason
    assert (fit.intervals[0] == [0, 1]).all()
    assert np.isinf(fit.stderr).all()


def test_a_twin_leaves_the_third_weight_identified() -> None:
    two = random_logs(2000, 2, 1)
    fit, alone = fit_weights(two[:, [0, 0, 1]]), fit_weights(two)
    assert not fit.identified
    assert fit.interval_method == "profile"
    np.testing.assert_allclose(fit.intervals[2], alone.intervals[1], atol=1e-6)
    assert fit.intervals[0][0] == 0
    assert np.isinf(fit.stderr).tolist() == [True, True, False]


def test_too_short_a_text_is_not_identified() -> None:
    fit = fit_weights(logs(SEPARATE[:2, [0, 1]].T))
    assert not fit.identified
    assert fit.reason.startswith("2 tokens allow weights of component ")


def test_logged_components_have_the_exact_interval() -> None:
    fit = fit_from_components(np.array([[0, 1, 1], [2, 1, -1]]), 4)
    assert fit.weights.tolist() == [0.2, 0.6, 0.2, 0.0]
    exact = stats.binomtest(3, 5).proportion_ci(0.95, "exact")
    assert fit.intervals[1] == pytest.approx([exact.low, exact.high])
    assert fit.intervals[3] == pytest.approx([0, stats.binomtest(0, 5).proportion_ci(0.95, "exact").high])


def ensemble_text(logged: Callable, *, runs: int, weights: list[float], n: int = 400) -> np.ndarray:
    """p-values of the agreement test on an ancestral sampler whose log is changed by `logged`."""
    rng, out = np.random.default_rng(6), []
    for _ in range(runs):
        drawn = rng.choice(3, n, p=weights)
        tokens = (rng.random((n, 1)) < SEPARATE.cumsum(1)[drawn]).argmax(1)
        out.append(weights_agree(logs(SEPARATE[:, tokens].T), logged(drawn, rng)).pvalue)
    return np.array(out)


@pytest.mark.parametrize("weights", [[0.3, 0.3, 0.4], [0.02, 0.0, 0.98]])
def test_tokens_and_components_agree_at_the_stated_level(weights: list[float]) -> None:
    pvalues = ensemble_text(lambda drawn, rng: drawn, runs=500, weights=weights)
    assert 0.02 <= (pvalues < 0.05).mean() <= 0.08


@pytest.mark.parametrize(
    "logged",
    [
        lambda drawn, rng: (drawn + 1) % 3,
        lambda drawn, rng: np.where(rng.random(len(drawn)) < 0.4, 2, drawn),
        lambda drawn, rng: rng.choice(3, len(drawn), p=[0.2, 0.3, 0.5]),
    ],
    ids=["another order", "some overwritten", "other weights"],
)
def test_a_wrong_log_of_components_is_found(logged: Callable) -> None:
    assert (ensemble_text(logged, runs=50, weights=[0.6, 0.3, 0.1]) < 1e-3).mean() > 0.9


def test_a_token_that_its_component_cannot_write_is_a_bug() -> None:
    assert weights_agree(logs([[1.0, 0.5], [0.5, 0.0]]), [0, 1]).pvalue == 0.0


def test_the_weights_of_a_sampler_are_found_in_its_trace() -> None:
    parts = [TableModel.random(12, order=1, seed=i, concentration=0.3) for i in range(2)]
    trace = MESampler(Ensemble(parts, ConstantMixing([0.35, 0.65]))).sample([0], n=400, max_new_tokens=10, seed=0)
    log_probs = trace.component_log_probs.reshape(-1, 2).numpy()
    components = trace.components.numpy().ravel()
    from_tokens, from_draws = fit_weights(log_probs), fit_from_components(components, 2)
    for fit in (from_tokens, from_draws):
        assert fit.intervals[0, 0] < 0.35 < fit.intervals[0, 1]
    assert from_draws.stderr[0] < from_tokens.stderr[0]
    assert weights_agree(log_probs, components).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fit_weights(x, method="sgd"), "'newton' or 'em'"),
        (lambda x: fit_weights(x, confidence=1.0), "confidence"),
        (lambda x: fit_weights(x, groups=[0]), "one entry for each of 5 tokens"),
        (lambda x: fit_weights(x, groups=[0, 0, 0, 1, 1]), "2 groups for 2 components"),
        (lambda x: profile_interval(x, 2), "component must lie in 0..1"),
        (lambda x: held_out_nll(x, [0.5, 0.6]), "sum to 1"),
        (lambda x: held_out_nll(x, [1.0]), "one entry for each of 2"),
        (lambda x: fit_from_components([2], 2), "0..1"),
        (lambda x: fit_from_components([-1, -1], 2), "at least one"),
        (lambda x: weights_agree(x, [0, 1]), "one entry for each of 5"),
        (lambda x: weights_agree(x, [0, 1, 1, 0, -1]), "padding"),
    ],
)
def test_bad_arguments_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random_logs(5, 2, 0))
