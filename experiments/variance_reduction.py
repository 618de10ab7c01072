"""How much of the spread between continuations is the component path, and how few rows does an expectation need?

The share of the path is measured at every step and for running sums, by pairs of runs and by several rows on one path;
both must agree. Then the same expectations are estimated with conditional means, common random numbers and control
variates: on toys against exact values, on language models for the factor in variance that each of them gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from me_stats import ConstantMixing, Ensemble, MESampler
from me_stats.equivalence import binomial_interval
from me_stats.exact import sequence_law
from me_stats.models import TableModel
from me_stats.models.ensemble import chunked_paths
from me_stats.presets import SIBLINGS, Setting, open_recorded
from me_stats.record import Record, Recorder
from me_stats.reduction import (
    Reduced,
    common_draws,
    component_sums,
    control_variates,
    law_controls,
    reduced_mean,
    token_sums,
    weight_controls,
)
from me_stats.sensitivity import ExpectationPolynomial
from me_stats.sensitivity.readings import repetition
from me_stats.shares import PathShares, nested_shares, path_shares
from me_stats.tails import detectable_shift
from me_stats.trace import Trace
from me_stats.variance import FrozenDraw

NAME, TITLE = "variance_reduction", "What the component path explains, and estimates from fewer rows"
METHODS = (
    "common random numbers",
    "controls from laws",
    "controls from the trace",
    "mean given the prefix",
    "mean over components",
)
SHARED = ("log-probability", "log-ratio of models", "white space")  # read at every step

Floats = NDArray[np.float64]

_V, _T, _EOS = 4, 5, 3  # vocabulary and steps of a toy, and its last token
_WEIGHTS = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2)}
_SHIFT = 0.25  # of a toy's weights: so many rows differ that an interval is worth something


@dataclass(frozen=True)
class Config:
    """`rows` continuations a prompt of `steps` tokens; as many again, `path_rows` on each path, for the nested design.

    `shift` of weight from the first component to the last makes the difference that common random numbers estimate. On
    `toys` of each K every estimator runs `toy_runs` times with `toy_rows` rows. `doubt` is the chance that right
    estimators fail a check, for each kind of check.
    """

    models: tuple[str, ...] = SIBLINGS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    rows: int = 96
    steps: int = 128
    path_rows: int = 8
    shift: float = 0.1
    toys: int = 2
    toy_runs: int = 150
    toy_rows: int = 120
    confidence: float = 0.95
    doubt: float = 1e-6
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Exact expectations on toys, then shares of the path and gains on language models."""
    recorder = Recorder(NAME, TITLE, config)
    cases = [(k, toy) for k in _WEIGHTS for toy in range(config.toys)]
    toys: list[dict[str, Any]] = []
    for i, (k, toy) in enumerate(cases):
        progress(0.3 * i / len(cases), f"toy {toy + 1} of {k} components")
        toys += _toy(k, toy, config)
    _check_toys(recorder, toys, config)
    progress(0.3, "continuations")
    setting = open_recorded(recorder)
    prompts = list(setting.prompts)
    sampler, seed = MESampler(setting.ensemble), 10 * config.seed + 1
    base = sampler.sample(prompts, n=config.rows, max_new_tokens=config.steps, seed=seed)
    progress(0.45, "the same component paths with other tokens")
    draw = FrozenDraw(component_seed=seed, token_seed=seed + 1)
    again = sampler.sample(prompts, n=config.rows, max_new_tokens=config.steps, draw=draw)
    progress(0.55, f"{config.path_rows} rows on each path")
    # Pairs use two runs; rows on a path come from one with twice the rows.
    count = 2 * config.rows // config.path_rows * config.path_rows
    grouped = MESampler(setting.ensemble, shared_rows=config.path_rows)
    nested = grouped.sample(prompts, n=count, max_new_tokens=config.steps, seed=seed + 2)
    space = _space(setting)
    shares = _shares(recorder, space, base, again, nested, config)
    progress(0.8, "gains")
    gains = _gains(recorder, setting, space, base, config, seed)
    _find_shares(recorder, setting, shares, config)
    _find_gains(recorder, setting, gains, toys, config)
    results = {"label": setting.label, "shares": shares, "gains": gains, "toys": toys, "nested_rows": len(nested.rows)}
    return recorder.finish(results)


