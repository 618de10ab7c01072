from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    DiffLlamaConfig,
    DogeConfig,
    MambaConfig,
    NemotronConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    RobertaConfig,
)

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.models.base import PrefixSession
from me_stats.models.huggingface import TransformersModel
from me_stats.samplers import CESampler, MESampler
from tests.mixtures import PROMPTS, ROUNDING, STEPS, assert_coupled, component, ensemble
from tests.networks import FAMILIES, V, network, shape, total_variation

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two attentions in a layer": (lambda: DiffLlamaConfig(**shape()), "run attention more than once"),
    "a mask of its own": (lambda: DogeConfig(**shape()), "builds a mask of its own"),
    "no arguments passed on": (lambda: NemotronConfig(**shape()), "takes no arguments from the caller"),
    "a silent window": (
        lambda: PhimoeConfig(**shape(sliding_window=8, num_local_experts=4, num_experts_per_tok=2)),
        "does not say that it looks back 8 tokens only",
    ),
    "positions with an offset": (
        lambda: RobertaConfig(**shape(is_decoder=True, pad_token_id=1)),
        "off by a total variation",
    ),
    "state that is no key or value": (
        lambda: MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=None),
        "layers of type linear_attention",
    ),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_architecture_that_needs_another_session_is_refused(config: Callable[[], Any], reason: str) -> None:
    built = network(config())
    with pytest.raises(ValueError, match=rf"{reason}.*session='prefix'") as refusal:
        TransformersModel(built)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["state that is no key or value", "positions with an offset", "a silent window"])
def test_prefix_session_serves_every_architecture(kind: str) -> None:
    model = TransformersModel(network(REFUSED[kind][0]()), session="prefix")
    session = model.session([(5, 6, 7), (8, 9)])
    assert isinstance(session, PrefixSession)
    session.append(np.array([1]), torch.tensor([10]))
    laws = session.log_probs(np.array([1, 0]))
    alone = torch.cat([model.log_probs([prefix]) for prefix in ((8, 9, 10), (5, 6, 7))])
    assert total_variation(laws, alone).max() < ROUNDING
    assert model.cache_bytes_per_token() == 0
    mixture = Ensemble([model, model], ConstantMixing([0.6, 0.4]))
    assert_coupled(mixture, [(5, 6, 7), (8, 9)])


def test_prefix_session_of_a_usual_model_writes_the_same_texts() -> None:
    plain = [TransformersModel(component(i).network, session="prefix") for i in (0, 1)]
    slow = MESampler(Ensemble(plain, ConstantMixing([0.6, 0.4]))).sample(PROMPTS, max_new_tokens=STEPS, n=2)
    fast = MESampler(ensemble()).sample(PROMPTS, max_new_tokens=STEPS, n=2)
    assert torch.equal(slow.tokens, fast.tokens)
    assert fast.cost.tokens_forwarded < slow.cost.tokens_forwarded / 2


@pytest.mark.parametrize("session", ["ragged", "prefix"])
def test_network_that_looks_ahead_is_refused(session: Any) -> None:
    both_ways = network(BertConfig(**shape(is_decoder=False)))
    with pytest.raises(ValueError, match=r"^BertLMHeadModel is not a causal language model: .* depends on later ones$"):
        TransformersModel(both_ways, session=session)


def test_window_kept_on_the_module_is_obeyed() -> None:
    config = Qwen2MoeConfig(
        **shape(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_experts=4, num_experts_per_tok=2),
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = TransformersModel(network(config))
    text = tuple(np.random.default_rng(0).integers(2, V, 40).tolist())
    laws = model.session([text]).log_probs(np.arange(1))
    assert total_variation(laws, model.log_probs([text])).max() < ROUNDING


def test_poisoned_weights_are_refused_wherever_they_show() -> None:
    poisoned = network(FAMILIES["llama"]())
    model = TransformersModel(poisoned)
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[9] = float("nan")
    for call in (
        lambda: model.log_probs([(5,), (8, 9)]),
        lambda: list(model.path_log_probs([(5,)], [[9, 6]])),
        lambda: model.session([(8, 9)]).log_probs(np.arange(1)),
        lambda: CESampler(model).sample([8, 9], max_new_tokens=2),
        lambda: MESampler(Ensemble([model, model], ConstantMixing([0.6, 0.4]))).sample([8, 9], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"^LlamaForCausalLM returned NaN logits.*wider dtype$"):
            call()
    assert bool(model.log_probs([(5,)]).isfinite().all())
    with torch.no_grad():
        poisoned.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN logits"):
        TransformersModel(poisoned)
