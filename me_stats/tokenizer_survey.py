"""Several tokenizers side by side: each one's audit, what pairs share, and how much probability hangs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from me_stats.tokenizer_audit import (
    TokenizerAudit,
    audit_table,
    audit_tokenizer,
    compare_strings,
    exchange_losses,
    mass_at_stake,
)
from me_stats.tokenizer_sources import OpenTokenizer
from me_stats.vocabulary_map import ByteStrings, Role
from me_stats.vocabulary_names import exchange_names

Progress = Callable[[float, str], None]
_WINDOW = 128  # laws over 262,144 tokens take 1 MB each


class Survey:
    """Audits and comparisons of opened tokenizers, as plain numbers for tables and records.

    Parameters
    ----------
    tokenizers
        Those to audit.
    against
        Others to compare them with; without any, all pairs of `tokenizers` are compared.
    progress
        Called with the share that is done and a note.
    """

    def __init__(
        self,
        tokenizers: Sequence[OpenTokenizer],
        against: Sequence[OpenTokenizer] = (),
        *,
        progress: Progress = lambda fraction, note: None,
    ) -> None:
        self.tokenizers = {one.name: one for one in tokenizers}
        self.known = self.tokenizers | {one.name: one for one in against}
        if len(self.known) < len(tokenizers) + len(against):
            names = [one.name for one in (*tokenizers, *against)]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"tokenizers has two that are called {twice!r}; rename a file or leave one out")
        self.pairs = list(combinations(self.tokenizers, 2))
        if against:
            self.pairs = [(a, other.name) for a in self.tokenizers for other in against]
        self.names = {name: exchange_names(one.table, one.spellings) for name, one in self.known.items()}
        self.audits: dict[str, TokenizerAudit] = {}
        self.losses: dict[str, tuple[int, ...] | None] = {}
        for done, (name, one) in enumerate(self.tokenizers.items()):
            progress(done / (len(self.tokenizers) + 1), f"audit of {name}")
            if one.vocabulary is None:
                self.audits[name], self.losses[name] = audit_table(one.table, one.spellings), None
            else:
                self.audits[name] = audit_tokenizer(one.vocabulary, one.table)
                self.losses[name] = exchange_losses(one.table, self.names[name], one.encode)
        progress(len(self.tokenizers) / (len(self.tokenizers) + 1), "strings in common")
        tables = {name: one.table for name, one in self.known.items()}
        self.comparison = compare_strings(tables, symbols=self.names) if tables else None

    def tokenizer_rows(self) -> dict[str, dict[str, Any]]:
        """One row of numbers for each audited tokenizer, by name."""
        return {name: self._row(one) for name, one in self.tokenizers.items()}

    def pair_rows(self) -> list[dict[str, Any]]:
        """One row for each compared pair: strings of one, of the other, of both, and ids that split by name."""
        if self.comparison is None:
            return []
        rows = []
        found = self.comparison
        for a, b in self.pairs:
            shared = found.shared[(a, b) if (a, b) in found.shared else (b, a)]
            row = {"a": a, "b": b, "shared": shared}
            row |= {"only_a": found.strings[a] - shared, "only_b": found.strings[b] - shared}
            row["union"] = found.strings[a] + found.strings[b] - shared
            row |= {"split_a": len(found.split[a, b]), "split_b": len(found.split[b, a])}
            rows.append(row)
        return rows

    def union_row(self) -> dict[str, Any]:
        """All tokenizers together: the alphabet that an exact exchange needs, with its fingerprint."""
        if self.comparison is None:
            return {}
        shared = ByteStrings([one.table for one in self.known.values()])
        return {
            "everywhere": self.comparison.everywhere,
            "union": self.comparison.union,
            "size": shared.vocabulary.size,
            "fingerprint": shared.vocabulary.fingerprint,
        }

    def stakes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The sets of ids of a tokenizer whose probability an exchange puts at stake, by what is wrong with them."""
        audit, one = self.audits[name], self.tokenizers[name]
        roles = one.table.roles
        sets: dict[str, tuple[int, ...] | None] = {
            "ends": tuple(token for token, _ in audit.ends),
            "controls": tuple(token for token, role in enumerate(roles) if role == Role.CONTROL),
            "lost by decode and encode": audit.lost,
            "lost by the exchange of names": self.losses[name],
        }
        for a, b in self.pairs:
            if name in (a, b) and self.comparison is not None:
                other = b if name == a else a
                theirs = set(self.known[other].table.strings)
                mine = enumerate(one.table.strings)
                sets[f"no such string in {other}"] = tuple(
                    token for token, string in mine if string is not None and string not in theirs
                )
                sets[f"another name in {other}"] = self.comparison.split[name, other]
        return {kind: ids for kind, ids in sets.items() if ids is not None}

    def mass_rows(self, name: str, model: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Probability that `model`, whose tokenizer is `name`, puts on each set of `stakes` along texts."""
        sets = self.stakes(name)
        prompts, paths = windows(self.tokenizers[name], texts)
        size = self.tokenizers[name].table.size
        return [
            {
                "model": name,
                "set": found.name,
                "ids": found.ids,
                "share": found.ids / size,
                "mean": found.mean,
                "largest": found.largest,
                "n": found.n,
            }
            for found in mass_at_stake(model, prompts, paths, sets)
        ]

    def _row(self, one: OpenTokenizer) -> dict[str, Any]:
        audit, losses = self.audits[one.name], self.losses[one.name]
        return {
            "size": audit.size,
            "padded": one.padded,
            "roles": dict(audit.roles),
            "ends": list(audit.ends),
            "end_like": list(audit.end_like),
            "counts": audit.counts() | {"exchange": None if losses is None else len(losses)},
            "shares": audit.shares() | ({} if losses is None else {"exchange": len(losses) / _ordinary(audit)}),
            "unkept": None if audit.unkept is None else len(audit.unkept),
            "unread_bytes": list(audit.unread_bytes),
            # A file does not say what its tokenizer puts before a text.
            "prefix": None if one.vocabulary is None else one.table.prefix.decode(),
            "normaliser": one.normaliser,
            "byte_level": one.byte_level,
            "fingerprint": one.table.fingerprint,
            "source": one.source,
        }


def windows(
    one: OpenTokenizer, texts: Sequence[str], *, tokens: int = _WINDOW
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Texts as (prompts, continuations) of at most `tokens` ids; each starts afresh, after the begin of sequence.

    Where there is no such id the end of one serves; without either, the first token of a window is only context.
    ValueError where nothing is left.
    """
    assert one.vocabulary is not None
    named = [getattr(one.vocabulary.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    begin = next((token for token in (*named, *one.vocabulary.eos) if token is not None), None)
    prompts, paths = [], []
    for text in texts:
        ids = tuple(one.encode(text))
        for start in range(0, len(ids), tokens):
            window = ids[start : start + tokens]
            prompt, path = ((int(begin),), window) if begin is not None else (window[:1], window[1:])
            if path:
                prompts.append(prompt)
                paths.append(path)
    if not paths:
        raise ValueError(f"the text is empty for {one.name}: it must hold at least two tokens")
    return prompts, paths


def _ordinary(audit: TokenizerAudit) -> int:
    return max(1, audit.roles["ORDINARY"])
