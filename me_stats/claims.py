"""The paper's claims, numbered, and the verdict that a set of findings supports."""

from __future__ import annotations

from collections.abc import Iterable

from me_stats.record import Finding

PAPER = "Rethinking LLM Ensembling from the Perspective of Mixture Models (arXiv 2605.00419)"

CLAIMS: dict[str, str] = {
    "C1": "One ME step has the CE law",
    "C2": "Whole ME sequences have the CE law",
    "C3": "It holds for any number of components and any weights",
    "C4": "Lazy key-value synchronisation changes nothing",
    "C5": "Catching up a short span costs about one decode step",
    "C6": "ME is 1.78× to 2.68× faster than CE",
    "C7": "CE latency grows linearly with K, and running the models in parallel does not remove the cost",
    "C8": "With mixed vocabularies, ME with top-k alignment keeps the CE law",
    "C9": "ME matches CE with k = 5 and k = 10, the tables' setting",
    "C10": "The accuracy tables show equality",
    "C11": "ME is the simplest token-level router; CE marginalises it",
    "C12": "Learned routers can decide better, at the cost of training",
    "C13": "The weights λ matter, and their best value moves with the task",
    "C14": "Stability over long generations is open",
    "C15": "Production batch sizes are open",
}

# From the strongest support to the strongest doubt; a claim carries the most doubtful of its findings.
_ORDER = ("reproduced", "reproduced at small scale", "not testable here", "refuted as stated")


def verdict(findings: Iterable[Finding]) -> str:
    """The verdict on one claim: its most doubtful finding, ``"open"`` without findings.

    >>> verdict([])
    'open'
    """
    verdicts = [finding.verdict for finding in findings]
    return max(verdicts, key=_ORDER.index) if verdicts else "open"
