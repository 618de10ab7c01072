"""How many tokens until a planted bug is found?

Every mutant of `me_stats.testing` runs on its own playground until the e-process rejects at E >= 1e9, and once through
`check_sampler` with a declared number of draws; the right sampler of the same claim goes through the same call. The
bugs that matter most for ME run on the bundled transformers too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats.eprocess import EProcess, Looks
from me_stats.evidence import Evidence
from me_stats.families import ALL_FAMILIES, SCORE_FAMILIES, Family
from me_stats.models import Ensemble
from me_stats.monitor import WatchResult, watch
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.samplers import CESampler, MESampler, Sampler
from me_stats.testing import MUTANTS, Mutant, check_sampler, check_session
from me_stats.testing.mutants import PROMPTS
from me_stats.trace import score

NAME, TITLE = "power", "Planted bugs: how many tokens until they are found"

# (bug, families by name, tokens within which the median must lie; None where there is no target)
_SOON = 2_000
ON_TRANSFORMERS = (
    ("one component per sequence", "scores", _SOON),
    ("components in turn", "scores", _SOON),
    ("weights off by five points", "scores", 50_000),
    ("stale cache", "laws", _SOON),
    ("stale cache", "scores", None),
)
PATHS = (
    "one component per sequence", "components in turn", "sticky component", "stale cache",
    "weights off by five points", "temperature 1.05",
)  # fmt: skip
_FAMILIES = {"scores": SCORE_FAMILIES, "laws": ALL_FAMILIES}
_BATCHES = (8, 32, 128)  # rows a prompt, one size after the other: gross bugs need few, small ones many
_FEW = (8, 32)  # on transformers, where a row costs more
_SLOW_SEEDS = 1  # of the case without a target, whose session has no cache at all and reads every prefix anew


@dataclass(frozen=True)
class Config:
    """`seeds` watches of each mutant up to `cap` tokens; `rows` continuations of each prompt for `check_sampler`.

    `sibling_seeds` and `sibling_cap` are those of the bundled transformers; without `slow`, bugs that need more than
    2,000 tokens are left out there. `repeats` timings of both kinds of work.
    """

    models: tuple[str, ...] = SIBLINGS
    mutants: tuple[str, ...] = tuple(MUTANTS)
    seeds: int = 9
    cap: int = 150_000
    steps: int = 32
    rows: int = 2000
    alpha: float = 1e-9
    level: float = 1e-6
    sibling_seeds: int = 5
    sibling_cap: int = 60_000
    sibling_steps: int = 48
    slow: bool = True
    points: int = 200
    repeats: int = 5
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Watch and check every mutant, then their right samplers, then the transformers."""
    recorder = Recorder(NAME, TITLE, config)
    rows, paths = [], {}
    for i, name in enumerate(config.mutants):
        progress(0.6 * i / len(config.mutants), name)
        row, looks = _mutant(MUTANTS[name], config)
        rows.append(row)
        if name in PATHS:
            paths[name] = _thinned(looks, config.points)
    progress(0.6, "right samplers")
    right = _right_samplers(config)
    toy = MUTANTS["one component per sequence"].ensemble()
    for name, sampler in (("right ME", MESampler(toy)), ("right CE", CESampler(toy))):
        looks = _watch(sampler, toy, PROMPTS, ALL_FAMILIES, config.cap, config.steps, config.seed, config.alpha)[1]
        paths[name] = _thinned(looks, config.points)
    setting = open_recorded(recorder, weights=(0.5, 0.5))
    siblings = []
    cases = [case for case in ON_TRANSFORMERS if config.slow or case[2] == _SOON]
    for i, (name, kind, target) in enumerate(cases):
        progress(0.75 + 0.2 * i / len(cases), f"{setting.label}: {name}")
        siblings.append(_on_transformers(setting.ensemble, setting.prompts, name, kind, target, config))
    progress(0.95, "cost of feeding the e-process")
    timing = _cost(setting.ensemble, setting.prompts, config)
    _check(recorder, rows, right, siblings, timing, setting.label, config)
    results = {"label": setting.label, "mutants": rows, "right": right, "siblings": siblings, "paths": paths}
    return recorder.finish(results | {"timing": timing})


