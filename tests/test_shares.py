"""Shares of the component path at every step, by pairs and by nested rows, against enumeration and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from me_stats.dependence import design_effect
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel
from me_stats.samplers import MESampler
from me_stats.shares import nested, nested_shares, nested_split, path_shares
from me_stats.variance import FrozenDraw, exact_split, shared_variance
from tests.strategies import LastTokenMixing

STEPS = 3


def toy(eos: tuple[int, ...] = (2,)) -> Ensemble:
    components = [MarkovModel.random(3, seed=seed, concentration=0.5, eos=eos) for seed in (0, 3)]
    return Ensemble(components, ConstantMixing([0.4, 0.6]))


def rough(row: object) -> float:
    """A function of the whole continuation, neither additive nor symmetric."""
    return float(sum((i + 1) ** 1.5 * token for i, token in enumerate(row)) - len(row) ** 2)  # type: ignore[arg-type, var-annotated]


def zeros(tokens: object) -> np.ndarray:
    return np.asarray(np.asarray(tokens) == 0, dtype=float)


def pair(seed: int, n: int = 200, *, shared: bool = True) -> list[np.ndarray]:
    """Zeros at each step (N, T) of two runs with one component path a row; or, for a bug, with two."""
    sampler = MESampler(toy())
    return [
        zeros(
            sampler.sample(
                [0], n=n, max_new_tokens=STEPS,
                draw=FrozenDraw(component_seed=seed if shared else seed + token_seed, token_seed=token_seed),
            ).tokens
        )
        for token_seed in (seed + 10_000, seed + 20_000)
    ]  # fmt: skip


def exact_shares(cumulative: bool) -> np.ndarray:
    def at(step: int) -> float:
        def f(row: object) -> float:
            seen = [float(token == 0) for token in row] + [0.0] * STEPS  # type: ignore[attr-defined]
            return sum(seen[: step + 1]) if cumulative else seen[step]

        return exact_split(toy(), [0], f, max_new_tokens=STEPS).share

    return np.array([at(step) for step in range(STEPS)])


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
def test_every_column_is_the_estimate_of_one_number(cumulative: bool, prompts: bool) -> None:
    rng = np.random.default_rng(0)
    path, *own = rng.exponential(size=(3, 60, 7))
    x, y = (path * one + one for one in own)
    groups = np.repeat([0, 1, 2], 20) if prompts else None
    shares = path_shares(x, y, groups=groups, cumulative=cumulative, confidence=0.9)
    if cumulative:
        x, y = x.cumsum(1), y.cumsum(1)
    for t in range(7):
        one = shared_variance(x[:, t], y[:, t], groups=groups, confidence=0.9)
        assert shares.value[t] == pytest.approx(one.value)
        assert shares.stderr[t] == pytest.approx(one.stderr)
        assert (shares.lower[t], shares.upper[t]) == pytest.approx(one.interval)
    assert shares.n == one.n == 60
    assert shares.method == one.method


@pytest.mark.parametrize("cumulative", [False, True])
def test_shares_of_steps_are_covered(cumulative: bool) -> None:
    truth, inside = exact_shares(cumulative), np.zeros(STEPS)
    for seed in range(400):
        shares = path_shares(*pair(seed), cumulative=cumulative)
        inside += (shares.lower <= truth) & (truth <= shares.upper)
    assert (inside / 400 > 0.95 - 0.035).all()  # 3.2 binomial standard deviations
    assert 0.93 <= inside.mean() / 400 <= 0.97
    assert (truth > 0.05).any()


def test_runs_that_share_nothing_show_no_share() -> None:
    truth = exact_shares(True)[-1]
    honest, unpaired = (path_shares(*pair(0, 4000, shared=shared), cumulative=True) for shared in (True, False))
    assert honest.lower[-1] < truth < honest.upper[-1]
    assert honest.lower[-1] > 0.05
    assert unpaired.upper[-1] < truth  # the bug shows
    assert unpaired.lower[-1] < 0.0 < unpaired.upper[-1]


def grouped(rng: np.random.Generator, share: float, paths: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed paths and skewed rows: exponential both."""
    place = np.repeat(np.arange(paths), rows)
    common, own = rng.exponential(size=paths)[place] - 1, rng.exponential(size=paths * rows) - 1
    return np.sqrt(share) * common + np.sqrt(1 - share) * own, place


