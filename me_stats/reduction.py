"""The same expectation under ME from fewer rows: conditional means, common random numbers, control variates.

Every estimator here keeps the expectation; what changes is the variance, and the result says by how much: `factor` is
Var plain/Var reduced of one row, so the plain mean would need `factor` times the rows. Which gain is a theorem:

- `component_sums`: given all tokens the components are independent with the responsibilities as their laws, so these
  are the mean given the tokens, and the factor is never below 1 (Rao and Blackwell).
- `token_sums`: each term becomes its mean given the prefix. The expectation of the sum is unchanged (tower rule); its
  variance may grow, for the terms depend on each other. Measured, not promised.
- `control_variates` with `law_controls`: the same differences f(x_t) - E f with a coefficient that is fitted instead of
  1, so in the limit at least as good as both. `weight_controls` need only the trace.
- `common_draws`: two runs on one set of random numbers, against two independent ones.

Rows must be independent given their prompt; means are over the prompts given, so variances are within prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.chi_square import check_level
from me_stats.models.ensemble import chunked_paths
from me_stats.per_sequence import checked_sample
from me_stats.sensitivity.estimate import Estimate
from me_stats.sensitivity.exact import Statistic
from me_stats.sensitivity.reweight import values_of
from me_stats.trace import Trace, require_independent_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TokenFunction = ArrayLike | Literal["log_prob"]
"""A number per token (V,), or log p(x_t | prefix) in nats."""


@dataclass(frozen=True)
class Reduced:
    """One expectation twice from the same rows, `plain` and `reduced`, and `factor` = Var plain/Var reduced of a row.

    Where the reduced rows are equal within each prompt, the factor is infinite; there, and where a single row decides
    a variance, its interval is (0, inf): nothing is known of its error.
    """

    plain: Estimate
    reduced: Estimate
    factor: Estimate


@dataclass(frozen=True)
class Adjusted(Reduced):
    """`Reduced` by control variates: fitted `coefficients`, and `controls_pvalue` for controls of mean zero.

    A small `controls_pvalue` says that the controls are not what they claim to be, and the estimate is biased.
    """

    coefficients: tuple[float, ...]
    controls_pvalue: float


def reduced_mean(
    plain: ArrayLike, reduced: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95,
    method: str = "conditional mean",
) -> Reduced:  # fmt: skip
    """Means of two columns (N,) of equal expectation on the same rows, and their variance ratio within `groups` (N,).

    Student's t for the means; the factor by the jackknife of its logarithm over rows, which counts that both columns
    come from the same rows. Raises ValueError for groups of one row, or a `plain` that does not vary.

    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(2, 1000))
    >>> gain = reduced_mean(a + b, b).factor
    >>> gain.interval[0] < 2 < gain.interval[1]
    True
    """
    if np.shape(plain) != np.shape(reduced):
        raise ValueError(f"plain and reduced must have one shape, got {np.shape(plain)} and {np.shape(reduced)}")
    first, second = _Rows.of("plain", plain, groups), _Rows.of("reduced", reduced, groups)
    return Reduced(
        first.mean(confidence, "drawn"), second.mean(confidence, method), _factor([first], second, confidence)
    )


def component_sums(trace: Trace, values: ArrayLike, *, confidence: float = 0.95) -> Reduced:
    """E Σ_t h(m_t, x_t) with the mean over components, Σ_i r_ti h(i, x_t), in place of the component drawn.

    Parameters
    ----------
    values
        h: (K,) per component (its cost, or 1 to count its tokens), (V, K) per token and component, or (N, T, K).

    Raises
    ------
    ValueError
        No components in the trace (CE draws none), shared draws, or shapes that do not fit.

    Examples
    --------
    >>> from me_stats import ConstantMixing, Ensemble, MESampler
    >>> from me_stats.models import TableModel
    >>> coins = Ensemble([TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)], ConstantMixing([0.5, 0.5]))
    >>> trace = MESampler(coins).sample([], n=1000, max_new_tokens=4)
    >>> ones_by_second = component_sums(trace, [[0, 0], [0, 1]])  # 4 · 0.5 · 0.6
    >>> ones_by_second.reduced.interval[0] < 1.2 < ones_by_second.reduced.interval[1]
    True
    >>> ones_by_second.factor.value > 1
    True
    """
    require_independent_rows(trace, "component_sums")
    if trace.components is None:
        raise ValueError(f"{trace.sampler} drew no components, so there is no plain estimate; use a trace of MESampler")
    mask, shape = trace.mask.numpy(), tuple(trace.score.component_log_probs.shape)
    h = np.asarray(values, dtype=np.float64)
    known: dict[int, tuple[int, ...]] = {1: shape[2:], 2: (trace.model.vocabulary.size, shape[2]), 3: shape}
    if h.shape != known.get(h.ndim) or not np.isfinite(h).all():
        raise ValueError(f"values must be finite, of shape {known[1]}, {known[2]} or {known[3]}, got {h.shape}")
    if h.ndim < 3:
        h = np.broadcast_to(h, known[2])[np.where(mask, trace.tokens.numpy(), 0)]
    drawn = np.where(mask, trace.components.numpy(), 0)[..., None]
    plain = np.where(mask, np.take_along_axis(h, drawn, 2)[..., 0], 0.0).sum(1)
    averaged = np.where(mask, (h * trace.score.responsibilities.numpy()).sum(2), 0.0).sum(1)
    return reduced_mean(
        plain, averaged, groups=trace.prompt_index.numpy(), confidence=confidence, method="mean over components"
    )


def token_sums(trace: Trace, f: TokenFunction, *, confidence: float = 0.95) -> Reduced:
    """E Σ_t f(x_t) with each term's mean given its prefix, Σ_x p(x | prefix) f(x): needs the laws, one pass in chunks.

    The sum stops with the row: whether a step is reached depends on its prefix alone, so the tower rule holds. The
    factor may be below 1. `f` is (V,), or "log_prob", whose mean is minus the entropy (nats). Raises ValueError for
    shared draws or an f that is not one finite number per token.

    >>> from me_stats.models import MarkovModel
    >>> from me_stats.samplers import CESampler
    >>> flips = MarkovModel([0.5, 0.5], [[0.1, 0.9], [0.9, 0.1]])
    >>> trace = CESampler(flips).sample([], n=500, max_new_tokens=2)
    >>> token_sums(trace, [0.0, 1.0]).factor.value < 1  # the second token nearly undoes the first
    True
    """
    realised, expected = _law_sums(trace, [f], "token_sums")
    return reduced_mean(
        realised[:, 0], expected[:, 0], groups=trace.prompt_index.numpy(), confidence=confidence,
        method="mean given the prefix",
    )  # fmt: skip


def weight_controls(trace: Trace, *, starts: Sequence[int] = (0,)) -> Floats:
    """Controls (N, (K-1) B) of mean zero from the trace alone: Σ_t (responsibility_i - λ_i(prefix)), i < K.

    They are the λ-score times λ_i: what moves with the mixing weights is what they take out. `starts` are the first
    steps of B blocks, each summed on its own; the last component follows from the others. The component drawn, in place
    of its responsibility, would only add noise. Raises ValueError for one component, or shared draws.

    >>> from me_stats import ConstantMixing, Ensemble, MESampler
    >>> from me_stats.models import TableModel
    >>> coins = Ensemble([TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)], ConstantMixing([0.5, 0.5]))
    >>> trace = MESampler(coins).sample([], n=200, max_new_tokens=4)
    >>> adjusted = control_variates([sum(row) for row in trace.sequences()], weight_controls(trace))
    >>> round(adjusted.reduced.value, 6)  # a sum over coins is linear in the control: nothing is left to chance
    1.6
    """
    require_independent_rows(trace, "weight_controls")
    scored, n_steps = trace.score, trace.tokens.shape[1]
    if scored.log_weights.shape[2] < 2:
        raise ValueError("trace must come from an ensemble of two components or more: one weight is no control")
    edges = [*starts]
    if not edges or edges[0] != 0 or any(b <= a for a, b in itertools.pairwise(edges)):
        raise ValueError(f"starts must begin with 0 and grow, got {edges}")
    steps = (scored.responsibilities - scored.log_weights.exp()).masked_fill(~trace.mask[..., None], 0.0)[..., :-1]
    sums = np.concatenate([np.zeros((len(steps), 1, steps.shape[2])), steps.numpy().cumsum(1)], axis=1)
    ends = [min(edge, n_steps) for edge in [*edges, n_steps]]
    blocks = [sums[:, b] - sums[:, a] for a, b in itertools.pairwise(ends)]
    return np.concatenate(blocks, axis=1)


def law_controls(trace: Trace, *functions: TokenFunction) -> Floats:
    """Controls (N, C) of mean zero that need the laws: Σ_t f(x_t) - E(f | prefix) for each of C `functions`.

    Martingale differences; "log_prob" gives Σ_t log p(x_t) + entropy. One pass over the laws serves all, in chunks.
    Raises ValueError as `token_sums`.
    """
    if not functions:
        raise ValueError("functions must hold at least one: a number per token, or 'log_prob'")
    realised, expected = _law_sums(trace, functions, "law_controls")
    return realised - expected


def control_variates(
    values: ArrayLike, controls: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95
) -> Adjusted:
    """Mean of rows (N,) less what C `controls` (N, C) of mean zero explain of them: mean of y_i - b_(-i) c_i.

    b_(-i) is the least-squares coefficient without row i, one for all `groups` (N,) (prompts) with an intercept each:
    it is independent of c_i, so the estimate is unbiased however many controls there are, and the spread of its terms
    counts what fitting costs. Controls that repeat each other are dropped. Student's t with N - groups - C degrees of
    freedom. The factor is for this N, fitting included: it grows a little with N, and may fall below 1 where controls
    explain nothing. `controls_pvalue` is Hotelling's test that the controls have mean zero.

    Raises ValueError for too few rows, or controls that do not vary or are not finite.

    >>> rng = np.random.default_rng(0)
    >>> c, e = rng.normal(size=(2, 500))
    >>> found = control_variates(1 + 3 * c + e, c[:, None])
    >>> round(found.coefficients[0]), found.factor.interval[0] < 10 < found.factor.interval[1]
    (3, True)
    """
    rows, c = _Rows.of("values", values, groups), checked_sample("controls", controls, ndim=2)
    n = len(rows.values)
    if len(c) != n:
        raise ValueError(f"controls must have one row for each of the {n} values, got {len(c)}")
    centred = c - _group_means(c, rows.place, rows.sizes)
    basis, scales, turn = np.linalg.svd(centred, full_matrices=False)
    kept = scales > 1e-9 * max(float(scales[0]), 1e-9 * float(np.linalg.norm(c)))
    if not scales[0] > 1e-12 * float(np.linalg.norm(c)):
        raise ValueError("controls must vary between rows: a constant is no control")
    rank = int(kept.sum())
    degrees = n - len(rows.sizes) - rank
    if degrees < 3:
        raise ValueError(f"{n} rows in {len(rows.sizes)} groups are too few for {rank} controls; draw more rows")
    basis = basis[:, kept]
    back = turn[kept].T / scales[kept]
    whole = c @ back  # its centred columns are `basis`, which is orthonormal
    y = rows.values - _group_means(rows.values[:, None], rows.place, rows.sizes)[:, 0]
    slopes = basis.T @ y
    leverage = 1 / rows.sizes[rows.place] + (basis**2).sum(1)
    if not (leverage < 1 - 1e-9).all():
        raise ValueError("controls are fitted by a single row each; use fewer controls or more rows")
    shift = (whole * basis).sum(1) * (y - basis @ slopes) / (1 - leverage)
    adjusted = _Rows.of("values", rows.values - whole @ slopes + shift, groups)
    mean = whole.mean(0)
    weight = (rows.sizes / (rows.sizes - 1))[rows.place]
    square = float(mean @ np.linalg.solve((basis * weight[:, None]).T @ basis / n**2, mean))
    nu = n - len(rows.sizes)
    pvalue = float(stats.f.sf(square * (nu - rank + 1) / (nu * rank), rank, nu - rank + 1))
    return Adjusted(
        rows.mean(confidence, "drawn"),
        adjusted.mean(confidence, f"{rank} control variate{'s' * (rank > 1)}", degrees),
        _factor([rows], adjusted, confidence),
        tuple((back @ slopes).tolist()),
        pvalue,
    )


def common_draws(
    first: Trace, second: Trace, f: Statistic | tuple[ArrayLike, ArrayLike], *, confidence: float = 0.95
) -> Reduced:
    """E F of `second` - E F of `first`, two traces with the same random numbers, such as ME at λ' and at λ.

    Streams are addressed by seed, row and step, so equal rows read equal uniforms. `plain` is the difference with the
    error that independent runs of that size would have; ``factor = (Var x + Var y)/Var(y - x)``. `f` takes the token
    ids of one row, or is the pair of values (N,), (N,) of both traces. The interval rests on the rows that differ: ask
    for 30 of them.

    Raises ValueError for traces that differ in seed, rows or prompts, or were drawn by a `draw` of their own: their
    pairs would be independent, or worse. Derivatives: `sensitivity.common_random_number_difference`.
    """
    for trace in (first, second):
        require_independent_rows(trace, "common_draws")
    if first.seed is None or second.seed is None or first.seed != second.seed:
        raise ValueError(f"the traces must have one seed to share random numbers, got {first.seed} and {second.seed}")
    same = (torch.equal(getattr(first, name), getattr(second, name)) for name in ("rows", "prompt_index"))
    if first.prompts != second.prompts or not all(same):
        raise ValueError("the traces must continue the same prompts in the same rows; sample both alike")
    pair = f if isinstance(f, tuple) else (f, f)
    groups = first.prompt_index.numpy()
    x, y = (
        _Rows.of("f", _row_values(trace, one), groups) for trace, one in zip((first, second), pair, strict=True)
    )  # fmt: skip
    difference = _Rows.of("f", y.values - x.values, groups)
    reduced = difference.mean(confidence, "common random numbers")
    stderr = math.hypot(x.stderr, y.stderr)
    radius = float(stats.t.ppf(0.5 + confidence / 2, x.degrees)) * stderr
    plain = Estimate(
        reduced.value, stderr, (reduced.value - radius, reduced.value + radius), reduced.n, "as if independent"
    )
    return Reduced(plain, reduced, _factor([x, y], difference, confidence))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Values of independent rows in groups, and their distance `away` (N,) from the mean of their group."""

    values: Floats
    place: Ints
    sizes: Ints
    away: Floats

    @classmethod
    def of(cls, name: str, values: ArrayLike, groups: ArrayLike | None) -> _Rows:
        v = checked_sample(name, values, at_least=4)
        labels: NDArray[Any] = np.zeros(len(v), dtype=np.int64) if groups is None else np.asarray(groups)
        if labels.shape != v.shape:
            raise ValueError(f"groups must name one group for each of the {len(v)} rows, got shape {labels.shape}")
        _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if sizes.min() < 2:
            raise ValueError("groups must have two rows each: a variance within a prompt needs them; raise n")
        return cls(v, place, sizes, v - _group_means(v[:, None], place, sizes)[:, 0])

    @property
    def degrees(self) -> int:
        return len(self.values) - len(self.sizes)

    @property
    def stderr(self) -> float:
        """Of the mean over rows, the groups being fixed."""
        weight = (self.sizes / (self.sizes - 1))[self.place]
        return math.sqrt(float((weight * self.away**2).sum())) / len(self.values)

    def mean(self, confidence: float, method: str, degrees: int | None = None) -> Estimate:
        check_level(1 - confidence)
        value, stderr = float(self.values.mean()), self.stderr
        radius = float(stats.t.ppf(0.5 + confidence / 2, degrees or self.degrees)) * stderr
        return Estimate(value, stderr, (value - radius, value + radius), len(self.values), method)

    def squares(self) -> tuple[float, Floats]:
        """Sum of squares within groups, in all and without each row."""
        total = float((self.away**2).sum())
        return total, total - self.away**2 * (self.sizes / (self.sizes - 1))[self.place]


