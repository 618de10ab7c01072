"""Do the bounds on total variation cover, and how many draws do they need to be narrow?

A bound is run many times on draws from laws whose distance from the null is known. An upper bound may fall below the
true TV in a share 1 − confidence of the runs, and no more; the same for the others. The plug-in estimate comes along
for contrast: over a large vocabulary it reports a distance where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from me_stats.equivalence import (
    binomial_interval,
    plugin_tv,
    tv_lower_bound,
    tv_upper_bound,
    tv_upper_bound_cells,
)
from me_stats.record import Record, Recorder
from me_stats.sequence_divergence import sequence_tv

NAME, TITLE = "tv_bounds", "Coverage and width of the bounds on total variation"
BOUNDS = (
    "upper, whole vocabulary",
    "upper, 64 cells",
    "lower, two halves",
    "sequences, betting",
    "sequences, Hoeffding",
)
LAWS = ("uniform", "Zipf", "peaked")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Config:
    """`grid` are (V, numbers of draws, runs); slower bounds are run on the first runs alone.

    `doubt` is the chance that right bounds fail the checks.
    """

    grid: tuple[tuple[int, tuple[int, ...], int], ...] = (
        (256, (1000, 10_000, 100_000, 1_000_000), 400),
        (50_257, (10_000, 100_000, 1_000_000), 50),
    )
    distances: tuple[float, ...] = (0.0, 0.005, 0.02, 0.1)
    sequence_draws: tuple[int, ...] = (1000, 10_000)
    sequence_runs: int = 100
    confidence: float = 0.95
    doubt: float = 1e-6
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Draw from a law at each distance, bound it, and count how often the bound is on the right side."""
    recorder = Recorder(NAME, TITLE, config)
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(config.seed)
    cases = [(v, ns, runs, kind, tv) for v, ns, runs in config.grid for kind in LAWS for tv in config.distances]
    for i, (vocabulary, numbers, runs, kind, tv) in enumerate(cases):
        progress(0.8 * i / len(cases), f"{kind} law over {vocabulary:,} tokens, TV {tv}")
        p = law(kind, vocabulary)
        q = departed(p, tv, rng)
        for n in numbers:
            rows += _one_step(p, q, n, runs, config, rng, {"law": kind, "V": vocabulary, "case": tv})
    for i, tv in enumerate(config.distances):
        progress(0.8 + 0.2 * i / len(config.distances), f"sequences, TV {tv}")
        for n in config.sequence_draws:
            rows += _sequences(tv, n, config, rng)
    _judge(recorder, rows, config)
    return recorder.finish({"rows": rows})


def law(kind: str, vocabulary: int) -> Floats:
    """A null law (V,): uniform, Zipf with exponent 1.1, or one token of .7 and a geometric rest."""
    rank = np.arange(1.0, vocabulary + 1)
    if kind == "uniform":
        p = np.ones(vocabulary)
    elif kind == "Zipf":
        p = rank**-1.1
    else:
        rest = np.maximum(0.8 ** (rank - 1), 1e-9)
        p = 0.3 * rest / rest.sum()
        p[0] += 0.7
    return np.asarray(p / p.sum())


