"""How far apart two laws are along given continuations: per step, as whole sequences, by cause, and what repairs it.

Both laws stand on the same networks, which are read once; every distance of a step is exact at its prefix. Samples
come in only where prefixes do: the continuations are draws of the first law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from me_stats.acceptance import Forecast
from me_stats.dependence import clustered_mean
from me_stats.divergence import escaped_mass, tv_distance
from me_stats.models.base import Prefix, open_session, path_log_probs
from me_stats.models.shared import networks, readings_along
from me_stats.sensitivity.estimate import Estimate
from me_stats.sequence_divergence import TVEstimate, ViolationBound, escaped_mass_bound, sequence_tv

Floats = NDArray[np.float64]

_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class LengthGap:
    """TV of the first `length` tokens, and the part of it that no q could explain: tokens outside its support."""

    length: int
    tv: TVEstimate
    outside: ViolationBound


@dataclass(frozen=True)
class WorstPrefix:
    """A prefix where the laws differ most: the tokens with the largest |p - q| there, as (id, p, q).

    `row` and `step` say where it is, `tokens` are the prompt's ids and those of the continuation before the step.
    """

    row: int
    step: int
    tv: float
    tokens: tuple[int, ...]
    at_fault: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Comparison:
    """What separates p from q along N continuations drawn from p; rows are the groups of every interval.

    Attributes
    ----------
    step
        Mean TV a step.
    quantiles, largest
        Of the TV over prefixes, by probability; and its largest value.
    outside, missing
        Mass of p outside the support of q, and of q outside that of p; means over prefixes.
    others
        Mean TV a step between p and each further law.
    lengths
        Whole sequences, by length.
    worst
        The prefixes of largest TV, at most one a row.
    forecast
        Speculative sampling of q with p as the draft.
    row_tv
        (N,) mean TV of each row.
    prefixes, floor
        Prefixes looked at; TV a step by which rounding may move a law as drawn.
    """

    step: Estimate
    quantiles: Mapping[float, float]
    largest: float
    outside: Estimate
    missing: Estimate
    others: Mapping[str, Estimate]
    lengths: tuple[LengthGap, ...]
    worst: tuple[WorstPrefix, ...]
    forecast: Forecast
    row_tv: Floats
    prefixes: int
    floor: float


def compare_laws(
    p: Any,
    q: Any,
    prompts: Sequence[Prefix],
    tokens: Sequence[Prefix],
    *,
    others: Mapping[str, Any] | None = None,
    lengths: Sequence[int] | None = None,
    worst: int = 8,
    floor: float = 0.0,
    confidence: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    r"""Per-step and sequence TV between p and q, along continuations that were drawn from p.

    A step's distance is :math:`\frac12 \sum_x |p(x|c) - q(x|c)|`, exact at its prefix c. The TV of the first t tokens
    is :math:`E_p (1 - q/p)_+` over the rows. It is at least the probability that p writes a token outside the support
    of q, which needs no q at all.

    Parameters
    ----------
    p, q
        LanguageModels over one vocabulary: two orders of a transform, two weights, an ensemble and a component. What
        they share below `Warped`, `Ensemble` and joint transforms runs once.
    prompts, tokens
        N >= 2 prompts and their independent continuations under p: ``trace.row_prompts()``, ``trace.sequences()``.
        Distances of steps hold for any continuations; those of sequences for draws of p only.
    others
        Further laws whose TV to p is wanted, by name: steps between p and q, such as `causes`.
    lengths
        Of the prefixes whose TV is estimated; default 1, 2, 4, ... and the longest row.
    worst
        How many prefixes to show.
    floor
        TV a step between p as drawn and as scored here, plus that of q: widens the intervals of sequences.
        `session_floor` measures it.
    progress
        Called with 1 for every row.

    Raises
    ------
    ValueError
        For fewer than two rows, an empty row, vocabularies that differ, or a floor outside [0, 1].

    Examples
    --------
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models import Ensemble, MarkovModel, TopK, Warped
    >>> from me_stats.samplers import MESampler
    >>> toys, mixing = [MarkovModel.random(9, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5])
    >>> inside, after = Ensemble([Warped(t, TopK(3)) for t in toys], mixing), Warped(Ensemble(toys, mixing), TopK(3))
    >>> trace = MESampler(inside).sample([0], n=200, max_new_tokens=8)
    >>> found = compare_laws(inside, after, trace.row_prompts(), trace.sequences())
    >>> round(found.step.value, 2), [(gap.length, round(gap.tv.value, 2)) for gap in found.lengths]
    (0.3, [(1, 0.31), (2, 0.45), (4, 0.75), (8, 0.93)])
    """
    p.vocabulary.require_equal(q.vocabulary, name="p", other_name="q")
    if len(tokens) < 2 or not all(map(len, tokens)):
        raise ValueError(f"tokens must hold at least two rows and no empty one, got {len(tokens)} rows")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}: a total variation lies in [0, 1]")
    further = dict(others or {})
    rows = []
    for number, reading in enumerate(readings_along([p, q, *further.values()], prompts, tokens)):
        own, other = _on_cpu(reading.law(p)), _on_cpu(reading.law(q))
        gaps = {name: _tv(own, _on_cpu(reading.law(model))) for name, model in further.items()}
        rows.append(_Row.of(number, tokens[number], own, other, gaps))
        if progress is not None:
            progress(1)
    place = np.repeat(np.arange(len(rows)), [len(row.tv) for row in rows])
    tv = np.concatenate([row.tv for row in rows])

    def mean(parts: Sequence[Floats]) -> Estimate:
        return clustered_mean(np.concatenate(parts), place, confidence=confidence)

    step = mean([row.tv for row in rows])
    found = sorted(rows, key=lambda row: -row.tv.max())[: max(0, worst)]
    acceptance = mean([1 - row.tv for row in rows])
    return Comparison(
        step=step,
        quantiles={level: float(np.quantile(tv, level)) for level in _QUANTILES},
        largest=float(tv.max()),
        outside=mean([row.outside for row in rows]),
        missing=mean([row.missing for row in rows]),
        others={name: mean([row.gaps[name] for row in rows]) for name in further},
        lengths=_by_length(rows, lengths, floor, confidence),
        worst=tuple(row.worst(prompts[row.number], tokens[row.number]) for row in found),
        forecast=Forecast(acceptance, len(networks(p, q)), 1).at_best(),
        row_tv=np.array([row.tv.mean() for row in rows]),
        prefixes=len(tv),
        floor=floor,
    )


def session_floor(model: Any, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Floats:
    """TV (steps,) between the law that a sampler's session gives and the teacher-forced one, along continuations.

    A few rows are enough. Single steps may jump where a transform cuts between near-ties, so compare means with means.
    """
    session = open_session(model, prompts, max_new_tokens=max(map(len, tokens)))
    forced = [laws.cpu() for laws in path_log_probs(model, prompts, tokens)]
    found = []
    for step in range(max(map(len, tokens))):
        live = np.array([row for row, path in enumerate(tokens) if len(path) > step])
        found.append(_tv(session.log_probs(live).cpu(), torch.stack([forced[row][step] for row in live.tolist()])))
        session.append(live, torch.tensor([tokens[row][step] for row in live.tolist()]))
    return np.concatenate(found)


@dataclass(frozen=True)
class _Row:
    """Steps of one continuation; `log_ratio` is log q - log p of its tokens."""

    number: int
    tv: Floats
    outside: Floats
    missing: Floats
    log_ratio: Floats
    gaps: Mapping[str, Floats]
    at_fault: tuple[tuple[int, float, float], ...]

    @classmethod
    def of(cls, number: int, path: Prefix, p: Tensor, q: Tensor, gaps: Mapping[str, Floats]) -> _Row:
        tv = _tv(p, q)
        ids = torch.tensor(path, dtype=torch.int64)[:, None]
        log_p, log_q = p.gather(-1, ids)[:, 0].double(), q.gather(-1, ids)[:, 0].double()
        if bool((log_p == -torch.inf).any()):
            step = int((log_p == -torch.inf).nonzero()[0])
            raise ValueError(
                f"row {number} has token {path[step]} at step {step}, which p excludes: continuations must be draws of "
                "p, scored in the precision that they were drawn in"
            )
        worst = int(tv.argmax())
        # Differences in float64: a token's own p and q are read off the page.
        there_p, there_q = p[worst].double().exp(), q[worst].double().exp()
        top = (there_p - there_q).abs().topk(min(5, p.shape[-1])).indices
        at_fault = tuple((int(x), float(there_p[x]), float(there_q[x])) for x in top)
        ratio = (log_q - log_p).numpy()
        return cls(number, tv, _escaped(p, q), _escaped(q, p), ratio, gaps, at_fault)

    def worst(self, prompt: Prefix, path: Prefix) -> WorstPrefix:
        step = int(self.tv.argmax())
        return WorstPrefix(self.number, step, float(self.tv[step]), (*prompt, *path[:step]), self.at_fault)


def _by_length(
    rows: Sequence[_Row], lengths: Sequence[int] | None, floor: float, confidence: float
) -> tuple[LengthGap, ...]:
    longest = max(len(row.tv) for row in rows)
    if lengths is None:
        lengths = [*(1 << power for power in range(longest.bit_length()) if 1 << power < longest), longest]
    shape = (len(rows), longest)
    ratio, outside = np.zeros(shape), np.zeros(shape)
    for place, row in enumerate(rows):
        ratio[place, : len(row.tv)], outside[place, : len(row.tv)] = row.log_ratio, row.outside
    excluded = ratio == -math.inf
    # Mass below the rounding of a float32 sum reads as no mass, and a token that lies in it as no violation.
    outside = np.where(excluded, np.maximum(outside, np.finfo(np.float32).tiny), outside)
    total = np.cumsum(ratio, axis=1)
    # Betting intervals read values one by one, and rows of one prompt stand together.
    shuffled = np.random.default_rng(0).permutation(len(rows))
    total, outside, excluded = total[shuffled], outside[shuffled], excluded[shuffled]
    one_sided = 0.5 + confidence / 2
    found = []
    for length in sorted({min(int(length), longest) for length in lengths if length >= 1}):
        tv = sequence_tv(total[:, length - 1], confidence=confidence, floor=min(1.0, length * floor))
        bound = escaped_mass_bound(outside[:, :length], outside=excluded[:, :length], confidence=one_sided)
        found.append(LengthGap(length, tv, bound))
    return tuple(found)


def _tv(p: Tensor, q: Tensor) -> Floats:
    return np.atleast_1d(np.asarray(tv_distance(p, q), dtype=np.float64))


def _escaped(p: Tensor, q: Tensor) -> Floats:
    return np.atleast_1d(np.asarray(escaped_mass(p, q), dtype=np.float64))


def _on_cpu(law: Tensor) -> Tensor:
    return law.cpu()
