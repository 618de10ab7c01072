"""The bytes of a fast tokenizer's ids, read from its own rules rather than from `decode`, which loses some.

Two kinds are read: byte-level BPE (GPT-2, SmolLM2, Qwen, Llama 3), whose token strings are spelled in an alphabet of
256 characters, and BPE or Unigram with byte fallback (Gemma, Mistral, Llama 2), whose token strings are text with
U+2581 for a space and ``<0xNN>`` for a byte. Whatever else a tokenizer does to its text is refused, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import TokenBytes

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}

# Texts that a careless table gets wrong. Each must come back byte for byte, or the tokenizer is refused.
AWKWARD = (
    "The quick brown fox, 1984.",
    " leading and trailing  ",
    "Ünïcödé ÀÉÎ ñ ß İI ſ ﬁ Ⅷ ½ ²",
    "e\u0301 is not \u00e9; \u212b is not \u00c5",
    "日本語 中文 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧 \U0001f1e9\U0001f1ea 𝔘𝔫𝔦",
    "def f(x):\n\treturn x**2  # ok\r\n\r\n    pass\n\n\n",
    "tabs\t\t\tand\x0bfeeds\x0c, nul\x00 and \x7f\x1b",
    "no\u00a0break, zero\u200bwidth, \ufeff mark, \u2028 line",
    f"{SPACE}block {SPACE}{SPACE} and <0x0A> <0x41>",
    "</s><s><unk><pad><|endoftext|><|im_end|><eos><bos>[INST]",
    "HELLO hello HeLLo",
    "don't 'll we're",
    "=" * 40 + " " * 40 + "x",
)


def byte_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level BPE, and the byte that each spells.

    Printable characters of Latin-1 spell their own code; the others take the code points from 256 on, in order.

    >>> alphabet = byte_alphabet()
    >>> alphabet["A"], alphabet["\\u0120"], len(alphabet)
    (65, 32, 256)

    Source: OpenAI's GPT-2 encoder, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


def spelled_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """Bytes of a byte-level token; a token with a character outside the alphabet is text as it stands."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def fallback_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: ``<0xNN>`` is one byte, U+2581 a space.

    >>> fallback_bytes("<0x0A>"), fallback_bytes("\\u2581the")
    (b'\\n', b' the')
    """
    match = _BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else text_bytes(token)


def text_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token that is text, even where it looks like a byte."""
    return token.replace(SPACE, " ").encode()


def read_tokenizer(vocabulary: Vocabulary, *, drop_normalizer: bool = False) -> TokenBytes:
    """The bytes of every id of `vocabulary`, whose tokenizer must be a Hugging Face fast one.

    Special tokens are controls: a text that spells one is read as text. Ids of ``vocabulary.eos`` are the end, by role.
    Histories are read with the tokenizer's own rules, except that bytes which are no UTF-8 (the unfinished character
    at the end among them) and the character U+2581 become single-byte tokens, that bytes which no token spells are
    left out (`TokenBytes.unread_bytes`), and that a space put before a text is put before every text.

    Parameters
    ----------
    vocabulary
        ``model.vocabulary``.
    drop_normalizer
        Read texts as they stand where the tokenizer would normalise them (Qwen's NFC). The laws then are those after
        the text as it was written.

    Raises
    ------
    ValueError
        For a slow tokenizer, one that normalises, one without byte tokens, and one that does not give back every
        text of `AWKWARD`, with the text.
    """
    backend = getattr(vocabulary.tokenizer, "backend_tokenizer", vocabulary.tokenizer)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"bytes can be read from a fast tokenizer only, got {type(vocabulary.tokenizer).__name__}; "
            "load one with AutoTokenizer (a tokenizer.json), or give a TokenBytes of your own"
        )
    rules = _Rules(json.loads(backend.to_str()), vocabulary, drop_normalizer)
    table = TokenBytes(
        tuple(rules.strings), eos=vocabulary.eos, unused=rules.unused, prefix=rules.prefix, tokenize=rules.reader()
    )
    require_round_trip(table)
    return table


def require_round_trip(table: TokenBytes, texts: tuple[str, ...] = AWKWARD) -> None:
    """ValueError unless the ids of every text, and of every single byte, have the bytes of that text."""
    unread = table.unread_bytes
    for data in (*(text.encode() for text in texts), *(bytes([value]) for value in range(256))):
        ids = table.encode(data)
        back, meant = table.bytes_of(ids), (table.prefix + data).translate(None, unread)
        silent = [token for token in ids if table.strings[token] is None]
        if silent:
            raise ValueError(
                f"the tokenizer reads {data!r:.60} with id {silent[0]}, which stands for no bytes; {_REMEDY}"
            )
        if back != meant:
            raise ValueError(
                f"the tokenizer does not give back its text: {meant!r:.60} returns as {back!r:.60}; {_REMEDY}"
            )


_REMEDY = "write its table by hand (TokenBytes), or use a model whose tokenizer is byte-level or has byte fallback"


