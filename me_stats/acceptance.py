"""How often drafts are accepted: measured in a run, and forecast from the laws along given continuations."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from me_stats.dependence import clustered_mean
from me_stats.divergence import tv_distance
from me_stats.models.base import Prefix
from me_stats.models.shared import networks, readings_along
from me_stats.samplers.speculative import SpeculativeSampler
from me_stats.sensitivity.estimate import Estimate
from me_stats.trace import Trace
from me_stats.vocabulary import Prompt

_LONGEST_CHUNK = 64


@dataclass(frozen=True)
class Speculation:
    """A speculative run with what was accepted; rows are the groups of both intervals.

    Attributes
    ----------
    trace
        What was written.
    acceptance
        Share of written tokens that are the draft's. Its interval has no width where nothing was rejected; see
        `expected`, which has the same mean.
    expected
        Mean of 1 - TV(draft, target) over the same positions: the acceptance without the noise of the verdicts.
    surplus
        (accepted - expected) in standard errors given the prefixes. Standard normal in the limit if every draft is
        accepted with its own probability: a check of the sampler at no cost.
    forwards_per_token
        Network runs per written token of the batch as it was run, the prompt's included.
    """

    trace: Trace
    acceptance: Estimate
    expected: Estimate
    surplus: float
    forwards_per_token: float


def measure_acceptance(
    sampler: SpeculativeSampler, prompts: Prompt | Sequence[Prompt], *, confidence: float = 0.95, **options: Any
) -> Speculation:
    """``sampler.sample(prompts, **options)``, and how much of its drafts was accepted; at least two rows.

    Examples
    --------
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models import Ensemble, MarkovModel, TopK, Warped
    >>> from me_stats.samplers import SpeculativeSampler
    >>> toys, mixing = [MarkovModel.random(9, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5])
    >>> draft = Ensemble([Warped(toy, TopK(3)) for toy in toys], mixing)
    >>> sampler = SpeculativeSampler(Warped(Ensemble(toys, mixing), TopK(3)), draft)
    >>> run = measure_acceptance(sampler, [0], n=50, max_new_tokens=20)
    >>> abs(run.acceptance.value - run.expected.value) < 0.05
    True
    """
    # The sampler itself keeps nothing between calls, so a copy takes the notes.
    noting = copy.copy(sampler)
    notes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    noting._verdicts = notes
    trace = noting.sample(prompts, **options)
    rows, accepted, chances = (np.concatenate(parts) for parts in zip(*notes, strict=True))
    spread = math.sqrt(float((chances * (1 - chances)).sum()))
    return Speculation(
        trace,
        clustered_mean(accepted.astype(np.float64), rows, confidence=confidence),
        clustered_mean(chances, rows, confidence=confidence),
        float((accepted - chances).sum()) / spread if spread > 1e-6 else 0.0,
        trace.cost.forwards / len(rows),
    )


@dataclass(frozen=True)
class Forecast:
    r"""What speculative sampling will cost, if every position accepts with the mean probability.

    Attributes
    ----------
    acceptance
        Mean of 1 - TV(draft, target) along the given continuations, with rows as groups.
    n_networks
        L, distinct networks below target and draft.
    chunk
        c, the drafts of a round.
    """

    acceptance: Estimate
    n_networks: int
    chunk: int

    @property
    def tokens_per_round(self) -> float:
        """(1 - a^(c+1))/(1 - a)."""
        return tokens_per_round(self.acceptance.value, self.chunk)

    @property
    def forwards_per_token(self) -> float:
        """(c + L) forwards a round over its tokens, for a row that runs alone; CE needs L, ME needs 1."""
        return (self.chunk + self.n_networks) / self.tokens_per_round

    @property
    def best_chunk(self) -> int:
        """The chunk of fewest forwards per token, among 1 to 64."""
        costs = [
            (chunk + self.n_networks) / tokens_per_round(self.acceptance.value, chunk)
            for chunk in range(1, _LONGEST_CHUNK + 1)
        ]
        return int(np.argmin(costs)) + 1

    def at_best(self) -> Forecast:
        """The forecast with `best_chunk` as its chunk."""
        return replace(self, chunk=self.best_chunk)


def tokens_per_round(acceptance: float, chunk: int) -> float:
    r"""Mean tokens of a round, :math:`\sum_{j=0}^{c} a^j`, for a chunk of c and independent acceptance a.

    >>> tokens_per_round(0.5, 2), tokens_per_round(1.0, 4)
    (1.75, 5.0)
    """
    return float(sum(acceptance**j for j in range(chunk + 1)))


def forecast_acceptance(
    target: Any,
    draft: Any,
    prompts: Sequence[Prefix],
    tokens: Sequence[Prefix],
    *,
    chunk: int = 4,
    confidence: float = 0.95,
) -> Forecast:
    """The acceptance of `draft` by `target` at every prefix of given continuations, before anything is sampled.

    Parameters
    ----------
    target, draft
        LanguageModels over one vocabulary.
    prompts, tokens
        Ids of N prompts and of their N continuations, N >= 2: ``trace.row_prompts()`` and ``trace.sequences()``. The
        forecast is for prefixes such as these; those of the target itself are the ones that a speculative run meets.

    Raises ValueError for fewer than two rows or no tokens.

    Examples
    --------
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models import Ensemble, MarkovModel, TopK, Warped
    >>> from me_stats.samplers import MESampler
    >>> toys, mixing = [MarkovModel.random(9, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5])
    >>> draft = Ensemble([Warped(toy, TopK(3)) for toy in toys], mixing)
    >>> trace = MESampler(draft).sample([0], n=50, max_new_tokens=20)
    >>> target = Warped(Ensemble(toys, mixing), TopK(3))
    >>> forecast = forecast_acceptance(target, draft, trace.row_prompts(), trace.sequences())
    >>> forecast.n_networks, round(forecast.acceptance.value, 2), round(forecast.forwards_per_token, 2)
    (2, 0.7, 2.17)
    """
    if chunk < 1:
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
    chances = [
        1 - np.asarray(tv_distance(*(reading.law(model).cpu().double() for model in (target, draft))))
        for row, reading in zip(tokens, readings_along((target, draft), prompts, tokens), strict=True)
        if len(row)
    ]
    rows = np.repeat(np.arange(len(chances)), [len(row) for row in chances])
    if len(chances) < 2:
        raise ValueError(f"tokens must hold at least two rows with tokens, got {len(chances)}")
    acceptance = clustered_mean(np.concatenate(chances), rows, confidence=confidence)
    return Forecast(acceptance, len(networks(target, draft)), chunk)
