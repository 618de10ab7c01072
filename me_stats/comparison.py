"""How far apart two laws are along given continuations: per step, as whole sequences, by cause, and what repairs it.

Both laws stand on the same networks, which are read once; every distance of a step is exact at its prefix. Samples
come in only where prefixes do: the continuations are draws of the first law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from me_stats.acceptance import Forecast
from me_stats.dependence import clustered_mean
from me_stats.divergence import escaped_mass, tv_distance
from me_stats.models.base import Prefix, open_session, path_log_probs
from me_stats.models.shared import networks, readings_along
from me_stats.sensitivity.estimate import Estimate
from me_stats.sequence_divergence import TVEstimate, ViolationBound, escaped_mass_bound, sequence_tv

if TYPE_CHECKING:
    from me_stats.orders import Stage

Floats = NDArray[np.float64]

_QUANTILES = (0.1, 0.5, 0.9, 0.99)
_AT_FAULT = 5  # tokens shown of a prefix
_FALSE_REFUSAL = 1e-9  # that rounding alone makes rows pass for draws of another law


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
        TV a step between p as drawn and as scored here, plus that of q: widens the intervals and lowers the bounds of
        sequences. `session_floor` measures it.
    progress
        Called with 1 for every row.

    Raises
    ------
    ValueError
        For fewer than two rows, an empty row, vocabularies that differ, a floor outside [0, 1], or rows with more
        tokens that p excludes than rounding of the size of `floor` explains.

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
    rows = []
    for row in gaps_along(p, q, prompts, tokens, others=others):
        rows.append(row)
        if progress is not None:
            progress(1)
    return summarise(
        rows, prompts, tokens, n_networks=len(networks(p, q)), lengths=lengths, worst=worst, floor=floor,
        confidence=confidence,
    )  # fmt: skip


def gaps_along(
    p: Any,
    q: Any,
    prompts: Sequence[Prefix],
    tokens: Sequence[Prefix],
    *,
    others: Mapping[str, Any] | None = None,
) -> Iterator[RowGaps]:
    """Row by row what `compare_laws` looks at, with the same arguments; `summarise` makes one comparison of them."""
    p.vocabulary.require_equal(q.vocabulary, name="p", other_name="q")
    further = dict(others or {})
    for path, reading in zip(tokens, readings_along([p, q, *further.values()], prompts, tokens), strict=True):
        own, other = reading.law(p).cpu(), reading.law(q).cpu()
        gaps = {name: _tv(own, reading.law(model).cpu()) for name, model in further.items()}
        yield RowGaps.of(path, own, other, gaps)


def summarise(
    rows: Sequence[RowGaps],
    prompts: Sequence[Prefix],
    tokens: Sequence[Prefix],
    *,
    n_networks: int,
    lengths: Sequence[int] | None = None,
    worst: int = 8,
    floor: float = 0.0,
    confidence: float = 0.95,
) -> Comparison:
    """The `Comparison` of rows that `gaps_along` gave, in one call or several, for these prompts and tokens.

    `n_networks` is that of both laws together, ``len(networks(p, q))``; the rest is as in `compare_laws`.
    """
    _check_rows(rows, floor)
    place = np.repeat(np.arange(len(rows)), [len(row.tv) for row in rows])

    def mean(parts: Sequence[Floats]) -> Estimate:
        return clustered_mean(np.concatenate(parts), place, confidence=confidence)

    tv = np.concatenate([row.tv for row in rows])
    # Of equal ones the first: sorting is stable.
    found = sorted(range(len(rows)), key=lambda row: -rows[row].tv.max())[: max(0, worst)]
    acceptance = mean([1 - row.tv for row in rows])
    return Comparison(
        step=mean([row.tv for row in rows]),
        quantiles={level: float(np.quantile(tv, level)) for level in _QUANTILES},
        largest=float(tv.max()),
        outside=mean([row.outside for row in rows]),
        missing=mean([row.missing for row in rows]),
        others={name: mean([row.gaps[name] for row in rows]) for name in rows[0].gaps},
        lengths=_by_length(rows, lengths, floor, confidence),
        worst=tuple(rows[row].worst(row, prompts[row], tokens[row]) for row in found),
        forecast=Forecast(acceptance, n_networks, 1).at_best(),
        row_tv=np.array([row.tv.mean() for row in rows]),
        prefixes=len(tv),
        floor=floor,
    )


@dataclass(frozen=True)
class CauseGap:
    """TV a step between a law and the one with this cause `alone`, and with all causes up to this one."""

    name: str
    alone: Estimate | None
    cumulative: Estimate


def stage_laws(stages: Sequence[Stage]) -> dict[str, Any]:
    """The laws of `orders.stages` under the names at which `cause_gaps` looks for them: the `others` to compare with.

    The last cumulative law is q itself, and the first is the same alone and cumulative: neither is here twice.
    """
    laws = {f"{stage.name}, alone": stage.alone for stage in stages if stage.alone is not None}
    return laws | {f"up to {stage.name}": stage.cumulative for stage in stages[1:-1]}


def cause_gaps(found: Comparison, stages: Sequence[Stage]) -> tuple[CauseGap, ...]:
    """What each stage costs, from a comparison with ``others=stage_laws(stages)``.

    Examples
    --------
    >>> from me_stats.models import MarkovModel
    >>> from me_stats.orders import OrderedLaw, Transforms, stages
    >>> from me_stats.samplers import MESampler
    >>> toys, transforms = [MarkovModel.random(9, seed=s) for s in (0, 1)], Transforms(temperature=0.7, top_k=3)
    >>> first, second = (OrderedLaw(o, transforms, (0.5, 0.5)) for o in ("transform-then-mix", "mix-then-transform"))
    >>> p, q, way = first.over(toys), second.over(toys), stages(first, second, toys)
    >>> trace = MESampler(p).sample([0], n=200, max_new_tokens=8)
    >>> found = compare_laws(p, q, trace.row_prompts(), trace.sequences(), others=stage_laws(way))
    >>> [(gap.name, round(gap.alone.value, 2), round(gap.cumulative.value, 2)) for gap in cause_gaps(found, way)]
    [('temperature', 0.04, 0.04), ('top_k', 0.26, 0.26)]
    """
    gaps = []
    for number, stage in enumerate(stages):
        alone = found.others.get(f"{stage.name}, alone")
        if number == len(stages) - 1:
            cumulative = found.step
        else:
            cumulative = found.others[f"up to {stage.name}" if number else f"{stage.name}, alone"]
        gaps.append(CauseGap(stage.name, alone, cumulative))
    return tuple(gaps)


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
class RowGaps:
    """Steps of one continuation, as `gaps_along` finds them.

    Attributes
    ----------
    tv, outside, missing
        (T,) as in `Comparison`.
    log_ratio
        (T,) log q - log p of its tokens; 0 where p as scored here excludes the token that was drawn.
    gaps
        (T,) TV to each further law, by name.
    at_fault
        (F, 3) tokens of the step with the largest TV: id, p, q.
    excluded
        How many of its tokens p, as scored here, excludes.
    """

    tv: Floats
    outside: Floats
    missing: Floats
    log_ratio: Floats
    gaps: Mapping[str, Floats]
    at_fault: Floats
    excluded: int = 0

    @classmethod
    def of(cls, path: Prefix, p: Tensor, q: Tensor, gaps: Mapping[str, Floats]) -> RowGaps:
        """From the laws (T, V) of both along a continuation of T tokens."""
        if not len(path):
            raise ValueError("tokens must hold no empty row")
        tv = _tv(p, q)
        ids = torch.tensor(path, dtype=torch.int64)[:, None]
        log_p, log_q = p.gather(-1, ids)[:, 0].double(), q.gather(-1, ids)[:, 0].double()
        excluded = log_p == -torch.inf
        ratio = torch.where(excluded, 0.0, log_q - log_p)
        worst = int(tv.argmax())
        # Differences in float64: a token's own p and q are read off the page.
        there_p, there_q = p[worst].double().exp(), q[worst].double().exp()
        top = (there_p - there_q).abs().topk(min(_AT_FAULT, p.shape[-1])).indices
        at_fault = torch.stack([top.double(), there_p[top], there_q[top]], -1).numpy()
        return cls(tv, _escaped(p, q), _escaped(q, p), ratio.numpy(), gaps, at_fault, int(excluded.sum()))

    def worst(self, row: int, prompt: Prefix, path: Prefix) -> WorstPrefix:
        """Where this row's laws differ most."""
        step = int(self.tv.argmax())
        at_fault = tuple((int(token), float(p), float(q)) for token, p, q in self.at_fault)
        return WorstPrefix(row, step, float(self.tv[step]), (*prompt, *path[:step]), at_fault)


