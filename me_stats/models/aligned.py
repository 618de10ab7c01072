"""A model of token ids as a law over byte strings, so that models with different tokenizers can be mixed.

Each component's law is pushed forward along "id → its bytes". That is a map of one law, made before the mixture, so
CE = ME holds as it does for any transform of a component; nothing is scored by a first subtoken, and no symbol is
split; `FirstSubtoken` and `TokenBytes.names` are there to price the aligners that do so. What components share is the
history in bytes. Each reads it in its own canonical tokenisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import (
    Cost,
    LanguageModel,
    Prefix,
    checked_laws,
    require_language_model,
)
from me_stats.models.ensemble import log_add
from me_stats.models.moving import MovingRows, feed
from me_stats.models.shared import open_lookback
from me_stats.models.subtokens import FirstSubtoken
from me_stats.models.warped import Warp, Warped
from me_stats.vocabulary_map import ByteStrings, TokenBytes

_TOGETHER = 1 << 26  # probabilities of paths that are read side by side


class Aligned(LanguageModel):
    r"""The law over byte strings, :math:`P(s \mid h) = \sum_{x:\, bytes(x) = s} P(x \mid T(h)) \,/\, (1 - D(h))`.

    h is the history as bytes and T the model's canonical tokenisation, a function of these bytes alone: every spelling
    of one history in shared ids gives one law. Ids with equal bytes add up. The end of sequence is shared by role: all
    of a model's end ids become the one shared end. D is the mass of ids that stand for nothing (controls, such as a
    begin-of-turn marker, and unused rows): no shared string can carry it, so it is taken out and the rest renormalised
    within this component; `dropped_mass` reports it.

    What a model has to read besides the shared history (begin of sequence, a chat template, a system prompt) goes
    inside, in its own tokens: ``Aligned(Conditioned(gemma, [2]), shared)``. So do transforms of its own law:
    ``Aligned(Warped(model, TopK(10)), shared)`` keeps ten ids, at most ten strings.

    A byte that the model's tokenizer cannot spell (SmolLM2 lacks 21 byte values, none of them in ordinary text) is left
    out of what it reads, whoever wrote it: a prompt, or another component. With `read_tokenizer` the law after
    ``a\x04b`` is the law after ``ab``. It is a function of the prefix, so CE = ME holds. A UserWarning says so once per
    model; `unread` tells which bytes of a history these are.

    Parameters
    ----------
    model
        Any LanguageModel.
    shared
        The alphabet, made from all components: ``ByteStrings.of([a, b])``.
    token_bytes
        The model's table, for a model without a fast tokenizer; default the one that `shared` read.

    Raises
    ------
    ValueError
        For a model that `shared` was not made from, a table that does not fit the model, a history that holds the
        end of sequence, a history that the table's reading rule does not give back, and a law with all its mass on
        controls.

    Examples
    --------
    >>> from me_stats.models.toy import TableModel
    >>> table = TokenBytes.greedy([b"a", b"ab", b"b", b"a"])
    >>> shared = ByteStrings([table])
    >>> model = Aligned(TableModel([[0.4, 0.3, 0.2, 0.1]], order=0), shared, token_bytes=table)
    >>> shared.strings, [round(p, 9) for p in model.log_probs([()]).exp()[0].tolist()]
    ((b'a', b'b', b'ab'), [0.5, 0.2, 0.3])
    """

    def __init__(self, model: Any, shared: ByteStrings, *, token_bytes: TokenBytes | None = None) -> None:
        require_language_model(model)
        if not isinstance(shared, ByteStrings):
            raise TypeError(f"shared must be a ByteStrings, such as ByteStrings.of([a, b]), got {shared!r:.60}")
        table = shared.table_of(model.vocabulary) if token_bytes is None else token_bytes
        if table.size != model.vocabulary.size:
            raise ValueError(f"token_bytes has {table.size} ids, but {model!r} has {model.vocabulary.size}")
        if table.eos != model.vocabulary.eos:
            raise ValueError(f"token_bytes ends at ids {table.eos}, but {model!r} ends at {model.vocabulary.eos}")
        self.model = model
        self.shared = shared
        self.token_bytes = table
        self.vocabulary = shared.vocabulary
        self.push = PushForward(shared.targets(table), self.vocabulary.size)
        self._unread = table.unread_bytes
        self._warned = False
        table.encode(b"")  # a table without a reading rule is of no use here

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return self.push(self._own_laws(prefixes))

    def dropped_mass(self, prefixes: Sequence[Prefix]) -> Tensor:
        """D (B,): probability of controls and unused rows after each prefix, which `log_probs` leaves out."""
        return self.push.dropped(self._own_laws(prefixes))

    def warped(self, *warps: Warp) -> Aligned:
        """The same alignment of the transformed model: the warps see the law over its own ids, before any string."""
        inside = copy(self)
        inside.model = Warped(self.model, *warps)
        return inside

    @cached_property
    def first_subtoken(self) -> FirstSubtoken:
        """What scores the strings that this model has no id for, where an aligner wants them scored."""
        return FirstSubtoken(self.token_bytes, self.shared)

    def read(self, history: bytes) -> tuple[int, ...]:
        """T(h): the model's own ids of a history."""
        ids = self.token_bytes.encode(history)
        if self.token_bytes.bytes_of(ids) != self.token_bytes.prefix + history:
            self._report(history, ids)
        return ids

    def written(self, token: int) -> bytes:
        """The bytes that a generated token adds to the history.

        The end adds none: a draft may run past it, and the law that is read behind it, a sampler throws away.
        """
        return b"" if token in self.vocabulary.eos else self.shared.strings[token]

    def unread(self, history: bytes) -> bytes:
        """The byte values of a history that the model cannot read, sorted.

        >>> from me_stats.models.toy import TableModel
        >>> table = TokenBytes.greedy([b"a", b"b"])
        >>> Aligned(TableModel([[0.5, 0.5]], order=0), ByteStrings([table]), token_bytes=table).unread(b"\\xffab\\x04")
        b'\\x04\\xff'
        """
        return bytes(sorted(set(history) & set(self._unread)))

    def _report(self, history: bytes, ids: Prefix) -> None:
        """Say that a reading is not the whole history; ValueError if more is wrong than bytes without a token."""
        meant, back = (self.token_bytes.prefix + history), self.token_bytes.bytes_of(ids)
        if back.translate(None, self._unread) != meant.translate(None, self._unread):
            raise ValueError(
                f"the reading rule of token_bytes does not give back its history: {meant[-60:]!r} returns as "
                f"{back[-60:]!r}; a rule must neither drop nor change bytes that its ids can spell"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.model!r:.60} has no token for the bytes {self.unread(history)!r} of a history, and reads it "
                "without them; leave them out of the prompts if that is not meant",
                UserWarning,
                stacklevel=2,
            )

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> AlignedSession:
        return AlignedSession(self, prompts)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        group: list[tuple[Prefix, Prefix]] = []
        waiting = 0
        for number, pair in enumerate(zip(prompts, tokens, strict=True), start=1):
            group.append(pair)
            waiting += len(pair[1]) * self.model.vocabulary.size
            if waiting >= _TOGETHER or number == len(tokens):
                for laws in self._own_paths(group):
                    yield self.push(laws)
                group, waiting = [], 0

    def _own_paths(self, group: Sequence[tuple[Prefix, Prefix]]) -> list[Tensor]:
        """The model's own laws (T, V_own) along each path of a group of (prompt, path).

        A path falls into stretches, in which each reading continues the one before. Rows go from stretch to stretch
        together, on one session: what a new reading shares with the last one is not fed again.
        """
        reads = [self._readings(prompt, path) for prompt, path in group]
        spans = [_stretches(row) if path else [] for row, (_, path) in zip(reads, group, strict=True)]
        session = open_lookback(self.model, [row[0] for row in reads])
        current = [row[0] for row in reads]
        parts: list[list[Tensor]] = [[] for _ in group]
        for number in range(max(map(len, spans), default=0)):
            rows = np.array([row for row, own in enumerate(spans) if len(own) > number])
            ends = [reads[row][spans[row][number][1] - 1] for row in rows.tolist()]
            kept = [_common(current[row], end) for row, end in zip(rows.tolist(), ends, strict=True)]
            surplus = np.array([len(current[row]) for row in rows.tolist()]) - kept
            if surplus.any():
                session.drop(rows[surplus > 0], surplus[surplus > 0])
            feed(session, rows, [end[own:] for end, own in zip(ends, kept, strict=True)])
            begins = [len(reads[row][spans[row][number][0]]) for row in rows.tolist()]
            counts = np.array([len(end) for end in ends]) - begins
            laws = session.log_probs_along(rows, counts).split((counts + 1).tolist())
            for row, end, begin, own in zip(rows.tolist(), ends, begins, laws, strict=True):
                current[row] = end
                parts[row].append(own[[len(read) - begin for read in reads[row][slice(*spans[row][number])]]])
        size = self.model.vocabulary.size
        return [torch.cat(part) if part else torch.empty(0, size) for part in parts]

    def _readings(self, prompt: Prefix, path: Prefix) -> list[tuple[int, ...]]:
        """T(h) before each token of a path, and before none of an empty one."""
        history = self.shared.bytes_of(prompt)
        reads = [self.read(history)]
        for token in path[:-1]:
            history += self.written(token)
            reads.append(self.read(history))
        return reads

    def _own_laws(self, prefixes: Sequence[Prefix]) -> Tensor:
        reads = [self.read(self.shared.bytes_of(prefix)) for prefix in prefixes]
        return checked_laws(self.model, self.model.log_probs(reads), len(reads))

    def __repr__(self) -> str:
        return f"Aligned({self.model!r}, {self.shared!r})"


