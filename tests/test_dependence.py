"""Dependence within rows and within batches against closed forms, other libraries, and planted effects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from me_stats.dependence import (
    autocorrelation_time,
    autocovariances,
    clustered_difference,
    clustered_mean,
    design_effect,
    drift,
    geyer_time,
    log_rank_test,
    survival_curve,
)
from me_stats.models import MarkovModel
from me_stats.samplers import CESampler

Floats = NDArray[np.float64]


def autoregressive(rng: np.random.Generator, n: int, steps: int, phi: float) -> Floats:
    x = rng.normal(size=(n, steps))
    for t in range(1, steps):
        x[:, t] = phi * x[:, t - 1] + np.sqrt(1 - phi**2) * x[:, t]
    return x


def grouped(rng: np.random.Generator, groups: int, size: int, rho: float) -> tuple[Floats, NDArray[np.int64]]:
    place = np.repeat(np.arange(groups), size)
    return np.sqrt(rho) * rng.normal(size=groups)[place] + np.sqrt(1 - rho) * rng.normal(size=groups * size), place


def covered(truth: float, draw: Callable[[], tuple[float, float]], repeats: int) -> int:
    return sum(low <= truth <= high for low, high in (draw() for _ in range(repeats)))


def test_autocovariances_are_those_of_a_sum_and_of_statsmodels() -> None:
    x = np.random.default_rng(0).normal(size=(3, 37))
    c = x - x.mean(1, keepdims=True)
    direct = [[row[: 37 - k] @ row[k:] for k in range(37)] for row in c]
    np.testing.assert_allclose(autocovariances(x), direct, atol=1e-12)
    about = autocovariances(x, centre=0.5)[:, 1]
    np.testing.assert_allclose(about, ((x[:, :-1] - 0.5) * (x[:, 1:] - 0.5)).sum(1))
    tools = pytest.importorskip("statsmodels.tsa.stattools")
    for row, mine in zip(x, autocovariances(x), strict=True):
        np.testing.assert_allclose(mine / mine[0], tools.acf(row, nlags=36, fft=False), atol=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.5])
def test_times_are_the_closed_form_of_exact_autocovariances(phi: float) -> None:
    tau = geyer_time([phi ** np.arange(400.0)])[0]
    assert tau == pytest.approx((1 + phi) / (1 - phi), rel=1e-9)


def test_the_sequence_stops_at_the_first_negative_pair_and_never_rises() -> None:
    # Pairs 1.5, 0.5, 0.9, -0.1, 5: the third is cut to the second, the last is not reached.
    gamma = [[1.0, 0.5, 0.3, 0.2, 0.5, 0.4, -0.2, 0.1, 3.0, 2.0]]
    assert geyer_time(gamma)[0] == pytest.approx(-1 + 2 * (1.5 + 0.5 + 0.5))
    assert geyer_time([[1.0, -1.0, 0.5, -0.5]])[0] == 0.25  # alternating: at least 1/T


@pytest.mark.parametrize(("phi", "steps"), [(0.5, 200), (-0.3, 100), (0.8, 600)])
def test_pooled_times_are_covered(phi: float, steps: int) -> None:
    rng = np.random.default_rng(2)
    times = [autocorrelation_time(autoregressive(rng, 100, steps, phi)) for _ in range(150)]
    truth = (1 + phi) / (1 - phi)
    assert 134 <= sum(low <= truth <= high for low, high in (time.pooled.interval for time in times)) <= 150
    assert np.mean([time.pooled.value for time in times]) == pytest.approx(truth, rel=0.03)
    assert times[0].effective.shape == (100,)
    assert times[0].effective_tokens == pytest.approx(100 * steps / truth, rel=0.25)
    if steps >= 50 * truth:
        assert np.mean([time.rows.mean() for time in times]) == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(("phi", "rows", "steps"), [(0.0, 64, 64), (0.1, 64, 256), (0.9, 64, 256), (0.5, 16, 1024)])
def test_the_interval_of_the_pooled_time_does_not_trust_the_cut(phi: float, rows: int, steps: int) -> None:
    rng = np.random.default_rng(9)
    truth = (1 + phi) / (1 - phi)
    repeats = 400
    inside = covered(
        truth, lambda: autocorrelation_time(autoregressive(rng, rows, steps, phi)).pooled.interval, repeats
    )
    assert 362 <= inside <= 395  # 380 expected, standard deviation 4.4


def test_a_row_that_never_moves_is_worth_one_token_and_counts() -> None:
    rng = np.random.default_rng(10)
    v = autoregressive(rng, 40, 64, 0.9)
    sluggish = np.vstack([v, np.full((10, 64), 1.5)])
    time = autocorrelation_time(sluggish)
    assert time.rows[40:].tolist() == [64.0] * 10
    assert time.effective[40:].tolist() == [1.0] * 10
    np.testing.assert_allclose(time.rows[:40], autocorrelation_time(v).rows)
    assert time.pooled.value > autocorrelation_time(v).pooled.value
    assert autocorrelation_time(np.repeat(rng.normal(size=(9, 1)), 64, axis=1)).rows.tolist() == [64.0] * 9


def test_few_rows_at_a_high_confidence_have_no_upper_end() -> None:
    v = autoregressive(np.random.default_rng(1), 3, 64, 0.9)
    assert autocorrelation_time(v, confidence=1 - 1e-9).pooled.interval == (0.0, np.inf)


def test_drift_is_calibrated_under_any_dependence_and_finds_a_trend() -> None:
    rng = np.random.default_rng(3)
    alarms, together = 0, 0
    for _ in range(400):
        # Random walks plus one level per row: dependence at every lag, no trend.
        walk = rng.normal(size=(40, 1)) + rng.normal(size=(40, 24)).cumsum(1)
        result = drift(walk, blocks=6)
        alarms += result.pvalue <= 0.05
        together += bool(((result.lower <= 0) & (result.upper >= 0)).all())
    assert 8 <= alarms <= 33  # 20 expected, standard deviation 4.4
    assert together >= 372
    moved = drift(autoregressive(rng, 200, 48, 0.9) + 0.02 * np.arange(48), blocks=5)
    assert moved.pvalue < 1e-6
    assert moved.slope.interval[0] < 0.02 < moved.slope.interval[1]
    assert moved.starts.tolist() == [0, 9, 19, 28, 38]


def test_block_means_are_the_means_of_the_blocks() -> None:
    x = np.random.default_rng(0).normal(size=(5, 7))
    np.testing.assert_allclose(drift(x, blocks=3).means, [x[:, :2].mean(), x[:, 2:4].mean(), x[:, 4:].mean()])
    assert drift(np.tile([1.0, 2.0], (4, 1)), blocks=2).pvalue == 0.0
    assert drift(np.ones((4, 3)), blocks=3).pvalue == 1.0


def test_survival_bands_hold_together_on_a_chain_that_ends() -> None:
    chain = MarkovModel([0.45, 0.45, 0.1], [[0.5, 0.3, 0.2], [0.3, 0.6, 0.1], [1, 0, 0]], eos=(2,))
    table, law, truth = chain.log_table.exp().numpy(), np.array([0.45, 0.45]), [1.0]
    for _ in range(9):
        truth.append(float(law.sum()))
        law = law @ table[1:3, :2]
    held = pointwise = 0
    for seed in range(300):
        lengths = CESampler(chain).sample((), n=60, max_new_tokens=10, seed=seed).lengths.numpy()
        band = survival_curve(lengths, max_new_tokens=10)
        held += bool(((band.lower <= truth) & (truth <= band.upper)).all())
        alone = survival_curve(lengths, max_new_tokens=10, simultaneous=False)
        pointwise += int(((alone.lower <= truth) & (truth <= alone.upper))[1:].sum())
    assert held >= 279  # at least 285 expected
    assert pointwise / 2700 > 0.94
    oracle = stats.binomtest(round(alone.alive[3] * 60), 60).proportion_ci(0.95)
    assert (alone.lower[3], alone.upper[3]) == pytest.approx((oracle.low, oracle.high))


def test_log_rank_is_that_of_scipy_and_finds_another_hazard() -> None:
    rng = np.random.default_rng(5)

    def sample(n: int, hazard: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        drawn = rng.geometric(hazard, n)
        return np.minimum(drawn, 20), drawn <= 20

    def censored(lengths: NDArray[np.int64], ended: NDArray[np.bool_]) -> stats.CensoredData:
        return stats.CensoredData(lengths[ended], right=lengths[~ended])

    x, y = sample(60, 0.1), sample(40, 0.1)
    oracle = stats.logrank(censored(*x), censored(*y))
    mine = log_rank_test(*x, *y)
    assert (abs(mine.statistic), mine.pvalue) == pytest.approx((abs(oracle.statistic), oracle.pvalue))
    alarms = sum(log_rank_test(*sample(60, 0.1), *sample(40, 0.1), level=0.05).rejected for _ in range(600))
    assert 15 <= alarms <= 48  # 30 expected, standard deviation 5.3
    ratio = log_rank_test(*sample(400, 0.1), *sample(400, 0.1)).min_detectable
    assert 1.2 < ratio < 1.5
    found = [log_rank_test(*sample(400, 0.1 * ratio), *sample(400, 0.1)) for _ in range(100)]
    assert 65 <= sum(result.rejected for result in found) <= 95  # 80 by design, at small hazards
    assert all(result.statistic > 0 for result in found)
    never = np.full(9, 5), np.zeros(9, dtype=bool)
    assert log_rank_test(*never, *never).pvalue == 1.0


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.8])
def test_design_effects_are_covered(rho: float) -> None:
    rng = np.random.default_rng(6)
    for groups in (20, 100):
        inside = covered(1 + 7 * rho, lambda g=groups: design_effect(*grouped(rng, g, 8, rho)).interval, 500)  # type: ignore[misc]
        assert 462 <= inside <= 488


def test_the_design_effect_is_the_textbook_one_whatever_the_labels() -> None:
    x = np.array([1.0, 2.0, 4.0, 4.5, 0.0, 1.0, 3.0, 2.0])
    batch = np.repeat(list("badc"), 2)
    f = stats.f_oneway(*x.reshape(4, 2)).statistic
    assert design_effect(x, batch).value == pytest.approx(1 + (f - 1) / (f + 1))
    assert design_effect(x + 1e6, batch).value == pytest.approx(1 + (f - 1) / (f + 1))
    even = np.tile([0.0, 1.0], 50) + np.random.default_rng(0).normal(size=100) / 100
    assert design_effect(even, np.repeat(np.arange(50), 2)).interval[1] < 0.1
    unequal = np.repeat(np.arange(200), np.tile([2, 6], 100))
    rng = np.random.default_rng(1)
    effect = design_effect(rng.normal(size=200)[unequal] + rng.normal(size=800), unequal)
    size = (800 - (100 * 4 + 100 * 36) / 800) / 199
    assert effect.interval[0] < 1 + (size - 1) / 2 < effect.interval[1]


def test_rows_that_share_draws_fool_a_naive_test_and_not_a_clustered_one() -> None:
    rng = np.random.default_rng(7)
    naive, clustered, spread = 0, 0, 0
    for _ in range(400):
        (x, x_groups), (y, y_groups) = grouped(rng, 40, 20, 0.5), grouped(rng, 60, 10, 0.5)
        naive += stats.ttest_ind(x, y).pvalue <= 0.05
        groups = {"x_groups": x_groups, "y_groups": y_groups}
        clustered += clustered_difference(x, y, **groups).pvalue <= 0.05
        spread += clustered_difference(x, y, **groups, of="log variance").pvalue <= 0.05
    assert naive > 150
    assert 8 <= clustered <= 33  # 20 expected, standard deviation 4.4
    assert 8 <= spread <= 36
    (x, place), (y, _) = grouped(rng, 200, 5, 0.5), grouped(rng, 200, 5, 0.5)
    assert clustered_difference(x + 0.5, y, x_groups=place, y_groups=place).pvalue < 1e-3
    wide = clustered_difference(2 * x, y, x_groups=place, y_groups=place, of="log variance")
    assert wide.difference.interval[0] < np.log(4) < wide.difference.interval[1]
    assert wide.pvalue < 1e-9


def test_groups_of_one_row_give_the_usual_interval() -> None:
    x = np.random.default_rng(0).normal(size=30)
    estimate = clustered_mean(x, np.arange(30))
    assert estimate.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(30))
    assert estimate.interval == pytest.approx(tuple(stats.t.interval(0.95, 29, x.mean(), stats.sem(x))))
    rng = np.random.default_rng(8)
    inside = covered(0.0, lambda: clustered_mean(*grouped(rng, 25, 6, 0.6)).interval, 600)
    assert 550 <= inside <= 588


def test_bad_input_names_the_argument() -> None:
    ones, rng = np.ones((4, 8)), np.random.default_rng(0)
    x = rng.normal(size=8)
    ended = np.ones(3, dtype=bool)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: autocorrelation_time(ones), "values are all 1"),
        (lambda: autocorrelation_time(ones[:, :3]), "at least 4 steps"),
        (lambda: autocorrelation_time(np.full((4, 8), np.nan)), "values must be"),
        (lambda: geyer_time([[0.0, 0.0]]), "row 0 has no variance"),
        (lambda: drift(ones, blocks=9), "blocks must lie in 1..8"),
        (lambda: survival_curve([1, 5], max_new_tokens=4), r"lengths must be \(N,\) integers in 1..4"),
        (lambda: log_rank_test([1, 2, 2], [1, 1, 1], [1, 2, 2], ended), "x_ended must be 3 booleans"),
        (lambda: design_effect(x, np.arange(8)), "one of them with two rows"),
        (lambda: design_effect(x, np.arange(7)), "one group for each of the 8 rows"),
        (lambda: design_effect(np.repeat(x, 2), np.repeat(np.arange(8), 2)), "do not vary within batches"),
        (lambda: clustered_mean(x, np.zeros(8)), "at least two groups"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    halves = np.tile([0, 1], 4)
    with pytest.raises(ValueError, match="of must be"):
        clustered_difference(x, x, x_groups=halves, y_groups=halves, of="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vary in more than one group"):
        clustered_difference(x, np.ones(8), x_groups=halves, y_groups=halves, of="log variance")
