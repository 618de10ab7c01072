"""Speculative repairs with one thing wrong, and one that is right in another way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw, Stream
from me_stats.models.shared import Reading
from me_stats.samplers import SpeculativeSampler


class RepairsFromTarget(SpeculativeSampler):
    """Redraws a rejected token from q, where only (q - p)+ is left to be written."""

    def _left_over(self, reading: Reading, q: Tensor, p: Tensor) -> Tensor:
        return q


class AcceptsAll(SpeculativeSampler):
    """Takes every draft that the target can write."""

    def _proposal(self, reading: Reading, rows: np.ndarray, steps: np.ndarray) -> Tensor:
        return reading.law(self.model)


class JudgesByTheOther(SpeculativeSampler):
    """Judges the drafts of all components by the law of the first."""

    def _proposal(self, reading: Reading, rows: np.ndarray, steps: np.ndarray) -> Tensor:
        return reading.law(self.draft.components[0])


class JudgesByTheWriter(SpeculativeSampler):
    """Judges a draft by the component m that wrote it, with min(1, q/P_m) and repairs from (q - P_m)+.

    Exact too, and accepted less often: TV(Σ λ_m P_m, q) <= Σ λ_m TV(P_m, q).
    """

    def _propose(self, reading: Reading, rows: np.ndarray, steps: np.ndarray, draw: Draw) -> np.ndarray:
        self._chosen: dict[tuple[int, int], int] = getattr(self, "_chosen", {})

        def noting(
            log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
        ) -> Tensor:
            drawn = draw(log_law, rows, step, stream=stream, index=index)
            if stream == "component":
                self._chosen |= {(row, step): i for row, i in zip(rows.tolist(), drawn.tolist(), strict=True)}
            return drawn

        return super()._propose(reading, rows, steps, noting)

    def _proposal(self, reading: Reading, rows: np.ndarray, steps: np.ndarray) -> Tensor:
        laws = torch.stack([reading.law(component) for component in self.draft.components])
        wrote = [self._chosen[place] for place in zip(rows.tolist(), steps.tolist(), strict=True)]
        return laws[torch.tensor(wrote), torch.arange(len(rows))]


class RepairsForTheDraft(JudgesByTheWriter):
    """Judges by P_m, but repairs from (q - p)+ of the whole draft."""

    def _left_over(self, reading: Reading, q: Tensor, p: Tensor) -> Tensor:
        return super()._left_over(reading, q, reading.law(self.draft).double().exp())
