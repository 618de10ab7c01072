"""Bytes of token ids from vocabulary files alone: what two models could share, known before their weights are.

The tables have no reading rule: they can be counted and compared, and not aligned. An end of sequence is a role that
the model gives, so callers name its ids, except where a GGUF does.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from me_stats.tokenizer_bytes import byte_alphabet, fallback_bytes, spelled_bytes, text_bytes
from me_stats.vocabulary_map import TokenBytes

Spellings = tuple[str | None, ...]

# `tokenizer.ggml.token_type` of a GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_PADDING = re.compile(r"\[PAD(\d+)\]")


def read_tiktoken(path: str | os.PathLike[str], *, size: int | None = None, eos: Sequence[int] = ()) -> TokenBytes:
    """The table of a tiktoken file (one base64 string and its id per line).

    Special tokens are not in such a file. With `size`, the width of the model's law, the ids past the file are
    controls or padding, which the file cannot tell apart: all but `eos` count as unused.
    """
    return _tiktoken(path, size, eos)[0]


def read_sentencepiece(path: str | os.PathLike[str], *, eos: Sequence[int] | None = None) -> TokenBytes:
    """The table of a SentencePiece model file; needs the package ``sentencepiece``. `eos` defaults to the file's.

    The space before a text, which such a model may add, belongs to reading and is not in the table.
    """
    return _sentencepiece(path, eos)[0]


def read_gguf(path: str | os.PathLike[str], *, eos: Sequence[int] | None = None) -> TokenBytes:
    """The table of a GGUF file's vocabulary; needs the package ``gguf``. `eos` defaults to the file's one id.

    Rows that the converter filled up (``[PAD100015]`` at id 100015) are unused.
    """
    return _gguf(path, eos)[0]


def read_file(
    path: str | os.PathLike[str], kind: str, *, size: int | None = None, eos: Sequence[int] | None = None
) -> tuple[TokenBytes, Spellings]:
    """The table of a vocabulary file and its token strings, by one of the three readers.

    `kind` is "tiktoken", "sentencepiece" or "gguf"; `size` is for the first. Token strings are those that the model's
    tokenizer.json would have: the bytes of a tiktoken file are spelled in the alphabet of byte-level BPE. Ids that the
    file lacks have None.
    """
    if kind == "tiktoken":
        return _tiktoken(path, size, eos or ())
    if kind not in ("sentencepiece", "gguf"):
        raise ValueError(f"kind must be 'tiktoken', 'sentencepiece' or 'gguf', got {kind!r}")
    return _sentencepiece(path, eos) if kind == "sentencepiece" else _gguf(path, eos)


def _tiktoken(path: str | os.PathLike[str], size: int | None, eos: Sequence[int]) -> tuple[TokenBytes, Spellings]:
    known: dict[int, bytes] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                string, token = line.split()
                known[int(token)] = base64.b64decode(string, validate=True)
            except (ValueError, binascii.Error) as error:
                raise ValueError(
                    f"line {number} of {path} is no tiktoken entry (base64, space, id): {line!r:.40}"
                ) from error
    width = max([*known, *eos], default=-1) + 1 if size is None else size
    if not known or max(known) >= width:
        raise ValueError(f"{path} has ids up to {max(known, default=-1)}; size must be larger, got {size}")
    strings = [known.get(token) if token not in eos else None for token in range(width)]
    unused = [token for token, string in enumerate(strings) if string is None and token not in eos]
    signs = {value: sign for sign, value in byte_alphabet().items()}
    spelled = ("".join(map(signs.__getitem__, known[t])) if t in known else None for t in range(width))
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused)), tuple(spelled)


def _sentencepiece(path: str | os.PathLike[str], eos: Sequence[int] | None) -> tuple[TokenBytes, Spellings]:
    processor = _package("sentencepiece").SentencePieceProcessor(model_file=os.fspath(path))
    size = processor.get_piece_size()
    if eos is None:
        eos = [processor.eos_id()] if processor.eos_id() >= 0 else []
    unused = [token for token in range(size) if processor.is_unused(token) and token not in eos]
    silent = {*unused, *eos, *(t for t in range(size) if processor.is_control(t) or processor.is_unknown(t))}
    strings: list[bytes | None] = []
    for token in range(size):
        read = fallback_bytes if processor.is_byte(token) else text_bytes
        strings.append(None if token in silent else read(processor.id_to_piece(token)))
    pieces = (str(processor.id_to_piece(token)) for token in range(size))
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused)), tuple(pieces)


def _gguf(path: str | os.PathLike[str], eos: Sequence[int] | None) -> tuple[TokenBytes, Spellings]:
    fields = _package("gguf").GGUFReader(os.fspath(path)).fields
    kind = _contents(fields, "tokenizer.ggml.model", path)
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path} has a vocabulary of kind {kind!r}; only 'gpt2' (bytes) and 'llama' (byte fallback) are read"
        )
    tokens = _contents(fields, "tokenizer.ggml.tokens", path)
    types = _contents(fields, "tokenizer.ggml.token_type", path)
    if eos is None:
        named = fields.get("tokenizer.ggml.eos_token_id")
        eos = [] if named is None else [int(named.contents())]
    alphabet = byte_alphabet()
    strings: list[bytes | None] = []
    unused = []
    for token, (string, role) in enumerate(zip(tokens, types, strict=True)):
        padding = _PADDING.fullmatch(string)
        if token in eos or role in (_UNKNOWN, _CONTROL):
            strings.append(None)
        elif role == _UNUSED or (padding is not None and int(padding[1]) == token):
            strings.append(None)
            unused.append(token)
        elif kind == "gpt2":
            strings.append(string.encode() if role == _USER_DEFINED else spelled_bytes(string, alphabet))
        else:
            strings.append(fallback_bytes(string) if role == _BYTE else text_bytes(string))
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused)), tuple(map(str, tokens))


def _contents(fields: Any, name: str, path: str | os.PathLike[str]) -> Any:
    if name not in fields:
        raise ValueError(f"{path} has no field {name}: it carries no vocabulary")
    return fields[name].contents()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading this vocabulary needs the package {name}: pip install {name}") from error
