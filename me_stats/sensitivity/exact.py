"""E_λ f on toys: a polynomial in λ, and its derivatives of any order in forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from me_stats.exact import sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.trace import score
from me_stats.vocabulary import Prompt

Floats = NDArray[np.float64]
Statistic = Callable[[Sequence[int]], float]


@dataclass(frozen=True, eq=False)
class ExpectationPolynomial:
    r"""E_λ f over whole continuations, :math:`\sum_x f(x) \prod_t \sum_i λ_i P_i(x_t | x_{<t})`.

    A polynomial in λ of degree at most T. Enumerate once, then ask at any λ.

    Attributes
    ----------
    step_probs
        (M, T, K) probabilities P_i(x_t | x_<t) of every sequence that some component can write; 1 after the end.
    values
        (M,) f of each sequence.

    Examples
    --------
    >>> from me_stats.models.toy import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)]
    >>> heads_twice = ExpectationPolynomial.enumerate(coins, [], lambda x: float(sum(x) == 2), max_new_tokens=2)
    >>> round(heads_twice.value([0.5, 0.5]), 6)  # 0.4²
    0.16
    >>> heads_twice.gradient([0.5, 0.5]).round(6).tolist()  # 2 · 0.4 · (P_i − 0.4)
    [-0.16, 0.16]
    """

    step_probs: Floats
    values: Floats

    @classmethod
    def enumerate(
        cls, components: Sequence[Any], prompt: Prompt, f: Statistic, *, max_new_tokens: int
    ) -> ExpectationPolynomial:
        """Walk every sequence of up to `max_new_tokens` tokens; `f` takes the token ids of one continuation.

        Raises ValueError for too many sequences (`exact.sequence_law` says how many) or an f that is not finite.
        """
        even = Ensemble(components, ConstantMixing(np.full(len(components), 1 / max(1, len(components)))))
        law = sequence_law(even, prompt, max_new_tokens=max_new_tokens)
        rows = law.rows
        values = np.array([float(f(row)) for row in rows])
        if not np.isfinite(values).all():
            raise ValueError("f must be finite on every continuation that some component can write")
        return cls(score(even, prompt, rows).component_log_probs.exp().numpy(), values)

    def value(self, weights: ArrayLike) -> float:
        """E_λ f at λ = `weights` (K,)."""
        at = self._weights(weights)
        return self._taylor(at, np.zeros_like(at), 0)

    def derivative(self, weights: ArrayLike, direction: ArrayLike, *, order: int = 1) -> float:
        """The derivative of `order` of ε ↦ E_{λ + ε d} f at ε = 0, for a direction d (K,) that sums to 0."""
        if order < 0:
            raise ValueError(f"order must be at least 0, got {order}")
        along = checked_direction(direction, self.step_probs.shape[2])
        return math.factorial(order) * self._taylor(self._weights(weights), along, order)

    def gradient(self, weights: ArrayLike) -> Floats:
        """(K,) derivatives towards each vertex of the simplex: entry i is along e_i − λ, so Σ λ_i g_i = 0."""
        at = self._weights(weights)
        return np.array([self._taylor(at, vertex - at, 1) for vertex in np.eye(len(at))])

    def _taylor(self, weights: Floats, direction: Floats, order: int) -> float:
        """The coefficient of ε^order: forward mode with truncated Taylor series, one product (a + ε b) a step."""
        series = [np.ones(len(self.values))] + [np.zeros(len(self.values)) for _ in range(order)]
        for step in range(self.step_probs.shape[1]):
            a, b = self.step_probs[:, step] @ weights, self.step_probs[:, step] @ direction
            series = [series[0] * a] + [series[k] * a + series[k - 1] * b for k in range(1, order + 1)]
        return float(series[order] @ self.values)

    def _weights(self, weights: ArrayLike) -> Floats:
        at = ConstantMixing(np.asarray(weights, dtype=np.float64)).weights.numpy()
        if len(at) != self.step_probs.shape[2]:
            raise ValueError(f"weights has {len(at)} entries for {self.step_probs.shape[2]} components; give one each")
        return np.asarray(at)


def exact_expectation(
    components: Sequence[Any], prompt: Prompt, f: Statistic, weights: ArrayLike, *, max_new_tokens: int
) -> float:
    """E_λ f by enumeration; to ask at several λ, enumerate an `ExpectationPolynomial` once.

    >>> from me_stats.models.toy import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)]
    >>> round(exact_expectation(coins, [], sum, [0.5, 0.5], max_new_tokens=3), 6)
    1.2
    """
    return ExpectationPolynomial.enumerate(components, prompt, f, max_new_tokens=max_new_tokens).value(weights)


def exact_gradient(
    components: Sequence[Any], prompt: Prompt, f: Statistic, weights: ArrayLike, *, max_new_tokens: int
) -> Floats:
    """(K,) derivatives of E_λ f towards each vertex: entry i is d/dε at λ + ε (e_i − λ), so Σ λ_i g_i = 0.

    A difference of two entries is the derivative along e_i − e_j, which moves weight from j to i.

    >>> from me_stats.models.toy import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)]
    >>> exact_gradient(coins, [], sum, [0.5, 0.5], max_new_tokens=3).round(6).tolist()
    [-0.6, 0.6]
    """
    return ExpectationPolynomial.enumerate(components, prompt, f, max_new_tokens=max_new_tokens).gradient(weights)


def exact_curvature(
    components: Sequence[Any],
    prompt: Prompt,
    f: Statistic,
    weights: ArrayLike,
    direction: ArrayLike,
    *,
    max_new_tokens: int,
) -> float:
    """Second derivative of E_λ f along a direction (K,) that sums to 0."""
    polynomial = ExpectationPolynomial.enumerate(components, prompt, f, max_new_tokens=max_new_tokens)
    return polynomial.derivative(weights, direction, order=2)


def checked_direction(direction: ArrayLike, n_components: int) -> Floats:
    """`direction` as (K,) float64, or a ValueError unless it keeps λ on the plane Σ λ_i = 1."""
    along = np.asarray(direction, dtype=np.float64)
    if along.shape != (n_components,) or not np.isfinite(along).all():
        raise ValueError(f"direction must be {n_components} finite numbers, one per component, got {direction!r}")
    if abs(along.sum()) > 1e-9 * max(1.0, float(np.abs(along).max())):
        raise ValueError(
            f"direction must sum to 0, got {along.tolist()}; use e_i − λ (towards component i) or e_i − e_j"
        )
    return along
