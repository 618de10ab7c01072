"""TV of steps, likelihood of a corpus and forecast work, against formulas and counted work."""

from __future__ import annotations

import math

import numpy as np
import pytest

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import MESampler
from me_stats.sensitivity.readings import (
    corpus_nll,
    distinct,
    forwards_per_token,
    repetition,
    step_tv_sums,
    tokens_forwarded,
)
from tests import mixtures


@pytest.mark.parametrize("reference", [(0.5, 0.5), (0.2, 0.3, 0.5)])
def test_step_tv_is_summed_along_the_prefixes(reference: tuple[float, ...]) -> None:
    toys = [TableModel.random(4, seed=seed, eos=(3,)) for seed in range(len(reference))]
    trace = MESampler(Ensemble(toys, ConstantMixing(reference))).sample([[0], [1]], n=3, max_new_tokens=5)
    targets = [tuple(np.eye(len(reference))[0].tolist()), reference, tuple(reversed(reference))]
    expected = np.zeros((6, 3))
    for row, (prompt, tokens) in enumerate(zip(trace.row_prompts(), trace.sequences(), strict=True)):
        for step in range(len(tokens)):
            laws = np.stack([toy.log_probs([(*prompt, *tokens[:step])])[0].exp().numpy() for toy in toys])
            for g, target in enumerate(targets):
                expected[row, g] += np.abs((np.array(target) - reference) @ laws).sum() / 2
    assert step_tv_sums(trace, targets, reference) == pytest.approx(expected, abs=1e-12)


def test_corpus_nll_and_slopes_are_those_of_the_mean() -> None:
    log_probs = np.log(np.random.default_rng(0).uniform(0.05, 0.9, size=(500, 3)))
    at = np.array([0.2, 0.5, 0.3])

    def mean(weights: np.ndarray) -> float:
        return float(-np.log(np.exp(log_probs) @ weights).mean())

    nll, slopes = corpus_nll(log_probs, at.tolist())
    assert nll.value == pytest.approx(mean(at))
    for slope, vertex in zip(slopes, np.eye(3), strict=True):
        assert slope is not None
        step = 1e-5 * (vertex - at)
        assert slope.value == pytest.approx((mean(at + step) - mean(at - step)) / 2e-5, rel=1e-5)


def test_an_excluded_token_costs_infinitely_much() -> None:
    nll, slopes = corpus_nll([[-1.0, -math.inf], [-2.0, -1.0]], [0.0, 1.0])
    assert nll.value == math.inf
    assert slopes == (None, None)
    with pytest.raises(ValueError, match="without NaN"):
        corpus_nll([[math.nan, -1.0], [-2.0, -1.0]], [0.5, 0.5])
    with pytest.raises(ValueError, match="two tokens or more"):
        corpus_nll([[-1.0, -1.0]], [0.5, 0.5])


def test_shares() -> None:
    assert (distinct([1, 2, 1, 1]), distinct([])) == (0.5, 1.0)
    assert repetition([1, 2, 1, 2, 1]) == pytest.approx(0.5)  # 12 and 21 come again
    assert (repetition([1]), repetition([1, 2, 3])) == (0.0, 0.0)


def test_forecast_work_is_what_networks_count() -> None:
    model = mixtures.ensemble()
    rows, steps = 60, 12
    prompts = np.random.default_rng(0).integers(5, 40, size=(rows, 4)).tolist()  # equal prompts would share a law
    trace = MESampler(model, lockstep=True).sample(prompts, max_new_tokens=steps, batch_size=rows)
    lengths = trace.lengths.numpy().astype(float)
    assert (lengths == steps).all()
    assert trace.components is not None
    fed = []
    for components in trace.components.tolist():
        last = {component: step for step, component in enumerate(components)}
        fed.append(sum(4 + step for step in last.values()))
    assert trace.cost.tokens_forwarded == sum(fed)
    forecast = tokens_forwarded(trace, (0.6, 0.4))
    assert forecast == pytest.approx(np.full(rows, forecast[0]))
    assert abs(np.mean(fed) - forecast[0]) < 4 * np.std(fed) / np.sqrt(rows)
    # Rows that are read for the first time are prefilled apart from those that go on.
    extra = trace.cost.forwards - lengths.sum() * forwards_per_token((0.6, 0.4), lengths, lockstep=True)
    assert 0 <= extra < 12
    drifting = MESampler(model).sample(prompts, max_new_tokens=steps, batch_size=rows)
    forecast = lengths.sum() * forwards_per_token((0.6, 0.4), lengths)
    assert drifting.cost.forwards == pytest.approx(forecast, rel=0.1)
    assert forecast < 0.95 * trace.cost.forwards


def test_forecast_of_corners() -> None:
    toys = [TableModel.random(4, seed=seed) for seed in (0, 1)]
    trace = MESampler(Ensemble(toys, ConstantMixing([1.0, 0.0]))).sample([0, 1, 2], n=2, max_new_tokens=5)
    assert tokens_forwarded(trace, (1.0, 0.0)).tolist() == [7.0, 7.0]  # the prompt and all but the last token
    assert forwards_per_token((1.0, 0.0), np.array([5.0, 5.0])) == pytest.approx(0.5)  # one forward serves two rows
    assert forwards_per_token((0.5, 0.5), np.array([5.0])) == pytest.approx(1.0)
