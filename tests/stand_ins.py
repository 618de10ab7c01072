"""What several tests put in the place of the real thing: a planted bug, and draws that keep a ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from me_stats.draws import Draw, RowStreams, Stream
from me_stats.models import TopK, TransformersModel, ragged
from me_stats.models.moving import feed
from me_stats.samplers import MESampler


class Ungrouped(MESampler):
    """Planted bug: claims to share component draws, and every row has its own."""

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        return draw(log_weights, rows, step, stream="component").numpy()


class Ledger(RowStreams):
    """Keeps the addresses that were asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: list[tuple[str, int, int]] = []

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        self.asked += [(stream, row, step) for row in rows.tolist()]
        return super().__call__(log_law, rows, step, stream=stream, index=index)


def reads_alone(self: Any, rows: np.ndarray) -> None:
    """Planted `AlignedSession._catch_up`: each string is tokenised by itself, as token-by-token re-encoding does."""
    for row in rows.tolist():
        known = self._aligned.token_bytes.bytes_of(self._read[row])
        tail = self._aligned.read(self._history[row][len(known) :])
        feed(self._rows, np.array([row]), [tail])
        self._read[row] = (*self._read[row], *tail)
    self._stale[rows] = False


def stale_cache(patch: pytest.MonkeyPatch) -> None:
    """Planted bug: a session of transformers that does not see the newest token."""
    run = ragged.RaggedSession._run

    def stale(self: Any, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> Any:
        stops = np.maximum(stops - 1, self._prompt_length[rows])
        return run(self, rows, np.minimum(starts, stops - reads), stops, reads)

    patch.setattr(ragged.RaggedSession, "_run", stale)
    past_the_gate(patch)


def past_the_gate(patch: pytest.MonkeyPatch) -> None:
    """A model that is opened compares a few tokens itself; others have to see the bug without that."""
    patch.setattr(TransformersModel, "_probe", lambda self: None)


def toothless_transform(patch: pytest.MonkeyPatch) -> None:
    """Planted bug: top-k that truncates nothing."""
    patch.setattr(TopK, "__call__", lambda self, law: law)
