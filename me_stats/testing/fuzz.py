"""The smallest ensemble on which a sampler is wrong.

`fuzz_sampler` compares a sampler with the exact law of tiny ensembles: zeros, one-hot laws, identical components,
disjoint supports, one token, one component, ends at once. It is deterministic: the same call looks at the same
examples. `fuzz_session` does the same for sessions and schedules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from me_stats.exact import SequenceLaw, sampler_law, sequence_law
from me_stats.models.ensemble import Ensemble
from me_stats.samplers.base import Sampler
from me_stats.sequential import dirichlet_log_evalue
from me_stats.testing.drawing import as_rows, structural_faults
from me_stats.testing.result import CheckResult, Outcome, SamplerRejected
from me_stats.testing.search import check_counts, rounded, search
from me_stats.testing.session_fuzz import fuzz_session
from me_stats.testing.strategies import ensembles, prompts
from me_stats.trace import require_independent_rows

__all__ = ["FuzzRejected", "SamplerExample", "fuzz_sampler", "fuzz_session"]

_WALK_TOLERANCE = 1e-9  # total variation that float64 sums over all paths of a toy may differ by


@dataclass(frozen=True)
class SamplerExample:
    """What `fuzz_sampler` tries: ``build(ensemble)`` continues each of `prompts` by up to `max_new_tokens` tokens."""

    ensemble: Ensemble
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    seed: int


class FuzzRejected(SamplerRejected):
    """A sampler that `fuzz_sampler` rejected; `example` is the smallest that was found, ready to run again."""

    def __init__(self, message: str, result: CheckResult, example: SamplerExample) -> None:
        super().__init__(message, result)
        self.example = example


def fuzz_sampler(
    build: Callable[[Ensemble], Any],
    *,
    max_examples: int = 100,
    draws: int = 20_000,
    level: float = 1e-12,
    exact: bool | None = None,
    max_components: int = 3,
    max_vocabulary: int = 4,
    max_new_tokens: int = 3,
    min_prompt_length: int = 1,
    seed: int = 0,
) -> CheckResult:
    """Look for the smallest ensemble on which the sampler that `build` makes does not write the ensemble's law.

    Each example is an ensemble, one or two prompts, T and a seed. A `me_stats` sampler is walked: every path of its
    code is weighted and compared with `sequence_law`, so nothing is left to chance. Of any other, `draws` sequences are
    compared by `dirichlet_log_evalue`, which rejects at E >= 1/`level`; rows that no law could have written reject at
    once. A right sampler is rejected with probability at most ``max_examples * level``: shrinking only follows a
    rejection.

    Measured with 20,000 draws and a law of equal cells, half of them too likely and half too unlikely: a TV of .032 is
    found in 90 of 100 runs with 2 cells, and of .036 in 82 with 16 (1000 runs). Bugs are often larger than that on the
    toys that are tried, since their supports may be disjoint.

    Parameters
    ----------
    build
        ``build(ensemble)`` returns a `me_stats` sampler or a `TokenSampler`. It may call `hypothesis.assume` to refuse
        ensembles that the sampler is not made for.
    draws
        Sequences of an example, shared equally by its prompts.
    level
        False-alarm probability of one example.
    exact
        True walks paths and refuses samplers that cannot be walked, False draws. Default: walk where possible. A walk
        replaces the sampler's random numbers through the `draw` of `sample`, so only draws can find these wrong.
    max_components, max_vocabulary, max_new_tokens
        Largest K, V and T.
    min_prompt_length
        0 tries empty prompts too.
    seed
        Of the search; another seed looks at other examples.

    Returns
    -------
    CheckResult
        Its level and p-value are those of the whole call.

    Raises
    ------
    SamplerRejected
        With the smallest example found in the message and as `.example`, and the result as `.result`.
    TypeError, ValueError
        For bad options, or a `build` that returns no sampler. What the sampler raises is passed on.

    Examples
    --------
    >>> from me_stats import MESampler, SequenceMixtureSampler
    >>> fuzz_sampler(MESampler, max_examples=20).passed
    True
    >>> fuzz_sampler(SequenceMixtureSampler)
    Traceback (most recent call last):
    ...
    me_stats.testing.fuzz.FuzzRejected: sampler rejected: total variation 0.5 from the ensemble's law; smallest ...
      K = 2 components of weights [0.5, 0.5], V = 2 tokens, eos [], T = 2
    ...
    """
    check_counts(
        max_examples=max_examples, draws=draws, max_components=max_components, max_vocabulary=max_vocabulary,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    judge = _Judge(build, draws, level, exact)
    examples = _sampler_examples(max_components, max_vocabulary, max_new_tokens, min_prompt_length)
    found = search(examples, judge, max_examples=max_examples, seed=seed)
    if found is not None:
        example, finding, replayed = found
        message = finding.describe(example)
        if not replayed:
            message += "\n  drawn again with this seed it was not rejected: the sampler has random numbers of its own"
        raise FuzzRejected(message, finding.result(level), example)
    return judge.verdict(max_examples)


@st.composite
def _sampler_examples(
    draw: st.DrawFn, max_components: int, max_vocabulary: int, max_new_tokens: int, min_prompt_length: int
) -> SamplerExample:
    steps = draw(st.integers(1, max_new_tokens))
    ensemble = draw(
        ensembles(max_components=max_components, max_vocabulary=max_vocabulary, max_order=2, warped=False)
    )  # fmt: skip
    texts = prompts(ensemble.vocabulary.size, min_length=min_prompt_length, max_length=max(3, min_prompt_length))
    starts = draw(st.lists(texts, min_size=1, max_size=2, unique=True))
    # 31 bits, which every random number generator takes.
    return SamplerExample(ensemble, tuple(starts), steps, draw(st.integers(0, 2**31 - 1)))


@dataclass(frozen=True)
class _Finding:
    """What was wrong after `prompt`: in words, and at which continuation (None: with the shape of a row)."""

    what: str
    how: str
    prompt: tuple[int, ...]
    pvalue: float
    sequence: tuple[int, ...] | None = None
    expected: float = math.nan
    observed: float = math.nan
    sequences: int = 0
    tokens: int = 0

    def describe(self, example: SamplerExample) -> str:
        ensemble = example.ensemble
        vocabulary = ensemble.vocabulary
        weights = ensemble.mixing.log_weights([self.prompt])[0].exp()
        lines = [
            f"sampler rejected: {self.what}; smallest example found:",
            f"  K = {len(weights)} components of weights {rounded(weights)}, V = {vocabulary.size} tokens, "
            f"eos {list(vocabulary.eos)}, T = {example.max_new_tokens}",
            f"  prompt {self.prompt}" + (f" among {list(example.prompts)}" if len(example.prompts) > 1 else ""),
        ]
        if self.sequence is not None:
            kind = "frequency" if self.sequences else "probability"
            lines.append(
                f"  continuation {self.sequence}: expected {kind} {self.expected:.4g}, observed {self.observed:.4g}"
            )
        # The laws that a right sampler would have used on the way; an id outside the vocabulary ends the way.
        path = [token for token in self.sequence or () if 0 <= token < vocabulary.size]
        for step in range(max(1, len(path))):
            prefix = (*self.prompt, *path[:step])
            laws = [rounded(component.log_probs([prefix])[0].exp()) for component in ensemble.components]
            lines.append(f"  component laws after {prefix}: {', '.join(map(str, laws))}")
        lines.append(f"  {self.how}, seed to replay: {example.seed}")
        return "\n".join(lines)

    def sized(self, *, sequences: int, tokens: int) -> _Finding:
        return replace(self, sequences=sequences, tokens=tokens)

    def result(self, level: float) -> CheckResult:
        outcome = Outcome(self.how, self.pvalue, level, detail=self.what)
        return CheckResult(self.pvalue, level, self.sequences, self.tokens, (outcome,), math.inf)


@dataclass
class _Judge:
    """Judges one example after the other, and remembers what was looked at."""

    build: Callable[[Ensemble], Any]
    draws: int
    level: float
    exact: bool | None
    walked: int = 0
    drawn: int = 0
    sequences: int = 0
    tokens: int = 0
    log_e: float = -math.inf  # the largest

    def __call__(self, example: SamplerExample) -> _Finding | None:
        sampler = self.build(example.ensemble)
        if not (isinstance(sampler, Sampler) or callable(sampler)):
            raise TypeError(
                "build must return a me_stats sampler or a callable (prompts, *, max_new_tokens, seed) -> ids, got "
                f"{type(sampler).__name__}"
            )
        steps = example.max_new_tokens
        laws = [sequence_law(example.ensemble, prompt, max_new_tokens=steps) for prompt in example.prompts]
        written = self._walk(sampler, example)
        if written is None:
            return self._draw(sampler, example, laws)
        self.walked += 1
        findings = map(_differing, example.prompts, laws, written)
        return next((finding for finding in findings if finding is not None), None)

    def verdict(self, max_examples: int) -> CheckResult:
        """The result of a call in which nothing was found, with the level of all its examples."""
        outcomes = []
        level = max_examples * self.level
        pvalue = 1.0 if self.log_e <= 0 else min(1.0, self.drawn * math.exp(-self.log_e))
        if self.walked:
            effect = "TV of continuations"
            outcomes.append(Outcome(f"{self.walked} ensembles, every path walked", 1.0, 0.0, _WALK_TOLERANCE, effect))
        if self.drawn:
            outcomes.append(Outcome(f"{self.drawn} ensembles, {self.draws:,} draws of each", pvalue, level))
        return CheckResult(pvalue, level, self.sequences, self.tokens, tuple(outcomes), math.inf)

    def _walk(self, sampler: Any, example: SamplerExample) -> list[SequenceLaw] | None:
        """The sampler's laws, or None where it is to be drawn from."""
        if self.exact is False:
            return None
        if not isinstance(sampler, Sampler):
            if self.exact:
                raise TypeError(f"exact=True needs a me_stats sampler, got {type(sampler).__name__}; draw instead")
            return None
        try:
            steps = example.max_new_tokens
            return [sampler_law(sampler, prompt, max_new_tokens=steps) for prompt in example.prompts]
        except ValueError:
            # Too many paths, or choices that do not pass through the draw: such a sampler can still be drawn from.
            if self.exact:
                raise
            return None

    def _draw(self, sampler: Any, example: SamplerExample, laws: Sequence[SequenceLaw]) -> _Finding | None:
        n = math.ceil(self.draws / len(laws))
        drawn = _drawn(sampler, example, n)
        tokens = sum(len(row) * count for rows in drawn for row, count in rows.items())
        self.drawn, self.sequences, self.tokens = self.drawn + 1, self.sequences + n * len(laws), self.tokens + tokens
        how, size = f"{n:,} draws of each prompt", {"sequences": n * len(laws), "tokens": tokens}
        for prompt, law, observed in zip(example.prompts, laws, drawn, strict=True):
            for row in sorted(observed):
                fault = structural_faults([list(row)], example.ensemble.vocabulary, example.max_new_tokens)
                if fault:
                    return _Finding(fault.replace("row 0", f"row {row}", 1), how, prompt, 0.0).sized(**size)
            expected = _probabilities(law)
            cells = sorted({*expected, *observed})
            counts = np.array([observed[cell] for cell in cells])
            probs = np.array([expected.get(cell, 0.0) for cell in cells])
            # Each prompt has an equal part of the level.
            log_e = dirichlet_log_evalue(counts, probs, tv=_departure(n, self.level)) - math.log(len(laws))
            self.log_e = max(self.log_e, log_e)
            if log_e >= -math.log(self.level):
                # Impossible sequences surprise most.
                worst = int(((counts - n * probs) ** 2 / np.maximum(probs, 1e-300)).argmax())
                what = f"e-value 10^{log_e / math.log(10):.3g} against the ensemble's law"
                if not math.isfinite(log_e):
                    what = "a continuation that the ensemble cannot write"
                place = (cells[worst], float(probs[worst]), float(counts[worst]) / n)
                return _Finding(what, how, prompt, math.exp(-log_e), *place).sized(**size)
        return None


