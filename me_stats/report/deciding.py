"""Which finding answers a claim most directly, and what that finding leaves open, in a few words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from me_stats.record import Finding, experiment_of


@dataclass(frozen=True)
class Lead:
    """Where the answer to a claim is found: an experiment, words of the statement, and words of the caveat to show."""

    experiment: str
    statement: str
    caveat: str = ""


LEADS: dict[str, Lead] = {
    "C1": Lead("per_step", "ME: one step"),
    "C2": Lead("sequences", "ME: law of whole sequences"),
    "C4": Lead("cache_floor", "float32"),
    "C5": Lead("speed", "catching up a short span", "must take less than"),
    "C6": Lead("speed", "ME writes tokens faster", "batch 1"),
    "C7": Lead("speed", "CE's time grows linearly", "in parallel"),
    "C8": Lead("transform_order", "union of top-k sets"),
    "C9": Lead("transform_order", "published CE against published ME", "accuracies"),
    "C10": Lead("accuracy", "accuracy of", "no TV"),
    "C11": Lead("routers", "has the law that CE sums"),
    "C12": Lead("routers", "beats the best constant", "likelihood"),
    "C13": Lead("weights", "the best λ", "likelihood"),
    "C14": Lead("long", "variance over rows"),
    "C15": Lead("speed", "by batch size", "slower than CE"),
}
"""Claims on which findings of several kinds bear. A claim that is not here takes its verdict's weakest bound."""

Named = tuple[str, Finding]
"""A finding with the name of its record."""


def choose(claim: str, verdict: str, found: Sequence[Named]) -> Finding | None:
    """The finding behind the verdict; None without findings.

    Of the findings with the claim's verdict those of its lead, if there are any. Among these one whose check failed
    comes first, then the weakest bound on TV (of a refuted claim: the largest gap), then the first.
    """
    rows = [(name, finding) for name, finding in found if finding.verdict == verdict]
    lead = LEADS.get(claim)
    if lead is not None:
        rows = [
            (name, finding)
            for name, finding in rows
            if experiment_of(name) == lead.experiment and lead.statement in finding.statement
        ] or rows
    return max((finding for _, finding in rows), key=lambda f: (not f.held, _size(f)), default=None)


def elsewhere(deciding: Finding, found: Sequence[Named]) -> Finding | None:
    """The finding with the same verdict and the weakest bound, if over twice the deciding one; None for gaps."""
    if deciding.tv_upper is None or deciding.verdict == "refuted as stated":
        return None
    weakest = max((finding for _, finding in found if finding.verdict == deciding.verdict), key=_size)
    return weakest if _size(weakest) > 2 * deciding.tv_upper else None


def clause(claim: str, caveat: str) -> str:
    """The part of a caveat to show beside the verdict: the lead's words pick it, else it is the first.

    >>> clause("C12", "text that no model has seen (or so; we hope); likelihood, not accuracy")
    'likelihood, not accuracy'
    >>> clause("C3", "one prompt (short; truncated); more")
    'one prompt (short; truncated)'
    """
    parts = re.split(r";\s+(?![^()]*\))", caveat.strip())
    words = LEADS[claim].caveat if claim in LEADS else ""
    return next((part for part in parts if words in part), parts[0])


def _size(finding: Finding) -> float:
    return -1.0 if finding.tv_upper is None else float(finding.tv_upper)
