"""Texts of a task as the tokens that a law reads, by the conventions of the evaluation harness."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError

from me_stats.models.aligned import Aligned
from me_stats.models.base import Prefix
from me_stats.models.conditioned import Conditioned
from me_stats.models.windowed import context_length
from me_stats.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# A token of an alphabet over byte strings is one of each model's own tokens, or a few: room for two is kept.
OWN_TOKENS = 2

Pair = tuple[tuple[int, ...], tuple[int, ...]]


class Encoder:
    """How texts become prompts of `model`.

    A prompt begins with what the tokenizer puts before a text of its own accord (``<s>``), once: not if the text spells
    it already, as chat templates do, and not where a `Conditioned` stands inside, whose context comes first. Models
    over byte strings have their own begin inside (`Aligned`).

    Parameters
    ----------
    model
        Any LanguageModel with a tokenizer.
    also
        Further models that read the same prompts and may have less room, such as a draft.

    Attributes
    ----------
    begin
        The ids that stand before every text.
    nothing
        What is read where a text is empty: `begin`, or the tokenizer's begin of sequence where it adds none by itself,
        or an end of sequence; () for a tokenizer that does not say, and over byte strings.

    Raises
    ------
    ValueError
        For a vocabulary without a tokenizer.
    """

    def __init__(self, model: Any, also: Sequence[Any] = ()) -> None:
        self.vocabulary: Vocabulary = model.vocabulary
        if self.vocabulary.tokenizer is None:
            raise ValueError(f"{model!r:.60} has no tokenizer, and tasks are texts; give its vocabulary one")
        self._parts = [*inside(model)]
        conditioned = any(isinstance(part, Conditioned) for part in self._parts)
        self.begin = () if conditioned else _begin(self.vocabulary.tokenizer)
        self.nothing = () if conditioned else self.begin or _stand_in(self.vocabulary)
        self._readers = [reader for one in (model, *also) for reader in _readers(one)]

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that stands at the beginning."""
        return self._begun(text) or self.nothing

    def pair(self, context: str, continuation: str) -> Pair:
        """Token ids of a context and of what follows it.

        Spaces at the context's end go to the continuation, and the whole is encoded as one text and then split.
        ValueError for a continuation that adds no token.
        """
        stripped = context.rstrip()
        before = self._begun(stripped) if stripped else self.begin
        after = self._begun(context + continuation)[len(before) :]
        if not after:
            raise ValueError(f"the continuation {continuation!r:.60} adds no token to its context")
        return before or self.nothing, after

    def _begun(self, text: str) -> tuple[int, ...]:
        ids = self.vocabulary.encode(text)
        return ids if ids[: len(self.begin)] == self.begin else (*self.begin, *ids)

    def fit(self, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
        """The newest tokens of a prompt that leave room for `new` ones; `begin` stays. ValueError if none do."""
        if self._fits(prompt, new):
            return prompt
        head = len(self.begin) if prompt[: len(self.begin)] == self.begin else 0
        cuts = range(1, len(prompt) - head)
        found = bisect_left(cuts, True, key=lambda cut: self._fits((*prompt[:head], *prompt[head + cut :]), new))
        if found == len(cuts):
            limit = min(limit for _, limit, _ in self._readers)
            raise ValueError(
                f"{new} tokens leave no room for a prompt in a context of {limit}; lower max_gen_toks "
                "(max_new_tokens), or score with loglikelihood_rolling"
            )
        return (*prompt[:head], *prompt[head + cuts[found] :])

    def _fits(self, prompt: tuple[int, ...], new: int) -> bool:
        return all(length(prompt) + scale * new <= limit for length, limit, scale in self._readers)

    @cached_property
    def window(self) -> int | None:
        """Tokens that are scored together with their context in one window of a long text; None for no limit."""
        limits = [limit // scale for _, limit, scale in self._readers]
        return max(1, min(limits) - max(1, len(self.nothing))) if limits else None

    # --- chats ---------------------------------------------------------------------------------------------------

    def chat(self, turns: Sequence[dict[str, str]], *, reply: bool = True) -> str:
        """`turns` (role and content) in the one chat template of all components.

        A template that takes no system prompt is given the others, and a warning is logged. ValueError where there is
        no common template.
        """
        tokenizer = self._chat_tokenizer
        options: dict[str, Any] = {
            "tokenize": False, "add_generation_prompt": reply, "continue_final_message": not reply
        }  # fmt: skip
        try:
            return str(tokenizer.apply_chat_template(list(turns), **options))
        except TemplateError:
            logger.warning("the chat template takes no system prompt; it is left out")
            others = [turn for turn in turns if turn["role"] != "system"]
            return str(tokenizer.apply_chat_template(others, **options))

    @property
    def chat_template(self) -> str:
        """The template of `chat`; ValueError where there is none."""
        return str(self._chat_tokenizer.chat_template)

    @cached_property
    def _chat_tokenizer(self) -> Any:
        networks = [part for part in self._parts if not _inner(part)]
        names = [str(getattr(part, "name", part)) for part in networks]
        templates = [getattr(part.vocabulary.tokenizer, "chat_template", None) for part in networks]
        listed = ", ".join(dict.fromkeys(names))
        if any(isinstance(part, Aligned) for part in self._parts):
            raise ValueError(
                f"a chat template cannot be written over the byte strings of {listed}: its control tokens are no text. "
                "Use plain prompts, or models of one vocabulary"
            )
        without = [name for name, template in zip(names, templates, strict=True) if not template]
        if without:
            raise ValueError(
                f"{', '.join(dict.fromkeys(without))} has no chat template; use plain prompts, or set "
                "model.vocabulary.tokenizer.chat_template"
            )
        if len({str(template) for template in templates}) > 1:
            raise ValueError(
                f"{listed} have different chat templates, and all components read one prompt; use plain prompts, or "
                "set one of the templates on every component (model.vocabulary.tokenizer.chat_template)"
            )
        return networks[0].vocabulary.tokenizer


def inside(model: Any) -> Iterator[Any]:
    """`model` and every model that it is made of."""
    yield model
    for part in _inner(model):
        yield from inside(part)


def _inner(model: Any) -> list[Any]:
    components = list(getattr(model, "components", ()))
    return components or [part for part in [getattr(model, "model", None)] if part is not None]


def _readers(model: Any) -> Iterator[tuple[Callable[[Prefix], int], int, int]]:
    """How each network of limited context counts a prompt, that limit, and its tokens for a new one."""
    aligned = [part for part in inside(model) if isinstance(part, Aligned)]
    for part in aligned:
        if (limit := context_length(part.model)) is not None:
            yield partial(_own_length, part), limit, OWN_TOKENS
    if not aligned and (limit := context_length(model)) is not None:
        yield len, limit, 1


def _own_length(model: Aligned, prompt: Prefix) -> int:
    return len(model.read(model.shared.bytes_of(prompt)))


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text of its own accord."""
    if getattr(tokenizer, "bos_token_id", None) is None:
        return ()
    plain, special = (list(tokenizer.encode("a", add_special_tokens=add)) for add in (False, True))
    start = next((n for n in range(len(special)) if special[n : n + len(plain)] == plain), 0)
    return tuple(special[:start])


def _stand_in(vocabulary: Vocabulary) -> tuple[int, ...]:
    if not hasattr(vocabulary.tokenizer, "bos_token_id"):
        return ()
    begin = vocabulary.tokenizer.bos_token_id
    return (int(begin),) if begin is not None else vocabulary.eos[:1]
