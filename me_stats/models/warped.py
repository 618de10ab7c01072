"""Per-step transforms of one law, and the model that applies them.

Where the transform stands decides what ME can do. ``Ensemble([Warped(m, TopK(5)) for m in models], λ)``
is transform-then-mix: CE and ME agree for every transform. ``Warped(Ensemble(models, λ), TopK(5))`` is
mix-then-transform: only CE can sample it, unless the transform is affine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import (
    Cost,
    LanguageModel,
    Prefix,
    checked_laws,
    open_session,
    path_log_probs,
    require_language_model,
)


class Warp(ABC):
    """A map from law to law, (B, V) → (B, V), row by row; the result is normalised."""

    @abstractmethod
    def __call__(self, log_probs: Tensor) -> Tensor: ...

    def at(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """Transformed log-probabilities (B,) of one token each, without the rest of the law where that is cheaper.

        >>> law = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> TopK(2).at(law, torch.tensor([1])).exp()
        tensor([0.3750])
        """
        return self(log_probs).gather(-1, tokens[:, None])[:, 0]


@dataclass(frozen=True)
class Temperature(Warp):
    r"""Tempered law, :math:`P(x)^{1/τ} / \sum_y P(y)^{1/τ}`.

    τ = 0 is the limit τ → 0: uniform over the most probable tokens, so that ties keep equal mass. Use
    `Greedy` for an arg max that picks one of them. τ = 1 changes nothing.
    """

    tau: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"Temperature must be finite and at least 0, got {self.tau}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.tau == 1:
            return log_probs
        top = log_probs.amax(-1, keepdim=True)
        if self.tau == 0:
            return _keep(log_probs, log_probs == top, uniform=True)
        # Subtracting the maximum first keeps a small τ from overflowing.
        return ((log_probs - top) / self.tau).log_softmax(-1)

    def at(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        if self.tau in (0, 1):
            return super().at(log_probs, tokens)
        scaled = (log_probs - log_probs.amax(-1, keepdim=True)).div_(self.tau)
        chosen = scaled.gather(-1, tokens[:, None])[:, 0]
        return chosen - scaled.exp_().sum(-1).log()


@dataclass(frozen=True)
class TopK(Warp):
    """The k most probable tokens, renormalised.

    Tokens tied with the k-th are all kept, as transformers' ``TopKLogitsWarper`` does, so the result does
    not depend on token numbering. k ≥ V changes nothing.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, (int, np.integer)) or self.k < 1:
            raise ValueError(f"TopK needs an integer k of at least 1, got {self.k}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.k >= log_probs.shape[-1]:
            return log_probs
        smallest = log_probs.topk(self.k, dim=-1).values[..., -1:]
        return _keep(log_probs, log_probs >= smallest)

    def at(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        if self.k >= log_probs.shape[-1]:
            return super().at(log_probs, tokens)
        top = log_probs.topk(self.k, dim=-1).values
        smallest = top[:, -1:]
        # The mass of the first k, and of those tied with the last of them.
        tied = (log_probs == smallest).sum(-1) - (top == smallest).sum(-1)
        mass = top.exp().sum(-1) + tied * smallest[:, 0].exp()
        chosen = log_probs.gather(-1, tokens[:, None])
        return torch.where(chosen >= smallest, chosen, -math.inf)[:, 0] - mass.log()


@dataclass(frozen=True)
class TopP(Warp):
    """Nucleus: the fewest most probable tokens whose mass reaches p, renormalised.

    Tokens tied with the last one are all kept (transformers' ``TopPLogitsWarper`` keeps an arbitrary one
    of them; without ties the two agree). p = 1 changes nothing; the most probable token is always kept.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP needs 0 < p ≤ 1, got {self.p}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.p == 1:
            return log_probs
        ascending = log_probs.sort(dim=-1).values
        # Mass of a token and all below it: dropped while it does not exceed 1 − p.
        dropped = ascending.exp().cumsum(-1, dtype=torch.float64) <= 1 - self.p
        count = dropped.sum(-1, keepdim=True).clamp(max=log_probs.shape[-1] - 1)
        return _keep(log_probs, log_probs >= ascending.gather(-1, count))


@dataclass(frozen=True)
class MinP(Warp):
    """Tokens at least `p` times as probable as the most probable one, renormalised. p = 0 changes nothing."""

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"MinP needs 0 ≤ p ≤ 1, got {self.p}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.p == 0:
            return log_probs
        mass = log_probs.exp()
        return _keep(log_probs, mass >= self.p * mass.amax(-1, keepdim=True))


@dataclass(frozen=True)
class Greedy(Warp):
    """All mass on the most probable token; the lowest id among ties, as an arg max returns it."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        best = log_probs.argmax(-1, keepdim=True)
        return torch.full_like(log_probs, -math.inf).scatter_(-1, best, 0.0)

    def at(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(log_probs.argmax(-1) == tokens, 0.0, -math.inf).to(log_probs.dtype)


class Warped(LanguageModel):
    """A model whose next-token law is transformed, left to right, by `warps`.

    Examples
    --------
    >>> from me_stats.models.toy import MarkovModel
    >>> model = Warped(MarkovModel.random(5, seed=0), Temperature(0.7), TopK(2))
    >>> int((model.log_probs([(1,)]).exp() > 0).sum())
    2
    """

    def __init__(self, model: Any, *warps: Warp) -> None:
        require_language_model(model)
        for warp in warps:
            if not isinstance(warp, Warp):
                raise TypeError(f"warps must be Warp objects such as TopK(5), got {warp!r}")
        self.model = model
        self.warps = warps
        self.vocabulary = model.vocabulary

    def warp(self, log_probs: Tensor) -> Tensor:
        """The transformed laws (B, V); a ValueError if a transform forgot to renormalise."""
        warped = log_probs
        for warp in self.warps:
            warped = warp(warped)
        return checked_laws(self, warped, len(log_probs)) if self.warps else log_probs

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return self.warp(checked_laws(self.model, self.model.log_probs(prefixes), len(prefixes)))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> WarpedSession:
        return WarpedSession(self, prompts, max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        for laws in path_log_probs(self.model, prompts, tokens):
            yield self.warp(laws)

    def __repr__(self) -> str:
        return f"Warped({', '.join(map(repr, (self.model, *self.warps)))})"


class WarpedSession:
    """The inner model's session, its laws transformed as they are read."""

    def __init__(self, model: Warped, prompts: Sequence[Prefix], *, max_new_tokens: int | None) -> None:
        self._warp = model.warp
        self._session = open_session(model.model, prompts, max_new_tokens=max_new_tokens)
        if hasattr(self._session, "drop"):
            self.drop = self._session.drop  # a session that can take tokens back can do so here too

    @property
    def cost(self) -> Cost:
        return self._session.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._session.append(rows, tokens)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        return self._warp(self._session.log_probs(rows))


def _keep(log_probs: Tensor, kept: Tensor, *, uniform: bool = False) -> Tensor:
    base = torch.zeros_like(log_probs) if uniform else log_probs
    return base.masked_fill(~kept, -math.inf).log_softmax(-1)
