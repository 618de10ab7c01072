"""Laws at the last few positions of a row, read at once: `log_probs_along` of sessions with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Cost, Endless, Ensemble, TopK, TransformersModel, Warped, Windowed, ragged
from me_stats.models.layout import Layout
from me_stats.models.ragged import RaggedSession
from me_stats.models.shared import PrefixLookback, open_lookback
from me_stats.samplers import SpeculativeSampler
from tests.networks import FAMILIES, V, tiny, total_variation

PROMPTS = [(5, 6, 7), (5, 6, 7), (9,), (5, 6, 7), (11, 12, 13, 14, 15)]


@pytest.fixture(scope="module")
def sibling() -> TransformersModel:
    return TransformersModel("bundled:prose")


def walk(model: Any, *, seed: int, rounds: int = 16, size: int = V) -> float:
    """Largest TV from the definition while rows grow, are read late, are read along, and take back what they wrote.

    The first row stays unread for long, so that the prompt that others share is computed by another.
    """
    rng = np.random.default_rng(seed)
    session, prefixes = open_lookback(model, PROMPTS, max_new_tokens=8), list(PROMPTS)
    worst = 0.0
    for turn in range(rounds):
        drafted = np.zeros(len(PROMPTS), dtype=np.int64)
        for _ in range(rng.integers(0, 4)):
            rows = rng.permutation(np.flatnonzero(rng.random(len(PROMPTS)) < 0.6))
            tokens = rng.integers(2, size, len(rows))
            session.append(rows, torch.from_numpy(tokens))
            drafted[rows] += 1
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                prefixes[row] = (*prefixes[row], token)
            if rng.random() < 0.3:
                session.log_probs(rng.permutation(rows[: len(rows) // 2]))
        asked = rng.random(len(PROMPTS)) < 0.7
        asked[0] &= turn > rounds // 2
        rows = rng.permutation(np.flatnonzero(asked))
        if not len(rows):
            continue
        # Sometimes further back than what was drafted, into the prompt.
        counts = np.array([rng.integers(0, min(len(prefixes[row]), drafted[row] + 3)) for row in rows])
        laws = session.log_probs_along(rows, counts)
        worst = max(worst, float(total_variation(laws, defined(model, prefixes, rows, counts)).max()))
        taken = np.minimum(rng.integers(0, 3, len(rows)), counts)
        session.drop(rows, taken)
        for row, count in zip(rows.tolist(), taken.tolist(), strict=True):
            prefixes[row] = prefixes[row][: len(prefixes[row]) - count]
    return worst


def defined(model: Any, prefixes: Sequence[tuple[int, ...]], rows: np.ndarray, counts: np.ndarray) -> Tensor:
    pairs = zip(rows.tolist(), counts.tolist(), strict=True)
    found: Tensor = model.log_probs(
        [prefixes[row][: len(prefixes[row]) - back] for row, count in pairs for back in range(count, -1, -1)]
    )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_along_is_the_definition(family: str) -> None:
    model = tiny(family)
    assert type(open_lookback(model, PROMPTS)) is RaggedSession
    assert max(walk(model, seed=seed) for seed in range(3)) < 1e-4


def test_siblings_and_what_stands_around_them(sibling: TransformersModel) -> None:
    for model in (sibling, Conditioned(sibling, "def "), Endless(Conditioned(sibling, "The "))):
        assert type(open_lookback(model, PROMPTS)) is RaggedSession
        assert walk(model, seed=0, size=256) < 1e-4


def test_a_window_that_hops_cannot_go_back_by_itself(sibling: TransformersModel) -> None:
    model = Windowed(sibling, 8, hop=3)
    assert type(open_lookback(model, PROMPTS)) is PrefixLookback
    assert walk(model, seed=0, rounds=8, size=256) < 1e-4


# --- planted bugs ---------------------------------------------------------------------------------------


def one_position_early(patch: pytest.MonkeyPatch) -> None:
    """Rows are read one position before what was asked, where there is one."""
    build = Layout.__init__

    def early(self: Layout, *given: Any) -> None:
        build(self, *given)
        self.read = (self.read - int(given[4].max() > 1)).clamp(min=0)

    patch.setattr(Layout, "__init__", early)


def in_the_order_of_the_cache(patch: pytest.MonkeyPatch) -> None:
    """Blocks of laws come as the slots do, and not as the rows were asked for."""
    packed = ragged.stretches

    def sorted_blocks(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        order = np.argsort(starts)
        return packed(starts[order], lengths[order])

    patch.setattr(ragged, "stretches", sorted_blocks)


def leaves_a_gap(patch: pytest.MonkeyPatch) -> None:
    """Feeds the tokens that are read after and no others, though the row lags behind them."""
    run = RaggedSession._run

    def short(self: Any, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> Any:
        return run(self, rows, stops - reads, stops, reads)

    patch.setattr(RaggedSession, "_run", short)


def forgets_to_take_back(patch: pytest.MonkeyPatch) -> None:
    """What is dropped keeps its keys and values."""
    drop = RaggedSession.drop

    def faulty(self: Any, rows: np.ndarray, counts: np.ndarray) -> None:
        cached = self._cached[rows]
        drop(self, rows, counts)
        self._cached[rows] = cached

    patch.setattr(RaggedSession, "drop", faulty)


@pytest.mark.parametrize("plant", [one_position_early, in_the_order_of_the_cache, leaves_a_gap, forgets_to_take_back])
def test_planted_bugs_are_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plant(monkeypatch)
    assert max(walk(model, seed=seed) for seed in range(3)) > 0.01


# --- work, counted --------------------------------------------------------------------------------------


def grown(session: Any, rows: Sequence[int], steps: int) -> None:
    for step in range(steps):
        session.append(np.array(rows), torch.full((len(rows),), 2 + step))


def test_one_forward_feeds_what_is_new_and_what_is_read() -> None:
    session: Any = tiny("llama").session([(5, 6, 7), (9,)])
    session.log_probs(np.arange(2))
    assert session.cost == Cost(1, 4, 2)
    grown(session, [0, 1], 4)
    session.log_probs(np.array([0]))
    # Row 0 has all keys and is fed its last three tokens again; row 1 is fed the four that it misses.
    session.log_probs_along(np.array([1, 0]), np.array([1, 2]))
    assert session.cost == Cost(1 + 1 + 1, 4 + 4 + (3 + 4), 2 + 1 + 5)


def test_a_prompt_is_computed_once_for_all_its_rows() -> None:
    session: Any = tiny("llama").session([(5, 6, 7, 8)] * 3)
    grown(session, [0, 1, 2], 2)
    session.log_probs_along(np.arange(3), np.array([2, 2, 2]))
    # The first row feeds prompt and tokens; the others copy it, and feed the three tokens that they are read after.
    assert session.cost == Cost(2, 6 + 3 + 3, 9)


def test_no_position_without_a_token_before_it_is_read() -> None:
    session: Any = tiny("llama").session([(5, 6)])
    with pytest.raises(ValueError, match="a row without tokens has no law"):
        session.log_probs_along(np.array([0]), np.array([2]))
    assert session.log_probs_along(np.array([0]), np.array([1])).shape == (2, V)
    none = np.array([], dtype=np.int64)
    assert session.log_probs_along(none, none).shape == (0, V)


def test_speculation_feeds_a_few_tokens_for_each_that_it_writes() -> None:
    def run(**options: Any) -> Any:
        parts, mixing = [tiny("llama", seed=seed, **options) for seed in (0, 1)], ConstantMixing([0.6, 0.4])
        draft = Ensemble([Warped(part, TopK(10)) for part in parts], mixing)
        sampler = SpeculativeSampler(Warped(Ensemble(parts, mixing), TopK(10)), draft, chunk=3)
        return sampler.sample([[5, 6, 7], [9]], n=2, max_new_tokens=48, seed=1, batch_size=1)

    cached, whole = run(), run(session="prefix")
    assert torch.equal(cached.tokens, whole.tokens)
    assert cached.cost.forwards == whole.cost.forwards
    written = cached.tokens.numel()
    # A network is fed each position at most twice, as draft and as check, and some again after a rejection.
    assert cached.cost.tokens_forwarded < 8 * written
    assert whole.cost.tokens_forwarded > 20 * written
