"""The likelihood of mixing weights, read block by block, and the two ways to its maximum: EM and Newton.

``L(λ) = Σ_t log Σ_i λ_i P_i(x_t)`` is concave on the simplex. With ``A_ti = P_i(x_t) / Σ_j λ_j P_j(x_t)`` the gradient
a token is ``u_i = mean_t A_ti`` and the information a token is ``H = mean_t A_t A_t^T``. For every λ on the simplex
``max L - L(λ) ≤ n log max_i u_i`` (Jensen), so each solution carries a certificate of how far it is from the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls

Floats = NDArray[np.float64]

BLOCK = 1 << 16
"""Tokens that are read at a time; sums do not depend on where the array lies, in memory or on disk."""

_CACHED = 1 << 25  # numbers (256 MiB) up to which exp(log_probs) is kept between passes
_ROUNDING = 0.01  # nats by which a rounded log-probability may exceed 0
_RIDGE = 1e-10  # of the mean information: keeps a step finite where components are identical


@dataclass(frozen=True)
class Maximum:
    """Where a solver stopped: weights (K,), mean log-likelihood, certificate in nats a token, iterations."""

    weights: Floats
    value: float
    kkt_gap: float
    iterations: int


class MixtureLikelihood:
    """``mean_t log Σ_i λ_i P_i(x_t)`` of tokens scored by K components; each row is scaled by its largest probability.

    Raises ValueError for a shape other than (n, K), NaN, log-probabilities above 0, and a token that no component can
    write, which no λ explains.
    """

    def __init__(self, log_probs: ArrayLike) -> None:
        array = log_probs if isinstance(log_probs, np.ndarray) else np.asarray(log_probs, dtype=float)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"log_probs must be (n, K) with at least one token and one component, got {array.shape}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"log_probs must be natural log-probabilities, got {array.dtype}")
        self.n, self.n_components = array.shape
        self._array = array
        self._kept: list[Floats] | None = [] if array.size <= _CACHED else None
        shifts = 0.0
        for start, block in self._read():
            top = block.max(0)
            _require_possible(block, top, start)
            shifts += float(top.sum())
            if self._kept is not None:
                self._kept.append(np.exp(block - top))
        self._shift = shifts / self.n

    def _read(self) -> Iterator[tuple[int, Floats]]:
        for start in range(0, self.n, BLOCK):
            yield start, np.ascontiguousarray(self._array[start : start + BLOCK].T, dtype=np.float64)

    def blocks(self) -> Iterator[Floats]:
        """Probabilities (K, m) relative to each token's largest, in order."""
        if self._kept is not None:
            yield from self._kept
        else:
            for _, block in self._read():
                yield np.exp(block - block.max(0))

    def value(self, weights: Floats) -> float:
        """Mean log-likelihood in nats a token; -inf if some token is impossible under `weights`."""
        total = 0.0
        with np.errstate(divide="ignore"):
            for block in self.blocks():
                total += float(np.log(weights @ block).sum())
        return total / self.n + self._shift

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Value, gradient u (K,) and information H (K, K), each a token; every token must be possible."""
        total, u, h = 0.0, np.zeros(self.n_components), np.zeros((self.n_components,) * 2)
        for block in self.blocks():
            mixed = weights @ block
            total += float(np.log(mixed).sum())
            ratios = block / mixed
            u += ratios.sum(1)
            h += ratios @ ratios.T
        return total / self.n + self._shift, u / self.n, h / self.n

    def pinned(self, component: int, weight: float) -> _Pinned:
        """The likelihood of the other components' shares, with one weight held fixed."""
        return _Pinned(self, component, weight)


class _Pinned(MixtureLikelihood):
    """Components ``c P_i + (1 - c) P_j``, j ≠ i, whose mixtures are those with ``λ_i = c``."""

    def __init__(self, parent: MixtureLikelihood, component: int, weight: float) -> None:
        self._parent, self._component, self._weight = parent, component, weight
        self._others = [j for j in range(parent.n_components) if j != component]
        self.n, self.n_components, self._shift = parent.n, len(self._others), parent._shift

    def blocks(self) -> Iterator[Floats]:
        for block in self._parent.blocks():
            yield self._weight * block[self._component] + (1 - self._weight) * block[self._others]


def _require_possible(block: Floats, top: Floats, start: int) -> None:
    if np.isnan(block).any():
        token = start + int(np.isnan(block).any(0).argmax())
        raise ValueError(f"log_probs has NaN at token {token}; check the model that scored it")
    if (top > _ROUNDING).any():
        token = start + int((top > _ROUNDING).argmax())
        raise ValueError(f"log_probs has {top.max():.3g} > 0 at token {token}; give log-probabilities, not logits")
    if (top == -np.inf).any():
        token = start + int((top == -np.inf).argmax())
        raise ValueError(
            f"no component can write token {token} (all log_probs are -inf), so no λ explains the text; "
            "leave the token out, or score with components that do not truncate"
        )


