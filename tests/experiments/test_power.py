"""Power of the checks: planted bugs are found, right samplers pass, and both records say so only where it is so."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.goodness import Portfolio
from me_stats.record import Record, config_key
from me_stats.report.style import read_data
from me_stats.samplers import SequenceMixtureSampler
from me_stats.testing import MUTANTS, Mutant
from tests import tiny

power: Any = scripts.load("experiments", "power")
one_step: Any = scripts.load("experiments", "power_one_step")
MODULES = {"power": power, "power_one_step": one_step}
TINY = tiny.OPTIONS


def record(name: str) -> Record:
    return tiny.record(name)


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


@pytest.mark.parametrize("name", MODULES)
def test_every_check_holds(name: str, tmp_path: Path) -> None:
    found = record(name)
    assert failed(found) == []
    assert found.checks
    assert found.key == config_key(name, MODULES[name].Config(**TINY[name]))
    assert not found.findings
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


@pytest.mark.parametrize("name", MODULES)
def test_the_figure_is_drawn_from_the_record(name: str, tmp_path: Path) -> None:
    script = scripts.load("figures", name)
    record(name).save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == [f"{name}.pdf", f"{name}.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert 100 < len(figure.caption) < 600
    assert figure.caption.endswith(".")
    assert not any(word in figure.caption for word in ("nan", "None", "inf ", "  "))


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("power", {"mutants": ("one component per sequence",), "cap": 500, "seeds": 2, "rows": 50}),
        ("power_one_step", {"grid": ((256, 1000, 3),), "sequence_runs": 1, "rows": 60}),
    ],
)
def test_progress_and_seed(name: str, smaller: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = MODULES[name], []
    if name == "power":
        monkeypatch.setattr(module, "ON_TRANSFORMERS", module.ON_TRANSFORMERS[:1])
    config = module.Config(**TINY[name] | smaller)
    first = module.run(config, lambda fraction, note: seen.append((fraction, note)))
    again = module.run(config)
    for timed in (first, again):
        timed.results.pop("timing", None)
    assert again.results == first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


# What the numbers are


def test_tokens_are_medians_and_what_is_not_found_stays_open() -> None:
    rows = {row["name"]: row for row in record("power").results["mutants"]}
    for row in rows.values():
        known = [math.inf if tokens is None else tokens for tokens in row["tokens"]]
        assert (row["median"] or math.inf) == sorted(known)[len(known) // 2]
        assert (row["low"] or math.inf) <= (row["median"] or math.inf) <= (row["high"] or math.inf)
    once = rows["one component per sequence"]
    assert once["family"] == "hidden Markov"
    assert once["median"] < 400 < rows["sticky component"]["median"]
    assert rows["zero-probability token drawn"]["family"] == "support"
    open_ended = rows["stale cache at 5% of switches"]
    assert open_ended["tokens"] == [None] * 3
    assert open_ended["session_rejected"]
    shape = rows["stops with the first row"]
    assert (shape["runs"], shape["check"]["worst"]) == (1, "structure")


def test_paths_start_near_one_and_cross_only_where_something_is_wrong() -> None:
    paths = record("power").results["paths"]
    assert set(paths) == {"one component per sequence", "sticky component", "right ME", "right CE"}
    for name, path in paths.items():
        assert len(path["tokens"]) == len(path["log10_e"]) <= 40
        assert path["tokens"] == sorted(path["tokens"])
        assert (max(path["log10_e"]) >= 9) == (not name.startswith("right")), name


@pytest.mark.parametrize("vocabulary", [256, 3000])
def test_planted_laws_are_laws(vocabulary: int) -> None:
    p, parts = one_step.laws(vocabulary)
    assert p.sum() == pytest.approx(1)
    assert parts.sum(1) == pytest.approx(np.ones(2))
    wrong = one_step.bugs(p, parts)
    assert np.array_equal(wrong["right"], p / p.sum())
    for name, q in wrong.items():
        assert q.sum() == pytest.approx(1)
        assert (q >= 0).all()
        assert (0.5 * np.abs(p - q).sum() > 1e-7) == (name != "right")
    tv = {name: 0.5 * np.abs(p - q).sum() for name, q in wrong.items()}
    assert tv["top-p 0.7"] == pytest.approx(0.3, abs=0.02)
    assert tv["TV .01 on\nrandom half"] == pytest.approx(0.01)
    assert tv["λ + .05"] == pytest.approx(0.05 * 0.5 * np.abs(parts[0] - parts[1]).sum())
    assert 0.003 < tv["token at .01\nnever drawn"] <= 0.0101


def test_what_tests_in_use_miss() -> None:
    rows = {row["bug"]: row for row in record("power_one_step").results["rows"] if row["V"] == 256}
    nucleus, right = rows["top-p 0.7"], rows["right"]
    assert nucleus["rejected"]["portfolio, 1e-6"] == nucleus["runs"]
    assert nucleus["rejected"]["observed cells"] == nucleus["rejected"]["cosine"] == 0
    assert right["rejected"]["distance ratio"] > right["runs"] / 4
    assert nucleus["in_sight"]["portfolio, 1e-6"] > 1
    sequences = {row["bug"]: row["rejected"] for row in record("power_one_step").results["sequences"]}
    assert sequences["one component per sequence"]["martingales, 1e-6"] == 3
    assert sequences["one component per sequence"]["Hamming MMD"] < 3


# Checks that must fail


def small(name: str, **changes: Any) -> Record:
    few: dict[str, Any] = {"mutants": ("one component per sequence",), "seeds": 1, "cap": 500, "rows": 50}
    result: Record = MODULES[name].run(MODULES[name].Config(**TINY[name] | (few if name == "power" else {}) | changes))
    return result


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bug on transformers, which are slow."""
    monkeypatch.setattr(power, "ON_TRANSFORMERS", power.ON_TRANSFORMERS[:1])


@pytest.mark.usefixtures("one_case")
def test_a_check_that_misses_a_bug_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = power.check_sampler

    def blind(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(honest(*args, **options), pvalue=1.0)

    monkeypatch.setattr(power, "check_sampler", blind)
    (name,) = failed(small("power"))
    assert name.endswith("missed one component per sequence")


@pytest.mark.usefixtures("one_case")
def test_a_right_sampler_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mutant, "right_sampler", lambda self, ensemble: SequenceMixtureSampler(ensemble))
    (name,) = failed(small("power"))
    assert name.startswith("the right sampler of each of 1 claims")


@pytest.mark.usefixtures("one_case")
def test_a_median_beyond_the_target_fails() -> None:
    (name,) = failed(small("power", alpha=1e-290, sibling_cap=200))
    assert name.startswith("one component per sequence")
    assert "more than 200 tokens" in name


@pytest.mark.parametrize(("factor", "start"), [(1 / 30, "a right sampler is rejected"), (1e9, "finds with power 0.8")])
def test_a_portfolio_that_is_wrong_is_found(factor: float, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Portfolio.test

    def wrong(self: Any, counts: Any, **options: Any) -> Any:
        found = honest(self, counts, **options)
        return dataclasses.replace(found, pvalue=min(1.0, found.pvalue * factor if factor < 1 else 1.0))

    monkeypatch.setattr(Portfolio, "test", wrong)
    names = failed(small("power_one_step", grid=((256, 10_000, 30),), sequence_runs=1, rows=200))
    assert names
    assert all(start in name for name in names)


def test_every_path_and_case_is_a_mutant() -> None:
    assert {*power.PATHS, *(name for name, _, _ in power.ON_TRANSFORMERS)} <= set(MUTANTS)
