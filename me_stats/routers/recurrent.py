"""A router that remembers the whole prefix in a few floats: a gated recurrent unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, Prefix
from me_stats.routers.base import Router, at_least


class RecurrentRouter(Router):
    r"""A GRU over token embeddings, :math:`s(c) = W h_t` with :math:`h_t = \mathrm{GRU}(E[x_t], h_{t-1})`.

    A mark is read before the first token. Sessions keep `width` floats a row and pay one step per token.

    Parameters
    ----------
    vocabulary_size
        V; ids outside 0..V-1 are refused.
    width
        Of embeddings and state.
    seed
        Of the random initial weights; the global generator is left alone.

    Examples
    --------
    >>> router = RecurrentRouter(2, 5, width=4)
    >>> router.features([(1, 2)])[0].tolist(), router.scores(torch.tensor([[0, 2, 3]])).shape
    ([0, 2, 3], torch.Size([1, 3, 2]))

    Source: Cho et al. 2014, arXiv 1406.1078.
    """

    def __init__(self, n_components: int, vocabulary_size: int, *, width: int = 32, seed: int = 0) -> None:
        super().__init__(n_components)
        self.vocabulary_size, self.width = at_least(1, vocabulary_size=vocabulary_size), at_least(1, width=width)
        self.seed = seed
        with torch.random.fork_rng(devices=[]):  # the layers below draw their first values from the global generator
            self.embedding = torch.nn.Embedding(vocabulary_size + 1, width)
            self.cell = torch.nn.GRU(width, width, batch_first=True)
            self.head = torch.nn.Linear(width, n_components, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(self.embedding.weight.shape, generator=generator))
            for parameter in self.cell.parameters():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / width**0.5)
            self.head.weight.zero_()

    def features(self, sequences: Sequence[Prefix]) -> list[Tensor]:
        return [self._marked(tokens) for tokens in sequences]

    def scores(self, features: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(features))[0])

    def stream(self, prompts: Sequence[Prefix]) -> _RecurrentStream:
        return _RecurrentStream(self, prompts)

    def options(self) -> dict[str, Any]:
        return {
            "n_components": self.n_components,
            "vocabulary_size": self.vocabulary_size,
            "width": self.width,
            "seed": self.seed,
        }

    def _marked(self, tokens: Prefix) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary_size:
            raise ValueError(f"prefixes hold a token id outside the vocabulary 0..{self.vocabulary_size - 1}")
        return torch.nn.functional.pad(ids + 1, (1, 0))  # 0 is the mark before the first token


class _RecurrentStream:
    def __init__(self, router: RecurrentRouter, prompts: Sequence[Prefix]) -> None:
        self._router = router
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        states = torch.empty((len(distinct), router.width), dtype=router.bias.dtype)
        for prompt, place in distinct.items():
            states[place] = router.cell(router.embedding(router._marked(prompt)))[1][0]
        self._states = states[[distinct[tuple(prompt)] for prompt in prompts]]
        self.cost = Cost()

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        where = torch.from_numpy(rows)
        inputs = self._router.embedding(tokens[:, None] + 1)
        self._states[where] = self._router.cell(inputs, self._states[where][None])[1][0]

    def scores(self, rows: np.ndarray) -> Tensor:
        return self._router.head(self._states[torch.from_numpy(rows)])
