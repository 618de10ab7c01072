"""How long a component waits between its turns under ME, and what it must catch up on when it is drawn.

With constant weights the component m_t is drawn afresh at every step, so the wait of component i since its last turn is
Geometric(λ_i) at any time, a run's start included: the chance of a turn is λ_i at *every* age of the wait. That is what
`lag_test` tests, age by age. It needs no complete gaps: a first wait counts from the start of the row, and a wait cut
off by the end of the row stops counting there. Both are right because m_t does not depend on the past, even where an
end-of-sequence token, which does depend on the path, decides when a row ends; counting complete gaps would favour short
ones. Rows that share component draws have one path, which counts once: of a Trace, `lag_test` reads the longest row of
each group, whose end depends on the past alone like any other.

When component i is drawn it forwards the tokens written since its last turn (at its first turn, the prompt and all
tokens written): Σ λ_i E lag_i = K tokens a step in the long run, against K for CE at K forwards a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from me_stats.chi_square import GoodnessResult, ScoreSums, score_chi_square
from me_stats.dependence import clustered_mean
from me_stats.goodness import PortfolioResult, bonferroni
from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.sensitivity.estimate import Estimate, normal_estimate
from me_stats.trace import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SINGLE_AGES = 4  # the ages where sticky and alternating draws show are bins of their own
_MAX_CELLS = 100_000_000  # of the table behind `longest_wait`, 800 MB
_TAIL = 1e-16  # chance of a wait so long that `LongestWait` leaves it out


def turn_ages(components: ArrayLike, component: int) -> Ints:
    """Age (N, T) of the wait of `component` at each step: steps since its last turn, or since before the first token.

    `components` (N, T) is who wrote each token, -1 after the end. Ages start at 1; -1 after the end. Where `component`
    has its turn, the age is its lag.

    >>> turn_ages([[0, 1, 1, 0, 1, -1]], 1).tolist()
    [[1, 2, 1, 1, 2, -1]]
    """
    path = _path(components)
    steps = np.broadcast_to(np.arange(path.shape[1]), path.shape)
    last = np.maximum.accumulate(np.where(path == component, steps, -1), axis=1)
    before = np.concatenate([np.full((len(path), 1), -1), last[:, :-1]], axis=1)
    return np.where(path >= 0, steps - before, -1)


def lag_test(
    trace: Trace | ArrayLike, *, weights: ArrayLike | None = None, level: float = 1e-6, min_expected: float = 25.0
) -> PortfolioResult:
    """Are the lags of every component Geometric(λ_i)? Chi-square over bins of ages, Bonferroni over components.

    At age a, of R_a rows and steps that wait, D_a have a turn: ``S_a = D_a - λ R_a`` is a martingale with predictable
    variation ``λ (1-λ) R_a``, uncorrelated over ages, and ``X^2 = sum S_a^2/(λ (1-λ) R_a)``, with the tail of
    `score_chi_square`. Ages are binned by what the null expects if every row is as long as the longest: ages 1 to 4
    alone and a sixteenth of the turns in each later bin, but at least `min_expected` turns.

    `trace` is a Trace of MESampler, or components (N, T) with -1 after the end, which need `weights` (K,); with a Trace
    `weights` replaces its model's. Rows are independent, but for those of a Trace that share component draws, which
    count once. A component of weight 0 that was drawn is a rejection by itself. Raises ValueError for a trace without
    components, TypeError for a router.

    >>> rng = np.random.default_rng(0)
    >>> fair = rng.choice(2, size=(100, 200), p=[0.3, 0.7])
    >>> lag_test(fair, weights=[0.3, 0.7]).rejected, lag_test(fair, weights=[0.35, 0.65]).rejected
    (False, True)
    """
    path, law = _run(trace, weights)
    if isinstance(trace, Trace):
        path = _one_path_per_group(path, trace.groups.numpy())
    return bonferroni(
        [_component_test(path, i, w, level, min_expected) for i, w in enumerate(law)],
        level=level,
        n=int((path >= 0).sum()),
    )


def prefilled_tokens(components: ArrayLike, *, prompt_length: int | ArrayLike = 0) -> Ints:
    """Tokens (N, T) that the drawn component must forward before it writes: its lag, -1 after the end.

    At its first turn after t tokens that is `prompt_length` (a number, or one per row) + t.

    >>> prefilled_tokens([[0, 1, 1, 0]], prompt_length=5).tolist()
    [[5, 6, 1, 3]]
    """
    path = _path(components)
    lengths = np.broadcast_to(np.asarray(prompt_length, dtype=np.int64), len(path))
    tokens = np.where(path >= 0, 0, -1)
    for i in np.unique(path[path >= 0]).tolist():
        turn = path == i
        first = turn & (turn.cumsum(1) == 1)
        # The age of a first wait counts from before the first token, one more than the tokens written.
        tokens = np.where(turn, turn_ages(path, i) + first * (lengths[:, None] - 1), tokens)
    return tokens


def prefill_per_step(trace: Trace, *, confidence: float = 0.95) -> Estimate:
    """Tokens forwarded per token written, over the rows of an ME trace: the ratio of sums, delta method over rows.

    Rows that share component draws count as one (`dependence.clustered_mean`). Needs no weights, so any ME trace will
    do; where rows have one length, `expected_prefill` is what it estimates.

    What a row forwards falls short of K a step by geometric waits, which are skewed: ask for 200 rows (a 95% interval
    covers in 95% of runs of 256 rows, in 90% of runs of 64).
    """
    path, lengths = _components(trace), np.array([len(prompt) for prompt in trace.row_prompts()])
    groups = trace.groups.numpy()
    if len(np.unique(groups)) < 2:
        raise ValueError("trace must have at least two rows (or groups of them); their spread gives the interval")
    tokens, steps = prefilled_tokens(path, prompt_length=lengths).clip(min=0).sum(1), (path >= 0).sum(1)
    value = float(tokens.sum() / steps.sum())
    stderr = clustered_mean(tokens - value * steps, groups).stderr / float(steps.mean())
    return normal_estimate(value, stderr, len(path), confidence=confidence, method="ratio over rows")


def expected_prefill(weights: ArrayLike, steps: int, *, prompt_length: float = 0) -> float:
    """Expected tokens forwarded per token written over rows of exactly `steps` = T tokens.

    Step t (from 0) forwards ``sum_i λ_i E min(lag_i, t) = K - sum_i (1-λ_i)^t``, and the prompt at every first turn:
    ``K - sum_i (1-(1-λ_i)^T) (1/λ_i - P)/T`` over components of positive weight. It tends to K.

    >>> expected_prefill([0.5, 0.5], 1, prompt_length=7), round(expected_prefill([0.5, 0.5], 10**6), 5)
    (7.0, 2.0)
    """
    law = _weights(weights)
    if steps < 1 or prompt_length < 0:
        raise ValueError(f"steps must be at least 1 and prompt_length at least 0, got {steps} and {prompt_length}")
    positive = law[law > 0]
    with np.errstate(divide="ignore"):
        turned = -np.expm1(steps * np.log1p(-positive))
    return float(len(positive) - (turned * (1 / positive - prompt_length)).sum() / steps)


@dataclass(frozen=True, eq=False)
class LongestWait:
    """Exact law of the longest wait of a component in T steps: the most steps in a row in which it has no turn.

    `cdf` (L+1,) is P(longest <= l), l = 0..L. The longest lag that is caught up on is one more, the turn itself.
    """

    cdf: Floats

    @property
    def mean(self) -> float:
        """Expected longest wait, in steps."""
        return float((1 - self.cdf).sum())

    def quantile(self, probability: float) -> int:
        """Smallest l with P(longest <= l) >= `probability`: a cache bound that rows pass with at most the rest."""
        if not 0 < probability < 1:
            raise ValueError(f"probability must lie in (0, 1), got {probability}")
        # The last entry is 1 up to the mass left out.
        return min(int(np.searchsorted(self.cdf, probability)), len(self.cdf) - 1)


def longest_wait(weight: float, steps: int) -> LongestWait:
    """Forecast of the longest wait of a component of weight λ in `steps` = T: waits at both ends of a row count.

    With q = 1-λ and A(t) = P(no l steps in a row without a turn in t steps): A(t) = 1 for t < l, A(l) = 1 - q^l, and
    ``A(t) = A(t-1) - λ q^l A(t-l-1)``. About ``log(T λ)/-log q`` for long rows. Rows that end early wait less.

    From 4 L steps on, L the longest wait in the table, A falls by one factor a step, so T may be millions.

    >>> coin = longest_wait(0.5, 3)  # 111; a 0 alone: 011 101 110 010; two: 001 100; three: 000
    >>> (coin.cdf * 8).round(6).tolist(), coin.mean
    ([1.0, 5.0, 7.0, 8.0], 1.375)
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight must lie in (0, 1], got {weight}; a component of weight 0 waits for ever")
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if weight == 1:
        return LongestWait(np.ones(1))
    log_q = math.log1p(-weight)
    longest = min(steps, math.ceil((math.log(_TAIL) - math.log(steps)) / log_q))
    # Other roots of the recursion are at most q in modulus: after 4 L steps q^{4L} < 1e-64 of them is left.
    tabled = min(steps, 4 * longest + 4)
    if tabled * longest > _MAX_CELLS:
        raise ValueError(f"steps is {steps:,}: the law of waits of up to {longest:,} steps does not fit; cut the row")
    runs = np.arange(1, longest + 2)  # row t holds A(t) for each l
    power = np.exp(runs * log_q)
    none = np.ones((tabled + 1, len(runs)))
    for t in range(1, tabled + 1):
        earlier = none[np.maximum(t - runs - 1, 0), np.arange(len(runs))]
        lost = np.where(t == runs, power, np.where(t > runs, weight * power * earlier, 0.0))
        none[t] = none[t - 1] - lost
    last, before = none[tabled], none[tabled - 1]
    factor = np.divide(last, before, out=np.zeros(len(runs)), where=before > 0)
    return LongestWait(np.clip(last * factor ** (steps - tabled), 0.0, 1.0))


