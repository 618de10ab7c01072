"""What a run costs: model runs against theory, component frequencies, and tokens a second by batch size.

Absolute speeds belong to the machine; the record keeps ratios within one run, medians of interleaved
repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from me_stats import CESampler, MESampler
from me_stats.equivalence import tv_upper_bound_cells
from me_stats.goodness import chi_square_gof
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.trace import Trace

NAME, TITLE = "generation", "Generations by CE and ME: cost, component frequencies, speed by batch"


@dataclass(frozen=True)
class Config:
    """Batch sizes to compare and how often; `required` is the least gain from the largest batch."""

    models: tuple[str, ...] = SIBLINGS
    batches: tuple[int, ...] = (1, 64)
    steps: int = 24
    repeats: int = 3
    required: float | None = None
    level: float = 1e-6
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Time both samplers at each batch size, interleaved, and count what they ran."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    ensemble, label = setting.ensemble, setting.label
    k = len(ensemble.components)
    samplers = {"ME": MESampler(ensemble), "CE": CESampler(ensemble)}
    cells = [(name, batch) for batch in config.batches for name in samplers]
    speeds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    traces: dict[tuple[str, int], Trace] = {}
    for name, _ in cells[:2]:
        samplers[name].sample(setting.prompts[:1], max_new_tokens=4)  # warm-up
    for repeat in range(config.repeats):
        for i, (name, batch) in enumerate(cells):
            progress((repeat + i / len(cells)) / config.repeats, f"{name}, batch {batch}")
            prompts = [setting.prompts[j % len(setting.prompts)] for j in range(min(batch, len(setting.prompts)))]
            n = max(1, batch // len(prompts))
            start = time.perf_counter()
            trace = samplers[name].sample(prompts, n=n, max_new_tokens=config.steps, seed=config.seed + repeat)
            speeds[name, batch].append(int(trace.lengths.sum()) / (time.perf_counter() - start))
            traces[name, batch] = trace
    surplus = config.device != "cpu" and bool(ensemble.vocabulary.eos)
    rows = [_row(name, batch, k, traces[name, batch], speeds[name, batch]) for name, batch in cells]
    for row in rows:
        laws = "at least " * surplus + ("one law" if row["sampler"] == "ME" else f"{k} laws")
        recorder.check(
            f"{row['sampler']} reads {laws} a token ({label}, batch {row['batch']})",
            # On an accelerator ended rows leave once in some steps, and are read until then.
            row["reads"] >= row["reads_in_theory"] if surplus else row["reads"] == row["reads_in_theory"],
        )
    single = [row for row in rows if row["batch"] == 1]
    forwards = {row["sampler"]: row["forwards"] / row["steps"] for row in single}
    if forwards:
        exact_count = forwards["ME"] == 1 and forwards["CE"] == k
        recorder.check(f"at batch 1 ME runs 1 model a step and CE {k} ({label})", exact_count)
    frequencies = _frequencies(recorder, traces["ME", config.batches[-1]], ensemble, label, config)
    gain = _gain(recorder, rows, config, label)
    return recorder.finish({"label": label, "rows": rows, "components": frequencies, "batch_gain": gain})


def _row(name: str, batch: int, k: int, trace: Trace, speeds: list[float]) -> dict[str, Any]:
    lengths = trace.lengths.numpy()
    # Before the first token all rows of a prompt share one law per component that any of them drew.
    later = int((lengths - 1).sum())
    first = trace.prompt_index.numpy()
    drawn = trace.components
    if name == "ME" and drawn is not None:
        shared = len({(p, c) for p, c in zip(first.tolist(), drawn[:, 0].tolist(), strict=True)})
    else:
        shared = k * len(np.unique(first))
    return {
        "sampler": name,
        "batch": batch,
        "steps": int(lengths.max()),
        "tokens": int(lengths.sum()),
        "tokens_per_second": median(speeds),
        "spread": [min(speeds), max(speeds)],
        "forwards": trace.cost.forwards,
        "tokens_forwarded": trace.cost.tokens_forwarded,
        "reads": trace.cost.reads,
        "reads_in_theory": shared + later * (1 if name == "ME" else k),
    }


def _frequencies(recorder: Recorder, trace: Trace, ensemble: Any, label: str, config: Config) -> dict[str, Any]:
    weights = ensemble.mixing.weights.numpy()
    drawn = trace.components.numpy()  # type: ignore[union-attr]
    counts = np.bincount(drawn[drawn >= 0], minlength=len(weights))
    test = chi_square_gof(counts, weights, level=config.level)
    bound = tv_upper_bound_cells(counts, weights)
    recorder.check(f"component frequencies follow λ ({label}, p = {test.pvalue:.3g})", test.pvalue > config.level)
    return {"counts": counts, "weights": weights, "pvalue": test.pvalue, "tv_upper": bound.upper}


def _gain(recorder: Recorder, rows: list[dict[str, Any]], config: Config, label: str) -> float | None:
    speed = {row["batch"]: row["tokens_per_second"] for row in rows if row["sampler"] == "ME"}
    if len(speed) < 2:
        return None
    gain: float = speed[max(speed)] / speed[min(speed)]
    if config.required is not None:
        recorder.check(
            f"ME: batch {max(speed)} gives {gain:.1f} × the tokens a second of batch {min(speed)} ({label})",
            gain >= config.required,
        )
    return gain