def over_byte_strings(components: Sequence[Any]) -> bool:
    """Whether all components are `Aligned`: models of several vocabularies, mixed over byte strings."""
    return all(isinstance(component, Aligned) for component in components)


class PushForward:
    """Log-laws (B, V) over a model's ids → normalised log-laws (B, S) over shared ids.

    `targets` (V,) has the shared id of each id, -1 for mass that is dropped. The first id of each string is copied,
    further ids with the same bytes are added in log space, so that no probability underflows.
    """

    def __init__(self, targets: np.ndarray, size: int) -> None:
        kept = np.flatnonzero(targets >= 0)
        order = kept[np.argsort(targets[kept], kind="stable")]
        shared = targets[order]
        starts = np.flatnonzero(np.diff(shared, prepend=-1))
        rank = np.arange(len(shared)) - np.repeat(starts, np.diff([*starts, len(shared)]))
        self.size = size
        self._rounds = [
            (torch.from_numpy(shared[rank == r]), torch.from_numpy(order[rank == r]))
            for r in range(int(rank.max(initial=-1)) + 1)
        ]
        self._lost = torch.from_numpy(np.flatnonzero(targets < 0))

    def __call__(self, laws: Tensor) -> Tensor:
        self._to(laws.device)
        pushed = laws.new_full((len(laws), self.size), -torch.inf)
        for number, (to, own) in enumerate(self._rounds):
            taken = laws[:, own]
            pushed[:, to] = taken if number == 0 else log_add(pushed[:, to], taken)
        if not len(self._lost):
            return pushed
        kept = pushed.logsumexp(-1, keepdim=True)
        if kept.is_cpu and bool((kept == -torch.inf).any()):
            raise ValueError("all mass is on control tokens, and no byte string can carry it; allow some in the model")
        return pushed - kept

    def dropped(self, laws: Tensor) -> Tensor:
        """Mass (B,) without a shared id."""
        self._to(laws.device)
        return laws[:, self._lost].exp().sum(-1)

    def _to(self, device: torch.device) -> None:
        if self._lost.device != device:
            self._rounds = [(to.to(device), own.to(device)) for to, own in self._rounds]
            self._lost = self._lost.to(device)


