"""Sensitivity to λ: estimates agree with exact values on toys, and the bug that each check catches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.record import Record
from me_stats.report.style import read_data
from me_stats.sensitivity import Estimate
from tests import tiny

sensitivity: Any = scripts.load("experiments", "sensitivity")


@pytest.fixture(scope="module")
def record() -> Record:
    return tiny.record("sensitivity")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(record: Record) -> None:
    assert failed(record) == []
    assert not record.findings
    options = tiny.OPTIONS["sensitivity"]
    rows = record.results["derivatives"]
    assert [row["K"] for row in rows] == [2] * options["toys"] + [3] * 2 * options["toys"]
    assert max(abs(row["exact"]) for row in rows) > 0.05
    assert len(record.results["line"]["points"]) == options["points"]
    assert sum(record.results["text"]["best"]) == pytest.approx(1)


def test_estimators_are_calibrated() -> None:
    config = tiny.config("sensitivity", toy_rows=500)
    z = []
    for toy in range(20):
        (row,) = sensitivity._derivatives(2, toy, config)
        z += [(row["score"].value - row["exact"]) / row["score"].stderr]
        z += [(row["common"].value - row["central"]) / row["common"].stderr]
    assert np.sum(np.abs(z) < 1.96) >= 32  # of 40 at 95%: fewer with probability 4e-4
    assert max(map(abs, z)) < 5


Plant = Callable[[pytest.MonkeyPatch], None]


def biased_baseline(patch: pytest.MonkeyPatch) -> None:
    """A score function that shrinks."""
    gradient = sensitivity.score_function_gradient

    def shrunk(*args: Any) -> Any:
        return [dataclasses.replace(one, value=0.5 * one.value) for one in gradient(*args)]

    patch.setattr(sensitivity, "score_function_gradient", shrunk)


def swapped_vertices(patch: pytest.MonkeyPatch) -> None:
    gradient = sensitivity.score_function_gradient
    patch.setattr(sensitivity, "score_function_gradient", lambda *args: gradient(*args)[::-1])


def one_sided_step(patch: pytest.MonkeyPatch) -> None:
    """A difference over half the step that it is divided by."""
    difference = sensitivity.common_random_number_difference

    def halved(*args: Any, **options: Any) -> Estimate:
        found: Estimate = difference(*args, **options)
        return dataclasses.replace(found, value=found.value / 2)

    patch.setattr(sensitivity, "common_random_number_difference", halved)


def wrong_polynomial(patch: pytest.MonkeyPatch) -> None:
    """Exact values that are not: the weights of the first two components are swapped."""
    taylor = sensitivity.ExpectationPolynomial._taylor

    def swapped(self: Any, weights: Any, direction: Any, order: int) -> float:
        turn = [1, 0, *range(2, len(weights))]
        return float(taylor(self, weights[turn], direction[turn], order))

    patch.setattr(sensitivity.ExpectationPolynomial, "_taylor", swapped)


def wrong_slope(patch: pytest.MonkeyPatch) -> None:
    gradient = sensitivity.ExpectationPolynomial.gradient
    patch.setattr(sensitivity.ExpectationPolynomial, "gradient", lambda self, at: 1.2 * gradient(self, at))


CAUGHT: dict[Plant, tuple[str, ...]] = {
    biased_baseline: ("the score function agrees",),
    swapped_vertices: ("the score function agrees",),
    one_sided_step: ("common random numbers agree",),
    wrong_polynomial: ("exact expectations", "the score function agrees", "common random numbers agree"),
    wrong_slope: ("exact derivatives are slopes",),
}


@pytest.mark.parametrize("plant", CAUGHT, ids=lambda plant: plant.__name__)
def test_a_planted_bug_of_derivatives_fails_its_check(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("sensitivity", toy_rows=4000)
    plant(monkeypatch)
    recorder = sensitivity.Recorder(sensitivity.NAME, sensitivity.TITLE, config)
    rows = [row for k in (2, 3) for toy in range(config.toys) for row in sensitivity._derivatives(k, toy, config)]
    sensitivity._check_derivatives(recorder, rows)
    for start in CAUGHT[plant]:
        chosen = {name: held for name, held in recorder.checks.items() if name.startswith(start)}
        assert chosen, start
        assert not all(chosen.values()), chosen
    allowed = (*CAUGHT[plant], "the score function agrees") if plant is wrong_slope else CAUGHT[plant]
    assert all(held or name.startswith(allowed) for name, held in recorder.checks.items())


def altered(points: Any, **changes: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Points of a sweep with estimates or costs changed by name."""
    out = []
    for point in points:
        estimates = {name: changes.get(name, lambda one: one)(one) for name, one in point.estimates.items()}
        cost = {name: changes.get(name, lambda one: one)(one) for name, one in point.cost.items()}
        out.append(dataclasses.replace(point, estimates=estimates, cost=cost))
    return tuple(out)


