"""The budget holds by arithmetic: what all tests may spend never adds up to more."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.testing.budget import Allowance, RunBudget, divide, parse_budget

alphas = st.floats(1e-15, 0.999)
counts = st.integers(1, 2000)


@given(alphas, st.integers(1, 10**9))
def test_parts_never_add_up_to_more_than_the_whole(alpha: float, parts: int) -> None:
    # Exact: Fraction knows the binary value of a float.
    part = divide(alpha, parts)
    assert Fraction(part) * parts <= Fraction(alpha)
    assert math.isclose(part * parts, alpha, rel_tol=1e-12)


@given(alphas, st.lists(st.tuples(counts, counts), min_size=1, max_size=50))
def test_levels_of_all_checks_add_up_to_at_most_the_budget(alpha: float, tests: list[tuple[int, int]]) -> None:
    run = RunBudget(alpha, len(tests))
    spent = Fraction(0)
    for checks, examples in tests:
        spent += Fraction(run.allowance(checks=checks, examples=examples).level) * checks * examples
    assert spent <= Fraction(alpha)


@given(alphas, st.integers(1, 10**6), st.integers(1, 10**6), counts, counts)
def test_a_part_of_the_run_has_levels_no_smaller(alpha: float, some: int, more: int, checks: int, calls: int) -> None:
    alone = RunBudget(alpha, some).allowance(checks=checks, examples=calls).level
    assert alone >= RunBudget(alpha, some + more).allowance(checks=checks, examples=calls).level


@given(alphas, st.integers(1, 30), st.integers(1, 30))
def test_declared_checks_fit_and_one_more_does_not(alpha: float, checks: int, examples: int) -> None:
    allowance = Allowance(alpha, checks=checks, examples=examples)
    for _ in range(checks * examples):
        allowance.spend()
    assert allowance.spent <= alpha * (1 + 1e-9)
    with pytest.raises(ValueError, match=r"declare the checks with @pytest.mark.me_stats\(checks="):
        allowance.spend()
    assert allowance.record()["checks"] == checks * examples


@given(alphas, st.integers(1, 1000))
def test_shares_are_parts_of_a_level(alpha: float, n: int) -> None:
    allowance = Allowance(alpha, checks=2)
    assert Fraction(allowance.share(n)) * n * 2 <= Fraction(alpha)
    for _ in range(min(n, 20)):
        allowance.spend(allowance.share(n))


def test_a_test_that_saw_its_level_may_have_spent_everything() -> None:
    checked, handed = Allowance(0.01, checks=4), Allowance(0.01, checks=4)
    checked.spend()
    assert math.isclose(checked.spent, 0.0025)
    assert 0 < handed.level < 0.01
    assert handed.spent == 0.01


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_counts_are_positive_integers(wrong: object) -> None:
    with pytest.raises(ValueError, match="checks must be an integer of at least 1"):
        Allowance(0.1, checks=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="examples must be an integer of at least 1"):
        Allowance(0.1, examples=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        Allowance(0.1).share(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["0", "1", "-1e-6", "nan", "inf", "many", ""])
def test_a_budget_is_a_probability(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"--me-stats-budget must be a probability strictly between 0 and 1.*got"):
        parse_budget(wrong, name="--me-stats-budget")
    assert parse_budget("0.25") == 0.25


def test_an_own_level_is_checked_and_counted() -> None:
    allowance = Allowance(0.01)
    with pytest.raises(ValueError, match="level must be a probability"):
        allowance.spend(0.0)
    with pytest.raises(ValueError, match=r"may spend 0\.01 and its check 1 brings it to 0\.02"):
        allowance.spend(0.02)
    assert allowance.spend(0.004) == 0.004


def test_the_summary_adds_up_what_tests_record() -> None:
    run = RunBudget(1e-6, tests=2)
    assert run.summary() == []
    for name, missed, passed in (("a", 0.03, True), ("b", 0.5, False)):
        allowance = run.allowance(checks=2)
        allowance.spend()
        allowance.note(SimpleNamespace(passed=passed, min_detectable_tv=missed))
        run.records[name] = allowance.record()
    assert run.summary() == [
        "budget 1e-06 for false alarms of the run: 2 checks in 2 tests spent 5e-07",
        "checks that passed find a departure of TV 0.03 in one step with power 0.8",
    ]
    run.records["c"] = {"checks": 1, "spent": 0.0, "missed": math.inf}
    assert run.summary()[1] == "at least one check that passed states no departure that it would find"
