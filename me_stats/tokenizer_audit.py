"""What goes wrong with a tokenizer when its tokens are exchanged as text, counted id by id.

A token that another model shall read has to survive "id → text → id". `audit_tokenizer` counts the ids that do not and
says why, `compare_strings` what several vocabularies share, `mass_at_stake` how much probability a model puts on given
ids along a text, and `canonical_runs` how often written ids are the tokenisation of their own text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch

from me_stats.models.base import Prefix, path_log_probs
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import Role, TokenBytes

_END_LIKE = ("</s>", "eos", "eot", "end")


@dataclass(frozen=True)
class TokenizerAudit:
    """One tokenizer, id by id.

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
    changed: tuple[int, ...]
    mis_decoded: tuple[int, ...]
    lost: tuple[int, ...]
    unread_bytes: bytes

    def shares(self) -> dict[str, float]:
        """Each kind of trouble as a share of the ids that have bytes."""
        ordinary = max(1, self.roles["ORDINARY"])
        kinds = ("same_bytes", "changed", "mis_decoded", "lost")
        return {kind: len(getattr(self, kind)) / ordinary for kind in kinds}


def audit_tokenizer(vocabulary: Vocabulary, table: TokenBytes) -> TokenizerAudit:
    """Count what `TokenizerAudit` lists; `table` is ``read_tokenizer(vocabulary)``. About 20 µs an id.

    Raises ValueError where table and vocabulary are of different sizes or the table has no reading rule.
    """
    if table.size != vocabulary.size:
        raise ValueError(f"the table has {table.size} ids and the vocabulary {vocabulary.size}; read it from this one")
    tokenizer = vocabulary.tokenizer
    times = Counter(string for string in table.strings if string is not None)
    written = [(token, string) for token, string in enumerate(table.strings) if string is not None]
    decoded = [tokenizer.decode([token]) for token, _ in written]
    returned = [tokenizer.encode(text, add_special_tokens=False) for text in decoded]
    roles = table.roles
    controls = [(token, _spelling(tokenizer, token)) for token, role in enumerate(roles) if role == Role.CONTROL]
    return TokenizerAudit(
        size=table.size,
        roles={role.name: roles.count(role) for role in Role},
        ends=tuple((token, _spelling(tokenizer, token)) for token in table.eos),
        end_like=tuple((token, name) for token, name in controls if any(hint in name.lower() for hint in _END_LIKE)),
        unused=table.unused,
        same_bytes=tuple(token for token, string in written if times[string] > 1),
        changed=tuple(token for token, string in written if not _reads_as(table, string, (token,))),
        mis_decoded=tuple(
            token for (token, string), text in zip(written, decoded, strict=True) if text.encode() != string
        ),
        lost=tuple(token for (token, _), back in zip(written, returned, strict=True) if list(back) != [token]),
        unread_bytes=table.unread_bytes,
    )


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
        By ordered pair (a, b): ids of a whose bytes b has too, and under no id of the same name. An exchange by name
        takes them for symbols that b lacks.
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
            name: {(string, symbols[name][token]) for token, string in enumerate(table.strings)}
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
        read = _plain(table, table.bytes_of(text))
        apart = [place for place, (a, b) in enumerate(zip(text, read, strict=False)) if a != b]
        departures.append(apart[0] if apart else -1)
    return CanonicalRuns(len(departures), departures.count(-1), tuple(departures))


def _plain(table: TokenBytes, data: bytes) -> tuple[int, ...]:
    """The tokenisation without the bytes that are put before every text: ids in the middle of one have none."""
    if table.tokenize is None:
        return table.encode(data)  # raises, with the remedy
    return tuple(table.tokenize(data))


def _reads_as(table: TokenBytes, string: bytes, ids: tuple[int, ...]) -> bool:
    return _plain(table, string) == ids


def _spelling(tokenizer: Any, token: int) -> str:
    """The token string as it stands in the file."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return str(tokenizer.convert_ids_to_tokens(token))
    return str(tokenizer.id_to_token(token))
