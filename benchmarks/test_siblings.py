"""The bundled siblings: a session against what others do for the same token, and ME against CE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.models.base import PrefixSession
from me_stats.models.huggingface import TransformersModel
from me_stats.samplers import CESampler, MESampler

PROMPT, STEPS = tuple(range(65, 115)), 32
ROW = np.zeros(1, dtype=np.int64)


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return TransformersModel("bundled:prose")


@pytest.fixture(scope="module")
def ensemble(model: TransformersModel) -> Ensemble:
    return Ensemble([model, TransformersModel("bundled:code")], ConstantMixing([0.5, 0.5]))


def decode(session: object, *, every: int = 1) -> None:
    """Write a fixed token `STEPS` times and read the law after each `every` of them."""
    for step in range(STEPS):
        if step % every == 0:
            session.log_probs(ROW)  # type: ignore[attr-defined]
        session.append(ROW, torch.tensor([66]))  # type: ignore[attr-defined]


@torch.inference_mode()
def transformers_decode(network: torch.nn.Module) -> None:
    """The same laws as a user of transformers reads them, with its own cache."""
    cache, ids = None, torch.tensor([PROMPT])
    for _ in range(STEPS):
        out = network(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, torch.tensor([[66]])
        out.logits[:, -1].log_softmax(-1)


@torch.inference_mode()
def weight_products(network: torch.nn.Module) -> None:
    """Every matrix of the network times one vector, as often as tokens are decoded."""
    matrices = [module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)]
    vectors = [torch.ones(1, matrix.shape[1]) for matrix in matrices]
    for _ in range(STEPS):
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.nn.functional.linear(vector, matrix)


def test_session_over_transformers(ratio: Callable[..., float], model: TransformersModel) -> None:
    ratio(lambda: decode(model.session([PROMPT], max_new_tokens=STEPS)), lambda: transformers_decode(model.network))


def test_session_over_weight_products(ratio: Callable[..., float], model: TransformersModel) -> None:
    ratio(lambda: decode(model.session([PROMPT], max_new_tokens=STEPS)), lambda: weight_products(model.network))


def test_catching_up_over_recomputing_the_prefix(ratio: Callable[..., float], model: TransformersModel) -> None:
    """One law for each four tokens: ME's component that is drawn a quarter of the time."""
    ragged, prefix = model.session, lambda: PrefixSession(model, [PROMPT])
    ratio(lambda: decode(ragged([PROMPT], max_new_tokens=STEPS), every=4), lambda: decode(prefix(), every=4))


@pytest.mark.parametrize("rows", [1, 16])
def test_me_over_ce(ratio: Callable[..., float], ensemble: Ensemble, rows: int) -> None:
    me, ce = MESampler(ensemble), CESampler(ensemble)
    ratio(
        lambda: me.sample(PROMPT, max_new_tokens=STEPS, n=rows), lambda: ce.sample(PROMPT, max_new_tokens=STEPS, n=rows)
    )
