"""Does a sampler draw from the law that it claims? One call, one declared false-alarm rate, one verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from me_stats.equivalence import required_draws, tv_lower_bound, tv_upper_bound
from me_stats.exact import SequenceLaw
from me_stats.goodness import Portfolio
from me_stats.models.base import require_language_model
from me_stats.samplers.base import Sampler
from me_stats.testing.conditionals import check_conditionals
from me_stats.testing.drawing import Source, structural_faults
from me_stats.testing.result import CheckResult, Outcome, SamplerRejected
from me_stats.twosample import two_sample_portfolio
from me_stats.vocabulary import Prompt, Vocabulary, as_prompts

CELLS = 65  # of the finest partition in a `Portfolio`, which sets how many draws a given TV needs
_MOST_ROWS = 1000  # a side, against a second sampler: kernels need all pairs
_MEMBERS = 9  # of `two_sample_portfolio`
_LEVEL, _SECOND_LEVEL = 1e-6, 1e-3


def check_sampler(
    sampler: Any,
    against: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 1,
    n: int | None = None,
    detect: float = 0.05,
    level: float | None = None,
    seed: int = 0,
    floor: float = 0.0,
    stop_early: bool = True,
    on_fail: Literal["raise", "return"] = "raise",
    progress: Callable[[int], None] | None = None,
) -> CheckResult:
    r"""Check that `sampler` draws from `against`; a right sampler is rejected with probability at most `level`.

    What is tested depends on what is known:

    - a **LanguageModel**: all conditionals are known. First tokens: the `Portfolio` of each prompt. Continuations of
      two or more tokens: `martingale_portfolio`, and e-processes of `ALL_FAMILIES` and of copied rows, which may stop
      the check early. Half of the level goes to the e-processes, the rest is shared equally by the others;
    - a **SequenceLaw** (`me_stats.exact.sequence_law`): a `Portfolio` over whole continuations of one prompt;
    - a **second sampler**: `two_sample_portfolio`. It can find differences and can certify nothing.

    Rows whose shape cannot come from any law (ids outside the vocabulary, tokens after the end, an end without
    an end-of-sequence id) reject by themselves.

    Parameters
    ----------
    sampler
        A `me_stats` sampler, or any callable of the form of `TokenSampler`; see `me_stats.testing.adapters`.
    against
        What it claims to draw from.
    prompts
        One or many, text or ids.
    max_new_tokens
        T. With 1, only the law of one step is tested.
    n
        Continuations of each prompt; default as many as `detect` needs (at most 1,000 against a second sampler).
    detect
        Total variation of one step that has to be found with power 0.8, on partitions of up to 65 cells.
    level
        False-alarm probability of the whole call; default 1e-6, or 1e-3 against a second sampler, where 9/level
        permutations are needed.
    seed
        Every batch gets another seed derived from it; the same call repeats the same draws.
    floor
        Largest TV of one step that rounding may cause (measure it: `me_stats reproduce` does); added to `tv_upper` and
        taken off `tv_lower`. Draws that resolve less than the floor would reject right code, and are refused.
    stop_early
        Stop longer continuations as soon as the evidence suffices. False draws everything, which bounds the size of a
        bug as well.
    on_fail
        "raise" a `SamplerRejected` (an AssertionError), or "return" the result.
    progress
        Called with the number of sequences finished since the last call.

    Raises
    ------
    SamplerRejected
        With the result as `.result`.
    ValueError, TypeError
        For arguments or rows that cannot be checked, such as a sampler whose rows share component draws.

    Examples
    --------
    >>> from me_stats import ConstantMixing, Ensemble, MESampler, SequenceMixtureSampler
    >>> from me_stats.models import MarkovModel
    >>> toys = [MarkovModel.random(5, seed=s, concentration=0.5) for s in (0, 1)]
    >>> ensemble = Ensemble(toys, ConstantMixing([0.5, 0.5]))
    >>> result = check_sampler(MESampler(ensemble), ensemble, [0], max_new_tokens=16, n=2000)
    >>> result.passed, result.tokens, result.tv_upper < 0.06
    (True, 32000, True)
    >>> check_sampler(SequenceMixtureSampler(ensemble), ensemble, [0], max_new_tokens=16, n=2000)
    Traceback (most recent call last):
    ...
    me_stats.testing.result.SamplerRejected: sampler REJECTED: ...
    """
    second = isinstance(against, Sampler) or (callable(against) and not hasattr(against, "log_probs"))
    if level is None:
        level = _SECOND_LEVEL if second else _LEVEL
    _check_options(max_new_tokens, n, detect, level, floor, on_fail)
    known = isinstance(against, SequenceLaw)
    vocabulary = _vocabulary(against, sampler)
    encoded = [tuple(vocabulary.encode(p) if vocabulary else map(int, p)) for p in as_prompts(prompts)]
    source = Source(sampler, encoded, max_new_tokens, seed)
    needed = required_draws(detect, CELLS, level=level / (4 * CELLS * len(encoded)))
    if known:
        if len(encoded) > 1:
            raise ValueError(f"prompts must be one prompt for a SequenceLaw, got {len(encoded)}")
        if against.sequences.shape[1] > max_new_tokens:
            raise ValueError(f"max_new_tokens must be {against.sequences.shape[1]}, the length of the SequenceLaw")
        result = _check_law(source, against, n or needed, level, floor)
    elif second:
        rows = n or min(needed, _MOST_ROWS // len(encoded) or 1)
        other = Source(against, encoded, max_new_tokens, seed, stream=1)
        result = _check_against_sampler(source, other, rows, level, vocabulary, seed)
    else:
        require_language_model(against, name="against")
        result = check_conditionals(
            source, against, n or needed, level=level, floor=floor, stop_early=stop_early, progress=progress
        )
    if not result.passed and on_fail == "raise":
        raise SamplerRejected(str(result), result)
    return result


def _check_law(source: Source, law: SequenceLaw, n: int, level: float, floor: float) -> CheckResult:
    rows = source.draw(n)
    # One cell for every continuation of positive probability, and one for all that the law excludes.
    cell = {tuple(row): place for place, row in enumerate(law.rows)}
    drawn = np.array([cell.get(tuple(row), len(cell)) for row in rows])
    log_p = np.append(law.log_probs - math.log(law.total), -math.inf)
    p = np.exp(log_p)
    counts = np.bincount(drawn, minlength=len(log_p))
    tested = Portfolio.from_null(log_p).test(counts, level=level)
    outcome = Outcome("law of whole continuations", tested.pvalue, level, tested.min_detectable_tv, "TV of a partition")
    first = np.bincount(drawn[: n // 2], minlength=len(log_p))
    return CheckResult(
        pvalue=tested.pvalue,
        level=level,
        sequences=len(rows),
        tokens=sum(map(len, rows)),
        outcomes=(outcome,),
        min_detectable_tv=tested.min_detectable_tv,
        tv_upper=tv_upper_bound(counts, p, floor=floor).upper,
        tv_lower=tv_lower_bound(first, counts - first, p, floor=floor).lower,
        floor=floor,
    )


def _check_against_sampler(
    source: Source, other: Source, n: int, level: float, vocabulary: Vocabulary | None, seed: int
) -> CheckResult:
    mine, theirs = source.draw(n), other.draw(n)
    tokens = sum(map(len, mine))
    for name, rows in (("sampler", mine), ("against", theirs)):
        fault = structural_faults(rows, vocabulary, source.max_new_tokens)
        if fault:
            outcome = Outcome("structure", 0.0, level, detail=f"{name}: {fault}")
            return CheckResult(0.0, level, len(mine), tokens, (outcome,), math.inf)
    groups = np.repeat(np.arange(len(source.prompts)), n)
    permutations = max(999, math.ceil(_MEMBERS / level))
    if permutations > 1_000_000:
        raise ValueError(
            f"level is {level:g}: a permutation test against a second sampler would need {permutations:,} "
            "permutations; ask for a level of 1e-4 or more, or give the law that both should have"
        )
    result = two_sample_portfolio(
        mine, theirs, groups=groups, level=level, permutations=permutations, rng=np.random.default_rng([seed, 2])
    )
    outcomes = tuple(
        Outcome(m.name, m.pvalue, level / len(result.members), detail=f"cannot see {m.blind}") for m in result.members
    )
    return CheckResult(result.pvalue, level, len(mine), tokens, outcomes, result.min_detectable_tv)


def _vocabulary(against: Any, sampler: Any) -> Vocabulary | None:
    for thing in (against, getattr(against, "model", None), getattr(sampler, "model", None)):
        vocabulary = getattr(thing, "vocabulary", None)
        if isinstance(vocabulary, Vocabulary):
            return vocabulary
    return None


def _check_options(
    max_new_tokens: int, n: int | None, detect: float, level: float, floor: float, on_fail: str
) -> None:  # fmt: skip
    for name, value in (("max_new_tokens", max_new_tokens), ("n", 1 if n is None else n)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    for name, share in (("detect", detect), ("level", level)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {share}")
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be a total variation in [0, 1), got {floor}")
    if on_fail not in ("raise", "return"):
        raise ValueError(f"on_fail must be 'raise' or 'return', got {on_fail!r}")
