"""Comparisons of two laws against enumeration and closed forms; a wrong count, direction or mean must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import comparison
from me_stats.comparison import Comparison, cause_gaps, compare_laws, gaps_along, session_floor, stage_laws, summarise
from me_stats.divergence import tv_distance
from me_stats.exact import sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, TopK, Warped
from me_stats.models.shared import networks
from me_stats.orders import OrderedLaw, Transforms, stages
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity.estimate import Estimate

WEIGHTS = (0.6, 0.4)
TOYS = [MarkovModel.random(5, seed=seed, eos=(4,)) for seed in (0, 1)]
INSIDE = OrderedLaw("transform-then-mix", Transforms(temperature=0.7, top_k=3), WEIGHTS)
AFTER = OrderedLaw("mix-then-transform", Transforms(temperature=0.7, top_k=3), WEIGHTS)
P, Q = INSIDE.over(TOYS), AFTER.over(TOYS)
SURE = 1 - 1e-9  # of an interval that may fail in no run


def drawn(law: Any, n: int = 60, steps: int = 4, seed: int = 0) -> tuple[list[Any], list[Any]]:
    sampler = MESampler(law) if isinstance(law, Ensemble) else CESampler(law)
    trace = sampler.sample([[0], [1]], n=n // 2, max_new_tokens=steps, seed=seed)
    return trace.row_prompts(), trace.sequences()


def single(rows: Sequence[Sequence[float]], weights: Sequence[float] = (0.5, 0.5)) -> Ensemble:
    """A mixture of laws that read no prefix."""
    return Ensemble([TableModel([row], order=0) for row in rows], ConstantMixing(weights))


def by_definition(p: Any, q: Any, prompts: Sequence[Any], tokens: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    """TV and both masses outside, a row at a time, from `log_probs` of each prefix alone."""
    rows = [
        [(*prompt, *path[:step]) for step in range(len(path))] for prompt, path in zip(prompts, tokens, strict=True)
    ]
    distinct = sorted({prefix for row in rows for prefix in row})
    a, b = (law.log_probs(distinct).exp().numpy() for law in (p, q))
    values = {
        "tv": np.abs(a - b).sum(1) / 2, "outside": (a * (b == 0)).sum(1), "missing": (b * (a == 0)).sum(1),
    }  # fmt: skip
    place = {prefix: number for number, prefix in enumerate(distinct)}
    return {name: [found[[place[prefix] for prefix in row]] for row in rows] for name, found in values.items()}


def disagreements(found: Comparison, p: Any, q: Any, prompts: Sequence[Any], tokens: Sequence[Any]) -> list[str]:
    """What of a comparison is not what enumeration says."""
    expected = {name: np.concatenate(values) for name, values in by_definition(p, q, prompts, tokens).items()}
    wrong = []
    for name, estimate in (("tv", found.step), ("outside", found.outside), ("missing", found.missing)):
        if abs(estimate.value - expected[name].mean()) > 1e-9:
            wrong.append(name)
    for gap in found.lengths:
        distance = average_sequence_tv(p, q, gap.length)
        if not gap.tv.interval[0] - 1e-12 <= distance <= gap.tv.interval[1] + 1e-12:
            wrong.append(f"texts of {gap.length}")
        if gap.outside.lower > distance:
            wrong.append(f"bound at {gap.length}")
    return wrong


@cache
def average_sequence_tv(p: Any, q: Any, length: int) -> float:
    """Over the two prompts of `drawn`, by enumeration."""
    laws = [[sequence_law(law, [start], max_new_tokens=length) for law in (p, q)] for start in (0, 1)]
    return float(np.mean([one.tv_distance(other) for one, other in laws]))


# Against enumeration


@pytest.mark.parametrize(("p", "q"), [(P, Q), (Q, P), (P, P)], ids=["p q", "q p", "p p"])
def test_every_number_is_what_enumeration_says(p: Any, q: Any) -> None:
    prompts, tokens = drawn(p, n=600)
    assert len(set(map(len, tokens))) > 2  # rows that end count by their prefixes
    found = compare_laws(p, q, prompts, tokens, confidence=SURE)
    assert disagreements(found, p, q, prompts, tokens) == []
    expected = by_definition(p, q, prompts, tokens)
    tv = np.concatenate(expected["tv"])
    assert (found.prefixes, found.largest) == (len(tv), pytest.approx(tv.max()))
    assert list(found.quantiles.values()) == pytest.approx(np.quantile(tv, list(found.quantiles)))
    assert found.row_tv == pytest.approx([row.mean() for row in expected["tv"]])
    assert found.forecast.acceptance.value == pytest.approx(1 - tv.mean())
    assert found.forecast.n_networks == 2
    assert found.forecast.chunk == found.forecast.best_chunk
    assert [gap.length for gap in found.lengths] == [1, 2, 4]
    widths = np.subtract(*np.array([gap.tv.interval for gap in found.lengths]).T)
    assert (widths > -0.3).all()


def swapped(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, q: original(q, p)


def mean_of_row_means(original: Callable[..., Estimate]) -> Callable[..., Estimate]:
    def mean(values: Any, groups: Any, **options: Any) -> Estimate:
        rows = [np.mean(values[groups == group]) for group in np.unique(groups)]
        return original(np.array(rows), np.arange(len(rows)), **options)

    return mean


def other_way_round(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ratio, **options: original(np.where(np.isfinite(ratio), -ratio, 0.0), **options)


@pytest.mark.parametrize(
    ("name", "bug", "seen"),
    [
        ("_escaped", swapped, "outside"),
        ("clustered_mean", mean_of_row_means, "tv"),
        ("sequence_tv", other_way_round, "texts of 4"),
    ],
)
def test_planted_bugs_show(name: str, bug: Callable[[Any], Any], seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = P, Q
    prompts, tokens = drawn(p, n=600)
    assert disagreements(compare_laws(p, q, prompts, tokens, confidence=SURE), p, q, prompts, tokens) == []
    monkeypatch.setattr(comparison, name, bug(getattr(comparison, name)))
    assert seen in disagreements(compare_laws(p, q, prompts, tokens, confidence=SURE), p, q, prompts, tokens)


def test_two_tokens_by_hand() -> None:
    p, q = single([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0]]), single([[0.6, 0.0, 0.4], [0.6, 0.0, 0.4]])
    found = compare_laws(p, q, [()] * 3, [(0, 1), (0, 0), (1, 0)], lengths=[2, 1, 0, 9])
    assert found.step.value == pytest.approx(0.4)
    assert (found.outside.value, found.missing.value) == (pytest.approx(0.4), pytest.approx(0.4))
    assert [gap.length for gap in found.lengths] == [1, 2]
    # Two of three rows hold token 1, which q never writes; q/p = 1 for token 0.
    assert [gap.tv.value for gap in found.lengths] == pytest.approx([1 / 3, 2 / 3])
    # 0.4 escapes at the first step, and at the second one in the two rows that are not lost yet.
    assert found.lengths[1].outside.value == pytest.approx((0.8 + 0.8 + 0.4) / 3)


def test_laws_without_a_common_token() -> None:
    p, q = single([[1.0, 0.0], [1.0, 0.0]]), single([[0.0, 1.0], [0.0, 1.0]])
    found = compare_laws(p, q, [(), ()], [(0, 0), (0, 0)])
    assert (found.step.value, found.outside.value, found.missing.value) == (1.0, 1.0, 1.0)
    assert found.forecast.acceptance.value == 0.0
    assert found.forecast.forwards_per_token == 1 + len(networks(p, q))


# Causes


@pytest.mark.parametrize("order", ["mix-then-transform", "published-ce", "union-joint"])
def test_causes_alone_and_together_end_at_the_distance(order: Any) -> None:
    second = OrderedLaw(order, INSIDE.transforms, WEIGHTS)
    q, way = second.over(TOYS), stages(INSIDE, second, TOYS)
    prompts, tokens = drawn(P)
    found = compare_laws(P, q, prompts, tokens, others=stage_laws(way))
    causes = cause_gaps(found, way)
    assert [cause.name for cause in causes] == [stage.name for stage in way]
    assert causes[-1].cumulative == found.step
    assert causes[0].alone == causes[0].cumulative or len(way) == 1
    for cause, stage in zip(causes, way, strict=True):
        for estimate, law in ((cause.alone, stage.alone), (cause.cumulative, stage.cumulative)):
            expected = np.concatenate(by_definition(P, law, prompts, tokens)["tv"]).mean()
            assert estimate is not None
            assert estimate.value == pytest.approx(expected, abs=1e-9)


def test_weights_and_settings_come_first_and_other_causes_have_no_meaning_alone() -> None:
    second = OrderedLaw("mix-then-transform", Transforms(top_k=3), (0.5, 0.5))
    way = stages(INSIDE, second, TOYS)
    prompts, tokens = drawn(P)
    causes = cause_gaps(compare_laws(P, second.over(TOYS), prompts, tokens, others=stage_laws(way)), way)
    assert [(cause.name, cause.alone is None) for cause in causes] == [
        ("weights", False), ("settings", False), ("top_k", True),
    ]  # fmt: skip
    tilted = OrderedLaw("transform-then-mix", INSIDE.transforms, (0.5, 0.5)).over(TOYS)
    expected = np.concatenate(by_definition(P, tilted, prompts, tokens)["tv"]).mean()
    assert causes[0].cumulative.value == pytest.approx(expected)


def test_a_single_cause_is_the_whole_distance() -> None:
    first, second = (OrderedLaw(order, Transforms(top_k=2), WEIGHTS) for order in ("transform-then-mix", AFTER.order))
    way = stages(first, second, TOYS)
    prompts, tokens = drawn(first.over(TOYS))
    found = compare_laws(first.over(TOYS), second.over(TOYS), prompts, tokens, others=stage_laws(way))
    (cause,) = cause_gaps(found, way)
    assert cause.cumulative == found.step
    assert cause.alone is not None
    assert cause.alone.value == pytest.approx(found.step.value, abs=1e-12)


# The worst prefixes


def test_the_worst_prefix_is_the_one_where_the_laws_differ() -> None:
    same = np.full((4, 4), 0.25)
    apart = same.copy()
    apart[2] = [0.7, 0.1, 0.1, 0.1]
    p, q = (MarkovModel(np.full(4, 0.25), table) for table in (same, apart))
    tokens = [(0, 1, 3), (1, 2, 0), (3, 0, 1), (2, 1, 1)]
    found = compare_laws(p, q, [(1,), (3,), (0,), (1,)], tokens, worst=3)
    assert [(prefix.row, prefix.step, prefix.tokens) for prefix in found.worst] == [
        (1, 2, (3, 1, 2)), (3, 1, (1, 2)), (0, 0, (1,)),
    ]  # fmt: skip
    assert found.worst[0].tv == pytest.approx(0.45)
    assert found.worst[2].tv == 0.0
    token, of_p, of_q = found.worst[0].at_fault[0]
    assert (token, of_p, of_q) == (0, pytest.approx(0.25), pytest.approx(0.7))
    assert [len(found.worst), len(compare_laws(p, q, [(1,)] * 4, tokens, worst=0).worst)] == [3, 0]


def test_of_equal_prefixes_the_first_is_shown() -> None:
    p, q = single([[0.5, 0.5], [0.5, 0.5]]), single([[1.0, 0.0], [1.0, 0.0]])
    found = compare_laws(p, q, [()] * 3, [(0, 0, 0)] * 3, worst=2)
    assert [(prefix.row, prefix.step) for prefix in found.worst] == [(0, 0), (1, 0)]


# Parts, rounding and refusals


def test_rows_read_in_parts_make_the_same_comparison() -> None:
    prompts, tokens = drawn(P, n=20)
    others = {"other": AFTER.over(TOYS)}
    whole = compare_laws(P, Q, prompts, tokens, others=others, lengths=[1, 3], worst=3)
    rows = [row for part in (slice(0, 7), slice(7, 20))
            for row in gaps_along(P, Q, prompts[part], tokens[part], others=others)]  # fmt: skip
    again = summarise(rows, prompts, tokens, n_networks=2, lengths=[1, 3], worst=3)
    assert np.array_equal(whole.row_tv, again.row_tv)
    for name in ("step", "quantiles", "outside", "missing", "others", "lengths", "worst", "forecast", "prefixes"):
        assert getattr(whole, name) == getattr(again, name), name
    ticks: list[int] = []
    compare_laws(P, Q, prompts, tokens, progress=ticks.append)
    assert ticks == [1] * 20


def test_tokens_that_p_excludes_are_refused_unless_rounding_explains_them() -> None:
    p, q = Warped(single([[0.6, 0.3, 0.1]] * 2), TopK(2)), single([[0.4, 0.3, 0.3]] * 2)
    tokens = [(0, 1) * 20] * 25
    compare_laws(p, q, [()] * 25, tokens)
    flipped = [(2, *tokens[0][1:]), *tokens[1:]]
    with pytest.raises(ValueError, match="1 of 1000 tokens are excluded by p, and a floor of 0 "):
        compare_laws(p, q, [()] * 25, flipped)
    found = compare_laws(p, q, [()] * 25, flipped, floor=1e-3)
    assert np.isfinite(found.lengths[-1].tv.interval).all()
    assert found.lengths[-1].tv.interval[1] - found.lengths[-1].tv.interval[0] > 0.04
    with pytest.raises(ValueError, match="25 of 1000 tokens are excluded by p"):
        compare_laws(p, q, [()] * 25, [(2, *path[1:]) for path in tokens], floor=1e-3)


def test_a_floor_widens_what_is_said_of_texts_by_its_size_at_every_token() -> None:
    prompts, tokens = drawn(P, n=200)
    exact, rounded = (compare_laws(P, Q, prompts, tokens, floor=floor) for floor in (0.0, 0.01))
    assert exact.lengths[-1].outside.lower > 0.04
    for one, other in zip(exact.lengths, rounded.lengths, strict=True):
        low, high = one.tv.interval
        assert other.tv.interval == (max(0.0, low - 0.01 * one.length), min(1.0, high + 0.01 * one.length))
        assert other.outside.lower == max(0.0, one.outside.lower - 0.01 * one.length)
    assert (exact.step, exact.outside) == (rounded.step, rounded.outside)


def test_the_floor_is_what_moves_a_law_as_drawn() -> None:
    class Forced(TableModel):
        """Teacher forcing that gives another law than the definition."""

        def path_log_probs(self, prompts: Any, tokens: Any) -> Any:
            for path in tokens:
                yield torch.tensor([0.5, 0.5], dtype=torch.float64).log().expand(len(path), 2)

    tokens = [(0, 1, 0), (1,)]
    assert session_floor(P, [(0,), (1,)], tokens).max() < 1e-12
    assert session_floor(Forced([[0.8, 0.2]], order=0), [(), ()], tokens) == pytest.approx([0.3] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [(0, 1)], "prompts": [(0,)]}, "at least two rows, got 1"),
        ({"tokens": [(0, 1), ()]}, "no empty row"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"q": MarkovModel.random(5, seed=0)}, "p and q have different vocabularies"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = {"p": TOYS[0], "q": TOYS[1], "prompts": [(0,), (1,)], "tokens": [(0, 1), (1, 2)]} | change
    with pytest.raises(ValueError, match=message):
        compare_laws(**given)


def test_distances_are_those_of_the_divergence_module() -> None:
    prompts, tokens = drawn(P, n=4)
    (row, *_) = gaps_along(P, Q, prompts, tokens)
    laws = [law.log_probs([prompts[0]])[0] for law in (P, Q)]
    assert row.tv[0] == pytest.approx(tv_distance(*laws))
