"""What a sampler did, and the component log-probabilities of what it wrote.

Rows that share component draws
-------------------------------
Under ``MESampler(ensemble, shared_rows=B)`` every row has its usual law, and rows of one of `Trace.groups` depend on
each other: a test that counts them as independent rejects a right sampler far too often.

Corrects, by counting groups: `lags.lag_test` (one path a group), `lags.prefill_per_step`, `exact.sampler_law` (walks
one row of each group).

Refuses, through `require_independent_rows`: `Evidence.from_trace`, `sensitivity.reweight` (and `Reweighted`),
`score_function_gradient` and `common_random_number_difference`, what `reduction` reads from traces, `sweep`, `watch`,
`tasks.harness.HarnessLM`, `testing.check_sampler`, and `testing.fuzz_sampler` where it draws.

Functions of plain arrays cannot see groups. `dependence.design_effect`, `clustered_mean`, `clustered_difference` and
`per_sequence.sequence_tests` take them; give everything else (`martingale`, `log_rank_test`, `variance_ratio`, the rest
of `dependence`, ...) the rows of `Trace.one_per_group`, which are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost
from me_stats.models.ensemble import Ensemble, component_paths
from me_stats.stopping import StopStrings
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
        One of ``"eos"``, ``"until"`` or ``"length"`` per row: an end-of-sequence id, a stop string, or neither.
    components
        (N, T) int64, the component that wrote each token, -1 after the end; None where the sampler drew
        from the mixture itself.
    prompts, prompt_index
        Token ids of the distinct prompts, and (N,) which one each row continued.
    rows
        (N,) global row numbers: with the seed they address the row's random numbers.
    cost
        Forwards, tokens forwarded and laws read.
    shared_rows
        Rows whose number // shared_rows agree shared the component uniforms of every step; 1 for independent rows.
    until
        The stop strings of the run.
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
    shared_rows: int = 1
    until: tuple[str, ...] = ()

    @property
    def groups(self) -> Tensor:
        """(N,) int64, which rows shared component draws: row number // `shared_rows`."""
        return torch.div(self.rows, self.shared_rows, rounding_mode="floor")

    def one_per_group(self) -> Trace:
        """The row of the lowest number of each group: an independent sample, in the order of this trace.

        Which row stays does not depend on what was written. `cost` remains that of the whole run.

        >>> from me_stats import ConstantMixing, Ensemble, MESampler
        >>> from me_stats.models import MarkovModel
        >>> toy = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]))
        >>> trace = MESampler(toy, shared_rows=4).sample([0], n=8, max_new_tokens=5)
        >>> trace.groups.tolist(), trace.one_per_group().rows.tolist()
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 4])
        """
        numbers, groups = self.rows.numpy(), self.groups.numpy()
        order = np.argsort(numbers, kind="stable")
        first = np.unique(groups[order], return_index=True)[1]
        kept = torch.from_numpy(np.sort(order[first]))
        lengths = self.lengths[kept]
        longest = int(lengths.max()) if len(lengths) else 0
        return replace(
            self,
            tokens=self.tokens[kept, :longest],
            lengths=lengths,
            components=None if self.components is None else self.components[kept, :longest],
            prompt_index=self.prompt_index[kept],
            rows=self.rows[kept],
        )

    @property
    def stop_reason(self) -> list[str]:
        last = self.tokens.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]
        eos = torch.isin(last, torch.tensor(self.model.vocabulary.eos, dtype=torch.int64)).tolist()
        stops = StopStrings(self.model.vocabulary, self.until) if self.until else None
        stopped = [stops is not None and stops.first(row) is not None for row in self.sequences()]
        return ["eos" if end else "until" if stop else "length" for end, stop in zip(eos, stopped, strict=True)]

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


def require_independent_rows(given: Any, caller: str) -> None:
    """ValueError where rows of `given`, a Trace or a Sampler, share component draws, which `caller` does not correct.

    A trace passes if no two of its rows are of one group, as after `Trace.one_per_group`. What is neither passes.
    """
    if isinstance(given, Trace):
        groups = len(torch.unique(given.groups))
        if groups < len(given.rows):
            raise ValueError(
                f"{caller} counts rows as independent, and the {len(given.rows)} rows of this trace share the "
                f"component draws of {groups} groups (shared_rows={given.shared_rows}): its errors would be too small. "
                "Give it trace.one_per_group(), or compare one value a row with dependence.clustered_mean or "
                "per_sequence.sequence_tests(x_groups=..., y_groups=...)"
            )
    elif (shared := getattr(given, "shared_rows", 1)) > 1:
        raise ValueError(
            f"{caller} counts rows as independent, and {type(given).__name__} has shared_rows={shared}: rows of a "
            "group share component draws. Every row has the same law without them: give it the sampler with "
            "shared_rows=1, or test a trace with trace.one_per_group(), dependence.clustered_mean or "
            "per_sequence.sequence_tests(x_groups=..., y_groups=...)"
        )


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
