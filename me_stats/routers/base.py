"""Learned mixing weights: a network that reads the prefix, and the `Mixing` that makes it samplable.

A `Router` is written once and read in three ways: whole documents at once (training, teacher forcing), the last
entry of a prefix (the definition), and row by row as tokens arrive (the session). The test of every router is that
the three agree.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from me_stats.mixing import Mixing, MixingSession, checked_log_weights
from me_stats.models.base import Cost, Prefix

_BATCH_TOKENS = 1 << 16  # positions, padding included, that are scored together


class RouterStream(Protocol):
    """Scores of rows that advance one token at a time."""

    @property
    def cost(self) -> Cost: ...

    def append(self, rows: np.ndarray, tokens: Tensor) -> None: ...

    def scores(self, rows: np.ndarray) -> Tensor:
        """(B, K) what `Router.scores` gives for the prefixes of `rows`."""
        ...


class Router(torch.nn.Module, ABC):
    r"""Weights of K components from the prefix: :math:`w(c) = \mathrm{softmax}((b + s(c)) / t)`.

    Subclasses say what a prefix looks like (`features`, fixed) and how it is scored (`scores`, trained). Their last
    map starts at zero, so that an untrained router is the constant mixture softmax(b).

    Parameters
    ----------
    n_components
        K, at least 1.

    Attributes
    ----------
    bias, temperature
        b (K,) and t, which `train_router` fits last.
    learning_rate
        Default step of `train_router`.
    """

    learning_rate: float = 0.01
    bias: Tensor
    temperature: Tensor

    def __init__(self, n_components: int) -> None:
        super().__init__()
        self.n_components = at_least(1, n_components=n_components)
        self.bias = torch.nn.Parameter(torch.zeros(n_components))
        self.register_buffer("temperature", torch.ones(()))

    @abstractmethod
    def features(self, sequences: Sequence[Prefix]) -> list[Tensor]:
        """For each sequence of T tokens a tensor (T + 1, ...): entry t describes its first t tokens."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, L, K) from features (B, L, ...) that start at the empty prefix; entry t reads entries 0..t."""

    @abstractmethod
    def stream(self, prompts: Sequence[Prefix]) -> RouterStream:
        """One row per prompt."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments that build this router again, but for a network it reads."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, L, K)."""
        return (self.bias + self.scores(features)) / self.temperature

    def duplicate(self) -> Self:
        """A copy with parameters of its own; a network that the router reads is shared."""
        return copy.deepcopy(self, {id(part): part for part in self._shared()})

    def _shared(self) -> tuple[Any, ...]:
        return ()

    @property
    def n_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options().items())})"


class Decodable(Mixing):
    """A mixing that can be sharpened; both results read the prefix alone, so that ME samples them too."""

    def threshold(self) -> Thresholded:
        """All weight on the largest, the first of equals."""
        return Thresholded(self)

    def tempered(self, t: float) -> Tempered:
        """Weights in proportion to w^(1/t): sharper below 1, flatter above."""
        return Tempered(self, t)


class RouterMixing(Decodable):
    """A router as mixing weights: CE marginalises them, ME draws from them.

    The router is copied and runs in float64, so that training goes on without changing a law that is being sampled,
    and batches of another shape round alike to about 1e-15.

    Examples
    --------
    >>> from me_stats import Ensemble, MESampler
    >>> from me_stats.models import MarkovModel
    >>> from me_stats.routers import NgramRouter
    >>> mixing = RouterMixing(NgramRouter(2))
    >>> mixing.log_weights([(0, 1)]).exp()
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    >>> toys = [MarkovModel.random(3, seed=s) for s in (0, 1)]
    >>> MESampler(Ensemble(toys, mixing)).sample([0], max_new_tokens=4).lengths.tolist()
    [4]
    """

    def __init__(self, router: Router) -> None:
        if not isinstance(router, Router):
            raise TypeError(f"router must be a Router such as NgramRouter(2), got {router!r:.80}")
        self.router = router.duplicate().double().eval().requires_grad_(False)
        self.n_components = router.n_components

    def log_weights(self, prefixes: Sequence[Prefix]) -> Tensor:
        paths = document_log_weights(self.router, prefixes)
        return torch.stack([path[-1] for path in paths]) if paths else torch.empty((0, self.n_components)).double()

    def session(self, prompts: Sequence[Prefix]) -> MixingSession:
        return _RouterSession(self.router, prompts)

    def path_log_weights(self, prompt: Prefix, tokens: Sequence[int]) -> Tensor:
        if not len(tokens):
            return torch.empty((0, self.n_components), dtype=torch.float64)
        (path,) = document_log_weights(self.router, [(*prompt, *tokens[:-1])])
        return path[len(prompt) :]

    def __repr__(self) -> str:
        return f"RouterMixing({self.router!r})"


