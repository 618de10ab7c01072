"""C1 on transformers: many draws of one step by the real samplers, against the mixture from a fresh prefill.

The null law never touches the sampler's session, so a wrong cache, wrong weights and a wrong draw all show.
A planted error in λ shows what the test can see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler
from me_stats.divergence import tv_distance
from me_stats.equivalence import tv_upper_bound, tv_upper_bound_cells
from me_stats.goodness import Portfolio
from me_stats.models.ensemble import mix
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.samplers import Sampler

NAME, TITLE = "per_step", "One step of CE and ME on transformers, against the exact mixture"
_CHUNK = 250_000  # rows of one call: a few hundred MB of random numbers and tokens
_SHOWN = 40  # tokens kept for the figure


@dataclass(frozen=True)
class Config:
    """What to draw: `draws` tokens per prompt and sampler; `shift` is the planted error in λ_1."""

    models: tuple[str, ...] = SIBLINGS
    prompts: int = 4
    draws: int = 500_000
    shift: float = 0.05
    confidence: float = 0.95
    level: float = 1e-6
    margin: float = 0.01
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Draw, count, test and bound, prompt by prompt."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    ensemble = setting.ensemble
    weights = ensemble.mixing.weights  # type: ignore[attr-defined]
    shifted = weights.clone()
    shifted[0] += config.shift
    shifted[1] -= config.shift
    samplers: dict[str, Sampler] = {
        "ME": MESampler(ensemble),
        "CE": CESampler(ensemble),
        "planted": MESampler(Ensemble(ensemble.components, ConstantMixing(shifted))),
    }
    prompts = setting.prompts[: config.prompts]
    # All bounds hold together at the stated confidence: each takes its share of the error.
    alone = 1 - (1 - config.confidence) / len(prompts)
    rows = []
    for p, prompt in enumerate(prompts):
        ids = ensemble.vocabulary.encode(prompt)
        laws = [component.log_probs([ids]).double().cpu() for component in ensemble.components]
        log_p = mix(laws, weights.log()[None])[0]
        log_p = log_p - log_p.logsumexp(-1)
        probs = log_p.exp().numpy()
        test = Portfolio.from_null(log_p.numpy(), np.stack([law[0].numpy() for law in laws]))
        row: dict[str, Any] = {"prompt": prompt, "component_tv": float(tv_distance(laws[0], laws[1])[0])}  # type: ignore[index]
        for s, (name, sampler) in enumerate(samplers.items()):
            progress((p + s / len(samplers)) / len(prompts), f"{name}, prompt {p + 1} of {len(prompts)}")
            counts, chosen = _count(sampler, prompt, config, len(weights))
            verdict = test.test(counts, level=config.level)
            row[name] = {
                "pvalue": verdict.pvalue,
                "worst": verdict.worst.name,
                "min_detectable_tv": verdict.min_detectable_tv,
            }
            if name != "planted":
                bound = tv_upper_bound(counts, probs, confidence=alone)
                row[name] |= {"tv_upper": bound.upper, "tv_null_value": bound.null_value}
            if name == "ME":
                cells = tv_upper_bound_cells(chosen, weights.numpy(), confidence=alone)
                row["components"] = {
                    "frequencies": (chosen / chosen.sum()).tolist(),
                    "weights": weights.tolist(),
                    "tv_upper": cells.upper,
                }
            if p == 0 and name != "planted":
                top = np.argsort(-probs)[:_SHOWN]
                row.setdefault("top", {"probs": probs[top].tolist(), "tokens": _names(ensemble, top)})
                row["top"][name] = (counts[top] / counts.sum()).tolist()
        rows.append(row)
    _judge(recorder, rows, config, setting.label)
    return recorder.finish({"rows": rows, "label": setting.label, "vocabulary": ensemble.vocabulary.size})


def _count(sampler: Sampler, prompt: Any, config: Config, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of tokens (V,) and of components (K,) over all draws of one prompt."""
    counts, chosen = np.zeros(sampler.model.vocabulary.size), np.zeros(k)
    for rows in _chunks(config.draws):
        trace = sampler.sample([prompt], n=len(rows), max_new_tokens=1, seed=config.seed, rows=rows)
        counts += np.bincount(trace.tokens[:, 0].numpy(), minlength=len(counts))
        if trace.components is not None:
            chosen += np.bincount(trace.components[:, 0].numpy(), minlength=k)
    return counts, chosen


def _chunks(draws: int) -> Iterator[np.ndarray]:
    for start in range(0, draws, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, draws))


def _names(ensemble: Ensemble, tokens: np.ndarray) -> list[str]:
    return [ensemble.vocabulary.decode([token]) for token in tokens]


def _judge(recorder: Recorder, rows: list[dict[str, Any]], config: Config, label: str) -> None:
    for name in ("ME", "CE"):
        upper = max(row[name]["tv_upper"] for row in rows)
        pvalue = min(1.0, len(rows) * min(row[name]["pvalue"] for row in rows))
        visible = max(row[name]["min_detectable_tv"] for row in rows)
        power = f"sees TV {visible:.4f} on its best partition with power 0.8"
        if math.isinf(visible):
            power = "has no power at some prompt: too few draws, or one token has all the mass"
        held = pvalue > config.level and upper <= config.margin
        recorder.find(
            claim="C1",
            statement=f"{name}: one step over the whole vocabulary, {len(rows)} prompts",
            models=label,
            n=f"{len(rows)} × {config.draws:,} draws",
            statistic=f"portfolio p = {pvalue:.3g}",
            tv_upper=upper,
            bound=f"{config.confidence:.0%} confidence, joint",
            held=held,
            caveat=f"a test at level {config.level:g} {power}",
        )
    planted = max(row["planted"]["pvalue"] for row in rows)
    recorder.check(
        f"λ off by {config.shift} is rejected at every prompt ({label}, p ≤ {planted:.1e})", planted < config.level
    )
    share = max(row["components"]["tv_upper"] for row in rows)
    recorder.check(f"component frequencies within {share:.4f} of λ in TV ({label})", share < config.margin)
