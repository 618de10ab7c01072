"""Transformers' own `generate`, judged by the same checks that anyone can run on their sampler.

Five ways to call it on two small models, each with the law that its user would expect: plain sampling, plain sampling
with what stays in force silently, speculative sampling, its mixture of two models (`assistant_ensemble_weight`), and
that mixture where every token is drafted: drafts are never cut short, and the last token, which is never drafted, is
asked for and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats import ConstantMixing, Ensemble
from me_stats.models import LanguageModel
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.testing import Generate, check_sampler
from me_stats.trace import score
from me_stats.weights import fit_weights

NAME, TITLE = "generate_judged", "Transformers' generate, judged"


@dataclass(frozen=True)
class Config:
    """`rows` continuations of each prompt for plain calls, `assisted_rows` for those that take one row at a time."""

    models: tuple[str, str] = SIBLINGS
    weight: float = 0.6
    prompts: int = 2
    rows: int = 1000
    assisted_rows: int = 150
    steps: int = 16
    level: float = 1e-6
    seed: int = 0


@dataclass(frozen=True)
class _Case:
    name: str
    call: str
    law: LanguageModel
    claim: str
    sampler: Any
    rows: int


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Judge each way to call generate, and estimate the weight that its rows really have."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder, weights=(config.weight, 1 - config.weight))
    target, assistant = setting.ensemble.components
    prompts = [tuple(setting.ensemble.vocabulary.encode(p)) for p in setting.prompts[: config.prompts]]
    assisted: dict[str, Any] = {"assistant_model": assistant, "top_k": 0}
    cases = [
        _Case("plain", "do_sample=True, top_k=0", target, "the model's law", Generate(target, top_k=0), config.rows),
        _Case("silent top-k", "do_sample=True", target, "the model's law", Generate(target), config.rows),
        _Case(
            "speculative", "assistant_model, top_k=0", target, "the target's law", Generate(target, **assisted),
            config.assisted_rows,
        ),
        _Case(
            "ensemble weight",
            f"assistant_model, assistant_ensemble_weight={config.weight}, top_k=0",
            setting.ensemble,
            f"{config.weight:g} target + {1 - config.weight:g} assistant",
            Generate(target, assistant_ensemble_weight=config.weight, **assisted),
            config.assisted_rows,
        ),
        _Case(
            "all drafted",
            f"assistant_ensemble_weight={config.weight}, no confidence threshold, one token more",
            setting.ensemble,
            f"{config.weight:g} target + {1 - config.weight:g} assistant",
            _all_drafted(Generate(target, assistant_ensemble_weight=config.weight, **assisted), assistant),
            config.assisted_rows,
        ),
    ]  # fmt: skip
    results = []
    both = Ensemble([target, assistant], ConstantMixing([0.5, 0.5]))
    for i, case in enumerate(cases):
        progress(i / len(cases), f"generate({case.call})")
        results.append(_judge(case, both, prompts, config))
    _check(recorder, {result["name"]: result for result in results}, config)
    return recorder.finish({"label": setting.label, "cases": results})


def _all_drafted(generate: Generate, assistant: Any) -> Callable[..., list[list[int]]]:
    """`generate` with drafts that reach past the end: the token after a draft, and the last one, are not mixed."""

    def sampler(prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> list[list[int]]:
        # Both settings are read from the assistant's own generation config, whatever the call says.
        own = assistant.network.generation_config
        before = own.assistant_confidence_threshold, own.num_assistant_tokens
        own.assistant_confidence_threshold, own.num_assistant_tokens = 0.0, max_new_tokens + 1
        try:
            rows = generate(prompts, max_new_tokens=max_new_tokens + 1, seed=seed)
        finally:
            own.assistant_confidence_threshold, own.num_assistant_tokens = before
        return [row[:max_new_tokens] for row in rows]

    return sampler


def _judge(case: _Case, both: Ensemble, prompts: list[tuple[int, ...]], config: Config) -> dict[str, Any]:
    kept: list[tuple[tuple[int, ...], list[int]]] = []

    def sampler(asked: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> list[list[int]]:
        rows = case.sampler(asked, max_new_tokens=max_new_tokens, seed=seed)
        kept.extend(zip(asked, rows, strict=True))
        return rows

    # Everything is drawn, so that a departure is sized and not only found.
    result = check_sampler(
        sampler, case.law, prompts, max_new_tokens=config.steps, n=case.rows, level=config.level, seed=config.seed,
        stop_early=False, on_fail="return",
    )  # fmt: skip
    scored = score(both, [prompt for prompt, _ in kept], [row for _, row in kept]).component_log_probs.numpy()
    written = np.array([[step < len(row) for step in range(scored.shape[1])] for _, row in kept])
    weights = [effective_weight(scored[written[:, step], step]) for step in range(scored.shape[1])]
    return {
        "name": case.name,
        "call": case.call,
        "claim": case.claim,
        "pvalue": result.pvalue,
        "passed": result.passed,
        "worst": result.worst.name,
        "tokens": result.tokens,
        "tv_upper_first": result.tv_upper,
        "tv_lower_step": result.step_tv_lower,
        "min_detectable_tv": result.min_detectable_tv,
        "weight": effective_weight(scored[written]),
        "weight_by_step": weights,
    }


def effective_weight(log_probs: np.ndarray) -> dict[str, float]:
    """Weight of the first of two components that best explains tokens with log P_i (n, 2), and its 95% interval."""
    fit = fit_weights(log_probs)
    low, high = fit.intervals[0].tolist()
    return {"value": float(fit.weights[0]), "low": low, "high": high}


def _check(recorder: Recorder, cases: dict[str, dict[str, Any]], config: Config) -> None:
    plain, silent = cases["plain"], cases["silent top-k"]
    recorder.check(
        f"generate(top_k=0) follows the model (p = {plain['pvalue']:.2g}, {plain['tokens']:,} tokens)", plain["passed"]
    )
    recorder.check(
        f"its silent default top_k=50 is caught (p = {silent['pvalue']:.1e}, {silent['worst']})", not silent["passed"]
    )
    speculative = cases["speculative"]
    recorder.check(
        f"speculative sampling follows the target (p = {speculative['pvalue']:.2g})", speculative["passed"]
    )  # fmt: skip
    repaired = cases["all drafted"]
    recorder.check(
        f"the mixture holds where every token is drafted (p = {repaired['pvalue']:.2g}, weight "
        f"{repaired['weight']['value']:.3f})",
        repaired["passed"],
    )
    # A verdict on someone else's code, which may change: stated, not demanded.
    mixture = cases["ensemble weight"]
    found, weight = "rejected" if not mixture["passed"] else "not rejected", mixture["weight"]
    recorder.check(
        f"assistant_ensemble_weight={config.weight} is {found} as a mixture (p = {mixture['pvalue']:.1e}); its rows "
        f"have weight {weight['value']:.3f} [{weight['low']:.3f}, {weight['high']:.3f}] on the target",
        weight["high"] - weight["low"] < 0.2,
    )
