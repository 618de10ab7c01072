"""Small worlds for hypothesis: weights, laws, toys, ensembles, warps, prompts and session schedules, edges included.

A strategy draws a shape and an integer seed, and the numbers follow from the seed: an example is a pure function of
what hypothesis prints, and shrinking reduces the shape.

>>> from hypothesis import given, settings
>>> from me_stats import MESampler
>>> from me_stats.exact import sampler_law, sequence_law
>>> @settings(max_examples=10, database=None, deadline=None)
... @given(ensembles(max_components=2, max_vocabulary=3, max_order=1))
... def me_writes_the_law_of_the_ensemble(ensemble):
...     written = sampler_law(MESampler(ensemble), (), max_new_tokens=2)
...     assert written.tv_distance(sequence_law(ensemble, (), max_new_tokens=2)) < 1e-9
>>> me_writes_the_law_of_the_ensemble()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from hypothesis import strategies as st

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MarkovModel, MinP, TableModel, Temperature, TopK, TopP, Warp, Warped

LawKind = Literal["one-hot", "zeros and ties", "dirichlet", "peaked", "near ties"]
Relation = Literal["independent", "identical", "disjoint"]
# Simplest first: shrinking goes to the left.
LAW_KINDS: tuple[LawKind, ...] = ("one-hot", "zeros and ties", "dirichlet", "peaked", "near ties")
RELATIONS: tuple[Relation, ...] = ("independent", "identical", "disjoint")

seeds = st.integers(0, 2**32 - 1)
warps: st.SearchStrategy[Warp] = st.one_of(
    st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]).map(Temperature),
    st.integers(1, 5).map(TopK),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]).map(TopP),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]).map(MinP),
    st.just(Greedy()),
)


@st.composite
def simplex(draw: st.DrawFn, size: int) -> list[float]:
    """Weights that sum to 1; zeros are common and one-hot weights possible."""
    counts = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size).filter(any))
    return [count / sum(counts) for count in counts]


def law_rows(kind: LawKind, rows: int, size: int, seed: int) -> np.ndarray:
    """(rows, size) probabilities of one of `LAW_KINDS`.

    "near ties" differ by 1e-12 or not at all, so that every k is an edge for top-k and every token nearly an arg max.

    >>> law_rows("one-hot", 2, 3, seed=1)
    array([[0., 1., 0.],
           [1., 0., 0.]])
    """
    if kind not in LAW_KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, LAW_KINDS))}, got {kind!r}")
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


@st.composite
def laws(draw: st.DrawFn, size: int) -> np.ndarray:
    """One law (V,) over `size` tokens, of any of `LAW_KINDS`."""
    return law_rows(draw(st.sampled_from(LAW_KINDS)), 1, size, draw(seeds))[0]


@st.composite
def table_models(
    draw: st.DrawFn,
    *,
    size: int | None = None,
    min_order: int = 0,
    max_order: int = 3,
    eos: Sequence[int] | None = None,
) -> TableModel:
    """A toy of V = 1..5 tokens and order `min_order`..`max_order`, with or without end-of-sequence ids.

    Where there are such ids, one kind of toy writes nothing else. Orders above 2 need V < 4, or else `min_order` > 2.
    """
    size = draw(st.integers(1, 5)) if size is None else size
    order = draw(st.integers(min_order, max_order if size < 4 else max(min_order, min(max_order, 2))))
    eos = draw(_ends(size)) if eos is None else eos
    states = sum(size**depth for depth in range(order + 1))
    # None: every token ends the sequence.
    kind = draw(st.sampled_from([*LAW_KINDS, None] if eos else LAW_KINDS))
    table = _ending_rows(states, size, eos) if kind is None else law_rows(kind, states, size, draw(seeds))
    return TableModel(table, order=order, eos=eos)


@st.composite
def markov_models(draw: st.DrawFn, *, size: int | None = None, eos: Sequence[int] | None = None) -> MarkovModel:
    """A first-order chain over V = 1..5 tokens, with or without end-of-sequence ids."""
    size = draw(st.integers(1, 5)) if size is None else size
    eos = draw(_ends(size)) if eos is None else eos
    rows = law_rows(draw(st.sampled_from(LAW_KINDS)), size + 1, size, draw(seeds))
    return MarkovModel(rows[0], rows[1:], eos=eos)


@st.composite
def ending_models(draw: st.DrawFn, *, size: int | None = None) -> TableModel:
    """A toy that writes end-of-sequence ids only, so that every row has one token."""
    size = draw(st.integers(1, 5)) if size is None else size
    eos = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    return TableModel(_ending_rows(1, size, eos), order=0, eos=eos)


@st.composite
def ensembles(
    draw: st.DrawFn,
    *,
    max_components: int = 4,
    min_vocabulary: int = 1,
    max_vocabulary: int = 5,
    min_order: int = 0,
    max_order: int = 3,
    warped: bool = True,
    eos: bool = True,
    relations: Sequence[Relation] = RELATIONS,
) -> Ensemble:
    """K = 1..`max_components` toys over one vocabulary, with fixed weights.

    Parameters
    ----------
    min_vocabulary, max_vocabulary
        Range of V.
    min_order, max_order
        Range of the toys' orders; see `table_models`.
    warped
        Whether components may be transformed, each by up to two of `warps`.
    eos
        Whether the vocabulary may have an end-of-sequence id.
    relations
        What the components may be to each other. "disjoint" supports need V >= K, and are "independent" otherwise.
    """
    size = draw(st.integers(min_vocabulary, max_vocabulary))
    ends = draw(_ends(size)) if eos else []
    # Weight, toy and warps of a component stand together, so that shrinking can drop it in one piece.
    own = st.lists(warps, max_size=2) if warped else st.just([])
    toys_of_size = table_models(size=size, min_order=min_order, max_order=max_order, eos=ends)
    component = st.tuples(st.integers(0, 6), toys_of_size, own)
    parts = draw(st.lists(component, min_size=1, max_size=max_components))
    counts, toys = [count for count, _, _ in parts], [toy for _, toy, _ in parts]
    relation = draw(st.sampled_from(relations))
    if relation == "identical":
        toys = [toys[0]] * len(toys)
    if relation == "disjoint" and size >= len(toys):
        toys = [_with_support(toy, range(i, size, len(toys))) for i, toy in enumerate(toys)]
    components = [Warped(toy, *part[2]) if part[2] else toy for toy, part in zip(toys, parts, strict=True)]
    counts = counts if any(counts) else [1] * len(counts)
    return Ensemble(components, ConstantMixing([count / sum(counts) for count in counts]))


def prompts(size: int, *, min_length: int = 0, max_length: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Prompts of `min_length` to `max_length` ids below `size`."""
    return st.lists(st.integers(0, size - 1), min_size=min_length, max_size=max_length).map(tuple)


