"""paper_repro.md and the committed figures say what the committed records say."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from me_stats import reproduce
from me_stats.cli import app
from me_stats.record import Record
from me_stats.report.style import read_data

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "experiments" / "results", ROOT / "figures"
STALE = "the records have changed: run 'make figures' and commit what it writes"


def records() -> list[Record]:
    return [Record.load(path) for path in sorted(RESULTS.glob("*.json"))]


def committed(record: Record) -> list[Path]:
    return [FIGURES / f"{record.name}.{kind}" for kind in ("pdf", "png")]


def test_paper_repro_is_what_the_records_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`me-stats report --paper` on the committed records, with the committed figures in place of new ones."""
    monkeypatch.setattr(reproduce, "draw_figures", lambda records, _: {r.name: committed(r) for r in records})
    paper = tmp_path / "paper_repro.md"
    result = CliRunner().invoke(app, ["report", str(RESULTS), "--out", str(tmp_path / "out"), "--paper", str(paper)])
    assert result.exit_code == 0, result.output
    # Not one assert of two long texts: pytest would spend minutes on their difference.
    new, old = paper.read_text().splitlines(), (ROOT / "paper_repro.md").read_text().splitlines()
    changed = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
    assert not changed, f"{STALE}; first of {len(changed)} lines: {changed[0]}"
    assert len(old) == len(new), STALE


def test_each_record_has_its_figure_and_each_figure_its_record() -> None:
    drawn = {path for record in records() for path in committed(record)}
    assert drawn == {path for path in FIGURES.iterdir() if path.suffix in (".pdf", ".png")}, STALE


def test_figures_carry_the_key_of_their_record() -> None:
    """The key is that of the configuration; captions are compared above, in the text that quotes them."""
    stale = [r.name for r in records() if read_data(FIGURES / f"{r.name}.png").get("key") != r.key]
    assert not stale, f"{STALE}: {stale}"
