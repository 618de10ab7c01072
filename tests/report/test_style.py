"""Figures: fixed sizes, embedded fonts, the same bytes twice, and captions that travel inside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from me_stats.record import Record
from me_stats.report import Figure, figures_of, style

DRAW = """
import sys
from pathlib import Path
from me_stats.report import style
fig, axes = style.figure(columns=2, ncols=2)
axes[0].semilogy([1, 2, 3], [1e-16, 1e-8, 1.0], color=style.COLORS["ME"], marker=style.MARKERS["ME"], label="λ")
axes[0].set_xlabel("lag $L$ 10⁻³")
axes[0].legend()
axes[1].bar([1, 2], [3, 4], color=style.COLORS["CE"])
style.save(fig, Path(sys.argv[1]), {"caption": "One – λ. Two.", "key": "abc"})
"""


def draw(stem: Path, data: dict | None = None) -> list[Path]:
    fig, axes = style.figure()
    axes.plot([1, 2], [3, 4], color=style.COLORS["CE"])
    return style.save(fig, stem, data)


def test_save_writes_both_files_at_the_column_width(tmp_path: Path) -> None:
    pdf, png = draw(tmp_path / "new" / "floor-1.5b")
    assert (pdf.name, png.name) == ("floor-1.5b.pdf", "floor-1.5b.png")
    content = pdf.read_bytes()
    assert b"/FontFile2" in content  # TrueType, embedded: what fonttype 42 asks for
    assert b"/Type3" not in content
    assert b"CreationDate" not in content
    with Image.open(png) as image:
        assert image.width == round(3.25 * style.SCREEN_DPI)
    assert sorted(path.name for path in pdf.parent.iterdir()) == [pdf.name, png.name]


@pytest.mark.parametrize(("columns", "width"), [(1, 3.25), (2, 6.75)])
def test_figure_sizes(columns: int, width: float) -> None:
    fig, _ = style.figure(columns=columns, height=1.5)
    assert fig.get_size_inches().tolist() == [width, 1.5]


def test_bytes_depend_on_nothing_but_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, hash seed, backend setting and user's matplotlibrc: the same bytes, and no warning."""
    rc = tmp_path / "matplotlibrc"
    rc.write_text("font.size: 20\npdf.fonttype: 3\nlines.linewidth: 9\n")
    env = {**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "tkagg", "MATPLOTLIBRC": str(rc), "DISPLAY": ""}
    subprocess.run([sys.executable, "-W", "error", "-c", DRAW, str(tmp_path / "there")], check=True, env=env)
    monkeypatch.setattr(sys, "argv", ["draw", str(tmp_path / "here")])
    exec(DRAW, {})
    for kind in ("pdf", "png"):
        assert (tmp_path / f"here.{kind}").read_bytes() == (tmp_path / f"there.{kind}").read_bytes()


def test_caption_and_source_travel_in_the_png(tmp_path: Path) -> None:
    paths = draw(tmp_path / "floor", {"caption": "The floor – 10⁻¹⁶. More.", "record": "floor", "seed": 3})
    assert style.read_data(paths[1]) == {"caption": "The floor – 10⁻¹⁶. More.", "record": "floor", "seed": 3}
    record = Record("floor", "Floor", "k", {}, (), {}, {}, (), {}, 1.0, "2026-01-01T00:00:00+00:00")
    assert figures_of(record, {"floor": paths}) == (Figure(tuple(paths), "The floor – 10⁻¹⁶. More."),)


def test_the_png_has_few_colours_and_all_of_them_right(tmp_path: Path) -> None:
    """Every colour with a meaning survives beside a picture of thousands of shades."""
    fig, (shades, lines) = style.figure(columns=2, ncols=2)
    shades.imshow([[row * column for column in range(60)] for row in range(60)], cmap="viridis")
    for place, color in enumerate(style.COLORS.values()):
        lines.plot([0, 1], [place, place], color=color, linewidth=4)
    with Image.open(style.save(fig, tmp_path / "figure")[1]) as image:
        assert image.mode == "P"
        counts = [color for _, color in image.convert("RGB").getcolors(256)]
    for color in style.COLORS.values():
        own = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        assert any(max(abs(a - b) for a, b in zip(own, seen, strict=True)) <= 8 for seen in counts), color


def test_png_from_elsewhere_has_no_data(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    assert style.read_data(tmp_path / "plain.png") == {}


def test_save_closes_the_figure(tmp_path: Path) -> None:
    fig, axes = style.figure()
    axes.plot([0, 1])
    style.save(fig, tmp_path / "figure")
    assert fig.axes == []


def test_a_failed_save_leaves_the_old_figure(tmp_path: Path) -> None:
    before = [path.read_bytes() for path in draw(tmp_path / "figure")]
    fig, axes = style.figure()
    axes.plot([0, 1])
    with pytest.raises(ValueError, match="NaN"):
        style.save(fig, tmp_path / "figure", {"tv": float("nan")})
    assert [(tmp_path / f"figure.{kind}").read_bytes() for kind in ("pdf", "png")] == before


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="columns"):
        style.figure(columns=3)
    with pytest.raises(ValueError, match="height"):
        style.figure(height=0.0)


def test_meanings_have_their_own_colour_and_marker() -> None:
    assert len(set(style.COLORS.values())) == len(style.COLORS)
    assert len(set(style.MARKERS.values())) == len(style.MARKERS)
    assert all(name in style.COLORS for name in style.MARKERS)
    style.figure()
    assert matplotlib.rcParams["font.size"] == 8
