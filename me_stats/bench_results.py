"""What timings say: each against CE and against what a cost model predicts, as plain rows for records and figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from me_stats.bench import Bench, Cell, Timing, ratio
from me_stats.bench_models import BenchModels
from me_stats.bench_spans import as_spans
from me_stats.cost import Outside, calibrate_outside, crossover_batch, predicted_seconds
from me_stats.forward_time import calibrate
from me_stats.rounds import Ratio, middle

SMALL_GAIN = 1.05
"""Below it, ME hardly pays."""

Shapes = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class CostModel:
    """What predicts the cells of one run: forwards of each component, and the time outside them."""

    times: tuple[Any, ...]
    outside: Outside

    def seconds(self, bench: Bench, cell: Cell) -> float | None:
        """Predicted seconds of a cell; None for arms that the model does not know."""
        work = bench.work(cell)
        return None if work is None else predicted_seconds(work, self.times[: cell.k], outside=self.outside)


def calibrated(
    bench: Bench, timings: Sequence[Timing], calibrating: Sequence[Cell], models: BenchModels, curves: dict[Any, Any]
) -> CostModel:
    """The cost model from single forwards, `curves` by (dtype, model), the run's dtype first, and some whole runs."""
    dtype = next(iter(curves))[0]
    measured = {name: calibrate(as_spans(*found)) for (own, name), found in curves.items() if own == dtype}
    times = tuple(measured[name] for name in models.names)
    runs = [(bench.work(timing.cell), median(timing.seconds)) for timing in timings if timing.cell in calibrating]
    known = [(done, seconds) for done, seconds in runs if done is not None]
    return CostModel(times, calibrate_outside(known, [times] * len(known)))


def cell_rows(
    bench: Bench, model: CostModel, timings: Sequence[Timing], calibrating: Sequence[Cell]
) -> list[dict[str, Any]]:
    """One row a cell: what it took, what it counted, what the model says, and its ratio to CE."""
    by_cell = {timing.cell: timing for timing in timings}
    rows = []
    for cell, timing in by_cell.items():
        seconds, predicted = median(timing.seconds), model.seconds(bench, cell)
        reference = _reference(cell, list(by_cell))
        base = None if reference is None else by_cell[reference]
        ideal = None
        if reference is not None and predicted is not None:
            ideal = (model.seconds(bench, reference) or math.nan) / predicted
        rows.append({
            "arm": cell.arm, "k": cell.k, "weights": cell.weights, "batch": cell.batch, "steps": cell.steps,
            "prompt_length": cell.prompt_length, "tokens": timing.tokens, "seconds": timing.seconds,
            "tokens_per_second": timing.tokens_per_second,
            "forwards_per_token": timing.cost.forwards / timing.tokens,
            "fed_per_token": timing.cost.tokens_forwarded / timing.tokens,
            "laws_per_token": timing.cost.reads / timing.tokens,
            "gb_per_token": timing.bytes_moved / timing.tokens / 1e9,
            "peak_memory": timing.peak_memory, "memory": timing.memory,
            "joules_per_token": None if timing.joules is None else median(timing.joules) / timing.tokens,
            "calibrates": cell in calibrating, "predicted": predicted,
            "error": None if predicted is None else predicted / seconds - 1,
            "ideal": ideal, "of_ce": None if base is None else vars(ratio(timing, base)),
        })  # fmt: skip
    return rows