@pytest.mark.parametrize(("share", "rows"), [(0.0, 8), (0.1, 8), (0.1, 3), (0.6, 3)])
def test_the_nested_interval_is_calibrated_without_normality(share: float, rows: int) -> None:
    rng, hits, between, within = np.random.default_rng(4), 0, [], []
    for _ in range(1000):
        split = nested_split(*grouped(rng, share, 150, rows))
        hits += split.share.interval[0] <= share <= split.share.interval[1]
        between.append(split.between)
        within.append(split.within)
    assert 930 <= hits <= 970
    for found, truth in ((between, share), (within, 1 - share)):  # unbiased
        assert abs(np.mean(found) - truth) < 4 * np.std(found) / np.sqrt(1000)


def test_unequal_paths_and_prompts_stay_unbiased() -> None:
    rng, between, within, hits = np.random.default_rng(5), [], [], 0
    sizes = np.tile([2, 3, 7], 40)
    place = np.repeat(np.arange(120), sizes)
    groups = (np.arange(120) < 45).astype(int)[place]
    for _ in range(600):
        values = rng.exponential(size=120)[place] + 2 * rng.exponential(size=len(place)) + 100 * groups
        split = nested_split(values, place, groups=groups)
        between.append(split.between)
        within.append(split.within)
        hits += split.share.interval[0] <= 0.2 <= split.share.interval[1]
    for found, truth in ((between, 1.0), (within, 4.0)):
        assert abs(np.mean(found) - truth) < 4 * np.std(found) / np.sqrt(600)
    assert 553 <= hits <= 587  # 570 expected, standard deviation 5.3
    # Without the prompts their distance counts as paths: the bug that groups are there for.
    assert nested_split(values, place).share.value > 0.9
    assert split.rows == pytest.approx(4, abs=0.3)


def test_two_rows_a_path_are_pairs_and_one_group_is_a_design_effect() -> None:
    rng = np.random.default_rng(6)
    values, paths = grouped(rng, 0.4, 200, 2)
    split, pairs = nested_split(values, paths), shared_variance(values[::2], values[1::2])
    assert split.share.value == pytest.approx(pairs.value)
    assert split.share.stderr == pytest.approx(pairs.stderr)
    assert split.share.interval == pytest.approx(pairs.interval)
    values, paths = grouped(rng, 0.4, 50, 6)
    split, effect = nested_split(values, paths), design_effect(values, paths)
    assert 1 + 5 * split.share.value == pytest.approx(effect.value)
    shares = nested_shares(np.stack([values, values**2, np.abs(values)], 1), paths, cumulative=True)
    again = nested_split(values + values**2, paths).share
    assert (shares.value[1], shares.lower[1], shares.upper[1]) == pytest.approx((again.value, *again.interval))
    assert shares.variance[0] == pytest.approx(split.variance)
    assert shares.n == split.paths == 50


def test_nested_rows_find_what_enumeration_gives() -> None:
    truth = [exact_split(toy(), prompt, rough, max_new_tokens=STEPS) for prompt in ([0], [1])]
    share = sum(split.between for split in truth) / sum(split.variance for split in truth)
    split = nested(toy(), [[0], [1]], rough, paths=1500, rows=6, max_new_tokens=STEPS, seed=1, confidence=1 - 1e-6)
    assert split.share.interval[0] < share < split.share.interval[1]
    assert (split.paths, split.rows, split.share.n) == (3000, pytest.approx(6), 18_000)
    assert split.within == pytest.approx(np.mean([one.within for one in truth]), rel=0.1)
    assert split.between == pytest.approx(np.mean([one.between for one in truth]), rel=0.2)
    runs = [
        nested(toy(), [[0], [1]], rough, paths=40, rows=4, max_new_tokens=STEPS, seed=seed).share for seed in range(200)
    ]
    hits = sum(low <= share <= high for low, high in (run.interval for run in runs))
    assert 181 <= hits <= 199  # 190 expected, standard deviation 3.1


