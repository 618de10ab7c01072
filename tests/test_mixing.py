from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.mixing import ConstantMixing, Mixing
from me_stats.models import Ensemble, MarkovModel
from me_stats.samplers import CESampler, MESampler
from tests.strategies import LastTokenMixing, simplex


@given(st.integers(1, 6).flatmap(simplex))
def test_constant_weights_are_kept_as_given(weights: list[float]) -> None:
    for form in (weights, np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        mixing = ConstantMixing(form)
        assert mixing.weights.tolist() == weights
        assert mixing.n_components == len(weights)
        expected = torch.tensor(weights, dtype=torch.float64).log()
        assert torch.equal(mixing.log_weights([(), (1, 2)]), expected.expand(2, -1))
        assert torch.equal(mixing.session([()]).log_weights(np.array([0])), expected[None])
        assert torch.equal(mixing.path_log_weights((0,), (1, 1, 1)), expected.expand(3, -1))


def test_a_zero_weight_is_minus_infinity() -> None:
    assert ConstantMixing([1.0, 0.0]).log_weights([()]).tolist() == [[0.0, -np.inf]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], "weights must sum to 1, got .* with sum 0.9"),
        ([1.0, 1.0], "divide by the sum if proportions were meant"),
        ([1.5, -0.5], "weights must be finite and non-negative"),
        ([float("nan"), 1.0], "weights must be finite and non-negative"),
        ([float("inf"), 0.0], "weights must be finite and non-negative"),
        ([], "weights must be one number per component"),
        ([[0.5, 0.5]], "weights must be one number per component"),
        (1.0, "weights must be one number per component"),
        ([0.5, 0.5 + 2e-9], "weights must sum to 1"),
    ],
)
def test_weights_off_the_simplex_are_refused(weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstantMixing(weights)  # type: ignore[arg-type]


def test_changing_the_callers_array_changes_nothing() -> None:
    mine = np.array([0.25, 0.75])
    mixing = ConstantMixing(mine)
    mine[:] = 0
    assert mixing.weights.tolist() == [0.25, 0.75]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_the_session_of_a_router_equals_its_definition(moves: list[tuple[int, int]]) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    router = LastTokenMixing(rng.dirichlet(np.ones(2), 4))
    prefixes: list[tuple[int, ...]] = [(), (1,), (2, 0), ()]
    session = router.session(prefixes)
    for row, token in moves:
        session.append(np.array([row]), torch.tensor([token]))
        prefixes[row] = (*prefixes[row], token)
        asked = [row, (row + 1) % 4]
        assert torch.equal(session.log_weights(np.array(asked)), router.log_weights([prefixes[i] for i in asked]))


def test_path_weights_are_those_of_every_prefix() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    router = LastTokenMixing(rng.dirichlet(np.ones(3), 3))
    path = router.path_log_weights((1,), (0, 1, 1))
    assert torch.equal(path, router.log_weights([(1,), (1, 0), (1, 0, 1)]))
    assert router.path_log_weights((1,), ()).shape == (0, 3)


class BadRouter(Mixing):
    n_components = 2

    def __init__(self, row: list[float]) -> None:
        self.row = row

    def log_weights(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([self.row] * len(prefixes), dtype=torch.float64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.5], "BadRouter.log_weights is not normalised; return log-probabilities"),
        ([float("nan"), 0.0], "not normalised"),
        ([-np.inf, -np.inf], "not normalised"),
        ([0.0], r"returned shape \(1, 1\), expected \(1, 2\)"),
    ],
)
def test_a_router_off_the_simplex_is_refused_wherever_it_enters(row: list[float], message: str) -> None:
    ensemble = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], BadRouter(row))
    with pytest.raises(ValueError, match=message):
        ensemble.log_probs([(0,)])
    with pytest.raises(ValueError, match=message):
        next(ensemble.path_log_probs([(0,)], [(1,)]))
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        with pytest.raises(ValueError, match=message):
            sampler.sample([0], max_new_tokens=1)
