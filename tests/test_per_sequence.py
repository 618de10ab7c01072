"""Comparisons by sequence: intervals without normality, valid p-values, and what each test can find."""

from __future__ import annotations

import itertools
from typing import Any

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


# --- groups that share draws --------------------------------------------------------------------------------


def shifted(rng: np.random.Generator, groups: np.ndarray, *, rho: float = 0.4, by: float = 0.0) -> np.ndarray:
    """Values (N,) of variance 1 about `by`, with correlation rho within each of `groups` (N,)."""
    common = rng.normal(size=groups.max() + 1)[groups]
    return np.asarray(by + np.sqrt(rho) * common + np.sqrt(1 - rho) * rng.normal(size=len(groups)))


UNEQUAL = np.repeat(np.arange(30), np.tile([2, 12, 12], 10))


@pytest.mark.parametrize("groups", [np.repeat(np.arange(24), 10), UNEQUAL], ids=["equal", "unequal"])
def test_whole_groups_hold_the_level_and_single_sequences_do_not(groups: np.ndarray) -> None:
    rng, corrected, naive, runs = np.random.default_rng(5), 0, 0, 300
    options: dict[str, Any] = {"level": 0.05, "permutations": 99, "rng": rng}
    for _ in range(runs):
        pair = {"a": (shifted(rng, groups), shifted(rng, groups))}
        corrected += sequence_tests(pair, x_groups=groups, y_groups=groups, **options).rejected
        naive += sequence_tests(pair, **options).rejected
    assert corrected <= stats.binom.isf(1e-6, runs, 0.05)
    assert naive > runs / 4


def test_a_shift_of_the_detectable_size_is_found_from_groups_with_its_power() -> None:
    rng, found, groups = np.random.default_rng(6), 0, np.repeat(np.arange(60), 8)
    options: dict[str, Any] = {"x_groups": groups, "y_groups": groups, "level": 0.02, "permutations": 399, "rng": rng}
    sizes = [sequence_tests({"a": (shifted(rng, groups), shifted(rng, groups))}, **options).tests for _ in range(20)]
    shift, distance = (float(np.mean([tests[i].min_detectable for tests in sizes])) for i in (0, 1))
    # (z_.005 + z_.8) sqrt(2/480) sqrt(1 + 7 rho)
    assert shift == pytest.approx((2.576 + 0.842) * np.sqrt(2 / 480 * 3.8), rel=0.1)
    alone = sequence_tests({"a": (rng.normal(size=480), rng.normal(size=480))}, level=0.02, rng=rng)
    assert 1.3 < distance / alone.tests[1].min_detectable < 2.1
    for _ in range(60):
        result = sequence_tests({"a": (shifted(rng, groups), shifted(rng, groups, by=shift))}, **options)
        found += result.tests[0].pvalue <= 0.01
    assert 38 <= found <= 58  # 48 expected, standard deviation 3.1
    assert result.groups == (60, 60)
    assert (result.n, result.m) == (480, 480)


def test_pvalues_of_groups_are_those_of_all_relabellings() -> None:
    rng, groups = np.random.default_rng(7), np.repeat(np.arange(5), 3)
    x, y = shifted(rng, groups).round(1), shifted(rng, groups, by=0.7).round(1)
    pooled = np.concatenate([x, y]).reshape(10, 3)
    means, distances = [], []
    for chosen in itertools.combinations(range(10), 5):
        rest = [i for i in range(10) if i not in chosen]
        a, b = pooled[list(chosen)].ravel(), pooled[rest].ravel()
        means.append(abs(a.mean() - b.mean()))
        distances.append(stats.ks_2samp(a, b).statistic)
    found = sequence_tests(
        {"a": (x, y)}, x_groups=groups, y_groups=groups + 90, level=0.2, permutations=20_000, rng=rng
    )
    for test, all_of_them in zip(found.tests, (means, distances), strict=True):
        assert abs(test.statistic) == pytest.approx(all_of_them[0])
        assert test.pvalue == pytest.approx((np.array(all_of_them) >= all_of_them[0] - 1e-9).mean(), abs=0.015)


def test_groups_of_one_sequence_are_no_groups() -> None:
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=40), rng.normal(0.5, 1, size=50)
    options: dict[str, Any] = {"level": 0.01, "permutations": 999}
    plain = sequence_tests({"a": (x, y)}, rng=np.random.default_rng(0), **options)
    single = sequence_tests(
        {"a": (x, y)}, x_groups=np.arange(40), y_groups=np.arange(50), rng=np.random.default_rng(0), **options
    )
    assert single.tests[0] == plain.tests[0]
    assert single.tests[1].statistic == pytest.approx(plain.tests[1].statistic)
    assert single.tests[1].min_detectable == plain.tests[1].min_detectable
    assert single.tests[1].pvalue == pytest.approx(plain.tests[1].pvalue, abs=0.03)
    constant = sequence_tests(
        {"a": (np.ones(40), np.ones(40))}, x_groups=np.arange(40) // 2, y_groups=np.arange(40) // 2,
        rng=np.random.default_rng(0), **options,
    )  # fmt: skip
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
    with pytest.raises(ValueError, match="given together"):
        sequence_tests({"a": (good, good)}, x_groups=np.arange(20), rng=rng)
    with pytest.raises(ValueError, match="y_groups must name one group for each of the 20 rows"):
        sequence_tests({"a": (good, good)}, x_groups=np.arange(20), y_groups=np.arange(9), rng=rng)
    with pytest.raises(ValueError, match="x_groups must name at least two groups"):
        sequence_tests({"a": (good, good)}, x_groups=np.zeros(20), y_groups=np.arange(20), rng=rng)
    with pytest.raises(ValueError, match=r"4 and 4 groups allow 70 relabellings.*too few"):
        sequence_tests({"a": (good, good)}, x_groups=np.arange(20) // 5, y_groups=np.arange(20) // 5, rng=rng)
