"""The command line's mistakes: one line and exit code 2, nothing run and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from me_stats import cli
from me_stats.record import Record
from tests import tiny
from tests.commands import Run, save_records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nonsense",), "No such option: --nonsense; see 'me-stats --help'"),
        (("nonsense",), "No such command 'nonsense'; see 'me-stats --help'"),
        (("reproduce", "--nonsense"), "see 'me-stats reproduce --help'"),
        (("reproduce", "--seed", "-1"), "'--seed'"),
        (("reproduce", "--seed", "many"), "'--seed'"),
        (("reproduce", "--dtype", "int8"), "'--dtype'"),
        (("reproduce", "stray"), "stray"),
        (("report",), "see 'me-stats report --help'"),
        (("models", "path", "smolm2-135m"), "did you mean 'smollm2-135m'"),
    ],
)
def test_bad_usage_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert message in result.line
    assert list(tmp_path.iterdir()) == []


def test_unknown_part_is_named_with_those_that_exist(run: Run, instant: list[str]) -> None:
    result = run("reproduce", "--quick", "--only", "per_step-siblings", "nope", "never")
    assert result.code == 2
    assert "--only never nope: no such part; this run has toy_equivalence, per_step-siblings, " in result.line
    assert instant == []


def test_unknown_model_comes_with_a_suggestion_before_any_work(run: Run, instant: list[str]) -> None:
    result = run("reproduce", "--models", "bundled:prose", "smolm2-135m")
    assert result.code == 2
    assert "no model 'smolm2-135m': did you mean 'smollm2-135m'?" in result.line
    assert instant == []


def test_an_absent_folder_is_no_model(run: Run, instant: list[str]) -> None:
    result = run("reproduce", "--models", "./no/such folder")
    assert result.code == 2
    assert "no folder './no/such folder'" in result.line
    assert instant == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test asks for in vain")
def test_a_device_that_is_not_there(run: Run, instant: list[str]) -> None:
    result = run("reproduce", "--quick", "--device", "cuda")
    assert result.code == 2
    assert "--device cuda: " in result.line
    assert instant == []


def test_a_device_that_does_not_exist(run: Run, instant: list[str]) -> None:
    result = run("reproduce", "--quick", "--device", "abacus")
    assert result.code == 2
    assert "--device abacus: " in result.line
    assert instant == []


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_results_that_could_not_be_written_are_refused_before_any_work(
    run: Run, instant: list[str], tmp_path: Path, out: str
) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    for command in (("reproduce", "--quick"), ("report", save_records(tmp_path / "old"))):
        result = run(*command, "--out", out)
        assert result.code == 2
        assert f"cannot write to {out}: " in result.line
        assert "choose another --out" in result.line
        assert "Errno" not in result.line
    assert instant == []
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "a file"


def test_bad_input_that_shows_late_is_one_line_too(
    run: Run, instant: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def different(config: Any, progress: Any) -> Record:
        raise ValueError("the vocabularies\ndiffer")

    monkeypatch.setattr(tiny.experiment("per_step"), "run", different)
    result = run("reproduce", "--quick")
    assert result.code == 2
    ours = [line for line in result.err.splitlines() if line.startswith("me-stats: ")]
    assert ours == [result.err.splitlines()[-1]] == ["me-stats: the vocabularies differ"]


def test_traceback_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ME_STATS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="holds no records"):
        cli.main(["report", "nowhere"])


def test_a_bug_keeps_its_traceback(instant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, progress: Any) -> Record:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(tiny.experiment("toy_equivalence"), "run", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["reproduce", "--quick", "--out", str(tmp_path)])
