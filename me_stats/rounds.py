"""Rounds of tasks: each runs every task once, in an order of its own, so that a machine's drift hits all alike."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from me_stats.parts import Arrays, PartOfWork, Tick, load_part, run_parts

Note = Callable[[float, str], None]


class Sample(NamedTuple):
    """One run: its time, what it counted, and the memory (bytes) and energy (joules, NaN: unknown) that it took."""

    seconds: float
    tokens: int = 0
    forwards: int = 0
    tokens_forwarded: int = 0
    reads: int = 0
    memory: int = 0
    joules: float = math.nan


@dataclass(frozen=True)
class Task:
    """What one round does once; `warm` is done before the first round, as often as `run_rounds` is told."""

    name: str
    run: Callable[[], Sample]
    warm: Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios, with an interval that needs no law of the noise but equal medians in all rounds.

    `coverage` is the exact chance that the interval holds the true median: with 5 rounds the smallest and largest ratio
    hold it with chance 1 - 2·2⁻⁵ = 93.75%.
    """

    value: float
    interval: tuple[float, float]
    coverage: float
    rounds: tuple[float, ...]


def middle(values: Sequence[float], *, confidence: float = 0.9) -> Ratio:
    """The median of `values`, with the narrowest pair of order statistics that holds it with chance `confidence`.

    Where even the smallest and largest do not (below 5 values), they are the interval, and its coverage says so.
    """
    ordered = sorted(values)
    n = len(ordered)
    cut = max((j for j in range((n + 1) // 2) if 1 - 2 * binom.cdf(j, n, 0.5) >= confidence), default=0)
    coverage = max(0.0, float(1 - 2 * binom.cdf(cut, n, 0.5)))
    return Ratio(median(ordered), (ordered[cut], ordered[n - 1 - cut]), coverage, tuple(values))


def run_rounds(
    tasks: Sequence[Task], *, repeats: int, warm_ups: int = 1, seed: int = 0, folder: Path | None = None,
    progress: Note = lambda fraction, note: None,
) -> np.ndarray:  # fmt: skip
    """Samples (rounds, tasks, 7) of all tasks, interleaved; rounds that `folder` holds are not run again.

    Before the first round each task is warmed up `warm_ups` times, in turn.
    """
    if repeats < 1 or not tasks:
        raise ValueError(f"give at least one round and one task, got {repeats} and {len(tasks)}")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("tasks must have distinct names")
    with tempfile.TemporaryDirectory() as scratch:
        rounds = _Rounds(tasks, seed, warm_ups)
        parts = [PartOfWork(f"round-{i:03d}", len(tasks), partial(rounds.run, i)) for i in range(repeats)]

        def show(done: int, total: int) -> None:
            progress(done / total, rounds.note)

        paths = run_parts(parts, folder or Path(scratch), progress=show)
        found = [load_part(path) for path in paths]
    assert all(part is not None for part in found)
    return np.stack([part["samples"] for part in found if part is not None])


class _Rounds:
    def __init__(self, tasks: Sequence[Task], seed: int, warm_ups: int) -> None:
        self.tasks, self.seed, self.note, self._warm_ups = tasks, seed, "warming up", warm_ups

    def run(self, number: int, tick: Tick) -> Arrays:
        # The last first: large runs stand there, and what they allocate serves the others.
        for task in [*reversed(self.tasks)] * self._warm_ups:
            self.note = f"warming up: {task.name}"
            tick(0)
            task.warm()
        self._warm_ups = 0
        samples = np.zeros((len(self.tasks), len(Sample._fields)))
        for place in np.random.default_rng([self.seed, number]).permutation(len(self.tasks)).tolist():
            self.note = f"round {number + 1}: {self.tasks[place].name}"
            tick(0)
            samples[place] = self.tasks[place].run()
            tick(1)
        return {"samples": samples}
