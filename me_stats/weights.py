"""Mixing weights λ from a scored text: the maximum of a concave likelihood, with an interval that can be trusted.

``L(λ) = Σ_t log Σ_i λ_i P_i(x_t)``, where P_i(x_t) is the probability of the realised token under component i given its
true prefix (`me_stats.corpus.score_corpus`). If the text was written by the ensemble, tokens are dependent but their
scores are martingale differences, so the observed information is right. On other text give ``groups`` (documents), and
standard errors allow for tokens of one document that go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from me_stats.likelihood import (
    BLOCK,
    Floats,
    Maximum,
    MixtureLikelihood,
    em,
    flat_weights,
    inverse_on_simplex,
    least_information,
    newton,
    simplex_basis,
)

MIN_INFORMATION = 1e-9
"""Smallest information a token and direction that counts: components whose probabilities of the same tokens differ by
3e-5 of themselves, which is near what the rounding of float32 laws can make of equal ones."""

MAX_WIDTH = 0.9
"""A profile interval wider than this says that the text does not tell which weights wrote it."""

_MAX_GAP = 1e-7  # nats a token that a solver may leave

_SOLVERS: dict[str, Callable[[MixtureLikelihood], Maximum]] = {"newton": newton, "em": em}


@dataclass(frozen=True, eq=False)
class WeightFit:
    """Estimated weights with what is needed to doubt them.

    Attributes
    ----------
    weights
        (K,) λ̂ on the simplex.
    intervals
        (K, 2), each at the `confidence` level on its own.
    stderr
        (K,) from the curvature, robust to `groups` where given; of a weight at 0 or 1 it is that of the likelihood
        continued past the boundary, and inf in a direction without information.
    interval_method
        ``"information"``, ``"profile"`` or, for logged components, ``"exact"``.
    log_likelihood, nll, bits_per_byte
        L(λ̂) in nats, -L/n in nats a token, and in bits a byte where the bytes are known.
    identified, reason
        False if the text cannot tell the weights apart, and why.
    min_information
        Smallest eigenvalue a token of the information along the simplex.
    kkt_gap
        L(λ̂)/n is within this many nats of the maximum, whatever the solver did.
    score_norm
        Largest ``|u_i - 1|`` of the components with positive weight: 0 at a maximum.
    n, n_groups, iterations, method, confidence
        Tokens, groups (None without), and how it was computed.
    """

    weights: Floats
    intervals: Floats
    stderr: Floats
    interval_method: str
    log_likelihood: float
    nll: float
    bits_per_byte: float | None
    identified: bool
    reason: str
    min_information: float
    kkt_gap: float
    score_norm: float
    n: int
    n_groups: int | None
    iterations: int
    method: str
    confidence: float


def fit_weights(
    log_probs: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    method: Literal["newton", "em"] = "newton",
    confidence: float = 0.95,
    n_bytes: int | None = None,
) -> WeightFit:
    """Maximum-likelihood weights ``argmax_λ Σ_t log Σ_i λ_i P_i(x_t)`` with intervals.

    Intervals come from the observed information where all weights are further from 0 and 1 than two half-widths, and
    K > 2; else from the profile likelihood, whose χ²₁ limit is conservative for a true λ_i of 0 or 1. With `groups`
    both use the sandwich variance ``H⁻¹ (Σ_g S_g S_g^T) H⁻¹``: the profile's statistic is scaled by the ratio of the
    two variances.

    Parameters
    ----------
    log_probs
        (n, K) natural log P_i(x_t); -inf where component i cannot write the token. May be a memory map: it is read in
        blocks.
    groups
        (n,) the group, such as the document, of each token. At least K + 1 groups.
    method
        ``"newton"``, or ``"em"`` as a check on it.
    confidence
        Level of each interval.
    n_bytes
        Bytes that the tokens stand for, for ``bits_per_byte``.

    Raises
    ------
    ValueError
        NaN, a positive log-probability, a token that no component can write (the message has its index), groups that
        do not match; EM that has not converged.

    Examples
    --------
    >>> fit = fit_weights(np.log([[0.9, 0.1]] * 30 + [[0.1, 0.9]] * 10))
    >>> fit.weights.round(6), fit.intervals[0].round(3)
    (array([0.8125, 0.1875]), array([0.629, 0.957]))
    >>> fit_weights(np.log([[0.5, 0.5]] * 40)).reason
    'the components give the same probabilities to this text ...'
    """
    if method not in _SOLVERS:
        raise ValueError(f"method must be 'newton' or 'em', got {method!r}")
    _check_confidence(confidence)
    likelihood = MixtureLikelihood(log_probs)
    labels = None if groups is None else _labels(groups, likelihood)
    found = _SOLVERS[method](likelihood)
    if found.kkt_gap > _MAX_GAP:
        raise ValueError(
            f"{method} stopped up to {found.kkt_gap:.1e} nats a token below the maximum; use method='newton'"
        )
    _, u, h = likelihood.derivatives(found.weights)
    least = least_information(h)
    covariance = inverse_on_simplex(h) / likelihood.n
    inflation = np.ones(likelihood.n_components)
    if labels is not None:
        naive = np.diag(covariance).copy()
        covariance = covariance @ _clustered(likelihood, found.weights, labels) @ covariance
        inflation = np.divide(np.diag(covariance), naive, out=inflation, where=naive > 0)
    stderr = np.sqrt(np.maximum(np.diag(covariance), 0))
    identified, reason = True, ""
    if least < MIN_INFORMATION:
        identified, reason = False, _same_laws(least)
        stderr = np.where(flat_weights(h, MIN_INFORMATION), math.inf, stderr)
    # Few groups know their own variance badly: Student's limit instead of the normal one.
    freedom = math.inf if labels is None else int(labels.max())
    limit = float(stats.t.ppf((1 + confidence) / 2, freedom))
    half = limit * stderr
    inside = np.minimum(found.weights, 1 - found.weights) > 2 * half
    if likelihood.n_components == 1:
        kind, intervals = "information", np.ones((1, 2))
    elif likelihood.n_components > 2 and identified and inside.all():
        kind, intervals = "information", np.stack([found.weights - half, found.weights + half], axis=1)
    else:
        kind, cut = "profile", limit**2 * inflation
        rows = [_profile(likelihood, found, i, cut[i], stderr[i]) for i in range(likelihood.n_components)]
        intervals = np.array(rows)
        widths = intervals[:, 1] - intervals[:, 0]
        if identified and (widths > MAX_WIDTH).any():
            i = int(widths.argmax())
            identified = False
            reason = f"{likelihood.n} tokens allow weights of component {i} from {rows[i][0]:.2g} to {rows[i][1]:.2g}"
    return WeightFit(
        weights=found.weights,
        intervals=intervals,
        stderr=stderr,
        interval_method=kind,
        log_likelihood=found.value * likelihood.n,
        nll=-found.value,
        bits_per_byte=_bits(found.value * likelihood.n, n_bytes),
        identified=identified,
        reason=reason,
        min_information=least,
        kkt_gap=found.kkt_gap,
        score_norm=float(np.abs(u - 1)[found.weights > 0].max()),
        n=likelihood.n,
        n_groups=None if labels is None else int(labels.max()) + 1,
        iterations=found.iterations,
        method=method,
        confidence=confidence,
    )


def profile_interval(log_probs: ArrayLike, component: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Weights c of a component with ``2 (max L - max_{λ_i = c} L) ≤ χ²₁``: it stays inside [0, 1], also near its ends.

    >>> low, high = profile_interval(np.log([[0.9, 0.1]] * 40), 0)
    >>> round(low, 3), high
    (0.947, 1.0)
    """
    _check_confidence(confidence)
    likelihood = MixtureLikelihood(log_probs)
    if not 0 <= component < likelihood.n_components:
        raise ValueError(f"component must lie in 0..{likelihood.n_components - 1}, got {component}")
    if likelihood.n_components == 1:
        return 1.0, 1.0
    found = newton(likelihood)
    covariance = inverse_on_simplex(likelihood.derivatives(found.weights)[2]) / likelihood.n
    stderr = math.sqrt(max(covariance[component, component], 0))
    return _profile(likelihood, found, component, float(stats.chi2.ppf(confidence, 1)), stderr)


