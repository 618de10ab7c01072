"""A model behind an inference server: laws and tokens over HTTP, in token ids."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, LanguageModel, Prefix, PrefixSession
from me_stats.served.client import HttpClient, Json, Malformed
from me_stats.served.dialects import Ask, Completion, Dialect, LlamaCpp, SGLang
from me_stats.served.identity import Identity
from me_stats.served.laws import PartialLaws
from me_stats.served.openai import VLLM, OpenAI
from me_stats.served.seeds import next_seed
from me_stats.vocabulary import Vocabulary

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (LlamaCpp(), VLLM(), SGLang(), OpenAI())}
_PROBED = 16  # log-probabilities that a probe asks for


@dataclass
class ServedCost(Cost):
    """Work that servers did: a forward is one token drawn or one law read; `requests` counts answers that were used."""

    requests: int = 0

    def __add__(self, other: Cost) -> ServedCost:
        return ServedCost(
            self.forwards + other.forwards,
            self.tokens_forwarded + other.tokens_forwarded,
            self.reads + other.reads,
            self.requests + getattr(other, "requests", 0),
        )

    __radd__ = __add__

    def since(self, start: ServedCost) -> ServedCost:
        """What came after `start`."""
        return self + ServedCost(-start.forwards, -start.tokens_forwarded, -start.reads, -start.requests)


class ServedModel(LanguageModel):
    """Next-token laws and tokens of a model behind an HTTP server.

    Parameters
    ----------
    url
        Base url, such as ``"http://localhost:8080"``; a trailing ``/v1`` is dropped.
    vocabulary
        What the ids mean: that of a local tokenizer (`served_vocabulary`), or of a model that it will be mixed with.
    dialect
        ``"llama.cpp"``, ``"vllm"``, ``"sglang"``, ``"openai"``, or a `Dialect`.
    model
        Name of the model on the server, where it serves several.
    api_key, concurrency, timeout, retries
        As for `HttpClient`. A request that is repeated keeps its seed, so what failed does not select what is kept.
    probe
        A prefix whose log-probabilities tell the model from another of the same name; default the first few ids. Empty
        for servers that return no log-probabilities.
    fields
        Further fields of every request. They override the neutral ones; None leaves a field out.

    Attributes
    ----------
    cost
        All answers that were used so far.

    Notes
    -----
    The identity of the server is read at the first request, and again after every request that had to be repeated and
    at the end of each `ServedME` run; answers that name their model are compared each time. A server that came back
    with another model raises `ServerChanged`, and nothing is mixed.

    Raises
    ------
    ValueError
        For arguments out of range; when used: for a server that refuses a field, samples with another setting than it
        was sent, returns no ids, or returns less of a law than was asked for.
    ConnectionError
        When used: for a server that stays out of reach.
    """

    def __init__(
        self,
        url: str,
        *,
        vocabulary: Vocabulary,
        dialect: str | Dialect = "llama.cpp",
        model: str = "",
        api_key: str | None = None,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 6,
        probe: Prefix | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(dialect, str) and dialect not in DIALECTS:
            raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
        if not isinstance(vocabulary, Vocabulary):
            raise TypeError(f"vocabulary must be a me_stats Vocabulary, got {vocabulary!r:.60}")
        self.dialect = DIALECTS[dialect] if isinstance(dialect, str) else dialect
        self.vocabulary, self.name, self.fields = vocabulary, model, dict(fields or {})
        options: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "retries": retries}
        base = url.rstrip("/").removesuffix("/v1")
        self.client = HttpClient(base, api_key=api_key, needed_by="ServedModel", **options)
        self.probe = tuple(range(min(4, vocabulary.size))) if probe is None else vocabulary.encode(probe)
        self.cost = ServedCost()
        self._identity = Identity(base, lambda: self.dialect.identity(self.client), self._probed)
        self._lock, self._numbers, self._run = threading.Lock(), itertools.count(), secrets.token_hex(4)
        self._lanes: tuple[int | None] | None = None
        self._seen = 0  # failures of the client after which the identity was read again

    @property
    def identity(self) -> dict[str, str]:
        """What the server said about its model at the first request."""
        return dict(self._identity.names)

    @property
    def lanes(self) -> int | None:
        """Prefix caches that requests can address; None where the server keeps them by itself."""
        if self._lanes is None:
            self._lanes = (self.dialect.lanes(self.client),)
        return self._lanes[0]

    def verify(self) -> None:
        """Raise `ServerChanged` unless the server still serves the model of the first request."""
        self._seen = self.client.retried
        self._identity.verify()

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        size = self.vocabulary.size
        laws = torch.full((len(prefixes), size), -torch.inf)
        for row, answer in enumerate(self._read(prefixes, size)):
            ids, values = self._law(answer)
            if len(np.unique(ids)) < size:
                raise ValueError(
                    f"{self!r} returned {len(ids)} of {size} log-probabilities, which is no law; let the server return "
                    "the whole vocabulary (vLLM: --max-logprobs -1), or use partial_laws, which carry what is missing"
                )
            laws[row, torch.from_numpy(ids)] = torch.from_numpy(values).float()
        total = laws.logsumexp(-1, keepdim=True)
        # Rows of the output layer past the last id of the tokenizer carry no token, and their mass is left out.
        if bool((total.isnan() | (total > 1e-3) | (total < -0.05)).any()):
            raise ValueError(f"{self!r} returned log-probabilities with a total mass of {float(total.exp().min()):.3g}")
        return laws - total

    def partial_laws(self, prefixes: Sequence[Prefix], *, n: int = 20) -> PartialLaws:
        """The `n` most probable tokens of each law, with the mass that they miss (see `laws.tv_interval`)."""
        if not 1 <= n <= self.vocabulary.size:
            raise ValueError(f"n must lie in 1..{self.vocabulary.size}, got {n}")
        pairs = [self._law(answer) for answer in self._read(prefixes, n)]
        width = max((len(ids) for ids, _ in pairs), default=0)
        ids = torch.full((len(pairs), width), -1, dtype=torch.int64)
        log_probs = torch.full((len(pairs), width), -torch.inf, dtype=torch.float64)
        for row, (own, values) in enumerate(pairs):
            ids[row, : len(own)], log_probs[row, : len(own)] = torch.from_numpy(own), torch.from_numpy(values)
        missing = 1 - log_probs.exp().sum(1)
        if bool((missing < -1e-3).any()):
            raise ValueError(f"{self!r} returned log-probabilities with a total mass of {float(1 - missing.min()):.4g}")
        return PartialLaws(ids, log_probs, missing.clamp(0, 1), self.vocabulary.size)

    def sample_tokens(
        self, prefixes: Sequence[Prefix], max_tokens: int | Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Tokens drawn by the server after each prefix: `max_tokens`, or fewer where the last is an end of sequence.

        Each prefix has a seed of its own (see `seeds.request_seed`); equal seeds repeat their noise.
        """
        counts = [max_tokens] * len(prefixes) if isinstance(max_tokens, int) else list(max_tokens)
        if min(counts, default=1) < 1 or not len(prefixes) == len(counts) == len(seeds):
            raise ValueError("give one seed, and at least one token, for each prefix")
        return self.client.map(self.write, prefixes, counts, seeds) if len(prefixes) else []

    def write(self, prefix: Prefix, count: int, seed: int, lane: int | None = None) -> list[int]:
        """`count` tokens after one prefix, or fewer where the last is an end of sequence."""
        written: list[int] = []
        for part in itertools.count():
            own = next_seed(seed, part, bits=self.dialect.seed_bits)
            answer = self._ask((*prefix, *written), count - len(written), own, 0, lane)
            # A server may write more than it was asked for, such as the rest of a letter; what comes later is cut.
            tokens = self._known(answer.tokens[: count - len(written)])
            end = next((place for place, token in enumerate(tokens) if token in self.vocabulary.eos), None)
            written += tokens if end is None else tokens[: end + 1]
            if end is not None or len(written) >= count:
                return written
            if not answer.stop_kept:
                return [*written, self._stripped()]
            if not tokens:
                raise ValueError(f"{self!r} answered without a token; see the log of the server")
            # The server stopped at an id that ends nothing for us, such as the end of a turn: go on behind it.
        raise AssertionError("unreachable")

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> ServedSession:
        return ServedSession(self, prompts)

    def _read(self, prefixes: Sequence[Prefix], n: int) -> list[Completion]:
        return self.client.map(lambda prefix: self._ask(prefix, 1, 0, n, None), prefixes) if len(prefixes) else []

    def _ask(self, prefix: Prefix, count: int, seed: int, n_probs: int, lane: int | None) -> Completion:
        if not len(prefix):
            raise ValueError("an empty prefix gives the server nothing to read; start with at least one token")
        slots = None if lane is None else self.lanes
        self._identity.pin()
        answer = self._answer(prefix, count, seed, n_probs, None if slots is None or lane is None else lane % slots)
        if self.client.retried > self._seen:
            self.verify()
        with self._lock:
            drawn = len(answer.tokens)
            self.cost += ServedCost(drawn, answer.fed + drawn - 1, drawn, 1)
        return answer

    def _answer(self, prefix: Prefix, count: int, seed: int, n_probs: int, lane: int | None) -> Completion:
        tag, latest = f"{self._run}-{next(self._numbers)}", [0]

        def ask() -> Ask:
            return Ask(self.name, tuple(prefix), count, seed, n_probs, f"{tag}-{latest[0]}", lane)

        def body(attempt: int) -> Json:
            latest[0] = attempt
            return self.dialect.request(ask(), self.fields)

        def read(sent: Json, answer: Any) -> Completion:
            try:
                return self.dialect.read(ask(), sent, answer)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise Malformed(f"the answer has another form than expected: {answer!s:.120}") from error

        answered = self.client.post(self.dialect.path, body, read=read)
        self._identity.mark(answered.marks)
        return answered

    def _probed(self) -> dict[int, float]:
        if not self.probe:
            return {}
        ids, values = self._law(self._answer(self.probe, 1, 0, min(_PROBED, self.vocabulary.size), None))
        order = np.argsort(-values, kind="stable")
        return dict(zip(ids[order].tolist(), values[order].tolist(), strict=True))

    def _law(self, answer: Completion) -> tuple[np.ndarray, np.ndarray]:
        if not answer.laws:
            raise ValueError(f"{self!r} returned no log-probabilities; allow them on the server, or give probe=()")
        ids, values = np.array(answer.laws[0][0], dtype=np.int64), np.array(answer.laws[0][1], dtype=np.float64)
        known = (ids >= 0) & (ids < self.vocabulary.size)
        return ids[known], values[known]

    def _known(self, tokens: Sequence[int]) -> list[int]:
        outside = [token for token in tokens if not 0 <= token < self.vocabulary.size]
        if outside:
            raise ValueError(
                f"{self!r} wrote id {outside[0]}, outside the vocabulary 0..{self.vocabulary.size - 1}; give the "
                "vocabulary of the model that it serves"
            )
        return list(tokens)

    def _stripped(self) -> int:
        """The end of sequence that a server left out of its ids."""
        if len(self.vocabulary.eos) != 1:
            raise ValueError(
                f"{self!r} does not say which of the ids {self.vocabulary.eos} ended a row; let its answers hold the "
                "id (vLLM and llama.cpp do), or give a vocabulary with the one id that it stops at as eos"
            )
        return self.vocabulary.eos[0]

    def __repr__(self) -> str:
        return f"ServedModel({self.client.url!r}, dialect={self.dialect.name!r}, model={self.name!r})"


class ServedSession(PrefixSession):
    """Rows as prefixes of ids: what a server keeps of them is its prefix cache."""

    def __init__(self, model: ServedModel, prompts: Sequence[Prefix]) -> None:
        super().__init__(model, prompts)
        self.cost: Cost = ServedCost()

    def log_probs(self, rows: np.ndarray) -> Tensor:
        before, start = self.cost, self._model.cost
        laws = super().log_probs(rows)
        self.cost = before + self._model.cost.since(start)
        return laws
