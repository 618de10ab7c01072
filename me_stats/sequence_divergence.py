"""TV between laws over whole sequences, from samples of one of them: estimates and lower bounds.

Throughout, p is the law that the N sequences were drawn from and q the other one. All intervals hold at finite N and
any length, and need independent rows. `sequence_kl` bounds the same TV from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from me_stats.equivalence import binomial_interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ROUNDING = 1e-6  # how far above 1 a probability that was summed in float32 may come out


@dataclass(frozen=True)
class TVEstimate:
    """Estimate of a sequence TV. `interval` is the betting interval, `hoeffding` the wider closed form."""

    value: float
    stderr: float
    interval: tuple[float, float]
    hoeffding: tuple[float, float]
    confidence: float
    n: int
    method: str


@dataclass(frozen=True)
class ViolationBound:
    """`lower`, a one-sided confidence bound on P_p(some token outside the support of q), and so on the sequence TV.

    `value` is the mean that the bound is for, `n` the number of sequences.
    """

    value: float
    lower: float
    confidence: float
    n: int
    method: str


def sequence_tv(log_ratio: ArrayLike, *, confidence: float = 0.95, floor: float = 0.0) -> TVEstimate:
    """TV between two laws on whole sequences, TV = E_p[(1 − q/p)_+], from independent samples of p.

    Each term lies in [0, 1], so the intervals hold at any length; ½ E|1 − q/p| has the same mean but unbounded
    variance. `hoeffding` is value ± √(log(2/α)/2n). `interval` is the hedged capital interval: the means m at
    which no capital ½ Π(1 + λ⁺(m)(x − m)) or ½ Π(1 − λ⁻(m)(x − m)) ever reaches 1/α, with predictable bets
    λ_t = √(2 log(2/α)/(n σ̂²_{t−1})), truncated at 1/2m and 1/2(1 − m). It adapts to the variance: for a
    correct sampler its width falls as 1/n. Both hold for finite n; the second depends on the order.

    Parameters
    ----------
    log_ratio
        (N,) log q(x) − log p(x), in nats, of sequences x drawn from p; -inf where q excludes x.
    floor
        Numerical floor of a *sequence*, in [0, 1], by which both intervals are widened at both ends: the TV between p
        as drawn and as scored, plus that between the true and the scored q. A floor of δ a step makes it at most T δ
        over T steps; past 1/δ tokens nothing is left to say.

    Raises
    ------
    ValueError
        Empty, NaN, or +inf (a sample of p that p excludes); a floor outside [0, 1].

    References
    ----------
    Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables by betting, JRSS B 86(1),
    the hedged capital process.

    Examples
    --------
    >>> estimate = sequence_tv(np.zeros(1000))
    >>> estimate.value, round(estimate.interval[1], 3), round(estimate.hoeffding[1], 3)
    (0.0, 0.007, 0.043)
    """
    ratios = np.asarray(log_ratio, dtype=np.float64)
    if ratios.ndim != 1 or ratios.size < 2:
        raise ValueError(f"log_ratio has shape {ratios.shape}: give one value a sequence, at least two")
    if np.isnan(ratios).any() or (ratios == math.inf).any():
        raise ValueError("log_ratio holds NaN or +inf: score the samples under the law they were drawn from")
    _check_confidence(confidence)
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}: a total variation lies in [0, 1]")
    losses = -np.expm1(np.minimum(ratios, 0.0))
    n, value = losses.size, float(losses.mean())
    radius = math.sqrt(math.log(2.0 / (1.0 - confidence)) / (2.0 * n))
    low, high = betting_interval(losses, confidence=confidence)
    return TVEstimate(
        value=value,
        stderr=float(losses.std(ddof=1)) / math.sqrt(n),
        interval=(max(0.0, low - floor), min(1.0, high + floor)),
        hoeffding=(max(0.0, value - radius - floor), min(1.0, value + radius + floor)),
        confidence=confidence,
        n=n,
        method="mean of (1 − q/p)_+, hedged capital betting interval",
    )


def support_violation_bound(outside: ArrayLike, *, confidence: float = 0.95) -> ViolationBound:
    """Lower bound on the sequence TV that needs no q(x): TV ≥ P_p(some token outside the support of q).

    The event has probability 0 under q. Clopper–Pearson, exact at any N. It is what to quote where KL(p‖q) is
    infinite, as for truncation before mixing (p) against after (q).

    Parameters
    ----------
    outside
        (N,) bool, one a sequence drawn from p: whether q excludes one of its tokens after the tokens before it.

    Raises
    ------
    ValueError
        Not one dimension of at least one bool, or a bad confidence.

    Examples
    --------
    >>> bound = support_violation_bound([True] * 30 + [False] * 70)
    >>> bound.value, round(bound.lower, 3)
    (0.3, 0.225)
    """
    flags = _flags(outside)
    if flags.ndim != 1 or not flags.size:
        raise ValueError(f"outside has shape {flags.shape}: give one bool a sequence, (N,); use any(1) on (N, T)")
    _check_confidence(confidence, one_sided=True)
    n, hits = flags.size, int(flags.sum())
    lower = binomial_interval(hits, n, confidence=2.0 * confidence - 1.0)[0]
    return ViolationBound(hits / n, lower, confidence, n, "violations counted, Clopper–Pearson")


def escaped_mass_bound(step_mass: ArrayLike, *, outside: ArrayLike | None, confidence: float = 0.95) -> ViolationBound:
    """`support_violation_bound` from the mass that escapes at each step, m_t = P_p(x_t excluded by q | x_<t).

    Which formula is right depends on where the rows come from, so `outside` has to be given:

    * `None`: rows drawn from p *restricted* at every step to the support of q (redraw a token until q allows it).
      Since p(x_t) 1(allowed) = (1 − m_t) p̃(x_t), P(violation) = 1 − E_p̃ Π(1 − m_t) exactly, without any violation
      having to occur: rare ones are found far sooner than by counting.
    * (N, T) flags: rows drawn from p itself. The first violation, at τ, has P(violation) = E_p Σ_{t ≤ τ} m_t. The sum
      can pass 1, and is cut there, which only lowers it: the bound stays valid, and `value` may be too small.
      1 − Π(1 − m_t) over a whole row of p would be wrong, since steps after a violation count too.

    Both are means of values in [0, 1], bounded by the one-sided betting bound of `betting_interval`.

    Parameters
    ----------
    step_mass
        (N, T) escaped mass, as from `divergence.escaped_mass(log_p, log_q)`; 0 after a row's end. A mass of 1 leaves
        the restricted law nothing to draw: end the row there.
    outside
        (N, T) bool, whether q excludes the token at this step, or None.

    Raises
    ------
    ValueError
        Masses outside [0, 1], shapes that differ, or a violation where no mass escapes.

    Examples
    --------
    >>> masses = np.full((200, 50), 0.001)  # counting would expect 10 violations
    >>> bound = escaped_mass_bound(masses, outside=None)
    >>> round(bound.value, 4), round(bound.lower, 2)
    (0.0488, 0.04)
    """
    masses = np.asarray(step_mass, dtype=np.float64)
    if masses.ndim != 2 or masses.shape[0] < 2 or masses.shape[1] < 1:
        raise ValueError(f"step_mass has shape {masses.shape}: give (N, T), at least two sequences of one step")
    if not ((masses >= 0) & (masses <= 1 + _ROUNDING)).all():
        raise ValueError("step_mass must hold probabilities in [0, 1]; use divergence.escaped_mass")
    _check_confidence(confidence, one_sided=True)
    masses = np.minimum(masses, 1.0)
    if outside is None:
        values = 1.0 - np.prod(1.0 - masses, axis=1)
        method = "1 − Π(1 − m) along the restricted law, betting bound"
    else:
        flags = _flags(outside)
        if flags.shape != masses.shape:
            raise ValueError(f"outside has shape {flags.shape} and step_mass {masses.shape}: give one of each a step")
        if (flags & (masses == 0)).any():
            raise ValueError("outside marks a token where step_mass is 0: both must be of the same p, q and rows")
        reached: Bools = np.cumsum(flags, axis=1) - flags == 0
        values = np.minimum((masses * reached).sum(1), 1.0)
        method = "Σ m up to the first violation, betting bound"
    log_bound = -math.log1p(-confidence)
    value, lower = float(values.mean()), _betting_lower(values, _bets(values, log_bound), log_bound)
    return ViolationBound(value, min(lower, value), confidence, values.size, method)


def betting_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval for the mean of independent values in [0, 1]; see `sequence_tv` for formula and source.

    Sorted values can contradict every mean; the interval then shrinks to the sample mean.

    Examples
    --------
    >>> low, high = betting_interval(np.random.default_rng(0).beta(2, 6, size=500))
    >>> round(low, 2), round(high, 2)
    (0.23, 0.26)
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size or not ((sample >= 0) & (sample <= 1)).all():
        raise ValueError("values must be one dimension of numbers in [0, 1]; divide by their upper bound")
    _check_confidence(confidence)
    log_bound = math.log(2.0 / (1.0 - confidence))
    bets, mean = _bets(sample, log_bound), float(sample.mean())
    low, high = _betting_lower(sample, bets, log_bound), 1.0 - _betting_lower(1.0 - sample, bets, log_bound)
    return min(low, mean), max(high, mean)


def _bets(values: Floats, log_bound: float) -> Floats:
    # Regularised by half an observation of mean ½ and variance ¼; the bet at t uses what came before t.
    n, steps = values.size, np.arange(2, values.size + 2)
    means = (0.5 + np.cumsum(values)) / steps
    variances = np.concatenate([[0.25], ((0.25 + np.cumsum((values - means) ** 2)) / steps)[:-1]])
    return np.asarray(np.sqrt(2.0 * log_bound / (n * variances)))


def _betting_lower(values: Floats, bets: Floats, log_threshold: float) -> float:
    """Largest mean that the bet "the true mean is higher" rejects, to 2⁻⁴⁰; that capital falls as m grows."""
    rejected, kept = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (rejected + kept)
        capital = np.cumsum(np.log1p(np.minimum(bets, 0.5 / middle) * (values - middle)))
        if capital.max() >= log_threshold:
            rejected = middle
        else:
            kept = middle
    return rejected


def _flags(outside: ArrayLike) -> Bools:
    flags = np.asarray(outside)
    if flags.dtype != np.bool_:
        raise ValueError(f"outside must hold bools, not {flags.dtype}: True where q excludes the token")
    return flags


def _check_confidence(value: float, *, one_sided: bool = False) -> None:
    low = 0.5 if one_sided else 0.0
    if not low < value < 1.0:
        raise ValueError(f"confidence is {value}: it must lie between {low:g} and 1")
