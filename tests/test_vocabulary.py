from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.vocabulary import Vocabulary, as_prompts


class Letters:
    """A tokenizer of a..z."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in ids)


def test_eos_ids_are_sorted_and_distinct() -> None:
    assert Vocabulary(5, eos=(3, 1, 3)).eos == (1, 3)


@pytest.mark.parametrize(("size", "eos"), [(0, ()), (-1, ()), (3, (3,)), (3, (-1,))])
def test_bad_vocabularies_are_refused(size: int, eos: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"size must be at least 1|eos ids must lie in"):
        Vocabulary(size, eos=eos)


def test_equality_is_about_ids_and_not_about_tokenizer_objects() -> None:
    assert Vocabulary(26, tokenizer=Letters()) == Vocabulary(26)
    assert Vocabulary(26, fingerprint="a") != Vocabulary(26, fingerprint="b")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Vocabulary(4, eos=(2,)), "3 against 4 tokens"),
        (Vocabulary(3, eos=(2,), fingerprint="other"), "ids stand for different tokens"),
        (Vocabulary(3, eos=(1,)), r"end-of-sequence ids \(2,\) against \(1,\)"),
    ],
)
def test_differences_are_named(other: Vocabulary, reason: str) -> None:
    mine = Vocabulary(3, eos=(2,))
    mine.require_equal(Vocabulary(3, eos=(2,)), name="a", other_name="b")
    with pytest.raises(ValueError, match=f"mine and theirs have different vocabularies .*{reason}"):
        mine.require_equal(other, name="mine", other_name="theirs")


@given(st.lists(st.integers(0, 6)))
def test_ids_of_any_container_pass_through(ids: list[int]) -> None:
    vocabulary = Vocabulary(7)
    assert vocabulary.encode(ids) == tuple(ids)
    assert vocabulary.encode(np.array(ids, dtype=np.int32)) == tuple(ids)
    assert vocabulary.encode(torch.tensor(ids, dtype=torch.int64)) == tuple(ids)


@pytest.mark.parametrize("token", [-1, 7])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"prompt has token id {token}, outside the vocabulary 0\.\.6"):
        Vocabulary(7).encode([0, token])


@pytest.mark.parametrize("prompt", [[0.5], [[1]], ["a"], 3])
def test_prompts_that_are_not_ids_are_refused(prompt: object) -> None:
    with pytest.raises(TypeError, match="a prompt must be text or a sequence of integer ids"):
        Vocabulary(7).encode(prompt)  # type: ignore[arg-type]


def test_text_goes_through_the_tokenizer() -> None:
    vocabulary = Vocabulary(26, tokenizer=Letters())
    assert vocabulary.encode("cab") == (2, 0, 1)
    assert vocabulary.decode([2, 0, 1, -1, -1]) == "cab"
    with pytest.raises(TypeError, match=r"no tokenizer.*got the text 'cab'"):
        Vocabulary(26).encode("cab")


def test_without_a_tokenizer_ids_are_shown_as_numbers() -> None:
    assert Vocabulary(4).decode([3, 0, -1]) == "3 0"


@pytest.mark.parametrize(
    ("given_", "count"),
    [
        ("text", 1),
        (["a", "b"], 2),
        ([1, 2, 3], 1),
        ([], 1),
        ([[], [1]], 2),
        ([[]], 1),
        (np.array([1, 2]), 1),
        (np.array([[1, 2], [0, 1]]), 2),
        (torch.tensor([1, 2]), 1),
        (torch.tensor([[1], [2]]), 2),
        ([np.int64(1), np.int64(2)], 1),
        (["a", [1]], 2),
    ],
)
def test_one_prompt_is_told_from_many(given_: object, count: int) -> None:
    assert len(as_prompts(given_)) == count  # type: ignore[arg-type]
