r"""Tests of samplers that are in use elsewhere, written anew from what they do: to be measured, not to be used.

``experiments/power_one_step.py`` runs them beside the tests of this package on planted bugs. Two of them have no
false-alarm rate, one rejects far more right samplers than it states where most cells expect less than one draw, and one
does not look at what is never drawn. To test a sampler, use `check_sampler`.

Each function follows the published test in its default settings and says where that stands. Counts are those of
independent draws from one law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from me_stats.chi_square import validated_counts
from me_stats.twosample import permutation_test

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """What a test in use says.

    Attributes
    ----------
    name
        Of the test.
    accepts
        Whether the test passes.
    statistic, threshold
        It passes where the statistic is above the threshold.
    usable
        False where the test itself calls the sample too small; it fails then, whatever was drawn.
    source
        Where the test stands.
    """

    name: str
    accepts: bool
    statistic: float
    threshold: float
    usable: bool
    source: str


def all_cell_chi_square(counts: ArrayLike, probs: ArrayLike, *, alpha: float = 0.01) -> Verdict:
    """Pearson's chi-square over every cell of positive probability, however few draws it expects.

    Passes where p > alpha by the chi-square law on (cells - 1) degrees of freedom, which holds for large expected
    counts only. A draw of probability zero makes observed and expected sums differ, which fails.

    Source: JAX, ``LaxRandomTest._CheckChiSquared`` in tests/random_lax_test.py.

    >>> all_cell_chi_square([30, 20, 50], [0.3, 0.2, 0.5]).accepts
    True
    """
    c, p = validated_counts(counts, probs, "probs")
    possible = p > 0
    pvalue = 0.0 if c[~possible].sum() else _chi_square_pvalue(c[possible], c.sum() * p[possible])
    source = "JAX, tests/random_lax_test.py, _CheckChiSquared"
    return Verdict("all cells", pvalue > alpha, pvalue, alpha, True, source)


def observed_count_chi_square(counts: ArrayLike, probs: ArrayLike, *, failure_rate: float = 1e-3) -> Verdict:
    """Pearson's chi-square of the tokens that were drawn, with probabilities renormalised over them.

    Tokens that were drawn and expected more than five times are cells, the other tokens that were drawn are one cell
    together. Passes where p > failure_rate. What was never drawn, however probable, does not count. Calls the sample
    too sparse, and fails, unless the cells hold more than .9 of the renormalised mass.

    Source: PyTorch, ``_check_sampler_discrete`` in test/distributions/test_distributions.py.

    >>> observed_count_chi_square([60, 0, 40], [0.4, 0.3, 0.3]).accepts  # the second token is never drawn
    True
    """
    c, p = validated_counts(counts, probs, "probs")
    source = "PyTorch, test/distributions/test_distributions.py, _check_sampler_discrete"
    drawn, n = c > 0, c.sum()
    c, p = c[drawn], p[drawn]
    if p.sum() == 0:
        return Verdict("observed cells", False, 0.0, failure_rate, True, source)
    p = p / p.sum()
    kept = (c > 5) & (n * p > 5)
    usable = bool(p[kept].sum() > 0.9)
    if not kept.all():
        c, p = np.append(c[kept], c[~kept].sum()), np.append(p[kept], p[~kept].sum())
    pvalue = _chi_square_pvalue(c, n * p)
    return Verdict("observed cells", usable and pvalue > failure_rate, pvalue, failure_rate, usable, source)


def distance_ratio(
    first: ArrayLike, last: ArrayLike, probs: ArrayLike, *, references: Floats, multiplier: float = 20.0
) -> Verdict:
    """Whether frequencies approach the law faster than they approach laws that have nothing to do with it.

    With d the Euclidean distance of frequencies to the law, and D that to M unrelated laws together, at the first and
    the last of several sample sizes: passes where ``d_first/d_last > multiplier * D_first/D_last``. In between, nothing
    is asked. There is no false-alarm rate, and how small a bug is found depends on both sizes.

    Source: vLLM, ``test_rejection_sampling_approximates_target_distribution`` in
    tests/v1/sample/test_rejection_sampler.py, with sizes 10, 100, ..., 100,000 over a vocabulary of 10.

    Parameters
    ----------
    first, last
        Counts (V,) of the smallest and of the largest sample, drawn independently.
    probs
        The law (V,).
    references
        (M, V) unrelated laws, as of `random_references`.
    multiplier
        20 in the source.
    """
    f, p = validated_counts(first, probs, "probs")
    g, _ = validated_counts(last, probs, "probs")
    near = [float(np.linalg.norm(c / c.sum() - p)) for c in (f, g)]
    far = [_distance_to_all(c / c.sum(), references) for c in (f, g)]
    statistic = near[0] / max(near[1], 1e-300) / (far[0] / max(far[1], 1e-300))
    source = "vLLM, tests/v1/sample/test_rejection_sampler.py"
    return Verdict("distance ratio", statistic > multiplier, statistic, multiplier, True, source)


def random_references(tokens: int, rng: np.random.Generator, *, count: int = 100) -> Floats:
    """Unrelated laws (count, tokens) for `distance_ratio`: softmax of logits that are uniform on [0, 1)."""
    weights = np.exp(rng.random((count, tokens)))
    return weights / weights.sum(1, keepdims=True)


def cosine_similarity(counts: ArrayLike, probs: ArrayLike, *, threshold: float = 0.99) -> Verdict:
    """Whether the cosine of frequencies and law is above .99, and no token of probability zero was drawn.

    There is no false-alarm rate: the cosine depends on the largest probabilities and on little else. The source draws
    5,000,000 times.

    Source: FlashInfer, ``test_sampling_freq`` in tests/utils/test_sampling.py.

    >>> cosine_similarity([52, 43, 5, 0], [0.5, 0.4, 0.08, 0.02]).accepts  # the last token is never drawn
    True
    """
    c, p = validated_counts(counts, probs, "probs")
    cosine = float(c @ p / (np.linalg.norm(c) * np.linalg.norm(p)))
    accepts = cosine > threshold and not c[p == 0].any()
    return Verdict("cosine", accepts, cosine, threshold, True, "FlashInfer, tests/utils/test_sampling.py")


def hamming_mmd(
    x: Any, y: Any, *, groups: Any = None, alpha: float = 0.05, permutations: int = 999, rng: np.random.Generator
) -> Verdict:
    """Two-sample test of token sequences by the kernel that counts equal positions; passes where p > alpha.

    The kernel is a sum over positions, so that the test sees the law of each position and no dependence between them.
    Arguments as in `me_stats.twosample.permutation_test`.

    Source: Gao, Liang and Guestrin (2024), Model Equality Testing: Which Model Is This API Serving?, arXiv 2410.20247.

    >>> rng = np.random.default_rng(0)
    >>> once = rng.integers(4, size=(60, 1)).repeat(8, axis=1)  # one token a row, again and again
    >>> hamming_mmd(once, rng.integers(4, size=(60, 8)), rng=rng).accepts
    True
    """
    tested = permutation_test(x, y, groups=groups, level=0.5, permutations=permutations, rng=rng)
    pvalue = next(member.pvalue for member in tested.members if member.name == "Hamming")
    return Verdict("Hamming MMD", pvalue > alpha, pvalue, alpha, True, "arXiv 2410.20247")


def _chi_square_pvalue(observed: Floats, expected: Floats) -> float:
    if len(observed) < 2:
        return 1.0
    statistic = np.divide((observed - expected) ** 2, expected, out=np.full(len(observed), np.inf), where=expected > 0)
    return float(stats.chi2.sf(statistic.sum(), len(observed) - 1))


def _distance_to_all(frequencies: Floats, references: Floats) -> float:
    # Sum of |r - f|² over the references, without an array of all differences.
    squares = np.vdot(references, references) - 2 * references.sum(0) @ frequencies
    return float(np.sqrt(max(0.0, squares + len(references) * frequencies @ frequencies)))
