"""Row statistics against slow definitions of the same things, written as one would say them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats import row_statistics
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, TransformersModel
from me_stats.presets import SIBLINGS
from me_stats.row_statistics import block_means, first_end, scored_tokens, token_features, token_statistics
from me_stats.trace import score
from me_stats.vocabulary import Vocabulary


@st.composite
def grids(draw: st.DrawFn, vocabulary: int = 3) -> tuple[list[list[int]], int]:
    """Tokens (N, T) of a small vocabulary, which repeats itself, and a number of blocks."""
    blocks, size, rows = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    token = st.integers(0, vocabulary - 1)
    row = st.lists(token, min_size=blocks * size, max_size=blocks * size)
    return draw(st.lists(row, min_size=rows, max_size=rows)), blocks


def cut(values: list[Any], blocks: int) -> list[list[Any]]:
    size = len(values) // blocks
    return [values[i * size : (i + 1) * size] for i in range(blocks)]


def slow_repetition(row: list[int], blocks: int) -> list[float]:
    runs = [tuple(row[t - 3 : t + 1]) if t >= 3 else None for t in range(len(row))]
    again = [run is not None and run in runs[:t] for t, run in enumerate(runs)]
    return [sum(block) / len(block) for block in cut(again, blocks)]


def slow_distinct(row: list[int], blocks: int) -> list[float]:
    out = []
    for block in cut(row, blocks):
        pairs = list(pairwise(block))
        out.append(len(set(pairs)) / len(pairs) if pairs else 1.0)
    return out


def agrees(tokens: list[list[int]], blocks: int) -> bool:
    feature = np.array([0.25, -1.0, 3.0])
    found = token_statistics(tokens, {"feature": feature}, blocks=blocks)
    assert set(found) == {"repetition", "distinct", "feature"}
    assert all(values.shape == (len(tokens), blocks) and values.dtype == np.float64 for values in found.values())
    expected = {
        "repetition": [slow_repetition(row, blocks) for row in tokens],
        "distinct": [slow_distinct(row, blocks) for row in tokens],
        "feature": [[sum(feature[token] for token in cell) / len(cell) for cell in cut(row, blocks)] for row in tokens],
    }
    return all(np.allclose(found[name], expected[name], rtol=0, atol=1e-12) for name in found)


@given(grids())
def test_statistics_of_tokens_are_what_they_say(given_grid: tuple[list[list[int]], int]) -> None:
    assert agrees(*given_grid)


REPEATING = ([[0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 0], [2] * 12, [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]], 3)


def shorter_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row_statistics, "REPEATED", 3)


def seen_anywhere(patch: pytest.MonkeyPatch) -> None:
    """A run counts that stands in another row, too."""
    honest = row_statistics._seen_before
    patch.setattr(row_statistics, "_seen_before", lambda keys: honest(keys.reshape(1, -1)).reshape(keys.shape))


def first_ones_too(patch: pytest.MonkeyPatch) -> None:
    """Every copy of a run counts, the first one included."""

    def copies(keys: np.ndarray) -> np.ndarray:
        return np.array([[(row == key).sum() > 1 for key in row] for row in keys])

    patch.setattr(row_statistics, "_seen_before", copies)


def orderless_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row_statistics, "_MIXER", np.uint64(1))


def shifted_blocks(patch: pytest.MonkeyPatch) -> None:
    honest = row_statistics.block_means
    patch.setattr(row_statistics, "block_means", lambda values, blocks: honest(np.roll(values, 1, axis=1), blocks))


@pytest.mark.parametrize("plant", [shorter_runs, seen_anywhere, first_ones_too, orderless_runs, shifted_blocks])
def test_planted_bugs_disagree(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees(*REPEATING)
    plant(monkeypatch)
    assert not agrees(*REPEATING)


@given(st.integers(2, 200_000), st.integers(0, 2**32))
def test_large_vocabularies_do_not_collide(size: int, seed: int) -> None:
    row = np.random.default_rng(seed).integers(0, size, size=64)
    row[40:48] = row[8:16]
    found = token_statistics(row[None], {}, blocks=2)
    assert found["repetition"].tolist() == [slow_repetition(row.tolist(), 2)]
    assert found["distinct"].tolist() == [slow_distinct(row.tolist(), 2)]


@given(grids())
def test_block_means_and_ends(given_grid: tuple[list[list[int]], int]) -> None:
    tokens, blocks = given_grid
    means = block_means(tokens, blocks)
    for row, found in zip(tokens, means.tolist(), strict=True):
        assert found == pytest.approx([sum(cell) / len(cell) for cell in cut(row, blocks)])
    assert block_means(np.asarray(tokens) > 0, blocks).dtype == np.float64
    for eos in ((), (0,), (0, 2)):
        ends = [next((t + 1 for t, token in enumerate(row) if token in eos), 0) for row in tokens]
        assert first_end(tokens, eos).tolist() == ends


@pytest.mark.parametrize("tokens", [[], [[]], [0, 1], [[[0]]]])
def test_what_is_no_grid_is_refused(tokens: Any) -> None:
    for function in (lambda: block_means(tokens, 1), lambda: token_statistics(tokens, {}, blocks=1)):
        with pytest.raises(ValueError, match=r"tokens must be \(N, T\) with a token each"):
            function()


@pytest.mark.parametrize("blocks", [0, -1, 4, 7])
def test_blocks_must_divide_a_row(blocks: int) -> None:
    for function in (lambda: block_means([[1] * 6], blocks), lambda: token_statistics([[1] * 6], {}, blocks=blocks)):
        with pytest.raises(ValueError, match="blocks must divide the 6 tokens of a row"):
            function()


def test_features_of_texts_and_of_ids() -> None:
    vocabulary = TransformersModel(SIBLINGS[0]).vocabulary
    features = token_features(vocabulary)
    assert set(features) == {"letters", "line breaks"}
    for name, character in (("letters", "a"), ("letters", "é"), ("line breaks", "\n")):
        token = vocabulary.encode(character)
        if len(token) == 1:
            assert features[name][token[0]] == 1.0
    for text, letters, breaks in (("ab 1", 0.5, 0.0), ("x\n\n.", 0.25, 0.5)):
        ids = np.array([vocabulary.encode(text)])
        found = token_statistics(ids, features, blocks=1)
        assert (found["letters"][0, 0], found["line breaks"][0, 0]) == (letters, breaks)
    assert token_features(Vocabulary(1))["id"].tolist() == [0.0]
    assert token_features(Vocabulary(5))["id"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


# Scores

TOY = Ensemble([TableModel.random(4, seed=seed, order=2) for seed in range(3)], ConstantMixing([0.5, 0.3, 0.2]))


def slow_scores(ensemble: Ensemble, prompt: list[int], row: list[int]) -> list[tuple[float, float, float, float]]:
    weights = ensemble.mixing.log_weights([()])[0].exp().tolist()
    out = []
    for t, token in enumerate(row):
        prefix = (*prompt, *row[:t])
        laws = [component.log_probs([prefix])[0].double().exp().tolist() for component in ensemble.components]
        mixed = [sum(w * law[x] for w, law in zip(weights, laws, strict=True)) for x in range(len(laws[0]))]
        entropy = -sum(p * math.log(p) for p in mixed if p > 0)
        apart = [sum(abs(p - q) for p, q in zip(law, mixed, strict=True)) / 2 for law in laws]
        disagreement = sum(w * tv for w, tv in zip(weights, apart, strict=True))
        out.append((math.log(mixed[token]), entropy, weights[0] * laws[0][token] / mixed[token], disagreement))
    return out


@given(grids(4), st.lists(st.integers(0, 3), max_size=3))
def test_scores_are_those_of_the_definition(given_grid: tuple[list[list[int]], int], prompt: list[int]) -> None:
    tokens, _ = given_grid
    ticks: list[int] = []
    found = scored_tokens(TOY, [prompt] * len(tokens), tokens, ticks.append)
    assert list(found) == ["log_prob", "entropy", "responsibility", "disagreement"]
    assert sum(ticks) == np.size(tokens)
    expected = np.array([slow_scores(TOY, prompt, row) for row in tokens])
    for place, values in enumerate(found.values()):
        assert values.shape == np.shape(tokens)
        np.testing.assert_allclose(values, expected[..., place], rtol=0, atol=1e-6)


def test_scores_are_those_of_a_trace_on_networks() -> None:
    from me_stats.presets import open_setting

    ensemble = open_setting(SIBLINGS).ensemble
    encode = ensemble.vocabulary.encode
    prompts = [encode(text) for text in ("def f(x):", "The names ")]
    tokens = np.array([encode("\n    return x * 2"), encode("of the rows are 0")])
    found = scored_tokens(ensemble, prompts, tokens)
    expected = score(ensemble, prompts, tokens.tolist())
    np.testing.assert_allclose(found["log_prob"], expected.log_probs.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["responsibility"], expected.responsibilities[..., 0].numpy(), atol=1e-5)
    for row, (prompt, text) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        laws = torch.cat([ensemble.log_probs([(*prompt, *text[:t])]) for t in range(len(text))]).double()
        np.testing.assert_allclose(found["entropy"][row], -(laws.exp() * laws).sum(1).numpy(), atol=1e-4)
    assert (found["disagreement"] > 0).all()
    assert (found["disagreement"] <= 0.5).all()  # of two components, 2 w (1 - w) TV at most


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 4, size=(5, 12))
    whole = scored_tokens(TOY, [(1,)] * 5, tokens)
    monkeypatch.setattr("me_stats.models.ensemble._CHUNK", 30)
    for name, values in scored_tokens(TOY, [(1,)] * 5, tokens).items():
        np.testing.assert_array_equal(values, whole[name])


def test_components_and_tokens_that_are_impossible_leave_no_nan() -> None:
    never = Ensemble(
        [MarkovModel([1.0, 0.0, 0.0], np.tile([1.0, 0.0, 0.0], (3, 1))),
         MarkovModel([0.5, 0.5, 0.0], np.tile([0.5, 0.5, 0.0], (3, 1)))],
        ConstantMixing([0.25, 0.75]),
    )  # fmt: skip
    found = scored_tokens(never, [()], [[0, 1, 2]])
    assert found["responsibility"][0].tolist() == pytest.approx([0.25 / 0.625, 0.0, 0.25])
    assert found["log_prob"][0].tolist() == pytest.approx([math.log(0.625), math.log(0.375), -math.inf])
    law = [0.625, 0.375]
    assert found["entropy"][0, 0] == pytest.approx(-sum(p * math.log(p) for p in law))
    assert found["disagreement"][0, 0] == pytest.approx(0.25 * 0.375 + 0.75 * 0.125)
    one_sided = Ensemble(never.components, ConstantMixing([0.0, 1.0]))
    assert scored_tokens(one_sided, [()], [[0, 1]])["responsibility"].tolist() == [[0.0, 0.0]]


def wrong_weights(patch: pytest.MonkeyPatch) -> None:
    honest = row_statistics.chunked_paths
    patch.setattr(
        row_statistics, "chunked_paths",
        lambda *given: ((laws, weights.flip(1), drawn) for laws, weights, drawn in honest(*given)),
    )  # fmt: skip


def next_law(patch: pytest.MonkeyPatch) -> None:
    """Every token is scored by the law of the step after."""
    honest = row_statistics.chunked_paths
    patch.setattr(
        row_statistics, "chunked_paths",
        lambda *given: ((laws.roll(-1, 0), weights, drawn) for laws, weights, drawn in honest(*given)),
    )  # fmt: skip


@pytest.mark.parametrize("plant", [wrong_weights, next_law])
def test_planted_bugs_change_the_scores(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = [0, 1, 3, 2, 0]
    expected = np.array(slow_scores(TOY, [2], row))
    plant(monkeypatch)
    found = scored_tokens(TOY, [[2]], [row])
    apart = [abs(values[0] - expected[:, place]).max() for place, values in enumerate(found.values())]
    assert min(apart) > 1e-3
