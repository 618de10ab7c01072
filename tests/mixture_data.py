"""Tokens drawn from mixtures of known laws, as log-probabilities under each component."""

from __future__ import annotations

import numpy as np

SEPARATE = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.05, 0.05, 0.2, 0.7]])


def logs(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, dtype=float))


def draw_tokens(laws: np.ndarray, weights: np.ndarray | list[float], shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Token ids of `shape` from the mixture of `laws` (K, V)."""
    mixed = np.asarray(weights) @ laws
    return np.random.default_rng(seed).choice(laws.shape[1], shape, p=mixed)


def random_logs(
    n: int, k: int, seed: int, *, zeros: float = 0.0, size: int = 50, concentration: float = 0.5
) -> np.ndarray:
    """(n, K) of tokens written by a random mixture of random laws, some with impossible tokens."""
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.full(size, concentration), k)
    laws[rng.random(laws.shape) < zeros] = 0
    laws += 1e-9 * (laws.sum(1, keepdims=True) == 0)
    laws /= laws.sum(1, keepdims=True)
    drawn = draw_tokens(laws, rng.dirichlet(np.ones(k)), (n,), seed + 1)
    return logs(laws[:, drawn].T)
