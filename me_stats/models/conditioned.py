"""One model under a fixed context, such as a system prompt: the components of a prompt ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from me_stats.models.base import (
    LanguageModel,
    Prefix,
    Session,
    checked_laws,
    open_session,
    path_log_probs,
    require_language_model,
)
from me_stats.vocabulary import Prompt


class Conditioned(LanguageModel):
    """The law :math:`P(x | context, prefix)`: a model that reads `context` before every prefix.

    Several of these over one model make an ensemble of prompts with one set of weights in memory.

    >>> from me_stats.models.toy import MarkovModel
    >>> model = MarkovModel.random(4, seed=0)
    >>> bool((Conditioned(model, [2]).log_probs([()]) == model.log_probs([(2,)])).all())
    True
    """

    def __init__(self, model: Any, context: Prompt) -> None:
        require_language_model(model)
        self.model = model
        self.vocabulary = model.vocabulary
        self.context = self.vocabulary.encode(context)

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return checked_laws(self.model, self.model.log_probs(self._extended(prefixes)), len(prefixes))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
        return open_session(self.model, self._extended(prompts), max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        return path_log_probs(self.model, self._extended(prompts), tokens)

    def _extended(self, prefixes: Sequence[Prefix]) -> list[tuple[int, ...]]:
        return [(*self.context, *prefix) for prefix in prefixes]

    def __repr__(self) -> str:
        return f"Conditioned({self.model!r}, {len(self.context)} tokens)"
