"""Do rows repeat each other more often than their law says? A bet on copies, for samplers whose seed has no effect.

For each row the alternative is the law itself, with a share ε put on what a copy would be::

    E = prod_r [(1 - ε) + ε 1{x_r = copy_r}/p(x_r)]

where copy_r is the row before it (rows that share random numbers), the row at its place in the batch before (a seed
without effect), or an earlier row of its prompt chosen at random (seeds that come back). All are predictable, so E
is a non-negative martingale when rows are independent with law p: an e-process as in `eprocess`, valid at any time. One
copied row of T tokens is worth T times the entropy rate, in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_SHARES = np.array([1e-4, 1e-2, 0.3, 0.9])
_KINDS = ("the row before", "the row at the same place of the batch before", "any earlier row of the prompt")


class RepeatProcess:
    """Evidence that rows copy earlier rows: the average over three kinds of copies and shares ε of 1e-4, .01, .3, .9.

    >>> process = RepeatProcess()
    >>> row = [3, 1, 2, 2, 0, 1]  # a row of probability 4^-6, drawn three times
    >>> process.update([0, 0, 0], [row, row, row], np.full(3, -6 * math.log(4))) > math.log(1e5)
    True
    >>> process.worst
    'the row before'
    """

    def __init__(self) -> None:
        self.log_sup = 0.0
        self._log_wealth = np.zeros((len(_KINDS), len(_SHARES)))
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._rows: Counter[int] = Counter()
        self._batch: dict[tuple[int, int], tuple[int, ...]] = {}

    def update(self, groups: Sequence[int], rows: Sequence[Sequence[int]], log_probs: ArrayLike) -> float:
        """Feed a batch of N rows of ids, the number of the prompt of each, and their log-probabilities (N,) in nats.

        Returns log E (nats). Rows of probability zero are left out. Raises ValueError for NaN or lengths that differ.
        """
        log_p = np.asarray(log_probs, dtype=float)
        if log_p.shape != (len(rows),) or len(groups) != len(rows):
            raise ValueError(f"rows, groups and log_probs must have one entry a row, got {len(rows)}, {len(groups)}")
        if not (log_p <= 1e-3).all():  # NaN compares false
            raise ValueError("log_probs must be natural log-probabilities of whole rows, at most 0 and without NaN")
        places: Counter[int] = Counter()
        batch: dict[tuple[int, int], tuple[int, ...]] = {}
        for group, row, log_prob in zip(groups, rows, log_p.tolist(), strict=True):
            place, key = places[group], (group, *row)
            places[group] += 1
            batch[group, place] = key
            if log_prob > -math.inf:
                self._bet(key, group, place, batch, log_prob)
        self._batch = batch
        return self.log_e

    def _bet(
        self, key: tuple[int, ...], group: int, place: int, batch: dict[tuple[int, int], tuple[int, ...]], log_p: float
    ) -> None:
        earlier = self._rows[group]
        # Probability of this row under each kind of copy; a kind with nothing to copy does not bet.
        chances = (
            _chance(batch.get((group, place - 1)), key),
            _chance(self._batch.get((group, place)), key),
            self._seen[key] / earlier if earlier else None,
        )
        for kind, chance in enumerate(chances):
            if chance is not None:
                log_ratio = math.log(chance) - log_p if chance else -math.inf
                self._log_wealth[kind] += np.logaddexp(np.log1p(-_SHARES), np.log(_SHARES) + log_ratio)
        self.log_sup = max(self.log_sup, self.log_e)
        self._seen[key] += 1
        self._rows[group] += 1

    @property
    def log_e(self) -> float:
        """log E now (nats)."""
        return float(np.logaddexp.reduce(self._log_wealth, axis=None)) - math.log(self._log_wealth.size)

    @property
    def pvalue(self) -> float:
        """Anytime-valid p-value ``min(1, 1/sup E)``."""
        return math.exp(-self.log_sup)

    @property
    def worst(self) -> str:
        """The kind of copy with the largest E now."""
        return _KINDS[int(self._log_wealth.max(1).argmax())]


def _chance(copied: tuple[int, ...] | None, key: tuple[int, ...]) -> float | None:
    return None if copied is None else float(copied == key)
