from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from me_stats.models import Aligned, TableModel
from me_stats.models.catalog import pulled
from me_stats.tokenizer_bytes import AWKWARD, SPACE, byte_alphabet, read_tokenizer, require_round_trip
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings, Role, TokenBytes

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©")]


def byte_level(*, skip: str = "", **options: Any) -> Tokenizer:
    """GPT-2's kind: the alphabet, four merges, an end and a control, a token that is written."""
    pieces = [character for character in byte_alphabet() if character not in skip] + [a + b for a, b in MERGES]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("space", False))
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = options.get("normalizer")
    backend.add_special_tokens(["<eos>", "<turn>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False, **options.get("added", {}))])
    return backend


def fallback(*, space: str = "none", lost: int | None = None, byte_fallback: bool = True) -> Tokenizer:
    """SentencePiece's kind: bytes, a few pieces, spaces as U+2581."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256) if value != lost)]
    pieces += [SPACE, "t", "h", "e", "a", "th", "the", f"{SPACE}the", f"{SPACE}{SPACE}", "é"]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, SPACE)]
    model = models.BPE(
        {piece: n for n, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    backend = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    if space == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif space == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def vocabulary(backend: Tokenizer, *, eos: str = "<eos>", extra: int = 0) -> Vocabulary:
    return Vocabulary(backend.get_vocab_size() + extra, eos=(backend.token_to_id(eos),), tokenizer=backend)


def kinds() -> list[tuple[Tokenizer, str]]:
    return [
        (byte_level(), "<eos>"),
        (byte_level(space=True), "<eos>"),
        *((fallback(space=space), "</s>") for space in ("none", "prepend", "metaspace")),
    ]


class Written(TableModel):
    """A law after each id of a real tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(np.random.default_rng(0).dirichlet(np.ones(vocabulary.size), vocabulary.size + 1), order=1)
        self.vocabulary = vocabulary


TABLES = [read_tokenizer(vocabulary(backend, eos=eos)) for backend, eos in kinds()]


@given(st.sampled_from(range(len(TABLES))), st.one_of(st.binary(max_size=12), st.text(max_size=12).map(str.encode)))
def test_any_bytes_come_back(kind: int, data: bytes) -> None:
    table = TABLES[kind]
    assert table.bytes_of(table.encode(data)) == table.prefix + data


@pytest.mark.parametrize("kind", range(len(TABLES)))
@pytest.mark.parametrize("text", ["the the  thé", "a\n\t\x00the", "日本 🙂", "<tool>the", "ath<0x41> "])
def test_plain_texts_are_read_as_the_tokenizer_reads_them(kind: int, text: str) -> None:
    backend = kinds()[kind][0]
    if kind == 1 and text.startswith("<tool>"):
        return  # byte-level tokenizers put their space behind each added token too
    assert list(TABLES[kind].encode(text.encode())) == backend.encode(text, add_special_tokens=False).ids


def test_what_is_no_text_becomes_single_bytes() -> None:
    for backend, table in zip([kind[0] for kind in kinds()], TABLES, strict=True):
        half, whole = table.encode(b"th\xc3"), table.encode("thé".encode())
        assert [table.strings[token] for token in half[-1:]] == [b"\xc3"]
        assert table.bytes_of(whole).endswith("é".encode())
        assert len(whole) == len(half)  # the byte is taken back and the character read
        assert backend.encode("é", add_special_tokens=False).ids[-1] == whole[-1]


def test_the_sign_that_sentencepiece_uses_for_spaces_is_read_as_bytes() -> None:
    table = TABLES[2]
    assert [table.strings[token] for token in table.encode(SPACE.encode())] == [b"\xe2", b"\x96", b"\x81"]
    assert [table.strings[token] for token in table.encode(b"  ")] == [b"  "]


def test_a_space_before_the_text_is_the_prefix() -> None:
    assert [table.prefix for table in TABLES] == [b"", b" ", b"", b" ", b" "]
    for table in TABLES[3:]:
        assert [table.strings[token] for token in table.encode(b"the")] == [b" the"]


def test_roles_and_texts_that_spell_a_special_token() -> None:
    backend = byte_level()
    table = read_tokenizer(vocabulary(backend, extra=2))
    names = {token: backend.id_to_token(token) for token in range(backend.get_vocab_size())}
    roles = {names.get(token, token): role for token, role in enumerate(table.roles)}
    assert {name: role for name, role in roles.items() if role != Role.ORDINARY} == {
        "<eos>": Role.END,
        "<turn>": Role.CONTROL,
        backend.get_vocab_size(): Role.UNUSED,
        backend.get_vocab_size() + 1: Role.UNUSED,
    }
    assert table.bytes_of(table.encode(b"<turn><eos>")) == b"<turn><eos>"
    assert backend.token_to_id("<tool>") in table.encode(b"a <tool>")
    # The end by role wins over the spelling: a written token that ends sequences has no bytes.
    ends = read_tokenizer(vocabulary(backend, eos="<tool>"))
    assert ends.strings[backend.token_to_id("<tool>")] is None
    assert backend.token_to_id("<tool>") not in ends.encode(b"a <tool>")


def test_ids_that_the_network_has_no_row_for_are_never_read() -> None:
    backend = byte_level()
    table = read_tokenizer(Vocabulary(backend.token_to_id("<tool>"), tokenizer=backend))
    assert max(table.encode(b"a <tool>")) < table.size


def test_bytes_without_a_token_are_left_out() -> None:
    table = read_tokenizer(vocabulary(byte_level(skip="Ā")))  # byte 0
    assert table.unread_bytes == b"\x00"
    assert table.bytes_of(table.encode(b"th\x00e")) == b"the"
    assert table.encode(b"th\x00e") == table.encode(b"the")
    # A model says so when it meets one, and its law is a function of what it can read.
    model = Written(vocabulary(byte_level(skip="Ā")))
    wide = Written(vocabulary(fallback(), eos="</s>"))
    shared = ByteStrings.of([model, wide])
    aligned = Aligned(model, shared)
    with pytest.warns(UserWarning, match=r"no token for the bytes b'\\x00' of a history"):
        law = aligned.log_probs([shared.encode(b"th\x00e")])
    assert torch.equal(law, aligned.log_probs([shared.encode(b"the")]))
    assert Aligned(wide, shared).unread(bytes(range(256))) == b""


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (lambda: byte_level(normalizer=normalizers.NFC()), r"normalises its text \(NFC\).*drop_normalizer=True"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), r"normalises its text \(Lowercase\)"),
        (lambda: byte_level(added={"lstrip": True}), "'<tool>' swallows the spaces around it"),
        (lambda: fallback(byte_fallback=False), "neither byte-level tokens nor byte fallback"),
        (lambda: fallback(lost=65), "no token for byte 0x41"),
    ],
)
def test_tokenizers_that_lose_text_are_refused(backend: Callable[[], Tokenizer], message: str) -> None:
    broken = backend()
    with pytest.raises(ValueError, match=message):
        read_tokenizer(Vocabulary(broken.get_vocab_size(), tokenizer=broken))


