"""Where rows end: at an end-of-sequence id, or at the first token whose text completes a stop string.

Both are stopping times: whether a row ends after a token is known from the row up to that token. What was written has
the law of the stopped sequence, and every test of a token given its prefix stays valid. The token that completes a
string belongs to the row.

A row ends where `Endings` of its finished tokens says, in one place for all samplers. What they learn of it while they
write (`Watch`) spares work, and surplus tokens are cut off: tokens do not depend on how often they look.

**Strings are looked for in bytes.** The bytes of a row only ever grow, while its decoded text does not: half a
character reads as U+FFFD until the other half has come, and some decoders turn a whole run of bytes into U+FFFD if its
last character is not whole. In bytes a stop string that straddles tokens, or whose characters do, is found where it
ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from me_stats.vocabulary import Vocabulary

# On an accelerator the copy to the host stalls the queue, so rows that ended are looked for once in this many steps;
# their surplus tokens are discarded.
STEPS_BETWEEN_COMPACTIONS = 16

_NONE = np.empty(0, dtype=np.int64)
_MARGIN = 4  # tokens: a first space that decoders strip, and the rest of a character of four bytes


class StopStrings:
    """Where a sequence of token ids first contains one of some strings.

    The bytes of an id come from `read_tokenizer`, or from `ByteStrings`; an id that stands for none, such as an
    end-of-turn marker, is what it decodes to. For a tokenizer whose bytes cannot be read the newest ids are decoded
    after every token: as many as the longest string has bytes, and four more.

    Parameters
    ----------
    vocabulary
        With a tokenizer.
    until
        The strings.

    Raises
    ------
    ValueError
        For a vocabulary without a tokenizer, no strings, or what is no non-empty string.

    Examples
    --------
    >>> from me_stats.vocabulary_map import ByteStrings, TokenBytes
    >>> shared = ByteStrings([TokenBytes.greedy([b"a", b"b", b"ab"])])
    >>> stops = StopStrings(shared.vocabulary, ["bab"])
    >>> stops.first([0, 1, 2, 0]), stops.first([2, 2, 2]), stops.first([0, 0, 1])
    (3, 2, None)
    """

    def __init__(self, vocabulary: Vocabulary, until: Sequence[str]) -> None:
        strings = () if isinstance(until, str) else tuple(until)
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"until must be a sequence of non-empty strings, such as ['Question:'], got {until!r:.60}")
        if vocabulary.tokenizer is None:
            raise ValueError(
                f"until={list(strings)} needs a vocabulary with a tokenizer; the ids of this one stand for no text"
            )
        self.until = strings
        self._vocabulary = vocabulary
        self._bytes = _bytes_of_ids(vocabulary)
        self._needles = [string.encode() for string in strings]
        self._longest = max(map(len, self._needles))

    def first(self, ids: Sequence[int], *, after: int = 0) -> int | None:
        """How many of `ids` it takes to contain a string; None if all do not. It is known to take more than `after`."""
        return self._first_decoded(ids, after) if self._bytes is None else self._first_bytes(self._bytes, ids, after)

    def _first_bytes(self, table: Sequence[bytes], ids: Sequence[int], after: int) -> int | None:
        start, before = after, 0
        while start > 0 and before < self._longest - 1:
            start -= 1
            before += len(table[ids[start]])
        pieces = [table[token] for token in ids[start:]]
        data = b"".join(pieces)
        ends = [data.find(needle) + len(needle) for needle in self._needles if needle in data]
        if not ends:
            return None
        return start + 1 + bisect_left(list(accumulate(map(len, pieces))), min(ends))

    def _first_decoded(self, ids: Sequence[int], after: int) -> int | None:
        width = self._longest + _MARGIN
        for count in range(after + 1, len(ids) + 1):
            text = self._vocabulary.decode(ids[max(0, count - width) : count])
            if any(string in text for string in self.until):
                return count
        return None


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first of the strings.

    >>> cut("7. Question: 8. Answer:", ["Answer:", "Question:"])
    '7. '
    """
    return text[: min((text.find(string) for string in until if string in text), default=len(text))]


