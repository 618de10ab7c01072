"""C14 on transformers: are CE and ME one law over thousands of tokens, and what does the component path decide?

Rows are generated in parts and kept as block means (`me_stats.long_run`), so a run goes on where it was stopped and its
memory is that of one part. Then variances, means, drift, ends and lags of CE and ME are compared row by row, and ME is
run again along the same component paths to see how much of the spread they explain.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from me_stats.divergence import tv_distance
from me_stats.long_run import LongPlan, column, generate, open_plan, seconds_spent
from me_stats.long_summary import LongSummary, ratio_pvalue, summarise
from me_stats.models import Ensemble
from me_stats.models.base import open_session
from me_stats.presets import SIBLINGS
from me_stats.record import Record, Recorder, config_key
from me_stats.tails import detectable_shift

NAME, TITLE = "long", "Long generations: variance, drift, ends and lags of CE and ME"

_POINTS = 128  # of a survival curve in the record
_REPRODUCED = "reproduced at small scale"  # bundled and small models; whoever runs it at scale says so


@dataclass(frozen=True)
class Config:
    """What `me_stats.long_run.LongPlan` takes; `level` is that of each group of tests, Bonferroni inside.

    The window of the siblings, 33 to 128 bytes, keeps a token's cost the same at any length.
    """

    models: tuple[str, ...] = SIBLINGS
    prompts: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    rows: int = 3456
    steps: int = 4096
    batch: int = 384
    blocks: int = 16
    window: int | None = 128
    hop: int | None = 96
    scored: int = 384
    paired: int = 768
    control: int = 64
    seed: int = 0
    level: float = 1e-3
    confidence: float = 0.95


def run(
    config: Config,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
    *,
    work: Path | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Record:
    """Generate what `work` does not hold yet, summarise, judge. Without `work` nothing is kept but the record.

    `workers` processes share the parts; by default one per core for the bundled models, else one. An `executor` runs
    them instead.
    """
    recorder = Recorder(NAME, TITLE, config)
    names = {field.name for field in fields(LongPlan)}
    plan = LongPlan(**{name: value for name, value in vars(config).items() if name in names})
    progress(0.0, "opening the models")
    ensemble, prompts, setting = open_plan(plan)
    for name, model in setting.models:
        recorder.add_model(name, model)
    encoded = [ensemble.vocabulary.encode(prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    folder = nullcontext(str(work / config_key(NAME, config))) if work is not None else tempfile.TemporaryDirectory()
    with folder as place:
        recorder.count_earlier(seconds_spent(Path(place)))
        files = generate(
            plan, Path(place), workers=workers or (1 if executor else _workers(config)), executor=executor,
            progress=lambda done, total: progress(0.95 * done / total, f"{done:,} of {total:,} tokens"),
        )  # fmt: skip
        progress(0.95, "comparing")
        network = setting.models[0][1]
        summary = summarise(
            plan, files, weights=setting.ensemble.mixing.log_weights([()])[0].exp().tolist(),
            prompt_length=float(np.mean([len(encoded[r % len(encoded)]) for r in range(plan.rows)])),
            bytes_per_token=network.cache_bytes_per_token(), level=config.level, confidence=config.confidence,
        )  # fmt: skip
        vocabulary = setting.ensemble.vocabulary
        first = {arm: column(files[arm][:1], "first tokens")[0].tolist() for arm in ("ME", "CE")}
        size = sum(path.stat().st_size for path in files["ME"] + files["CE"]) / (2 * plan.rows)
        floor = _floor(ensemble, encoded[0], first["ME"]) if config.dtype != "float32" else None
    label = setting.label + (f", window {plan.window}" if plan.window is not None else "")
    _judge(recorder, summary, config, label, floor)
    results = {
        "label": label,
        "longest_prompt": longest,
        "floor": floor,
        "bytes_kept_per_row": size,
        "samples": {arm: vocabulary.decode(tokens) for arm, tokens in first.items()},
        **_thinned(summary, config.steps),
    }
    return recorder.finish(results)


def _workers(config: Config) -> int:
    small = all(name.startswith("bundled:") for name in config.models) and config.device == "cpu"
    return len(os.sched_getaffinity(0)) if small and hasattr(os, "sched_getaffinity") else 1


def _floor(ensemble: Ensemble, prompt: tuple[int, ...], tokens: list[int]) -> dict[str, float]:
    """TV between the law that a session reads at lags of 1 to 4 and that of one teacher-forced pass.

    What rounding alone does in a narrow dtype: no difference between CE and ME below it means anything.
    """
    laws = next(iter(ensemble.path_log_probs([prompt], [tokens]))).double().cpu()
    session, row = open_session(ensemble, [prompt], max_new_tokens=len(tokens)), np.array([0])
    apart = []
    for step, token in enumerate(tokens):
        if step * 3 % 4 != 1:
            apart.append(tv_distance(session.log_probs(row)[0].double().cpu(), laws[step]))
        session.append(row, torch.tensor([token]))
    return {"mean": float(np.mean(apart)), "max": float(np.max(apart)), "steps": len(apart)}


def _judge(
    recorder: Recorder, found: LongSummary, config: Config, label: str, floor: dict[str, float] | None
) -> None:  # fmt: skip
    shape = f"{config.rows:,} rows of {config.steps:,} tokens each"
    rounding = f"; rounding in {config.dtype} moves a law by TV {floor['mean']:.2g} on average" if floor else ""
    many = 2 * len(found.comparisons)
    worst = min(found.comparisons, key=lambda c: min(c.pvalue, c.block_pvalue))
    pvalue = min(1.0, many * min(worst.pvalue, worst.block_pvalue))
    everywhere = [c for c in found.comparisons if c.n == config.rows]
    scored = [c for c in found.comparisons if c.n < config.rows]
    power = (
        f"smallest ratio seen with power 0.8: {max(c.seen for c in everywhere):.2f} between rows" if everywhere else ""
    )
    if scored:
        power += (
            f"; {max(c.seen for c in scored):.2f} between the {scored[0].n} scored rows, "
            f"{max(c.block_seen for c in scored):.2f} between their blocks"
        )
    _find(
        recorder, "variance over rows and over blocks, ME against CE, every statistic", label, shape,
        f"{len(found.comparisons)} statistics; furthest from 1: {worst.name}, ratio {_interval(worst.ratio)}, "
        f"p = {pvalue:.2g} (Bonferroni over {many})",
        pvalue > config.level, power + rounding + _control(found, config),
    )  # fmt: skip
    pvalue = min(1.0, len(found.tests) * min(test.pvalue for test in found.tests.values()))
    tests = next(iter(found.tests.values()))
    means = [test.min_detectable / c.sd for test in tests.tests if test.kind == "mean"
             for c in found.comparisons if c.name == test.name]  # fmt: skip
    _find(
        recorder, "law of row means, ME against CE: permutation and Kolmogorov-Smirnov tests", label, shape,
        f"p = {pvalue:.2g} over {sum(len(t.tests) for t in found.tests.values())} tests",
        pvalue > config.level,
        f"sees a shift of {max(means):.2g} standard deviations of a row mean with power 0.8{rounding}",
    )  # fmt: skip
    slopes = {name: _slope_pvalue(arms) for name, arms in found.drifts.items()}
    name = min(slopes, key=lambda key: slopes[key])
    pvalue = min(1.0, len(slopes) * slopes[name])
    moving = [key for key, arms in found.drifts.items() if arms["CE"].pvalue < config.level / len(slopes)]
    _find(
        recorder, "drift along the row, ME against CE", label, shape,
        f"slopes agree: p = {pvalue:.2g} (smallest: {name})" if pvalue > config.level else f"{name}: p = {pvalue:.2g}",
        pvalue > config.level,
        (f"CE itself drifts in {', '.join(moving)}" if moving else "CE itself is not seen to drift in any statistic")
        + f"; sees a change of {_drift_seen(found):.2g} standard deviations of a block from end to end",
    )  # fmt: skip
    if found.log_rank is not None:
        rank = found.log_rank
        _find(
            recorder, "when rows write their first end of sequence, ME against CE: log-rank test", label,
            f"{rank.n + rank.m:,} rows, {rank.ends:,} ends", f"z = {rank.statistic:.2f}, p = {rank.pvalue:.2g}",
            rank.pvalue > config.level, f"sees a ratio of hazards of {rank.min_detectable:.2f} with power 0.8",
        )  # fmt: skip
    lags = found.lags
    held = lags["pvalue"] > config.level
    _find(
        recorder, "lags of each component are Geometric(λ)", label, f"{lags['tokens']:,} draws",
        f"p = {lags['pvalue']:.2g}; tokens forwarded a step {_interval(lags['prefilled'], 3)}, "
        f"expected {lags['expected prefilled']:.3f}",
        held, f"longest wait {', '.join(f'{w.value:.1f}' for w in lags['longest'])} steps a row on average, expected "
        f"{', '.join(f'{w:.1f}' for w in lags['expected longest'])}"
        + ("; a window's hops forward more" if config.window else ""),
    )  # fmt: skip
    for shares, what in ((found.shares, "row means"), (found.pooled_shares, "block means, all blocks together")):
        if shares:
            top = max(shares, key=lambda key: shares[key].value)
            largest = f"largest: {top}, {_interval(shares[top])}"
            recorder.find(
                claim="C14", statement=f"share of the variance of {what} that the component path decides",
                models=label, n=f"{config.paired:,} pairs of rows", statistic=largest,
                tv_upper=None, bound=f"{config.confidence:.0%} interval", verdict=_REPRODUCED, held=True,
                caveat=meaning(shares, config),
            )  # fmt: skip
    # Only components that are far apart must show one component per sequence; for others `_control` says what it said.
    if config.models == SIBLINGS and found.control_tests is not None:
        pvalue = _control_pvalue(found, config)
        recorder.check(
            f"one component per sequence is found with {config.control} rows ({label}, p = {pvalue:.1e})",
            pvalue <= config.level,
        )


def _control_pvalue(found: LongSummary, config: Config) -> float:
    """Of the control's means and laws, and of how far its rows lie apart, which it can hide less."""
    assert found.control_tests is not None
    spreads = [ratio_pvalue(ratio, config.control - 1) for ratio in found.control.values()]
    return min(1.0, 2 * min([found.control_tests.pvalue, *(len(spreads) * spread for spread in spreads)]))


