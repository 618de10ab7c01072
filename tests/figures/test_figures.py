"""Figures: drawn from a record alone, in two formats, with the same bytes every time."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from me_stats import scripts
from me_stats.record import Record, plain
from me_stats.report import Figure, style
from me_stats.report.style import read_data
from tests import tiny

NAMES = list(tiny.OPTIONS)


def loaded(name: str, folder: Path) -> Record:
    """The tiny record as a report gets it: read from a file."""
    path = folder / f"{name}.json"
    tiny.record(name).save(path)
    return replace(Record.load(path), name=f"{name}-siblings")


def draw(name: str, record: Record, folder: Path) -> Figure:
    figure: Figure = scripts.load("figures", name).draw(record, folder)
    return figure


@pytest.mark.parametrize("name", NAMES)
def test_two_formats_one_caption_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = loaded(name, tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a figure ran an experiment")

    monkeypatch.setattr(tiny.experiment(name), "run", refuse)
    figure = draw(name, record, tmp_path / "one")
    assert [path.name for path in figure.paths] == [f"{name}-siblings.pdf", f"{name}-siblings.png"]
    pdf, png = (path.read_bytes() for path in figure.paths)
    assert pdf.startswith(b"%PDF-")
    assert png.startswith(b"\x89PNG")
    assert min(len(pdf), len(png)) > 5_000
    assert read_data(figure.image) == {"caption": figure.caption, "key": record.key}
    again = draw(name, record, tmp_path / "two")
    assert (again.caption, *(path.read_bytes() for path in again.paths)) == (figure.caption, pdf, png)


def caption(name: str, record: Record, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The caption alone; drawing is slow, and files are tested above."""
    module = scripts.load("figures", name)
    monkeypatch.setattr(module, "save", lambda fig, stem, data: [stem.with_suffix(".png")])
    return draw(name, record, folder).caption


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_sentences_that_start_with_the_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = caption(name, loaded(name, tmp_path), tmp_path, monkeypatch)
    assert text.endswith(".")
    assert 100 < len(text) < 600
    assert re.search(r"\d", text)
    assert not re.search(r"nan|inf\b|None|  ", text)


def other(change: Callable[[dict[str, Any]], None], record: Record) -> Record:
    results = plain(record.results)
    change(results)
    return replace(record, results=results)


def test_per_step_counts_the_planted_errors_that_were_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = loaded("per_step", tmp_path)
    assert "rejected at 1 of 1 prompts" in caption("per_step", record, tmp_path, monkeypatch)

    def missed(results: dict[str, Any]) -> None:
        results["rows"][0]["planted"]["pvalue"] = 0.5
        results["rows"][0]["ME"]["tv_upper"] = 0.125

    text = caption("per_step", other(missed, record), tmp_path, monkeypatch)
    assert "rejected at 0 of 1 prompts" in text
    assert "within TV 0.1250" in text


def test_sequences_says_who_was_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = loaded("sequences", tmp_path)
    assert "no test rejects CE or ME" in caption("sequences", record, tmp_path, monkeypatch)

    def rejected(results: dict[str, Any]) -> None:
        results["tests"]["ME"]["pvalue"] = 0.0
        results["tests"]["sequence mixture"]["pvalue"] = 0.0
        for result in results["tests"]["ME"]["results"]:
            result["pvalue"], result["detects"] = 0.0, "inf"

    text = caption("sequences", other(rejected, record), tmp_path, monkeypatch)
    assert "the tests reject ME" in text
    assert "p below 1e-299" in text


def test_exact_zeros_and_failures_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(results: dict[str, Any]) -> None:
        for row in results["rows"]:
            row["tv_me"], row["tv_ce"] = 0.0, 0.0

    record = other(exact, loaded("toy_equivalence", tmp_path))
    assert "off by at most 0.0e+00" in caption("toy_equivalence", record, tmp_path, monkeypatch)

    def far(results: dict[str, Any]) -> None:
        results["rows"][0]["tv_me"] = 0.4

    assert "off by at most 4.0e-01" in caption("toy_equivalence", other(far, record), tmp_path, monkeypatch)

    def flat(results: dict[str, Any]) -> None:
        results["floor"] = 0.0

    record = other(flat, loaded("transform_order", tmp_path))
    assert "agree to 1e-09" in caption("transform_order", record, tmp_path, monkeypatch)