def fit_from_components(components: ArrayLike, n_components: int, *, confidence: float = 0.95) -> WeightFit:
    """Weights from logged component draws m_t: ``λ̂_i = #{t: m_t = i} / n``, with exact (Clopper-Pearson) intervals.

    -1, which pads a trace after a row's end, is left out. ``log_likelihood`` is that of the draws, not of tokens.

    >>> fit = fit_from_components([0, 0, 1, 0, -1], 2)
    >>> fit.weights, fit.intervals[1].round(3)
    (array([0.75, 0.25]), array([0.006, 0.806]))
    """
    _check_confidence(confidence)
    drawn = np.asarray(components).ravel()
    drawn = drawn[drawn != -1]
    if not len(drawn) or not np.issubdtype(drawn.dtype, np.integer):
        raise ValueError("components must hold at least one integer draw; a sampler of the mixture itself logs none")
    if drawn.min() < 0 or drawn.max() >= n_components:
        raise ValueError(f"components must lie in 0..{n_components - 1}, or be -1 after a row's end")
    counts, n = np.bincount(drawn, minlength=n_components), len(drawn)
    tail = (1 - confidence) / 2
    low = np.where(counts > 0, stats.beta.ppf(tail, np.maximum(counts, 1), n - counts + 1), 0.0)
    high = np.where(counts < n, stats.beta.isf(tail, counts + 1, np.maximum(n - counts, 1)), 1.0)
    weights = counts / n
    used = weights[weights > 0]
    return WeightFit(
        weights=weights,
        intervals=np.stack([low, high], axis=1),
        stderr=np.sqrt(weights * (1 - weights) / n),
        interval_method="exact",
        log_likelihood=float(n * (used * np.log(used)).sum()),
        nll=-float((used * np.log(used)).sum()),
        bits_per_byte=None,
        identified=True,
        reason="",
        min_information=1.0,
        kkt_gap=0.0,
        score_norm=0.0,
        n=n,
        n_groups=None,
        iterations=0,
        method="components",
        confidence=confidence,
    )


