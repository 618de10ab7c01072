"""What long runs say, on rows of known laws: truths are covered, plants found, and alarms are as rare as said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from me_stats import long_summary
from me_stats.long_run import ARMS, LongPlan
from me_stats.long_summary import Comparison, LongSummary, compare, statistics, summarise
from me_stats.scripts import load

Floats = NDArray[np.float64]
PROMPTS, BLOCKS, SIZE = 4, 6, 20
PLAN = LongPlan(
    models=("a", "b"), prompts=None, weights=None, dtype="float32", device="cpu", rows=400, steps=BLOCKS * SIZE,
    batch=100, blocks=BLOCKS, window=None, hop=None, scored=200, paired=200, control=60, seed=0,
)  # fmt: skip
WEIGHTS = (0.6, 0.4)


def iid(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.normal(size=shape)


def ar1(rng: np.random.Generator, shape: tuple[int, int], rho: float = 0.9) -> Floats:
    """Rows of a stationary autoregression with variance 1."""
    out = rng.normal(size=shape)
    for t in range(1, shape[1]):
        out[:, t] = rho * out[:, t - 1] + np.sqrt(1 - rho**2) * out[:, t]
    return out


def blocks(tokens: Floats) -> Floats:
    return np.asarray(tokens.reshape(len(tokens), BLOCKS, tokens.shape[1] // BLOCKS).mean(2))


def write(folder: Path, plan: LongPlan, arms: dict[str, dict[str, Any]]) -> dict[Any, list[Path]]:
    """Parts of `plan.batch` rows of the columns of each arm; what is shorter than the rows is of the first rows."""
    files: dict[Any, list[Path]] = {arm: [] for arm in ARMS}
    for arm, columns in arms.items():
        rows = len(columns["prompt"])
        for start in range(0, rows, plan.batch):
            stop = min(start + plan.batch, rows)
            part = {name: np.asarray(v)[start:stop] for name, v in columns.items() if len(np.asarray(v)[start:stop])}
            files[arm].append(folder / f"{arm.replace(' ', '-')}-{start:06d}.npz")
            np.savez(files[arm][-1], **part)
    return files


def path_columns(rng: np.random.Generator, plan: LongPlan) -> dict[str, Any]:
    path = rng.choice(2, size=(plan.rows, plan.steps), p=WEIGHTS)
    from me_stats.lags import longest_waits, prefilled_tokens

    return {
        "component share": blocks(path == 0), "prefilled": prefilled_tokens(path, prompt_length=9).mean(1),
        "longest wait": longest_waits(path, 2), "held tokens": np.tile(np.arange(BLOCKS) * 7.0, (plan.rows, 1)),
        "first path": path[: plan.batch],
    }  # fmt: skip


def run(
    folder: Path, seed: int = 0, *, plan: LongPlan = PLAN, law: Callable[..., Floats] = iid, scale: float = 1.0,
    trend: float = 0.0, shift: float = 0.0, share: float = 0.0, control: float = 3.0, hazard: float = 0.01,
) -> dict[Any, list[Path]]:  # fmt: skip
    """Synthetic parts: ME's rows times `scale`, plus `shift` and `trend` along the row, a `share` of the path's."""
    rng = np.random.default_rng(seed)
    shape, level = (plan.rows, plan.steps), 5 * np.arange(PROMPTS)

    def columns(rows: int, values: Floats, more: float = 1.0) -> dict[str, Any]:
        which = np.arange(rows) % PROMPTS
        ends = rng.geometric(hazard * more, size=rows)
        return {"prompt": which, "a": values + level[which][:, None], "end": np.where(ends > plan.steps, 0, ends)}

    path, own, other = law(rng, shape), law(rng, shape), law(rng, shape)
    drift = shift + trend * (np.arange(BLOCKS) - (BLOCKS - 1) / 2)
    me, same = (scale * blocks(np.sqrt(share) * path + np.sqrt(1 - share) * rest) + drift for rest in (own, other))
    arms = {
        "ME": columns(plan.rows, me) | path_columns(rng, plan),
        "CE": columns(plan.rows, blocks(law(rng, shape))),
        "same path": columns(plan.paired, same[: plan.paired]),
        "control": columns(plan.control, blocks(law(rng, shape))[: plan.control] * control),
    }
    for arm in ("ME", "CE"):
        arms[arm] |= {"scored rows": np.arange(plan.scored), "b": blocks(law(rng, (plan.scored, plan.steps)))}
        if plan.scored:
            arms[arm] |= {"b time": np.ones(plan.scored), "b pooled time": np.array([[2.0, 1.5, 2.5, 8]])}
    return write(folder, plan, {arm: found for arm, found in arms.items() if len(found["prompt"])})


def summary(files: dict[Any, list[Path]], plan: LongPlan = PLAN, **options: Any) -> LongSummary:
    return summarise(plan, files, weights=WEIGHTS, prompt_length=9, bytes_per_token=2, **options)


def covers(estimate: Any, truth: float) -> bool:
    low, high = estimate.interval
    return bool(low <= truth <= high)


# One run


@pytest.mark.parametrize("law", [iid, ar1])
def test_everything_covers_what_is_true(tmp_path: Path, law: Callable[..., Floats]) -> None:
    files = run(tmp_path, law=law)
    assert statistics(files["ME"]) == ("a", "b")
    found = summary(files, confidence=1 - 1e-6)
    by_name = {c.name: c for c in found.comparisons}
    assert (by_name["a"].n, by_name["b"].n) == (400, 200)
    for c in found.comparisons:
        assert covers(c.ratio, 1)
        assert covers(c.block_ratio, 1)
        assert covers(c.difference, 0)
        assert min(c.pvalue, c.block_pvalue) > 1e-6
        assert 1 < c.block_seen < c.seen < 2
    assert {name: test.n for name, test in found.tests.items()} == {"rows": 400, "scored rows": 200}
    for arms in found.drifts.values():
        assert all(covers(arm.slope, 0) and arm.pvalue > 1e-6 for arm in arms.values())
    # Sums over a row grow with its blocks where they are independent, and faster where they are not.
    for arms in found.growth.values():
        assert all(covers(growth.rate, 1) if law is iid else growth.rate.value > 1.05 for growth in arms.values())
    assert all(0.98 < agreement.rhat < 1.03 for agreement in found.agreement.values())
    assert found.agreement["a"].chains == 8
    assert set(found.shares) == set(found.pooled_shares) == {"a"}
    assert covers(found.shares["a"], 0)
    assert covers(found.pooled_shares["a"], 0)
    assert found.times == {"b": {"ME": (2.0, 1.5, 2.5), "CE": (2.0, 1.5, 2.5)}}
    assert found.log_rank is not None
    assert found.log_rank.pvalue > 1e-6
    for arm in ("ME", "CE"):
        truth = 0.99 ** np.arange(PLAN.steps)
        curve = found.survival[arm]
        assert bool(((curve.lower <= truth) & (truth <= curve.upper)).all())
    assert covers(found.control["a"], 9)
    assert found.control_tests is not None


def test_what_the_path_says(tmp_path: Path) -> None:
    lags = summary(run(tmp_path), confidence=1 - 1e-6).lags
    assert lags["pvalue"] > 1e-6
    assert lags["tokens"] == 100 * PLAN.steps  # of the first part
    assert lags["rows"] == 400
    assert covers(lags["share"], 0.6)
    assert lags["weight"] == 0.6
    assert covers(lags["prefilled"], lags["expected prefilled"])
    for wait, expected in zip(lags["longest"], lags["expected longest"], strict=True):
        assert covers(wait, expected)
    assert lags["held tokens"].tolist() == [0, 7, 14, 21, 28, 35]
    assert lags["held bytes"].tolist() == [0, 14, 28, 42, 56, 70]


def test_wrong_weights_are_seen_in_the_lags(tmp_path: Path) -> None:
    found = summarise(PLAN, run(tmp_path), weights=(0.5, 0.5), prompt_length=9, bytes_per_token=0)
    assert found.lags["pvalue"] < 1e-9


def test_a_component_of_weight_zero_waits_the_whole_row(tmp_path: Path) -> None:
    found = summarise(PLAN, run(tmp_path), weights=(1.0, 0.0), prompt_length=9, bytes_per_token=0)
    assert found.lags["expected longest"] == [0.0, PLAN.steps]
    assert found.lags["pvalue"] == 0


def test_prompts_that_differ_are_no_variance(tmp_path: Path) -> None:
    """Means of prompts lie 5 apart, and rows of iid(1)'s blocks 0.1: only the difference of means keeps them."""
    files = run(tmp_path)
    x = np.concatenate([np.load(path)["a"] for path in files["CE"]]).mean(1)
    assert x.var() > 1000 * 1 / PLAN.steps
    found = summary(files)
    assert found.growth["a"]["CE"].variance[-1] == pytest.approx(BLOCKS / SIZE, rel=0.3)
    assert compare(files["ME"], files["CE"], "a").sd == pytest.approx(x.std(), rel=0.1)