def _control(found: LongSummary, config: Config) -> str:
    """What the tests are worth here, in the words of a caveat: do they find one component per sequence?"""
    if found.control_tests is None:
        return ""
    pvalue = _control_pvalue(found, config)
    seen = "found" if pvalue <= config.level else "not found either: the tests say little here"
    return f"; one component per sequence, {config.control} rows, is {seen} (p = {pvalue:.2g})"


def meaning(shares: dict[str, Any], config: Config) -> str:
    """What the component path's share of the variance says, in a sentence."""
    high = max(estimate.interval[1] for estimate in shares.values())
    surely = [name for name, estimate in shares.items() if estimate.interval[0] > 0]
    part = f"for {', '.join(surely)} it is above 0" if surely else "for none of them is it seen to be above 0"
    few = "; with fewer than 100 pairs and long tails such an interval is too narrow" if config.paired < 100 else ""
    return (
        f"which model wrote which token decides at most {min(1.0, high):.0%} of how continuations differ in any of "
        f"{len(shares)} statistics ({config.confidence:.0%} intervals, one by one); {part}; the rest is chance in the "
        f"tokens{few}"
    )


def _find(
    recorder: Recorder, statement: str, models: str, n: str, statistic: str, held: bool, caveat: str
) -> None:  # fmt: skip
    recorder.find(
        claim="C14", statement=statement, models=models, n=n, statistic=statistic, tv_upper=None,
        bound="not rejected is not equal: see the power", held=held, caveat=caveat,
        verdict=_REPRODUCED if held else "refuted as stated",
    )  # fmt: skip


