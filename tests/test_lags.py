"""Lags against enumeration and the geometric law; planted routing bugs rejected, right draws calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from me_stats.lags import (
    expected_prefill,
    lag_test,
    longest_wait,
    longest_waits,
    prefill_per_step,
    prefilled_tokens,
    turn_ages,
)
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from tests.mixtures import PROMPTS, ensemble
from tests.strategies import LastTokenMixing

Ints = NDArray[np.int64]
Paths = Callable[[np.random.Generator, int, int], Ints]
WEIGHTS = np.array([0.2, 0.3, 0.5])


def fair(rng: np.random.Generator, n: int, steps: int) -> Ints:
    return rng.choice(3, size=(n, steps), p=WEIGHTS)


def sticky(rng: np.random.Generator, n: int, steps: int) -> Ints:
    path = fair(rng, n, steps)
    for t in range(1, steps):
        path[:, t] = np.where(rng.random(n) < 0.05, path[:, t - 1], path[:, t])
    return path


def round_robin(rng: np.random.Generator, n: int, steps: int) -> Ints:
    cycle = np.array([2, 1, 2, 0, 2, 1, 2, 0, 2, 1])  # turns in proportion to the weights
    return cycle[(rng.integers(10, size=(n, 1)) + np.arange(steps)) % 10]


def once(rng: np.random.Generator, n: int, steps: int) -> Ints:
    return np.repeat(fair(rng, n, 1), steps, axis=1)


def wrong_weights(rng: np.random.Generator, n: int, steps: int) -> Ints:
    return rng.choice(3, size=(n, steps), p=[0.23, 0.3, 0.47])


def ended(path: Ints, rng: np.random.Generator) -> Ints:
    """Rows that stop at random right after component 0 had two turns in a row: the end depends on the path."""
    stop = (path[:, 1:] == 0) & (path[:, :-1] == 0) & (rng.random(path[:, 1:].shape) < 0.5)
    last = np.where(stop.any(1), stop.argmax(1) + 1, path.shape[1])
    return np.where(np.arange(path.shape[1]) > last[:, None], -1, path)


def false_alarms(end: bool, level: float, repeats: int = 500) -> int:
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(repeats):
        path = fair(rng, 40, 50)
        alarms += lag_test(ended(path, rng) if end else path, weights=WEIGHTS, level=level).rejected
    return alarms


@pytest.mark.parametrize("end", [False, True])
def test_right_draws_are_calibrated_also_where_the_path_decides_the_end(end: bool) -> None:
    alarms = false_alarms(end, 0.1)
    assert 25 <= alarms <= 70  # 50 expected less what Bonferroni loses, standard deviation 6.7


def test_complete_gaps_alone_would_reject_right_draws() -> None:
    """Why ages and not gaps: rows that the path ends leave more short gaps than the geometric law."""
    rng = np.random.default_rng(0)
    path = ended(fair(rng, 4000, 12), rng)
    turns = path == 0
    gaps = turn_ages(path, 0)[turns & (turns.cumsum(1) > 1)]
    assert abs((gaps == 1).mean() - 0.2) > 0.08
    assert not lag_test(path, weights=WEIGHTS, level=0.01).rejected


@pytest.mark.parametrize("planted", [sticky, round_robin, once, wrong_weights])
def test_planted_bugs_are_rejected(planted: Paths) -> None:
    result = lag_test(planted(np.random.default_rng(1), 300, 100), weights=WEIGHTS, level=1e-9)
    assert result.rejected
    assert result.n == 30_000


def test_samplers_are_judged_by_their_traces() -> None:
    toy = Ensemble([MarkovModel.random(4, seed=s, eos=(3,)) for s in range(3)], ConstantMixing(WEIGHTS))
    right = MESampler(toy).sample([0], n=500, max_new_tokens=40, seed=2)
    assert not lag_test(right, level=0.01).rejected
    assert lag_test(right, weights=[0.3, 0.2, 0.5]).rejected
    assert lag_test(SequenceMixtureSampler(toy).sample([0], n=500, max_new_tokens=40, seed=2)).rejected
    assert not lag_test(CESampler(toy, latent=True).sample([0], n=500, max_new_tokens=40), level=0.01).rejected


def test_what_has_no_geometric_lags_is_refused() -> None:
    components = [MarkovModel.random(2, seed=s) for s in range(2)]
    router = Ensemble(components, LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])))
    with pytest.raises(TypeError, match="LastTokenMixing has none: under a router the chance of a component depends"):
        lag_test(MESampler(router).sample([0], n=4, max_new_tokens=4))
    plain = Ensemble(components, ConstantMixing([0.5, 0.5]))
    with pytest.raises(ValueError, match="CESampler has no components"):
        lag_test(CESampler(plain).sample([0], n=4, max_new_tokens=4))
    for path, weights, message in (
        ([[0, 1]], None, "weights must be given"),
        ([[0, 2]], [0.5, 0.5], "components names 2"),
        ([[0, -1, 1]], [0.5, 0.5], "entry after a -1"),
        ([0, 1], [0.5, 0.5], r"must be \(N, T\) integers"),
        ([[0.0, 1.0]], [0.5, 0.5], r"must be \(N, T\) integers"),
        ([[0, 1]], [0.5, 0.6], "sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lag_test(path, weights=weights)


def test_weights_of_zero_and_one_are_certain() -> None:
    assert lag_test(np.zeros((5, 9), dtype=int), weights=[1.0, 0.0]).pvalue == 1.0
    assert lag_test(np.ones((5, 9), dtype=int), weights=[1.0, 0.0]).pvalue == 0.0
    assert lag_test(np.array([[0, 1, 0, 1]] * 9), weights=[0.5, 0.5, 0.0]).n == 36


@pytest.mark.parametrize("prompt_length", [1, 7])
def test_prefill_and_longest_waits_are_those_of_enumeration(prompt_length: int) -> None:
    steps = 6
    paths = np.array(list(itertools.product(range(3), repeat=steps)))
    chances = WEIGHTS[paths].prod(1)
    forwarded = []
    for path in paths.tolist():
        seen, total = [-prompt_length] * 3, 0
        for t, component in enumerate(path):
            total += t - seen[component]
            seen[component] = t
        forwarded.append(total)
    tokens = prefilled_tokens(paths, prompt_length=prompt_length)
    assert tokens.sum(1).tolist() == forwarded
    expected = expected_prefill(WEIGHTS, steps, prompt_length=prompt_length)
    assert chances @ forwarded / steps == pytest.approx(expected, rel=1e-12)
    for i, weight in enumerate(WEIGHTS):
        runs = [
            max(len(list(group)) if away else 0 for away, group in itertools.groupby(path, lambda m, i=i: m != i))
            for path in paths.tolist()
        ]
        assert longest_waits(paths, 3)[:, i].tolist() == runs
        law = longest_wait(weight, steps)
        cdf = [chances[np.array(runs) <= length].sum() for length in range(steps + 1)]
        np.testing.assert_allclose(law.cdf, cdf[: len(law.cdf)], atol=1e-12)
        assert law.mean == pytest.approx(chances @ runs)
        assert law.quantile(0.9) == next(length for length, p in enumerate(cdf) if p >= 0.9)


def test_forecasts_hold_on_long_rows() -> None:
    toy = Ensemble([MarkovModel.random(4, seed=s) for s in range(3)], ConstantMixing(WEIGHTS))
    trace = MESampler(toy).sample([0, 1], n=4000, max_new_tokens=200, seed=3)
    measured = prefill_per_step(trace, confidence=1 - 1e-6)
    assert measured.interval[0] < expected_prefill(WEIGHTS, 200, prompt_length=2) < measured.interval[1]
    assert expected_prefill(WEIGHTS, 10**7) == pytest.approx(3, abs=1e-5)
    assert trace.components is not None
    waits = longest_waits(trace.components, 3)
    for i, weight in enumerate(WEIGHTS):
        law = longest_wait(weight, 200)
        assert waits[:, i].mean() == pytest.approx(law.mean, abs=5 * waits[:, i].std() / 4000**0.5)
        passed = (waits[:, i] > law.quantile(0.99)).mean()
        assert passed <= 0.01 + 5 * 0.1 / 4000**0.5
    assert longest_wait(0.001, 50).cdf[-1] == 1.0
    assert longest_wait(1.0, 5).mean == 0.0


@pytest.mark.parametrize("weight", [0.02, 0.2, 0.5, 0.7, 0.97])
def test_the_law_of_long_rows_is_that_of_the_whole_recursion(weight: float) -> None:
    steps, q = 30_000, 1 - weight
    law = longest_wait(weight, steps)
    for run in {1, 2, law.quantile(1e-6) + 1, law.quantile(0.5) + 1, law.quantile(1 - 1e-9) + 1}:
        none = [1.0] * (run + 1)
        none[run] = 1 - q**run
        for t in range(run + 1, steps + 1):
            none.append(none[t - 1] - weight * q**run * none[t - run - 1])
        assert law.cdf[run - 1] == pytest.approx(none[steps], rel=1e-8, abs=1e-12)
    growth = longest_wait(weight, 10**7).mean - longest_wait(weight, 10**6).mean
    assert growth == pytest.approx(np.log(10) / -np.log(q), rel=0.02 if weight < 0.9 else 0.3)


def test_the_prefill_is_what_the_caches_forward() -> None:
    model = ensemble()
    trace = MESampler(model).sample(PROMPTS, n=3, max_new_tokens=10, seed=1)
    assert trace.components is not None
    lengths = [len(prompt) for prompt in trace.row_prompts()]
    tokens = prefilled_tokens(trace.components, prompt_length=lengths)
    shared = trace.cost.tokens_forwarded
    assert tokens.clip(min=0).sum() >= shared > 0.5 * tokens.clip(min=0).sum()  # rows of a prompt share its prefill


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longest_wait(0.0, 5), "weight must lie"),
        (lambda: longest_wait(0.5, 0), "steps must be"),
        (lambda: longest_wait(1e-4, 10**5), "does not fit"),
        (lambda: longest_wait(0.5, 5).quantile(1.0), "probability must lie"),
        (lambda: expected_prefill([0.5, 0.5], 0), "steps must be at least 1"),
        (lambda: turn_ages(torch.zeros(2, 3), 0), "integers"),
    ],
)
def test_bad_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
