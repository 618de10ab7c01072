"""Do runs of one statistic look like one law? Rank-normalised R-hat and effective draws over seeds, by arviz-stats.

A description, not a test: R-hat has no level and no p-value, and nothing in this package decides by it. It cannot see
what all chains share (CE and ME of one wrong model agree), what the statistic leaves out, or dependence between rows;
and it is a blunt eye for differences: a shift of d standard deviations between two halves of the chains gives about
``1 + d^2/8``, so 1.01 is a shift of 0.28. `per_sequence` tests, `dependence` corrects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats
from numpy.typing import ArrayLike, NDArray

from me_stats.per_sequence import checked_sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ChainAgreement:
    """`rhat` = max(`location`, `spread`) of C `chains` of N `draws`, and effective draws of all chains together.

    `location` compares ranks, `spread` ranks of distances from the median; `ess_bulk` is of the ranks, `ess_tail` the
    smaller of the indicators of the 5% and 95% quantiles.
    """

    rhat: float
    location: float
    spread: float
    ess_bulk: float
    ess_tail: float
    chains: int
    draws: int


def rank_rhat(chains: ArrayLike) -> ChainAgreement:
    """Rank-normalised split R-hat and effective draws of one statistic over chains (C, N): seeds of CE and of ME, say.

    A chain holds one value per sequence, or per token of one long row. Each is split in halves, so a drift shows, too;
    values become normal scores of their ranks, so no moment need exist. Independent sequences give ``ess_bulk`` near
    C N. R-hat has no bound where halves are constant and differ. Raises ValueError for fewer than 2 chains or 4 draws,
    values that are not finite, or a constant chain, of which arviz says NaN or nothing.
    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Bayesian Analysis 16, by arviz-stats.

    >>> rng = np.random.default_rng(0)
    >>> seeds = rng.normal(size=(4, 1000))
    >>> round(rank_rhat(seeds).rhat, 2), round(rank_rhat(seeds + [[0], [0], [1], [1]]).rhat, 2)
    (1.0, 1.14)
    """
    v = _chains(chains, at_least=2)
    location = float(array_stats.rhat(v, method="z_scale"))
    # Values that all lie equally far from the median, as those of a fair coin, have no spread to compare.
    folds = np.ptp(np.abs(v - np.median(v))) > 0
    spread = float(array_stats.rhat(v, method="folded")) if folds else 1.0
    bulk, tail = (float(array_stats.ess(v, method=method, prob=prob)) for method, prob in _KINDS)
    return ChainAgreement(max(location, spread), location, spread, bulk, tail, *v.shape)


def effective_draws(chains: ArrayLike) -> float:
    """Effective draws for the mean over all chains (C, N), centred at their own means: arviz's ESS of the mean.

    The second opinion on ``C N/tau`` of `dependence.autocorrelation_time`; chains that disagree in their means lower
    it. Raises ValueError as `rank_rhat` does, but one chain will do.

    >>> round(effective_draws(np.random.default_rng(0).normal(size=(4, 1000))) / 4000, 1)
    1.0
    """
    return float(array_stats.ess(_chains(chains, at_least=1), method="mean"))


_KINDS = (("bulk", None), ("tail", (0.05, 0.95)))


def _chains(chains: ArrayLike, *, at_least: int) -> Floats:
    v = np.asarray(chains, dtype=np.float64)
    if v.ndim != 2 or len(v) < at_least or v.shape[1] < 4:
        raise ValueError(f"chains must be (C, N) with C at least {at_least} and N at least 4, got shape {v.shape}")
    v = checked_sample("chains", v, ndim=2, at_least=at_least)
    constant = np.flatnonzero(np.ptp(v, axis=1) == 0)
    if len(constant):
        raise ValueError(
            f"chain {constant[0]} is constant at {v[constant[0], 0]:g}: it has neither R-hat nor effective draws; take "
            "another statistic, or ask why this seed never moves"
        )
    return v
