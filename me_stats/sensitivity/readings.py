"""What a sweep reads at one λ besides means over rows: TV of steps, likelihood of a corpus, forecast work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from me_stats.cost import me_work
from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import chunked_paths
from me_stats.sensitivity.estimate import Estimate, mean_estimate, normal_estimate
from me_stats.trace import Trace

Floats = NDArray[np.float64]
Weights = tuple[float, ...]

_PATHS = 4  # simulated runs behind a forecast of forwards


def step_tv_sums(trace: Trace, targets: Sequence[Weights], reference: Weights) -> Floats:
    """(N, G) Σ_t TV(p_λ, p_ref) along the prefixes of each row, for each λ of `targets`: one pass for all.

    For K = 2 the TV of a step is exactly |λ_1 − ref_1| TV(P_1, P_2).
    """
    moves = np.asarray(targets, dtype=np.float64).reshape(-1, len(reference)) - np.asarray(reference)
    lengths = trace.lengths.numpy()
    sums = np.zeros((len(lengths), len(moves)))
    if not moves.any():
        return sums
    row = np.repeat(np.arange(len(lengths)), lengths)
    start = 0
    for laws, _, _ in chunked_paths(trace.model, trace.row_prompts(), trace.sequences()):
        probs = laws.double().exp()
        if len(reference) == 2:
            apart = (probs[:, 0] - probs[:, 1]).abs().sum(-1) / 2
            steps = apart.cpu().numpy()[:, None] * np.abs(moves[:, 0])
        else:
            columns = [(probs * probs.new_tensor(move)[:, None]).sum(1).abs().sum(-1) / 2 for move in moves]
            steps = np.stack([column.cpu().numpy() for column in columns], axis=1)
        np.add.at(sums, row[start : start + len(steps)], steps)
        start += len(steps)
    return sums


def corpus_nll(
    log_probs: ArrayLike, weights: Sequence[float], *, confidence: float = 0.95
) -> tuple[Estimate, tuple[Estimate | None, ...]]:
    """Mean of −log Σ_i λ_i P_i over the tokens of a corpus, nats a token, and its derivatives towards each vertex.

    The values are exact for this corpus. The intervals are for the text that it stands for, as if tokens were
    independent; where λ excludes a token the value is inf and the derivatives are None.

    >>> nll, slopes = corpus_nll(np.log([[0.5, 0.25], [0.5, 0.75]]), [0.5, 0.5])
    >>> round(nll.value, 3), [round(slope.value, 3) for slope in slopes]
    (0.725, [-0.067, 0.067])
    """
    scores = checked_corpus(log_probs, len(weights))
    law = checked_weights(weights, scores.shape[1], "weights")
    with np.errstate(divide="ignore"):
        joint = scores + np.log(law)
    peak = joint.max(1)
    method = "exact on the corpus, stderr over tokens"
    if (peak == -np.inf).any():
        return Estimate(math.inf, 0.0, (math.inf, math.inf), len(scores), method), (None,) * len(law)
    mixed = peak + np.log(np.exp(joint - peak[:, None]).sum(1))
    nll = mean_estimate(-mixed, confidence=confidence, method=method)
    terms = -np.expm1(scores - mixed[:, None])
    stderr = terms.std(0, ddof=1) / math.sqrt(len(terms))
    slopes = [
        normal_estimate(value, error, len(terms), confidence=confidence, method=method)
        for value, error in zip(terms.mean(0).tolist(), stderr.tolist(), strict=True)
    ]
    return nll, tuple(slopes)


def distinct(row: Sequence[int]) -> float:
    """Share of different tokens in a row; 1 for an empty one."""
    return len(set(row)) / len(row) if row else 1.0


def repetition(row: Sequence[int], *, size: int = 2) -> float:
    """Share of a row's runs of `size` tokens that stood in it before; 0 for a shorter row."""
    runs = [tuple(row[start : start + size]) for start in range(len(row) - size + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def tokens_forwarded(trace: Trace, weights: Weights) -> Floats:
    """(N,) expected tokens that ME feeds through networks for each row, one read a token: catching up included.

    A component drawn last at step l (probability λ (1 − λ)^(T − l)) has been fed the prompt and l − 1 tokens.
    """
    lengths = trace.lengths.numpy()
    prompts = np.array([len(prompt) for prompt in trace.row_prompts()], dtype=np.float64)
    steps = np.arange(1, max(1, int(lengths.max(initial=0))) + 1)
    after = lengths[:, None] - steps
    total = np.zeros(len(lengths))
    for weight in weights:
        last = np.where(after >= 0, weight * (1.0 - weight) ** np.maximum(after, 0), 0.0)
        total += (last * (prompts[:, None] + steps - 1)).sum(1)
    return total


def forwards_per_token(
    weights: Weights, lengths: Floats, *, lockstep: bool = False, prompt_index: ArrayLike | None = None
) -> float:
    """ME forwards a token, all rows in one batch: expected in lockstep, else the mean of some simulated runs.

    In lockstep a step runs every component that some row draws. Else `cost.me_work` counts, with the forwards in which
    rows copy a prompt (N,) `prompt_index` that another one reads.
    """
    if not lockstep:
        steps, rng = int(lengths.max(initial=0)), np.random.default_rng(0)
        after = np.arange(steps) >= lengths[:, None]
        paths = rng.choice(len(weights), (_PATHS, len(lengths), steps), p=weights)
        simulated = [me_work(np.where(after, -1, path), prompt_length=_known(prompt_index), prompt_index=prompt_index)
                for path in paths]  # fmt: skip
        return float(np.mean([work.cost.forwards for work in simulated]) / lengths.sum())
    alive = np.array([(lengths > step).sum() for step in range(int(lengths.max(initial=0)))], dtype=np.float64)
    runs = sum(1.0 - (1.0 - weight) ** alive for weight in weights)
    return float(np.sum(runs) / alive.sum())


def _known(prompt_index: ArrayLike | None) -> int | NDArray[np.int64]:
    """Lengths of prompts, which no number of forwards depends on."""
    return 1 if prompt_index is None else np.ones(int(np.max(prompt_index)) + 1, dtype=np.int64)


def checked_weights(weights: Sequence[float], n_components: int, name: str) -> Weights:
    """`weights` (K,) on the simplex, or a ValueError that calls them `name`."""
    try:
        values = tuple(ConstantMixing(np.asarray(weights, dtype=np.float64)).weights.tolist())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(values) != n_components:
        raise ValueError(f"{name} has weights of {len(values)} entries for {n_components} components; give one each")
    return values


def checked_corpus(log_probs: ArrayLike, n_components: int) -> Floats:
    """Component log-probabilities (n, K), or a ValueError."""
    scores = np.asarray(log_probs, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] != n_components or len(scores) < 2:
        raise ValueError(
            f"corpus must be (n, {n_components}) log-probabilities of two tokens or more, got {scores.shape}"
        )
    if not (scores <= 1e-3).all():  # NaN compares false
        raise ValueError("corpus must hold natural log-probabilities, at most 0 and without NaN")
    return scores
