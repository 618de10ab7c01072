"""Networks of published shapes with random weights: for measuring speed at real sizes where the weights are not.

What a forward costs depends on shapes, dtype and device, and not on what the weights say. Laws of random weights are
good for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from me_stats.devices import torch_dtype

# The shape of Mistral-7B-v0.1, which all fine-tuned models below share but for ids added to the vocabulary.
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Qwen/Qwen2.5-3B-Instruct
        "qwen2.5-3b": _QWEN
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
        },
        # Qwen/Qwen2.5-Math-1.5B-Instruct
        "qwen2.5-math-1.5b": _QWEN
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "max_position_embeddings": 4096,
            "rope_theta": 1e4,
        },
        # openchat/openchat_3.5
        "openchat-7b": _MISTRAL | {"vocab_size": 32002, "max_position_embeddings": 8192, "eos_token_id": 32000},
        # NousResearch/Nous-Hermes-2-Mistral-7B-DPO
        "nous-hermes-7b": _MISTRAL | {"vocab_size": 32002, "eos_token_id": 32000},
        # teknium/OpenHermes-2.5-Mistral-7B
        "openhermes-7b": _MISTRAL | {"vocab_size": 32002, "eos_token_id": 32000},
        # mistralai/Mistral-7B-Instruct-v0.1
        "mistral-7b": _MISTRAL,
        # deepseek-ai/deepseek-llm-7b-chat
        "deepseek-7b": {
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 30,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
        },
        # google/gemma-3-270m: in no group; the output layer holds most of its weights.
        "gemma3-270m": {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    }
)
"""The fields of config.json that say how large a network is, by name; above each the hub repository."""

PAPER_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qwen": ("qwen2.5-3b", "qwen2.5-math-1.5b"),
        "hermes2": ("openchat-7b", "nous-hermes-7b"),
        "hermes3": ("openchat-7b", "nous-hermes-7b", "openhermes-7b"),
        "mixed": ("openchat-7b", "deepseek-7b", "mistral-7b"),
    }
)
"""The ensembles that the paper times (arXiv 2605.00419, section 3.1)."""


def published_config(name: str, *, layers: int | None = None, shrink: int = 1) -> PreTrainedConfig:
    """The Hugging Face config of a published shape.

    Parameters
    ----------
    layers
        Fewer layers than published; the time of a forward then scales, its output layer aside.
    shrink
        Divides hidden size, intermediate size and vocabulary, and the width of a head where it is given; numbers of
        heads stay. For tests.

    Raises ValueError for an unknown name, and for layers or a `shrink` that leave no network.

    >>> config = published_config("mistral-7b", layers=2)
    >>> config.model_type, config.hidden_size, config.num_hidden_layers
    ('mistral', 4096, 2)
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    fields = dict(PUBLISHED[name])
    if layers is not None and not 1 <= layers <= fields["num_hidden_layers"]:
        raise ValueError(f"layers must lie in 1..{fields['num_hidden_layers']}, got {layers!r}")
    heads = fields["num_attention_heads"]
    # A head needs an even width of at least 2, which rotary positions turn by pairs.
    if shrink < 1 or fields["hidden_size"] % (2 * shrink * heads):
        most = fields["hidden_size"] // (2 * heads)
        raise ValueError(f"shrink must be a divisor of {most}, which leaves heads of even width; got {shrink!r}")
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    for field in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"):
        if field in fields:
            fields[field] = fields[field] // shrink
    if shrink > 1:
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    if "rope_theta" in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    return AutoConfig.for_model(**fields)


def random_network(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: str = "cpu",
    layers: int | None = None,
    shrink: int = 1,
    seed: int = 0,
) -> PreTrainedModel:
    """A network of a published shape, its matrices drawn from N(0, .02²) on `device`, ready for `TransformersModel`.

    Norms are 1 and biases 0. It has no tokenizer: prompts are token ids. The same seed gives the same weights on one
    kind of device. `layers`, `shrink` and errors as of `published_config`.

    >>> from me_stats.models import TransformersModel
    >>> model = TransformersModel(random_network("qwen2.5-3b", dtype="float32", layers=2, shrink=32))
    >>> model.log_probs([[1, 2, 3]]).shape
    torch.Size([1, 4748])
    """
    precision = torch_dtype(dtype)
    config = published_config(name, layers=layers, shrink=shrink)
    # Weights are made where they are used; filling 7 billion numbers in host memory first would take minutes.
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=precision)
    network = network.to_empty(device=torch.device(device))
    network.tie_weights()
    where = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=where), torch.no_grad():
        torch.manual_seed(seed)
        network.init_weights()  # buffers, such as the frequencies of rotary positions, come back with the weights
    return network.eval().requires_grad_(False)
