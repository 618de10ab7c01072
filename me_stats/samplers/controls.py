"""Named controls: samplers that look like ME and are not, so that every test can show what it catches."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from me_stats.draws import Draw
from me_stats.samplers import tabular
from me_stats.samplers.mixture import MESampler


class SequenceMixtureSampler(MESampler):
    r"""One component per sequence: :math:`\sum_i λ_i \prod_t P_i(x_t | x_{<t})`, not the CE law.

    Its first token has the CE law, and every later token follows the component of the first: marginal
    tests of single tokens have little to see, tests of dependence along a sequence see it at once.
    """

    def _plan(self) -> tabular.Plan | None:
        return tabular.Plan.ancestral(self.model, redraw=False, shared_rows=self.shared_rows)

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        if step == 0:
            drawn = super()._components(log_weights, rows, positions, step, draw, memory)
            memory["component"] = dict(zip(positions.tolist(), drawn.tolist(), strict=True))
        kept = memory["component"]
        return np.array([kept[position] for position in positions.tolist()], dtype=np.int64)
