"""What is kept of each token: ratios by hand, scores against laws, and input that must be refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.evidence import Evidence, collect
from me_stats.families import ALL_FAMILIES, SCORE_FAMILIES, Tilts, TransformBins
from me_stats.models import MarkovModel, Temperature, Warped
from me_stats.models import ensemble as ensemble_module
from me_stats.samplers import CESampler, MESampler
from tests.strategies import ensembles, prompts, seeds

HALF = torch.log(torch.tensor([0.5, 0.5]))


@settings(max_examples=40)
@given(st.data(), seeds)
def test_laws_and_scores_give_the_same_ratios(data: st.DataObject, seed: int) -> None:
    model = data.draw(ensembles())
    start = data.draw(prompts(model.vocabulary.size))
    trace = MESampler(model).sample([start], n=3, max_new_tokens=4, seed=seed)
    starts = [trace.prompts[0]] * 3
    by_scores = collect(model, starts, trace.tokens, families=SCORE_FAMILIES)
    by_laws = collect(model, starts, trace.tokens, families=ALL_FAMILIES, rng=np.random.default_rng(seed))
    by_trace = Evidence.from_trace(trace)
    for other in (by_laws, by_trace):
        np.testing.assert_allclose(by_scores.ratios, other.ratios, rtol=1e-9)
        np.testing.assert_allclose(by_scores.weights, other.weights, atol=1e-12)
        np.testing.assert_array_equal(by_scores.live, other.live)
    np.testing.assert_array_equal(by_scores.live, trace.mask.numpy())
    assert not by_scores.impossible.any()
    np.testing.assert_allclose((by_scores.ratios * by_scores.weights).sum(-1), 1, atol=1e-12)
    assert set(by_laws.readings) == {family.name for family in ALL_FAMILIES if family.needs_laws}
    for readings in by_laws.readings.values():
        assert (readings[~by_laws.live] == 0).all()
        assert np.isfinite(readings).all()


def test_chunks_do_not_change_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkovModel.random(5, seed=0)
    trace = CESampler(model).sample([[0], [1, 2]], n=4, max_new_tokens=9, seed=0)
    starts = [trace.prompts[i] for i in trace.prompt_index.tolist()]
    whole = collect(model, starts, trace.tokens, families=[Tilts()])
    for size in (1, 17, 64):
        monkeypatch.setattr(ensemble_module, "_CHUNK", size)
        part = collect(model, starts, trace.tokens, families=[Tilts()])
        np.testing.assert_array_equal(part.readings["tilts"], whole.readings["tilts"])
        np.testing.assert_array_equal(part.ratios, whole.ratios)


def test_any_other_model_is_one_component() -> None:
    model = Warped(MarkovModel.random(4, seed=0), Temperature(0.5))
    trace = CESampler(model).sample([0], n=3, max_new_tokens=5, seed=0)
    for families in (SCORE_FAMILIES, [Tilts()]):
        evidence = collect(model, [(0,)] * 3, trace.tokens, families=families)
        assert evidence.ratios.shape == (3, 5, 1)
        assert (evidence.ratios == 1).all()


def test_steps_after_the_end_are_neutral_whatever_they_hold() -> None:
    laws = torch.log(torch.full((2, 3, 2, 4), 0.25)).clone()
    weights = HALF.expand(2, 3, 2).clone()
    tokens = torch.tensor([[0, 1, -1], [2, -1, -1]])
    laws[:, 2], weights[:, 2] = math.nan, 5.0
    evidence = Evidence.from_laws(laws, weights, tokens, families=ALL_FAMILIES, rng=np.random.default_rng(0))
    assert evidence.live.tolist() == [[True, True, False], [True, False, False]]
    assert (evidence.ratios == 1).all()
    assert (evidence.weights == 0.5).all()


def test_impossible_tokens_are_marked() -> None:
    # The mixture cannot write token 1 where its only writer has weight zero.
    laws = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64).expand(2, 2, 2)
    one_hot = torch.tensor([0.0, -math.inf])
    evidence = Evidence.from_laws(
        laws, one_hot, torch.tensor([0, 1]), families=ALL_FAMILIES, rng=np.random.default_rng(0)
    )
    assert evidence.impossible.tolist() == [False, True]
    assert evidence.live.tolist() == [True, False]
    assert all(np.isfinite(readings).all() for readings in evidence.readings.values())
    assert evidence.ratios.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("logs", [[-800.0, -1.0], [-1.0, -800.0], [-5000.0, -5001.0], [-math.inf, -700.0]])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [1 - 1e-300, 1e-300]])
def test_extreme_probabilities_stay_finite(logs: list[float], weights: list[float]) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    evidence = Evidence.from_scores(torch.tensor([logs], dtype=torch.float64), w.log(), torch.tensor([0]))
    assert np.isfinite(evidence.ratios).all()
    if evidence.live[0]:
        assert evidence.ratios[0] @ evidence.weights[0] == pytest.approx(1)
    assert bool(evidence.impossible[0]) == (weights == [1.0, 0.0] and logs[0] == -math.inf)


def test_a_component_of_no_weight_cannot_overflow() -> None:
    logs, weights = [-700.0, -1.0, -math.inf], torch.tensor([1e-300, 0.0, 1.0], dtype=torch.float64)
    evidence = Evidence.from_scores(torch.tensor([logs], dtype=torch.float64), weights.log(), torch.tensor([0]))
    assert np.isfinite(evidence.ratios).all()
    assert evidence.live.all()


def test_bad_input() -> None:
    laws, tokens = torch.log(torch.full((3, 2, 4), 0.25)), torch.zeros(3, dtype=torch.int64)
    for args, message in (
        ((laws[:2], HALF, tokens), "component_log_probs"),
        ((laws, torch.zeros(1), tokens), "log_weights must end in K=2"),
        ((laws + 0.1, HALF, tokens), "normalised"),
        ((laws * math.nan, HALF, tokens), "normalised"),
        ((laws, HALF * 2, tokens), "log_weights must be normalised"),
        ((laws, HALF * math.nan, tokens), "log_weights must be normalised"),
        ((laws, HALF, tokens + 4), "below V=4"),
        ((laws, HALF, tokens.float()), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            Evidence.from_laws(*args, families=[Tilts()])
    for args, message in (
        ((laws[:2, :, 0], HALF, tokens), "component_log_probs"),
        ((laws[..., 0] + 3, HALF, tokens), "at most 0"),
        ((laws[..., 0] * math.nan, HALF, tokens), "without NaN"),
        ((laws[..., 0], HALF, tokens.float()), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            Evidence.from_scores(*args)
    with pytest.raises(ValueError, match="rng must be a numpy Generator"):
        Evidence.from_laws(laws, HALF, tokens, families=[TransformBins()])
