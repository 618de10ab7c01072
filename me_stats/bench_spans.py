"""Forwards of one model, timed one by one: what a cost model is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np
import torch

from me_stats.bench_models import BenchModels
from me_stats.forward_time import Span
from me_stats.models.shared import open_lookback
from me_stats.rounds import Sample, Task, run_rounds
from me_stats.stopwatch import Stopwatch

_REPEATS = 3  # forwards of one shape in one round, whose median counts: one takes milliseconds


class SpanRows:
    """Rows of one model behind a context, whose next tokens are fed, timed and taken back."""

    def __init__(self, model: Any, *, context: int, rows: int, prompt: Sequence[int], label: str = "") -> None:
        if len(prompt) != context:
            raise ValueError(f"prompt must have {context} tokens, got {len(prompt)}")
        self._context, self._rows, self._label = context, rows, label
        self._model, self._prompt = model, tuple(prompt)
        self._watch = Stopwatch(model.device)
        self._token = torch.tensor([self._prompt[0]], device=model.device)

    def task(self, rows: int, span: int) -> Task:
        """One forward of `rows` rows that feed `span` tokens each."""
        name = f"{self._label}forward of {rows} × {span} tokens behind {self._context}"
        return Task(name, partial(self._run, rows, span, _REPEATS), partial(self._run, rows, span, 1))

    @cached_property
    def _session(self) -> Any:
        session = open_lookback(self._model, [self._prompt] * self._rows, max_new_tokens=128)
        session.log_probs(np.arange(self._rows))  # reads the prompt
        return session

    def _run(self, rows: int, span: int, repeats: int) -> Sample:
        session, positions = self._session, np.arange(rows)
        seconds = []
        for _ in range(repeats):
            for _ in range(span):
                session.append(positions, self._token.expand(rows))
            self._watch.start()
            session.log_probs(positions)
            seconds.append(self._watch.stop()[0])
            session.drop(positions, np.full(rows, span))
        return Sample(median(seconds), rows * span, 1, rows * span, rows)


def span_grid(
    models: BenchModels, component: int = 0, *, spans: Sequence[int], batches: Sequence[int], contexts: Sequence[int],
    label: str = "",
) -> list[tuple[Task, tuple[int, int, int]]]:  # fmt: skip
    """Tasks with their (rows, span, context): single rows over `spans`, and `batches` of rows that feed one token."""
    found = []
    shapes = [(1, span) for span in spans] + [(rows, 1) for rows in batches if rows > 1]
    for context in contexts:
        held = SpanRows(models.networks[component], context=context, rows=max([1, *batches]),
                        prompt=models.prompt(context), label=label)  # fmt: skip
        found += [(held.task(rows, span), (rows, span, context)) for rows, span in shapes]
    return found


def measure_spans(
    models: BenchModels,
    *,
    component: int = 0,
    spans: Sequence[int] = (1, 2, 3, 4, 8, 16, 32, 64, 128),
    batches: Sequence[int] = (1, 8, 64),
    contexts: Sequence[int] = (32, 160),
    repeats: int = 5,
    seed: int = 0,
) -> list[Span]:
    """Forwards of one component, for `cost.calibrate`: medians over interleaved rounds. Draws are not timed."""
    grid = span_grid(models, component, spans=spans, batches=batches, contexts=contexts)
    samples = run_rounds([task for task, _ in grid], repeats=repeats, seed=seed)
    return as_spans([shape for _, shape in grid], samples)


def as_spans(shapes: Sequence[tuple[int, int, int]], samples: np.ndarray) -> list[Span]:
    """Spans of (rows, span, context) from samples (rounds, spans, 7)."""
    seconds = np.median(samples[:, :, 0], axis=0)
    return [Span(*shape, float(time)) for shape, time in zip(shapes, seconds, strict=True)]
