"""R-hat and effective draws of arviz-stats against closed forms, our own times, and planted disagreements."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from me_stats.chains import effective_draws, rank_rhat
from me_stats.dependence import autocorrelation_time, autocovariances, geyer_time
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from me_stats.variance import markov_moments

Floats = NDArray[np.float64]


def autoregressive(rng: np.random.Generator, n: int, steps: int, phi: float) -> Floats:
    x = rng.normal(size=(n, steps))
    for t in range(1, steps):
        x[:, t] = phi * x[:, t - 1] + math.sqrt(1 - phi**2) * x[:, t]
    return x


def toy() -> Ensemble:
    parts = [MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]]), MarkovModel([0.5, 0.5], [[0.6, 0.4], [0.1, 0.9]])]
    return Ensemble(parts, ConstantMixing([0.5, 0.5]))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_tokens_agree_with_arviz_on_autoregressions(phi: float) -> None:
    chains = autoregressive(np.random.default_rng(1), 8, 20_000, phi)
    truth = chains.size * (1 - phi) / (1 + phi)
    ours = autocorrelation_time(chains).effective_tokens
    by_row = (chains.shape[1] / geyer_time(autocovariances(chains))).sum()
    assert effective_draws(chains) == pytest.approx(truth, rel=0.1)
    assert ours == pytest.approx(effective_draws(chains), rel=0.05)
    assert by_row == pytest.approx(effective_draws(chains), rel=0.1)
    assert rank_rhat(chains).ess_bulk == pytest.approx(ours, rel=0.1)


def test_effective_tokens_agree_with_arviz_on_a_markov_toy() -> None:
    ensemble, f = toy(), np.array([0.0, 1.0])
    values = f[MESampler(ensemble).sample((), n=4, max_new_tokens=50_000, seed=0).tokens.numpy()]
    limit = markov_moments(ensemble, f, steps=1)
    level = limit.stationary_mean
    truth = values.size * level * (1 - level) / limit.asymptotic_variance
    assert autocorrelation_time(values).effective_tokens == pytest.approx(truth, rel=0.1)
    assert effective_draws(values) == pytest.approx(truth, rel=0.1)
    # Ranks of two values are those values on another scale.
    assert rank_rhat(values).ess_bulk == pytest.approx(effective_draws(values), rel=0.01)


def test_independent_sequences_are_worth_themselves_and_chains_of_one_law_agree() -> None:
    rng = np.random.default_rng(2)
    found = [rank_rhat(rng.standard_cauchy(size=(4, 500))) for _ in range(50)]
    assert max(result.rhat for result in found) < 1.02
    assert np.mean([result.ess_bulk for result in found]) == pytest.approx(2000, rel=0.1)
    assert np.mean([result.ess_tail for result in found]) == pytest.approx(2000, rel=0.1)
    assert (found[0].chains, found[0].draws) == (4, 500)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_a_shift_shows_as_the_docstring_says(shift: float) -> None:
    rng = np.random.default_rng(3)
    found = rank_rhat(rng.normal(size=(4, 20_000)) + shift * np.array([[0], [0], [1], [1]]))
    assert found.rhat == found.location == pytest.approx(1 + shift**2 / 8, abs=0.015)


def test_spread_and_drift_show_where_means_agree() -> None:
    rng = np.random.default_rng(4)
    wide = rank_rhat(rng.normal(size=(4, 2000)) * np.array([[1], [1], [2], [2]]))
    assert wide.spread > 1.05 > 1.01 > wide.location
    drifting = rank_rhat(rng.normal(size=(4, 2000)) + np.linspace(-1, 1, 2000))
    assert drifting.location > 1.1


def test_one_component_per_sequence_is_seen_beside_right_seeds() -> None:
    def chain(kind: type[MESampler] | type[CESampler], seed: int) -> Floats:
        tokens = kind(toy()).sample((), n=1000, max_new_tokens=64, seed=seed).tokens.numpy()
        return np.asarray(tokens.sum(1, dtype=np.float64))

    right = [chain(CESampler, 1), chain(CESampler, 2), chain(MESampler, 3), chain(MESampler, 4)]
    assert rank_rhat(right).rhat < 1.01
    assert rank_rhat([*right[:2], chain(SequenceMixtureSampler, 3), chain(SequenceMixtureSampler, 4)]).rhat > 1.05


def test_two_valued_statistics_are_judged_without_a_warning() -> None:
    fair = np.tile([-1.0, 1.0], (4, 50))
    found = rank_rhat(fair)
    assert found.spread == 1.0
    assert found.location == pytest.approx(1, abs=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rank_rhat(np.repeat([[0.0, 1.0], [0.0, 1.0]], 50, axis=1)).location > 1e6


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        (np.zeros(9), r"chains must be \(C, N\)"),
        (np.eye(4)[:1], "C at least 2"),
        (np.eye(3), "N at least 4"),
        (np.full((2, 9), np.nan), "finite"),
        ([[1.0, 2.0, 3.0, 4.0], [5.0] * 4], "chain 1 is constant at 5"),
        (np.ones((4, 100)), "chain 0 is constant"),
    ],
)
def test_bad_input_names_the_argument(chains: Floats, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_rhat(chains)
    with pytest.raises(ValueError, match=message.replace("C at least 2", "constant|C at least 1|chain")):
        effective_draws(chains[:0] if message == "C at least 2" else chains)
