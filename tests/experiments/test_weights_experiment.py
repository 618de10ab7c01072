"""Weights by domain: what holds, what the findings say where it does not, and the bug that each check catches."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import scripts
from me_stats.corpus import Document
from me_stats.likelihood import Maximum
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.report.style import read_data
from tests import tiny

weights: Any = scripts.load("experiments", "weights")


@pytest.fixture(scope="module")
def record() -> Record:
    return tiny.record("weights")


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def run(**changes: Any) -> Record:
    found: Record = weights.run(tiny.config("weights", **changes))
    return found


def test_every_check_holds_and_the_best_weights_move(record: Record) -> None:
    assert failed(record) == []
    assert [finding.claim for finding in record.findings] == ["C13", "C13"]
    assert {finding.verdict for finding in record.findings} == {"reproduced at small scale"}
    fits = record.results["fits"]
    assert fits["prose"]["weights"][0] > 0.6 > 0.3 > fits["code"]["weights"][0]
    excess = np.array(record.results["transfer"]["excess"])
    assert np.diag(excess).tolist() == [0, 0, 0]
    assert (excess >= -1e-12).all()
    curve = record.results["curves"]["prose"]
    assert 0 <= min(curve["excess"]) < 0.01
    power = record.results["power"]
    shown = [re.search(r"power 0\.8 .* effect of ([\d.]+)", finding.caveat) for finding in record.findings]
    assert [float(one[1]) for one in shown if one] == pytest.approx([power["weight"], power["nll"]], abs=1e-3)


def test_power_is_that_of_intervals_which_do_not_touch(record: Record) -> None:
    rng = np.random.default_rng(0)
    errors = [record.results["fits"][name]["stderr"][0] for name in ("prose", "code")]
    drawn = rng.normal(size=(100_000, 2)) * errors + [record.results["power"]["weight"], 0]
    apart = (drawn[:, 0] - drawn[:, 1] > 1.96 * sum(errors)).mean()
    assert abs(apart - 0.8) < 0.01


def test_texts_are_unseen_disjoint_and_of_equal_size() -> None:
    documents = weights.held_out(3000, 300)
    by_domain = {name: [d.content for d in documents if d.domain == name] for name in weights.DOMAINS}
    trained = {name: scripts.load("experiments", "train_siblings").corpora()[name][0] for name in ("prose", "code")}
    for name, texts in by_domain.items():
        assert sum(len(text.encode()) for text in texts) == pytest.approx(3000, abs=8)
        assert max(len(text.encode()) for text in texts) <= 300
        if name != "mixed":
            assert not any(text.encode() in trained[name] for text in texts if len(text) > 200)
    assert len({text for texts in by_domain.values() for text in texts}) == len(documents)
    with pytest.raises(ValueError, match="text_bytes=10000000 is more held-out prose"):
        weights.held_out(10_000_000, 300)


Plant = Callable[[pytest.MonkeyPatch], None]


def swapped_components(patch: pytest.MonkeyPatch) -> None:
    """Scores come in another order than the ensemble's components."""
    score = weights.score_corpus

    def swapped(models: Any, documents: Any) -> Any:
        found = score(models, documents)
        return dataclasses.replace(found, log_probs=found.log_probs[:, ::-1].copy())

    patch.setattr(weights, "score_corpus", swapped)


def shifted_tokens(patch: pytest.MonkeyPatch) -> None:
    """Each token gets the score of the one before."""
    score = weights.score_corpus

    def shifted(models: Any, documents: Any) -> Any:
        found = score(models, documents)
        return dataclasses.replace(found, log_probs=np.roll(found.log_probs, 1, axis=0))

    patch.setattr(weights, "score_corpus", shifted)


def poor_fits(patch: pytest.MonkeyPatch) -> None:
    """Fits that other weights beat on their own domain."""
    fit = weights.fit_by_domain

    def poor(scores: Any, **options: Any) -> Any:
        found = fit(scores, **options)
        return dataclasses.replace(found, excess=found.excess - 0.01)

    patch.setattr(weights, "fit_by_domain", poor)


def poor_folds(patch: pytest.MonkeyPatch) -> None:
    """Held-out losses above those of every rival."""
    validate = weights.cross_validate

    def poor(scores: Any, **options: Any) -> Any:
        found = validate(scores, **options)
        worse = tuple(dataclasses.replace(one, difference=-1.0, interval=(-1.1, -0.9)) for one in found.comparisons)
        return dataclasses.replace(found, comparisons=worse)

    patch.setattr(weights, "cross_validate", poor)


def narrow_intervals(patch: pytest.MonkeyPatch) -> None:
    fit = weights.fit_weights

    def narrow(*args: Any, **options: Any) -> Any:
        found = fit(*args, **options)
        middle = found.weights[:, None]
        return dataclasses.replace(found, intervals=middle + 0.3 * (found.intervals - middle))

    patch.setattr(weights, "fit_weights", narrow)


def documents_forgotten(patch: pytest.MonkeyPatch) -> None:
    fit = weights.fit_weights
    patch.setattr(weights, "fit_weights", lambda x, *, groups=None, **options: fit(x, **options))


def never_flagged(patch: pytest.MonkeyPatch) -> None:
    fit = weights.fit_weights
    patch.setattr(weights, "fit_weights", lambda *a, **o: dataclasses.replace(fit(*a, **o), identified=True))


def always_flagged(patch: pytest.MonkeyPatch) -> None:
    fit = weights.fit_weights
    patch.setattr(weights, "fit_weights", lambda *a, **o: dataclasses.replace(fit(*a, **o), identified=False))


