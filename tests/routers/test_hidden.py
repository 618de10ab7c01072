from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TopK, Warped
from me_stats.routers import HiddenStateRouter, RouterMixing
from me_stats.samplers import CESampler, MESampler
from tests.mixtures import ROUNDING, component
from tests.networks import FAMILIES, tiny
from tests.routers.toys import scrambled


@cache
def mixing(width: int | None = None) -> RouterMixing:
    return RouterMixing(scrambled(HiddenStateRouter(component(0), 2, width=width), scale=0.2))


@pytest.mark.parametrize("width", [None, 5])
def test_sessions_and_paths_equal_the_definition(width: int | None) -> None:
    weights = mixing(width)
    prefixes: list[tuple[int, ...]] = [(5, 6, 7), (8,), (5, 6, 7), (9, 3, 1, 4, 1, 5)]
    session = weights.session(prefixes)
    rng = np.random.default_rng(0)
    for _ in range(12):
        some = rng.permutation(4)[: rng.integers(1, 5)]
        tokens = rng.integers(0, 64, len(some))
        session.append(some, torch.from_numpy(tokens))
        for row, token in zip(some.tolist(), tokens.tolist(), strict=True):
            prefixes[row] = (*prefixes[row], token)
        asked = rng.permutation(4)[:2]
        expected = weights.log_weights([prefixes[row] for row in asked.tolist()]).exp()
        assert float((session.log_weights(asked).exp() - expected).abs().max()) < ROUNDING
    for row in prefixes:
        path = weights.path_log_weights(row[:1], row[1:])
        assert path.dtype == torch.float64
        definition = weights.log_weights([row[:end] for end in range(1, len(row))])
        assert float((path.exp() - definition.exp()).abs().max()) < ROUNDING
        # The weights do move along the row, far more than rounding.
        assert float(definition.exp()[:, 0].std()) > 0.01


def test_the_state_is_that_of_the_last_position_however_many_are_read() -> None:
    router = HiddenStateRouter(component(0), 2)
    session = router.stream([(5, 6, 7), (8,), (9, 3)])._session
    session.log_probs_along(np.array([2, 0]), np.array([1, 2]))
    expected = torch.stack([states[-1] for states in router.features([(5, 6, 7), (9, 3)])])
    assert torch.allclose(session.states[[0, 2]], expected, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_architecture_reads_one_state_in_both_ways(family: str) -> None:
    weights = RouterMixing(scrambled(HiddenStateRouter(tiny(family), 3), scale=0.2))
    session = weights.session([(5, 6), (7,)])
    session.log_weights(np.array([1]))
    for row, token in ((0, 8), (0, 9), (1, 10)):
        session.append(np.array([row]), torch.tensor([token]))
    expected = weights.log_weights([(5, 6, 8, 9), (7, 10)]).exp()
    assert float((session.log_weights(np.array([0, 1])).exp() - expected).abs().max()) < 1e-4


def test_me_draws_from_the_routed_mixture() -> None:
    parts = [Warped(component(seed), TopK(3)) for seed in (0, 1)]
    ensemble = Ensemble(parts, mixing())
    law = sequence_law(ensemble, (5, 6), max_new_tokens=2)
    for sampler in (MESampler(ensemble), CESampler(ensemble)):
        assert sampler_law(sampler, (5, 6), max_new_tokens=2).tv_distance(law) < ROUNDING
    # Constant weights, even the router's own first ones, are another law.
    fixed = Ensemble(parts, ConstantMixing(mixing().log_weights([(5, 6)])[0].exp()))
    assert sequence_law(fixed, (5, 6), max_new_tokens=2).tv_distance(law) > 100 * ROUNDING


def test_the_network_s_runs_are_in_the_cost_of_the_ensemble() -> None:
    parts = [MarkovModel.random(64, seed=seed) for seed in (0, 1)]
    routed, constant = (
        MESampler(Ensemble(parts, rule)).sample([5, 6, 7], n=4, max_new_tokens=6, batch_size=4).cost
        for rule in (mixing(), ConstantMixing([0.5, 0.5]))
    )
    # Toys launch a run per step and drawn component; the router one more per step, two where the prompt is shared.
    steps = 6
    assert 2 <= constant.forwards <= 2 * steps
    session = Ensemble(parts, mixing()).session([(5, 6, 7)] * 4)
    for step in range(steps):
        session.mixing.log_weights(np.arange(4))
        session.mixing.log_weights(np.arange(4))  # a second look is free
        if step + 1 < steps:
            session.append(np.arange(4), torch.full((4,), step))
    assert session.cost.forwards == steps + 1
    assert session.cost.tokens_forwarded == 3 + 3 + 4 * (steps - 1)
    assert session.cost.reads == 4 * steps
    assert routed.reads > constant.reads


def test_the_network_is_shared_and_frozen() -> None:
    router = HiddenStateRouter(component(0), 2)
    assert RouterMixing(router).router.model is router.model
    assert router.n_parameters == 2 + 2 * 32
    assert not any("network" in name for name in router.state_dict())
    before = [parameter.dtype for parameter in router.model.network.parameters()]
    RouterMixing(router)
    assert [parameter.dtype for parameter in router.model.network.parameters()] == before


def test_documents_are_read_in_one_pass() -> None:
    router = HiddenStateRouter(component(0), 2)
    found = router.features([(5, 6, 7), (), (5, 6, 7), (8,)])
    assert [tuple(states.shape) for states in found] == [(4, 32), (1, 32), (4, 32), (2, 32)]
    assert not found[0][0].any()
    assert torch.allclose(found[0][1:3], router.features([(5, 6)])[0][1:], atol=1e-4)


def test_networks_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a TransformersModel, whose hidden states"):
        HiddenStateRouter(MarkovModel.random(3, seed=0), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="session='ragged' to route on its hidden state"):
        HiddenStateRouter(tiny(session="prefix"), 2)
    with pytest.raises(ValueError, match="exceed the context window"):
        HiddenStateRouter(component(0), 2).features([[1] * 97])
    with pytest.raises(ValueError, match="an empty prompt"):
        mixing().session([()])
    with pytest.raises(ValueError, match="width must be an integer of at least 1"):
        HiddenStateRouter(component(0), 2, width=0)


def test_a_state_that_is_changed_before_the_output_layer_is_refused() -> None:
    changed = tiny(seed=3)
    HiddenStateRouter(changed, 2)
    changed.network.lm_head.register_forward_pre_hook(lambda _, given: (given[0] * 1.5,))
    with pytest.raises(ValueError, match="changes its last hidden state before the output layer"):
        HiddenStateRouter(changed, 2)
