"""Repairs are exact and cost what is forecast; planted errors in sampler, tests and forecast flip their checks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from me_stats import scripts
from me_stats.record import Record, Recorder, config_key
from me_stats.report.style import read_data
from me_stats.samplers import FixedMaskSampler, SpeculativeSampler

repairs: Any = scripts.load("experiments", "repairs")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "toys": 1, "exact_cases": (("top-k 5", 1), ("greedy", 3)), "rows": 24, "steps": 24, "first": 100,
    "second_level": 0.01, "permutations": 999, "without_repairs": ("top-k 5", "top-k 10"), "repairs_from_q": (),
    "chunks": (1, 4), "batches": (1, 4), "timed_steps": 24, "repeats": 1,
}  # fmt: skip
# For planted errors: toys alone, or two targets alone and no clock.
TOYS: dict[str, Any] = {"toys": 1}
NETWORKS: dict[str, Any] = TINY | {"toys": 0, "timed": (), "exact_cases": (("top-k 5", 1),), "steps": 16}


@cache
def record() -> Record:
    found: Record = repairs.run(repairs.Config(**TINY))
    return found


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.key == config_key("repairs", repairs.Config(**TINY))
    assert {finding.claim for finding in found.findings} == {"C9"}
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    faults = {row["fault"] for row in found.results["toys"] if row["fault"]}
    assert len(faults) == 7
    assert sum(name.startswith("enumeration sees a planted error") for name in found.checks) == 7
    assert {row["repair"] for row in found.results["toys"]} == {"speculative", "fixed mask", "Bayes router"}
    assert set(found.results["targets"]) == set(repairs.TRANSFORMS)


def two_targets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(repairs, "TRANSFORMS", {name: repairs.TRANSFORMS[name] for name in ("top-k 5", "greedy")})


def test_progress_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    two_targets(monkeypatch)
    seen: list[tuple[float, str]] = []
    small = NETWORKS | {"rows": 16, "steps": 8, "exact_cases": (), "without_repairs": ()}
    first = repairs.run(repairs.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    assert repairs.run(repairs.Config(**small)).results == first.results
    assert repairs.run(repairs.Config(**small, seed=1)).results != first.results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)


def repairs_from_q(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SpeculativeSampler, "_left_over", lambda self, reading, q, p: q)


def takes_every_draft(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SpeculativeSampler, "_proposal", lambda self, reading, rows, steps: reading.law(self.model))


def mask_keeps_the_weights(patch: pytest.MonkeyPatch) -> None:
    """Attempts redraw the token for ever, and m never."""
    inside = repairs.Allowed

    def attempt(self: Any, pair: Any, laws: Any, log_weights: Any, waiting: Any) -> Any:
        chosen = pair.component(log_weights[waiting], waiting)
        tokens = chosen.copy()
        for i in set(chosen.tolist()):
            mine = (chosen == i).nonzero()[0]
            law, index = laws.of(i, waiting[mine])
            tokens[mine] = pair.token(inside(self.model.allowed.tokens)(law), waiting[mine], index)
        return tokens, chosen

    patch.setattr(FixedMaskSampler, "_attempt", attempt)


def router_forgets(patch: pytest.MonkeyPatch) -> None:
    build = repairs.BayesRouter
    patch.setattr(repairs, "BayesRouter", lambda parts, prior, beta, given: build(parts, prior, beta=0.0, given=given))


def blind_enumeration(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(repairs.exact, "sampler_law", lambda sampler, prompt, max_new_tokens: NoDistance())


class NoDistance:
    sequences = ((),)

    def tv_distance(self, other: Any) -> float:
        return 0.0


def optimistic_forecast(patch: pytest.MonkeyPatch) -> None:
    honest = repairs.forecast_acceptance

    def bright(*given: Any, **options: Any) -> Any:
        found = honest(*given, **options)
        share = dataclasses.replace(found.acceptance, value=found.acceptance.value + 0.15)
        return dataclasses.replace(found, acceptance=share)

    patch.setattr(repairs, "forecast_acceptance", bright)


def verdicts_ignored(patch: pytest.MonkeyPatch) -> None:
    """The run says that every draft was taken."""
    honest = repairs.measure_acceptance

    def all_taken(*given: Any, **options: Any) -> Any:
        return dataclasses.replace(honest(*given, **options), surplus=8.0)

    patch.setattr(repairs, "measure_acceptance", all_taken)


def blind_tests(patch: pytest.MonkeyPatch) -> None:
    honest = repairs.martingale_portfolio

    def blind(*given: Any, **options: Any) -> Any:
        return dataclasses.replace(honest(*given, **options), pvalue=0.5)

    patch.setattr(repairs, "martingale_portfolio", blind)


Plant = Callable[[pytest.MonkeyPatch], None]
ON_TOYS: dict[Plant, str] = {
    repairs_from_q: "speculative: exact",
    takes_every_draft: "speculative: exact",
    mask_keeps_the_weights: "fixed mask: exact",
    router_forgets: "Bayes router: exact",
    blind_enumeration: "enumeration sees a planted error",
}
ON_NETWORKS: dict[Plant, tuple[str, ...]] = {
    repairs_from_q: ("C9: mix-then-transform by ME drafts and speculative repairs, every path",),
    takes_every_draft: ("C9: mix-then-transform", "top-k 5: acceptance is what laws along CE rows forecast"),
    blind_enumeration: ("walked: ME alone is another law",),
    optimistic_forecast: ("greedy: acceptance is what laws along CE rows forecast",),
    verdicts_ignored: ("top-k 5: drafts are accepted as often as 1 - TV says",),
    blind_tests: ("top-k 5: ME without repairs is rejected",),
}


@pytest.mark.parametrize("plant", ON_TOYS, ids=lambda plant: plant.__name__)
def test_planted_errors_are_seen_on_toys(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    config = repairs.Config(**TOYS)
    recorder = Recorder("repairs", "", config)
    repairs._judge_toys(recorder, list(repairs._toys(config)))
    assert any(name.startswith(ON_TOYS[plant]) for name, held in recorder.checks.items() if not held)


@pytest.mark.parametrize("plant", ON_NETWORKS, ids=lambda plant: plant.__name__)
def test_planted_errors_are_seen_on_networks(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    two_targets(monkeypatch)
    plant(monkeypatch)
    names = failed(repairs.run(repairs.Config(**NETWORKS)))
    for start in ON_NETWORKS[plant]:
        assert any(name.startswith(start) for name in names), names


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "repairs")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["repairs.pdf", "repairs.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("Checked ME drafts have the law of mix-then-transform (largest TV")
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    loaded.checks["greedy: the repaired rows are CE's (bundled siblings)"] = False
    assert script.draw(loaded, tmp_path / "three").caption.startswith("1 checks failed")
