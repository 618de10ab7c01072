"""TV between laws over whole sequences, from samples of one of them and both log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


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


def sequence_tv(log_ratio: ArrayLike, *, confidence: float = 0.95) -> TVEstimate:
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

    Raises
    ------
    ValueError
        Empty, NaN, or +inf (a sample of p that p excludes).

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
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")
    losses = -np.expm1(np.minimum(ratios, 0.0))
    n, value, log_bound = losses.size, float(losses.mean()), math.log(2.0 / (1.0 - confidence))
    radius = math.sqrt(log_bound / (2.0 * n))
    # Regularised by half an observation of mean ½ and variance ¼; the bet at t uses what came before t.
    steps = np.arange(2, n + 2)
    means = (0.5 + np.cumsum(losses)) / steps
    variances = np.concatenate([[0.25], ((0.25 + np.cumsum((losses - means) ** 2)) / steps)[:-1]])
    bets = np.sqrt(2.0 * log_bound / (n * variances))
    return TVEstimate(
        value=value,
        stderr=float(losses.std(ddof=1)) / math.sqrt(n),
        interval=(_betting_lower(losses, bets, log_bound), 1.0 - _betting_lower(1.0 - losses, bets, log_bound)),
        hoeffding=(max(0.0, value - radius), min(1.0, value + radius)),
        confidence=confidence,
        n=n,
        method="mean of (1 − q/p)_+, hedged capital betting interval",
    )


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
