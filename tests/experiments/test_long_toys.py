"""Long rows of toys keep to their closed forms, and planted samplers, laws and estimators do not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.models import MarkovModel
from me_stats.record import Record
from me_stats.report.style import read_data
from me_stats.routers import StickySampler
from me_stats.samplers import MESampler, SequenceMixtureSampler
from tests import tiny

long_toys = scripts.load("experiments", "long_toys")
TINY: dict[str, Any] = tiny.OPTIONS["long_toys"]


def record() -> Record:
    return tiny.record("long_toys")


def failed(found: Record) -> list[str]:
    return [finding.statement for finding in found.findings if not finding.held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.held
    assert {finding.claim for finding in found.findings} == {"C14"}
    assert all(finding.n and finding.caveat and finding.bound.startswith("level") for finding in found.findings)
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    assert len(found.results["moments"]) == 2 * 5
    assert len(found.results["waits"]) == 3 * (2 + 3)
    for row in found.results["long"]:
        if "ess" in row:
            assert row["ess"] == pytest.approx(row["arviz_ess"], rel=0.1)
            assert len(row["row_ess"]) == TINY["long_rows"]


def test_the_moments_of_surprisals_are_those_of_enumeration() -> None:
    for toy in long_toys.toys():
        laws, size = toy.laws, toy.laws.shape[1]
        paths = np.array(list(itertools.product(range(size), repeat=3)))
        sums = toy.values(paths, "surprisal").cumsum(1)
        chance = np.exp(-sums[:, -1])
        moments = toy.moments("surprisal", 3)
        np.testing.assert_allclose(moments.mean, chance @ sums)
        np.testing.assert_allclose(moments.variance, chance @ sums**2 - (chance @ sums) ** 2)
        # From the middle on, the first surprisal is already that of a pair.
        pairs, middle = laws[0][:, None] * laws[1:], toy.moments("surprisal", 2, middle=True)
        mean = -(pairs * np.log(laws[1:])).sum()
        np.testing.assert_allclose(middle.mean, [mean, 2 * mean])
        assert middle.variance[0] == pytest.approx((pairs * np.log(laws[1:]) ** 2).sum() - mean**2)
        np.testing.assert_allclose(laws[0] @ laws[1:], laws[0])


def test_the_law_of_one_component_per_sequence_is_that_of_enumeration() -> None:
    toy = long_toys.toys()[0]
    paths = np.array(list(itertools.product(range(4), repeat=3)))
    sums, chance = toy.values(paths, "token").cumsum(1), np.zeros(len(paths))
    for weight, component in zip(toy.weights, toy.ensemble.components, strict=True):
        law = component.log_table.exp().numpy()
        chance += weight * law[0, paths[:, 0]] * law[1 + paths[:, 0], paths[:, 1]] * law[1 + paths[:, 1], paths[:, 2]]
    mean, variance = long_toys._once(toy, 3)
    np.testing.assert_allclose(mean, chance @ sums)
    np.testing.assert_allclose(variance, chance @ sums**2 - (chance @ sums) ** 2)


def test_long_rows_have_the_variance_that_the_window_continues() -> None:
    toy = long_toys.toys()[0]
    moments = toy.moments("token", 4000)
    assert moments.variance[-1] == pytest.approx(moments.variance[999] + 3000 * moments.asymptotic_variance, rel=1e-9)


def test_progress_and_seed() -> None:
    seen: list[tuple[float, str]] = []
    small = TINY | {"rows": 100, "steps": 32, "long_steps": 4000, "waits": (100,)}
    first = long_toys.run(long_toys.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    assert long_toys.run(long_toys.Config(**small)).results == first.results
    assert long_toys.run(long_toys.Config(**small, seed=1)).results != first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


# Planted bugs


def test_a_sticky_sampler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_toys, "MESampler", StickySampler)
    small = TINY | {"rows": 300, "long_steps": 2000, "waits": (100, 1000)}
    found = failed(long_toys.run(long_toys.Config(**small)))
    assert any(statement.startswith("waits of components") for statement in found)


def test_one_component_per_sequence_in_place_of_me_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_toys, "MESampler", SequenceMixtureSampler)
    found = failed(long_toys.run(long_toys.Config(**TINY)))
    for start in ("mean and variance", "in rows of a million", "waits of components", "ME and CE have one law"):
        assert any(statement.startswith(start) for statement in found)


@pytest.mark.parametrize("field", ["variance", "mean"])
def test_a_wrong_closed_form_is_found(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = long_toys.markov_moments

    def wrong(*args: Any, **options: Any) -> Any:
        moments = honest(*args, **options)
        moved = 1.6 * moments.variance if field == "variance" else moments.mean + 0.4 * np.sqrt(moments.variance)
        return dataclasses.replace(moments, **{field: moved})

    monkeypatch.setattr(long_toys, "markov_moments", wrong)
    assert any(
        statement.startswith("mean and variance") for statement in failed(long_toys.run(long_toys.Config(**TINY)))
    )


def test_a_wrong_autocorrelation_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = long_toys.autocorrelation_time

    def doubled(v: Any, **options: Any) -> Any:
        found = honest(v, **options)
        low, high = found.pooled.interval
        return dataclasses.replace(found, pooled=dataclasses.replace(found.pooled, interval=(8 * low, 8 * high)))

    monkeypatch.setattr(long_toys, "autocorrelation_time", doubled)
    (statement,) = failed(long_toys.run(long_toys.Config(**TINY)))
    assert statement.startswith("autocorrelation times")


def test_a_right_sampler_passed_as_control_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_toys, "SequenceMixtureSampler", MESampler)
    (statement,) = failed(long_toys.run(long_toys.Config(**TINY)))
    assert statement.startswith("one component per sequence")


def test_toys_are_what_they_say() -> None:
    long, short = long_toys.toys()
    times = []
    for toy in (long, short):
        moments = toy.moments("token", 1)
        times.append(moments.asymptotic_variance / moments.variance[0])
        assert all(type(component) is MarkovModel for component in toy.ensemble.components)
    assert times[0] > 20
    assert times[1] < 1.2


def test_the_figure_is_drawn_from_the_record(tmp_path: Path) -> None:
    script = scripts.load("figures", "long_toys")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["long_toys.pdf", "long_toys.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("Long rows keep to their closed forms")
    assert 100 < len(figure.caption) < 700
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
