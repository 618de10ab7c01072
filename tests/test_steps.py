"""Summaries of steps: moments of the law by brute force, and parts that join to the whole."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.steps import concatenate_rows, stack_steps, step_scores
from tests.laws import EVEN, markov_pair, simulate, summarise


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), vocabulary=st.integers(1, 9))
def test_summaries_are_the_moments_of_the_law(seed: int, count: int, vocabulary: int) -> None:
    # Put every token of the vocabulary at the same prefix, then average under the law.
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.full(vocabulary, 0.5), size=count)
    law[rng.random(law.shape) < 0.2] = 0
    law[:, 0] += 1e-3
    law /= law.sum(1, keepdims=True)
    weights = rng.dirichlet(np.ones(count))
    weights[rng.random(count) < 0.2] = 0
    weights = weights / weights.sum() if weights.sum() else np.eye(count)[0]
    p = weights @ law
    steps = summarise(np.broadcast_to(law, (vocabulary, count, vocabulary)), np.arange(vocabulary), weights)
    assert (steps.impossible == (p == 0)).all()
    assert (steps.mask == (p > 0)).all()
    np.testing.assert_allclose(p @ steps.score, 0, atol=1e-9)
    info = np.einsum("v,vi,vj->ij", p, steps.score, steps.score)
    live = int(np.argmax(p > 0))
    np.testing.assert_allclose(steps.information[live], info, atol=1e-9)
    np.testing.assert_allclose(p @ (steps.log_p + steps.entropy), 0, atol=1e-9)
    np.testing.assert_allclose(p @ (steps.log_p + steps.entropy) ** 2, steps.variance[live], atol=1e-9)
    np.testing.assert_allclose(steps.p, p, atol=1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(p > 0, law[0] / p, np.inf)
    for below, key in ((steps.below_ratio, ratio), (steps.below_rank, -p)):
        # Whatever the ties, the intervals [below, below + p) must tile [0, 1) in the order of the key.
        possible = np.flatnonzero(p > 0)
        order = possible[np.argsort(below[possible], kind="stable")]
        np.testing.assert_allclose(below[order], np.concatenate([[0], np.cumsum(p[order])[:-1]]), atol=1e-9)
        assert (np.diff(key[order]) >= -1e-9).all()


def test_parts_join_to_the_whole() -> None:
    laws, tokens = simulate(markov_pair(), EVEN, 6, 9, np.random.default_rng(0))
    tokens[2, 5:] = tokens[4, 1:] = -1
    whole = summarise(laws, tokens, EVEN)
    short = [
        summarise(laws[i, :5], tokens[i, :5], EVEN) if i == 2 else summarise(laws[i], tokens[i], EVEN) for i in range(6)
    ]
    by_rows = concatenate_rows(short)
    by_chunks = concatenate_rows([summarise(laws[:4], tokens[:4], EVEN), summarise(laws[4:], tokens[4:], EVEN)])
    by_steps = stack_steps([summarise(laws[:, t], tokens[:, t], EVEN) for t in range(9)])
    for entry in fields(whole):
        for other in (by_rows, by_chunks, by_steps):
            np.testing.assert_allclose(getattr(other, entry.name), getattr(whole, entry.name), atol=1e-12)
    assert int(whole.mask.sum()) == 6 * 9 - 4 - 8


def test_steps_after_the_end_ignore_their_laws() -> None:
    laws, tokens = simulate(markov_pair(), EVEN, 3, 4, np.random.default_rng(0))
    log_laws, log_weights = torch.tensor(np.log(laws)), torch.log(torch.tensor(EVEN)).expand(3, 4, 2).clone()
    tokens[:, 3] = -1
    clean = step_scores(log_laws, log_weights, torch.tensor(tokens))
    log_laws[:, 3], log_weights[:, 3] = math.nan, 0.0
    dirty = step_scores(log_laws, log_weights, torch.tensor(tokens))
    for entry in fields(clean):
        np.testing.assert_array_equal(getattr(clean, entry.name), getattr(dirty, entry.name))


def test_an_empty_row_joins_as_masked_steps() -> None:
    laws, tokens = simulate(markov_pair(), EVEN, 1, 3, np.random.default_rng(0))
    empty = step_scores(torch.zeros(0, 2, 8), torch.log(torch.tensor(EVEN)), torch.tensor([]))
    joined = concatenate_rows([empty, summarise(laws, tokens, EVEN)])
    assert joined.mask.tolist() == [[False] * 3, [True] * 3]


def test_bad_input() -> None:
    laws, weights = torch.log(torch.full((3, 2, 4), 0.25)), torch.log(torch.tensor(EVEN))
    tokens = torch.zeros(3, dtype=torch.int64)
    for args, message in (
        ((laws[:2], weights, tokens), "component_log_probs"),
        ((laws, torch.zeros(1), tokens), "log_weights"),
        ((laws + 0.1, weights, tokens), "normalised"),
        ((laws * math.nan, weights, tokens), "normalised"),
        ((laws, weights * 2, tokens), "log_weights must be normalised"),
        ((laws, weights, tokens + 4), "below V=4"),
        ((laws, weights, tokens.float()), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            step_scores(*args)
    with pytest.raises(ValueError, match="non-empty"):
        concatenate_rows([])
    with pytest.raises(ValueError, match="non-empty"):
        stack_steps([])