def _factor(plain: Sequence[_Rows], reduced: _Rows, confidence: float) -> Estimate:
    """Ratio of summed variances of `plain` to that of `reduced`, jackknifed over rows on the log scale."""
    n, method = len(reduced.values), "jackknife of log variances"
    sums = [rows.squares() for rows in plain]
    above, without = sum(total for total, _ in sums), np.sum([left for _, left in sums], axis=0)
    scale = sum(float((rows.values**2).sum()) for rows in plain)
    if above <= 1e-24 * scale:
        raise ValueError("the plain values do not vary: there is nothing to reduce")
    below, left = reduced.squares()
    if below <= 1e-20 * max(above, 1e-10 * scale):
        return Estimate(math.inf, math.inf, (0.0, math.inf), n, "the reduced rows are equal")
    if not (without > 1e-12 * above).all() or not (left > 1e-12 * below).all():
        return Estimate(above / below, math.inf, (0.0, math.inf), n, "a single row decides")
    logs = np.log(without) - np.log(left)
    spread = math.sqrt((n - 1) * float(logs.var()))
    value = above / below
    radius = float(stats.t.ppf(0.5 + confidence / 2, reduced.degrees)) * spread
    return Estimate(value, value * spread, (value * math.exp(-radius), value * math.exp(radius)), n, method)


