"""Where ME and CE part: exact for every transform inside the mixture, and for affine ones alone behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.divergence import tv_distance
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MinP, TableModel, Temperature, TopK, TopP, Warp, Warped
from me_stats.models.joint import Allowed
from me_stats.samplers import CESampler, MESampler
from tests.strategies import ensembles, seeds

TRANSFORMS: dict[str, Warp] = {
    "temperature 0.5": Temperature(0.5),
    "temperature 2": Temperature(2.0),
    "temperature 0": Temperature(0.0),
    "top-k": TopK(2),
    "top-p": TopP(0.6),
    "min-p": MinP(0.3),
    "greedy": Greedy(),
    "mask": Allowed([0, 2]),
}


class Smoothed(Warp):
    """(1 - ε) P + ε/V: affine."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        return (0.9 * log_probs.exp() + 0.1 / log_probs.shape[-1]).log()


class Relabelled(Warp):
    """A Markov kernel from token to token, P M: linear. It merges, splits and permutes."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        size = log_probs.shape[-1]
        kernel = np.random.default_rng(size).dirichlet(np.full(size, 0.3), size)
        return (log_probs.exp() @ torch.from_numpy(kernel)).log()


class Constant(Warp):
    """The same law whatever came in: affine, if nothing else."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        return torch.full_like(log_probs, -np.log(log_probs.shape[-1]))


def random_rows(seed: int, count: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(size), count)


def tables(rows: Any) -> list[TableModel]:
    return [TableModel(row[None], order=0) for row in np.asarray(rows)]


def orders(rows: Any, weights: Any, warp: Warp) -> tuple[Ensemble, Warped]:
    """Transform-then-mix and mix-then-transform of one-step laws (K, V)."""
    toys, mixing = tables(rows), ConstantMixing(weights)
    return Ensemble([Warped(toy, warp) for toy in toys], mixing), Warped(Ensemble(toys, mixing), warp)


def gap(rows: Any, weights: Any, warp: Warp) -> float:
    then_mix, then_transform = (model.log_probs([()])[0] for model in orders(rows, weights, warp))
    return float(tv_distance(then_mix, then_transform))


# --- transform-then-mix: every transform ----------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("count", [2, 3])
def test_inside_the_mixture_every_transform_leaves_ce_and_me_one_law(name: str, count: int) -> None:
    for seed in range(3):
        weights = np.random.default_rng(seed).dirichlet(np.ones(count))
        toys = [TableModel.random(3, seed=10 * seed + i, order=2) for i in range(count)]
        ensemble = Ensemble([Warped(toy, TRANSFORMS[name]) for toy in toys], ConstantMixing(weights))
        law = sequence_law(ensemble, [0], max_new_tokens=3)
        assert sampler_law(MESampler(ensemble), [0], max_new_tokens=3).tv_distance(law) < 1e-12
        assert sampler_law(CESampler(ensemble), [0], max_new_tokens=3).tv_distance(law) < 1e-12


@given(st.data())
def test_a_mixture_of_transforms_drawn_at_random(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles(max_components=3, max_vocabulary=3, max_order=1))
    law = sequence_law(ensemble, [0], max_new_tokens=2)
    me, ce = MESampler(ensemble), CESampler(ensemble)
    assert sampler_law(me, [0], max_new_tokens=2).tv_distance(sampler_law(ce, [0], max_new_tokens=2)) < 1e-12
    assert sampler_law(me, [0], max_new_tokens=2).tv_distance(law) < 1e-12


# --- mix-then-transform: affine transforms only ---------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(2, 6), st.sampled_from([Smoothed(), Relabelled(), Constant()]))
def test_behind_the_mixture_an_affine_transform_changes_nothing(seed: int, count: int, size: int, warp: Warp) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(count))
    assert gap(random_rows(seed, count, size), weights, warp) < 1e-12


@pytest.mark.parametrize("name", TRANSFORMS)
def test_behind_the_mixture_every_other_transform_does(name: str) -> None:
    warp = TRANSFORMS[name]
    gaps = [gap(random_rows(seed, 2, 6), [0.6, 0.4], warp) for seed in range(40)]
    # Arg maxima and top sets agree by chance now and then; a smooth transform never does on laws in general position.
    assert np.mean(np.array(gaps) > 1e-6) > (0.4 if name in ("greedy", "temperature 0") else 0.95)
    # And ME samples the other order: its distance from mix-then-transform is the gap.
    then_mix, then_transform = orders(random_rows(1, 2, 6), [0.6, 0.4], warp)
    me = sampler_law(MESampler(then_mix), [], max_new_tokens=1)
    apart = me.tv_distance(sequence_law(then_transform, [], max_new_tokens=1))
    assert apart == pytest.approx(gaps[1], abs=1e-12)


