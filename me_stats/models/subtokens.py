"""Scores of shared strings that a component has no id for: by the first token of its own reading.

Published aligners that take a union of top-k sets over mixed vocabularies score every string of the union under every
model. A string outside a vocabulary gets the probability of its first subtoken there. These scores are no law: strings
that begin alike share one subtoken, so their sum over the union can exceed 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.warped import Warped
from me_stats.vocabulary_map import ByteStrings, TokenBytes

if TYPE_CHECKING:
    from me_stats.models.aligned import Aligned

_UNMET = -2


class FirstSubtoken:
    r"""The string whose probability scores each shared string under one table: itself, or its first subtoken.

    A string that the table has an id for stands for itself. Another one is read as it would be in the middle of a
    text (no bytes in front), and the string of the first id stands in: :math:`score(s) = P(bytes(T(s)_1))`. The end of
    sequence is the end by role, and is never spelled. A string is read when it is first met, and remembered.

    Parameters
    ----------
    table
        The component's `TokenBytes`.
    shared
        The alphabet that the component is aligned to.

    Examples
    --------
    >>> table = TokenBytes.greedy([b"a", b"b", b"ab"])
    >>> shared = ByteStrings([table, TokenBytes.greedy([b"aa", b"abb", b"c"])])
    >>> shared.strings
    (b'a', b'b', b'c', b'aa', b'ab', b'abb')
    >>> FirstSubtoken(table, shared)(np.arange(6)).tolist()
    [0, 1, -1, 0, 4, 4]
    """

    def __init__(self, table: TokenBytes, shared: ByteStrings) -> None:
        self._table, self._shared = table, shared

    @cached_property
    def _targets(self) -> np.ndarray:
        return self._shared.targets(self._table)

    @cached_property
    def _stand_in(self) -> np.ndarray:
        found = np.full(self._shared.vocabulary.size, _UNMET, dtype=np.int64)
        known = np.union1d(self._targets[self._targets >= 0], self._shared.vocabulary.eos).astype(np.int64)
        found[known] = known
        return found

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """(n,) the shared ids that stand in for the shared `ids` (n,); -1 where the table can read nothing of one."""
        for new in np.unique(ids[self._stand_in[ids] == _UNMET]).tolist():
            read = self._table.encode_within(self._shared.strings[new])
            self._stand_in[new] = self._targets[read[0]] if read else -1
        return self._stand_in[ids]

    def scores(self, law: Tensor, kept: Tensor) -> Tensor:
        """Log-scores (B, S) of the strings `kept` (B, S), from a log-law (B, S); other entries mean nothing."""
        ids = kept.any(0).nonzero()[:, 0]
        stand_in = torch.from_numpy(self(ids.cpu().numpy())).to(law.device)
        foreign = stand_in != ids
        scores = law.clone()
        scores[:, ids[foreign]] = law[:, stand_in[foreign].clamp(min=0)].masked_fill(stand_in[foreign] < 0, -torch.inf)
        return scores


def first_subtokens(components: Sequence[Any]) -> tuple[FirstSubtoken, ...]:
    """The rule of each component; none at all unless every one is `Aligned`, bare or `Warped`."""
    aligned = [_aligned(component) for component in components]
    return tuple(one.first_subtoken for one in aligned if one is not None) if None not in aligned else ()


def _aligned(model: Any) -> Aligned | None:
    while isinstance(model, Warped):
        model = model.model
    return model if isinstance(getattr(model, "first_subtoken", None), FirstSubtoken) else None
