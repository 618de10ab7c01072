"""The main job: what it runs, what it does not run twice, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from me_stats import cli
from me_stats import reproduce as job
from me_stats.presets import MIXED_SIBLINGS, SIBLINGS
from me_stats.record import Record, Recorder, plain
from tests import tiny

EXPERIMENTS = list(tiny.OPTIONS)
# After the toys: what runs on any models, on models of several vocabularies, on the siblings alone, on our tests.
ON_MODELS, ON_SEVERAL, ON_SIBLINGS, ON_TESTS = EXPERIMENTS[1:9], EXPERIMENTS[9:11], EXPERIMENTS[11:17], EXPERIMENTS[17:]
# What runs on models of several vocabularies besides.
ON_STRINGS = ["per_step", "certificate", "sequences", "transform_order", *ON_SEVERAL]
PLANNED = [part.experiment for part in job.plan(quick=True)]


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


# Plans


def test_quick_plan_needs_no_download() -> None:
    parts = job.plan(quick=True)
    assert list(job.ORDER) == EXPERIMENTS
    assert {part.experiment for part in parts} == set(EXPERIMENTS)
    siblings = [f"{name}-siblings" for name in (*ON_MODELS, *ON_SIBLINGS)]
    mixed = [f"{name}-siblings-mixed" for name in ON_STRINGS]
    assert [part.name for part in parts] == ["toy_equivalence", *siblings, *mixed, *ON_TESTS]
    assert {part.config.models for part in parts if hasattr(part.config, "models")} == {SIBLINGS, MIXED_SIBLINGS}


def test_default_plan_adds_the_language_model() -> None:
    parts = job.plan()
    added = [part for part in parts if part.tag.startswith("smollm2-135m")]
    quick = [part.name for part in job.plan(quick=True)]
    assert [part.name for part in parts if part not in added] == [name for name in quick if name != "speed-siblings"]
    alone = [part for part in added if part.config.models == job.LANGUAGE_MODEL]
    assert sorted(part.experiment for part in alone) == sorted([*ON_MODELS, "weights", "long"])
    mixed = [part for part in added if part not in alone]
    assert [part.experiment for part in mixed] == ON_STRINGS
    assert {part.config.models for part in mixed} == {job.MIXED_MODELS}


def test_quick_is_smaller_not_other() -> None:
    full = {part.name: part.config for part in (*job.plan(), *job.plan(models=SIBLINGS))}
    for part in (part for part in job.plan(quick=True) if part.name != "speed-siblings"):
        assert part.config != full[part.name]
        assert part.key != job.Part(part.experiment, part.tag, full[part.name]).key
        for size in ("prompts", "draws", "rows", "coupled_rows", "steps", "repeats"):
            small, large = (getattr(config, size, 0) for config in (part.config, full[part.name]))
            assert small == large or small < large  # None for the prompts that suit the models
    assert len(full["toy_equivalence"].shapes) > len(job.plan(quick=True)[0].config.shapes)


def test_models_replace_the_default_sets() -> None:
    parts = job.plan(models=["org/a", "org/b:c"], dtype="bfloat16", device="cuda:1", seed=7)
    assert parts[0].name == "toy_equivalence"
    assert {part.tag for part in parts[1:]} == {"org_a+org_b_c-cuda"}
    for part in parts[1:]:
        assert part.config.models == ("org/a", "org/b:c")
        assert part.config.device == "cuda:1"
        assert getattr(part.config, "dtype", "bfloat16") == "bfloat16"
    assert {part.config.seed for part in parts} == {7}
    by_name = {part.experiment: part.config for part in parts}
    assert not hasattr(by_name["cache_floor"], "dtype")  # it measures every dtype
    named = [part.key for part in job.plan(models=list(SIBLINGS), quick=True)]
    quick = [part for part in job.plan(quick=True) if part.tag != "siblings-mixed"]
    assert named == [part.key for part in quick if part.experiment not in ON_TESTS]


def test_models_of_several_vocabularies_have_parts_of_their_own() -> None:
    parts = job.plan(models=list(MIXED_SIBLINGS))
    assert [part.experiment for part in parts] == ["toy_equivalence", *ON_STRINGS]
    assert {part.config.models for part in parts[1:]} == {MIXED_SIBLINGS}


@pytest.mark.parametrize("options", [{}, {"quick": True}, {"models": ["a"]}, {"models": ["a", "b", "c"]}])
def test_parts_have_names_of_files_and_keys_of_their_own(options: dict[str, Any]) -> None:
    parts = job.plan(**options)
    assert len({part.name for part in parts}) == len({part.key for part in parts}) == len(parts)
    for part in parts:
        assert "/" not in part.name
        assert ":" not in part.name
        assert json.loads(json.dumps(plain(part.config)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "bfloat16"}, {"device": "cuda"}, {"models": ["other"]}])
def test_whatever_changes_the_run_changes_the_key(change: dict[str, Any]) -> None:
    before = {part.experiment: part.key for part in job.plan(models=["some"])}
    after = {part.experiment: part.key for part in job.plan(**({"models": ["some"]} | change))}
    same = {name for name in before if before[name] == after[name]}
    expected = {"seed": set(), "dtype": {"toy_equivalence", "cache_floor"}}
    assert same == expected.get(next(iter(change)), {"toy_equivalence"})


# Reuse


def test_run_part_writes_the_record_under_the_parts_name(tmp_path: Path, runs: list[str]) -> None:
    part = job.plan(quick=True)[1]
    notes: list[tuple[float, str]] = []
    record = job.run_part(part, tmp_path, lambda fraction, note: notes.append((fraction, note)))
    assert record.name == part.name == "per_step-siblings"
    assert Record.load(tmp_path / "per_step-siblings.json") == record
    assert notes == [(0.5, "half")]


def test_only_a_complete_matching_record_that_held_is_reused(tmp_path: Path, runs: list[str]) -> None:
    part = job.plan(quick=True)[1]
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
    part = job.plan(quick=True)[0]
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


# Loading


def test_experiments_and_figures_of_the_clone_are_found() -> None:
    for name in job.ORDER:
        module = job.load("experiments", name)
        assert name == module.NAME
        assert module.TITLE
        assert job.load("experiments", name) is module
        assert callable(job.load("figures", name).draw)


def test_a_missing_script_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"experiments/absent\.py .* reinstall me_stats"):
        job.load("experiments", "absent")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package: its scripts lie inside it."""
    package = tmp_path / "me_stats"
    monkeypatch.setattr(job, "__file__", str(package / "reproduce.py"))
    folder = package / "_shipped" / "experiments"
    folder.mkdir(parents=True)
    return folder


def test_scripts_of_an_installed_package_are_found(shipped: Path) -> None:
    (shipped / "only_shipped.py").write_text("VALUE = 3\n", encoding="utf-8")
    try:
        assert job.load("experiments", "only_shipped").VALUE == 3
    finally:
        sys.modules.pop("me_stats_experiments.only_shipped", None)


def test_a_script_that_fails_to_load_is_loaded_anew(shipped: Path) -> None:
    script = shipped / "half_written.py"
    script.write_text("VALUE = 3\nraise RuntimeError('half')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="half"):
        job.load("experiments", "half_written")
    script.write_text("VALUE = 4  # whole now\n", encoding="utf-8")
    try:
        assert job.load("experiments", "half_written").VALUE == 4
    finally:
        sys.modules.pop("me_stats_experiments.half_written", None)


# Reports


def test_rank_tells_the_story_in_order() -> None:
    names = {part.name for part in job.plan()}
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