def _slope_pvalue(arms: dict[str, Any]) -> float:
    a, b = arms["ME"].slope, arms["CE"].slope
    error = math.hypot(a.stderr, b.stderr)
    if error == 0:
        return float(a.value == b.value)
    df = error**4 / (a.stderr**4 / (a.n - 1) + b.stderr**4 / (b.n - 1))  # Welch's
    return 2 * float(stats.t.sf(abs(a.value - b.value) / error, df))


def _drift_seen(found: LongSummary) -> float:
    """Largest over statistics of the drift of ME less CE that is found with power 0.8 at level .05."""
    seen = []
    for name in found.growth:  # what stands still in a block has no deviation of it
        arms = found.drifts[name]
        error = math.hypot(arms["ME"].slope.stderr, arms["CE"].slope.stderr) * (len(arms["CE"].means) - 1)
        seen.append(detectable_shift() * error / math.sqrt(found.growth[name]["CE"].variance[0]))
    return max(seen, default=math.inf)


def _interval(estimate: Any, digits: int = 2) -> str:
    low, high = estimate.interval
    return f"{estimate.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _thinned(found: LongSummary, steps: int) -> dict[str, Any]:
    """The summary as a record keeps it: survival at some points, growth without what the figure does not read."""
    points = np.unique(np.linspace(0, steps - 1, _POINTS).astype(int))
    results = {name: value for name, value in vars(found).items() if name not in ("survival", "log_rank")}
    results["log_rank"] = found.log_rank
    results["survival"] = {
        arm: {"t": points, "alive": curve.alive[points], "lower": curve.lower[points], "upper": curve.upper[points]}
        for arm, curve in found.survival.items()
    }
    return results