def test_which_design_is_better_at_equal_cost() -> None:
    """The statement of the module: rows on one path for a small share, pairs for a large one."""
    rng = np.random.default_rng(7)
    spread = {}
    for share in (0.1, 0.9):
        for rows in (2, 10):
            paths = 600 // rows
            place = np.repeat(np.arange(paths), rows)
            found = []
            for _ in range(300):
                common, own = rng.normal(size=paths)[place], rng.normal(size=600)
                values = np.sqrt(share) * common + np.sqrt(1 - share) * own
                found.append(nested_split(values, place).share.value)
            spread[share, rows] = np.var(found)
            theory = 2 * (1 - share) ** 2 * (1 + (rows - 1) * share) ** 2 / (rows - 1) / 600
            assert spread[share, rows] == pytest.approx(theory, rel=0.4)
    assert spread[0.1, 10] < 0.6 * spread[0.1, 2]
    assert spread[0.9, 2] < 0.7 * spread[0.9, 10]


def test_extremes_and_a_router() -> None:
    sure = Ensemble([TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)], ConstantMixing([0.5, 0.5]))
    split = nested(sure, [], sum, paths=50, rows=3, max_new_tokens=4, seed=0)
    assert split.share.interval == (1.0, 1.0)
    assert split.within == pytest.approx(0, abs=1e-12)
    same = Ensemble([MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.3, 0.7]])] * 2, ConstantMixing([0.5, 0.5]))
    low, high = nested(same, [0], rough, paths=300, rows=8, max_new_tokens=4, seed=0).share.interval
    assert low < 0 < high < 0.08
    components = [TableModel([[0.9, 0.1]], order=0), TableModel([[0.1, 0.9]], order=0)]
    router = Ensemble(components, LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])))
    assert nested(router, [()], sum, paths=200, rows=4, max_new_tokens=4, seed=0).share.interval[0] > 0.2
    for values in ([0, 1, 2, 2, 3, 3, 4, 4], [0, 1, 0, 1, 0, 1, 9, 9]):  # one path decides a mean square
        lone = nested_split(values, np.repeat(np.arange(4), 2)).share
        assert lone.interval == (-1.0, 1.0)
        assert np.isinf(lone.stderr)
    equal = np.arange(8.0)[:, None]
    assert path_shares(equal, equal).upper.tolist() == [1.0]


def test_bad_input_names_the_argument() -> None:
    x = np.random.default_rng(0).normal(size=(6, 2))
    with pytest.raises(ValueError, match="pairs of one shape"):
        path_shares(x, x[:, :1])
    with pytest.raises(ValueError, match="at least two pairs"):
        path_shares(x, x, groups=[0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="groups must name one"):
        path_shares(x, x, groups=[0, 1])
    with pytest.raises(ValueError, match="column 1 does not vary"):
        path_shares(x * [1, 0], x * [1, 0])
    with pytest.raises(ValueError, match="at least 4 paths"):
        nested_split(x[:, 0], [0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="at least 4 paths"):
        nested_split(x[:, 0], range(6))
    with pytest.raises(ValueError, match="one group each"):
        nested_split(x[:, 0], [0, 0, 1, 1, 2, 3], groups=[0, 1, 0, 1, 0, 1])
    with pytest.raises(ValueError, match="does not vary"):
        nested_split(np.ones(8), np.repeat(np.arange(4), 2))
    for options, name in (({"paths": 1, "rows": 4}, "paths"), ({"paths": 9, "rows": 1}, "rows")):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 2"):
            nested(toy(), [0], rough, max_new_tokens=2, seed=0, **options)
    with pytest.raises(ValueError, match="f must be finite"):
        nested(toy(), [0], lambda row: float("nan"), paths=4, rows=2, max_new_tokens=2, seed=0)


def test_columns_together_are_one_share_whose_interval_covers() -> None:
    rng = np.random.default_rng(7)
    covered, runs, steps = 0, 300, 6
    weights = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 3.0])
    for _ in range(runs):
        path, x, y = rng.exponential(size=(3, 60, steps)) * weights
        path += 0.5 * path[:, :1]  # columns depend on each other, as blocks of a row do
        pooled = path_shares(path + x, path + y, pooled=True)
        between = (weights**2 + 0.25 + np.eye(steps)[0] * weights**2).sum()  # the first column is 1.5 times itself
        truth = between / (between + (weights**2).sum())
        covered += bool(pooled.lower[0] < truth < pooled.upper[0])
    assert abs(covered / runs - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs)
    alone = path_shares(path[:, :1] + x[:, :1], path[:, :1] + y[:, :1])
    same = path_shares(path[:, :1] + x[:, :1], path[:, :1] + y[:, :1], pooled=True)
    assert (same.value, same.lower, same.upper) == (alone.value, alone.lower, alone.upper)
