"""The protocol that everything here speaks: a law over the next token given a prefix.

`LanguageModel.log_probs` is the definition and may be slow; a `Session` is the fast path. The test of
every session is that the two agree. A model written elsewhere needs ``vocabulary`` and ``log_probs``
and nothing more: `open_session` and `path_log_probs` supply the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from me_stats.vocabulary import Vocabulary

Prefix = Sequence[int]


class NaNLawError(ValueError):
    """A network returned NaN: its checkpoint is broken, or its dtype too narrow."""


@dataclass
class Cost:
    """Work counted without a clock.

    Attributes
    ----------
    forwards
        Model runs (kernel launches of a whole network; a table look-up counts as one).
    tokens_forwarded
        Tokens fed through a network, prompt included.
    reads
        Next-token laws computed for a row. For n rows of T tokens ME reads n·T and CE n·T·K, less the first
        token's, where all rows of a prompt share one law.
    """

    forwards: int = 0
    tokens_forwarded: int = 0
    reads: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards,
            self.tokens_forwarded + other.tokens_forwarded,
            self.reads + other.reads,
        )


@runtime_checkable
class Session(Protocol):
    """Rows that advance on their own, each with its own prefix.

    ``append`` only records. ``log_probs`` catches the asked rows up in one forward and returns their
    next-token laws; samplers never see a cache.
    """

    @property
    def cost(self) -> Cost: ...

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        """Record one more token (B,) for each of the distinct `rows` (B,)."""
        ...

    def log_probs(self, rows: np.ndarray) -> Tensor:
        """Laws (B, V) of the next token of the distinct `rows` (B,)."""
        ...


class LanguageModel(ABC):
    """A law over the next token given a prefix: a pure function of token ids."""

    vocabulary: Vocabulary

    @abstractmethod
    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Normalised natural log-probabilities (B, V) of the next token after each prefix."""

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
        """Open one row per prompt; `max_new_tokens` is a hint for allocation."""
        return PrefixSession(self, prompts)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        """Teacher-forced laws along given continuations: per row a tensor (T_row, V).

        Entry t is the law of ``tokens[row][t]`` given the prompt and ``tokens[row][:t]``.
        """
        for prompt, path in zip(prompts, tokens, strict=True):
            prefixes = [(*prompt, *path[:step]) for step in range(len(path))]
            yield checked_laws(self, self.log_probs(prefixes), len(prefixes))


class PrefixSession:
    """The session of a model that offers nothing but its definition."""

    def __init__(self, model: Any, prompts: Sequence[Prefix]) -> None:
        self._model = model
        self._prefixes = [tuple(prompt) for prompt in prompts]
        self.cost = Cost()

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._prefixes[row] = (*self._prefixes[row], token)

    def drop(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Take back the last `counts` (B,) tokens of `rows` (B,)."""
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            self._prefixes[row] = self._prefixes[row][: len(self._prefixes[row]) - count]

    def log_probs(self, rows: np.ndarray) -> Tensor:
        # Rows often share a prefix (many samples of one prompt), and the law is a function of it alone.
        distinct: dict[tuple[int, ...], int] = {}
        index = [distinct.setdefault(self._prefixes[row], len(distinct)) for row in rows.tolist()]
        laws = checked_laws(self._model, self._model.log_probs(list(distinct)), len(distinct))
        self.cost += Cost(1, sum(map(len, distinct)), len(rows))
        return laws if len(distinct) == len(index) else laws[index]


def open_session(model: Any, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
    """The model's own session, or one built on its ``log_probs``."""
    if callable(getattr(model, "session", None)):
        session: Session = model.session(prompts, max_new_tokens=max_new_tokens)
        return session
    require_language_model(model)
    return PrefixSession(model, prompts)


def path_log_probs(model: Any, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
    """Teacher-forced laws per row, through the model's own fast path where it has one."""
    if callable(getattr(model, "path_log_probs", None)):
        return iter(model.path_log_probs(prompts, tokens))
    require_language_model(model)
    return LanguageModel.path_log_probs(model, prompts, tokens)


def require_language_model(model: object, *, name: str = "model") -> None:
    """Raise TypeError unless `model` has the two members that make a LanguageModel."""
    if not (isinstance(getattr(model, "vocabulary", None), Vocabulary) and hasattr(model, "log_probs")):
        raise TypeError(
            f"{name} must be a LanguageModel: `vocabulary` (a me_stats Vocabulary) and "
            f"`log_probs(prefixes) -> (B, V)`; got {type(model).__name__}"
        )


def checked_laws(model: Any, laws: Any, rows: int) -> Tensor:
    """`laws` as a tensor (B, V), or a ValueError that says what is wrong with them.

    A law that is off by more than rounding would bias every test built on it, so it is refused where it
    enters. The tolerance is the rounding error of a float32 softmax over V tokens.
    """
    laws = torch.as_tensor(laws)
    name = type(model).__name__
    if laws.shape != (rows, model.vocabulary.size):
        raise ValueError(
            f"{name}.log_probs returned shape {tuple(laws.shape)}, expected {(rows, model.vocabulary.size)} "
            "(one law over the vocabulary for each prefix)"
        )
    if not laws.is_floating_point():
        raise ValueError(f"{name}.log_probs returned {laws.dtype}, expected floating-point log-probabilities")
    if rows and laws.is_cpu:
        total = laws.logsumexp(-1)
        if bool(total.isnan().any()):
            raise NaNLawError(f"{name}.log_probs returned NaN")
        if bool((total.abs() > 1e-3).any()):
            worst = float(total.abs().max())
            raise ValueError(
                f"{name}.log_probs is not normalised (log of a row's total mass is off by {worst:.3g}); "
                "return log_softmax(logits), not logits"
            )
    return laws
