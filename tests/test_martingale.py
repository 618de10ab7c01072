"""Martingale tests on Markov toys: textbook formulas, false alarms, and the planted samplers each must reject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from me_stats import CESampler, ConstantMixing, Ensemble
from me_stats.martingale import (
    concatenate_rows,
    lag_one_test,
    lambda_score_test,
    log_prob_test,
    martingale_portfolio,
    overdispersion_test,
    pit_test,
    step_scores,
)
from me_stats.models import MarkovModel
from me_stats.steps import collect_steps
from tests.laws import EVEN, markov_pair, rows, simulate, summarise


def test_two_components_give_the_textbook_score() -> None:
    weights = np.array([0.7, 0.3])
    laws, tokens = simulate(markov_pair(), weights, 20, 15, np.random.default_rng(0))
    p = np.einsum("k,ntkv->ntv", weights, laws)
    u = np.take_along_axis((laws[:, :, 0] - laws[:, :, 1]) / p, tokens[..., None], axis=2)[..., 0]
    info = ((laws[:, :, 0] - laws[:, :, 1]) ** 2 / p).sum(-1)
    result = lambda_score_test(summarise(laws, tokens, weights), level=0.05)
    assert result.statistic == pytest.approx(u.sum() / math.sqrt(info.sum()))
    assert result.min_detectable == pytest.approx((1.96 + 0.8416) / math.sqrt(info.sum()), rel=1e-3)
    past = np.cumsum(u, axis=1) - u
    over = overdispersion_test(summarise(laws, tokens, weights))
    assert over.statistic == pytest.approx((u * past).sum() / math.sqrt((past**2 * info).sum()))
    lag = lag_one_test(summarise(laws, tokens, weights))
    assert lag.statistic == pytest.approx(
        (u[:, 1:] * u[:, :-1]).sum() / math.sqrt((u[:, :-1] ** 2 * info[:, 1:]).sum())
    )


# --- false alarms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "sampler", "n", "steps"),
    [
        ([0.5, 0.5], "ancestral", 50, 16),
        ([0.5, 0.5], "marginal", 50, 16),
        ([0.7, 0.25, 0.05], "ancestral", 20, 16),
        ([1.0, 0.0], "ancestral", 20, 8),
        ([0.5, 0.5], "ancestral", 1, 200),
    ],
)
def test_right_samplers_pass_at_the_stated_rate(weights: list[float], sampler: str, n: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    repeats, w = 400, np.array(weights)
    laws, tokens = simulate(markov_pair(components=len(w)), w, n * repeats, steps, rng, sampler=sampler)
    summaries = summarise(laws, tokens, w)
    found = [martingale_portfolio(rows(summaries, i * n, (i + 1) * n), rng) for i in range(repeats)]
    columns = [[r.pvalue for r in found]] + [[r.results[j].pvalue for r in found] for j in range(8)]
    for column in columns:
        for level in (0.05, 0.01, 0.001):
            assert (np.array(column) <= level).sum() <= stats.binom.isf(1e-5, repeats, level)


def test_a_router_is_tested_with_its_own_weights() -> None:
    # w(prefix) = (.9, .1) after even tokens and (.2, .8) after odd ones: right with the router, wrong with constants.
    rng = np.random.default_rng(2)
    tables, n, steps = markov_pair(), 200, 40
    tokens, laws = np.zeros((n, steps), dtype=np.int64), np.empty((n, steps, 2, 8))
    weights, previous = np.empty((n, steps, 2)), np.zeros(n, dtype=np.int64)
    for t in range(steps):
        laws[:, t] = tables[:, previous].transpose(1, 0, 2)
        weights[:, t] = np.where((previous % 2 == 0)[:, None], [0.9, 0.1], [0.2, 0.8])
        component = (rng.random(n) > weights[:, t, 0]).astype(int)
        cumulative = laws[np.arange(n), t, component].cumsum(1)
        previous = tokens[:, t] = (rng.random((n, 1)) * cumulative[:, -1:] > cumulative).sum(1).clip(max=7)
    log_laws = torch.tensor(np.log(laws))
    right = step_scores(log_laws, torch.tensor(np.log(weights)), torch.tensor(tokens))
    assert martingale_portfolio(right, rng).pvalue > 1e-3
    wrong = step_scores(log_laws, torch.tensor(np.log(weights.mean((0, 1)))), torch.tensor(tokens))
    assert martingale_portfolio(wrong, rng).rejected


# --- planted samplers ----------------------------------------------------------------------------------------------

PLANTED = [
    # sampler, strength, sequences, steps, the test that must find it, sign of its z
    ("once", 0.0, 50, 32, "overdispersion", 1),
    ("round robin", 0.0, 50, 32, "lag one", -1),
    ("sticky", 0.5, 50, 64, "lag one", 1),
    ("sticky", 0.95, 50, 64, "overdispersion", 1),
    ("temperature", 1.05, 1500, 64, "mean log p", -1),
    ("greedy", 0.1, 150, 64, "mean log p", 1),
]


@pytest.mark.parametrize(("sampler", "strength", "n", "steps", "finder", "sign"), PLANTED)
def test_planted_samplers_are_rejected(
    sampler: str, strength: float, n: int, steps: int, finder: str, sign: int
) -> None:
    rng = np.random.default_rng(4)
    laws, tokens = simulate(markov_pair(), EVEN, n, steps, rng, sampler=sampler, strength=strength)
    result = martingale_portfolio(summarise(laws, tokens, EVEN), rng)
    assert result.pvalue <= 1e-6, result.worst
    found = next(r for r in result.results if r.name == finder)
    assert found.rejected
    assert math.copysign(1, found.statistic) == sign


def test_wrong_weights_are_rejected() -> None:
    rng = np.random.default_rng(4)
    laws, tokens = simulate(markov_pair(), np.array([0.55, 0.45]), 500, 64, rng)
    result = martingale_portfolio(summarise(laws, tokens, EVEN), rng)
    assert result.rejected
    assert result.worst.name == "lambda score"
    assert result.worst.statistic > 0


def test_one_component_per_sequence_is_typically_found_with_fifty_sequences() -> None:
    # ... while the marginal tests see nothing: the bug that only a sequence test can find.
    rng = np.random.default_rng(6)
    repeats = 40
    laws, tokens = simulate(markov_pair(), EVEN, 50 * repeats, 32, rng, sampler="once")
    summaries = summarise(laws, tokens, EVEN)
    found = [martingale_portfolio(rows(summaries, 50 * i, 50 * i + 50), rng) for i in range(repeats)]
    assert all(r.rejected for r in found)
    assert {r.worst.name for r in found} == {"overdispersion"}
    for blind in ("PIT by rank", "PIT by ratio"):
        assert np.mean([next(x for x in r.results if x.name == blind).pvalue < 1e-3 for r in found]) < 0.2


def test_pairs_of_transforms_see_dependence_that_single_values_do_not() -> None:
    rng = np.random.default_rng(8)
    laws, tokens = simulate(markov_pair(), EVEN, 300, 64, rng, sampler="sticky", strength=0.7)
    uniform, pairs = pit_test(summarise(laws, tokens, EVEN), rng)
    assert pairs.pvalue < 1e-9
    assert uniform.pvalue > 1e-6


def test_minimum_detectable_weight_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    n, repeats = 200, 200
    null = summarise(*simulate(markov_pair(), EVEN, n, 10, rng), EVEN)
    shift = lambda_score_test(null, level=1e-3).min_detectable
    shifted = np.array([0.5 + shift, 0.5 - shift])
    summaries = summarise(*simulate(markov_pair(), shifted, n * repeats, 10, rng), EVEN)
    found = [lambda_score_test(rows(summaries, n * i, n * i + n), level=1e-3).rejected for i in range(repeats)]
    assert 0.7 < np.mean(found) < 0.9


# --- edges ---------------------------------------------------------------------------------------------------------


def test_an_impossible_token_rejects_alone() -> None:
    tables = markov_pair()
    tables[:, :, 7] = 0
    tables /= tables.sum(-1, keepdims=True)
    rng = np.random.default_rng(0)
    laws, tokens = simulate(tables, EVEN, 10, 10, rng)
    assert martingale_portfolio(summarise(laws, tokens, EVEN), rng).pvalue > 1e-3
    tokens[3, 9] = 7
    result = martingale_portfolio(summarise(laws, tokens, EVEN), rng)
    assert (result.pvalue, result.impossible, result.rejected) == (0.0, 1, True)
    assert all(np.isfinite(r.pvalue) for r in result.results)


@pytest.mark.parametrize("kind", ["identical", "single", "one-hot"])
def test_no_information_is_not_nan(kind: str) -> None:
    tables, weights = markov_pair(), EVEN
    if kind == "identical":
        tables[1] = tables[0]
    elif kind == "single":
        tables, weights = tables[:1], np.ones(1)
    else:
        tables[:] = np.eye(8)[[1, 2, 3, 4, 5, 6, 7, 0]]
    rng = np.random.default_rng(0)
    laws, tokens = simulate(tables, weights, 20, 20, rng)
    steps = summarise(laws, tokens, weights)
    for result in (lambda_score_test(steps), overdispersion_test(steps), lag_one_test(steps)):
        assert (result.pvalue, result.method, result.min_detectable) == (1.0, "no information", math.inf)
    assert (log_prob_test(steps).method == "no information") == (kind == "one-hot")
    assert martingale_portfolio(steps, rng).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1)])
def test_tiny_traces_give_valid_results(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    laws, tokens = simulate(markov_pair(), EVEN, *shape, rng)
    result = martingale_portfolio(summarise(laws, tokens, EVEN), rng)
    assert result.pvalue > 0.1
    assert result.n == shape[0] * shape[1]


def test_the_same_generator_gives_the_same_result() -> None:
    laws, tokens = simulate(markov_pair(), EVEN, 30, 30, np.random.default_rng(0))
    steps = summarise(laws, tokens, EVEN)
    one, two, other = (martingale_portfolio(steps, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_bad_input() -> None:
    laws, weights = torch.log(torch.full((3, 2, 4), 0.25)), torch.log(torch.tensor(EVEN))
    tokens = torch.zeros(3, dtype=torch.int64)
    steps = step_scores(laws, weights, tokens)
    for test in (overdispersion_test, lag_one_test):
        with pytest.raises(ValueError, match=r"\(N, T\)"):
            test(steps)
    with pytest.raises(ValueError, match="order"):
        pit_test(concatenate_rows([steps]), np.random.default_rng(0), order="size")
    nothing = step_scores(laws[None], weights, tokens[None] - 1)
    with pytest.raises(ValueError, match="at least one valid step"):
        lambda_score_test(nothing)


@pytest.mark.parametrize("order", ["ratio", "rank"])
def test_transforms_are_uniform_where_sequences_end(order: str) -> None:
    # Whether a second token exists depends on the first, so pairs that are complete are no fair sample of pairs.
    toys = [MarkovModel.random(6, seed=seed, eos=(5,)) for seed in (2, 3)]
    ensemble = Ensemble(toys, ConstantMixing([0.5, 0.5]))
    trace = CESampler(ensemble).sample([[0], [1, 2]], n=3000, max_new_tokens=12, seed=0)
    steps = collect_steps(ensemble, trace.row_prompts(), trace.sequences())
    values, pairs = pit_test(steps, np.random.default_rng(0), order=order)
    assert min(values.pvalue, pairs.pvalue) > 1e-4
    small, false_alarms = 30, np.zeros(2)
    for run in range(200):
        drawn = rows(steps, run * small, (run + 1) * small)
        found = pit_test(drawn, np.random.default_rng(run), order=order)
        false_alarms += [result.pvalue <= 0.05 for result in found]
    assert (false_alarms <= 28).all()  # binomial(200, .05) passes 28 with probability 1e-7
