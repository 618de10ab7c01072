"""C10: the audit of the paper's tables holds on right code, and fails when its statistics or its table are wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import audit as library
from me_stats import scripts
from me_stats.record import Record
from me_stats.report.style import read_data

audit = scripts.load("experiments", "audit")
TINY: dict[str, Any] = {"tables": 3000}


@cache
def record() -> Record:
    found: Record = audit.run(audit.Config(**TINY))
    return found


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert len(found.checks) == 11
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == found


def test_the_finding_gives_size_power_and_bound() -> None:
    (finding,) = record().findings
    assert (finding.claim, finding.verdict, finding.held, finding.tv_upper) == ("C10", "refuted as stated", True, None)
    assert "Σz² = 58.95 on 32, p = 0.0026" in finding.statistic
    assert "z = +4.9 (MMLU, k = 10, 66.67 against 67.90)" in finding.statistic
    assert "gaps of up to 2.6 points in a cell are not excluded" in finding.bound
    assert re.search(r"effect of \d.*power 0.8", finding.caveat)
    assert "accuracies never bound TV from above" in finding.caveat
    assert "without MMLU (p = 0.72) nothing stands out; the cell does down to 5,822 items" in finding.caveat
    assert finding.n == "32 cells, 5 runs of 1,172 to 14,042 items"


def test_rates_power_and_the_second_table() -> None:
    results = record().results
    assert results["rates"]["alike"]["too far apart"] == pytest.approx(0.05, abs=0.02)
    # Why "too close" says little: items that are sure look like it.
    assert results["rates"]["unlike"]["too close"] > 0.5
    assert results["rates"]["unlike"]["too far apart"] < 0.01
    assert {row["dataset"] for row in results["power"]} == {"GSM8K", "MMLU", "BBH", "ARC"}
    assert results["other"]["methods"] == ["ArS", "SpS"]
    assert "All 2 values can be means of 1 run over 164 HumanEval items" in results["other_paragraph"]
    assert set(results["sources"]) == {"paper_tables.csv", "speculative_sampling.csv"}


def test_where_nothing_stands_out_equality_is_still_not_shown() -> None:
    found = audit.run(audit.Config(tables=3000, items=(("GSM8K", 300), ("MMLU", 300), ("BBH", 300), ("ARC", 300))))
    (finding,) = found.findings
    assert finding.verdict == "not testable here"
    assert "nothing stands out" not in finding.caveat
    assert "an independent count" not in " ".join(found.checks)


def test_progress_goes_forward_and_a_seed_makes_the_same_again() -> None:
    seen: list[tuple[float, str]] = []
    again = audit.run(audit.Config(**TINY), lambda fraction, note: seen.append((fraction, note)))
    assert again.results == record().results
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert all(note for _, note in seen)
    assert audit.run(audit.Config(**TINY, seed=1)).results["rates"] != record().results["rates"]


# Planted errors


def one_sided_noise(patch: pytest.MonkeyPatch) -> None:
    """The variance of one method in place of that of a difference."""
    honest = library.gap_scores

    def small(*args: Any, **options: Any) -> Any:
        difference, stderr = honest(*args, **options)
        return difference, stderr / np.sqrt(2)

    for module in (library, audit):
        patch.setattr(module, "gap_scores", small)


def no_runs(patch: pytest.MonkeyPatch) -> None:
    """One run where there were five."""
    honest = library.gap_scores

    def wide(first: Any, second: Any, items: Any, runs: Any, **options: Any) -> Any:
        return honest(first, second, items, np.ones_like(runs), **options)

    for module in (library, audit):
        patch.setattr(module, "gap_scores", wide)


def uncorrected(patch: pytest.MonkeyPatch) -> None:
    """Every cell on its own."""
    for module in (library, audit):
        patch.setattr(module, "holm", np.asarray)


def blind_to_slips(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(library, "find_slips", lambda table: ((), 64))


FAR, CLOSE, CELL = (f"“{name}” is said" for name in ("too far apart", "too close", "a cell"))
CAUGHT: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    one_sided_noise: ("Σz² of the printed table", FAR, "a gap of the smallest visible size"),
    no_runs: ("Σz² of the printed table", FAR, CLOSE, "a gap of the smallest"),
    uncorrected: ("a cell stands out of equal accuracies no more often",),
    blind_to_slips: ("the printed table has one arithmetic slip",),
}


@pytest.mark.parametrize("plant", CAUGHT, ids=lambda plant: plant.__name__)
def test_a_planted_error_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = failed(audit.run(audit.Config(**TINY)))
    for start in CAUGHT[plant]:
        assert any(name.startswith(start) for name in found), (start, found)


def test_a_table_that_was_changed_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in audit.DATA.glob("*.csv"):
        shutil.copy(path, tmp_path)
    changed = tmp_path / "paper_tables.csv"
    changed.write_text(changed.read_text(encoding="utf-8").replace("47.33", "47.94"), encoding="utf-8")
    monkeypatch.setattr(audit, "DATA", tmp_path)
    found = failed(audit.run(audit.Config(**TINY)))
    assert [name.split(" of ")[0].split(" has ")[0] for name in found] == ["Σz²", "the printed table"]


# The figure


def test_the_figure_is_drawn_from_the_record(tmp_path: Path) -> None:
    script = scripts.load("figures", "audit")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["audit.pdf", "audit.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert figure.caption.startswith("The printed accuracies of CE and ME scatter more")
    assert "One cell stands out (MMLU, k = 10, z = +4.9)." in figure.caption
    assert 100 < len(figure.caption) < 600
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]


def test_captions_of_other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts.load("figures", "audit")
    monkeypatch.setattr(script, "save", lambda fig, stem, data: [stem.with_suffix(".png")])

    def caption(change: Callable[[dict[str, Any]], None]) -> str:
        results = json.loads(json.dumps({"audit": record().results["audit"]}))
        change(results["audit"])
        drawn = script.draw(Record.load(saved(results, tmp_path)), tmp_path)
        assert 100 < len(drawn.caption) < 600
        return str(drawn.caption)

    def quiet(found: dict[str, Any]) -> None:
        found["cells"] = found["cells"][:1]
        found["blocks"], found["without"] = found["blocks"][:1], []
        found["blocks"][0] |= {"p_large": 0.4, "p_small": 0.6}

    def close(found: dict[str, Any]) -> None:
        found["blocks"][0] |= {"p_large": 1.0, "p_small": 1e-4, "statistic": 0.0}
        found["noise"] = 0.5
        for cell in found["cells"]:
            cell["k"] = ""

    def many(found: dict[str, Any]) -> None:
        found["cells"] = [cell | {"group": f"group {i}", "holm": 0.01} for i, cell in enumerate(found["cells"] * 5)]

    assert "scatter as equal accuracies do" in caption(quiet)
    assert "lie closer than independent runs leave them" in caption(close)
    assert "0.5 of the largest" in caption(close)
    assert "of 160 that do" in caption(many)


def saved(results: dict[str, Any], folder: Path) -> Path:
    path = folder / "changed.json"
    record().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"results": results}), encoding="utf-8")
    return path
