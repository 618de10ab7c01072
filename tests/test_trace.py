from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, TopK, Warped
from me_stats.samplers import CESampler, MESampler
from me_stats.trace import Score, score
from me_stats.vocabulary import Vocabulary
from tests.strategies import LastTokenMixing, ensembles, prompts, seeds

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


@given(st.data(), seeds, st.integers(1, 4), st.integers(1, 6))
def test_scores_are_those_of_a_loop_over_prefixes(data: st.DataObject, seed: int, n: int, steps: int) -> None:
    ensemble = data.draw(ensembles())
    starts = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=3))
    trace = MESampler(ensemble).sample(starts, n=n, max_new_tokens=steps, seed=seed)
    weights = ensemble.mixing.weights.tolist()
    for row, length in enumerate(trace.lengths.tolist()):
        start = trace.prompts[int(trace.prompt_index[row])]
        assert start == starts[row // n]
        written = trace.tokens[row, :length].tolist()
        for step, token in enumerate(written):
            prefix = (*start, *written[:step])
            own = [float(component.log_probs([prefix])[0, token]) for component in ensemble.components]
            assert trace.component_log_probs[row, step].tolist() == pytest.approx(own, abs=1e-12)
            joint = np.array([w * np.exp(p) for w, p in zip(weights, own, strict=True)])
            assert float(trace.log_probs[row, step]) == pytest.approx(np.log(joint.sum()), abs=1e-12)
            shares = trace.score.responsibilities[row, step].numpy()
            np.testing.assert_allclose(shares, joint / joint.sum(), rtol=0, atol=1e-12)
        assert (trace.tokens[row, length:] == -1).all()
        assert (trace.components[row, length:] == -1).all()
        assert (trace.log_probs[row, length:] == 0).all()
        assert (trace.component_log_probs[row, length:] == 0).all()
    assert torch.equal(trace.mask, torch.arange(trace.tokens.shape[1]) < trace.lengths[:, None])
    assert trace.tokens.shape[1] == int(trace.lengths.max())
    # The component that wrote a token can write it.
    wrote = trace.component_log_probs.gather(2, trace.components.clamp(min=0)[..., None])[..., 0]
    assert bool((wrote[trace.mask] > -torch.inf).all())
    ones = torch.ones(trace.tokens.shape, dtype=torch.float64)
    torch.testing.assert_close(trace.score.responsibilities.sum(-1), ones)


def test_one_example_by_hand() -> None:
    a = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    b = MarkovModel([0.1, 0.9], [[0.4, 0.6], [0.7, 0.3]])
    scored = score(Ensemble([a, b], ConstantMixing([0.25, 0.75])), [0], [[1, 1], [0]])
    expected = torch.tensor([[[0.1, 0.6], [0.8, 0.3]], [[0.9, 0.4], [1.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(scored.component_log_probs.exp(), expected)
    # 0.25·0.1 + 0.75·0.6, 0.25·0.8 + 0.75·0.3, 0.25·0.9 + 0.75·0.4; log 1 after the end
    mixed = torch.tensor([[0.475, 0.425], [0.525, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(scored.log_probs.exp(), mixed)
    shares = torch.tensor([[[0.025, 0.45], [0.2, 0.225]], [[0.225, 0.3], [0.5, 0.5]]], dtype=torch.float64)
    torch.testing.assert_close(scored.responsibilities, shares / shares.sum(-1, keepdim=True))
    assert scored.log_weights[1, 1].tolist() == [0.0, 0.0]


def test_a_router_weighs_by_prefix() -> None:
    router = LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    ensemble = Ensemble([TableModel([[0.5, 0.5]], order=0), TableModel([[0.1, 0.9]], order=0)], router)
    scored = score(ensemble, [()], [[0, 1]])
    expected = [0.5 * 0.5 + 0.5 * 0.1, 0.9 * 0.5 + 0.1 * 0.9]
    assert scored.log_probs.exp()[0].tolist() == pytest.approx(expected)


def test_any_other_model_is_one_component_of_weight_one() -> None:
    model = Warped(MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]]), TopK(1))
    scored = score(model, [0], [[0, 1]])
    assert scored.component_log_probs.shape == (1, 2, 1)
    assert scored.log_probs.tolist() == [[0.0, -np.inf]]
    assert scored.responsibilities.flatten().tolist() == [1.0, 1.0]


def test_a_token_that_no_component_writes_leaves_the_weights() -> None:
    sure = TableModel([[1.0, 0.0]], order=0)
    scored = score(Ensemble([sure, sure], ConstantMixing([0.25, 0.75])), [()], [[1, 0]])
    assert scored.log_probs[0].tolist() == [-np.inf, pytest.approx(0, abs=1e-12)]
    assert scored.responsibilities[0].flatten().tolist() == pytest.approx([0.25, 0.75] * 2)


def test_ragged_rows_and_padded_tensors_are_the_same() -> None:
    model = MarkovModel.random(3, seed=0)
    ragged: list[list[int]] = [[0, 1, 2], [], [2]]
    padded = torch.tensor([[0, 1, 2], [-1, -1, -1], [2, -1, -1]])
    assert torch.equal(score(model, [1], ragged).log_probs, score(model, [1], padded).log_probs)
    each = score(model, [[1], [1], [1]], [np.array(row, dtype=np.int64) for row in ragged])
    assert torch.equal(each.log_probs, score(model, [1], ragged).log_probs)
    assert score(model, [1], []).log_probs.shape == (0, 0)


@pytest.mark.parametrize(
    ("prompts_", "tokens", "message"),
    [
        ([[0], [1]], [[0], [1], [2]], "prompts has 2 entries for 3 rows of tokens; give one each"),
        ([0], [[3]], r"tokens has an id outside the vocabulary 0\.\.2"),
        ([0], [[-2]], r"tokens has an id outside the vocabulary 0\.\.2"),
        ([0], [[0, -1, 1]], "tokens has an id after a -1"),
        ([3], [[0]], "prompt has token id 3, outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_refused(prompts_: list[int], tokens: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(MarkovModel.random(3, seed=0), prompts_, tokens)


def test_stop_reasons_and_texts() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return ["ab.".index(letter) for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join("ab."[token] for token in ids)

    # a → b → . and . ends; from b it is one token to the end.
    model = MarkovModel([1, 0, 0], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], eos=(2,))
    model.vocabulary = Vocabulary(3, eos=(2,), tokenizer=Letters())
    for batch_size in (None, 2):
        trace = CESampler(model).sample(["a", "b", "."], max_new_tokens=2, batch_size=batch_size)
        assert trace.texts() == ["b.", ".", "ab"]
        assert trace.stop_reason == ["eos", "eos", "length"]
        assert trace.lengths.tolist() == [2, 1, 2]
        assert trace.tokens.tolist() == [[1, 2], [2, -1], [0, 1]]
        assert trace.components is None


def test_all_rows_may_end_early() -> None:
    ending = TableModel([[0.0, 1.0]], order=0, eos=(1,))
    for batch_size in (None, 8):
        trace = CESampler(ending).sample([0], n=3, max_new_tokens=9, batch_size=batch_size)
        assert trace.tokens.tolist() == [[1], [1], [1]]
        assert trace.stop_reason == ["eos"] * 3
    assert CESampler(TableModel([[1.0, 0.0]], order=0)).sample([0], max_new_tokens=1).stop_reason == ["length"]


def test_a_trace_says_where_it_came_from() -> None:
    ensemble = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    trace = MESampler(ensemble).sample([[0], [1, 2]], n=2, max_new_tokens=3, seed=9, rows=[5, 1, 8, 2])
    assert (trace.sampler, trace.seed, trace.prompts) == ("MESampler", 9, ((0,), (1, 2)))
    assert trace.rows.tolist() == [5, 1, 8, 2]
    assert trace.prompt_index.tolist() == [0, 0, 1, 1]
    assert trace.model is ensemble
    for tensor in (trace.tokens, trace.lengths, trace.components, trace.rows, trace.prompt_index):
        assert tensor.dtype == torch.int64
        assert tensor.is_cpu


def test_a_score_is_made_once() -> None:
    trace = CESampler(MarkovModel.random(3, seed=0)).sample([0], max_new_tokens=3)
    assert isinstance(trace.score, Score)
    assert trace.score is trace.score
