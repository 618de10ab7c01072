"""How everything moves with λ.

On toys the derivative of an expectation is exact: the score function and common random numbers have to agree with it.
On language models one walk over λ reads entropy, the likelihood of a mixed text, distances to λ = ½ and ME's work;
on three toys it covers the triangle of weights, where every estimate is compared with the exact value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from me_stats import ConstantMixing, Ensemble, MESampler
from me_stats.corpus import score_corpus
from me_stats.exact import sequence_law
from me_stats.models import TableModel
from me_stats.models.base import path_log_probs
from me_stats.presets import SIBLINGS, Setting, open_recorded
from me_stats.record import Record, Recorder
from me_stats.scripts import load
from me_stats.sensitivity import (
    Estimate,
    ExpectationPolynomial,
    common_random_number_difference,
    score_function_gradient,
)
from me_stats.sensitivity.readings import step_tv_sums
from me_stats.sweep import Sweep, simplex_grid, sweep
from me_stats.trace import Trace
from me_stats.weights import fit_weights, held_out_nll

NAME, TITLE = "sensitivity", "How everything moves with λ"

WEIGHTS = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2)}  # where derivatives are taken
_V, _T, _EOS = 4, 5, 3  # vocabulary and steps of a toy, and its last token
_STEP = 0.1  # of the central difference; towards every vertex it stays on the simplex
_ERROR = 1e-6  # probability that a right estimator fails, all toys together
_FAR = 6.0  # standard errors that re-weighted estimates of a sweep may be off: their own errors are estimated
# Per-token TV between two ways to compute it: batches of other shapes round otherwise.
_ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_TEXT_WEIGHTS = (0.2, 0.3, 0.5)  # that write the text of the three toys


@dataclass(frozen=True)
class Config:
    """`toys` of each K with `toy_rows` rows; a line of `points` λ with `rows` continuations a prompt of `steps` tokens.

    `text_bytes` of held-out prose and code together, and `triangle` steps along an edge for three toys.
    """

    models: tuple[str, ...] = SIBLINGS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    toys: int = 6
    toy_rows: int = 6000
    points: int = 11
    rows: int = 48
    steps: int = 40
    text_bytes: int = 16_000
    document_bytes: int = 2000
    triangle: int = 8
    triangle_rows: int = 1000
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Derivatives on toys, the triangle of three toys, then the line between two language models."""
    recorder = Recorder(NAME, TITLE, config)
    progress(0.0, "derivatives on toys")
    derivatives = [row for k in WEIGHTS for toy in range(config.toys) for row in _derivatives(k, toy, config)]
    _check_derivatives(recorder, derivatives)
    progress(0.2, "the triangle of three toys")
    triangle = _triangle(recorder, config)
    progress(0.3, "reading held-out text")
    experiment = load("experiments", "weights")
    texts = [one for one in experiment.held_out(config.text_bytes, config.document_bytes) if one.domain == "mixed"]
    setting = open_recorded(recorder)
    components = setting.ensemble.components
    if len(components) != 2:
        raise ValueError(f"models must give two components, got {len(components)}: the line joins two")
    corpus = np.asarray(score_corpus(components, texts).log_probs, dtype=np.float64)
    found = _line(setting, corpus, config, progress)
    recorder.check("the sweep's NLL is that of its weights", _same_nll(found, corpus))
    _check_line(recorder, found)
    progress(0.95, "TV of steps, by the ensemble's own laws")
    step_tv = _measured_step_tv(setting, config)
    worst = max(abs(row["formula"] - row["measured"]) for row in step_tv)
    recorder.check(
        f"TV of a step is |λ - ½| TV(P₁, P₂) (off by {worst:.1e})",
        worst <= _ROUNDING[config.dtype] and max(row["measured"] for row in step_tv) > 0,
    )
    return recorder.finish(
        {
            "label": setting.label,
            "components": experiment.component_names(config.models, 2),
            "derivatives": derivatives,
            "line": found,
            "step_tv": step_tv,
            "text": {"tokens": len(corpus), "documents": len(texts), "best": fit_weights(corpus).weights},
            "triangle": triangle,
        }
    )


def zeros(row: Sequence[int]) -> float:
    """How often token 0 was written: the quantity that derivatives are taken of."""
    return float(sum(token == 0 for token in row))


