"""KL between laws over whole sequences, from the exact KL of every step, and the TV that it allows at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from me_stats.sequence_divergence import betting_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class KLEstimate:
    """Estimate of KL(p‖q) over sequences, in nats, from `n` sequences drawn from p.

    Attributes
    ----------
    value, stderr
        Mean and its standard error; both +inf where `infinite`.
    normal
        value ± z stderr, cut at 0: approximate, and too narrow where few rows carry most of the divergence.
    bounded
        Betting interval, valid at any n; None unless `max_step_kl` was given.
    tv_upper
        `tv_bound_from_kl` of the upper end of `bounded`, or of `normal` where there is none.
    infinite
        Whether some step has infinite KL. p visited it, so KL(p‖q) is +inf: a fact, not an estimate.
    """

    value: float
    stderr: float
    normal: tuple[float, float]
    bounded: tuple[float, float] | None
    tv_upper: float
    infinite: bool
    confidence: float
    n: int
    method: str


def sequence_kl(step_kl: ArrayLike, *, max_step_kl: float | None = None, confidence: float = 0.95) -> KLEstimate:
    """KL(p‖q) over whole sequences by the chain rule, KL = E_p Σ_t KL(p_t‖q_t), the inner KL exact at each step.

    Independent sequences are drawn from p; p_t and q_t are the laws of the next token after their prefixes, with no
    draw between them ("Rao-Blackwell": log p(x_t)/q(x_t) is replaced by its mean given the prefix). The sum is never
    negative and has the mean of log p(x)/q(x), as a rule with less variance: 2.3 to 28 times on eight random toys of
    four steps. That is no theorem: in a log-ratio a later step may cancel an earlier one, and step KLs never cancel.

    TV stays below √(KL/2) and √(1 − e^−KL) (`tv_bound_from_kl`); a sum of step TVs is vacuous after a few tokens.

    Parameters
    ----------
    step_kl
        (N, T) KL(p_t‖q_t) in nats, as from `divergence.kl_divergence(log_p, log_q)`; 0 after a row's end. +inf where
        q excludes a token that p allows: then use `sequence_divergence.support_violation_bound`.
    max_step_kl
        A bound on the KL of every step, known beforehand, not the largest one seen: log 1/min λ where q mixes with
        weights λ what p draws from. It makes T · max_step_kl bound a row, and gives `bounded`. Without it, rows that
        all happen to agree give a width of 0.

    Raises
    ------
    ValueError
        Fewer than two rows, NaN, negative entries, or entries above `max_step_kl`.

    Source: Amini, Vieira and Cotterell (2025), Better estimation of the KL divergence between language models,
    arXiv:2504.10637, for the estimator.

    Examples
    --------
    >>> steps = np.tile([0.002, 0.0, 0.001, 0.0], (200, 2))
    >>> estimate = sequence_kl(steps, max_step_kl=0.01)
    >>> round(estimate.value, 3), round(estimate.bounded[1], 3), round(estimate.tv_upper, 2)
    (0.006, 0.009, 0.07)
    >>> sequence_kl([[0.0, math.inf], [0.0, 0.1]]).tv_upper
    1.0
    """
    steps = _steps(step_kl, max_step_kl)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")
    n = len(steps)
    if np.isinf(steps).any():
        infinity = (math.inf, math.inf)
        return KLEstimate(math.inf, math.inf, infinity, None, 1.0, True, confidence, n, "infinite at a visited step")
    rows = steps.sum(1)
    value, stderr = float(rows.mean()), float(rows.std(ddof=1)) / math.sqrt(n)
    radius = float(norm.isf((1.0 - confidence) / 2.0)) * stderr
    normal, bounded = (max(0.0, value - radius), value + radius), None
    method = "sum of exact step KLs, normal interval"
    if max_step_kl is not None:
        most = max_step_kl * steps.shape[1]
        low, high = betting_interval(np.minimum(rows / most, 1.0), confidence=confidence)
        bounded = (most * low, most * high)
        method = "sum of exact step KLs, betting interval"
    tv_upper = tv_bound_from_kl((bounded or normal)[1])
    return KLEstimate(value, stderr, normal, bounded, tv_upper, False, confidence, n, method)


def tv_bound_from_kl(kl: float) -> float:
    """Largest TV that a KL (nats) allows: min(√(KL/2), √(1 − e^−KL)), Pinsker and Bretagnolle–Huber.

    The first is smaller up to 1.59 nats, the second never passes 1.

    Examples
    --------
    >>> round(tv_bound_from_kl(0.02), 12), round(tv_bound_from_kl(3.0), 3), tv_bound_from_kl(math.inf)
    (0.1, 0.975, 1.0)
    """
    if not kl >= 0.0:
        raise ValueError(f"kl is {kl}: a divergence is non-negative")
    return min(math.sqrt(kl / 2.0), math.sqrt(-math.expm1(-kl)))


def _steps(step_kl: ArrayLike, max_step_kl: float | None) -> Floats:
    steps = np.asarray(step_kl, dtype=np.float64)
    if steps.ndim != 2 or steps.shape[0] < 2 or steps.shape[1] < 1:
        raise ValueError(f"step_kl has shape {steps.shape}: give (N, T), at least two sequences of one step")
    if not (steps >= 0).all():
        raise ValueError("step_kl holds NaN or negative entries: give exact divergences, not log-ratios of samples")
    if max_step_kl is not None:
        if not 0.0 < max_step_kl < math.inf:
            raise ValueError(f"max_step_kl is {max_step_kl}: it must be positive and finite")
        # Rounding may lift a step that attains the bound.
        if steps.max() > max_step_kl * (1 + 1e-9) + 1e-12:
            raise ValueError(f"step_kl reaches {steps.max():.6g}, above max_step_kl {max_step_kl:.6g}: no bound")
    return steps
