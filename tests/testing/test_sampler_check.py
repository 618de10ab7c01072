"""check_sampler: right samplers pass as often as declared, wrong ones are named, whatever is known about the law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler, SequenceMixtureSampler, exact
from me_stats.equivalence import binomial_interval
from me_stats.models import MarkovModel, TableModel, Temperature, TopK, Warped
from me_stats.models.joint import Restricted
from me_stats.samplers import FixedMaskSampler, SpeculativeSampler
from me_stats.testing import SamplerRejected, check_sampler

TOYS = [MarkovModel.random(6, seed=s, concentration=0.5) for s in (0, 1)]
ENSEMBLE = Ensemble(TOYS, ConstantMixing([0.6, 0.4]))
SHIFTED = Ensemble(TOYS, ConstantMixing([0.75, 0.25]))
ENDING = Ensemble([MarkovModel.random(6, seed=s, eos=(5,)) for s in (2, 3)], ConstantMixing([0.5, 0.5]))


def speculative(ensemble: Ensemble) -> SpeculativeSampler:
    """The mixture, repaired from drafts at a low temperature."""
    cold = Ensemble([Warped(part, Temperature(0.5)) for part in ensemble.components], ensemble.mixing)
    return SpeculativeSampler(ensemble, cold)


def fixed_mask(ensemble: Ensemble) -> FixedMaskSampler:
    """The mixture conditioned on all tokens."""
    everything = range(ensemble.vocabulary.size)
    return FixedMaskSampler(Restricted(ensemble.components, ensemble.mixing, everything), attempts=0)


@pytest.mark.parametrize("sampler", [MESampler, CESampler, speculative, fixed_mask])
@pytest.mark.parametrize("model", [ENSEMBLE, ENDING], ids=["fixed length", "ends"])
@pytest.mark.parametrize("steps", [1, 12])
def test_right_samplers_pass_and_are_bounded(sampler: Any, model: Ensemble, steps: int) -> None:
    result = check_sampler(sampler(model), model, [[0], [1, 2]], max_new_tokens=steps, n=2000)
    assert result.passed
    assert result.sequences == 4000
    assert result.tv_upper is not None
    assert 0 < result.tv_upper < 0.15
    assert result.tv_lower == 0
    assert 0 < result.min_detectable_tv < 0.15
    assert "not rejected" in str(result)
    assert math.isclose(sum(o.level for o in result.outcomes), result.level, rel_tol=0.3)


def test_levels_of_the_parts_add_up_to_the_level() -> None:
    for steps in (1, 8):
        result = check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [[0], [1]], max_new_tokens=steps, n=500)
        assert sum(outcome.level for outcome in result.outcomes) <= result.level * (1 + 1e-9)


@pytest.mark.parametrize("steps", [1, 6])
def test_false_alarms_are_as_rare_as_declared(steps: int) -> None:
    level, runs = 0.2, 150
    alarms = sum(
        not check_sampler(
            MESampler(ENSEMBLE), ENSEMBLE, [0], max_new_tokens=steps, n=60, level=level, seed=seed, on_fail="return"
        ).passed
        for seed in range(runs)
    )
    assert binomial_interval(alarms, runs, confidence=1 - 1e-6)[0] <= level


def test_one_component_per_sequence_stops_early() -> None:
    with pytest.raises(SamplerRejected, match="REJECTED") as caught:
        check_sampler(SequenceMixtureSampler(ENSEMBLE), ENSEMBLE, [0], max_new_tokens=32)
    result = caught.value.result
    assert result is not None
    assert result.stopped_early
    assert result.tokens < 20_000
    assert result.tv_upper is None
    assert "hidden Markov" in result.worst.detail


def test_wrong_weights_are_found_in_one_step_and_sized() -> None:
    result = check_sampler(MESampler(SHIFTED), ENSEMBLE, [0], n=20_000, on_fail="return")
    gap = 0.15 * float((TOYS[0].log_probs([(0,)]).exp() - TOYS[1].log_probs([(0,)]).exp()).abs().sum() / 2)
    assert not result.passed
    assert result.tv_lower is not None
    assert result.tv_upper is not None
    assert 0 < result.tv_lower < gap < result.tv_upper
    assert "TV of the first token >=" in str(result)


def test_without_early_stopping_a_bug_is_sized_too() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "n": 3000, "on_fail": "return"}
    early = check_sampler(MESampler(SHIFTED), ENSEMBLE, [0], **options)
    late = check_sampler(MESampler(SHIFTED), ENSEMBLE, [0], stop_early=False, **options)
    assert early.stopped_early
    assert early.tokens < late.tokens == 24_000
    assert late.tv_lower
    assert not late.passed


def test_a_sampler_that_ignores_its_seed_is_found() -> None:
    def deaf(prompts: Sequence[Any], *, max_new_tokens: int, seed: int) -> Any:
        return CESampler(ENSEMBLE).sample(prompts, max_new_tokens=max_new_tokens, seed=0).tokens

    for steps in (1, 8):
        result = check_sampler(deaf, ENSEMBLE, [0], max_new_tokens=steps, n=2000, on_fail="return")
        assert not result.passed
        assert "copied rows" in result.worst.name


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([[9, 0]], "outside the vocabulary"),
        ([[5, 0]], "goes on after end-of-sequence"),
        ([[0]], "without an end-of-sequence"),
        ([[0, 1, 2]], "more than max_new_tokens"),
    ],
)
def test_impossible_rows_reject_at_once(rows: list[list[int]], fault: str) -> None:
    def sampler(prompts: Sequence[Any], *, max_new_tokens: int, seed: int) -> Any:
        return rows * len(prompts)

    with pytest.raises(SamplerRejected, match=fault) as caught:
        check_sampler(sampler, ENDING, [0], max_new_tokens=2)
    assert caught.value.result is not None
    assert caught.value.result.pvalue == 0


def test_tokens_of_probability_zero_are_named() -> None:
    truncated = Ensemble([Warped(toy, TopK(2)) for toy in TOYS], ENSEMBLE.mixing)
    for steps in (1, 4):
        result = check_sampler(MESampler(ENSEMBLE), truncated, [0], max_new_tokens=steps, n=200, on_fail="return")
        assert result.pvalue == 0
        assert "probability zero" in result.worst.detail


def test_an_exact_law_is_enough() -> None:
    law = exact.sequence_law(ENDING, [0], max_new_tokens=3)
    passed = check_sampler(MESampler(ENDING), law, [0], max_new_tokens=3, n=20_000)
    assert passed.tv_upper is not None
    assert passed.tv_upper < 0.2
    wrong = SequenceMixtureSampler(ENDING)
    size = exact.sampler_law(wrong, [0], max_new_tokens=3).tv_distance(law)
    result = check_sampler(wrong, law, [0], max_new_tokens=3, n=20_000, on_fail="return")
    assert not result.passed
    assert result.tv_lower is not None
    assert 0 < result.tv_lower < size
    with pytest.raises(SamplerRejected):
        check_sampler(MESampler(ENSEMBLE), law, [0], max_new_tokens=3, n=500)


def test_an_exact_law_is_tested_at_its_level() -> None:
    law, runs = exact.sequence_law(ENDING, [0], max_new_tokens=2), 200
    alarms = sum(
        not check_sampler(
            CESampler(ENDING), law, [0], max_new_tokens=2, n=100, level=0.2, seed=seed, on_fail="return"
        ).passed
        for seed in range(runs)
    )
    assert binomial_interval(alarms, runs, confidence=1 - 1e-6)[0] <= 0.2


def test_a_second_sampler_finds_differences_and_bounds_nothing() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "n": 150, "level": 1e-2}
    same = check_sampler(MESampler(ENSEMBLE), CESampler(ENSEMBLE), [[0], [1]], **options)
    assert same.passed
    assert same.tv_upper is None
    other = Ensemble([TableModel([[0.7, 0.1, 0.05, 0.05, 0.05, 0.05]], order=0), TOYS[1]], ENSEMBLE.mixing)
    with pytest.raises(SamplerRejected):
        check_sampler(MESampler(other), CESampler(ENSEMBLE), [[0], [1]], **options)
    with pytest.raises(ValueError, match="permutations"):
        check_sampler(MESampler(ENSEMBLE), CESampler(ENSEMBLE), [0], level=1e-9)


def test_the_floor_widens_bounds_and_limits_draws() -> None:
    options: dict[str, Any] = {"n": 4000}
    plain = check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], **options)
    floored = check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], floor=0.01, **options)
    assert plain.tv_upper is not None
    assert floored.tv_upper == pytest.approx(plain.tv_upper + 0.01)
    with pytest.raises(ValueError, match="n is too large for floor"):
        check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], floor=0.3, **options)


def test_default_draws_find_what_was_asked_for() -> None:
    coarse = check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], detect=0.2)
    fine = check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], detect=0.1)
    assert coarse.min_detectable_tv <= 0.2
    assert fine.min_detectable_tv <= 0.1
    assert fine.sequences > 3 * coarse.sequences


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_handful_of_rows_decides_nothing(n: int, steps: int) -> None:
    result = check_sampler(MESampler(ENSEMBLE), ENSEMBLE, [[0], [1]], n=n, max_new_tokens=steps)
    assert result.passed
    assert result.tv_upper == 1
    assert result.tv_lower == 0


def test_progress_counts_every_sequence() -> None:
    seen: list[int] = []
    check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [[0], [1]], n=300, progress=seen.append)
    assert sum(seen) == 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer"),
        ({"n": 0}, "n must be an integer"),
        ({"detect": 0}, "detect must lie"),
        ({"level": 1}, "level must lie"),
        ({"floor": 1}, "floor must be"),
        ({"on_fail": "shrug"}, "on_fail must be"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], **options)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="against must be a LanguageModel"):
        check_sampler(CESampler(ENSEMBLE), 3, [0])
    with pytest.raises(TypeError, match="sampler must be"):
        check_sampler(3, ENSEMBLE, [0])
    law = exact.sequence_law(ENDING, [0], max_new_tokens=2)
    with pytest.raises(ValueError, match="one prompt"):
        check_sampler(CESampler(ENDING), law, [[0], [1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be 2"):
        check_sampler(CESampler(ENDING), law, [0], max_new_tokens=1)


def test_it_repeats_itself() -> None:
    one, two = (check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], max_new_tokens=4, n=300, seed=5) for _ in range(2))
    assert one == two
    assert one != check_sampler(CESampler(ENSEMBLE), ENSEMBLE, [0], max_new_tokens=4, n=300, seed=6)
    assert np.isfinite([outcome.pvalue for outcome in one.outcomes]).all()
