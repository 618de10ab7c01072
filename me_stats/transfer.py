"""Do fitted weights pay on text that they have not seen: across documents (`cross_validate`) and across domains.

Losses are nats a token. Two choices of λ are compared on the same tokens, document by document: what one document adds
to the difference is one draw, because tokens of one document go together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from me_stats.corpus_store import CorpusScores
from me_stats.likelihood import Floats, MixtureLikelihood, newton
from me_stats.weights import WeightFit, checked_weights, fit_weights


@dataclass(frozen=True)
class Comparison:
    """Loss of an alternative less that of the fitted weights, nats a token: positive where fitting pays."""

    alternative: str
    nll: float
    difference: float
    interval: tuple[float, float]
    n_documents: int


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Weights fitted on all folds but one, and their loss on that one.

    Attributes
    ----------
    weights
        (F, K) λ̂ of each fold.
    fold_nll
        (F,) held-out loss of each fold; ``nll`` over all tokens.
    comparisons
        Equal weights and each single component against the fitted ones.
    fold
        (D,) the fold in which each document was held out.
    """

    weights: Floats
    fold_nll: Floats
    nll: float
    bits_per_byte: float | None
    comparisons: tuple[Comparison, ...]
    fold: np.ndarray
    confidence: float


@dataclass(frozen=True, eq=False)
class DomainFits:
    """Weights of each domain, and what they cost elsewhere.

    Attributes
    ----------
    fits, pooled
        λ̂ of each domain, and of all text together; standard errors by document where there are enough documents.
    domains
        Names, the order of the arrays below.
    nll
        (M, M) loss on domain j (column) at the λ̂ of domain i (row). The diagonal is in-sample: it is too low by about
        (K - 1) / 2n.
    excess, intervals
        (M, M) and (M, M, 2): that less the loss of domain j's own λ̂, paired by document; never below 0 but by rounding.
    """

    fits: Mapping[str, WeightFit]
    pooled: WeightFit
    domains: tuple[str, ...]
    nll: Floats
    excess: Floats
    intervals: Floats
    confidence: float


def document_nll(scores: CorpusScores, weights: np.ndarray) -> Floats:
    """(D,) loss ``-Σ_t log Σ_i λ_i P_i(x_t)`` of each document, in nats; inf where a token is impossible.

    >>> import numpy as np
    >>> logs, ones = np.log([[0.5, 0.25], [0.25, 0.5]]), np.ones(2, dtype=int)
    >>> toy = CorpusScores(logs, ones, ones, ones, np.zeros((2, 0)), ("a", "b"), {})
    >>> np.exp(-document_nll(toy, [1.0, 0.0]))
    array([0.5 , 0.25])
    """
    weights = checked_weights(weights, scores.n_components)
    out, start = np.zeros(scores.n_documents), 0
    used = weights > 0
    log_weights = np.log(weights[used])
    for chunk in scores.chunks():
        losses = -np.logaddexp.reduce(chunk[:, used] + log_weights, axis=1)
        document = scores.document[start : start + len(chunk)]
        first = int(document[0])
        sums = np.bincount(document - first, weights=losses)
        out[first : first + len(sums)] += sums
        start += len(chunk)
    return out


