"""The intervals for long rows cover, and one that is too narrow, too wide or about another law is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.exact import sequence_law
from me_stats.record import Record
from me_stats.report.style import read_data
from me_stats.samplers import MESampler, SequenceMixtureSampler
from tests import tiny

coverage = scripts.load("experiments", "long_coverage")
TINY: dict[str, Any] = tiny.OPTIONS["long_coverage"]
# For planted errors, which show in few runs.
SMALL: dict[str, Any] = {"repeats": 60, "rows": 32, "steps": 64, "pairs": 1000, "many": 400}


def record() -> Record:
    return tiny.record("long_coverage")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def narrowed(found: Any, factor: float) -> Any:
    low, high = found.interval
    centre = (low + high) / 2
    return dataclasses.replace(found, interval=tuple(centre + factor * (end - centre) for end in (low, high)))


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert {finding.claim for finding in found.findings} == {"C14"}
    assert len(found.findings) == 4
    rows = found.results["rows"]
    assert len(rows) == 12 * 2 + 5 + 3
    assert all(row["runs"] == TINY["repeats"] and 0 <= row["covered"] <= row["runs"] for row in rows)
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


def test_progress_and_seed() -> None:
    seen: list[tuple[float, str]] = []
    small = SMALL | {"repeats": 6}
    first = coverage.run(coverage.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    assert coverage.run(coverage.Config(**small)).results == first.results
    assert coverage.run(coverage.Config(**small, seed=7)).results != first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


def test_the_share_of_rows_that_run_on_is_that_of_enumeration() -> None:
    law = sequence_law(coverage.ending_toy(), (), max_new_tokens=4)
    lengths = np.array([len(row) for row in law.rows])
    probs = np.exp(law.log_probs)
    np.testing.assert_allclose(coverage.alive(coverage.ending_toy(), 4), [probs[lengths > t].sum() for t in range(4)])


def test_a_share_off_its_band_is_flagged_on_both_sides() -> None:
    ledger = coverage._Ledger()
    for r in range(2000):
        ledger.add("good", "toy", r % 20 > 0)
        ledger.add("narrow", "toy", r % 10 > 0)
        ledger.add("wide", "toy", True)
        ledger.add("wide by design", "toy", [True, True], safe=True)
        ledger.add("narrow together", "toy", [True, r % 10 > 0], safe=True)
    off = {row["estimator"]: row["off"] for row in ledger.rows(1e-3)}
    assert off == {"good": False, "narrow": True, "wide": True, "wide by design": False, "narrow together": True}


# Planted errors


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("variance_ratio", ("Var ME/Var CE, tokens", "Var ME/Var CE, surprisals")),
        ("prefill_per_step", ("prefill per step",)),
        ("shared_variance", ("share of the path",)),
        ("design_effect", ("design effect",)),
        ("clustered_mean", ("clustered mean",)),
    ],
)
def test_an_interval_that_is_too_narrow_is_found(
    name: str, starts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = getattr(coverage, name)
    monkeypatch.setattr(coverage, name, lambda *args, **options: narrowed(honest(*args, **options), 0.2))
    found = failed(coverage.run(coverage.Config(**SMALL)))
    for start in (*starts, "C14: the 95% intervals"):
        assert any(check.startswith(start) for check in found)


def test_narrow_parts_of_a_result_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    time, growth = coverage.autocorrelation_time, coverage.variance_growth
    band = coverage.survival_curve

    def shifted(*args: Any, **options: Any) -> Any:
        found = growth(*args, **options)
        middle = found.variance * 0.2
        return dataclasses.replace(found, lower=found.lower * 0.2, upper=middle, rate=narrowed(found.rate, 0.2))

    def certain(*args: Any, **options: Any) -> Any:
        found = band(*args, **options)
        return dataclasses.replace(found, lower=found.alive, upper=found.alive)

    monkeypatch.setattr(coverage, "variance_growth", shifted)
    monkeypatch.setattr(coverage, "survival_curve", certain)
    monkeypatch.setattr(
        coverage, "autocorrelation_time", lambda x: dataclasses.replace(f := time(x), pooled=narrowed(f.pooled, 0.2))
    )
    found = failed(coverage.run(coverage.Config(**SMALL)))
    for start in ("Var of a row's tokens", "growth rate, surprisals", "autocorrelation time", "survival, all t"):
        assert any(check.startswith(start) for check in found)


def test_one_component_per_sequence_in_place_of_me_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "MESampler", SequenceMixtureSampler)
    found = failed(coverage.run(coverage.Config(**SMALL)))
    for start in ("Var of a row's tokens", "Var ME/Var CE, tokens", "lag test", "C14: sequences end"):
        assert any(check.startswith(start) for check in found)


def test_a_right_sampler_passed_as_control_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "SequenceMixtureSampler", MESampler)
    (check,) = failed(coverage.run(coverage.Config(**SMALL | {"steps": 224})))
    assert check.startswith("C14: sequences end")


def test_the_figure_is_drawn_from_the_record(tmp_path: Path) -> None:
    script = scripts.load("figures", "long_coverage")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["long_coverage.pdf", "long_coverage.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("The intervals cover")
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    loaded.results["rows"][0]["off"] = True
    assert script.draw(loaded, tmp_path / "three").caption.startswith("Not all intervals cover (1 of ")