# Toys


def distinct(row: Sequence[int]) -> float:
    """Different tokens in a row: neither additive nor smooth."""
    return float(len(set(row)))


def _toy(k: int, toy: int, config: Config) -> list[dict[str, Any]]:
    """One row per estimator: its exact value, and `toy_runs` estimates."""
    numbers = np.random.default_rng([config.seed, k, toy]).integers(2**31, size=k + 1).tolist()
    models = [TableModel.random(_V, seed=number, order=1, eos=(_EOS,)) for number in numbers[:k]]
    weights = np.array(_WEIGHTS[k])
    moved = _moved(weights, _SHIFT)
    ensemble, other = (Ensemble(models, ConstantMixing(w)) for w in (weights, moved))
    rewards = np.eye(_V)[0]
    by_component = np.outer(rewards, np.arange(k) == 0)
    expectation = ExpectationPolynomial.enumerate(models, [0], distinct, max_new_tokens=_T)
    at = expectation.value(weights)
    law = sequence_law(ensemble, [0], max_new_tokens=_T)
    exact = dict.fromkeys(METHODS, at)
    exact["common random numbers"] = expectation.value(moved) - at
    exact["mean given the prefix"] = float(
        np.exp(law.log_probs) @ [sum(token == 0 for token in row) for row in law.rows]
    )
    exact["mean over components"] = _written_by(ensemble, law, by_component)
    found: dict[str, list[Reduced]] = {name: [] for name in METHODS}
    for r in range(config.toy_runs):
        # Seeds of their own: toys that share random numbers would err together.
        seed = 2**20 * numbers[k] + r
        options: dict[str, Any] = {"n": config.toy_rows, "max_new_tokens": _T, "seed": seed}
        trace = MESampler(ensemble).sample([0], **options)
        values = [distinct(row) for row in trace.sequences()]
        own = weight_controls(trace)
        read = np.concatenate([own, law_controls(trace, rewards, "log_prob")], axis=1)
        shared = MESampler(other).sample([0], **options)
        for name, one in zip(
            METHODS,
            (
                common_draws(trace, shared, distinct, confidence=config.confidence),
                control_variates(values, read, confidence=config.confidence),
                control_variates(values, own, confidence=config.confidence),
                token_sums(trace, rewards, confidence=config.confidence),
                component_sums(trace, by_component, confidence=config.confidence),
            ),
            strict=True,
        ):
            found[name].append(one)
    rows = []
    for name, estimates in found.items():
        values, truth = [one.reduced.value for one in estimates], exact[name]
        rows.append(
            {
                "K": k,
                "toy": toy,
                "method": name,
                "exact": truth,
                "mean": float(np.mean(values)),
                "stderr": float(np.std(values, ddof=1)) / np.sqrt(len(values)),
                "covered": sum(one.reduced.interval[0] <= truth <= one.reduced.interval[1] for one in estimates),
                "runs": len(values),
                "factor": float(np.median([one.factor.value for one in estimates])),
            }
        )
    return rows


def _moved(weights: Floats, shift: float) -> Floats:
    return np.asarray(weights + shift * (np.arange(len(weights)) == len(weights) - 1) - shift * np.eye(len(weights))[0])


def _written_by(ensemble: Ensemble, law: Any, values: Floats) -> float:
    """E Σ_t h(m_t, x_t) over the prefixes of every sequence: Σ_i λ_i Σ_x P_i(x | prefix) h(i, x)."""
    rows, weights = law.rows, ensemble.mixing.log_weights([()])[0].exp().numpy()
    chance = np.repeat(np.exp(law.log_probs), [len(row) for row in rows])
    start, total = 0, 0.0
    for laws, _, _ in chunked_paths(ensemble, [(0,)] * len(rows), rows):
        steps = np.einsum("tkv,k,vk->t", laws.double().exp().numpy(), weights, values)
        total += float(chance[start : start + len(steps)] @ steps)
        start += len(steps)
    return total


