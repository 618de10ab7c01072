"""Hypothesis without clocks: a slow machine is no failure, and CI replays the same examples every time.

``pytest --hypothesis-profile=thorough`` looks at 2000 examples of each property.

The fixtures of the command line import what they need when they run: the other tests do without the experiments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from me_stats.samplers import tabular

if TYPE_CHECKING:
    from me_stats.record import Record
    from tests.commands import Result, Run

settings.register_profile(
    "local",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("local"), max_examples=2000)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def tables_for_any_length() -> Iterator[None]:
    """Let the fast path of tables write short samples too, which it leaves to the general loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabular, "MIN_TOKENS", 0)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch, as the bundled models run with."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``me-stats`` with these arguments, in this process and in an empty folder."""
    from me_stats import cli
    from tests.commands import Result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("ME_STATS_TRACEBACK", raising=False)

    def main(*arguments: str | Path) -> Result:
        capsys.readouterr()  # what the test itself loaded may have drawn a bar
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return main


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Experiments whose runs are there already; the list grows by the name of each that is asked for."""
    from tests import tiny

    calls: list[str] = []

    def stand_in(name: str) -> Callable[..., Record]:
        def run_experiment(config: Any, progress: Callable[[float, str], None]) -> Record:
            calls.append(name)
            return tiny.stand_in(name, config)

        return run_experiment

    for name in tiny.OPTIONS:
        monkeypatch.setattr(tiny.experiment(name), "run", stand_in(name))
    from me_stats.preflight import Preflight

    monkeypatch.setattr("me_stats.preflight.check", lambda parts, **_: Preflight((), (), ""))  # names of no model
    return calls


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from me_stats import reproduce as job

    monkeypatch.setattr(job, "draw_figures", lambda records, folder: {})
