from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.draws import Draw
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel, Warped
from me_stats.models.joint import Allowed, Restricted, UnionTopK
from me_stats.samplers import FixedMaskSampler, MESampler
from tests.stand_ins import Ledger
from tests.strategies import LastTokenMixing, ensembles, horizons, prompts, seeds

TOYS = [TableModel.random(3, seed=seed, order=2) for seed in (0, 1, 2)]
WEIGHTS = ([0.3, 0.3, 0.4], [0.9, 0.05, 0.05], [0.0, 0.5, 0.5])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("allowed", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize(("attempts", "steps"), [(0, 4), (1, 3), (2, 2)])
def test_any_number_of_attempts_has_the_law_of_the_conditioned_mixture(
    weights: list[float], allowed: list[int], attempts: int, steps: int
) -> None:
    target = Restricted(TOYS, ConstantMixing(weights), allowed)
    law = sequence_law(target, [0], max_new_tokens=steps)
    assert law.total == pytest.approx(1, abs=1e-12)
    sampler = FixedMaskSampler(target, attempts=attempts)
    assert sampler_law(sampler, [0], max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data())
def test_toys_of_any_kind(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles(max_components=3, max_vocabulary=3))
    size = ensemble.vocabulary.size
    allowed = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    prompt = data.draw(prompts(size))
    attempts = data.draw(st.integers(0, 2))
    choices = (size * len(ensemble.components)) ** (attempts + 1)
    steps = data.draw(horizons(choices, budget=2048, most=3))
    target = Restricted(ensemble.components, ensemble.mixing, allowed)
    sampler = FixedMaskSampler(target, attempts=attempts)
    try:
        law = sequence_law(target, prompt, max_new_tokens=steps)
    except ValueError:
        # A set that the mixture cannot write at some prefix: the sampler, which may get there, must say so too.
        with pytest.raises(ValueError, match="no mass to the allowed tokens"):
            sampler_law(sampler, prompt, max_new_tokens=steps)
    else:
        assert sampler_law(sampler, prompt, max_new_tokens=steps).tv_distance(law) < 1e-12


def test_a_router_may_set_the_weights() -> None:
    router = LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(3), 4))
    target = Restricted(TOYS, router, [0, 2])
    law = sequence_law(target, [1], max_new_tokens=2)
    assert sampler_law(FixedMaskSampler(target, attempts=1), [1], max_new_tokens=2).tv_distance(law) < 1e-12


# --- planted bugs ---------------------------------------------------------------------------------------


