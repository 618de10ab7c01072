"""What a token id means: the one thing that models must share before their laws can be mixed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Vocabulary:
    """V token ids, 0..V-1, with the ids that end a sequence.

    Two vocabularies are equal when size, end-of-sequence ids and fingerprint agree; the tokenizer
    object itself is not compared. Laws over equal vocabularies can be mixed.

    Parameters
    ----------
    size
        V, the number of token ids (the width of every law).
    eos
        Ids that end a sequence. Empty: sequences end at ``max_new_tokens`` only.
    fingerprint
        A hash of the token table. Toys use the default, ``"ids"``.
    tokenizer
        Optional object with ``encode(text, add_special_tokens=False)`` and ``decode(ids)``.

    Examples
    --------
    >>> Vocabulary(3, eos=(2,)) == Vocabulary(3, eos=(2,))
    True
    >>> Vocabulary(3).encode([0, 2, 1])
    (0, 2, 1)
    """

    size: int
    eos: tuple[int, ...] = ()
    fingerprint: str = "ids"
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if operator.index(self.size) < 1:
            raise ValueError(f"Vocabulary size must be at least 1, got {self.size}")
        object.__setattr__(self, "eos", tuple(sorted({int(token) for token in self.eos})))
        if any(not 0 <= token < self.size for token in self.eos):
            raise ValueError(f"eos ids must lie in 0..{self.size - 1}, got {self.eos}")

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: text through the tokenizer, ids checked and passed through."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TypeError(
                    "this vocabulary has no tokenizer, so a prompt must be a sequence of token ids, "
                    f"got the text {prompt[:40]!r}"
                )
            ids = tuple(int(token) for token in self.tokenizer.encode(prompt, add_special_tokens=False))
        else:
            try:
                ids = tuple(operator.index(token) for token in prompt)
            except TypeError as error:
                raise TypeError(f"a prompt must be text or a sequence of integer ids, got {prompt!r:.60}") from error
        outside = [token for token in ids if not 0 <= token < self.size]
        if outside:
            raise ValueError(f"prompt has token id {outside[0]}, outside the vocabulary 0..{self.size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; padding (-1) is skipped, and ids are shown as numbers without a tokenizer."""
        kept = [int(token) for token in ids if int(token) >= 0]
        if self.tokenizer is None:
            return " ".join(map(str, kept))
        return str(self.tokenizer.decode(kept))

    def require_equal(self, other: Vocabulary, *, name: str, other_name: str) -> None:
        """Raise ValueError unless a law over ``self`` can be mixed with a law over ``other``."""
        if self == other:
            return
        if self.size != other.size:
            reason = f"{self.size} against {other.size} tokens"
        elif self.fingerprint != other.fingerprint:
            reason = "same size, but the ids stand for different tokens"
        else:
            reason = f"different end-of-sequence ids {self.eos} against {other.eos}"
        raise ValueError(
            f"{name} and {other_name} have different vocabularies ({reason}); "
            "only laws over one vocabulary can be mixed"
        )


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: a text or a sequence of ints is one prompt.

    >>> as_prompts("a"), as_prompts([1, 2]), as_prompts(["a", [1, 2]])
    (['a'], [[1, 2]], ['a', [1, 2]])
    """
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if not listed or all(_is_token(item) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _is_token(item: object) -> bool:
    # Tensors and arrays have __index__ whatever they hold, so a scalar is told by its dimension.
    return hasattr(item, "__index__") and getattr(item, "ndim", 0) == 0
