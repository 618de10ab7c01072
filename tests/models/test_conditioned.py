from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats import exact
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, MarkovModel, TableModel
from me_stats.samplers import CESampler, MESampler
from tests.strategies import OutsideModel, prompts, table_models


@given(st.data())
def test_the_context_is_read_before_every_prefix(data: st.DataObject) -> None:
    model = data.draw(table_models())
    context = data.draw(prompts(model.vocabulary.size))
    prefixes = data.draw(st.lists(prompts(model.vocabulary.size), min_size=1, max_size=4))
    mine = Conditioned(model, context)
    assert torch.equal(mine.log_probs(prefixes), model.log_probs([(*context, *prefix) for prefix in prefixes]))
    assert mine.vocabulary == model.vocabulary
    law = exact.sequence_law(mine, prefixes[0], max_new_tokens=2)
    assert law.tv_distance(exact.sequence_law(model, (*context, *prefixes[0]), max_new_tokens=2)) == 0


def test_contexts_nest_outside_in() -> None:
    model = TableModel.random(3, seed=0, order=3)
    nested = Conditioned(Conditioned(model, [0]), [1])
    assert torch.equal(nested.log_probs([(2,)]), model.log_probs([(0, 1, 2)]))


def test_contexts_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="token id 3, outside the vocabulary"):
        Conditioned(MarkovModel.random(3, seed=0), [3])
    with pytest.raises(TypeError, match="no tokenizer"):
        Conditioned(MarkovModel.random(3, seed=0), "a system prompt")


@pytest.mark.parametrize("wrap", [lambda model: model, OutsideModel])
def test_one_model_under_two_contexts_is_an_ensemble(wrap: object) -> None:
    model = wrap(TableModel.random(3, seed=0, order=3))  # type: ignore[operator]
    ensemble = Ensemble([Conditioned(model, [0]), Conditioned(model, [1, 2])], ConstantMixing([0.3, 0.7]))
    law = exact.sequence_law(ensemble, [2], max_new_tokens=3)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, [2], max_new_tokens=3).tv_distance(law) < 1e-12
    # The two contexts matter: neither alone is the ensemble.
    for component in ensemble.components:
        assert exact.sequence_law(component, [2], max_new_tokens=3).tv_distance(law) > 0.01


def test_its_laws_are_tensors_whatever_the_model_returns() -> None:
    laws = Conditioned(OutsideModel(MarkovModel.random(3, seed=0)), [0]).log_probs([(1,)])
    assert isinstance(laws, torch.Tensor)
