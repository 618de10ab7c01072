"""The count of false alarms holds for the tests as they are, and finds tests that reject too often."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import chi_square, report, scripts
from me_stats.goodness import Portfolio
from me_stats.record import Record, config_key
from me_stats.report.markdown import report_markdown
from me_stats.report.style import read_data
from tests import tiny
from tests.laws import zipf_pair

calibration = scripts.load("experiments", "calibration")
TINY = tiny.OPTIONS["calibration"]


def record() -> Record:
    return tiny.record("calibration")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.key == config_key("calibration", calibration.Config(**TINY))
    assert not found.findings
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    rows = found.results["rows"]
    assert {row["world"] for row in rows} == set(calibration.WORLDS)
    assert {row["kind"] for row in rows} == {
        "cells", "score", "combination", "transform", "permutation", "anytime", "control",
    }  # fmt: skip
    assert len({(row["world"], row["test"]) for row in rows}) == len(rows) > 130
    for row in rows:
        assert all(0 <= alarms <= row["runs"] for alarms in row["alarms"])
        assert sorted(row["alarms"], reverse=True) == row["alarms"] or "sequential" in row["test"]
        for (low, high), alarms in zip(row["intervals"], row["alarms"], strict=True):
            assert low <= alarms / row["runs"] <= high


def test_progress_and_seed() -> None:
    seen: list[tuple[float, str]] = []
    small = TINY | {"runs": 30, "zipf_runs": 3, "sequence_runs": 6, "pool_rows": 24, "two_sample_runs": 2}
    first, again = (
        calibration.run(calibration.Config(**small), lambda fraction, note: seen.append((fraction, note)))
        for _ in range(2)
    )
    assert first.results == again.results
    fractions = [fraction for fraction, _ in seen[: len(seen) // 2]]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


# Planted tests that reject too often


def only(name: str, patch: pytest.MonkeyPatch) -> None:
    """Leave out every world but the one that `name` simulates."""
    for part in ("_toys_one_step", "_looking_often", "_toys_sequences", "_zipf", "_transformers_one_step"):
        if part != name:
            patch.setattr(calibration, part, lambda *_: None)
    if name != "_pool":
        patch.setattr(calibration, "_sequences", lambda *_: None)
        patch.setattr(calibration, "_pool", lambda *_: None)
    patch.setattr(calibration, "_far_tail", lambda *_: [{"worst": 1.0}])


def test_a_score_that_is_too_sure_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    only("_toys_one_step", monkeypatch)
    honest = Portfolio.test

    def eager(self: Any, counts: Any, **options: Any) -> Any:
        found = honest(self, counts, **options)
        results = [dataclasses.replace(r, pvalue=r.pvalue / 6 if r.name == "rank" else r.pvalue) for r in found.results]
        return dataclasses.replace(found, results=tuple(results))

    monkeypatch.setattr(Portfolio, "test", eager)
    found = calibration.run(calibration.Config(**TINY))
    named = failed(found)
    assert len(named) == 4  # the world, and the member in each of its three toys
    assert all("toys, one step" in check for check in named)
    assert sum(": rank at level" in check for check in named) == 3


def test_martingales_that_forget_bonferroni_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    only("_pool", monkeypatch)
    honest = calibration.martingale_portfolio

    def forgetful(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        return dataclasses.replace(found, pvalue=min(r.pvalue for r in found.results))

    monkeypatch.setattr(calibration, "martingale_portfolio", forgetful)
    found = calibration.run(calibration.Config(**TINY | {"pool_rows": 720}))
    assert [check for check in failed(found) if "sequences" in check] == [
        "transformers, sequences: 20 tests reject a right sampler no more often than their level",
        "transformers, sequences: martingale portfolio at level 0.05",
    ]


def test_a_chi_square_tail_that_is_trusted_everywhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(statistic: float, df: int, *_: Any) -> tuple[float, str]:
        return float(calibration.stats.chi2.sf(statistic, df)), "chi-square tail"

    monkeypatch.setattr(chi_square, "trusted_pvalue", naive)
    assert calibration._two_cells(20, 10_000)["worst"] > 100
    monkeypatch.undo()
    assert calibration._two_cells(20, 10_000)["worst"] < 3


def test_a_control_without_teeth_and_a_far_tail_out_of_bounds_fail() -> None:
    row = {"world": "far tail", "kind": "cells", "test": "t", "runs": 1000, "levels": [0.01], "alarms": [10]}
    blunt = {"world": "Zipf, one step", "kind": "control", "test": "c", "runs": 1000, "levels": [0.05], "alarms": [50]}
    recorder = calibration.Recorder("calibration", "", calibration.Config())
    calibration._judge(recorder, [row, blunt], [{"worst": 3.5}], calibration.Config())
    assert [name.split(":")[0] for name, held in recorder.checks.items() if not held] == ["Zipf, one step", "far tail"]


# What makes the count fast


def test_runs_that_are_skipped_have_no_small_pvalue() -> None:
    pair = zipf_pair(40)
    test = calibration._portfolio(pair, np.array([0.5, 0.5]))
    counts = np.random.default_rng(0).multinomial(300, test.p, size=300)
    fast = calibration._pvalues(test, counts)
    for r, row in enumerate(counts):
        result = test.test(row)
        slow = {member.name: member.pvalue for member in result.results if member.df}
        assert set(fast) == set(slow) | {"portfolio"}
        for name, pvalue in (slow | {"portfolio": result.pvalue}).items():
            skipped = fast[name][r] > calibration.CURVE[0] and pvalue > calibration.CURVE[0]
            assert skipped or fast[name][r] == pytest.approx(pvalue, rel=1e-9)


def test_rank_bins_are_fixed_by_the_null() -> None:
    laws = torch.tensor([[[0.1, 0.5, 0.4], [0.1, 0.5, 0.4]]]).log().expand(3, 2, 3)
    weights = torch.tensor([0.3, 0.7]).log().expand(3, 2)
    bins, mass = calibration._rank_bins(laws, weights, torch.tensor([0, 1, 2]))
    assert bins.tolist() == [1, 0, 1]
    np.testing.assert_allclose(mass, [[0.5, 0.5]] * 3, atol=1e-6)


# Figure and report


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "calibration")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["calibration.pdf", "calibration.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("No test of 135 rejects")
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    loaded.results["rows"][0]["above"] = [0.05]
    assert script.draw(loaded, tmp_path / "three").caption.startswith("1 test of 135 rejects")


def test_a_record_without_findings_has_its_place_in_the_report() -> None:
    text = report_markdown([record()], {})
    assert "# False alarms of every test" in text
    assert not report.failures([record()])
