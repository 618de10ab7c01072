"""What long runs say: CE against ME statistic by statistic, drift, growth, memory, and what the path decides.

Every comparison is of one value per row, or per block with rows as clusters: tokens of a row are not independent. Each
says what it could have seen.
"""

from __future__ import annotations

import dataclasses
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
from me_stats.tails import detectable_shift
from me_stats.variance import VarianceGrowth, shared_variance, variance_growth

Floats = NDArray[np.float64]
Files = Sequence[Path]

_CHAINS = 4  # of each arm, for R-hat
_NOT_STATISTICS = {"prompt", "end", "scored rows", "first tokens", "first path", "component share",
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
    free = min(len(prompts) - len(np.unique(prompts)) for prompts, _ in (x, y))
    # Rows of a prompt lose its mean together, which a jackknife over rows does not see.
    lost = math.sqrt(max(1.0, min(len(x[1]), len(y[1])) / max(1, free)))
    ratio = _widened(variance_ratio(inner[0].mean(1), inner[1].mean(1), confidence=confidence), lost)
    blocks = [(rows - rows.mean(0)).reshape(-1) for rows in inner]
    rows_of = [np.repeat(np.arange(len(rows)), rows.shape[1]) for rows in inner]
    log = clustered_difference(
        blocks[0], blocks[1], x_groups=rows_of[0], y_groups=rows_of[1], of="log variance", confidence=confidence
    )
    low, high = log.difference.interval
    value = math.exp(log.difference.value)
    method = "jackknife over rows of log variances of blocks"
    ends = math.exp(low), math.exp(high)
    block_ratio = _widened(Estimate(value, value * log.difference.stderr, ends, len(x[1]) + len(y[1]), method), lost)
    sides = [mean_estimate(values, confidence=confidence) for values in whole]
    error = math.hypot(sides[0].stderr, sides[1].stderr)
    gap = sides[0].value - sides[1].value
    radius = float(stats.norm.ppf(0.5 + confidence / 2)) * error
    sd = math.sqrt((whole[0].var(ddof=1) + whole[1].var(ddof=1)) / 2)
    return Comparison(
        name, len(x[1]), ratio, _seen(ratio), ratio_pvalue(ratio, free), block_ratio, _seen(block_ratio),
        ratio_pvalue(block_ratio, free),
        Estimate(gap, error, (gap - radius, gap + radius), len(whole[0]) + len(whole[1]), "difference of means"), sd,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LongSummary:
    """All that a long run says; see the functions that made each part.

    `growth`, `drifts` by statistic and arm. `agreement` is R-hat over 4 chains of rows of each arm. `shares` is the
    component path's share of the variance of row means, `block_shares` that of each block's mean, `pooled_shares` of
    all blocks together. `times` are integrated autocorrelation times in tokens, value and interval, by statistic and
    arm. What stands still in a block has no `growth`, `block_shares` and `pooled_shares`.
    """

    comparisons: tuple[Comparison, ...]
    tests: dict[str, SequenceTests]
    drifts: dict[str, dict[str, Drift]]
    growth: dict[str, dict[str, VarianceGrowth]]
    agreement: dict[str, ChainAgreement]
    shares: dict[str, Estimate]
    block_shares: dict[str, PathShares]
    pooled_shares: dict[str, Estimate]
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

    Statistics that do not vary in an arm are left out, and ValueError says if that leaves none. `bytes_per_token` of
    keys and values of one row of one component, 0 if unknown; `prompt_length` the mean over rows.
    """
    me, ce = files["ME"], files["CE"]
    if not me or not ce:
        raise ValueError("files must hold at least one part of ME and one of CE")
    names = [name for name in statistics(me) if _varies(me, name) and _varies(ce, name)]
    if not names:
        raise ValueError("no statistic varies between rows of a prompt in both arms: give more rows or steps")
    rng = np.random.default_rng(plan.seed)
    drifts: dict[str, dict[str, Drift]] = {}
    growth: dict[str, dict[str, VarianceGrowth]] = {}
    for name in names:
        arms = {arm: _blocks(files[arm], name) for arm in ("ME", "CE")}
        drifts[name] = {arm: drift(rows, blocks=plan.blocks, confidence=confidence) for arm, (_, rows) in arms.items()}
        sums = {arm: _centred(*both).cumsum(1) for arm, both in arms.items()}
        if all(map(_varies_throughout, sums.values())):
            growth[name] = {
                arm: variance_growth(rows, start=max(1, plan.blocks // 4), confidence=confidence)
                for arm, rows in sums.items()
            }
    control = files["control"]
    return LongSummary(
        comparisons=tuple(compare(me, ce, name, confidence=confidence) for name in names),
        tests=_tests(me, ce, names, level, rng),
        drifts=drifts,
        growth=growth,
        agreement={name: _agreement(me, ce, name) for name in names if len(column(me, name)) >= 4 * _CHAINS},
        shares={name: _share(me, files["same path"], name, confidence) for name in names if _paired(files, name)},
        block_shares={
            name: _block_shares(me, files["same path"], name, confidence, pooled=False)
            for name in names if _paired(files, name, throughout=True)
        },
        pooled_shares={
            name: _pooled(_block_shares(me, files["same path"], name, confidence, pooled=True))
            for name in names if _paired(files, name, throughout=True)
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
        control_tests=_tests(control, ce, [n for n in names if n in names_of(control)], level, rng).get("rows")
        if control else None,
    )  # fmt: skip


def _blocks(files: Files, name: str) -> tuple[NDArray[np.int64], Floats]:
    """Prompt (N,) and block means (N, G) of the rows that have the statistic."""
    rows = column(files, name)
    prompts = column(files, "prompt")
    scored = len(rows) < len(prompts)
    return (prompts[column(files, "scored rows")] if scored else prompts), rows


def _centred(prompts: NDArray[np.int64], rows: Floats) -> Floats:
    """Rows less the mean of their prompt, block by block, and scaled so that this takes no variance from them."""
    out = rows.astype(np.float64)
    for prompt in np.unique(prompts):
        mine = prompts == prompt
        count = int(mine.sum())
        moves = np.ptp(out[mine], axis=0) > 0  # the mean of equal values may miss them by rounding
        out[mine] = np.where(moves, out[mine] - out[mine].mean(0), 0.0) * math.sqrt(count / max(1, count - 1))
    return out


def _varies(files: Files, name: str) -> bool:
    """Whether 8 rows or more have the statistic, and it moves between rows of a prompt."""
    prompts, rows = _blocks(files, name)
    means = rows.mean(1)
    moving = sum(len(np.unique(means[prompts == prompt])) - 1 for prompt in np.unique(prompts))
    return len(rows) >= 8 and moving >= 3


def _varies_throughout(rows: Floats) -> bool:
    """Whether every block differs in more than one row: the first blocks of a rare event may not."""
    squares = (rows - rows.mean(0)) ** 2
    total = squares.sum(0)
    without = total - squares.max(0) * len(rows) / (len(rows) - 1)
    return bool(((np.ptp(rows, axis=0) > 0) & (without > 1e-9 * total)).all())


def _widened(ratio: Estimate, factor: float) -> Estimate:
    """A ratio whose logarithm has `factor` times the error."""
    low, high = (ratio.value * (end / ratio.value) ** factor for end in ratio.interval)
    return dataclasses.replace(ratio, stderr=ratio.stderr * factor, interval=(low, high))


def _seen(ratio: Estimate) -> float:
    """Ratio told from 1 at level .05 with power .8, for the error of this one's logarithm."""
    return math.exp(detectable_shift() * ratio.stderr / ratio.value)


def ratio_pvalue(ratio: Estimate, df: int) -> float:
    """Two-sided p-value of a ratio of variances for 1, by Student's t on the log scale."""
    return 2 * float(stats.t.sf(abs(math.log(ratio.value)) / (ratio.stderr / ratio.value), max(1, df)))


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


def _paired(files: Mapping[Arm, Files], name: str, *, throughout: bool = False) -> bool:
    same = files["same path"]
    if not same or name not in names_of(same) or not _varies(same, name):
        return False
    x, y, prompts = _pairs(files["ME"], same, name)
    enough = np.unique(prompts, return_counts=True)[1].min() >= 2
    return bool(enough) and (not throughout or _varies_throughout(np.concatenate([x, y])))


def _pairs(me: Files, same: Files, name: str) -> tuple[Floats, Floats, NDArray[np.int64]]:
    other = column(same, name)
    return column(me, name)[: len(other)], other, column(same, "prompt")


def _share(me: Files, same: Files, name: str, confidence: float) -> Estimate:
    x, y, prompts = _pairs(me, same, name)
    return shared_variance(x.mean(1), y.mean(1), groups=prompts, confidence=confidence)


def _block_shares(me: Files, same: Files, name: str, confidence: float, *, pooled: bool) -> PathShares:
    x, y, prompts = _pairs(me, same, name)
    return path_shares(x, y, groups=prompts, pooled=pooled, confidence=confidence)


def _pooled(shares: PathShares) -> Estimate:
    value, stderr, low, high = (float(v[0]) for v in (shares.value, shares.stderr, shares.lower, shares.upper))
    return Estimate(value, stderr, (low, high), shares.n, f"{shares.method}, all blocks together")


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
        "share along the row": drift(column(me, "component share"), blocks=plan.blocks, confidence=confidence),
        "weight": float(weights[0]),
        "prefilled": mean_estimate(column(me, "prefilled"), confidence=confidence),
        # A window's hops forward tokens again, which no law of lags knows.
        "expected prefilled": expected_prefill(weights, plan.steps, prompt_length=prompt_length),
        "longest": [mean_estimate(waits[:, i], confidence=confidence) for i in range(waits.shape[1])],
        "expected longest": [
            longest_wait(float(weight), plan.steps).mean if weight > 0 else float(plan.steps) for weight in weights
        ],
        "held tokens": held,
        "held bytes": held * bytes_per_token,
        "rows": len(waits),
    }