def _watch(
    sampler: Sampler, model: Any, prompts: Any, families: Sequence[Family], cap: int, steps: int, seed: int,
    alpha: float, batches: Sequence[int] = _BATCHES,
) -> tuple[WatchResult, Looks]:  # fmt: skip
    """Watch in batches that grow, up to the first batch that ends after `cap` tokens."""
    process = EProcess(len(getattr(model, "components", (model,))), families=families)
    for batch in batches:
        # Each size but the last is drawn once.
        limit = cap if batch == batches[-1] else min(cap, process.tokens + 1)
        seen = watch(
            sampler, prompts, model=model, families=families, alpha=alpha, max_tokens=limit, max_new_tokens=steps,
            seed=seed, batch=batch, process=process,
        )  # fmt: skip
    return seen, process.looks


def _mutant(mutant: Mutant, config: Config) -> tuple[dict[str, Any], Looks]:
    ensemble = mutant.ensemble()
    null, sampler = mutant.null(ensemble), mutant.sampler(ensemble)
    # No bet is on the shape of rows, which the check looks at by itself: one watch shows that.
    seeds = 1 if mutant.size == "structure" else config.seeds
    runs = [
        _watch(sampler, null, PROMPTS, ALL_FAMILIES, config.cap, config.steps, config.seed + i, config.alpha)
        for i in range(seeds)
    ]
    checked = check_sampler(
        sampler, null, PROMPTS, max_new_tokens=config.steps, n=config.rows, level=config.level, seed=config.seed,
        on_fail="return",
    )  # fmt: skip
    session = None
    if mutant.model is not None:
        session = check_session(mutant.model(ensemble), PROMPTS, seed=config.seed, on_fail="return").passed
    row = {"name": mutant.name, "size": mutant.size, "bug": mutant.bug} | _summary([seen for seen, _ in runs])
    row |= {
        "check": {
            "rejected": not checked.passed,
            "worst": checked.worst.name,
            "detail": checked.worst.detail,
            "tokens": checked.tokens,
            "sequences": checked.sequences,
        },
        "session_rejected": None if session is None else not session,
    }
    return row, runs[0][1]


