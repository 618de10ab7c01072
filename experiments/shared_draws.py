"""ME whose batch shares its component draws: what it saves, what it correlates, and which tests stay right.

One component uniform per step for all rows of a batch (``MESampler(shared_rows=B)``) leaves every row's law alone and
makes the batch one forward a step. The rows then depend on each other: on toys their design effect has a closed form,
1 + (B-1) S with S the share of the component path in the variance, and tests that count rows raise false alarms that
tests which count batches do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler
from me_stats.dependence import clustered_difference, design_effect
from me_stats.equivalence import binomial_interval
from me_stats.exact import sampler_law, sequence_law
from me_stats.martingale import martingale_portfolio
from me_stats.models import MarkovModel, TableModel
from me_stats.per_sequence import sequence_tests, variance_ratio
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.sensitivity.readings import distinct, repetition
from me_stats.steps import collect_steps
from me_stats.trace import Trace
from me_stats.variance import exact_split

NAME, TITLE = "shared_draws", "Component draws shared by a batch: design effect, false alarms, forwards"
NAIVE = ("Welch's t on rows", "Kolmogorov-Smirnov on rows", "rows relabelled", "variance ratio of rows")
CORRECTED = ("clustered difference", "whole groups relabelled", "one row per group", "clustered log variances")
_STRONG = ("clustered difference", "whole groups relabelled")  # these look for a shift, in all rows
# A name, the toy, and what ME with shared draws is compared with.
WORLDS = (("coins", "coins, λ = .5", "ME"), ("chains", "chains", "ME"), ("chains, against CE", "chains", "CE"))

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Config:
    """Design effects are measured on `groups` of B rows each, B in `batches`, or more to make up `rows`.

    Their 95% intervals must cover in `coverage` of the runs: a jackknife of few small batches with long tails covers
    less than it says. Tests compare `test_groups` batches of `test_batch` rows a side. `doubt` is the chance that right
    code fails the checks.
    """

    models: tuple[str, ...] = SIBLINGS
    batches: tuple[int, ...] = (2, 8, 32)
    groups: int = 80
    rows: int = 640
    coverage_runs: int = 200
    coverage: float = 0.9
    runs: int = 1000
    power_runs: int = 200
    test_batch: int = 16
    test_groups: int = 20
    permutations: int = 199
    level: float = 0.05
    shift: float = 0.25
    batch: int = 16
    sibling_groups: int = 80
    steps: int = 64
    timed_groups: int = 4
    repeats: int = 3
    doubt: float = 1e-6
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Toy:
    """An ensemble that can be enumerated, and T."""

    ensemble: Ensemble
    steps: int

    def values(self, sampler: Any, rows: int, seed: int) -> Floats:
        """F, the sum of a row's token ids, of each row (N,)."""
        tokens = sampler.sample([0], n=rows, max_new_tokens=self.steps, seed=seed).tokens
        return np.asarray(tokens.clamp(min=0).sum(1).double().numpy())


def toys() -> dict[str, Toy]:
    """Two coins at two λ, chains without and with an end, and components of equal mean, which no path moves."""
    coins = [TableModel([[1 - p, p]], order=0) for p in (0.1, 0.9)]
    chains = [MarkovModel.random(3, seed=seed, concentration=0.5) for seed in (0, 1)]
    ending = [MarkovModel.random(3, seed=seed, eos=(2,)) for seed in (4, 5)]
    even = [TableModel([law], order=0) for law in ([0.5, 0.0, 0.5], [0.1, 0.8, 0.1])]
    return {
        "coins, λ = .5": Toy(Ensemble(coins, ConstantMixing([0.5, 0.5])), 8),
        "coins, λ = .9": Toy(Ensemble(coins, ConstantMixing([0.9, 0.1])), 8),
        "chains": Toy(Ensemble(chains, ConstantMixing([0.5, 0.5])), 6),
        "chains that end": Toy(Ensemble(ending, ConstantMixing([0.4, 0.6])), 6),
        "equal means": Toy(Ensemble(even, ConstantMixing([0.5, 0.5])), 5),
    }


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Walk every path, measure design effects, count false alarms, then run the transformers."""
    recorder = Recorder(NAME, TITLE, config)
    known = toys()
    progress(0.0, "every path of a row")
    laws = {name: _row_law(toy) for name, toy in known.items()}
    progress(0.02, "design effects")
    effects = [
        _design_effects(name, toy, batch, config) for name, toy in known.items() for batch in config.batches
    ]  # fmt: skip
    alarms = []
    for i, (label, name, other) in enumerate(WORLDS):
        progress(0.2 + 0.45 * i / len(WORLDS), f"tests of two right samplers: {label}")
        alarms += _alarms(label, known[name], other, config)
    progress(0.65, "transformers")
    siblings = _siblings(recorder, config)
    _judge(recorder, laws, effects, alarms, siblings, config)
    return recorder.finish({"laws": laws, "effects": effects, "alarms": alarms, "siblings": siblings})


def _row_law(toy: Toy) -> float:
    """TV between a row of shared draws, by every path of the sampler, and the ensemble's law; at most 4 tokens."""
    steps = min(toy.steps, 4)
    law = sequence_law(toy.ensemble, [0], max_new_tokens=steps)
    walks = [sampler_law(MESampler(toy.ensemble, shared_rows=rows), [0], max_new_tokens=steps) for rows in (2, 16)]
    return max(walk.tv_distance(law) for walk in walks)


