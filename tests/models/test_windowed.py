from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats import exact
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Endless, Ensemble, MarkovModel, TableModel, TransformersModel, Windowed
from me_stats.models.moving import MovingRows
from me_stats.models.windowed import WindowedSession, context_length
from me_stats.samplers import CESampler, MESampler
from me_stats.testing import ModelRejected, check_session

DEEP = TableModel.random(3, seed=4, order=4)


@given(st.integers(2, 9), st.integers(1, 9), st.lists(st.integers(0, 2), max_size=40))
def test_a_prefix_is_read_from_the_start_that_the_rule_says(window: int, hop: int, prefix: list[int]) -> None:
    hop = min(hop, window)
    model = Windowed(DEEP, window, hop=hop)
    # The rule, told as a story: whenever more than W tokens are in view, h of them leave.
    begin = 0
    for length in range(len(prefix) + 1):
        while length - begin > window:
            begin += hop
        assert model.start(length) == begin
    assert torch.equal(model.log_probs([prefix]), DEEP.log_probs([prefix[begin:]]))
    if len(prefix) > window:
        assert window - hop + 1 <= len(prefix) - begin <= window


def test_nothing_is_lost_while_everything_fits() -> None:
    law = exact.sequence_law(Windowed(DEEP, 6), [0, 1], max_new_tokens=4)
    assert law.tv_distance(exact.sequence_law(DEEP, [0, 1], max_new_tokens=4)) == 0
    assert exact.sequence_law(Windowed(DEEP, 3), [0, 1], max_new_tokens=4).tv_distance(law) > 1e-3


def test_windows_inside_a_mixture_keep_ce_and_me_equal() -> None:
    parts = [Windowed(TableModel.random(2, seed=seed, order=3), 2, hop=1) for seed in (0, 1)]
    ensemble = Ensemble(parts, ConstantMixing([0.3, 0.7]))
    law = exact.sequence_law(ensemble, [0], max_new_tokens=4)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, [0], max_new_tokens=4).tv_distance(law) < 1e-12


def test_a_condition_inside_the_window_stays_in_view() -> None:
    prefix = [0, 1, 2, 0, 1]
    inside = Windowed(Conditioned(DEEP, [2]), 2, hop=1)
    assert torch.equal(inside.log_probs([prefix]), DEEP.log_probs([(2, 0, 1)]))
    outside = Conditioned(Windowed(DEEP, 2, hop=1), [2])
    assert torch.equal(outside.log_probs([prefix]), DEEP.log_probs([(0, 1)]))


def shifted(patch: pytest.MonkeyPatch) -> None:
    """A hop drops one token too many."""
    start = Windowed.start
    patch.setattr(
        WindowedSession,
        "_move",
        lambda self, rows: _moved(self, rows, start(self._windowed, self._length[rows]) + 1),
    )


def _moved(session: Any, rows: np.ndarray, starts: np.ndarray) -> None:
    ring, window = session._recent[torch.from_numpy(rows)].numpy(), session._windowed.window
    views = [
        tuple(own[np.arange(a, b) % window].tolist())
        for own, a, b in zip(ring, starts, session._length[rows], strict=True)
    ]
    session._rows.move(rows, views)


def never_moves(patch: pytest.MonkeyPatch) -> None:
    """Rows keep all they have read."""
    patch.setattr(WindowedSession, "_move", lambda self, rows: None)


def rows_swapped(patch: pytest.MonkeyPatch) -> None:
    """Laws come back in the order of the sessions, not of the rows."""
    patch.setattr(
        MovingRows,
        "log_probs",
        lambda self, rows: torch.cat([s.log_probs(self.place[rows[mine]]) for s, mine in self.groups(rows)]),
    )


