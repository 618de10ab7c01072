"""Estimates from fewer rows keep their expectation, both designs give one share, and planted bugs are found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.record import Record, config_key
from me_stats.report.style import read_data
from me_stats.sensitivity.readings import repetition
from me_stats.variance import FrozenDraw
from tests import tiny

experiment = scripts.load("experiments", "variance_reduction")
TINY: dict[str, Any] = tiny.OPTIONS["variance_reduction"]


def record() -> Record:
    return tiny.record("variance_reduction")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held and not name.startswith("C14")]


def rerun(**changes: Any) -> Record:
    found: Record = experiment.run(experiment.Config(**(TINY | {"rows": 8, "steps": 12, "toy_runs": 3} | changes)))
    return found


def toys_only(**changes: Any) -> dict[str, bool]:
    """The checks on toys alone."""
    config = experiment.Config(**(TINY | changes))
    recorder = experiment.Recorder(experiment.NAME, experiment.TITLE, config)
    experiment._check_toys(recorder, experiment._toy(2, 0, config), config)
    return dict(recorder.checks)


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert [name for name, held in found.checks.items() if not held] == []
    assert found.key == config_key("variance_reduction", experiment.Config(**TINY))
    assert {finding.claim for finding in found.findings} == {"C14"}
    assert len(found.findings) == 3 + len(experiment.METHODS)
    assert all(finding.caveat and finding.held for finding in found.findings)
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    shares = found.results["shares"]
    for name in ("log-probability", "log-ratio of models"):
        for kind in ("step", "cumulative"):
            assert all(len(shares[name][kind][one]["value"]) == shares["steps"] for one in ("pairs", "nested"))
    gains = {(row["statistic"], row["method"]): row["factor"]["value"] for row in found.results["gains"]}
    assert gains["tokens by the last model", "mean over components"] > 1
    assert gains["log-ratio of models", "controls from the trace"] > 1.5  # what the weights move


def test_findings_say_what_helps_and_what_does_not() -> None:
    statements = [finding.statement for finding in record().findings]
    assert any("which model wrote which token: log-probability" in text for text in statements)
    summary = experiment._summary
    assert summary(0, 0, 5) == "no gain for any of 5 statistics"
    assert summary(2, 1, 5) == "a gain for 2 of 5 statistics, a loss for 1"


def test_progress_and_seed() -> None:
    seen: list[tuple[float, str]] = []
    small = TINY | {"rows": 8, "steps": 6, "toy_runs": 2}
    first = experiment.run(experiment.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    assert experiment.run(experiment.Config(**small)).results == first.results
    assert experiment.run(experiment.Config(**small, seed=1)).results != first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


def test_repetition_and_the_exact_value_of_what_a_component_wrote() -> None:
    assert repetition([1, 2, 3, 4] * 2, size=4) == pytest.approx(1 / 5)
    assert repetition([1, 2], size=4) == 0
    ensemble = experiment.Ensemble(
        [experiment.TableModel([[1 - p, p]], order=0) for p in (0.2, 0.6)], experiment.ConstantMixing([0.25, 0.75])
    )
    law = experiment.sequence_law(ensemble, [0], max_new_tokens=3)
    assert experiment._written_by(ensemble, law, np.array([[0.0, 0.0], [1.0, 0.0]])) == pytest.approx(3 * 0.25 * 0.2)


# Planted bugs


def test_a_control_with_a_wrong_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = experiment.weight_controls
    monkeypatch.setattr(experiment, "weight_controls", lambda trace, **options: honest(trace, **options) + 2.0)
    bad = failed(rerun())
    assert any(name.startswith("controls have mean zero") for name in bad)
    assert not all(held for name, held in toys_only().items() if name.startswith("controls from laws"))


def test_random_numbers_that_are_not_common_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the second run in another order: still unbiased, and no gain left."""
    honest = experiment.common_draws

    def unpaired(first: Any, second: Any, f: Any, **options: Any) -> Any:
        rows = second.sequences()
        values = [experiment.distinct(row) for row in rows]
        return honest(first, second, ([f(row) for row in first.sequences()], np.roll(values, 1)), **options)

    monkeypatch.setattr(experiment, "common_draws", unpaired)
    bad = [name for name, held in toys_only().items() if not held]
    assert len(bad) == 1
    assert bad[0].startswith("common random numbers: lower variance")


def test_pairs_that_do_not_share_their_paths_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpaired(*, component_seed: int, token_seed: int) -> FrozenDraw:
        return FrozenDraw(component_seed=component_seed + 77, token_seed=token_seed)

    monkeypatch.setattr(experiment, "FrozenDraw", unpaired)
    found = rerun()
    assert "pairs share their component paths" in failed(found)
    assert not any(finding.held for finding in found.findings if "which model wrote" in finding.statement)


def test_shares_that_differ_between_the_designs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of the wrong run: pairs of a run with itself have all the variance in their path."""
    honest = experiment.path_shares
    monkeypatch.setattr(
        experiment, "path_shares", lambda x, y, **options: honest(x, x + 0.5 * (y - x), **options)
    )  # fmt: skip
    assert any(name.startswith("both designs give the same shares") for name in failed(rerun(rows=16)))


def test_an_interval_that_is_too_narrow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = experiment.token_sums

    def narrow(*args: Any, **options: Any) -> Any:
        found = honest(*args, **options)
        value, (low, high) = found.reduced.value, found.reduced.interval
        interval = (value + 0.2 * (low - value), value + 0.2 * (high - value))
        return dataclasses.replace(found, reduced=dataclasses.replace(found.reduced, interval=interval))

    monkeypatch.setattr(experiment, "token_sums", narrow)
    bad = [name for name, held in toys_only().items() if not held]
    assert len(bad) == 1
    assert bad[0].startswith("mean given the prefix: intervals cover")


def test_a_biased_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responsibilities of the wrong component: a mean over components, of something else."""
    honest = experiment.component_sums

    def careless(trace: Any, values: Any, **options: Any) -> Any:
        scored = dataclasses.replace(trace.score, component_log_probs=trace.component_log_probs.flip(-1))
        moved = dataclasses.replace(trace)
        vars(moved)["score"] = scored
        return honest(moved, values, **options)

    monkeypatch.setattr(experiment, "component_sums", careless)
    bad = [name for name, held in toys_only().items() if not held]
    assert any(name.startswith("mean over components: unbiased") for name in bad)


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "variance_reduction")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["variance_reduction.pdf", "variance_reduction.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("Which model wrote which token explains ")
    assert "the two designs agree" in figure.caption
    assert 100 < len(figure.caption) < 700
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    loaded.results["shares"]["largest_z"] = 99.0
    assert "do not agree" in script.draw(loaded, tmp_path / "three").caption
    for row in loaded.results["gains"]:
        row["factor"] |= {"value": "inf", "interval": [0.0, "inf"]}  # nothing to draw, and nothing claimed
    assert "none above 1" in script.draw(loaded, tmp_path / "three").caption