class _RouterSession:
    def __init__(self, router: Router, prompts: Sequence[Prefix]) -> None:
        self._router = router
        with torch.no_grad():
            self._stream = router.stream([tuple(prompt) for prompt in prompts])

    @property
    def cost(self) -> Cost:
        """Model runs behind the weights; an ensemble's session adds them to its own."""
        return self._stream.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        with torch.no_grad():
            self._stream.append(rows, tokens.cpu())

    def log_weights(self, rows: np.ndarray) -> Tensor:
        with torch.no_grad():
            logits = (self._router.bias + self._stream.scores(rows)) / self._router.temperature
        return logits.log_softmax(-1)


class _Mapped(Decodable):
    """Another mixing, its weights changed row by row."""

    def __init__(self, mixing: Mixing) -> None:
        if not isinstance(mixing, Mixing):
            raise TypeError(f"mixing must be a Mixing such as RouterMixing(...), got {mixing!r:.80}")
        self.mixing = mixing
        self.n_components = mixing.n_components

    @abstractmethod
    def change(self, log_weights: Tensor) -> Tensor:
        """The new log-weights (B, K)."""

    def log_weights(self, prefixes: Sequence[Prefix]) -> Tensor:
        return self.change(checked_log_weights(self.mixing, prefixes))

    def session(self, prompts: Sequence[Prefix]) -> MixingSession:
        return _MappedSession(self, prompts)

    def path_log_weights(self, prompt: Prefix, tokens: Sequence[int]) -> Tensor:
        return self.change(self.mixing.path_log_weights(prompt, tokens))


class Thresholded(_Mapped):
    """All weight on the component of the largest weight; the lowest index among equals.

    >>> from me_stats.mixing import ConstantMixing
    >>> Thresholded(ConstantMixing([0.25, 0.5, 0.25])).log_weights([()]).exp().tolist()
    [[0.0, 1.0, 0.0]]
    """

    def change(self, log_weights: Tensor) -> Tensor:
        best = log_weights.argmax(-1, keepdim=True)
        return torch.full_like(log_weights, -math.inf).scatter_(-1, best, 0.0)

    def __repr__(self) -> str:
        return f"Thresholded({self.mixing!r})"


class Tempered(_Mapped):
    """Weights in proportion to w^(1/t), t > 0; t → 0 is `Thresholded` but for ties."""

    def __init__(self, mixing: Mixing, t: float) -> None:
        super().__init__(mixing)
        if not (math.isfinite(t) and t > 0):
            raise ValueError(f"t must be finite and positive, got {t}; Thresholded is the limit t → 0")
        self.t = t

    def change(self, log_weights: Tensor) -> Tensor:
        # Subtracting the maximum first keeps a small t from overflowing.
        return ((log_weights - log_weights.amax(-1, keepdim=True)) / self.t).log_softmax(-1)

    def __repr__(self) -> str:
        return f"Tempered({self.mixing!r}, {self.t})"


class _MappedSession:
    def __init__(self, mapped: _Mapped, prompts: Sequence[Prefix]) -> None:
        self._change = mapped.change
        self._inner = mapped.mixing.session(prompts)

    @property
    def cost(self) -> Cost:
        return mixing_cost(self._inner)

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._inner.append(rows, tokens)

    def log_weights(self, rows: np.ndarray) -> Tensor:
        return self._change(self._inner.log_weights(rows))


def mixing_cost(session: MixingSession) -> Cost:
    """Model runs of a mixing session; none for one that counts nothing."""
    cost: Cost = getattr(session, "cost", Cost())
    return cost


def document_log_weights(router: Router, sequences: Sequence[Prefix]) -> list[Tensor]:
    """Log-weights (T + 1, K) before every token of each sequence and after its last, in one pass."""
    features = router.features(sequences)
    order = sorted(range(len(features)), key=lambda index: len(features[index]))
    paths: list[Tensor] = [torch.empty(0)] * len(features)
    for batch in length_batches([len(features[index]) for index in order], _BATCH_TOKENS):
        mine = [order[place] for place in batch]
        with torch.no_grad():
            padded = torch.nn.utils.rnn.pad_sequence([features[index] for index in mine], batch_first=True)
            # Entry t reads nothing after it, so that padding on the right needs no mask.
            found = router(padded).log_softmax(-1)
        for index, path in zip(mine, found, strict=True):
            paths[index] = path[: len(features[index])]
    return paths


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places 0..n-1 cut in order into batches of at most `budget` positions with padding, or of one place.

    >>> length_batches([2, 3, 4, 9], 8)
    [[0, 1], [2], [3]]
    """
    batches: list[list[int]] = []
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
            longest = length
    return batches


def at_least(smallest: int, **given: int) -> int:
    """The one given count, or a ValueError that names it."""
    ((name, value),) = given.items()
    if not isinstance(value, (int, np.integer)) or value < smallest:
        raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
    return int(value)