@dataclass(frozen=True, eq=False)
class Agreement:
    """Whether the weights seen in the tokens are those that the sampler says it drew from.

    `difference` (K,) is λ̂ from tokens less λ̂ from components (one Newton step), `z` (K,) that in standard errors (0 for
    a weight without information), and ``statistic ~ χ²(df)`` if the logged components wrote the tokens.
    """

    difference: Floats
    z: Floats
    statistic: float
    df: int
    pvalue: float
    n: int


def weights_agree(log_probs: ArrayLike, components: ArrayLike) -> Agreement:
    """Test that the logged components wrote the tokens: λ̂ of m_t against λ̂ of x_t, on the same draws.

    At λ̂ from the components, the score of the tokens is a sum of ``A_t - 1 - H (e_{m_t} - λ̂)``, martingale differences
    under an ancestral sampler with constant weights, whatever λ. A small p-value is a bug: components logged in another
    order, or tokens drawn with other weights than logged. Mistakes that leave λ as it is do not show. Needs no interior
    λ.

    Parameters
    ----------
    log_probs, components
        (n, K) component log-probabilities of the tokens, and (n,) the component that wrote each, without padding.

    >>> rng = np.random.default_rng(0)
    >>> drawn = rng.choice(2, 5000, p=[0.3, 0.7])
    >>> token = (rng.random(5000) < np.where(drawn == 0, 0.9, 0.2)).astype(int)
    >>> log_probs = np.log(np.where(token[:, None] == 1, [0.9, 0.2], [0.1, 0.8]))
    >>> weights_agree(log_probs, drawn).pvalue > 0.01, weights_agree(log_probs, 1 - drawn).pvalue < 1e-9
    (True, True)
    """
    likelihood = MixtureLikelihood(log_probs)
    drawn = np.asarray(components)
    k, n = likelihood.n_components, likelihood.n
    if drawn.shape != (n,):
        raise ValueError(f"components must have one entry for each of {n} tokens, got shape {drawn.shape}")
    weights = fit_from_components(drawn, k).weights
    if (drawn < 0).any():
        raise ValueError("components has -1 (padding); leave out what follows a row's end, in both arguments")
    places = [drawn[start : start + BLOCK] for start in range(0, n, BLOCK)]
    if any(
        (block[own, np.arange(len(own))] == 0).any() for own, block in zip(places, likelihood.blocks(), strict=True)
    ):
        # Some token is impossible under the component that is said to have written it.
        return Agreement(np.zeros(k), np.zeros(k), math.inf, max(k - 1, 1), 0.0, n)
    _, u, h = likelihood.derivatives(weights)
    spread = np.zeros((k, k))
    for own, block in zip(places, likelihood.blocks(), strict=True):
        draws = np.eye(k)[own] - weights
        terms = block / (weights @ block) - u[:, None] - h @ draws.T
        spread += terms @ terms.T
    z = simplex_basis(k)
    moment, variance = n * (u @ z), z.T @ spread @ z
    values, vectors = np.linalg.eigh(variance)
    kept = values > MIN_INFORMATION * n
    statistic = float((((moment @ vectors)[kept]) ** 2 / values[kept]).sum())
    inverse = inverse_on_simplex(h)
    difference = inverse @ (u - 1)
    stderr = np.sqrt(np.maximum(np.diag(inverse @ spread @ inverse), 0)) / n
    informed = kept.any() & ~flat_weights(h, MIN_INFORMATION)
    scores = np.divide(difference, stderr, out=np.zeros(k), where=(stderr > 0) & informed)
    df = int(kept.sum())
    return Agreement(difference, scores, statistic, df, float(stats.chi2.sf(statistic, df)) if df else 1.0, n)


