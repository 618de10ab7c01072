"""Laws over whole sequences, by enumeration: of a model, and of a sampler's real code.

`sequence_law` multiplies a model's conditionals over every sequence. `sampler_law` runs the sampler itself
with an enumerating draw, so that every random path of the real code is walked once and weighted. Where the
two agree, the sampler is right on that model; no statistics are involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Stream
from me_stats.models.base import open_session
from me_stats.samplers.base import Sampler
from me_stats.vocabulary import Prompt


@dataclass(frozen=True)
class SequenceLaw:
    """An exact law over sequences.

    Attributes
    ----------
    sequences
        (M, T) distinct token sequences, -1 after the end, in lexicographic order.
    log_probs
        (M,) natural log-probabilities; sequences of probability zero are left out.
    """

    sequences: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def collect(cls, sequences: np.ndarray, log_probs: np.ndarray) -> SequenceLaw:
        """Merge equal sequences, adding their probabilities."""
        distinct, place = np.unique(sequences, axis=0, return_inverse=True)
        mass = np.zeros(len(distinct))
        np.add.at(mass, place.reshape(-1), np.exp(log_probs))
        kept = mass > 0
        return cls(distinct[kept], np.log(mass[kept]))

    @property
    def rows(self) -> list[list[int]]:
        """The sequences without what stands after their end."""
        return [[token for token in row if token >= 0] for row in self.sequences.tolist()]

    @property
    def total(self) -> float:
        """Sum of all probabilities: 1 up to rounding."""
        return float(np.exp(self.log_probs).sum())

    def aligned(self, other: SequenceLaw) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of both laws over the union of their sequences, -inf where absent."""
        width = max(self.sequences.shape[1], other.sequences.shape[1])
        both = np.concatenate([_padded(self.sequences, width), _padded(other.sequences, width)])
        distinct, place = np.unique(both, axis=0, return_inverse=True)
        place = place.reshape(-1)
        mine, theirs = np.full((2, len(distinct)), -np.inf)
        mine[place[: len(self.sequences)]] = self.log_probs
        theirs[place[len(self.sequences) :]] = other.log_probs
        return mine, theirs

    def tv_distance(self, other: SequenceLaw) -> float:
        """Total variation ½ Σ |p − q| between two laws over sequences, in [0, 1]."""
        mine, theirs = self.aligned(other)
        return min(1.0, float(np.abs(np.exp(mine) - np.exp(theirs)).sum() / 2))


