"""One trace at other weights: exact ratios, honest intervals, and a refusal where rows are missing."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity import ExpectationPolynomial, Reweighted, mean_estimate, reweight
from me_stats.trace import Score, Trace
from tests.strategies import LastTokenMixing

STEPS, ROWS, GROUPS = 4, 100, 200
AT, AIM = (0.3, 0.3, 0.4), (0.5, 0.25, 0.25)


@cache
def toys(count: int = 3) -> tuple[TableModel, ...]:
    return tuple(TableModel.random(3, seed=seed, order=1, eos=(2,)) for seed in range(count))


def draw(weights: tuple[float, ...], n: int, seed: int = 0) -> Trace:
    ensemble = Ensemble(toys(len(weights)), ConstantMixing(weights))
    return MESampler(ensemble).sample([0], n=n, max_new_tokens=STEPS, seed=seed)


def part(trace: Trace, rows: slice) -> Trace:
    """Some rows of a trace, with their scores."""
    out = dataclasses.replace(
        trace, tokens=trace.tokens[rows], lengths=trace.lengths[rows], components=None,
        prompt_index=trace.prompt_index[rows], rows=trace.rows[rows],
    )  # fmt: skip
    scored = Score(trace.score.component_log_probs[rows], trace.score.log_weights[rows])
    vars(out)["score"] = scored
    return out


@cache
def groups() -> list[Trace]:
    whole = draw(AT, ROWS * GROUPS)
    return [part(whole, slice(g * ROWS, (g + 1) * ROWS)) for g in range(GROUPS)]


def truth(weights: tuple[float, ...]) -> ExpectationPolynomial:
    return ExpectationPolynomial.enumerate(toys(len(weights)), [0], sum, max_new_tokens=STEPS)


def test_ratios_are_those_of_the_laws() -> None:
    trace = draw(AT, 50)
    at = reweight(trace, AIM)
    laws = [Ensemble(toys(), ConstantMixing(w)) for w in (AIM, AT)]
    for row, log_ratio in zip(trace.sequences(), at.log_ratios, strict=True):
        aim, own = (sum(float(law.log_probs([(0, *row[:t])])[0, token]) for t, token in enumerate(row)) for law in laws)
        assert log_ratio == pytest.approx(aim - own, abs=1e-12)


def test_at_the_drawn_weights_it_is_the_plain_mean() -> None:
    trace = draw(AT, 300)
    at = reweight(trace, AT)
    values = [float(sum(row)) for row in trace.sequences()]
    assert at.drawn
    assert at.effective_sample_size == pytest.approx(300)
    assert at.tv_distance == 0.0
    for normalised in (True, False):
        estimate = at.estimate(sum, self_normalised=normalised)
        assert estimate.method == "drawn"
        assert estimate.value == pytest.approx(np.mean(values))
        assert estimate.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(300))
        assert estimate.interval == pytest.approx(mean_estimate(values).interval)


def coverage(read: object) -> float:
    exact = truth(AIM).value(AIM)
    hits = []
    for trace in groups():
        low, high = read(trace).interval  # type: ignore[operator]
        hits.append(low <= exact <= high)
    return float(np.mean(hits))


@pytest.mark.parametrize("normalised", [True, False])
def test_intervals_cover(normalised: bool) -> None:
    # 200 intervals: four binomial standard deviations around 0.95.
    assert 0.888 <= coverage(lambda trace: reweight(trace, AIM).estimate(sum, self_normalised=normalised)) < 1


def test_planted_bugs_do_not_cover() -> None:
    def forgot_the_ratio(trace: Trace) -> object:
        return reweight(trace, AT).estimate(sum)

    def upside_down(trace: Trace) -> object:
        return Reweighted(trace, AIM, AT, -reweight(trace, AIM).log_ratios, True).estimate(sum)

    assert coverage(forgot_the_ratio) < 0.888
    assert coverage(upside_down) < 0.888


def test_the_effective_sample_size_alone_trusts_rows_that_miss_the_tail() -> None:
    components = [TableModel.random(6, seed=seed, eos=(5,), concentration=0.6) for seed in (0, 1)]
    aim, n, count = (0.9, 0.1), 400, 60

    def rows(weights: tuple[float, ...], total: int, seed: int) -> Trace:
        sampler = MESampler(Ensemble(components, ConstantMixing(weights)))
        return sampler.sample([0], n=total, max_new_tokens=30, seed=seed)

    exact, whole = float(rows(aim, 100_000, 7).lengths.double().mean()), rows((0.5, 0.5), n * count, 1)
    hits = []
    for g in range(count):
        at = reweight(part(whole, slice(g * n, (g + 1) * n)), aim)
        assert at.tv_distance > 0.4  # what a sweep goes by
        if at.effective_sample_size > 0.1 * n:
            low, high = at.estimate(len).interval
            hits.append(low <= exact <= high)
    assert len(hits) > 20
    assert np.mean(hits) < 0.5


def test_tv_distance_is_that_of_the_sequence_laws() -> None:
    def laws(weights: tuple[float, ...]) -> np.ndarray:
        polynomial = truth(weights)
        return np.asarray((polynomial.step_probs @ np.array(weights)).prod(1))

    exact = float(np.abs(laws(AT) - laws(AIM)).sum() / 2)
    assert reweight(draw(AT, 10_000), AIM).tv_distance == pytest.approx(exact, abs=0.01)


def test_a_rate_is_a_ratio_of_means() -> None:
    lengths = ExpectationPolynomial.enumerate(toys(), [0], len, max_new_tokens=STEPS).value(AIM)
    rate = truth(AIM).value(AIM) / lengths
    estimate = reweight(draw(AT, 5000), AIM).ratio(sum, len)
    assert abs(estimate.value - rate) < 5 * estimate.stderr
    assert estimate.stderr < 0.02 * rate


def test_no_weight_can_come_from_nothing() -> None:
    trace = draw((0.0, 0.5, 0.5), 100)
    beyond = reweight(trace, AIM)
    assert not beyond.covered
    assert beyond.effective_sample_size == 0.0
    assert beyond.tv_distance == 1.0
    for read in (beyond.estimate, beyond.gradient, lambda f: beyond.ratio(f, len)):
        with pytest.raises(ValueError, match="use a component that the rows were drawn without"):
            read(sum)
    assert reweight(trace, (0.0, 0.2, 0.8)).covered  # it stays at zero
    to_one = reweight(draw(AT, 2000), (0.0, 0.0, 1.0))
    assert to_one.covered
    estimate = to_one.estimate(sum)
    assert abs(estimate.value - truth(AT).value((0.0, 0.0, 1.0))) < 5 * estimate.stderr


def test_rows_that_the_weights_exclude_count_nothing() -> None:
    disjoint = [TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)]
    trace = MESampler(Ensemble(disjoint, ConstantMixing([0.5, 0.5]))).sample([], n=400, max_new_tokens=2, seed=1)
    at = reweight(trace, [1.0, 0.0])
    assert at.estimate(sum).value == 0.0
    assert np.isneginf(at.log_ratios).sum() == (trace.tokens.sum(1) > 0).sum()
    assert at.estimate(np.where(np.isneginf(at.log_ratios), np.inf, 1.0)).value == 1.0
    none = part(trace, slice(0, 0))
    with pytest.raises(ValueError, match="0 rows"):
        reweight(none, [1.0, 0.0]).estimate(sum)
    ones = part(trace, torch.nonzero(trace.tokens.sum(1) == 2)[:, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no row of the trace is possible"):
        reweight(ones, [1.0, 0.0]).estimate(sum)


def test_a_trace_of_a_router_reads_at_constant_weights() -> None:
    mixing = LastTokenMixing(np.array([[0.5, 0.5], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]]))
    trace = MESampler(Ensemble(toys(2), mixing)).sample([0], n=5000, max_new_tokens=STEPS)
    at = reweight(trace, [0.4, 0.6])
    estimate = at.estimate(sum)
    exact = ExpectationPolynomial.enumerate(toys(2), [0], sum, max_new_tokens=STEPS).value([0.4, 0.6])
    assert abs(estimate.value - exact) < 5 * estimate.stderr
    assert estimate.method == "re-weighted from a router"


def test_one_component() -> None:
    trace = CESampler(toys()[0]).sample([0], n=10, max_new_tokens=3)
    at = reweight(trace, [1.0])
    assert at.drawn
    (slope,) = at.gradient(sum)
    assert slope is not None
    assert (slope.value, slope.stderr) == (0.0, 0.0)


def test_bad_input_names_the_argument() -> None:
    trace = draw(AT, 20)
    for weights, message in (([0.5, 0.5], "2 entries for 3"), ([0.5, 0.5, 0.5], "sum to 1")):
        with pytest.raises(ValueError, match=message):
            reweight(trace, weights)
    at = reweight(trace, AIM)
    with pytest.raises(ValueError, match="f has shape"):
        at.estimate(np.ones(7))
    with pytest.raises(ValueError, match="sum over the steps"):
        at.estimate(np.ones(tuple(trace.tokens.shape)))
    with pytest.raises(ValueError, match="f must be finite"):
        at.estimate(np.full(20, np.nan))
    with pytest.raises(ValueError, match="denominator"):
        at.ratio(len, np.zeros(20))
    with pytest.raises(ValueError, match="confidence"):
        at.estimate(sum, confidence=1.0)
    with pytest.raises(ValueError, match="two finite numbers"):
        mean_estimate([1.0])
    impossible = dataclasses.replace(trace)
    vars(impossible)["score"] = Score(torch.full((20, STEPS, 3), -torch.inf), trace.score.log_weights)
    with pytest.raises(ValueError, match="under its own model"):
        reweight(impossible, AIM)