def _check_toys(recorder: Recorder, toys: list[dict[str, Any]], config: Config) -> None:
    limit = float(stats.t.isf(config.doubt / 2 / len(toys), config.toy_runs - 1))
    for name in METHODS:
        own = [row for row in toys if row["method"] == name]
        z = max(abs(row["mean"] - row["exact"]) / row["stderr"] for row in own)
        recorder.check(f"{name}: unbiased on {len(own)} toys (largest |z| {z:.1f})", z <= limit)
        covered, runs = (sum(row[key] for row in own) for key in ("covered", "runs"))
        low, high = binomial_interval(covered, runs, confidence=1 - config.doubt / len(METHODS))
        near = low <= config.confidence + 0.02 and high >= config.confidence - 0.02
        recorder.check(f"{name}: intervals cover the exact value ({covered / runs:.1%} of {runs:,} runs)", near)
    # Rao and Blackwell's theorem, and pairs that are equal in most rows: far from 1, so no chance is spent here.
    for name in ("mean over components", "common random numbers"):
        least = min(row["factor"] for row in toys if row["method"] == name)
        recorder.check(f"{name}: lower variance on every toy (least factor {least:.2f})", least > 1)


# Shares of the path


def _per_step(space: Floats, trace: Trace) -> dict[str, Floats]:
    """(N, T) statistics of each step, 0 after the end."""
    mask = trace.mask.numpy()
    by_model = trace.component_log_probs.numpy()
    return {
        "log-probability": trace.log_probs.numpy(),
        "log-ratio of models": by_model[..., 0] - by_model[..., -1],
        "white space": np.where(mask, space[np.where(mask, trace.tokens.numpy(), 0)], 0.0),
    }


def _space(setting: Setting) -> Floats:
    """(V,) 1 for tokens that hold nothing but white space."""
    vocabulary = setting.ensemble.vocabulary
    texts = (vocabulary.decode([token]) for token in range(vocabulary.size))
    return np.array([float(bool(text) and text.isspace()) for text in texts])


def _varies(columns: Floats) -> bool:
    """Whether every step has at least eight rows that differ from most: fewer give no interval worth having."""
    return bool(((columns != np.median(columns, axis=0)).sum(0) >= 8).all())


def _shares(
    recorder: Recorder, space: Floats, base: Trace, again: Trace, nested: Trace, config: Config
) -> dict[str, Any]:
    """Both designs at every step and for running sums, and where they were compared."""
    traces = (base, again, nested)
    # Later steps have too few rows that still run.
    steps = min(int((trace.mask.double().mean(0) >= 0.25).sum()) for trace in traces)
    x, y, z = ({name: v[:, :steps] for name, v in _per_step(space, trace).items()} for trace in traces)
    paths = [
        np.where(base.mask[:, :steps] & again.mask[:, :steps], _path(trace)[:, :steps], -1) for trace in traces[:2]
    ]
    recorder.check("pairs share their component paths", bool((paths[0] == paths[1]).all()))
    prompts = base.prompt_index.numpy()
    # Steps far enough apart to be worth a test each, the last among them.
    places = np.unique(np.linspace(0, steps - 1, 9).astype(int)[1:])
    found: dict[str, Any] = {"steps": steps, "places": (places + 1).tolist()}
    names = [name for name in SHARED if all(_varies(part[name]) for part in (x, y, z))]
    worst, tests = 0.0, 2 * len(names) * len(places)
    for name in names:
        one: dict[str, Any] = {}
        for kind, cumulative in (("step", False), ("cumulative", True)):
            options: dict[str, Any] = {"cumulative": cumulative, "confidence": config.confidence}
            pairs = path_shares(x[name], y[name], groups=prompts, **options)
            rows = nested_shares(z[name], nested.groups.numpy(), groups=nested.prompt_index.numpy(), **options)
            gap = np.abs(pairs.value - rows.value) / np.hypot(pairs.stderr, rows.stderr)
            worst = max(worst, float(gap[places].max()))
            one[kind] = {"pairs": _plain(pairs), "nested": _plain(rows)}
        found[name] = one
    degrees = min(found["log-probability"]["step"][one]["n"] for one in ("pairs", "nested")) - len(base.prompts)
    limit = float(stats.t.isf(config.doubt / 2 / tests, max(1, degrees)))
    recorder.check(f"both designs give the same shares at {tests} places (largest |z| {worst:.1f})", worst <= limit)
    return found | {"largest_z": worst, "limit": limit}


