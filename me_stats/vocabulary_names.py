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


def spellings_of(tokenizer: Any, size: int) -> tuple[str | None, ...]:
    """The token strings of ids 0..size-1 as they stand in the tokenizer's file, None where it has none."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return tuple(tokenizer.convert_ids_to_tokens(range(size)))
    return tuple(tokenizer.id_to_token(token) for token in range(size))


def file_names(vocabulary: Vocabulary, table: TokenBytes) -> tuple[str | None, ...]:
    """(V,) token strings as they stand in the tokenizer's file; None for ids that it has no token for.

    A byte-level vocabulary and a SentencePiece one agree on plain ASCII words only: spaces and all other bytes are
    spelled in other signs.

    Source of the union of token strings: Yu et al. 2024 (GaC, arXiv 2406.12585).
    """
    return spellings_of(vocabulary.tokenizer, table.size)


def converted_names(vocabulary: Vocabulary, table: TokenBytes) -> tuple[str | None, ...]:
    """(V,) `exchange_names` of a vocabulary's own token strings."""
    return exchange_names(table, file_names(vocabulary, table))


def exchange_names(table: TokenBytes, spellings: Sequence[str | None]) -> tuple[str | None, ...]:
    """The symbols by which published code matches tokens of different vocabularies, from their `spellings`.

    The signs for a space become spaces. Byte-level tokens of one ASCII byte become ``<0xNN>``, and only 0-9, A-Z and
    a-z are mapped back: a full stop, an equals sign or a newline no longer match the pieces of SentencePiece, but its
    byte tokens, which it never writes. Of the other signs of byte-level BPE the one for a newline is decoded, and no
    more: "\u00e9" stays two letters.

    >>> exchange_names(TokenBytes((b".", b"a", b" the")), [".", "a", "\u0120the"])
    ('<0x2E>', 'a', ' the')
    """
    byte_level = is_byte_level(table, spellings)
    return tuple(None if name is None else converted_name(name, byte_level=byte_level) for name in spellings)


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