# Plants


def test_a_ratio_of_variances_is_found(tmp_path: Path) -> None:
    c = compare(*(run(tmp_path, scale=np.sqrt(1.5))[arm] for arm in ("ME", "CE")), "a", confidence=1 - 1e-6)
    assert covers(c.ratio, 1.5)
    assert covers(c.block_ratio, 1.5)
    assert c.pvalue < 1e-3
    assert c.block_pvalue < 1e-9
    assert c.seen == pytest.approx(np.exp(2.8 * np.sqrt(2 * 2 / 400)), rel=0.15)


def test_a_shift_is_found(tmp_path: Path) -> None:
    files = run(tmp_path, shift=0.05)
    inner = 0.05 / np.sqrt(1 / PLAN.steps)  # in standard deviations of a row without its prompt
    assert inner > 0.5
    c = compare(files["ME"], files["CE"], "a", confidence=1 - 1e-6)
    assert covers(c.difference, 0.05)


def test_a_drift_is_found(tmp_path: Path) -> None:
    found = summary(run(tmp_path, trend=0.05), confidence=1 - 1e-6)
    assert covers(found.drifts["a"]["ME"].slope, 0.05)
    assert found.drifts["a"]["ME"].pvalue < 1e-9
    assert covers(found.drifts["a"]["CE"].slope, 0)


