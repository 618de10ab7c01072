"""What all samplers share: rows, batches and traces; and the loop of those that write one token a row and step."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.draws import Draw, RowStreams
from me_stats.models.base import Cost, Session, open_session, require_language_model
from me_stats.models.conditioned import Conditioned
from me_stats.models.windowed import Windowed
from me_stats.samplers import tabular
from me_stats.trace import Trace
from me_stats.vocabulary import Prompt, as_prompts

# Rows that ended are dropped when their tokens reach the host. On an accelerator that copy stalls the
# queue, so it happens once in this many steps; the surplus tokens of ended rows are discarded.
STEPS_BETWEEN_COMPACTIONS = 16


@dataclass(frozen=True)
class Batch:
    """The rows of one session: positions in it, global numbers, and which prompt each continues."""

    session: Session
    rows: np.ndarray
    prompt_index: np.ndarray

    def read(self, session: Session, positions: np.ndarray, step: int) -> tuple[Tensor, Tensor | None]:
        """Laws for `positions`, and which law each uses (None: one each).

        Before the first token all rows of a prompt share one prefix, so one law serves them all: a million
        draws from one prompt cost one forward.
        """
        if step > 0 or len(positions) == 1:
            return session.log_probs(positions), None
        _, first, index = np.unique(self.prompt_index[positions], return_index=True, return_inverse=True)
        if len(first) == len(positions):
            return session.log_probs(positions), None
        laws = session.log_probs(positions[first])
        return laws, on_device(index, laws.device)


class Sampler(ABC):
    """Draws continuations of prompts. Subclasses say how a batch of rows is written; most are a `StepSampler`.

    Parameters
    ----------
    model
        Any LanguageModel (see `me_stats.models`).
    """

    shared_rows: int = 1  # rows that share component draws; see MESampler

    def __init__(self, model: Any) -> None:
        require_language_model(model)
        self.model = model

    @abstractmethod
    def _run_batch(
        self,
        prompts: list[tuple[int, ...]],
        prompt_index: np.ndarray,
        numbers: np.ndarray,
        max_new_tokens: int,
        draw: Draw,
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor | None, Cost]:
        """Tokens (N, T) of the rows `numbers`, the components that wrote them (None: the mixture did), and the cost."""

    def _plan(self) -> tabular.Plan | None:
        """How to run this sampler on tables alone; None if the model is not a table.

        Never inherited: a subclass whose steps are the same says so by defining it again.
        """
        return None

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        n: int = 1,
        seed: int = 0,
        rows: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
        draw: Draw | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Trace:
        """Draw `n` continuations of each prompt.

        A row's tokens depend on the seed, its global row number and its prompt only: not on the batch
        size, the order or the neighbours: exactly on toys, and on networks up to the rounding of batched matrix
        products. Rounding changes a token where the uniform falls within it of a boundary between two tokens:
        almost never over 256 symbols, about once in a hundred tokens over 49,152, whose tail is full of tokens
        narrower than the rounding. The law is unchanged either way.

        Parameters
        ----------
        prompts
            Text or token ids, one or many.
        max_new_tokens
            T, at which a row stops unless it ends earlier.
        n
            Continuations per prompt; row p·n + j is the j-th continuation of prompt p.
        seed
            Keys the random numbers, together with the row number.
        rows
            (N,) distinct global row numbers, N = len(prompts)·n; default 0..N-1. Give others to extend an
            earlier run by fresh rows.
        batch_size
            Rows that run together; default as many as the models' cache limits allow.
        draw
            Replaces the random numbers (used by `me_stats.exact`).
        progress
            Called with the number of tokens finished since the last call.

        Raises
        ------
        ValueError
            For counts below 1, duplicate rows, an empty or overlong prompt, or a law with NaN.
        """
        encoded = [self.model.vocabulary.encode(prompt) for prompt in as_prompts(prompts)]
        _positive(n=n, max_new_tokens=max_new_tokens, batch_size=1 if batch_size is None else batch_size)
        prompt_index = np.repeat(np.arange(len(encoded)), n)
        numbers = _row_numbers(rows, len(prompt_index))
        # A subclass may have changed what a step does, so only a class's own plan stands for it.
        planned = draw is None and batch_size is None and "_plan" in vars(type(self))
        plan = self._plan() if planned and len(numbers) * max_new_tokens >= tabular.MIN_TOKENS else None
        if plan is not None:
            tokens, components = plan.run(encoded, prompt_index, numbers, max_new_tokens, seed, progress)
        else:
            tokens, components, cost = self._run(
                encoded, prompt_index, numbers, max_new_tokens, seed, batch_size, draw, progress
            )
        lengths, tokens, components = _trim(tokens, components, self.model.vocabulary.eos)
        if plan is not None:
            cost = plan.cost(tokens, components, prompt_index)
        return Trace(
            model=self.model,
            tokens=tokens,
            lengths=lengths,
            components=components,
            prompts=tuple(encoded),
            prompt_index=torch.from_numpy(prompt_index),
            rows=torch.from_numpy(numbers),
            seed=seed if draw is None else None,
            cost=cost,
            sampler=type(self).__name__,
            shared_rows=self.shared_rows,
        )

    def _run(
        self,
        prompts: list[tuple[int, ...]],
        prompt_index: np.ndarray,
        numbers: np.ndarray,
        max_new_tokens: int,
        seed: int,
        batch_size: int | None,
        draw: Draw | None,
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor | None, Cost]:
        size = batch_size or self._rows_at_once(max(map(len, prompts)), max_new_tokens)
        # Streams remember the rows of their batch, so each batch has its own; the numbers are the same.
        parts = [
            self._run_batch(
                prompts, prompt_index[part], numbers[part], max_new_tokens, draw or RowStreams(seed), progress
            )
            for part in (slice(start, start + size) for start in range(0, len(numbers), size))
        ]
        components = [part[1] for part in parts if part[1] is not None]
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat(components) if components else None,
            sum((part[2] for part in parts), Cost()),
        )

    def _rows_at_once(self, prompt_length: int, max_new_tokens: int) -> int:
        """Rows of a batch if the caller does not say."""
        return rows_that_fit(self.model, prompt_length + max_new_tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"


class StepSampler(Sampler):
    """A sampler that writes one token to every row at every step. Subclasses say how a step chooses it."""

    @abstractmethod
    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        """One token per position, and the component that wrote it (None: the mixture did)."""

    def _rows_at_once(self, prompt_length: int, max_new_tokens: int) -> int:
        # A row that writes one token reads the law of its prompt, and keeps nothing of its own.
        return sys.maxsize if max_new_tokens == 1 else super()._rows_at_once(prompt_length, max_new_tokens)

    def _run_batch(
        self,
        prompts: list[tuple[int, ...]],
        prompt_index: np.ndarray,
        numbers: np.ndarray,
        max_new_tokens: int,
        draw: Draw,
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor | None, Cost]:
        session = open_session(self.model, [prompts[p] for p in prompt_index], max_new_tokens=max_new_tokens)
        batch = Batch(session, numbers, prompt_index)
        active = np.arange(len(numbers))
        written: list[tuple[np.ndarray, Tensor]] = []
        components = np.full((len(numbers), max_new_tokens), -1, dtype=np.int64)
        has_components = False
        memory: dict[str, Any] = {}
        ended: Tensor | None = None
        for step in range(max_new_tokens):
            tokens, drawn = self._step(batch, active, step, draw, memory)
            written.append((active, tokens))
            if drawn is not None:
                has_components = True
                components[active, step] = drawn
            if progress is not None:
                progress(len(active))
            if step + 1 == max_new_tokens:
                break
            session.append(active, tokens)
            if self.model.vocabulary.eos:
                now = torch.isin(tokens, on_device(np.array(self.model.vocabulary.eos), tokens.device))
                ended = now if ended is None else ended | now
                if tokens.is_cpu or (step + 1) % STEPS_BETWEEN_COMPACTIONS == 0:
                    active = active[~ended.cpu().numpy()]
                    ended = None
                    if not len(active):
                        break
        # One copy to the host for the whole batch.
        flat = torch.cat([tokens for _, tokens in written]).cpu()
        grid = torch.full((len(numbers), max_new_tokens), -1, dtype=torch.int64)
        where = np.concatenate([positions for positions, _ in written])
        steps = np.repeat(np.arange(len(written)), [len(positions) for positions, _ in written])
        grid[torch.from_numpy(where), torch.from_numpy(steps)] = flat
        return grid, torch.from_numpy(components) if has_components else None, session.cost


def rows_that_fit(model: Any, length: int, *, default: int = 1 << 20) -> int:
    """The smallest row limit among the networks inside `model`, for rows of `length` tokens."""
    if hasattr(model, "rows_that_fit"):
        return max(1, int(model.rows_that_fit(length)))
    if isinstance(model, Conditioned):
        length += len(model.context)
    elif isinstance(model, Windowed):
        length = min(length, model.window)
    inner = [*getattr(model, "components", ()), *filter(None, [getattr(model, "model", None)])]
    return min((rows_that_fit(part, length, default=default) for part in inner), default=default)


def _positive(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def _row_numbers(rows: Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    if rows is None:
        return np.arange(count)
    numbers = np.asarray(rows)
    ordered = np.sort(numbers, axis=None)
    valid = numbers.shape == (count,) and np.issubdtype(numbers.dtype, np.integer)
    if not valid or (ordered[1:] == ordered[:-1]).any() or ordered[0] < 0 or ordered[-1] >= 2**62:
        raise ValueError(f"rows must be {count} distinct integers in 0..2**62 - 1 (prompts × n), got {rows!r:.60}")
    return numbers.astype(np.int64)


def _trim(tokens: Tensor, components: Tensor | None, eos: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lengths, and both grids with -1 after the first end-of-sequence token, cut to the longest row."""
    steps = tokens.shape[1]
    if not eos:
        return torch.full((len(tokens),), steps), tokens, components
    is_end = torch.isin(tokens, torch.tensor(eos, dtype=torch.int64))
    first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, steps)
    lengths = torch.minimum(first, (tokens >= 0).sum(1))
    longest = int(lengths.max()) if len(lengths) else 0
    after = torch.arange(longest)[None] >= lengths[:, None]
    tokens = tokens[:, :longest].masked_fill(after, -1)
    if components is not None:
        components = components[:, :longest].masked_fill(after, -1)
    return lengths, tokens, components
