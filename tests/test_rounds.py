"""Rounds: every task once, in orders that a seed decides, kept and gone on with; medians with exact coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from me_stats.rounds import Sample, Task, middle, run_rounds


def tasks(log: list[str], count: int = 3, *, stop: int | None = None) -> list[Task]:
    def ran(name: str) -> Sample:
        if stop is not None and len([entry for entry in log if entry[0] != "w"]) == stop:
            raise KeyboardInterrupt
        log.append(name)
        return Sample(float(len(log)), 7)

    return [Task(str(i), lambda i=i: ran(str(i)), lambda i=i: log.append(f"w{i}")) for i in range(count)]  # type: ignore[misc]


def test_a_round_runs_each_task_once_in_an_order_of_its_own() -> None:
    log: list[str] = []
    samples = run_rounds(tasks(log, 6), repeats=4, seed=3)
    assert samples.shape == (4, 6, len(Sample._fields))
    assert log[:6] == [f"w{i}" for i in reversed(range(6))]
    rounds = [log[6 * i : 6 * i + 6] for i in range(1, 5)]
    assert all(sorted(one) == [str(i) for i in range(6)] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    for number, order in enumerate(rounds):
        for place, name in enumerate(order):
            assert samples[number, int(name), 0] == 6 * (number + 1) + place + 1
    again: list[str] = []
    run_rounds(tasks(again, 6), repeats=4, seed=3)
    assert again == log


def test_finished_rounds_are_kept(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_rounds(tasks(log, stop=7), repeats=4, folder=tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-000.npz", "round-001.npz"]
    rest: list[str] = []
    notes: list[tuple[float, str]] = []
    samples = run_rounds(tasks(rest), repeats=4, folder=tmp_path, progress=lambda *at: notes.append(at))
    assert len(rest) == 3 + 6  # a warm-up, and the two rounds that were missing
    assert samples[0, :, 0].max() < 7 < 10
    assert [done for done, _ in notes] == sorted(done for done, _ in notes)
    assert notes[0][0] == 0.5
    assert notes[-1][0] == 1
    silent: list[str] = []
    assert (run_rounds(tasks(silent), repeats=4, folder=tmp_path) == samples)[..., 0].all()
    assert silent == []


def test_bad_rounds_are_refused() -> None:
    for given, repeats in ((tasks([]), 0), ([], 2)):
        with pytest.raises(ValueError, match="at least one round"):
            run_rounds(given, repeats=repeats)
    with pytest.raises(ValueError, match="distinct names"):
        run_rounds(tasks([]) * 2, repeats=1)


@pytest.mark.parametrize(("n", "cut"), [(1, 0), (2, 0), (4, 0), (5, 0), (7, 0), (8, 1), (12, 2), (30, 10)])
def test_intervals_are_the_narrowest_order_statistics_that_suffice(n: int, cut: int) -> None:
    values = np.random.default_rng(n).permutation(n) + 1.0
    found = middle(values.tolist())
    assert found.value == np.median(values)
    assert found.interval == (1 + cut, n - cut)
    assert found.rounds == tuple(values)
    assert found.coverage == pytest.approx(max(0.0, 1 - 2 * binom.cdf(cut, n, 0.5)), abs=1e-12)
    if n >= 5:
        assert found.coverage >= 0.9 > 1 - 2 * binom.cdf(cut + 1, n, 0.5)


def test_the_coverage_is_what_it_says_for_skewed_noise() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 9):
        draws = np.exp(rng.normal(size=(4000, n)) * 2)  # median 1
        found = [middle(row.tolist()) for row in draws]
        covered = sum(one.interval[0] <= 1 <= one.interval[1] for one in found)
        low, high = binom.ppf([1e-5, 1 - 1e-5], 4000, found[0].coverage)
        assert low <= covered <= high
