from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.draws import Draw
from me_stats.exact import SequenceLaw, sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, Temperature, TopK, TopP, Warped
from me_stats.samplers import CESampler, MESampler
from tests.strategies import ensembles, horizons, prompts, seeds, table_models

PAIR = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]))


def by_products(model: Any, prompt: tuple[int, ...], steps: int) -> dict[tuple[int, ...], float]:
    """The law by itertools and the definition alone: no session, no arrays."""
    law = {}
    for path in itertools.product(range(model.vocabulary.size), repeat=steps):
        probability, written = 1.0, []
        for token in path:
            probability *= float(model.log_probs([(*prompt, *written)])[0, token].exp())
            written.append(token)
            if token in model.vocabulary.eos:
                break
        padded = (*written, *[-1] * (steps - len(written)))
        if probability > 0:
            law[padded] = probability
    return law


@given(st.data())
def test_the_sequence_law_is_the_product_of_the_conditionals(data: st.DataObject) -> None:
    model = data.draw(st.one_of(table_models(), ensembles()))
    prompt = data.draw(prompts(model.vocabulary.size))
    steps = data.draw(horizons(model.vocabulary.size, budget=64, most=4))
    law, expected = sequence_law(model, prompt, max_new_tokens=steps), by_products(model, prompt, steps)
    assert [tuple(row) for row in law.sequences.tolist()] == sorted(expected)
    np.testing.assert_allclose(np.exp(law.log_probs), [expected[path] for path in sorted(expected)], rtol=1e-12)
    assert law.total == pytest.approx(1, abs=1e-12)


@given(table_models(max_order=2, eos=[]), st.integers(1, 3))
def test_a_longer_law_has_the_shorter_as_its_marginal(model: TableModel, steps: int) -> None:
    longer = sequence_law(model, [], max_new_tokens=steps + 1)
    marginal = SequenceLaw.collect(longer.sequences[:, :steps], longer.log_probs)
    assert marginal.tv_distance(sequence_law(model, [], max_new_tokens=steps)) < 1e-12


@given(st.data())
def test_distances_are_distances(data: st.DataObject) -> None:
    # One vocabulary; eos may differ, which only changes which sequences there are.
    size = data.draw(st.integers(1, 4))
    a, b, c = (sequence_law(data.draw(table_models(size=size, max_order=1)), [], max_new_tokens=3) for _ in range(3))
    assert a.tv_distance(a) == 0
    assert a.tv_distance(b) == b.tv_distance(a)
    assert 0 <= a.tv_distance(b) <= 1
    assert a.tv_distance(c) <= a.tv_distance(b) + b.tv_distance(c) + 1e-12
    mine, theirs = a.aligned(b)
    assert np.exp(mine).sum() == pytest.approx(1)
    assert np.exp(theirs).sum() == pytest.approx(1)
    best_event = np.maximum(np.exp(mine) - np.exp(theirs), 0).sum()
    assert a.tv_distance(b) == pytest.approx(best_event, abs=1e-12)


def test_laws_without_common_sequences_are_at_distance_one() -> None:
    zero, one = TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)
    a, b = (sequence_law(model, [], max_new_tokens=4) for model in (zero, one))
    assert a.sequences.tolist() == [[0, 0, 0, 0]]
    assert a.tv_distance(b) == 1
    # Of different length too.
    assert a.tv_distance(sequence_law(zero, [], max_new_tokens=2)) == 1


def test_equal_sequences_are_merged_and_impossible_ones_left_out() -> None:
    log_probs = np.log([0.25, 0.5, 0.25, 1.0]) - [0, 0, 0, 800]  # the last underflows to zero
    law = SequenceLaw.collect(np.array([[1, -1], [0, 1], [1, -1], [0, 0]]), log_probs)
    assert law.sequences.tolist() == [[0, 1], [1, -1]]
    assert np.exp(law.log_probs).tolist() == pytest.approx([0.5, 0.5])


# --- the two ends of the theorem, and the transforms between -----------------------------------------------


def one_step(model: Any) -> list[float]:
    return model.log_probs([()]).exp()[0].tolist()


LEFT, RIGHT = TableModel([[0.6, 0.4]], order=0), TableModel([[0.1, 0.9]], order=0)


def both_orders(*warps: Any) -> tuple[Ensemble, Warped]:
    half = ConstantMixing([0.5, 0.5])
    return Ensemble([Warped(m, *warps) for m in (LEFT, RIGHT)], half), Warped(Ensemble([LEFT, RIGHT], half), *warps)


@pytest.mark.parametrize(
    ("warp", "transform_then_mix", "mix_then_transform"),
    [
        # g(P) = P²/ΣP²: the mean of 36/52 and 1/82 against 35²/(35² + 65²)
        (Temperature(0.5), (36 / 52 + 1 / 82) / 2, 0.35**2 / (0.35**2 + 0.65**2)),
        (TopK(1), 0.5, 0.0),
        (TopP(0.7), (0.6 + 0.0) / 2, 0.35),
    ],
)
def test_the_order_of_transform_and_mix_matters(
    warp: Any, transform_then_mix: float, mix_then_transform: float
) -> None:
    before, after = both_orders(warp)
    assert one_step(before)[0] == pytest.approx(transform_then_mix, abs=1e-12)
    assert one_step(after)[0] == pytest.approx(mix_then_transform, abs=1e-12)
    gap = sequence_law(before, [], max_new_tokens=1).tv_distance(sequence_law(after, [], max_new_tokens=1))
    assert gap == pytest.approx(abs(transform_then_mix - mix_then_transform), abs=1e-12)
    assert gap > 0.01
    # ME and CE agree on the first, which is all that ME can run; CE follows the second too.
    law = sequence_law(before, [], max_new_tokens=3)
    assert sampler_law(MESampler(before), [], max_new_tokens=3).tv_distance(law) < 1e-12
    assert sampler_law(CESampler(before), [], max_new_tokens=3).tv_distance(law) < 1e-12
    mixed_first = sequence_law(after, [], max_new_tokens=3)
    assert sampler_law(CESampler(after), [], max_new_tokens=3).tv_distance(mixed_first) < 1e-12
    assert mixed_first.tv_distance(law) > 0.01


