"""Known laws and sequences drawn from them, by right and by wrong samplers, for the statistical tests to judge."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray

from me_stats.steps import StepScores, step_scores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVELS = (0.05, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9)
EVEN = np.array([0.5, 0.5])


def zipf_pair(vocabulary: int, seed: int = 1) -> Floats:
    """Two Zipf laws over the same ranking with independent log-normal noise, (2, V)."""
    rng = np.random.default_rng(seed)
    laws = np.exp(0.7 * rng.normal(size=(2, vocabulary))) / np.arange(1, vocabulary + 1) ** 1.1
    return np.asarray(laws / laws.sum(1, keepdims=True))


def log(x: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(x)


def markov_pair(seed: int = 1, *, vocabulary: int = 8, components: int = 2) -> Floats:
    """Transition tables (K, V, V) of a toy ensemble."""
    return np.random.default_rng(seed).dirichlet(np.full(vocabulary, 0.5), size=(components, vocabulary))


def simulate(
    tables: Floats,
    weights: Floats,
    n: int,
    steps: int,
    rng: np.random.Generator,
    *,
    sampler: str = "ancestral",
    strength: float = 0.0,
) -> tuple[Floats, Ints]:
    """Draw n sequences with a right or a wrong sampler; returns the true laws (N, T, K, V) and the tokens (N, T)."""
    count, vocabulary, _ = tables.shape
    tokens = np.zeros((n, steps), dtype=np.int64)
    laws = np.empty((n, steps, count, vocabulary))
    previous = np.zeros(n, dtype=np.int64)
    component = first = rng.choice(count, size=n, p=weights)
    for t in range(steps):
        laws[:, t] = tables[:, previous].transpose(1, 0, 2)
        fresh = rng.choice(count, size=n, p=weights)
        if sampler == "once":
            component = first
        elif sampler == "round robin":
            component = (first + t) % count
        elif sampler == "sticky":
            component = np.where(rng.random(n) < strength, component, fresh)
        else:
            component = fresh
        law = laws[np.arange(n), t, component]
        mixture = np.einsum("k,nkv->nv", weights, laws[:, t])
        if sampler == "marginal":
            law = mixture
        elif sampler == "temperature":
            law = mixture ** (1 / strength)
        cumulative = law.cumsum(1)
        previous = (rng.random((n, 1)) * cumulative[:, -1:] > cumulative).sum(1).clip(max=vocabulary - 1)
        if sampler == "greedy":
            previous = np.where(rng.random(n) < strength, mixture.argmax(1), previous)
        tokens[:, t] = previous
    return laws, tokens


def summarise(laws: Floats, tokens: Ints, weights: Floats) -> StepScores:
    with np.errstate(divide="ignore"):
        return step_scores(torch.tensor(np.log(laws)), torch.tensor(np.log(weights)), torch.tensor(tokens))


def rows(steps: StepScores, start: int, stop: int) -> StepScores:
    return StepScores(**{entry.name: getattr(steps, entry.name)[start:stop] for entry in fields(steps)})
