from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from me_stats.models import _gguf


def write_gguf(path: Path, architecture: str, model: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for method, value in fields.items():
        getattr(writer, method)(value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_names(model: Any, transform: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The weights of a one-layer llama or gemma3 under llama.cpp's names."""
    pairs = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
    }
    if model.config.model_type == "llama":
        pairs["post_attention_layernorm"] = "ffn_norm"
    else:
        pairs["post_attention_layernorm"] = "post_attention_norm"
        pairs["pre_feedforward_layernorm"] = "ffn_norm"
        pairs["post_feedforward_layernorm"] = "post_ffw_norm"
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem = name.removesuffix(".weight").removeprefix("model.layers.0.")
        prefix = "blk.0." if name.startswith("model.layers.0.") else ""
        tensors[f"{prefix}{pairs[stem]}.weight"] = transform(stem, weight)
    return tensors


def random_model(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def assert_same_law(folder: Path, model: Any, vocabulary: int, *, tolerance: float) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=loaded.dtype).eval()
    reference.load_state_dict(model.state_dict())  # rounds the weights, not the rotary frequencies
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        difference = (loaded(ids).logits - reference(ids).logits).abs().max().item()
    assert difference <= tolerance
    assert not hasattr(loaded.config, "quantization_config")
    return loaded


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.0)])
def test_a_llama_gguf_converts_to_the_same_law(tmp_path: Path, dtype: str, tolerance: float) -> None:
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "19", "ab", "abc"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=77,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    model = random_model(config)

    def interleave(stem: str, weight: Any) -> Any:
        # llama.cpp keeps the two halves of a rotary pair side by side
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(stem)
        if heads is None:
            return weight
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    fields = {
        "add_rope_dimension_count": 8,
        "add_rope_freq_base": 1e5,
        "add_vocab_size": len(tokens),
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": "smollm",
        "add_token_list": tokens,
        "add_token_types": [3, 3, 3] + [1] * (len(tokens) - 3),
        "add_token_merges": ["1 9", "a b", "ab c"],
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
        "add_unk_token_id": 0,
        "add_pad_token_id": 2,
        "add_add_bos_token": False,
        "add_chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    source, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    folder.mkdir()
    write_gguf(source, "llama", model, fields, gguf_names(model, interleave))
    _gguf.convert(source, folder, dtype=dtype, eos_token_ids=(2, 0))

    loaded = assert_same_law(folder, model, len(tokens), tolerance=tolerance)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.rope_parameters["rope_theta"] == 1e5
    assert loaded.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc19<|im_end|>").input_ids) == ["abc", "1", "9", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("naïve 🙂 19").input_ids) == "naïve 🙂 19"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 77
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_the_digit_repair_is_needed_and_done_once() -> None:
    """Without it "19" is one token: the control that the conversion test can tell the difference."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"1": 0, "9": 1, "19": 2}, [("1", "9")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert backend.encode("19").tokens == ["19"]
    state = json.loads(backend.to_str())
    fields = {"architecture": "llama", "model": "gpt2", "pre": "smollm", "scores": [], "types": []}
    assert _gguf.repair_tokenizer(state, fields)
    once = json.dumps(state)
    assert Tokenizer.from_str(once).encode("19").tokens == ["1", "9"]
    _gguf.repair_tokenizer(state, fields)
    assert json.dumps(state) == once
    assert not _gguf.repair_tokenizer(state, {**fields, "pre": "llama-bpe"})


def test_a_gemma3_gguf_converts_to_the_same_law_and_cuts_runs_longest_first(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3TextConfig

    runs = ["\n" * n for n in (2, 3, 4)] + [" " * n for n in (2, 3, 4)]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    # "▁a" stands before the letters' own merges, as a frequent word does
    words = ["▁", "\n", "a", "b", "▁a", "ab", "▁ab"]
    tokens = [*specials, *runs, *byte_pieces, *words]
    types = [3] * len(specials) + [4] * len(runs) + [6] * 256 + [1] * len(words)
    scores = [-1000.0] * (len(specials) + len(runs)) + [0.0] * 256 + [-float(n) for n in range(len(words))]
    config = Gemma3TextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=256,
        sliding_window=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        layer_types=["sliding_attention"],
    )
    model = random_model(config)
    fields = {
        "add_key_length": 16,
        "add_value_length": 16,
        "add_rope_freq_base": 1e6,
        "add_sliding_window": 4,
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_scores": scores,
        "add_token_types": types,
        "add_bos_token_id": 2,
        "add_eos_token_id": 1,
        "add_unk_token_id": 3,
        "add_pad_token_id": 0,
        "add_add_bos_token": True,
        "add_add_space_prefix": False,
    }
    source, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    folder.mkdir()
    # llama.cpp stores 1 + w for Gemma's norms
    tensors = gguf_names(model, lambda stem, weight: weight + 1 if "norm" in stem else weight)
    write_gguf(source, "gemma3", model, fields, tensors)
    _gguf.convert(source, folder, dtype="float32", eos_token_ids=(1,))

    loaded = assert_same_law(folder, model, len(tokens), tolerance=1e-4)
    assert loaded.config.sliding_window == 4
    assert loaded.config.layer_types == ["sliding_attention"]
    assert loaded.config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert loaded.config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert loaded.generation_config.eos_token_id == [1]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("ab") == ["<bos>", "ab"]
    assert pieces("\n" * 6 + "a") == ["<bos>", "\n" * 4, "\n" * 2, "a"]
    assert pieces(" " * 7 + "a") == ["<bos>", "▁" * 4, "▁" * 3, "a"]
    assert tokenizer.decode(tokenizer("<unused0>é    b").input_ids, skip_special_tokens=True) == "<unused0>é    b"
