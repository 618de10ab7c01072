"""Two tiny Llamas and their mixture."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.models.huggingface import TransformersModel
from me_stats.samplers import CESampler, MESampler
from tests.networks import tiny

PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13, 14, 15))
# Two float32 computations of one law in different batch shapes; a wrong law is off by more than 0.01.
ROUNDING = 1e-5
STEPS = 12


@cache
def component(seed: int = 0) -> TransformersModel:
    return tiny("llama", seed=seed)


def ensemble(device: str = "cpu") -> Ensemble:
    models = [component(0), component(1)] if device == "cpu" else [tiny(seed=i, device=device) for i in (0, 1)]
    return Ensemble(models, ConstantMixing([0.6, 0.4]))


def assert_coupled(model: Ensemble, prompts: Any) -> None:
    me = MESampler(model).sample(prompts, max_new_tokens=STEPS, n=4, seed=5)
    ce = CESampler(model, latent=True).sample(prompts, max_new_tokens=STEPS, n=4, seed=5)
    assert me.components is not None
    assert ce.components is not None
    assert torch.equal(me.tokens, ce.tokens)
    assert torch.equal(me.components, ce.components)
    assert me.cost.reads < ce.cost.reads