def cross_validate(scores: CorpusScores, *, folds: int = 5, seed: int = 0, confidence: float = 0.95) -> CrossValidation:
    """Held-out loss of fitted weights against equal weights and each component alone; whole documents are held out.

    Intervals are Student's over documents: ``Σ_d (D_d - m n_d)²`` with D_d the summed difference and n_d the tokens of
    document d. Raises ValueError unless each fold gets a document with a scored token and others remain.
    """
    usable = np.flatnonzero(scores.lengths > 0)
    if not 2 <= folds <= len(usable):
        raise ValueError(
            f"folds must lie between 2 and the number of documents with scored tokens ({len(usable)}), got {folds}; "
            "split the text into more documents"
        )
    fold = np.full(scores.n_documents, -1)
    fold[np.random.default_rng(seed).permutation(usable)] = np.arange(len(usable)) % folds
    k = scores.n_components
    weights, losses, fold_nll = np.empty((folds, k)), np.zeros(scores.n_documents), np.empty(folds)
    for f in range(folds):
        held = np.flatnonzero(fold == f)
        rest = scores.subset(np.flatnonzero((fold != f) & (fold >= 0)))
        weights[f] = newton(MixtureLikelihood(rest.log_probs)).weights
        losses[held] = document_nll(scores.subset(held), weights[f])
        fold_nll[f] = losses[held].sum() / scores.lengths[held].sum()
    rivals = {"equal weights": np.full(k, 1 / k), **{f"component {i} alone": np.eye(k)[i] for i in range(k)}}
    comparisons = []
    for name, rival in rivals.items():
        own = document_nll(scores, rival)
        difference, low, high = paired_difference(own[usable], losses[usable], scores.lengths[usable], confidence)
        comparisons.append(Comparison(name, float(own.sum()) / scores.n, difference, (low, high), len(usable)))
    total, n_bytes = float(losses.sum()), int(scores.bytes.sum(dtype=np.int64))
    return CrossValidation(
        weights=weights,
        fold_nll=fold_nll,
        nll=total / scores.n,
        bits_per_byte=total / n_bytes / math.log(2) if n_bytes else None,
        comparisons=tuple(comparisons),
        fold=fold,
        confidence=confidence,
    )


def fit_by_domain(scores: CorpusScores, *, confidence: float = 0.95) -> DomainFits:
    """λ̂ of each domain with intervals, and the loss on every domain at the weights of every other."""
    names = tuple(dict.fromkeys(name for name, n in zip(scores.domains, scores.lengths, strict=True) if n > 0))
    parts = [scores.subset(np.array([d for d, name in enumerate(scores.domains) if name == j])) for j in names]
    fits = {name: fit_documents(part, confidence=confidence) for name, part in zip(names, parts, strict=True)}
    m = len(names)
    nll, excess, intervals = np.empty((m, m)), np.zeros((m, m)), np.zeros((m, m, 2))
    for j, part in enumerate(parts):
        own = document_nll(part, fits[names[j]].weights)
        for i, name in enumerate(names):
            losses = own if i == j else document_nll(part, fits[name].weights)
            nll[i, j] = losses.sum() / part.n
            excess[i, j], *intervals[i, j] = paired_difference(losses, own, part.lengths, confidence)
    return DomainFits(fits, fit_documents(scores, confidence=confidence), names, nll, excess, intervals, confidence)


def fit_documents(scores: CorpusScores, *, confidence: float = 0.95) -> WeightFit:
    """`fit_weights` with documents as groups, or without groups where there are too few documents for that."""
    groups = scores.document if (scores.lengths > 0).sum() > max(scores.n_components, 9) else None
    n_bytes = int(scores.bytes.sum(dtype=np.int64))
    return fit_weights(scores.log_probs, groups=groups, confidence=confidence, n_bytes=n_bytes or None)


def paired_difference(
    losses: Floats, own: Floats, lengths: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """Mean difference a token and its interval; infinite losses give an infinite difference, equal ones none."""
    with np.errstate(invalid="ignore"):
        differences = losses - own
    if not np.isfinite(differences).all():
        both = np.isinf(losses).any() and np.isinf(own).any()
        value = 0.0 if both else math.inf if np.isinf(losses).any() else -math.inf
        return (value, -math.inf, math.inf) if both else (value, value, value)
    n, d = int(lengths.sum()), len(lengths)
    mean = float(differences.sum()) / n
    if d < 2:
        return mean, -math.inf, math.inf
    stderr = math.sqrt(d / (d - 1) * float(((differences - mean * lengths) ** 2).sum())) / n
    half = float(stats.t.ppf((1 + confidence) / 2, d - 1)) * stderr
    return mean, mean - half, mean + half
