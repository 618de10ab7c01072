"""The order of forwards: every row and step once, in its turn, by its component, and fewer than in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.schedule import Schedule, Serve, serves

HALVES, SKEWED = (0.5, 0.5), (0.95, 0.05)
WEIGHTS = [HALVES, (0.8, 0.2), SKEWED, (0.98, 0.02), (0.7, 0.2, 0.1), (0.9, 0.05, 0.05), (0.25,) * 4]


def random_path(rows: int, steps: int, weights: tuple[float, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(weights), size=(rows, steps), p=weights)


def faults(path: np.ndarray, run: Iterable[Serve]) -> list[str]:
    """What is wrong with a run over `path`, where -1 stands from the end of a row on."""
    found = []
    done = np.zeros(len(path), dtype=np.int64)
    lengths = (path >= 0).sum(1)
    for serve in run:
        if not len(serve.rows) or (np.diff(serve.rows) <= 0).any():
            found.append("rows are not distinct")
        if (serve.steps != done[serve.rows]).any():
            found.append("a row is not at this step")
        if (serve.steps >= lengths[serve.rows]).any():
            found.append("a row had ended")
        elif (path[serve.rows, serve.steps] != serve.component).any():
            found.append("another component was drawn")
        done[serve.rows] += 1
    if (done != lengths).any():
        found.append("a step was left out or added")
    return found


paths = st.builds(
    lambda rows, steps, k, seed: np.random.default_rng(seed).integers(0, k, (rows, steps)),
    st.integers(0, 9), st.integers(0, 24), st.integers(1, 4), st.integers(0, 2**32 - 1),
)  # fmt: skip


@given(paths, st.booleans(), st.data())
def test_each_row_and_step_is_served_once_by_its_component(path: np.ndarray, lockstep: bool, data: Any) -> None:
    lengths = np.array([data.draw(st.integers(0, path.shape[1])) for _ in path], dtype=np.int64)
    cut = np.where(np.arange(path.shape[1]) < lengths[:, None], path, -1)
    assert faults(cut, serves(path, lockstep=lockstep, lengths=lengths)) == []
    given_cut = [(s.component, s.rows.tolist()) for s in serves(cut, lockstep=lockstep)]
    assert given_cut == [(s.component, s.rows.tolist()) for s in serves(path, lockstep=lockstep, lengths=lengths)]


@given(paths, st.booleans(), st.data(), st.integers(1, 8))
def test_ends_and_a_path_that_come_as_the_rows_go(path: np.ndarray, lockstep: bool, data: Any, block: int) -> None:
    lengths = np.array([data.draw(st.integers(1, max(path.shape[1], 1))) for _ in path], dtype=np.int64)
    whole = list(serves(path, lockstep=lockstep, lengths=lengths))
    schedule = Schedule(path[:, :block], lockstep=lockstep, horizon=path.shape[1])
    known, run = block, []
    while (serve := schedule.next()) is not None:
        run.append(serve)
        schedule.end(serve.rows[serve.steps + 1 == lengths[serve.rows]])
        if int(serve.steps.max()) + 1 == known:
            schedule.extend(path[:, known : known + block])
            known += block
    assert faults(np.where(np.arange(path.shape[1]) < lengths[:, None], path, -1), run) == []
    assert [(a.component, a.rows.tolist(), a.steps.tolist()) for a in run] == [
        (b.component, b.rows.tolist(), b.steps.tolist()) for b in whole
    ]


@given(paths)
def test_lockstep_is_every_drawn_component_of_every_step(path: np.ndarray) -> None:
    expected = [(step, i) for step in range(path.shape[1]) for i in np.unique(path[:, step]).tolist()]
    run = list(serves(path, lockstep=True))
    assert [(int(serve.steps[0]), serve.component) for serve in run] == expected
    assert all(
        (serve.rows == np.flatnonzero(path[:, s] == i)).all() for serve, (s, i) in zip(run, expected, strict=True)
    )


@given(paths)
def test_the_first_step_is_in_lockstep_and_a_serve_takes_all_that_wait(path: np.ndarray) -> None:
    step = np.zeros(len(path), dtype=np.int64)
    for serve in serves(path):
        standing = np.flatnonzero(step < path.shape[1])
        if (step[standing] == 0).any():
            standing = standing[step[standing] == 0]
        waiting = standing[path[standing, step[standing]] == serve.component]
        assert serve.rows.tolist() == waiting.tolist()
        step[serve.rows] += 1


def test_rows_that_share_their_path_cost_one_forward_a_step() -> None:
    path = np.repeat(random_path(1, 50, HALVES, seed=0), 16, axis=0)
    assert len(list(serves(path))) == 50


# --- how many forwards ------------------------------------------------------------------------------------


def forwards(path: np.ndarray, *, lockstep: bool = False) -> int:
    return sum(1 for _ in serves(path, lockstep=lockstep))


@pytest.mark.parametrize(("k", "share"), [(2, 2 / 3), (3, 1 / 2), (4, 2 / 5)])
def test_the_stationary_queue_of_equal_weights(k: int, share: float) -> None:
    rows, steps = 20_000, 40
    run = list(serves(random_path(rows, steps, (1 / k,) * k, seed=k)))
    middle = [len(serve.rows) for serve in run[10 * k : len(run) - 15 * k]]
    assert np.mean(middle) / rows == pytest.approx(share, rel=0.02)


def fullest(path: np.ndarray) -> int:
    """Forwards of the rule that looks simplest: run the component that most rows wait for."""
    step, count = np.zeros(len(path), dtype=np.int64), 0
    while (left := np.flatnonzero(step < path.shape[1])).size:
        drawn = path[left, step[left]]
        step[left[drawn == np.bincount(drawn).argmax()]] += 1
        count += 1
    return count


@pytest.mark.parametrize("steps", [16, 64, 256])
@pytest.mark.parametrize("rows", [4, 16, 64])
def test_no_weights_need_more_forwards_than_lockstep(rows: int, steps: int) -> None:
    for weights in WEIGHTS:
        draws = [random_path(rows, steps, weights, seed) for seed in range(max(4, 4096 // (rows * steps)))]
        drift = sum(forwards(path) for path in draws)
        assert drift <= sum(forwards(path, lockstep=True) for path in draws), weights


def test_the_fullest_queue_would_need_more_than_lockstep_for_skewed_weights() -> None:
    draws = [random_path(16, 64, SKEWED, seed) for seed in range(4)]
    assert sum(map(fullest, draws)) > sum(forwards(path, lockstep=True) for path in draws)


def test_forwards_come_near_the_square_root_law() -> None:
    for weights in WEIGHTS:
        law = (1 + np.sqrt(weights).sum() ** 2) / 2
        assert 0.99 * law < forwards(random_path(128, 512, weights, seed=1)) / 512 < 1.16 * law, weights


def test_no_row_waits_for_ever() -> None:
    # One row draws a component of its own all the time, and 200 rows another: it is served, and not once in 200 turns.
    path = np.zeros((201, 100), dtype=np.int64)
    path[0] = 1
    run = list(serves(path))
    turns = [turn for turn, serve in enumerate(run) if serve.component == 1]
    assert len(run) == 200
    assert max(b - a for a, b in pairwise(turns)) < 30


# --- planted bugs, and what is refused ---------------------------------------------------------------------


def wrong_component(run: list[Serve]) -> Iterator[Serve]:
    yield from run[:5]
    yield replace(run[5], component=1 - run[5].component)
    yield from run[6:]


def wrong_step(run: list[Serve]) -> Iterator[Serve]:
    yield from run[:5]
    yield replace(run[5], steps=run[5].steps + 1)
    yield from run[6:]


def a_row_forgotten(run: list[Serve]) -> Iterator[Serve]:
    yield from run[:-1]
    yield replace(run[-1], rows=run[-1].rows[1:], steps=run[-1].steps[1:])


def served_twice(run: list[Serve]) -> Iterator[Serve]:
    yield from run
    yield run[-1]


@pytest.mark.parametrize("bug", [wrong_component, wrong_step, a_row_forgotten, served_twice])
def test_planted_bugs_are_found(bug: Callable[[list[Serve]], Iterator[Serve]]) -> None:
    path = random_path(12, 10, HALVES, seed=3)
    run = list(serves(path))
    assert faults(path, run) == []
    assert faults(path, bug(run)) != []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([0, 1], "path must be"),
        ([[0.5, 1.0]], "path must be"),
        ([[0, -2]], "path must be"),
        ([[0, -1, 1]], "an entry after a -1"),
    ],
)
def test_bad_paths_are_refused(path: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(path)


def test_bad_lengths_and_horizons_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths must be 2 integers"):
        serves([[0], [1]], lengths=[1])
    with pytest.raises(ValueError, match="2 steps, more than the horizon of 1"):
        Schedule([[0, 1]], horizon=1)
    schedule = Schedule([[0, 1], [0, -1]], horizon=3)
    with pytest.raises(ValueError, match="an entry after a -1"):
        schedule.extend([[0], [0]])
    with pytest.raises(ValueError, match="4 steps, more than"):
        schedule.extend([[0, 0], [-1, -1]])
