"""Documents with cached component log-probabilities: what routers are trained and judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from me_stats.mixing import Mixing
from me_stats.models.base import Prefix

if TYPE_CHECKING:
    from me_stats.corpus import CorpusScores


@dataclass(frozen=True)
class ScoredDocument:
    """T tokens, and log P_i (S, K), float32, of the last S of them; the tokens before those are context only."""

    tokens: tuple[int, ...]
    log_probs: Tensor

    @property
    def start(self) -> int:
        """Place of the first scored token."""
        return len(self.tokens) - len(self.log_probs)


def as_documents(sequences: Sequence[Prefix], component_log_probs: Any, n_components: int) -> list[ScoredDocument]:
    """Checked documents from D sequences and their scores.

    Parameters
    ----------
    component_log_probs
        D arrays (S_d, K), natural logs of the last S_d <= T_d tokens; or one array (Σ T_d, K) of all tokens in order.
        An entry may be -inf, a whole row may not.
    """
    rows = [tuple(int(token) for token in sequence) for sequence in sequences]
    scores = component_log_probs
    if isinstance(scores, (np.ndarray, Tensor)) and scores.ndim == 2:
        if len(scores) != sum(map(len, rows)):
            raise ValueError(
                f"component_log_probs has {len(scores)} rows for {sum(map(len, rows))} tokens; give one row per token, "
                "or one array per sequence for its last tokens"
            )
        scores = _tensor(scores).split(list(map(len, rows)))
    if len(scores) != len(rows):
        raise ValueError(f"component_log_probs has {len(scores)} entries for {len(rows)} sequences; give one each")
    documents = []
    for number, (tokens, given) in enumerate(zip(rows, scores, strict=True)):
        log_probs = _tensor(given).to(torch.float32)
        if log_probs.ndim != 2 or log_probs.shape[1] != n_components or len(log_probs) > len(tokens):
            raise ValueError(
                f"component_log_probs[{number}] must be (S, K) with S <= {len(tokens)} and K={n_components}, "
                f"got {tuple(log_probs.shape)}"
            )
        if bool(log_probs.isnan().any()) or bool((log_probs > 1e-3).any()):
            raise ValueError(f"component_log_probs[{number}] must hold natural logs of probabilities, without NaN")
        if bool((log_probs == -torch.inf).all(-1).any()):
            raise ValueError(f"component_log_probs[{number}] has a token that no component can write; leave it out")
        if len(log_probs):
            documents.append(ScoredDocument(tokens, log_probs))
    return documents


def scored_sequences(scores: CorpusScores) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """The documents of `me_stats.corpus.score_corpus` as the two arguments that `train_router` takes.

    >>> from me_stats.corpus import Document, score_corpus
    >>> from me_stats.models import MarkovModel
    >>> toys = [MarkovModel.random(3, seed=s) for s in (0, 1)]
    >>> sequences, log_probs = scored_sequences(score_corpus(toys, [Document("toy", [0, 1, 2])]))
    >>> sequences, log_probs[0].shape
    ([(0, 1, 2)], (2, 2))
    """
    sequences = [(*prompt, *map(int, tokens)) for prompt, tokens in scores.sequences()]
    return sequences, np.split(scores.log_probs, scores.offsets[1:-1])


def _tensor(scores: Any) -> Tensor:
    # Memory maps are read-only, which torch warns about; a copy is not.
    return scores.detach().cpu() if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores))


def document_nll(
    mixing: Mixing, sequences: Sequence[Prefix], component_log_probs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood (D,) in nats and scored tokens (D,) of each document, for any mixing.

    Differences between two mixings on the same documents are paired; documents, not tokens, are independent.
    `component_log_probs` as in `train_router`; documents without a scored token are left out.

    >>> from me_stats.mixing import ConstantMixing
    >>> nats, tokens = document_nll(ConstantMixing([0.5, 0.5]), [[0, 1]], [np.log([[0.5, 0.5], [1.0, 0.5]])])
    >>> np.exp(-nats).round(6).tolist(), tokens.tolist()
    ([0.375], [2])
    """
    nats, counts = [], []
    for document in as_documents(sequences, component_log_probs, mixing.n_components):
        path = mixing.path_log_weights(document.tokens[: document.start], document.tokens[document.start :])
        nats.append(-float((path + document.log_probs.double()).logsumexp(-1).sum()))
        counts.append(len(document.log_probs))
    return np.array(nats), np.array(counts, dtype=np.int64)
