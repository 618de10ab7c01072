"""The pytest plugin in runs of its own: levels, marks, deselection, processes, summary, and what its import costs."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

# Loaded here, so that runs inside this process find them and do not load torch anew.
from me_stats import ConstantMixing, Ensemble, MESampler
from me_stats.models import MarkovModel
from me_stats.testing import SamplerRejected, check_sampler, strategies

pytest_plugins = ["pytester"]
LOADED = (ConstantMixing, Ensemble, MESampler, MarkovModel, SamplerRejected, check_sampler, strategies)

LEVELS = """
    import json, os, pathlib
    import pytest

    def write(name, level, parts=1):
        with open(pathlib.Path(os.environ["LEVELS"]) / f"{name}.json", "w") as file:
            json.dump([level, parts], file)

    @pytest.fixture
    def through(me_stats_level):
        return me_stats_level

    def test_direct(me_stats_level):
        write("direct", me_stats_level)

    def test_through_a_fixture(through):
        write("through", through)

    @pytest.mark.me_stats(checks=3)
    def test_three_checks(me_stats_level):
        write("three", me_stats_level, 3)

    @pytest.mark.me_stats(checks=2, examples=1_000_000)
    def test_property(me_stats_level):
        write("property", me_stats_level, 2_000_000)

    @pytest.mark.parametrize("number", range(4))
    def test_parametrised(number, me_stats_budget):
        write(f"parametrised{number}", me_stats_budget.share(7), 7)

    class TestMarked:
        pytestmark = pytest.mark.me_stats(checks=5)

        def test_method(self, me_stats_budget):
            write("method", me_stats_budget.level, 5)

    @pytest.mark.usefixtures("me_stats_level")
    def test_by_mark():
        write("mark", 0.0)

    def test_without(): pass
"""
TESTS = 10  # that ask for a level


class Run:
    """Pytest with this plugin alone, in this process, and the levels that its tests wrote."""

    def __init__(self, pytester: pytest.Pytester, folder: Path) -> None:
        self._pytester, self._folder = pytester, folder

    def __call__(self, *arguments: str) -> pytest.RunResult:
        for path in self._folder.glob("*.json"):
            path.unlink()
        return self._pytester.runpytest_inprocess("-p", "me_stats.testing.plugin", *arguments)

    def levels(self) -> dict[str, tuple[float, int]]:
        return {path.stem: tuple(json.loads(path.read_text())) for path in self._folder.glob("*.json")}


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    # Without other plugins, whether or not this one is installed as an entry point.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    folder = tmp_path / "levels"
    folder.mkdir()
    monkeypatch.setenv("LEVELS", str(folder))
    return Run(pytester, folder)


def spent(levels: dict[str, tuple[float, int]]) -> Fraction:
    return sum((Fraction(level) * parts for level, parts in levels.values()), Fraction(0))


def test_levels_of_a_run_add_up_to_at_most_its_budget(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(LEVELS)
    run("--me-stats-budget", "1e-3").assert_outcomes(passed=TESTS + 1)
    levels = run.levels()
    assert len(levels) == TESTS
    assert spent(levels) <= Fraction(1e-3)
    # The test that is counted by its mark wrote nothing.
    assert float(spent(levels)) == pytest.approx(1e-3 * (TESTS - 1) / TESTS)
    assert levels["direct"][0] == levels["through"][0] == pytest.approx(1e-4)
    assert levels["three"][0] == pytest.approx(1e-4 / 3)
    assert levels["property"][0] == pytest.approx(1e-4 / 2e6)
    assert levels["parametrised2"][0] == pytest.approx(1e-4 / 7)
    assert levels["method"][0] == pytest.approx(1e-4 / 5)


@pytest.mark.parametrize("selection", [("-k", "direct or three or 1"), ("-k", "method"), ("-m", "me_stats")])
def test_fewer_tests_get_larger_levels(pytester: pytest.Pytester, run: Run, selection: tuple[str, str]) -> None:
    pytester.makepyfile(LEVELS)
    run()
    everything = run.levels()
    outcome = run(*selection)
    some = run.levels()
    assert outcome.ret == 0
    assert 0 < len(some) < TESTS
    assert spent(some) <= Fraction(1e-6)
    assert float(spent(some)) == pytest.approx(1e-6)
    assert all(level > everything[name][0] for name, (level, _) in some.items())


def test_processes_share_one_budget(pytester: pytest.Pytester, run: Run) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(LEVELS)
    result = run("-p", "xdist", "-n", "2", "--me-stats-budget", "1e-3")
    result.assert_outcomes(passed=TESTS + 1)
    result.stdout.fnmatch_lines(["budget 0.001 for false alarms of the run: 0 checks in 10 tests spent 0.001"])
    spread = run.levels()
    run("--me-stats-budget", "1e-3")
    assert spread == run.levels()


CHECKS = """
    import pytest
    from me_stats import ConstantMixing, Ensemble, MESampler
    from me_stats.models import MarkovModel

    TOYS = [MarkovModel.random(4, seed=s) for s in (0, 1)]
    RIGHT = Ensemble(TOYS, ConstantMixing([0.5, 0.5]))
    WRONG = Ensemble(TOYS, ConstantMixing([0.9, 0.1]))

    @pytest.mark.me_stats(checks=2)
    def test_right(me_stats_check):
        results = [me_stats_check(MESampler(RIGHT), RIGHT, [0], n=2000, seed=seed) for seed in (0, 1)]
        assert all(result.passed for result in results)
        assert results[0].level == pytest.approx(1e-3 / 6)

    def test_wrong(me_stats_check):
        me_stats_check(MESampler(WRONG), RIGHT, [0], n=20_000)

    def test_more_than_declared(me_stats_check):
        for _ in range(2):
            me_stats_check(MESampler(RIGHT), RIGHT, [0], n=500)
