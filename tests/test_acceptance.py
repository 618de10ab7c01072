from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats.acceptance import Forecast, forecast_acceptance, measure_acceptance, tokens_per_round
from me_stats.draws import RowStreams, Stream
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MarkovModel, TableModel, TopK, Warped
from me_stats.samplers import CESampler, MESampler, SpeculativeSampler
from me_stats.sensitivity.estimate import Estimate

TOYS = [MarkovModel.random(9, seed=seed) for seed in (0, 1)]
MIXING = ConstantMixing([0.6, 0.4])
TARGET = Warped(Ensemble(TOYS, MIXING), TopK(3))
DRAFT = Ensemble([Warped(toy, TopK(3)) for toy in TOYS], MIXING)


def test_acceptance_is_one_minus_tv_on_a_law_without_memory() -> None:
    toys = [TableModel([row], order=0) for row in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5])]
    target, draft = (
        Warped(Ensemble(toys, ConstantMixing([0.5, 0.5])), Greedy()),
        Ensemble(toys, ConstantMixing([0.5, 0.5])),
    )
    run = measure_acceptance(SpeculativeSampler(target, draft), [()], n=100, max_new_tokens=20)
    assert run.expected.value == pytest.approx(0.4)
    # 2,000 verdicts; 4.9 standard errors is 1e-6.
    assert abs(run.acceptance.value - 0.4) < 4.9 * np.sqrt(0.24 / 2000)
    assert run.acceptance.n == 2000
    forecast = forecast_acceptance(target, draft, run.trace.row_prompts(), run.trace.sequences(), chunk=2)
    assert forecast.acceptance.value == pytest.approx(0.4)
    assert forecast.tokens_per_round == pytest.approx(1 + 0.4 + 0.16)
    assert forecast.forwards_per_token == pytest.approx(4 / 1.56)
    assert forecast.best_chunk == 1


def test_a_forecast_along_the_targets_own_rows_is_what_a_run_expects() -> None:
    run = measure_acceptance(SpeculativeSampler(TARGET, DRAFT), [[0], [1]], n=40, max_new_tokens=10, seed=1)
    along = forecast_acceptance(TARGET, DRAFT, run.trace.row_prompts(), run.trace.sequences())
    assert along.acceptance.value == pytest.approx(run.expected.value)
    assert along.acceptance.stderr == pytest.approx(run.expected.stderr)
    elsewhere = CESampler(TARGET).sample([[0], [1]], n=40, max_new_tokens=10, seed=2)
    other = forecast_acceptance(TARGET, DRAFT, elsewhere.row_prompts(), elsewhere.sequences()).acceptance
    assert abs(other.value - along.acceptance.value) < 4.9 * np.hypot(other.stderr, along.acceptance.stderr)


def test_forwards_come_out_as_forecast_for_rows_that_run_alone() -> None:
    options = {"n": 12, "max_new_tokens": 40, "batch_size": 1}
    run = measure_acceptance(SpeculativeSampler(TARGET, DRAFT, chunk=3), [0], seed=3, **options)
    forecast = Forecast(run.expected, 2, 3)
    # Positions are not independent, and the last round of a row is short: a few percent either way.
    assert run.forwards_per_token == pytest.approx(forecast.forwards_per_token, rel=0.1)
    me = MESampler(DRAFT).sample([0], seed=3, **options)  # type: ignore[arg-type]
    assert me.cost.forwards == 480


class Lenient(RowStreams):
    """Takes a tenth of what should be rejected."""

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        if stream == "accept":
            log_law = (0.9 * log_law.exp() + torch.tensor([0.1, 0.0])).log()
        return super().__call__(log_law, rows, step, stream=stream, index=index)


def test_the_surplus_is_standard_normal_and_finds_a_sampler_that_accepts_too_much() -> None:
    runs = [
        measure_acceptance(SpeculativeSampler(TARGET, DRAFT), [0], n=5, max_new_tokens=8, seed=seed).surplus
        for seed in range(40)
    ]
    # The mean of 40 standard normals, and their sum of squares: about 1e-6 each.
    assert abs(np.mean(runs)) * np.sqrt(40) < 4.9
    assert 9 < float(np.sum(np.square(runs))) < 101

    sampler = SpeculativeSampler(TARGET, DRAFT)
    assert measure_acceptance(sampler, [0], n=200, max_new_tokens=15, draw=Lenient(0)).surplus > 4.9


def test_where_nothing_is_rejected_the_surplus_is_none() -> None:
    run = measure_acceptance(SpeculativeSampler(DRAFT, DRAFT), [0], n=2, max_new_tokens=10)
    assert (run.acceptance.value, run.surplus) == (1.0, 0.0)
    assert run.expected.value == pytest.approx(1)


def test_sampling_itself_keeps_no_notes() -> None:
    sampler = SpeculativeSampler(TARGET, DRAFT)
    measure_acceptance(sampler, [0], n=2, max_new_tokens=5)
    assert sampler._verdicts is None


def test_the_chunk_of_fewest_forwards() -> None:
    def best(acceptance: float, count: int) -> int:
        return Forecast(Estimate(acceptance, 0.0, (acceptance, acceptance), 2, ""), count, 4).best_chunk

    def by_hand(acceptance: float, count: int) -> int:
        costs = {c: (c + count) * (1 - acceptance) / (1 - acceptance ** (c + 1)) for c in range(1, 65)}
        return min(costs, key=lambda c: costs[c])

    assert best(1.0, 2) == 64
    for acceptance in (0.3, 0.8, 0.95, 0.98):
        assert best(acceptance, 3) == by_hand(acceptance, 3)
    assert tokens_per_round(0.0, 5) == 1


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two rows with tokens, got 1"):
        forecast_acceptance(TARGET, DRAFT, [[0], [0]], [[1, 2], []])
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1"):
        forecast_acceptance(TARGET, DRAFT, [[0]], [[1]], chunk=0)
