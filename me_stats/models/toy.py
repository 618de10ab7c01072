"""Toys whose laws can be written down, so that every claim about them can be checked exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, LanguageModel, Prefix
from me_stats.vocabulary import Vocabulary

ArrayLike = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Tensor


class TableModel(LanguageModel):
    """A law per recent history: a complete tree of the last `order` tokens (all of them, if fewer).

    With `order` = T − 1 every prefix of up to T − 1 tokens has its own law, so the model is an arbitrary
    law over sequences of T tokens.

    Parameters
    ----------
    probs
        (S, V) probabilities, one row per history, S = 1 + V + … + V^order. Row 0 is the empty history;
        the row of a history h extended by token x is ``V·row(h) + 1 + x``. Rows sum to 1 within 1e-9.
    order
        How many tokens the law remembers.
    eos
        Ids that end a sequence.

    Examples
    --------
    >>> coin = TableModel([[0.25, 0.75]], order=0)
    >>> coin.log_probs([(), (1, 1)]).exp()
    tensor([[0.2500, 0.7500],
            [0.2500, 0.7500]], dtype=torch.float64)
    """

    def __init__(self, probs: ArrayLike, *, order: int, eos: Sequence[int] = ()) -> None:
        table = torch.as_tensor(probs, dtype=torch.float64)
        if table.ndim != 2 or order < 0:
            raise ValueError(f"probs must be (S, V) with order ≥ 0, got {tuple(table.shape)}, order {order}")
        size = table.shape[1]
        states = sum(size**depth for depth in range(order + 1))
        if len(table) != states:
            raise ValueError(
                f"probs has {len(table)} rows; order {order} over V={size} tokens needs {states} histories"
            )
        if bool((table < 0).any()) or not bool(((table.sum(-1) - 1).abs() <= 1e-9).all()):
            raise ValueError("every row of probs must be non-negative and sum to 1 within 1e-9")
        self._set(table.log(), order, eos)

    def _set(self, log_table: Tensor, order: int, eos: Sequence[int]) -> None:
        self.log_table, self.order = log_table.to("cpu", torch.float64), order
        self.vocabulary = Vocabulary(log_table.shape[1], eos=tuple(eos))
        self._full = len(log_table) - log_table.shape[1] ** order  # first state that remembers `order` tokens

    @classmethod
    def from_log_table(cls, log_table: Tensor, *, order: int, eos: Sequence[int] = ()) -> TableModel:
        """A table from log-probabilities that are normalised already."""
        model = TableModel.__new__(TableModel)
        model._set(log_table, order, eos)
        return model

    @classmethod
    def random(
        cls, size: int, *, seed: int, order: int = 1, concentration: float = 1.0, eos: Sequence[int] = ()
    ) -> Self:
        """Independent Dirichlet(`concentration`) laws over `size` tokens; small values are peaked."""
        states = sum(size**depth for depth in range(order + 1))
        rng = np.random.Generator(np.random.Philox(seed))
        probs = rng.dirichlet(np.full(size, concentration), states) if size > 1 else np.ones((states, 1))
        model = cls.__new__(cls)
        TableModel.__init__(model, probs, order=order, eos=eos)
        return model

    def next_states(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Row of the table after each of `tokens`, given the rows before."""
        size = self.vocabulary.size
        growing = states * size + 1 + tokens
        shifted = self._full + ((states - self._full) * size + tokens) % size**self.order
        return np.where(states < self._full, growing, shifted)

    def states_of(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """Row of the table for each prefix."""
        states = np.zeros(len(prefixes), dtype=np.int64)
        if self.order == 0:
            return states
        tails = [tuple(prefix)[-self.order :] for prefix in prefixes]
        for depth in range(max(map(len, tails), default=0)):
            live = np.array([len(tail) > depth for tail in tails])
            tokens = np.array([tail[depth] for tail in tails if len(tail) > depth], dtype=np.int64)
            if tokens.min() < 0 or tokens.max() >= self.vocabulary.size:
                raise ValueError(f"prefixes hold a token id outside the vocabulary 0..{self.vocabulary.size - 1}")
            states[live] = self.next_states(states[live], tokens)
        return states

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return self.log_table[torch.from_numpy(self.states_of(prefixes))]

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> TableSession:
        return TableSession(self, prompts)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        states = self.states_of(prompts)
        longest = max(map(len, tokens), default=0)
        padded = np.array([[*path, *[0] * (longest - len(path))] for path in tokens], dtype=np.int64)
        visited = np.empty((len(tokens), longest), dtype=np.int64)
        for step in range(longest):
            visited[:, step] = states
            states = self.next_states(states, padded[:, step])
        for row, path in zip(visited, tokens, strict=True):
            yield self.log_table[torch.from_numpy(row[: len(path)])]

    def at_order(self, order: int) -> TableModel:
        """The same law written as a table of a higher `order`."""
        if order < self.order:
            raise ValueError(f"order must be at least the model's own, {self.order}, got {order}")
        size = self.vocabulary.size
        rows = np.zeros(1, dtype=np.int64)
        level = rows
        for _ in range(order):
            level = self.next_states(np.repeat(level, size), np.tile(np.arange(size), len(level)))
            rows = np.concatenate([rows, level])
        return TableModel.from_log_table(self.log_table[torch.from_numpy(rows)], order=order, eos=self.vocabulary.eos)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(V={self.vocabulary.size}, order={self.order})"


class MarkovModel(TableModel):
    """A first-order chain: an initial law and one law per last token.

    >>> chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    >>> chain.log_probs([(), (1,), (0, 1)]).exp()
    tensor([[0.5000, 0.5000],
            [0.2000, 0.8000],
            [0.2000, 0.8000]], dtype=torch.float64)
    """

    def __init__(self, initial: ArrayLike, transition: ArrayLike, *, eos: Sequence[int] = ()) -> None:
        first = torch.as_tensor(initial, dtype=torch.float64)[None]
        super().__init__(torch.cat([first, torch.as_tensor(transition, dtype=torch.float64)]), order=1, eos=eos)

    @classmethod
    def random(
        cls, size: int, *, seed: int, order: int = 1, concentration: float = 1.0, eos: Sequence[int] = ()
    ) -> Self:
        if order != 1:
            raise ValueError("a MarkovModel has order 1; use TableModel.random for a longer memory")
        return super().random(size, seed=seed, order=1, concentration=concentration, eos=eos)


class TableSession:
    """Rows are positions in the table: appending a token is integer arithmetic."""

    def __init__(self, model: TableModel, prompts: Sequence[Prefix]) -> None:
        self._model = model
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        states = model.states_of(list(distinct))
        self._states = states[[distinct[tuple(prompt)] for prompt in prompts]]
        self.cost = Cost()

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._states[rows] = self._model.next_states(self._states[rows], tokens.numpy())

    def log_probs(self, rows: np.ndarray) -> Tensor:
        self.cost += Cost(1, len(rows), len(rows))
        return self._model.log_table[torch.from_numpy(self._states[rows])]
