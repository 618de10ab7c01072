"""What a check found, and what it could have found."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One test inside a check.

    `pvalue` is raw; `level` is this test's share of the level of the whole check, and `detects` the departure that the
    test finds at that level with power 0.8, in the units that `effect` names (infinite where it has no say).
    """

    name: str
    pvalue: float
    level: float
    detects: float = math.inf
    effect: str = ""
    detail: str = ""

    @property
    def rejected(self) -> bool:
        """Whether this test alone rejects."""
        return self.pvalue <= self.level


@dataclass(frozen=True)
class CheckResult:
    """What `check_sampler` found about N sequences.

    Attributes
    ----------
    pvalue
        Of the whole check, corrected for its parts: a right sampler has ``P(pvalue <= α) <= α`` at `level`.
    level
        Declared false-alarm probability.
    sequences, tokens
        How much was drawn until the check stopped.
    outcomes
        The tests inside, in the order in which they ran.
    min_detectable_tv
        Smallest departure in total variation of one step that the check finds with power 0.8.
    tv_upper, tv_lower
        Confidence bounds on the total variation of the first token's law, the largest over prompts; `tv_upper` holds
        `floor`. None where no law is known.
    step_tv_lower
        Lower confidence bound on the total variation of a step, averaged over all steps of all rows; None where T = 1.
    confidence
        Of each of these bounds.
    floor
        Numerical floor that was declared.
    stopped_early
        Whether the evidence sufficed before all sequences were drawn.
    """

    pvalue: float
    level: float
    sequences: int
    tokens: int
    outcomes: tuple[Outcome, ...]
    min_detectable_tv: float
    tv_upper: float | None = None
    tv_lower: float | None = None
    step_tv_lower: float | None = None
    confidence: float = 0.95
    floor: float = 0.0
    stopped_early: bool = False

    @property
    def passed(self) -> bool:
        """Whether the check did not reject. It is no proof of equality: read `tv_upper` and `min_detectable_tv`."""
        return self.pvalue > self.level

    @property
    def worst(self) -> Outcome:
        """The outcome that is closest to a rejection."""
        return min(self.outcomes, key=lambda outcome: outcome.pvalue / outcome.level)

    def __str__(self) -> str:
        verdict = "not rejected" if self.passed else "REJECTED"
        lines = [f"sampler {verdict}: p = {self.pvalue:.3g} at level {self.level:.1g}, {self._drawn()}"]
        if not self.passed:
            detail = f": {self.worst.detail}" if self.worst.detail else ""
            lines.append(f"  found by: {self.worst.name} (p = {self.worst.pvalue:.3g}){detail}")
        if self.tv_upper is not None and self.passed:
            lines.append(f"  TV of the first token <= {self.tv_upper:.3g} at {self.confidence:.0%} confidence")
        if self.tv_lower and not self.passed:
            lines.append(f"  TV of the first token >= {self.tv_lower:.3g} at {self.confidence:.0%} confidence")
        if self.step_tv_lower and not self.passed:
            lines.append(f"  TV of a step, on average >= {self.step_tv_lower:.3g} at {self.confidence:.0%} confidence")
        if math.isfinite(self.min_detectable_tv):
            lines.append(f"  a departure of TV {self.min_detectable_tv:.3g} in one step is found with power 0.8")
        return "\n".join(lines)

    def _drawn(self) -> str:
        early = ", stopped early" if self.stopped_early else ""
        return f"{self.sequences:,} sequences, {self.tokens:,} tokens{early}"


class SamplerRejected(AssertionError):
    """A check that rejected; `result` says why. It is an AssertionError, so that any test runner counts a failure."""

    def __init__(self, message: str, result: CheckResult | None = None) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class ConformanceResult:
    """What `check_language_model` or `check_session` found; these compare numbers, so no probability is involved.

    `faults` are sentences, empty where all held; `largest_tv` is the largest total variation between two laws that
    should be equal, over `compared` laws, and `tolerance` what was allowed.
    """

    faults: tuple[str, ...]
    largest_tv: float
    tolerance: float
    compared: int

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.faults

    def __str__(self) -> str:
        if self.passed:
            return f"model conforms: {self.compared} laws compared, largest TV {self.largest_tv:.2g}"
        return "model does not conform:\n" + "\n".join(f"  - {fault}" for fault in self.faults)


class ModelRejected(AssertionError):
    """A model or session that does not keep its contract; `result` lists the faults."""

    def __init__(self, result: ConformanceResult) -> None:
        super().__init__(str(result))
        self.result = result
