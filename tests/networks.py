"""Tiny transformers with random weights: laws that are peaked and that depend on the whole prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from me_stats.models.huggingface import TransformersModel

V, CONTEXT, WINDOW = 64, 96, 8

SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def shape(**changes: Any) -> dict[str, Any]:
    return SHAPE | changes


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma3": lambda: Gemma3TextConfig(**shape(**_WINDOWED, query_pre_attn_scalar=8)),
    "mistral": lambda: MistralConfig(**shape(sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(
        **shape(**_WINDOWED, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=30.0)
    ),
    "phi3": lambda: Phi3Config(**shape(sliding_window=WINDOW)),
    "gpt2": lambda: GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=None),
    "gpt_neox": lambda: GPTNeoXConfig(**shape(rotary_pct=0.5)),
    "gpt_oss": lambda: GptOssConfig(**shape(**_WINDOWED, **_EXPERTS, **_ROPE)),
}

devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)


def network(config: Any, *, seed: int = 0, gain: float = 1.5) -> PreTrainedModel:
    """A network with weights N(0, gain²/fan-in) and small biases, drawn from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
            elif name.endswith(("bias", "sinks")):
                parameter.copy_(noise / 4)
    return built.eval()


def tiny(family: str = "llama", *, seed: int = 0, gain: float = 1.5, **options: Any) -> TransformersModel:
    if family == "gpt_oss":
        options.setdefault("graphs", False)  # its experts cannot be captured, of which it would warn
    return TransformersModel(network(FAMILIES[family](), seed=seed, gain=gain), **options)


def byte_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """256 bytes, ``<s>`` and ``</s>``: every text has ids, with nothing to download."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def total_variation(laws: Tensor, others: Tensor) -> Tensor:
    """(B,) total variation between the rows of two laws (B, V)."""
    return (laws.cpu().double().exp() - others.cpu().double().exp()).abs().sum(-1) / 2