def _toys(k: int, toy: int, seed: int) -> list[TableModel]:
    numbers = np.random.default_rng([seed, k, toy]).integers(2**31, size=k)
    return [TableModel.random(_V, seed=int(number), order=1, eos=(_EOS,)) for number in numbers]


def _derivatives(k: int, toy: int, config: Config) -> list[dict[str, Any]]:
    """Towards each vertex but the last: exact, by the score function, and by common random numbers."""
    models, weights = _toys(k, toy, config.seed), np.array(WEIGHTS[k])
    polynomial = ExpectationPolynomial.enumerate(models, [0], zeros, max_new_tokens=_T)
    ensemble = Ensemble(models, ConstantMixing(weights))
    law = sequence_law(ensemble, [0], max_new_tokens=_T)
    by_law = float(np.exp(law.log_probs) @ [zeros(row) for row in law.sequences.tolist()])
    # Seeds of their own: toys that share random numbers would err together.
    seed, other = np.random.default_rng([config.seed, k, toy, 1]).integers(2**31, size=2).tolist()
    trace = MESampler(ensemble).sample([0], n=config.toy_rows, max_new_tokens=_T, seed=seed)
    scores = score_function_gradient(trace, zeros)
    rows = []
    for i, exact in enumerate(polynomial.gradient(weights)[:-1].tolist()):
        direction = np.eye(k)[i] - weights
        common = common_random_number_difference(
            models, weights, direction, _STEP, zeros, prompts=[0], n=config.toy_rows, max_new_tokens=_T, seed=other
        )
        ends = [polynomial.value(weights + sign * _STEP * direction) for sign in (-1, 1)]
        score = scores[i]
        assert score is not None  # all weights are positive
        rows.append(
            {
                "K": k,
                "toy": toy,
                "component": i,
                "exact": exact,
                "central": (ends[1] - ends[0]) / (2 * _STEP),
                "score": score,
                "common": common,
                "expectation_error": abs(by_law - polynomial.value(weights)),
                "slope_error": abs(_slope(polynomial, weights, direction) - exact),
            }
        )
    return rows


def _slope(polynomial: ExpectationPolynomial, weights: np.ndarray, direction: np.ndarray) -> float:
    """Derivative of the expectation by a small central difference, whose error is about 1e-8."""
    h = 1e-4
    return (polynomial.value(weights + h * direction) - polynomial.value(weights - h * direction)) / (2 * h)


def _check_derivatives(recorder: Recorder, rows: list[dict[str, Any]]) -> None:
    expectation = max(row["expectation_error"] for row in rows)
    recorder.check(f"exact expectations are those of the enumerated law (off by {expectation:.1e})", expectation < 1e-9)
    slope = max(row["slope_error"] for row in rows)
    recorder.check(f"exact derivatives are slopes of exact expectations (off by {slope:.1e})", slope < 1e-6)
    for k in WEIGHTS:
        own = [row for row in rows if row["K"] == k]
        limit = float(stats.norm.isf(_ERROR / 2 / len(rows)))
        for name, label, target in (
            ("score", "the score function agrees", "exact"),
            ("common", "common random numbers agree", "central"),
        ):
            z = max(_z(row[name], row[target]) for row in own)
            recorder.check(f"{label} with exact derivatives, K={k} (largest |z| {z:.1f})", z <= limit)


def _z(estimate: Estimate, exact: float) -> float:
    gap = abs(estimate.value - exact)
    return gap / estimate.stderr if estimate.stderr > 0 else float(gap > 1e-9) * 1e9