class Slow:
    """A tokenizer in Python: nothing says how it reads, and nothing can be read from it."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0] * len(text)

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


def word_piece() -> Tokenizer:
    """BERT's kind: lower case, words, an unknown token."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    return backend


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Slow, r"fast tokenizer only, got Slow; load one with AutoTokenizer"),
        (word_piece, r"\(WordPiece\) has neither byte-level tokens nor byte fallback"),
        (lambda: fallback(byte_fallback=False), "so it loses characters that it does not know"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), "what it reads is not what was written"),
        (lambda: byte_level(normalizer=normalizers.Strip()), r"normalises its text \(Strip\)"),
    ],
)
def test_no_alphabet_is_made_of_a_tokenizer_that_loses_text(tokenizer: Callable[[], Any], message: str) -> None:
    good, broken = Written(vocabulary(byte_level())), Written(Vocabulary(8, fingerprint="x", tokenizer=tokenizer()))
    with pytest.raises(ValueError, match=message):
        ByteStrings.of([good, broken])
    # An alphabet of the good one alone does not take the other in.
    with pytest.raises(ValueError, match="not made from this model's vocabulary"):
        Aligned(broken, ByteStrings.of([good]))


def test_a_splitter_that_drops_spaces_is_refused_with_the_text() -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ValueError, match="does not give back its text: b'The quick"):
        read_tokenizer(vocabulary(backend))


def test_a_normalizer_can_be_dropped_but_not_what_it_hides() -> None:
    table = read_tokenizer(vocabulary(byte_level(normalizer=normalizers.NFC())), drop_normalizer=True)
    for text in AWKWARD:
        assert table.bytes_of(table.encode(text.encode())) == text.encode()


def test_an_unknown_token_in_the_round_trip_is_refused() -> None:
    table = TokenBytes((None, b"T"), tokenize=lambda data: [1 if byte == 84 else 0 for byte in data])
    with pytest.raises(ValueError, match="with id 0, which stands for no bytes"):
        require_round_trip(table)


def test_the_caller_keeps_its_switches() -> None:
    backend = byte_level()
    before = backend.to_str()
    read_tokenizer(vocabulary(backend)).encode(b"<eos>")
    assert backend.to_str() == before
    assert backend.encode("<eos>", add_special_tokens=False).ids == [backend.token_to_id("<eos>")]


@pytest.mark.parametrize(
    ("name", "size", "eos", "counts"),
    [
        ("smollm2-135m", 49_152, (0, 2), {"ORDINARY": 49_135, "END": 2, "CONTROL": 15, "UNUSED": 0}),
        ("gemma3-270m", 262_144, (1,), {"ORDINARY": 262_137, "END": 1, "CONTROL": 6, "UNUSED": 0}),
    ],
)
def test_real_tokenizers(name: str, size: int, eos: tuple[int, ...], counts: dict[str, int]) -> None:
    found = pulled(name)
    if not found:
        pytest.skip(f"{name} is not on this machine: me-stats models pull {name}")
    tokenizer = AutoTokenizer.from_pretrained(next(iter(found.values())))
    table = read_tokenizer(Vocabulary(size, eos=eos, tokenizer=tokenizer))
    roles = table.roles
    assert {role.name: roles.count(role) for role in Role} == counts
    for text in AWKWARD:
        if "<" not in text and not set(text.encode()) & set(table.unread_bytes) and SPACE not in text:
            assert list(table.encode(text.encode())) == tokenizer.encode(text, add_special_tokens=False), text
