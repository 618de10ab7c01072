"""The experiment on tasks: what it finds, what it refuses, that it goes on, and that it catches a wrong sampler."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from me_stats import draws
from me_stats.claims import CLAIMS
from me_stats.record import Record, plain
from me_stats.samplers import CESampler, MESampler
from me_stats.scripts import load
from me_stats.tasks.expected import ExpectedScores

pytest.importorskip("lm_eval")

module = load("experiments", "accuracy")
TINY: dict[str, Any] = {
    "tasks": ("indentation", "stdlib_bpb:prose"), "limit": 8, "texts": 2, "runs": 2, "margin": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tiny run kept its texts."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def seen() -> list[tuple[float, str]]:
    return []


@pytest.fixture(scope="module")
def record(kept: Path, seen: list[tuple[float, str]]) -> Record:
    found: Record = module.run(module.Config(**TINY), lambda fraction, note: seen.append((fraction, note)), work=kept)
    return found


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A data folder with three questions of ARC's format."""
    folder = tmp_path / "arc_challenge"
    folder.mkdir()
    options = [{"label": label, "text": text} for label, text in zip("ABC", ("stone", "water", "air"), strict=True)]
    rows = [
        {"id": f"q{number}", "question": {"stem": f"What is number {number}?", "choices": options}, "answerKey": key}
        for number, key in enumerate("ABC")
    ]
    (folder / "ARC-Challenge-Test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "SOURCE.json").write_text("{}")
    return tmp_path


def failed(record: Record) -> list[str]:
    return [name for name, held in record.checks.items() if not held]


def test_a_tiny_run_holds_and_says_how_far_to_trust_it(record: Record, seen: list[tuple[float, str]]) -> None:
    assert failed(record) == []
    assert json.loads(json.dumps(record.results, allow_nan=False)) == record.results
    assert [finding.claim for finding in record.findings] == ["C10", "C10", "C9"]
    for finding in record.findings:
        assert finding.claim in CLAIMS
        assert "power 0.8" in finding.caveat
        assert re.search(r"effect of \d", finding.caveat)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)


def test_one_law_has_one_exact_accuracy_and_the_published_one_another(record: Record) -> None:
    (row,) = record.results["rows"]
    exact = row["exact"]["arms"]
    assert exact["CE"]["accuracy"] == exact["ME"]["accuracy"] != exact["published CE"]["accuracy"]
    assert row["exact"]["largest"] > 10 * row["exact"]["gap"]
    assert row["exact"]["difference"] == pytest.approx(np.mean(row["exact"]["moved"]), abs=1e-5)
    assert row["items_needed"]["0.01"] > 20 * row["items_needed"]["0.05"]
    low, high = row["pairs"]["CE - ME"]["these items"]["interval"]
    assert low <= 0 <= high


def test_bits_per_byte_of_the_mixture_and_its_components(record: Record) -> None:
    (row,) = record.results["texts"]
    assert set(row["bits"]) == {"mixture", "component 1", "component 2"}
    assert row["excess"] <= 0
    for arm, gain in row["gains"].items():
        assert gain["value"] == pytest.approx(row["bits"][arm]["value"] - row["bits"]["mixture"]["value"])
    assert row["gains"]["component 2"]["value"] > 0.2  # the model of code, on prose


