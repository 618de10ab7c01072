"""Advice on two laws that differ: one sampler for each case, which runs and draws the law that it is for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from me_stats import samplers
from me_stats.advice import Advice, advise, describe, program
from me_stats.comparison import CauseGap, Comparison, compare_laws
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MarkovModel, TableModel, TopK, Warped
from me_stats.models.joint import Allowed, Restricted, UnionTopK
from me_stats.orders import ORDERS, OrderedLaw, Transforms
from me_stats.routers import BayesRouter
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity.estimate import Estimate

MIXING = ConstantMixing([0.6, 0.4])
TOYS = [MarkovModel.random(3, seed=seed) for seed in (0, 1)]
PLAIN = Ensemble(TOYS, MIXING)
INSIDE = Ensemble([Warped(toy, TopK(2)) for toy in TOYS], MIXING)
AFTER = Warped(PLAIN, TopK(2))
OTHER_WEIGHTS = Ensemble(TOYS, ConstantMixing([0.2, 0.8]))
ROUTED = Ensemble(TOYS, BayesRouter(TOYS, [0.6, 0.4], given=1))
MASKED = Restricted(TOYS, MIXING, [0, 2])
CLOSE = Warped(Ensemble([TOYS[0], TOYS[0]], MIXING), TopK(2))  # one component twice: no order
ONE_LAW = Ensemble([Warped(TOYS[0], TopK(2))] * 2, MIXING)
# Arg maxima that never agree: three in five drafts are refused.
COINS = [TableModel([row], order=0) for row in ([0.9, 0.1], [0.1, 0.9])]
GREEDY = Warped(Ensemble(COINS, ConstantMixing([0.5, 0.5])), Greedy())
SURE = Ensemble([Warped(coin, Greedy()) for coin in COINS], ConstantMixing([0.5, 0.5]))


def compared(p: Any, q: Any, steps: int = 4) -> Comparison:
    sampler = MESampler(p) if isinstance(p, Ensemble) else CESampler(p)
    trace = sampler.sample([0], n=30, max_new_tokens=steps, seed=0)
    return compare_laws(p, q, trace.row_prompts(), trace.sequences())


def codes(p: Any, q: Any, found: Comparison | None = None) -> list[str]:
    return [entry.code for entry in advise(p, q, found or compared(p, q)) if entry.code]


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (INSIDE, AFTER, ["MESampler(p)", "SpeculativeSampler(q, p, chunk=3)"]),
        (AFTER, INSIDE, ["MESampler(q)", "SpeculativeSampler(p, q, chunk=3)"]),
        (PLAIN, OTHER_WEIGHTS, ["MESampler(p)", "MESampler(q)"]),
        (PLAIN, ROUTED, ["MESampler(p)", "MESampler(q)"]),
        (PLAIN, MASKED, ["MESampler(p)", "FixedMaskSampler(q)"]),
        (
            PLAIN, Warped(PLAIN, Allowed([0, 2])),
            ["MESampler(p)", "FixedMaskSampler(Restricted(q.model.components, q.model.mixing, q.warps[0].tokens))"],
        ),
        (AFTER, UnionTopK(TOYS, MIXING, 1), ["CESampler(p)", "CESampler(q)"]),
        (SURE, GREEDY, ["MESampler(p)", "CESampler(q)"]),
        (ONE_LAW, CLOSE, ["MESampler(p)"]),
        (CLOSE, ONE_LAW, ["MESampler(q)"]),
        (AFTER, Warped(PLAIN, TopK(2)), ["CESampler(p)"]),
    ],
)  # fmt: skip
def test_each_pair_of_laws_has_its_samplers(p: Any, q: Any, expected: list[str]) -> None:
    assert codes(p, q) == expected
    for code in expected:
        sampler = eval(code, {**vars(samplers), "Restricted": Restricted, "p": p, "q": q})
        # What is advised for a law draws this law.
        law = p if "(p" in code or code.startswith("SpeculativeSampler(p") else q
        if hasattr(sampler, "attempts"):
            sampler.attempts = 1  # any number draws the same law, and one has fewer paths to walk
        expected_law = sequence_law(law, [0], max_new_tokens=2)
        assert sampler_law(sampler, [0], max_new_tokens=2).tv_distance(expected_law) < 1e-12


def test_a_draft_is_advised_exactly_where_it_is_cheaper() -> None:
    found = compared(INSIDE, AFTER)
    for acceptance, cheaper in ((0.5, False), (0.75, True), (0.99, True)):
        estimate = Estimate(acceptance, 0.01, (acceptance, acceptance), 30, "")
        forecast = dataclasses.replace(found.forecast, acceptance=estimate).at_best()
        assert (forecast.forwards_per_token < 2) == cheaper
        advised = codes(INSIDE, AFTER, dataclasses.replace(found, forecast=forecast))
        repair = f"SpeculativeSampler(q, p, chunk={forecast.chunk})" if cheaper else "CESampler(q)"
        assert advised == ["MESampler(p)", repair]
        other_way = f"SpeculativeSampler(p, q, chunk={forecast.chunk})" if cheaper else "CESampler(p)"
        assert codes(AFTER, INSIDE, dataclasses.replace(found, forecast=forecast)) == ["MESampler(q)", other_way]


def test_laws_within_the_floor_are_one() -> None:
    found = compared(PLAIN, OTHER_WEIGHTS)
    (only,) = advise(PLAIN, OTHER_WEIGHTS, dataclasses.replace(found, floor=0.9))
    assert "one law up to rounding" in only.statement
    assert len(advise(PLAIN, OTHER_WEIGHTS, found)) > 1


def test_what_whole_texts_show_is_said_and_only_then() -> None:
    said = " ".join(entry.statement for entry in advise(SURE, GREEDY, compared(SURE, GREEDY, steps=12)))
    assert "q cannot write at least" in said
    assert "Equal scores on a benchmark do not make them one law" in said
    said = " ".join(entry.statement for entry in advise(PLAIN, OTHER_WEIGHTS, compared(PLAIN, OTHER_WEIGHTS)))
    assert "cannot write" not in said
    assert "benchmark" not in said


def test_the_largest_cause_is_named_where_there_are_several() -> None:
    found = compared(INSIDE, AFTER)
    small, large = (dataclasses.replace(found.step, value=value) for value in (0.01, 0.3))
    causes = [CauseGap("union", small, small), CauseGap("top_p", large, large), CauseGap("greedy", None, large)]
    last = advise(INSIDE, AFTER, found, causes=causes)[-1]
    assert "The largest single cause is top_p: TV 0.3 a step alone" in last.statement
    assert all("cause" not in entry.statement for entry in advise(INSIDE, AFTER, found, causes=causes[:1]))


def test_an_ordered_law_in_words_and_a_program_that_runs() -> None:
    laws = [OrderedLaw(order, Transforms(top_k=5, greedy=True), (0.6, 0.4)) for order in ORDERS[:2]]
    assert describe(laws[0]) == "transform-then-mix, top-k 5, greedy, λ = 0.6, 0.4"
    assert describe(OrderedLaw("published-ce", Transforms(), (1.0,))) == "published-ce, no transform, λ = 1"
    advice = [Advice("", "MESampler(p)"), Advice("no sampler"), Advice("", "CESampler(q)")]
    text = program(["bundled:prose", "bundled:code"], *laws, advice)
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    assert isinstance(MESampler(namespace["p"]), MESampler)
    assert OrderedLaw("mix-then-transform", Transforms(top_k=5, greedy=True), (0.6, 0.4)) == laws[1]
    assert text.endswith("MESampler(p)\nCESampler(q)")
