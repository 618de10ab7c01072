"""Small routers with random parameters, and mixtures that use them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from me_stats.mixing import Mixing
from me_stats.models import Ensemble, TableModel
from me_stats.routers import BayesRouter, NgramRouter, RecurrentRouter, Router, RouterMixing

AnyRouter = TypeVar("AnyRouter", bound=Router)

KINDS = ("ngram", "recurrent", "bayes", "thresholded", "tempered", "thresholded bayes")


def scrambled(router: AnyRouter, seed: int = 0, scale: float = 1.0) -> AnyRouter:
    """The same router with every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return router


def tables(size: int, count: int, *, seed: int = 0, order: int = 1, eos: tuple[int, ...] = ()) -> list[TableModel]:
    return [TableModel.random(size, seed=10 * seed + i, order=order, concentration=0.5, eos=eos) for i in range(count)]


def mixing_of(kind: str, parts: list[TableModel], *, seed: int = 0) -> Mixing:
    count, size = len(parts), parts[0].vocabulary.size
    prior = np.random.default_rng(seed).dirichlet(np.ones(count))
    bayes = BayesRouter(parts, prior, beta=0.7, given=1)
    ngram = RouterMixing(scrambled(NgramRouter(count, order=2, buckets=32), seed))
    return {
        "ngram": ngram,
        "recurrent": RouterMixing(scrambled(RecurrentRouter(count, size, width=3), seed)),
        "bayes": bayes,
        "thresholded": ngram.threshold(),
        "tempered": ngram.tempered(0.5),
        "thresholded bayes": bayes.threshold(),
    }[kind]


def routed(kind: str, size: int, count: int, *, seed: int = 0, eos: tuple[int, ...] = ()) -> Ensemble:
    parts = tables(size, count, seed=seed, eos=eos)
    return Ensemble(parts, mixing_of(kind, parts, seed=seed))
