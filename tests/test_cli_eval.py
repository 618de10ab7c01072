"""`me-stats eval`: what it prints and writes, how it goes on, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import logging

from me_stats.paired import paired_difference
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.tasks import run as tasks_run
from me_stats.tasks.arms import EvalPlan, results
from me_stats.tasks.run import ItemScores
from tests.commands import Run
from tests.tasks.benchmark_files import write

pytest.importorskip("lm_eval")

TWO = ("eval", "--models", *SIBLINGS)


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """No loading bars of transformers, which a command switches off where it comes first."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


def test_both_arms_on_code_that_no_model_saw(run: Run, tmp_path: Path) -> None:
    result = run(*TWO, "--tasks", "closing_brackets", "--limit", "8", "--seeds", "2", "--arms", "CE", "ME", "single",
                 "--temperature", ".7", "--margin", "30")  # fmt: skip
    assert result.code == 0, result.err
    record = Record.load(Path("eval/eval.json"))
    (found,) = record.results["tasks"]
    assert (found["task"], found["metric"], found["runs"]) == ("closing_brackets", "exact_match", 2)
    assert len(found["items"]) == 8
    assert list(found["mean"]) == record.results["arms"] == ["CE", "ME", *SIBLINGS]
    assert 0.2 < found["mean"]["ME"] < 1
    assert found["of"] > 100
    for arm, mean in found["mean"].items():
        assert np.mean(found["scores"][arm]) == pytest.approx(mean)
        assert f"{100 * mean:.1f}%" in result.out
    (difference,) = record.results["differences"]
    expected = paired_difference(found["scores"]["ME"], found["scores"]["CE"], margin=0.3, paired_runs=True)
    assert difference["these_items"]["estimate"]["interval"] == list(expected.these_items.estimate.interval)
    assert "closing_brackets: |ME - CE| < 30 points is " in result.out
    texts = list(Path("eval/texts").glob("*/*/closing_brackets-seed?.jsonl"))
    assert len(texts) == 8
    assert sum(len(path.read_text().splitlines()) for path in texts) == 64
    assert str(tmp_path) not in Path("eval/eval.json").read_text(encoding="utf-8")
    assert record.config["transforms"]["temperature"] == 0.7


def test_benchmarks_of_a_folder_and_a_group(run: Run, folder: Path) -> None:
    result = run(*TWO, "--tasks", "bbh", "gsm8k", "--data", folder, "--limit", "3", "--max-new-tokens", "4",
                 "--weights", ".5,.5", "--fewshot", "1")  # fmt: skip
    assert result.code == 0, result.err
    for words in ("bbh:navigate", "bbh, all 2", "3 of 6", "gsm8k", "ME - CE, points", "0.0%"):
        assert words in result.out, words
    record = Record.load(Path("eval/eval.json"))
    assert [entry["task"] for entry in record.results["differences"]] == ["bbh:navigate", "bbh:snarks", "gsm8k", "bbh"]
    assert record.results["differences"][3]["items"] == 6
    assert record.config["data"] == "data"


def test_one_model_by_itself(run: Run, folder: Path) -> None:
    result = run("eval", "--models", SIBLINGS[1], "--tasks", "arc_challenge", "--data", folder, "--arms", "single",
                 "--max-new-tokens", "2", "--greedy")  # fmt: skip
    assert result.code == 0, result.err
    record = Record.load(Path("eval/eval.json"))
    assert record.results["arms"] == [SIBLINGS[1]]
    assert record.results["differences"] == []
    assert "points" not in result.out
    assert record.results["tasks"][0]["items"][-1] == "q0"


