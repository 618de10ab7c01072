"""Transform-then-mix against mix-then-transform on transformers: how far apart the two laws are per step.

Teacher-forced along ME generations, so both laws are exact at every prefix. Transform-then-mix through
the samplers' sessions is the line that separates rounding from a real gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from me_stats import Ensemble, MESampler
from me_stats.divergence import escaped_mass, tv_distance
from me_stats.models import Greedy, MinP, Temperature, TopK, TopP, Warp, Warped
from me_stats.models.base import open_session
from me_stats.models.ensemble import mix
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder

NAME, TITLE = "transform_order", "The price of the order of transforms"
TRANSFORMS: dict[str, tuple[Warp, ...]] = {
    "none": (),
    "temperature 0.7": (Temperature(0.7),),
    "top-k 50": (TopK(50),),
    "top-k 10": (TopK(10),),
    "top-k 5": (TopK(5),),
    "top-p 0.9": (TopP(0.9),),
    "min-p 0.1": (MinP(0.1),),
    "greedy": (Greedy(),),
}


@dataclass(frozen=True)
class Config:
    """How many generations to walk along, and how long they are."""

    models: tuple[str, ...] = SIBLINGS
    rows: int = 32
    steps: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Both orders of every transform at every prefix of the generations."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    ensemble = setting.ensemble
    progress(0.0, "generating")
    per_prompt = max(1, config.rows // len(setting.prompts))
    trace = MESampler(ensemble).sample(setting.prompts, n=per_prompt, max_new_tokens=config.steps, seed=config.seed)
    prompts, rows = trace.row_prompts(), trace.sequences()
    gaps: dict[str, list[torch.Tensor]] = {name: [] for name in TRANSFORMS}
    outside: dict[str, list[torch.Tensor]] = {name: [] for name in TRANSFORMS}
    floor = _floor(ensemble, prompts, rows)
    for done, (laws, log_weights) in enumerate(ensemble.component_paths(prompts, rows)):
        progress(0.3 + 0.7 * done / len(rows), f"row {done + 1} of {len(rows)}")
        laws = tuple(law.cpu() for law in laws)
        mixture = mix(laws, log_weights)
        mixture = mixture - mixture.logsumexp(-1, keepdim=True)
        for name, warps in TRANSFORMS.items():
            warp = Warped(ensemble, *warps).warp
            then_mix = mix([warp(law) for law in laws], log_weights)
            then_transform = warp(mixture)
            gaps[name].append(torch.as_tensor(tv_distance(then_mix, then_transform)))
            outside[name].append(torch.as_tensor(escaped_mass(then_mix, then_transform)))
    results = {name: _summary(torch.cat(gaps[name]), torch.cat(outside[name])) for name in TRANSFORMS}
    results["none"]["note"] = "the two orders are one law"
    mean, largest = float(floor.mean()), float(floor.max())
    # Both orders start from the same component laws, so what "none" shows is all the rounding between them.
    rounding = results["none"]["max"]
    for name in TRANSFORMS:
        if name != "none":
            size = results[name]["mean"]
            recorder.check(f"{name}: the orders differ by TV {size:.3f} a step ({setting.label})", size > 10 * rounding)
    recorder.check(
        f"transform-then-mix through sessions stays at the floor, mean TV {mean:.1e} a step ({setting.label})",
        mean < _largest_floor(config.dtype),
    )
    return recorder.finish(
        {
            "label": setting.label,
            "transforms": results,
            "floor": mean,
            "floor_max": largest,
            "prefixes": sum(map(len, rows)),
        }
    )


def _largest_floor(dtype: str) -> float:
    """What rounding may do to a law on average: a few units in the last place of the weights' dtype."""
    return max(1e-3, 8 * torch.finfo(getattr(torch, dtype)).eps)


def _floor(ensemble: Ensemble, prompts: list[Any], rows: list[list[int]]) -> torch.Tensor:
    """TV of each step between transform-then-mix read from a session and from a fresh prefill, top-k 10.

    The mean is what to compare with means: in half precision near-ties at the cut make single steps jump.
    """
    truncated = Ensemble([Warped(c, TopK(10)) for c in ensemble.components], ensemble.mixing)
    kept = rows[:4]
    session = open_session(truncated, prompts[:4], max_new_tokens=max(map(len, kept)))
    distances = []
    fresh = list(truncated.path_log_probs(prompts[:4], kept))
    for step in range(max(map(len, kept))):
        live = np.array([i for i, row in enumerate(kept) if len(row) > step])
        laws = session.log_probs(live).cpu()
        expected = torch.stack([fresh[i][step].cpu() for i in live])
        distances.append(torch.as_tensor(tv_distance(laws, expected)))
        session.append(live, torch.tensor([kept[i][step] for i in live]))
    return torch.cat(distances)


def _summary(gap: torch.Tensor, outside: torch.Tensor) -> dict[str, Any]:
    quantiles = torch.quantile(gap.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "mean": float(gap.mean()),
        "stderr": float(gap.std() / len(gap) ** 0.5),
        "quantiles": quantiles,
        "max": float(gap.max()),
        "outside_support": float(outside.mean()),
        "prefixes": len(gap),
    }
