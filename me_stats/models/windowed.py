"""Texts longer than a model's context: a window that moves in hops, and a vocabulary without an end.

Past its context a model has no law of its own, so some rule must say what it reads. This one is a function of the
prefix alone, so everything that holds for a LanguageModel holds for it, CE = ME included; and it moves in hops, so
that a cache is rebuilt once in `hop` tokens and not at every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.models.base import (
    Cost,
    LanguageModel,
    Prefix,
    Session,
    checked_laws,
    open_session,
    path_log_probs,
    require_language_model,
)
from me_stats.models.conditioned import Conditioned
from me_stats.models.moving import MovingRows


def context_length(model: Any) -> int | None:
    """Longest sequence that `model` reads from its caller, or None for no limit.

    The smallest window among the networks inside, less what a `Conditioned` puts before it.
    """
    if isinstance(model, Windowed):
        return None
    parts = getattr(model, "components", None) or ([model.model] if hasattr(model, "model") else [])
    known = [context_length(part) for part in parts] or [getattr(model, "context_length", None)]
    limits = [limit for limit in known if limit is not None]
    taken = len(model.context) if isinstance(model, Conditioned) else 0
    return min(limits) - taken if limits else None


class Windowed(LanguageModel):
    r"""A model that reads the newest tokens of a prefix only: at most `window`, at least ``window - hop + 1``.

    A prefix of L tokens is read whole up to L = W, then from token :math:`s(L) = h \lceil (L-W)/h \rceil` on. Positions
    count from s(L), so the model never leaves the context that it knows. The oldest tokens go first, a prompt's
    included; what has to stay in view belongs inside: ``Windowed(Conditioned(model, system), 1024)`` drops none of the
    system prompt, which the window does not count.

    Parameters
    ----------
    model
        Any LanguageModel.
    window
        W, at least 2. It must fit into the model's own context together with what stands inside it.
    hop
        h in 1..W; default W/2. Each hop reads W - h + 1 tokens again, so a token costs W/h - 1 more at worst: one
        more by default. The law is another for every W and h.

    Examples
    --------
    >>> from me_stats.models.toy import TableModel
    >>> model = TableModel.random(3, order=4, seed=0)
    >>> short = Windowed(model, 3, hop=2)
    >>> bool((short.log_probs([(0, 1, 2, 0, 1)]) == model.log_probs([(2, 0, 1)])).all())
    True
    """

    def __init__(self, model: Any, window: int, *, hop: int | None = None) -> None:
        require_language_model(model)
        if not isinstance(window, (int, np.integer)) or window < 2:
            raise ValueError(f"window must be an integer of at least 2 tokens, got {window!r}")
        limit = context_length(model)
        if limit is not None and window > limit:
            raise ValueError(f"window is {window} tokens, but {model!r} reads at most {limit}; choose a smaller window")
        hop = window // 2 if hop is None else hop
        if not isinstance(hop, (int, np.integer)) or not 1 <= hop <= window:
            raise ValueError(f"hop must be an integer in 1..{window} (the window), got {hop!r}")
        self.model = model
        self.window, self.hop = int(window), int(hop)
        self.vocabulary = model.vocabulary

    def start(self, length: Any) -> Any:
        """First token that is read of a prefix of `length` tokens (a number or an array).

        >>> from me_stats.models.toy import MarkovModel
        >>> Windowed(MarkovModel.random(3, seed=0), 8, hop=4).start(np.arange(6, 14)).tolist()
        [0, 0, 0, 4, 4, 4, 4, 8]
        """
        return np.maximum(0, -(-(np.asarray(length) - self.window) // self.hop)) * self.hop

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        seen = [prefix[int(self.start(len(prefix))) :] for prefix in prefixes]
        return checked_laws(self.model, self.model.log_probs(seen), len(prefixes))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> WindowedSession:
        return WindowedSession(self, prompts, max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        heads, paths, pieces = [], [], []
        for prompt, path in zip(prompts, tokens, strict=True):
            whole = (*prompt, *path)
            starts = self.start(np.arange(len(prompt), len(whole)))
            cuts = [0, *(np.flatnonzero(np.diff(starts)) + 1).tolist(), len(path)]
            spans = [(begin, end) for begin, end in pairwise(cuts) if begin < end]
            heads += [whole[int(starts[begin]) : len(prompt) + begin] for begin, _ in spans]
            paths += [path[begin:end] for begin, end in spans]
            pieces.append(len(spans))
        laws = path_log_probs(self.model, heads, paths)
        for prompt, count in zip(prompts, pieces, strict=True):
            parts = [next(laws) for _ in range(count)]
            yield torch.cat(parts) if parts else self.log_probs([prompt])[:0]

    def __repr__(self) -> str:
        return f"Windowed({self.model!r}, {self.window}, hop={self.hop})"


class WindowedSession:
    """Rows in sessions of the inner model; rows that hop together move to a fresh one, with the tokens still in view.

    Memory is that of W tokens a row however long the rows grow.
    """

    def __init__(self, windowed: Windowed, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> None:
        self._windowed, self._left = windowed, max_new_tokens
        self._length = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        # The newest W tokens of each row, token i of a row in column i modulo W.
        self._recent = torch.zeros((len(prompts), windowed.window), dtype=torch.int64)
        seen = [tuple(prompt[int(windowed.start(len(prompt))) :]) for prompt in prompts]
        for row, (prompt, view) in enumerate(zip(prompts, seen, strict=True)):
            columns = torch.arange(len(prompt) - len(view), len(prompt)) % windowed.window
            self._recent[row, columns] = torch.tensor(view, dtype=torch.int64)
        self._rows = MovingRows(windowed.model, seen, max_new_tokens=self._room(seen))

    @property
    def cost(self) -> Cost:
        return self._rows.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        if tokens.device != self._recent.device:
            self._recent = self._recent.to(tokens.device)
        row, place = on_device(np.stack([rows, self._length[rows] % self._windowed.window]), tokens.device)
        self._recent[row, place] = tokens
        before = self._windowed.start(self._length[rows])
        self._length[rows] += 1
        hops = self._windowed.start(self._length[rows]) != before
        if not hops.any():
            self._rows.append(rows, tokens)
            return
        stay = np.flatnonzero(~hops)
        self._rows.append(rows[stay], tokens[on_device(stay, tokens.device)])
        self._move(rows[hops])

    def log_probs(self, rows: np.ndarray) -> Tensor:
        return self._rows.log_probs(rows)

    def _move(self, rows: np.ndarray) -> None:
        # Device to host once a hop: the inner model takes the tokens in view as a prompt.
        recent = self._recent[on_device(rows, self._recent.device)].cpu().numpy()
        stops = self._length[rows]
        views = [
            tuple(ring[np.arange(start, stop) % self._windowed.window].tolist())
            for ring, start, stop in zip(recent, self._windowed.start(stops).tolist(), stops.tolist(), strict=True)
        ]
        self._rows.move(rows, views, max_new_tokens=self._room(views))

    def _room(self, views: Sequence[Prefix]) -> int:
        """Tokens that the longest view can still get before it hops."""
        room = self._windowed.window - max(map(len, views), default=0)
        return room if self._left is None else min(room, self._left)


class Endless(LanguageModel):
    """A model whose sequences end at ``max_new_tokens`` only: the same laws over a vocabulary without an end.

    The end-of-sequence token stays a token that can be written, and the model reads on after it, as under
    ``ignore_eos`` in serving engines. Up to its first end a row has the law that it has without `Endless`.

    >>> from me_stats.models.toy import MarkovModel
    >>> Endless(MarkovModel.random(3, seed=0, eos=(2,))).vocabulary.eos
    ()
    """

    def __init__(self, model: Any) -> None:
        require_language_model(model)
        self.model = model
        self.vocabulary = dataclasses.replace(model.vocabulary, eos=())

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return checked_laws(self.model, self.model.log_probs(prefixes), len(prefixes))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
        return open_session(self.model, prompts, max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        return path_log_probs(self.model, prompts, tokens)

    def __repr__(self) -> str:
        return f"Endless({self.model!r})"
