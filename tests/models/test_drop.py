"""Tokens that are taken back: `drop` of the sessions that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from me_stats.models import Conditioned, TableModel, TopK, TransformersModel, Warped
from me_stats.models.base import PrefixSession
from me_stats.models.ragged import RaggedSession

PROMPTS = [tuple(b"The names")] * 6 + [tuple(b"The")] * 2


@pytest.fixture(scope="module")
def sibling() -> TransformersModel:
    return TransformersModel("bundled:prose")


def walk(model: Any, *, seed: int, steps: int = 60) -> float:
    """Largest difference between session and definition while a few rows at a time grow, shrink and are read."""
    rng = np.random.default_rng(seed)
    prefixes, session = list(PROMPTS), model.session(PROMPTS)
    worst = 0.0
    session.log_probs(np.array([0]))
    for step in range(steps):
        # First the row that holds the prompt's keys is cut, then others ask for them.
        rows = rng.choice(len(prefixes), size=rng.integers(1, 4), replace=False) if step else np.array([0])
        if rng.random() < 0.5 or not step:
            counts = np.array([rng.integers(0, min(6, len(prefixes[row]))) for row in rows])
            session.drop(rows, counts)
            for row, count in zip(rows, counts, strict=True):
                prefixes[row] = prefixes[row][: len(prefixes[row]) - count]
        for _ in range(rng.integers(0, 4)):
            tokens = rng.integers(1, 256, len(rows))
            session.append(rows, torch.from_numpy(tokens))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                prefixes[row] = (*prefixes[row], token)
        read = rng.choice(len(prefixes), size=rng.integers(1, 4), replace=False) if step else rows
        difference = session.log_probs(read).exp() - model.log_probs([prefixes[row] for row in read]).exp()
        worst = max(worst, float(difference.abs().sum(-1).max()) / 2)
    return worst


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_that_take_tokens_back_agree_with_the_definition(sibling: TransformersModel, seed: int) -> None:
    assert walk(sibling, seed=seed) < 1e-4
    assert walk(Warped(Conditioned(sibling, "def "), TopK(30)), seed=seed, steps=20) < 1e-4


def keeps_the_keys(patch: pytest.MonkeyPatch, drop: Any) -> None:
    """Keys of tokens that are gone count as stored."""

    def faulty(self: Any, rows: np.ndarray, counts: np.ndarray) -> None:
        cached = self._cached[rows]
        drop(self, rows, counts)
        self._cached[rows] = cached

    patch.setattr(RaggedSession, "drop", faulty)


def goes_on_lending(patch: pytest.MonkeyPatch, drop: Any) -> None:
    """A row whose prompt was cut and written over is still copied from."""

    def faulty(self: Any, rows: np.ndarray, counts: np.ndarray) -> None:
        home = self._home.copy()
        drop(self, rows, counts)
        self._home = home

    patch.setattr(RaggedSession, "drop", faulty)


def lends_what_it_cut(patch: pytest.MonkeyPatch, drop: Any) -> None:
    """A cut row that is read first passes for a holder of the prompt."""

    def faulty(self: Any, rows: np.ndarray, counts: np.ndarray) -> None:
        drop(self, rows, counts)
        self._whole[rows] = True

    patch.setattr(RaggedSession, "drop", faulty)


@pytest.mark.parametrize("plant", [keeps_the_keys, goes_on_lending, lends_what_it_cut])
def test_planted_bugs_are_seen(
    plant: Callable[..., None], sibling: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, RaggedSession.drop)
    assert max(walk(sibling, seed=seed) for seed in (0, 1, 2)) > 0.01


def test_one_prefill_serves_the_rows_that_still_hold_the_prompt(sibling: TransformersModel) -> None:
    session: Any = sibling.session(PROMPTS[:3])
    session.log_probs(np.array([0]))
    session.drop(np.array([1]), np.array([2]))
    session.append(np.array([1]), torch.tensor([65]))
    before = session.cost.tokens_forwarded
    session.log_probs(np.array([1, 2]))
    assert session.cost.tokens_forwarded - before == 2  # seven tokens of the prompt were copied


def test_more_tokens_than_there_are_cannot_be_dropped(sibling: TransformersModel) -> None:
    session: Any = sibling.session([(65, 66)])
    row = np.array([0])
    for counts in ([3], [-1]):
        with pytest.raises(ValueError, match="counts must lie between 0"):
            session.drop(row, np.array(counts))
    session.drop(row, np.array([2]))
    with pytest.raises(ValueError, match="a row without tokens has no law"):
        session.log_probs(row)
    session.append(row, torch.tensor([70]))
    torch.testing.assert_close(session.log_probs(row), sibling.log_probs([(70,)]), rtol=0, atol=1e-4)


def test_a_session_without_a_cache_drops_too() -> None:
    model = TableModel.random(3, seed=0, order=2)
    session = PrefixSession(model, [(0, 1, 2), (1,)])
    session.drop(np.array([0, 1]), np.array([2, 0]))
    assert torch.equal(session.log_probs(np.array([0, 1])), model.log_probs([(0,), (1,)]))
    assert not hasattr(Warped(model, TopK(2)).session([(0,)]), "drop")
