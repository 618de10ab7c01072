"""Names of token ids, for aligners that match vocabularies by token strings and not by bytes.

Give one of them to ``ByteStrings.of(models, names=...)``: ids share an entry only where bytes and names both agree.
What the names split is probability that such an aligner keeps apart although it writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from me_stats.tokenizer_bytes import SPACE, byte_alphabet
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import TokenBytes

_ALPHABET = byte_alphabet()
_GLYPHS = {chr(256 + 32): " ", chr(256 + 10): "\n"}  # of byte-level BPE: the two that some codes decode


def file_names(vocabulary: Vocabulary, table: TokenBytes) -> list[str | None]:
    """(V,) token strings as they stand in the tokenizer's file; None for ids that it has no token for.

    A byte-level vocabulary and a SentencePiece one agree on plain ASCII words only: spaces and all other bytes are
    spelled in other signs.

    Source of the union of token strings: Yu et al. 2024 (GaC, arXiv 2406.12585).
    """
    tokenizer = _backend(vocabulary.tokenizer)
    return [tokenizer.id_to_token(token) for token in range(table.size)]


def converted_names(vocabulary: Vocabulary, table: TokenBytes) -> list[str | None]:
    """(V,) token strings after the conversion that the published code makes before it matches them.

    The signs for a space become spaces. Byte-level tokens of one ASCII byte become ``<0xNN>``, and only 0-9, A-Z and
    a-z are mapped back: a full stop, an equals sign or a newline no longer match the pieces of SentencePiece, which
    stay as they are. Of the other signs of byte-level BPE the one for a newline is decoded, and no more: "é" stays
    two letters.
    """
    names = file_names(vocabulary, table)
    byte_level = is_byte_level(table, names)
    return [None if name is None else converted_name(name, byte_level=byte_level) for name in names]


def converted_name(name: str, *, byte_level: bool) -> str:
    """One name of `converted_names`.

    >>> [converted_name(name, byte_level=True) for name in ("\u0120the", ".", "\u0120", "\u010a", "\u00c3\u00a9", "==")]
    [' the', '<0x2E>', '<0x20>', '<0x0A>', '\u00c3\u00a9', '==']
    >>> [converted_name(name, byte_level=False) for name in ("\u2581the", ".", "<0x2E>", "\u00e9")]
    [' the', '.', '<0x2E>', '\u00e9']
    """
    if not byte_level:
        return name.replace(SPACE, " ")
    value = _ALPHABET.get(name, 128)
    if value < 128 and not chr(value).isalnum():
        return f"<0x{value:02X}>"
    for sign, text in _GLYPHS.items():
        name = name.replace(sign, text)
    return name


def is_byte_level(table: TokenBytes, spellings: Sequence[str | None]) -> bool:
    """Whether tokens are spelled in the byte alphabet: no token is spelled with the space of SentencePiece.

    >>> is_byte_level(TokenBytes((b" a",)), ["Ġa"]), is_byte_level(TokenBytes((b" a",)), ["▁a"])
    (True, False)
    """
    return not any(
        spelling is not None and string is not None and string.startswith(b" ") and spelling.startswith(SPACE)
        for string, spelling in zip(table.strings, spellings, strict=True)
    )


def _backend(tokenizer: Any) -> Any:
    return getattr(tokenizer, "backend_tokenizer", tokenizer)