def hasty_em(patch: pytest.MonkeyPatch) -> None:
    em = weights.em

    def hasty(likelihood: Any) -> Maximum:
        found: Maximum = em(likelihood, tol=1e-4)
        return found

    patch.setattr(weights, "em", hasty)


CAUGHT: dict[Plant, tuple[str, tuple[str, ...]]] = {
    # bug: the part of the experiment that sees it, and the checks that must fail
    swapped_components: ("text", ("the ensemble at λ̂", "each sibling has most", "λ̂ of the mixed text")),
    shifted_tokens: ("text", ("the ensemble at λ̂",)),
    poor_fits: ("text", ("no weights explain a domain better",)),
    poor_folds: ("text", ("prose: λ̂ of other", "code: λ̂ of other", "mixed: λ̂ of other")),
    narrow_intervals: ("coverage", ("intervals hold: 0.3 of (0.3, 0.7), indep", "intervals hold: 0.2 of (0.2, 0.3")),
    documents_forgotten: ("coverage", ("intervals hold: 0.3 of (0.3, 0.7), independent documents",)),
    never_flagged: ("alike", ("components that differ by",)),
    always_flagged: ("alike", ("distinct components are not flagged",)),
    hasty_em: ("solvers", ("Newton and EM agree",)),
}


@pytest.mark.parametrize("plant", CAUGHT, ids=lambda plant: plant.__name__)
def test_a_planted_bug_fails_its_check(plant: Plant, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    part, starts = CAUGHT[plant]
    plant(monkeypatch)
    checks = run(runs=0, text_bytes=1500, document_bytes=150).checks if part == "text" else simulated(part, record)
    for start in starts:
        chosen = {name: held for name, held in checks.items() if name.startswith(start)}
        assert chosen, start
        assert not any(chosen.values()), chosen
    if plant is not swapped_components:
        assert sum(not held for held in checks.values()) == len(starts) or plant is narrow_intervals


def simulated(part: str, record: Record) -> dict[str, bool]:
    """The checks of the simulated part, of which one part is computed again."""
    config = tiny.config("weights")
    again: dict[str, Callable[[], Any]] = {
        "coverage": lambda: [row for case in weights.CASES for row in weights._coverage(case, config)],
        "alike": lambda: [weights._alike(difference, config) for difference in weights._DIFFERENCES],
        "solvers": lambda: weights._solvers(config),
    }
    recorder = weights.Recorder(weights.NAME, weights.TITLE, config)
    weights._check_simulated(recorder, {**record.results, part: again[part]()})
    checks: dict[str, bool] = recorder.checks
    return checks


@pytest.mark.parametrize(
    ("margin", "verdict", "held"), [(10.0, "refuted as stated", False), (1e-9, "not testable here", True)]
)
def test_domains_that_are_one_do_not_move(
    margin: float, verdict: str, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = weights.held_out

    def one_domain(text_bytes: int, document_bytes: int) -> list[Document]:
        prose = [d.content for d in original(2 * text_bytes, document_bytes) if d.domain == "prose"]
        mixed = [d for d in original(text_bytes, document_bytes) if d.domain == "mixed"]
        return [Document(("prose", "code")[i % 2], text) for i, text in enumerate(prose)] + mixed

    monkeypatch.setattr(weights, "held_out", one_domain)
    monkeypatch.setattr(weights, "_MARGINS", {"weight": margin, "nll": margin})
    found = run(runs=0)
    assert found.findings[0].verdict == verdict
    assert found.findings[0].held == held
    caption = scripts.load("figures", "weights").draw(found, tmp_path).caption
    assert caption.startswith("The best λ is not seen to move")


def test_components_that_were_not_made_for_the_domains_refute_nothing() -> None:
    assert weights._verdict(False, 0.001, 0.01, specialised=True)["verdict"] == "refuted as stated"
    assert weights._verdict(False, 0.001, 0.01, specialised=False)["verdict"] == "not testable here"
    assert weights._verdict(True, 0.1, 0.01, specialised=False)["verdict"] == "reproduced at small scale"


def test_one_model_under_two_prompts_states_its_weights_without_a_verdict() -> None:
    found = run(models=("bundled:prose",), runs=0)
    assert not found.findings
    stated = [name for name in found.checks if "under 2 prompts" in name]
    assert len(stated) == 1
    assert "seen to move" in stated[0]


def test_one_model_under_two_prompts_or_three_models_have_names() -> None:
    assert weights.component_names(SIBLINGS, 2) == ["prose", "code"]
    assert weights.component_names(("smollm2-135m",), 2) == ["prompt 1", "prompt 2"]


def test_three_components_are_drawn_as_dots(record: Record, tmp_path: Path) -> None:
    results = json.loads(json.dumps(record.results))
    results["components"] = ["a", "b", "c"]
    results["curves"] = dict.fromkeys(results["curves"])
    for fit in results["fits"].values():
        fit["weights"], fit["intervals"] = [0.2, 0.3, 0.5], [[0.1, 0.3], [0.2, 0.4], [0.4, 0.6]]
    del results["coverage"]
    drawn = scripts.load("figures", "weights").draw(dataclasses.replace(record, results=results), tmp_path)
    assert read_data(drawn.image)["caption"] == drawn.caption
    assert "Simulated" not in drawn.caption


def test_progress_goes_forward() -> None:
    seen: list[float] = []
    weights.run(
        tiny.config("weights", text_bytes=1500, document_bytes=150, runs=2, solver_tokens=2000),
        lambda fraction, note: seen.append(fraction),
    )
    assert seen == sorted(seen)
    assert len(seen) == 6
    assert math.isclose(seen[0], 0)
