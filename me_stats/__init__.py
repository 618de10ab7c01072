"""me_stats: does sampling one language model per token follow the ensemble's law?

CE (`CESampler`) draws each token from the mixture Σ λ_i P_i. ME (`MESampler`) draws a component, runs it
alone and draws from its law. `exact` proves on enumerable models that the two agree, `goodness`,
`martingale` and `equivalence` bound the difference on real ones.

The root imports nothing heavy; names load their modules at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "CESampler": "me_stats.samplers",
    "MESampler": "me_stats.samplers",
    "SequenceMixtureSampler": "me_stats.samplers",
    "ConstantMixing": "me_stats.mixing",
    "Conditioned": "me_stats.models",
    "EProcess": "me_stats.eprocess",
    "Ensemble": "me_stats.models",
    "Evidence": "me_stats.evidence",
    "LanguageModel": "me_stats.models",
    "RowStreams": "me_stats.draws",
    "Trace": "me_stats.trace",
    "Vocabulary": "me_stats.vocabulary",
    "score": "me_stats.trace",
    "watch": "me_stats.monitor",
}
_MODULES = (
    "acceptance",
    "advice",
    "bench",
    "chains",
    "chi_square",
    "comparison",
    "corpus",
    "cost",
    "dependence",
    "divergence",
    "eprocess",
    "equivalence",
    "evidence",
    "exact",
    "families",
    "goodness",
    "hardware",
    "lags",
    "likelihood",
    "long_run",
    "long_summary",
    "martingale",
    "models",
    "monitor",
    "orders",
    "paired",
    "parts",
    "per_sequence",
    "prefixes",
    "reduction",
    "repeats",
    "routers",
    "row_statistics",
    "samplers",
    "schedule",
    "sensitivity",
    "sequence_divergence",
    "sequence_kl",
    "sequential",
    "shares",
    "steps",
    "tails",
    "testing",
    "tokenizer_audit",
    "tokenizer_bytes",
    "transfer",
    "twosample",
    "variance",
    "vocabulary_files",
    "vocabulary_map",
    "vocabulary_names",
    "weights",
)

if TYPE_CHECKING:
    from me_stats import (
        acceptance,
        advice,
        bench,
        chains,
        chi_square,
        comparison,
        corpus,
        cost,
        dependence,
        divergence,
        eprocess,
        equivalence,
        evidence,
        exact,
        families,
        goodness,
        hardware,
        lags,
        likelihood,
        long_run,
        long_summary,
        martingale,
        models,
        monitor,
        orders,
        paired,
        parts,
        per_sequence,
        prefixes,
        reduction,
        repeats,
        routers,
        row_statistics,
        samplers,
        schedule,
        sensitivity,
        sequence_divergence,
        sequence_kl,
        sequential,
        shares,
        steps,
        tails,
        testing,
        tokenizer_audit,
        tokenizer_bytes,
        transfer,
        twosample,
        variance,
        vocabulary_files,
        vocabulary_map,
        vocabulary_names,
        weights,
    )
    from me_stats.draws import RowStreams
    from me_stats.eprocess import EProcess
    from me_stats.evidence import Evidence
    from me_stats.mixing import ConstantMixing
    from me_stats.models import Conditioned, Ensemble, LanguageModel
    from me_stats.monitor import watch
    from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
    from me_stats.trace import Trace, score
    from me_stats.vocabulary import Vocabulary

__all__ = [
    "CESampler",
    "Conditioned",
    "ConstantMixing",
    "EProcess",
    "Ensemble",
    "Evidence",
    "LanguageModel",
    "MESampler",
    "RowStreams",
    "SequenceMixtureSampler",
    "Trace",
    "Vocabulary",
    "__version__",
    "acceptance",
    "advice",
    "bench",
    "chains",
    "chi_square",
    "comparison",
    "corpus",
    "cost",
    "dependence",
    "divergence",
    "eprocess",
    "equivalence",
    "evidence",
    "exact",
    "families",
    "goodness",
    "hardware",
    "lags",
    "likelihood",
    "long_run",
    "long_summary",
    "martingale",
    "models",
    "monitor",
    "orders",
    "paired",
    "parts",
    "per_sequence",
    "prefixes",
    "reduction",
    "repeats",
    "routers",
    "row_statistics",
    "samplers",
    "schedule",
    "score",
    "sensitivity",
    "sequence_divergence",
    "sequence_kl",
    "sequential",
    "shares",
    "steps",
    "tails",
    "testing",
    "tokenizer_audit",
    "tokenizer_bytes",
    "transfer",
    "twosample",
    "variance",
    "vocabulary_files",
    "vocabulary_map",
    "vocabulary_names",
    "watch",
    "weights",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"me_stats.{name}")
    raise AttributeError(f"module 'me_stats' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