def _law_sums(trace: Trace, functions: Sequence[TokenFunction], caller: str) -> tuple[Floats, Floats]:
    """(N, C) Σ_t f(x_t) and Σ_t E(f | prefix) along each row."""
    require_independent_rows(trace, caller)
    size = trace.model.vocabulary.size
    tables: list[torch.Tensor | None] = []
    for f in functions:
        if isinstance(f, str):
            if f != "log_prob":
                raise ValueError(f"a token function is a number per token or 'log_prob', got {f!r}")
            tables.append(None)
        else:
            table = checked_sample("f", f, at_least=1)
            if table.shape != (size,):
                raise ValueError(f"f must be one number per token, {size}, got {table.size}")
            tables.append(torch.from_numpy(table))
    lengths = trace.lengths.numpy()
    row, start = np.repeat(np.arange(len(lengths)), lengths), 0
    sums = np.zeros((2, len(lengths), len(tables)))
    for laws, log_weights, tokens in chunked_paths(trace.model, trace.row_prompts(), trace.sequences()):
        weights = log_weights.to(laws.device, torch.float64)[..., None]
        # Normalised, as the inverse CDF reads it.
        log_law = (laws.double() + weights).logsumexp(1).log_softmax(-1)
        law, picked = log_law.exp(), tokens.to(log_law.device)[:, None]
        place = row[start : start + len(tokens)]
        for column, one in enumerate(tables):
            if one is None:
                seen = log_law.gather(1, picked)[:, 0]
                mean = torch.where(law > 0, law * log_law, torch.zeros_like(law)).sum(-1)
            else:
                reward = one.to(law.device)
                seen, mean = reward[picked[:, 0]], law @ reward
            for side, steps in zip(sums, (seen, mean), strict=True):
                np.add.at(side[:, column], place, steps.cpu().numpy())
        start += len(tokens)
    return sums[0], sums[1]


def _row_values(trace: Trace, f: Statistic | ArrayLike) -> Floats:
    values = values_of(trace, f)
    if values.ndim != 1:
        raise ValueError(f"f must give one value a row, got shape {values.shape}; sum over the steps")
    return values


def _group_means(values: Floats, place: Ints, sizes: Ints) -> Floats:
    """(N, C) mean of each row's group."""
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, place, values)
    return np.asarray((sums / sizes[:, None])[place])
