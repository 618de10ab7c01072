"""A comparison of two orders on models and prompts: drawn, read and kept part by part, and written as a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from me_stats.advice import advise, describe, program
from me_stats.comparison import (
    Comparison,
    RowGaps,
    WorstPrefix,
    cause_gaps,
    gaps_along,
    session_floor,
    stage_laws,
    summarise,
)
from me_stats.models import Aligned, Ensemble
from me_stats.models.base import Prefix
from me_stats.models.shared import networks
from me_stats.models.windowed import context_length
from me_stats.orders import OrderedLaw, Stage, stages
from me_stats.parts import Arrays, PartOfWork, Tick, load_part, open_part, run_parts
from me_stats.presets import Setting, open_setting
from me_stats.record import Record, Recorder, config_key, plain
from me_stats.samplers import CESampler, MESampler

NAME = "compare"
_FLOOR_ROWS, _FLOOR_STEPS = 4, 64  # a session is read token by token, so a few must do
_CURVE = 129  # quantiles in the record, for the figure


@dataclass(frozen=True)
class ComparePlan:
    """What to compare; everything that decides a number in the result.

    Attributes
    ----------
    models, dtype, device
        As in `presets.open_setting`.
    prompts
        Texts that rows continue in turn; None: those that suit the models.
    first, second
        The laws; continuations are drawn from the first.
    rows, max_new_tokens
        N >= 2 continuations of at most so many tokens.
    batch
        Rows that are drawn and read together: what is in memory, and what an interruption loses.
    worst
        Prefixes to show.
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...] | None
    first: OrderedLaw
    second: OrderedLaw
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    rows: int = 64
    max_new_tokens: int = 64
    batch: int = 8
    worst: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("max_new_tokens", 1), ("batch", 1), ("worst", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Laws:
    """The laws of a plan over opened models."""

    plan: ComparePlan
    setting: Setting
    p: Any
    q: Any
    way: tuple[Stage, ...]
    prompts: tuple[Prefix, ...]

    @classmethod
    def open(cls, plan: ComparePlan) -> _Laws:
        setting = open_setting(plan.models, weights=plan.first.weights, dtype=plan.dtype, device=plan.device)
        components = setting.ensemble.components
        p, q = (law.over(components) for law in (plan.first, plan.second))
        prompts = tuple(map(p.vocabulary.encode, plan.prompts or setting.prompts))
        longest, limit = max(map(len, prompts)), context_length(p)
        if limit is not None and longest + plan.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens: a prompt of {longest:,} tokens and {plan.max_new_tokens:,} new ones exceed the "
                f"{limit:,} that the models read; give shorter prompts or fewer tokens"
            )
        return cls(plan, setting, p, q, stages(plan.first, plan.second, components), prompts)

    def prompts_of(self, rows: Sequence[int]) -> list[Prefix]:
        return [self.prompts[row % len(self.prompts)] for row in rows]


