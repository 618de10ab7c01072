"""C1 inside out: a bound on every ME step from what was measured in it, and not from a histogram of tokens.

Three things make the law of an ME step differ from the CE law: the weights that components are really drawn with, laws
that come from a cache and not from a fresh prefill, and the draw of the token. Each is measured where it happens,
and the triangle inequality adds them up (`white_box_bound`), for each conditional along generated rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from me_stats import Ensemble, MESampler, RowStreams
from me_stats.divergence import tv_distance
from me_stats.draws import BLOCK, inverse_cdf_error
from me_stats.equivalence import tv_upper_bound_cells, white_box_bound
from me_stats.models.base import open_session
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.trace import Trace

NAME, TITLE = "certificate", "White-box certificate of single steps"


@dataclass(frozen=True)
class Config:
    """`rows` generations of `steps` tokens; `component_draws` from the sampler's own stream for the weights."""

    models: tuple[str, ...] = SIBLINGS
    rows: int = 32
    steps: int = 64
    component_draws: int = 4_000_000
    confidence: float = 0.95
    margin: float = 0.01
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Measure weights, caches and draws, and add them up for every conditional."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    ensemble = setting.ensemble
    progress(0.0, "drawing components")
    weights = ensemble.mixing.log_weights([()])[0].exp().numpy()
    counts = _component_counts(ensemble, config)
    cells = tv_upper_bound_cells(counts, weights, confidence=config.confidence)
    progress(0.1, "generating with ME")
    n = max(1, config.rows // len(setting.prompts))
    trace = MESampler(ensemble).sample(setting.prompts, n=n, max_new_tokens=config.steps, seed=config.seed)
    progress(0.3, "the same rows through lazy caches and through fresh prefills")
    steps = _steps(trace)
    # Every component is charged with the worst cache seen of it, drawn at this step or not.
    cache = [
        max((step["cache_tv"] for step in steps if step["component"] == i), default=0.0) for i in range(len(weights))
    ]
    certificates = [
        white_box_bound(
            weight_error_tv=cells.upper,
            max_component_tv=min(1.0, step["component_tv"]),
            cache_tv=cache,
            weights=weights,
            draw_tv=step["draw_tv"],
        )
        for step in steps
    ]
    total = np.array([certificate.total for certificate in certificates])
    worst = certificates[int(total.argmax())]
    held = bool(total.max() <= config.margin)
    recorder.find(
        claim="C1",
        statement="ME: every step along generations, white-box certificate",
        models=setting.label,
        n=f"{len(steps):,} conditionals, {config.component_draws:,} component draws",
        statistic=f"largest certificate {total.max():.1e}",
        tv_upper=float(total.max()),
        bound=f"white box, {config.confidence:.0%} confidence on the weights",
        held=held,
        caveat=(
            f"weights {worst.weight_term:.1e} + caches {worst.cache_term:.1e} + draw {worst.draw_term:.1e}; takes the "
            "uniforms of Philox as uniform, and the caches of other steps as no worse than those seen"
        ),
    )
    stale = _stale(trace)
    recorder.check(
        f"a cache that misses one token would be certified at {stale:.2g} on average, above the margin",
        stale > config.margin,
    )
    quantiles = np.quantile(total, [0.0, 0.25, 0.5, 0.75, 1.0]).tolist()
    return recorder.finish(
        {
            "label": setting.label,
            "weights": {"counts": counts.tolist(), "lambda": weights.tolist(), "tv_upper": cells.upper},
            "cache_tv": cache,
            "draw_tv": max(step["draw_tv"] for step in steps),
            "component_tv": {"mean": float(np.mean([step["component_tv"] for step in steps]))},
            "certificate": {"quantiles": quantiles, "worst": vars(worst)},
            "stale": stale,
        }
    )


def _component_counts(ensemble: Ensemble, config: Config) -> np.ndarray:
    """Counts (K,) of the components that the sampler's own stream and draw choose."""
    log_weights = ensemble.mixing.log_weights([()])
    draw, rows = RowStreams(config.seed), np.arange(-(-config.component_draws // BLOCK))
    counts = np.zeros(log_weights.shape[1], dtype=np.int64)
    shared = torch.zeros(len(rows), dtype=torch.int64)
    for step in range(BLOCK):
        drawn = draw(log_weights, rows, step, stream="component", index=shared)
        counts += np.bincount(drawn.numpy(), minlength=len(counts))
    return counts


def _steps(trace: Trace) -> list[dict[str, Any]]:
    """For each token: TV of the law that was used from a fresh one, of its draw, and the largest between components."""
    prompts, rows = trace.row_prompts(), trace.sequences()
    fresh = [[law.cpu() for law in laws] for laws, _ in trace.model.component_paths(prompts, rows)]
    assert trace.components is not None
    sessions = [open_session(c, prompts, max_new_tokens=trace.tokens.shape[1]) for c in trace.model.components]
    steps = []
    for step in range(trace.tokens.shape[1]):
        live = np.flatnonzero(trace.tokens[:, step].numpy() >= 0)
        for i, session in enumerate(sessions):
            mine = live[trace.components[live, step].numpy() == i]
            if not len(mine):
                continue
            used = session.log_probs(mine).cpu()
            target = torch.stack([fresh[row][i][step] for row in mine.tolist()])
            cache, drawn = torch.as_tensor(tv_distance(used, target)), inverse_cdf_error(used)
            for row, cache_tv, draw_tv in zip(mine.tolist(), cache.tolist(), drawn.tolist(), strict=True):
                laws = [law[step] for law in fresh[row]]
                apart = max((float(tv_distance(a, b)) for j, a in enumerate(laws) for b in laws[:j]), default=0.0)
                steps.append({"component": i, "cache_tv": cache_tv, "draw_tv": draw_tv, "component_tv": apart})
        for session in sessions:
            session.append(live, trace.tokens[live, step])
    return steps


def _stale(trace: Trace) -> float:
    """Mean TV of a component's law from its law one token earlier: what a cache that missed a token would cost."""
    prompts, rows = trace.row_prompts(), trace.sequences()
    missed = [
        torch.as_tensor(tv_distance(law[:-1], law[1:]))
        for laws, _ in trace.model.component_paths(prompts, rows)
        for law in laws
        if len(law) > 1
    ]
    return float(torch.cat(missed).mean()) if missed else 1.0
