"""What several tests put in the place of the real thing: a planted bug, and draws that keep a ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from me_stats.draws import Draw, RowStreams, Stream
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
