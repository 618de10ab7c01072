"""The search: small, repeatable, and silent about nothing that a judge raises."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from me_stats.testing.search import search

NUMBERS = st.integers(0, 10**6)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    seen: list[int] = []
    assert search(NUMBERS, seen.append, max_examples=50, seed=0) is None
    assert len(seen) == 50


def test_the_smallest_example_comes_with_its_answer() -> None:
    found = search(NUMBERS, lambda n: f"{n} is large" if n > 100 else None, max_examples=100, seed=3)
    assert found == (101, "101 is large", True)


def test_an_objection_that_does_not_come_again_is_kept() -> None:
    calls = iter(range(1000))
    found = search(NUMBERS, lambda n: None if next(calls) else "once", max_examples=10, seed=0)
    assert found is not None
    assert found[1:] == ("once", False)


def test_what_a_judge_raises_is_passed_on_with_its_example() -> None:
    def judge(n: int) -> None:
        if n > 7:
            raise KeyError(n)

    with pytest.raises(KeyError, match="8") as caught:
        search(NUMBERS, judge, max_examples=100, seed=0)
    assert any("example=8" in note for note in caught.value.__notes__)


def test_calls_repeat() -> None:
    def seen(seed: int) -> list[int]:
        numbers: list[int] = []
        search(NUMBERS, numbers.append, max_examples=30, seed=seed)
        return numbers

    assert seen(1) == seen(1) != seen(2)
