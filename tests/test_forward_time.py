"""A few measured forwards give the time of others, and too few are refused."""

from __future__ import annotations

import numpy as np
import pytest

from me_stats.forward_time import Measured, Span, calibrate

LENGTHS, ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32, 64)
GRID = [(1, n, 100) for n in LENGTHS] + [(n, 1, 100) for n in ROWS] + [(1, 1, 500), (64, 1, 500)]


def true_seconds(rows: np.ndarray, fed: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A jump from the first token to the second, then flat, then linear: float32 on a CPU."""
    return 0.043 + 0.02 * (fed > 1) + 7e-4 * np.maximum(fed - 16, 0) + 2e-4 * (rows - 1) + 1e-7 * keys


def spans(grid: list[tuple[int, int, int]], *, noise: float = 0.0, seed: int = 0) -> list[Span]:
    rng = np.random.default_rng(seed)
    found = []
    for rows, span, context in grid:
        seconds = true_seconds(np.array(rows), np.array(rows * span), np.array(rows * (context + span)))
        found.append(Span(rows, span, context, float(seconds * np.exp(noise * rng.normal()))))
    return found


def worst(time: Measured) -> float:
    """Largest relative error over shapes between the knots that were not measured."""
    rows, span, context = (
        a.reshape(-1) for a in np.meshgrid([1, 2, 3, 6, 24, 48, 64], [1, 2, 3, 5], [50, 100, 900], indexing="ij")
    )
    rows, span, context = (a[rows * span <= 128] for a in (rows, span, context))
    fed, keys = rows * span, rows * (context + span)
    return float(np.abs(time.seconds(rows, fed, keys) / true_seconds(rows, fed, keys) - 1).max())


def test_curves_with_jumps_are_recovered() -> None:
    time = calibrate(spans(GRID))
    assert time.worst_error < 1e-6
    assert worst(time) < 1e-6
    assert time.fed == LENGTHS
    assert time.rows == (1, *ROWS)
    assert time.per_key == pytest.approx(1e-7)
    assert time.span_cost[2] == pytest.approx(63 / 43)
    assert time.span_cost[1] == 1


def test_noise_stays_as_small_as_it_was() -> None:
    errors = [worst(calibrate(spans(GRID, noise=0.02, seed=seed))) for seed in range(20)]
    assert max(errors) < 0.1
    assert np.median(errors) < 0.06


def test_noise_never_makes_more_tokens_cheaper() -> None:
    time = calibrate(spans(GRID, noise=0.3))
    assert (np.diff(time.fed_seconds) >= 0).all()
    assert (np.diff(time.rows_seconds) >= 0).all()
    assert time.per_key >= 0
    assert 0.05 < time.worst_error < 2


def test_beyond_the_last_knots_the_last_slopes_go_on() -> None:
    time = calibrate(spans(GRID))
    (far,) = time.seconds([256], [1024], [0])
    assert far == pytest.approx(float(true_seconds(np.array(256), np.array(1024), np.array(0))))
    assert time.seconds(1, 1, 0).shape == ()


def test_planted_cost_of_laws_is_not_taken_for_one_of_tokens() -> None:
    cheap, dear = calibrate(spans(GRID)), calibrate([
        Span(s.rows, s.span, s.context, s.seconds + 1e-3 * (s.rows - 1)) for s in spans(GRID)
    ])  # fmt: skip
    np.testing.assert_allclose(np.diff(dear.rows_seconds) - np.diff(cheap.rows_seconds), 1e-3 * np.diff(dear.rows))
    np.testing.assert_allclose(dear.fed_seconds, cheap.fed_seconds)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "one row with span=1"),
        ([(1, 1, 100), (4, 1, 100), (1, 1, 500)], "one row with span=1"),
        ([(1, 2, 100), (1, 4, 100), (4, 1, 100), (1, 2, 500)], "one row with span=1"),
        ([(1, 1, 100), (1, 4, 100), (1, 1, 500)], "several rows"),
        ([(1, 1, 100), (1, 4, 100), (4, 1, 100)], "two contexts"),
        ([(1, 1, 100), (1, 4, 100), (4, 1, 100), (1, 1, 100)], "two contexts"),
        ([(0, 1, 100)], "at least 1"),
        ([(1, 1, -1)], "at least 0"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(grid: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(spans(grid))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_are_no_measurement_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="measure it again"):
        calibrate([*spans(GRID), Span(1, 1, 5, seconds)])
