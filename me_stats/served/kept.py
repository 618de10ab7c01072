"""Long runs of rows that are kept as they finish: an interruption, a full disk or a lost server costs a few rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from me_stats.models.base import Cost
from me_stats.parts import PartOfWork, load_part, run_parts
from me_stats.samplers.base import Sampler
from me_stats.served.model import ServedCost, ServedModel
from me_stats.trace import Trace
from me_stats.vocabulary import Prompt, as_prompts


def sample_kept(
    sampler: Sampler,
    prompts: Prompt | Sequence[Prompt],
    *,
    folder: str | Path,
    max_new_tokens: int,
    n: int = 1,
    seed: int = 0,
    rows_per_part: int = 8,
    until: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """``sampler.sample(...)``, with groups of rows written to `folder` as soon as they are done.

    Called again with the same arguments it goes on where it stopped, and returns the trace of an uninterrupted run:
    a row depends on the seed, its number and its prompt alone. Files appear whole or not at all, and belong to one
    sampler, server, seed and length: another one finds none of them. `cost` is that of the work that is kept.

    Raises
    ------
    OSError
        For a full disk, and others of its kind; rows that were kept before stay.
    ValueError
        For counts below 1, and what the sampler raises.
    """
    encoded = [sampler.model.vocabulary.encode(prompt) for prompt in as_prompts(prompts)]
    if min(n, max_new_tokens, rows_per_part) < 1:
        raise ValueError("n, max_new_tokens and rows_per_part must be at least 1")
    index = np.repeat(np.arange(len(encoded)), n)
    given = {"max_new_tokens": max_new_tokens, "seed": seed, "until": list(until)}
    run = {**given, "prompts": encoded, "n": n, "sampler": repr(sampler), "servers": _identities(sampler)}
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
    groups = np.split(np.arange(len(index)), range(rows_per_part, len(index), rows_per_part))
    parts = [
        PartOfWork(
            f"rows-{name}-{rows[0]}-{rows[-1]}",
            len(rows),
            partial(_write, sampler, [encoded[place] for place in index[rows]], rows, given),
        )
        for rows in groups
    ]
    paths = run_parts(parts, Path(folder), progress=progress)
    kept = [load_part(path) for path in paths]
    return _joined(sampler, [part for part in kept if part is not None], encoded, index, seed, tuple(until))


def _write(
    sampler: Sampler,
    prompts: list[tuple[int, ...]],
    rows: np.ndarray,
    given: dict[str, Any],
    tick: Callable[[int], None],
) -> dict[str, np.ndarray]:
    trace = sampler.sample(prompts, rows=rows, **given)
    tick(len(rows))
    cost = [trace.cost.forwards, trace.cost.tokens_forwarded, trace.cost.reads, getattr(trace.cost, "requests", -1)]
    arrays = {"tokens": trace.tokens.numpy(), "lengths": trace.lengths.numpy(), "cost": np.array(cost)}
    return arrays if trace.components is None else {**arrays, "components": trace.components.numpy()}


def _joined(
    sampler: Sampler,
    parts: list[dict[str, np.ndarray]],
    prompts: list[tuple[int, ...]],
    index: np.ndarray,
    seed: int,
    until: tuple[str, ...],
) -> Trace:
    longest = max(part["tokens"].shape[1] for part in parts)

    def grid(name: str) -> torch.Tensor:
        wide = [np.pad(part[name], ((0, 0), (0, longest - part[name].shape[1])), constant_values=-1) for part in parts]
        return torch.from_numpy(np.concatenate(wide))

    costs = [
        ServedCost(*part["cost"].tolist()) if part["cost"][3] >= 0 else Cost(*part["cost"][:3].tolist())
        for part in parts
    ]
    return Trace(
        model=sampler.model,
        tokens=grid("tokens"),
        lengths=torch.from_numpy(np.concatenate([part["lengths"] for part in parts])),
        components=grid("components") if "components" in parts[0] else None,
        prompts=tuple(prompts),
        prompt_index=torch.from_numpy(index),
        rows=torch.arange(len(index)),
        seed=seed,
        cost=sum(costs, Cost()),
        sampler=type(sampler).__name__,
        shared_rows=sampler.shared_rows,
        until=until,
    )


def _identities(sampler: Sampler) -> list[dict[str, str]]:
    """What the servers of a sampler say about their models."""
    servers: dict[int, ServedModel] = {}
    pending: list[Any] = [sampler.model]
    while pending:
        model = pending.pop()
        if isinstance(model, ServedModel):
            servers[id(model)] = model
        pending += [*getattr(model, "components", ()), *filter(None, [getattr(model, "model", None)])]
    return [server.identity for server in servers.values()]
