"""The mixture Σ λ_i P_i as a language model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.mixing import Mixing, checked_log_weights
from me_stats.models.base import (
    Cost,
    LanguageModel,
    Prefix,
    Session,
    checked_laws,
    open_session,
    require_language_model,
)
from me_stats.models.base import path_log_probs as component_path_log_probs

_CHUNK = 1 << 22  # probabilities that `chunked_paths` keeps together
_BLOCK = 1 << 18  # probabilities that `mix` adds up at a time on a processor


class Combination(LanguageModel):
    """A law that `combine` makes of K component laws and the mixing weights, all at one prefix.

    Components and mixing are those of an `Ensemble`, with the same errors.
    """

    def __init__(self, components: Sequence[Any], mixing: Mixing) -> None:
        if not components:
            raise ValueError("components must hold at least one language model")
        if not isinstance(mixing, Mixing):
            raise TypeError(f"mixing must be a Mixing such as ConstantMixing([...]), got {mixing!r}")
        for i, component in enumerate(components):
            require_language_model(component, name=f"components[{i}]")
            components[0].vocabulary.require_equal(
                component.vocabulary, name="components[0]", other_name=f"components[{i}]"
            )
        if mixing.n_components != len(components):
            raise ValueError(
                f"mixing has {mixing.n_components} weights for {len(components)} components; give one each"
            )
        self.components = tuple(components)
        self.mixing = mixing
        self.vocabulary = components[0].vocabulary

    @abstractmethod
    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        """The law (B, V) from K component laws (B, V) and log-weights (B, K)."""

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        laws = [checked_laws(c, c.log_probs(prefixes), len(prefixes)) for c in self.components]
        return self.combine(laws, checked_log_weights(self.mixing, prefixes))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> EnsembleSession:
        return EnsembleSession(self, prompts, max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        for laws, log_weights in self.component_paths(prompts, tokens):
            yield self.combine(laws, log_weights)

    def component_paths(
        self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Teacher-forced laws of each component, K × (T_row, V), and log-weights (T_row, K), per row."""
        paths = [component_path_log_probs(c, prompts, tokens) for c in self.components]
        for prompt, path, *laws in zip(prompts, tokens, *paths, strict=True):
            yield tuple(laws), self.mixing.path_log_weights(prompt, path)


class Ensemble(Combination):
    r"""Mixture of K laws over one vocabulary, :math:`P(x|c) = \sum_i w_i(c) P_i(x|c)`.

    Parameters
    ----------
    components
        K language models over equal vocabularies. Transforms of single components
        (``Warped(m, TopK(5))``) go here: transform-then-mix, which ME samples exactly.
    mixing
        The weights, `ConstantMixing` or any rule of the prefix.

    Raises
    ------
    ValueError
        If the vocabularies differ or the mixing has another number of components.

    Examples
    --------
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import MarkovModel
    >>> a, b = MarkovModel.random(3, seed=0), MarkovModel.random(3, seed=1)
    >>> ensemble = Ensemble([a, b], ConstantMixing([0.5, 0.5]))
    >>> mean = (a.log_probs([(0,)]).exp() + b.log_probs([(0,)]).exp()) / 2
    >>> bool(torch.allclose(ensemble.log_probs([(0,)]).exp(), mean))
    True

    Source: arXiv 2605.00419, section 2.1.
    """

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        return mix(laws, log_weights)

    def __repr__(self) -> str:
        return f"Ensemble({list(self.components)!r}, {self.mixing!r})"


def component_paths(
    model: Any, prompts: Sequence[Prefix], tokens: Sequence[Prefix]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """`Ensemble.component_paths` of any model: one that is not an Ensemble is one component of weight 1."""
    if isinstance(model, Ensemble):
        yield from model.component_paths(prompts, tokens)
    else:
        for law in component_path_log_probs(model, prompts, tokens):
            yield (law,), torch.zeros(len(law), 1)


def chunked_paths(
    model: Any, prompts: Sequence[Prefix], tokens: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Laws (L, K, V), log-weights (L, K) and tokens (L,) along continuations, row after row.

    Short rows are joined and long ones cut, so that what stands in memory is bounded whatever T and V are.
    """
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    waiting = 0
    paths = component_paths(model, prompts, tokens)
    for number, ((laws, log_weights), row) in enumerate(zip(paths, tokens, strict=True), start=1):
        stacked = torch.stack([law.to(laws[0].device) for law in laws], dim=1)
        pending.append((stacked, log_weights, torch.tensor(row, dtype=torch.int64)))
        waiting += stacked.numel()
        if number == len(tokens) or waiting >= _CHUNK:
            joined = [torch.cat(arrays) for arrays in zip(*pending, strict=True)]
            size = max(1, _CHUNK // math.prod(joined[0].shape[1:]))
            yield from zip(*(array.split(size) for array in joined), strict=True)
            pending, waiting = [], 0


class EnsembleSession:
    """One session per component, each catching up only when it is read."""

    def __init__(self, model: Combination, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> None:
        self.components: tuple[Session, ...] = tuple(
            open_session(c, prompts, max_new_tokens=max_new_tokens) for c in model.components
        )
        self.mixing = model.mixing.session(prompts)
        self._combine = model.combine

    @property
    def cost(self) -> Cost:
        # A mixing that runs a model of its own counts that too.
        own: Cost = getattr(self.mixing, "cost", Cost())
        return sum((session.cost for session in self.components), own)

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for session in self.components:
            session.append(rows, tokens)
        self.mixing.append(rows, tokens)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        return self._combine([session.log_probs(rows) for session in self.components], self.mixing.log_weights(rows))


def mix(laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
    """log Σ_i w_i P_i from K laws (B, V) and log-weights (B, K), in the laws' precision.

    Weights that round to zero mass keep their -inf; no term is ever inf - inf.
    """
    weights = on_device(log_weights.to(torch.promote_types(laws[0].dtype, torch.float32)), laws[0].device)
    rows, size = laws[0].shape
    # On a processor the sums of a block of rows stay in its cache; pages of new memory cost more than the arithmetic.
    step = max(1, _BLOCK // max(1, size)) if laws[0].is_cpu else rows
    if step >= rows or len(laws) == 1:
        return _mix(laws, weights)
    blocks = zip(*(law.split(step) for law in (*laws, weights)), strict=True)
    mixed = laws[0].new_empty((rows, size), dtype=torch.promote_types(laws[0].dtype, weights.dtype))
    for place, block in zip(mixed.split(step), blocks, strict=True):
        place.copy_(_mix(block[:-1], block[-1]))
    return mixed


def _mix(laws: Sequence[Tensor], weights: Tensor) -> Tensor:
    mixed = laws[0] + weights[:, :1]
    for i, law in enumerate(laws[1:], start=1):
        mixed = log_add(mixed, law.to(mixed.device) + weights[:, i : i + 1])
    return mixed


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), the same for equal entries.

    The last bit of torch.logaddexp depends on an entry's place in the batch, and a warp after the mixture would
    then break ties by place.
    """
    high = torch.maximum(a, b)
    total = high + (torch.minimum(a, b) - high).exp_().log1p_()
    return torch.where(high == -torch.inf, high, total)