def sequence_law(model: Any, prompt: Prompt, *, max_new_tokens: int, max_sequences: int = 2_000_000) -> SequenceLaw:
    """Exact law of `max_new_tokens` tokens after `prompt`, from the model's conditionals.

    Raises
    ------
    ValueError
        If more than `max_sequences` sequences have positive probability.

    Examples
    --------
    >>> from me_stats.models.toy import MarkovModel
    >>> chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    >>> law = sequence_law(chain, [0], max_new_tokens=2)
    >>> law.sequences.tolist(), np.exp(law.log_probs).round(3).tolist()
    ([[0, 0], [0, 1], [1, 0], [1, 1]], [0.81, 0.09, 0.02, 0.08])
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens}")
    eos = np.array(model.vocabulary.eos, dtype=np.int64)
    start = model.vocabulary.encode(prompt)
    live = np.zeros((1, 0), dtype=np.int64)
    weight = np.zeros(1)
    done: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(max_new_tokens):
        session = open_session(model, [start] * len(live), max_new_tokens=max_new_tokens)
        every = np.arange(len(live))
        for earlier in range(step):
            session.append(every, torch.from_numpy(live[:, earlier]))
        laws = session.log_probs(every).double().cpu().numpy()
        parent, token = np.nonzero(laws > -np.inf)
        if len(parent) > max_sequences:
            raise ValueError(
                f"{len(parent):,} sequences after {step + 1} tokens, more than max_sequences={max_sequences:,}; "
                "shorten max_new_tokens, truncate the law (TopK) or raise max_sequences"
            )
        live = np.column_stack([live[parent], token])
        weight = weight[parent] + laws[parent, token]
        ended = np.isin(token, eos)
        if ended.any():
            done.append((_padded(live[ended], max_new_tokens), weight[ended]))
            live, weight = live[~ended], weight[~ended]
        if not len(live):
            break
    done.append((_padded(live, max_new_tokens), weight))
    return SequenceLaw.collect(np.concatenate([s for s, _ in done]), np.concatenate([w for _, w in done]))


def sampler_law(sampler: Sampler, prompt: Prompt, *, max_new_tokens: int, max_paths: int = 4_000_000) -> SequenceLaw:
    """Exact law of what `sampler` writes, by walking every random path of its own code.

    Row number r of one big run is read as a mixed-radix number whose digits are the row's choices, so the
    rows together take every path once. Works for any sampler whose choices all pass through its draw and whose
    rows do not read each other; of rows that share component draws (`MESampler`) it walks one of each group.

    Raises
    ------
    ValueError
        If the sampler has more than `max_paths` random paths.

    Examples
    --------
    >>> from me_stats import ConstantMixing, Ensemble, MESampler
    >>> from me_stats.models import MarkovModel
    >>> toy = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]))
    >>> law = sampler_law(MESampler(toy), [0], max_new_tokens=3)
    >>> law.tv_distance(sequence_law(toy, [0], max_new_tokens=3)) < 1e-12
    True
    """
    paths = 1
    while True:
        walk = _Walk(paths, sampler.shared_rows)
        numbers = np.arange(paths) * sampler.shared_rows
        trace = sampler.sample([prompt], n=paths, max_new_tokens=max_new_tokens, rows=numbers, draw=walk)
        needed = float(walk.radix.max())
        if needed <= paths:
            break
        # Deeper choices appear only on rows that reach them, so the count is found in rounds.
        if needed > max_paths:
            raise ValueError(
                f"the sampler has at least {needed:,.0f} random paths, more than max_paths={max_paths:,}; "
                "shorten max_new_tokens, truncate the components (TopK) or raise max_paths"
            )
        paths = int(needed)
    # A row whose number has digits left over repeats a shorter path of another row.
    once = walk.remaining == 0
    sequences = _padded(trace.tokens.numpy()[once], max_new_tokens)
    law = SequenceLaw.collect(sequences, walk.log_weight[once])
    if abs(law.total - 1) > 1e-3:
        raise ValueError(
            f"the paths of {sampler!r} have total probability {law.total:.6g}, not 1: "
            "some choice does not pass through the draw, or depends on other rows"
        )
    return law


class _Walk:
    """A draw that takes, on row r, the choices that r spells out, and keeps their probability.

    With `shared_rows` B, row r has the number r·B and the group r.
    """

    def __init__(self, paths: int, shared_rows: int = 1) -> None:
        self.shared_rows = shared_rows
        self.remaining = np.arange(paths, dtype=np.int64)
        self.radix = np.ones(paths)  # floats: the product of counts may pass 2⁶³, and then is only compared
        self.log_weight = np.zeros(paths)

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        rows = rows if stream == "component" else rows // self.shared_rows
        laws = log_law.double().cpu().log_softmax(-1).numpy()
        # Possible choices first, in id order, so that a digit below `count` names one of them.
        order = np.argsort(~(laws > -np.inf), axis=1, kind="stable")
        count = (laws > -np.inf).sum(1)
        if not count.all():
            raise ValueError("cannot draw: a next-token law has a NaN or no token with positive probability")
        law = np.arange(len(rows)) if index is None else index.cpu().numpy()
        digit = self.remaining[rows] % count[law]
        self.remaining[rows] //= count[law]
        self.radix[rows] *= count[law]
        choice = order[law, digit]
        self.log_weight[rows] += laws[law, choice]
        return torch.from_numpy(choice).to(log_law.device)


def _padded(sequences: Sequence[Sequence[int]] | np.ndarray, width: int) -> np.ndarray:
    array = np.asarray(sequences, dtype=np.int64)
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1)
