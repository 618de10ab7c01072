"""dE_λ f/dλ from samples: the score function on one trace, and differences under common random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.samplers import MESampler, Sampler
from me_stats.sensitivity.estimate import Estimate, mean_estimate
from me_stats.sensitivity.exact import Statistic, checked_direction
from me_stats.sensitivity.reweight import reweight, values_of
from me_stats.trace import Trace, require_independent_rows
from me_stats.vocabulary import Prompt


def score_function_gradient(
    trace: Trace, f: Statistic | ArrayLike, *, weights: ArrayLike | None = None, confidence: float = 0.95
) -> tuple[Estimate | None, ...]:
    r"""Derivatives of E_λ f towards each vertex, :math:`E[(f - b) \sum_t s_{t,i}]`, :math:`s_{t,i} = P_i/p_t - 1`.

    Entry i is along e_i − λ, so Σ λ_i g_i = 0. The baseline b is the mean of f over the *other* rows: it changes
    no expectation, since E s = 0, and removes the variance that the mean of f would add. Intervals are normal, with the
    stderr over rows. Rows of several prompts count as draws of a random prompt.

    Parameters
    ----------
    trace
        Rows of CE or ME under an Ensemble, at least two.
    f
        A function of the token ids of one row; its values (N,); or rewards (N, T) that add up to f, each a function of
        the tokens up to its step. With rewards a step's score meets only the rewards from that step on (the earlier
        ones have mean zero against it), and the baseline is taken per step, over the rows that got there.
    weights
        (K,) the λ to differentiate at; default the one drawn at. Elsewhere the rows are re-weighted, self-normalised.

    Returns
    -------
    tuple
        One Estimate per component; None for a component that had weight 0 in the draw, since rows that only it can
        write contribute to the derivative and are not there.

    Raises
    ------
    ValueError
        A router's trace without `weights`, or as `reweight`.

    Examples
    --------
    >>> from me_stats.models import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)]
    >>> trace = MESampler(Ensemble(coins, ConstantMixing([0.5, 0.5]))).sample([], n=20_000, max_new_tokens=3)
    >>> [round(g.value, 1) for g in score_function_gradient(trace, sum)]  # exactly ∓0.6
    [-0.6, 0.6]
    """
    if weights is None:
        mixing = getattr(trace.model, "mixing", ConstantMixing([1.0]))
        if not isinstance(mixing, ConstantMixing):
            raise ValueError("the trace was drawn by a router; give the weights to differentiate at")
        weights = mixing.weights.numpy()
    return reweight(trace, weights).gradient(f, confidence=confidence)


def common_random_number_difference(
    components: Sequence[Any],
    weights: ArrayLike,
    direction: ArrayLike,
    step: float,
    f: Statistic,
    *,
    prompts: Prompt | Sequence[Prompt],
    n: int,
    max_new_tokens: int,
    seed: int = 0,
    sampler: Callable[[Ensemble], Sampler] = MESampler,
    confidence: float = 0.95,
) -> Estimate:
    """Derivative of E_λ f along d by (f(λ + h d) − f(λ − h d))/2h, both sampled with the same random numbers.

    Row r of both runs reads the same uniforms, so most rows are equal and their noise cancels. The bias is
    h² |d³E/dε³|/6 + O(h⁴); the interval does not contain it.

    Parameters
    ----------
    direction, step
        d (K,), summing to 0, and h > 0; λ ± h d must lie on the simplex.
    f
        A function of the token ids of one row.
    n
        Rows per prompt.

    Raises
    ------
    ValueError
        A direction that does not sum to 0, a step that leaves the simplex, or a sampler whose rows share component
        draws.

    Examples
    --------
    >>> from me_stats.models import TableModel
    >>> coins = [TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)]
    >>> slope = common_random_number_difference(
    ...     coins, [0.5, 0.5], [-0.5, 0.5], 0.1, sum, prompts=[], n=20_000, max_new_tokens=3
    ... )
    >>> round(slope.value, 1)
    0.6
    """
    middle = ConstantMixing(np.asarray(weights, dtype=np.float64)).weights.numpy()
    along = checked_direction(direction, len(middle))
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive, got {step}")
    ends = [middle - step * along, middle + step * along]
    if min(end.min() for end in ends) < -1e-12:
        raise ValueError(f"λ ± {step} · direction leaves the simplex at {middle.tolist()}; take a smaller step")
    values = []
    for end in ends:
        ensemble = Ensemble(components, ConstantMixing(np.maximum(end, 0.0)))
        drawing = sampler(ensemble)
        require_independent_rows(drawing, "common_random_number_difference")
        trace = drawing.sample(prompts, n=n, max_new_tokens=max_new_tokens, seed=seed)
        values.append(values_of(trace, f))
    difference = mean_estimate((values[1] - values[0]) / (2 * step), confidence=confidence)
    return replace(difference, method=f"common random numbers, central difference with step {step:g}")