@pytest.mark.parametrize("warp", [Temperature(1), TopK(2), TopP(1)])
def test_an_affine_transform_commutes_with_mixing(warp: Any) -> None:
    before, after = (sequence_law(model, [], max_new_tokens=4) for model in both_orders(warp))
    assert before.tv_distance(after) < 1e-12


@given(st.integers(1, 5), seeds, st.floats(0, 1), st.floats(0, 1))
def test_two_weights_are_as_far_apart_as_they_differ(size: int, seed: int, first: float, second: float) -> None:
    # TV(P_λ, P_λ') = |λ − λ'| TV(P_1, P_2), of one token's law
    parts = [TableModel.random(size, seed=seed + i, order=0) for i in (0, 1)]
    a, b = (
        sequence_law(Ensemble(parts, ConstantMixing([1 - weight, weight])), [], max_new_tokens=1)
        for weight in (first, second)
    )
    apart = sequence_law(parts[0], [], max_new_tokens=1).tv_distance(sequence_law(parts[1], [], max_new_tokens=1))
    assert a.tv_distance(b) == pytest.approx(abs(first - second) * apart, abs=1e-12)


# --- what enumeration refuses ---------------------------------------------------------------------------------


def test_a_law_with_too_many_sequences_is_refused() -> None:
    assert len(sequence_law(PAIR, [0], max_new_tokens=4, max_sequences=81).sequences) == 81
    with pytest.raises(ValueError, match="81 sequences after 4 tokens, more than max_sequences=80; shorten"):
        sequence_law(PAIR, [0], max_new_tokens=4, max_sequences=80)


def test_a_sampler_with_too_many_paths_is_refused() -> None:
    assert sampler_law(MESampler(PAIR), [0], max_new_tokens=3, max_paths=216).total == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 216 random paths, more than max_paths=215; shorten"):
        sampler_law(MESampler(PAIR), [0], max_new_tokens=3, max_paths=215)


def test_more_paths_than_integers_are_refused_too() -> None:
    wide = TableModel(np.full((1, 1024), 2.0**-10), order=0)
    with pytest.raises(ValueError, match="random paths, more than max_paths"):
        sampler_law(CESampler(wide), [], max_new_tokens=7)  # 2⁷⁰ paths


@pytest.mark.parametrize("steps", [0, -1])
def test_no_tokens_no_law(steps: int) -> None:
    for law in (
        lambda: sequence_law(PAIR, [0], max_new_tokens=steps),
        lambda: sampler_law(MESampler(PAIR), [0], max_new_tokens=steps),
    ):
        with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1"):
            law()


class OwnCoins(MESampler):
    """A sampler that draws its component from randomness of its own."""

    def _components(
        self,
        log_weights: Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        step: int,
        draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:
        return np.random.Generator(np.random.Philox(step)).choice(2, size=len(rows), p=log_weights[0].exp().numpy())


class LooksAtItsNeighbours(CESampler):
    """A sampler whose rows share the choice of the first row."""

    def _step(self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
        tokens, components = super()._step(batch, positions, step, draw, memory)
        laws = batch.session.log_probs(positions)
        return torch.where(laws.gather(1, tokens[:, None])[:, 0] < -1, tokens[0], tokens), components


class NarrowWindow(CESampler):
    """A sampler that draws from its law cut off at one token, with the cut hidden from the draw."""

    def _step(self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
        tokens, components = super()._step(batch, positions, step, draw, memory)
        return tokens.clamp(max=1), components


def test_a_choice_outside_the_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="some choice does not pass through the draw"):
        sampler_law(OwnCoins(PAIR), [0], max_new_tokens=3)


def test_rows_that_depend_on_each_other_never_pass_as_the_law() -> None:
    law = sequence_law(PAIR, [0], max_new_tokens=3)
    for wrong in (LooksAtItsNeighbours(PAIR), NarrowWindow(PAIR)):
        assert sampler_law(wrong, [0], max_new_tokens=3).tv_distance(law) > 0.01


def test_laws_that_cannot_be_drawn_from_are_refused() -> None:
    class Broken(CESampler):
        def _step(self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
            return draw(torch.full((len(positions), 2), torch.nan), positions, step, stream="token"), None

    with pytest.raises(ValueError, match="cannot draw: a next-token law has a NaN"):
        sampler_law(Broken(PAIR), [0], max_new_tokens=1)


def test_a_sampler_without_choices_has_one_path() -> None:
    fixed = TableModel(np.eye(3)[[0, 1, 2, 0]], order=1)
    law = sampler_law(CESampler(fixed), [0], max_new_tokens=5)
    assert law.sequences.tolist() == [[1, 2, 0, 1, 2]]
    assert law.log_probs.tolist() == [0.0]


def test_rows_end_where_their_sequences_do() -> None:
    law = sequence_law(TableModel([[0.5, 0.5]], order=0, eos=(1,)), [], max_new_tokens=2)
    assert law.rows == [[0, 0], [0, 1], [1]]
    assert [len(row) for row in law.rows] == (law.sequences >= 0).sum(1).tolist()