@pytest.mark.parametrize("plant", [shifted, never_moves, rows_swapped])
def test_the_session_check_rejects_a_planted_bug(plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Windowed(DEEP, 4, hop=2)
    prompts = [(0,), (1, 2, 0), (2, 2, 1, 0)]
    check_session(model, prompts, steps=12, seed=0)
    plant(monkeypatch)
    with pytest.raises(ModelRejected, match="differs from log_probs"):
        check_session(model, prompts, steps=12, seed=0)


def test_memory_is_that_of_the_window_and_work_is_counted() -> None:
    session = Windowed(DEEP, 8, hop=4).session([(0,)] * 3, max_new_tokens=200)
    rows = np.arange(3)
    for step in range(200):
        session.log_probs(rows)
        session.append(rows, torch.full((3,), step % 3))
    assert len(session._rows.sessions) == 1
    assert session.cost.reads == 600  # sessions that were left count on


def test_rows_that_hop_at_different_steps() -> None:
    model = Windowed(DEEP, 4, hop=3)
    prefixes = [(0,), (1, 2, 1), (2, 1, 0, 1, 0, 2)]
    session = model.session(prefixes, max_new_tokens=20)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = np.sort(rng.choice(3, size=rng.integers(1, 4), replace=False))
        tokens = rng.integers(0, 3, len(rows))
        session.append(rows, torch.from_numpy(tokens))
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            prefixes[row] = (*prefixes[row], token)
        read = rng.permutation(3)[: rng.integers(1, 4)]
        expected = model.log_probs([prefixes[row] for row in read])
        torch.testing.assert_close(session.log_probs(read), expected, rtol=0, atol=0)


@pytest.mark.parametrize("window", [1, 0, 2.5, "8"])
def test_bad_windows_are_refused(window: Any) -> None:
    with pytest.raises(ValueError, match="window must be an integer of at least 2"):
        Windowed(DEEP, window)
    with pytest.raises(ValueError, match=r"hop must be an integer in 1..4"):
        Windowed(DEEP, 4, hop=window if window != 1 else 5)


# --- transformers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sibling() -> TransformersModel:
    return TransformersModel("bundled:prose")


def test_a_transformer_past_its_window(sibling: TransformersModel) -> None:
    model = Windowed(Endless(sibling), 24, hop=8)
    prompts = [sibling.vocabulary.encode(text) for text in ("The names", "An expression is ev")]
    trace = CESampler(model).sample(prompts, n=2, max_new_tokens=60, seed=0)
    laws = list(model.path_log_probs(trace.row_prompts(), trace.sequences()))
    rows = list(zip(trace.row_prompts(), trace.sequences(), strict=True))
    for step in (0, 10, 30, 59):
        expected = model.log_probs([(*prompt, *path[:step]) for prompt, path in rows])
        torch.testing.assert_close(torch.stack([law[step] for law in laws]), expected, rtol=0, atol=1e-3)
    check_session(model, prompts, steps=40, seed=1)


def test_a_window_that_the_model_cannot_read_is_refused(sibling: TransformersModel) -> None:
    with pytest.raises(ValueError, match="reads at most 8192; choose a smaller window"):
        Windowed(sibling, 8193)
    with pytest.raises(ValueError, match="reads at most 8190"):
        Windowed(Conditioned(sibling, [65, 66]), 8192)
    assert context_length(Windowed(sibling, 64)) is None
    assert context_length(Ensemble([Conditioned(sibling, [65]), sibling], ConstantMixing([0.5, 0.5]))) == 8191


# --- no end ------------------------------------------------------------------------------------------


def test_endless_rows_have_the_usual_law_up_to_their_end() -> None:
    model = MarkovModel.random(3, seed=0, eos=(2,))
    endless = exact.sequence_law(Endless(model), [0], max_new_tokens=3)
    usual = exact.sequence_law(model, [0], max_new_tokens=3)
    cut: dict[tuple[int, ...], float] = {}
    for row, p in zip(endless.rows, np.exp(np.asarray(endless.log_probs)), strict=True):
        stop = row.index(2) + 1 if 2 in row else len(row)
        cut[tuple(row[:stop])] = cut.get(tuple(row[:stop]), 0.0) + float(p)
    expected = dict(zip(map(tuple, usual.rows), np.exp(np.asarray(usual.log_probs)).tolist(), strict=True))
    assert cut == pytest.approx(expected, abs=1e-12)
    assert CESampler(Endless(model)).sample([0], n=50, max_new_tokens=9, seed=0).tokens.shape == (50, 9)
