"""Watch a running sampler: draw, score, bet, and stop as soon as the evidence is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats.eprocess import EProcess, log_threshold
from me_stats.evidence import collect
from me_stats.families import SCORE_FAMILIES, Family
from me_stats.samplers.base import Sampler
from me_stats.trace import require_independent_rows
from me_stats.vocabulary import Prompt, as_prompts


@dataclass(frozen=True, eq=False)
class WatchResult:
    """What `watch` saw. `log_e` and `log_sup` in nats; `worst` and `member` have the largest E at the end.

    `tokens_to_reject` counts tokens up to the first look with E >= 1/alpha, None without one. `process` continues.
    """

    rejected: bool
    alpha: float
    pvalue: float
    log_e: float
    log_sup: float
    tokens: int
    tokens_to_reject: int | None
    sequences: int
    impossible: int
    worst: str
    member: str
    by_family: dict[str, float]
    process: EProcess


def watch(
    sampler: Sampler,
    prompts: Prompt | Sequence[Prompt],
    *,
    alpha: float,
    max_tokens: int,
    max_new_tokens: int,
    seed: int,
    batch: int = 16,
    model: Any = None,
    families: Sequence[Family] = SCORE_FAMILIES,
    process: EProcess | None = None,
) -> WatchResult:
    """Draw from `sampler` until E >= 1/alpha or `max_tokens` were drawn; a right sampler is rejected with P <= alpha.

    Batches of `batch` continuations of each prompt, with fresh row numbers, are scored by teacher forcing. Raises
    ValueError for counts below 1, or a sampler whose rows share component draws.

    Parameters
    ----------
    max_tokens
        The last batch is fed whole, so that slightly more may be drawn.
    model
        The law under the null; default the sampler's own model.
    families
        Alternatives; with `SCORE_FAMILIES` only K floats a token are kept, never a law.
    process
        Continue this process, of the same prompts and seed; its number of sequences is the first row.

    Examples
    --------
    >>> from me_stats import ConstantMixing, Ensemble, MESampler, SequenceMixtureSampler
    >>> from me_stats.models import MarkovModel
    >>> toys = [MarkovModel.random(5, seed=s, concentration=0.5) for s in (0, 1)]
    >>> ensemble = Ensemble(toys, ConstantMixing([0.5, 0.5]))
    >>> given = dict(alpha=1e-6, max_tokens=3000, max_new_tokens=32, seed=0)
    >>> watch(MESampler(ensemble), [0], **given).rejected
    False
    >>> found = watch(SequenceMixtureSampler(ensemble), [0], **given)
    >>> found.rejected, found.worst, found.tokens < 1500
    (True, 'hidden Markov', True)
    """
    log_threshold(alpha)
    require_independent_rows(sampler, "watch")
    for name, value in (("max_tokens", max_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    model = sampler.model if model is None else model
    if process is None:
        process = EProcess(len(getattr(model, "components", (model,))), families=families)
    per_batch = batch * len(as_prompts(prompts))
    while not process.rejects(alpha) and process.tokens < max_tokens:
        rows = process.sequences + np.arange(per_batch)
        trace = sampler.sample(prompts, n=batch, max_new_tokens=max_new_tokens, seed=seed, rows=rows)
        # A generator of its own for each batch, so that a resumed run draws the same numbers.
        rng = np.random.default_rng([seed, process.sequences]) if process.needs_laws else None
        process.update(collect(model, trace.row_prompts(), trace.tokens, families=process.families, rng=rng))
    members = process.by_member[process.worst]
    return WatchResult(
        rejected=process.rejects(alpha),
        alpha=alpha,
        pvalue=process.pvalue,
        log_e=process.log_e,
        log_sup=process.log_sup,
        tokens=process.tokens,
        tokens_to_reject=process.looks.tokens_to(alpha),
        sequences=process.sequences,
        impossible=process.impossible,
        worst=process.worst,
        member=max(members, key=lambda label: members[label]),
        by_family=process.by_family,
        process=process,
    )
