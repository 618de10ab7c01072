"""Comparisons by sequence: intervals without normality, valid p-values, and what each test can find."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from me_stats.per_sequence import detectable_ratio, sequence_tests, variance_ratio


def ratio_covers(n: int, m: int, law: str, repeats: int = 1000) -> int:
    rng = np.random.default_rng(3)
    draw = {"normal": rng.normal, "exponential": rng.exponential, "uniform": rng.uniform}[law]
    inside = 0
    for _ in range(repeats):
        low, high = variance_ratio(draw(size=n), 2 * draw(size=m)).interval
        inside += low <= 0.25 <= high
    return inside


def test_ratios_are_covered_without_normality() -> None:
    assert 930 <= ratio_covers(100, 200, "normal") <= 970
    assert 930 <= ratio_covers(100, 60, "uniform") <= 970
    assert 930 <= ratio_covers(800, 800, "exponential") <= 970
    # The F interval, which needs normality, covers 85% there at best.


def test_the_detectable_ratio_is_detected_with_its_power() -> None:
    rng, n, level = np.random.default_rng(0), 400, 0.05
    ratio = detectable_ratio(n, kurtosis=3, level=level, power=0.8)
    found = 0
    for _ in range(600):
        low, _ = variance_ratio(np.sqrt(ratio) * rng.normal(size=n), rng.normal(size=n)).interval
        found += low > 1
    assert 440 <= found <= 520  # 480 expected, standard deviation 10


def test_tests_of_equal_laws_hold_their_level() -> None:
    rng, rejected = np.random.default_rng(1), 0
    for _ in range(400):
        x, y = rng.exponential(size=60), rng.exponential(size=80)
        rejected += sequence_tests(
            {"value": (x, y), "rounded": (x.round(), y.round())}, level=0.05, permutations=199, rng=rng
        ).rejected
    assert rejected <= 32  # at most 20 expected


def test_each_planted_difference_is_found_by_its_test_at_its_size() -> None:
    rng, n = np.random.default_rng(2), 300
    same = sequence_tests({"a": (rng.normal(size=n), rng.normal(size=n))}, rng=rng)
    assert [test.kind for test in same.tests] == ["mean", "KS"]
    shift, distance = (test.min_detectable for test in same.tests)
    found = np.zeros(2)
    for _ in range(60):
        moved = sequence_tests(
            {"a": (rng.normal(size=n), rng.normal(size=n) + shift), "b": rng.normal(size=(2, n))},
            level=2e-3, permutations=2999, rng=rng,
        )  # fmt: skip
        # A share of the law moved past all others: a distance of just that size.
        spread = np.where(rng.random(n) < distance, 9.0, rng.normal(size=n))
        far = stats.ks_2samp(rng.normal(size=n), spread).pvalue
        found += moved.tests[0].pvalue <= 5e-4, far <= 5e-4
    assert found[0] >= 39  # 48 expected, standard deviation 3.1
    assert found[1] >= 48  # the KS size is a bound
    wide = sequence_tests({"a": (rng.normal(size=n), 3 * rng.normal(size=n))}, rng=rng)
    assert wide.rejected
    assert wide.tests[0].pvalue > 1e-3  # means agree; laws do not


def test_permutation_pvalues_are_those_of_scipy() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=5), rng.normal(0.8, 1, size=4)
    oracle = stats.permutation_test(
        (x, y), lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)), vectorized=True, alternative="greater"
    )
    mine = sequence_tests({"a": (x, y)}, level=0.05, permutations=20_000, rng=rng).tests[0]
    assert mine.pvalue == pytest.approx(oracle.pvalue, abs=0.015)
    constant = sequence_tests({"a": (np.ones(9), np.ones(9))}, rng=rng)
    assert constant.pvalue == 1.0


def test_bad_input_names_the_argument() -> None:
    rng = np.random.default_rng(0)
    good = rng.normal(size=20)
    for x, message in (([1.0, 2.0, 3.0], "x must be"), ([1.0, np.nan, 2.0, 3.0], "x must be"), (np.eye(20)[0], "vary")):
        with pytest.raises(ValueError, match=message):
            variance_ratio(x, good)
    with pytest.raises(ValueError, match="kurtosis"):
        detectable_ratio(100, kurtosis=0.5)
    with pytest.raises(ValueError, match="at least one statistic"):
        sequence_tests({}, rng=rng)
    with pytest.raises(ValueError, match="same sequences"):
        sequence_tests({"a": (good, good), "b": (good, good[:9])}, rng=rng)
    with pytest.raises(ValueError, match="permutations is 99"):
        sequence_tests({"a": (good, good)}, permutations=99, rng=rng)