def test_ctrl_c_keeps_texts_and_the_same_command_goes_on(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*TWO, "--tasks", "gsm8k", "--data", folder, "--max-new-tokens", "3", "--fewshot", "0", "--batch", "4")
    whole = run(*command, "--out", "whole")
    write_texts, batches = tasks_run.HarnessLM._write, []

    def interrupted(self: Any, batch: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return write_texts(self, batch)

    monkeypatch.setattr(tasks_run.HarnessLM, "_write", interrupted)
    stopped = run(*command)
    assert stopped.code == 130
    assert "interrupted: 4 answers are kept in eval/texts; the same command goes on from there" in stopped.err
    assert not Path("eval/eval.json").exists()
    again = run(*command)
    assert again.code == 0
    assert batches == [4, 2, 2, 4, 2]  # CE, interrupted; its rest; ME
    assert again.out == whole.out
    one, other = (Record.load(Path(out, "eval.json")) for out in ("eval", "whole"))
    assert one.results == other.results
    # More seeds take over the first one.
    assert run(*command, "--seeds", "2", "--margin", "5").code == 0
    assert batches[5:] == [4, 2, 4, 2]


def test_early_mistakes_are_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder)
    opening = "opening gsm8k ...\n"
    for words, message in (
        (("--tasks", "gsm8k", "--data", "nowhere"), "--data nowhere: no such folder"),
        (("--tasks", "gsm8k", *data, "--margin", "0"), "--margin 0.0: points of 100"),
        (("--tasks", "gsm8k", *data, "--weights", "1"), "weights has 1 values for 2 models"),
        (("--tasks", "gsm8k", *data, "--arms", "XE"), "arms must be some of CE, ME, single"),
        (("--tasks", "gsm8k", *data, "--top-k", "0"), "an integer k of at least 1"),
        (("--tasks", "gsm8k", "gsm8k", *data), "each once"),
    ):
        result = run(*TWO, *words)
        assert (result.code, message in result.line) == (2, True), result.err
    (folder / "gsm8k/test.jsonl").unlink()
    result = run(*TWO, "--tasks", "gsm8k", *data)
    assert result.code == 2
    assert result.err.startswith(opening)
    assert "gsm8k has no test.jsonl; give a folder with test.jsonl" in result.err
    assert run("eval", "--models", SIBLINGS[0], "--tasks", "gsm8k", *data, "--arms", "CE").line.startswith(
        "me-stats: one model is no ensemble"
    )
    assert run("eval", "--models", SIBLINGS[0], "--tasks", "gsm8k", *data, "--weights", "1").line.startswith(
        "me-stats: --weights mix several models"
    )
    assert not Path("eval").exists()


def test_help_has_examples(run: Run) -> None:
    result = run("eval", "--help")
    assert result.code == 0
    assert "me-stats eval --models bundled:prose bundled:code --tasks closing_brackets" in result.out


def test_results_of_planted_scores() -> None:
    rng = np.random.default_rng(0)

    def scores(name: str, share: float, items: int = 200, metric: str = "exact_match", runs: int = 3) -> ItemScores:
        drawn = (rng.random((items, runs)) < share).astype(float)
        return ItemScores(name, metric, tuple(range(items)), drawn, items)

    def both(share: float) -> dict[str, ItemScores]:
        return {"mmlu:law": scores("mmlu:law", share), "mmlu:art": scores("mmlu:art", share, 50),
                "bits": scores("bits", 0.5, metric="bits_per_byte", runs=1)}  # fmt: skip

    found = results({"CE": both(0.5), "ME": both(0.5)}, margin=0.15)
    assert [entry["task"] for entry in found["differences"]] == ["mmlu:law", "mmlu:art", "mmlu"]
    whole = found["differences"][2]
    assert whole["items"] == 250
    assert whole["these_items"]["equivalence_pvalue"] < 0.05
    low, high = whole["these_items"]["estimate"]["interval"]
    assert low < 0 < high
    # A planted difference is seen, with its sign: ME less CE.
    found = results({"CE": both(0.9), "ME": both(0.4)}, margin=0.15)
    assert found["differences"][2]["these_items"]["estimate"]["interval"][1] < -0.3
    assert found["differences"][2]["these_items"]["equivalence_pvalue"] > 0.5
    assert found["groups"][0]["tasks"] == 2


def test_what_a_plan_refuses() -> None:
    with pytest.raises(ValueError, match="margin must lie between 0 and 1"):
        EvalPlan(SIBLINGS, ("gsm8k",), weights=(0.5, 0.5), margin=2)
    with pytest.raises(ValueError, match="at least one task"):
        EvalPlan(SIBLINGS, (), weights=(0.5, 0.5))