class _Rules:
    """What tokenizer.json says, taken apart: the table, and a copy that does nothing but split text."""

    def __init__(self, spec: dict[str, Any], vocabulary: Vocabulary, drop_normalizer: bool) -> None:
        self._spec, self._size = spec, vocabulary.size
        model = spec["model"]
        self.prefix = b""
        self._byte_level = any(
            step["type"] == "ByteLevel" for part in ("normalizer", "pre_tokenizer") for step in self._steps(part)
        )
        if not self._byte_level and not (model["type"] in ("BPE", "Unigram") and model.get("byte_fallback")):
            raise ValueError(
                f"the tokenizer ({model['type']}) has neither byte-level tokens nor byte fallback, so it loses "
                f"characters that it does not know; {_REMEDY}"
            )
        self._plain_normalizer(drop_normalizer)
        self._plain_splitter()
        model["dropout"] = None  # random merges: not a function of the text
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None
        self.strings = self._table(vocabulary.eos)
        known = {string: token for token, string in reversed(list(enumerate(self.strings))) if string is not None}
        self._singles = [known.get(bytes([value]), -1) for value in range(256)]
        if not self._byte_level:
            for token, string in self._ordinary():
                if _BYTE.fullmatch(string) and token < self._size and self.strings[token] is not None:
                    self._singles[int(string[3:5], 16)] = token
            if min(self._singles) < 0:
                missing = self._singles.index(-1)
                raise ValueError(f"the tokenizer has byte fallback but no token for byte {missing:#04x}; {_REMEDY}")

    def _steps(self, part: str) -> list[dict[str, Any]]:
        """The steps of a part, sequences within sequences laid out."""

        def flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
            if step is None:
                return []
            return (
                [one for inner in step[_STEPS[part]] for one in flat(inner)] if step["type"] == "Sequence" else [step]
            )

        return flat(self._spec.get(part))

    def _put(self, part: str, steps: list[dict[str, Any]]) -> None:
        self._spec[part] = {"type": "Sequence", _STEPS[part]: steps} if steps else None

    def _plain_normalizer(self, drop: bool) -> None:
        kept = []
        for step in self._steps("normalizer"):
            if step["type"] == "Prepend" and step["prepend"] in (SPACE, " "):
                self.prefix = b" "
            elif step["type"] == "ByteLevel" or (
                step["type"] == "Replace"
                and step["pattern"].get("String", step["pattern"].get("Regex")) == " "
                and step["content"] == SPACE
                and not self._byte_level
            ):
                kept.append(step)
            elif not drop:
                raise ValueError(
                    f"the tokenizer normalises its text ({step['type']}), so what it reads is not what was written; "
                    "drop_normalizer=True reads the text as it stands"
                )
        self._put("normalizer", kept)

    def _plain_splitter(self) -> None:
        steps = self._steps("pre_tokenizer")
        for step in steps:
            if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
                step["add_prefix_space"], self.prefix = False, b" "
            elif step["type"] == "Metaspace":
                if step.get("prepend_scheme", "always") != "never":
                    self.prefix = b" "
                step["prepend_scheme"] = "never"
                step.pop("add_prefix_space", None)
        self._put("pre_tokenizer", steps)

    def _ordinary(self) -> list[tuple[int, str]]:
        vocab = self._spec["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], n) for n, entry in enumerate(vocab))
        return [(token, string) for string, token in pairs]

    def _table(self, eos: tuple[int, ...]) -> list[bytes | None]:
        strings: list[bytes | None] = [None] * self._size
        alphabet = byte_alphabet()
        used = set(eos)
        for token, string in self._ordinary():
            if token < self._size:
                strings[token] = (
                    spelled_bytes(string, alphabet) if self._byte_level else fallback_bytes(string)
                ) or None
                used.add(token)
        model, added = self._spec["model"], []
        unknown = model.get("unk_token") if model["type"] == "BPE" else None
        silent = {token for token, string in self._ordinary() if string == unknown} | {model.get("unk_id")} | set(eos)
        for entry in self._spec["added_tokens"]:
            if entry["id"] >= self._size:
                continue  # the network has no row for it, so no text may lead there
            used.add(entry["id"])
            content = entry["content"] if self._byte_level else entry["content"].replace(SPACE, " ")
            strings[entry["id"]] = content.encode() or None
            if entry["special"] or entry["id"] in eos:
                silent.add(entry["id"])
                entry["special"] = True
            elif entry["lstrip"] or entry["rstrip"]:
                raise ValueError(f"the token {entry['content']!r} swallows the spaces around it; {_REMEDY}")
            added.append(entry)
        self._spec["added_tokens"] = added
        for token in silent & set(range(self._size)):
            strings[token] = None
        self.unused = tuple(sorted(set(range(self._size)) - used))
        return strings

    def reader(self) -> _Reader:
        """The canonical tokenisation, by a tokenizer of its own that nobody else sets switches on."""
        backend = Tokenizer.from_str(json.dumps(self._spec))
        backend.encode_special_tokens = True
        return _Reader(backend, self._singles, glyph=not self._byte_level)


class _Reader:
    """Bytes → ids, for any bytes: text by the tokenizer, what is no text by single-byte tokens."""

    def __init__(self, backend: Tokenizer, singles: list[int], *, glyph: bool) -> None:
        self._backend, self._singles = backend, singles
        self._unread = bytes(value for value, token in enumerate(singles) if token < 0)
        # surrogateescape hands over each byte that is no UTF-8 as U+DC80 to U+DCFF; U+2581 would turn into a space.
        self._raw = re.compile(f"([\udc80-\udcff{SPACE if glyph else ''}]+)")

    def __call__(self, data: bytes) -> list[int]:
        text = data.translate(None, self._unread).decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for number, piece in enumerate(self._raw.split(text)):
            if number % 2:
                ids += [self._singles[value] for value in piece.encode("utf-8", "surrogateescape")]
            elif piece:
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids
