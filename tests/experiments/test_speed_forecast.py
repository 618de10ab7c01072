"""The forecast holds on right code, fails when the count or the arithmetic is wrong, and says that it is one."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.models import ragged
from me_stats.record import Record
from me_stats.report.style import read_data

forecast = scripts.load("experiments", "speed_forecast")
TINY: dict[str, Any] = {
    "groups": ("qwen", "mixed"), "batches": (1, 8, 32), "steps": 64, "overheads": (0.05, 0.5), "equal_sizes": (1, 3),
    "launches": (0.0, 0.02),
}  # fmt: skip
SMALL: dict[str, Any] = TINY | {"groups": ("hermes2",), "batches": (1, 2), "equal_sizes": (1,), "launches": (0.0,)}


@cache
def record() -> Record:
    found: Record = forecast.run(forecast.Config(**TINY))
    return found


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert len(found.checks) == 3
    assert not found.findings  # a forecast settles no claim
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


def test_progress_goes_forward() -> None:
    seen: list[tuple[float, str]] = []
    first = forecast.run(forecast.Config(**SMALL), lambda fraction, note: seen.append((fraction, note)))
    assert forecast.run(forecast.Config(**SMALL)).results == first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)


def test_the_gain_falls_with_the_batch_and_grows_with_the_models() -> None:
    for row in record().results["rows"]:
        ratios = {(cell["way"], cell["batch"]): cell["ratio"] for cell in row["cells"]}
        assert ratios["drifting", 1] == ratios["lockstep", 1]
        assert ratios["drifting", 1] > ratios["drifting", 8] > ratios["lockstep", 8]
        assert ratios["drifting", 32] > 1.15
    one, three = record().results["sizes"]
    assert all(cell["ratio"] == pytest.approx(1) for cell in one["cells"])
    assert three["cells"][0]["ratio"] == pytest.approx(3, rel=0.01)


def test_the_time_outside_that_is_needed_gives_the_printed_ratio() -> None:
    for row in record().results["alone"]:
        k, x = row["k"], row["needed"]
        by_hand = {2: 0.28, 3: 0.19}[k]  # (k - r)/(r - 1) for equal sizes
        assert x == pytest.approx(by_hand, abs=0.12)
        curve = [point["ratio"] for point in row["curve"]]
        assert curve == sorted(curve, reverse=True)
        # A launch costs CE and ME alike for each forward, so it leaves K.
        assert row["launches"][-1]["ratio"] == pytest.approx(k, rel=0.01)


def test_sizes_are_stated() -> None:
    shapes = {row["shape"]: row for row in record().results["shapes"]}
    assert shapes["gemma3-270m"]["share"] > 0.6
    assert shapes["gemma3-270m"]["arithmetic"] > 1.4
    assert shapes["mistral-7b"]["arithmetic"] < 1.02


# Planted errors


def test_sessions_that_feed_more_than_is_counted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged.RaggedSession, "_share_prompts", lambda self, rows: None)
    (check,) = failed(forecast.run(forecast.Config(**SMALL)))
    assert check.startswith("forwards, tokens and laws")


def test_work_that_forgets_to_catch_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = forecast.me_work

    def without_lags(*args: Any, **options: Any) -> Any:
        work = honest(*args, **options)
        return dataclasses.replace(work, fed=np.minimum(work.fed, work.rows))

    monkeypatch.setattr(forecast, "me_work", without_lags)
    assert failed(forecast.run(forecast.Config(**SMALL)))[0].startswith("forwards, tokens and laws")


def test_a_forecast_that_lets_me_run_all_components_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = forecast.speed_up

    def slow(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        return dataclasses.replace(found, me_seconds=1.02 * found.ce_seconds)

    monkeypatch.setattr(forecast, "speed_up", slow)
    assert len(failed(forecast.run(forecast.Config(**SMALL)))) == 2


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "speed_forecast")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["speed_forecast.pdf", "speed_forecast.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("Forecast")
    assert figure.caption.endswith(".")
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    for row in loaded.results["rows"]:
        row["crossover"]["lockstep"] = None
    assert "nowhere" in script.draw(loaded, tmp_path / "three").caption
