"""What a sampler did, and the component log-probabilities of what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from me_stats.models.base import Cost
from me_stats.models.ensemble import Ensemble, component_paths
from me_stats.vocabulary import Prompt, as_prompts


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probabilities of given sequences: K floats a token, never V.

    Attributes
    ----------
    component_log_probs
        (N, T, K) natural log P_i(x_t | prefix); 0 after the end.
    log_weights
        (N, T, K) natural log w_i(prefix); 0 after the end.
    """

    component_log_probs: Tensor
    log_weights: Tensor

    @cached_property
    def log_probs(self) -> Tensor:
        """(N, T) log of the mixture's probability of each token; 0 after the end."""
        mixed = (self.component_log_probs + self.log_weights).logsumexp(-1)
        # After the end every entry is log 1 + log 1, and the K copies must not add up.
        ended = (self.component_log_probs == 0).all(-1) & (self.log_weights == 0).all(-1)
        return mixed.masked_fill(ended, 0.0)

    @cached_property
    def responsibilities(self) -> Tensor:
        """(N, T, K) posterior probability that component i wrote the token, given prefix and token.

        1/K after the end. A token that no component can write teaches nothing: its row is the weights.
        """
        joint = self.component_log_probs + self.log_weights
        impossible = (joint == -torch.inf).all(-1, keepdim=True)
        return torch.where(impossible, self.log_weights, joint).softmax(-1)


@dataclass(frozen=True)
class Trace:
    """Generated tokens with what is needed to doubt them.

    Attributes
    ----------
    tokens
        (N, T) int64; -1 after the end. T is the longest row, at most ``max_new_tokens``.
    lengths
        (N,) tokens written, the end-of-sequence token included.
    stop_reason
        One of ``"eos"`` or ``"length"`` per row.
    components
        (N, T) int64, the component that wrote each token, -1 after the end; None where the sampler drew
        from the mixture itself.
    prompts, prompt_index
        Token ids of the distinct prompts, and (N,) which one each row continued.
    rows
        (N,) global row numbers: with the seed they address the row's random numbers.
    cost
        Forwards, tokens forwarded and laws read.
    """

    model: Any
    tokens: Tensor
    lengths: Tensor
    components: Tensor | None
    prompts: tuple[tuple[int, ...], ...]
    prompt_index: Tensor
    rows: Tensor
    seed: int | None
    cost: Cost
    sampler: str

    @property
    def stop_reason(self) -> list[str]:
        last = self.tokens.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]
        eos = torch.isin(last, torch.tensor(self.model.vocabulary.eos, dtype=torch.int64))
        return ["eos" if ended else "length" for ended in eos.tolist()]

    @property
    def mask(self) -> Tensor:
        """(N, T) True where a token was written."""
        return self.tokens >= 0

    @cached_property
    def score(self) -> Score:
        """Teacher-forced scores under the model, computed at first use: one pass per component."""
        return score(self.model, self.row_prompts(), self.sequences())

    @property
    def component_log_probs(self) -> Tensor:
        """(N, T, K) natural log P_i(x_t | prefix) of the tokens written; 0 after the end."""
        return self.score.component_log_probs

    @property
    def log_probs(self) -> Tensor:
        """(N, T) natural log-probability of each token under the model; 0 after the end."""
        return self.score.log_probs

    def texts(self) -> list[str]:
        """The continuations as text (ids, if the vocabulary has no tokenizer)."""
        return [self.model.vocabulary.decode(row) for row in self.sequences()]

    def sequences(self) -> list[list[int]]:
        """Token ids that each row wrote, without padding."""
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[:length] for row, length in rows]

    def row_prompts(self) -> list[tuple[int, ...]]:
        """Token ids of the prompt that each row continued."""
        return [self.prompts[i] for i in self.prompt_index.tolist()]


def score(model: Any, prompts: Prompt | Sequence[Prompt], tokens: Sequence[Sequence[int]] | Tensor) -> Score:
    """Log-probabilities of given continuations by teacher forcing, one pass per component.

    A model that is not an Ensemble counts as one component with weight 1.

    Parameters
    ----------
    prompts
        One prompt per row of `tokens`, or a single prompt for all rows.
    tokens
        N continuations: ragged lists, or a tensor (N, T) with -1 after the end.

    Examples
    --------
    >>> from me_stats.models.toy import MarkovModel
    >>> chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    >>> score(chain, [0], [[1, 1]]).log_probs.exp()
    tensor([[0.1000, 0.8000]], dtype=torch.float64)
    """
    rows = _written(tokens, model.vocabulary.size)
    encoded = [model.vocabulary.encode(prompt) for prompt in as_prompts(prompts)]
    if len(encoded) == 1:
        encoded *= len(rows)
    if len(encoded) != len(rows):
        raise ValueError(f"prompts has {len(encoded)} entries for {len(rows)} rows of tokens; give one each")
    n_components = len(model.components) if isinstance(model, Ensemble) else 1
    shape = (len(rows), max(map(len, rows), default=0), n_components)
    component_log_probs = torch.zeros(shape, dtype=torch.float64)
    log_weights = torch.zeros(shape, dtype=torch.float64)
    for row, (laws, weights) in enumerate(component_paths(model, encoded, rows)):
        drawn = torch.tensor(rows[row], dtype=torch.int64)
        log_weights[row, : len(drawn)] = weights
        for i, law in enumerate(laws):
            picked = law.gather(1, drawn.to(law.device)[:, None])[:, 0]
            component_log_probs[row, : len(drawn), i] = picked.to("cpu", torch.float64)
    return Score(component_log_probs, log_weights)


def _written(tokens: Sequence[Sequence[int]] | Tensor, size: int) -> list[list[int]]:
    """Rows of token ids without the -1 that follow their end."""
    listed = tokens.tolist() if isinstance(tokens, Tensor) else [[int(token) for token in row] for row in tokens]
    rows = [row[: row.index(-1)] if -1 in row else row for row in listed]
    for row, padded in zip(rows, listed, strict=True):
        if any(token != -1 for token in padded[len(row) :]):
            raise ValueError("tokens has an id after a -1; -1 may only follow a row's end")
        if row and not 0 <= min(row) <= max(row) < size:
            raise ValueError(f"tokens has an id outside the vocabulary 0..{size - 1}")
    return rows
