"""Small worlds for hypothesis: weights, laws, toys, ensembles, warps and prompts, edges included.

A strategy draws a shape and a seed, and the numbers follow from the seed: the example is a pure function of
what hypothesis prints, and shrinking reduces the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from me_stats.mixing import ConstantMixing, Mixing
from me_stats.models import Ensemble, Greedy, MinP, TableModel, Temperature, TopK, TopP, Warp, Warped
from me_stats.vocabulary import Vocabulary

seeds = st.integers(0, 2**32 - 1)
LAW_KINDS = ("dirichlet", "peaked", "zeros and ties", "near ties", "one-hot")


@st.composite
def simplex(draw: st.DrawFn, size: int) -> list[float]:
    """Weights that sum to 1; zeros are common and one-hot weights possible."""
    counts = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size).filter(any))
    return [count / sum(counts) for count in counts]


def law_rows(kind: str, rows: int, size: int, seed: int) -> np.ndarray:
    """(rows, size) probabilities of one of `LAW_KINDS`."""
    rng = np.random.Generator(np.random.Philox(seed))
    if size == 1:
        return np.ones((rows, 1))
    if kind == "one-hot":
        return np.eye(size)[rng.integers(0, size, rows)]
    if kind == "zeros and ties":
        counts = rng.integers(0, 4, (rows, size)).astype(float)
        counts[np.arange(rows), rng.integers(0, size, rows)] += 1
    elif kind == "near ties":
        counts = 1 + 1e-12 * rng.integers(0, 3, (rows, size))
    else:
        counts = rng.dirichlet(np.full(size, 1.0 if kind == "dirichlet" else 0.1), rows)
    return counts / counts.sum(1, keepdims=True)


def toy(kind: str, size: int, order: int, seed: int, eos: Sequence[int] = ()) -> TableModel:
    return TableModel(law_rows(kind, sum(size**d for d in range(order + 1)), size, seed), order=order, eos=eos)


def with_support(model: TableModel, tokens: Sequence[int]) -> TableModel:
    """The same table kept to `tokens`, renormalised (uniform where it had no mass there)."""
    kept = np.zeros(model.vocabulary.size)
    kept[list(tokens)] = 1
    mass = model.log_table.exp().numpy() * kept
    mass = np.where(mass.sum(1, keepdims=True) > 0, mass, kept)
    return TableModel(mass / mass.sum(1, keepdims=True), order=model.order, eos=model.vocabulary.eos)


@st.composite
def table_models(
    draw: st.DrawFn, *, size: int | None = None, max_order: int = 3, eos: Sequence[int] | None = None
) -> TableModel:
    """A toy of V = 1..5 tokens and order 0..`max_order`, with or without end-of-sequence ids."""
    size = draw(st.integers(1, 5)) if size is None else size
    order = draw(st.integers(0, max_order if size < 4 else min(max_order, 2)))
    eos = draw(st.lists(st.integers(0, size - 1), max_size=1)) if eos is None else eos
    return toy(draw(st.sampled_from(LAW_KINDS)), size, order, draw(seeds), eos)


warps: st.SearchStrategy[Warp] = st.one_of(
    st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]).map(Temperature),
    st.integers(1, 5).map(TopK),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]).map(TopP),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]).map(MinP),
    st.just(Greedy()),
)


@st.composite
def ensembles(
    draw: st.DrawFn, *, max_components: int = 4, max_order: int = 3, warped: bool = True, eos: bool = True
) -> Ensemble:
    """K = 1..4 toys over one vocabulary: independent, identical or with disjoint supports; warped at will."""
    size, n_components = draw(st.integers(1, 5)), draw(st.integers(1, max_components))
    ends = draw(st.lists(st.integers(0, size - 1), max_size=1)) if eos else []
    toys = [draw(table_models(size=size, max_order=max_order, eos=ends)) for _ in range(n_components)]
    relation = draw(st.sampled_from(["independent", "identical", "disjoint"]))
    if relation == "identical":
        toys = [toys[0]] * n_components
    if relation == "disjoint" and size >= n_components:
        toys = [with_support(model, range(i, size, n_components)) for i, model in enumerate(toys)]
    components: list[Any] = list(toys)
    if warped:
        for i, model in enumerate(toys):
            own = draw(st.lists(warps, max_size=2))
            components[i] = Warped(model, *own) if own else model
    return Ensemble(components, ConstantMixing(draw(simplex(n_components))))


def prompts(size: int, *, max_length: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, size - 1), max_size=max_length).map(tuple)


def horizons(choices: int, *, budget: int = 4096, most: int = 5) -> st.SearchStrategy[int]:
    """T = 1..`most` with at most `budget` paths of `choices` a token."""
    longest = 1
    while longest < most and choices ** (longest + 1) <= budget:
        longest += 1
    return st.integers(1, longest)


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
