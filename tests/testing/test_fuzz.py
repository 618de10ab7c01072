"""Fuzzing samplers: right ones pass, planted bugs are found and come out small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler, SequenceMixtureSampler, exact
from me_stats.equivalence import binomial_interval
from me_stats.models import TableModel, Temperature, Warped
from me_stats.models.joint import Restricted
from me_stats.samplers import FixedMaskSampler, Sampler, SpeculativeSampler
from me_stats.testing import SamplerRejected
from me_stats.testing.fuzz import FuzzRejected, SamplerExample, fuzz_sampler

FEW: dict[str, Any] = {"max_examples": 40, "draws": 2000}
Build = Callable[[Ensemble], Any]


class Outside:
    """A sampler by someone else: numpy, one token at a time, with a bug if asked for."""

    def __init__(self, ensemble: Ensemble, *, bug: str = "") -> None:
        self.ensemble, self.bug = ensemble, bug

    def __call__(self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(None if self.bug == "seedless" else seed)
        eos = self.ensemble.vocabulary.eos
        steps = max_new_tokens + (self.bug == "too long")
        rows = np.full((len(prompts), steps), -1)
        texts = [tuple(prompt) for prompt in prompts]
        if self.bug == "neighbour's prompt":
            texts = [max(texts)] * len(texts)
        alive = np.arange(len(prompts))
        for step in range(steps):
            distinct = sorted({texts[row] for row in alive})
            laws = self.ensemble.log_probs(distinct).exp().numpy()
            place = {text: number for number, text in enumerate(distinct)}
            cdf = laws.cumsum(1)[[place[texts[row]] for row in alive]]
            uniforms = rng.random(len(alive))[:, None] * cdf[:, -1:]
            # A uniform of 0 counts as past tokens of probability zero; the bug lets them win now and then.
            tokens = (uniforms >= cdf).sum(1)
            if self.bug == "impossible":
                tokens[rng.random(len(alive)) < 0.01] = 0
            rows[alive, step] = tokens + (self.bug == "off by one")
            for row, token in zip(alive, tokens.tolist(), strict=True):
                texts[row] = (*texts[row], token)
            if self.bug != "eos ignored":
                alive = alive[~np.isin(tokens, eos)]
            if self.bug == "stops early" and step == 1:
                break
        return rows


def off_by(shift: float) -> Build:
    """ME with λ_1 larger by `shift`."""

    def build(ensemble: Ensemble) -> Sampler:
        weights = ensemble.mixing.weights.clone()
        if len(weights) > 1 and weights[0] <= 1 - shift:
            taken = weights[1:] / weights[1:].sum() * shift
            weights = torch.cat([weights[:1] + shift, (weights[1:] - taken).clamp(min=0)])
        return MESampler(Ensemble(ensemble.components, ConstantMixing(weights / weights.sum())))

    return build


def eos_ignored(ensemble: Ensemble) -> Sampler:
    return MESampler(
        Ensemble([TableModel.from_log_table(c.log_table, order=c.order) for c in ensemble.components], ensemble.mixing)
    )


def rejected(build: Build, **options: Any) -> tuple[SamplerExample, str, FuzzRejected]:
    with pytest.raises(SamplerRejected) as caught:
        fuzz_sampler(build, **options)
    assert isinstance(caught.value, FuzzRejected)
    assert isinstance(caught.value, AssertionError)
    return caught.value.example, str(caught.value), caught.value


def speculative(ensemble: Ensemble) -> Sampler:
    """The mixture, repaired from drafts at a low temperature, one at a time: paths multiply."""
    cold = Ensemble([Warped(part, Temperature(0.5)) for part in ensemble.components], ensemble.mixing)
    return SpeculativeSampler(ensemble, cold, chunk=1)


def fixed_mask(ensemble: Ensemble) -> Sampler:
    """The mixture conditioned on all tokens, each drawn by the fall-back."""
    everything = range(ensemble.vocabulary.size)
    return FixedMaskSampler(Restricted(ensemble.components, ensemble.mixing, everything), attempts=0)


@pytest.mark.parametrize(
    ("sampler", "size"),
    [(MESampler, {}), (CESampler, {}), (fixed_mask, {}), (speculative, {"max_vocabulary": 3, "max_new_tokens": 2})],
)
def test_right_samplers_pass_both_ways(sampler: Build, size: dict[str, Any]) -> None:
    walked = fuzz_sampler(sampler, max_examples=60, min_prompt_length=0, **size)
    assert walked.passed
    assert walked.sequences == 0
    assert [outcome.name for outcome in walked.outcomes] == ["60 ensembles, every path walked"]
    drawn = fuzz_sampler(sampler, exact=False, **FEW)
    assert drawn.passed
    assert drawn.sequences == 40 * 2000
    assert drawn.level == pytest.approx(40 * 1e-12)
    assert drawn.pvalue > 1e-3


def test_right_outside_sampler_passes() -> None:
    assert fuzz_sampler(Outside, seed=1, **FEW).passed


def test_false_alarms_are_as_rare_as_declared() -> None:
    runs = 100

    def alarm(seed: int) -> bool:
        try:
            fuzz_sampler(MESampler, exact=False, max_examples=1, draws=50, level=0.1, max_new_tokens=1, seed=seed)
        except SamplerRejected:
            return True
        return False

    alarms = sum(map(alarm, range(runs)))
    assert binomial_interval(alarms, runs, confidence=1 - 1e-6)[0] <= 0.1


@pytest.mark.parametrize("way", [True, False], ids=["walked", "drawn"])
def test_one_component_per_sequence_shrinks_to_two_of_everything(way: bool) -> None:
    example, message, error = rejected(SequenceMixtureSampler, exact=way, draws=2000)
    assert len(example.ensemble.components) == 2
    assert example.ensemble.vocabulary.size == 2
    assert example.max_new_tokens == 2
    assert example.prompts == ((0,),)
    assert "K = 2 components of weights [0.5, 0.5], V = 2 tokens, eos [], T = 2\n  prompt (0,)\n" in message
    assert "component laws after (0,): [1.0, 0.0], [0.0, 1.0]" in message
    assert error.result is not None
    assert error.result.pvalue <= 1e-12
    assert (error.result.sequences == 0) == way
    # The example runs again as it was.
    law = exact.sequence_law(example.ensemble, example.prompts[0], max_new_tokens=2)
    wrong = exact.sampler_law(SequenceMixtureSampler(example.ensemble), example.prompts[0], max_new_tokens=2)
    assert wrong.tv_distance(law) > 0.1


@pytest.mark.parametrize("way", [True, False], ids=["walked", "drawn"])
def test_wrong_weights_shrink_to_one_token_of_two_components(way: bool) -> None:
    example, message, _ = rejected(off_by(0.05), exact=way, draws=8000)
    assert example.max_new_tokens == 1
    assert len(example.ensemble.components) == 2
    assert example.ensemble.vocabulary.size == 2
    assert "total variation 0.0" in message or "e-value 10^" in message


def test_an_ignored_end_needs_two_tokens() -> None:
    example, message, _ = rejected(eos_ignored)
    assert example.max_new_tokens == 2
    assert len(example.ensemble.components) == 1
    assert "every path walked" in message
    _, message, _ = rejected(eos_ignored, exact=False, **FEW)
    assert "goes on after end-of-sequence token 0" in message


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("impossible", "a continuation that the ensemble cannot write"),
        ("eos ignored", "row (0, 0) goes on after end-of-sequence token 0"),
        ("off by one", "holds id 1, outside the vocabulary 0..0"),
        ("too long", "tokens, more than max_new_tokens=1"),
        ("stops early", "stops after 2 of 3 tokens without an end-of-sequence token"),
        ("neighbour's prompt", "among [("),
    ],
)
def test_bugs_of_outside_samplers_are_named(bug: str, said: str) -> None:
    example, message, error = rejected(lambda ensemble: Outside(ensemble, bug=bug), **FEW)
    assert said in message
    assert f"seed to replay: {example.seed}" in message
    assert error.result is not None
    assert not error.result.passed
    assert error.result.pvalue == 0 or bug == "neighbour's prompt"
    assert ("expected frequency 0, observed 0.0" in message) == (bug == "impossible")
    assert len(example.ensemble.components) == 1 or bug == "neighbour's prompt"


def test_a_sampler_that_ignores_seeds_is_reported_all_the_same() -> None:
    calls = iter(range(10**6))

    def sometimes(ensemble: Ensemble) -> Outside:
        # Wrong once, so that no replay sees it.
        return Outside(ensemble, bug="seedless" if next(calls) else "too long")

    _, message, _ = rejected(sometimes, **FEW)
    assert "it was not rejected: the sampler has random numbers of its own" in message


def test_the_same_call_looks_at_the_same_examples() -> None:
    def seen(seed: int) -> list[Any]:
        worlds: list[Any] = []

        def build(ensemble: Ensemble) -> Sampler:
            worlds.append((repr(ensemble), ensemble.log_probs([()]).tolist()))
            return CESampler(ensemble)

        fuzz_sampler(build, max_examples=15, seed=seed)
        return worlds

    assert seen(0) == seen(0) != seen(1)


def test_build_may_refuse_ensembles() -> None:
    def build(ensemble: Ensemble) -> Sampler:
        assume(len(ensemble.components) == 2)
        return MESampler(ensemble)

    assert fuzz_sampler(build, max_examples=10).outcomes[0].name.startswith("10 ensembles")


def test_a_sampler_that_cannot_be_walked_is_drawn_from() -> None:
    class Refuses(MESampler):
        def sample(self, prompts: Any, **options: Any) -> Any:
            if options.get("draw") is not None:
                raise ValueError("no draw but mine")
            return super().sample(prompts, **options)

    assert fuzz_sampler(Refuses, **FEW).sequences > 0
    with pytest.raises(ValueError, match="no draw but mine"):
        fuzz_sampler(Refuses, exact=True)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        fuzz_sampler(MESampler, draws=0)
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
        fuzz_sampler(MESampler, level=0.0)
    with pytest.raises(TypeError, match="build must return a me_stats sampler or a callable"):
        fuzz_sampler(lambda ensemble: 3)
    with pytest.raises(TypeError, match="exact=True needs a me_stats sampler, got Outside"):
        fuzz_sampler(Outside, exact=True)