@given(seeds, st.sampled_from(list(TRANSFORMS.values())), st.integers(3, 6))
def test_degenerate_mixtures_have_no_order(seed: int, warp: Warp, size: int) -> None:
    rows = random_rows(seed, 2, size)
    assert gap(rows[:1], [1.0], warp) < 1e-12
    assert gap(rows, [1.0, 0.0], warp) < 1e-12
    # Weights that are exact in binary: two equal laws must mix to themselves, ties included.
    assert gap(rows[[0, 0]], [0.5, 0.5], warp) < 1e-12


# --- closed forms ---------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(2, 6))
def test_greedy_parts_by_the_weight_that_disagrees(seed: int, count: int, size: int) -> None:
    rows, weights = random_rows(seed, count, size), np.random.default_rng(seed + 1).dirichlet(np.ones(count))
    agrees = rows.argmax(1) == (weights @ rows).argmax()
    assert gap(rows, weights, Greedy()) == pytest.approx(1 - weights[agrees].sum(), abs=1e-12)


@given(seeds, st.floats(0.01, 0.99))
def test_a_fixed_mask_parts_by_the_tilt_of_the_weights(seed: int, weight: float) -> None:
    rows, kept = random_rows(seed, 2, 5), [0, 3, 4]
    masses = rows[:, kept].sum(1)
    tilted = weight * masses[0] / (weight * masses[0] + (1 - weight) * masses[1])
    inside = rows[:, kept] / masses[:, None]
    expected = abs(tilted - weight) * np.abs(inside[0] - inside[1]).sum() / 2
    assert gap(rows, [weight, 1 - weight], Allowed(kept)) == pytest.approx(expected, abs=1e-12)


@given(seeds, st.floats(0.1, 0.9))
def test_a_truncation_that_all_agree_on_is_a_fixed_mask(seed: int, weight: float) -> None:
    # Tokens 0 to 2 lead everywhere, so top-3 keeps them whoever is asked.
    rows = np.sort(random_rows(seed, 2, 6), axis=1)[:, ::-1]
    rows = np.concatenate([rows[:, np.random.default_rng(seed).permutation(3)], rows[:, 3:]], axis=1)
    weights = [weight, 1 - weight]
    assert gap(rows, weights, TopK(3)) == pytest.approx(gap(rows, weights, Allowed([0, 1, 2])), abs=1e-12)


@given(seeds, st.floats(0.01, 0.99), st.floats(0.3, 3.0))
def test_temperature_of_two_tokens_is_a_gap_of_logistic_curves(seed: int, weight: float, tau: float) -> None:
    rows = random_rows(seed, 2, 2)

    def curve(p: Any) -> Any:
        return 1 / (1 + np.exp(-(np.log(p) - np.log1p(-p)) / tau))

    first = rows[:, 0]
    expected = abs(
        weight * curve(first[0]) + (1 - weight) * curve(first[1]) - curve(weight * first[0] + (1 - weight) * first[1])
    )
    assert gap(rows, [weight, 1 - weight], Temperature(tau)) == pytest.approx(expected, abs=1e-9)


@given(seeds, st.floats(0.01, 0.99), st.floats(0.3, 3.0))
def test_temperature_of_disjoint_components_tilts_the_weights(seed: int, weight: float, tau: float) -> None:
    # T(Σ λ_i P_i) = Σ λ''_i T(P_i) with λ''_i ∝ λ_i^(1/τ) Σ P_i^(1/τ).
    rows = np.zeros((2, 6))
    rows[0, :3], rows[1, 3:] = random_rows(seed, 2, 3)
    tilt = np.array([weight, 1 - weight]) ** (1 / tau) * (rows ** (1 / tau)).sum(1)
    expected = abs(tilt[0] / tilt.sum() - weight)
    assert gap(rows, [weight, 1 - weight], Temperature(tau)) == pytest.approx(expected, abs=1e-9)
