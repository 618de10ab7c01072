"""Language models that are right by definition and wrong in their session, as key-value caches go wrong.

A `Rule` says which of the pending tokens a row ingests when it catches up. A `Start` says what the rows have read of
their prompts before the first token. Everything else is the model's own law of what the row has ingested. Nothing is
random: where a bug strikes now and then, a hash of the row's own tokens decides, so that rows do not depend on their
neighbours (unless the bug says so) and one seed gives one result.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, LanguageModel, Prefix, checked_laws, path_log_probs
from me_stats.models.ensemble import Ensemble
from me_stats.vocabulary import Vocabulary

Rule = Callable[[list[int], list[int]], list[int]]
Start = Callable[[Sequence[Prefix]], list[list[int]]]


def newest_only(read: list[int], pending: list[int]) -> list[int]:
    """Feed the newest token; what others wrote in between is never ingested."""
    return pending[-1:]


def sometimes_newest_only(read: list[int], pending: list[int]) -> list[int]:
    """`newest_only` at one switch in twenty."""
    strikes = len(pending) > 1 and zlib.crc32(bytes(str((read, pending)), "ascii")) % 20 == 0
    return pending[-1:] if strikes else pending


def oldest_skipped(read: list[int], pending: list[int]) -> list[int]:
    """Catch up from one token too late whenever more than one is pending."""
    return pending[1:] if len(pending) > 1 else pending


def newest_twice(read: list[int], pending: list[int]) -> list[int]:
    """Catch up, and then feed the newest token once more."""
    return [*pending, pending[-1]] if len(pending) > 1 else pending


def all_pending(read: list[int], pending: list[int]) -> list[int]:
    """What a right session does."""
    return pending


def whole_prompts(prompts: Sequence[Prefix]) -> list[list[int]]:
    """What a right session does."""
    return [list(prompt) for prompt in prompts]


def prompts_cut(prompts: Sequence[Prefix]) -> list[list[int]]:
    """Prompts without their last token."""
    return [list(prompt)[:-1] for prompt in prompts]


def prompts_padded(prompts: Sequence[Prefix]) -> list[list[int]]:
    """Prompts filled up on the right to the longest, with token 0 that nothing masks."""
    longest = max(map(len, prompts), default=0)
    return [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]


class FaultyModel(LanguageModel):
    """The law of `model`, with a session that ingests its rows by `rule` after `start`.

    >>> from me_stats.models.toy import MarkovModel
    >>> chain = MarkovModel.random(3, seed=0)
    >>> session = FaultyModel(chain, start=prompts_cut).session([(1, 2)])
    >>> bool((session.log_probs(np.array([0])) == chain.log_probs([(1,)])).all())
    True
    """

    def __init__(self, model: Any, *, rule: Rule = all_pending, start: Start = whole_prompts) -> None:
        self.model = model
        self.vocabulary = model.vocabulary
        self.rule, self.start = rule, start

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return checked_laws(self.model, self.model.log_probs(prefixes), len(prefixes))

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        return path_log_probs(self.model, prompts, tokens)

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> FaultySession:
        return FaultySession(self, prompts)

    def __repr__(self) -> str:
        return f"FaultyModel({self.model!r}, {self.rule.__name__}, {self.start.__name__})"


class FaultySession:
    """Per row, the tokens that were really ingested and those that wait."""

    def __init__(self, model: FaultyModel, prompts: Sequence[Prefix]) -> None:
        self._model = model
        self._read = model.start(prompts)
        self._pending: list[list[int]] = [[] for _ in prompts]
        self.cost = Cost()

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._pending[row].append(token)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        forwarded = 0
        for row in rows.tolist():
            if self._pending[row]:
                ingested = self._model.rule(self._read[row], self._pending[row])
                forwarded += len(ingested)
                self._read[row] += ingested
                self._pending[row] = []
        self.cost += Cost(1, forwarded, len(rows))
        return self._model.log_probs([self._read[row] for row in rows.tolist()])


def with_faulty_sessions(ensemble: Ensemble, *, rule: Rule = all_pending, start: Start = whole_prompts) -> Ensemble:
    """The same law over components whose sessions go wrong."""
    return Ensemble([FaultyModel(part, rule=rule, start=start) for part in ensemble.components], ensemble.mixing)


class PositionalModel(LanguageModel):
    """A law of the last token and of the position, modulo a period.

    Parameters
    ----------
    probs
        (P, V + 1, V): position modulo P, last token (V for the empty prefix), next token.
    eos
        Ids that end a sequence.

    >>> model = PositionalModel(np.array([[[0.5, 0.5]] * 3, [[0.1, 0.9]] * 3]))
    >>> model.log_probs([(), (0,), (1, 0)]).exp()[:, 0]
    tensor([0.5000, 0.1000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, probs: np.ndarray, *, eos: Sequence[int] = ()) -> None:
        table = torch.as_tensor(probs, dtype=torch.float64)
        if table.ndim != 3 or table.shape[1] != table.shape[2] + 1:
            raise ValueError(f"probs must be (P, V + 1, V), got {tuple(table.shape)}")
        self.log_table = table.log()
        self.vocabulary = Vocabulary(table.shape[2], eos=tuple(eos))

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        period, size = len(self.log_table), self.vocabulary.size
        place = torch.tensor([len(prefix) % period for prefix in prefixes], dtype=torch.int64)
        last = torch.tensor([prefix[-1] if len(prefix) else size for prefix in prefixes], dtype=torch.int64)
        return self.log_table[place, last]
