from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel
from me_stats.models.base import Cost
from me_stats.models.ensemble import mix
from tests.strategies import LastTokenMixing, OutsideModel, ensembles, prompts


@given(st.data())
def test_the_law_is_the_weighted_mean_of_the_laws(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    prefixes = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=5))
    laws = [component.log_probs(prefixes).exp().numpy() for component in ensemble.components]
    expected = sum(weight * law for weight, law in zip(ensemble.mixing.weights.tolist(), laws, strict=True))
    mixed = ensemble.log_probs(prefixes)
    np.testing.assert_allclose(mixed.exp().numpy(), expected, rtol=0, atol=1e-14)
    assert not bool(mixed.isnan().any())
    # A token is impossible exactly where no component with weight can write it.
    assert ((mixed == -torch.inf).numpy() == (expected == 0)).all()


@given(st.data())
def test_a_law_does_not_depend_on_its_place_in_a_batch(data: st.DataObject) -> None:
    # To the last bit: a warp after the mixture acts on ties.
    ensemble = data.draw(ensembles(max_order=2))
    asked = prompts(ensemble.vocabulary.size, max_length=2)
    prefixes = data.draw(st.lists(asked, min_size=1, max_size=12))
    together = ensemble.log_probs(prefixes)
    for prefix, law in zip(prefixes, together, strict=True):
        assert torch.equal(ensemble.log_probs([prefix])[0], law)


def test_tokens_that_tie_in_every_component_tie_in_the_mixture() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    for size in range(2, 40):
        halves = rng.dirichlet(np.ones(size), 2) / 2
        parts = [TableModel([[*half, *half]], order=0) for half in halves]
        mixed = Ensemble(parts, ConstantMixing([0.3, 0.7])).log_probs([()] * 3)
        assert torch.equal(mixed[:, :size], mixed[:, size:])


def test_a_router_weighs_each_prefix_on_its_own() -> None:
    a, b = TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)
    router = LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    laws = Ensemble([a, b], router).log_probs([(), (1, 0), (0, 1)]).exp()
    assert torch.allclose(laws, torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64))


def test_component_paths_hold_every_law_and_weight() -> None:
    parts = [MarkovModel.random(3, seed=0), OutsideModel(MarkovModel.random(3, seed=1))]
    router = LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]))
    ensemble = Ensemble(parts, router)
    rows = list(ensemble.component_paths([(0,), ()], [(1, 2), (2,)]))
    for (laws, weights), prefixes in zip(rows, [[(0,), (0, 1)], [()]], strict=True):
        for part, law in zip(parts, laws, strict=True):
            assert torch.equal(law, torch.as_tensor(part.log_probs(prefixes)))
        assert torch.equal(weights, router.log_weights(prefixes))


def test_components_of_different_vocabularies_are_refused() -> None:
    three, four = MarkovModel.random(3, seed=0), MarkovModel.random(4, seed=0)
    ending = MarkovModel.random(3, seed=0, eos=(2,))
    half = ConstantMixing([0.5, 0.5])
    with pytest.raises(ValueError, match=r"components\[0\] and components\[1\] have different vocabularies"):
        Ensemble([three, four], half)
    with pytest.raises(ValueError, match="different end-of-sequence ids"):
        Ensemble([three, ending], half)


@pytest.mark.parametrize(("weights", "count"), [([1.0], 2), ([0.5, 0.5], 1), ([0.5, 0.25, 0.25], 2)])
def test_one_weight_for_each_component(weights: list[float], count: int) -> None:
    with pytest.raises(ValueError, match=f"mixing has {len(weights)} weights for {count} components; give one each"):
        Ensemble([MarkovModel.random(3, seed=0)] * count, ConstantMixing(weights))


def test_no_components_and_bare_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="components must hold at least one language model"):
        Ensemble([], ConstantMixing([1.0]))
    with pytest.raises(TypeError, match=r"mixing must be a Mixing such as ConstantMixing\(\[...\]\)"):
        Ensemble([MarkovModel.random(3, seed=0)], [1.0])  # type: ignore[arg-type]


def test_zero_weights_and_impossible_tokens_never_make_a_nan() -> None:
    impossible = torch.tensor([[1.0, 0.0, 0.0]]).log()
    other = torch.tensor([[0.0, 1.0, 0.0]]).log()
    for weights, expected in (([1.0, 0.0], [1.0, 0.0, 0.0]), ([0.5, 0.5], [0.5, 0.5, 0.0])):
        assert mix([impossible, other], torch.tensor([weights]).log()).exp().tolist() == [expected]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_mixing_is_at_least_float32(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    laws = [torch.full((1, 2), 0.5, dtype=dtype).log() for dtype in dtypes]
    mixed = mix(laws, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    assert mixed.dtype == expected
    assert torch.allclose(mixed.exp(), torch.full((1, 2), 0.5, dtype=expected), atol=2e-3)


def test_a_session_costs_what_its_components_cost() -> None:
    ensemble = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    session = ensemble.session([(0,), (1,)])
    session.log_probs(np.array([0, 1]))
    assert session.cost == Cost(forwards=2, tokens_forwarded=4, reads=4)
    session.append(np.array([0]), torch.tensor([2]))
    session.components[1].log_probs(np.array([0]))
    assert session.cost == Cost(forwards=3, tokens_forwarded=5, reads=5)
