"""`me-stats long` on the bundled siblings: what it writes, how it goes on, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers.utils import logging

from me_stats import cli_long, cli_options
from me_stats.cli_options import parsed_weights, prepare_models
from me_stats.parts import WorkerDied
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.report.style import read_data
from tests import tiny
from tests.commands import Run

SMALL = (
    "--models", *SIBLINGS, "--prompt", "The names of the ", "--rows", "8", "--steps", "12", "--blocks", "3", "--batch",
    "4", "--window", "12", "--control", "0", "--workers", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """No loading bars of transformers, which a command switches off where it comes first."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def parts(folder: str = "long") -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder, "parts").rglob("*.npz")}


def test_it_writes_a_record_a_table_and_a_figure_and_uses_its_parts_again(run: Run, tmp_path: Path) -> None:
    command = (*SMALL, "--paired", "8", "--weights", ".7,.3", "--seed", "5")
    result = run("long", *command)
    assert result.code == 0, result.err
    record = Record.load(Path("long/long.json"))
    assert record.name == "long"
    assert record.config["weights"] == [0.7, 0.3]
    assert (record.config["seed"], record.config["hop"], record.config["scored"]) == (5, None, 8)
    assert [model["name"] for model in record.models] == list(SIBLINGS)
    assert record.results["label"] == "bundled siblings, window 12"
    for row in record.results["comparisons"]:
        assert row["name"] in result.out
    assert {row["name"] for row in record.results["comparisons"]} >= {"log_prob", "entropy"}
    for word in ("Var ME/CE", "sees", "path's share", "95% intervals, one by one"):
        assert word in result.out
    lines = result.err.splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == ["held"] * len(record.findings)
    checks = len(record.checks)
    assert lines[-1] == f"{checks} of {checks} checks held. Record and figure: long, long.png"
    about = read_data(Path("long/long.png"))
    assert about["key"] == record.key
    assert "over 12 tokens" in about["caption"]
    assert Path("long/long.pdf").exists()
    assert str(tmp_path) not in Path("long/long.json").read_text()

    before = parts()
    assert len(before) == 2 * 3
    again = run("long", *command)
    assert (again.code, again.out, again.err) == (0, result.out, result.err)
    assert parts() == before
    assert Record.load(Path("long/long.json")).results == record.results
    other = run("long", *SMALL, "--paired", "8", "--weights", ".7,.3", "--seed", "6")
    assert other.code == 0
    assert len(parts()) == 2 * 3  # of the same names, in a folder of their own
    assert len(list(Path("long/parts").iterdir())) == 2


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("long", *SMALL, "--out", "whole")
    assert whole.code == 0
    experiment = tiny.experiment("long")
    honest = experiment.run

    def interrupted(config: Any, progress: Any, **options: Any) -> Record:
        def stop(fraction: float, note: str) -> None:
            progress(fraction, note)
            if parts():
                raise KeyboardInterrupt

        return honest(config, stop, **options)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", interrupted)
        stopped = run("long", *SMALL)
    assert stopped.code == 130
    assert "interrupted: finished parts are kept in long/parts; the same command goes on from there" in stopped.err
    assert "Traceback" not in stopped.err
    assert not Path("long/long.json").exists()
    (kept,) = parts().items()
    again = run("long", *SMALL)
    assert again.code == 0
    assert parts()[kept[0]] == kept[1]
    assert again.out == whole.out
    assert {name: content for name, (_, content) in parts().items()} == {
        name: content for name, (_, content) in parts("whole").items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blocks", "5"), "blocks must divide steps into blocks of two tokens or more, got 5 blocks of 12 tokens"),
        (("--window", "99999"), "window is 99999 tokens, but "),
        (("--hop", "13"), "hop must be an integer in 1..12 (the window), got 13"),
        (("--weights", ".6,.2,.2"), "mixing has 3 weights for 2 components"),
        (("--weights", ".6,.6"), "--weights .6,.6: weights must sum to 1"),
        (("--weights", ".6;.4"), "--weights .6;.4: could not convert"),
        (("--rows", "7"), "'--rows'"),
        (("--steps", "2"), "'--steps'"),
        (("--scored", "9"), "scored must lie in 0..8 (rows), got 9"),
        (("--paired", "9"), "paired must lie in 0..8 (rows), got 9"),
        (("--control", "3"), "control must be 0 (none) or at least 8 rows, got 3"),
        (("--device", "gpu9"), "--device gpu9: "),
        (("--dtype", "int4"), "int4"),
        (("--models", "smolm2-135m"), "did you mean 'smollm2-135m'"),
        (("--out", "taken"), "cannot write to taken"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("taken").write_text("a file", encoding="utf-8")
    given = SMALL[3:] if arguments[0] == "--models" else SMALL
    result = run("long", *given, *arguments)
    assert result.code == 2
    assert message in result.line
    assert "Traceback" not in result.line
    assert not Path("long/long.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "99999", "--blocks", "3"), "give a window of at most "),
        (("--steps", "12", "--blocks", "3", "--hop", "4"), "give window too"),
        (("--steps", "16"), "blocks of two tokens or more, got 16 blocks of 16 tokens"),
    ],
    ids=["beyond the context", "hop without window", "default blocks"],
)
def test_mistakes_without_a_window_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("long", "--models", *SIBLINGS, "--rows", "8", "--workers", "1", "--control", "0", *arguments)
    assert result.code == 2
    assert message in result.line


def test_a_dead_process_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(*_: Any, **__: Any) -> Record:
        raise WorkerDied("a process of the run died, perhaps for want of memory; finished parts are kept")

    monkeypatch.setattr(tiny.experiment("long"), "run", died)
    result = run("long", *SMALL)
    assert result.code == 2
    assert "a process of the run died" in result.line


def test_a_check_that_failed_is_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tiny.record("long")
    name = next(iter(record.checks))
    finding = dataclasses.replace(record.findings[0], held=False)
    failed = dataclasses.replace(
        record, checks=record.checks | {name: False}, findings=(finding, *record.findings[1:])
    )  # fmt: skip
    monkeypatch.setattr(tiny.experiment("long"), "run", lambda *_, **__: failed)
    result = run("long", *SMALL)
    assert result.code == 1
    assert "FAILED: variance over rows and over blocks" in result.err
    assert f"{len(record.checks) - 1} of {len(record.checks)} checks held" in result.err


def test_help_has_examples_that_parse(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("long", "--help").out
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("me-stats long --")]
    assert len(examples) == 2
    seen: list[Any] = []

    def stop(config: Any, *_: Any, **__: Any) -> Record:
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(tiny.experiment("long"), "run", stop)
    monkeypatch.setattr(cli_long, "prepare_models", lambda *_, **__: None)
    for example in examples:
        result = run(*shlex.split(example)[1:])
        assert result.line == "me-stats: seen"
    assert [(config.rows, config.steps, config.window) for config in seen] == [(128, 512, 128), (64, 1024, None)]
    assert (seen[0].scored, seen[0].paired, seen[0].batch, seen[1].dtype) == (128, 32, 64, "bfloat16")
    assert seen[1].prompts == ("Why is the sky blue?",)


# What the commands share


def test_weights_are_parsed_and_checked() -> None:
    assert parsed_weights("", "--weights") is None
    assert parsed_weights("0.25, .75", "--weights") == (0.25, 0.75)
    assert parsed_weights("1,0", "--weights") == (1.0, 0.0)
    for text in (".5", ".5,.6", "a,b", "-.5,1.5", "nan,1", ","):
        with pytest.raises(ValueError, match=f"--weights {text}: "):
            parsed_weights(text, "--weights")


def test_models_are_pulled_where_they_are_missing_and_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from me_stats import presets
    from me_stats.models import catalog

    done: list[str] = []
    monkeypatch.setattr(presets, "open_setting", lambda *_, **__: done.append("opened"))
    monkeypatch.setattr(catalog, "pulled", lambda name: False)
    monkeypatch.setattr(catalog, "pull", lambda name, progress: done.append(f"pulled {name}"))
    monkeypatch.setattr(catalog, "resolve", lambda name: done.append(f"resolved {name}"))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: done.append(f"{count} thread"))
    prepare_models(["smollm2-135m", "smollm2-135m"], device="cpu", say=done.append)
    assert done == ["pulled smollm2-135m", "resolved smollm2-135m"]
    done.clear()
    monkeypatch.setattr(catalog, "pulled", lambda name: True)
    prepare_models(SIBLINGS, device="cpu", say=done.append)
    assert done == [*(f"resolved {name}" for name in SIBLINGS), "1 thread"]
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="--device abacus: "):
        prepare_models(SIBLINGS, device="abacus", say=done.append)
    assert cli_options.Dtype("float16") is cli_options.Dtype.float16
    assert issubclass(typer.Exit, RuntimeError)  # so a failed check is no other error


def test_other_workers_leave_the_same_numbers(run: Run) -> None:
    command = (*SMALL[:-2], "--seed", "5")
    assert run("long", *command, "--workers", "1").code == 0
    elsewhere = ("--executor", "processes", "--workers", "2", "--threads", "1", "--out", "there")
    result = run("long", *command, *elsewhere)
    assert result.code == 0, result.err
    here, there = (Record.load(Path(folder, "long.json")) for folder in ("long", "there"))
    assert (here.results, here.findings) == (there.results, there.findings)
    assert {name: content for name, (_, content) in parts().items()} == {
        name: content for name, (_, content) in parts("there").items()
    }
    refused = run("long", *command, "--threads", "2")
    assert refused.line == "me-stats: --threads needs --executor processes, ray or slurm"
