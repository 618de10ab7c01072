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

# `tokenizer.ggml.token_type` of a GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_PADDING = re.compile(r"\[PAD(\d+)\]")


def read_tiktoken(path: str | os.PathLike[str], *, size: int | None = None, eos: Sequence[int] = ()) -> TokenBytes:
    """The table of a tiktoken file (one base64 string and its id per line).

    Special tokens are not in such a file. With `size`, the width of the model's law, the ids past the file are
    controls or padding, which the file cannot tell apart: all but `eos` count as unused.
    """
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
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused))


def read_sentencepiece(path: str | os.PathLike[str], *, eos: Sequence[int] | None = None) -> TokenBytes:
    """The table of a SentencePiece model file; needs the package ``sentencepiece``. `eos` defaults to the file's.

    The space before a text, which such a model may add, belongs to reading and is not in the table.
    """
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
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused))


def read_gguf(path: str | os.PathLike[str], *, eos: Sequence[int] | None = None) -> TokenBytes:
    """The table of a GGUF file's vocabulary; needs the package ``gguf``. `eos` defaults to the file's one id.

    Rows that the converter filled up (``[PAD100015]`` at id 100015) are unused.
    """
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
    return TokenBytes(tuple(strings), tuple(eos), tuple(unused))


def _contents(fields: Any, name: str, path: str | os.PathLike[str]) -> Any:
    if name not in fields:
        raise ValueError(f"{path} has no field {name}: it carries no vocabulary")
    return fields[name].contents()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading this vocabulary needs the package {name}: pip install {name}") from error