class AlignedSession:
    """Rows as bytes, each read by one row of the model's own session in its canonical tokenisation.

    Bytes that are appended may change how the end of a history is split. Such a row takes back the tokens that no
    longer hold and reads the new ones: by the session's ``drop`` where it has one, else in a fresh session.
    """

    def __init__(self, aligned: Aligned, prompts: Sequence[Prefix]) -> None:
        self._aligned = aligned
        distinct = {prompt: aligned.shared.bytes_of(prompt) for prompt in dict.fromkeys(map(tuple, prompts))}
        reads = {prompt: aligned.read(history) for prompt, history in distinct.items()}
        self._history = [distinct[tuple(prompt)] for prompt in prompts]
        self._read: list[tuple[int, ...]] = [reads[tuple(prompt)] for prompt in prompts]
        self._stale = np.zeros(len(prompts), dtype=bool)
        # The last token of a prompt is the one that new bytes change, and the others can be shared by its rows.
        heads = [read[:-1] if len(read) > 1 else read for read in self._read]
        self._rows = MovingRows(aligned.model, heads)
        feed(
            self._rows,
            np.arange(len(prompts)),
            [read[len(head) :] for read, head in zip(self._read, heads, strict=True)],
        )

    @property
    def cost(self) -> Cost:
        return self._rows.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._history[row] += self._aligned.written(token)
        self._stale[rows] = True

    def log_probs(self, rows: np.ndarray) -> Tensor:
        self._catch_up(rows[self._stale[rows]])
        return self._aligned.push(self._rows.log_probs(rows))

    def _catch_up(self, rows: np.ndarray) -> None:
        """Bring the model's own rows to the canonical tokenisation of their histories."""
        reads = [self._aligned.read(self._history[row]) for row in rows.tolist()]
        kept = [_common(self._read[row], read) for row, read in zip(rows.tolist(), reads, strict=True)]
        surplus = np.array([len(self._read[row]) for row in rows.tolist()], dtype=np.int64) - kept
        moved = np.zeros(len(rows), dtype=bool)
        changed = np.flatnonzero(surplus > 0)
        for session, mine in self._rows.groups(rows[changed]):
            places = changed[mine]
            if hasattr(session, "drop"):
                session.drop(self._rows.place[rows[places]], surplus[places])
            else:
                moved[places] = True
        self._rows.move(rows[moved], [reads[place] for place in np.flatnonzero(moved)])
        stay = np.flatnonzero(~moved)
        feed(self._rows, rows[stay], [reads[place][kept[place] :] for place in stay.tolist()])
        for row, read in zip(rows.tolist(), reads, strict=True):
            self._read[row] = read
        self._stale[rows] = False


def _stretches(reads: Sequence[Prefix]) -> list[tuple[int, int]]:
    """Begin and end of the longest runs in which each reading continues the one before."""
    cuts = [step for step in range(1, len(reads)) if reads[step][: len(reads[step - 1])] != reads[step - 1]]
    return list(zip([0, *cuts], [*cuts, len(reads)], strict=True))


def _common(one: Prefix, other: Prefix) -> int:
    """Length of the longest common prefix."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
