from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.exact import SequenceLaw, sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from tests.strategies import ensembles, horizons, prompts

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


def mixed_after(ensemble: Ensemble, prompt: tuple[int, ...], steps: int) -> SequenceLaw:
    """Σ λ_i Π P_i, by mixing the components' sequence laws."""
    laws = [sequence_law(component, prompt, max_new_tokens=steps) for component in ensemble.components]
    weights = ensemble.mixing.weights.tolist()
    kept = [(law, np.log(weight)) for law, weight in zip(laws, weights, strict=True) if weight > 0]
    return SequenceLaw.collect(
        np.concatenate([law.sequences for law, _ in kept]),
        np.concatenate([law.log_probs + log_weight for law, log_weight in kept]),
    )


@given(st.data())
def test_it_mixes_whole_sequences(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    prompt = data.draw(prompts(ensemble.vocabulary.size))
    steps = data.draw(horizons(ensemble.vocabulary.size, budget=1024))
    law = sampler_law(SequenceMixtureSampler(ensemble), prompt, max_new_tokens=steps)
    assert law.tv_distance(mixed_after(ensemble, prompt, steps)) < 1e-12


@given(st.data())
def test_its_first_token_has_the_ce_law(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    law = sequence_law(ensemble, [], max_new_tokens=1)
    assert sampler_law(SequenceMixtureSampler(ensemble), [], max_new_tokens=1).tv_distance(law) < 1e-12


def coins(*heads: float, weights: list[float]) -> Ensemble:
    return Ensemble([TableModel([[1 - p, p]], order=0) for p in heads], ConstantMixing(weights))


def test_two_coins_by_hand() -> None:
    # λ = (1/4, 3/4) and heads 1/5, 3/5: the mixture is a fair coin, so CE writes each pair with 1/4. One coin
    # per sequence writes 11 and 00 with 1/4·1/25 + 3/4·9/25 = 1/4·16/25 + 3/4·4/25 = 0.28, 01 and 10 with 0.22.
    ensemble = coins(0.2, 0.6, weights=[0.25, 0.75])
    law = sampler_law(SequenceMixtureSampler(ensemble), [], max_new_tokens=2)
    assert law.sequences.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert np.exp(law.log_probs).tolist() == pytest.approx([0.28, 0.22, 0.22, 0.28], abs=1e-12)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        ce = sampler_law(sampler, [], max_new_tokens=2)
        assert np.exp(ce.log_probs).tolist() == pytest.approx([0.25] * 4, abs=1e-12)
        assert law.tv_distance(ce) == pytest.approx(0.06, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_two_sure_components_drift_apart_with_length(steps: int) -> None:
    # CE writes 2^T sequences evenly, one component per sequence writes two of them: TV = 1 − 2^(1−T).
    ensemble = coins(0.0, 1.0, weights=[0.5, 0.5])
    law = sampler_law(SequenceMixtureSampler(ensemble), [], max_new_tokens=steps)
    assert law.sequences.tolist() == [[0] * steps, [1] * steps]
    ce = sequence_law(ensemble, [], max_new_tokens=steps)
    assert law.tv_distance(ce) == pytest.approx(1 - 2.0 ** (1 - steps), abs=1e-12)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 4))
def test_its_weights_are_as_far_apart_as_they_differ(first: float, second: float, steps: int) -> None:
    # TV(P_λ, P_λ') = |λ − λ'| TV(P_1, P_2), of whole sequences here
    parts = [TableModel.random(2, seed=seed, order=1) for seed in (0, 1)]
    a, b = (
        sampler_law(SequenceMixtureSampler(Ensemble(parts, ConstantMixing([1 - w, w]))), [], max_new_tokens=steps)
        for w in (first, second)
    )
    one, two = (sequence_law(part, [], max_new_tokens=steps) for part in parts)
    assert a.tv_distance(b) == pytest.approx(abs(first - second) * one.tv_distance(two), abs=1e-12)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_row_keeps_its_first_component(batch_size: int | None) -> None:
    ensemble = Ensemble(
        [TableModel.random(5, seed=seed, eos=(4,)) for seed in range(3)], ConstantMixing([0.2, 0.3, 0.5])
    )
    trace = SequenceMixtureSampler(ensemble).sample([0], n=40, max_new_tokens=40, seed=3, batch_size=batch_size)
    first = trace.components[:, :1].expand_as(trace.components)
    assert torch.equal(trace.components[trace.mask], first[trace.mask])
    assert len(first[:, 0].unique()) == 3
    # ME's first component and token are the same: the random numbers are shared.
    me = MESampler(ensemble).sample([0], n=40, max_new_tokens=40, seed=3)
    assert torch.equal(me.tokens[:, 0], trace.tokens[:, 0])
    assert torch.equal(me.components[:, 0], trace.components[:, 0])
