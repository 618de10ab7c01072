"""What long runs say: CE against ME statistic by statistic, drift, growth, memory, and what the path decides.

Every comparison is of one value per row, or per block with rows as clusters: tokens of a row are not independent. Each
says what it could have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from me_stats.chains import ChainAgreement, rank_rhat
from me_stats.dependence import Drift, LogRank, Survival, clustered_difference, drift, log_rank_test, survival_curve
from me_stats.goodness import PortfolioResult
from me_stats.lags import expected_prefill, lag_test, longest_wait
from me_stats.long_run import Arm, LongPlan, column, names_of
from me_stats.per_sequence import SequenceTests, sequence_tests, variance_ratio
from me_stats.sensitivity.estimate import Estimate, mean_estimate
from me_stats.shares import PathShares, path_shares
from me_stats.tails import POWER
from me_stats.variance import VarianceGrowth, shared_variance, variance_growth

Floats = NDArray[np.float64]
Files = Sequence[Path]

_CHAINS = 4  # of each arm, for R-hat
_NOT_STATISTICS = {"prompt", "end", "scored rows", "first tokens", "first path", "cost", "component share",
                   "prefilled", "longest wait", "held tokens"}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One statistic of CE's rows against ME's: Var ME/Var CE, and the difference of means.

    `ratio` compares whole rows, `block_ratio` blocks about their block's mean, with rows as clusters; both with
    intervals at the confidence asked for. `seen` and `block_seen` are the smallest ratios > 1 that would have been
    told from 1 at level .05 with power .8, from the standard error measured here. `pvalue`, `block_pvalue` are
    two-sided for ratio 1. `difference` is mean ME - mean CE, `sd` the standard deviation of rows.
    """

    name: str
    n: int
    ratio: Estimate
    seen: float
    pvalue: float
    block_ratio: Estimate
    block_seen: float
    block_pvalue: float
    difference: Estimate
    sd: float


def statistics(files: Files) -> tuple[str, ...]:
    """Names of the statistics that an arm's files hold in blocks."""
    return tuple(name for name in names_of(files) if name not in _NOT_STATISTICS and not name.endswith(" time"))