def _differing(prompt: tuple[int, ...], law: SequenceLaw, own: SequenceLaw) -> _Finding | None:
    """The continuation whose probability is most wrong, if the sampler's own law is not the ensemble's."""
    distance = own.tv_distance(law)
    if distance <= _WALK_TOLERANCE:
        return None
    expected, observed = _probabilities(law), _probabilities(own)
    gaps = {cell: abs(observed.get(cell, 0.0) - expected.get(cell, 0.0)) for cell in sorted({*expected, *observed})}
    worst = max(gaps, key=gaps.__getitem__)
    what = f"total variation {distance:.3g} from the ensemble's law"
    place = (worst, expected.get(worst, 0.0), observed.get(worst, 0.0))
    return _Finding(what, "every path walked", prompt, 0.0, *place)


def _drawn(sampler: Any, example: SamplerExample, n: int) -> list[Counter[tuple[int, ...]]]:
    """How often each row was written, per prompt, in `n` draws of each with the seed of the example itself."""
    steps, seed = example.max_new_tokens, example.seed
    if isinstance(sampler, Sampler):
        require_independent_rows(sampler, "fuzz_sampler")
        tokens = sampler.sample(example.prompts, n=n, max_new_tokens=steps, seed=seed).tokens.numpy()
        parts = [np.unique(tokens[start : start + n], axis=0, return_counts=True) for start in range(0, len(tokens), n)]
        return [Counter(dict(zip(_tuples(rows), counts.tolist(), strict=True))) for rows, counts in parts]
    expanded = [prompt for prompt in example.prompts for _ in range(n)]
    rows = as_rows(sampler(expanded, max_new_tokens=steps, seed=seed), len(expanded))
    return [Counter(map(tuple, rows[start : start + n])) for start in range(0, len(rows), n)]


def _departure(n: int, level: float) -> float:
    """The total variation of two equal cells whose evidence reaches the level in n draws."""
    return min(0.5, math.sqrt(-math.log(level) / (2 * n)))


def _probabilities(law: SequenceLaw) -> dict[tuple[int, ...], float]:
    return dict(zip(map(tuple, law.rows), np.exp(law.log_probs).tolist(), strict=True))


def _tuples(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(token for token in row if token >= 0) for row in rows.tolist()]
