"""Padded forwards must be the exact ones; on a device they are captured and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from me_stats.models import graphs
from me_stats.models.graphs import GraphPool, Graphs, rounded
from me_stats.models.huggingface import TransformersModel
from me_stats.models.layout import Sizes, index_arrays
from me_stats.models.slots import SlotCache
from tests.models.test_ragged import prompts, replay, tolerance
from tests.networks import FAMILIES, tiny, total_variation

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def padded(family: str = "llama", **options: Any) -> TransformersModel:
    """A model whose sessions run padded forwards of few shapes, without capturing them."""
    model = tiny(family, **options)
    model._graphs = GraphPool(model.network, model.vocabulary.size, capture=False)
    return model


def distance(model: TransformersModel, *, seeds: range = range(2)) -> float:
    """Largest distance of a random run from the definition; runs share one pool, so storage is used again."""
    worst = 0.0
    for seed in seeds:
        session = model.session(prompts(), max_new_tokens=32)
        for prefixes, laws in replay(session, prompts(), seed):
            worst = max(worst, float(total_variation(laws, model.log_probs(prefixes)).max()))
        del session
        gc.collect()
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_forwards_keep_the_law(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = counted(monkeypatch)
    model = padded(family)
    assert distance(model) < tolerance(model)
    assert sum(used) > 20


def counted(patch: pytest.MonkeyPatch) -> list[bool]:
    """Which forwards ran padded."""
    used: list[bool] = []
    laws = Graphs.laws

    def noted(self: Graphs, *given: Any) -> Any:
        out = laws(self, *given)
        used.append(out is not None)
        return out

    patch.setattr(Graphs, "laws", noted)
    return used


def test_rounded_sizes_hold_the_exact_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        spans = rng.integers(1, 9, rng.integers(1, 40))
        starts = rng.integers(0, 300, len(spans))
        sizes = Sizes.of(starts, starts + spans, np.ones_like(spans))
        big = rounded(sizes, 512)
        assert all(a <= b for a, b in zip(sizes.lengths, big.lengths, strict=True))
        assert sizes.visible <= big.visible <= 512
        arrays = index_arrays(big, np.arange(len(spans)), starts, starts + spans, np.ones_like(spans), spare=99)
        assert len(arrays) == sum(big.lengths)


def test_storage_is_lent_to_one_session_at_a_time_and_comes_back() -> None:
    model = padded()
    first, second = (model.session([(3, 4)], max_new_tokens=8) for _ in range(2))
    assert first._cache is not second._cache  # type: ignore[attr-defined]
    kept = first._cache  # type: ignore[attr-defined]
    del first
    gc.collect()
    assert model.session([(5,)], max_new_tokens=8)._cache is kept  # type: ignore[attr-defined]


def test_graphs_need_a_device() -> None:
    with pytest.raises(ValueError, match="graphs=True needs a CUDA device"):
        tiny(graphs=True)


# --- planted bugs ---------------------------------------------------------------------------------------


def padding_in_a_slot_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotCache, "spare", property(lambda self: 0))


def masks_of_an_earlier_forward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graphs.Layout, "forget", lambda self: self._layers.clear())


def tokens_of_an_earlier_forward(patch: pytest.MonkeyPatch) -> None:
    run = Graphs._run

    def late(self: Graphs, captured: Any) -> Any:
        captured.tokens[0] = 2
        return run(self, captured)

    patch.setattr(Graphs, "_run", late)


@pytest.mark.parametrize("plant", [padding_in_a_slot_in_use, masks_of_an_earlier_forward, tokens_of_an_earlier_forward])
def test_planted_bugs_leave_the_law(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: Any) -> None:
    model = padded()
    floor = tolerance(model)
    plant(monkeypatch)
    assert distance(model) > 100 * floor


# --- on a device ----------------------------------------------------------------------------------------


@CUDA
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt_oss"}))
def test_replayed_forwards_keep_the_law(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = counted(monkeypatch)
    model = tiny(family, device="cuda", graphs=True)
    assert distance(model, seeds=range(4)) < tolerance(model)
    assert sum(used) > 20


@CUDA
def test_a_network_that_cannot_be_captured_runs_without_and_says_so() -> None:
    # Its experts copy their counts to the host, which no graph can hold.
    with pytest.warns(UserWarning, match="runs without CUDA graphs"):
        assert not tiny("gpt_oss", device="cuda", graphs=None).graphs
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph"):
        tiny("gpt_oss", device="cuda", graphs=True)


@CUDA
def test_a_law_outlives_the_next_replay() -> None:
    model = tiny(device="cuda", graphs=True)
    session = model.session([(3, 4)], max_new_tokens=16)
    row, laws = np.array([0]), []
    for token in (5, 6, 7, 8):
        laws.append(session.log_probs(row))
        session.append(row, torch.tensor([token], device="cuda"))
    before = [law.clone() for law in laws]
    session.log_probs(row)
    assert all(bool((a == b).all()) for a, b in zip(before, laws, strict=True))