def _design_effects(name: str, toy: Toy, batch: int, config: Config) -> dict[str, Any]:
    """Measured design effects of many runs, each with its interval, against 1 + (B-1) S."""
    share = exact_split(toy.ensemble, [0], sum, max_new_tokens=toy.steps).share
    runs, rows = config.coverage_runs, batch * max(config.groups, config.rows // batch)
    values = toy.values(MESampler(toy.ensemble, shared_rows=batch), runs * rows, config.seed)
    groups = np.arange(rows) // batch
    found = [design_effect(values[begin : begin + rows], groups) for begin in range(0, runs * rows, rows)]
    expected = 1 + (batch - 1) * share
    covered = sum(one.interval[0] <= expected <= one.interval[1] for one in found)
    measured = sorted(one.value for one in found)
    return {
        "toy": name, "B": batch, "groups": rows // batch, "T": toy.steps, "share": share, "expected": expected,
        "runs": runs, "covered": covered, "median": median(measured),
        "spread": [float(np.quantile(measured, q)) for q in (0.025, 0.975)],
    }  # fmt: skip


def _alarms(label: str, toy: Toy, other: str, config: Config) -> list[dict[str, Any]]:
    """How often each test rejects two right samplers, and a wrong λ."""
    batch, groups = config.test_batch, np.arange(config.test_groups * config.test_batch) // config.test_batch
    weights = toy.ensemble.mixing.log_weights([()])[0].exp().numpy()
    moved = weights + np.array([-config.shift, config.shift])
    wrong = Ensemble(toy.ensemble.components, ConstantMixing(moved))
    shared = MESampler(toy.ensemble, shared_rows=batch)
    same = CESampler(toy.ensemble) if other == "CE" else shared
    counts = {"right": dict.fromkeys((*NAIVE, *CORRECTED), 0), "wrong": dict.fromkeys(CORRECTED, 0)}
    for case, runs, sampler in (
        ("right", config.runs, shared),
        ("wrong", config.power_runs, MESampler(wrong, shared_rows=batch)),
    ):
        x = toy.values(same, runs * len(groups), config.seed + 1).reshape(runs, -1)
        y = toy.values(sampler, runs * len(groups), config.seed + 2).reshape(runs, -1)
        # Rows of CE share nothing; each is a group of its own.
        x_groups = np.arange(len(groups)) if other == "CE" else groups
        rng = np.random.default_rng([config.seed, runs])
        for a, b in zip(x, y, strict=True):
            pvalues = _corrected(a, b, x_groups, groups, config, rng)
            pvalues |= _naive(a, b, config, rng) if case == "right" else {}
            for test, pvalue in pvalues.items():
                counts[case][test] += pvalue <= config.level
    return [
        {
            "world": label, "test": test, "corrected": test in CORRECTED, "runs": config.runs, "alarms": alarms,
            "power_runs": config.power_runs, "found": counts["wrong"].get(test),
        }
        for test, alarms in counts["right"].items()
        if not (other == "CE" and test == "whole groups relabelled")
    ]  # fmt: skip


def _naive(x: Floats, y: Floats, config: Config, rng: np.random.Generator) -> dict[str, float]:
    """P-values that count rows."""
    options: dict[str, Any] = {"level": config.level, "permutations": config.permutations, "rng": rng}
    ratio = variance_ratio(x, y, confidence=1 - config.level).interval
    return {
        "Welch's t on rows": float(stats.ttest_ind(x, y, equal_var=False).pvalue),
        "Kolmogorov-Smirnov on rows": float(stats.ks_2samp(x, y, method="asymp").pvalue),
        "rows relabelled": sequence_tests({"F": (x, y)}, **options).pvalue,
        "variance ratio of rows": 0.0 if not ratio[0] <= 1 <= ratio[1] else 1.0,
    }


def _corrected(
    x: Floats, y: Floats, x_groups: Ints, y_groups: Ints, config: Config, rng: np.random.Generator
) -> dict[str, float]:
    """P-values that count groups; whole groups are relabelled where both sides have them."""
    options: dict[str, Any] = {"level": config.level, "permutations": config.permutations, "rng": rng}
    groups: dict[str, Any] = {"x_groups": x_groups, "y_groups": y_groups}
    single = tuple(v[np.unique(g, return_index=True)[1]] for v, g in ((x, x_groups), (y, y_groups)))
    found = {
        "clustered difference": clustered_difference(x, y, **groups).pvalue,
        "clustered log variances": clustered_difference(x, y, of="log variance", **groups).pvalue,
        "one row per group": sequence_tests({"F": (single[0], single[1])}, **options).pvalue,
    }
    if len(np.unique(x_groups)) < len(x):
        found["whole groups relabelled"] = sequence_tests({"F": (x, y)}, **groups, **options).pvalue
    return found


def _siblings(recorder: Recorder, config: Config) -> dict[str, Any]:
    """Design effects of row statistics within prompts, the tests of one row per group, forwards and speed."""
    setting = open_recorded(recorder)
    batch, ensemble = config.batch, setting.ensemble
    # Every batch holds all prompts in turn, as a server's would.
    starts = [setting.prompts[i % len(setting.prompts)] for i in range(config.sibling_groups * batch)]
    prompt = np.arange(len(starts)) % len(setting.prompts)
    options: dict[str, Any] = {"max_new_tokens": config.steps, "batch_size": batch}
    trace = MESampler(ensemble, shared_rows=batch).sample(starts, seed=config.seed, **options)
    steps = collect_steps(ensemble, trace.row_prompts(), trace.sequences())
    rows, lengths = trace.sequences(), trace.lengths.double().numpy()
    values = {
        "log-probability": steps.log_p.sum(1),
        "mean entropy": steps.entropy.sum(1) / lengths,
        "length": lengths,
        "different tokens": np.array([distinct(row) for row in rows]),
        "repeated bigrams": np.array([repetition(row) for row in rows]),
    }
    effects = []
    for name, column in values.items():
        within = column - (np.bincount(prompt, column) / np.bincount(prompt))[prompt]
        if np.ptp(within) > 0:
            found = design_effect(within, trace.groups)
            effects.append({"statistic": name, "value": found.value, "interval": found.interval})
    single = trace.one_per_group()
    tested = martingale_portfolio(
        collect_steps(ensemble, single.row_prompts(), single.sequences()), np.random.default_rng(config.seed),
        level=config.doubt,
    )  # fmt: skip
    timed = starts[: config.timed_groups * batch]
    speeds: dict[int, list[float]] = {1: [], batch: []}
    for repeat in range(config.repeats):
        for shared, seen in speeds.items():
            begin = time.perf_counter()
            # Rows at one step: what sharing saves alone, without what drifting apart saves.
            sampler = MESampler(ensemble, shared_rows=shared, lockstep=True)
            drawn = sampler.sample(timed, seed=config.seed + repeat, **options)
            seen.append(int(drawn.lengths.sum()) / (time.perf_counter() - begin))
            if shared == 1:
                alone = drawn
    return {
        "label": setting.label, "B": batch, "rows": len(starts), "T": config.steps, "effects": effects,
        "pvalue": tested.pvalue, "detects": tested.worst.min_detectable, "worst": tested.worst.name,
        "K": len(ensemble.components), "batches": config.sibling_groups,
        "steps": _batch_steps(trace, batch), "forwards": trace.cost.forwards,
        "forwards_per_step_alone": alone.cost.forwards / _batch_steps(alone, batch),
        "forwards_per_token": trace.cost.forwards / int(trace.lengths.sum()),
        "forwards_per_token_alone": alone.cost.forwards / int(alone.lengths.sum()),
        "speed_ratio": median(speeds[batch]) / median(speeds[1]),
        "speeds": {str(shared): [min(seen), max(seen)] for shared, seen in speeds.items()},
    }  # fmt: skip


def _batch_steps(trace: Trace, batch: int) -> int:
    """Steps that all batches ran: the longest row of each."""
    lengths = trace.lengths.numpy()
    return int(sum(lengths[begin : begin + batch].max() for begin in range(0, len(lengths), batch)))


def _judge(
    recorder: Recorder, laws: dict[str, float], effects: list[dict[str, Any]], alarms: list[dict[str, Any]],
    siblings: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    doubt = config.doubt / (len(effects) + 2 * len(alarms))
    worst = max(laws.values())
    _find(
        recorder, statement="a row of shared component draws has the law of the ensemble", models="toys",
        n=f"{len(laws)} ensembles, every path", statistic=f"largest TV {worst:.1e}", tv_upper=worst, bound="exact",
        held=worst < 1e-12, caveat="one row at a time: rows of a batch depend on each other",
    )  # fmt: skip
    for row in effects:
        row["short"] = binomial_interval(row["covered"], row["runs"], confidence=1 - doubt)[1] < config.coverage
    covered, runs = (sum(row[key] for row in effects) for key in ("covered", "runs"))
    least = min(row["covered"] / row["runs"] for row in effects)
    largest = max(effects, key=lambda row: row["expected"])
    _find(
        recorder, statement="the design effect of a batch is 1 + (B-1) S, S the share of the component path",
        models="toys", n=f"{runs:,} runs of {config.groups} or more batches, {len(effects)} cases",
        statistic=f"95% intervals cover the closed form in {covered / runs:.1%} of runs, least in {least:.1%}",
        tv_upper=None, bound="coverage of 95% intervals, counted", held=not any(row["short"] for row in effects),
        caveat=(
            f"sums of tokens; the largest effect is {largest['expected']:.1f} at B = {largest['B']}; coverage "
            f"significantly below {config.coverage:.0%} would fail"
        ),
    )  # fmt: skip
    for row in alarms:
        row["interval"] = binomial_interval(row["alarms"], row["runs"])
        low = binomial_interval(row["alarms"], row["runs"], confidence=1 - doubt)[0]
        row["above"] = low > config.level
        found = row["found"]
        row["power"] = None if found is None else found / row["power_runs"]
    corrected = [row for row in alarms if row["corrected"]]
    naive = [row for row in alarms if not row["corrected"]]
    rates = [row["alarms"] / row["runs"] for row in naive]
    fooled = [
        binomial_interval(sum(own), config.runs * len(own), confidence=1 - doubt)[0] > config.level
        for own in ([row["alarms"] for row in naive if row["test"] == test] for test in NAIVE)
    ]
    high = max(row["alarms"] / row["runs"] for row in corrected)
    _find(
        recorder, statement="tests that count batches hold their level when batches share draws", models="toys",
        n=f"{config.runs:,} runs, {config.test_groups} batches of {config.test_batch} rows a side",
        statistic=(
            f"false alarms at level {config.level:g}: at most {high:.3f} of runs; tests that count rows "
            f"{min(rates):.2f} to {max(rates):.2f}"
        ),
        tv_upper=None, bound="rate of false alarms, counted", held=not any(row["above"] for row in corrected),
        caveat="holds for C14 too: comparisons of long rows must count batches where draws are shared",
    )  # fmt: skip
    recorder.check(
        f"each test that counts rows raises more false alarms than its level {config.level:g} ({min(rates):.2f} to "
        f"{max(rates):.2f})",
        all(fooled),
    )
    strong = [row for row in corrected if row["test"] in _STRONG and row["found"] is not None]
    powers = [binomial_interval(row["found"], row["power_runs"], confidence=1 - doubt)[0] for row in strong]
    recorder.check(
        f"tests that count batches find λ off by {config.shift:g} in more than half of the runs "
        f"(smallest power {min(row['power'] for row in strong):.2f})",
        min(powers) > 0.5,
    )
    recorder.check(
        f"one row per batch passes the tests of whole sequences ({siblings['label']}, p = {siblings['pvalue']:.2g})",
        siblings["pvalue"] > config.doubt,
    )
    effect = max(siblings["effects"], key=lambda row: row["value"])
    # A component's first read of a prompt may take a forward of its own.
    extra = siblings["forwards"] - siblings["steps"]
    once = 0 <= extra <= siblings["K"] * siblings["batches"]
    _find(
        recorder, statement=f"a batch of {config.batch} that shares draws runs one model a step",
        models=siblings["label"], n=f"{siblings['rows']:,} rows of {config.steps} tokens",
        statistic=(
            f"{siblings['forwards'] / siblings['steps']:.2f} forwards a step with the prompts' own, "
            f"{siblings['forwards_per_step_alone']:.2f} without sharing; {siblings['speed_ratio']:.2f} times the "
            "tokens a second"
        ),
        tv_upper=None, bound="forwards are counted", held=once,
        caveat=(
            f"largest design effect {effect['value']:.2f} ({effect['interval'][0]:.2f} to {effect['interval'][1]:.2f}, "
            f"{effect['statistic']}); small models on a CPU, speed is reported and not checked"
        ),
    )  # fmt: skip


def _find(recorder: Recorder, *, held: bool, **finding: Any) -> None:
    verdict = "reproduced at small scale" if held else "refuted as stated"
    recorder.find(claim="C15", verdict=verdict, held=held, **finding)
