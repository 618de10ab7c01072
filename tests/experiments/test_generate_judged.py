"""The judgement of generate: the estimate of a weight, and what a planted bug does to each verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from me_stats.testing import Generate
from tests import tiny

judged = tiny.experiment("generate_judged")
CASES = ("plain", "silent top-k", "speculative", "ensemble weight", "all drafted")


def simulated(weight: float, n: int, seed: int) -> np.ndarray:
    """Log-probabilities (n, 2) of tokens from a mixture of two laws."""
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.ones(20), size=2)
    tokens = rng.choice(20, size=n, p=weight * laws[0] + (1 - weight) * laws[1])
    return np.asarray(np.log(laws[:, tokens].T))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.6, 1.0])
def test_the_weight_is_recovered(weight: float) -> None:
    covered = 0
    for seed in range(100):
        found = judged.effective_weight(simulated(weight, 500, seed))
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        covered += found["low"] - 0.005 <= weight <= found["high"] + 0.005  # the grid of the interval
    assert covered >= 86  # binomial(100, .95) falls below 86 with probability 2e-4; the seeds are fixed


def test_every_case_has_a_verdict_and_a_size() -> None:
    cases = {case["name"]: case for case in tiny.record("generate_judged").results["cases"]}
    assert tuple(cases) == CASES
    for case in cases.values():
        assert 0 <= case["pvalue"] <= 1
        assert len(case["weight_by_step"]) == tiny.OPTIONS["generate_judged"]["steps"]
    assert cases["plain"]["tv_upper_first"] < 0.3
    assert not cases["silent top-k"]["passed"]
    assert cases["ensemble weight"]["weight"]["value"] > 0.62
    assert cases["ensemble weight"]["weight_by_step"][-1]["value"] > 0.75


def test_a_planted_temperature_fails_the_plain_case(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hot(Generate):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, temperature=1.5)

    monkeypatch.setattr(judged, "Generate", Hot)
    record = judged.run(tiny.config("generate_judged", rows=200, assisted_rows=8, steps=8))
    assert not record.held
    assert [name for name, held in record.checks.items() if not held and name.startswith("generate(top_k=0)")]


def test_progress_goes_forward() -> None:
    seen: list[float] = []
    config = tiny.config("generate_judged", rows=20, assisted_rows=2, steps=3)
    judged.run(config, lambda fraction, note: seen.append(fraction))
    assert seen == sorted(seen)
    assert len(seen) == 5
