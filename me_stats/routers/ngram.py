"""A router that reads the last few tokens: softmax regression on hashed n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, Prefix
from me_stats.routers.base import Router, at_least

# The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of a token reaches every bit of its bucket.
_GOLDEN, _FIRST, _SECOND = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class NgramRouter(Router):
    r"""Softmax regression, :math:`s(c) = \sum_{n=1}^{\text{order}} E[h_n(\text{last } n \text{ tokens})]`.

    Each n-gram has a bucket of K floats, found by a hash of token ids that is the same on every machine. Before the
    first token stands a mark of its own, so that a document's start is a context too. Unrelated n-grams share a
    bucket once there are many more of them than buckets.

    Parameters
    ----------
    order
        Longest n-gram, at least 1.
    buckets
        Rows of the table, for all n together.

    Examples
    --------
    >>> router = NgramRouter(3, order=2, buckets=64)
    >>> router.features([(5, 6)])[0].shape, router.n_parameters
    (torch.Size([3, 2]), 195)
    """

    learning_rate = 0.05

    def __init__(self, n_components: int, *, order: int = 3, buckets: int = 1 << 14) -> None:
        super().__init__(n_components)
        self.order, self.buckets = at_least(1, order=order), at_least(1, buckets=buckets)
        self.table = torch.nn.Parameter(torch.zeros(buckets, n_components))

    def features(self, sequences: Sequence[Prefix]) -> list[Tensor]:
        return [self._buckets(windows) for windows in map(self._windows, sequences)]

    def scores(self, features: Tensor) -> Tensor:
        return torch.nn.functional.embedding(features, self.table).sum(-2)

    def stream(self, prompts: Sequence[Prefix]) -> _NgramStream:
        return _NgramStream(self, prompts)

    def options(self) -> dict[str, Any]:
        return {"n_components": self.n_components, "order": self.order, "buckets": self.buckets}

    def _windows(self, tokens: Prefix) -> np.ndarray:
        """(T + 1, order) the tokens before each place, newest first; -1 before the first token."""
        padded = np.concatenate([np.full(self.order, -1, dtype=np.int64), _ids(tokens)])
        return np.lib.stride_tricks.sliding_window_view(padded, self.order)[:, ::-1]

    def _buckets(self, windows: np.ndarray) -> Tensor:
        """(B, order) the bucket of the newest 1, 2, .. order tokens of each window (B, order)."""
        words = (windows + 2).astype(np.uint64)  # 1 marks the start
        found = np.empty(windows.shape, dtype=np.int64)
        state = np.zeros(len(windows), dtype=np.uint64)
        for n in range(self.order):
            state = _mix(state + _GOLDEN * words[:, n])
            found[:, n] = state % np.uint64(self.buckets)
        return torch.from_numpy(found)


class _NgramStream:
    def __init__(self, router: NgramRouter, prompts: Sequence[Prefix]) -> None:
        self._router = router
        self._windows = np.array(
            [router._windows(prompt[-router.order :])[-1] for prompt in prompts], dtype=np.int64
        ).reshape(-1, router.order)
        self.cost = Cost()

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._windows[rows, 1:] = self._windows[rows, :-1]
        self._windows[rows, 0] = tokens.numpy()

    def scores(self, rows: np.ndarray) -> Tensor:
        return self._router.scores(self._router._buckets(self._windows[rows]))


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def _ids(tokens: Prefix) -> np.ndarray:
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if len(ids) and ids.min() < 0:
        raise ValueError(f"prefixes must hold token ids of at least 0, got {ids.min()}")
    return ids
