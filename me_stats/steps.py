"""What the tests of whole sequences need of each step: a few numbers, computed once from its laws.

Given the law w_t over components and the components' laws P_i at every step, the score of the realised token::

    s_ti = sqrt(w_ti) (P_ti(x_t)/p_t(x_t) - 1),    p_t = sum_i w_ti P_ti,    E[s_t | past] = 0

is a martingale difference whose conditional covariance I_t is known exactly, for constant weights and for any router
that reads the prefix alone. Scaled so, ``sum_i s_ti s_ui`` is the locally most powerful statistic against a component
index that remembers itself, no component is singled out, and components of weight zero drop out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from me_stats.divergence import LONG
from me_stats.long_steps import LongSteps
from me_stats.models.ensemble import chunked_paths

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StepScores:
    """What the tests need of each step: N sequences, T steps, K components, nats; zeros where `mask` is False.

    `score` (N, T, K) and `information` (N, T, K, K) are s_t and E[s_t s_t^T | past]; `log_p`, `entropy` and `variance`
    (N, T) are log p_t(x_t), H_t and Var(log p_t); `p` is p_t(x_t); `below_ratio` and `below_rank` (N, T) are the mass
    of the tokens that come before x_t by P_1/p and by decreasing p (ties by id). `impossible` marks realised tokens of
    probability zero; they are masked.
    """

    score: Floats
    information: Floats
    log_p: Floats
    entropy: Floats
    variance: Floats
    p: Floats
    below_ratio: Floats
    below_rank: Floats
    mask: Bools
    impossible: Bools


def step_scores(component_log_probs: Tensor, log_weights: Tensor, tokens: Tensor) -> StepScores:
    """Summaries of the realised tokens (...) under laws (..., K, V) and log weights (..., K), all in one pass.

    Leading axes are free: pass one sequence (T, K, V), one step of all (N, K, V), or everything; join the parts with
    `concatenate_rows` or `stack_steps`. It needs about 60 K V bytes a step. Negative tokens mark steps after the end,
    where laws and weights are ignored. Elsewhere they are renormalised in float64; weights broadcast, and may hold
    -inf. Float32 laws of `divergence.LONG` tokens or more on a processor are not widened, but summed in `long_steps`,
    ten times as fast: sums over the vocabulary move by 1e-6, and near-ties in `below_ratio` by their tokens. Raises
    ValueError for shapes that do not match, token ids outside the vocabulary, NaN, or laws further than 1e-3 from
    normalised.

    >>> laws = torch.log(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    >>> steps = step_scores(laws.expand(1, 3, 2, 2), torch.log(torch.tensor([0.5, 0.5])), torch.tensor([[0, 1, -1]]))
    >>> steps.score[0, :, 0].round(3).tolist(), steps.mask.tolist()
    ([0.354, -0.354, 0.0], [[True, True, False]])
    """
    weights, ended = _checked_shapes(component_log_probs, log_weights, tokens)
    log_w = _normalised(weights, "log_weights", ended)
    laws = component_log_probs
    if laws.is_cpu and laws.dtype == torch.float32 and laws.shape[-1] >= LONG and tokens.numel():
        return _long_scores(laws, log_w, tokens.to(torch.int64))
    return _scores(laws, log_w, tokens, ended)


def _scores(laws: Tensor, log_w: Tensor, tokens: Tensor, ended: Tensor) -> StepScores:
    log_parts = _normalised(laws, "component_log_probs", ended[..., None])
    ids = tokens.to(log_parts.device, torch.int64)
    ended, index = ended[..., 0], ids.clamp(min=0)[..., None]
    log_mix = torch.logsumexp(log_parts + log_w[..., None], dim=-2)
    p = log_mix.exp()
    finite = torch.where(p > 0, log_mix, 0.0)
    entropy = -(p * finite).sum(-1)
    variance = (p * (finite + entropy[..., None]).square()).sum(-1)
    # r_i = sqrt(w_i) P_i/sqrt(p) keeps every exponent bounded: w_i P_i <= p.
    r = (0.5 * log_w[..., None] + log_parts - 0.5 * finite[..., None, :]).exp()
    r = torch.where((p > 0)[..., None, :], r, 0.0)
    root = (0.5 * log_w).exp()
    information = r @ r.transpose(-1, -2) - root[..., :, None] * root[..., None, :]
    at = finite.gather(-1, index)[..., 0]
    p_at = p.gather(-1, index)[..., 0]
    impossible = ~ended & (p_at == 0)
    log_parts_at = log_parts.gather(-1, index[..., None, :].expand(*log_parts.shape[:-1], 1))[..., 0]
    score = (0.5 * log_w + log_parts_at - at[..., None]).exp() - root
    ratio = torch.where(p > 0, log_parts[..., 0, :] - finite, math.inf)
    mask = ~ended & ~impossible

    def masked(x: Tensor) -> Floats:
        keep = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return np.asarray(torch.where(keep, x, 0.0).cpu().numpy(), dtype=np.float64)

    return StepScores(
        masked(score),
        masked(information),
        masked(at),
        masked(entropy),
        masked(variance),
        masked(p_at),
        masked(_mass_before(ratio, p, index)),
        masked(_mass_before(-p, p, index)),
        mask.cpu().numpy(),
        impossible.cpu().numpy(),
    )


def collect_steps(model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> StepScores:
    """Summaries (N, T) of N ragged continuations by teacher forcing under `model`, one prompt of ids per row.

    A model that is not an Ensemble is one component of weight 1.

    >>> from me_stats.models.toy import MarkovModel
    >>> collect_steps(MarkovModel.random(4, seed=0), [(0,), (1,)], [[1, 2, 3], [3]]).mask.tolist()
    [[True, True, True], [True, False, False]]
    """
    parts = [step_scores(*chunk) for chunk in chunked_paths(model, prompts, tokens)]
    longest = max(map(len, tokens), default=0)
    return join_steps(parts, np.arange(longest) < np.array([len(row) for row in tokens], dtype=int)[:, None])


def join_steps(parts: Sequence[StepScores], written: Bools) -> StepScores:
    """Parts that hold the written tokens of all rows one after the other, as one of axes (N, T)."""
    joined = {}
    for entry in fields(StepScores):
        flat = np.concatenate([getattr(part, entry.name) for part in parts])
        joined[entry.name] = np.zeros((*written.shape, *flat.shape[1:]), dtype=flat.dtype)
        joined[entry.name][written] = flat
    return StepScores(**joined)


def concatenate_rows(parts: Sequence[StepScores]) -> StepScores:
    """Join parts of shape (T,) or (B, T) into (N, T), padding short ones with masked steps.

    >>> one = step_scores(torch.zeros(3, 1, 1), torch.zeros(1), torch.zeros(3, dtype=torch.int64))
    >>> two = step_scores(torch.zeros(2, 1, 1), torch.zeros(1), torch.zeros(2, dtype=torch.int64))
    >>> concatenate_rows([one, two]).mask.tolist()
    [[True, True, True], [True, True, False]]
    """
    if not parts or any(part.mask.ndim not in (1, 2) for part in parts):
        raise ValueError("parts must be a non-empty sequence of StepScores of shape (T,) or (B, T)")
    longest = max(part.mask.shape[-1] for part in parts)
    joined = {}
    for entry in fields(StepScores):
        rows = []
        for part in parts:
            array = getattr(part, entry.name)
            array = array if part.mask.ndim == 2 else array[None]
            padding = [(0, 0), (0, longest - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
            rows.append(np.pad(array, padding))
        joined[entry.name] = np.concatenate(rows)
    return StepScores(**joined)


def stack_steps(parts: Sequence[StepScores]) -> StepScores:
    """Join T parts of shape (N,), one a step, into (N, T).

    >>> step = step_scores(torch.zeros(5, 1, 1), torch.zeros(1), torch.zeros(5, dtype=torch.int64))
    >>> stack_steps([step, step]).mask.shape
    (5, 2)
    """
    if not parts or any(part.mask.ndim != 1 for part in parts):
        raise ValueError("parts must be a non-empty sequence of StepScores of shape (N,)")
    names = [entry.name for entry in fields(StepScores)]
    return StepScores(**{name: np.stack([getattr(part, name) for part in parts], axis=1) for name in names})


def _long_scores(laws: Tensor, log_w: Tensor, tokens: Tensor) -> StepScores:
    components, vocabulary = laws.shape[-2:]
    work, ended = LongSteps(components, vocabulary), torch.zeros(1, dtype=torch.bool)
    zero, no = np.zeros(()), np.zeros((), dtype=bool)
    none = StepScores(
        np.zeros(components), np.zeros((components, components)), zero, zero, zero, zero, zero, zero, no, no
    )
    parts = []
    flat = laws.reshape(-1, components, vocabulary), log_w.reshape(-1, components), tokens.reshape(-1)
    for law, weights, token in zip(*flat, strict=True):
        sums = work.sums(law, weights, int(token)) if token >= 0 else None
        if token < 0:
            parts.append(none)
        else:
            parts.append(_scores(law, weights, token, ended) if sums is None else StepScores(**sums))
    joined = {entry.name: np.stack([getattr(part, entry.name) for part in parts]) for entry in fields(StepScores)}
    return StepScores(**{name: array.reshape(*tokens.shape, *array.shape[1:]) for name, array in joined.items()})


def _mass_before(key: Tensor, p: Tensor, index: Tensor) -> Tensor:
    own = key.gather(-1, index)
    ids = torch.arange(key.shape[-1], device=key.device)
    before = (key < own) | ((key == own) & (ids < index))
    return torch.where(before, p, 0.0).sum(-1)


def _checked_shapes(laws: Tensor, log_weights: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., K) beside the laws, and which steps (..., 1) come after the end."""
    if laws.ndim < 2 or tokens.shape != laws.shape[:-2]:
        raise ValueError(f"component_log_probs must be (..., K, V) for tokens (...), got {tuple(laws.shape)}")
    if log_weights.shape[-1:] != laws.shape[-2:-1]:
        raise ValueError(f"log_weights must end in K={laws.shape[-2]}, got {tuple(log_weights.shape)}")
    if (tokens.is_floating_point() and tokens.numel()) or (tokens >= laws.shape[-1]).any():
        raise ValueError(f"tokens must be integers below V={laws.shape[-1]}, negative after the end")
    return log_weights.to(laws.device).expand(laws.shape[:-1]), (tokens < 0).to(laws.device)[..., None]


def _normalised(log_p: Tensor, name: str, ended: Tensor) -> Tensor:
    exact = log_p.double()
    mass = torch.logsumexp(exact, dim=-1, keepdim=True)
    if not ((mass.abs() < 1e-3) | ended).all():  # NaN compares false
        raise ValueError(f"{name} must be normalised natural logs without NaN along the last axis; use log_softmax")
    return exact - mass
