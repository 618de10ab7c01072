"""Pytest plugin: one false-alarm budget for the whole run, shared by the tests that ask for a level.

``--me-stats-budget ALPHA`` (or ``me_stats_budget`` in the ini file, default 1e-6) is the probability that a run in
which every sampler is right fails at all. Each collected test that uses a fixture of this file gets an equal share::

    def test_sampler(me_stats_check):
        me_stats_check(my_sampler, my_model, [[0], [1]], n=20_000)

    @pytest.mark.me_stats(checks=2)  # each at half of the test's share
    def test_two_samplers(me_stats_check): ...

    @pytest.mark.me_stats(examples=1_000_000)  # a property: so many calls at most, shrinking included
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ensemble=ensembles())
    def test_property(me_stats_level, ensemble): ...

A test that failed in the whole run fails alone as well if it draws the same: give `n`, since a default number of draws
follows the level. This file imports nothing heavy, because every test run of whoever installed the package loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from me_stats.testing.budget import Allowance, RunBudget, parse_budget

if TYPE_CHECKING:
    from me_stats.testing.result import CheckResult

_RUN = pytest.StashKey[RunBudget]()
_ALLOWANCE = pytest.StashKey[Allowance]()
_FIXTURE = "me_stats_budget"  # the other two fixtures ask for it, so every test that spends has it in its closure


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--me-stats-budget`` and the ini value of the same name."""
    help_text = "probability that a run fails in which every sampler is right"
    group = parser.getgroup("me_stats", "me_stats: checks of samplers")
    group.addoption("--me-stats-budget", metavar="ALPHA", default=None, help=f"{help_text} (default: 1e-6)")
    parser.addini("me_stats_budget", help=help_text, default="1e-6")


def pytest_configure(config: pytest.Config) -> None:
    """Read the budget, or raise a UsageError that names where it was given."""
    config.addinivalue_line(
        "markers",
        "me_stats(checks=1, examples=1): a test that makes so many checks, or a property of so many calls at most; "
        "its level is divided among them",
    )
    option = config.getoption("--me-stats-budget")
    name = "--me-stats-budget" if option is not None else "me_stats_budget (ini file)"
    try:
        alpha = parse_budget(config.getini("me_stats_budget") if option is None else option, name=name)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_RUN] = run = RunBudget(alpha)
    config.pluginmanager.register(_Reporter(run), "me_stats_reporter")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the tests that share the budget: deselected ones are gone, and every worker of xdist has the full list."""
    session.config.stash[_RUN].tests = sum(map(_asks, session.items))


def _asks(item: pytest.Item) -> bool:
    return _FIXTURE in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what a test spent along with its last report."""
    report = yield
    allowance = item.stash.get(_ALLOWANCE, None)
    # The last phase of a test, which always runs. Attributes of a report travel from workers as they are.
    if report.when == "teardown" and allowance is not None:
        vars(report)["me_stats"] = allowance.record()
    return report


class _Reporter:
    """Collects what the tests spent, in the process that reports."""

    def __init__(self, run: RunBudget) -> None:
        self._run = run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "me_stats"):
            self._run.records[report.nodeid] = report.me_stats

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = self._run.summary()
        if lines:
            terminalreporter.section("me_stats")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def me_stats_budget(request: pytest.FixtureRequest) -> Allowance:
    """What this test may spend of the run's false-alarm budget: `.level` for each check, `.share(n)` for n checks."""
    if not _asks(request.node):
        raise pytest.UsageError(
            "a level was asked for by request.getfixturevalue, after the budget was shared out; name the fixture in "
            f"the arguments of the test, or mark the test with @pytest.mark.usefixtures({_FIXTURE!r})"
        )
    marker = request.node.get_closest_marker("me_stats")
    try:
        if marker is not None and marker.args:
            raise TypeError("it takes keywords only")
        allowance = request.config.stash[_RUN].allowance(**({} if marker is None else marker.kwargs))
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"@pytest.mark.me_stats(checks=..., examples=...): {error}") from None
    request.node.stash[_ALLOWANCE] = allowance
    return allowance


@pytest.fixture
def me_stats_level(me_stats_budget: Allowance) -> float:
    """False-alarm probability of each check of this test: its share of the run's budget over its declared checks."""
    return me_stats_budget.level


@pytest.fixture
def me_stats_check(me_stats_budget: Allowance) -> Callable[..., CheckResult]:
    """`me_stats.testing.check_sampler` at the level of this test, entered into the run's budget.

    An own `level` counts against the test's share; more checks than declared raise ValueError.
    """

    def check(sampler: Any, against: Any, *args: Any, level: float | None = None, **options: Any) -> CheckResult:
        __tracebackhide__ = True
        from me_stats.testing import check_sampler

        result = check_sampler(sampler, against, *args, level=me_stats_budget.spend(level), **options)
        me_stats_budget.note(result)
        return result

    return check
