"""`me-stats sweep` on the bundled siblings: what it writes, how it goes on, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from me_stats import cli_sweep
from me_stats import sweep as sweep_module
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.report.style import read_data
from me_stats.sweep import SweepPoint
from tests.commands import Run

SMALL = ("--models", *SIBLINGS, "--prompt", "The names of the ", "--grid", "3", "--rows", "4", "--max-new-tokens", "5")


def test_it_writes_a_record_a_table_and_a_figure(run: Run, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("def read(path):\n    return path\n" * 40, encoding="utf-8")
    result = run("sweep", *SMALL, "--text", "some.txt", "--reference", ".6,.4", "--seed", "3")
    assert result.code == 0, result.err
    record = Record.load(Path("sweep/sweep.json"))
    assert record.results["reference"] == [0.6, 0.4]
    assert record.config["seed"] == 3
    assert [model["name"] for model in record.models] == list(SIBLINGS)
    points = [SweepPoint.from_json(point) for point in record.results["points"]]
    assert [point.weights for point in points] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    nll = [point.estimates["nll"].value for point in points]
    assert nll[0] < nll[2]  # the code model knows code better
    for word in ("prose", "code", "entropy", "text NLL", "drawn"):
        assert word in result.out
    assert "3 points from" in result.err
    about = read_data(Path("sweep/sweep.png"))
    assert about["key"] == record.key
    assert "4 rows of up to 5 tokens" in about["caption"]
    assert Path("sweep/sweep.pdf").exists()
    assert str(tmp_path) not in Path("sweep/sweep.json").read_text()


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("sweep", *SMALL, "--out", "whole")
    assert whole.code == 0
    walk = sweep_module.sweep

    def interrupted(*arguments: Any, on_point: Any, **options: Any) -> Any:
        def stop(point: SweepPoint) -> None:
            on_point(point)
            raise KeyboardInterrupt

        return walk(*arguments, on_point=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "sweep", interrupted)
        stopped = run("sweep", *SMALL)
    assert stopped.code == 130
    assert "interrupted: 1 of 3 points are kept" in stopped.err
    assert not Path("sweep/sweep.json").exists()

    seen: list[int] = []

    def counted(*arguments: Any, done: Any, **options: Any) -> Any:
        seen.append(len(done))
        return walk(*arguments, done=done, **options)

    monkeypatch.setattr(sweep_module, "sweep", counted)
    assert run("sweep", *SMALL).code == 0
    again = run("sweep", *SMALL)
    assert (again.code, seen) == (0, [1, 3])
    assert again.out == whole.out
    assert Record.load(Path("sweep/sweep.json")).results == Record.load(Path("whole/sweep.json")).results

    path, key = Path("sweep/points.json"), Record.load(Path("sweep/sweep.json")).key
    assert len(cli_sweep._load(path, key)) == 3
    assert cli_sweep._load(path, "another command") == []
    for damaged in ("", '{"key": 3', "[]", json.dumps({"key": key, "points": [{}]})):
        path.write_text(damaged, encoding="utf-8")
        assert cli_sweep._load(path, key) == []


def test_one_model_runs_under_two_prompts(run: Run) -> None:
    result = run("sweep", "--models", "bundled:prose", "--grid", "2", "--rows", "2", "--max-new-tokens", "2")
    assert result.code == 0, result.err
    assert "prompt 1" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reference", ".6,.6"), "--reference .6,.6: weights must sum to 1"),
        (("--reference", ".6;.4"), "--reference .6;.4: could not convert"),
        (("--reference", ".6,.2,.2"), "--reference has 3 weights for 2 components"),
        (("--text", "absent.txt"), "absent.txt: No such file"),
        (("--text", "latin.txt"), "--text latin.txt is not UTF-8 text"),
        (("--device", "gpu9"), "--device gpu9: "),
        (("--grid", "1"), "'--grid'"),
        (("--dtype", "int4"), "int4"),
        (("--models", "smolm2-135m"), "did you mean 'smollm2-135m'"),
        (("--out", "short.txt"), "cannot write to short.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("short.txt").write_text("a", encoding="utf-8")
    Path("latin.txt").write_bytes(b"caf\xe9")
    models = () if "--models" in arguments else ("--models", *SIBLINGS)
    result = run("sweep", *models, *arguments)
    assert result.code == 2
    assert message in result.line


def test_a_text_too_short(run: Run) -> None:
    Path("short.txt").write_text("a", encoding="utf-8")
    result = run("sweep", *SMALL, "--text", "short.txt")
    assert result.code == 2
    assert result.err.splitlines()[-1] == "me-stats: --text holds 1 tokens; give a longer text"


def test_help_has_an_example(run: Run) -> None:
    text = " ".join(run("sweep", "--help").out.split())
    assert "me-stats sweep --models" in text.split("Example", 1)[1]
