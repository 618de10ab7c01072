"""How an ensemble's behaviour moves with λ: a walk over a grid that re-weights a trace as far as it reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.samplers import MESampler, Sampler
from me_stats.samplers.tabular import tabulate
from me_stats.sensitivity import Estimate, Reweighted, Statistic, reweight
from me_stats.sensitivity.readings import (
    Floats,
    Weights,
    checked_corpus,
    checked_weights,
    corpus_nll,
    distinct,
    forwards_per_token,
    repetition,
    step_tv_sums,
    tokens_forwarded,
)
from me_stats.sensitivity.reweight import shown
from me_stats.sequence_divergence import sequence_tv
from me_stats.trace import Trace, require_independent_rows
from me_stats.vocabulary import Prompt, as_prompts


@dataclass(frozen=True)
class SweepPoint:
    """Everything known at one λ. Its intervals hold point by point; neighbours share rows.

    Attributes
    ----------
    weights
        (K,) λ.
    source
        (K,) the λ that the rows were drawn at: `weights` itself, or they were re-weighted.
    effective_sample_size
        Of the rows read at `weights`.
    estimates
        By name. ``log_prob`` E log p_λ(x) under the own law (nats a sequence), ``entropy_rate`` (nats a token),
        ``length`` (tokens), ``distinct`` (share of different tokens), ``repetition`` (share of bigrams that stood
        in the row before), ``tokens_per_forward`` (forecast for ME); ``step_tv`` and ``sequence_tv`` to the reference
        λ; ``nll`` of a corpus (nats a token), ``task``, and the caller's statistics.
    gradients
        By name, derivatives towards each vertex (direction e_i − λ); None where the rows do not identify one.
    cost
        ``switches_per_token`` 1 − Σ λ_i²; ``forwards_per_token`` forecast for ME with all rows in one batch, and
        ``forwards_per_token_measured`` where the rows were drawn.
    """

    weights: Weights
    source: Weights
    effective_sample_size: float
    estimates: dict[str, Estimate]
    gradients: dict[str, tuple[Estimate | None, ...]]
    cost: dict[str, float]

    @property
    def drawn(self) -> bool:
        return self.source == self.weights

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SweepPoint:
        """Undo `me_stats.record.plain`."""

        def estimate(entry: Mapping[str, Any] | None) -> Estimate | None:
            if entry is None:
                return None
            low, high = map(float, entry["interval"])
            return Estimate(float(entry["value"]), float(entry["stderr"]), (low, high), entry["n"], entry["method"])

        estimates = {name: estimate(entry) for name, entry in data["estimates"].items()}
        return cls(
            tuple(map(float, data["weights"])),
            tuple(map(float, data["source"])),
            float(data["effective_sample_size"]),
            {name: found for name, found in estimates.items() if found is not None},
            {name: tuple(map(estimate, entries)) for name, entries in data["gradients"].items()},
            {name: float(value) for name, value in data["cost"].items()},
        )


@dataclass(frozen=True)
class Sweep:
    """Points in the order of the grid, and how they were made. `n` counts the rows of one draw."""

    reference: Weights
    points: tuple[SweepPoint, ...]
    n: int
    max_new_tokens: int
    seed: int
    minimum_ess: float
    maximum_tv: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the estimates that every point has."""
        return tuple(name for name in self.points[0].estimates if all(name in p.estimates for p in self.points))

    def series(self, name: str) -> tuple[Floats, Floats, Floats]:
        """Values and both ends of the interval (G,) along the grid."""
        if name not in self.names:
            raise ValueError(f"name must be one of {self.names}, got {name!r}")
        rows = np.array([(e.value, *e.interval) for e in (point.estimates[name] for point in self.points)])
        return rows[:, 0], rows[:, 1], rows[:, 2]


def simplex_grid(n_components: int, steps: int) -> list[Weights]:
    """All λ with entries in {0, 1/steps, ..., 1}: a line for K = 2, a triangular lattice for K = 3.

    >>> simplex_grid(2, 4)
    [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    >>> len(simplex_grid(3, 10))
    66
    """
    if n_components < 1 or steps < 1:
        raise ValueError(f"n_components and steps must be at least 1, got {n_components} and {steps}")

    def parts(count: int, total: int) -> Iterable[tuple[int, ...]]:
        if count == 1:
            yield (total,)
            return
        for first in range(total + 1):
            yield from ((first, *rest) for rest in parts(count - 1, total - first))

    return [tuple(part / steps for part in whole) for whole in parts(n_components, steps)]


