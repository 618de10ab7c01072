"""Rows from any sampler in one form; what no law could have written is told apart from what cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from me_stats.models import MarkovModel
from me_stats.samplers import CESampler
from me_stats.testing.drawing import Source, as_rows, structural_faults
from me_stats.vocabulary import Vocabulary

WITH_END = Vocabulary(4, eos=(0,))


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2, 3], [2]],
        [(1, 2, 3), np.array([2])],
        [torch.tensor([1, 2, 3]), torch.tensor([2])],
        np.array([[1, 2, 3], [2, -1, -1]]),
        torch.tensor([[1, 2, 3], [2, -1, -1]]),
    ],
    ids=["lists", "tuples and arrays", "tensors", "array", "tensor"],
)
def test_rows_come_in_many_forms(ids: Any) -> None:
    assert as_rows(ids, 2) == [[1, 2, 3], [2]]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1]], ValueError, "one row per prompt: 2 prompts, 1 rows"),
        ([[0.5], [1]], TypeError, "integer ids"),
        (np.zeros((2, 2)), TypeError, "integer ids"),
        (torch.zeros(2), TypeError, "integer ids"),
        (None, TypeError, "one row of integer ids"),
        ([1, 2], TypeError, "one row of integer ids"),
        ("ab", TypeError, "one row of integer ids"),
    ],
)
def test_what_is_no_set_of_rows_is_refused(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rows(ids, 2)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([1, 2, 3], ""),
        ([1, 0], ""),
        ([1, 2, 3, 1], "has 4 tokens, more than"),
        ([1, 4, 1], "holds id 4"),
        ([1, -2, 1], "holds id -2"),
        ([1, 0, 2], "goes on after end-of-sequence token 0"),
        ([1, 2], "stops after 2 of 3 tokens"),
        ([], "stops after 0 of 3 tokens"),
    ],
)
def test_faults_are_named(row: list[int], fault: str) -> None:
    found = structural_faults([[1, 1, 1], row], WITH_END, 3)
    assert found.startswith("row 1 ") == bool(fault)
    assert fault in found


def test_without_a_vocabulary_only_the_length_is_known() -> None:
    assert structural_faults([[9, 9], []], None, 2) == ""
    assert "3 tokens" in structural_faults([[9, 9, 9]], None, 2)


def test_batches_differ_and_a_source_repeats_itself() -> None:
    sampler = CESampler(MarkovModel.random(50, seed=0))
    first = Source(sampler, [(0,), (1, 2)], 4, seed=3)
    batches = [first.draw(5), first.draw(5)]
    again = Source(sampler, [(0,), (1, 2)], 4, seed=3)
    assert batches == [again.draw(5), again.draw(5)]
    assert batches[0] != batches[1]
    assert Source(sampler, [(0,), (1, 2)], 4, seed=3, stream=1).draw(5) != batches[0]
    assert Source(sampler, [(0,), (1, 2)], 4, seed=4).draw(5) != batches[0]


def test_a_callable_gets_every_prompt_once_a_row_and_a_small_seed() -> None:
    calls: list[tuple[Any, int, int]] = []

    def sampler(prompts: Any, *, max_new_tokens: int, seed: int) -> list[list[int]]:
        calls.append((prompts, max_new_tokens, seed))
        return [[1]] * len(prompts)

    source = Source(sampler, [(0,), (1, 2)], 1, seed=0)
    assert source.draw(2) == [[1]] * 4
    (prompts, max_new_tokens, seed), *_ = calls
    assert prompts == [(0,), (0,), (1, 2), (1, 2)]
    assert max_new_tokens == 1
    assert 0 <= seed < 2**31
    with pytest.raises(TypeError, match="adapters"):
        Source(3, [(0,)], 1, seed=0)