def test_a_run_that_was_interrupted_goes_on(record: Record, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn again")

    for sampler in (CESampler, MESampler):
        monkeypatch.setattr(sampler, "sample", refuse)
    assert module.run(module.Config(**TINY), work=kept).results == record.results
    files = sorted(kept.rglob("ME/*.jsonl"))
    assert len(files) == TINY["runs"]
    files[0].unlink()
    with pytest.raises(AssertionError, match="drawn again"):
        module.run(module.Config(**TINY), work=kept)


def test_letters_are_answered_with_one_token_and_summed_exactly(
    questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = module.Config(tasks=("arc_challenge",), limit=3, runs=3, top_k=40)
    by_option = module.run(config, data=questions)
    assert failed(by_option) == []
    (row,) = by_option.results["rows"]
    assert row["max_new_tokens"] == 1
    assert 0 < row["exact"]["arms"]["CE"]["accuracy"] < 1
    digest = hashlib.sha256((questions / "arc_challenge" / "ARC-Challenge-Test.jsonl").read_bytes()).hexdigest()
    assert by_option.results["files"] == [
        {"task": "arc_challenge", "file": "ARC-Challenge-Test.jsonl", "sha256": digest}
    ]
    assert str(questions) not in json.dumps(plain(by_option))
    monkeypatch.setenv(module.DATA, str(questions))
    assert module._source("arc_challenge", None) == questions / "arc_challenge"


def test_tasks_without_their_data_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.DATA, raising=False)
    config = module.Config(tasks=("gsm8k",))
    with pytest.raises(ValueError, match=r"gsm8k needs the benchmark's files: pass --data FOLDER or set ME_STATS_DATA"):
        module.run(config)
    with pytest.raises(ValueError, match="no folder gsm8k; --data or ME_STATS_DATA"):
        module.run(config, data=tmp_path)


# A wrong sampler


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """An inverse CDF that returns the outcome after the one drawn."""
    original = draws.inverse_cdf

    def shifted(log_law: Tensor, uniforms: Tensor, *, index: Tensor | None = None) -> Tensor:
        return (original(log_law, uniforms, index=index) + 1) % log_law.shape[1]

    patch.setattr(draws, "inverse_cdf", shifted)


def test_a_sampler_of_another_law_fails_its_exact_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_one(monkeypatch)
    monkeypatch.setattr(module, "_SURPRISE", 4.0)  # found with fewer draws
    found = module.run(module.Config(**TINY | {"tasks": ("indentation",), "limit": 8, "runs": 6}))
    for arm in module.ARMS:
        (check,) = [name for name in found.checks if name.startswith(f"indentation: sampled {arm} ")]
        assert not found.checks[check]


def expected(p: np.ndarray) -> ExpectedScores:
    return ExpectedScores("toy", tuple(range(len(p))), p, p)


def exact_of(found: ExpectedScores, scores: np.ndarray) -> dict[str, Any]:
    both: dict[str, Any] = module._exact(dict.fromkeys(module.ARMS, found), dict.fromkeys(module.ARMS, scores))
    one: dict[str, Any] = both["arms"]["ME"]
    return one


def samples(seed: int, *, shift: float = 0.0, mixed: bool = False) -> Iterator[dict[str, Any]]:
    """Readings of runs that answer as often as expected, or more, or other items than expected."""
    rng = np.random.default_rng(seed)
    for _ in range(400):
        p = rng.beta(0.4, 0.6, size=60)
        q = p[np.argsort(rng.uniform(size=60))] if mixed else np.clip(p + shift, 0, 1)
        yield exact_of(expected(p), (rng.uniform(size=(60, 5)) < q[:, None]) * 1.0)


def test_standard_errors_from_exact_accuracies_are_standard() -> None:
    found = [(one["z"], one["items_z"]) for one in samples(0)]
    mean, squares = np.mean(found, axis=0), np.mean(np.square(found), axis=0)
    np.testing.assert_allclose(mean, 0, atol=0.3)  # six standard errors of a mean of 400
    np.testing.assert_allclose(squares, 1, atol=0.5)
    assert np.abs(found).max() < module._SURPRISE
    moved = [(abs(one["z"]), one["detects"]) for one in samples(1, shift=0.3)]
    assert np.mean([z > module._SURPRISE for z, _ in moved]) > 0.8
    assert np.mean([detects for _, detects in moved]) < 0.2
    # The right mean on the wrong items: only single items show it.
    others = [(abs(one["z"]), one["items_z"]) for one in samples(2, mixed=True)]
    assert np.mean([z > module._SURPRISE for z, _ in others]) < 0.5
    assert np.mean([items > module._SURPRISE for _, items in others]) > 0.99


def test_bounds_of_an_expectation_are_no_error_of_the_sampler() -> None:
    p = np.full(10, 0.5)
    loose = ExpectedScores("toy", tuple(range(10)), p - 0.2, p + 0.2)
    scores = np.tile(np.r_[np.ones(7), np.zeros(3)], (10, 1))
    assert exact_of(loose, scores)["z"] == 0
    assert abs(exact_of(expected(p), scores)["z"]) > 3


# Verdicts


def judged(record: Record, *, sampled: bool = True, **changes: Any) -> dict[str, str]:
    """Verdicts for other readings of the pairs, by pair."""
    results = plain(record.results)
    for row in results["rows"]:
        row["exact"] = None if sampled else row["exact"]
        for pair in row["pairs"].values():
            pair["these items"] |= changes
    recorder = module.Recorder(module.NAME, module.TITLE, module.Config())
    module._find_pairs(recorder, results)
    return {
        finding.statement.split(" on ")[0].removeprefix("accuracy of "): finding.verdict
        for finding in recorder.findings
    }


def test_verdicts_follow_the_tests(record: Record) -> None:
    one, other = "CE against ME", "published CE against ME"
    small, far, open_ = "reproduced at small scale", "refuted as stated", "not testable here"
    assert judged(record, equivalent=True, pvalue=1e-3) == {one: small, other: small}
    assert judged(record, equivalent=False, pvalue=0.4) == {one: open_, other: open_}
    # A difference of two samplers of one law is a bug, or chance unless it is very sure.
    assert judged(record, equivalent=False, pvalue=1e-3) == {one: open_, other: far}
    assert judged(record, equivalent=False, pvalue=1e-12) == {one: far, other: far}


def test_exact_differences_of_the_laws_decide_where_there_are(record: Record) -> None:
    # Samples that say nothing, and a sum that is within the margin.
    found = judged(record, sampled=False, equivalent=False, pvalue=0.4)
    assert found["CE against ME"] == "not testable here"
    assert found["published CE against ME"] == "reproduced at small scale"


def test_the_configuration_is_frozen_and_names_no_place() -> None:
    config = module.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert "data" not in plain(config)
    assert json.loads(json.dumps(plain(config)))


def test_the_figure_shows_it(record: Record, tmp_path: Path) -> None:
    figure = load("figures", "accuracy").draw(dataclasses.replace(record, name="accuracy-siblings"), tmp_path)
    assert [path.name for path in figure.paths] == ["accuracy-siblings.pdf", "accuracy-siblings.png"]
    assert 100 < len(figure.caption) < 600
