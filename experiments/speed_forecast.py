"""What the cost model says of the paper's ensembles on its GPU, before anything is measured: a forecast.

Networks are counted from their published shapes, the GPU from its data sheet, and the work of CE and ME as sessions
count it. Nothing here is timed, so no claim gets a verdict from it; the `speed` experiment measures. It says what to
expect: how the gain goes from K at one row to what is left in large batches, and what the paper's printed range would
need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats.cost import ce_work, crossover_batch, me_work, predicted_seconds, speed_up
from me_stats.hardware import HARDWARE, ModelShape, Roofline, limits
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TransformersModel
from me_stats.models.shapes import PAPER_GROUPS, PUBLISHED, published_config, random_network
from me_stats.record import Record, Recorder
from me_stats.samplers import CESampler, MESampler

NAME, TITLE = "speed_forecast", "Speed of the paper's ensembles, forecast from shapes and a data sheet"
PRINTED = (1.78, 2.68)
"""The range of speed-ups that the paper prints."""


@dataclass(frozen=True)
class Config:
    """`batches` rows of `steps` tokens behind a prompt of `prompt_length`; `skewed` is the first weight of the other λ.

    `overheads` are seconds outside the forwards for each token, as shares of one forward. `factor` is the gain under
    which ME no longer counts as faster.
    """

    groups: tuple[str, ...] = tuple(PAPER_GROUPS)
    equal_sizes: tuple[int, ...] = (1, 2, 3, 4)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    overheads: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    launches: tuple[float, ...] = (0.0, 5e-3, 20e-3)
    skewed: float = 0.8
    steps: int = 256
    prompt_length: int = 100
    factor: float = 1.05
    hardware: str = "h100"
    dtype: str = "bfloat16"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Count, divide by the data sheet, and compare."""
    recorder = Recorder(NAME, TITLE, config)
    progress(0.0, "counting a run of small networks")
    recorder.check("forwards, tokens and laws of small networks are those that the forecast counts", _counted(config))
    shapes = {name: ModelShape.of(published_config(name)) for name in PUBLISHED}
    rows: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for i, group in enumerate(config.groups):
        progress(0.1 + 0.6 * i / len(config.groups), f"group {group}")
        own = [shapes[name] for name in PAPER_GROUPS[group]]
        for weights in _weights(len(own), config.skewed):
            rows.append({"group": group, **_ensemble(own, weights, config)})
        alone.append({"group": group, **_one_row(own, config)})
    sizes = []
    for k in config.equal_sizes:
        progress(0.7 + 0.05 * k, f"{k} networks of one size")
        sizes.append(_ensemble([shapes["mistral-7b"]] * k, (1 / k,) * k, config))
    worst = min(cell["ratio"] for row in rows for cell in row["cells"] if cell["way"] == "drifting")
    recorder.check("ME is slower than CE at no batch by more than 1%", worst > 0.99)
    recorder.check(
        "one row gains what passes over the weights allow, to 5%",
        all(abs(row["cells"][0]["ratio"] / row["limits"]["passes"] - 1) < 0.05 for row in rows if row["equal"]),
    )
    table = [
        {
            "shape": name, "body": shape.body, "head": shape.head, "share": shape.head_share,
            "arithmetic": limits([shape, shape], [0.5, 0.5]).arithmetic,
        }
        for name, shape in shapes.items()
    ]  # fmt: skip
    machine = HARDWARE[config.hardware]
    results = {
        "machine": machine.name,
        "bandwidth": machine.bandwidth,
        "peak": machine.peak[config.dtype],
        "printed": PRINTED,
        "rows": rows,
        "alone": alone,
        "sizes": sizes,
        "shapes": table,
    }
    return recorder.finish(results)


def _weights(k: int, first: float) -> list[tuple[float, ...]]:
    """Equal weights, and weights of which the first is `first`."""
    return [(1 / k,) * k, (first, *((1 - first) / (k - 1),) * (k - 1))]


