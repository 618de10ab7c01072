"""Toys against the random numbers that they use up, and the price of checking a sampler and of the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from me_stats.draws import BLOCK, RowStreams, Stream
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel
from me_stats.samplers import CESampler, MESampler
from me_stats.samplers.tabular import Plan
from me_stats.testing import check_sampler

ROWS, STEPS, TOGETHER = 50_000, 50, 4096


def pair(size: int) -> Ensemble:
    return Ensemble([MarkovModel.random(size, seed=seed) for seed in (0, 1)], ConstantMixing([0.4, 0.6]))


def numbers(streams: list[Stream]) -> None:
    source = RowStreams(0)
    for first in range(0, ROWS, TOGETHER):
        for block in range(-(-STEPS // BLOCK)):
            for stream in streams:
                source.integers(np.arange(first, min(first + TOGETHER, ROWS)), block, stream=stream)


@pytest.mark.parametrize("size", [5, 50, 256])
@pytest.mark.parametrize("algorithm", ["ce", "me"])
def test_toy_over_random_numbers(ratio: Callable[..., float], algorithm: str, size: int) -> None:
    plan = Plan.marginal(pair(size)) if algorithm == "ce" else Plan.ancestral(pair(size))
    assert plan is not None
    rows, prompts = np.arange(ROWS), np.zeros(ROWS, dtype=np.int64)
    streams: list[Stream] = ["token"] if algorithm == "ce" else ["token", "component"]
    assert ratio(lambda: plan.run([(0,)], prompts, rows, STEPS, 0), lambda: numbers(streams), rounds=7) > 1


def test_check_sampler_over_sampling(ratio: Callable[..., float]) -> None:
    """Checking draws against drawing them alone: four tokens of 20,000 rows."""
    sampler, law = MESampler(pair(50)), pair(50)

    def check() -> None:
        assert check_sampler(sampler, law, [0], max_new_tokens=4, n=20_000, stop_early=False).passed

    ratio(check, lambda: sampler.sample([0], max_new_tokens=4, n=20_000), rounds=5)


def test_me_over_ce_on_toys(ratio: Callable[..., float]) -> None:
    ce, me = CESampler(pair(50)), MESampler(pair(50))
    ratio(lambda: me.sample([0], max_new_tokens=50, n=20_000), lambda: ce.sample([0], max_new_tokens=50, n=20_000))


def test_import_over_import_of_numpy(ratio: Callable[..., float]) -> None:
    def starting(module: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    ratio(starting("me_stats"), starting("numpy"), rounds=5)