def _check_rows(rows: Sequence[RowGaps], floor: float) -> None:
    if len(rows) < 2:
        raise ValueError(f"tokens must hold at least two rows, got {len(rows)}")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}: a total variation lies in [0, 1]")
    count, steps = sum(row.excluded for row in rows), sum(len(row.tv) for row in rows)
    # A cut between near-ties falls elsewhere in another forward; its tokens carry no more mass than the floor.
    if count and stats.binom.sf(count - 1, steps, floor) < _FALSE_REFUSAL:
        raise ValueError(
            f"{count} of {steps} tokens are excluded by p, and a floor of {floor:.2g} a step explains no such number: "
            "continuations must be draws of p, scored in the precision that they were drawn in"
        )


def _by_length(
    rows: Sequence[RowGaps], lengths: Sequence[int] | None, floor: float, confidence: float
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
        rounding = min(1.0, length * floor)
        tv = sequence_tv(total[:, length - 1], confidence=confidence, floor=rounding)
        bound = escaped_mass_bound(outside[:, :length], outside=excluded[:, :length], confidence=one_sided)
        found.append(LengthGap(length, tv, replace(bound, lower=max(0.0, bound.lower - rounding))))
    return tuple(found)


def _tv(p: Tensor, q: Tensor) -> Floats:
    return np.atleast_1d(np.asarray(tv_distance(p, q), dtype=np.float64))


def _escaped(p: Tensor, q: Tensor) -> Floats:
    return np.atleast_1d(np.asarray(escaped_mass(p, q), dtype=np.float64))