def test_one_model_and_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_model(results: dict[str, Any]) -> None:
        results["rows"] = results["rows"][:1]

    record = other(one_model, loaded("cache_floor", tmp_path))
    text = caption("cache_floor", record, tmp_path, monkeypatch)
    assert "float32" in text
    assert "bfloat16" not in text

    def one_batch(results: dict[str, Any]) -> None:
        results["rows"] = [row for row in results["rows"] if row["batch"] == 64]
        results["batch_gain"] = None

    text = caption("generation", other(one_batch, loaded("generation", tmp_path)), tmp_path, monkeypatch)
    assert text.startswith("CE and ME at batch 64 (bundled siblings")


def test_every_experiment_has_a_figure_of_its_name() -> None:
    folder = Path(scripts.load("figures", "per_step").__file__).parent  # type: ignore[arg-type]
    assert {path.stem for path in folder.glob("*.py")} == set(NAMES)


# --- the figures of the repository --------------------------------------------------------------------------------

COMMITTED = sorted((Path(__file__).parents[2] / "figures").glob("*.pdf"))


def streams(content: bytes) -> bytes:
    """The drawing commands of a PDF file: its compressed streams, unpacked, fonts left out."""
    found = re.findall(rb"<<(?:(?!>>).)*?/FlateDecode.*?>>\s*stream\r?\n(.*?)\r?\nendstream", content, flags=re.S)
    unpacked = [zlib.decompressobj().decompress(part) for part in found]
    return b"\n".join(part for part in unpacked if b" Tf" in part)


def font_sizes(content: bytes) -> set[float]:
    """Points of all text; sizes next to one of 10/7 times theirs are superscripts, which follow it."""
    sizes = {float(size) for size in re.findall(rb"/F\S* ([\d.]+) Tf", streams(content))}
    return {size for size in sizes if not any(abs(size - 0.7 * other) < 1e-3 for other in sizes)}


def faults(pdf: bytes) -> list[str]:
    """What breaks the style of all figures in a PDF file."""
    found = []
    boxes = [[float(x) for x in box.split()] for box in re.findall(rb"/MediaBox \[([^]]+)\]", pdf)]
    if [round((right - left) / 72, 2) for left, _, right, _ in boxes] not in ([3.25], [6.75]):
        found.append(f"width is not that of one or two columns: {boxes}")
    if b"/Type3" in pdf or pdf.count(b"/FontFile2") < max(1, len(re.findall(rb"/Type /FontDescriptor", pdf))):
        found.append("a font is not embedded as TrueType")
    small = sorted(size for size in font_sizes(pdf) if size < 6)
    if small or not font_sizes(pdf):
        found.append(f"text of {small} points")
    return found


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures_keep_the_style(path: Path) -> None:
    assert faults(path.read_bytes()) == []
    image = path.with_name(f"{path.stem}.png")
    with Image.open(image) as picture:
        assert picture.width in {round(width * style.SCREEN_DPI) for width in style.WIDTHS.values()}
    assert read_data(image)["caption"].endswith(".")


def test_a_figure_out_of_style_is_found(tmp_path: Path) -> None:
    fig, axes = style.figure()
    axes.text(0.5, 0.5, "small", fontsize=5)
    fig.set_size_inches(4, 2)
    pdf, _ = style.save(fig, tmp_path / "odd")
    wide, small = faults(pdf.read_bytes())
    assert "width" in wide
    assert small == "text of [5.0] points"


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_made_by_the_shared_style(name: str) -> None:
    """No figure of its own making: `style.figure` sets fonts and width, `style.save` both formats and the caption."""
    source = Path(str(scripts.load("figures", name).__file__)).read_text()
    assert re.search(r"\bfigure\(columns=[12]|\bfigure\(\s*columns=|sweep_figure\(", source)
    assert re.search(r"\bsave\(fig", source)
    assert not re.search(r"pyplot|usetex|savefig|plt\.|\"(?:red|green|lime)\"", source)
