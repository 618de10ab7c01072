"""C4: a row that catches up on a span lazily, against a fresh prefill, by dtype and lag.

The yardstick is the numerical floor of the model itself: transformers' own cache, fed one token at a time,
against the same prefill. Both are exact in exact arithmetic. A planted error, one token left out, shows
what a wrong cache looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.divergence import tv_distance
from me_stats.models import TransformersModel
from me_stats.models.base import NaNLawError
from me_stats.presets import CHAT_PROMPTS, SIBLINGS, TEXT_PROMPTS
from me_stats.record import Record, Recorder

NAME, TITLE = "cache_floor", "Lazy key-value synchronisation against a fresh prefill"


@dataclass(frozen=True)
class Config:
    """Which models, dtypes and lags (tokens caught up at once), over `rows` ragged rows of `steps` tokens."""

    models: tuple[str, ...] = SIBLINGS
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    lags: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rows: int = 8
    steps: int = 96
    # A lazy law may be this much further from the prefill than transformers' own cache is.
    factor: float = 10.0
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Measure the TV of every read at every lag, and the model's own floor."""
    recorder = Recorder(NAME, TITLE, config)
    cells = [(name, dtype) for name in config.models for dtype in config.dtypes]
    rows, unusable = [], []
    for done, (name, dtype) in enumerate(cells):
        progress(done / len(cells), f"{name}, {dtype}")
        try:
            model = TransformersModel(name, dtype=dtype, device=config.device)  # type: ignore[arg-type]
            rows.append(_measure(model, name, dtype, config))
            recorder.add_model(name, model)
        except NaNLawError as error:
            # Some models overflow in float16, with any cache: there is no law to compare.
            unusable.append({"model": name, "dtype": dtype, "reason": str(error)})
    for cell in unusable:
        progress(1.0, f"{cell['model']} cannot be run in {cell['dtype']}")
    if not rows:
        raise NaNLawError(f"no dtype of {', '.join(config.models)} gives finite laws; check the checkpoint")
    _judge(recorder, rows, config)
    return recorder.finish({"rows": rows, "unusable": unusable})


def _measure(model: TransformersModel, name: str, dtype: str, config: Config) -> dict[str, Any]:
    prompts, paths = _texts(model, config)
    fresh = torch.stack([law.cpu() for law in model.path_log_probs(prompts, paths)])  # (N, T, V)
    row: dict[str, Any] = {"model": name, "dtype": dtype, "lags": {}}
    row["own_cache"] = _summary(_own_cache(model, prompts[0], paths[0]), fresh[0])
    for lag in config.lags:
        row["lags"][lag] = _lazy(model, prompts, paths, fresh, lag)
    stale = tv_distance(fresh[:, :-1], fresh[:, 1:])
    row["stale_by_one"] = {"mean": float(stale.mean()), "max": float(stale.max())}  # type: ignore[union-attr]
    return row


def _texts(model: TransformersModel, config: Config) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Ragged prompts, and continuations that the model itself would write."""
    from me_stats import CESampler

    texts = TEXT_PROMPTS if model.name.startswith("bundled:") else CHAT_PROMPTS
    prompts = [model.vocabulary.encode(texts[i % len(texts)]) for i in range(config.rows)]
    prompts = [prompt[: max(2, len(prompt) - i)] for i, prompt in enumerate(prompts)]
    # Ends are allowed in the middle: a cache has to survive any token.
    trace = CESampler(model).sample(prompts, max_new_tokens=config.steps, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    paths = []
    for row in trace.tokens.tolist():
        path = [token for token in row if token >= 0]
        filler = rng.integers(model.vocabulary.size, size=config.steps - len(path)).tolist()
        paths.append(path + filler)
    return prompts, paths


def _lazy(
    model: TransformersModel, prompts: list[tuple[int, ...]], paths: list[list[int]], fresh: Tensor, lag: int
) -> dict[str, float]:
    """Rows read at staggered times, each `lag` tokens after its last read."""
    session = model.session(prompts, max_new_tokens=len(paths[0]))
    tokens = torch.tensor(paths)
    every = np.arange(len(paths))
    distances = []
    for step in range(len(paths[0])):
        due = every[(step + every) % lag == 0]
        if len(due):
            laws = session.log_probs(due).cpu()
            distances.append(torch.as_tensor(tv_distance(laws, fresh[due, step])))
        session.append(every, tokens[:, step])
    joined = torch.cat(distances)
    return {"mean": float(joined.mean()), "max": float(joined.max()), "reads": len(joined)}


@torch.no_grad()
def _own_cache(model: TransformersModel, prompt: tuple[int, ...], path: list[int]) -> Tensor:
    """Laws (T, V) from transformers' own cache, one token at a time."""
    laws, cache = [], None
    step = torch.tensor([prompt], device=model.device)
    for token in path:
        out = model.network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        laws.append(out.logits[0, -1, : model.vocabulary.size].float().log_softmax(-1).cpu())
        step = torch.tensor([[token]], device=model.device)
    return torch.stack(laws)


def _summary(laws: Tensor, fresh: Tensor) -> dict[str, float]:
    distance = torch.as_tensor(tv_distance(laws, fresh))
    return {"mean": float(distance.mean()), "max": float(distance.max())}


def _judge(recorder: Recorder, rows: list[dict[str, Any]], config: Config) -> None:
    for row in rows:
        largest = max(cell["max"] for cell in row["lags"].values())
        mean = max(cell["mean"] for cell in row["lags"].values())
        own, stale = row["own_cache"], row["stale_by_one"]
        held = mean <= config.factor * own["mean"] and largest < stale["mean"]
        recorder.find(
            claim="C4",
            statement=f"lazy laws against a fresh prefill, {row['dtype']}, lags 1..{max(config.lags)}",
            models=row["model"],
            n=f"{sum(cell['reads'] for cell in row['lags'].values()):,} laws",
            statistic=f"mean TV {mean:.1e}, largest {largest:.1e}; own cache {own['mean']:.1e}",
            tv_upper=largest,
            bound=f"measured floor, {row['dtype']}",
            held=held,
            caveat=f"a cache that misses one token would be off by {stale['mean']:.2f} on average",
        )
