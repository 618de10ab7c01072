"""The speed experiment: what it measures, what its verdicts say, and that a clock alone never fails it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import bench_results, scripts, stopwatch
from me_stats.bench import Cell
from me_stats.record import Record, Recorder, config_key
from me_stats.report.style import read_data
from me_stats.samplers import MESampler
from tests import tiny

speed = scripts.load("experiments", "speed")
figure = scripts.load("figures", "speed")


pytestmark = pytest.mark.usefixtures("one_thread")


def record() -> Record:
    return tiny.record("speed")


def judged(results: dict[str, Any], **targets: Any) -> Record:
    """What the experiment says of other numbers."""
    config = dataclasses.replace(tiny.config("speed"), **targets)
    recorder = Recorder("speed", "", config)
    speed._judge(recorder, results, config)
    return recorder.finish(results)


def ideal(ratios: dict[int, float]) -> dict[str, Any]:
    """Results in which ME is so many times as fast as CE at each K, everything as predicted, without noise."""
    results = copy.deepcopy(record().results)
    for row in results["by_k"]:
        k = row["k"]
        single = {"single": 1.0, "CE": 1 / k, "ME": ratios.get(k, 1.0) / k}.get(row["arm"], 1.0)
        row["of_single"] |= {"value": single, "interval": [single, single]}
        row["over_single_and_catching_up"] = {"value": 1.0, "interval": [0.99, 1.01]}
        if row["of_ce"]:
            row["of_ce"] |= {"value": ratios[k], "interval": [ratios[k]] * 2, "rounds": [ratios[k], ratios[k] * 1.001]}
            row["ideal"] = ratios[k]
    results["slope"] |= {"value": 1.0, "interval": [0.99, 1.01], "rounds": [0.99, 1.01]}
    for cell in results["cells"]:
        cell["error"] = None if cell["error"] is None else 0.01
    return results


def of(found: Record, claim: str, start: str = "") -> Any:
    (one,) = (f for f in found.findings if f.claim == claim and f.statement.startswith(start))
    return one


def test_every_check_holds_and_nothing_depends_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record()
    assert [name for name, held in found.checks.items() if not held] == []
    assert {finding.claim for finding in found.findings} == {"C5", "C6", "C7", "C15"}
    assert found.key == config_key("speed", tiny.config("speed"))
    # A clock that makes no sense changes numbers and verdicts, and fails nothing.
    rng = np.random.default_rng(0)
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(ticks) + rng.uniform())
    other = speed.run(dataclasses.replace(tiny.config("speed"), arms=("single", "CE", "ME"), batches=(1, 2)))
    assert other.held


def test_findings_say_how_far_to_trust_them() -> None:
    for finding in record().findings:
        assert finding.tv_upper is None
        assert "rounds" in finding.caveat
        if finding.claim != "C15":
            assert "power 0.8" in finding.caveat
            assert re.search(r"effect of \d", finding.caveat)


def test_cells_are_all_that_was_asked_for() -> None:
    config = speed.Config()
    cells, calibrating = speed.plan(config)
    assert len(set(cells)) == len(cells)
    assert set(calibrating) <= set(cells)
    assert len(calibrating) == 3
    predicted = [c for c in cells if c.arm in ("single", "CE", "ME", "ME lockstep", "ME shared")]
    assert len(predicted) - len(calibrating) >= 30
    for k in (2, 3, 4):
        arms = {cell.arm for cell in cells if cell.k == k and cell.batch == 1}
        assert arms >= {"CE", "CE parallel", "ME"}
        assert arms >= {"speculative", "CE top-k"} or k > 2
    for batch in config.batches:
        own = [cell for cell in cells if cell.batch == batch and cell.steps == config.batch_steps]
        assert {cell.weights for cell in own if cell.arm == "ME"} == set(config.weights)
        assert sum(cell.arm == "CE" for cell in own) == 1


def test_rows_are_what_was_counted() -> None:
    config = tiny.config("speed")
    for row in record().results["cells"]:
        assert row["tokens"] == row["batch"] * row["steps"]
        assert len(row["seconds"]) == config.rounds
        assert (row["of_ce"] is None) == (row["arm"] in ("single", "CE", "CE top-k"))
        if row["batch"] == 1 and row["arm"] in ("single", "ME", "CE"):
            assert row["forwards_per_token"] == (row["k"] if row["arm"] == "CE" else 1)
    shared = [row for row in record().results["cells"] if row["arm"] == "ME shared"]
    assert all(row["forwards_per_token"] < 2 / row["batch"] for row in shared)


def test_targets_that_are_met_hold_and_others_refute() -> None:
    targets: dict[str, Any] = {
        "required_ratio": ((2, 1.85),), "required_share": 0.95, "cost_error": 0.15, "near_single": 0.1,
    }  # fmt: skip
    good = judged(ideal({2: 1.9}), **targets)
    assert of(good, "C6").verdict == "reproduced at small scale"
    assert of(good, "C15", "a cost model").held
    slow = judged(ideal({2: 1.5}), **targets)
    assert of(slow, "C6").verdict == "refuted as stated"
    assert not slow.held
    # Without a target, the same numbers are no failure, and no confirmation.
    open_ = judged(ideal({2: 1.5}))
    assert of(open_, "C6").verdict == "not testable here"
    assert "sets no target" in of(open_, "C6").caveat
    assert open_.held
    assert of(judged(ideal({2: 1.79})), "C6").verdict == "reproduced at small scale"


def test_each_target_is_a_check_of_its_own() -> None:
    def failures(results: dict[str, Any], **targets: Any) -> list[str]:
        return [name for name, held in judged(results, **targets).checks.items() if not held]

    results = ideal({2: 1.9})
    for row in results["by_k"]:
        row["ideal"], row["over_single_and_catching_up"] = 2.5, {"value": 1.2, "interval": [1.15, 1.3]}
    (name,) = failures(results, required_share=0.95)
    assert name.startswith("ME reaches 76% (up to ")
    (name,) = failures(results, near_single=0.1)
    assert name.startswith("ME takes 1.20 (1.15 to 1.30) times one model")
    for cell in results["cells"]:
        if not cell["calibrates"] and cell["error"] is not None:
            cell["error"] = 0.2
    (name,) = failures(results, cost_error=0.15)
    assert name.startswith("C15: a cost model")


def test_me_that_is_slower_than_ce_somewhere_is_said() -> None:
    results = ideal({2: 1.9})
    for entry in results["by_batch"]:
        for point in entry["points"]:
            point["of_ce"] |= {"value": 1.2, "interval": [1.1, 1.3]}
            point["tokens_per_second"] = 100.0 * point["batch"]
    gains = "what ME gains over CE by batch size"
    assert of(judged(results, required_batch_gain=2.0), "C15", gains).held
    next(e for e in results["by_batch"] if e["arm"] == "ME")["points"][-1]["of_ce"]["interval"] = [0.8, 0.9]
    assert "slower than CE at batch" in of(judged(results), "C15", gains).caveat
    assert of(judged(results, required_batch_gain=2.0), "C15", gains).verdict == "refuted as stated"


def test_time_that_does_not_grow_with_k_refutes_c7() -> None:
    results = ideal({2: 1.9})
    target: dict[str, Any] = {"required_ratio": ((2, 1.85),)}
    parallel = copy.deepcopy(next(row for row in results["by_k"] if row["arm"] == "CE"))
    parallel |= {"arm": "CE parallel"}
    results["by_k"].append(parallel)
    assert of(judged(results, **target), "C7").verdict == "reproduced at small scale"
    parallel["of_single"] |= {"value": 0.98, "interval": [0.97, 0.99]}  # as fast as one model
    assert of(judged(results, **target), "C7").verdict == "refuted as stated"
    results["by_k"].pop()
    assert of(judged(results, **target), "C7").held
    results["slope"]["value"] = 0.5
    assert not of(judged(results, **target), "C7").held


def test_the_slope_is_that_of_a_line() -> None:
    def row(arm: str, k: int, seconds: list[float]) -> dict[str, Any]:
        return {"arm": arm, "k": k, "weights": [1 / k] * k, "batch": 1, "steps": 4, "tokens": 4, "seconds": seconds,
                "predicted": None, "of_ce": None, "ideal": None}  # fmt: skip

    rows = [row("single", 1, [1.0, 2.0]), row("CE", 2, [1.9, 3.6]), row("CE", 3, [2.8, 5.2]), row("ME", 3, [9.0, 9.0])]
    assert bench_results.growth_in_k(rows).rounds == pytest.approx((0.9, 0.8))


def test_crossings_are_interpolated() -> None:
    assert bench_results._crossing([(1, 1.9), (4, 1.1), (16, 1.0)]) == pytest.approx(8.0)
    assert bench_results._crossing([(1, 1.9), (4, 1.1)]) is None
    assert bench_results._crossing([(2, 1.04), (4, 1.0)]) == 2


def test_references_are_ce_of_the_same_shape() -> None:
    ce, other = Cell("CE", (0.5, 0.5), batch=4), Cell("CE", (0.5, 0.5), batch=8)
    top = Cell("CE top-k", (0.5, 0.5), batch=4)
    cells = [other, ce, top]
    assert bench_results._reference(Cell("ME", (0.8, 0.2), batch=4), cells) == ce
    assert bench_results._reference(Cell("speculative", (0.5, 0.5), batch=4), cells) == top
    assert bench_results._reference(Cell("ME", (0.2, 0.3, 0.5), batch=4), cells) is None
    assert bench_results._reference(ce, cells) is None


def test_bad_configs_are_refused() -> None:
    for changes, message in (
        ({"components": (1,)}, "K of at least 2"),
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"arms": ("ME",)}, "arms must have single, CE and ME"),
        ({"spans": (1, 4)}, "spans of 1 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            speed.Config(**changes)


def test_finished_rounds_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tiny.config("speed"), arms=("single", "CE", "ME"), batches=(1, 2))
    seen: list[tuple[float, str]] = []
    first = speed.run(config, lambda *at: seen.append(at), work=tmp_path)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)
    assert len(list((tmp_path / first.key).glob("round-*.npz"))) == config.rounds

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished round was run again")

    monkeypatch.setattr(MESampler, "sample", refuse)
    assert speed.run(config, work=tmp_path).results["cells"] == first.results["cells"]


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    assert json.loads(json.dumps(loaded.results, allow_nan=False)) == record().results
    drawn = figure.draw(loaded, tmp_path / "one")
    assert read_data(drawn.image) == {"caption": drawn.caption, "key": loaded.key}
    assert re.match(r"ME is \d\.\d\d", drawn.caption)
    assert 100 < len(drawn.caption) < 600
    monkeypatch.setattr(figure, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    results = ideal({2: 1.9})
    results["crossover"] = [{"weights": [0.5, 0.5], "measured": 96.2, "predicted": None, "largest": 128}]
    caption = figure.draw(dataclasses.replace(loaded, results=results), tmp_path / "two").caption
    assert "gains under 5% from batch 96 on (predicted: beyond 512)" in caption
