"""Rows from any sampler, in one form, with what no law could have written told apart."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from me_stats.samplers.base import Sampler
from me_stats.trace import require_independent_rows
from me_stats.vocabulary import Vocabulary

Rows = list[list[int]]


class Source:
    """A sampler with its prompts, which draws batch after batch, each with a seed of its own.

    Rows come prompt after prompt: row p·n + j is the j-th continuation of prompt p.
    """

    def __init__(
        self, sampler: Any, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, seed: int, *, stream: int = 0
    ) -> None:
        if not (isinstance(sampler, Sampler) or callable(sampler)):
            raise TypeError(
                "sampler must be a me_stats sampler or a callable (prompts, *, max_new_tokens, seed) -> ids, got "
                f"{type(sampler).__name__}; me_stats.testing.adapters wraps other kinds"
            )
        require_independent_rows(sampler, "check_sampler")
        self.sampler, self.prompts, self.max_new_tokens = sampler, tuple(prompts), max_new_tokens
        self._entropy = (operator.index(seed), stream)
        self._batches = 0

    def draw(self, n: int) -> Rows:
        """`n` fresh continuations of every prompt."""
        # 31 bits, which every random number generator and server takes.
        words = np.random.SeedSequence([*self._entropy, self._batches]).generate_state(1)
        seed = int(words[0] >> 1)
        self._batches += 1
        if isinstance(self.sampler, Sampler):
            trace = self.sampler.sample(self.prompts, n=n, max_new_tokens=self.max_new_tokens, seed=seed)
            return trace.sequences()
        expanded = [prompt for prompt in self.prompts for _ in range(n)]
        return as_rows(self.sampler(expanded, max_new_tokens=self.max_new_tokens, seed=seed), len(expanded))


def as_rows(ids: Any, rows: int) -> Rows:
    """Ragged rows of ids from lists or from an array (B, T) padded with -1.

    >>> as_rows(np.array([[1, 2], [3, -1]]), 2)
    [[1, 2], [3]]
    """
    if isinstance(ids, torch.Tensor):
        ids = ids.cpu().numpy()
    if isinstance(ids, np.ndarray) and (ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer)):
        raise TypeError(f"sampler must return integer ids (B, T), got shape {ids.shape} of {ids.dtype}")
    try:
        listed = [[operator.index(token) for token in (row.tolist() if hasattr(row, "tolist") else row)] for row in ids]
    except TypeError as error:
        raise TypeError(f"sampler must return one row of integer ids per prompt: {error}") from error
    if len(listed) != rows:
        raise ValueError(f"sampler must return one row per prompt: {rows} prompts, {len(listed)} rows")
    cut = []
    for row in listed:
        length = len(row)
        while length and row[length - 1] == -1:
            length -= 1
        cut.append(row[:length])
    return cut


def structural_faults(rows: Rows, vocabulary: Vocabulary | None, max_new_tokens: int) -> str:
    """The first thing that no law over the vocabulary could have written, in words; empty if there is none.

    >>> structural_faults([[1, 0], [0, 1]], Vocabulary(2, eos=(0,)), 2)
    'row 1 goes on after end-of-sequence token 0'
    """
    for number, row in enumerate(rows):
        if len(row) > max_new_tokens:
            return f"row {number} has {len(row)} tokens, more than max_new_tokens={max_new_tokens}"
        if vocabulary is None:
            continue
        outside = next((token for token in row if not 0 <= token < vocabulary.size), None)
        if outside is not None:
            return f"row {number} holds id {outside}, outside the vocabulary 0..{vocabulary.size - 1}"
        end = next((place for place, token in enumerate(row) if token in vocabulary.eos), None)
        if end is not None and end + 1 < len(row):
            return f"row {number} goes on after end-of-sequence token {row[end]}"
        if end is None and len(row) < max_new_tokens:
            return f"row {number} stops after {len(row)} of {max_new_tokens} tokens without an end-of-sequence token"
    return ""
