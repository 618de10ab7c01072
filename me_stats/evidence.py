"""What an e-process needs of realised tokens: K floats a token from scores, a few more from full laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.families import Bools, Family, Floats, Laws
from me_stats.models.ensemble import chunked_paths
from me_stats.trace import Trace, require_independent_rows, score

_LARGEST = 700.0  # log of the largest ratio: cutting q only lowers E, and only a component of no weight gets there


@dataclass(frozen=True, eq=False)
class Evidence:
    """Realised tokens (...) as the families read them.

    Attributes
    ----------
    ratios, weights
        (..., K) ``P_i(x_t)/p_t(x_t)`` and w_i(prefix); neutral where `live` is False.
    live
        (...) True where a token of positive probability was written.
    impossible
        (...) True where a token of probability zero was written.
    readings
        (..., F) for each family that needs full laws, by its name.
    """

    ratios: Floats
    weights: Floats
    live: Bools
    impossible: Bools
    readings: Mapping[str, Floats]

    @classmethod
    def from_scores(cls, component_log_probs: Tensor, log_weights: Tensor, tokens: Tensor) -> Evidence:
        """From log P_i(x_t) (..., K) and log weights (..., K) in nats; negative tokens mark steps after the end.

        Raises ValueError for shapes that do not match, NaN, positive log-probabilities or weights that do not sum to 1.

        >>> tokens = torch.tensor([0, 3, -1])
        >>> logs = torch.log(torch.tensor([[0.1, 0.3], [0.0, 0.0], [1.0, 1.0]]))
        >>> evidence = Evidence.from_scores(logs, torch.log(torch.tensor([0.5, 0.5])), tokens)
        >>> evidence.ratios.round(3).tolist(), evidence.live.tolist(), evidence.impossible.tolist()
        ([[0.5, 1.5], [1.0, 1.0], [1.0, 1.0]], [True, False, False], [False, True, False])
        """
        log_parts, weights, written = _checked(component_log_probs, log_weights, tokens)
        peak = np.where(weights > 0, log_parts, -np.inf).max(-1)
        live = written & (peak > -np.inf)
        parts = np.exp(np.minimum(log_parts - np.where(live, peak, 0.0)[..., None], _LARGEST))
        mixed = np.where(live, (weights * parts).sum(-1), 1.0)[..., None]
        with np.errstate(over="ignore"):
            ratios = np.minimum(parts / mixed, np.exp(_LARGEST))
        neutral = ~live[..., None]
        return cls(np.where(neutral, 1.0, ratios), weights, live, written & ~live, {})

    @classmethod
    def from_laws(
        cls,
        component_log_probs: Tensor,
        log_weights: Tensor,
        tokens: Tensor,
        *,
        families: Sequence[Family],
        rng: np.random.Generator | None = None,
    ) -> Evidence:
        """From full laws (..., K, V), for `families` that need them; `rng` randomises the probability transforms.

        Laws are renormalised in float64. Raises ValueError as `from_scores`, and for laws further than 1e-3 from
        normalised or token ids outside the vocabulary.
        """
        laws = component_log_probs
        if laws.ndim < 2 or tokens.shape != laws.shape[:-2]:
            raise ValueError(f"component_log_probs must be (..., K, V) for tokens (...), got {tuple(laws.shape)}")
        if tokens.is_floating_point() or bool((tokens >= laws.shape[-1]).any()):
            raise ValueError(f"tokens must be integers below V={laws.shape[-1]}, negative after the end")
        written = (tokens >= 0).to(laws.device)
        parts = laws[written].double()
        mass = parts.logsumexp(-1, keepdim=True)
        if not bool((mass.abs() < 1e-3).all()):  # NaN compares false
            raise ValueError("component_log_probs must be normalised natural logs without NaN; use log_softmax")
        parts, index = parts - mass, tokens.to(laws.device)[written].long()
        picked = torch.zeros(laws.shape[:-1], dtype=torch.float64)
        picked[written.cpu()] = parts.gather(-1, index[:, None, None].expand(*parts.shape[:-1], 1))[..., 0].cpu()
        base = cls.from_scores(picked, log_weights, tokens)
        weights = torch.from_numpy(base.weights[written.cpu().numpy()]).to(parts.device)
        realised = Laws(parts, (parts + weights.log()[..., None]).logsumexp(-2), index)
        readings = {}
        for family in families:
            if family.needs_laws:
                read = family.read(realised, rng).double().cpu().numpy()
                filled = np.zeros((*tokens.shape, read.shape[-1]))
                filled[written.cpu().numpy()] = read
                readings[family.name] = np.where(base.live[..., None], filled, 0.0)
        return cls(base.ratios, base.weights, base.live, base.impossible, readings)

    @classmethod
    def from_trace(cls, trace: Trace) -> Evidence:
        """From what a sampler wrote, scored under its own model (score families only).

        Raises ValueError for rows that share component draws: an e-process multiplies over rows.
        """
        require_independent_rows(trace, "Evidence.from_trace")
        return cls.from_scores(trace.component_log_probs, trace.score.log_weights, trace.tokens)

    @classmethod
    def join(cls, parts: Sequence[Evidence], written: Bools) -> Evidence:
        """Parts that hold the written tokens of all rows one after the other, as one of axes (N, T)."""

        def spread(arrays: list[np.ndarray], fill: float) -> np.ndarray:
            flat = np.concatenate(arrays)
            grid = np.full((*written.shape, *flat.shape[1:]), fill, dtype=flat.dtype)
            grid[written] = flat
            return grid

        n_components = parts[0].weights.shape[-1]
        return cls(
            spread([part.ratios for part in parts], 1.0),
            spread([part.weights for part in parts], 1 / n_components),
            spread([part.live for part in parts], False),
            spread([part.impossible for part in parts], False),
            {name: spread([part.readings[name] for part in parts], 0.0) for name in parts[0].readings},
        )


def collect(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    *,
    families: Sequence[Family],
    rng: np.random.Generator | None = None,
) -> Evidence:
    """Evidence of `tokens` (N, T), -1 after the end, by teacher forcing under `model`; one prompt of ids per row.

    Keeps K floats a token where no family needs laws. A model that is not an Ensemble is one component of weight 1.

    >>> from me_stats.families import Tilts
    >>> from me_stats.models.toy import MarkovModel
    >>> model = MarkovModel.random(4, seed=0)
    >>> evidence = collect(model, [(0,), (1,)], torch.tensor([[1, 2, 3], [3, -1, -1]]), families=[Tilts()])
    >>> evidence.live.sum(), evidence.readings["tilts"].shape
    (np.int64(4), (2, 3, 20))
    """
    if not any(family.needs_laws for family in families):
        scored = score(model, prompts, tokens)
        return Evidence.from_scores(
            scored.component_log_probs, scored.log_weights, tokens[:, : scored.log_weights.shape[1]]
        )
    rows = [row[row >= 0].tolist() for row in tokens.cpu()]
    parts = [
        Evidence.from_laws(laws, log_weights, written, families=families, rng=rng)
        for laws, log_weights, written in chunked_paths(model, prompts, rows)
    ]
    return Evidence.join(parts, (tokens >= 0).cpu().numpy())


def _checked(log_parts: Tensor, log_weights: Tensor, tokens: Tensor) -> tuple[Floats, Floats, Bools]:
    """Component log-probabilities and weights (..., K), neutral after the end, and where tokens were written."""
    if log_parts.ndim < 1 or tokens.shape != log_parts.shape[:-1]:
        raise ValueError(
            f"component_log_probs must be (..., K) for tokens {tuple(tokens.shape)}, got {tuple(log_parts.shape)}"
        )
    if tokens.is_floating_point():
        raise ValueError("tokens must be integers, negative after the end")
    n_components = log_parts.shape[-1]
    if log_weights.shape[-1:] != (n_components,):
        raise ValueError(f"log_weights must end in K={n_components}, got {tuple(log_weights.shape)}")
    written = (tokens >= 0).cpu().numpy()
    ended = ~written[..., None]
    parts = np.where(ended, 0.0, log_parts.double().cpu().numpy())
    log_w = np.where(ended, -np.log(n_components), log_weights.double().cpu().expand(parts.shape).numpy())
    if not (parts <= 1e-3).all():  # NaN compares false
        raise ValueError("component_log_probs must be natural log-probabilities, at most 0 and without NaN")
    weights = np.exp(log_w)
    total = weights.sum(-1, keepdims=True)
    if not (np.abs(total - 1) < 1e-3).all():
        raise ValueError("log_weights must be normalised natural logs without NaN; use log_softmax")
    return parts, weights / total, written
