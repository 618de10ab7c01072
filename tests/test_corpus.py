"""Documents and their scores: the rules for first tokens and windows, against definitions written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.corpus import CorpusScores, Document, read_documents, score_corpus, token_bytes
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, TableModel, TopK, TransformersModel, Warped
from me_stats.trace import score
from me_stats.vocabulary import Vocabulary
from tests.strategies import seeds


def texts(*arguments: Any, **options: Any) -> list[str]:
    return [str(document.content) for document in read_documents(*arguments, **options)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("blank lines", ["one\ntwo", "three"]),
        ("lines", ["one", "two", "three"]),
        ("file", ["\none\ntwo\n\n \nthree\n\n"]),
    ],
)
def test_what_ends_a_document(tmp_path: Path, split: Any, expected: list[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\none\r\ntwo\r\n\r\n \r\nthree\n\n")
    assert texts(path, split=split) == expected
    assert {document.domain for document in read_documents([path], split=split)} == {"notes"}
    assert {document.domain for document in read_documents(str(path), domain="diary")} == {"diary"}


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "a\\n\\nb\\n", "id": 1}\n\n{"text": " "}\n{"text": "c"}', encoding="utf-8")
    assert texts(path) == ["a\n\nb\n", "c"]
    for bad in ("{}", "[1]", "no json", '{"text": 3}'):
        path.write_text('{"text": "fine"}\n' + bad, encoding="utf-8")
        with pytest.raises(ValueError, match=r'web.jsonl, line 2: expected a JSON object with a "text" string'):
            texts(path)


def test_files_are_streamed_and_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"first\n" + b"x\n" * 100_000 + b"caf\xe9\n")
    stream = read_documents(path, split="lines")
    assert next(stream).content == "first"
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 .*iconv -f LATIN1 -t UTF-8"):
        list(stream)
    with pytest.raises(FileNotFoundError):
        read_documents([path, tmp_path / "absent.txt"])  # before the first document is asked for
    with pytest.raises(ValueError, match="split must be"):
        read_documents(path, split="words")  # type: ignore[arg-type]


def toys(order: int = 3, size: int = 3, count: int = 2) -> list[TableModel]:
    return [TableModel.random(size, order=order, seed=i) for i in range(count)]


def random_documents(seed: int, count: int, longest: int, size: int = 3) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(f"domain {i % 2}", rng.integers(0, size, rng.integers(2, longest + 1)).tolist()) for i in range(count)
    ]


@given(seed=seeds, count=st.integers(1, 6), batch=st.sampled_from([5, 16, 4096]))
@settings(max_examples=25)
def test_scores_are_the_components_laws_of_the_realised_tokens(seed: int, count: int, batch: int) -> None:
    models, documents = toys(), random_documents(seed, count, 5)
    scores = score_corpus(models, documents, prompt=[], batch_tokens=batch, window=4096)
    paths = [list(document.content) for document in documents]
    both = Ensemble(models, ConstantMixing([0.5, 0.5]))
    expected = score(both, [()] * len(paths), paths).component_log_probs  # type: ignore[arg-type, list-item]
    direct = np.concatenate([row[: len(path)] for row, path in zip(expected.numpy(), paths, strict=True)])
    np.testing.assert_array_equal(scores.log_probs, direct)
    assert scores.tokens.tolist() == [token for path in paths for token in path]
    assert scores.document.tolist() == [d for d, path in enumerate(paths) for _ in path]
    assert scores.domains == tuple(document.domain for document in documents)
    assert (scores.bytes == 0).all()


def test_the_first_token_of_a_toy_document_is_context_only() -> None:
    scores = score_corpus(toys(), [Document("a", [2, 0, 1]), Document("a", [1]), Document("b", [0, 0])])
    assert list(map(list, scores.prompts)) == [[2], [1], [0]]
    assert scores.lengths.tolist() == [2, 0, 1]
    law = toys()[0].log_probs([(2,), (2, 0), (0,)])
    np.testing.assert_array_equal(scores.log_probs[:, 0], law[[0, 1, 2], [0, 1, 0]].numpy())
    assert [(prompt, tokens.tolist()) for prompt, tokens in scores.sequences()] == [
        ((2,), [0, 1]),
        ((1,), []),
        ((0,), [0]),
    ]


def test_conditioned_components_bring_their_own_prompt() -> None:
    model = toys()[0]
    scores = score_corpus([Conditioned(model, [0]), Conditioned(model, [1, 2])], [Document("a", [2, 1])])
    laws = [model.log_probs([(*context, *head) for head in ((), (2,))]) for context in ((0,), (1, 2))]
    np.testing.assert_array_equal(scores.log_probs, np.stack([law[[0, 1], [2, 1]].numpy() for law in laws], axis=1))


class Spy:
    """A model that notes which prefix each token was scored after, and sees at most `context_length` tokens."""

    def __init__(self, model: TableModel, context_length: int | None = None) -> None:
        self.model_, self.context_length, self.vocabulary = model, context_length, model.vocabulary
        self.contexts: list[int] = []

    def log_probs(self, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        self.contexts += map(len, prefixes)
        return self.model_.log_probs(prefixes)


@pytest.mark.parametrize("prompt", [None, [0], []])
@pytest.mark.parametrize(("window", "stride"), [(10, 6), (9, 5), (7, 3), (5, 1)])
def test_windows_are_exact_for_a_law_of_finite_memory(prompt: list[int] | None, window: int, stride: int) -> None:
    models, documents = toys(order=3), random_documents(1, 5, 60)
    whole = score_corpus(models, documents, prompt=prompt)
    spies = [Spy(model) for model in models]
    cut = score_corpus(spies, documents, prompt=prompt, window=window, stride=stride, batch_tokens=32)
    # At least window - stride ≥ 4 tokens of context, a prompt of one token included: three of the document's own.
    np.testing.assert_array_equal(cut.log_probs, whole.log_probs)
    for spy in spies:
        assert max(spy.contexts) == window - 1
        assert len(spy.contexts) == whole.n  # each token once


@pytest.mark.parametrize(("window", "stride"), [(10, 6), (8, 7)])
def test_context_is_never_shorter_than_stated(window: int, stride: int) -> None:
    spy = Spy(toys()[0])
    score_corpus([spy], [Document("a", [0, 1, 2] * 20)], window=window, stride=stride)
    # The document's own start has less: 1, 2, ... tokens.
    assert sorted(spy.contexts)[: window - stride] == list(range(1, window - stride + 1))
    assert min(spy.contexts[window - 1 :]) == window - stride


def test_a_stride_that_cuts_into_the_memory_changes_the_scores() -> None:
    models, documents = toys(order=3), random_documents(1, 5, 60)
    cut = score_corpus(models, documents, window=10, stride=8)
    assert not np.array_equal(cut.log_probs, score_corpus(models, documents).log_probs)


def test_the_window_is_what_every_component_can_see() -> None:
    short, model = Spy(toys()[0], context_length=12), toys()[1]
    nested = Warped(Conditioned(Spy(model, context_length=11), [0, 1]), TopK(3))
    scores = score_corpus([short, nested], [Document("a", [0, 1, 2] * 20)])
    assert (scores.settings["window"], scores.settings["stride"]) == (9, 4)
    assert max(short.contexts) == 8
    with pytest.raises(ValueError, match="sees only 9; lower window"):
        score_corpus([short, nested], [Document("a", [0, 1])], window=10)


class Texts:
    """A tokenizer of someone else, with pieces that stand for different numbers of bytes."""

    pieces = ("<s>", "▁", "a", "▁é", "<0x0A>", "<unk>")
    added_tokens_decoder = {0: "<s>"}  # noqa: RUF012
    bos_token_id = 0
    eos_token_id = None

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.pieces[i] for i in ids]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return {"a é\na": [1, 2, 3, 4, 2], "ε": [5]}[text]


def test_bytes_add_up_to_the_text() -> None:
    vocabulary = Vocabulary(6, tokenizer=Texts())
    table = token_bytes(vocabulary)
    assert table is not None
    assert table.tolist() == [3, 1, 1, 3, 1, 5]
    model = TableModel.random(6, order=1, seed=0)
    model.vocabulary = vocabulary
    scores = score_corpus([model], [Document("a", "a é\na"), Document("a", "ε"), Document("a", [2, 3])])
    # The tokenizer's own space in front counts for nothing, and an unknown letter has its two bytes.
    assert scores.bytes.tolist() == [0, 1, 3, 1, 1, 2, 1, 3]
    assert (scores.prompts == 0).all()
    assert token_bytes(Vocabulary(3)) is None


@pytest.fixture(scope="module")
def siblings() -> Iterator[list[TransformersModel]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield [TransformersModel(f"bundled:{name}") for name in ("prose", "code")]


def test_transformers_are_scored_after_the_end_of_a_document(siblings: list[TransformersModel]) -> None:
    documents = [Document("prose", "The café is closed."), Document("code", "def f(x):\n    return x\n")]
    scores = score_corpus(siblings, documents)
    assert scores.n == sum(len(str(document.content).encode()) for document in documents)
    assert (scores.bytes == 1).all()
    assert scores.settings["prompt"] == [0]
    assert scores.log_probs.dtype == np.float32
    ids = [0, *str(documents[1].content).encode()]
    for column, model in zip(scores.log_probs[-len(ids) + 1 :].T, siblings, strict=True):
        law = model.log_probs([ids[:t] for t in range(1, len(ids))])
        np.testing.assert_allclose(column, law[range(len(ids) - 1), ids[1:]], atol=1e-4)
    windows = score_corpus(siblings, documents, window=12, stride=4)
    assert np.abs(windows.log_probs[:11] - scores.log_probs[:11]).max() < 1e-4
    assert np.abs(windows.log_probs - scores.log_probs).mean() < 1.0


def test_bad_arguments_are_refused() -> None:
    models, fine = toys(), [Document("a", [0, 1, 2])]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"documents": []}, "documents is empty"),
        ({"documents": [*fine, Document("b", [])]}, "document 1 .b. is empty; leave it out"),
        ({"documents": [Document("a", [1])]}, "no token was scored"),
        ({"documents": [Document("a", [7])]}, "outside the vocabulary"),
        ({"models": [models[0], TableModel.random(4, seed=0)]}, "3 against 4 tokens"),
        ({"window": 1}, "stride < window"),
        ({"window": 8, "stride": 8}, "stride < window"),
        ({"window": 8, "stride": 0}, "stride < window"),
        ({"window": 3, "prompt": [0, 1, 2]}, "3 of them the prompt"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            score_corpus(**{"models": models, "documents": fine, **change})
    with pytest.raises(TypeError, match="no tokenizer"):
        score_corpus(models, [Document("a", "text")])
    for wrong in ([], models[0], [object()]):
        with pytest.raises(TypeError, match="LanguageModel"):
            score_corpus(wrong, fine)  # type: ignore[arg-type]


def test_scores_check_their_own_shapes() -> None:
    empty = np.zeros((1, 0))
    for n, length, message in ((2, 1, "lengths must add up"), (3, 2, "log_probs must be")):
        with pytest.raises(ValueError, match=message):
            CorpusScores(np.zeros((2, 1)), np.zeros(n), np.zeros(2), np.array([length]), empty, ("a",), {})