@pytest.mark.parametrize("law", [iid, ar1])
def test_the_share_of_the_path_is_found(tmp_path: Path, law: Callable[..., Floats]) -> None:
    files = run(tmp_path, share=0.4, law=law)
    found, narrower = summary(files, confidence=1 - 1e-6), summary(files)
    assert covers(found.shares["a"], 0.4)
    assert covers(found.pooled_shares["a"], 0.4)
    assert narrower.shares["a"].interval[0] > 0
    assert narrower.pooled_shares["a"].interval[0] > 0
    assert bool(((found.block_shares["a"].lower < 0.4) & (found.block_shares["a"].upper > 0.4)).all())
    narrow, wide = (np.ptp(shares["a"].interval) for shares in (found.pooled_shares, found.shares))
    assert narrow < (0.7 if law is iid else 1.01) * wide


def test_earlier_ends_are_found(tmp_path: Path) -> None:
    files = run(tmp_path)
    (tmp_path / "other").mkdir()
    files["CE"] = run(tmp_path / "other", 1, hazard=0.02)["CE"]
    found = summary(files).log_rank
    assert found is not None
    assert found.pvalue < 1e-9


def test_pairs_of_other_rows_have_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the second run of the paths is compared with the wrong rows of the first."""
    honest = long_summary._pairs

    def shifted(*given: Any) -> Any:
        x, y, prompts = honest(*given)
        return np.roll(x, PROMPTS, axis=0), y, prompts

    monkeypatch.setattr(long_summary, "_pairs", shifted)
    found = summary(run(tmp_path, share=0.4), confidence=1 - 1e-6)
    assert not covers(found.shares["a"], 0.4)


# How often a right run fails


LEVEL, RUNS = 0.05, 120


def alarms(tmp_path: Path, plan: LongPlan, **options: Any) -> dict[str, int]:
    """Of RUNS runs without a difference, those in which each check of the experiment would fail at LEVEL."""
    slope = load("experiments", "long")._slope_pvalue
    count = dict.fromkeys(("rows", "blocks", "slope", "lags", "ratio covers", "share covers"), 0)
    for seed in range(RUNS):
        files = run(tmp_path, seed, plan=plan, **options)
        c: Comparison = compare(files["ME"], files["CE"], "a")
        drifts = {arm: long_summary.drift(long_summary._blocks(files[arm], "a")[1], blocks=BLOCKS)
                  for arm in ("ME", "CE")}  # fmt: skip
        lags = long_summary._lags(files["ME"], plan, WEIGHTS, 9, 0, 0.95)
        shares = long_summary._share(files["ME"], files["same path"], "a", 0.95)
        for name, alarm in (
            ("rows", c.pvalue < LEVEL), ("blocks", c.block_pvalue < LEVEL), ("slope", slope(drifts) < LEVEL),
            ("lags", lags["pvalue"] < LEVEL), ("ratio covers", not covers(c.ratio, 1)),
            ("share covers", not covers(shares, 0)),
        ):  # fmt: skip
            count[name] += bool(alarm)
    return count


SMALL = dataclasses.replace(PLAN, rows=16, batch=16, scored=0, paired=16, control=0)


@pytest.mark.parametrize("plan", [SMALL, dataclasses.replace(SMALL, rows=48, batch=48, paired=24)], ids=["16", "48"])
def test_false_alarms_keep_their_level(tmp_path: Path, plan: LongPlan) -> None:
    # A right check fails this test in one of 10^5 worlds; the seeds are fixed.
    bound = stats.binom.isf(1e-5, RUNS, 0.06)
    found = alarms(tmp_path, plan, law=ar1)
    assert max(found.values()) <= bound, found


def test_rows_that_lose_a_mean_for_free_raise_false_alarms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: two rows a prompt, and no word of what their means took."""
    monkeypatch.setattr(long_summary, "_widened", lambda ratio, factor: ratio)
    monkeypatch.setitem(globals(), "PROMPTS", 8)
    found = alarms(tmp_path, SMALL)
    assert found["rows"] > stats.binom.isf(1e-5, RUNS, 0.06)