def scaled(by: float) -> Callable[[Estimate], Estimate]:
    def change(one: Estimate) -> Estimate:
        low, high = one.interval
        return dataclasses.replace(one, value=by * one.value, interval=(by * low, by * high))

    return change


SWEEPS: dict[str, tuple[dict[str, Callable[[Any], Any]], tuple[str, ...]]] = {
    "re-weighting that is off": ({"zeros": scaled(1.3)}, ("estimates agree with exact ones",)),
    "the likelihood of other weights": ({"nll": scaled(1.001)}, ("the triangle's NLL", "the sweep's NLL")),
    "steps too near": ({"step_tv": scaled(0.01)}, ("TV of a sequence is at most",)),
    "work that was not forecast": ({"forwards_per_token_measured": lambda x: 1.5 * x}, ("ME runs as many forwards",)),
    "a reference far from itself": (
        {"sequence_tv": lambda one: dataclasses.replace(one, value=one.value + 0.1)},
        ("distances to the reference are 0",),
    ),
}


@pytest.mark.parametrize("bug", SWEEPS)
def test_a_planted_bug_of_the_sweep_fails_its_check(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, starts = SWEEPS[bug]
    walk = sensitivity.sweep

    def planted(*args: Any, **options: Any) -> Any:
        found = walk(*args, **options)
        return dataclasses.replace(found, points=altered(found.points, **changes))

    monkeypatch.setattr(sensitivity, "sweep", planted)
    found = sensitivity.run(tiny.config("sensitivity", toys=1, toy_rows=200, rows=4))
    for start in starts:
        assert [name for name in failed(found) if name.startswith(start)], start
    assert len(failed(found)) == len(starts)


def test_a_formula_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = sensitivity.step_tv_sums
    monkeypatch.setattr(sensitivity, "step_tv_sums", lambda *args: 1.05 * sums(*args))
    found = sensitivity.run(tiny.config("sensitivity", toys=1, toy_rows=200, rows=4))
    (name,) = failed(found)
    assert name.startswith("TV of a step is")


def test_three_models_have_no_line() -> None:
    three = ("bundled:prose", "bundled:code", "bundled:prose")
    with pytest.raises(ValueError, match="models must give two components, got 3"):
        sensitivity.run(tiny.config("sensitivity", models=three, toys=1, toy_rows=50, triangle=1, triangle_rows=50))


def test_the_caption_says_what_the_record_says(record: Record, tmp_path: Path) -> None:
    draw = scripts.load("figures", "sensitivity").draw
    record.save(tmp_path / "record.json")
    drawn = draw(Record.load(tmp_path / "record.json"), tmp_path)
    assert read_data(drawn.image) == {"caption": drawn.caption, "key": record.key}
    assert "agree with exact" in drawn.caption
    results = {**record.results, "triangle": {**record.results["triangle"], "agree": False}}
    assert "do not agree" in draw(dataclasses.replace(record, results=results), tmp_path).caption


def test_progress_goes_forward() -> None:
    seen: list[float] = []
    config = tiny.config("sensitivity", toys=1, toy_rows=50, points=3, rows=2, steps=4, triangle=2, triangle_rows=50)
    sensitivity.run(config, lambda fraction, note: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] <= 1
