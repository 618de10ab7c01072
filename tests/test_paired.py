"""Paired differences of accuracies: coverage and size by simulation, planted mistakes, closed forms, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from me_stats import paired
from me_stats.paired import PairedDifference, detectable_margin, items_needed, paired_difference

Floats = NDArray[np.float64]
Sample = tuple[Floats, Floats, float, float]

REPEATS = 300
# (a, b) of the items' beta law, I, R, R': accuracies from .02 to .98, few items, few runs.
SETTINGS = [
    ((1, 1), 12, 2, 2), ((0.3, 0.3), 40, 5, 5), ((0.05, 2), 30, 3, 2), ((4, 0.1), 30, 2, 2), ((0.5, 2), 10, 1, 1),
    ((2, 2), 100, 1, 4),
]  # fmt: skip


def scored(rng: np.random.Generator, right: Floats, runs: int) -> Floats:
    """Scores (I, R) of items that are answered right with probabilities (I, 1)."""
    return np.asarray(rng.uniform(size=(len(right), runs)) < right, dtype=np.float64)


def draws(
    shape: tuple[float, float], items: int, runs: int, other_runs: int, *, shift: float, seed: int = 0,
    repeats: int = REPEATS,
) -> Iterator[Sample]:  # fmt: skip
    """Scores of both arms, the true difference of these items, and that of items like these.

    The second arm answers an item right only where a coin of 1 - `shift`, tossed per item, allows it.
    """
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        right = rng.beta(*shape, size=(items, 1))
        other = right * (rng.uniform(size=(items, 1)) >= shift)
        x, y = (scored(rng, p, r) for r, p in ((runs, right), (other_runs, other)))
        yield x, y, float((right - other).mean()), shift * shape[0] / sum(shape)


def miss_bound(level: float, repeats: int = REPEATS) -> int:
    """As many misses as a procedure of this level shows once in 1e9 runs."""
    return int(stats.binom.isf(1e-9, repeats, level))


def misses(samples: Iterator[Sample], interval: Callable[[PairedDifference], Any], *, fixed: bool) -> int:
    count = 0
    for x, y, here, everywhere in samples:
        low, high = interval(paired_difference(x, y))
        count += not low <= (here if fixed else everywhere) <= high
    return count


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "items", "runs", "other"), SETTINGS)
def test_both_intervals_cover(shape: Any, items: int, runs: int, other: int, shift: float) -> None:
    missed = np.zeros(4, dtype=int)
    widths = []
    for x, y, here, everywhere in draws(shape, items, runs, other, shift=shift):
        found = paired_difference(x, y)
        readings = ((found.these_items, here), (found.items_like_these, everywhere))
        for place, (reading, truth) in enumerate(readings):
            for kind, (low, high) in enumerate((reading.estimate.interval, reading.guaranteed)):
                missed[2 * place + kind] += not low <= truth <= high
        low, high = found.these_items.estimate.interval
        widths.append(high - low)
    assert (missed <= miss_bound(0.05)).all(), missed
    assert min(widths) > 0


def test_no_variance_is_no_certainty() -> None:
    """The honest minimum: 3.84 weights of one observation where the exact Poisson bound says 3.69."""
    for score in (0.0, 1.0):
        found = paired_difference(np.full((50, 4), score), np.full((50, 2), score), margin=0.05)
        z2 = stats.norm.ppf(0.975) ** 2
        assert found.these_items.estimate.interval == pytest.approx((-z2 / 100, z2 / 100))
        assert found.these_items.estimate.interval[1] >= -math.log(0.025) / 100
        assert found.items_like_these.estimate.interval[1] == pytest.approx(stats.t.ppf(0.975, 49) ** 2 / 50)
        assert found.these_items.pvalue == 1
        assert found.these_items.equivalent is True
        assert found.items_like_these.equivalent is False
        assert found.split is not None
        assert found.split.icc == (0.0, 0.0)
        assert found.split.design_effect(5) == 1


@pytest.mark.parametrize(("items", "runs", "other"), [(1, 1, 1), (1, 5, 3), (2, 1, 1), (2, 2, 1)])
def test_the_smallest_arrays_give_wide_and_finite_readings(items: int, runs: int, other: int) -> None:
    for value in (0.0, 1.0):
        found = paired_difference(np.full((items, runs), value), np.zeros((items, other)), margin=0.5)
        for reading in (found.these_items, found.items_like_these):
            low, high = reading.estimate.interval
            assert -1 <= low < high <= 1
            assert high - low > 0.5
            assert reading.guaranteed[0] < reading.guaranteed[1]
            numbers = (reading.pvalue, reading.equivalence_pvalue, reading.smallest_margin)
            assert all(number is not None and 0 <= number <= 1 for number in numbers)
        assert found.split is None
    if items == 1:
        assert found.items_like_these.estimate.interval == (-1.0, 1.0)
        assert found.items_like_these.equivalent is False


# Planted mistakes


def pooled(found: PairedDifference, x: Floats, y: Floats) -> tuple[float, float]:
    """Every run taken for an item of its own."""
    radius = 1.96 * math.sqrt(x.var(ddof=1) / x.size + y.var(ddof=1) / y.size)
    value = found.these_items.estimate.value
    return value - radius, value + radius


def test_runs_that_pass_for_items_are_rejected() -> None:
    shape, items, runs = (0.3, 0.3), 40, 8
    wrong = right = 0
    for x, y, _, everywhere in draws(shape, items, runs, runs, shift=0.4):
        found = paired_difference(x, y)
        low, high = pooled(found, x, y)
        wrong += not low <= everywhere <= high
        low, high = found.items_like_these.estimate.interval
        right += not low <= everywhere <= high
    assert right <= miss_bound(0.05) < wrong


def test_ignoring_the_pairing_of_items_gives_a_wider_interval() -> None:
    for x, y, _, _ in draws((0.3, 0.3), 200, 5, 5, shift=0.1, repeats=20):
        own = paired_difference(x, y)
        unpaired = math.sqrt((x.mean(1).var(ddof=1) + y.mean(1).var(ddof=1)) / len(x))
        assert own.items_like_these.estimate.stderr < 0.75 * unpaired


def test_one_run_has_no_variance_of_its_own_and_zero_in_its_place_is_rejected() -> None:
    zero = kept = 0
    for x, y, here, _ in draws((1, 1), 30, 1, 1, shift=0.0):
        found = paired_difference(x, y)
        value, step = found.these_items.estimate.value, 1 / 30
        low, high = found.these_items.estimate.interval
        kept += not low <= here <= high
        zero += abs(value - here) > 0.5 * step  # an interval with no width but rounding
    assert kept <= miss_bound(0.05) < zero


def test_squared_differences_are_at_least_the_variance_of_one_run() -> None:
    variances = [
        paired_difference(x, y).these_items.estimate.stderr ** 2 for x, y, *_ in draws((1, 1), 60, 1, 1, shift=0)
    ]
    truth = 2 * (1 / 6) / 60  # E p(1-p) = 1/6, and both arms have the same p
    assert np.mean(variances) == pytest.approx(truth, rel=0.03)
    shifted = [
        paired_difference(x, y).these_items.estimate.stderr ** 2 for x, y, *_ in draws((1, 1), 60, 1, 1, shift=0.5)
    ]
    assert np.mean(shifted) > (1 / 6 + 1 / 12) / 60


def test_runs_that_share_their_draws_are_compared_run_by_run() -> None:
    rng = np.random.default_rng(3)
    missed, narrower = 0, 0
    for _ in range(REPEATS):
        p, u = rng.beta(1, 1, size=(40, 1)), rng.uniform(size=(40, 4))
        q = np.clip(p - 0.1, 0, 1)
        x, y = (u < p) * 1.0, (u < q) * 1.0
        coupled, apart = (paired_difference(x, y, paired_runs=paired).these_items for paired in (True, False))
        low, high = coupled.estimate.interval
        missed += not low <= float((p - q).mean()) <= high
        narrower += coupled.estimate.stderr < apart.estimate.stderr
        assert coupled.guaranteed[1] > apart.guaranteed[1] or coupled.guaranteed[1] == 1
    assert missed <= miss_bound(0.05)
    assert narrower == REPEATS


# Tests against a margin


@pytest.mark.parametrize(("shape", "items", "runs", "other"), SETTINGS)
def test_two_one_sided_tests_keep_their_level_at_the_margin(shape: Any, items: int, runs: int, other: int) -> None:
    shift = 0.3
    wrongly = np.zeros(2, dtype=int)
    for x, y, here, everywhere in draws(shape, items, runs, other, shift=shift, seed=1):
        for place, truth in enumerate((here, everywhere)):
            if 0 < truth < 1:
                found = paired_difference(x, y, margin=truth)
                wrongly[place] += bool((found.these_items, found.items_like_these)[place].equivalent)
    assert (wrongly <= miss_bound(0.05)).all(), wrongly


def test_a_test_at_the_level_that_ignores_rare_scores_is_rejected() -> None:
    """Plain standard errors pass half of all arms that differ by the margin, where scores are rare."""
    plain = own = 0
    for x, y, here, _ in draws((0.05, 2), 30, 2, 2, shift=1.0, seed=2):
        if here > 0:
            found = paired_difference(x, y, margin=here).these_items
            plain += abs(found.estimate.value) + 1.645 * found.estimate.stderr < here
            own += bool(found.equivalent)
    assert own <= miss_bound(0.05) < plain


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_readings_agree_with_themselves(seed: int, items: int, runs: int, other: int, rounded: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.uniform(size=(items, r)) for r in (runs, other))
    if rounded:
        x, y = x.round(), y.round()
    found, swapped = paired_difference(x, y, margin=0.5), paired_difference(y, x, margin=0.5)
    for one, two in (
        (found.these_items, swapped.these_items), (found.items_like_these, swapped.items_like_these)
    ):  # fmt: skip
        assert one.estimate.value == pytest.approx(-two.estimate.value)
        assert one.estimate.interval == pytest.approx((-two.estimate.interval[1], -two.estimate.interval[0]))
        assert one.pvalue == pytest.approx(two.pvalue)
        # A smaller p-value than 5% and an interval without 0 are the same event.
        low, high = one.estimate.interval
        if abs(one.pvalue - 0.05) > 1e-9:
            assert (one.pvalue < 0.05) == (not low <= 0 <= high)
        if 1e-6 < one.smallest_margin < 0.999:
            for margin, passes in ((one.smallest_margin * 1.001, True), (one.smallest_margin * 0.999, False)):
                again = paired_difference(x, y, margin=min(margin, 0.9999))
                assert (again.these_items if one is found.these_items else again.items_like_these).equivalent is passes


def test_scipy_agrees_where_items_are_the_sample() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.uniform(size=(200, 3)), rng.uniform(size=(200, 3))
    reading = paired_difference(x, y).items_like_these
    expected = stats.ttest_rel(x.mean(1), y.mean(1)).confidence_interval(0.95)
    assert reading.estimate.stderr == pytest.approx(stats.sem(x.mean(1) - y.mean(1)))
    low, high = reading.estimate.interval
    # Wider by the term for what has not been seen, (t^2/2)/I at each end and less than twice that.
    assert expected.low - 4 / 200 < low < expected.low
    assert expected.high < high < expected.high + 4 / 200


# What varies where


def test_the_split_finds_what_was_put_in_and_forecasts_more_runs_and_items() -> None:
    shift, runs, found = 0.4, 4, []
    for x, y, *_ in draws((2, 3), 300, runs, runs, shift=shift, repeats=200):
        found.append(paired_difference(x, y).split)
    parts = np.array([[*s.arm_between, *s.arm_within, s.between, s.within] for s in found if s is not None])
    mean, square = 0.4, 0.2  # of beta(2, 3)
    var, noise = square - mean**2, mean - square
    second = (1 - shift) * square - ((1 - shift) * mean) ** 2
    between = shift * square - (shift * mean) ** 2
    expected = [var, second, noise, (1 - shift) * noise, between, (2 - shift) * noise]
    np.testing.assert_allclose(parts.mean(0), expected, rtol=0.04)
    one = found[0]
    assert one is not None
    assert one.icc[0] == pytest.approx(one.arm_between[0] / (one.arm_between[0] + one.arm_within[0]))
    assert one.stderr(300, runs) == pytest.approx(
        paired_difference(*next(draws((2, 3), 300, runs, runs, shift=shift))[:2]).items_like_these.estimate.stderr
    )
    assert one.design_effect(1) == 1
    assert 1 < one.design_effect(10) < 10
    # Ten times the runs are worth less than ten times the items.
    assert one.stderr(300, 40) > one.stderr(3000, 4)
    assert one.stderr(300, 40, of="these items") == pytest.approx(one.stderr(3000, 4, of="these items"))


@pytest.mark.parametrize("of", ["these items", "items like these"])
@pytest.mark.parametrize("goal", ["equivalence", "difference"])
@pytest.mark.parametrize(("accuracy", "spread", "runs", "margin"), [(0.5, 1.0, 5, 0.05), (0.1, 4.0, 2, 0.04)])
def test_the_items_that_are_needed_have_the_power(
    of: Any, goal: Any, accuracy: float, spread: float, runs: int, margin: float
) -> None:
    a, b = accuracy * spread, (1 - accuracy) * spread
    share = spread / (1 + spread)  # E p(1-p) = share a(1-a)
    items = items_needed(margin, accuracy=accuracy, within_share=share, runs=runs, goal=goal, of=of)
    rng = np.random.default_rng(5)
    repeats, passed = 150, np.zeros(2, dtype=int)
    for _ in range(repeats):
        p = rng.beta(a, b, size=(items, 1))
        q = p
        if goal == "difference":
            # Moved by `margin` at about the same variances: towards an accuracy on the other side.
            q = np.clip(p + margin, 0, 1)
            q = q + (margin - float((q - p).mean())) * (q < 0.9)
        for place, kept in enumerate((items, items // 2)):
            found = paired_difference(scored(rng, p[:kept], runs), scored(rng, q[:kept], runs), margin=margin)
            reading = found.these_items if of == "these items" else found.items_like_these
            passed[place] += bool(reading.equivalent) if goal == "equivalence" else reading.pvalue <= 0.05
    low, high = stats.binom.interval(1 - 1e-9, repeats, 0.8)
    # The variance of the second arm is not quite that of the plan. Half the items are too few.
    assert low - 20 <= passed[0] <= high + 20, passed
    assert passed[1] < low


@pytest.mark.parametrize("of", ["these items", "items like these"])
@pytest.mark.parametrize("goal", ["equivalence", "difference"])
def test_margins_and_items_are_inverse(of: Any, goal: Any) -> None:
    what: dict[str, Any] = {
        "accuracy": 0.6, "within_share": 0.4, "runs": 3, "goal": goal, "of": of, "between": 0.01,
    }  # fmt: skip
    items = items_needed(0.03, **what)
    assert detectable_margin(items, **what) <= 0.03 < detectable_margin(items - 1, **what)
    assert items_needed(0.03, **what | {"power": 0.95}) > items
    assert items_needed(0.03, **what | {"level": 0.01}) > items
    assert items_needed(0.015, **what) > 2 * items
    assert detectable_margin(1, **what | {"of": "items like these"}) == 1


def test_more_runs_replace_items_only_where_the_items_do_not_differ() -> None:
    what: dict[str, Any] = {"accuracy": 0.5, "within_share": 0.5, "of": "items like these"}
    few, many = (items_needed(0.02, runs=runs, between=0.0, **what) for runs in (1, 10))
    assert many < few / 6
    few, many = (items_needed(0.02, runs=runs, between=0.2, **what) for runs in (1, 10))
    assert many > few / 3
    assert items_needed(0.02, accuracy=0.0, within_share=1.0, runs=1) == 136  # 2.71/0.02: nothing was ever seen to vary


def test_a_difference_of_accuracies_is_at_most_the_tv_of_the_laws() -> None:
    rng = np.random.default_rng(6)
    p, q = rng.dirichlet(np.ones(20), size=2)
    right = rng.uniform(size=20) < 0.4
    tv = 0.5 * np.abs(p - q).sum()
    assert abs(p[right].sum() - q[right].sum()) <= tv
    # And equal accuracy bounds nothing: all the mass moves among wrong texts.
    p, q = np.array([0.3, 0.7, 0.0]), np.array([0.3, 0.0, 0.7])
    assert p[0] == q[0]
    assert 0.5 * np.abs(p - q).sum() == pytest.approx(0.7)


# Bad input


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), {}, "first has 3 items and second 4"),
        (np.zeros(3), np.zeros((3, 1)), {}, r"first must be \(I, R\).*one run is \(I, 1\)"),
        (np.zeros((3, 1)), np.zeros((3, 0)), {}, r"second must be \(I, R\)"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), {}, r"first must hold scores in \[0, 1\] and no NaN"),
        (np.zeros((3, 2)), np.full((3, 2), 1.5), {}, r"second must hold scores in \[0, 1\]"),
        (
            np.zeros((3, 2)),
            np.zeros((3, 3)),
            {"paired_runs": True},
            "paired_runs needs run r of both arms, got 2 and 3",
        ),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"margin": 0.0}, "margin is 0.0"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"margin": 2.0}, "margin is 2.0"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"confidence": 0.4}, "confidence is 0.4"),
    ],
)
def test_bad_scores_are_refused(first: Any, second: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0.0}, "margin in"),
        ({"power": 0.01}, "level < power"),
        ({"level": 1.0}, "0 < level"),
        ({"accuracy": 1.2}, "accuracy 1.2"),
        ({"within_share": -0.1}, "within_share -0.1"),
        ({"between": math.nan}, "between nan"),
        ({"runs": 0}, "runs must be an integer of at least 1"),
        ({"goal": "both"}, "goal must be"),
        ({"of": "all items"}, "of must be"),
    ],
)
def test_bad_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    plan = {"margin": 0.02, "accuracy": 0.5, "within_share": 0.5, "runs": 2} | changes
    with pytest.raises(ValueError, match=message):
        items_needed(**plan)
    with pytest.raises(ValueError, match="items must be"):
        detectable_margin(0, accuracy=0.5, within_share=0.5, runs=2)


def test_forecasts_need_whole_numbers() -> None:
    split = paired.ScoreSplit((0.1, 0.1), (0.1, 0.1), 0.0, 0.2)
    with pytest.raises(ValueError, match="runs must be an integer"):
        split.design_effect(0)
    with pytest.raises(ValueError, match="items must be an integer"):
        split.stderr(2.5, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of must be"):
        split.stderr(2, 2, of="everything")  # type: ignore[arg-type]
