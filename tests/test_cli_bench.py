"""`me-stats bench` on the bundled siblings: what it prints and writes, how it goes on, and what it refuses."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from me_stats import cli_bench, rounds, scripts
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.report.style import read_data
from tests.commands import Run

SMALL = ("--models", *SIBLINGS, "--batch", "2", "1", "--steps", "4", "--prompt-length", "6", "--rounds", "2")


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """No loading bars of transformers, which a command switches off where it comes first."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few spans: what they calibrate is tested elsewhere."""
    script = scripts.load("experiments", "speed")
    whole = script.Config

    def config(**options: Any) -> Any:
        return whole(**({"spans": (1, 2), "contexts": (4, 8)} | options))

    monkeypatch.setattr(script, "Config", config)


@pytest.mark.usefixtures("small")
def test_it_prints_speeds_and_what_they_mean(run: Run, tmp_path: Path) -> None:
    result = run("bench", *SMALL, "--weights", ".5,.5", ".8,.2", "--arms", "shared", "speculative")
    assert result.code == 0, result.err
    assert result.err.splitlines()[-1] == "Record and figure: bench, speed-bench.png"
    for word in ("bundled:prose + bundled:code, float32, on ", "thread", "tokens/s", "× CE", "ME shared", "speculative",
                 "CE top-k", "0.8,0.2", "chance 50.0%", "GB moved", "cost model predicts"):  # fmt: skip
        assert word in result.out, word
    assert re.search(r"With λ 0.5,0.5 ME is \d\.\d\d × CE at batch 1 and \d\.\d\d × at batch 2", result.out)
    record = Record.load(Path("bench/speed-bench.json"))
    assert record.name == "speed-bench"
    assert record.config["batches"] == [1, 2]
    assert record.held
    assert str(tmp_path) not in Path("bench/speed-bench.json").read_text(encoding="utf-8")
    assert read_data(Path("bench/speed-bench.png"))["key"] == record.key
    # The command that the record names makes it again, from the rounds that are kept.
    words = shlex.split(cli_bench.command(record))
    assert words[:2] == ["me-stats", "bench"]
    assert run(*words[1:]).code == 0
    again = Record.load(Path("bench/speed-bench.json"))
    assert (again.key, again.results["cells"]) == (record.key, record.results["cells"])


@pytest.mark.usefixtures("small")
def test_fresh_times_everything_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original, ran = rounds._Rounds.run, []

    def noted(self: Any, number: int, tick: Any) -> Any:
        ran.append(number)
        return original(self, number, tick)

    monkeypatch.setattr(rounds._Rounds, "run", noted)
    for arguments, expected in (((), [0, 1]), ((), []), (("--fresh",), [0, 1])):
        ran.clear()
        assert run("bench", *SMALL, *arguments).code == 0
        assert ran == expected


@pytest.mark.usefixtures("small")
def test_an_interruption_keeps_finished_rounds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original, started = rounds._Rounds.run, []

    def stopping(self: Any, number: int, tick: Any) -> Any:
        started.append(number)
        if len(started) == 2:
            raise KeyboardInterrupt
        return original(self, number, tick)

    monkeypatch.setattr(rounds._Rounds, "run", stopping)
    result = run("bench", *SMALL)
    assert result.code == 130
    assert "1 of 2 rounds are kept in bench/rounds" in result.err
    monkeypatch.setattr(rounds._Rounds, "run", original)
    assert run("bench", *SMALL).code == 0
    assert Record.load(Path("bench/speed-bench.json")).results["cells"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arms", "router"), "no such arm"),
        (("--weights", ".5,.3,.2", "--components", "2"), "give 2 to 2 weights"),
        (("--weights", "1"), "give 2 to 2 weights"),
        (("--weights", ".5,.6"), "--weights .5,.6"),
        (("--batch", "0"), "--batch must name positive"),
        (("--rounds", "1"), "rounds"),
        (("--components", "1"), "components"),
        (("--models", "random:mistral-8b"), "name must be one of"),
        (("--models", "bundled:nothing"), "bundled:nothing"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, options: tuple[str, ...], message: str) -> None:
    first = () if options[0] == "--models" else ("--models", *SIBLINGS)
    result = run("bench", *first, *options)
    assert result.code == 2
    assert message in result.line


def test_models_of_other_vocabularies_are_refused(run: Run) -> None:
    result = run("bench", "--models", "bundled:prose", "bundled:words")
    assert result.code == 2
    assert "different vocabularies" in result.err


def test_the_help_teaches(run: Run) -> None:
    result = run("bench", "--help")
    assert result.code == 0
    for word in ("Examples:", "--arms", "random:", "interruption", "Exit code"):
        assert word in result.out, word


def test_the_conclusion_says_where_it_stops_paying() -> None:
    def concluded(measured: float | None, predicted: int | None) -> str:
        points = [{"batch": b, "of_ce": {"value": v}} for b, v in ((1, 1.9), (64, 1.1))]
        results = {
            "by_batch": [{"arm": "ME", "weights": [0.5, 0.5], "points": copy.deepcopy(points)}],
            "crossover": [{"weights": [0.5, 0.5], "measured": measured, "predicted": predicted, "largest": 64}],
        }
        record = Record("speed-bench", "", "", {}, (), {}, results, (), {}, 0.0, "")
        return cli_bench.conclusion(record)

    start = "With λ 0.5,0.5 ME is 1.90 × CE at batch 1 and 1.10 × at batch 64; "
    assert concluded(40.4, 50) == start + "from batch 40 on it gains under 5%."
    assert concluded(None, 96).endswith("at every batch tested, and under 5% from 96 on by the cost model.")
    assert concluded(None, None).endswith("under 5% beyond 256 by the cost model.")
