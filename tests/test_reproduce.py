"""The main job: what it runs, what it does not run twice, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from me_stats import cli, plans
from me_stats import reproduce as job
from me_stats.record import Record, Recorder
from tests import tiny

EXPERIMENTS = list(tiny.OPTIONS)
PLANNED = [part.experiment for part in plans.plan(size="quick")]


def silent(fraction: float, note: str) -> None:
    pass


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Experiments that take no time; the list grows by the name of each one that is run."""
    calls: list[str] = []

    def instant(name: str) -> Callable[..., Record]:
        def run(config: Any, progress: Callable[[float, str], None] = silent) -> Record:
            calls.append(name)
            progress(0.5, "half")
            recorder = Recorder(name, f"Title of {name}", config)
            recorder.check("something", True)
            return recorder.finish({})

        return run

    for name in EXPERIMENTS:
        monkeypatch.setattr(tiny.experiment(name), "run", instant(name))
    monkeypatch.setattr(job, "draw_figures", lambda records, folder: {})
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return calls


def main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return int(stop.value.code or 0)


# Reuse


def test_run_part_writes_the_record_under_the_parts_name(tmp_path: Path, runs: list[str]) -> None:
    part = plans.plan(size="quick")[1]
    notes: list[tuple[float, str]] = []
    record = job.run_part(part, tmp_path, lambda fraction, note: notes.append((fraction, note)))
    assert record.name == part.name == "per_step-siblings"
    assert Record.load(tmp_path / "per_step-siblings.json") == record
    assert notes == [(0.5, "half")]


def test_only_a_complete_matching_record_that_held_is_reused(tmp_path: Path, runs: list[str]) -> None:
    part = plans.plan(size="quick")[1]
    path = tmp_path / f"{part.name}.json"
    assert job.finished(part, tmp_path) is None
    assert job.finished(part, tmp_path / "no such folder") is None
    record = job.run_part(part, tmp_path, silent)
    assert job.finished(part, tmp_path) == record
    # Another configuration, seed or version is another run.
    for change in ({"seed": 1}, {"draws": part.config.draws + 1}, {"dtype": "bfloat16"}):
        other = dataclasses.replace(part, config=dataclasses.replace(part.config, **change))
        assert job.finished(other, tmp_path) is None
    # A check that failed is worth another look.
    dataclasses.replace(record, checks={"something": False}).save(path)
    assert job.finished(part, tmp_path) is None
    # Half a file is none.
    record.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert job.finished(part, tmp_path) is None
    path.write_text("", encoding="utf-8")
    assert job.finished(part, tmp_path) is None


def test_another_version_runs_again(tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    part = plans.plan(size="quick")[0]
    job.run_part(part, tmp_path, silent)
    assert job.finished(part, tmp_path) is not None
    monkeypatch.setattr("me_stats.__version__", "0.0.0")
    assert job.finished(part, tmp_path) is None


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instant = tiny.experiment("per_step").run

    def interrupted(*_: Any) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.experiment("per_step"), "run", interrupted)
    command = ("reproduce", "--quick", "--out", str(tmp_path))
    assert main(*command) == 130
    errors = capsys.readouterr().err
    records = tmp_path / "records"
    assert f"interrupted: 1 finished parts are kept in {records}; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert [path.name for path in records.iterdir()] == ["toy_equivalence.json"]
    assert not (tmp_path / "index.html").exists()

    first = records / "toy_equivalence.json"
    before = (first.stat().st_mtime_ns, first.stat().st_ino, first.read_bytes())
    monkeypatch.setattr(tiny.experiment("per_step"), "run", instant)
    runs.clear()
    assert main(*command) == 0
    assert runs == PLANNED[1:]
    assert (first.stat().st_mtime_ns, first.stat().st_ino, first.read_bytes()) == before
    assert len(list(records.iterdir())) == len(PLANNED)
    assert (tmp_path / "index.html").exists()

    runs.clear()
    assert main(*command) == 0
    assert runs == []
    assert main(*command, "--seed", "1") == 0
    assert runs == PLANNED
    runs.clear()
    assert main(*command, "--seed", "1", "--fresh", "--only", "sequences-siblings", "toy_equivalence") == 0
    assert runs == ["toy_equivalence", "sequences"]


# Reports


def test_rank_tells_the_story_in_order() -> None:
    names = {part.name for part in plans.plan()}
    assert sorted(names, key=lambda name: (job.rank(name), name))[:3] == [
        "toy_equivalence",
        "per_step-siblings",
        "per_step-siblings-mixed",
    ]
    assert job.rank("something of somebody else") == len(job.ORDER)


def test_a_record_without_a_figure_script_has_no_figure(tmp_path: Path) -> None:
    record = Recorder("of_somebody_else", "Another", {}).finish({})
    assert job.draw_figures([record], tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
