from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing, Mixing
from me_stats.models import Cost, Ensemble
from me_stats.routers import NgramRouter, RecurrentRouter, RouterMixing, Tempered, Thresholded
from me_stats.routers.base import length_batches
from me_stats.samplers import CESampler, MESampler
from tests.routers.toys import KINDS, mixing_of, routed, scrambled, tables

moves = st.lists(st.tuples(st.sets(st.integers(0, 4), min_size=1), st.integers(0, 2)), max_size=8)


def assert_close(mixing: Mixing, found: torch.Tensor, prefixes: Sequence[tuple[int, ...]]) -> None:
    expected = mixing.log_weights(prefixes)
    assert found.dtype == expected.dtype == torch.float64
    assert found.shape == (len(prefixes), mixing.n_components)
    assert float(expected.logsumexp(-1).abs().max()) < 1e-12
    assert float((found.exp() - expected.exp()).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@given(steps=moves, seed=st.integers(0, 3))
def test_sessions_and_paths_equal_the_definition(kind: str, steps: list[tuple[set[int], int]], seed: int) -> None:
    mixing = mixing_of(kind, tables(3, 3, seed=seed), seed=seed)
    prefixes: list[tuple[int, ...]] = [(0,), (1, 2, 1, 0), (0,), (2, 2), ()]
    session = mixing.session(prefixes)
    for rows, token in steps:
        some = np.array(sorted(rows))
        session.append(some, torch.tensor([(token + row) % 3 for row in some.tolist()]))
        for row in some.tolist():
            prefixes[row] = (*prefixes[row], (token + row) % 3)
        asked = some[::-1].copy()
        assert_close(mixing, session.log_weights(asked), [prefixes[row] for row in asked.tolist()])
    assert_close(mixing, session.log_weights(np.arange(5)), prefixes)
    for row in prefixes:
        for cut in {0, len(row) // 2}:
            before = [row[:end] for end in range(cut, len(row))]
            if before:
                assert_close(mixing, mixing.path_log_weights(row[:cut], row[cut:]), before)
    assert mixing.path_log_weights((0, 1), ()).shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "count", "steps", "eos"), [(2, 2, 4, ()), (3, 2, 3, (2,)), (4, 3, 2, ())])
def test_me_draws_from_the_routed_mixture(kind: str, size: int, count: int, steps: int, eos: tuple[int, ...]) -> None:
    for seed in range(3):
        ensemble = routed(kind, size, count, seed=seed, eos=eos)
        law = sequence_law(ensemble, [1], max_new_tokens=steps)
        assert law.total == pytest.approx(1, abs=1e-12)
        for sampler in (MESampler(ensemble), CESampler(ensemble), CESampler(ensemble, latent=True)):
            assert sampler_law(sampler, [1], max_new_tokens=steps).tv_distance(law) < 1e-12


def test_one_seed_couples_me_and_latent_ce() -> None:
    for kind in KINDS:
        ensemble = routed(kind, 4, 3)
        me = MESampler(ensemble).sample([[0], [1, 2]], n=20, max_new_tokens=12, seed=3)
        ce = CESampler(ensemble, latent=True).sample([[0], [1, 2]], n=20, max_new_tokens=12, seed=3, batch_size=7)
        assert torch.equal(me.tokens, ce.tokens)
        assert torch.equal(me.components, ce.components)


def test_a_router_reads_the_prefix() -> None:
    for router in (scrambled(NgramRouter(2, order=2)), scrambled(RecurrentRouter(2, 4, width=3))):
        weights = RouterMixing(router).log_weights([(), (0,), (1,), (0, 1), (1, 1)]).exp()
        assert len({round(value, 6) for value in weights[:, 0].tolist()}) == 5


def test_an_untrained_router_is_a_constant() -> None:
    for router in (NgramRouter(3), RecurrentRouter(3, 4)):
        with torch.no_grad():
            router.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
        weights = RouterMixing(router).log_weights([(), (1, 2)]).exp()
        assert weights.flatten().tolist() == pytest.approx([0.2, 0.3, 0.5] * 2, abs=1e-7)


def test_training_goes_on_without_changing_a_law_in_use() -> None:
    router = scrambled(NgramRouter(2))
    mixing = RouterMixing(router)
    before = mixing.log_weights([(0, 1)])
    scrambled(router, seed=9)
    assert torch.equal(mixing.log_weights([(0, 1)]), before)
    assert not any(parameter.requires_grad for parameter in mixing.router.parameters())


def test_thresholding_takes_the_first_of_equals() -> None:
    for weights, best in (([0.4, 0.4, 0.2], 0), ([0.2, 0.4, 0.4], 1), ([0.0, 0.0, 1.0], 2)):
        assert Thresholded(ConstantMixing(weights)).log_weights([()]).exp().argmax() == best
        assert Thresholded(ConstantMixing(weights)).log_weights([()]).exp().sum() == 1


def test_temperatures_are_powers() -> None:
    weights = torch.tensor([0.1, 0.3, 0.6, 0.0], dtype=torch.float64)
    for t in (0.25, 1.0, 3.0, 1e-4):
        found = Tempered(ConstantMixing(weights), t).log_weights([()])[0].exp()
        powers = (weights / 0.6) ** (1 / t)
        assert found.tolist() == pytest.approx((powers / powers.sum()).tolist(), abs=1e-12)


def test_the_router_s_own_temperature_divides_its_logits() -> None:
    router = scrambled(NgramRouter(3))
    before = RouterMixing(router).tempered(2.0).log_weights([(1, 2)])
    router.temperature.fill_(2.0)
    assert torch.allclose(RouterMixing(router).log_weights([(1, 2)]), before, atol=1e-14, rtol=0)


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_off_the_range_are_refused(t: float) -> None:
    with pytest.raises(ValueError, match=r"t must be finite and positive, got .*; Thresholded is the limit"):
        Tempered(ConstantMixing([1.0]), t)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="router must be a Router such as NgramRouter"):
        RouterMixing(ConstantMixing([1.0]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mixing must be a Mixing such as RouterMixing"):
        Thresholded(NgramRouter(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_components must be an integer of at least 1, got 0"):
        NgramRouter(0)
    with pytest.raises(ValueError, match="mixing has 3 weights for 2 components"):
        Ensemble(tables(3, 2), RouterMixing(NgramRouter(3)))


def test_reading_no_network_costs_nothing() -> None:
    parts = tables(4, 2)
    for mixing in (RouterMixing(NgramRouter(2)), RouterMixing(RecurrentRouter(2, 4)).tempered(2.0)):
        session = Ensemble(parts, mixing).session([(0,)])
        session.mixing.log_weights(np.array([0]))
        assert session.cost == Cost()


def test_nothing_draws_from_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    a, b = RecurrentRouter(2, 5, seed=3), RecurrentRouter(2, 5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, RecurrentRouter(2, 5, seed=4).embedding.weight)


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 64))
def test_batches_hold_every_place_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert [place for batch in batches for place in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[place] for place in batch) * len(batch) <= budget
