"""Mixing weights λ: which component speaks next, as a function of the prefix alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class MixingSession(Protocol):
    """Log-weights of rows that advance one token at a time."""

    def append(self, rows: np.ndarray, tokens: Tensor) -> None: ...

    def log_weights(self, rows: np.ndarray) -> Tensor:
        """(B, K) log-weights for the next token of `rows`."""
        ...


class Mixing(ABC):
    """A rule w(prefix) on the simplex. It reads the prefix and nothing else: that is what keeps ME exact."""

    n_components: int

    @abstractmethod
    def log_weights(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Natural log-weights (B, K), float64; a zero weight is -inf."""

    def session(self, prompts: Sequence[Sequence[int]]) -> MixingSession:
        return _PrefixMixingSession(self, prompts)

    def path_log_weights(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Log-weights (T, K) along a given continuation: entry t is for ``tokens[t]``."""
        return checked_log_weights(self, [(*prompt, *tokens[:step]) for step in range(len(tokens))])


class ConstantMixing(Mixing):
    """The same weights λ at every step, as in the paper.

    Parameters
    ----------
    weights
        (K,) non-negative and summing to 1 within 1e-9. They are never normalised silently: a λ that
        does not sum to 1 is a mistake upstream, and mixing it would be a different ensemble.

    Examples
    --------
    >>> ConstantMixing([0.25, 0.75]).weights
    tensor([0.2500, 0.7500], dtype=torch.float64)
    >>> ConstantMixing([1, 1])
    Traceback (most recent call last):
    ...
    ValueError: weights must sum to 1, got [1.0, 1.0] with sum 2; divide by the sum if proportions were meant
    """

    def __init__(self, weights: Sequence[float] | np.ndarray | Tensor) -> None:
        self.weights = _simplex(weights)
        self.n_components = len(self.weights)
        self._log_weights = self.weights.log()

    def log_weights(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        return self._log_weights.expand(len(prefixes), -1)

    def session(self, prompts: Sequence[Sequence[int]]) -> MixingSession:
        return _ConstantMixingSession(self._log_weights)

    def path_log_weights(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return self._log_weights.expand(len(tokens), -1)

    def __repr__(self) -> str:
        return f"ConstantMixing({[round(w, 6) for w in self.weights.tolist()]})"


class _ConstantMixingSession:
    def __init__(self, log_weights: Tensor) -> None:
        self._log_weights = log_weights

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        pass  # nothing depends on the prefix

    def log_weights(self, rows: np.ndarray) -> Tensor:
        return self._log_weights.expand(len(rows), -1)


class _PrefixMixingSession:
    def __init__(self, mixing: Mixing, prompts: Sequence[Sequence[int]]) -> None:
        self._mixing = mixing
        self._prefixes = [tuple(prompt) for prompt in prompts]

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._prefixes[row] = (*self._prefixes[row], token)

    def log_weights(self, rows: np.ndarray) -> Tensor:
        return checked_log_weights(self._mixing, [self._prefixes[row] for row in rows.tolist()])


def checked_log_weights(mixing: Mixing, prefixes: Sequence[Sequence[int]]) -> Tensor:
    """The weights of `mixing` at `prefixes`, or a ValueError unless they are (B, K) log-probabilities.

    ME would renormalise weights that CE uses as they are, so unnormalised ones would look like a bug in ME.
    """
    weights = torch.as_tensor(mixing.log_weights(prefixes))
    name = type(mixing).__name__
    if weights.shape != (len(prefixes), mixing.n_components):
        raise ValueError(
            f"{name}.log_weights returned shape {tuple(weights.shape)}, expected "
            f"{(len(prefixes), mixing.n_components)} (one weight per component for each prefix)"
        )
    # A NaN fails the comparison too.
    if not bool((weights.logsumexp(-1).abs() <= 1e-6).all()):
        raise ValueError(f"{name}.log_weights is not normalised; return log-probabilities over the components")
    return weights


def _simplex(weights: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    values = torch.as_tensor(weights, dtype=torch.float64).detach().cpu().clone()
    shown = [round(w, 9) for w in values.flatten().tolist()[:8]]
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"weights must be one number per component, got shape {tuple(values.shape)}")
    if not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError(f"weights must be finite and non-negative, got {shown}")
    total = float(values.sum())
    if abs(total - 1) > 1e-9:
        raise ValueError(
            f"weights must sum to 1, got {shown} with sum {total:.12g}; divide by the sum if proportions were meant"
        )
    return values