"""


def test_checks_spend_and_report(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(CHECKS)
    result = run("--me-stats-budget", "1e-3")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "E   *SamplerRejected: sampler REJECTED*at level 0.0003*",
            "E   *ValueError: this test may spend 0.000333 and its check 2 brings it to 0.000667; declare *",
            "*= me_stats =*",
            "budget 0.001 for false alarms of the run: 4 checks in 3 tests spent 0.001",
            "checks that passed find a departure of TV 0.* in one step with power 0.8",
        ]
    )
    # A failure of the whole run fails alone too.
    run("--me-stats-budget", "1e-3", "-k", "wrong").assert_outcomes(failed=1, deselected=2)


def test_properties_spend_by_the_call(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from hypothesis import HealthCheck, given, settings
        from me_stats import MESampler
        from me_stats.testing.strategies import ensembles

        @pytest.mark.me_stats(examples=1000)
        @settings(max_examples=5, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(ensemble=ensembles(warped=False))
        def test_property(me_stats_check, ensemble):
            assert me_stats_check(MESampler(ensemble), ensemble, [0], n=50).level == pytest.approx(1e-6 / 1000)
        """
    )
    result = run()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["budget 1e-06 for false alarms of the run: 5 checks in 1 test spent 5e-09"])


def test_a_run_without_checks_says_nothing(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    result = run()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*me_stats*budget*")
    result.stdout.no_fnmatch_line("*false alarms*")


@pytest.mark.parametrize("wrong", ["0", "1", "nan", "soon"])
def test_a_wrong_budget_names_the_option(pytester: pytest.Pytester, run: Run, wrong: str) -> None:
    result = run("--me-stats-budget", wrong)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --me-stats-budget must be a probability*got '{wrong}'"])


def test_the_ini_file_sets_the_budget_and_the_option_wins(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile("def test_one(me_stats_level): assert me_stats_level == 0.01")
    pytester.makeini("[pytest]\nme_stats_budget = 0.01\naddopts = --strict-markers --strict-config")
    run().assert_outcomes(passed=1)
    run("--me-stats-budget", "0.02").assert_outcomes(failed=1)
    pytester.makeini("[pytest]\nme_stats_budget = 2")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([r"ERROR: me_stats_budget (ini file) must be a probability*"])


@pytest.mark.parametrize("mark", ["checks=0", "examples=1.5", "check=2", "3"])
def test_a_wrong_mark_is_an_error(pytester: pytest.Pytester, run: Run, mark: str) -> None:
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.me_stats({mark})\ndef test_one(me_stats_level): pass",
    )
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*@pytest.mark.me_stats(checks=..., examples=...): *"])


def test_a_fixture_that_was_not_counted_is_refused(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile('def test_late(request): request.getfixturevalue("me_stats_level")')
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*after the budget was shared out; name the fixture in the arguments of the test*"])


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "scipy", "numpy", "hypothesis", "matplotlib")
    code = f"import sys, me_stats.testing.plugin; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