def longest_waits(components: ArrayLike, n_components: int) -> Ints:
    """Longest wait (N, K) of each component in each row of `components` (N, T), in steps without a turn.

    >>> longest_waits([[0, 1, 1, 0, -1]], 3).tolist()
    [[2, 1, 4]]
    """
    path = _path(components)
    waits = [np.where(path == i, 0, turn_ages(path, i)).max(1) for i in range(n_components)]
    return np.stack([wait.clip(min=0) for wait in waits], axis=1)


def _component_test(path: Ints, component: int, weight: float, level: float, min_expected: float) -> GoodnessResult:
    ages, turn = turn_ages(path, component), path == component
    alive = path >= 0
    edges = _age_bins(weight, path.shape, min_expected)
    bins = np.searchsorted(edges, ages[alive], side="right") - 1
    waiting = np.bincount(bins, minlength=len(edges)).astype(np.float64)
    turns = np.bincount(bins, weights=turn[alive], minlength=len(edges))
    total, information = turns - weight * waiting, weight * (1 - weight) * waiting
    drawn, n = int(turns.sum()), int(alive.sum())
    name = f"lags of component {component}"
    if (weight == 0 and drawn) or (weight == 1 and drawn < n):
        return GoodnessResult(
            name, math.inf, 0.0, 0, n, len(edges), 0, "impossible cell", math.inf, level, impossible=n
        )
    variation = np.diag(turns * (1 - 2 * weight) + weight**2 * waiting)
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(information > 0, (weight**2 + (1 - weight) ** 2) / np.sqrt(information), 0.0)
    sums = ScoreSums(total, np.diag(information), variation, float(skewness.max(initial=0.0)), n)
    return score_chi_square(sums, name=name, level=level)


