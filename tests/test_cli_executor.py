"""The main job on several workers: the same records, one progress, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from me_stats import plans
from me_stats.cli_executor import parsed
from tests import tiny
from tests.commands import Run

# Facts of a run that may differ between two runs of the same part.
OF_THE_RUN = ("wall_s", "finished", "environment")


def _content(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in OF_THE_RUN}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [plans.Part(name, "", tiny.config(name)) for name in ("toy_equivalence", "audit")]
    monkeypatch.setattr(plans, "plan", lambda **_: parts)


@pytest.mark.usefixtures("small", "no_figures")
def test_processes_leave_the_records_of_one_process(run: Run, tmp_path: Path) -> None:
    assert run("reproduce", "--out", "here").code == 0
    result = run("reproduce", "--out", "there", "--executor", "processes", "--workers", "2", "--threads", "1")
    assert result.code == 0, result.err
    assert "✓ toy_equivalence" in result.err
    for name in ("toy_equivalence", "audit"):
        here, there = (_content(tmp_path / out / "records" / f"{name}.json") for out in ("here", "there"))
        assert here == there
    again = run("reproduce", "--out", "there", "--executor", "processes", "--workers", "2")
    assert again.err.count("done before") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "2"), "--workers needs --executor processes, ray or slurm"),
        (("--executor-option", "a=1"), "--executor-option needs --executor processes, ray or slurm"),
        (("--executor", "processes", "--executor-option", "a"), "--executor-option a: give NAME=VALUE"),
        (("--executor", "processes", "--gpus-per-worker", "1"), "gpus_per_worker"),
    ],
)
def test_options_that_do_not_fit_are_refused(run: Run, options: tuple[str, ...], message: str) -> None:
    result = run("reproduce", "--quick", *options)
    assert result.code == 2
    assert message in result.line


def test_options_of_executors_keep_their_types() -> None:
    assert parsed(["a=1", "b=true", "c=x=y", 'd="1"']) == {"a": 1, "b": True, "c": "x=y", "d": "1"}