def horizons(choices: int, *, budget: int = 4096, most: int = 5) -> st.SearchStrategy[int]:
    """T = 1..`most` with at most `budget` paths of `choices` a token."""
    longest = 1
    while longest < most and choices ** (longest + 1) <= budget:
        longest += 1
    return st.integers(1, longest)


class Turn(NamedTuple):
    """One turn of a session: the rows `appended` get one of `tokens` each, and then `reader` reads the rows `read`."""

    appended: tuple[int, ...]
    tokens: tuple[int, ...]
    reader: int
    read: tuple[int, ...]


@st.composite
def schedules(
    draw: st.DrawFn, rows: int, steps: int, *, size: int, eos: Sequence[int] = (), readers: int = 1
) -> tuple[Turn, ...]:
    """Turns of a session of `rows` rows: at most `steps` appends a row, in any order, and a read of all at the end.

    Rows grow at their own pace, so they are ragged. Some are read often and some at the end only, after a long lag.
    Readers 0..`readers` - 1 (components, say) take turns, so each falls behind while another reads. Tokens are ids
    below `size` that do not end a sequence, if there are any.
    """
    row, reader = st.integers(0, rows - 1), st.integers(0, readers - 1)
    token = st.sampled_from([t for t in range(size) if t not in set(eos)] or range(size))
    late = draw(st.one_of(st.just(set[int]()), st.sets(row)))
    turns = []
    for _ in range(draw(st.integers(0, steps))):
        grown = draw(st.dictionaries(row, token, max_size=rows))
        read = draw(st.lists(row, unique=True, max_size=rows))
        turn = Turn(tuple(grown), tuple(grown.values()), draw(reader), tuple(r for r in read if r not in late))
        if turn.appended or turn.read:
            turns.append(turn)
    return (*turns, Turn((), (), draw(reader), tuple(range(rows))))


def _ends(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=1)


def _ending_rows(rows: int, size: int, eos: Sequence[int]) -> np.ndarray:
    law = np.zeros(size)
    law[list(eos)] = 1 / len(set(eos))
    return np.tile(law, (rows, 1))


def _with_support(model: TableModel, tokens: Sequence[int]) -> TableModel:
    """The same table kept to `tokens`, renormalised (uniform where it had no mass there)."""
    kept = np.zeros(model.vocabulary.size)
    kept[list(tokens)] = 1
    mass = model.log_table.exp().numpy() * kept
    mass = np.where(mass.sum(1, keepdims=True) > 0, mass, kept)
    return TableModel(mass / mass.sum(1, keepdims=True), order=model.order, eos=model.vocabulary.eos)
