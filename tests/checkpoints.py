"""Checkpoints on disk in the paper's shapes, shrunk, with random weights and tokenizers of the same kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from me_stats.groups import Group
from me_stats.models.catalog import cache_folder
from me_stats.models.shapes import published_config
from me_stats.tokenizer_bytes import SPACE, byte_alphabet
from tests.networks import network

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What turns begin and end with, which is all that sets the relatives of Mistral-7B apart.
TURNS = {
    "qwen2.5-3b": ("<|im_start|>", "<|im_end|>"),
    "qwen2.5-math-1.5b": ("<|im_start|>", "<|im_end|>"),
    "openchat-7b": ("<|end_of_turn|>", "<|pad_0|>"),
    "nous-hermes-7b": ("<|im_start|>", "<|im_end|>"),
    "openhermes-7b": ("<|im_end|>", "<|im_start|>"),
    "mistral-7b": (),
    "deepseek-7b": (),
}


def byte_level(merges: list[tuple[str, str]]) -> Tokenizer:
    """Bytes, and a piece for each merge: the kind of Qwen and DeepSeek."""
    pieces = [*byte_alphabet(), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> Tokenizer:
    """Pieces of text, and bytes for the rest, behind a space: the kind of Mistral."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), SPACE, *"the", "th", f"{SPACE}t"]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)},
            [("t", "h"), (SPACE, "t")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def tokenizer_like(shape: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that the checkpoint of this shape has."""
    if shape.startswith(("qwen", "deepseek")):
        backend = byte_level([("t", "h")] if shape.startswith("qwen") else [("i", "n"), ("in", "g")])
        begin, end = "<|begin|>", "<|endoftext|>"
    else:
        backend, begin, end = byte_fallback(), "<s>", "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, additional_special_tokens=list(TURNS[shape])
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def save_stand_in(folder: Path, shape: str, *, seed: int = 0, shard: str = "5GB", tokenizer: Any = None) -> str:
    """A checkpoint of this shape, 1/64 as wide and of two layers; its path.

    Its vocabulary is that of `tokenizer`, by default a small one of the same kind in 1/64 of the rows.
    """
    config = published_config(shape, shrink=64, layers=2)
    if tokenizer is None:
        tokenizer = tokenizer_like(shape)
    else:
        config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    built = network(config, seed=seed, gain=3.0)
    built.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    built.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_group(root: Path, group: Group) -> list[str]:
    """Stand-ins for all models of a group, in its order."""
    return [save_stand_in(root / shape, shape, seed=seed) for seed, shape in enumerate(group.shapes)]


def real_tokenizers(root: Path) -> dict[str, Any]:
    """Tokenizers of the group of mixed vocabularies as they are, by shape; none where their files are not here."""
    piece = cache_folder() / "mistral-7b-vocabulary" / "tokenizer.model.v1"
    gguf = cache_folder() / "vocabularies" / "ggml-vocab-deepseek-llm.gguf"
    if not (piece.is_file() and gguf.is_file()):
        return {}
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (root / "tokenizer_config.json").write_text(json.dumps(names))
    shutil.copy(piece, root / "tokenizer.model")
    openchat = AutoTokenizer.from_pretrained(root)
    openchat.add_special_tokens({"additional_special_tokens": list(TURNS["openchat-7b"])})
    return {
        "openchat-7b": openchat,
        "deepseek-7b": AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
        "mistral-7b": AutoTokenizer.from_pretrained(root),
    }
