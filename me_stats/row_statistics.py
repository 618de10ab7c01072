"""What a long continuation is summed up by: block means of per-token statistics, K floats a token never kept.

A row of T tokens is cut into G blocks of equal length. A statistic of a row is the mean of its blocks; how it moves
along the row is what `dependence.drift` and `variance.variance_growth` read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from me_stats.models.ensemble import Ensemble, chunked_paths
from me_stats.vocabulary import Vocabulary

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REPEATED = 4  # tokens in a row that were there before make a repetition
_MIXER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing modulo 2^64


def token_features(vocabulary: Vocabulary) -> dict[str, Floats]:
    """Numbers (V,) of each token that need no model: share of letters in its text, and whether it breaks the line.

    A vocabulary without a tokenizer has the id itself, over V - 1.

    >>> token_features(Vocabulary(3))
    {'id': array([0. , 0.5, 1. ])}
    """
    if vocabulary.tokenizer is None:
        return {"id": np.arange(vocabulary.size) / max(1, vocabulary.size - 1)}
    texts = [vocabulary.decode([token]) for token in range(vocabulary.size)]
    return {
        "letters": np.array([sum(map(str.isalpha, text)) / max(1, len(text)) for text in texts]),
        "line breaks": np.array([float("\n" in text) for text in texts]),
    }


def token_statistics(tokens: ArrayLike, features: Mapping[str, Floats], *, blocks: int) -> dict[str, Floats]:
    """Block means (N, G) of statistics of tokens (N, T) alone, G = `blocks`, a divisor of T.

    ``repetition``: share of tokens that end a run of 4 which stood in the row before. ``distinct``: different bigrams
    of a block over its bigrams. Each of `features`, numbers (V,) by name: its mean over the block.

    >>> found = token_statistics([[0, 1, 2, 3, 0, 1, 2, 3]], {}, blocks=1)
    >>> {name: value.tolist() for name, value in found.items()}  # 4 of 7 bigrams differ; one run of 4 came back
    {'repetition': [[0.125]], 'distinct': [[0.5714285714285714]]}
    """
    ids = np.asarray(tokens)
    size = _block_size(ids, blocks)
    grams = np.zeros((len(ids), ids.shape[1]), dtype=np.uint64)
    for back in range(REPEATED):
        shifted = np.zeros_like(grams)
        shifted[:, back:] = ids[:, : ids.shape[1] - back].astype(np.uint64) + np.uint64(1)
        grams = grams * _MIXER + shifted
    again = _seen_before(grams)
    again[:, : REPEATED - 1] = False
    cells = ids.reshape(len(ids) * blocks, size).astype(np.uint64)
    pairs = cells[:, :-1] * _MIXER + cells[:, 1:]
    different = (~_seen_before(pairs)).mean(1) if size > 1 else np.ones(len(cells))
    found = {"repetition": block_means(again, blocks), "distinct": different.reshape(len(ids), blocks)}
    return found | {name: block_means(values[ids], blocks) for name, values in features.items()}


def scored_tokens(
    ensemble: Ensemble, prompts: Sequence[Sequence[int]], tokens: ArrayLike,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Floats]:  # fmt: skip
    """Per-token statistics (N, T) of tokens (N, T) that need the laws, by teacher forcing: one pass per component.

    ``log_prob``: log of the mixture's probability of the token, in nats. ``entropy`` of the mixture, in nats.
    ``responsibility``: posterior probability that component 0 wrote the token, its weight if none can.
    ``disagreement``: ``sum_i w_i TV(P_i, P)``, how far apart the components are. Holds four (N, T) arrays and a bounded
    chunk of laws.
    """
    ids = np.asarray(tokens)
    names = ("log_prob", "entropy", "responsibility", "disagreement")
    found = {name: np.empty(ids.size) for name in names}
    start = 0
    for laws, log_weights, drawn in chunked_paths(ensemble, list(prompts), ids.tolist()):
        joint = laws.double() + log_weights.to(laws.device)[..., None]
        mixed = joint.logsumexp(1)
        place = drawn.to(laws.device)[:, None]
        own = joint.gather(2, place[:, None].expand(-1, laws.shape[1], 1))[..., 0]
        # A token that no component can write teaches nothing, as in `trace.Score.responsibilities`.
        teaches = own.logsumexp(1, keepdim=True) > -torch.inf
        posterior = torch.where(teaches, own, log_weights.to(own.device, own.dtype)).softmax(1)
        law = mixed.exp()
        apart = (laws.double().exp() - law[:, None]).abs().sum(-1) / 2
        values = (
            mixed.gather(1, place)[:, 0],
            torch.special.entr(law).sum(-1),
            posterior[:, 0],
            (log_weights.to(laws.device).exp() * apart).sum(1),
        )
        for name, value in zip(names, values, strict=True):
            found[name][start : start + len(drawn)] = value.cpu().numpy()
        start += len(drawn)
        progress(len(drawn))
    return {name: values.reshape(ids.shape) for name, values in found.items()}


def block_means(values: ArrayLike, blocks: int) -> Floats:
    """Means (N, G) of G = `blocks` equal blocks of values (N, T).

    >>> block_means([[1.0, 3.0, 5.0, 7.0]], 2).tolist()
    [[2.0, 6.0]]
    """
    array = np.asarray(values)
    size = _block_size(array, blocks)
    return np.asarray(array.reshape(len(array), blocks, size).mean(2, dtype=np.float64))


def first_end(tokens: ArrayLike, eos: Sequence[int]) -> Ints:
    """How many tokens (N,) each row of tokens (N, T) would have if its first end-of-sequence token ended it; 0: none.

    >>> first_end([[3, 0, 1], [3, 3, 3]], eos=(0,)).tolist()
    [2, 0]
    """
    is_end = np.isin(np.asarray(tokens), list(eos))
    return np.where(is_end.any(1), is_end.argmax(1) + 1, 0).astype(np.int64)


def _block_size(array: NDArray[np.generic], blocks: int) -> int:
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"tokens must be (N, T) with a token each, got shape {array.shape}")
    if blocks < 1 or array.shape[1] % blocks:
        raise ValueError(f"blocks must divide the {array.shape[1]} tokens of a row, got {blocks}")
    return math.floor(array.shape[1] / blocks)


def _seen_before(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each entry of keys (N, T) stood further left in its row."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, 1)
    seen = np.zeros(keys.shape, dtype=bool)
    np.put_along_axis(seen, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return seen
