"""A model of token ids as a law over the next byte: all tokenisations of the text so far, added up.

`Aligned` draws whole strings and reads the history in one tokenisation. Here nothing depends on where tokens end: two
models share the 256 bytes and the end, and the price is that every tokenisation of the newest bytes is read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from me_stats.models.base import Cost, LanguageModel, Prefix, checked_laws, require_language_model
from me_stats.vocabulary_map import ByteStrings, Role, TokenBytes

Floats = NDArray[np.float64]

END = 256  # the id after the 256 bytes

BYTES = ByteStrings([TokenBytes((*(bytes([value]) for value in range(256)), None), eos=(END,))])
"""The alphabet of all `NextByte` models: id = byte, and one end."""


class NextByte(LanguageModel):
    r"""The law of the next byte of a model's text, :math:`P(b \mid h) = P(h b) / P(h)`.

    P(h) is the probability that the text begins with the bytes h. A *cover* of h is a row of tokens whose text begins
    with h and ends in the token that h's last byte belongs to, so that :math:`P(h) = \sum_{covers} P(tokens)`. Covers
    that agree up to their last token are kept as one: its tokens up to a boundary, and the rest of h behind it. An
    appended byte needs one law for each tokenisation of h that ends exactly there.

    Mass on controls and unused rows, which stand for no bytes, is taken out of each token law, as in `Aligned`.

    Parameters
    ----------
    model
        Any LanguageModel over token ids. What it has to read before (a prompt in its own tokens, a begin of sequence)
        goes inside: ``NextByte(Conditioned(model, prompt))``.
    token_bytes
        The model's table; default read from its fast tokenizer. Its reading rule is not used, nor its prefix.
    beam
        How many kept rows of tokens survive a byte, by the probability of their covers; the best one that ends there
        survives besides. None keeps all: exact, and exponential in the length of h. `pruned_mass` says what a beam
        costs.

    Raises
    ------
    ValueError
        For a table that does not fit, a beam below 1, or a history that the model cannot write.

    Notes
    -----
    Source: Phan, Amos, Gat, Havasi, Muckley, Ullrich (2024), Exact byte-level probabilities from tokenized language
    models, arXiv 2410.09303, for models that write canonical tokenisations only. The sum here runs over all of them.

    Examples
    --------
    >>> from me_stats.models.toy import TableModel
    >>> table = TokenBytes.greedy([b"a", b"ab", b"b"])
    >>> model = NextByte(TableModel([[0.5, 0.3, 0.2]], order=0), token_bytes=table)
    >>> law = model.log_probs([(), b"a"]).exp()
    >>> [round(float(law[0, byte]), 9) for byte in b"ab"], [round(float(law[1, byte]), 9) for byte in b"ab"]
    ([0.8, 0.2], [0.5, 0.5])

    After "a" the token was "a" with .5, and then "a" follows with .8; or "ab" with .3: (.5 · .2 + .3) / .8 = .5.
    """

    def __init__(self, model: Any, *, token_bytes: TokenBytes | None = None, beam: int | None = None) -> None:
        require_language_model(model)
        if token_bytes is None:
            from me_stats.tokenizer_bytes import read_tokenizer

            token_bytes = read_tokenizer(model.vocabulary)
        if token_bytes.size != model.vocabulary.size or token_bytes.eos != model.vocabulary.eos:
            raise ValueError(f"token_bytes has {token_bytes.size} ids and ends {token_bytes.eos}, unlike {model!r}")
        if beam is not None and beam < 1:
            raise ValueError(f"beam must be at least 1, or None for all tokenisations, got {beam}")
        self.model, self.token_bytes, self.beam = model, token_bytes, beam
        self.vocabulary = BYTES.vocabulary
        self._order = _Sorted(token_bytes)

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        known: dict[bytes, _State] = {}
        laws = [self._order.law(self._after(_history(prefix), known)) for prefix in prefixes]
        return torch.from_numpy(np.stack(laws)).log()

    def pruned_mass(self, prefixes: Sequence[Prefix]) -> Floats:
        """(B,) the share of covers that the beam left out, by their mass when they were left out; 0 without a beam.

        No bound on the error: what was left out may have explained later bytes better than what was kept.
        """
        known: dict[bytes, _State] = {}
        return np.array([self._after(_history(prefix), known).pruned for prefix in prefixes])

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> NextByteSession:
        return NextByteSession(self, prompts)

    def _start(self) -> _State:
        return _State((self._cover((), 0.0),), 0.0, 1)

    def _after(self, history: bytes, known: dict[bytes, _State]) -> _State:
        """The state after a history, from the longest beginning of it in `known`, which is filled on the way."""
        length = next((size for size in range(len(history), 0, -1) if history[:size] in known), 0)
        state = known[history[:length]] if length else self._start()
        for size in range(length, len(history)):
            state = self._append(state, history[size])
            known[history[: size + 1]] = state
        return state

    def _append(self, state: _State, byte: int) -> _State:
        kept: list[_Cover] = []
        fresh: list[tuple[tuple[int, ...], float]] = []
        for cover in state.covers:
            rest = cover.rest + bytes([byte])
            for token in self._order.equal(rest):
                log_p = math.log(cover.law[token]) if cover.law[token] > 0 else -math.inf
                if log_p > -math.inf:
                    fresh.append(((*cover.tokens, token), cover.log_weight + log_p))
            if self._order.longer(rest, cover.law) > 0:
                kept.append(replace(cover, rest=rest))
        # A new boundary is worth its own weight, a row that reaches past h the tokens that begin with what is left.
        log_masses = [cover.log_weight + math.log(self._order.longer(cover.rest, cover.law)) for cover in kept]
        log_masses += [weight for _, weight in fresh]
        if not log_masses:
            raise ValueError(f"the model cannot write byte {byte:#04x} after what was written, by any tokenisation")
        survivors = self._survivors(np.array(log_masses), len(kept))
        total, left = (float(np.logaddexp.reduce(np.array(log_masses)[places])) for places in (slice(None), survivors))
        covers = [kept[place] for place in survivors if place < len(kept)]
        covers += self._covers([fresh[place - len(kept)] for place in survivors if place >= len(kept)])
        scaled = tuple(replace(cover, log_weight=cover.log_weight - left) for cover in covers)
        pruned = 1 - (1 - state.pruned) * math.exp(min(0.0, left - total))
        return _State(scaled, pruned, state.read + sum(not cover.rest for cover in covers))

    def _survivors(self, log_masses: Floats, boundary: int) -> list[int]:
        """Places of the best `beam` rows, and of the best that ends at the boundary: it can write every byte."""
        best = np.argsort(-log_masses, kind="stable")
        if self.beam is None or len(best) <= self.beam:
            return sorted(best.tolist())
        ends_here = [place for place in best.tolist() if place >= boundary][:1]
        return sorted({*best[: self.beam].tolist(), *ends_here})

    def _covers(self, rows: Sequence[tuple[tuple[int, ...], float]]) -> list[_Cover]:
        if not rows:
            return []
        laws = checked_laws(self.model, self.model.log_probs([tokens for tokens, _ in rows]), len(rows))
        shares = self._order.probabilities(laws.cpu().double().exp().numpy())
        return [_Cover(tokens, b"", weight, law) for (tokens, weight), law in zip(rows, shares, strict=True)]

    def _cover(self, tokens: tuple[int, ...], log_weight: float) -> _Cover:
        return self._covers([(tokens, log_weight)])[0]

    def __repr__(self) -> str:
        return f"NextByte({self.model!r}, beam={self.beam})"


class NextByteSession:
    """Rows of bytes; each appended byte is walked when the row is read."""

    def __init__(self, model: NextByte, prompts: Sequence[Prefix]) -> None:
        self._model = model
        known: dict[bytes, _State] = {}
        self._states = [model._after(_history(prompt), known) for prompt in prompts]
        self._waiting: list[list[int]] = [[] for _ in prompts]
        self._reads = 0

    @property
    def cost(self) -> Cost:
        """Reads are laws of bytes, tokens forwarded the lengths of all rows of tokens that were read."""
        rows = sum(state.read for state in self._states)
        return Cost(rows, rows, self._reads)

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._waiting[row].append(token)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        for row in rows.tolist():
            for byte in self._waiting[row]:
                # What follows an end is thrown away by the samplers.
                if byte != END:
                    self._states[row] = self._model._append(self._states[row], byte)
            self._waiting[row] = []
        self._reads += len(rows)
        laws = [self._model._order.law(self._states[row]) for row in rows.tolist()]
        return torch.from_numpy(np.stack(laws)).log()


@dataclass(frozen=True)
class _Cover:
    """Tokens up to a boundary, the bytes of h behind it, log P(tokens) and the law of the next token (V,)."""

    tokens: tuple[int, ...]
    rest: bytes
    log_weight: float
    law: Floats


@dataclass(frozen=True)
class _State:
    """All covers of a history, the share that a beam left out, and how many laws were read for it."""

    covers: tuple[_Cover, ...]
    pruned: float
    read: int


class _Sorted:
    """The table in the order of its bytes, in which tokens that begin alike stand together."""

    def __init__(self, table: TokenBytes) -> None:
        roles = np.array(table.roles)
        self._ends = list(table.eos)
        self._silent = np.flatnonzero((roles != Role.ORDINARY) & (roles != Role.END))
        pairs = sorted((string, token) for token, string in enumerate(table.strings) if string is not None)
        self._strings = [string for string, _ in pairs]
        self._tokens = np.array([token for _, token in pairs], dtype=np.int64)
        # Entry d of a string is its byte there; behind its end stands 0, which `_range` keeps out.
        longest = max(map(len, self._strings))
        self._bytes = np.zeros((len(pairs), longest), dtype=np.uint8)
        for place, string in enumerate(self._strings):
            self._bytes[place, : len(string)] = np.frombuffer(string, dtype=np.uint8)

    def probabilities(self, laws: Floats) -> Floats:
        """Laws (B, V) without the mass of ids that stand for nothing."""
        laws[:, self._silent] = 0.0
        return laws / laws.sum(-1, keepdims=True)

    def equal(self, string: bytes) -> list[int]:
        """Ids with exactly these bytes."""
        begin = bisect_left(self._strings, string)
        found = []
        while begin < len(self._strings) and self._strings[begin] == string:
            found.append(int(self._tokens[begin]))
            begin += 1
        return found

    def longer(self, rest: bytes, law: Floats) -> float:
        """Mass of the tokens that begin with `rest` and go on."""
        begin, end = self._range(rest)
        return float(law[self._tokens[begin:end]].sum())

    def law(self, state: _State) -> Floats:
        """(257,) the next byte and the end."""
        total = np.zeros(257)
        for cover in state.covers:
            weight, depth = math.exp(cover.log_weight), len(cover.rest)
            begin, end = self._range(cover.rest)
            shares = cover.law[self._tokens[begin:end]]
            if len(shares):
                total[:END] += weight * np.bincount(self._bytes[begin:end, depth], weights=shares, minlength=END)
            if not depth:
                total[END] += weight * cover.law[self._ends].sum()
        return np.asarray(total / total.sum())

    def _range(self, rest: bytes) -> tuple[int, int]:
        """Places of the strings that begin with `rest` and are longer."""
        if not rest:
            return 0, len(self._strings)
        begin = bisect_left(self._strings, rest + b"\x00")
        # The next string that does not begin with `rest`: its last byte that can grow, grown.
        head = rest.rstrip(b"\xff")
        end = bisect_left(self._strings, head[:-1] + bytes([head[-1] + 1])) if head else len(self._strings)
        return begin, end


def _history(prefix: Prefix) -> bytes:
    if not all(0 <= byte < END for byte in prefix):
        raise ValueError("a history is bytes, ids 0..255, and has no end of sequence in it")
    return bytes(prefix)
