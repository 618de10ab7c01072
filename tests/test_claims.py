"""The list of claims, and the verdict that findings add up to."""

from __future__ import annotations

from itertools import permutations
from typing import Any, get_args

import pytest

from me_stats.claims import CLAIMS, PAPER, verdict
from me_stats.record import Finding, Verdict


def finding(outcome: Any) -> Finding:
    return Finding(
        claim="C1", statement="s", models="m", n="1", statistic="x", tv_upper=None, bound="exact",
        verdict=outcome, held=True,
    )  # fmt: skip


def test_fifteen_claims_in_order() -> None:
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 16)]
    assert all(CLAIMS.values())
    assert len(set(CLAIMS.values())) == 15
    assert "2605.00419" in PAPER


def test_without_findings_a_claim_is_open() -> None:
    assert verdict([]) == "open"


@pytest.mark.parametrize("outcome", get_args(Verdict))
def test_one_finding_decides(outcome: str) -> None:
    assert verdict([finding(outcome)]) == outcome


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("reproduced", "reproduced at small scale"), "reproduced at small scale"),
        (("reproduced", "not testable here"), "not testable here"),
        (("reproduced", "reproduced at small scale", "refuted as stated"), "refuted as stated"),
        (("not testable here", "refuted as stated"), "refuted as stated"),
    ],
)
def test_the_most_doubtful_finding_decides_in_any_order(outcomes: tuple[str, ...], expected: str) -> None:
    for order in permutations(outcomes):
        assert verdict(map(finding, order)) == expected
