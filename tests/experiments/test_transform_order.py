"""Every cause has its price, the prices add up to the published CE, and a wrong law or a wrong row is found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler, scripts
from me_stats.models import Aligned, MarkovModel, TableModel, Temperature
from me_stats.orders import Stage, Transforms
from me_stats.presets import Setting
from me_stats.record import Record, config_key
from me_stats.report.style import read_data
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests.stand_ins import stale_cache, toothless_transform

transform_order = scripts.load("experiments", "transform_order")
ledger = scripts.load("experiments", "ledger")
TINY: dict[str, Any] = {"rows": 4, "steps": 16, "sequence_rows": 24, "sequence_steps": 16}
BARE: dict[str, Any] = TINY | {"curves": False}


@cache
def record() -> Record:
    found: Record = transform_order.run(transform_order.Config(**TINY))
    return found


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def run(**changes: Any) -> Record:
    found: Record = transform_order.run(transform_order.Config(**(BARE | changes)))
    return found


# On correct code


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.key == config_key("transform_order", transform_order.Config(**TINY))
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found
    assert [(finding.claim, finding.verdict) for finding in found.findings] == [
        ("C9", "refuted as stated"),
        ("C9", "refuted as stated"),
        ("C9", "reproduced at small scale"),
    ]
    for finding in found.findings:
        assert finding.tv_upper is not None
        assert 0 < finding.tv_upper < 1
        assert finding.caveat


def test_prices_add_up() -> None:
    results = record().results
    for name, row in results["ledger"].items():
        causes, total = row["causes"], row["total"]["mean"]
        assert row["rest"] == 0
        assert causes[-1]["cumulative"]["mean"] == pytest.approx(total, abs=1e-12)
        assert causes[0]["alone"] == causes[0]["cumulative"] == causes[0]["added"]
        assert sum(cause["added"]["mean"] for cause in causes) >= total - 1e-12
        assert row["sum_alone"] == pytest.approx(sum(cause["alone"]["mean"] for cause in causes))
        assert "joint" in [cause["name"] for cause in causes] or "k" not in name
    ten, five = (results["ledger"][name]["total"]["mean"] for name in ("k = 10", "k = 5"))
    assert results["ledger"]["k = 50"]["total"]["mean"] < ten < five
    entries = results["entries"]
    assert entries["no transform"]["max"] < 1e-6
    assert entries["clamp, T = 0.7"]["max"] < 1e-9 < entries["clamp, T = 2"]["mean"]
    assert 1e-5 < entries["half precision"]["mean"] < 1e-2
    assert results["score_sums"] is None


def test_curves_meet_the_table_and_end_in_nothing() -> None:
    results = record().results
    curves = results["curves"]
    assert [point["at"] for point in curves["k"]] == [1, 2, 5, 10, 20, 50, 100, 200]
    at = {axis: {point["at"]: point for point in points} for axis, points in curves.items()}
    assert at["k"][10]["order"] == results["transforms"]["top-k 10"]
    assert at["k"][10]["published"] == results["ledger"]["k = 10"]["total"] == at["T"][1.0]["published"]
    assert at["T"][0.7]["published"] == results["ledger"]["k = 10, T = 0.7"]["total"]
    assert at["T"][1.0]["order"]["max"] == 0
    assert at["k"][200]["order"]["mean"] < 1e-3 < at["k"][1]["order"]["mean"]


def test_sequences_part_faster_than_steps() -> None:
    results = record().results["sequences"]
    lengths = [row["length"] for row in results["lengths"]]
    assert lengths == [1, 2, 4, 8, 16]
    for row in results["lengths"]:
        assert 0 <= row["interval"][0] <= row["tv"] <= row["interval"][1] <= 1
        assert row["outside_lower"] <= row["outside"]
    assert results["lengths"][-1]["tv"] > 3 * results["step"]["value"]
    assert transform_order._lengths([(0,) * 128, (1,)]) == [1, 2, 4, 8, 16, 32, 64, 100, 128]


def test_progress_goes_forward_and_a_seed_repeats() -> None:
    seen: list[tuple[float, str]] = []
    small = BARE | {"rows": 2, "steps": 4, "sequence_rows": 4, "sequence_steps": 4}
    first = transform_order.run(transform_order.Config(**small), lambda fraction, note: seen.append((fraction, note)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)
    assert transform_order.run(transform_order.Config(**small)).results == first.results
    assert transform_order.run(transform_order.Config(**small, seed=1)).results != first.results


def test_half_precision_is_no_failure() -> None:
    found = run(dtype="bfloat16")
    assert failed(found) == []
    assert not any("draws of ME" in check for check in found.checks)


# The laws that only the ledger has


def test_the_clamp_leaks_what_its_formula_says() -> None:
    law = torch.full((1, 1000), -math.inf, dtype=torch.float64)
    law[0, :3] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for tau in (0.7, 1.5, 2.0):
        clamped = ledger.ClampedTemperature(tau)(law).exp()[0]
        leak = 997 * 1e-12 ** (1 / tau)
        kept = sum(p ** (1 / tau) for p in (0.5, 0.3, 0.2))
        assert float(clamped[3:].sum()) == pytest.approx(leak / (kept + leak), rel=1e-9)
        ideal = Temperature(tau)(law).exp()[0]
        assert torch.allclose(clamped[:3] / clamped[:3].sum(), ideal[:3])


def test_mixtures_of_other_precisions_are_the_mixture() -> None:
    toys, mixing = [MarkovModel.random(50, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7])
    prefixes = [(token,) for token in range(50)]
    law = Ensemble(toys, mixing).log_probs(prefixes).exp()
    assert torch.allclose(ledger.WideMixture(toys, mixing).log_probs(prefixes).exp(), law, atol=1e-15)
    half = ledger.HalfMixture(toys, mixing).log_probs(prefixes).exp().double()
    assert 0 < float((half - law).abs().sum(-1).max()) < 4e-3


def drawn(rows_from: Callable[[Ensemble], Any], *, seed: int, n: int = 24) -> dict[str, float]:
    """The scores of rows of some sampler as draws of ME, over toys with k = 10."""
    toys, mixing = [MarkovModel.random(40, seed=s, concentration=0.3) for s in (0, 1)], ConstantMixing([0.3, 0.7])
    weights = (0.3, 0.7)
    me = ledger.OrderedLaw("transform-then-mix", ledger.PUBLISHED, weights).over(toys)
    ce = ledger.published_ce(toys, mixing, ledger.PUBLISHED)
    trace = rows_from(me).sample([0], n=n, max_new_tokens=20, seed=seed)
    found = ledger.Draws()
    models = [me.components[0], me, ce]
    for path, reading in zip(
        trace.sequences(), ledger.readings_along(models, trace.row_prompts(), trace.sequences()), strict=True
    ):
        first, p, q = (reading.law(model) for model in models)
        found.add(path, first, p, q, ledger._gap(p, q)[1])
    scores: dict[str, float] = found.scores()
    return scores


def test_scores_of_right_rows_are_standard_normal() -> None:
    scores = [drawn(MESampler, seed=seed) for seed in range(40)]
    for name in ("weights", "outside"):
        z = np.array([score[name] for score in scores])
        # Of 40 standard normals: the mean within 5/sqrt(40), the sum of squares within a chi-square's far tails.
        assert abs(z.mean()) < 0.8
        assert 10 < (z**2).sum() < 95
        assert np.abs(z).max() < transform_order._SURPRISE


def test_rows_of_another_law_are_found() -> None:
    def swapped(me: Ensemble) -> MESampler:
        return MESampler(Ensemble(me.components[::-1], me.mixing))

    assert abs(drawn(swapped, seed=0, n=100)["weights"]) > transform_order._SURPRISE

    def from_ce(me: Ensemble) -> CESampler:
        toys = [component.model for component in me.components]
        return CESampler(ledger.published_ce(toys, me.mixing, ledger.PUBLISHED))

    assert abs(drawn(from_ce, seed=0, n=100)["outside"]) > transform_order._SURPRISE


# Several vocabularies, by toys over byte strings


def byte_toys() -> Setting:
    rng = np.random.default_rng(0)
    letters = [bytes([97 + i]) for i in range(26)]
    tables = [
        TokenBytes.greedy([*letters, *(a + b for a in letters[:8] for b in letters[:5])]),
        TokenBytes.greedy([*letters, *(a + b for a in letters[2:9] for b in letters[4:9]), b"a"]),
    ]
    shared = ByteStrings(tables)
    toys = [TableModel(rng.dirichlet(np.full(table.size, 0.5), size=1), order=0) for table in tables]
    parts = [Aligned(toy, shared, token_bytes=table) for toy, table in zip(toys, tables, strict=True)]
    return Setting("byte toys", Ensemble(parts, ConstantMixing([0.6, 0.4])), ("ab", "c"), ())


def test_several_vocabularies_have_findings_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transform_order, "open_recorded", lambda recorder: byte_toys())
    found = run()
    results = found.results
    assert failed(found) == []
    assert results["mixed"]
    assert [cause["name"] for cause in results["ledger"]["k = 10"]["causes"]] == [
        "union", "first_subtoken", "top_k_again",
    ]  # fmt: skip
    by_name = {cause["name"]: cause for cause in results["ledger"]["k = 10"]["causes"]}
    assert by_name["first_subtoken"]["alone"]["max"] < 1e-12  # nothing is scored without a union
    assert by_name["first_subtoken"]["added"]["mean"] > 1e-3
    assert results["entries"]["transforms before strings"]["mean"] > 0
    assert 0 < results["score_sums"][0] <= results["score_sums"][1]
    assert results["curves"] is None
    claims = [(finding.claim, finding.verdict) for finding in found.findings]
    assert claims.count(("C8", "refuted as stated")) == 2
    assert claims.count(("C8", "reproduced at small scale")) == 1
    figure = scripts.load("figures", "transform_order").draw(found, tmp_path)
    assert "byte toys" in figure.caption


# Planted bugs


def a_cause_missing(patch: pytest.MonkeyPatch) -> None:
    """The way from ME to CE stops before its last cause."""
    honest = ledger.stages
    patch.setattr(ledger, "stages", lambda *args: honest(*args)[:-1] or honest(*args))


def a_missing_switch(patch: pytest.MonkeyPatch) -> None:
    """CE mixes what each component renormalised for itself."""
    honest = ledger.published_ce
    patch.setattr(
        ledger,
        "published_ce",
        lambda *args: honest(*args).with_causes(*(c for c in honest(*args).causes if c != "joint")),
    )


def an_idle_cause(patch: pytest.MonkeyPatch) -> None:
    """A switch that is connected to nothing: with it on, each law is the one before."""
    honest = ledger.stages

    def idle(first: Any, second: Any, components: Any) -> tuple[Stage, ...]:
        found, me = list(honest(first, second, components)), first.over(components)
        if len(found) > 2:
            found[1] = Stage(found[1].name, me, found[0].cumulative)
        return tuple(found)

    patch.setattr(ledger, "stages", idle)


def rows_of_other_weights(patch: pytest.MonkeyPatch) -> None:
    """The rows come from components in the wrong order."""

    class Swapped(MESampler):
        def __init__(self, ensemble: Ensemble) -> None:
            super().__init__(Ensemble(ensemble.components[::-1], ensemble.mixing))

    patch.setattr(transform_order, "MESampler", Swapped)


def swapped_sides(patch: pytest.MonkeyPatch) -> None:
    """Mass of CE outside the support of ME, in place of the mass of ME outside that of CE."""
    honest = ledger.escaped_mass
    patch.setattr(ledger, "escaped_mass", lambda p, q: honest(q, p))


def no_clamp(patch: pytest.MonkeyPatch) -> None:
    """A clamp that clamps nothing."""
    patch.setattr(ledger.ClampedTemperature, "__call__", Temperature.__call__)


CAUGHT: dict[Callable[[pytest.MonkeyPatch], None], tuple[tuple[str, ...], tuple[str, ...]]] = {
    # what must fail, and what must not, by the start of the check's name
    a_cause_missing: (("k = 10: the causes together", "k = 5: the causes together"), ("k = 10: every", "greedy: ")),
    a_missing_switch: (("k = 10: the causes together",), ("T = 0.7: ", "C9: published")),
    an_idle_cause: (("k = 10: every cause", "k = 5: every cause"), ("k = 10: the causes", "p = 0.9: ")),
    rows_of_other_weights: (("the rows are draws of ME, weights",), ("k = 10: ", "transform-then-mix through")),
    swapped_sides: (("the rows are draws of ME, outside",), ("the rows are draws of ME, weights", "k = 10: ")),
    stale_cache: (("transform-then-mix through sessions", "C9: CE and ME"), ("greedy: the orders", "C9: published")),
    toothless_transform: (("top-k 5: ", "top-k 10: ", "top-k 50: "), ("greedy: ", "top-p")),
    no_clamp: (("the clamp leaks",), ("k = 10: ",)),
}


@pytest.mark.parametrize("plant", CAUGHT, ids=lambda plant: plant.__name__)
def test_a_planted_bug_fails_the_right_checks(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    must_fail, must_hold = CAUGHT[plant]
    plant(monkeypatch)
    more: dict[str, Any] = {}
    if plant in (rows_of_other_weights, swapped_sides):  # these show in many tokens, and in one setting
        more = {"rows": 64, "steps": 32, "sequence_rows": 64}
        for table, names in (("CASES", ("k = 10", "k = 5")), ("TRANSFORMS", ("none", "top-k 10"))):
            monkeypatch.setattr(ledger, table, {name: getattr(ledger, table)[name] for name in names})
    found = run(**more)
    monkeypatch.undo()
    for start in must_fail:
        chosen = [check for check in found.checks if check.startswith(start)]
        assert chosen, start
        assert not all(found.checks[check] for check in chosen), (start, failed(found))
    for start in must_hold:
        chosen = [check for check in found.checks if check.startswith(start)]
        assert chosen, start
        assert all(found.checks[check] for check in chosen), (start, failed(found))


def test_rows_without_the_transform_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(MESampler):
        def __init__(self, ensemble: Ensemble) -> None:
            super().__init__(Ensemble([part.model for part in ensemble.components], ensemble.mixing))

    monkeypatch.setattr(transform_order, "MESampler", Whole)
    with pytest.raises(ValueError, match="excluded by p"):
        run(sequence_rows=64)


@pytest.mark.parametrize(
    ("tv", "mass", "held"), [(0.023, 0.018, True), (0.2, 0.018, False), (0.023, 0.003, False), (0.009, 0.006, True)]
)
def test_the_size_known_for_smollm2_is_asked_of_it_alone(tv: float, mass: float, held: bool) -> None:
    found = {key: {"value": value, "stderr": 1e-3} for key, value in (("step", tv), ("outside", mass))}
    results = {"label": "x", "sequences": found}
    for models, count in ((("smollm2-135m",), 2), (("bundled:prose", "bundled:code"), 0)):
        recorder = SimpleNamespace(checks={})
        recorder.check = recorder.checks.__setitem__
        transform_order._check_size(recorder, results, transform_order.Config(models=models))
        assert len(recorder.checks) == count
        assert all(recorder.checks.values()) == (held or not count)


def test_without_a_gap_nothing_is_refuted() -> None:
    results = plain_results()
    for row in results["ledger"].values():
        row["total"]["mean"] = 0.0
    recorder = transform_order.Recorder("transform_order", "", {})
    transform_order._find_published(recorder, results)
    assert [(finding.verdict, finding.held) for finding in recorder.findings] == [("not testable here", False)] * 2


def plain_results() -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(record().results))
    return copied


# The figure


def test_the_figure_is_drawn_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "transform_order")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["transform_order.pdf", "transform_order.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    total = loaded.results["ledger"]["k = 10"]["total"]
    assert f"TV {total['mean']:.3f} a step" in figure.caption
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    bare = dataclasses.replace(loaded, results=loaded.results | {"curves": None, "floor": 0.0})
    assert "agree to 1e-09" in script.draw(bare, tmp_path / "three").caption


def test_the_axes_ask_for_the_transforms_they_name() -> None:
    assert ledger.asked("k", 5) == Transforms(top_k=5) == ledger.asked("k", 5, published=True)
    assert ledger.asked("T", 0.5, published=True) == Transforms(temperature=0.5, top_k=10)
    assert ledger.asked("p", 0.9) == Transforms(top_p=0.9)
    assert ledger.points("k", 60) == (1, 2, 5, 10, 20, 50)
