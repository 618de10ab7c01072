"""Intervals of total variation from partial laws: they hold the truth, and are as tight as they can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.served import PartialLaws, mix_partial, tv_interval


def top(law: np.ndarray, n: int) -> PartialLaws:
    order = np.argsort(-law)[:n]
    listed = torch.tensor(law[order])[None]
    return PartialLaws(torch.tensor(order.copy())[None], listed.log(), 1 - listed.sum(1), len(law))


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


@given(st.integers(0, 2**32), st.integers(2, 8), st.data())
def test_the_interval_holds_the_distance(seed: int, size: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    p, q, r = rng.dirichlet(np.full(size, 0.7), 3)
    n, m = (data.draw(st.integers(1, size)) for _ in range(2))
    share = data.draw(st.floats(0, 1))
    mixed = mix_partial([top(p, n), top(r, m)], [share, 1 - share])
    assert float(mixed.missing) == pytest.approx(
        share * (1 - np.sort(p)[-n:].sum()) + (1 - share) * (1 - np.sort(r)[-m:].sum())
    )
    truth = share * p + (1 - share) * r
    cases = (
        (top(p, n), torch.tensor(q)[None].log(), distance(p, q)),
        (top(p, n), top(q, m), distance(p, q)),
        (mixed, top(q, m), distance(truth, q)),
        (mixed, torch.tensor(q)[None].log(), distance(truth, q)),
    )
    for first, second, true in cases:
        low, high = (float(end) for end in tv_interval(first, second))
        assert low - 1e-9 <= true <= high + 1e-9


@given(st.integers(0, 2**32), st.integers(2, 6))
def test_whole_laws_give_the_distance_itself(seed: int, size: int) -> None:
    p, q = np.random.default_rng(seed).dirichlet(np.ones(size), 2)
    low, high = tv_interval(top(p, size), top(q, size))
    assert float(low) == pytest.approx(distance(p, q), abs=1e-9)
    assert float(high) == pytest.approx(distance(p, q), abs=1e-9)


def test_both_ends_are_reached_by_some_law() -> None:
    known, q = top(np.array([0.5, 0.2, 0.2, 0.1]), 2), np.array([0.5, 0.2, 0.05, 0.25])
    low, high = tv_interval(known, torch.tensor(q)[None].log())
    ends = [distance(np.array([0.5, 0.2, x, 0.3 - x]), q) for x in np.linspace(0, 0.3, 301)]
    assert float(low) == pytest.approx(min(ends), abs=1e-9)
    assert float(high) == pytest.approx(0.3)
    assert max(ends) <= float(high)


def test_a_mixture_of_lists_may_hide_mass_on_what_it_lists() -> None:
    one, other = top(np.array([0.6, 0.4, 0.0]), 1), top(np.array([0.0, 0.6, 0.4]), 1)
    mixed = mix_partial([one, other], [0.5, 0.5])
    assert not mixed.closed
    assert float(mixed.missing) == pytest.approx(0.4)
    low, _ = tv_interval(mixed, torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64).log())
    assert float(low) == pytest.approx(0.0, abs=1e-9)
    assert mix_partial([one, one], [0.5, 0.5]).closed


def test_bad_arguments_are_named() -> None:
    one, other = top(np.array([0.6, 0.4]), 1), top(np.array([0.6, 0.3, 0.1]), 1)
    with pytest.raises(ValueError, match="over the same tokens"):
        tv_interval(one, other)
    with pytest.raises(ValueError, match="as many rows and tokens"):
        mix_partial([one, other], [0.5, 0.5])
    with pytest.raises(ValueError, match="must sum to 1"):
        mix_partial([one], [0.5])
