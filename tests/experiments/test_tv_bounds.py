"""The bounds cover, their width falls with the number of draws, and a bound that is too narrow is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from me_stats import scripts
from me_stats.record import Record, config_key
from me_stats.report.markdown import report_markdown
from me_stats.report.style import read_data
from tests import tiny

tv_bounds = scripts.load("experiments", "tv_bounds")
TINY = tiny.OPTIONS["tv_bounds"]


# For planted errors, which show in one small case.
SMALL: dict[str, Any] = TINY | {"grid": ((64, (1000, 10_000), 60),)}


def record() -> Record:
    return tiny.record("tv_bounds")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.key == config_key("tv_bounds", tv_bounds.Config(**TINY))
    assert not found.findings
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    rows = found.results["rows"]
    assert {row["bound"] for row in rows} == set(tv_bounds.BOUNDS)
    assert len(rows) == 3 * 4 * 3 * 3 + 4 * 2
    assert all(0 <= row["covered"] <= row["runs"] and 0 <= row["median"] <= 1 for row in rows)
    assert len(found.checks) == len(tv_bounds.BOUNDS) + 1
    assert "# Coverage and width of the bounds on total variation" in report_markdown([found], {})


def test_bounds_narrow_and_the_plug_in_estimate_misleads() -> None:
    rows = [row for row in record().results["rows"] if row["bound"] == "upper, whole vocabulary"]
    for law in tv_bounds.LAWS:
        few, many = (r for r in rows if r["law"] == law and r["V"] == 64 and r["case"] == 0)
        assert many["median"] < few["median"] / 2.5
        assert few["median"] >= few["null_value"]
    (wide,) = (r for r in rows if r["law"] == "uniform" and r["V"] == 2000 and r["case"] == 0)
    assert wide["plugin"] > 2 * wide["median"]


def test_progress_and_seed() -> None:
    seen: list[tuple[float, str]] = []
    small = TINY | {"grid": ((64, (1000,), 4),), "sequence_runs": 3}
    first = tv_bounds.run(tv_bounds.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    assert tv_bounds.run(tv_bounds.Config(**small)).results == first.results
    assert tv_bounds.run(tv_bounds.Config(**small, seed=1)).results != first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


@pytest.mark.parametrize("kind", tv_bounds.LAWS)
@pytest.mark.parametrize("tv", [0.0, 0.005, 0.1])
def test_the_simulated_laws_are_as_far_apart_as_they_say(kind: str, tv: float) -> None:
    for seed in range(5):
        p = tv_bounds.law(kind, 256)
        q = tv_bounds.departed(p, tv, np.random.default_rng(seed))
        assert p.sum() == pytest.approx(1)
        assert q.sum() == pytest.approx(1)
        assert (q >= 0).all()
        assert 0.5 * np.abs(p - q).sum() == pytest.approx(tv, abs=1e-12)


def test_the_simulated_sequences_are_as_far_apart_as_they_say() -> None:
    ratio = np.exp(0.5 * np.random.default_rng(0).normal(size=1_000_000) - 0.125)
    share = 0.1 / (2 * norm.cdf(0.25) - 1)
    assert np.maximum(0, share * (1 - ratio)).mean() == pytest.approx(0.1, rel=5e-3)


# Planted bounds that are too narrow


@pytest.mark.parametrize(
    ("name", "start"),
    [("tv_upper_bound", "upper, whole vocabulary"), ("tv_upper_bound_cells", "upper, 64 cells")],
)
def test_an_upper_bound_that_is_too_narrow_is_found(name: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = getattr(tv_bounds, name)

    def narrow(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        return dataclasses.replace(found, upper=0.5 * found.upper)

    monkeypatch.setattr(tv_bounds, name, narrow)
    (check,) = failed(tv_bounds.run(tv_bounds.Config(**SMALL)))
    assert check.startswith(start)


def test_a_lower_bound_that_selects_and_tests_on_the_same_draws_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tv_bounds.tv_lower_bound
    monkeypatch.setattr(tv_bounds, "tv_lower_bound", lambda a, b, p, **options: honest(b, b, p, **options))
    (check,) = failed(tv_bounds.run(tv_bounds.Config(**SMALL)))
    assert check.startswith("lower, two halves")


def test_a_sequence_interval_that_misses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tv_bounds.sequence_tv

    def shifted(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        return dataclasses.replace(found, interval=(found.value, found.value))

    monkeypatch.setattr(tv_bounds, "sequence_tv", shifted)
    (check,) = failed(tv_bounds.run(tv_bounds.Config(**SMALL)))
    assert check.startswith("sequences, betting")


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "tv_bounds")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["tv_bounds.pdf", "tv_bounds.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert "in no case of 116 is coverage" in figure.caption
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    loaded.results["rows"][0]["short"] = True
    assert script.draw(loaded, tmp_path / "three").caption.startswith("Not all bounds hold: in 1 case of 116")
