from __future__ import annotations

import numpy as np
import pytest
import torch

from me_stats.divergence import tv_distance
from me_stats.exact import sampler_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.routers import decoding_distances, decodings
from tests.routers.toys import KINDS, routed, tables


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_composing_agree_and_thresholding_does_not(kind: str) -> None:
    found = decodings(routed(kind, 3, 2))
    sample, compose, threshold = (
        sampler_law(sampler, [1], max_new_tokens=3) for sampler in (found.sample, found.compose, found.threshold)
    )
    assert sample.tv_distance(compose) < 1e-12
    if not kind.startswith("thresholded"):
        assert sample.tv_distance(threshold) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_the_laws(kind: str) -> None:
    ensemble = routed(kind, 4, 3, seed=1)
    prompts, tokens = [(0,), (1, 2)], [[1, 2, 3], [3]]
    found = decoding_distances(ensemble, prompts, tokens)
    assert found.mask.tolist() == [[True] * 3, [True, False, False]]
    thresholded = decodings(ensemble).threshold.model
    for row, (prompt, path) in enumerate(zip(prompts, tokens, strict=True)):
        prefixes = [(*prompt, *path[:step]) for step in range(len(path))]
        expected = tv_distance(ensemble.log_probs(prefixes), thresholded.log_probs(prefixes))
        assert found.threshold[row, : len(path)] == pytest.approx(np.asarray(expected), abs=1e-12)
        top = ensemble.mixing.log_weights(prefixes).exp().amax(-1)
        assert found.top_weight[row, : len(path)] == pytest.approx(top.numpy(), abs=1e-12)
    assert (found.threshold <= 1 - found.top_weight + 1e-12)[found.mask].all()
    assert found.compose.max() < 1e-14
    assert (found.threshold[~found.mask] == 0).all()
    assert found.mean("top_weight") == pytest.approx(found.top_weight[found.mask].mean())


def test_the_thresholded_ensemble_runs_one_component() -> None:
    ensemble = Ensemble(tables(4, 3), ConstantMixing([0.2, 0.5, 0.3]))
    trace = decodings(ensemble).threshold.sample([0], n=5, max_new_tokens=6)
    assert torch.equal(trace.components, torch.ones(5, 6, dtype=torch.int64))


def test_nothing_to_compare_is_refused() -> None:
    for tokens in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="tokens must hold at least one row, each of at least one token"):
            decoding_distances(routed("ngram", 3, 2), [(0,)] * len(tokens), tokens)