def _one_path_per_group(path: Ints, groups: Ints) -> Ints:
    """The longest row of each group; the first of equals."""
    order = np.lexsort((-(path >= 0).sum(1), groups))
    return path[order[np.unique(groups[order], return_index=True)[1]]]


def _age_bins(weight: float, shape: tuple[int, ...], min_expected: float) -> Ints:
    """First age of each bin: single ages, then wider ones, while the null expects `min_expected` turns in each."""
    n, steps = shape
    if not 0 < weight < 1:
        return np.array([0])
    ages = np.arange(1, steps + 1)
    # Waits start before the first token and after each turn; one of age a needs a steps to be seen.
    starts = n * (1 + weight * np.maximum(steps - ages, 0))
    expected = starts * weight * np.exp((ages - 1) * math.log1p(-weight))
    after = expected[::-1].cumsum()[::-1]
    edges, held = [1], 0.0
    for age, now, rest in zip(ages.tolist(), expected.tolist(), after.tolist(), strict=True):
        enough = min_expected if age <= _SINGLE_AGES + 1 else max(min_expected, after[0] / 16)
        if held >= enough and rest >= min_expected:
            edges.append(age)
            held = 0.0
        held += now
    return np.array(edges)


def _run(trace: Trace | ArrayLike, weights: ArrayLike | None) -> tuple[Ints, Floats]:
    if isinstance(trace, Trace):
        path = _components(trace)
        law = _weights(_constant_weights(trace.model) if weights is None else weights)
    elif weights is None:
        raise ValueError("weights must be given with components: the chance of each component at a step")
    else:
        path, law = _path(trace), _weights(weights)
    if path.max(initial=-1) >= len(law):
        raise ValueError(f"components names {path.max()}, but there are {len(law)} weights")
    return path, law


def _constant_weights(model: Any) -> Floats:
    mixing = getattr(model, "mixing", None)
    if not isinstance(model, Ensemble) or not isinstance(mixing, ConstantMixing):
        raise TypeError(
            f"lag_test needs constant weights, and {type(mixing or model).__name__} has none: under a router the "
            "chance of a component depends on the prefix, so a wait is no geometric variable; test the draws with "
            "martingale.martingale_portfolio instead"
        )
    return np.asarray(mixing.weights.numpy())


def _weights(weights: ArrayLike) -> Floats:
    return np.asarray(ConstantMixing(np.asarray(weights, dtype=np.float64)).weights.numpy())


def _components(trace: Trace) -> Ints:
    if trace.components is None:
        raise ValueError(f"trace of {trace.sampler} has no components: it drew from the mixture; use MESampler")
    return _path(trace.components)


def _path(components: Any) -> Ints:
    path = np.asarray(components.cpu() if isinstance(components, torch.Tensor) else components)
    if path.ndim != 2 or not np.issubdtype(path.dtype, np.integer) or path.size == 0 or path.min() < -1:
        raise ValueError(f"components must be (N, T) integers, -1 after the end, got {path.dtype} {path.shape}")
    if (path[:, :-1] < path[:, 1:])[path[:, :-1] == -1].any() or (path[:, 0] == -1).any():
        raise ValueError("components has an entry after a -1, or an empty row; -1 may only follow a row's end")
    return path.astype(np.int64)
