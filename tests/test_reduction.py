"""Reduced estimators keep the exact expectation, their intervals cover, and the factors are those of long runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from me_stats.exact import sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel
from me_stats.reduction import (
    Reduced,
    common_draws,
    component_sums,
    control_variates,
    law_controls,
    reduced_mean,
    token_sums,
    weight_controls,
)
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity.exact import ExpectationPolynomial
from me_stats.trace import Trace, score
from tests.strategies import LastTokenMixing

AT, AIM = (0.3, 0.7), (0.45, 0.55)
STEPS, ROWS, GROUPS = 4, 60, 300
PROMPTS = ([0], [1])
REWARD = np.array([1.0, -0.5, 2.0])
BY_COMPONENT = np.array([[0.0, 1.0], [0.0, -2.0], [0.5, 0.0]])  # (V, K)


def toy(weights: tuple[float, ...] = AT) -> Ensemble:
    components = [TableModel.random(3, seed=seed, order=1, eos=(2,)) for seed in range(len(weights))]
    return Ensemble(components, ConstantMixing(weights))


def rough(row: Sequence[int]) -> float:
    """A function of the whole continuation, neither additive nor symmetric."""
    return float(sum((i + 1) ** 1.5 * REWARD[token] for i, token in enumerate(row)) + len(row) ** 2)


def reward(row: Sequence[int]) -> float:
    return float(REWARD[list(row)].sum())


def log_prob(ensemble: Ensemble, prompt: list[int]) -> Callable[[Sequence[int]], float]:
    return lambda row: float(score(ensemble, prompt, [list(row)]).log_probs.sum())


def exact(f: Callable[[Sequence[int]], float], weights: tuple[float, ...] = AT) -> float:
    """E f, the mean over both prompts."""
    components = toy(weights).components
    return float(
        np.mean(
            [
                ExpectationPolynomial.enumerate(components, prompt, f, max_new_tokens=STEPS).value(weights)
                for prompt in PROMPTS
            ]
        )
    )


def exact_by_component() -> float:
    """E Σ_t h(m_t, x_t) = Σ_t Σ_i E λ_i P_i(x|prefix) h(i, x), by enumeration of the prefixes."""
    ensemble, total = toy(), 0.0
    for prompt in PROMPTS:
        for steps in range(STEPS):
            prefixes, chances = [()], np.ones(1)
            if steps:
                law = sequence_law(ensemble, prompt, max_new_tokens=steps)
                alive = [len(row) == steps and 2 not in row for row in law.rows]
                prefixes = [tuple(row) for row, one in zip(law.rows, alive, strict=True) if one]
                chances = np.exp(law.log_probs)[alive]
            for i, component in enumerate(ensemble.components):
                laws = component.log_probs([(*prompt, *prefix) for prefix in prefixes]).exp().numpy()
                total += AT[i] * float(chances @ laws @ BY_COMPONENT[:, i]) / 2
    return total


@cache
def long() -> Trace:
    return MESampler(toy()).sample(PROMPTS, n=ROWS * GROUPS // 2, max_new_tokens=STEPS, seed=0)


@cache
def other() -> Trace:
    return MESampler(toy(AIM)).sample(PROMPTS, n=ROWS * GROUPS // 2, max_new_tokens=STEPS, seed=0)


def part(trace: Trace, group: int) -> Trace:
    """A few rows of each prompt, with their scores."""
    half, each = len(trace.tokens) // 2, ROWS // 2
    rows = np.concatenate([np.arange(group * each, (group + 1) * each) + start for start in (0, half)])
    out = dataclasses.replace(
        trace, tokens=trace.tokens[rows], lengths=trace.lengths[rows], components=trace.components[rows],
        prompt_index=trace.prompt_index[rows], rows=trace.rows[rows],
    )  # fmt: skip
    vars(out)["score"] = dataclasses.replace(
        trace.score, component_log_probs=trace.score.component_log_probs[rows],
        log_weights=trace.score.log_weights[rows],
    )  # fmt: skip
    return out


def adjusted(trace: Trace, f: Callable[[Sequence[int]], float], *, laws: bool) -> Reduced:
    controls = weight_controls(trace, starts=(0, 2))
    if laws:
        controls = np.concatenate([controls, law_controls(trace, REWARD, "log_prob")], 1)
    values = [f(row) for row in trace.sequences()]
    return control_variates(values, controls, groups=trace.prompt_index.numpy())


def estimators() -> dict[str, tuple[Callable[[Trace], Reduced], float]]:
    return {
        "components": (lambda trace: component_sums(trace, BY_COMPONENT), exact_by_component()),
        "tokens": (lambda trace: token_sums(trace, REWARD), exact(reward)),
        "weights": (lambda trace: adjusted(trace, rough, laws=False), exact(rough)),
        "laws": (lambda trace: adjusted(trace, rough, laws=True), exact(rough)),
    }


@pytest.mark.parametrize("name", ["components", "tokens", "weights", "laws"])
def test_estimates_keep_the_expectation_and_intervals_cover(name: str) -> None:
    estimate, truth = estimators()[name]
    whole = estimate(long())
    for one in (whole.plain, whole.reduced):
        assert abs(one.value - truth) < 4 * one.stderr
    parts = [estimate(part(long(), group)) for group in range(GROUPS)]
    values = np.array([one.reduced.value for one in parts])
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(GROUPS)  # unbiased with 60 rows, too
    for column in ("plain", "reduced"):
        hits = sum(low <= truth <= high for low, high in (getattr(one, column).interval for one in parts))
        assert 0.95 - 0.04 <= hits / GROUPS <= 0.985  # 3 binomial standard deviations
    # The factor is what becomes of the spread of whole estimates; with more rows, fitting costs less.
    plain = np.array([one.plain.value for one in parts])
    spread = plain.var() / values.var()
    assert spread == pytest.approx(whole.factor.value, rel=0.25)
    factor = spread if name in ("weights", "laws") else whole.factor.value
    if name != "tokens":
        assert whole.factor.value > 1.05
    hits = sum(low <= factor <= high for low, high in (one.factor.interval for one in parts))
    assert hits / GROUPS >= 0.9


def test_the_log_prob_has_the_mean_of_the_entropy() -> None:
    ensemble = toy()
    whole = token_sums(long(), "log_prob")
    truth = np.mean(
        [
            ExpectationPolynomial.enumerate(
                ensemble.components, p, log_prob(ensemble, p), max_new_tokens=STEPS
            ).value(AT)
            for p in PROMPTS
        ]
    )  # fmt: skip
    for one in (whole.plain, whole.reduced):
        assert abs(one.value - truth) < 4 * one.stderr
    assert law_controls(long(), "log_prob")[:, 0] == pytest.approx(
        long().log_probs.sum(1).numpy() - _entropy_sums(long()), abs=1e-9
    )


def _entropy_sums(trace: Trace) -> np.ndarray:
    """Σ_t E(log p | prefix), each law on its own."""
    table = {(): 0.0}
    sums = []
    for prompt, row in zip(trace.row_prompts(), trace.sequences(), strict=True):
        total = 0.0
        for last in [*prompt, *row][:-1]:
            if (last,) not in table:
                law = trace.model.log_probs([(last,)])[0]
                table[(last,)] = float((law.exp() * law).sum())
            total += table[(last,)]
        sums.append(total)
    return np.array(sums)


def test_a_whole_step_control_is_the_conditional_mean_with_a_better_coefficient() -> None:
    """f(x_t) - E f with coefficient 1 is `token_sums`; the fitted one is at least as good on a long run."""
    trace, groups = long(), long().prompt_index.numpy()
    rewards = np.array([reward(row) for row in trace.sequences()])
    control = law_controls(trace, REWARD)
    once = token_sums(trace, REWARD)
    assert np.mean(rewards - control[:, 0]) == pytest.approx(once.reduced.value)
    fitted = control_variates(rewards, control, groups=groups)
    assert fitted.factor.value >= max(1.0, once.factor.value) * 0.999


def test_components_given_the_tokens_never_add_variance_but_tokens_given_the_prefix_may() -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        h = rng.normal(size=(3, 2))
        assert component_sums(part(long(), seed), h).factor.interval[1] > 1
        assert component_sums(long(), h).factor.value > 1
    # x_2 = 1 - x_1: the sum is 1 for certain, its term by term mean is not.
    flips = MarkovModel([0.5, 0.5], [[0.02, 0.98], [0.98, 0.02]])
    trace = CESampler(flips).sample([], n=2000, max_new_tokens=2, seed=0)
    gain = token_sums(trace, [0.0, 1.0])
    assert gain.factor.interval[1] < 0.2
    assert gain.reduced.interval[0] < 1 < gain.reduced.interval[1]


def test_per_component_and_per_step_values_agree() -> None:
    trace = part(long(), 0)
    shape = tuple(trace.score.component_log_probs.shape)
    per_step = np.broadcast_to([1.0, 3.0], shape)
    assert component_sums(trace, [1.0, 3.0]) == component_sums(trace, per_step)
    both = component_sums(trace, [1.0, 1.0])  # counts tokens, whoever wrote them
    assert both.factor.value == pytest.approx(1)
    assert both.plain.value == pytest.approx(float(trace.lengths.double().mean()))


def test_blocks_of_controls_add_up_and_have_mean_zero_under_a_router() -> None:
    trace = long()
    whole, blocks = weight_controls(trace), weight_controls(trace, starts=(0, 1, 3, 9))
    np.testing.assert_allclose(blocks.sum(1), whole[:, 0], atol=1e-12)
    assert blocks.shape == (len(trace.tokens), 4)
    assert not blocks[:, 3].any()  # past the last step
    router = Ensemble(toy().components, LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])))
    routed = MESampler(router).sample([0], n=3000, max_new_tokens=STEPS, seed=3)
    controls = np.concatenate([weight_controls(routed), law_controls(routed, REWARD, "log_prob")], 1)
    found = control_variates([reward(row) for row in routed.sequences()], controls)
    assert found.controls_pvalue > 1e-3
    assert found.factor.interval[0] > 1


def test_a_control_with_a_wrong_mean_is_seen_and_biases() -> None:
    trace, groups, truth = long(), long().prompt_index.numpy(), exact(rough)
    values = [rough(row) for row in trace.sequences()]
    honest = control_variates(values, weight_controls(trace), groups=groups)
    assert honest.controls_pvalue > 1e-3
    found = control_variates(values, weight_controls(trace) + 0.05, groups=groups)
    assert found.controls_pvalue < 1e-6
    assert not found.reduced.interval[0] <= truth <= found.reduced.interval[1]
    # The share of tokens under other weights than those drawn at: the usual way to get it wrong.
    moved = dataclasses.replace(trace, model=toy((0.4, 0.6)))
    assert control_variates(values, weight_controls(moved), groups=groups).controls_pvalue < 1e-6
    rng, small = np.random.default_rng(1), 0
    for _ in range(1000):
        y, c = rng.exponential(size=100), rng.exponential(size=(100, 3)) - 1
        small += control_variates(y, c).controls_pvalue <= 0.05
    assert 25 <= small <= 100  # skewed controls, 100 rows: a little above nominal


def test_useless_and_repeated_controls_cost_little_and_say_so() -> None:
    rng, hits, factors = np.random.default_rng(2), 0, []
    for _ in range(1000):
        y, c = rng.exponential(size=60), rng.normal(size=(60, 5))
        found = control_variates(y, np.concatenate([c, c], 1))
        assert found.reduced.method == "5 control variates"
        hits += found.reduced.interval[0] <= 1 <= found.reduced.interval[1]
        factors.append(found.factor.value)
    assert 925 <= hits <= 970  # exponential rows, as for the plain mean
    assert 0.7 < np.mean(factors) < 1  # fitting noise is charged, not hidden


def test_common_draws_estimate_the_difference_and_beat_independent_runs() -> None:
    truth = exact(rough, AIM) - exact(rough)
    whole = common_draws(long(), other(), rough)
    assert abs(whole.reduced.value - truth) < 4 * whole.reduced.stderr
    assert whole.factor.interval[0] > 2
    assert (whole.plain.stderr / whole.reduced.stderr) ** 2 == pytest.approx(whole.factor.value, rel=1e-6)
    parts = [common_draws(part(long(), group), part(other(), group), rough) for group in range(GROUPS)]
    for column in ("plain", "reduced"):
        hits = [low <= truth <= high for low, high in (getattr(one, column).interval for one in parts)]
        if column == "reduced":
            assert 0.91 <= np.mean(hits) <= 0.985
        else:
            assert np.mean(hits) > 0.99  # its interval is for runs that do not share
    factor = whole.factor.value
    assert np.mean([one.factor.interval[0] <= factor <= one.factor.interval[1] for one in parts]) >= 0.91
    # What independent seeds really give.
    apart = MESampler(toy(AIM)).sample(PROMPTS, n=ROWS * GROUPS // 2, max_new_tokens=STEPS, seed=1)
    values = [np.array([rough(row) for row in trace.sequences()]) for trace in (long(), apart)]
    groups = long().prompt_index.numpy()
    independent = reduced_mean(values[1] - values[0], values[0], groups=groups)
    assert independent.plain.stderr == pytest.approx(whole.plain.stderr, rel=0.05)
    pair = common_draws(long(), other(), (values[0], [rough(row) for row in other().sequences()]))
    assert pair == whole
    same = common_draws(long(), long(), rough)
    assert same.factor.value == math.inf
    assert same.reduced.interval == (0.0, 0.0)


def test_traces_that_do_not_share_their_draws_are_refused() -> None:
    def draw(**options: object) -> Trace:
        settings = {"n": 8, "max_new_tokens": STEPS, "seed": 0} | options
        return MESampler(toy()).sample([0], **settings)  # type: ignore[arg-type]

    base = draw()
    for bad, message in (
        (draw(seed=1), "one seed"),
        (dataclasses.replace(base, seed=None), "one seed"),
        (draw(rows=range(8, 16)), "same rows"),
        (dataclasses.replace(base, prompts=((1,),)), "same prompts"),
        (draw(n=4), "same rows"),
    ):
        with pytest.raises(ValueError, match=message):
            common_draws(base, bad, rough)
    with pytest.raises(ValueError, match="one value a row"):
        common_draws(base, base, (np.zeros(base.tokens.shape), np.zeros(base.tokens.shape)))


def test_rows_that_share_component_draws_are_refused() -> None:
    shared = MESampler(toy(), shared_rows=4).sample([0], n=40, max_new_tokens=STEPS, seed=0)
    for name, call in {
        "component_sums": lambda trace: component_sums(trace, [0.0, 1.0]),
        "token_sums": lambda trace: token_sums(trace, REWARD),
        "weight_controls": weight_controls,
        "law_controls": lambda trace: law_controls(trace, REWARD),
        "common_draws": lambda trace: common_draws(trace, trace, rough),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} counts rows as independent"):
            call(shared)
        call(shared.one_per_group())


def test_bad_input_names_the_argument() -> None:
    trace = part(long(), 0)
    rng = np.random.default_rng(0)
    y, c = rng.normal(size=20), rng.normal(size=(20, 1))
    with pytest.raises(ValueError, match="one shape"):
        reduced_mean([1.0, 2.0, 3.0, 4.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="do not vary"):
        reduced_mean(np.ones(9), y[:9])
    with pytest.raises(ValueError, match="two rows each"):
        reduced_mean(y, y, groups=[0] * 19 + [1])
    for single in (reduced_mean([0.0, 0, 0, 0, 1], y[:5]), reduced_mean(y[:5], [0.0, 0, 0, 0, 1])):
        assert single.factor.interval == (0, math.inf)
    with pytest.raises(ValueError, match="drew no components"):
        component_sums(CESampler(toy()).sample([0], n=4, max_new_tokens=2), [0, 1])
    for values in (np.zeros(3), np.zeros((2, 2)), [0.0, np.inf]):
        with pytest.raises(ValueError, match="values must be finite, of shape"):
            component_sums(trace, values)
    with pytest.raises(ValueError, match="one number per token"):
        token_sums(trace, [1.0])
    with pytest.raises(ValueError, match="'log_prob'"):
        token_sums(trace, "length")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        law_controls(trace)
    with pytest.raises(ValueError, match="two components"):
        weight_controls(MESampler(toy((1.0,))).sample([0], n=4, max_new_tokens=2))
    for starts in ((), (1,), (0, 0)):
        with pytest.raises(ValueError, match="starts must begin"):
            weight_controls(trace, starts=starts)
    with pytest.raises(ValueError, match="one row for each"):
        control_variates(y, c[:5])
    with pytest.raises(ValueError, match="must vary"):
        control_variates(y, np.ones((20, 1)))
    with pytest.raises(ValueError, match="too few for"):
        control_variates(y, rng.normal(size=(20, 18)))
    with pytest.raises(ValueError, match="single row"):
        control_variates(y, np.eye(20)[:, :1])
