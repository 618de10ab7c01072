"""Tests for anyone's sampler: checks with a declared false-alarm rate, planted bugs, strategies, a pytest plugin.

`check_sampler` judges anything that returns token ids against a law, its conditionals or a second sampler;
`check_language_model` and `check_session` judge what it runs on; `fuzz_sampler` looks for the smallest ensemble on
which it fails; `MUTANTS` are the bugs that every check here has to find; `strategies` has what hypothesis draws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from me_stats.testing.result import CheckResult, ConformanceResult, ModelRejected, Outcome, SamplerRejected

if TYPE_CHECKING:
    from me_stats.equivalence import required_draws
    from me_stats.testing.adapters import Generate, TokenSampler, one_by_one
    from me_stats.testing.endpoint import Completions
    from me_stats.testing.fuzz import FuzzRejected, fuzz_sampler
    from me_stats.testing.model_check import check_language_model, check_session
    from me_stats.testing.mutants import MUTANTS, Mutant
    from me_stats.testing.sampler_check import check_sampler
    from me_stats.testing.session_fuzz import fuzz_session

# The plugin imports this package in every pytest run of whoever installed it, so names load at first use.
_HOME = {
    "Completions": "me_stats.testing.endpoint",
    "Generate": "me_stats.testing.adapters",
    "TokenSampler": "me_stats.testing.adapters",
    "one_by_one": "me_stats.testing.adapters",
    "check_language_model": "me_stats.testing.model_check",
    "check_session": "me_stats.testing.model_check",
    "check_sampler": "me_stats.testing.sampler_check",
    "required_draws": "me_stats.equivalence",
    "fuzz_sampler": "me_stats.testing.fuzz",
    "fuzz_session": "me_stats.testing.session_fuzz",
    "FuzzRejected": "me_stats.testing.fuzz",
    "MUTANTS": "me_stats.testing.mutants",
    "Mutant": "me_stats.testing.mutants",
}

__all__ = [
    "MUTANTS",
    "CheckResult",
    "Completions",
    "ConformanceResult",
    "FuzzRejected",
    "Generate",
    "ModelRejected",
    "Mutant",
    "Outcome",
    "SamplerRejected",
    "TokenSampler",
    "check_language_model",
    "check_sampler",
    "check_session",
    "fuzz_sampler",
    "fuzz_session",
    "one_by_one",
    "required_draws",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'me_stats.testing' has no attribute {name!r}")
