"""Samplers: CE draws from the mixture, ME runs one component a token, repairs reach other laws, controls err."""

from me_stats.samplers.base import Sampler, StepSampler
from me_stats.samplers.controls import SequenceMixtureSampler
from me_stats.samplers.conventional import CESampler
from me_stats.samplers.mixture import MESampler
from me_stats.samplers.repairs import FixedMaskSampler
from me_stats.samplers.speculative import SpeculativeSampler

__all__ = [
    "CESampler",
    "FixedMaskSampler",
    "MESampler",
    "Sampler",
    "SequenceMixtureSampler",
    "SpeculativeSampler",
    "StepSampler",
]
