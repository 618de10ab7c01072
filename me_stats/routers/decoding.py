"""The three ways to decode a routed ensemble, and how far apart their laws are at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Prefix
from me_stats.models.ensemble import Ensemble, chunked_paths, mix
from me_stats.routers.base import Thresholded
from me_stats.samplers.conventional import CESampler
from me_stats.samplers.mixture import MESampler


@dataclass(frozen=True)
class Decodings:
    """One ensemble, three samplers.

    Attributes
    ----------
    sample
        ME: one component drawn per token, from w(prefix).
    compose
        CE: the mixture's own law, all K components per token. The same law as `sample`.
    threshold
        The component of the largest weight writes: one component per token, another law.
    """

    sample: MESampler
    compose: CESampler
    threshold: MESampler


def decodings(ensemble: Ensemble) -> Decodings:
    """Samplers that draw from the router, marginalise it, and threshold it.

    >>> from me_stats import ConstantMixing
    >>> from me_stats.models import MarkovModel
    >>> toys = [MarkovModel.random(3, seed=s) for s in (0, 1)]
    >>> decodings(Ensemble(toys, ConstantMixing([0.4, 0.6]))).threshold.sample([0], max_new_tokens=2).components
    tensor([[1, 1]])
    """
    return Decodings(MESampler(ensemble), CESampler(ensemble), MESampler(_thresholded(ensemble)))


def _thresholded(ensemble: Ensemble) -> Ensemble:
    return Ensemble(ensemble.components, Thresholded(ensemble.mixing))


@dataclass(frozen=True)
class DecodingDistances:
    """Total variation of one step's laws along given continuations; all (N, T), 0 where `mask` is False.

    Attributes
    ----------
    threshold
        Between Σ w_i P_i and the law of the component with the largest weight.
    compose
        Between Σ w_i P_i summed in float64, which is what ME draws from, and the mixture as CE computes it: rounding.
    top_weight
        The largest weight; `threshold` is at most 1 - top_weight.
    mask
        True where a token was given.
    """

    threshold: np.ndarray
    compose: np.ndarray
    top_weight: np.ndarray
    mask: np.ndarray

    def mean(self, name: str = "threshold") -> float:
        """Average of one of the three over all steps."""
        return float(getattr(self, name)[self.mask].mean())


def decoding_distances(
    ensemble: Ensemble, prompts: Sequence[Prefix], tokens: Sequence[Sequence[int]]
) -> DecodingDistances:
    """Exact per-step distances between the decodings, by teacher forcing N ragged continuations of ids.

    >>> from me_stats import ConstantMixing
    >>> from me_stats.models import TableModel
    >>> coins = [TableModel([[0.8, 0.2]], order=0), TableModel([[0.4, 0.6]], order=0)]
    >>> found = decoding_distances(Ensemble(coins, ConstantMixing([0.75, 0.25])), [()], [[0, 1]])
    >>> found.threshold.round(9).tolist(), found.mean("compose") < 1e-15
    ([[0.1, 0.1]], True)
    """
    lengths = [len(row) for row in tokens]
    if not lengths or min(lengths) < 1:
        raise ValueError("tokens must hold at least one row, each of at least one token")
    parts: list[Tensor] = []
    for laws, log_weights, _ in chunked_paths(ensemble, prompts, tokens):
        weights = log_weights.double().exp().cpu()
        p = laws.double().exp().cpu()
        mixture = (weights[:, :, None] * p).sum(1)
        composed = mix(list(laws.unbind(1)), log_weights).double().exp().cpu()
        top, best = weights.max(-1)
        chosen = p[torch.arange(len(p)), best]
        distances = [(mixture - other).abs().sum(-1) / 2 for other in (chosen, composed)]
        parts.append(torch.stack([*distances, top]))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    grids = np.zeros((3, *mask.shape))
    grids[:, mask] = torch.cat(parts, dim=1).numpy()
    return DecodingDistances(grids[0], grids[1], grids[2], mask)
