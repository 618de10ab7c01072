"""The bundled model over pieces of text: its tokenizer, its two ends, and how well it knows both domains."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from me_stats.models import TransformersModel
from me_stats.models.catalog import get_entry
from me_stats.scripts import load
from me_stats.tokenizer_bytes import AWKWARD, SPACE
from me_stats.vocabulary_map import Role, TokenBytes

WORDS = Path(__file__).parents[1] / "me_stats" / "models" / "bundled" / "words"
TEXTS = (
    "plain ASCII,  two  spaces .  And , a tab\t!\n\n\nend\r\n",
    "Grüße, naïve café, Ω, e\u0301",
    "日本語と中文",
    "😀 👩‍🔬 🇫🇷",
    "def f(x):\n\tif x:\r\n        return '<0x41>'\n",
    " leading and trailing ",
    "\x00\x7f\x1b",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("experiments", "train_siblings")


@pytest.fixture(scope="module")
def streams(script: ModuleType) -> dict[str, tuple[bytes, bytes]]:
    found: dict[str, tuple[bytes, bytes]] = script.corpora()
    return found


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WORDS / "training.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(WORDS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WORDS)


@pytest.fixture(scope="module")
def table(script: ModuleType, tokenizer: Any) -> TokenBytes:
    read: TokenBytes = script.word_table(tokenizer)
    return read


def same_corpus(report: dict[str, Any], streams: dict[str, tuple[bytes, bytes]]) -> bool:
    """Whether this Python comes with the texts of the one that words was trained on."""
    train, held = (b"".join(parts) for parts in zip(*streams.values(), strict=True))
    return bool(hashlib.sha256(train + held).hexdigest() == report["corpus"]["sha256"])


# --- the tokenizer -----------------------------------------------------------------------------------


def test_texts_come_back_byte_for_byte(tokenizer: Any, table: TokenBytes) -> None:
    for text in (*TEXTS, *AWKWARD):
        ids = table.encode(text.encode())
        assert table.bytes_of(ids) == text.encode()
        if SPACE not in text and "</s>" not in text:
            assert tokenizer.encode(text, add_special_tokens=False) == list(ids)
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode(text) == [2, *ids]


def test_ids_have_the_roles_of_a_real_checkpoint(tokenizer: Any, table: TokenBytes) -> None:
    roles = table.roles
    assert [roles[token] for token in range(5)] == [Role.CONTROL, Role.END, Role.CONTROL, Role.CONTROL, Role.END]
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "</s>", "<s>", "<unk>", "<end_of_turn>"]
    assert table.strings[5:261] == tuple(bytes([value]) for value in range(256))
    assert roles[5:1000] == [Role.ORDINARY] * 995
    assert roles[1000:] == [Role.UNUSED] * 40
    assert len(set(table.strings[261:1000])) == 739
    assert table.strings[261:1000].count(b"A") == 1  # and <0x41>
    assert {b" the", b" return", b"    "} < set(table.strings)
    assert table.prefix == b""


def test_a_piece_is_read_only_where_the_whole_text_says_so(table: TokenBytes) -> None:
    """What follows changes how a text is read, which is what makes other vocabularies hard to follow."""
    whole, start = table.encode(b" returns"), table.encode(b" retur")
    assert whole[: len(start)] != start
    assert [table.strings[token] for token in table.encode("é".encode())] == [b"\xc3", b"\xa9"]


def test_the_tokenizer_depends_on_the_texts_alone(
    script: ModuleType, streams: dict[str, tuple[bytes, bytes]], report: dict[str, Any], tokenizer: Any
) -> None:
    """Each process has hash seeds of its own, so that an order of theirs would show."""
    if not same_corpus(report, streams):
        pytest.skip("this Python comes with other texts than the one that words was trained on")
    documents = [document for train, _ in streams.values() for document in script.split(train)]
    again = script.word_tokenizer(document.decode() for document in documents)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


# --- the model ---------------------------------------------------------------------------------------


def test_it_is_what_the_catalog_says() -> None:
    model, entry = TransformersModel("bundled:words"), get_entry("bundled:words")
    assert model.vocabulary.eos == entry.eos_token_ids == (1, 4)
    assert model.vocabulary.size == 1000
    assert model.network.num_parameters() == entry.parameters
    assert model.log_probs([(2,)]).shape == (1, 1000)


def test_rows_that_no_token_has_have_hardly_any_mass(
    model: PreTrainedModel, table: TokenBytes, streams: dict[str, tuple[bytes, bytes]], script: ModuleType
) -> None:
    documents = [document for _, held in streams.values() for document in script.split(held)[:8]]
    ids = [(2, *table.encode(document)) for document in documents]
    with torch.inference_mode():
        laws = [model(input_ids=torch.tensor([row])).logits[0].softmax(-1) for row in ids]
    silent = [token for token, role in enumerate(table.roles) if role in (Role.UNUSED, Role.CONTROL)]
    assert len(silent) == 43
    assert float(torch.cat(laws)[:, silent].sum(-1).mean()) < 1e-3


def test_both_ends_close_documents_and_neither_comes_within(
    model: PreTrainedModel, table: TokenBytes, streams: dict[str, tuple[bytes, bytes]], script: ModuleType
) -> None:
    within, closing = [], []
    for document in script.split(streams["prose"][1])[:24]:
        ids = torch.tensor([[2, *table.encode(document)]])
        with torch.inference_mode():
            ends = model(input_ids=ids).logits[0].softmax(-1)[:, [1, 4]]
        within.append(ends[:-1].sum(-1).mean())
        closing.append(ends[-1])
    first, second = torch.stack(closing).mean(0).tolist()
    assert min(first, second) > 30 * float(torch.stack(within).mean())
    assert 1.5 < first / second < 6  # three documents in four close with </s>


def test_the_record_holds_what_the_stored_weights_do(
    model: PreTrainedModel,
    table: TokenBytes,
    streams: dict[str, tuple[bytes, bytes]],
    script: ModuleType,
    report: dict[str, Any],
) -> None:
    bits = report["held_out_bits_per_byte"]
    assert max(bits.values()) < 2
    assert max(report["bits_per_byte_by_position"].values()) < 3
    for domain, (_, held_out) in streams.items():
        measured = script.score_words(model, table, held_out, length=script.LONG_CONTEXT, windows=64).mean().item()
        # Other Pythons have other texts, which were in part trained on.
        assert measured == pytest.approx(bits[domain], abs=1e-3 if same_corpus(report, streams) else 0.3)


def test_bits_are_those_of_the_bytes(model: PreTrainedModel, table: TokenBytes, script: ModuleType) -> None:
    """The sum over a window is the cost of its tokens, with either end and without the begin after it."""
    window = "The café is open.\n\0x = 1\n".encode()
    found = script.score_words(model, table, window, length=len(window), windows=1)
    assert found.shape == (1, len(window))
    first, second = (table.encode(part) for part in window.split(b"\0"))
    ids = [2, *first, 1, 2, *second]
    with torch.inference_mode():
        laws = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    cost = [laws[place, token] for place, token in enumerate(ids[1:])]
    cost[len(first)] = laws[len(first), [1, 4]].sum()
    del cost[len(first) + 1]
    assert float(found.sum()) == pytest.approx(-sum(math.log2(float(p)) for p in cost), rel=1e-4)


def test_documents_begin_and_end_with_one_of_two(script: ModuleType, table: TokenBytes) -> None:
    documents = [b"Document %d is short.\n" % number for number in range(200)]
    rows = [script.word_ids(document, table) for document in documents]
    assert {row[0] for row in rows} == {2}
    assert 20 < sum(row[-1] == 4 for row in rows) < 80
    assert {row[-1] for row in rows} == {1, 4}
    assert table.bytes_of(rows[0]) == documents[0]