def _path(trace: Trace) -> NDArray[np.int64]:
    assert trace.components is not None  # ME drew them
    return np.asarray(trace.components.numpy())


def _plain(shares: PathShares) -> dict[str, Any]:
    return {
        "value": shares.value,
        "lower": shares.lower,
        "upper": shares.upper,
        "stderr": shares.stderr,
        "n": shares.n,
    }


def _find_shares(recorder: Recorder, setting: Setting, shares: dict[str, Any], config: Config) -> None:
    held = recorder.checks["pairs share their component paths"] and shares["largest_z"] <= shares["limit"]
    for name in (name for name in SHARED if name in shares):
        ends = {
            design: {key: shares[name]["cumulative"][design][key][-1] for key in ("value", "lower", "upper", "stderr")}
            for design in ("pairs", "nested")
        }
        first, second = ends["pairs"], ends["nested"]
        width = np.divide(*(one["upper"] - one["lower"] for one in (second, first)))
        n = {design: shares[name]["cumulative"][design]["n"] for design in ends}
        recorder.find(
            claim="C14",
            statement=f"how much of the spread between continuations is due to which model wrote which token: {name}",
            models=setting.label,
            n=f"{n['pairs']} pairs; {n['nested']} paths with {config.path_rows} rows, {shares['steps']} tokens",
            statistic=f"{_interval(first)} of the variance by pairs, {_interval(second)} by rows on one path",
            tv_upper=None,
            bound=f"{config.confidence:.0%} confidence",
            held=held,
            caveat="no test of ME: CE has the same law; it is what shared component draws would correlate. "
            f"At equal cost the interval by rows on one path is {width:.2f} times as wide as that by pairs. Smallest "
            f"share found with power 0.8: {detectable_shift() * min(e['stderr'] for e in ends.values()):.2f}",
        )


def _interval(one: dict[str, float]) -> str:
    return f"{one['value']:.2f} ({one['lower']:.2f} to {one['upper']:.2f})"


# Gains


def _row_values(space: Floats, trace: Trace) -> dict[str, Floats]:
    """(N,) statistics of whole rows."""
    rows = trace.sequences()
    steps = _per_step(space, trace)
    log_probs, lengths = steps["log-probability"].sum(1), trace.lengths.numpy().astype(np.float64)
    return {
        "log-probability": log_probs,
        "log-prob. per token": log_probs / lengths,
        "log-ratio of models": steps["log-ratio of models"].sum(1),
        "white space": steps["white space"].sum(1),
        "distinct tokens": np.array([distinct(row) for row in rows]),
        "repeated 4-grams": np.array([repetition(row, size=4) for row in rows]),
        "length": lengths,
    }