def _ensemble(shapes: Sequence[ModelShape], weights: tuple[float, ...], config: Config) -> dict[str, Any]:
    times = [Roofline(shape, HARDWARE[config.hardware], dtype=config.dtype) for shape in shapes]
    given: dict[str, Any] = {"steps": config.steps, "prompt_length": config.prompt_length, "seed": config.seed}
    cells = []
    for way, lockstep in (("drifting", False), ("lockstep", True)):
        for batch in config.batches:
            found = speed_up(times, weights, batch=batch, lockstep=lockstep, **given)
            cells.append(
                {
                    "way": way, "batch": batch, "ratio": found.ratio, "ce": found.ce_speed, "me": found.me_speed,
                    "ce_forwards": found.ce_forwards, "me_forwards": found.me_forwards,
                }
            )  # fmt: skip
    most = max(config.batches)
    crossover = {
        way: crossover_batch(times, weights, factor=config.factor, largest=most, lockstep=lockstep, **given)
        for way, lockstep in (("drifting", False), ("lockstep", True))
    }
    return {
        "weights": weights,
        "equal": len(set(weights)) == 1,
        "limits": vars(limits(shapes, weights)),
        "cells": cells,
        "crossover": crossover,
    }


def _one_row(shapes: Sequence[ModelShape], config: Config) -> dict[str, Any]:
    """One row and equal weights: the gain by the time outside the forwards, and by that of a launch.

    A step of CE takes K forwards and h, one of ME a forward and h: the printed speed-up r of K models asks for
    h = (S - r M)/(r - 1), with S and M the forwards of CE and ME.
    """
    machine, k = HARDWARE[config.hardware], len(shapes)
    given: dict[str, Any] = {"steps": config.steps, "prompt_length": config.prompt_length, "seed": config.seed}
    by_launch = []
    for launch in config.launches:
        slow = dataclasses.replace(machine, launch_per_forward=launch)
        times = [Roofline(shape, slow, dtype=config.dtype) for shape in shapes]
        found = speed_up(times, (1 / k,) * k, **given)
        by_launch.append({"launch": launch, "ratio": found.ratio, "ce": found.ce_speed, "me": found.me_speed})
        if launch == min(config.launches):
            ce, me = found.ce_seconds / found.tokens, found.me_seconds / found.tokens
    printed = PRINTED[0] if k == 2 else PRINTED[1]
    forward = ce / k
    needed = (ce - printed * me) / (printed - 1) / forward
    curve = [{"overhead": x, "ratio": (ce + x * forward) / (me + x * forward)} for x in config.overheads]
    return {
        "k": k, "forward": forward, "printed": printed, "needed": needed, "curve": curve, "launches": by_launch,
    }  # fmt: skip


def _counted(config: Config) -> bool:
    """Whether CE and ME runs of shrunken networks of one group cost what `ce_work` and `me_work` say."""
    names = PAPER_GROUPS["hermes3"]
    models = [
        TransformersModel(random_network(name, dtype="float32", layers=1, shrink=16, seed=config.seed + i))
        for i, name in enumerate(names)
    ]
    ensemble = Ensemble(models, ConstantMixing(np.full(len(names), 1 / len(names))))
    prompt, n, steps = [[1, 2, 3, 4, 5]], 5, 12
    given: dict[str, Any] = {"n": n, "max_new_tokens": steps, "seed": config.seed}
    ce = CESampler(ensemble).sample(prompt, **given)
    equal = [ce.cost == ce_work(n, steps, len(names), prompt_length=5, lengths=ce.lengths.numpy()).cost]
    for lockstep in (False, True):
        me = MESampler(ensemble, lockstep=lockstep).sample(prompt, **given)
        assert me.components is not None
        work = me_work(me.components.numpy(), prompt_length=5, lockstep=lockstep, horizon=steps)
        equal.append(me.cost == work.cost and predicted_seconds(work, [_Passes()] * len(names)) == me.cost.forwards)
    return all(equal)


class _Passes:
    """A forward takes one second."""

    def seconds(self, rows: Any, fed: Any, context: Any) -> np.ndarray:
        return np.ones(len(rows))