def _summary(runs: Sequence[WatchResult]) -> dict[str, Any]:
    """Tokens to a rejection: each, median and quartiles, None beyond the cap; and what the median run found."""
    tokens = [math.inf if run.tokens_to_reject is None else float(run.tokens_to_reject) for run in runs]
    # Order statistics: an average with an infinite value would be one.
    quartiles = np.quantile(tokens, [0.25, 0.5, 0.75], method="nearest").tolist()
    low, median, high = (None if math.isinf(value) else int(value) for value in quartiles)
    typical = runs[int(np.argsort(tokens, kind="stable")[len(runs) // 2])]
    return {
        "runs": len(runs),
        "tokens": [run.tokens_to_reject for run in runs],
        "low": low,
        "median": median,
        "high": high,
        "family": "support" if typical.impossible else typical.worst,
        "member": "tokens of probability zero" if typical.impossible else typical.member,
    }


def _right_samplers(config: Config) -> list[dict[str, Any]]:
    """The right sampler of every claim, once for each playground, through the call that judged the mutants."""
    seen: dict[str, dict[str, Any]] = {}
    for name in config.mutants:
        mutant = MUTANTS[name]
        ensemble = mutant.ensemble()
        null = mutant.null(ensemble)
        key = mutant.ensemble.__name__ + ("" if null is ensemble else f", claim of {name}")
        if key in seen:
            seen[key]["mutants"].append(name)
            continue
        result = check_sampler(
            mutant.right_sampler(ensemble), null, PROMPTS, max_new_tokens=config.steps,
            n=config.rows, level=config.level, seed=config.seed, stop_early=False, on_fail="return",
        )  # fmt: skip
        bets = next(outcome for outcome in result.outcomes if outcome.name == "whole rows (e-process)")
        seen[key] = {
            "claim": key,
            "mutants": [name],
            "passed": result.passed,
            "pvalue": result.pvalue,
            "tokens": result.tokens,
            "sup_log10_e": abs(math.log10(max(bets.pvalue, 1e-300))),
            "tv_upper": result.tv_upper,
        }
    return list(seen.values())


def _on_transformers(
    ensemble: Ensemble, prompts: Any, name: str, kind: str, target: int | None, config: Config
) -> dict[str, Any]:
    sampler, families = MUTANTS[name].sampler(ensemble), _FAMILIES[kind]
    seeds = config.sibling_seeds if target else min(_SLOW_SEEDS, config.sibling_seeds)
    runs = [
        _watch(
            sampler,
            ensemble,
            prompts,
            families,
            config.sibling_cap,
            config.sibling_steps,
            config.seed + i,
            config.alpha,
            _FEW,
        )
        for i in range(seeds)
    ]
    return {"name": name, "families": kind, "target": target} | _summary([seen for seen, _ in runs])


def _cost(ensemble: Ensemble, prompts: Any, config: Config) -> dict[str, float]:
    """Seconds to score tokens by teacher forcing, and to feed the scores to the e-process."""
    trace = MESampler(ensemble).sample(prompts, n=8, max_new_tokens=config.sibling_steps, seed=config.seed)
    scoring, feeding = [], []
    for _ in range(config.repeats):
        start = time.perf_counter()
        scored = score(ensemble, trace.row_prompts(), trace.tokens)
        middle = time.perf_counter()
        process = EProcess(len(ensemble.components), families=SCORE_FAMILIES)
        process.update(Evidence.from_scores(scored.component_log_probs, scored.log_weights, trace.tokens))
        scoring.append(middle - start)
        feeding.append(time.perf_counter() - middle)
    score_s, feed_s = float(np.median(scoring)), float(np.median(feeding))
    tokens = int(trace.lengths.sum())
    return {"tokens": tokens, "score_s": score_s, "feed_s": feed_s, "share": feed_s / score_s}


def _thinned(looks: Looks, points: int) -> dict[str, list[float]]:
    """At most `points` looks, evenly spaced in log tokens; log E in powers of ten, no further than ±300."""
    last = len(looks.tokens)
    chosen = np.unique(np.geomspace(1, last, min(points, last)).round().astype(int) - 1)
    log10 = np.clip(looks.log_e[chosen] / math.log(10), -300, 300)
    return {"tokens": looks.tokens[chosen].tolist(), "log10_e": [round(value, 3) for value in log10.tolist()]}


def _check(
    recorder: Recorder, rows: list[dict[str, Any]], right: list[dict[str, Any]], siblings: list[dict[str, Any]],
    timing: dict[str, float], label: str, config: Config,
) -> None:  # fmt: skip
    missed = [row["name"] for row in rows if not (row["check"]["rejected"] or row["session_rejected"])]
    recorder.check(
        f"each of {len(rows)} planted bugs is rejected at level {config.level:g} within {config.rows} rows a prompt"
        + (f": missed {', '.join(missed)}" if missed else ""),
        not missed,
    )
    largest = max(claim["sup_log10_e"] for claim in right)
    recorder.check(
        f"the right sampler of each of {len(right)} claims passes the same call (largest E 10^{largest:.1f})",
        all(claim["passed"] for claim in right) and largest < -math.log10(config.alpha),
    )
    for row in siblings:
        if row["target"]:
            median = f"{row['median']:,} tokens" if row["median"] else f"more than {config.sibling_cap:,} tokens"
            recorder.check(
                f"{row['name']}, {row['families']} ({label}): median {median}, at most {row['target']:,} allowed",
                row["median"] is not None and row["median"] <= row["target"],
            )
    recorder.check("feeding the e-process takes less than a tenth of the time of scoring", timing["share"] < 0.1)