def _gains(
    recorder: Recorder, setting: Setting, space: Floats, base: Trace, config: Config, seed: int
) -> list[dict[str, Any]]:
    """Each method on each statistic that it applies to."""
    values, prompts = _row_values(space, base), base.prompt_index.numpy()
    components = setting.ensemble.components
    moved = _moved(setting.ensemble.mixing.log_weights([()])[0].exp().numpy(), config.shift)
    other = MESampler(Ensemble(components, ConstantMixing(moved))).sample(
        list(setting.prompts), n=config.rows, max_new_tokens=config.steps, seed=seed
    )
    others = _row_values(space, other)
    options: dict[str, Any] = {"confidence": config.confidence}
    own = weight_controls(base, starts=(0, *range(config.steps // 4, config.steps, -(-config.steps // 4))))
    laws = law_controls(base, "log_prob", space)
    read = np.concatenate([own, laws], axis=1)
    rows: list[dict[str, Any]] = []

    def add(statistic: str, method: str, one: Reduced) -> None:
        rows.append(
            {
                "statistic": statistic,
                "method": method,
                "plain": one.plain,
                "reduced": one.reduced,
                "factor": one.factor,
            }
        )

    pvalues = []
    for name in values:
        if np.ptp(values[name]) == 0:
            continue  # the length of models that never end
        for method, controls in (("controls from the trace", own), ("controls from laws", read)):
            one = control_variates(values[name], controls, groups=prompts, **options)
            pvalues.append(one.controls_pvalue)
            add(name, method, one)
        add(name, "common random numbers", common_draws(base, other, (values[name], others[name]), **options))
    # What `token_sums` does, without two more passes over the laws.
    for column, name in enumerate(("log-probability", "white space")):
        kept = values[name] - laws[:, column]
        add(name, "mean given the prefix", reduced_mean(values[name], kept, groups=prompts, **options))
    last = np.arange(len(components)) == len(components) - 1
    add("tokens by the last model", "mean over components", component_sums(base, last.astype(float), **options))
    by_last = component_sums(base, np.outer(space, last), **options)
    add("white space by the last model", "mean over components", by_last)
    recorder.check(f"controls have mean zero (p ≥ {min(pvalues):.2g})", min(pvalues) > config.doubt)
    # Both estimate one number from the same rows: their difference has an error of its own, at most the sum.
    apart = max(
        abs(row["plain"].value - row["reduced"].value) / (row["plain"].stderr + row["reduced"].stderr) for row in rows
    )
    limit = float(stats.norm.isf(config.doubt / 2 / len(rows)))
    recorder.check(f"reduced estimates agree with plain ones (largest |z| {apart:.1f})", apart <= limit)
    return rows


def _find_gains(
    recorder: Recorder, setting: Setting, gains: list[dict[str, Any]], toys: list[dict[str, Any]], config: Config
) -> None:
    for method in METHODS:
        own = [row for row in gains if row["method"] == method]
        held = all(
            value
            for name, value in recorder.checks.items()
            if name.startswith((f"{method}:", "controls have", "reduced"))
        )
        better = [row for row in own if row["factor"].interval[0] > 1]
        worse = [row for row in own if row["factor"].interval[1] < 1]
        verdicts = "; ".join(
            f"{row['statistic']} {row['factor'].value:.2f} "
            f"({row['factor'].interval[0]:.2f} to {row['factor'].interval[1]:.2f})"
            for row in own
        )
        runs = sum(row["runs"] for row in toys if row["method"] == method)
        recorder.find(
            claim="C14",
            statement=f"rows saved by {method}: {_summary(len(better), len(worse), len(own))}",
            models=setting.label,
            n=f"{len(setting.prompts) * config.rows} rows of {config.steps} tokens; {runs:,} runs on toys",
            statistic=f"variance falls by the factor: {verdicts}",
            tv_upper=None,
            bound=f"{config.confidence:.0%} confidence, each",
            held=held,
            caveat=_CAVEATS[method],
        )


def _summary(better: int, worse: int, total: int) -> str:
    parts = [f"a gain for {better} of {total} statistics"] if better else [f"no gain for any of {total} statistics"]
    if worse:
        parts.append(f"a loss for {worse}")
    return ", ".join(parts)


_CAVEATS = {
    "common random numbers": "for the difference between two weights, not for either value",
    "controls from laws": "needs all laws along the rows; coefficients are fitted, which costs where controls explain "
    "nothing",
    "controls from the trace": "K floats a token; explains what moves with the weights, and nothing else",
    "mean given the prefix": "additive statistics only; a gain is no theorem, for terms depend on each other",
    "mean over components": "only for statistics that ask which model wrote; never a loss, by Rao and Blackwell",
}
