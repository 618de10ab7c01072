"""The time of one forward, from a few measured ones.

`calibrate` asks for forwards of one row that feeds 1, 2, 4, ... tokens, forwards of many rows that feed one each, and
one shape at two contexts. It takes time as the sum of three curves: what tokens cost, what laws cost, and what keys
cost. Nothing smoother holds: on a CPU the second token may cost half a forward, where a matrix-vector product
becomes a matrix product, and the next fifteen nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """One measured forward: `rows` rows that each feed `span` tokens, behind `context` tokens each; median seconds."""

    rows: int
    span: int
    context: int
    seconds: float

    @property
    def fed(self) -> int:
        """Tokens fed."""
        return self.rows * self.span

    @property
    def keys(self) -> int:
        """Keys that the rows look at."""
        return self.rows * (self.context + self.span)


@dataclass(frozen=True, eq=False)
class Measured:
    r"""Time of a forward, :math:`t = A(\mathrm{fed}) + D(\mathrm{rows}) + κ \, \mathrm{context}`, as calibrated.

    A, the time of tokens, and D, that of laws beyond the first, are non-decreasing, linear between their knots and
    beyond the last. Both, and κ >= 0, are fitted together.

    Attributes
    ----------
    fed, fed_seconds
        Knots of A, and A there, at no context.
    rows, rows_seconds
        Knots of D, from 1 where it is 0, and D there.
    per_key
        κ, seconds for each key that a row looks at.
    worst_error
        Largest relative error on the spans that it was fitted to.
    """

    fed: tuple[int, ...]
    fed_seconds: tuple[float, ...]
    rows: tuple[int, ...]
    rows_seconds: tuple[float, ...]
    per_key: float
    worst_error: float

    def seconds(self, rows: ArrayLike, fed: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds (F,) of forwards that read `rows` laws, are fed `fed` tokens and look at `context` keys."""
        tokens = _along(fed, self.fed) @ np.diff(self.fed_seconds, prepend=0.0)
        laws = _along(rows, self.rows)[..., 1:] @ np.diff(self.rows_seconds)
        return np.asarray(tokens + laws + self.per_key * np.asarray(context, dtype=np.float64))

    @property
    def span_cost(self) -> dict[int, float]:
        """Time of one row that feeds n tokens over that of one that feeds 1, at each knot, keys aside (claim C5)."""
        return {n: second / self.fed_seconds[0] for n, second in zip(self.fed, self.fed_seconds, strict=True)}


def calibrate(spans: Sequence[Span]) -> Measured:
    """The three curves of `Measured`, by non-negative least squares on the relative errors of all `spans`.

    The knots of A are the lengths measured with one row; those of D the numbers of rows measured. More spans than knots
    average their noise. Give the second context to the most rows, where keys show. What lies far beyond the largest
    knots is extrapolated: measure as far as you ask.

    Raises ValueError unless there are spans of one row with 1 token and with more, of several rows, and of one shape at
    two contexts.

    >>> grid = [(1, n, 100) for n in (1, 2, 4, 8)] + [(n, 1, 100) for n in (2, 8)] + [(1, 1, 500)]
    >>> spans = [Span(r, s, c, 0.02 + 1e-3 * r * s + 5e-4 * (r - 1) + 1e-6 * r * (c + s)) for r, s, c in grid]
    >>> time = calibrate(spans)
    >>> time.seconds([4, 1], [4, 100], [800, 300]).round(6).tolist()
    [0.0263, 0.1203]
    """
    spans = list(spans)
    _check(spans)
    rows, fed, keys, seconds = (
        np.array([getattr(span, name) for span in spans], dtype=np.float64)
        for name in ("rows", "fed", "keys", "seconds")
    )
    lengths = tuple(sorted({span.span for span in spans if span.rows == 1}))
    numbers = tuple(sorted({1, *(span.rows for span in spans)}))
    # Unknowns are increments from knot to knot, so that at least 0 means non-decreasing.
    design = np.hstack([_along(fed, lengths), _along(rows, numbers)[:, 1:], keys[:, None]])
    scale = 1 / np.linalg.norm(design / seconds[:, None], axis=0)
    found = scale * nnls(design / seconds[:, None] * scale, np.ones(len(spans)))[0]
    tokens, laws, per_key = np.split(found, [len(lengths), len(found) - 1])
    return Measured(
        lengths,
        tuple(tokens.cumsum().tolist()),
        numbers,
        (0.0, *laws.cumsum().tolist()),
        float(per_key[0]),
        float(np.abs(design @ found / seconds - 1).max()),
    )


def _along(values: ArrayLike, knots: Sequence[int]) -> Floats:
    """(..., len(knots)): how far `values` have come along each stretch that ends at a knot, 1 at its end.

    The first entry is the constant. The last stretch goes on for ever.
    """
    x = np.asarray(values, dtype=np.float64)[..., None]
    at = np.asarray(knots, dtype=np.float64)
    if len(at) == 1:
        return np.ones_like(x)
    part = (x - at[:-1]) / np.diff(at)
    top = np.ones(len(at) - 1)
    top[-1] = np.inf
    return np.concatenate([np.ones_like(x), np.clip(part, 0.0, top)], axis=-1)


def _check(spans: Sequence[Span]) -> None:
    for span in spans:
        if min(span.rows, span.span) < 1 or span.context < 0:
            raise ValueError(f"spans has {span}: rows and span must be at least 1, context at least 0")
        if not np.isfinite(span.seconds) or span.seconds <= 0:
            raise ValueError(f"spans has {span}: seconds must be finite and positive; measure it again")
    alone = {span.span for span in spans if span.rows == 1}
    if 1 not in alone or len(alone) < 2:
        raise ValueError("spans must have one row with span=1 and with a longer one; without them tokens have no cost")
    if all(span.rows == 1 for span in spans):
        raise ValueError("spans must have a forward of several rows; without one laws have no cost")
    shapes = {(span.rows, span.span) for span in spans}
    if len({(span.rows, span.span, span.context) for span in spans}) == len(shapes):
        raise ValueError("spans must have one shape (rows, span) at two contexts; without it keys have no cost")