def _triangle(recorder: Recorder, config: Config) -> dict[str, Any]:
    """A sweep over all weights of three toys; every estimate has an exact value."""
    models = _toys(3, 0, config.seed)
    writer = MESampler(Ensemble(models, ConstantMixing(_TEXT_WEIGHTS)))
    text = writer.sample([0], n=config.triangle_rows, max_new_tokens=_T, seed=config.seed + 1)
    corpus = _component_scores(text)
    found = sweep(
        Ensemble(models, ConstantMixing(np.full(3, 1 / 3))), [0], simplex_grid(3, config.triangle),
        n=config.triangle_rows, max_new_tokens=_T, statistics={"zeros": zeros}, corpus=corpus, seed=config.seed,
    )  # fmt: skip
    polynomial = ExpectationPolynomial.enumerate(models, [0], zeros, max_new_tokens=_T)
    z = [_z(point.estimates["zeros"], polynomial.value(point.weights)) for point in found.points]
    read = sum(not point.drawn for point in found.points)
    recorder.check(
        f"estimates agree with exact ones at all {len(z)} λ of three toys, {read} of them re-weighted "
        f"(largest |z| {max(z):.1f})",
        max(z) <= _FAR,
    )
    recorder.check("the triangle's NLL is that of its weights", _same_nll(found, corpus))
    fit = fit_weights(corpus)
    return {
        "sweep": found,
        "largest_z": max(z),
        "agree": max(z) <= _FAR,
        "text_weights": _TEXT_WEIGHTS,
        "best": fit.weights,
        "intervals": fit.intervals,
    }


def _component_scores(trace: Trace) -> np.ndarray:
    """(n, K) log-probabilities of the tokens of a trace, without padding."""
    return np.asarray(trace.component_log_probs.numpy()[trace.mask.numpy()])


def _same_nll(found: Sweep, corpus: np.ndarray) -> bool:
    values = [point.estimates["nll"].value for point in found.points]
    return bool(np.allclose(values, [held_out_nll(corpus, point.weights) for point in found.points], atol=1e-9))


def _line(setting: Setting, corpus: np.ndarray, config: Config, progress: Callable[[float, str], None]) -> Sweep:
    grid, done = simplex_grid(2, config.points - 1), 0

    def on_point(point: Any) -> None:
        nonlocal done
        done += 1
        progress(0.4 + 0.5 * done / len(grid), f"λ = {point.weights[0]:.2f}")

    return sweep(
        setting.ensemble, list(setting.prompts), grid, n=config.rows, max_new_tokens=config.steps,
        reference=(0.5, 0.5), corpus=corpus, seed=config.seed, on_point=on_point,
    )  # fmt: skip


def _check_line(recorder: Recorder, found: Sweep) -> None:
    # TV of sequences is at most the sum of the TV of steps along the rows of either law.
    slack = min(
        point.estimates["step_tv"].interval[1] * found.max_new_tokens - point.estimates["sequence_tv"].interval[0]
        for point in found.points
    )
    recorder.check("TV of a sequence is at most the sum over its steps", slack >= 0)
    drawn = [point for point in found.points if point.drawn]
    off = max(
        abs(point.cost["forwards_per_token_measured"] / point.cost["forwards_per_token"] - 1)
        for point in drawn or [found.points[0]]
    )
    recorder.check(f"ME runs as many forwards as λ forecasts (within {off:.1%}, {len(drawn)} draws)", off <= 0.1)
    start = next((point for point in found.points if point.weights == found.reference), None)
    recorder.check(
        "distances to the reference are 0 at the reference",
        start is not None and max(start.estimates[name].value for name in ("step_tv", "sequence_tv")) < 1e-12,
    )


def _measured_step_tv(setting: Setting, config: Config) -> list[dict[str, float]]:
    """Mean TV of a step to λ = ½ along a few rows: by the formula of two components, and between ensembles' laws."""
    components = setting.ensemble.components
    middle = Ensemble(components, ConstantMixing([0.5, 0.5]))
    trace = MESampler(middle).sample(list(setting.prompts), n=1, max_new_tokens=config.steps, seed=config.seed)
    prompts, tails = trace.row_prompts(), trace.sequences()
    weights = [(0.0, 1.0), (0.25, 0.75), (0.9, 0.1)]
    tokens = float(trace.lengths.sum())
    sums = step_tv_sums(trace, weights, (0.5, 0.5)).sum(0) / tokens
    base = list(path_log_probs(middle, prompts, tails))
    rows = []
    for weight, formula in zip(weights, sums.tolist(), strict=True):
        laws = path_log_probs(Ensemble(components, ConstantMixing(weight)), prompts, tails)
        gaps = [
            (law.double().exp() - own.double().exp()).abs().sum(-1) / 2 for law, own in zip(laws, base, strict=True)
        ]
        measured = sum(float(gap.sum()) for gap in gaps) / tokens
        rows.append({"weight": weight[0], "formula": formula, "measured": measured})
    return rows
