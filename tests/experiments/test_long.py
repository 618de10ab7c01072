"""Long generations: every check holds on right samplers, planted ones flip it, and `reproduce` goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import MESampler, SequenceMixtureSampler, long_run, plans, scripts
from me_stats import reproduce as job
from me_stats.draws import Draw
from me_stats.record import Record, config_key
from me_stats.report.style import read_data
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

long = scripts.load("experiments", "long")
TINY: dict[str, Any] = tiny.OPTIONS["long"]
# For planted errors: two arms of short rows without a window, 64 of them.
SMALL = TINY | {
    "prompts": ("The names of the ",), "rows": 64, "steps": 48, "window": None, "hop": None, "scored": 0, "paired": 0,
    "control": 0, "weights": None, "level": 1e-3,
}  # fmt: skip
VARIANCE, MEANS, DRIFT, LAGS = "variance over rows", "law of row means", "drift along the row", "lags of each component"
CONTROL = "one component per sequence"


def failed(found: Record) -> list[str]:
    return [name.removeprefix("C14: ") for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = tiny.record("long")
    assert failed(found) == []
    checks = [name.removeprefix("C14: ") for name in found.checks]
    for start in (VARIANCE, MEANS, DRIFT, LAGS, "share of the variance of row means", CONTROL):
        assert len([name for name in checks if name.startswith(start)]) == 1, start
    assert {finding.claim for finding in found.findings} == {"C14"}
    assert found.key == config_key("long", long.Config(**TINY))
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


def test_the_record_holds_what_the_figure_and_the_table_read() -> None:
    found = tiny.record("long").results
    names = [row["name"] for row in found["comparisons"]]
    assert names[:4] == ["repetition", "distinct", "letters", "line breaks"]
    assert set(names[4:]) == {"log_prob", "entropy", "responsibility", "disagreement"}
    assert set(found["shares"]) == set(found["control"]) == set(names[:4])
    assert set(found["times"]) == {"log_prob", "entropy"}
    assert all(len(curve["t"]) == len(curve["alive"]) <= 128 for curve in found["survival"].values())
    assert len(found["lags"]["held tokens"]) == TINY["blocks"]
    assert 0 < max(found["lags"]["held tokens"]) <= 2 * TINY["window"]
    assert max(found["lags"]["held bytes"]) > 0
    assert found["floor"] is None
    assert found["bytes_kept_per_row"] < 10_000  # of 120 tokens by two arms in one part, a path and scores included
    assert {arm: bool(text) for arm, text in found["samples"].items()} == {"ME": True, "CE": True}


# Planted bugs


class Sticky(MESampler):
    """Keeps the component of the step before in three of ten steps."""

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        fresh = super()._components(log_weights, rows, positions, step, draw, memory)
        before = memory.get("last", fresh)
        memory["last"] = np.where((rows + 7 * step) % 10 < 3, before, fresh)
        return np.asarray(memory["last"])


class Even(MESampler):
    """Draws components with equal weights, whatever the ensemble says."""

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        return super()._components(torch.zeros_like(log_weights) - np.log(2), rows, positions, step, draw, memory)


class Cold(MESampler):
    """Sharpens the laws that it draws tokens from."""

    def _step(self, batch: Any, positions: Any, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
        def sharp(law: Tensor, rows: np.ndarray, step: int, *, stream: Any, index: Any = None) -> Tensor:
            return draw(law if stream == "component" else 2.5 * law, rows, step, stream=stream, index=index)

        return super()._step(batch, positions, step, sharp, memory)


class Fading(MESampler):
    """Writes one and the same token in the last third of a row."""

    def _step(self, batch: Any, positions: Any, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
        tokens, chosen = super()._step(batch, positions, step, draw, memory)
        return (torch.full_like(tokens, 40) if step >= SMALL["steps"] * 2 // 3 else tokens), chosen


def planted(patch: pytest.MonkeyPatch, kind: type[MESampler], **changes: Any) -> list[str]:
    patch.setattr(long_run, "MESampler", kind)
    return failed(long.run(long.Config(**SMALL | changes), workers=1))


def test_right_samplers_pass_where_plants_must_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planted(monkeypatch, MESampler) == []


@pytest.mark.parametrize(
    ("kind", "check"),
    [(Sticky, LAGS), (SequenceMixtureSampler, LAGS), (Even, LAGS), (Cold, MEANS), (Fading, DRIFT)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_sampler_fails_its_check(kind: type[MESampler], check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = planted(monkeypatch, kind)
    assert any(name.startswith(check) for name in wrong), wrong


def test_a_control_without_teeth_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "SequenceMixtureSampler", MESampler)
    (wrong,) = failed(long.run(long.Config(**SMALL | {"control": 64}), workers=1))
    assert wrong.startswith("one component per sequence is found with 64 rows")


# Through the main job


def test_reproduce_keeps_the_parts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = long.Config(**SMALL | {"rows": 16, "steps": 24, "batch": 8, "blocks": 3})
    part = plans.Part("long", "siblings", config)
    monkeypatch.setattr(long, "_workers", lambda config: 1)
    work = tmp_path / "work" / config_key("long", config)

    def stop(fraction: float, note: str) -> None:
        if work.exists() and any(work.glob("*.npz")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run_part(part, tmp_path / "records", stop)
    (kept,) = work.glob("*.npz")
    before = kept.stat().st_mtime_ns
    assert not (tmp_path / "records").exists()
    seen: list[tuple[float, str]] = []
    record = job.run_part(part, tmp_path / "records", lambda *given: seen.append(given))
    assert kept.stat().st_mtime_ns == before
    assert len(list(work.glob("*.npz"))) == 4
    assert job.finished(part, tmp_path / "records") == record
    assert record.name == "long-siblings"
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)


def test_narrow_types_have_a_floor() -> None:
    config = long.Config(**SMALL | {"rows": 8, "steps": 12, "blocks": 3, "scored": 8, "dtype": "bfloat16"})
    found = long.run(config, workers=1)
    floor = found.results["floor"]
    assert floor["steps"] == 9
    assert 0 <= floor["mean"] <= floor["max"] < 0.1
    assert "rounding in bfloat16 moves a law by TV" in found.findings[0].caveat
    assert found.config["level"] == 1e-3


# The figure


def caption(record: Record, folder: Path) -> str:
    return str(scripts.load("figures", "long").draw(record, folder).caption)


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "long")
    tiny.record("long").save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["long.pdf", "long.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("ME and CE do not differ over 120 tokens (bundled siblings, window 64, 48 rows")
    assert "One component per sequence (64 rows) is up to" in figure.caption
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    wrong = dataclasses.replace(loaded, checks=loaded.checks | {"one": False})
    assert caption(wrong, tmp_path).startswith("ME and CE differ, or a control was missed over")

    drop: list[Callable[[dict[str, Any]], Any]] = [
        lambda results: results.update(growth={}),
        lambda results: results.update(block_shares={}, pooled_shares={}),
        lambda results: results.update(shares={}, block_shares={}, pooled_shares={}),
        lambda results: results.update(control={}),
        lambda results: results.update(log_rank=None),
        lambda results: results["lags"].update({"held bytes": [0.0] * TINY["blocks"]}),
    ]
    for change in drop:
        results = json.loads(json.dumps(loaded.results))
        change(results)
        assert "over 120 tokens" in caption(dataclasses.replace(loaded, results=results), tmp_path)
