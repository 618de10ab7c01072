"""Samplers: CE draws from the mixture, ME draws a component and runs it alone, controls do it wrong."""

from me_stats.samplers.base import Sampler
from me_stats.samplers.controls import SequenceMixtureSampler
from me_stats.samplers.conventional import CESampler
from me_stats.samplers.mixture import MESampler

__all__ = ["CESampler", "MESampler", "Sampler", "SequenceMixtureSampler"]
