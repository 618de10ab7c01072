from __future__ import annotations

import numpy as np
import pytest
import torch

from me_stats.chi_square import chi_square_gof
from me_stats.routers import NgramRouter, RecurrentRouter, RouterMixing
from tests.routers.toys import scrambled


def test_the_hash_is_the_same_everywhere() -> None:
    router = NgramRouter(2, order=3, buckets=1 << 14)
    assert router.features([(), (0,), (49151, 7, 255)]) is not None
    assert router.features([(49151, 7, 255)])[0].tolist() == HASHED


def test_only_the_last_tokens_matter_and_their_order_does() -> None:
    mixing = RouterMixing(scrambled(NgramRouter(2, order=2)))
    same = mixing.log_weights([(1, 2, 3), (0, 0, 2, 3), (2, 3)])
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    other = mixing.log_weights([(2, 3), (3, 2), (3,), ()])
    assert len({tuple(row) for row in other.tolist()}) == 4


def test_grams_of_different_lengths_have_buckets_of_their_own() -> None:
    # Where nothing stands before the first token, the mark counts: (x) at the start is not (x) after something.
    at_start, later = NgramRouter(2, order=2).features([(5,), (9, 5)])
    assert at_start[1, 0] == later[2, 0]
    assert at_start[1, 1] != later[2, 1]


def test_buckets_are_filled_evenly() -> None:
    rng = np.random.default_rng(0)
    distinct = np.unique(rng.integers(0, 50_000, (200_000, 2)), axis=0)
    found = NgramRouter(2, order=2, buckets=64)._buckets(distinct)[:, 1].numpy()
    counts = np.bincount(found, minlength=64)
    assert chi_square_gof(counts, np.full(64, 1 / 64)).pvalue > 1e-9
    # Consecutive ids are what a weak hash lines up.
    runs = NgramRouter(2, order=1, buckets=64)._buckets(np.arange(64_000)[:, None])[:, 0].numpy()
    assert chi_square_gof(np.bincount(runs, minlength=64), np.full(64, 1 / 64)).pvalue > 1e-9
    assert chi_square_gof(np.bincount(runs // 2, minlength=64), np.full(64, 1 / 64)).pvalue < 1e-9


def test_options_and_ids_are_checked() -> None:
    with pytest.raises(ValueError, match="order must be an integer of at least 1"):
        NgramRouter(2, order=0)
    with pytest.raises(ValueError, match="buckets must be an integer of at least 1"):
        NgramRouter(2, buckets=0)
    with pytest.raises(ValueError, match="token ids of at least 0, got -1"):
        NgramRouter(2).features([(0, -1)])
    with pytest.raises(ValueError, match=r"outside the vocabulary 0\.\.3"):
        RecurrentRouter(2, 4).features([(0, 4)])
    with pytest.raises(ValueError, match="width must be an integer of at least 1"):
        RecurrentRouter(2, 4, width=0)


HASHED = [[3503, 15983, 16017], [16051, 8917, 6960], [2755, 8202, 11028], [4941, 13704, 5037]]
