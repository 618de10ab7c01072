"""The package's strategies, with a router and a model of someone else that only its own tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from me_stats.mixing import Mixing
from me_stats.models import TableModel
from me_stats.testing.strategies import (
    LAW_KINDS,
    ensembles,
    horizons,
    law_rows,
    prompts,
    seeds,
    simplex,
    table_models,
    warps,
)
from me_stats.vocabulary import Vocabulary

__all__ = [
    "LAW_KINDS",
    "LastTokenMixing",
    "OutsideModel",
    "ensembles",
    "horizons",
    "law_rows",
    "prompts",
    "seeds",
    "simplex",
    "table_models",
    "warps",
]


class LastTokenMixing(Mixing):
    """A router that reads the last token: weights (V + 1, K), row 0 for the empty prefix.

    A rule that reads the previous *component* cannot be written as a Mixing, which sees prefixes only. That is
    what keeps ME exact, so such a control has to be a sampler (see `samplers.controls`).
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = np.asarray(weights, dtype=float)
        self.n_components = self._weights.shape[1]

    def log_weights(self, prefixes: Sequence[Sequence[int]]) -> Any:
        rows = [prefix[-1] + 1 if len(prefix) else 0 for prefix in prefixes]
        return torch.from_numpy(self._weights[rows].reshape(-1, self.n_components)).log()


@dataclass
class OutsideModel:
    """A language model by someone else: no base class, no session, numpy laws."""

    table: TableModel

    def __post_init__(self) -> None:
        self.vocabulary: Vocabulary = self.table.vocabulary
        self.calls = 0

    def log_probs(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray:
        self.calls += 1
        return self.table.log_probs(prefixes).numpy()
