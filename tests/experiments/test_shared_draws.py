"""Shared component draws: the closed form holds, tests that count batches hold their level, and planted bugs show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from me_stats import MESampler, SequenceMixtureSampler, scripts
from me_stats.draws import Draw
from me_stats.record import Record, config_key
from me_stats.report.style import read_data
from tests import tiny
from tests.stand_ins import Ungrouped

shared_draws = scripts.load("experiments", "shared_draws")
TINY: dict[str, Any] = tiny.OPTIONS["shared_draws"]
# For planted errors on toys, which show in one batch size.
SMALL = TINY | {"batches": (8,), "coverage_runs": 30, "runs": 40, "power_runs": 40}
LAW, EFFECT, LEVEL = "a row of shared", "the design effect of a batch", "tests that count batches hold their level"
FOOLED, POWER = "each test that counts rows", "tests that count batches find"


def record() -> Record:
    return tiny.record("shared_draws")


def failed(found: Record) -> list[str]:
    return [name.removeprefix("C15: ") for name, held in found.checks.items() if not held]


def planted(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> list[str]:
    """The checks that fail on toys with `parts` of the module replaced."""
    for name, part in parts.items():
        monkeypatch.setattr(shared_draws, name, part)
    siblings = record().results["siblings"]
    monkeypatch.setattr(shared_draws, "_siblings", lambda recorder, config: siblings)
    monkeypatch.setattr(shared_draws, "WORLDS", shared_draws.WORLDS[:1])
    return failed(shared_draws.run(shared_draws.Config(**SMALL)))


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert len(found.checks) == 7
    assert {finding.claim for finding in found.findings} == {"C15"}
    assert found.key == config_key("shared_draws", shared_draws.Config(**TINY))
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


def test_the_rows_say_what_was_compared() -> None:
    results = record().results
    assert max(results["laws"].values()) < 1e-12
    assert len(results["effects"]) == 5 * 2
    for row in results["effects"]:
        assert row["expected"] == pytest.approx(1 + (row["B"] - 1) * row["share"])
    shares = {row["toy"]: row["share"] for row in results["effects"]}
    assert shares["coins, λ = .5"] == pytest.approx(0.64)  # Var(P_m)/Var(x) = .16/.25
    assert shares["equal means"] == pytest.approx(0, abs=1e-12)
    tests = [row["test"] for row in results["alarms"]]
    assert len(tests) == 3 * 8 - 1
    assert set(tests) == {*shared_draws.NAIVE, *shared_draws.CORRECTED}
    assert all(row["corrected"] == (row["power"] is not None) for row in results["alarms"])
    siblings = results["siblings"]
    assert {row["statistic"] for row in siblings["effects"]} >= {"log-probability", "mean entropy", "different tokens"}
    assert siblings["steps"] == 5 * 16
    assert siblings["forwards_per_token"] < siblings["forwards_per_token_alone"]


# Planted bugs


class TokensInPairs(MESampler):
    """Pairs of rows share their token uniforms, too."""

    def _step(self, batch: Any, positions: Any, step: int, draw: Draw, memory: dict[str, Any]) -> Any:
        def paired(law: Tensor, rows: np.ndarray, step: int, *, stream: Any, index: Any = None) -> Tensor:
            return draw(law, rows if stream == "component" else rows // 2, step, stream=stream, index=index)

        return super()._step(batch, positions, step, paired, memory)


def test_a_sampler_that_ignores_the_groups_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_draws, "_row_law", lambda toy: 0.0)
    wrong = planted(monkeypatch, MESampler=Ungrouped)
    assert any(name.startswith(EFFECT) for name in wrong)
    assert any(name.startswith(FOOLED) for name in wrong)
    monkeypatch.undo()
    monkeypatch.setattr(shared_draws, "MESampler", Ungrouped)
    config = shared_draws.Config(**SMALL | {"steps": 8})
    siblings = shared_draws._siblings(shared_draws.Recorder("x", "x", config), config)
    assert siblings["forwards"] > siblings["steps"] + siblings["K"] * siblings["batches"]


def test_a_sampler_that_shares_token_draws_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_draws, "_row_law", lambda toy: 0.0)
    (wrong,) = planted(monkeypatch, MESampler=TokensInPairs)
    assert wrong.startswith(EFFECT)


def test_one_component_per_sequence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = planted(monkeypatch, MESampler=SequenceMixtureSampler)
    assert wrong[0].startswith(LAW)
    assert wrong[1].startswith(EFFECT)


def test_errors_that_do_not_count_batches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shared_draws.clustered_difference

    def by_row(x: Any, y: Any, *, x_groups: Any, y_groups: Any, **options: Any) -> Any:
        return honest(x, y, x_groups=np.arange(len(x)), y_groups=np.arange(len(y)), **options)

    (wrong,) = planted(monkeypatch, clustered_difference=by_row)
    assert wrong.startswith(LEVEL)


def test_relabelling_that_does_not_keep_batches_together_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shared_draws.sequence_tests

    def by_row(scores: Any, *, x_groups: Any = None, y_groups: Any = None, **options: Any) -> Any:
        return honest(scores, **options)

    (wrong,) = planted(monkeypatch, sequence_tests=by_row)
    assert wrong.startswith(LEVEL)


def test_tests_that_find_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (wrong,) = planted(monkeypatch, _corrected=lambda *args: dict.fromkeys(shared_draws.CORRECTED, 1.0))
    assert wrong.startswith(POWER)


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "shared_draws")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["shared_draws.pdf", "shared_draws.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("Tests that count batches hold their level")
    assert "follow the closed form 1 + (B−1) S" in figure.caption
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    loaded.results["alarms"][-1]["above"] = True
    loaded.results["effects"][0]["short"] = True
    caption = script.draw(loaded, tmp_path / "three").caption
    assert caption.startswith("Not all tests that count batches hold")
    assert "save in 1 of 10 cases" in caption
