"""Language models: toys, transformers, and the algebra that combines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from me_stats.models.aligned import Aligned
from me_stats.models.base import Cost, LanguageModel, Session
from me_stats.models.conditioned import Conditioned
from me_stats.models.ensemble import Ensemble
from me_stats.models.joint import Allowed, JointTransform, PublishedCE, Restricted, UnionTopK, published_me
from me_stats.models.next_byte import NextByte
from me_stats.models.subtokens import FirstSubtoken
from me_stats.models.toy import MarkovModel, TableModel
from me_stats.models.warped import Greedy, MinP, Temperature, TopK, TopP, Warp, Warped
from me_stats.models.windowed import Endless, Windowed

if TYPE_CHECKING:
    from me_stats.models.huggingface import TransformersModel

__all__ = [
    "Aligned",
    "Allowed",
    "Conditioned",
    "Cost",
    "Endless",
    "Ensemble",
    "FirstSubtoken",
    "Greedy",
    "JointTransform",
    "LanguageModel",
    "MarkovModel",
    "MinP",
    "NextByte",
    "PublishedCE",
    "Restricted",
    "Session",
    "TableModel",
    "Temperature",
    "TopK",
    "TopP",
    "TransformersModel",
    "UnionTopK",
    "Warp",
    "Warped",
    "Windowed",
    "published_me",
]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import, and toys do not need it.
    if name == "TransformersModel":
        from me_stats.models.huggingface import TransformersModel

        return TransformersModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
