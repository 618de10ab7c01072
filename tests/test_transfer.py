"""Whether fitted weights pay: held-out losses written out, intervals that cover, and the same over domains."""

from __future__ import annotations

import numpy as np
import pytest

from me_stats.corpus import CorpusScores
from me_stats.transfer import cross_validate, document_nll, fit_by_domain, fit_documents
from me_stats.weights import fit_weights, held_out_nll
from tests.mixture_data import SEPARATE, draw_tokens, logs


def corpus(log_probs: np.ndarray, lengths: list[int] | np.ndarray, domains: list[str] | None = None) -> CorpusScores:
    n, d = len(log_probs), len(lengths)
    ones = np.ones(n, dtype=np.int32)
    names = tuple(domains or ["text"] * d)
    return CorpusScores(log_probs, ones, ones, np.array(lengths), np.zeros((d, 0)), names, {})


def written(weights: list[float], lengths: list[int] | np.ndarray, seed: int, **options: object) -> CorpusScores:
    laws = SEPARATE[: len(weights)]
    tokens = draw_tokens(laws, weights, (int(np.sum(lengths)),), seed)
    return corpus(logs(laws[:, tokens].T), lengths, **options)  # type: ignore[arg-type]


def test_folds_hold_out_whole_documents_and_their_losses_add_up() -> None:
    lengths = [5, 40, 0, 30, 25, 60, 33, 7]
    scores = written([0.3, 0.7], lengths, 0)
    result = cross_validate(scores, folds=3, seed=1)
    assert result.fold[2] == -1  # nothing to hold out
    assert sorted(np.bincount(result.fold[result.fold >= 0])) == [2, 2, 3]
    total = 0.0
    for f in range(3):
        held = np.isin(scores.document, np.flatnonzero(result.fold == f))
        np.testing.assert_allclose(result.weights[f], fit_weights(scores.log_probs[~held]).weights, atol=1e-9)
        loss = held_out_nll(scores.log_probs[held], result.weights[f])
        assert result.fold_nll[f] == pytest.approx(loss)
        total += loss * held.sum()
    assert result.nll == pytest.approx(total / 200)
    assert result.bits_per_byte == pytest.approx(total / 200 / np.log(2))
    assert [row.alternative for row in result.comparisons] == [
        "equal weights", "component 0 alone", "component 1 alone",
    ]  # fmt: skip
    for row, rival in zip(result.comparisons, ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]), strict=True):
        assert row.nll == pytest.approx(held_out_nll(scores.log_probs, rival))
        assert row.difference == pytest.approx(row.nll - result.nll)
        assert row.interval[0] < row.difference < row.interval[1]
    again = cross_validate(scores, folds=3, seed=1)
    assert (again.fold == result.fold).all()


def test_fitting_pays_where_it_should_and_only_there() -> None:
    lengths = [50] * 60
    skewed = cross_validate(written([0.05, 0.95], lengths, 1))
    assert skewed.comparisons[0].interval[0] > 0
    even = cross_validate(written([0.5, 0.5], lengths, 2))
    low, high = even.comparisons[0].interval
    assert low < 0 < high
    assert all(row.interval[0] > 0 for row in even.comparisons[1:])


def test_paired_intervals_cover() -> None:
    # The weights of all folds are near the truth, so the expected difference is that of the true weights.
    laws, weights, equal = SEPARATE[:2], np.array([0.2, 0.8]), np.array([0.5, 0.5])
    mixed = weights @ laws
    truth = mixed @ (np.log(mixed) - np.log(equal @ laws))
    held, runs = 0, 200
    rng = np.random.default_rng(3)
    for run in range(runs):
        low, high = cross_validate(written([0.2, 0.8], rng.integers(20, 60, 100), run)).comparisons[0].interval
        held += low <= truth <= high
    assert 0.91 <= held / runs <= 0.99


def test_impossible_tokens_make_a_loss_infinite_not_nan() -> None:
    log_probs = logs(np.tile([[0.5, 0.2], [0.0, 0.3]], (20, 1)))
    result = cross_validate(corpus(log_probs, [2] * 20))
    equal, first, second = result.comparisons
    assert (first.nll, first.difference, first.interval) == (np.inf, np.inf, (np.inf, np.inf))
    assert np.isfinite([equal.difference, second.difference, result.nll]).all()
    # The one document that needs component 0 is held out: the fitted weights exclude it, as component 1 does.
    one_sided = corpus(logs([[0.0, 0.5]] * 30 + [[0.5, 0.0]] * 3), [3] * 11)
    lonely = cross_validate(one_sided, folds=11)
    assert lonely.nll == np.inf
    assert lonely.comparisons[0].difference == -np.inf
    assert (lonely.comparisons[2].difference, lonely.comparisons[2].interval) == (0.0, (-np.inf, np.inf))


def test_domains_have_their_own_weights() -> None:
    lengths = [40] * 30
    parts = [written(w, lengths, seed) for seed, w in enumerate(([0.1, 0.9], [0.8, 0.2]))]
    scores = corpus(np.concatenate([part.log_probs for part in parts]), lengths * 2, ["prose"] * 30 + ["code"] * 30)
    result = fit_by_domain(scores)
    assert result.domains == ("prose", "code")
    for name, part in zip(result.domains, parts, strict=True):
        direct = fit_weights(part.log_probs, groups=part.document, n_bytes=part.n)
        np.testing.assert_array_equal(result.fits[name].weights, direct.weights)
        np.testing.assert_array_equal(result.fits[name].intervals, direct.intervals)
    assert result.fits["prose"].intervals[0, 1] < result.pooled.weights[0] < result.fits["code"].intervals[0, 0]
    for i, row in enumerate(result.domains):
        for j, part in enumerate(parts):
            loss = held_out_nll(part.log_probs, result.fits[row].weights)
            assert result.nll[i, j] == pytest.approx(loss)
            assert result.excess[i, j] == pytest.approx(
                loss - held_out_nll(part.log_probs, result.fits[result.domains[j]].weights)
            )
    assert result.excess.diagonal().tolist() == [0, 0]
    assert (result.intervals[[0, 1], [1, 0], 0] > 0).all()


def test_few_documents_are_fitted_without_groups() -> None:
    assert fit_documents(written([0.3, 0.7], [50] * 5, 0)).n_groups is None
    assert fit_documents(written([0.3, 0.7], [50] * 20, 0)).n_groups == 20


@pytest.mark.parametrize("folds", [1, 4])
def test_folds_that_cannot_be_made(folds: int) -> None:
    with pytest.raises(ValueError, match=r"with scored tokens \(3\), got"):
        cross_validate(written([0.3, 0.7], [5, 0, 5, 5], 0), folds=folds)


def test_document_losses_are_sums_over_chunks() -> None:
    scores = written([0.2, 0.3, 0.5], [70_000, 0, 3, 66_000], 0)
    weights = np.array([0.2, 0.3, 0.5])
    losses = document_nll(scores, weights)
    token = -np.log(np.exp(scores.log_probs) @ weights)
    np.testing.assert_allclose(losses, np.bincount(scores.document, weights=token, minlength=4))
