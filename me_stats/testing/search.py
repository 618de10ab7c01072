"""Hypothesis as a function: the smallest example that a judge objects to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Flaky

_Example = TypeVar("_Example")
_Answer = TypeVar("_Answer")


def search(
    examples: st.SearchStrategy[_Example], judge: Callable[[_Example], _Answer | None], *, max_examples: int, seed: int
) -> tuple[_Example, _Answer, bool] | None:
    """The smallest example that `judge` objects to (returns something), the objection, and whether it came again.

    Nothing is kept between calls and nothing depends on the clock: a call is a function of its arguments, if `judge` is
    one. What `judge` raises is passed on, with the smallest example that raises it in a note.

    >>> search(st.lists(st.integers()), lambda xs: sum(xs) if sum(xs) > 9 else None, max_examples=200, seed=0)
    ([10], 10, True)
    """
    objection: list[tuple[_Example, _Answer]] = []

    # A finding ends generation, is shrunk, and is judged once more at the end, so the last objection is the smallest.
    # Explaining would run it many times more.
    @hypothesis.settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.seed(seed)
    @hypothesis.given(example=examples)
    def holds(example: _Example) -> None:
        answer = judge(example)
        if answer is not None:
            objection[:] = [(example, answer)]
            raise _Objection

    try:
        holds()
    except _Objection:
        return (*objection[0], True)
    except Flaky:
        if not objection:
            raise
        return (*objection[0], False)
    return None


class _Objection(Exception):
    """Tells hypothesis that this example is one to shrink: always raised at one line, so that any finding will do."""


def check_counts(**counts: int) -> None:
    """Refuse options that are no positive integers."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def rounded(law: Any) -> list[float]:
    """Probabilities with three digits, for messages."""
    return [float(f"{p:.3g}") for p in law.tolist()]