def newton(
    likelihood: MixtureLikelihood, *, start: Floats | None = None, tol: float = 1e-15, max_iterations: int = 100
) -> Maximum:
    """The maximum by Newton steps with an active set: quadratic convergence, also to the boundary.

    On λ ≥ 0 alone ``mean log Σ λ_i P_i - Σ λ_i`` has its maximum on the simplex, and its second-order model is a
    non-negative least-squares problem in K unknowns, which picks the active set. A line search makes each step rise.
    """
    k = likelihood.n_components
    weights = np.full(k, 1 / k) if start is None else np.maximum(start, 1e-3 / k)
    weights = weights / weights.sum()
    value, u, h = likelihood.derivatives(weights)
    iterations, moved = 0, math.inf
    while iterations < max_iterations and _gap(u) > tol:
        step = _active_set_step(weights, u, h) - weights
        rise = float((u - 1) @ step)
        last, moved = moved, float(np.abs(step).max())
        # Once nothing is left to gain but rounding, steps go on only while they shrink.
        if moved <= 1e-12 or (rise <= 1e-17 and moved > last / 2):
            break
        iterations += 1
        floor = value - 1e-14 * max(1.0, abs(value))  # rounding must not look like a fall
        size, trial = 1.0, weights
        while size > 1e-10:
            trial = weights + size * step
            trial = trial / trial.sum()
            with np.errstate(all="ignore"):  # a step may make a token impossible
                new = likelihood.derivatives(trial)
            if new[0] >= floor + 1e-4 * size * rise:
                break
            size /= 2
        else:
            break
        weights, (value, u, h) = trial, new
    return Maximum(weights, value, _gap(u), iterations)


def _active_set_step(weights: Floats, u: Floats, h: Floats) -> Floats:
    """The maximiser over y ≥ 0 of the second-order model ``(2u - 1)·y - y^T H y / 2`` (as H λ = u)."""
    ridge = _RIDGE * np.trace(h)
    lower = np.linalg.cholesky(h + ridge * np.eye(len(u)))
    target = solve_triangular(lower, 2 * u - 1 + ridge * weights, lower=True)
    found: Floats = nnls(lower.T, target)[0]
    return found


def em(
    likelihood: MixtureLikelihood, *, start: Floats | None = None, tol: float = 1e-13, max_iterations: int = 20_000
) -> Maximum:
    """The maximum by EM: λ_i becomes the mean responsibility ``λ_i u_i``. Monotone, linear, a check on `newton`.

    Raises ValueError where `max_iterations` are too few: flat likelihoods and weights near 0 take EM very long.
    """
    k = likelihood.n_components
    weights = np.full(k, 1 / k) if start is None else start
    for iteration in range(1, max_iterations + 1):
        value, u, _ = likelihood.derivatives(weights)
        new = weights * u
        new /= new.sum()
        moved = float(np.abs(new - weights).max())
        weights = new
        if moved <= tol:
            value, u, _ = likelihood.derivatives(weights)
            return Maximum(weights, value, _gap(u), iteration)
    raise ValueError(f"EM has not converged in {max_iterations} iterations (weights still move by {moved:.1e}); "
                     "use method='newton'")  # fmt: skip


def _gap(u: Floats) -> float:
    return max(0.0, math.log(float(u.max())))


def simplex_basis(k: int) -> Floats:
    """Orthonormal directions (K, K - 1) along the simplex."""
    return np.linalg.svd(np.ones((1, k)))[2][1:].T


def least_information(h: Floats) -> float:
    """Smallest eigenvalue of the information along the simplex; inf for one component."""
    if len(h) == 1:
        return math.inf
    z = simplex_basis(len(h))
    return max(0.0, float(np.linalg.eigvalsh(z.T @ h @ z)[0]))


def inverse_on_simplex(h: Floats) -> Floats:
    """(K, K) inverse of the information for weights that sum to 1; directions without any are left out."""
    if len(h) == 1:
        return np.zeros((1, 1))
    z = simplex_basis(len(h))
    return z @ np.linalg.pinv(z.T @ h @ z, rcond=1e-14, hermitian=True) @ z.T


def flat_weights(h: Floats, below: float) -> NDArray[np.bool_]:
    """Which weights move along the directions with less information than `below`."""
    z = simplex_basis(len(h))
    values, vectors = np.linalg.eigh(z.T @ h @ z)
    return (np.abs(z @ vectors[:, values < below]) > 1e-6).any(1)
