"""Work is counted as sessions count it, time adds up, and ME pays where passes cost and tokens do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from me_stats import ConstantMixing
from me_stats.cost import (
    Outside,
    Work,
    calibrate_outside,
    ce_work,
    crossover_batch,
    forward_seconds,
    me_work,
    predicted_seconds,
    speed_up,
)
from me_stats.lags import prefilled_tokens
from me_stats.models import Ensemble, TransformersModel
from me_stats.models.base import Cost, open_session
from me_stats.samplers import CESampler, MESampler
from me_stats.schedule import Schedule

PROMPTS = ("def f(x):", "The names of")
WEIGHTS = ((0.5, 0.5), (0.8, 0.2), (0.4, 0.35, 0.25))


class Linear:
    """Seconds: a constant for each forward, and what tokens, laws and keys cost."""

    def __init__(self, forward: float, *, token: float = 0.0, law: float = 0.0, key: float = 0.0) -> None:
        self.costs = forward, token, law, key

    def seconds(self, rows: ArrayLike, fed: ArrayLike, context: ArrayLike) -> np.ndarray:
        forward, token, law, key = self.costs
        return forward + token * np.asarray(fed) + law * np.asarray(rows) + key * np.asarray(context)


@pytest.fixture(scope="module")
def siblings() -> list[TransformersModel]:
    return [TransformersModel(f"bundled:{name}") for name in ("prose", "code", "prose")]


def drawn(weights: ArrayLike, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(np.asarray(weights)), size=shape, p=np.asarray(weights))


def ended(path: np.ndarray, seed: int = 0) -> np.ndarray:
    """The path with rows of different lengths."""
    lengths = np.random.default_rng(seed).integers(1, path.shape[1] + 1, size=len(path))
    return np.where(np.arange(path.shape[1]) < lengths[:, None], path, -1)


def run_sessions(models: list[TransformersModel], path: np.ndarray, index: np.ndarray, lockstep: bool) -> list[Cost]:
    """What each component counts when the schedule of `path` is run on real sessions."""
    prompts = [models[0].vocabulary.encode(PROMPTS[p]) for p in index]
    sessions = [open_session(model, prompts, max_new_tokens=path.shape[1]) for model in models]
    schedule = Schedule(path, lockstep=lockstep)
    while serve := schedule.next():
        rows = serve.rows
        if serve.steps[0] == 0:
            rows = rows[np.unique(index[rows], return_index=True)[1]]
        sessions[serve.component].log_probs(rows)
        for session in sessions:
            session.append(serve.rows, torch.full((len(serve.rows),), 97))
    return [session.cost for session in sessions]


def of_component(work: Work, i: int) -> Cost:
    own = work.component == i
    return Cost(int(own.sum()), int(work.fed[own].sum()), int(work.rows[own].sum()))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize(("batch", "n_prompts"), [(1, 1), (4, 1), (4, 2), (16, 2)])
def test_work_is_what_the_sessions_count(
    siblings: list[TransformersModel], weights: tuple[float, ...], lockstep: bool, batch: int, n_prompts: int
) -> None:
    index = np.arange(batch) % n_prompts
    lengths = [len(siblings[0].vocabulary.encode(prompt)) for prompt in PROMPTS]
    path = ended(drawn(weights, (batch, 12), seed=batch), seed=batch)
    counted = run_sessions(siblings[: len(weights)], path, index, lockstep)
    work = me_work(path, prompt_length=lengths, prompt_index=index, lockstep=lockstep)
    assert [of_component(work, i) for i in range(len(weights))] == counted
    assert work.cost == sum(counted, Cost())
    assert work.tokens == (path >= 0).sum()
    assert work.mixed == 0


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_work_of_the_samplers(siblings: list[TransformersModel], weights: tuple[float, ...], batch: int) -> None:
    ensemble = Ensemble(siblings[: len(weights)], ConstantMixing(weights))
    ce = CESampler(ensemble).sample(list(PROMPTS), n=batch, max_new_tokens=12, seed=batch)
    given: dict[str, Any] = {"prompt_length": list(map(len, ce.prompts)), "prompt_index": ce.prompt_index.numpy()}
    counted = ce_work(2 * batch, 12, len(weights), lengths=ce.lengths.numpy(), **given)
    assert counted.cost == ce.cost
    assert counted.tokens == int(ce.lengths.sum())
    assert counted.draws == int(ce.lengths.max())
    assert counted.mixed == (len(weights) - 1) * ce.cost.reads // len(weights)
    for lockstep in (True, False):
        me = MESampler(ensemble, lockstep=lockstep).sample(list(PROMPTS), n=batch, max_new_tokens=12, seed=batch)
        assert me.components is not None
        work = me_work(me.components.numpy(), lockstep=lockstep, horizon=12, **given)
        assert work.cost == me.cost
        assert work.tokens == int(me.lengths.sum())


def test_one_row_feeds_what_its_lags_say() -> None:
    path = drawn([0.7, 0.3], (1, 400))
    work = me_work(path, prompt_length=9)
    assert work.fed.tolist() == prefilled_tokens(path, prompt_length=9)[0].tolist()
    assert work.component.tolist() == path[0].tolist()
    assert work.context.tolist() == list(range(9, 409))
    assert work.draws == work.tokens == 400
    alone = ce_work(1, 400, 1, prompt_length=9)
    assert alone.fed.tolist() == [9] + [1] * 399
    assert alone.context.tolist() == work.context.tolist()


def test_rows_that_read_a_prompt_together_copy_it() -> None:
    # Component 1 is first read at step 1, by both rows: one computes the prompt, the other copies and feeds its token.
    work = me_work([[0, 1], [0, 1]], prompt_length=10)
    assert work.component.tolist() == [0, 1, 1]
    assert work.fed.tolist() == [10, 11, 1]
    assert work.rows.tolist() == [1, 1, 1]
    assert work.context.tolist() == [10, 11, 11]
    apart = me_work([[0, 1], [0, 1]], prompt_length=[10, 20], prompt_index=[0, 1])
    assert apart.fed.tolist() == [30, 11 + 21]
    assert apart.rows.tolist() == [2, 2]


def test_each_component_ingests_each_token_but_what_it_waits_for() -> None:
    path = drawn([0.5, 0.3, 0.2], (32, 300))
    together, apart = (me_work(path, prompt_length=20, lockstep=way) for way in (True, False))
    assert together.cost.tokens_forwarded == apart.cost.tokens_forwarded
    assert together.cost.reads >= apart.cost.reads  # more rows of the first step share a law, never fewer
    assert apart.cost.forwards < 0.8 * together.cost.forwards
    assert together.cost.tokens_forwarded / together.tokens == pytest.approx(3, rel=0.02)
    assert ce_work(32, 300, 3, prompt_length=20).cost.tokens_forwarded / together.tokens == pytest.approx(3, rel=0.02)


def test_seconds_add_up() -> None:
    work = ce_work(4, 3, 2, prompt_length=5)
    times = [Linear(1.0, token=0.1), Linear(2.0, law=0.5, key=0.01)]
    expected = [1.5, 2 + 0.5 + 0.05, 1.4, 2 + 2 + 0.24, 1.4, 2 + 2 + 0.28]
    np.testing.assert_allclose(forward_seconds(work, times), expected)
    outside = Outside(per_draw=1.0, per_token=0.1, per_mixed=0.01)
    assert work.mixed == 1 + 4 + 4
    assert predicted_seconds(work, times, outside=outside) == pytest.approx(sum(expected) + 3 + 1.2 + 0.09)


def test_time_outside_is_recovered_from_three_runs() -> None:
    times = [Linear(0.02, token=1e-4), Linear(0.03, law=1e-4)]
    truth = Outside(per_draw=2e-3, per_token=3e-4, per_mixed=5e-4)
    works = [
        ce_work(1, 50, 1, prompt_length=9),
        ce_work(32, 50, 1, prompt_length=9),
        ce_work(8, 50, 2, prompt_length=9),
    ]
    runs = [(work, predicted_seconds(work, times, outside=truth)) for work in works]
    found = calibrate_outside(runs, [times] * 3)
    assert found.per_draw == pytest.approx(truth.per_draw)
    assert found.per_token == pytest.approx(truth.per_token)
    assert found.per_mixed == pytest.approx(truth.per_mixed)
    # Forwards that are taken as slower than the whole run leave nothing outside.
    assert calibrate_outside(runs, [[Linear(9.0), Linear(9.0)]] * 3) == Outside()


def test_the_gain_goes_from_passes_to_nothing() -> None:
    weights_bound = [Linear(1.0)] * 3
    assert speed_up(weights_bound, [0.2, 0.3, 0.5], steps=200).ratio == pytest.approx(3)
    fixed = speed_up([Linear(3.0), Linear(1.0)], [0.8, 0.2], steps=2000)
    assert fixed.ratio == pytest.approx(4 / 2.6, rel=0.03)
    assert fixed.me_forwards == 1
    assert fixed.ce_forwards == 2
    assert fixed.me_speed / fixed.ce_speed == pytest.approx(fixed.ratio)
    tokens_only = speed_up([Linear(0.0, token=1.0)] * 2, [0.5, 0.5], batch=64, steps=400)
    assert tokens_only.ratio == pytest.approx(1, rel=0.02)
    laws_only = speed_up([Linear(0.0, law=1.0)] * 2, [0.5, 0.5], batch=64, steps=400)
    assert laws_only.ratio == pytest.approx(2, rel=0.02)


def test_rows_that_drift_apart_keep_a_gain_where_lockstep_has_none() -> None:
    times, half = [Linear(1.0)] * 2, [0.5, 0.5]
    lockstep = speed_up(times, half, batch=256, steps=200, lockstep=True)
    drifting = speed_up(times, half, batch=256, steps=200)
    assert lockstep.ratio == pytest.approx(1, abs=0.01)
    assert lockstep.me_forwards == pytest.approx(2, abs=0.01)
    assert drifting.ratio > 1.25


@pytest.mark.parametrize("factor", [1.05, 1.5])
def test_crossover_is_where_the_ratio_falls_under_the_factor(factor: float) -> None:
    times, half = [Linear(1.0, token=0.05)] * 2, [0.5, 0.5]
    given: dict[str, Any] = {"steps": 64, "prompt_length": 10, "lockstep": True}
    batch = crossover_batch(times, half, factor=factor, **given)
    assert batch is not None
    assert batch > 1
    assert speed_up(times, half, batch=batch, **given).ratio < factor
    assert speed_up(times, half, batch=batch - 1, **given).ratio >= factor
    assert crossover_batch(times, half, factor=factor, largest=batch - 1, **given) is None
    assert crossover_batch(times, half, factor=3.0, **given) == 1


@pytest.mark.parametrize("path", [[0, 1], [[]], [[0.5, 1]], [[-1, 0]]])
def test_what_is_no_path_is_refused(path: list) -> None:
    with pytest.raises(ValueError, match="path must be"):
        me_work(np.asarray(path), prompt_length=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "prompt_length"),
        ({"prompt_length": [3, 4]}, "give prompt_index"),
        ({"prompt_length": [3], "prompt_index": [0, 1]}, "prompt_length"),
        ({"prompt_length": 3, "prompt_index": [0]}, "prompt_index"),
        ({"prompt_length": 3, "prompt_index": [0, -1]}, "prompt_index"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        me_work([[0, 1], [0, 0]], **options)
    with pytest.raises(ValueError, match=message):
        ce_work(2, 2, 2, **options)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ce_work(2, 0, 2, prompt_length=3)
    with pytest.raises(ValueError, match="lengths"):
        ce_work(2, 4, 2, prompt_length=3, lengths=[1])
    work = ce_work(2, 4, 2, prompt_length=3)
    with pytest.raises(ValueError, match="each of 2 components, got 1"):
        predicted_seconds(work, [Linear(1.0)])
    for weights in ([1.0], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="weights"):
            speed_up([Linear(1.0)] * 2, weights)
    with pytest.raises(ValueError, match="batch and steps"):
        speed_up([Linear(1.0)], [1.0], batch=0)
    with pytest.raises(ValueError, match="factor"):
        crossover_batch([Linear(1.0)], [1.0], factor=0)
    with pytest.raises(ValueError, match="runs"):
        calibrate_outside([], [])
    with pytest.raises(ValueError, match="positive seconds"):
        calibrate_outside([(work, 0.0)], [[Linear(1.0)] * 2])
