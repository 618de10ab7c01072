"""Tests in use elsewhere do what their sources describe, with the blind spots that follow."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from me_stats.equivalence import binomial_interval
from me_stats.testing import in_use

LAW = np.array([0.4, 0.3, 0.2, 0.1])


def test_all_cells_by_hand() -> None:
    counts = [35, 34, 22, 9]
    verdict = in_use.all_cell_chi_square(counts, LAW)
    assert verdict.statistic == pytest.approx(stats.chisquare(counts, 100 * LAW).pvalue)
    assert (verdict.accepts, verdict.threshold, verdict.usable) == (True, 0.01, True)
    assert not in_use.all_cell_chi_square([10, 30, 30, 30], LAW).accepts
    assert not in_use.all_cell_chi_square([40, 30, 20, 10, 1], [*LAW, 0.0]).accepts
    assert in_use.all_cell_chi_square([40, 30, 20, 10, 0], [*LAW, 0.0]).accepts


def test_observed_cells_by_hand() -> None:
    # The last two tokens are drawn five times or fewer and share a cell.
    counts, law = np.array([52, 40, 5, 3, 0]), np.array([0.45, 0.35, 0.03, 0.03, 0.14])
    kept = law[:4] / law[:4].sum()
    expected = 100 * np.array([kept[0], kept[1], kept[2] + kept[3]])
    verdict = in_use.observed_count_chi_square(counts, law)
    assert verdict.statistic == pytest.approx(stats.chisquare([52, 40, 8], expected).pvalue)
    assert verdict.usable
    assert verdict.accepts
    assert not in_use.observed_count_chi_square([10, 30, 30, 30], LAW).accepts


def test_observed_cells_ask_for_mass() -> None:
    verdict = in_use.observed_count_chi_square(np.ones(20, dtype=int), np.full(20, 1 / 20))
    assert not verdict.usable
    assert not verdict.accepts
    assert not in_use.observed_count_chi_square([0, 3], [1.0, 0.0]).accepts


def test_observed_cells_do_not_miss_what_is_never_drawn() -> None:
    law = np.full(50, 1 / 50)
    counts = np.append(np.full(25, 40), np.zeros(25, dtype=int))  # half of the mass
    assert in_use.observed_count_chi_square(counts, law).accepts
    assert not in_use.all_cell_chi_square(counts, law).accepts


def test_the_distance_ratio_by_hand() -> None:
    references = in_use.random_references(4, np.random.default_rng(0), count=7)
    assert references.shape == (7, 4)
    assert references.sum(1) == pytest.approx(np.ones(7))
    first, last = np.array([6, 1, 2, 1]), np.array([401, 299, 202, 98])
    near = [np.linalg.norm(c / c.sum() - LAW) for c in (first, last)]
    far = [np.sqrt(((c / c.sum() - references) ** 2).sum()) for c in (first, last)]
    verdict = in_use.distance_ratio(first, last, LAW, references=references)
    assert verdict.statistic == pytest.approx((near[0] / near[1]) / (far[0] / far[1]))
    assert verdict.accepts == (verdict.statistic > 20)
    assert in_use.distance_ratio(first, 1000 * LAW, LAW, references=references).accepts


def test_the_distance_ratio_needs_a_bad_start() -> None:
    references = in_use.random_references(4, np.random.default_rng(0))
    # Ten draws that happen to be close leave nothing to improve on.
    assert not in_use.distance_ratio([4, 3, 2, 1], 1000 * LAW, LAW, references=references).accepts


def test_the_cosine_by_hand() -> None:
    verdict = in_use.cosine_similarity([3, 4], [0.4, 0.6])
    assert verdict.statistic == pytest.approx((3 * 0.4 + 4 * 0.6) / (5 * np.hypot(0.4, 0.6)))
    assert not in_use.cosine_similarity([60, 40, 1], [0.6, 0.4, 0.0]).accepts
    assert in_use.cosine_similarity([60, 40, 0], [0.6, 0.4, 0.0]).accepts


def test_the_hamming_kernel_sees_positions_and_no_dependence() -> None:
    rng = np.random.default_rng(0)
    shifted, fair = np.minimum(rng.integers(5, size=(150, 8)), 3), rng.integers(4, size=(150, 8))
    assert not in_use.hamming_mmd(shifted, fair, rng=rng).accepts
    rejected = 0
    for _ in range(20):
        bits = rng.integers(2, size=(60, 8))
        # Every second bit copies the one before it: uniform at each position.
        copied = np.repeat(bits[:, :4], 2, axis=1)
        rejected += not in_use.hamming_mmd(copied, rng.integers(2, size=(60, 8)), permutations=99, rng=rng).accepts
    assert rejected < 8


def test_false_alarms_are_those_of_the_level_where_cells_are_large() -> None:
    rng = np.random.default_rng(0)
    runs = 3000
    counts = rng.multinomial(2000, LAW, size=runs)
    for test, level in ((in_use.all_cell_chi_square, 0.01), (in_use.observed_count_chi_square, 1e-3)):
        alarms = sum(not test(row, LAW).accepts for row in counts)
        low, high = binomial_interval(alarms, runs, confidence=1 - 1e-6)
        assert low <= level <= high


@pytest.mark.parametrize(
    "test", [in_use.all_cell_chi_square, in_use.observed_count_chi_square, in_use.cosine_similarity]
)
def test_bad_counts_are_refused(test: object) -> None:
    for counts in ([1, -1], [0.5, 1], [0, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match="counts"):
            test(counts, [0.5, 0.5])  # type: ignore[operator]
