from __future__ import annotations

import numpy as np
import torch

from me_stats.models import TableModel
from me_stats.models.moving import MovingRows


def test_rows_that_moved_read_their_new_prefixes_and_the_others_their_own() -> None:
    model = TableModel.random(3, seed=0, order=3)
    prefixes = [(0,), (1, 2), (2, 0, 1), (1,)]
    rows = MovingRows(model, prefixes, max_new_tokens=8)
    rng = np.random.default_rng(0)
    for step in range(12):
        chosen = np.sort(rng.choice(4, size=rng.integers(0, 4), replace=False))
        fresh = [tuple(rng.integers(0, 3, 1 + step % 3).tolist()) for _ in chosen]
        rows.move(chosen, fresh)
        for row, prefix in zip(chosen.tolist(), fresh, strict=True):
            prefixes[row] = prefix
        told, tokens = rng.permutation(4)[:3], rng.integers(0, 3, 3)
        rows.append(told, torch.from_numpy(tokens))
        for row, token in zip(told.tolist(), tokens.tolist(), strict=True):
            prefixes[row] = (*prefixes[row], token)
        read = rng.permutation(4)[: rng.integers(1, 5)]
        assert torch.equal(rows.log_probs(read), model.log_probs([prefixes[row] for row in read]))


def test_a_session_ends_with_its_last_row_and_its_work_counts_on() -> None:
    rows = MovingRows(TableModel.random(3, seed=0, order=3), [(0,)] * 3)
    rows.log_probs(np.arange(3))
    for mine in ([0], [1, 2], [0, 1, 2]):
        rows.move(np.array(mine), [(1,)] * len(mine))
    assert len(rows.sessions) == 1
    assert rows.cost.reads == 3
    rows.log_probs(np.arange(3))
    assert rows.cost.reads == 6
