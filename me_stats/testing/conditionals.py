"""The check of a sampler whose conditionals are all known: first tokens, whole rows, copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from me_stats.chi_square import GoodnessResult
from me_stats.eprocess import EProcess
from me_stats.equivalence import tv_lower_bound, tv_upper_bound
from me_stats.evidence import Evidence
from me_stats.families import ALL_FAMILIES
from me_stats.goodness import Portfolio
from me_stats.martingale import martingale_portfolio, step_tv_lower_bound
from me_stats.models.ensemble import chunked_paths
from me_stats.repeats import RepeatProcess
from me_stats.steps import StepScores, concatenate_rows, join_steps, step_scores
from me_stats.testing.drawing import Rows, Source, structural_faults
from me_stats.testing.result import CheckResult, Outcome

_FIRST_BATCH = 32  # rows a prompt: gross bugs are found before the rest is drawn
_SCORED_AT_ONCE = 4096  # rows, so that memory does not grow with n


def check_conditionals(
    source: Source,
    model: Any,
    n: int,
    *,
    level: float,
    floor: float = 0.0,
    confidence: float = 0.95,
    stop_early: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CheckResult:
    """Test `n` continuations of each prompt of `source` against `model`; see `check_sampler`."""
    run = _Run(source, model, level=level, floor=floor, confidence=confidence)
    drawn = 0
    while drawn < n and not run.fault:
        size = min(n - drawn, max(_FIRST_BATCH, drawn), max(1, _SCORED_AT_ONCE // len(source.prompts)))
        run.feed(source.draw(size))
        drawn += size
        if progress is not None:
            progress(size * len(source.prompts))
        if stop_early and run.whole_rows and drawn < n and run.sequential_pvalue <= run.sequential_level:
            return run.result(stopped=True)
    return run.result(stopped=False)


class _Run:
    """What one check has drawn so far."""

    def __init__(self, source: Source, model: Any, *, level: float, floor: float, confidence: float) -> None:
        self.source, self.model = source, model
        self.level, self.floor, self.confidence = level, floor, confidence
        count, size = len(source.prompts), model.vocabulary.size
        laws = list(chunked_paths(model, source.prompts, [[0]] * count))
        parts = np.concatenate([chunk[0].double().cpu().numpy() for chunk in laws])
        weights = np.concatenate([chunk[1].double().cpu().numpy() for chunk in laws])
        with np.errstate(divide="ignore"):
            self.first_laws = np.logaddexp.reduce(parts + weights[:, :, None], axis=1)
        self.first_laws -= np.logaddexp.reduce(self.first_laws, axis=1, keepdims=True)
        self.portfolios = [Portfolio.from_null(law, own) for law, own in zip(self.first_laws, parts, strict=True)]
        self.counts = np.zeros((2, count, size), dtype=np.int64)
        self.process = EProcess(parts.shape[1], families=ALL_FAMILIES)
        self.repeats = RepeatProcess()
        self.steps: list[StepScores] = []
        self.rng = np.random.default_rng(np.random.SeedSequence([len(source.prompts), source.max_new_tokens, size]))
        self.sequences = self.tokens = 0
        self.fault = ""
        # Half for the tests that may stop the run, the rest for those that look once. One token has no past to test,
        # and is so cheap to draw that the size of a bug is worth more than an early stop.
        self.whole_rows = source.max_new_tokens > 1
        self.sequential_level = level / 2
        self.first_level, self.rows_level = (level / 4, level / 4) if self.whole_rows else (level / 2, 0.0)

    def feed(self, rows: Rows) -> None:
        """Count, score and bet on one batch of rows, prompt after prompt."""
        self.sequences += len(rows)
        self.tokens += sum(map(len, rows))
        self.fault = structural_faults(rows, self.model.vocabulary, self.source.max_new_tokens)
        if self.fault:
            return
        count = len(self.source.prompts)
        prompt = np.repeat(np.arange(count), len(rows) // count)
        # Halves by turns, so that the two of `tv_lower_bound` are independent and equally long.
        half, first = np.arange(len(rows)) % 2, np.array([row[0] for row in rows])
        np.add.at(self.counts, (half, prompt, first), 1)
        prompts = [self.source.prompts[index] for index in prompt.tolist()]
        if self.whole_rows:
            log_probs = self._score(prompts, rows)
        else:
            log_probs = self.first_laws[prompt, first]
        self.repeats.update(prompt.tolist(), rows, np.minimum(log_probs, 0.0))

    def _score(self, prompts: list[tuple[int, ...]], rows: Rows) -> np.ndarray:
        """One pass through the model for the steps of the martingale tests and the bets of the e-processes."""
        steps, evidence = [], []
        for laws, log_weights, written in chunked_paths(self.model, prompts, rows):
            steps.append(step_scores(laws, log_weights, written))
            evidence.append(
                Evidence.from_laws(laws, log_weights, written, families=self.process.families, rng=self.rng)
            )
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        joined = join_steps(steps, mask)
        self.process.update(Evidence.join(evidence, mask))
        self.steps.append(joined)
        return np.where(joined.impossible, -math.inf, joined.log_p).sum(1)

    @property
    def sequential_pvalue(self) -> float:
        """Anytime p-value of the e-processes together: twice the smaller of two."""
        return min(1.0, 2 * min(self.process.pvalue, self.repeats.pvalue))

    def result(self, *, stopped: bool) -> CheckResult:
        """The verdict on what was fed."""
        if self.fault:
            outcome = Outcome("structure", 0.0, self.level, detail=self.fault)
            return CheckResult(0.0, self.level, self.sequences, self.tokens, (outcome,), math.inf, floor=self.floor)
        outcomes = self._sequential()
        smallest, upper, lower, average = math.inf, None, None, None
        if not stopped:
            first, smallest = self._first_tokens()
            outcomes += first
            if self.whole_rows:
                rows = concatenate_rows(self.steps)
                outcomes += self._whole_rows(rows)
                average = max(0.0, step_tv_lower_bound(rows, self.rng, confidence=self.confidence) - self.floor)
            upper, lower = self._bounds()
            self._refuse_below_floor(smallest)
        pvalue = min([1.0, *(outcome.pvalue * (self.level / outcome.level) for outcome in outcomes)])
        return CheckResult(
            pvalue=pvalue,
            level=self.level,
            sequences=self.sequences,
            tokens=self.tokens,
            outcomes=tuple(outcomes),
            min_detectable_tv=smallest,
            tv_upper=upper,
            tv_lower=lower,
            step_tv_lower=average,
            confidence=self.confidence,
            floor=self.floor,
            stopped_early=stopped,
        )

    def _sequential(self) -> list[Outcome]:
        share = self.sequential_level / 2
        closest = f"as copies of {self.repeats.worst}"
        copies = Outcome("copied rows (e-process)", self.repeats.pvalue, share, detail=closest)
        if not self.whole_rows:
            return [copies]
        family = self.process.worst
        members = self.process.by_member[family]
        best = max(members, key=lambda member: members[member])
        detail = f"closest alternative: {family}, {best}"
        if self.process.impossible:
            detail = f"{self.process.impossible} tokens of probability zero"
        return [Outcome("whole rows (e-process)", self.process.pvalue, share, detail=detail), copies]

    def _first_tokens(self) -> tuple[list[Outcome], float]:
        share = self.first_level / len(self.portfolios)
        outcomes, smallest = [], 0.0
        for index, portfolio in enumerate(self.portfolios):
            tested = portfolio.test(self.counts[:, index].sum(0), level=share)
            worst: GoodnessResult = tested.worst
            where = f" of prompt {index}" if len(self.portfolios) > 1 else ""
            detail = f"{worst.impossible} draws of probability zero" if worst.impossible else worst.name
            outcomes.append(
                Outcome(f"first token{where}", tested.pvalue, share, tested.min_detectable_tv, "TV", detail)
            )
            smallest = max(smallest, tested.min_detectable_tv)
        return outcomes, smallest

    def _whole_rows(self, rows: StepScores) -> list[Outcome]:
        tested = martingale_portfolio(rows, self.rng, level=self.rows_level)
        share = self.rows_level / max(1, tested.tests)
        if tested.impossible:
            detail = f"{tested.impossible} tokens of probability zero"
            return [Outcome("whole rows", 0.0, self.rows_level, detail=detail)]
        return [Outcome(r.name, r.pvalue, share, r.min_detectable, r.effect) for r in tested.results if r.df > 0]

    def _bounds(self) -> tuple[float, float]:
        # Each side holds for all prompts together.
        confidence = 1 - (1 - self.confidence) / len(self.portfolios)
        upper, lower = 0.0, 0.0
        for index, law in enumerate(self.first_laws):
            p = np.exp(law)
            one, two = self.counts[:, index]
            if one.sum() < 2 or two.sum() < 2:  # too few to bound anything
                upper = 1.0
                continue
            upper = max(upper, tv_upper_bound(one + two, p, confidence=confidence, floor=self.floor).upper)
            lower = max(lower, tv_lower_bound(one, two, p, confidence=confidence, floor=self.floor).lower)
        return upper, lower

    def _refuse_below_floor(self, smallest: float) -> None:
        if smallest < self.floor:
            raise ValueError(
                f"n is too large for floor={self.floor:g}: the check would find a TV of {smallest:.2g}, which rounding "
                "alone may cause; draw fewer sequences or use a wider dtype"
            )
