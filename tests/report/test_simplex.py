"""Pictures of a sweep: what is drawn where, and that every label is readable inside the page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.report.simplex import CORNERS, LABELS, barycentric, draw_line, draw_ternary, sweep_figure
from me_stats.report.style import COLORS, figure, read_data, save
from me_stats.sweep import Sweep, simplex_grid, sweep


@cache
def small(count: int, *, infinite: bool = False) -> Sweep:
    toys = [TableModel.random(4, seed=seed, eos=(3,)) for seed in range(count)]
    corpus = np.log(np.random.default_rng(0).uniform(0.1, 0.9, size=(40, count)))
    if infinite:
        corpus[0, 0] = -np.inf
    ensemble = Ensemble(toys, ConstantMixing(np.full(count, 1 / count)))
    return sweep(ensemble, [0], simplex_grid(count, 4), n=100, max_new_tokens=6, corpus=corpus)


def test_corners_are_the_components() -> None:
    assert barycentric(np.eye(3)) == pytest.approx(CORNERS)
    sides = [np.linalg.norm(CORNERS[i] - CORNERS[i - 1]) for i in range(3)]
    assert sides == pytest.approx([1, 1, 1])


def test_line_marks_draws_and_the_reference() -> None:
    found = small(2)
    _, ax = figure()
    draw_line(ax, found, "length", components=["prose", "code"])
    assert ax.get_xlabel() == "weight of prose"
    assert ax.get_title(loc="left") == LABELS["length"]
    reference, line, moved, drawn = ax.get_lines()
    assert reference.get_xdata()[0] == 0.5
    assert line.get_xdata().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    at = {point.weights[0]: point for point in found.points}
    assert line.get_ydata().tolist() == [at[x].estimates["length"].value for x in line.get_xdata()]
    assert set(drawn.get_xdata()) == {x for x, point in at.items() if point.drawn}
    assert len(moved.get_xdata()) + len(drawn.get_xdata()) == 5
    assert drawn.get_color() == COLORS["ME"]


@pytest.mark.parametrize("count", [2, 3])
def test_a_page_holds_every_estimate(count: int, tmp_path: Path) -> None:
    found = small(count)
    names = [f"model {i}" for i in range(count)]
    fig = sweep_figure(found, components=names)
    titles = [ax.get_title(loc="left") for ax in fig.axes if ax.get_title(loc="left")]
    assert titles == [LABELS[name] for name in found.names]
    if count == 3:
        written = [text.get_text() for ax in fig.axes for text in ax.texts]
        assert all(written.count(name) == len(titles) for name in names)
    fig.canvas.draw()
    page = fig.bbox
    for ax in fig.axes:
        for text in ax.texts:
            box = text.get_window_extent()
            assert page.x0 <= box.x0 <= box.x1 <= page.x1
            assert page.y0 <= box.y0 <= box.y1 <= page.y1
    _, png = save(fig, tmp_path / "sweep", {"caption": "A sweep."})
    assert read_data(png) == {"caption": "A sweep."}
    with Image.open(png) as image:
        assert image.width == pytest.approx(6.75 * 216, abs=1)


def test_a_constant_is_drawn_too() -> None:
    found = small(3)
    flat = Sweep(
        found.reference,
        tuple(
            type(point)(
                point.weights, point.source, 1.0, {"length": found.points[0].estimates["length"]}, {}, point.cost
            )
            for point in found.points
        ),
        100, 6, 0, 0.1, 0.25,
    )  # fmt: skip
    fig, ax = figure()
    draw_ternary(ax, flat, "length")
    fig.canvas.draw()
    assert any("everywhere" in text.get_text() for text in ax.texts)
    assert len(fig.axes) == 1  # nothing for a colour bar to tell


def test_what_cannot_be_drawn_is_refused() -> None:
    _, ax = figure()
    with pytest.raises(ValueError, match="has 3 components"):
        draw_line(ax, small(3), "length")
    with pytest.raises(ValueError, match="has 2 components"):
        draw_ternary(ax, small(2), "length")
    with pytest.raises(ValueError, match="name must be one of"):
        draw_line(ax, small(2), "perplexity")
    with pytest.raises(ValueError, match="nll is infinite"):
        draw_ternary(ax, small(3, infinite=True), "nll")
    assert LABELS["nll"] not in {a.get_title(loc="left") for a in sweep_figure(small(3, infinite=True)).axes}
    with pytest.raises(ValueError, match="1 components has no picture"):
        sweep_figure(small(1))
    found = small(3)
    edge = Sweep(found.reference, tuple(p for p in found.points if p.weights[0] == 0), 100, 6, 0, 0.1, 0.25)
    with pytest.raises(ValueError, match="not on one line"):
        draw_ternary(ax, edge, "length")
