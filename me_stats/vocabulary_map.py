"""Token ids as the bytes that they stand for: what models with different tokenizers have in common.

`TokenBytes` is one tokenizer: a table from ids to bytes, the role of each id, and the one way in which it reads given
bytes. `ByteStrings` is the alphabet that several tokenizers share: the byte strings of all of them, and one end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

from me_stats.vocabulary import Vocabulary

Tokenize = Callable[[bytes], Sequence[int]]
Entry = tuple[bytes, str]


class Role(IntEnum):
    """What a token id is for."""

    ORDINARY = 0  #: stands for bytes
    END = 1  #: ends a sequence: an id of `Vocabulary.eos`, however it is spelled
    CONTROL = 2  #: a token that no text contains: begin of sequence, turn markers, padding
    UNUSED = 3  #: a row of the logits that no token has


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token id, and how the tokenizer reads bytes.

    Two tables are equal when bytes, roles, prefix and names agree; the reading rule itself is not compared.

    Parameters
    ----------
    strings
        (V,) the bytes of each id; None where it has none.
    eos
        Ids that end a sequence, by role. They have no bytes, even where their spelling is text.
    unused
        Ids that stand for nothing: padded rows, and holes in the table.
    prefix
        Bytes that the tokenizer reads before every text: a space for most Llama-like ones.
    tokenize
        The canonical tokenisation, bytes → ids: a function of the bytes alone, for every byte string. None for a
        table without a reading rule, which can be counted and compared but not aligned.
    names
        (V,) a name for each id that has bytes, where ids shall be matched by name; see `ByteStrings`.

    Raises
    ------
    ValueError
        For ids outside the table, an end or an unused id with bytes, an id whose bytes are empty, or one with bytes
        and no name among `names`.

    Examples
    --------
    >>> table = TokenBytes.greedy([b"a", b"b", b"ab", None], eos=(3,))
    >>> table.encode(b"abba")
    (2, 1, 0)
    >>> table.bytes_of((2, 1, 0))
    b'abba'
    >>> [role.name for role in table.roles]
    ['ORDINARY', 'ORDINARY', 'ORDINARY', 'END']
    """

    strings: tuple[bytes | None, ...]
    eos: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    prefix: bytes = b""
    tokenize: Tokenize | None = field(default=None, compare=False, repr=False)
    names: tuple[str | None, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strings", tuple(self.strings))
        for name in ("eos", "unused"):
            ids = tuple(sorted({int(token) for token in getattr(self, name)}))
            object.__setattr__(self, name, ids)
            if ids and not 0 <= ids[0] <= ids[-1] < len(self.strings):
                raise ValueError(f"{name} ids must lie in 0..{len(self.strings) - 1}, got {ids}")
            written = [token for token in ids if self.strings[token] is not None]
            if written:
                raise ValueError(
                    f"{name} has id {written[0]}, which stands for {self.strings[written[0]]!r}; give None"
                )
        if any(string == b"" for string in self.strings):
            raise ValueError(f"id {self.strings.index(b'')} stands for no bytes at all; give None for a control token")
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != len(self.strings):
                raise ValueError(f"names has {len(self.names)} entries for {len(self.strings)} ids")
            for token, (string, spelled) in enumerate(zip(self.strings, self.names, strict=True)):
                if string is not None and spelled is None:
                    raise ValueError(f"id {token} stands for {string!r:.60} and has no name")

    @classmethod
    def greedy(cls, strings: Iterable[bytes | None], *, eos: Sequence[int] = ()) -> TokenBytes:
        """A table that reads the longest token first, and of equal ones the first; for toys and tests.

        A byte at which no token starts is not read.
        """
        table = tuple(strings)
        known: dict[bytes, int] = {}
        for token, string in enumerate(table):
            if string is not None:
                known.setdefault(string, token)
        return cls(table, tuple(eos), tokenize=_Greedy(known))

    @property
    def size(self) -> int:
        """V, the number of ids."""
        return len(self.strings)

    @property
    def roles(self) -> list[Role]:
        """(V,) the role of each id."""
        roles = [Role.CONTROL if string is None else Role.ORDINARY for string in self.strings]
        for role, ids in ((Role.END, self.eos), (Role.UNUSED, self.unused)):
            for token in ids:
                roles[token] = role
        return roles

    @property
    def unread_bytes(self) -> bytes:
        """Byte values that no token spells alone. The model cannot read them: they are left out of its history."""
        known = {string for string in self.strings if string is not None and len(string) == 1}
        return bytes(value for value in range(256) if bytes([value]) not in known)

    @property
    def fingerprint(self) -> str:
        """A hash of bytes, roles, prefix and names."""
        names = () if self.names is None else (b"names", *(None if n is None else n.encode() for n in self.names))
        return _digest([*self.strings, b"eos", repr((self.eos, self.unused)).encode(), self.prefix, *names])

    @property
    def entries(self) -> list[Entry | None]:
        """(V,) what ids are matched by: bytes and name; the name is empty without `names`."""
        names = ("",) * self.size if self.names is None else self.names
        return [
            None if string is None else (string, name or "") for string, name in zip(self.strings, names, strict=True)
        ]

    def named(self, names: Sequence[str | None]) -> TokenBytes:
        """The same table with a name (V,) for each id."""
        return replace(self, names=tuple(names))

    def encode(self, history: bytes) -> tuple[int, ...]:
        """The canonical tokenisation of `history`; ValueError for a table without a reading rule."""
        return self.encode_within(self.prefix + history)

    def encode_within(self, string: bytes) -> tuple[int, ...]:
        """The tokenisation of bytes that do not begin a text, so without `prefix`."""
        if self.tokenize is None:
            raise ValueError(
                "this table has bytes but no reading rule, so no history can be read; "
                "make it from a model's fast tokenizer (me_stats.tokenizer_bytes.read_tokenizer)"
            )
        return tuple(self.tokenize(string))

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, joined; ids without bytes add none."""
        return b"".join(self.strings[token] or b"" for token in ids)


class ByteStrings:
    """The alphabet that several tokenizers share: the byte strings of all, and one end of sequence.

    Strings are numbered by length and then by their bytes, so the numbers depend on the tables alone; the end comes
    last, and only where some table has one. A text has many spellings in these strings. All of them mean the same
    history, since a history is its bytes.

    Tables with `TokenBytes.names` are matched by name as well: ids share an entry only where bytes and names both
    agree, so equal bytes under other names split, which is what a union of token strings does. A history is its bytes
    all the same, and `Aligned` works unchanged.

    Parameters
    ----------
    tables
        One `TokenBytes` per tokenizer; all with names or none.

    Attributes
    ----------
    strings
        The distinct byte strings, sorted; with names a string stands once for each name.
    names
        The name of each entry; None without names.
    vocabulary
        The `Vocabulary` over them: what an ensemble of aligned models writes. Its tokenizer is this object.

    Examples
    --------
    >>> shared = ByteStrings([TokenBytes.greedy([b"b", b"ab", None], eos=(2,)), TokenBytes.greedy([b"a", b"b"])])
    >>> shared.strings, shared.vocabulary.eos
    ((b'a', b'b', b'ab'), (3,))
    >>> shared.vocabulary.encode("abba")
    (2, 1, 0)
    >>> shared.decode([2, 1, 0]), shared.decode([0, 1, 1, 0])
    ('abba', 'abba')
    """

    def __init__(self, tables: Sequence[TokenBytes]) -> None:
        if not tables:
            raise ValueError("tables must hold at least one TokenBytes")
        self.tables = tuple(tables)
        if len({table.names is None for table in self.tables}) > 1:
            raise ValueError("some tables have names and some have none; give names to all, or to none")
        distinct = {entry for table in self.tables for entry in table.entries if entry is not None}
        if not distinct:
            raise ValueError("no table has an id that stands for bytes")
        entries = sorted(distinct, key=lambda entry: (len(entry[0]), *entry))
        self.strings = tuple(string for string, _ in entries)
        self.names = None if self.tables[0].names is None else tuple(name for _, name in entries)
        self._index = {entry: number for number, entry in enumerate(entries)}
        self._by_vocabulary: dict[Vocabulary, TokenBytes] = {}
        # Of entries with the same bytes the first spells a text: reversed, it is the one that the dict keeps.
        self._greedy = _Greedy({string: number for number, string in reversed(list(enumerate(self.strings)))})
        ends = (len(self.strings),) if any(table.eos for table in self.tables) else ()
        names = () if self.names is None else (None, *(name.encode() for name in self.names))
        self.vocabulary = Vocabulary(
            len(self.strings) + len(ends), eos=ends, fingerprint=_digest([*self.strings, *names]), tokenizer=self
        )

    @classmethod
    def of(
        cls,
        models: Sequence[Any],
        *,
        drop_normalizer: bool = False,
        names: Callable[[Vocabulary, TokenBytes], Sequence[str | None]] | None = None,
    ) -> ByteStrings:
        """The alphabet of models with fast tokenizers.

        See `read_tokenizer` for `drop_normalizer`. `names`, such as those of `me_stats.vocabulary_names`, gives the
        names (V,) of a vocabulary's ids, to match ids by.
        """
        from me_stats.tokenizer_bytes import read_tokenizer

        vocabularies = list(dict.fromkeys(model.vocabulary for model in models))
        tables = [read_tokenizer(vocabulary, drop_normalizer=drop_normalizer) for vocabulary in vocabularies]
        if names is not None:
            tables = [table.named(names(own, table)) for own, table in zip(vocabularies, tables, strict=True)]
        shared = cls(tables)
        shared._by_vocabulary = dict(zip(vocabularies, tables, strict=True))
        return shared

    def table_of(self, vocabulary: Vocabulary) -> TokenBytes:
        """The table that `of` read from `vocabulary`; ValueError for another one."""
        if vocabulary not in self._by_vocabulary:
            raise ValueError(
                "the shared strings were not made from this model's vocabulary: make them from the models as they "
                "enter the ensemble, ByteStrings.of([a, b]), or give its table as token_bytes="
            )
        return self._by_vocabulary[vocabulary]

    def targets(self, table: TokenBytes) -> np.ndarray:
        """(V,) the shared id of each id of `table`, -1 for controls and unused rows."""
        end = self.vocabulary.eos[0] if self.vocabulary.eos else -1
        targets = np.full(table.size, -1, dtype=np.int64)
        for token, entry in enumerate(table.entries):
            if entry is not None:
                if entry not in self._index:
                    known = repr(entry[0]) + (f" named {entry[1]!r}" if entry[1] else "")
                    raise ValueError(f"the shared strings lack {known}: make them from this table too")
                targets[token] = self._index[entry]
        if table.eos and end < 0:
            raise ValueError(
                "the shared strings have no end of sequence, but this table has one: make them from it too"
            )
        targets[list(table.eos)] = end
        return targets

    def table(self) -> TokenBytes:
        """These strings as a tokenizer of their own, without names: what aligns a model over them with other strings.

        >>> names = (["a", "<b>"], ["a", "b"])
        >>> split = ByteStrings([TokenBytes.greedy([b"a", b"b"]).named(own) for own in names])
        >>> ByteStrings([split.table()]).targets(split.table()).tolist()
        [0, 1, 1]
        """
        ends = self.vocabulary.eos
        return TokenBytes((*self.strings, *(None for _ in ends)), eos=ends, tokenize=self._greedy)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of shared ids, joined; ValueError for the end, after which there is no text."""
        parts = []
        for token in ids:
            if not 0 <= token < len(self.strings):
                raise ValueError(
                    f"id {token} is not a byte string: a history has no end of sequence in it and only ids below "
                    f"{len(self.strings)} (rows without an end: Aligned(Endless(model), shared))"
                )
            parts.append(self.strings[token])
        return b"".join(parts)

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> list[int]:
        """One spelling of `text`, longest strings first; ValueError where a byte is in no string."""
        data = text.encode() if isinstance(text, str) else text
        ids = list(self._greedy(data))
        if self.bytes_of(ids) != data:
            missing = sorted(set(data) - set(b"".join(self.strings)))
            raise ValueError(f"the shared strings cannot spell {text!r:.60} (bytes without a string: {missing})")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of shared ids; the end is skipped, and bytes that are no UTF-8 show as U+FFFD."""
        kept = (token for token in ids if token not in self.vocabulary.eos)
        return self.bytes_of(kept).decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"ByteStrings({len(self.strings)} strings of {len(self.tables)} tables)"


class _Greedy:
    """Longest known string first; a byte at which none starts is passed over."""

    def __init__(self, known: dict[bytes, int]) -> None:
        self._known = known
        lengths: dict[int, set[int]] = {}
        for string in known:
            lengths.setdefault(string[0], set()).add(len(string))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def __call__(self, data: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(data):
            for length in self._lengths.get(data[place], ()):
                token = self._known.get(data[place : place + length])
                if token is not None:
                    ids.append(token)
                    place += length
                    break
            else:
                place += 1
        return ids


def _digest(parts: Iterable[bytes | None]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # The length in front keeps (b"a", b"b") and (b"ab",) apart.
        digest.update(b"-" if part is None else b"%d:%b" % (len(part), part))
    return digest.hexdigest()[:16]


def require_one_spelling(vocabulary: Vocabulary) -> None:
    """ValueError for a vocabulary of byte strings: a given text has many spellings in them, and no one probability.

    What was *written* string by string has a spelling of its own and can be scored.
    """
    if isinstance(vocabulary.tokenizer, ByteStrings):
        raise ValueError(
            "models of different vocabularies are mixed over byte strings, in which a given text has many spellings: "
            "it cannot be scored token by token. Give models over one vocabulary, or mix their laws of single bytes "
            "(me_stats.models.NextByte)"
        )
