"""What all samplers share: rows, batches and traces; and the loop of those that write one token a row and step."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from me_stats.stopping import StopStrings, Watch, lengths_of
from me_stats.trace import Trace
from me_stats.vocabulary import Prompt, Vocabulary, as_prompts


@dataclass(frozen=True, eq=False)
class Run:
    """Rows to write together.

    Attributes
    ----------
    prompts, prompt_index
        Token ids of the distinct prompts, and (N,) which one each row continues.
    numbers
        (N,) global row numbers.
    max_new_tokens
        T, at which a row stops unless it ends earlier.
    draw
        The random numbers.
    progress
        Called with the number of tokens finished since the last call.
    stops
        The strings at which a row ends; what is written after them is cut off.
    """

    prompts: list[tuple[int, ...]]
    prompt_index: np.ndarray
    numbers: np.ndarray
    max_new_tokens: int
    draw: Draw
    progress: Callable[[int], None] | None = None
    stops: StopStrings | None = None

    @property
    def starts(self) -> list[tuple[int, ...]]:
        """The prompt of each row."""
        return [self.prompts[p] for p in self.prompt_index]

    def watch(self, vocabulary: Vocabulary) -> Watch:
        """What learns which of the rows have ended."""
        return Watch(vocabulary, self.stops, len(self.numbers))

    def note(self, tokens: int) -> None:
        """Tell the caller that so many more tokens are written."""
        if self.progress is not None:
            self.progress(tokens)


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
    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        """Tokens (N, T) of the rows, the components that wrote them (None: the mixture did), and the cost."""

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
        until: Sequence[str] = (),
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
        until
            A row stops at the first token at which its continuation contains one of these strings; the token that
            completes the string is kept. The row's tokens are those of a run without `until`, cut there
            (`me_stats.stopping`).
        draw
            Replaces the random numbers (used by `me_stats.exact`).
        progress
            Called with the number of tokens finished since the last call.

        Raises
        ------
        ValueError
            For counts below 1, duplicate rows, an empty or overlong prompt, or a law with NaN; for `until` where the
            vocabulary has no tokenizer.
        """
        encoded = [self.model.vocabulary.encode(prompt) for prompt in as_prompts(prompts)]
        _positive(n=n, max_new_tokens=max_new_tokens, batch_size=1 if batch_size is None else batch_size)
        prompt_index = np.repeat(np.arange(len(encoded)), n)
        run = Run(
            encoded,
            prompt_index,
            _row_numbers(rows, len(prompt_index)),
            max_new_tokens,
            draw or RowStreams(seed),
            progress,
            StopStrings(self.model.vocabulary, until) if until else None,
        )
        # A subclass may have changed what a step does, so only a class's own plan stands for it.
        planned = draw is None and batch_size is None and "_plan" in vars(type(self))
        plan = self._plan() if planned and len(run.numbers) * max_new_tokens >= tabular.MIN_TOKENS else None
        if plan is not None:
            tokens, components = plan.run(encoded, prompt_index, run.numbers, max_new_tokens, seed, progress)
        else:
            tokens, components, cost = self._run(run, batch_size, seed if draw is None else None)
        lengths = lengths_of(tokens, self.model.vocabulary.eos, run.stops)
        tokens, components = _trim(tokens, components, lengths)
        if plan is not None:
            cost = plan.cost(tokens, components, prompt_index)
        return Trace(
            model=self.model,
            tokens=tokens,
            lengths=lengths,
            components=components,
            prompts=tuple(encoded),
            prompt_index=torch.from_numpy(prompt_index),
            rows=torch.from_numpy(run.numbers),
            seed=seed if draw is None else None,
            cost=cost,
            sampler=type(self).__name__,
            shared_rows=self.shared_rows,
            until=() if run.stops is None else run.stops.until,
        )

    def _run(self, run: Run, batch_size: int | None, seed: int | None) -> tuple[Tensor, Tensor | None, Cost]:
        size = batch_size or self._rows_at_once(max(map(len, run.prompts)), run.max_new_tokens)
        parts = []
        for start in range(0, len(run.numbers), size):
            part = slice(start, start + size)
            # Streams remember the rows of their batch, so each batch has its own; the numbers are the same.
            draw = run.draw if seed is None else RowStreams(seed)
            parts.append(
                self._run_batch(replace(run, prompt_index=run.prompt_index[part], numbers=run.numbers[part], draw=draw))
            )
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

    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        session = open_session(self.model, run.starts, max_new_tokens=run.max_new_tokens)
        batch = Batch(session, run.numbers, run.prompt_index)
        watch = run.watch(self.model.vocabulary)
        active = np.arange(len(run.numbers))
        written: list[tuple[np.ndarray, Tensor]] = []
        components = np.full((len(run.numbers), run.max_new_tokens), -1, dtype=np.int64)
        has_components = False
        memory: dict[str, Any] = {}
        for step in range(run.max_new_tokens):
            tokens, drawn = self._step(batch, active, step, run.draw, memory)
            written.append((active, tokens))
            if drawn is not None:
                has_components = True
                components[active, step] = drawn
            run.note(len(active))
            if step + 1 == run.max_new_tokens:
                break
            session.append(active, tokens)
            if len(watch.see(active, tokens)):
                active = active[watch.alive[active]]
                if not len(active):
                    break
        # One copy to the host for the whole batch.
        flat = torch.cat([tokens for _, tokens in written]).cpu()
        grid = torch.full(components.shape, -1, dtype=torch.int64)
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


def _trim(tokens: Tensor, components: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both grids with -1 after each row's length, cut to the longest row."""
    longest = int(lengths.max()) if len(lengths) else 0
    after = torch.arange(longest)[None] >= lengths[:, None]
    if longest == tokens.shape[1] and not bool(after.any()):
        return tokens, components
    tokens = tokens[:, :longest].masked_fill(after, -1)
    return tokens, None if components is None else components[:, :longest].masked_fill(after, -1)