def lengths_of(tokens: Tensor, eos: Sequence[int], stops: StopStrings | None) -> Tensor:
    """(N,) tokens of rows (N, T), -1 where none was written, up to the first end: an id of `eos`, or a stop string."""
    written = (tokens >= 0).sum(1)
    if eos:
        is_end = torch.isin(tokens, torch.tensor(tuple(eos), dtype=torch.int64))
        first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
        written = torch.minimum(first, written)
    if stops is None:
        return written
    rows = zip(tokens.tolist(), written.tolist(), strict=True)
    found = [(stops.first(row[:length]), length) for row, length in rows]
    return torch.tensor([length if end is None else end for end, length in found], dtype=torch.int64)


class Watch:
    """Which rows of a batch have ended, learnt while they are written.

    On a processor after every token; on an accelerator once in `STEPS_BETWEEN_COMPACTIONS` tokens a row.

    Attributes
    ----------
    alive
        (N,) rows that are not known to have ended.
    """

    def __init__(self, vocabulary: Vocabulary, stops: StopStrings | None, rows: int) -> None:
        self.alive = np.ones(rows, dtype=bool)
        self._eos = np.array(vocabulary.eos, dtype=np.int64)
        self._stops = stops
        self._ids: list[list[int]] = [[] for _ in range(rows)] if stops is not None else []
        self._unseen: list[tuple[np.ndarray, Tensor]] = []
        self._count, self._alive = 0, rows

    def see(self, rows: np.ndarray, tokens: Tensor) -> np.ndarray:
        """Note `tokens` (B,) of `rows` (B,), in the order of each row; the rows that are now found to have ended."""
        if not len(self._eos) and self._stops is None:
            return _NONE
        self._unseen.append((rows, tokens))
        self._count += len(rows)
        if not tokens.is_cpu and self._count < STEPS_BETWEEN_COMPACTIONS * self._alive:
            return _NONE
        numbers = np.concatenate([own for own, _ in self._unseen])
        values = torch.cat([own.to(tokens.device) for _, own in self._unseen]).cpu().numpy()
        self._unseen, self._count = [], 0
        ended = np.isin(values, self._eos)
        if self._stops is not None:
            ended |= np.isin(numbers, self._stopped(self._stops, numbers.tolist(), values.tolist()))
        found = np.unique(numbers[ended & self.alive[numbers]])
        self.alive[found] = False
        self._alive -= len(found)
        return found

    def _stopped(self, stops: StopStrings, rows: list[int], tokens: list[int]) -> list[int]:
        before: dict[int, int] = {}
        for row, token in zip(rows, tokens, strict=True):
            before.setdefault(row, len(self._ids[row]))
            self._ids[row].append(token)
        return [row for row, after in before.items() if stops.first(self._ids[row], after=after) is not None]


# Reading a table takes a second for 150,000 ids, so it is kept as long as its tokenizer.
_tables: WeakKeyDictionary[Any, dict[Vocabulary, list[bytes] | None]] = WeakKeyDictionary()


def _bytes_of_ids(vocabulary: Vocabulary) -> list[bytes] | None:
    """(V,) what each id adds to a text, as bytes; None for a tokenizer whose bytes cannot be read."""
    try:
        known = _tables.setdefault(vocabulary.tokenizer, {})
    except TypeError:  # an object that cannot be referred to weakly
        known = {}
    if vocabulary not in known:
        known[vocabulary] = _read(vocabulary)
    return known[vocabulary]


def _read(vocabulary: Vocabulary) -> list[bytes] | None:
    from me_stats.tokenizer_bytes import read_tokenizer
    from me_stats.vocabulary_map import ByteStrings

    if isinstance(vocabulary.tokenizer, ByteStrings):
        return [*vocabulary.tokenizer.strings, *(b"" for _ in vocabulary.eos)]
    try:
        table = read_tokenizer(vocabulary, drop_normalizer=True)
    except ValueError:
        return None
    unused = set(table.unused)
    return [
        string if string is not None else b"" if token in unused else vocabulary.decode([token]).encode()
        for token, string in enumerate(table.strings)
    ]
