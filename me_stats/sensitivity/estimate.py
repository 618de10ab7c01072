"""A number from samples, with what is needed to doubt it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm


@dataclass(frozen=True)
class Estimate:
    """`value` with its standard error and confidence interval, from `n` rows by `method`."""

    value: float
    stderr: float
    interval: tuple[float, float]
    n: int
    method: str


def normal_estimate(value: float, stderr: float, n: int, *, confidence: float, method: str) -> Estimate:
    """Normal interval value ± z · stderr at the given confidence."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")
    radius = float(norm.ppf(0.5 + confidence / 2)) * stderr
    return Estimate(float(value), float(stderr), (float(value - radius), float(value + radius)), n, method)


def mean_estimate(values: ArrayLike, *, confidence: float = 0.95, method: str = "drawn") -> Estimate:
    """Mean of n independent values (n,), stderr = std/√n, normal interval.

    Raises ValueError for fewer than two values or one that is not finite.

    >>> estimate = mean_estimate([1.0, 2.0, 3.0, 2.0])
    >>> estimate.value, round(estimate.stderr, 3), [round(end, 2) for end in estimate.interval]
    (2.0, 0.408, [1.2, 2.8])
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values must be at least two finite numbers in one dimension, got shape {sample.shape}")
    stderr = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return normal_estimate(float(sample.mean()), stderr, sample.size, confidence=confidence, method=method)
