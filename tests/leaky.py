"""Servers with defaults of their own, for the doctor to find."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from me_stats.models import TableModel
from tests.served.fake import Fake

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer whose ids are letters, beginning with `first`."""

    def __init__(self, first: str = "a") -> None:
        self.first = LETTERS.index(first)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [LETTERS.index(letter) for letter in text.lower() if letter in LETTERS[:20]]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[(self.first + token) % len(LETTERS)] for token in ids)


class Leaky(Fake):
    """A `Fake` with sampling defaults, and with bugs.

    Parameters
    ----------
    defaults
        temperature, top_k, top_p, min_p, penalty: what applies to requests that do not say otherwise.
    overrides
        They apply whatever requests say.
    shift, seeds, forgets
        Planted bugs: added to sampled ids; ``"ignored"`` or ``"fixed"``; a prefix that is read again loses its last
        token.
    caches
        Whether it says that it kept the prefix.
    """

    def __init__(
        self,
        model: TableModel,
        *,
        defaults: dict[str, float] | None = None,
        overrides: bool = False,
        shift: int = 0,
        seeds: str = "",
        forgets: bool = False,
        caches: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.defaults, self.overrides, self.shift, self.seeds = defaults or {}, overrides, shift, seeds
        self.forgets, self.caches, self.seen = forgets, caches, set[tuple[int, ...]]()
        self.known: dict[tuple[Any, ...], np.ndarray] = {}
        self.asked, self.noise = threading.local(), np.random.default_rng(0)

    def post(self, path: str, sent: dict[str, Any]) -> dict[str, Any] | None:
        self.asked.sent = sent.get("sampling_params", sent)
        answer = super().post(path, sent)
        if answer is not None and "choices" in answer:
            answer["choices"][0]["text"] = Letters().decode(answer["choices"][0].get("token_ids", ()))
            if self.caches:
                answer["usage"]["prompt_tokens_details"]["cached_tokens"] = len(sent["prompt"]) - 1
        elif answer is not None and "tokens" in answer:
            answer["content"] = Letters().decode(answer["tokens"])
            if self.tells:
                answer["generation_settings"] |= {name: self.setting(name) for name in self.defaults}
        return answer

    def setting(self, name: str) -> float:
        sent, own = self.asked.sent, self.defaults.get(name)
        spelled = ("repeat_penalty", "repetition_penalty") if name == "penalty" else (name,)
        told = next((sent[field] for field in spelled if field in sent), None)
        if told is None or (self.overrides and own is not None):
            return NEUTRAL[name] if own is None else own
        return float(told)

    def draw(self, prefix: list[int], count: int, seed: int) -> tuple[list[int], bool]:
        rng = {"ignored": self.noise, "fixed": np.random.default_rng(7)}.get(self.seeds, np.random.default_rng(seed))
        read, written = list(prefix[: len(prefix) - self.stale]), []
        for uniform in rng.random(count):
            cdf = self.cdf(read, prefix)
            token = (int(np.searchsorted(cdf, uniform, side="right")) + self.shift) % len(cdf)
            written.append(token)
            read.append(token)
            if token in self.stops:
                return written, True
        return written, False

    def cdf(self, read: list[int], prefix: list[int]) -> np.ndarray:
        key = (tuple(read), tuple(prefix), *(self.setting(name) for name in NEUTRAL))
        if key not in self.known:
            mass = self.law(read, prefix).cumsum()
            self.known[key] = mass / mass[-1]
        return self.known[key]

    def law(self, read: list[int], prefix: list[int]) -> np.ndarray:
        values = self.model.log_probs([tuple(read)])[0].double().numpy().copy()
        values[list(set(prefix))] *= self.setting("penalty")  # they are negative
        values /= max(self.setting("temperature"), 0.01)
        mass = np.exp(values - values.max())
        mass /= mass.sum()
        order = np.argsort(-mass, kind="stable")
        kept = np.ones(len(mass), dtype=bool)
        before = np.cumsum(mass[order]) - mass[order]
        kept[order] = before < self.setting("top_p")
        if (k := int(self.setting("top_k"))) > 0:
            kept[order[k:]] = False
        return np.where(kept & (mass >= self.setting("min_p") * mass.max()), mass, 0.0)

    def _top(self, prefix: list[int], wanted: int) -> list[tuple[int, float]]:
        again, read = tuple(prefix) in self.seen, prefix
        self.seen.add(tuple(prefix))
        if self.forgets and again and len(prefix) > 20:
            read = prefix[:-1]
        return super()._top(read, wanted)
