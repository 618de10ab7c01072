"""Learned routers: weights w(prefix) that CE marginalises, ME draws from and a threshold makes one-hot.

A router is a `Mixing`, which sees the token ids of the prefix and nothing else, so that ME is exact by construction.
`controls` holds samplers that break this rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from me_stats.routers.base import Decodable, Router, RouterMixing, Tempered, Thresholded
from me_stats.routers.bayes import BayesRouter
from me_stats.routers.controls import LastComponentSampler, PeekingSampler, StickySampler
from me_stats.routers.decoding import DecodingDistances, Decodings, decoding_distances, decodings
from me_stats.routers.documents import document_nll, scored_sequences
from me_stats.routers.ngram import NgramRouter
from me_stats.routers.recurrent import RecurrentRouter
from me_stats.routers.store import load_router, router_metadata, save_router
from me_stats.routers.train import Epoch, RouterFit, train_router

if TYPE_CHECKING:
    from me_stats.routers.hidden import HiddenStateRouter

__all__ = [
    "BayesRouter",
    "Decodable",
    "DecodingDistances",
    "Decodings",
    "Epoch",
    "HiddenStateRouter",
    "LastComponentSampler",
    "NgramRouter",
    "PeekingSampler",
    "RecurrentRouter",
    "Router",
    "RouterFit",
    "RouterMixing",
    "StickySampler",
    "Tempered",
    "Thresholded",
    "decoding_distances",
    "decodings",
    "document_nll",
    "load_router",
    "router_metadata",
    "save_router",
    "scored_sequences",
    "train_router",
]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import, and the other routers do not need it.
    if name == "HiddenStateRouter":
        from me_stats.routers.hidden import HiddenStateRouter

        return HiddenStateRouter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
