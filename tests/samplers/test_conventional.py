from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MarkovModel, TopK, Warped
from me_stats.samplers import CESampler, MESampler
from tests.strategies import LastTokenMixing, ensembles, horizons, prompts, seeds, table_models, warps

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


@given(st.data())
def test_marginal_sampling_has_the_mixture_law(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    prompt = data.draw(prompts(ensemble.vocabulary.size))
    steps = data.draw(horizons(ensemble.vocabulary.size, budget=2048))
    law = sequence_law(ensemble, prompt, max_new_tokens=steps)
    assert sampler_law(CESampler(ensemble), prompt, max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data())
def test_the_latent_form_has_the_mixture_law(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    prompt = data.draw(prompts(ensemble.vocabulary.size))
    steps = data.draw(horizons(ensemble.vocabulary.size * len(ensemble.components), budget=2048))
    law = sequence_law(ensemble, prompt, max_new_tokens=steps)
    assert sampler_law(CESampler(ensemble, latent=True), prompt, max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data())
def test_any_language_model_can_be_sampled(data: st.DataObject) -> None:
    table = data.draw(table_models())
    model = Warped(table, *data.draw(st.lists(warps, max_size=2)))
    steps = data.draw(horizons(table.vocabulary.size, budget=512))
    law = sequence_law(model, [], max_new_tokens=steps)
    assert sampler_law(CESampler(model), [], max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data())
def test_mix_then_transform_is_sampled_as_it_stands(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    model = Warped(ensemble, data.draw(warps))
    steps = data.draw(horizons(ensemble.vocabulary.size, budget=512))
    law = sequence_law(model, [], max_new_tokens=steps)
    assert sampler_law(CESampler(model), [], max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data(), seeds, st.integers(1, 40))
def test_the_latent_form_writes_what_me_writes(data: st.DataObject, seed: int, steps: int) -> None:
    ensemble = data.draw(ensembles())
    starts = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=3))
    latent, me = CESampler(ensemble, latent=True), MESampler(ensemble)
    for batch_size in (None, 100):
        a = latent.sample(starts, n=5, max_new_tokens=steps, seed=seed, batch_size=batch_size)
        b = me.sample(starts, n=5, max_new_tokens=steps, seed=seed, batch_size=batch_size)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.components, b.components)
        assert a.cost.reads >= b.cost.reads


@given(seeds, st.integers(1, 20))
def test_the_latent_form_follows_a_router_as_me_does(seed: int, steps: int) -> None:
    router = LastTokenMixing(np.random.Generator(np.random.Philox(seed)).dirichlet(np.ones(3), 4))
    ensemble = Ensemble([MarkovModel.random(3, seed=s, eos=(2,)) for s in (0, 1, 2)], router)
    a = CESampler(ensemble, latent=True).sample([[0], [1, 0]], n=5, max_new_tokens=steps, seed=seed)
    b = MESampler(ensemble).sample([[0], [1, 0]], n=5, max_new_tokens=steps, seed=seed)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.components, b.components)


def test_the_latent_form_needs_components() -> None:
    model = MarkovModel.random(3, seed=0)
    ensemble = Ensemble([model], ConstantMixing([1.0]))
    for other in (model, Warped(ensemble, TopK(2))):
        with pytest.raises(TypeError, match="latent=True needs an Ensemble to draw components of"):
            CESampler(other, latent=True)


def test_no_component_is_named_where_none_was_drawn() -> None:
    ensemble = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    for batch_size in (None, 2):
        assert CESampler(ensemble).sample([0], n=3, max_new_tokens=2, batch_size=batch_size).components is None
        latent = CESampler(ensemble, latent=True).sample([0], n=3, max_new_tokens=2, batch_size=batch_size)
        assert latent.components is not None


def test_greedy_is_an_arg_max_whatever_the_seed() -> None:
    model = MarkovModel.random(5, seed=0)
    expected, prefix = [], (2,)
    for _ in range(20):
        prefix = (*prefix, int(model.log_probs([prefix]).argmax()))
        expected.append(prefix[-1])
    for seed in range(3):
        for batch_size in (None, 1):
            trace = CESampler(Warped(model, Greedy())).sample([2], max_new_tokens=20, seed=seed, batch_size=batch_size)
            assert trace.tokens.tolist() == [expected]