def held_out_nll(log_probs: ArrayLike, weights: ArrayLike) -> float:
    """``-mean_t log Σ_i λ_i P_i(x_t)`` in nats a token; inf if a token is impossible under `weights`.

    >>> round(held_out_nll(np.log([[0.5, 0.25], [0.25, 0.5]]), [0.5, 0.5]), 6)
    0.980829
    """
    likelihood = MixtureLikelihood(log_probs)
    return -likelihood.value(checked_weights(weights, likelihood.n_components))


def checked_weights(weights: ArrayLike, n_components: int) -> Floats:
    """`weights` as a point (K,) of the simplex, or a ValueError."""
    values = np.asarray(weights, dtype=float)
    if values.shape != (n_components,):
        raise ValueError(f"weights must have one entry for each of {n_components} components, got {values.shape}")
    if not (values >= 0).all() or abs(values.sum() - 1) > 1e-9:
        raise ValueError(f"weights must be non-negative and sum to 1, got {values.tolist()}")
    return values


def _profile(
    likelihood: MixtureLikelihood, found: Maximum, component: int, cut: float, stderr: float
) -> tuple[float, float]:
    """Where twice the fall of the profile reaches `cut` on either side of λ̂; 0 or 1 where it never does."""
    centre = float(found.weights[component])
    others = np.delete(found.weights, component)
    shares = others / others.sum() if others.sum() > 0 else np.full(len(others), 1 / len(others))

    def excess(weight: float) -> float:
        rest = likelihood.pinned(component, weight)
        value = rest.value(np.full(rest.n_components, 1 / rest.n_components))
        if rest.n_components > 1 and weight < 1 and value > -math.inf:
            value = newton(rest, start=shares, tol=1e-12 / likelihood.n**0.5).value
        fall = 2 * likelihood.n * max(found.value - value, 0.0)
        return min(math.sqrt(fall), 1e6) - math.sqrt(cut)  # the root is nearly linear in the weight

    def end(limit: float) -> float:
        if centre == limit or excess(limit) <= 0:
            return limit
        step = 1.5 * math.sqrt(cut) * stderr
        near = centre + math.copysign(step, limit - centre) if math.isfinite(step) else limit
        if not min(centre, limit) < near < max(centre, limit) or excess(near) <= 0:
            near = limit
        return float(brentq(excess, centre, near, xtol=1e-10, rtol=1e-10))

    return end(0.0), end(1.0)


def _same_laws(least: float) -> str:
    return (
        "the components give the same probabilities to this text in some direction: information a token "
        f"{least:.1e}, below {MIN_INFORMATION:.0e}"
    )


def _labels(groups: ArrayLike, likelihood: MixtureLikelihood) -> np.ndarray:
    labels = np.asarray(groups)
    if labels.shape != (likelihood.n,):
        raise ValueError(f"groups must have one entry for each of {likelihood.n} tokens, got shape {labels.shape}")
    distinct, index = np.unique(labels, return_inverse=True)
    if len(distinct) <= likelihood.n_components:
        raise ValueError(
            f"groups has {len(distinct)} groups for {likelihood.n_components} components; give more than that many, "
            "or leave groups out where the ensemble itself wrote the text"
        )
    return index


def _clustered(likelihood: MixtureLikelihood, weights: Floats, labels: np.ndarray) -> Floats:
    """``G/(G-1) Σ_g S_g S_g^T`` (K, K) of the scores summed within each group."""
    count = int(labels.max()) + 1
    sums = np.zeros((likelihood.n_components, count))
    for start, block in zip(range(0, likelihood.n, BLOCK), likelihood.blocks(), strict=True):
        scores = block / (weights @ block) - 1
        for i, row in enumerate(scores):
            sums[i] += np.bincount(labels[start : start + len(row)], weights=row, minlength=count)
    out: Floats = sums @ sums.T * (count / (count - 1))
    return out


def _bits(log_likelihood: float, n_bytes: int | None) -> float | None:
    if not n_bytes:
        return None
    return -log_likelihood / (n_bytes * math.log(2))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