class RedrawsTokenOnly(FixedMaskSampler):
    """Keeps the component of the first pair and redraws its token until it is allowed."""

    def _step(
        self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        rows, session = batch.rows[positions], batch.session
        chosen = draw(session.mixing.log_weights(positions), rows, step, stream="component").numpy()
        laws = torch.stack([component.log_probs(positions) for component in session.components])
        own = laws[torch.from_numpy(chosen), torch.arange(len(rows))].masked_fill(~self.model.mask, -torch.inf)
        return draw(own.log_softmax(-1), rows, step, stream="token"), chosen


class KeepsWeights(FixedMaskSampler):
    """Draws m from λ where P_m(A) should tilt it."""

    def _tilted(self, pair: Any, laws: Any, log_weights: Tensor, waiting: np.ndarray) -> Any:
        class Flat:
            def of(self, i: int, places: np.ndarray) -> tuple[Tensor, Tensor | None]:
                law, index = laws.of(i, places)
                law = law if index is None else law[index]
                return target_mask(law), None

        def target_mask(law: Tensor) -> Tensor:
            return law.masked_fill(~self.model.mask, -torch.inf).log_softmax(-1)

        return super()._tilted(pair, Flat(), log_weights, waiting)  # type: ignore[arg-type]


def test_redrawing_only_the_token_is_the_law_of_masks_inside_the_components() -> None:
    mixing = ConstantMixing([0.4, 0.6])
    toys = [TableModel([row], order=0) for row in ([0.8, 0.1, 0.1], [0.1, 0.2, 0.7])]
    target = Restricted(toys, mixing, [0, 1])
    right = sequence_law(target, [], max_new_tokens=1)
    for wrong in (RedrawsTokenOnly(target), KeepsWeights(target, attempts=0)):
        law = sampler_law(wrong, [], max_new_tokens=1)
        inside = Ensemble([Warped(toy, Allowed([0, 1])) for toy in toys], mixing)
        assert law.tv_distance(sequence_law(inside, [], max_new_tokens=1)) < 1e-12
        # |λ'_1 - λ_1| TV(P_1(.|A), P_2(.|A)), with λ'_1 = .4·.9/(.4·.9 + .6·.3).
        assert law.tv_distance(right) == pytest.approx((2 / 3 - 0.4) * (8 / 9 - 1 / 3))
    assert sampler_law(FixedMaskSampler(target, attempts=0), [], max_new_tokens=1).tv_distance(right) < 1e-12


# --- random numbers and cost ----------------------------------------------------------------------------


@given(seeds, st.integers(0, 3))
def test_no_random_number_is_used_twice(seed: int, attempts: int) -> None:
    target = Restricted(TOYS, ConstantMixing([0.3, 0.3, 0.4]), [1])
    ledger = Ledger(seed)
    FixedMaskSampler(target, attempts=attempts).sample([0], n=5, max_new_tokens=6, draw=ledger)
    assert len(ledger.asked) == len(set(ledger.asked))


def test_rows_do_not_depend_on_their_batch_and_the_first_pair_is_mes() -> None:
    mixing = ConstantMixing([0.3, 0.3, 0.4])
    sampler = FixedMaskSampler(Restricted(TOYS, mixing, [0, 2]), attempts=2)
    whole = sampler.sample([[0], [1, 2]], n=40, max_new_tokens=8, seed=3)
    small = sampler.sample([[0], [1, 2]], n=40, max_new_tokens=8, seed=3, batch_size=7)
    assert torch.equal(whole.tokens, small.tokens)
    assert whole.components is not None
    assert small.components is not None
    assert torch.equal(whole.components, small.components)
    assert not bool((whole.tokens == 1).any())
    me = MESampler(Ensemble(TOYS, mixing)).sample([[0], [1, 2]], n=40, max_new_tokens=8, seed=3, batch_size=80)
    assert me.components is not None
    accepted = me.tokens[:, 0] != 1
    assert torch.equal(whole.tokens[accepted, 0], me.tokens[accepted, 0])
    assert torch.equal(whole.components[accepted, 0], me.components[accepted, 0])


def test_a_component_runs_once_a_token_and_the_fall_back_runs_all() -> None:
    target = Restricted(TOYS, ConstantMixing([0.3, 0.3, 0.4]), [0, 1, 2])
    given_options: dict[str, Any] = {"n": 1, "max_new_tokens": 50, "batch_size": 1}
    assert FixedMaskSampler(target, attempts=0).sample([0], **given_options).cost.forwards == 150
    # Every pair is accepted, as under ME.
    assert FixedMaskSampler(target, attempts=3).sample([0], **given_options).cost.forwards == 50
    rare = FixedMaskSampler(Restricted(TOYS, ConstantMixing([0.3, 0.3, 0.4]), [1]), attempts=40)
    assert 50 < rare.sample([0], **given_options).cost.forwards <= 150


def test_only_fixed_sets_are_taken() -> None:
    with pytest.raises(TypeError, match="a set that changes with the laws is no fixed mask; SpeculativeSampler"):
        FixedMaskSampler(UnionTopK(TOYS, ConstantMixing(WEIGHTS[0]), 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attempts must be an integer of at least 0"):
        FixedMaskSampler(Restricted(TOYS, ConstantMixing(WEIGHTS[0]), [0]), attempts=-1)
    assert repr(FixedMaskSampler(Restricted(TOYS, ConstantMixing(WEIGHTS[0]), [0]))).endswith("attempts=8)")