def sweep(
    ensemble: Ensemble,
    prompts: Prompt | Sequence[Prompt],
    grid: Sequence[Sequence[float]],
    *,
    n: int,
    max_new_tokens: int,
    reference: Sequence[float] | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    task: Callable[[str], float] | None = None,
    corpus: ArrayLike | None = None,
    seed: int = 0,
    minimum_ess: float = 0.1,
    maximum_tv: float = 0.25,
    sampler: Callable[[Ensemble], Sampler] = MESampler,
    confidence: float = 0.95,
    done: Iterable[SweepPoint] = (),
    on_point: Callable[[SweepPoint], None] | None = None,
) -> Sweep:
    """Estimates, derivatives, divergences and cost at every λ of `grid`, from as few draws as the rows allow.

    The walk starts at the reference and goes outward. At each point the nearest trace (by ½ Σ|λ − λ'|) is re-weighted
    if its effective sample size there is above `minimum_ess` · N rows and its sequence law is within `maximum_tv` of
    the point's (`Reweighted.tv_distance`); otherwise N rows are drawn at the point, and serve from then on. Every draw
    has the same seed, so results do not depend on where a walk was interrupted.

    Parameters
    ----------
    ensemble
        Its components; its constant weights are the default reference.
    n
        Rows per prompt. Rows count as draws of a random prompt, so intervals over several fixed prompts are wide.
    minimum_ess, maximum_tv
        How far a trace reaches. The effective sample size alone trusts rows that miss the tail of their ratios
        (intervals then cover far below nominal); ``maximum_tv=1`` asks for that rule.
    statistics
        Functions of the token ids of one row, by name.
    task
        A score of a row's text.
    corpus
        (n, K) component log-probabilities of a corpus's tokens in nats: adds ``nll`` and its derivatives, with
        intervals as if tokens were independent.
    done
        Finished points of an earlier run with the same arguments; they are not computed again.
    on_point
        Called with each new point.

    Raises
    ------
    ValueError
        Weights off the simplex, an empty or repeated grid, a name that is taken, fewer than two rows, or a `sampler`
        whose rows share component draws.

    Examples
    --------
    >>> from me_stats.models import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.3, 0.6)]
    >>> found = sweep(Ensemble(coins, ConstantMixing([0.5, 0.5])), [], simplex_grid(2, 4), n=4000, max_new_tokens=5,
    ...               statistics={"ones": sum})
    >>> bool(np.abs(found.series("ones")[0] - [3, 2.625, 2.25, 1.875, 1.5]).max() < 0.1)
    True
    >>> [point.drawn for point in found.points]
    [True, False, True, False, True]
    """
    points = [checked_weights(weights, len(ensemble.components), "grid") for weights in grid]
    if not points or len(set(points)) < len(points):
        raise ValueError(f"grid must hold distinct weights, got {len(points)} with {len(set(points))} distinct")
    if not 0.0 < minimum_ess < 1.0:
        raise ValueError(f"minimum_ess is a share of the rows between 0 and 1, got {minimum_ess}")
    if not 0.0 <= maximum_tv <= 1.0:
        raise ValueError(f"maximum_tv is a total variation in [0, 1], got {maximum_tv}")
    if reference is None:
        if not isinstance(ensemble.mixing, ConstantMixing):
            raise ValueError("the ensemble's weights come from a router; give a reference")
        reference = ensemble.mixing.weights.tolist()
    start = checked_weights(reference, len(ensemble.components), "reference")
    rows = n * len(as_prompts(prompts))
    if rows < 2:
        raise ValueError(f"n must be at least 2 for one prompt, got {n}: an interval needs two rows")
    functions = _statistics(ensemble, statistics or {}, task)
    scores = None if corpus is None else checked_corpus(corpus, len(start))

    finished = {point.weights: point for point in done if point.weights in set(points)}
    left = sorted((w for w in points if w not in finished), key=lambda w: (_distance(w, start), points.index(w)))
    walk = _Walk(ensemble, prompts, n, max_new_tokens, seed, sampler, start, tuple(left), functions)
    # Traces of an earlier run are drawn again, the same rows, when they are the nearest.
    walk.sources += [w for w in sorted(finished, key=lambda w: (_distance(w, start), points.index(w)))
                     if finished[w].drawn and w != start]  # fmt: skip
    for weights in left:
        trace = walk.trace(min(walk.sources, key=lambda w: _distance(w, weights)))
        at = reweight(trace, weights)
        if not (at.effective_sample_size > minimum_ess * rows and at.tv_distance <= maximum_tv):
            walk.sources.append(weights)
            at = reweight(walk.trace(weights), weights)
        point = walk.point(at, scores, confidence)
        finished[weights] = point
        if on_point is not None:
            on_point(point)
    return Sweep(start, tuple(finished[w] for w in points), rows, max_new_tokens, seed, minimum_ess, maximum_tv)