# Few rows, and rows that stand still


def test_the_least_that_a_plan_allows_has_a_summary(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, rows=8, batch=3, scored=0, paired=8, control=8)
    found = summary(run(tmp_path, plan=plan), plan)
    assert [c.name for c in found.comparisons] == ["a"]
    assert found.agreement == {}  # chains of fewer than 4 rows say nothing
    assert covers(found.shares["a"], 0)
    alone = dataclasses.replace(plan, paired=0, control=0)
    found = summary(run(tmp_path, plan=alone), alone)
    assert (found.shares, found.pooled_shares, found.control, found.control_tests) == ({}, {}, {}, None)
    assert found.times == {}


def changed(files: list[Path], name: str, change: Callable[[Floats], Floats]) -> None:
    for path in files:
        with np.load(path) as part:
            arrays = {key: part[key] for key in part.files}
        np.savez(path, **arrays | {name: change(arrays[name])})


@pytest.mark.parametrize("rows_that_have_it", [0, 1])
def test_a_rare_event_that_no_first_block_has_or_one(tmp_path: Path, rows_that_have_it: int) -> None:
    files = run(tmp_path)
    for arm in ("ME", "CE", "same path"):
        for place, path in enumerate(files[arm]):
            few = np.zeros(BLOCKS)
            few[0] = 0.1 * rows_that_have_it * (place == 0)

            def change(rows: Floats, few: Floats = few) -> Floats:
                out = np.where(np.arange(BLOCKS) == 0, 0.1, rows)
                out[0] += few
                return out

            changed([path], "a", change)
    found = summary(files)
    assert {c.name for c in found.comparisons} == {"a", "b"}
    # One row of 400 that moves leaves a variance, with an interval that says how little is known.
    assert ("a" in found.growth) == (rows_that_have_it == 1)
    assert ("a" in found.block_shares) == ("a" in found.pooled_shares)
    if rows_that_have_it == 0:
        assert "a" not in found.block_shares
    assert "a" in found.shares
    assert "b" in found.growth


@pytest.mark.parametrize("arm", ["ME", "CE"])
def test_what_stands_still_in_an_arm_is_left_out(tmp_path: Path, arm: str) -> None:
    files = run(tmp_path)
    # It differs between prompts only.
    changed(files[arm], "a", lambda rows: np.tile(np.arange(len(rows)) % PROMPTS, (BLOCKS, 1)).T * 1.0)
    found = summary(files)
    assert [c.name for c in found.comparisons] == ["b"]
    assert found.control == found.shares == {}
    assert found.control_tests is None


def test_a_run_in_which_nothing_moves_says_so(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, scored=0)
    files = run(tmp_path, plan=plan)
    changed(files["CE"], "a", np.zeros_like)
    with pytest.raises(ValueError, match=r"no statistic varies between rows .* give more rows or steps"):
        summary(files, plan)


def test_too_few_ends_are_not_compared(tmp_path: Path) -> None:
    found = summary(run(tmp_path, hazard=1e-5))
    assert found.log_rank is None
    assert found.survival["ME"].alive[-1] > 0.98


@pytest.mark.parametrize("arm", ["ME", "CE", "control", "same path"])
def test_missing_and_damaged_parts_are_named(tmp_path: Path, arm: str) -> None:
    files = run(tmp_path)
    lost = files[arm][0]
    lost.write_bytes(lost.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{lost.name} is missing or damaged"):
        summary(files)
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is missing or damaged"):
        summary(files)


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    files = run(tmp_path)
    with pytest.raises(KeyError, match="no part holds 'c'"):
        compare(files["ME"], files["CE"], "c")
    for arm in ("ME", "CE"):
        with pytest.raises(ValueError, match="at least one part of ME and one of CE"):
            summary(files | {arm: []})