def run(plan: ComparePlan, work: Path, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Draw and read what `work` does not hold yet, and sum it up. The record is the same however often it stopped."""
    recorder = Recorder(NAME, f"{plan.first.order} against {plan.second.order}: {', '.join(plan.models)}", plan)
    progress(0.0, "opening the models")
    laws = _Laws.open(plan)
    for name, model in laws.setting.models:
        recorder.add_model(name, model)
    folder = part_folder(plan, work)
    recorder.count_earlier(sum(float(part["seconds"]) for path in folder.glob("*.npz") if (part := load_part(path))))
    batches = [range(start, min(start + plan.batch, plan.rows)) for start in range(0, plan.rows, plan.batch)]
    parts = [
        PartOfWork(f"rows-{rows.start:06d}", 2 * len(rows) * plan.max_new_tokens, partial(_read, laws, rows))
        for rows in batches
    ]

    def show(done: int, total: int) -> None:
        progress(0.9 * done / total, f"{done // 2:,} of {total // 2:,} tokens")

    rows, tokens = _unpacked(run_parts(parts, folder, progress=show))
    progress(0.9, "measuring rounding")
    few = [path[:_FLOOR_STEPS] for path in tokens[:_FLOOR_ROWS]]
    (path,) = run_parts([PartOfWork("rounding", 1, partial(_rounding, laws, few))], folder)
    with open_part(path) as part:
        floors, dropped = part["floors"], part["dropped"]
    found = summarise(
        rows, laws.prompts_of(range(plan.rows)), tokens, n_networks=len(networks(laws.p, laws.q)), worst=plan.worst,
        floor=min(1.0, float(floors.sum())),
    )  # fmt: skip
    return recorder.finish(_results(laws, found, rows, dropped))


def part_folder(plan: ComparePlan, work: Path) -> Path:
    """Where `run` keeps the parts of this plan."""
    return work / config_key(NAME, plan)


def rows_kept(plan: ComparePlan, work: Path) -> int:
    """Rows that an interrupted run of the plan left."""
    starts = [int(path.stem.removeprefix("rows-")) for path in part_folder(plan, work).glob("rows-*.npz")]
    return sum(min(plan.batch, plan.rows - start) for start in starts)


def _read(laws: _Laws, rows: range, tick: Tick) -> Arrays:
    """Draw some rows and look at both laws along them."""
    began, steps = time.perf_counter(), laws.plan.max_new_tokens
    prompts = laws.prompts_of(rows)
    sampler = MESampler(laws.p) if isinstance(laws.p, Ensemble) else CESampler(laws.p)
    trace = sampler.sample(
        prompts, max_new_tokens=steps, seed=laws.plan.seed, rows=np.array(rows), batch_size=len(rows), progress=tick
    )
    tokens = trace.sequences()
    tick(len(rows) * steps - sum(map(len, tokens)))  # rows that ended early
    found = []
    for row in gaps_along(laws.p, laws.q, prompts, tokens, others=stage_laws(laws.way)):
        found.append(row)
        tick(steps)
    packed: Arrays = {
        "lengths": np.array([len(path) for path in tokens]),
        "tokens": np.concatenate([np.array(path, dtype=np.int64) for path in tokens]),
        "excluded": np.array([row.excluded for row in found]),
        "at_fault": np.stack([row.at_fault for row in found]),
        "others": np.array(list(found[0].gaps), dtype=np.str_),
        "gaps": np.concatenate([np.array([*row.gaps.values()]).reshape(-1, len(row.tv)) for row in found], axis=1),
        "seconds": np.array(round(time.perf_counter() - began, 2)),
    }
    return packed | {name: np.concatenate([getattr(row, name) for row in found]) for name in _STEPS}


_STEPS = ("tv", "outside", "missing", "log_ratio")


def _unpacked(files: Sequence[Path]) -> tuple[list[RowGaps], list[tuple[int, ...]]]:
    rows, tokens = [], []
    for path in files:
        with open_part(path) as part:
            found = {name: part[name] for name in part.files}
        stops = np.cumsum(found["lengths"])
        for place, (start, stop) in enumerate(zip(stops - found["lengths"], stops, strict=True)):
            gaps = {str(name): values[start:stop] for name, values in zip(found["others"], found["gaps"], strict=True)}
            steps = {name: found[name][start:stop] for name in _STEPS}
            excluded = int(found["excluded"][place])
            rows.append(RowGaps(**steps, gaps=gaps, at_fault=found["at_fault"][place], excluded=excluded))
            tokens.append(tuple(found["tokens"][start:stop].tolist()))
    return rows, tokens


def _rounding(laws: _Laws, tokens: Sequence[Prefix], tick: Tick) -> Arrays:
    """TV a step by which a session moves each law, and the mass that each aligned component drops."""
    began, prompts = time.perf_counter(), laws.prompts_of(range(len(tokens)))
    floors = [session_floor(law, prompts, tokens).mean() for law in (laws.p, laws.q)]
    prefixes = [(*prompt, *path[:step]) for prompt, path in zip(prompts, tokens, strict=True)
                for step in sorted({0, len(path) // 2})]  # fmt: skip
    components = laws.setting.ensemble.components
    dropped = [part.dropped_mass(prefixes).double().cpu().numpy() for part in components if isinstance(part, Aligned)]
    return {
        "floors": np.array(floors),
        "dropped": np.array(dropped).reshape(len(dropped), len(prefixes)),
        "seconds": np.array(round(time.perf_counter() - began, 2)),
    }


def _results(laws: _Laws, found: Comparison, rows: Sequence[RowGaps], dropped: np.ndarray) -> dict[str, Any]:
    plan, causes = laws.plan, cause_gaps(found, laws.way)
    advice = advise(laws.p, laws.q, found, causes=causes)
    forecast = found.forecast
    return {
        "label": laws.setting.label,
        "p": describe(plan.first),
        "q": describe(plan.second),
        "drawn_by": "MESampler" if isinstance(laws.p, Ensemble) else "CESampler",
        "comparison": plain(found),
        "causes": causes,
        "curve": np.quantile(np.concatenate([row.tv for row in rows]), np.linspace(0, 1, _CURVE)),
        "components": len(laws.setting.ensemble.components),
        "forwards": {
            "repair": forecast.forwards_per_token, "chunk": forecast.chunk, "CE": len(networks(laws.q)), "ME": 1,
        },
        "unread": sum(row.excluded for row in rows),
        "vocabularies": _vocabularies(laws, dropped),
        "worst": [_shown(laws, prefix) for prefix in found.worst],
        "advice": advice,
        "program": program(plan.models, plan.first, plan.second, advice),
    }  # fmt: skip


def _vocabularies(laws: _Laws, dropped: np.ndarray) -> dict[str, Any] | None:
    """How models of several vocabularies were aligned; None where they share one."""
    if not dropped.size:
        return None
    return {
        "strings": laws.p.vocabulary.size,
        "ids": {name: model.vocabulary.size for name, model in laws.setting.models},
        "dropped": {
            name: {"mean": float(mass.mean()), "largest": float(mass.max())}
            for (name, _), mass in zip(laws.setting.models, dropped, strict=True)
        },
        "prefixes": dropped.shape[1],
    }


def _shown(laws: _Laws, prefix: WorstPrefix) -> dict[str, Any]:
    vocabulary = laws.p.vocabulary

    def text(token: int) -> str:
        return "the end" if token in vocabulary.eos else repr(vocabulary.decode([token]))

    return {
        "row": prefix.row, "step": prefix.step, "tv": prefix.tv, "text": vocabulary.decode(prefix.tokens),
        "tokens": [{"token": text(token), "p": p, "q": q} for token, p, q in prefix.at_fault],
    }  # fmt: skip