class _Walk:
    """The traces drawn so far and what was computed from them once."""

    def __init__(
        self, ensemble: Ensemble, prompts: Prompt | Sequence[Prompt], n: int, max_new_tokens: int, seed: int,
        sampler: Callable[[Ensemble], Sampler], reference: Weights, targets: tuple[Weights, ...],
        functions: Mapping[str, Statistic],
    ) -> None:  # fmt: skip
        self.ensemble, self.prompts, self.n, self.max_new_tokens = ensemble, prompts, n, max_new_tokens
        self.seed, self.sampler, self.reference, self.targets = seed, sampler, reference, targets
        self.functions = functions
        self._tables = tabulate(ensemble) is not None  # tables are written, and counted, step by step
        self.sources = [reference]
        self._traces: dict[Weights, Trace] = {}
        self._values: dict[Weights, dict[str, Floats]] = {}
        self._tv: dict[Weights, Floats] = {}

    def trace(self, weights: Weights) -> Trace:
        """Rows drawn at `weights`, with what does not depend on where they are read."""
        if weights not in self._traces:
            drawing = self.sampler(Ensemble(self.ensemble.components, ConstantMixing(weights)))
            require_independent_rows(drawing, "sweep")
            trace = drawing.sample(self.prompts, n=self.n, max_new_tokens=self.max_new_tokens, seed=self.seed)
            rows = trace.sequences()
            self._values[weights] = {
                name: np.array([float(f(row)) for row in rows]) for name, f in self.functions.items()
            }
            self._tv[weights] = step_tv_sums(trace, self.targets, self.reference)
            self._traces[weights] = trace
        return self._traces[weights]

    def point(self, at: Reweighted, corpus: Floats | None, confidence: float) -> SweepPoint:
        assert at.drawn_weights is not None
        trace, source, weights = at.trace, at.drawn_weights, at.weights
        lengths = trace.lengths.numpy().astype(np.float64)
        surprise = -at.log_probs.sum(1)
        estimates = {
            "log_prob": at.estimate(-surprise, confidence=confidence),
            "entropy_rate": at.ratio(surprise, lengths, confidence=confidence),
            "step_tv": at.ratio(self._tv[source][:, self.targets.index(weights)], lengths, confidence=confidence),
            "sequence_tv": self._sequence_tv(weights, confidence),
            "tokens_per_forward": at.ratio(tokens_forwarded(trace, weights), lengths, confidence=confidence),
        }
        gradients = {}
        if np.isfinite(surprise).all():
            gradients["log_prob"] = at.gradient(-surprise, confidence=confidence)  # E d log p = 0
        for name, values in self._values[source].items():
            estimates[name] = at.estimate(values, confidence=confidence)
            gradients[name] = at.gradient(values, confidence=confidence)
        if corpus is not None:
            estimates["nll"], slopes = corpus_nll(corpus, weights, confidence=confidence)
            gradients["nll"] = slopes
        cost = {
            "switches_per_token": 1.0 - sum(weight**2 for weight in weights),
            "forwards_per_token": forwards_per_token(
                weights, lengths, lockstep=self._tables, prompt_index=trace.prompt_index.numpy()
            ),
        }
        if at.drawn:
            cost["forwards_per_token_measured"] = trace.cost.forwards / float(lengths.sum())
        return SweepPoint(weights, source, at.effective_sample_size, estimates, gradients, cost)

    def _sequence_tv(self, weights: Weights, confidence: float) -> Estimate:
        """From rows of the reference at every λ: the terms (1 − q/p)_+ stay in [0, 1] whatever λ is."""
        trace = self.trace(self.reference)
        ratios = reweight(trace, weights).log_ratios
        # The betting interval needs rows in exchangeable order, and rows of one prompt come together.
        order = np.random.default_rng(self.seed).permutation(len(ratios))
        found = sequence_tv(ratios[order], confidence=confidence)
        method = f"betting interval on rows of λ={shown(self.reference)}"
        return Estimate(found.value, found.stderr, found.interval, found.n, method)


_TAKEN = {"log_prob", "entropy_rate", "length", "distinct", "repetition", "step_tv", "sequence_tv", "nll", "task",
          "tokens_per_forward"}  # fmt: skip


def _statistics(
    ensemble: Ensemble, given: Mapping[str, Statistic], task: Callable[[str], float] | None
) -> dict[str, Statistic]:
    taken = sorted(_TAKEN & set(given))
    if taken:
        raise ValueError(f"statistics may not use the names {taken}, which the sweep fills itself")
    functions: dict[str, Statistic] = {"length": len, "distinct": distinct, "repetition": repetition, **given}
    if task is not None:
        functions["task"] = lambda row: task(ensemble.vocabulary.decode(row))
    return functions


def _distance(a: Weights, b: Weights) -> float:
    # Rounded, so that points at one distance on a lattice tie and the order of the grid decides.
    return round(sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2, 12)