def _reference(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The CE that a cell is compared with."""
    arm = {"speculative": "CE top-k", "CE": None, "CE top-k": None, "single": None}.get(cell.arm, "CE")
    same = ("k", "batch", "steps", "prompt_length")
    found = [other for other in cells
             if other.arm == arm and all(getattr(other, name) == getattr(cell, name) for name in same)]  # fmt: skip
    return found[0] if found else None


def span_curve(
    key: tuple[str, str], shapes: Shapes, samples: np.ndarray, model: CostModel, models: BenchModels
) -> dict[str, Any]:
    """Time of a forward against its span, per round, as multiples of the same round's decode step."""
    dtype, name = key
    own = str(models.networks[0].dtype).removeprefix("torch.") == dtype
    time = model.times[models.names.index(name)] if own else calibrate(as_spans(shapes, samples))
    step = {context: samples[:, i, 0] for i, (rows, span, context) in enumerate(shapes) if (rows, span) == (1, 1)}
    points = []
    for i, (rows, span, context) in enumerate(shapes):
        seconds = samples[:, i, 0]
        fitted = float(np.ravel(time.seconds([rows], [rows * span], [rows * (context + span)]))[0])
        points.append({
            "rows": rows, "span": span, "context": context, "seconds": float(np.median(seconds)),
            "spread": [float(seconds.min()), float(seconds.max())], "fitted": fitted,
            "steps": vars(middle((seconds / step[context]).tolist())),
        })  # fmt: skip
    return {"dtype": dtype, "model": name, "points": points}


def by_k(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At batch 1: every arm against one model alone, and CE's time by K."""
    alone = next(row for row in rows if row["arm"] == "single" and row["batch"] == 1)
    same = [row for row in rows if (row["batch"], row["steps"]) == (1, alone["steps"])]
    found = []
    for row in same:
        if row is not alone and len(set(np.round(row["weights"], 9))) > 1:
            continue
        per_round = [a / b for a, b in zip(alone["seconds"], row["seconds"], strict=True)]
        over = None
        if row["arm"] == "ME" and row["predicted"] is not None:
            # One model's measured time, and the predicted time of catching up.
            extra = row["predicted"] - alone["predicted"]
            pairs = zip(row["seconds"], alone["seconds"], strict=True)
            over = vars(middle([own / (single + extra) for own, single in pairs]))
        found.append({
            "arm": row["arm"], "k": row["k"], "of_single": vars(middle(per_round)), "of_ce": row["of_ce"],
            "ideal": row["ideal"], "ms_per_token": 1000 * median(row["seconds"]) / row["tokens"],
            "over_single_and_catching_up": over,
            "rounds_ms": [1000 * second / row["tokens"] for second in row["seconds"]],
        })  # fmt: skip
    return found


def growth_in_k(rows: Sequence[dict[str, Any]]) -> Ratio:
    """What each further component adds to a step of CE at batch 1, in steps of one model: a slope for each round."""
    times = {row["k"]: row["rounds_ms"] for row in by_k(rows) if row["arm"] in ("single", "CE")}
    ks = sorted(times)
    rounds = np.array([times[k] for k in ks]).T
    return middle([float(np.polyfit(ks, column / column[0], 1)[0]) for column in rounds])


def by_batch(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arms of ME against CE over the batches, one entry an arm and λ."""
    found: dict[tuple[str, tuple[float, ...]], list[dict[str, Any]]] = {}
    steps = next((row["steps"] for row in rows if row["batch"] > 1), rows[0]["steps"])
    for row in rows:
        if row["arm"].startswith("ME") and row["steps"] == steps:
            found.setdefault((row["arm"], tuple(row["weights"])), []).append(row)
    keys = ("batch", "of_ce", "ideal", "tokens_per_second")
    return [
        {"arm": arm, "weights": weights, "points": [{key: row[key] for key in keys} for row in own]}
        for (arm, weights), own in found.items()
        if {row["batch"] for row in own} - {1} or len(own) == 1
    ]


def crossovers(
    rows: Sequence[dict[str, Any]], model: CostModel, models: BenchModels, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Per λ: the batch from which ME gains less than 5%, as measured between the tested ones, and as predicted."""
    found = []
    context = round(float(np.mean(models.contexts)))
    for entry in by_batch(rows):
        if entry["arm"] != "ME" or len(entry["points"]) < 2:
            continue
        points = sorted((point["batch"], point["of_ce"]["value"]) for point in entry["points"])
        k, largest = len(entry["weights"]), points[-1][0]
        shape = next(row for row in rows if (row["arm"], row["batch"]) == ("ME", largest))
        predicted = crossover_batch(
            model.times[:k], entry["weights"], factor=SMALL_GAIN, largest=4 * largest, steps=shape["steps"],
            prompt_length=shape["prompt_length"] + context, outside=model.outside, seed=seed,
        )  # fmt: skip
        found.append({"weights": entry["weights"], "measured": _crossing(points), "predicted": predicted,
                      "largest": largest})  # fmt: skip
    return found


def _crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Batch at which the ratio falls below 1.05, interpolated in the logarithm of the batch; None if it never does."""
    if points[0][1] < SMALL_GAIN:
        return float(points[0][0])
    for (low, above), (high, below) in itertools.pairwise(points):
        if below < SMALL_GAIN:
            share = (above - SMALL_GAIN) / (above - below)
            return float(low * (high / low) ** share)
    return None