def departed(p: Floats, tv: float, rng: np.random.Generator) -> Floats:
    """A law (V,) at exactly TV `tv` from `p`: half the tokens, at random, each lose the same share to the others."""
    if tv == 0:
        return p
    order = rng.permutation(len(p))
    giving = np.zeros(len(p), dtype=bool)
    giving[order[: len(p) // 2]] = True
    if p[giving].sum() < tv:
        giving = ~giving
    q = np.where(giving, p * (1 - tv / p[giving].sum()), p * (1 + tv / p[~giving].sum()))
    return np.asarray(q)


def _one_step(
    p: Floats, q: Floats, n: int, runs: int, config: Config, rng: np.random.Generator, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    cells = np.minimum(np.arange(len(p)), 63) if about["law"] != "uniform" else np.arange(len(p)) % 64
    coarse_p, coarse_q = (np.bincount(cells, weights=x).astype(float) for x in (p, q))
    options = {"confidence": config.confidence}
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in BOUNDS[:3]}
    plugin = []
    for r in range(runs):
        halves = rng.multinomial(n // 2, q / q.sum(), size=2)
        counts = halves.sum(0)
        whole = tv_upper_bound(counts, p, **options)
        values[BOUNDS[0]].append((whole.upper, whole.null_value))
        if r < -(-runs // 4):
            binned = tv_upper_bound_cells(np.bincount(cells, weights=counts), coarse_p, **options)
            values[BOUNDS[1]].append((binned.upper, binned.null_value))
            values[BOUNDS[2]].append((tv_lower_bound(halves[0], halves[1], p, **options).lower, 0.0))
        if r < 10:
            plugin.append(plugin_tv(counts, p).value)
    truth = {name: _tv(p, q) for name in BOUNDS} | {BOUNDS[1]: _tv(coarse_p, coarse_q)}
    for name, pairs in values.items():
        bounds, null = np.array(pairs).T
        right = bounds <= truth[name] if name.startswith("lower") else bounds >= truth[name]
        row = about | {"bound": name, "n": n, "runs": len(pairs), "tv": truth[name], "covered": int(right.sum())}
        row |= {"median": float(np.median(bounds)), "null_value": float(np.median(null))}
        if name == BOUNDS[0]:
            row["plugin"] = float(np.median(plugin))
        yield row


def _sequences(tv: float, n: int, config: Config, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Ratios q/p of sequences: log-normal under p, shrunk towards 1 until E_p (1 − q/p)_+ is `tv`."""
    spread = 0.5
    # E_p (1 − L)_+ of L = exp(s z − s²/2) is 2 Φ(s/2) − 1; a mixture of L and 1 scales it.
    share = tv / math.erf(spread / (2 * math.sqrt(2)))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in BOUNDS[3:]}
    for _ in range(config.sequence_runs):
        ratio = np.exp(spread * rng.normal(size=n) - spread**2 / 2)
        estimate = sequence_tv(np.log1p(share * (ratio - 1)), confidence=config.confidence)
        found[BOUNDS[3]].append(estimate.interval)
        found[BOUNDS[4]].append(estimate.hoeffding)
    for name, intervals in found.items():
        low, high = np.array(intervals).T
        covered = int(((low <= tv + 1e-12) & (high >= tv - 1e-12)).sum())
        about = {
            "law": "log-normal ratio",
            "V": None,
            "case": tv,
            "bound": name,
            "n": n,
            "runs": config.sequence_runs,
            "tv": tv,
        }
        yield about | {"covered": covered, "median": float(np.median(high)), "null_value": 0.0}


def _tv(p: Floats, q: Floats) -> float:
    return float(0.5 * np.abs(p - q).sum())


def _judge(recorder: Recorder, rows: list[dict[str, Any]], config: Config) -> None:
    """One check a bound: no case's coverage is significantly below the stated confidence."""
    confidence = 1 - config.doubt / len(rows)
    for row in rows:
        row["interval"] = binomial_interval(row["covered"], row["runs"])
        row["short"] = binomial_interval(row["covered"], row["runs"], confidence=confidence)[1] < config.confidence
    for name in dict.fromkeys(row["bound"] for row in rows):
        own = [row for row in rows if row["bound"] == name]
        covered, runs = (sum(row[key] for row in own) for key in ("covered", "runs"))
        recorder.check(
            f"{name}: covers in {config.confidence:.0%} of runs or more "
            f"({covered / runs:.1%} of {runs:,}, {len(own)} cases)",
            not any(row["short"] for row in own),
        )
    worst = max((row for row in rows if "plugin" in row and row["case"] == 0), key=lambda row: row["plugin"])
    recorder.check(
        f"the plug-in estimate reports TV {worst['plugin']:.2f} for a right sampler, more than the upper bound",
        worst["plugin"] > worst["median"],
    )
