"""How much a statistic of a continuation varies, and how much of that is the component path.

Under ME a continuation is F(m, u): m the components drawn, u the token draws. The law of total variance splits

    Var F = E Var(F | m) + Var E(F | m),    share of the path S = Var E(F | m)/Var F.

CE has the same law of F whatever S is, so S is not a test of ME: it says what a run with *shared* component draws would
correlate (`dependence.design_effect`: 1 + (B-1) S). `pick_freeze` measures S, `exact_split` enumerates it on toys.
`variance_growth` says how Var F grows with T, and `markov_moments` is its oracle; `per_sequence` compares variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from me_stats.chi_square import check_level
from me_stats.draws import RowStreams, Stream
from me_stats.exact import sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.per_sequence import checked_sample
from me_stats.samplers.mixture import MESampler
from me_stats.samplers.tabular import tabulate
from me_stats.sensitivity.estimate import Estimate
from me_stats.sensitivity.exact import Statistic
from me_stats.trace import Trace, score
from me_stats.vocabulary import Prompt

Floats = NDArray[np.float64]

_FRESH = 2**119  # added to a seed modulo 2^120, the number of seeds: no user's second run has it by chance


@dataclass(frozen=True)
class VarianceSplit:
    """Shares of Var F by pick-freeze, from n rows (pairs) within prompts.

    `path` is Var E(F | m)/Var F, `tokens` is Var E(F | u)/Var F, `path_total` = 1 - `tokens` is E Var(F | u)/Var F: the
    path with its interactions. u are the uniforms of the inverse CDF, so the last two belong to that way of drawing
    tokens; `path` belongs to the law alone (to the component uniforms, if a router mixes). Estimates may be negative
    where the truth is 0. `variance` = `within` + `between`, `within` E Var(F | m), `between` Var E(F | m).
    """

    path: Estimate
    tokens: Estimate
    path_total: Estimate
    within: float
    between: float

    @property
    def variance(self) -> float:
        """Var F, pooled within prompts."""
        return self.within + self.between


@dataclass(frozen=True)
class ExactSplit:
    """Mean and variance of F by enumeration: `within` E Var(F | m), `between` Var E(F | m) over `paths` paths m."""

    mean: float
    within: float
    between: float
    paths: int

    @property
    def variance(self) -> float:
        """Var F."""
        return self.within + self.between

    @property
    def share(self) -> float:
        """Share of the component path, Var E(F | m)/Var F; 0 for a constant F."""
        return self.between / self.variance if self.variance > 0 else 0.0


class FrozenDraw:
    """A Draw that takes component uniforms from one seed and token uniforms from another.

    Two runs that share `component_seed` share the component path of every row (constant weights), whatever is written.
    """

    def __init__(self, *, component_seed: int, token_seed: int) -> None:
        self._seeds: dict[Stream, int] = {"component": component_seed, "token": token_seed}
        self._streams: dict[Stream, RowStreams] = {}

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        # Streams remember the rows they have met; a new batch begins with its components.
        if not self._streams or (step == 0 and stream == "component"):
            self._streams = {name: RowStreams(seed) for name, seed in self._seeds.items()}
        return self._streams[stream](log_law, rows, step, stream=stream, index=index)


def pick_freeze(
    ensemble: Ensemble, prompts: Prompt | Sequence[Prompt], f: Statistic, *, n: int, max_new_tokens: int, seed: int,
    confidence: float = 0.95,
) -> VarianceSplit:  # fmt: skip
    """Shares of Var F from `n` >= 2 pairs of rows per prompt that share the component path, or the token draws.

    Three ME runs: (m, u), (m, u') and (m', u); shares by `shared_variance` within prompts. `f` takes the token ids of
    one continuation. Raises ValueError for an f that is not finite, or that is constant.
    Source: Sobol' (1993), Sensitivity estimates for nonlinear mathematical models; Janon et al. (2014), ESAIM: P&S 18.

    >>> from me_stats.models.toy import TableModel
    >>> coins = Ensemble([TableModel([[1 - p, p]], order=0) for p in (0.1, 0.9)], ConstantMixing([0.5, 0.5]))
    >>> split = pick_freeze(coins, [], sum, n=4000, max_new_tokens=4, seed=0)
    >>> round(exact_split(coins, [], sum, max_new_tokens=4).share, 6)  # Var(P_m)/Var(x) = 0.16/0.25
    0.64
    >>> split.path.interval[0] < 0.64 < split.path.interval[1]
    True
    """
    if not isinstance(n, (int, np.integer)) or n < 2:
        raise ValueError(f"n must be an integer of at least 2 (pairs per prompt), got {n!r}")
    sampler, other = MESampler(ensemble), (seed + _FRESH) % (2 * _FRESH)
    runs = [sampler.sample(prompts, n=n, max_new_tokens=max_new_tokens, seed=seed)]
    for component_seed, token_seed in ((seed, other), (other, seed)):
        draw = FrozenDraw(component_seed=component_seed, token_seed=token_seed)
        runs.append(sampler.sample(prompts, n=n, max_new_tokens=max_new_tokens, draw=draw))
    base, same_path, same_tokens = (_values(run, f) for run in runs)
    groups = runs[0].prompt_index.numpy()
    path = shared_variance(base, same_path, groups=groups, confidence=confidence)
    tokens = shared_variance(base, same_tokens, groups=groups, confidence=confidence)
    low, high = tokens.interval
    total = Estimate(1 - tokens.value, tokens.stderr, (1 - high, 1 - low), tokens.n, "pick-freeze, 1 - tokens")
    within, pairs = _mean_squares(base, same_path, groups)[:2]
    return VarianceSplit(path, tokens, total, within, (pairs - within) / 2)


def shared_variance(
    x: ArrayLike, y: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95
) -> Estimate:
    """Cov(F, F')/Var F of exchangeable pairs x (N,), y (N,): the intraclass correlation of pairs, within `groups` (N,).

    ``S = (MSB - MSW)/(MSB + MSW)``, with MSW = mean (x-y)^2/2 and MSB = sum 2 (pair mean - group mean)^2/(N - groups).
    Interval by the jackknife over pairs on the scale atanh S with Student's t, so it stays in (-1, 1): all of it for
    two pairs in one group, and wide for groups of two or three. No normality is assumed, but tails count: ask for 100
    pairs, for 500 where values are as skewed as an exponential. Raises ValueError for unequal lengths or a constant F.

    >>> shared_variance([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.5]).value > 0.95
    True
    """
    first, second = checked_sample("x", x), checked_sample("y", y)
    if first.shape != second.shape:
        raise ValueError(f"x and y must be pairs of one length, got {first.size} and {second.size}")
    check_level(1 - confidence)
    labels = np.zeros(len(first), dtype=np.int64) if groups is None else np.asarray(groups)
    if labels.shape != first.shape or np.unique(labels, return_counts=True)[1].min() < 2:
        raise ValueError("groups must name one group per pair, with at least two pairs in each")
    msw, msb, a, b = _mean_squares(first, second, labels)
    if msb + msw <= 1e-24 * float(np.mean(first**2 + second**2)):
        raise ValueError("the statistic does not vary: no share of a variance of 0 is defined")
    share, n = (msb - msw) / (msb + msw), len(a)
    if 1 - abs(share) < 1e-12:  # the pairs are equal: atanh has no scale here, and nothing varies
        return Estimate(share, 0.0, (share, share), n, "pick-freeze")
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    left = n - 1 - len(sizes)
    if left < 1:
        return Estimate(share, math.inf, (-1.0, 1.0), n, "pick-freeze")
    # Leaving out a pair leaves out its squares, and moves the mean of its group.
    apart, together = (a - b) ** 2, (a + b) ** 2
    within = (apart.sum() - apart) / (2 * (n - 1))
    between = (together.sum() - together * (sizes / (sizes - 1))[place]) / (2 * left)
    shares = np.divide(between - within, between + within, out=np.ones(n), where=between + within > 0)
    scale = np.arctanh(np.clip(shares, -1 + 1e-12, 1 - 1e-12))
    spread = (n - 1) / math.sqrt(n) * float(scale.std(ddof=1))
    radius = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * spread
    low, high = (math.tanh(math.atanh(share) + sign * radius) for sign in (-1, 1))
    return Estimate(share, spread * (1 - share**2), (low, high), n, "pick-freeze")


def exact_split(
    ensemble: Ensemble, prompt: Prompt, f: Statistic, *, max_new_tokens: int, max_cells: int = 20_000_000
) -> ExactSplit:
    """The split of Var F by enumeration over every component path m and every continuation x.

    ``E(F | m) = sum_x F(x) prod_t P_{m_t}(x_t | x_<t)``; a path is T draws, of which a continuation that ends early
    uses its first. Raises TypeError for a router (its m has no law of its own), ValueError for more than `max_cells`
    pairs (m, x).
    """
    if not isinstance(ensemble, Ensemble) or type(ensemble.mixing) is not ConstantMixing:
        raise TypeError(
            "exact_split needs an Ensemble with ConstantMixing: under a router the path m depends on the tokens, so "
            "F given m is no product of components; use pick_freeze, which freezes the uniforms"
        )
    law = sequence_law(ensemble, prompt, max_new_tokens=max_new_tokens)
    rows = law.rows
    values = _finite([f(row) for row in rows])
    weights = ensemble.mixing.weights.numpy()
    used = np.flatnonzero(weights > 0)
    paths = len(used) ** max_new_tokens
    if paths * len(rows) > max_cells:
        raise ValueError(
            f"{paths:,} paths times {len(rows):,} continuations exceed max_cells={max_cells:,}; shorten max_new_tokens"
        )
    steps = score(ensemble, prompt, rows).component_log_probs.exp().numpy()[..., used]
    given_path, path_probs = np.ones((len(rows), 1)), np.ones(1)
    for step in range(max_new_tokens):
        now = steps[:, step] if step < steps.shape[1] else np.ones((len(rows), len(used)))
        given_path = (given_path[:, :, None] * now[:, None, :]).reshape(len(rows), -1)
        path_probs = np.outer(path_probs, weights[used]).reshape(-1)
    mean = float(path_probs @ (values @ given_path))
    means = (values - mean) @ given_path
    second = (values - mean) ** 2 @ given_path
    return ExactSplit(mean, float(path_probs @ (second - means**2)), float(path_probs @ means**2), paths)


@dataclass(frozen=True, eq=False)
class VarianceGrowth:
    """Var of a cumulative statistic at steps 1..T: `variance`, `lower`, `upper` (T,) pointwise, and the log-log slope.

    `rate` is the least-squares slope of log Var_t on log t from `start`: 1 for short memory, 2 for what is drawn once
    per sequence.
    """

    variance: Floats
    lower: Floats
    upper: Floats
    rate: Estimate
    start: int


def variance_growth(values: ArrayLike, *, start: int = 1, confidence: float = 0.95) -> VarianceGrowth:
    """Variance over sequences of a cumulative per-token statistic (N, T), with intervals and its growth rate.

    Intervals of log Var_t and of the slope by the jackknife over sequences with Student's t: a slope is
    ``sum c_t log Var_t``, and leaving out a sequence leaves out all its steps, whatever the dependence between them.
    Raises ValueError for fewer than 4 sequences, a step without variance, or fewer than two steps from `start`.

    >>> steps = np.random.default_rng(0).normal(size=(500, 30)).cumsum(1)
    >>> growth = variance_growth(steps)
    >>> growth.rate.interval[0] < 1 < growth.rate.interval[1]
    True
    """
    v = checked_sample("values", values, ndim=2, at_least=4)
    n, steps = v.shape
    check_level(1 - confidence)
    if not 1 <= start < steps:
        raise ValueError(f"start must lie in 1..{steps - 1} (two steps make a slope), got {start}")
    squares = (v - v.mean(0)) ** 2
    variance = squares.sum(0) / (n - 1)
    without = (squares.sum(0) - squares * n / (n - 1)) / (n - 2)
    if not (without > 1e-12 * (v**2).mean(0)).all():
        raise ValueError("values must vary over sequences at every step; drop the steps that do not")
    logs = np.log(without)
    t = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
    # 2/(n-1) is what remains for a fair coin, whose variance has no first-order error.
    radius = t * np.sqrt((n - 1) ** 2 / n * logs.var(0, ddof=1) + 2 / (n * (n - 1)))
    log_t = np.log(np.arange(start, steps + 1))
    slope = (log_t - log_t.mean()) / ((log_t - log_t.mean()) ** 2).sum()
    value = float(slope @ np.log(variance[start - 1 :]))
    stderr = (n - 1) / math.sqrt(n) * float((logs[:, start - 1 :] @ slope).std(ddof=1))
    rate = Estimate(value, stderr, (value - t * stderr, value + t * stderr), n, "log-log slope")
    return VarianceGrowth(variance, variance * np.exp(-radius), variance * np.exp(radius), rate, start)


@dataclass(frozen=True, eq=False)
class MarkovMoments:
    """Exact `mean` and `variance` (T,) of ``S_t = f(x_1) + .. + f(x_t)``, t = 1..T, and the limits per token.

    `stationary_mean` is lim S_t/t and `asymptotic_variance` lim Var(S_t)/t.
    """

    mean: Floats
    variance: Floats
    stationary_mean: float
    asymptotic_variance: float


def markov_moments(model: Any, f: ArrayLike, *, steps: int, prompt: Prompt = ()) -> MarkovMoments:
    """Closed-form moments of an additive statistic of a first-order chain: the oracle of `variance_growth`.

    `model` is a MarkovModel, or an Ensemble of such with constant weights (its law is the chain of the mixed tables);
    `f` (V,) a number per token. The limit is ``2 <g, Z g>_pi - <g, g>_pi`` with g = f - pi f and the fundamental matrix
    ``Z = (I - P + 1 pi)^-1``. Raises TypeError for other models, ValueError for end-of-sequence ids or more than one
    recurrent class. Source: Kemeny and Snell (1960), Finite Markov Chains.

    >>> from me_stats.models.toy import MarkovModel
    >>> chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]])
    >>> moments = markov_moments(chain, [0.0, 1.0], steps=2)
    >>> moments.variance.round(6).tolist()  # the autocorrelation is 0.8^k
    [0.25, 0.9]
    >>> round(moments.asymptotic_variance, 6)  # 0.25 (1 + 0.8)/(1 - 0.8)
    2.25
    """
    table = tabulate(model)
    if table is None or table.order > 1:
        raise TypeError("model must be a MarkovModel, or an Ensemble of MarkovModels with ConstantMixing")
    if table.vocabulary.eos:
        raise ValueError("model has end-of-sequence ids: the sum then stops at random; use a chain without them")
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    size = table.vocabulary.size
    reward = checked_sample("f", f, at_least=1)
    if reward.shape != (size,):
        raise ValueError(f"f must be one number per token, {size}, got {reward.size}")
    laws = table.at_order(1).log_table.exp().numpy()
    laws = laws / laws.sum(1, keepdims=True)
    first = laws[int(table.at_order(1).states_of([table.vocabulary.encode(prompt)])[0])]
    transition = laws[1:]
    values, vectors = np.linalg.eig(transition.T)
    fixed = np.flatnonzero(np.abs(values - 1) < 1e-9)
    if len(fixed) != 1:
        raise ValueError("model has more than one recurrent class, so no limit that all starts share")
    pi = vectors[:, fixed[0]].real / vectors[:, fixed[0]].real.sum()
    level = float(pi @ reward)
    g = reward - level
    fundamental = np.linalg.inv(np.eye(size) - transition + pi)
    asymptotic = float(2 * (pi * g) @ fundamental @ g - (pi * g) @ g)
    # Mass, E[S; x] and E[S^2; x] of the centred sum at each last token x.
    mass, one, two = first, first * g, first * g**2
    mean, variance = np.empty(steps), np.empty(steps)
    for step in range(steps):
        if step:
            mass, one, two = mass @ transition, one @ transition, two @ transition
            one, two = one + mass * g, two + 2 * one * g + mass * g**2
        mean[step] = one.sum()
        variance[step] = max(0.0, two.sum() - mean[step] ** 2)
    return MarkovMoments(mean + level * np.arange(1, steps + 1), variance, level, max(0.0, asymptotic))


def _values(trace: Trace, f: Statistic) -> Floats:
    return _finite([f(row) for row in trace.sequences()])


def _finite(values: Sequence[float]) -> Floats:
    array = np.array([float(value) for value in values])
    if not np.isfinite(array).all():
        raise ValueError("f must be finite on every continuation")
    return array


def _mean_squares(x: Floats, y: Floats, groups: NDArray[Any]) -> tuple[float, float, Floats, Floats]:
    """Mean squares within and between pairs, and both members centred at the mean of their group."""
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    centre = (np.bincount(place, weights=(x + y) / 2) / sizes)[place]
    a, b = x - centre, y - centre
    between = float(((a + b) ** 2).sum()) / 2 / (len(x) - len(sizes))
    return float(((a - b) ** 2).mean()) / 2, between, a, b