def compare(me: Files, ce: Files, name: str, *, confidence: float = 0.95) -> Comparison:
    """Variances and means of one statistic in two arms; prompts' means are taken out of the variances."""
    x, y = (_blocks(files, name) for files in (me, ce))
    whole = [rows.mean(1) for _, rows in (x, y)]
    inner = [_centred(prompts, rows) for prompts, rows in (x, y)]
    ratio = variance_ratio(inner[0].mean(1), inner[1].mean(1), confidence=confidence)
    blocks = [(rows - rows.mean(0)).reshape(-1) for rows in inner]
    rows_of = [np.repeat(np.arange(len(rows)), rows.shape[1]) for rows in inner]
    log = clustered_difference(
        blocks[0], blocks[1], x_groups=rows_of[0], y_groups=rows_of[1], of="log variance", confidence=confidence
    )
    low, high = log.difference.interval
    value = math.exp(log.difference.value)
    block_ratio = Estimate(
        value, value * log.difference.stderr, (math.exp(low), math.exp(high)), len(x[1]) + len(y[1]),
        "jackknife over rows of log variances of blocks",
    )  # fmt: skip
    sides = [mean_estimate(values, confidence=confidence) for values in whole]
    error = math.hypot(sides[0].stderr, sides[1].stderr)
    gap = sides[0].value - sides[1].value
    radius = float(stats.norm.ppf(0.5 + confidence / 2)) * error
    sd = math.sqrt((whole[0].var(ddof=1) + whole[1].var(ddof=1)) / 2)
    return Comparison(
        name, len(x[1]), ratio, _seen(ratio.stderr / ratio.value), _ratio_pvalue(ratio), block_ratio,
        _seen(log.difference.stderr), log.pvalue,
        Estimate(gap, error, (gap - radius, gap + radius), len(whole[0]) + len(whole[1]), "difference of means"), sd,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LongSummary:
    """All that a long run says; see the functions that made each part.

    `growth`, `drifts` by statistic and arm. `agreement` is R-hat over 4 chains of rows of each arm. `shares` is the
    component path's share of the variance of row means, `block_shares` that of each block's mean. `times` are
    integrated autocorrelation times in tokens, value and interval, by statistic and arm.
    """

    comparisons: tuple[Comparison, ...]
    tests: dict[str, SequenceTests]
    drifts: dict[str, dict[str, Drift]]
    growth: dict[str, dict[str, VarianceGrowth]]
    agreement: dict[str, ChainAgreement]
    shares: dict[str, Estimate]
    block_shares: dict[str, PathShares]
    times: dict[str, dict[str, tuple[float, float, float]]]
    survival: dict[str, Survival]
    log_rank: LogRank | None
    lags: dict[str, Any]
    control: dict[str, Estimate]
    control_tests: SequenceTests | None


def summarise(
    plan: LongPlan, files: Mapping[Arm, Files], *, weights: Sequence[float], prompt_length: float,
    bytes_per_token: float, level: float = 1e-3, confidence: float = 0.95,
) -> LongSummary:  # fmt: skip
    """Every comparison of a run. Whole statistics are read one at a time, so memory is that of one: 8 G bytes a row.

    Statistics that do not vary in an arm are left out. `bytes_per_token` of keys and values of one row of one
    component, 0 if unknown; `prompt_length` the mean over rows.
    """
    me, ce = files["ME"], files["CE"]
    names = [name for name in statistics(me) if _varies(me, name) and _varies(ce, name)]
    rng = np.random.default_rng(plan.seed)
    drifts: dict[str, dict[str, Drift]] = {}
    growth: dict[str, dict[str, VarianceGrowth]] = {}
    for name in names:
        arms = {arm: _blocks(files[arm], name) for arm in ("ME", "CE")}
        drifts[name] = {arm: drift(rows, blocks=plan.blocks, confidence=confidence) for arm, (_, rows) in arms.items()}
        growth[name] = {
            arm: variance_growth(_centred(*both).cumsum(1), start=max(1, plan.blocks // 4), confidence=confidence)
            for arm, both in arms.items()
        }
    control = files["control"]
    return LongSummary(
        comparisons=tuple(compare(me, ce, name, confidence=confidence) for name in names),
        tests=_tests(me, ce, names, level, rng),
        drifts=drifts,
        growth=growth,
        agreement={name: _agreement(me, ce, name) for name in names},
        shares={name: _share(me, files["same path"], name, confidence) for name in names if _paired(files, name)},
        block_shares={
            name: path_shares(*_pairs(me, files["same path"], name)[:2], confidence=confidence)
            for name in names if _paired(files, name)
        },
        times=_times(files),
        survival={arm: _survival(files[arm], plan.steps, confidence) for arm in ("ME", "CE")},
        log_rank=_log_rank(me, ce, plan.steps, level),
        lags=_lags(me, plan, weights, prompt_length, bytes_per_token, confidence),
        control={
            name: variance_ratio(*(_centred(*_blocks(arm, name)).mean(1) for arm in (control, ce)),
                                 confidence=confidence)
            for name in names if control and name in names_of(control) and _varies(control, name)
        },
        control_tests=_tests(control, ce, [n for n in names if n in names_of(control)], level, rng)["rows"]
        if control else None,
    )  # fmt: skip


def _blocks(files: Files, name: str) -> tuple[NDArray[np.int64], Floats]:
    """Prompt (N,) and block means (N, G) of the rows that have the statistic."""
    rows = column(files, name)
    prompts = column(files, "prompt")
    scored = len(rows) < len(prompts)
    return (prompts[column(files, "scored rows")] if scored else prompts), rows


def _centred(prompts: NDArray[np.int64], rows: Floats) -> Floats:
    """Rows less the mean of their prompt, block by block."""
    out = rows.astype(np.float64)
    for prompt in np.unique(prompts):
        mine = prompts == prompt
        out[mine] -= out[mine].mean(0)
    return out


def _varies(files: Files, name: str) -> bool:
    rows = column(files, name).mean(1)
    return len(rows) >= 8 and len(np.unique(rows)) > 3


def _seen(stderr: float) -> float:
    """Ratio told from 1 at level .05 with power .8, for the standard error of its logarithm."""
    return math.exp((float(stats.norm.isf(0.025)) + float(stats.norm.ppf(POWER))) * stderr)


def _ratio_pvalue(ratio: Estimate) -> float:
    spread = ratio.stderr / ratio.value
    return 2 * float(stats.t.sf(abs(math.log(ratio.value)) / spread, max(1, ratio.n // 2 - 1)))


def _tests(me: Files, ce: Files, names: Sequence[str], level: float, rng: np.random.Generator) -> dict[str, Any]:
    """Tests of row means: of statistics that all rows have, and of those that scored rows have."""
    by_size: dict[int, list[str]] = {}
    for name in names:
        by_size.setdefault(len(column(me, name)), []).append(name)
    found = {}
    for size, group in sorted(by_size.items(), reverse=True):
        scores = {name: (column(me, name).mean(1), column(ce, name).mean(1)) for name in group}
        key = "rows" if size == len(column(me, "prompt")) else "scored rows"
        found[key] = sequence_tests(scores, level=level, permutations=math.ceil(4 * len(group) / level), rng=rng)
    return found


def _agreement(me: Files, ce: Files, name: str) -> ChainAgreement:
    """R-hat over chains that are consecutive rows of an arm, as if seeds of their own: rows are independent."""
    chains = []
    for files in (me, ce):
        values = _centred(*_blocks(files, name)).mean(1)
        size = len(values) // _CHAINS
        chains += [values[i * size : (i + 1) * size] for i in range(_CHAINS)]
    shortest = min(map(len, chains))
    return rank_rhat([chain[:shortest] for chain in chains])


def _paired(files: Mapping[Arm, Files], name: str) -> bool:
    return bool(files["same path"]) and name in names_of(files["same path"]) and _varies(files["same path"], name)


def _pairs(me: Files, same: Files, name: str) -> tuple[Floats, Floats, NDArray[np.int64]]:
    other = column(same, name)
    return column(me, name)[: len(other)], other, column(same, "prompt")


def _share(me: Files, same: Files, name: str, confidence: float) -> Estimate:
    x, y, prompts = _pairs(me, same, name)
    return shared_variance(x.mean(1), y.mean(1), groups=prompts, confidence=confidence)


def _times(files: Mapping[Arm, Files]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of the first part's rows, which are enough and fit into memory together."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm in ("ME", "CE"):
        for name in names_of(files[arm]):
            if name.endswith(" pooled time"):
                value, low, high, _ = column(files[arm][:1], name)[0].tolist()
                found.setdefault(name.removesuffix(" pooled time"), {})[arm] = (value, low, high)
    return found


def _survival(files: Files, steps: int, confidence: float) -> Survival:
    end = column(files, "end")
    return survival_curve(np.where(end > 0, end, steps), max_new_tokens=steps, confidence=confidence)


def _log_rank(me: Files, ce: Files, steps: int, level: float) -> LogRank | None:
    ends = [column(files, "end") for files in (me, ce)]
    if sum(int((end > 0).sum()) for end in ends) < 20:
        return None
    (x, y) = ([np.where(end > 0, end, steps), end > 0] for end in ends)
    return log_rank_test(x[0], x[1], y[0], y[1], level=level)


def _lags(
    me: Files, plan: LongPlan, weights: Sequence[float], prompt_length: float, bytes_per_token: float,
    confidence: float,
) -> dict[str, Any]:  # fmt: skip
    path = column(me[:1], "first path").astype(np.int64)
    test: PortfolioResult = lag_test(path, weights=weights)
    waits = column(me, "longest wait")
    share = mean_estimate(column(me, "component share").mean(1), confidence=confidence)
    held = column(me, "held tokens").mean(0)
    return {
        "pvalue": test.pvalue,
        "tokens": int(path.size),
        "share": share,
        "weight": float(weights[0]),
        "prefilled": mean_estimate(column(me, "prefilled"), confidence=confidence),
        # A window's hops forward tokens again, which no law of lags knows.
        "expected prefilled": expected_prefill(weights, plan.steps, prompt_length=prompt_length),
        "longest": [mean_estimate(waits[:, i], confidence=confidence) for i in range(waits.shape[1])],
        "expected longest": [longest_wait(float(weight), plan.steps).mean for weight in weights],
        "held tokens": held,
        "held bytes": held * bytes_per_token,
        "rows": len(waits),
    }
