"""Fuzzing sessions: right ones pass, planted bugs are found and come out as small schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import Ensemble
from me_stats.models import LanguageModel
from me_stats.models.base import PrefixSession
from me_stats.testing import ModelRejected, fuzz_session

Build = Callable[[Ensemble], Any]


class Cached(LanguageModel):
    """A model by someone else, with a session that forgets, mixes up or garbles in the way that `bug` says."""

    def __init__(self, model: Any, bug: str = "") -> None:
        self.model, self.bug, self.vocabulary = model, bug, model.vocabulary

    def log_probs(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        return self.model.log_probs(prefixes)

    def session(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None) -> CachedSession:
        return CachedSession(self, prompts)


class CachedSession(PrefixSession):
    def __init__(self, model: Cached, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts))
        padded = [(*prompt, *[0] * (longest - len(prompt))) for prompt in prompts]
        super().__init__(model, padded if model.bug == "padding" else prompts)
        self.bug = model.bug
        self.pending: dict[int, list[int]] = {}
        self.reads = 0

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.pending.setdefault(row, []).append(token)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        for row in rows.tolist():
            waiting = self.pending.pop(row, [])
            if self.bug == "newest only":
                waiting = waiting[-1:]
            if self.bug == "long lag" and len(waiting) > 2:
                waiting = waiting[1:]
            super().append(np.array([row] * len(waiting), dtype=int), torch.tensor(waiting, dtype=torch.int64))
        self.reads += 1
        laws = super().log_probs(np.sort(rows) if self.bug == "row order" else rows)
        if self.bug == "turned" and laws.shape[1] > 1:
            laws = laws.roll(1, 1)
        return laws + 0.1 if self.bug == "garbled" and self.reads > 1 else laws


@pytest.mark.parametrize("build", [lambda e: e, Cached, lambda e: Ensemble([*map(Cached, e.components)], e.mixing)])
def test_right_sessions_pass(build: Build) -> None:
    result = fuzz_session(build, max_examples=80, min_prompt_length=0)
    assert result.passed
    assert result.compared > 300
    assert result.largest_tv < 1e-12


def words(bug: str, *, parts: bool = False) -> list[str]:
    def build(ensemble: Ensemble) -> Any:
        if parts:
            return Ensemble([Cached(component, bug) for component in ensemble.components], ensemble.mixing)
        return Cached(ensemble, bug)

    with pytest.raises(ModelRejected, match="smallest schedule found") as caught:
        fuzz_session(build)
    assert not caught.value.result.passed
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("parts", [False, True])
def test_forgotten_tokens_shrink_to_two_appends(parts: bool) -> None:
    lines = words("newest only", parts=parts)
    assert sum(line.startswith("append") for line in lines) == 2
    assert any(line.startswith("K = 1 components, V = 2 tokens") for line in lines)
    assert any("which is wrong" in line for line in lines)
    assert "log_probs gives [" in lines[-1]


def test_a_bug_of_long_lags_needs_one() -> None:
    assert sum(line.startswith("append") for line in words("long lag")) == 3


def test_padding_and_order_need_two_rows_and_no_append() -> None:
    padding, order = words("padding"), words("row order")
    assert not any(line.startswith("append") for line in padding)
    assert any(line.startswith(("read rows 0, 1", "read rows 1, 0")) for line in padding)
    (read,) = (line.split(" (")[0].removeprefix("read rows ") for line in order if "which is wrong" in line)
    assert read in ("1, 0", "2, 1", "2, 0")


def test_laws_that_are_none_are_a_fault() -> None:
    lines = words("garbled")
    assert "what the session returned is no law" in lines[1]


def test_a_session_that_depends_on_more_than_its_rows_is_reported_all_the_same() -> None:
    calls = iter(range(10**6))

    def once(ensemble: Ensemble) -> Cached:
        return Cached(ensemble, "" if next(calls) else "turned")

    with pytest.raises(ModelRejected, match="run again it agreed: the session depends on more than its rows"):
        fuzz_session(once)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rows must be an integer"):
        fuzz_session(lambda ensemble: ensemble, max_rows=0)
    with pytest.raises(ValueError, match="max_vocabulary must be at least 2"):
        fuzz_session(lambda ensemble: ensemble, max_vocabulary=1)
    with pytest.raises(ValueError, match="tolerance must be a total variation"):
        fuzz_session(lambda ensemble: ensemble, tolerance=1.0)
    with pytest.raises(TypeError, match=r"build\(ensemble\) must be a LanguageModel"):
        fuzz_session(lambda ensemble: 3)
