"""What goes wrong with a tokenizer when its tokens are exchanged as text, counted id by id.

A token that another model shall read has to survive "id → text → id". `audit_tokenizer` counts the ids that do not and
says why (`audit_table` what a vocabulary file alone can tell), `compare_strings` what several vocabularies share,
`exchange_names` by which names ids are commonly matched instead, `mass_at_stake` how much probability a model puts on
given ids along a text, and `canonical_runs` how often written ids are the tokenisation of their own text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch

from me_stats.models.base import Prefix, path_log_probs
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import Role, TokenBytes
from me_stats.vocabulary_names import spellings_of

_END_LIKE = ("</s>", "eos", "eot", "end")
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenizerAudit:
    """One tokenizer, id by id; what takes a reading rule is None for a table without one.

    Attributes
    ----------
    size
        V, the width of the law.
    roles
        Ids per role name.
    ends
        Ids that end a sequence, each with its spelling: more than one are aliases of one end.
    end_like
        Controls whose spelling says "end" and whose role does not: a model may write them to stop, and nothing stops.
    unused
        Rows of the law that no token has.
    same_bytes
        Ids that share their bytes with another id.
    changed
        Ids whose own bytes are read as other ids: they never occur in a text by themselves, so a round trip through
        exact bytes loses them.
    mis_decoded
        Ids that ``tokenizer.decode([id])`` does not turn into their bytes: halves of characters, stripped spaces.
    unkept
        Ids whose bytes, read again, spell other bytes, those in `unread_bytes` aside: exactness is lost. There is none
        in a sound table.
    lost
        Ids that do not return from ``encode(decode([id]))``: what an exchange of decoded text loses.
    unread_bytes
        Byte values that no token spells.
    """

    size: int
    roles: Mapping[str, int]
    ends: tuple[tuple[int, str], ...]
    end_like: tuple[tuple[int, str], ...]
    unused: tuple[int, ...]
    same_bytes: tuple[int, ...]
    unread_bytes: bytes
    changed: tuple[int, ...] | None = None
    unkept: tuple[int, ...] | None = None
    mis_decoded: tuple[int, ...] | None = None
    lost: tuple[int, ...] | None = None

    def counts(self) -> dict[str, int | None]:
        """Ids of each kind of trouble; None where the table cannot tell."""
        found = {kind: getattr(self, kind) for kind in ("same_bytes", "changed", "mis_decoded", "lost")}
        return {kind: None if ids is None else len(ids) for kind, ids in found.items()}

    def shares(self) -> dict[str, float]:
        """Each kind of trouble that is known, as a share of the ids that have bytes."""
        ordinary = max(1, self.roles["ORDINARY"])
        return {kind: count / ordinary for kind, count in self.counts().items() if count is not None}


def audit_table(table: TokenBytes, spellings: Sequence[str | None]) -> TokenizerAudit:
    """What a table tells without a tokenizer; `spellings` are its token strings, None where a file has none.

    >>> audit = audit_table(TokenBytes((b"a", b"a", None, None), eos=(2,)), ["a", "<0x61>", "</s>", "<end>"])
    >>> audit.ends, audit.end_like, audit.same_bytes, audit.lost
    (((2, '</s>'),), ((3, '<end>'),), (0, 1), None)
    """
    if len(spellings) != table.size:
        raise ValueError(f"spellings must have one entry for each of {table.size} ids, got {len(spellings)}")
    roles = table.roles
    times = Counter(string for string in table.strings if string is not None)
    named = [(token, spellings[token] or f"id {token}") for token in range(table.size) if roles[token] != Role.ORDINARY]
    controls = [(token, name) for token, name in named if roles[token] == Role.CONTROL]
    return TokenizerAudit(
        size=table.size,
        roles={role.name: roles.count(role) for role in Role},
        ends=tuple((token, name) for token, name in named if roles[token] == Role.END),
        end_like=tuple((token, name) for token, name in controls if any(hint in name.lower() for hint in _END_LIKE)),
        unused=table.unused,
        same_bytes=tuple(
            token for token, string in enumerate(table.strings) if string is not None and times[string] > 1
        ),
        unread_bytes=table.unread_bytes,
    )


def audit_tokenizer(vocabulary: Vocabulary, table: TokenBytes) -> TokenizerAudit:
    """Count what `TokenizerAudit` lists; `table` is ``read_tokenizer(vocabulary)``. About 20 µs an id.

    Raises ValueError where table and vocabulary are of different sizes or the table has no reading rule.
    """
    if table.size != vocabulary.size:
        raise ValueError(f"the table has {table.size} ids and the vocabulary {vocabulary.size}; read it from this one")
    tokenizer = vocabulary.tokenizer
    written = [(token, string) for token, string in enumerate(table.strings) if string is not None]
    read = [(token, string, table.encode_within(string)) for token, string in written]
    decoded = [(token, string, tokenizer.decode([token])) for token, string in written]
    unread = table.unread_bytes
    return replace(
        audit_table(table, spellings_of(tokenizer, table.size)),
        changed=tuple(token for token, _, ids in read if ids != (token,)),
        unkept=tuple(token for token, string, ids in read if table.bytes_of(ids) != string.translate(None, unread)),
        mis_decoded=tuple(token for token, string, text in decoded if text.encode() != string),
        lost=tuple(
            token for token, _, text in decoded if list(tokenizer.encode(text, add_special_tokens=False)) != [token]
        ),
    )


def exchange_losses(
    table: TokenBytes, names: Sequence[str | None], encode: Callable[[str], Sequence[int]]
) -> tuple[int, ...]:
    """Ids that do not return from ``encode(text of their name)``, ``<0xNN>`` read as a character.

    >>> encode = lambda text: [".".index(c) for c in text]
    >>> exchange_losses(TokenBytes((b".", None)), ["<0x2E>", "</s>"], encode)
    ()
    """
    return tuple(
        token
        for token, name in enumerate(names)
        if name is not None and table.strings[token] is not None and list(encode(exchange_text(name))) != [token]
    )


def exchange_text(name: str) -> str:
    """The text that a name of `exchange_names` is re-encoded from.

    >>> exchange_text("<0x0A>"), exchange_text(" the")
    ('\\n', ' the')
    """
    found = _BYTE_NAME.fullmatch(name)
    return chr(int(found[1], 16)) if found else name


@dataclass(frozen=True)
class StringComparison:
    """The byte strings of several vocabularies.

    Attributes
    ----------
    strings
        Distinct strings of each vocabulary, by name.
    shared
        Strings that both of a pair have, by pair of names.
    everywhere, union
        Strings that all have, and that any has.
    split
        By ordered pair (a, b): ids of a whose bytes b writes too, and under another name. An exchange by name takes
        them for other symbols. A byte token of b that its own texts never hold does not count as a way to write.
    """

    strings: Mapping[str, int]
    shared: Mapping[tuple[str, str], int]
    everywhere: int
    union: int
    split: Mapping[tuple[str, str], tuple[int, ...]]


def compare_strings(
    tables: Mapping[str, TokenBytes], *, symbols: Mapping[str, Sequence[str | None]] | None = None
) -> StringComparison:
    """Which byte strings several tables share; with `symbols` (a name for every id) also which ids split.

    `symbols` are the names by which ids would be matched: token strings as they stand in the files, or what some code
    makes of them.

    >>> a, b = TokenBytes((b" a", b"b")), TokenBytes((b"b", b" a", b"c"))
    >>> found = compare_strings({"a": a, "b": b}, symbols={"a": ["Ġa", "b"], "b": ["b", "▁a", "c"]})
    >>> found.shared, found.union, found.split
    ({('a', 'b'): 2}, 3, {('a', 'b'): (0,), ('b', 'a'): (1,)})
    """
    if not tables:
        raise ValueError("tables must hold at least one TokenBytes")
    for name, own in (symbols or {}).items():
        if name in tables and len(own) < tables[name].size:
            raise ValueError(f"symbols[{name!r}] has {len(own)} names for {tables[name].size} ids")
    known = {name: {string for string in table.strings if string is not None} for name, table in tables.items()}
    split = {}
    if symbols is not None:
        pairs = {
            name: {(table.strings[token], symbols[name][token]) for token in _written(table, symbols[name])}
            for name, table in tables.items()
        }
        for a, b in permutations(tables, 2):
            split[a, b] = tuple(
                token
                for token, string in enumerate(tables[a].strings)
                if string in known[b] and (string, symbols[a][token]) not in pairs[b]
            )
    return StringComparison(
        strings={name: len(own) for name, own in known.items()},
        shared={(a, b): len(known[a] & known[b]) for a, b in combinations(tables, 2)},
        everywhere=len(set.intersection(*known.values())),
        union=len(set.union(*known.values())),
        split=split,
    )


@dataclass(frozen=True)
class MassAtStake:
    """Probability on a set of ids along a text: `mean` and `largest` over `n` next-token laws, `ids` ids in the set."""

    name: str
    mean: float
    largest: float
    n: int
    ids: int


def mass_at_stake(
    model: Any, prompts: Sequence[Prefix], tokens: Sequence[Prefix], ids: Mapping[str, Sequence[int]]
) -> tuple[MassAtStake, ...]:
    """How much probability `model` puts on each named set of its `ids`, along given continuations.

    >>> from me_stats.models import TableModel
    >>> model = TableModel([[0.5, 0.3, 0.2]], order=0)
    >>> [stake] = mass_at_stake(model, [()], [(0, 0)], {"odd": [1]})
    >>> round(stake.mean, 6), stake.n
    (0.3, 2)
    """
    size = model.vocabulary.size
    sets = {name: torch.as_tensor(sorted(set(chosen)), dtype=torch.int64) for name, chosen in ids.items()}
    for name, chosen in sets.items():
        if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < size:
            raise ValueError(f"ids[{name!r}] must lie in 0..{size - 1}, got {int(chosen[0])}..{int(chosen[-1])}")
    masses: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    for laws in path_log_probs(model, prompts, tokens):
        for name, chosen in sets.items():
            mass = laws[:, chosen.to(laws.device)].double().exp().sum(-1)
            masses[name].append(mass.cpu().numpy())
    if not any(map(len, tokens)):
        raise ValueError("tokens must hold at least one token, or there is no law to look at")
    joined = {name: np.concatenate(parts) for name, parts in masses.items()}
    return tuple(
        MassAtStake(name, float(mass.mean()), float(mass.max()), len(mass), len(sets[name]))
        for name, mass in joined.items()
    )


@dataclass(frozen=True)
class CanonicalRuns:
    """How many rows of ids are the tokenisation of their own bytes.

    Attributes
    ----------
    runs, canonical
        Rows looked at, and those that are canonical to their end.
    departures
        For each row the first position where it leaves the canonical tokenisation, or -1.
    """

    runs: int
    canonical: int
    departures: tuple[int, ...]

    @property
    def non_canonical_rate(self) -> float:
        """Share of rows that are not canonical."""
        return 1 - self.canonical / self.runs


def canonical_runs(table: TokenBytes, rows: Sequence[Prefix]) -> CanonicalRuns:
    """Compare rows of a tokenizer's own ids with the canonical tokenisation of their bytes, prefix space aside.

    Ids without bytes end a row's text, so a row is read up to the first of them.

    >>> table = TokenBytes.greedy([b"a", b"b", b"ab"])
    >>> canonical_runs(table, [(2, 0), (0, 1), (1, 0, 1)]).departures
    (-1, 0, 1)
    """
    if not rows:
        raise ValueError("rows must hold at least one row of ids")
    departures = []
    for row in rows:
        text = tuple(row)
        silent = [place for place, token in enumerate(text) if table.strings[token] is None]
        text = text[: silent[0]] if silent else text
        read = table.encode_within(table.bytes_of(text))
        apart = [place for place, (a, b) in enumerate(zip(text, read, strict=False)) if a != b]
        departures.append(apart[0] if apart else -1)
    return CanonicalRuns(len(departures), departures.count(-1), tuple(departures))


def _written(table: TokenBytes, names: Sequence[str | None]) -> set[int]:
    """Ids that stand in texts: of ids with equal bytes those that the tokenizer reads, or else no ``<0xNN>``."""
    times = Counter(string for string in table.strings if string is not None)
    ordinary = {token for token, string in enumerate(table.strings) if string is not None}

    def idle(token: int) -> bool:
        string, name = table.strings[token], names[token]
        if string is None or times[string] == 1:
            return False
        if table.tokenize is not None:
            return table.encode_within(string) != (token,)
        return name is not None and _BYTE_NAME.fullmatch(name) is not None

    kept = {token for token in ordinary if not idle(token)}
    # Where none of several equal ids is read, each may be written.
    strings = {table.strings[token] for token in kept}
    return kept | {token for token in ordinary if table.strings[token] not in strings}
